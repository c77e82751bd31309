"""A folder of Aligners, opened by name: thousands of them in memory, as the few numbers that they are."""

import os
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from sys import intern
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from lit_llama.aligner import Aligner
from lit_llama.checkpoint import check_adapter, load_adapter
from lit_llama.model import LLaMA


class StoredAligner(NamedTuple):
    """An Aligner at rest.

    Args:
        stamp: time of change and size of its file.
        values: tokens (N, C) and gates (layers, nh), flat, on the CPU; None if the file is not to be used.
        length: number of prefix tokens N.
        start_layer: first layer that attends to them.
        prompt_style: of its training prompts, if known.
        error: why it is not to be used.
    """

    stamp: tuple[int, int]
    values: Tensor | None = None
    length: int = 0
    start_layer: int = 0
    prompt_style: str | None = None
    error: str = ""


class AlignerStore:
    """The Aligners of a folder and of the folders in it, each named by its path without `.safetensors`.

    They cost 4 bytes a number and some for the bookkeeping; keys and values are made only for rows that are generated.
    Files that cannot be used do not stop the others: asking for one says what is wrong with it.

    Args:
        folder: where the files are.
        model: the base model that they must belong to; without weights will do, if it has their fingerprint.
        allow_other_base: accept Aligners of other weights of the same sizes.

    Raises:
        FileNotFoundError: there is no such folder.
    """

    def __init__(self, folder: Path, model: LLaMA, allow_other_base: bool = False) -> None:
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder of Aligners")
        self.folder = folder
        self._model = model
        self._allow_other_base = allow_other_base
        self._stored: dict[str, StoredAligner] = {}
        self.refresh()

    def __len__(self) -> int:
        return len(self.names())

    def names(self) -> list[str]:
        """Of the Aligners that can be used, sorted."""
        return sorted(name for name, stored in self._stored.items() if stored.values is not None)

    def refresh(self) -> None:
        """Read files that are new or changed, and forget those that are gone."""
        found = dict(_aligner_files(self.folder))
        for name in self._stored.keys() - found.keys():
            del self._stored[name]
        changed = [
            name for name, stamp in found.items() if name not in self._stored or self._stored[name].stamp != stamp
        ]
        for name in tqdm(changed, desc="Aligners", leave=False, disable=len(changed) < 100):
            self._stored[name] = self._read(name, found[name])

    def get(self, name: str) -> tuple[Aligner, str | None]:
        """An Aligner as its file is now, on the model's device, and the style of its training prompts if known.

        Raises:
            ValueError: there is none of that name, or its file cannot be used; the message says why.
        """
        stored = self._current(name)
        if stored.values is None:
            raise ValueError(stored.error)
        aligner = Aligner(self._model.config, stored.length, stored.start_layer)
        tokens, gates = stored.values.split([aligner.tokens.numel(), aligner.gates.numel()])
        aligner.tokens.data, aligner.gates.data = tokens.view_as(aligner.tokens), gates.view_as(aligner.gates)
        return aligner.to(self._model.device).requires_grad_(False).eval(), stored.prompt_style

    def _current(self, name: str) -> StoredAligner:
        """What is stored under a name, read again if its file has changed."""
        path = self.folder / f"{name}.safetensors"
        is_inside = all(part and not part.startswith(".") for part in name.split("/"))
        try:
            is_there = is_inside and path.is_file()
        except (OSError, ValueError):  # no file can have such a name: it is too long, or has characters that none has
            is_there = False
        if is_there:
            stamp = _stamp(path.stat())
            if name not in self._stored or self._stored[name].stamp != stamp:
                self._stored[name] = self._read(name, stamp)
            return self._stored[name]
        self._stored.pop(name, None)
        near = get_close_matches(name[:100], self.names(), n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"no Aligner named {name[:100]!r} among {len(self)}{hint}")

    def _read(self, name: str, stamp: tuple[int, int]) -> StoredAligner:
        path = self.folder / f"{name}.safetensors"
        try:
            info = check_adapter(path, self._model, self._allow_other_base)
            aligner = load_adapter(path, "aligner")
        except (ValueError, OSError) as error:
            return StoredAligner(stamp, error=str(error))
        assert isinstance(aligner, Aligner)
        values = torch.cat([aligner.tokens.data.flatten(), aligner.gates.data.flatten()])
        sizes = info.config["length"], info.config["start_layer"]
        return StoredAligner(stamp, values, *sizes, info.prompt_style and intern(info.prompt_style))


def _aligner_files(folder: Path, prefix: str = "") -> Iterator[tuple[str, tuple[int, int]]]:
    """Name and stamp of each file, in this folder and in those in it."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):  # one that is being written
                continue
            if entry.is_dir():
                yield from _aligner_files(Path(entry.path), f"{prefix}{entry.name}/")
            elif entry.name.endswith(".safetensors"):
                try:
                    stamp = _stamp(entry.stat())
                except FileNotFoundError:  # it vanished
                    continue
                yield prefix + entry.name.removesuffix(".safetensors"), stamp


def _stamp(status: os.stat_result) -> tuple[int, int]:
    return status.st_mtime_ns, status.st_size
