"""Does an adapter give answers a form? Ask the held-out questions with and without it, and check each answer.

    python evaluate/form.py --form captain --adapter_path out/demo/aligner.safetensors --out_dir out/demo

Writes `report.json` and `report.txt` to `--out_dir` and prints the latter. Answers are kept there as they come: the
same command goes on where it was interrupted.
"""

import time
from pathlib import Path
from typing import Any

from lit_llama.adapters import AnyAdapter
from lit_llama.base import Base
from lit_llama.combine import WeightedSum
from lit_llama.evaluation.answers import read_test_questions
from lit_llama.evaluation.forms import FORMS, FormName
from lit_llama.files import atomic_file, write_json
from lit_llama.model import parameter_shapes
from lit_llama.script.command_line import DEMO_BASE, peak_memory, run, try_next
from lit_llama.script.evaluation import ask, mixture
from lit_llama.tables import side_by_side


def main(
    form: FormName = "captain",
    adapter_path: list[Path] | None = None,
    adapter_scale: list[float] | None = None,
    questions_path: Path = Path("examples/questions.jsonl"),
    out_dir: Path = Path("out/demo"),
    max_new_tokens: int = 64,
    **options: Any,
) -> None:
    """Evaluate.

    Args:
        form: form that answers are checked for.
        adapter_path: file or run folder of an adapter of any method; may be given several times, to add up adapters.
            The one in --out_dir if not given.
        adapter_scale: number that the adapter is multiplied by; may be given once for each adapter. 1 if not given.
        questions_path: JSON Lines with "split" and "question"; those of the split "test" are asked.
        out_dir: folder of answers and report.
        max_new_tokens: length of the longest answer, in tokens; a longer one is cut and counts as it stands.
        options: those of every evaluation with answers, see `ask`.
    """
    started = time.perf_counter()
    if adapter_path is None and not out_dir.is_dir():
        raise FileNotFoundError(f"{out_dir}: no such run; give --adapter_path, or the folder of a run as --out_dir")
    aligned = mixture(adapter_path or [out_dir], adapter_scale)
    questions = read_test_questions(questions_path)
    models, answers = ask(
        {"base": {}, "aligned": aligned}, questions, out_dir, max_new_tokens=max_new_tokens, **options
    )
    check = FORMS[form].check
    rows = []
    for question in questions:
        row: dict[str, Any] = {"question": question.turns[0]}
        for name, texts in answers.items():
            [text] = texts[question.id]
            row |= {name: text, f"{name}_has_form": check(text)}
        rows.append(row)
    report = {
        "form": form,
        "description": FORMS[form].description,
        **{f"{name}_compliance": sum(row[f"{name}_has_form"] for row in rows) / len(rows) for name in answers},
        "held_out_prompts": len(rows),
        **facts(models["aligned"], time.perf_counter() - started),
        "adapter_bytes": sum(file.stat().st_size for file in aligned),
        "adapters": {str(file): scale for file, scale in aligned.items()},
        "checkpoint_dir": str(options.get("checkpoint_dir", DEMO_BASE)),
        "out_dir": str(out_dir),
        "answers": rows,
    }
    write_json(out_dir / "report.json", report)
    text = render(report)
    with atomic_file(out_dir / "report.txt") as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(text, end="")


def facts(aligned: Base, seconds: float) -> dict[str, Any]:
    """What the report says about the model and the time that it took."""
    adapters = (
        [one for one, _ in aligned.adapter.terms] if isinstance(aligned.adapter, WeightedSum) else [aligned.adapter]
    )
    trained = [parameter for one in adapters if isinstance(one, AnyAdapter) for parameter in one.parameters()]
    training_seconds = sum(info.seconds or 0.0 for info in aligned.infos)
    return {
        "method": " + ".join(info.method for info in aligned.infos),
        "trainable_parameters": sum(parameter.numel() for parameter in trained),
        "base_parameters": sum(shape.numel() for shape in parameter_shapes(aligned.model.config).values()),
        "seconds": round(training_seconds + seconds, 1),
        "training_seconds": round(training_seconds, 1),
        "evaluation_seconds": round(seconds, 1),
        "peak_memory": peak_memory(),
        "base": aligned.with_adapter(None).name,
    }


def render(report: dict[str, Any], shown: int = 5) -> str:
    """The report as text for people: a few answers side by side, then the figures."""
    rows = [[row["question"], row["base"], row["aligned"]] for row in report["answers"][:shown]]
    lines = [f"The form: {report['description']}", ""]
    lines += side_by_side(["held-out question", "base", "aligned"], rows, [22, 36, 36])
    n = report["held_out_prompts"]
    paths = [Path(path) for path in report["adapters"]]
    figures = [
        ("answers with the form, base", f"{report['base_compliance']:.1%} of {n}"),
        ("answers with the form, aligned", f"{report['aligned_compliance']:.1%} of {n}"),
        ("trainable parameters", f"{report['trainable_parameters']:,}, with {report['base_parameters']:,} frozen ones"),
        ("adapter file", f"{report['adapter_bytes']:,} bytes, {', '.join(map(str, paths))}"),
        ("seconds", f"{report['training_seconds']:.0f} training, {report['evaluation_seconds']:.0f} asking"),
        ("base model", report["base"]),
        ("all answers", str(Path(report["out_dir"]) / "report.json")),
    ]
    pictures = [picture for path in paths if (picture := path.with_name("loss.png")).exists()]
    figures += [("picture of the loss", str(picture)) for picture in pictures]
    lines += [f"{name:32}{value}" for name, value in figures]
    asked = " ".join(f"--adapter_path {path}" for path in paths)
    if any(scale != 1 for scale in report["adapters"].values()):
        asked += "".join(f" --adapter_scale {scale:g}" for scale in report["adapters"].values())
    other = next(name for name in FORMS if name != report["form"])
    lines += try_next(
        Path(report["checkpoint_dir"]),
        f'generate/aligner.py {asked} --prompt "Why is the sky blue?"',
        'generate/base.py --prompt "Why is the sky blue?"',
        f"scripts/prepare_examples.py --form {other} --output_dir data/{other}",
        f"finetune/aligner.py --data_dir data/{other} --out_dir out/{other}",
        f"evaluate/form.py --form {other} --out_dir out/{other}",
    )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run(main)
