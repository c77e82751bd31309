"""A folder of adapters, opened by name: thousands of them in memory, as the few numbers that they are."""

import json
import os
import re
from collections import deque
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from tqdm import tqdm

from lit_llama.adapters import FORMER_METHODS, METHODS, AnyAdapter, adapter_without_values
from lit_llama.formats.peft import WEIGHTS_FILE
from lit_llama.model import LLaMA
from lit_llama.together import Bits, check_adapters, read_adapters

Stamp = tuple[int, int, int]
# What an adapter is called in the folder of its run, or in PEFT's, without .safetensors.
RUN_FILES = (*METHODS, *FORMER_METHODS, WEIGHTS_FILE.removesuffix(".safetensors"))


class Kind(NamedTuple):
    """What adapters that differ in their values alone have in common.

    Args:
        method: a key of `lit_llama.adapters.METHODS`.
        sizes: `sizes` of the adapter.
        style: name of the prompt style to use.
    """

    method: str
    sizes: dict[str, Any]
    style: str


class StoredAdapter(NamedTuple):
    """An adapter at rest.

    Args:
        stamp: time of change, size and number of its file; another file of the same name has another one.
        kind: shared by all adapters of the kind; None if the file cannot be used.
        values: all tensors of the adapter's `state_dict`, flat and one after the other, on the CPU.
        error: why the file cannot be used.
    """

    stamp: Stamp
    kind: Kind | None = None
    values: Tensor | None = None
    error: str = ""


