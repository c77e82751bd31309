"""Turn adapters up and down: how often answers have a form, and the validation loss, at one scale after another.

    python evaluate/scale.py --adapter_path out/demo/aligner.safetensors --form captain --data_dir data/demo
    python evaluate/scale.py --adapter_path a.safetensors --adapter_path b.safetensors --form captain --form followup

Several adapters are added up, each times the scale. Writes `scale.csv`, `scale.json` with all answers and `scale.png`
to `--out_dir`, and prints a table in Markdown.
"""

import csv
import sys
import textwrap
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from lit_llama.combine import WeightedSum
from lit_llama.data import open_data
from lit_llama.devices.layouts import WeightOnly
from lit_llama.devices.precision import Precision
from lit_llama.devices.quantization import Quantize
from lit_llama.evaluation.forms import FORMS
from lit_llama.files import atomic_file, require_extra, write_json
from lit_llama.generation import respond
from lit_llama.losses import supervised_loss
from lit_llama.prompts import prompt_style
from lit_llama.records import read_records
from lit_llama.script.command_line import open_with_adapters, run
from lit_llama.script.launch import launch
from lit_llama.training import evaluate

SCALES = [0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5]


def main(
    adapter_path: list[Path],
    adapter_scale: list[float] | None = None,
    form: list[Literal["captain", "json", "followup"]] = ["captain"],  # noqa: B006
    data_dir: Path | None = None,
    scale: list[float] = SCALES,
    checkpoint_dir: Path = Path("checkpoints/SmolLM2-135M-Instruct"),
    questions_path: Path = Path("examples/questions.jsonl"),
    out_dir: Path = Path("out/scale"),
    max_new_tokens: int = 64,
    batch_size: int = 24,
    precision: Precision = "auto",
    quantize: Quantize | WeightOnly | None = None,
    allow_other_base: bool = False,
) -> None:
    """Evaluate.

    Args:
        adapter_path: an adapter of any method; may be given several times, to be added up.
        adapter_scale: what each is multiplied by beforehand; may be given once for each. 1 if not given.
        form: what to check answers for; may be given several times.
        data_dir: tokenised examples, for the validation loss.
        scale: of all adapters; may be given several times.
        checkpoint_dir: folder of the base model.
        questions_path: JSON Lines with "split" and "question"; those of the split "test" are asked.
        out_dir: where the results go.
        max_new_tokens: longest answer, in tokens.
        batch_size: questions answered at once.
        precision: "auto" is bf16-true on a GPU that has it and 32-true elsewhere.
        quantize: keep the base's weights in fewer bits; if not given, as the first adapter was trained.
        allow_other_base: use adapters on other weights than those they were trained on.
    """
    questions = [
        row["question"] for _, row in read_records(questions_path) if row.get("split") == "test" and "question" in row
    ]
    if not questions:
        raise ValueError(f"{questions_path} has no question of the split 'test'")
    if batch_size < 1:
        raise ValueError(f"--batch_size is {batch_size}, it must be at least 1")
    base = open_with_adapters(checkpoint_dir, adapter_path, adapter_scale, precision, quantize, allow_other_base)
    model, tokenizer, whole = base.model, base.tokenizer, base.adapter
    if whole is None:
        raise ValueError("no adapter: give --adapter_path")
    style = prompt_style(base.prompt_style or "alpaca", tokenizer)
    validation = None if data_dir is None else open_data(checkpoint_dir, data_dir, sys.maxsize)[1][1]
    fabric, _ = launch(1, 1, False, [])

    rows: list[dict[str, float]] = []
    answers: dict[str, list[str]] = {}
    for s in tqdm(scale, desc="scales", leave=False):
        adapter = WeightedSum((whole, s))
        row = {"scale": s}
        if validation is not None:
            with torch.no_grad():
                row["validation_loss"] = evaluate(
                    fabric, lambda batch, adapter=adapter: supervised_loss(model, adapter, batch), validation, 4
                )["loss"]
        sizes = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
        texts = respond(model, tokenizer, style, questions, adapter, what=f"answers at {s:g}", **sizes)
        row |= {name: sum(map(FORMS[name].check, texts)) / len(texts) for name in form}
        rows.append(row)
        answers[f"{s:g}"] = texts
    out_dir.mkdir(parents=True, exist_ok=True)
    with atomic_file(out_dir / "scale.csv") as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    write_json(out_dir / "scale.json", {"questions": questions, "answers": answers})
    title = f"{checkpoint_dir.name} + {' + '.join(map(str, adapter_path))}"
    draw(rows, title, out_dir / "scale.png")
    print(render(rows), end="")
    print(f"picture: {out_dir / 'scale.png'}", file=sys.stderr)


def render(rows: list[dict[str, float]]) -> str:
    """The table in Markdown."""
    titles = {"scale": "scale", "validation_loss": "validation loss"}
    lines = [f"| {' | '.join(titles.get(name, f'answers with {name}') for name in rows[0])} |"]
    lines.append(f"|{'---:|' * len(rows[0])}")
    formats = {"scale": "g", "validation_loss": ".3f"}
    lines += [f"| {' | '.join(format(row[name], formats.get(name, '.1%')) for name in row)} |" for row in rows]
    return "\n".join(lines) + "\n"


def draw(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Draw shares of answers against the scale, and the validation loss on an axis of its own."""
    figure = require_extra("matplotlib.figure", "plot").Figure(figsize=(6, 4), layout="constrained")
    figure.suptitle(textwrap.fill(title, 70), fontsize="medium")
    axes = figure.subplots()
    scales = [row["scale"] for row in rows]
    for name in [name for name in rows[0] if name not in ("scale", "validation_loss")]:
        axes.plot(scales, [row[name] for row in rows], marker="o", label=f"answers with {name}")
    axes.set_xlabel("scale of the gates")
    axes.set_ylabel("share of held-out answers")
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.set_ylim(-0.05, 1.05)
    axes.grid(alpha=0.3)
    lines = axes.get_lines()
    if "validation_loss" in rows[0]:
        right = axes.twinx()
        right.plot(scales, [row["validation_loss"] for row in rows], "--", color="gray", label="validation loss")
        right.set_ylabel("validation loss (nats per token)")
        top = max(row["validation_loss"] for row in rows)
        right.set_ylim(-0.05 * top, 1.05 * top)  # so that the grid's 0% and 100% are zero and the largest loss
        lines = [*lines, *right.get_lines()]
    figure.legend(lines, [line.get_label() for line in lines], fontsize="small", ncols=3, loc="outside lower center")
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


if __name__ == "__main__":
    run(main)
