"""What a run measured: `metrics.csv`, a row per step, and its picture."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from lit_llama.figures import picture
from lit_llama.files import atomic_file, read_text, require_extra


class MetricsFile:
    """`metrics.csv`, a row per step, each on disk before the next step begins.

    Args:
        path: the file.
        measured: names of what training and validation measure.
        keep_until: keep the rows of an earlier part of the run up to this step; None begins a new file.
        writes: whether this process writes at all.

    Raises:
        ValueError: the rows to keep are not such rows; the message names the line.

    Attributes:
        rows: those written so far, with numbers as the file has them.
    """

    def __init__(self, path: Path, measured: Iterable[str], keep_until: int | None, writes: bool) -> None:
        self._columns = ["step", *(f"{split}_{name}" for name in measured for split in ("train", "validation"))]
        self._columns += ["learning_rate", "grad_norm", "tokens_per_second", "seconds"]
        self.rows: list[dict[str, float]] = []
        if keep_until is not None and path.is_file():
            self.rows = [row for row in _read_metrics(path, self._columns) if row["step"] <= keep_until]
        self._writes = writes
        if writes:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, self._columns)
                writer.writeheader()
                writer.writerows(map(_as_text, self.rows))
            self._file = open(path, "a", newline="", encoding="utf-8")  # noqa: SIM115 (closed by __exit__)

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writes:
            self._file.close()

    def write(self, row: dict[str, float]) -> None:
        """Add a row."""
        self.rows.append(row)
        if self._writes:
            csv.DictWriter(self._file, self._columns).writerow(_as_text(row))
            self._file.flush()
            os.fsync(self._file.fileno())


def _as_text(row: dict[str, float]) -> dict[str, str]:
    return {name: f"{value:.6g}" for name, value in row.items()}


def _read_metrics(path: Path, columns: list[str]) -> list[dict[str, float]]:
    """The rows of a `metrics.csv`, without a last line that a kill has torn."""
    text = read_text(path)
    lines = text[: text.rfind("\n") + 1].splitlines()
    names = lines[0].split(",") if lines else []
    if "step" not in names or not set(names) <= set(columns):
        raise ValueError(f"{path}, line 1: expected the columns {', '.join(columns)}, found {', '.join(names)!r:.80}")
    rows: list[dict[str, float]] = []
    for number, line in enumerate(lines[1:], start=2):
        try:
            row = {name: float(value) for name, value in zip(names, line.split(","), strict=True) if value}
            if not row["step"] > (rows[-1]["step"] if rows else -1):
                raise ValueError
        except (ValueError, KeyError):
            raise ValueError(
                f"{path}, line {number}: expected the {len(names)} numbers of a step after the one before, found "
                f"{line!r:.80}; mend the line, or remove the file to go on without the earlier rows"
            ) from None
        rows.append(row)
    return rows


def plot_metrics(rows: list[dict[str, float]], measured: Mapping[str, str], title: str, path: Path) -> None:
    """Draw what training and validation measured over the steps, if matplotlib is installed.

    Args:
        rows: those of `metrics.csv`.
        measured: what to draw, with the label of its axis; names with the same label share one.
        title: title of the picture.
        path: the PNG to write.
    """
    labels = list(dict.fromkeys(measured.values()))
    try:
        require_extra("matplotlib.figure", "plot")
    except ImportError:
        return
    with picture(path, title, 7, 1.5 + 3 * len(labels)) as figure:
        for axes, label in zip(figure.subplots(len(labels), sharex=True, squeeze=False).flat, labels, strict=True):
            names = [name for name in measured if measured[name] == label]
            for i, name in enumerate(names):
                for split, look in (("train", {"alpha": 0.4}), ("validation", {"marker": "o"})):
                    points = [(row["step"], row[f"{split}_{name}"]) for row in rows if f"{split}_{name}" in row]
                    words = f"{split} {name}".replace("_", " ")
                    axes.plot(*zip(*points, strict=True), label=words, color=f"C{i}", **look)
            axes.set_ylabel(label)
            axes.grid(alpha=0.3)
            if "accuracy" in label:
                axes.yaxis.set_major_formatter("{x:.0%}")
            above = {"loc": "lower left", "bbox_to_anchor": (0, 1), "frameon": False}
            axes.legend(fontsize="small", ncols=max(2, len(names)), **above)
        axes.set_xlabel("optimizer step")
        axes.locator_params("x", integer=True)
        figure.align_ylabels()
