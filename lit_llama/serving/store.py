"""A folder of Aligners, opened by name: thousands of them in memory, as the few numbers that they are."""

import os
import re
from collections import deque
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from sys import intern
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from lit_llama.adapters import read_adapter
from lit_llama.aligner import Aligner
from lit_llama.model import LLaMA

Stamp = tuple[int, int, int]


class StoredAligner(NamedTuple):
    """An Aligner at rest.

    Args:
        stamp: time of change, size and number of its file; another file of the same name has another one.
        values: tokens (N, C) and gates (layers, nh), flat, on the CPU; None if the file is not to be used.
        length: number of prefix tokens N.
        start_layer: first layer that attends to them.
        prompt_style: of its training prompts, if known.
        error: why it is not to be used.
    """

    stamp: Stamp
    values: Tensor | None = None
    length: int = 0
    start_layer: int = 0
    prompt_style: str | None = None
    error: str = ""


class AlignerStore:
    """The Aligners of a folder and of the folders in it, each named by its path without `.safetensors`.

    That of a run, `demo/aligner.safetensors`, goes by the name of its folder, `demo`, as well. Earlier runs that a new
    one has moved to `previous-N`, and the runs of a search for learning rates, are left out.

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
        """Of the Aligners that can be used, sorted; a run's has the name of its folder, unless a file has it."""
        usable = [name for name, stored in self._stored.items() if stored.values is not None]
        short = {name: name.removesuffix("/aligner") for name in usable}
        return sorted(name if short[name] in self._stored else short[name] for name in usable)

    def _file(self, name: str) -> str:
        """Path of an Aligner's file in the folder, without `.safetensors`: its name, or `aligner` in a run's folder.

        Raises:
            ValueError: it is not to be used.
        """
        run = f"{name}/aligner"
        exists = os.path.isfile  # which takes any name, however long or strange
        if not exists(self.folder / f"{name}.safetensors") and exists(self.folder / f"{run}.safetensors"):
            name = run
        if _is_set_aside(self.folder, name):
            raise ValueError(f"{name[:100]!r} is of an earlier run or of a search's, which are not Aligners to use")
        return name

    def refresh(self) -> None:
        """Read files that are new or changed, and forget those that are gone."""
        files = _aligner_files(self.folder)
        found = {name: stamp for name, stamp in files if not _is_set_aside(self.folder, name)}
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
        name = self._file(name)
        path = self.folder / f"{name}.safetensors"
        is_inside = all(part and not part.startswith(".") for part in name.split("/"))
        try:
            stamp = _stamp(path.stat()) if is_inside and path.is_file() else None
        except (OSError, ValueError):  # a name that is too long, or a folder that may not be read
            stamp = None
        if stamp is None:
            self._stored.pop(name, None)
            near = get_close_matches(name[:100], self.names(), n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise ValueError(f"no Aligner named {name[:100]!r} among {len(self)}{hint}")
        if name not in self._stored or self._stored[name].stamp != stamp:
            self._stored[name] = self._read(name, stamp)
        return self._stored[name]

    def _read(self, name: str, stamp: Stamp) -> StoredAligner:
        path = self.folder / f"{name}.safetensors"
        try:
            aligner, info = read_adapter(path, "aligner", self._model, self._allow_other_base)
        except Exception as error:  # whatever is wrong with one file must not stop the others
            # Those who ask are told of the name that they know, not of the folder.
            return StoredAligner(stamp, error=str(error).replace(str(path), path.name) or type(error).__name__)
        assert isinstance(aligner, Aligner)
        values = torch.cat([aligner.tokens.data.flatten(), aligner.gates.data.flatten()])
        sizes = info.config["length"], info.config["start_layer"]
        return StoredAligner(stamp, values, *sizes, info.prompt_style and intern(info.prompt_style))


def _is_set_aside(folder: Path, name: str) -> bool:
    """Whether an Aligner is of an earlier run, which a new one has moved away, or of a search for learning rates."""
    *folders, _ = name.split("/")
    for i, part in enumerate(folders):
        if re.fullmatch(r"previous-\d+", part):
            return True
        if part == "search" and os.path.isfile(folder.joinpath(*folders[: i + 1], "data", "dataset.json")):
            return True
    return False


def _aligner_files(folder: Path) -> Iterator[tuple[str, Stamp]]:
    """Name and stamp of each file, in this folder and in those in it.

    Links to folders are followed after all that lies in the folder itself, and each folder is visited once, so that a
    link to a folder above it has no end.
    """
    waiting = deque([(folder, "")])
    visited: set[tuple[int, int]] = set()
    while waiting:
        path, prefix = waiting.popleft()
        try:
            status = path.stat()
            entries = sorted(os.scandir(path), key=lambda entry: entry.name)
        except OSError:  # it vanished, or may not be read
            continue
        if (status.st_dev, status.st_ino) in visited:
            continue
        visited.add((status.st_dev, status.st_ino))
        for entry in entries:
            if entry.name.startswith("."):  # one that is being written
                continue
            try:
                entry.name.encode()
                if entry.is_dir(follow_symlinks=False):
                    waiting.appendleft((Path(entry.path), f"{prefix}{entry.name}/"))
                elif entry.is_dir():
                    waiting.append((Path(entry.path), f"{prefix}{entry.name}/"))
                elif entry.name.endswith(".safetensors") and entry.is_file():
                    yield prefix + entry.name.removesuffix(".safetensors"), _stamp(entry.stat())
            except (OSError, UnicodeEncodeError):  # it vanished, is a link to itself, or no text names it
                continue


def _stamp(status: os.stat_result) -> Stamp:
    return status.st_mtime_ns, status.st_size, status.st_ino
