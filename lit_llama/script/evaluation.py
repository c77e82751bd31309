"""The options that evaluations share, each declared once: the model, how it is asked, the judge.

A script whose `main` hands its `**options` on to one of these functions has that function's options.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from lit_llama.adapters import adapter_file
from lit_llama.base import Base
from lit_llama.checkpoint import read_config
from lit_llama.evaluation.answers import ANSWERS, QUESTIONS, Question, answer_questions, read_answers, write_questions
from lit_llama.evaluation.judging import Case, Judge, estimate, judge_all
from lit_llama.prompts import CHAT_STYLES
from lit_llama.script.opening import open_model
from lit_llama.together import read_adapters, scales_of

Answers = dict[int | str, list[str]]  # by the question's id, a text for each turn


def evaluated_model(
    adapter_path: list[Path] | None = None, adapter_scale: list[float] | None = None, **options: Any
) -> Base:
    """Open the model that is evaluated: a base model, perhaps with adapters that are added up.

    Args:
        adapter_path: file or run folder of an adapter of any method; may be given several times, to add up adapters.
        adapter_scale: number that the adapter is multiplied by; may be given once for each adapter. 1 if not given.
        options: how the base model is opened, see `open_model`.
    """
    return open_model(adapter_path, adapter_scale, compile=False, **options)


def task_model(chat_template: bool, **options: Any) -> Base:
    """Open a model for tasks, whose prompts are those of the task, perhaps in the model's chat format.

    Args:
        chat_template: whether they are.
        options: see `evaluated_model`.

    Raises:
        ValueError: as `evaluated_model`; or a prompt style is asked for which no prompt would be written in.
    """
    if not chat_template:
        refuse_style(options, "a task writes its prompts itself, unless --chat_template is given")
    elif options.get("prompt_style") not in (None, *CHAT_STYLES):
        refuse_style(options, "--chat_template writes prompts in the model's own chat format")
    return evaluated_model(**options)


def refuse_style(options: Mapping[str, Any], why: str) -> None:
    """Refuse the options that say how a prompt is written.

    Raises:
        ValueError: one of them is given.
    """
    given = [f"--{name} {options[name]}" for name in ("prompt_style", "thinking") if options.get(name) is not None]
    if given:
        raise ValueError(f"{' and '.join(given)} would change nothing: {why}")


def ask(
    mixtures: Mapping[str, Mapping[Path, float]],
    questions: Sequence[Question],
    out_dir: Path,
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 1337,
    batch_size: int = 16,
    checkpoint_dir: Path = Path("checkpoints/SmolLM2-135M-Instruct"),
    **options: Any,
) -> tuple[dict[str, Base], dict[str, Answers]]:
    """Let several models with one base answer questions, and keep each answer in `out_dir` as soon as it is there.

    Args:
        mixtures: the models by name: their adapters with their scales; none for the base model alone.
        questions: what is asked; only what is not answered yet by this model with these settings.
        out_dir: folder of questions and answers, in FastChat's layout.
        max_new_tokens: length of the longest answer, in tokens.
        temperature: randomness of sampling; 0 always takes the likeliest token.
        seed: seed of sampling.
        batch_size: number of prompts answered at once.
        checkpoint_dir: folder of the base model.
        options: how the base model is opened, see `open_model`.

    Returns:
        The models, and their answers, by name.
    """
    if batch_size < 1:
        raise ValueError(f"--batch_size is {batch_size}, it must be at least 1")
    paths = list(dict.fromkeys(path for mixture in mixtures.values() for path in mixture))
    adapters = dict(zip(paths, read_adapters(paths, read_config(checkpoint_dir)), strict=True))
    base = open_model(list(adapters.values()), None, compile=False, checkpoint_dir=checkpoint_dir, **options)
    write_questions(out_dir / QUESTIONS, questions)
    models, answers = {}, {}
    for name, mixture in mixtures.items():
        used = [adapters[path] for path in mixture]
        models[name] = base.with_adapter(used or None, list(mixture.values()) or None)
        file = out_dir / ANSWERS / f"{name}.jsonl"
        sampling: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
        answer_questions(models[name], name, questions, file, batch_size=batch_size, **sampling)
        answers[name] = read_answers(file)
    return models, answers


def mixture(paths: Sequence[Path], scales: Sequence[float] | None) -> dict[Path, float]:
    """Adapters that are added up, each with the number that it is multiplied by.

    Args:
        paths: files, or folders of runs.
        scales: one for each, or one for all; if None, 1.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: an adapter is given twice, or the numbers do not go with them.
    """
    files = [adapter_file(path) for path in paths]
    if len(set(files)) < len(files):
        raise ValueError("an adapter is given twice: give it once, with the sum of its scales")
    return dict(zip(files, scales_of(scales, len(files)), strict=True))


def column_names(paths: Sequence[Path], *taken: str) -> dict[str, Path]:
    """Adapters by a name for each: that of their run's folder, or the whole path where two would have the same.

    Args:
        paths: files, or folders of runs.
        taken: names that none may have.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: an adapter is given twice.
    """
    files = [adapter_file(path) for path in paths]
    names = [file.absolute().parent.name or file.stem for file in files]
    named: dict[str, Path] = {}
    for name, file in zip(names, files, strict=True):
        if names.count(name) > 1 or name in taken:
            name = "-".join(part for part in file.with_suffix("").parts if part not in ("/", "..", "."))
        if name in named:
            raise ValueError(f"{file} is given twice")
        named[name] = file
    return named


def judged(
    judge_model: str,
    cases: Mapping[Path, Sequence[Case]],
    read: Callable[[str], Any],
    *,
    dry_run: bool = False,
    temperature: float | Literal["none"] = 0.7,
    max_tokens: int = 512,
    workers: int = 4,
    requests_per_minute: float | None = None,
    timeout: float = 60.0,
    retries: int = 6,
    input_price: float = 0.0,
    output_price: float = 0.0,
) -> dict[Path, list[tuple[Case, Any]]] | None:
    """Say on stderr what judging will take, then have cases judged.

    Args:
        judge_model: name of the judge at the endpoint.
        cases: what is judged, by the file of its judgements.
        read: see `lit_llama.evaluation.judging.judge_all`.
        dry_run: say how many requests and tokens it would take, and send nothing.
        temperature: randomness of the judge; repeats need one above 0. "none" leaves it to the endpoint; it is also
            left out where the endpoint refuses it.
        max_tokens: length of the longest judgement, in tokens; a judge that thinks first needs thousands, as its
            thoughts count.
        workers: number of requests that are sent at once.
        requests_per_minute: number of requests that the endpoint allows in a minute; if not given, requests are sent as
            fast as answers come.
        timeout: number of seconds after which a request is given up and sent again.
        retries: number of times that a failed request is sent again, with growing pauses.
        input_price: price of a million tokens that the judge reads, in US dollars, for the estimate.
        output_price: price of a million tokens that it writes.

    Returns:
        Each case with its verdict, None where none could be read, by file; None for a dry run.

    Raises:
        ValueError: the endpoint refuses, cannot be reached or keeps failing, or no judgement in a file can be read.
    """
    sampled = None if temperature == "none" else temperature
    judge = Judge(judge_model, sampled, max_tokens, workers, requests_per_minute, timeout, retries)
    for path, some in cases.items():
        print(f"{path.stem}: {estimate(some, path, judge, input_price, output_price)}", file=sys.stderr)
    if dry_run:
        return None
    found = {path: judge_all(some, path, judge, read) for path, some in cases.items()}
    for path, verdicts in found.items():
        if all(verdict is None for _, verdict in verdicts):
            raise ValueError(
                f"no judgement could be read, see {path}: does {judge_model} follow instructions, "
                "and is --max_tokens enough for it?"
            )
    return found
