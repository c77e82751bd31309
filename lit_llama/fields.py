"""Values out of files that anybody may have written, each checked for its type and range where it is taken."""

import reprlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

_REQUIRED: Any = object()
_WORDS = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    list: "a list",
    dict: "an object",
}


def take(
    fields: Mapping[str, Any],
    key: str,
    kind: type,
    place: object,
    default: Any = _REQUIRED,
    least: float | None = None,
    most: float | None = None,
) -> Any:
    """The value of a field, of the type that is expected.

    Args:
        fields: an object of a JSON file, or what else has values by name.
        key: the field's name.
        kind: int, float, str, bool, list or dict, as JSON has them; a whole number is also a number.
        place: the file, for error messages; None where `naming` says it.
        default: what stands for a field that is absent or null; without one, the field must be there.
        least: smallest number.
        most: largest number.

    Raises:
        ValueError: the field is missing, of another type or out of range; the message names file, field and value.
    """
    value = fields.get(key)
    if value is None:
        if default is _REQUIRED:
            raise ValueError(f"{place or 'the file'} lacks {key}, expected {_expected(kind, least, most)}")
        return default
    with naming(place):
        return check_value(value, key, kind, least, most)


@contextmanager
def naming(place: object) -> Iterator[None]:
    """Put the file in front of the message of an error that is raised inside; none if `place` is None."""
    try:
        yield
    except ValueError as error:
        if place is None:
            raise
        raise ValueError(f"{place}: {error}") from None


def check_value(value: Any, name: str, kind: type, least: float | None = None, most: float | None = None) -> Any:
    """Make sure that a value is of a type and in a range; see `take`.

    Returns:
        The value; a whole number becomes a float where `kind` is that.

    Raises:
        ValueError: it is not; the message names it.
    """
    fits = isinstance(value, int | float if kind is float else kind) and (kind is bool or not isinstance(value, bool))
    if fits and kind in (int, float):
        fits = (
            abs(value) <= sys.float_info.max and (least is None or value >= least) and (most is None or value <= most)
        )
    if fits and isinstance(value, str):
        fits = not any("\ud800" <= character <= "\udfff" for character in value)  # which no file can hold again
    if not fits:
        raise ValueError(f"{name} is {reprlib.repr(value)}, expected {_expected(kind, least, most)}")
    return float(value) if kind is float else value


def check_list(values: Any, name: str, kind: type, place: object, least: float | None = None) -> list[Any]:
    """Make sure that a value is a list whose entries are all of one type.

    Args:
        values: what should be a list.
        name: what it is called, for error messages.
        kind: type of the entries, see `take`.
        place: the file, for error messages.
        least: smallest number among them.

    Raises:
        ValueError: it is not; the message names file, field and entry.
    """
    with naming(place):
        return [
            check_value(value, f"{name}[{i}]", kind, least) for i, value in enumerate(check_value(values, name, list))
        ]


def check_object(value: Any, place: object) -> dict[str, Any]:
    """Make sure that a file, or a part of it, is a JSON object.

    Raises:
        ValueError: it is not; the message names what was found.
    """
    if not isinstance(value, dict):
        raise ValueError(f"{place or 'the file'}: expected an object, found {reprlib.repr(value)}")
    return value


def _expected(kind: type, least: float | None, most: float | None) -> str:
    if least is None and most is None:
        return _WORDS[kind]
    limits = f"from {least:g} to {most:g}" if None not in (least, most) else f"of at least {least:g}"
    return f"{_WORDS[kind]} {limits}"
