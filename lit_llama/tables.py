"""Tables, in Markdown for documents and in plain columns for a terminal; and counts in words."""

import itertools
import re
import textwrap
from collections.abc import Iterable, Sequence

_NUMBER = re.compile(r"[-+±$]?\.?\d")


def counted(number: int, noun: str) -> str:
    """ "1 record", "2 records"."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


def markdown(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown. Columns that hold nothing but numbers stand on the right, all others on the left.

    Args:
        header: a title for each column.
        rows: a cell for each column; a cell may be empty.

    Returns:
        The table, without a newline at its end.
    """
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    columns = list(zip(*cells, strict=True)) or [()] * len(header)
    marks = ["---:" if _is_of_numbers(column) else "---" for column in columns]
    lines = ["| " + " | ".join(row) + " |" for row in [header, *cells]]
    return "\n".join([lines[0], "|" + "|".join(marks) + "|", *lines[1:]])


def _is_of_numbers(column: Sequence[str]) -> bool:
    filled = [cell for cell in column if cell]
    return bool(filled) and all(_NUMBER.match(cell) for cell in filled)


def side_by_side(header: Sequence[str], rows: Iterable[Sequence[str]], widths: Sequence[int]) -> list[str]:
    """Lines of a table for people: texts in columns, wrapped, the long ones shortened.

    Args:
        header: a title for each column.
        rows: a text for each column.
        widths: widths of the columns, in characters.
    """

    def line(cells: Iterable[str]) -> str:
        return "  ".join(f"{cell:{width}}" for cell, width in zip(cells, widths, strict=True)).rstrip()

    lines = [line(header), line("-" * width for width in widths)]
    for row in rows:
        cells = [
            textwrap.wrap(textwrap.shorten(text, 4 * width), width) for text, width in zip(row, widths, strict=True)
        ]
        lines += [line(part) for part in itertools.zip_longest(*cells, fillvalue="")]
        lines.append("")
    return lines
