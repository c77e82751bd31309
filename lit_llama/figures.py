"""Pictures: one look for all of them, and files that an interruption cannot spoil."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lit_llama.files import atomic_file, require_extra

if TYPE_CHECKING:  # slow to import, which --help should not be
    from matplotlib.figure import Figure

DPI = 150
CHARACTERS_PER_INCH = 12  # of a title


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
