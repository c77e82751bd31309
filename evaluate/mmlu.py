"""What does a base model, perhaps with an adapter, know? MMLU (arXiv 2009.03300), by lm-evaluation-harness.

    python evaluate/mmlu.py
    python evaluate/mmlu.py --adapter_path out/demo/aligner.safetensors --questions 1000
    python evaluate/mmlu.py --data_dir data/mmlu --setting continuation

Prints accuracy by category and overall with its 95% interval, and writes `subjects.md`, `subjects.png` and what
`evaluate/harness.py` writes to --out_dir. The same command goes on where it was interrupted.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lit_llama.evaluation.statistics import in_words, share_interval
from lit_llama.figures import picture
from lit_llama.files import atomic_file, require_extra
from lit_llama.script.command_line import run
from lit_llama.script.evaluation import task_model
from lit_llama.script.launch import join_processes
from lit_llama.tables import markdown


class Setting(NamedTuple):
    """How questions are put.

    Args:
        task: name of the harness's task.
        shots: number of examples before each question.
        metric: the metric that counts, one of the task's.
    """

    task: str
    shots: int
    metric: str


class Subject(NamedTuple):
    """A subject's answers.

    Args:
        category: a value of `CATEGORIES`.
        subject: its name.
        right: 1 for each right answer, 0 for each wrong one.
    """

    category: str
    subject: str
    right: list[float]


SETTINGS = {
    "standard": Setting("mmlu", 5, "acc"),
    "zero-shot": Setting("mmlu", 0, "acc"),
    "continuation": Setting("mmlu_continuation", 0, "acc_norm"),
}
CATEGORIES = {"stem": "STEM", "humanities": "humanities", "social sciences": "social sciences", "other": "other"}


def main(
    setting: Literal["standard", "zero-shot", "continuation"] = "standard",
    data_dir: Path | None = None,
    out_dir: Path = Path("out/mmlu"),
    questions: int | None = None,
    seed: int = 1337,
    chat_template: bool = False,
    batch_size: int = 16,
    **options: Any,
) -> None:
    """Evaluate.

    Args:
        setting: "standard" is five examples before each question, "zero-shot" none, as the Aligner paper seems to;
            both ask for a letter, which small models cannot tell. "continuation" takes the choice whose words are the
            likeliest per byte, and tells small models apart.
        data_dir: folder with `{dev,test}/SUBJECT_{dev,test}.csv`, instead of the hub's data.
        out_dir: folder of the results.
        questions: number of questions, drawn at random from all 14,042; if not given, all.
        seed: seed of that draw.
        chat_template: put prompts in the model's chat format, examples as turns.
        batch_size: number of requests computed at once.
        options: those of the model, see `evaluated_model`.
    """
    require_extra("lm_eval", "evaluate")
    from lit_llama.evaluation.harness import HarnessModel, run_tasks
    from lit_llama.evaluation.tasks import load_tasks, random_questions

    task, shots, metric = SETTINGS[setting]
    tasks = load_tasks([task], data_dir, out_dir / "data", num_fewshot=shots)
    join_processes()
    lm = HarnessModel(task_model(chat_template, **options), batch_size)
    chosen = None if questions is None else random_questions(tasks, questions, seed)
    results = run_tasks(lm, tasks, out_dir, questions=chosen, chat_template=chat_template, counts=metric)
    if results is None:
        return
    rows = by_subject(tasks, results["samples"], metric)
    summary: dict[str, list[float]] = {}
    for row in rows:
        summary.setdefault(row.category, []).extend(row.right)
    summary["all"] = [score for row in rows for score in row.right]
    text = f"MMLU, {setting}, {lm.name}\n\n"
    text += (
        markdown(["category", "questions", "accuracy"], [[c, len(r), with_interval(r)] for c, r in summary.items()])
        + "\n"
    )
    print(text, end="")
    cells = [[row.subject, row.category, len(row.right), with_interval(row.right)] for row in rows]
    text += "\n" + markdown(["subject", "category", "questions", "accuracy"], cells) + "\n"
    with atomic_file(out_dir / "subjects.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    draw(rows, f"{lm.name}, {len(summary['all'])} questions", out_dir / "subjects.png")


def by_subject(tasks: Sequence[Any], samples: Mapping[str, Any], metric: str) -> list[Subject]:
    """Whether each answer is right, by subject, the subjects of a category together."""
    rows = []
    groups: list[Any] = tasks[0].get_all_groups()
    for key, label in CATEGORIES.items():
        [group] = [group for group in groups if re.split("::|mmlu_", group.name)[-1].replace("_", " ") == key]
        for one in group.get_all_tasks():
            right = [sample[metric] for sample in samples.get(one.task_name, [])]
            if right:
                name = one.task_name.removeprefix("mmlu_").removesuffix("_continuation").replace("_", " ")
                rows.append(Subject(label, name, right))
    return rows


def with_interval(right: list[float]) -> str:
    """The share of right answers and its 95% interval."""
    return f"{sum(right) / len(right):.1%} ({in_words(share_interval(sum(right), len(right)), '.1%')})"


def draw(rows: Sequence[Subject], title: str, path: Path) -> None:
    """Draw a bar for each subject, the best first, in the colour of its category."""
    with picture(path, title, 8, 1.5 + 0.19 * len(rows)) as figure:
        axes = figure.subplots()
        rows = sorted(rows, key=lambda row: sum(row.right) / len(row.right))
        for n, label in enumerate(CATEGORIES.values()):
            places = [i for i, row in enumerate(rows) if row.category == label]
            if places:
                shares = [sum(rows[i].right) / len(rows[i].right) for i in places]
                axes.barh(places, shares, color=f"C{n}", label=label)
        axes.axvline(0.25, color="black", linewidth=1, linestyle=":", label="chance")
        axes.set_yticks(range(len(rows)), [f"{row.subject} ({len(row.right)})" for row in rows], fontsize=7)
        axes.set(xlabel="accuracy", ylim=(-1, len(rows)))
        axes.xaxis.set_major_formatter("{x:.0%}")
        figure.legend(ncols=5, fontsize="small", loc="outside lower center")


if __name__ == "__main__":
    run(main)
