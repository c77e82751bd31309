"""Turn adapters up and down: how often answers have a form, and what it costs, at one scale after another.

    python evaluate/scale.py --adapter_path out/demo/aligner.safetensors --form captain --data_dir data/demo
    python evaluate/scale.py --adapter_path out/demo/aligner.safetensors --form captain --text_path book.txt
    python evaluate/scale.py --adapter_path a.safetensors --adapter_path b.safetensors --form captain --form followup

Several adapters are added up, each times the scale. Writes `scale.csv`, `scale.json` with all answers and `scale.png`
to `--out_dir`, and prints a table in Markdown. Answers are kept there as they come: the same command goes on where it
was interrupted, and computes only the losses again.

The cost is the divergence from the base on a plain text, in nats per token. Theory has it grow with the square of the
scale (arXiv 2401.16332), and the effect with the scale itself. So below the table stands the power with which the
divergence grew, and how evenly each share of answers rose.
"""

import csv
import itertools
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from lit_llama.base import Base
from lit_llama.data import Example, TokenDataset, collate
from lit_llama.evaluation.answers import read_test_questions
from lit_llama.evaluation.forms import FORMS, FormName
from lit_llama.figures import picture
from lit_llama.files import atomic_file, read_text, write_json
from lit_llama.losses import supervised_loss, text_divergence
from lit_llama.script.command_line import run
from lit_llama.script.evaluation import ask, mixture
from lit_llama.tables import markdown

SCALES = [0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5]
COSTS = {"validation_loss": "validation loss", "divergence": "divergence on plain text"}


def main(
    adapter_path: list[Path],
    adapter_scale: list[float] | None = None,
    form: list[FormName] = ["captain"],  # noqa: B006
    data_dir: Path | None = None,
    text_path: Path | None = None,
    scale: list[float] = SCALES,
    questions_path: Path = Path("examples/questions.jsonl"),
    out_dir: Path = Path("out/scale"),
    max_new_tokens: int = 64,
    **options: Any,
) -> None:
    """Evaluate.

    Args:
        adapter_path: file or run folder of an adapter of any method; may be given several times, to add up adapters.
        adapter_scale: number that each adapter is multiplied by in addition to the scale; may be given once for each.
            1 if not given.
        form: form that answers are checked for; may be given several times.
        data_dir: folder of a prepared data set, for the validation loss.
        text_path: text file that is not about the form, for the divergence from the base.
        scale: number that all adapters are multiplied by; may be given several times.
        questions_path: JSON Lines with "split" and "question"; those of the split "test" are asked.
        out_dir: folder of the results.
        max_new_tokens: length of the longest answer, in tokens.
        options: those of every evaluation with answers, see `ask`.
    """
    relative = mixture(adapter_path, adapter_scale)
    mixtures = {f"scale-{s:g}": {path: s * one for path, one in relative.items()} for s in scale}
    questions = read_test_questions(questions_path)
    models, answers = ask(mixtures, questions, out_dir, max_new_tokens=max_new_tokens, **options)
    texts = {name: [found[question.id][0] for question in questions] for name, found in answers.items()}
    rows: list[dict[str, float]] = []
    for s, (name, said) in zip(scale, texts.items(), strict=True):
        loss = {} if data_dir is None else {"validation_loss": validation_loss(models[name], data_dir)}
        cost = {} if text_path is None else {"divergence": divergence_on(models[name], text_path)}
        shares = {one: sum(map(FORMS[one].check, said)) / len(said) for one in form}
        rows.append({"scale": s, **loss, **cost, **shares})
    write(out_dir, rows, [question.turns[0] for question in questions], texts)
    base = next(iter(models.values())).model.config.name
    draw(rows, f"{base} + {' + '.join(map(str, adapter_path))}", out_dir / "scale.png")
    print(render(rows))
    print(*in_words(rows), sep="\n")
    print(f"picture: {out_dir / 'scale.png'}", file=sys.stderr)


