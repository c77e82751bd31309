"""Does an adapter give answers a form? Ask the held-out questions with and without it, and check each answer.

    python evaluate/form.py --form captain --adapter_path out/demo/aligner.safetensors --out_dir out/demo

Writes `report.json` and `report.txt` to `--out_dir` and prints the latter.
"""

import sys
import time
from pathlib import Path
from typing import Any, Literal

from lit_llama.adapters import adapter_file, adapter_info, check_adapter, load_adapter
from lit_llama.checkpoint import parameter_shapes
from lit_llama.devices.layouts import WeightOnly
from lit_llama.devices.precision import Precision
from lit_llama.devices.quantization import Quantize
from lit_llama.evaluation.forms import FORMS
from lit_llama.files import atomic_file, write_json
from lit_llama.generation import respond
from lit_llama.prompts import prompt_style
from lit_llama.records import read_records
from lit_llama.script.command_line import open_base, peak_memory, run, side_by_side
from lit_llama.seam import Adapter


def main(
    form: Literal["captain", "json", "followup"] = "captain",
    checkpoint_dir: Path = Path("checkpoints/SmolLM2-135M-Instruct"),
    adapter_path: Path | None = None,
    questions_path: Path = Path("examples/questions.jsonl"),
    out_dir: Path = Path("out/demo"),
    max_new_tokens: int = 64,
    batch_size: int = 24,
    precision: Precision = "auto",
    quantize: Quantize | WeightOnly | None = None,
    allow_other_base: bool = False,
) -> None:
    """Evaluate.

    Args:
        form: what to check for.
        checkpoint_dir: folder of the base model.
        adapter_path: an adapter of any method, its file or its run's folder; if not given, the one in --out_dir.
        questions_path: JSON Lines with "split" and "question"; those of the split "test" are asked.
        out_dir: where the report goes.
        max_new_tokens: longest answer, in tokens; a longer one is cut and counts as it stands.
        batch_size: questions answered at once.
        precision: "auto" is bf16-true on a GPU that has it and 32-true elsewhere.
        quantize: keep the base's weights in fewer bits; if not given, as the adapter was trained.
        allow_other_base: use the adapter on other weights than those it was trained on.
    """
    started = time.perf_counter()
    adapter_path = adapter_file(adapter_path or out_dir)
    if batch_size < 1:
        raise ValueError(f"--batch_size is {batch_size}, it must be at least 1")
    rows = [row for _, row in read_records(questions_path)]
    questions = [row["question"] for row in rows if row.get("split") == "test" and "question" in row]
    if not questions:
        raise ValueError(f"{questions_path} has no question of the split 'test'")
    adapter = load_adapter(adapter_path)
    quantize = quantize or adapter_info(adapter_path).hyperparameters.get("quantize")
    model, tokenizer = open_base(checkpoint_dir, precision, quantize)
    info = check_adapter(adapter_path, model, allow_other_base)
    style = prompt_style(info.prompt_style or "alpaca", tokenizer)

    def answers(adapter: Adapter | None, name: str) -> list[str]:
        sizes = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
        return respond(model, tokenizer, style, questions, adapter, what=f"answers of the {name} model", **sizes)

    check = FORMS[form].check
    rows = [
        {
            "question": question,
            "base": base,
            "base_has_form": check(base),
            "aligned": text,
            "aligned_has_form": check(text),
        }
        for question, base, text in zip(
            questions, answers(None, "base"), answers(adapter.to(model.device), "aligned"), strict=True
        )
    ]
    evaluation_seconds = time.perf_counter() - started
    report = {
        "form": form,
        "method": info.method,
        "description": FORMS[form].description,
        "base_compliance": sum(row["base_has_form"] for row in rows) / len(rows),
        "aligned_compliance": sum(row["aligned_has_form"] for row in rows) / len(rows),
        "held_out_prompts": len(rows),
        "trainable_parameters": sum(parameter.numel() for parameter in adapter.parameters()),
        "base_parameters": sum(shape.numel() for shape in parameter_shapes(model.config).values()),
        "adapter_bytes": adapter_path.stat().st_size,
        "seconds": round((info.seconds or 0.0) + evaluation_seconds, 1),
        "training_seconds": round(info.seconds or 0.0, 1),
        "evaluation_seconds": round(evaluation_seconds, 1),
        "peak_memory": peak_memory(),
        "checkpoint_dir": str(checkpoint_dir),
        "adapter_path": str(adapter_path),
        "out_dir": str(out_dir),
        "answers": rows,
    }
    write_json(out_dir / "report.json", report)
    text = render(report)
    with atomic_file(out_dir / "report.txt") as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(text, end="")


def render(report: dict[str, Any], shown: int = 5) -> str:
    """The report as text for people: a few answers side by side, then the figures."""
    rows = [[row["question"], row["base"], row["aligned"]] for row in report["answers"][:shown]]
    lines = [f"The form: {report['description']}", ""]
    lines += side_by_side(["held-out question", "base", "aligned"], rows, [22, 36, 36])
    n = report["held_out_prompts"]
    adapter_path = Path(report["adapter_path"])
    method = report["method"]
    figures = [
        ("answers with the form, base", f"{report['base_compliance']:.1%} of {n}"),
        ("answers with the form, aligned", f"{report['aligned_compliance']:.1%} of {n}"),
        ("trainable parameters", f"{report['trainable_parameters']:,} beside {report['base_parameters']:,} frozen"),
        ("adapter file", f"{report['adapter_bytes']:,} bytes, {adapter_path}"),
        (
            "seconds",
            f"{report['training_seconds']:.0f} training, {report['evaluation_seconds']:.0f} asking",
        ),
        ("base model", report["checkpoint_dir"]),
        ("all answers", str(Path(report["out_dir"]) / "report.json")),
        ("picture of the loss", str(adapter_path.with_name("loss.png"))),
    ]
    lines += [f"{name:32}{value}" for name, value in figures]
    other = next(name for name in FORMS if name != report["form"])
    python = ".venv/bin/python" if Path(sys.prefix) == Path.cwd() / ".venv" else "python"
    lines += [
        "",
        "Try next:",
        f'  {python} generate/{method}.py --adapter_path {adapter_path} --prompt "Why is the sky blue?"',
        f'  {python} generate/base.py --prompt "Why is the sky blue?"',
        f"  {python} scripts/prepare_examples.py --form {other} --output_dir data/{other}",
        f"  {python} finetune/aligner.py --data_dir data/{other} --out_dir out/{other}",
        f"  {python} evaluate/form.py --form {other} --out_dir out/{other}",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run(main)
