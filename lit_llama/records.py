"""Records of any file that people keep data in, one at a time.

JSON arrays, a JSON object around one, JSON Lines, CSV, parquet and folders written by `save_to_disk` of Hugging Face's
datasets; text formats also compressed by gzip, xz, bzip2 or zstandard. NaN and infinity, which Python and pandas write
although JSON has no such numbers, are read as null.
"""

import bz2
import codecs
import csv
import gzip
import io
import itertools
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from lit_llama.files import check_file, require_extra
from lit_llama.json_text import DECODER, PIECE, JSONText

TEXT_SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv")
PACKED_SUFFIXES = (".gz", ".xz", ".bz2", ".zst")
_PACKED: dict[bytes, tuple[str, Callable[[Path], Any]]] = {  # by the bytes that such a file begins with
    b"\x1f\x8b": ("gzip", gzip.open),
    b"\xfd7zXZ\0": ("xz", lzma.open),
    b"BZh": ("bzip2", bz2.open),
    b"\x28\xb5\x2f\xfd": ("zstandard", lambda path: require_extra("zstandard", "data").open(path, "rb")),
}
_NOT_RECORDS = {
    b"PK": "a zip archive (or a spreadsheet): unpack it, or save it as CSV",
    b"7z\xbc\xaf": "a 7z archive: unpack it",
    b"SQLite format 3": "an SQLite database: write its table as CSV",
    b"\x80": "a pickle or another binary file: write its records as JSON Lines",
    b"version https://git-lfs": "a pointer of Git LFS, not the file itself: fetch the file with `git lfs pull`",
    b"\xff\xfe": "text in UTF-16: save it as UTF-8",
    b"<": "a web page or XML, not a file of records: download the file itself",
}
# An object that has a list under one of these is a record, not a wrapper around the records.
_LISTS_OF_RECORDS = {"choices", "chosen", "rejected", "completion", "conversation", "conversations", "history", "input"}
_LISTS_OF_RECORDS |= {"messages", "non_preferred_output", "preferred_output", "prompt", "tools", "turns"}
_METADATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_ROWS = 1000  # rows of a table that are read at once

Bad = Callable[[str, str], object]


def _refuse(place: str, reason: str) -> NoReturn:
    raise ValueError(f"{place}: {reason}")


def read_records(path: Path, bad: Bad = _refuse) -> Iterator[tuple[str, dict[str, Any]]]:
    """The records of a file, one at a time, each with its place for error messages.

    Args:
        path: JSON, JSON Lines, CSV (perhaps packed), parquet, a folder of such files, or one of `save_to_disk`.
        bad: called with the place and the reason for each record that cannot be read; by default it raises.

    Yields:
        (place, object) pairs; a place reads "FILE, line 3", "FILE, example 3" or "FILE, row 3".

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty, cannot be unpacked, or is malformed so that nothing after that place can be read.
    """
    for file in _files(path):
        is_empty = True

        def refuse(place: str, reason: str) -> None:
            nonlocal is_empty
            is_empty = False
            bad(place, reason)

        for place, value in _read_file(file, refuse):
            if isinstance(value, dict):
                is_empty = False
                yield place, value
            else:
                refuse(place, f"expected an object, found {type(value).__name__}")
        if is_empty:
            raise ValueError(f"{file} is empty; expected JSON Lines, a JSON array, CSV or parquet")


def _files(path: Path) -> list[Path]:
    """The files with records that a path stands for."""
    if not path.is_dir():
        check_file(path)
        return [path]
    if (path / "dataset_dict.json").is_file():
        splits = ", ".join(sorted(str(file.parent) for file in path.glob("*/state.json")))
        raise ValueError(f"{path} holds several splits: give the folder of one of them ({splits})")
    if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
        files = sorted(path.glob("*.arrow"))
    else:
        packed = tuple(text + suffix for text in TEXT_SUFFIXES for suffix in ("", *PACKED_SUFFIXES))
        found = (file for file in path.iterdir() if file.name.endswith((*packed, ".parquet")))
        files = sorted(file for file in found if file.name not in _METADATA)
    if not files:
        raise FileNotFoundError(f"{path} holds no {', '.join(TEXT_SUFFIXES)} or .parquet file")
    return files


