"""What the scripts that generate share: prompts in, answers out.

The answers go to stdout as they come, everything else to stderr.
"""

import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

from lit_llama.evaluation.answers import as_question, prompt_rows
from lit_llama.files import atomic_file
from lit_llama.sampling import GREEDY_BELOW
from lit_llama.script.command_line import peak_memory


class Prompt(NamedTuple):
    """What a user says, and who is to answer.

    Args:
        instruction: the prompt.
        input: what it is about, for styles that keep it apart.
        adapter: name of an adapter in a folder of them.
    """

    instruction: str
    input: str = ""
    adapter: str | None = None


def read_prompts(prompt: list[str] | None, prompts_file: Path | None) -> list[Prompt]:
    """The prompts of a generation script: its `--prompt` options, a file, or standard input.

    Args:
        prompt: texts given on the command line.
        prompts_file: see `lit_llama.evaluation.answers.prompt_rows`; an object may name its `adapter`.

    Raises:
        ValueError: there is no prompt, or there are prompts from two places, or one of several turns.
    """
    if prompt and prompts_file:
        raise ValueError("give --prompt or --prompts_file, not both")
    if prompt:
        return [Prompt(text) for text in prompt]
    if prompts_file is None:
        if sys.stdin.isatty():
            raise ValueError("no prompt: give --prompt, --prompts_file, or text on standard input")
        text = sys.stdin.read().strip()
        if not text:
            raise ValueError("no prompt: standard input is empty")
        return [Prompt(text)]
    prompts = []
    for place, row in prompt_rows(prompts_file):
        question = as_question(place, row, len(prompts))
        if len(question.turns) > 1:
            raise ValueError(f"{place}: a question of {len(question.turns)} turns, and this script answers one: "
                             "evaluate/vicuna.py and evaluate/side_by_side.py answer all")  # fmt: skip
        prompts.append(Prompt(question.turns[0], question.input, question.adapter))
    return prompts


def refuse_names(prompts: Sequence[Prompt]) -> None:
    """Refuse prompts that name an adapter, in scripts that answer with one chosen by options.

    Raises:
        ValueError: a prompt does.
    """
    named = next((prompt.adapter for prompt in prompts if prompt.adapter is not None), None)
    if named is not None:
        raise ValueError(f"a prompt names the adapter {named}: generate/many.py goes by that")


def check_samples(num_samples: int, temperature: float) -> None:
    """Refuse a number of answers to each prompt that cannot be meant.

    Raises:
        ValueError: there are none, or all would be the same.
    """
    if num_samples < 1:
        raise ValueError(f"--num_samples is {num_samples}, it must be at least 1")
    if num_samples > 1 and temperature < GREEDY_BELOW:
        raise ValueError(
            f"--num_samples {num_samples} with --temperature {temperature:g} repeats one answer: raise the temperature"
        )


def search_pattern(matches: str | None) -> re.Pattern[str] | None:
    """The regular expression of the option --matches, if it is given.

    Raises:
        ValueError: it is not one.
    """
    try:
        return None if matches is None else re.compile(matches)
    except re.error as error:
        raise ValueError(f"--matches {matches}: not a regular expression ({error})") from None


def print_answers(
    prompts: Sequence[Prompt],
    answer: Callable[[int, int], Iterator[str]],
    *,
    model_name: str,
    num_samples: int,
    output_file: Path | None,
) -> None:
    """Print the answer to each prompt as it comes, then speed and memory on stderr.

    Args:
        prompts: what is answered.
        answer: given the number of a prompt and the number of answers before it, the pieces of the answer: one for each
            token, and the rest at the end.
        model_name: name of the model, recorded in `output_file`.
        num_samples: number of answers to each prompt.
        output_file: JSON Lines of prompt, response and model, written at the end.
    """
    rows: list[dict[str, str]] = []
    new_tokens, seconds = 0, 0.0
    try:
        for i, prompt in enumerate(prompts):
            for _ in range(num_samples):
                if rows:
                    print()
                if len(prompts) > 1:
                    show_prompt(prompt)
                pieces = []
                started = time.perf_counter()
                for piece in answer(i, len(rows)):
                    print(piece, end="", flush=True)
                    pieces.append(piece)
                seconds += time.perf_counter() - started
                new_tokens += len(pieces) - 1
                print()
                rows.append(answer_row(prompt, "".join(pieces), model_name))
    finally:  # what was answered before an interruption is kept
        if output_file is not None and rows:
            write_rows(output_file, rows)
    print_speed(new_tokens, seconds)


def show_prompt(prompt: Prompt) -> None:
    """Print a prompt before its answer where a person reads along: on stderr, if stdout is a terminal."""
    if sys.stdout.isatty():
        lines = f"{prompt.instruction}\n{prompt.input}".strip().splitlines()
        print("\n".join(f"> {line}" for line in lines), file=sys.stderr, flush=True)


def print_speed(new_tokens: int, seconds: float) -> None:
    """Print on stderr how fast answers came, and how much memory they took."""
    print(f"{new_tokens} tokens, {new_tokens / max(seconds, 1e-9):.1f} tokens/s, {peak_memory()}", file=sys.stderr)


def answer_row(prompt: Prompt, response: str, model_name: str) -> dict[str, str]:
    """The row of an answer in an output file; prompts with an input stay apart from it."""
    asked = {"instruction": prompt.instruction, "input": prompt.input} if prompt.input else {"prompt": prompt[0]}
    return {**asked, "response": response, "model": model_name}


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    """Write JSON Lines, whole or not at all."""
    with atomic_file(path) as temporary:
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        temporary.write_text("".join(lines), encoding="utf-8")


def adapter_in(folder: Path, name: str) -> Path:
    """The adapter of that name in a folder of them: a file without its `.safetensors`, or the folder of a run.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: there is none; the message names similar ones.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder of adapters")
    for path in (folder / f"{name}.safetensors", folder / name):
        if ".." not in Path(name).parts and not Path(name).is_absolute() and path.exists():
            return path
    there = {str(file.relative_to(folder).with_suffix("")) for file in folder.rglob("*.safetensors")}
    near = get_close_matches(name, there | {str(Path(one).parent) for one in there} - {"."}, n=3)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
    raise ValueError(f"no adapter named {name!r} in {folder}{hint}")
