"""A safetensors file read once, into memory, and checked by its header before its tensors are."""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from lit_llama.fields import check_list, check_object, check_value, take
from lit_llama.files import check_file, parse_json

MOST_HEADER = 2**22  # bytes; the largest LoRA's is a twentieth of that
FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
T = TypeVar("T")


class Header(NamedTuple):
    """What a safetensors file says about itself.

    Args:
        metadata: texts by name.
        shapes: shapes of its tensors, by name.
    """

    metadata: dict[str, str]
    shapes: dict[str, tuple[int, ...]]


def read_tensors(path: Path, check: Callable[[Header], T]) -> tuple[T, dict[str, Tensor]]:
    """Read a safetensors file of floating-point numbers.

    The file is opened once, so that what is returned is of one file even if another takes its name meanwhile, and read
    instead of mapped, so that a file that is cut off does no harm later.

    Args:
        path: the file.
        check: sees the header before the tensors are read, and raises a ValueError if they are not wanted.

    Returns:
        What `check` returned, and the tensors in float32.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a complete safetensors file, holds something else than finite floating-point numbers, or
            changed while it was read.
    """
    check_file(path)
    with open(path, "rb") as file:
        before = os.fstat(file.fileno())
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(MOST_HEADER, before.st_size - 8):
            raise _incomplete(path, f"a header of {length} bytes in a file of {before.st_size}")
        text = file.read(length)
        header, end = _parse_header(path, text)
        if end != before.st_size - 8 - length:
            raise _incomplete(path, f"it has {before.st_size} bytes, its header tells of {8 + length + end}")
        checked = check(header)
        data = start + text + file.read(end + 1)
        after = os.fstat(file.fileno())
    if len(data) != before.st_size or (before.st_mtime_ns, before.st_size) != (after.st_mtime_ns, after.st_size):
        raise ValueError(f"{path} changed while it was read: read it again when it is complete")
    try:
        loaded = load(data)
    except SafetensorError as error:
        raise _incomplete(path, str(error)) from None
    if {name: tuple(tensor.shape) for name, tensor in loaded.items()} != header.shapes:
        raise _incomplete(path, "its header names a tensor twice")
    return checked, {name: finite(path, name, tensor) for name, tensor in loaded.items()}


def finite(path: Path, name: str, tensor: Tensor) -> Tensor:
    """A tensor of a file in float32.

    Raises:
        ValueError: it holds values that are not finite.
    """
    values = tensor.float()
    bad = values.numel() - int(values.isfinite().sum())
    if bad:
        raise ValueError(f"{path}: {name} holds {bad} values that are not finite, of {values.numel()}")
    return values


def _parse_header(path: Path, text: bytes) -> tuple[Header, int]:
    """The header, and how many bytes its tensors take."""
    try:
        fields = check_object(parse_json(text.decode(), path), path)
    except UnicodeDecodeError:
        raise _incomplete(path, "its header is not text") from None
    metadata = check_object(fields.pop("__metadata__", None) or {}, f"{path}, __metadata__")
    for name in metadata:
        take(metadata, name, str, f"{path}, __metadata__")
    shapes, end = {}, 0
    for name, entry in fields.items():
        place = f"{path}, {name}"
        check_object(entry, place)
        kind = take(entry, "dtype", str, place)
        if kind not in FLOATS:
            raise ValueError(f"{place}: dtype is {kind[:20]!r}, expected one of {', '.join(FLOATS)}")
        shape = check_list(entry.get("shape"), "shape", int, place, least=0)
        offsets = check_list(entry.get("data_offsets"), "data_offsets", int, place, least=0)
        check_value(len(offsets), f"{place}: number of data_offsets", int, 2, 2)
        if offsets[1] - offsets[0] != math.prod(shape) * FLOATS[kind].itemsize:
            raise _incomplete(path, f"{name[:100]} has another number of bytes than its shape needs")
        shapes[name], end = tuple(shape), max(end, offsets[1])
    return Header(metadata, shapes), end


def _incomplete(path: Path, why: str) -> ValueError:
    return ValueError(f"{path} is not a complete safetensors file ({why}): fetch or write it again")