@torch.no_grad()
def validation_loss(base: Base, data_dir: Path, batch_size: int = 4) -> float:
    """The mean loss of the scored tokens of a data set's validation split, in nats."""
    dataset = TokenDataset(data_dir, "validation", base.tokenizer, sys.maxsize)
    examples = [example for i in range(len(dataset)) for example in dataset[i]]
    total, count = 0.0, 0.0
    for i in tqdm(range(0, len(examples), batch_size), desc="validation", leave=False):
        sums = supervised_loss(base.model, base.adapter, collate(examples[i : i + batch_size]).to(base.device))
        total, count = total + float(sums.metrics["loss"]), count + float(sums.count)
    return total / count


@torch.no_grad()
def divergence_on(base: Base, path: Path, window: int = 256) -> float:
    """The mean divergence of the base with its adapter from the base alone on a text, in nats per token."""
    ids = base.tokenizer.encode(read_text(path), bos=True)
    if len(ids) < 2:
        raise ValueError(f"{path} holds no text")
    parts = [np.array(ids[i : i + window]) for i in range(0, len(ids), window)]
    nats = []
    for part in tqdm(parts, desc="text", leave=False):
        text = collate([Example(part, np.ones(len(part), dtype=bool))]).to(base.device)
        nats += text_divergence(base.model, None, base.adapter, text).tolist()
    return statistics.mean(nats)


def in_words(rows: list[dict[str, float]]) -> list[str]:
    """How evenly the effect came, and with which power of the scale the cost grew, a line each."""
    lines = [""]
    rows = sorted(rows, key=lambda row: row["scale"])
    for name in [name for name in rows[0] if name not in ("scale", *COSTS)]:
        jumps = [(abs(b[name] - a[name]), a["scale"], b["scale"]) for a, b in itertools.pairwise(rows)]
        if jumps:
            jump, low, high = max(jumps)
            lines.append(f"answers with {name}: the largest step is {jump:.1%}, between {low:g} and {high:g}")
    points = [
        (math.log(row["scale"]), math.log(row["divergence"]))
        for row in rows
        if row.get("divergence", 0) > 0 < row["scale"]
    ]
    if len(points) > 1:
        power = statistics.linear_regression(*zip(*points, strict=True)).slope
        lines.append(f"divergence: grows with the scale to the power of {power:.2f} (least squares of the logarithms)")
    return lines


def write(out_dir: Path, rows: list[dict[str, float]], questions: list[str], texts: dict[str, list[str]]) -> None:
    """Write the figures as a table, and all answers."""
    with atomic_file(out_dir / "scale.csv") as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    said = {name.removeprefix("scale-"): some for name, some in texts.items()}
    write_json(out_dir / "scale.json", {"questions": questions, "answers": said})


def render(rows: list[dict[str, float]]) -> str:
    """The table in Markdown."""
    titles = {"scale": "scale", **COSTS}
    formats = {"scale": "g", "validation_loss": ".3f", "divergence": ".3f"}
    header = [titles.get(name, f"answers with {name}") for name in rows[0]]
    return markdown(header, [[format(value, formats.get(name, ".1%")) for name, value in row.items()] for row in rows])


def draw(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Draw shares of answers against the scale, and the costs on an axis of their own."""
    with picture(path, title, 6, 4) as figure:
        axes = figure.subplots()
        scales = [row["scale"] for row in rows]
        for name in [name for name in rows[0] if name not in ("scale", *COSTS)]:
            axes.plot(scales, [row[name] for row in rows], marker="o", label=f"answers with {name}")
        axes.set_xlabel("scale of the adapter")
        axes.set_ylabel("share of held-out answers")
        axes.yaxis.set_major_formatter("{x:.0%}")
        axes.set_ylim(-0.05, 1.05)
        axes.grid(alpha=0.3)
        lines = axes.get_lines()
        costs = [name for name in COSTS if name in rows[0]]
        if costs:
            right = axes.twinx()
            for name, look in zip(costs, ("--", ":"), strict=False):
                right.plot(scales, [row[name] for row in rows], look, color="gray", label=COSTS[name])
            right.set_ylabel("nats per token")
            top = max(row[name] for row in rows for name in costs)
            right.set_ylim(-0.05 * top, 1.05 * top)  # so that the grid's 0% and 100% are zero and the largest loss
            lines = [*lines, *right.get_lines()]
        labels = [str(line.get_label()) for line in lines]
        figure.legend(lines, labels, fontsize="small", ncols=3, loc="outside lower center")


if __name__ == "__main__":
    run(main)
