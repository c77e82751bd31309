"""Pictures: one look for all of them, and files that an interruption cannot spoil."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lit_llama.files import atomic_file, require_extra

if TYPE_CHECKING:  # slow to import, which --help should not be
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 150
CHARACTERS_PER_INCH = 12  # of a title
LABEL_PLACES = [(x, y) for y in (7, -7, 17, -17, 27, -27, 37, -37) for x in (6, -6, 0)]  # from its point, in points


@contextmanager
def picture(path: Path, title: str, width: float, height: float) -> Iterator[Figure]:
    """Give an empty figure to draw on, and save it as a PNG when the drawing is done.

    Args:
        path: the file to write.
        title: stands above all panels, wrapped to the width.
        width: in inches.
        height: in inches.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = require_extra("matplotlib.figure", "plot").Figure(figsize=(width, height), layout="constrained")
    lines = [textwrap.fill(line, int(CHARACTERS_PER_INCH * width)) for line in title.splitlines()]
    figure.suptitle("\n".join(lines), fontsize="medium")
    yield figure
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=DPI, format="png")


def label_points(axes: Axes, points: Mapping[str, tuple[float, float]]) -> None:
    """Write a name next to each point, in a place where it covers nothing, or above the point if there is none.

    Args:
        axes: a panel of a figure on which everything else is drawn already.
        points: where each name belongs, in the panel's data coordinates.
    """
    from matplotlib.collections import LineCollection

    cast("Figure", axes.figure).draw_without_rendering()  # settles the layout, and with it what lies where
    lines: list[Any] = [line.get_transform().transform(line.get_xydata()) for line in axes.lines]
    bars = [bar for bars in axes.collections if isinstance(bars, LineCollection) for bar in bars.get_segments()]
    lines += [axes.transData.transform(bar) for bar in bars]
    drawn = [start + (end - start) * i / 50 for line in lines for start, end in pairwise(line) for i in range(51)]
    drawn += [point for line in lines for point in line]
    names: list[Any] = []  # where they stand
    for name, point in points.items():
        for x, y in LABEL_PLACES:
            at: Any = {"ha": {6: "left", -6: "right", 0: "center"}[x], "va": "bottom" if y > 0 else "top"}
            label = axes.annotate(name, point, (x, y), textcoords="offset points", fontsize="small", **at)
            area = label.get_window_extent()
            is_inside = axes.bbox.count_contains(area.corners()) == 4
            if is_inside and not area.count_overlaps(names) and not area.padded(4).count_contains(drawn):
                break
            label.remove()
        else:
            label = axes.annotate(name, point, LABEL_PLACES[0], textcoords="offset points", fontsize="small")
        names.append(label.get_window_extent().padded(2))
