"""What does a base model, perhaps with an adapter, know? MMLU (arXiv 2009.03300), by lm-evaluation-harness.

    python evaluate/mmlu.py
    python evaluate/mmlu.py --adapter_path out/demo/aligner.safetensors --questions 1000
    python evaluate/mmlu.py --data_dir data/mmlu --setting continuation

Prints accuracy by category and overall with its 95% interval, and writes `subjects.md`, `subjects.png` and what
`evaluate/harness.py` writes to --out_dir. The same command goes on where it was interrupted.
"""

import re
import textwrap
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lit_llama.devices.layouts import WeightOnly
from lit_llama.devices.precision import Precision
from lit_llama.devices.quantization import Quantize
from lit_llama.evaluation.statistics import in_words, share_interval
from lit_llama.files import atomic_file, require_extra
from lit_llama.script.command_line import open_with_adapters, run
from lit_llama.script.launch import join_processes


class Setting(NamedTuple):
    """How questions are put.

    Args:
        task: of the harness.
        shots: examples before each question.
        metric: of the task's.
    """

    task: str
    shots: int
    metric: str


SETTINGS = {
    "standard": Setting("mmlu", 5, "acc"),
    "zero-shot": Setting("mmlu", 0, "acc"),
    "continuation": Setting("mmlu_continuation", 0, "acc_norm"),
}
CATEGORIES = {"stem": "STEM", "humanities": "humanities", "social sciences": "social sciences", "other": "other"}


def main(
    checkpoint_dir: Path = Path("checkpoints/SmolLM2-135M-Instruct"),
    adapter_path: list[Path] | None = None,
    adapter_scale: list[float] | None = None,
    setting: Literal["standard", "zero-shot", "continuation"] = "standard",
    data_dir: Path | None = None,
    out_dir: Path = Path("out/mmlu"),
    questions: int | None = None,
    seed: int = 1337,
    chat_template: bool = False,
    batch_size: int = 16,
    precision: Precision = "auto",
    quantize: Quantize | WeightOnly | None = None,
    allow_other_base: bool = False,
) -> None:
    """Evaluate.

    Args:
        checkpoint_dir: folder of the base model.
        adapter_path: an adapter of any method; may be given several times, to be added up.
        adapter_scale: what it is multiplied by; may be given once for each.
        setting: "standard" is five examples before each question, "zero-shot" none, as the Aligner paper seems to;
            both ask for a letter, which small models cannot tell. "continuation" takes the choice whose words are the
            likeliest per byte, and tells small models apart.
        data_dir: folder with `{dev,test}/SUBJECT_{dev,test}.csv`, instead of the hub's data.
        out_dir: where results go.
        questions: as many, drawn at random from all 14,042; if not given, all.
        seed: of that draw.
        chat_template: put prompts in the model's chat format, examples as turns.
        batch_size: questions at once.
        precision: "auto" is bf16-true on a GPU that has it and 32-true elsewhere.
        quantize: keep the weights in fewer bits.
        allow_other_base: use the adapter on other weights than those it was trained on.
    """
    require_extra("lm_eval", "evaluate")
    from lit_llama.evaluation.harness import HarnessModel, load_tasks, random_questions, run_tasks

    task, shots, metric = SETTINGS[setting]
    tasks = load_tasks([task], data_dir, out_dir / "data", num_fewshot=shots)
    join_processes()
    base = open_with_adapters(checkpoint_dir, adapter_path, adapter_scale, precision, quantize, allow_other_base)
    chosen = None if questions is None else random_questions(tasks, questions, seed)
    lm = HarnessModel(base.model, base.tokenizer, base.adapter, batch_size)
    asked = {"questions": chosen, "chat_template": chat_template}
    results = run_tasks(lm, tasks, out_dir, name=base.name, counts=metric, **asked)
    if results is None:
        return
    rows: list[tuple[str, str, list[float]]] = []  # category, subject, whether each answer is right
    groups: list[Any] = tasks[0].get_all_groups()  # type: ignore[union-attr]
    for key, label in CATEGORIES.items():
        [group] = [group for group in groups if re.split("::|mmlu_", group.name)[-1].replace("_", " ") == key]
        for one in group.get_all_tasks():
            right = [sample[metric] for sample in results["samples"].get(one.task_name, [])]
            if right:
                subject = one.task_name.removeprefix("mmlu_").removesuffix("_continuation").replace("_", " ")
                rows.append((label, subject, right))
    summary = [(label, [x for row in rows if row[0] == label for x in row[2]]) for label in CATEGORIES.values()]
    summary = [*((label, right) for label, right in summary if right), ("all", [x for row in rows for x in row[2]])]
    lines = [f"MMLU, {setting}, {base.name}", "", "| category | questions | accuracy |", "|---|---:|---:|"]
    lines += [f"| {label} | {len(right)} | {with_interval(right)} |" for label, right in summary]
    print("\n".join(lines))
    lines += ["", "| subject | category | questions | accuracy |", "|---|---|---:|---:|"]
    lines += [f"| {name} | {label} | {len(right)} | {with_interval(right)} |" for label, name, right in rows]
    with atomic_file(out_dir / "subjects.md") as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    plot(rows, f"{base.name}, {len(summary[-1][1])} questions", out_dir / "subjects.png")


def with_interval(right: list[float]) -> str:
    """The share of right answers and its 95% interval."""
    return f"{sum(right) / len(right):.1%} ({in_words(share_interval(sum(right), len(right)), '.1%')})"


def plot(rows: list[tuple[str, str, list[float]]], title: str, path: Path) -> None:
    """A bar for each subject, the best first, in the colour of its category."""
    figure = require_extra("matplotlib.figure", "plot").Figure(
        figsize=(8, 1.5 + 0.19 * len(rows)), layout="constrained"
    )
    axes = figure.subplots()
    rows = sorted(rows, key=lambda row: sum(row[2]) / len(row[2]))
    for n, label in enumerate(CATEGORIES.values()):
        places = [i for i, row in enumerate(rows) if row[0] == label]
        if places:
            shares = [sum(rows[i][2]) / len(rows[i][2]) for i in places]
            axes.barh(places, shares, color=f"C{n}", label=label)
    axes.axvline(0.25, color="black", linewidth=1, linestyle=":", label="chance")
    axes.set_yticks(range(len(rows)), [f"{row[1]} ({len(row[2])})" for row in rows], fontsize=7)
    axes.set(xlabel="accuracy", ylim=(-1, len(rows)))
    axes.xaxis.set_major_formatter("{x:.0%}")
    figure.suptitle(textwrap.fill(title, 90), fontsize=10)
    figure.legend(ncols=5, fontsize="small", loc="outside lower center")
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


if __name__ == "__main__":
    run(main)
