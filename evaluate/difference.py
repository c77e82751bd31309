"""Do models differ that answered the same questions? Their difference, question by question.

    python evaluate/mmlu.py --out_dir out/mmlu-base
    python evaluate/mmlu.py --out_dir out/mmlu-aligned --adapter_path out/demo/aligner.safetensors
    python evaluate/difference.py --results_dir out/mmlu-base --results_dir out/mmlu-aligned

Reads what `evaluate/harness.py`, `mmlu.py` and `gsm8k.py` write, and compares each model with the first. On the same
questions most of the chance in two scores is the same and drops out of the difference, whose interval is that of the
bootstrap over questions.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lit_llama.evaluation.statistics import bootstrap, in_words
from lit_llama.files import read_json
from lit_llama.records import read_records
from lit_llama.script.command_line import run
from lit_llama.tables import markdown

Question = tuple[str, int, str]  # task, number, digest of its content


def main(results_dir: list[Path] | None = None) -> None:
    """Compare.

    Args:
        results_dir: folder of results; may be given several times. The others are compared with the first.
    """
    folders = results_dir or []
    if len(folders) < 2:
        raise ValueError("give --results_dir twice or more: what to compare with, then what to compare")
    (first_name, first), *others = [(str(read_config(folder)["model_name"]), read_scores(folder)) for folder in folders]
    counts = metric_that_counts(folders[0])
    if counts in first:
        first = {counts: first[counts], **first}
        print(f"**{counts}** is the metric that counts in this setting; the others are the harness's.\n")
    elif len(first) > 1:
        print(f"These tasks have several metrics ({', '.join(first)}), and the results do not say which counts. Of acc "
              "and acc_norm, the second is per byte of the choice, and counts where choices are told apart by their "
              "words.\n")  # fmt: skip
    rows = []
    for metric, reference in first.items():
        label = f"**{metric}**" if metric == counts else metric
        share = sum(reference.values()) / len(reference)
        rows.append([label, first_name, len(reference), f"{share:.2%}", "", "", "", ""])
        for folder, (name, scores) in zip(folders[1:], others, strict=True):
            found = scores.get(metric, {})
            both = [question for question in reference if question in found]
            if not both:
                raise ValueError(f"{folder} and {folders[0]} have no question with {metric} in common")
            if len(both) < max(len(reference), len(found)):
                print(f"warning: {folder} and {folders[0]} have {len(both)} questions in common, and only these count",
                      file=sys.stderr)  # fmt: skip
            rows.append([label, name, *compare([(reference[question], found[question]) for question in both])])
    print(markdown(["metric", "model", "questions", "score", "difference", "95% interval", "lost", "gained"], rows))


def compare(scores: Sequence[tuple[float, float]]) -> list[object]:
    """Cells of the table for one model, from the first model's score of each question and this one's."""
    changes = [found - before for before, found in scores]
    share, change = sum(found for _, found in scores) / len(scores), sum(changes) / len(scores)
    interval = in_words(bootstrap(changes), "+.2%")
    lost, gained = (sum(sign * change > 0 for change in changes) for sign in (-1, 1))
    return [len(scores), f"{share:.2%}", f"{change:+.2%}", interval, lost, gained]


def read_config(folder: Path) -> dict[str, Any]:
    """What the results say of the model and the setting.

    Raises:
        FileNotFoundError: there are no results.
    """
    path = folder / "results.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} holds no results.json: write it with evaluate/harness.py or its short ways in"
        )
    return read_json(path)["config"]


def metric_that_counts(folder: Path) -> str | None:
    """The metric that the script which wrote the results reports; None if it reports all."""
    return read_config(folder).get("metric_that_counts")


def read_scores(folder: Path) -> dict[str, dict[Question, float]]:
    """The scores of each question, by metric, and by filter where there are several."""
    scores: dict[str, dict[Question, float]] = {}
    for metric, question, score in rows(folder):
        scores.setdefault(metric, {})[question] = score
    return scores


def rows(folder: Path) -> Iterator[tuple[str, Question, float]]:
    for _, row in read_records(folder / "samples.jsonl"):
        for metric in row["metrics"]:
            if isinstance(row[metric], int | float):  # a log-likelihood with its number of words is not a score
                name = metric if row["filter"] == "none" else f"{metric}, {row['filter']}"
                yield name, (row["task"], row["doc_id"], row["doc_hash"]), float(row[metric])


if __name__ == "__main__":
    run(main)
