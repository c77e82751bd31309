"""What finetune/aligner_distill.py ends with: answers side by side, and what a prompt costs that an adapter saves."""

import re
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lit_llama.adapters import adapter_file
from lit_llama.base import Base
from lit_llama.decoder import GenerationRequest
from lit_llama.files import atomic_file, write_json
from lit_llama.generation import answer_all, prefill
from lit_llama.prompts import Message
from lit_llama.script.command_line import try_next
from lit_llama.script.questions import Question
from lit_llama.states import Progress
from lit_llama.tables import side_by_side

REPEATS = 5  # of a measurement of time


def compare(
    student: Base,
    teacher: Base,
    context: Sequence[Message],
    questions: Sequence[Question],
    pattern: re.Pattern[str] | None,
    *,
    most: int,
    max_new_tokens: int,
    batch_size: int,
) -> dict[str, Any]:
    """Let base, teacher and student answer held-out questions, and measure what each reads for a question.

    Args:
        student: the base model with the new adapter.
        teacher: the base model with the adapters of the teacher.
        context: what only the teacher reads before each question.
        questions: what was asked; those of the split "test", or else those of validation, are asked again.
        pattern: what is searched for in the answers.
        most: number of questions that are asked.
        max_new_tokens: length of the longest answer, in tokens.
        batch_size: number of questions answered at once.

    Returns:
        What `render` makes a text of.
    """
    held_out = [one for one in questions if one.split == "test"]
    held_out = (held_out or [one for one in questions if one.split == "validation"])[:most]
    models = {"base": (student.with_adapter(None), []), "teacher": (teacher, context), "student": (student, [])}
    rows: list[dict[str, Any]] = [{"question": one.messages[-1].content} for one in held_out]
    cost = {}
    for name, (base, before) in models.items():
        asked = [[*before, *one.messages] for one in held_out]
        said = answer_all(
            base.model, base.tokenizer, student.style, asked, base.adapter,
            max_new_tokens=max_new_tokens, batch_size=batch_size, what=f"answers of the {name}",
        )  # fmt: skip
        for row, answer in zip(rows, said, strict=True):
            row[name] = answer.text
        cost[name] = _cost(base, student, asked[0])
    found = {name: sum(bool(pattern.search(row[name])) for row in rows) for name in models} if pattern else {}
    return {"answers": rows, "cost": cost, "found": found, "pattern": pattern and pattern.pattern}


def _cost(base: Base, student: Base, conversation: Sequence[Message]) -> dict[str, float]:
    """What it costs to read one prompt: tokens, bytes in the cache, and milliseconds, the median of a few."""
    style, model = student.style, base.model
    ids = base.tokenizer.encode(style.render(conversation), bos=style.bos)
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        prefill(model, [GenerationRequest(ids, base.adapter, max_new_tokens=1)])
        seconds.append(time.perf_counter() - started)
    config = model.config
    per_token = 2 * config.n_layer * config.n_kv_head * config.head_size * model.dtype.itemsize
    return {"tokens": len(ids), "cache_bytes": len(ids) * per_token, "milliseconds": 1e3 * statistics.median(seconds)}


def render(report: Mapping[str, Any], progress: Progress, checkpoint_dir: Path, out_dir: Path, shown: int = 5) -> str:
    """The report as text for people: a few answers side by side, then the figures.

    Args:
        report: what `compare` measured.
        progress: what validation measured first, and at best.
        checkpoint_dir: folder of the base model.
        out_dir: folder of the run.
        shown: number of questions that are shown.
    """
    names = ("base", "teacher", "student")
    rows = [[row["question"], *(row[name] for name in names)] for row in report["answers"][:shown]]
    lines = side_by_side(["held-out question", *names], rows, [20, 27, 27, 27])
    n, first, best = len(report["answers"]), progress.first, progress.best
    cost = report["cost"]
    file = adapter_file(out_dir)
    more = {key: cost["teacher"][key] - cost["base"][key] for key in cost["base"]}
    added = max(0.0, cost["student"]["milliseconds"] - cost["base"]["milliseconds"])
    figures = [(f"in the form, {name}", f"{100 * found / n:.1f}% of {n}") for name, found in report["found"].items()]
    figures += [
        ("divergence from the teacher", f"{first['loss']:.3f} nats per token before, {best['loss']:.3f} after"),
        ("same likeliest token", f"{first['agreement']:.1%} of tokens before, {best['agreement']:.1%} after"),
    ]
    if more["tokens"]:  # else there is no prompt, only adapters of the teacher
        read = f"{more['cache_bytes']:,.0f} bytes of cache, {more['milliseconds']:.0f} ms to read on this machine"
        figures.append(("the prompt's cost, each request", f"{more['tokens']:.0f} tokens, {read}"))
    figures += [
        ("the adapter's cost", f"0 tokens, 0 bytes of cache, {added:.0f} ms; a file of {file.stat().st_size:,} bytes"),
        ("reading a question alone", f"{cost['base']['tokens']:.0f} tokens, {cost['base']['milliseconds']:.0f} ms"),
        ("seconds of training", f"{progress.seconds:.0f}"),
        ("all answers", str(out_dir / "report.json")),
        ("picture of the loss", str(out_dir / "loss.png")),
    ]  # fmt: skip
    lines += [f"{name:33}{value}" for name, value in figures]
    lines += try_next(checkpoint_dir, f'generate/aligner.py --adapter_path {file} --prompt "Why is the sky blue?"')
    return "\n".join(lines) + "\n"


def write_report(found: Mapping[str, Any], progress: Progress, checkpoint_dir: Path, out_dir: Path) -> str:
    """Write `report.json` and `report.txt` to the folder of a run; see `render`.

    Returns:
        The text of the latter.
    """
    text = render(found, progress, checkpoint_dir, out_dir)
    write_json(out_dir / "report.json", found)
    with atomic_file(out_dir / "report.txt") as temporary:
        temporary.write_text(text, encoding="utf-8")
    return text
