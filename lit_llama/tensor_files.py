"""Files of tensors by name: found, opened lazily, compared, written. Nothing is unpickled but tensors."""

import io
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from lit_llama.fields import check_object, check_value, take
from lit_llama.files import check_file, read_json, write_json

SHARD_BYTES = 4 * 1024**3


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

    def __contains__(self, name: object) -> bool:
        return name in self._readers

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


def write_weights(
    folder: Path, groups: Iterable[dict[str, Tensor]], total: int, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write tensors as safetensors under Hugging Face's names of files, one shard in memory at a time.

    Args:
        folder: where to write; nobody reads it yet.
        groups: tensors by name, those that come together in one shard.
        total: how many groups there are.
        shard_bytes: largest shard, unless a group is larger.
    """
    shards: list[list[str]] = []
    waiting: dict[str, Tensor] = {}
    total_bytes = waiting_bytes = 0

    def write() -> None:
        save_file(waiting, folder / f"shard-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(waiting))
        waiting.clear()

    for group in tqdm(groups, total=total, desc="weights", leave=False):
        size = sum(tensor.nbytes for tensor in group.values())
        if waiting and waiting_bytes + size > shard_bytes:
            write()
            waiting_bytes = 0
        waiting |= group
        waiting_bytes += size
        total_bytes += size
    write()
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards):
        file = "model.safetensors" if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{i}").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)


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