def _read_file(path: Path, bad: Bad) -> Iterator[tuple[str, Any]]:
    with open(path, "rb") as file:
        start = file.read(32)
    if start.startswith(b"PAR1"):
        return _parquet_rows(path)
    if start.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
        return _arrow_rows(path)
    for opening, kind in _NOT_RECORDS.items():
        if start.removeprefix(codecs.BOM_UTF8).lstrip().startswith(opening):
            raise ValueError(f"{path} is {kind}")
    name = path.name.removesuffix(path.suffix) if path.suffix in PACKED_SUFFIXES else path.name
    if name.endswith((".csv", ".tsv")):
        return _csv_rows(path, bad)
    with _unpacked(path) as file:
        is_array = file.read(PIECE).lstrip().startswith(b"[")
    if is_array:
        return _array(path)
    return _lines(path, bad) if name.endswith((".jsonl", ".ndjson")) or _is_lines(path) else _wrapped(path)


@contextmanager
def _unpacked(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a text file after its mark of UTF-8, unpacked if it is packed; its name does not matter."""
    with open(path, "rb") as file:
        start = file.read(32)
    kind, unpack = next((entry for opening, entry in _PACKED.items() if start.startswith(opening)), ("", None))
    try:
        with io.BufferedReader(unpack(path) if unpack else open(path, "rb", buffering=0)) as file:
            if file.peek(len(codecs.BOM_UTF8)).startswith(codecs.BOM_UTF8):
                file.read(len(codecs.BOM_UTF8))
            yield file
    except (lzma.LZMAError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a complete {kind} file ({error})") from None
    except OSError as error:
        if not kind or error.errno is not None:
            raise
        raise ValueError(f"{path} is not a complete {kind} file ({error})") from None
    except Exception as error:
        if type(error).__name__ != "ZstdError":
            raise
        raise ValueError(f"{path} is not a complete {kind} file ({error})") from None


def _lines(path: Path, bad: Bad) -> Iterator[tuple[str, Any]]:
    with _unpacked(path) as file:
        for number, line in enumerate(file, start=1):
            place = f"{path}, line {number}"
            try:
                text = line.decode().strip()
                value = DECODER.decode(text) if text else None
            except UnicodeDecodeError as error:
                bad(place, f"byte 0x{line[error.start]:02x} is not UTF-8")
            except json.JSONDecodeError as error:
                bad(place, f"not JSON ({error.msg})")
            except RecursionError:
                bad(place, "the JSON is nested too deeply")
            else:
                if text:
                    yield place, value


def _array(path: Path) -> Iterator[tuple[str, Any]]:
    with _unpacked(path) as file:
        text = JSONText(path, file)
        for number, value in enumerate(text.entries(), start=1):
            yield f"{path}, example {number}", value
        text.end()


def _is_lines(path: Path) -> bool:
    """Whether a file that is not an array holds an object per line, and not one object."""
    try:
        with _unpacked(path) as file:
            text = JSONText(path, file)
            if text.peek() == "{":
                _lists(text)
            elif text.peek():
                text.value()
            return text.peek() != ""
    except ValueError:  # the first line is malformed, perhaps, and the second begins like an object as well
        with _unpacked(path) as file:
            lines = (line.strip() for line in file)
            starts = [line[:1] for line, _ in zip(filter(None, lines), range(2), strict=False)]
        return starts == [b"{", b"{"]


def _lists(text: JSONText) -> dict[str, bool]:
    """The keys of an object, and whether each has a list of objects; the values are not held."""
    keys = {}
    for key in text.members():
        if text.peek() == "[":
            keys[key] = {isinstance(entry, dict) for entry in text.entries()} == {True}
        else:
            text.value()
            keys[key] = False
    return keys


def _wrapped(path: Path) -> Iterator[tuple[str, Any]]:
    """The entries of the one list in an object, or the object itself if it is a record."""
    with _unpacked(path) as file:
        text = JSONText(path, file)
        if not text.peek():
            return
        keys = _lists(text)
    lists = [key for key, is_list in keys.items() if is_list]
    is_record = not lists or _LISTS_OF_RECORDS & keys.keys()
    if len(lists) > 1 and not is_record:
        raise ValueError(
            f"{path} holds an object with several lists ({', '.join(lists)}): write one of them to a file of its own"
        )
    with _unpacked(path) as file:
        text = JSONText(path, file)
        if is_record:
            yield f"{path}, example 1", text.value()
            return
        for key in text.members():
            if key != lists[0]:
                text.value()
                continue
            for number, value in enumerate(text.entries(), start=1):
                yield f"{path}, {key} {number}", value


def _csv_rows(path: Path, bad: Bad, columns: Sequence[str] = ()) -> Iterator[tuple[str, dict[str, str]]]:
    csv.field_size_limit(2**24)  # characters in a cell: a quote that is never closed does not take all memory
    with _unpacked(path) as file:
        lines = _decoded(path, file)
        first = next(lines, "")
        delimiter = max(",;\t", key=first.count)
        reader = csv.reader(itertools.chain([first], lines), delimiter=delimiter)
        try:
            header = next(reader, [])
            rows: Iterator[list[str]] = reader
            if len(header) == len(columns) and not set(columns) & set(header):
                header, rows = list(columns), itertools.chain([header], reader)
            if lacking := [name for name in columns if name not in header]:
                raise ValueError(f"{path} lacks the column {', '.join(lacking)}; it has {', '.join(header)}")
            for row in filter(None, rows):
                place = f"{path}, line {reader.line_num}"
                if len(row) != len(header):
                    bad(place, f"{len(row)} values, but the header has {len(header)} names")
                else:
                    yield place, dict(zip(header, row, strict=True))
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num}: not CSV ({error})") from None


def _decoded(path: Path, file: BinaryIO) -> Iterator[str]:
    for number, line in enumerate(file, start=1):
        try:
            yield line.decode()
        except UnicodeDecodeError as error:
            byte = line[error.start]
            raise ValueError(f"{path}, line {number}: byte 0x{byte:02x} is not UTF-8: save it as UTF-8") from None


def read_csv(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """The rows of a CSV file that has these columns, each with its place for error messages.

    Args:
        path: the file. It may lack a header if it has as many columns as are asked for.
        columns: names that the header must have.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it lacks a column, or a row is shorter or longer than the header.
    """
    check_file(path)
    return _csv_rows(path, _refuse, columns)


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    arrow, parquet = (require_extra(name, "data") for name in ("pyarrow", "pyarrow.parquet"))
    try:
        with parquet.ParquetFile(path) as file:
            yield from _numbered(path, file.iter_batches(_ROWS))
    except (arrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a complete parquet file ({str(error).splitlines()[0]})") from None


def _arrow_rows(path: Path) -> Iterator[tuple[str, Any]]:
    arrow, ipc = (require_extra(name, "data") for name in ("pyarrow", "pyarrow.ipc"))
    try:
        with arrow.memory_map(str(path)) as source:
            if source.read(6) == b"ARROW1":
                opened = ipc.open_file(source)
                batches = (opened.get_batch(number) for number in range(opened.num_record_batches))
            else:
                source.seek(0)
                batches = ipc.open_stream(source)
            pieces = (batch.slice(begin, _ROWS) for batch in batches for begin in range(0, batch.num_rows, _ROWS))
            yield from _numbered(path, pieces)
    except (arrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a complete Arrow file ({str(error).splitlines()[0]})") from None


def _numbered(path: Path, batches: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    rows = (row for batch in batches for row in batch.to_pylist())
    return ((f"{path}, row {number}", row) for number, row in enumerate(rows, start=1))