class AdapterStore:
    """The adapters of a folder and of the folders in it, each named by its path without `.safetensors`.

    The adapter of a run, such as `demo/aligner.safetensors`, also goes by the name of its folder, `demo`, and so does
    one in PEFT's format, `demo/adapter_model.safetensors`; unless the folder holds adapters of several methods. Earlier
    runs that a new one has moved to `previous-N`, and the runs of a search for learning rates, are left out.

    An adapter costs 4 bytes for each of its numbers, and a little for the bookkeeping; keys and values are computed
    only for rows that are generated. Files that cannot be used do not stop the others: asking for one says what is
    wrong with it.

    Args:
        folder: where the files are.
        model: the base model that they must belong to; without weights will do, if it has their fingerprint.
        quantize: how the weights of the base are quantised, or "none", if somebody chose that; then it holds for all
            adapters. If None, those that were trained on a quantised base are refused.
        allow_other_base: accept adapters of other weights of the same sizes.

    Raises:
        FileNotFoundError: there is no such folder.
    """

    def __init__(
        self, folder: Path, model: LLaMA, allow_other_base: bool = False, quantize: Bits | None = None
    ) -> None:
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder of adapters")
        self.folder = folder
        self._model = model
        self._allow_other_base = allow_other_base
        self._quantize = quantize
        self._stored: dict[str, StoredAdapter] = {}
        self._kinds: dict[str, Kind] = {}
        self._opened: WeakValueDictionary[tuple[str, Stamp, float], AnyAdapter] = WeakValueDictionary()
        self.refresh()

    def __len__(self) -> int:
        return len(self.names())

    def names(self) -> list[str]:
        """Names of the adapters that can be used, sorted; a run's is that of its folder where that is clear."""
        return sorted(self._short(name) for name, stored in self._stored.items() if stored.kind is not None)

    def unusable(self) -> dict[str, str]:
        """What is wrong with the files that cannot be used, by their names."""
        return {name: stored.error for name, stored in sorted(self._stored.items()) if stored.kind is None}

    def get(self, name: str, scale: float = 1.0) -> AnyAdapter:
        """An adapter as its file is now, on the model's device; the same object as long as somebody has it.

        Args:
            name: its name.
            scale: number that what it adds is multiplied by.

        Raises:
            ValueError: there is none of that name, or its file cannot be used; the message says why.
        """
        file = self._file(name)
        stored = self._current(file)
        if stored.kind is None or stored.values is None:
            raise ValueError(stored.error)
        key = (file, stored.stamp, scale)
        opened = self._opened.get(key)
        if opened is not None:
            return opened
        adapter = adapter_without_values(stored.kind.method, stored.kind.sizes)
        tensors = adapter.state_dict()
        values = stored.values if scale == 1 else stored.values.clone()
        parts = values.split([tensor.numel() for tensor in tensors.values()])
        loaded = {one: part.view(tensors[one].shape) for one, part in zip(tensors, parts, strict=True)}
        adapter.load_state_dict(loaded, assign=True)
        adapter.requires_grad_(False)
        if scale != 1:
            adapter.scale_(scale)
        self._opened[key] = adapter = adapter.to(self._model.device).eval()
        return adapter

    def style(self, name: str) -> str:
        """Name of the prompt style to use with an adapter, as its file is now.

        Raises:
            ValueError: as `get`.
        """
        stored = self._current(self._file(name))
        if stored.kind is None:
            raise ValueError(stored.error)
        return stored.kind.style

    def refresh(self) -> None:
        """Read files that are new or changed, and forget those that are gone."""
        files = _adapter_files(self.folder)
        found = {name: stamp for name, stamp in files if not _is_set_aside(self.folder, name)}
        for name in self._stored.keys() - found.keys():
            del self._stored[name]
        changed = [
            name for name, stamp in found.items() if name not in self._stored or self._stored[name].stamp != stamp
        ]
        for name in tqdm(changed, desc="adapters", leave=False, disable=len(changed) < 100):
            self._stored[name] = self._read(name, found[name])

    def _short(self, name: str) -> str:
        """The shortest name of a stored file: for a run's adapter that of its folder, unless that means another."""
        run, _, file = name.rpartition("/")
        is_run = run and file in RUN_FILES and run not in self._stored
        return run if is_run and sum(f"{run}/{other}" in self._stored for other in RUN_FILES) == 1 else name

    def _file(self, name: str) -> str:
        """Path of an adapter's file in the folder, without `.safetensors`: its name, or that of the one in a run.

        Raises:
            ValueError: it is not to be used.
        """

        def exists(path: str) -> bool:  # takes any name, however long or strange
            return os.path.isfile(self.folder / f"{path}.safetensors")

        if not exists(name):
            in_run = [f"{name}/{file}" for file in RUN_FILES if exists(f"{name}/{file}")]
            name = in_run[0] if len(in_run) == 1 else name
        if _is_set_aside(self.folder, name):
            raise ValueError(
                f"{name[:100]!r} belongs to an earlier run or to a search for learning rates; these are left out"
            )
        return name

    def _current(self, name: str) -> StoredAdapter:
        """What is stored under the name of a file, read again if that has changed."""
        path = self.folder / f"{name}.safetensors"
        is_inside = all(part and not part.startswith(".") for part in name.split("/"))
        try:
            stamp = _stamp(path.stat()) if is_inside and path.is_file() else None
        except (OSError, ValueError):  # a name that is too long, or a folder that may not be read
            stamp = None
        if stamp is None:
            self._stored.pop(name, None)
            inside = [one for one in self.names() if one.startswith(f"{name}/")]
            near = inside[:3] or get_close_matches(name[:100], self.names(), n=3)
            hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
            raise ValueError(f"no adapter named {name[:100]!r} among {len(self)}{hint}")
        if name not in self._stored or self._stored[name].stamp != stamp:
            self._stored[name] = self._read(name, stamp)
        return self._stored[name]

    def _read(self, name: str, stamp: Stamp) -> StoredAdapter:
        path = self.folder / f"{name}.safetensors"
        try:
            [one] = read_adapters(path, self._model.config)
            bits = "none" if self._quantize is None else None
            check_adapters([one], self._model, bits, allow_other_base=self._allow_other_base)
            assert isinstance(one.adapter, AnyAdapter)
            assert one.info is not None
            values = torch.cat([tensor.flatten() for tensor in one.adapter.state_dict().values()])
        except Exception as error:  # a fault of any kind in one file must not stop the others
            # Those who ask are told of the name that they know, not of the folder.
            return StoredAdapter(stamp, error=str(error).replace(str(path), path.name) or type(error).__name__)
        kind = Kind(one.info.method, one.info.config, one.info.style)
        return StoredAdapter(stamp, self._kinds.setdefault(json.dumps(kind), kind), values)


def _is_set_aside(folder: Path, name: str) -> bool:
    """Whether a file belongs to an earlier run, which a new one has moved away, or to a search for learning rates."""
    *folders, _ = name.split("/")
    for i, part in enumerate(folders):
        if re.fullmatch(r"previous-\d+", part):
            return True
        if part == "search" and os.path.isfile(folder.joinpath(*folders[: i + 1], "data", "dataset.json")):
            return True
    return False


def _adapter_files(folder: Path) -> Iterator[tuple[str, Stamp]]:
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
