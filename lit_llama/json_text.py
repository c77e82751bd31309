"""JSON read in pieces: the values of an array or an object that is larger than memory, one after the other."""

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

PIECE = 2**20  # bytes of text that are read at once


def _whole(digits: str) -> int | str:
    """An integer, or its digits where Python would refuse to convert so many of them."""
    return int(digits) if len(digits) < 4000 else digits


DECODER = json.JSONDecoder(parse_constant=lambda _: None, parse_int=_whole)


class JSONText:
    """Values in a JSON text, one after the other, from a file that is read in pieces."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path, self._file = path, file
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._text, self._at = "", 0
        self._line = 1  # of the beginning of the text that is held
        self._is_whole = False

    def _more(self) -> bool:
        """Read another piece, forgetting what was taken; whether there is one."""
        if self._is_whole:
            return False
        piece = self._file.read(max(PIECE, len(self._text) - self._at))  # as much again, so that work stays linear
        self._line += self._text.count("\n", 0, self._at)
        self._text, self._at = self._text[self._at :], 0
        try:
            self._text += self._decoder.decode(piece, final=not piece)
        except UnicodeDecodeError as error:
            line = self._line + self._text.count("\n") + error.object[: error.start].count(b"\n")
            byte = error.object[error.start]
            raise ValueError(f"{self._path}, line {line}: byte 0x{byte:02x} is not UTF-8") from None
        self._is_whole = not piece
        return bool(piece)

    def peek(self) -> str:
        """The next character that is not white space; at the end of the file ""."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in " \t\r\n":
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def take(self, characters: str) -> str:
        """Take the next character, one of these."""
        found = self.peek()
        if not found or found not in characters:
            wanted = " or ".join(map(repr, characters))
            self._fail(f"expected {wanted}, found {repr(found) if found else 'the end of the file'}", self._at)
        self._at += 1
        return found

    def value(self) -> Any:
        """Take the next value."""
        self.peek()
        while True:
            try:
                value, end = DECODER.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                # A value that goes on in the next piece fails at the end of this one, or where an open string begins.
                is_cut = error.msg.startswith("Unterminated string") or error.pos > len(self._text) - 16
                if not (is_cut and self._more()):
                    self._fail(error.msg, error.pos)
            except RecursionError:
                self._fail("nested too deeply", self._at)
            else:
                if end < len(self._text) or not self._more():  # a number may go on in the next piece
                    self._at = end
                    return value

    def _fail(self, reason: str, at: int) -> NoReturn:
        line = self._line + self._text.count("\n", 0, at)
        raise ValueError(f"{self._path}, line {line}: not JSON ({reason})")

    def entries(self) -> Iterator[Any]:
        """Take the values of an array, from its "[" to its "]"."""
        self.take("[")
        if self.peek() == "]":
            self.take("]")
            return
        while True:
            yield self.value()
            if self.take(",]") == "]":
                return

    def members(self) -> Iterator[str]:
        """The keys of an object, from its "{" to its "}"; the caller takes each value before it goes on."""
        self.take("{")
        if self.peek() == "}":
            self.take("}")
            return
        while True:
            if self.peek() != '"':
                self._fail("expected a key in double quotes", self._at)
            key = self.value()
            self.take(":")
            yield key
            if self.take(",}") == "}":
                return

    def end(self) -> None:
        """Make sure that nothing follows."""
        if self.peek():
            self._fail("Extra data", self._at)
