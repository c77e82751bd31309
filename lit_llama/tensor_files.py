"""Files of tensors by name: found, opened lazily, compared with what is expected. Nothing is unpickled but tensors."""

import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lit_llama.fields import check_object, check_value, take
from lit_llama.files import check_file, read_json


class TensorFiles(Mapping[str, Tensor]):
    """The tensors of weight files, safetensors or torch's, as one mapping. A tensor is read when it is asked for.

    Args:
        files: the files; torch's hold tensors by name and are memory-mapped.
        ignore: pattern of names to leave out.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, holds anything but tensors, or repeats a name.
    """

    def __init__(self, files: Sequence[Path], ignore: str = "") -> None:
        self._readers: dict[str, tuple[Path, Callable[[str], Tensor]]] = {}
        for file in files:
            check_file(file)
            for name, read in _open_tensors(file):
                if re.fullmatch(ignore, name):
                    continue
                if name in self._readers:
                    raise ValueError(f"{name} is both in {self._readers[name][0]} and in {file}")
                self._readers[name] = file, read

    def __getitem__(self, name: str) -> Tensor:
        file, read = self._readers[name]
        try:
            return read(name)
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged ({error})") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)


def _open_tensors(file: Path) -> list[tuple[str, Callable[[str], Tensor]]]:
    if file.suffix == ".safetensors":
        try:
            handle = safe_open(file, framework="pt")
        except SafetensorError as error:
            raise ValueError(f"{file} is not a complete safetensors file ({error}): fetch or write it again") from None
        return [(name, handle.get_tensor) for name in handle.keys()]  # noqa: SIM118 (not a mapping)
    tensors = load_tensors(file, file)
    return [(name, tensors.__getitem__) for name in tensors]


def load_tensors(file: Path, source: Path | io.BytesIO) -> dict[str, Tensor]:
    """The tensors by name that torch has saved in a file, which is mapped into memory if `source` is its path."""
    try:
        try:
            tensors = torch.load(source, map_location="cpu", mmap=isinstance(source, Path), weights_only=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            tensors = torch.load(source, map_location="cpu", weights_only=True)  # torch's format before 1.6
    except Exception as error:  # junk makes torch's unpickler raise errors of any kind
        raise ValueError(
            f"{file} is not a file of tensors that torch can read without running code in it; nothing was run "
            f"({type(error).__name__})"
        ) from None
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ValueError(f"{file}: expected tensors by name, found {type(tensors).__name__}")
    return tensors


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a model's folder, by Hugging Face's names: safetensors or `.bin`, one or sharded.

    Raises:
        FileNotFoundError: there is no such folder, no weights in it, or a shard is missing.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if index.is_file():
            weight_map = take(check_object(read_json(index), index), "weight_map", dict, index)
            for tensor, shard in weight_map.items():
                check_value(shard, f"{index}: file of {tensor}", str)
                if Path(shard).name != shard:
                    raise ValueError(f"{index}: file of {tensor} is {shard!r}, expected the name of a file next to it")
            files = [folder / shard for shard in sorted(set(weight_map.values()))]
            if not files:
                raise ValueError(f"{index} names no weights")
            missing = [file.name for file in files if not file.is_file()]
            if missing:
                some = ", ".join(missing[:3]) + (f", ... ({len(missing)} files)" if len(missing) > 3 else "")
                raise FileNotFoundError(f"{folder} lacks {some}, which {index.name} names")
            return files
        if (folder / name).is_file():
            return [folder / name]
    raise FileNotFoundError(f"{folder} holds no weights: expected model.safetensors or pytorch_model.bin, or an index")


def check_shape(name: str, found: torch.Size, expected: torch.Size, where: str) -> None:
    """Refuse a tensor of another shape than the configuration says."""
    if found != expected:
        raise ValueError(f"{where}: {name} has shape {tuple(found)}, the configuration expects {tuple(expected)}")


def refuse_names(path: Path | str, missing: set[str], unknown: set[str]) -> NoReturn:
    """Say which tensors a file lacks, or has too many of."""

    def some(names: set[str]) -> str:
        first = [name if name.isprintable() else ascii(name) for name in sorted(names)[:3]]
        return f"{', '.join(first)}{', ...' if len(names) > 3 else ''} ({len(names)} in all)"

    parts = [f"{word} {some(names)}" for word, names in (("lacks", missing), ("has unknown", unknown)) if names]
    raise ValueError(f"{path}: the weights are not those of the configured model: it {' and '.join(parts)}")
