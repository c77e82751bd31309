"""What each row of a batch adds to a layer, in tensors that have a place for every row.

Rows join and leave by writing to their own places; those of others stay as they are.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lit_llama.seam import ExpandedAdapter, LayerAdapter


class RowAdapters:
    """What each row of a batch adds to one layer.

    Prefixes and updates that differ in nothing but their numbers share tensors. Rows that have none of a kind have
    zeros there, which add nothing.

    Args:
        places: number of rows.
    """

    def __init__(self, places: int) -> None:
        self._places = places
        self._parts: dict[tuple, Any] = {}  # prefixes and updates, named tuples of tensors (places, ...)
        self._users: dict[tuple, set[int]] = {}  # of each, the rows that have it

    @property
    def nbytes(self) -> int:
        """Memory of all rows."""
        return sum(tensor.nbytes for part in self._parts.values() for tensor in _tensors(part))

    def put(self, rows: slice, adapter: LayerAdapter | ExpandedAdapter) -> None:
        """Write what some rows add.

        Args:
            rows: their places.
            adapter: in tensors of one row each, or of a single row if all of them add the same.

        Raises:
            TypeError: an update is not a named tuple.
        """
        self.clear(rows)
        for kind, part in _parts(adapter):
            if kind not in self._parts:
                zeros = (tensor.new_zeros(self._places, *tensor.shape[1:]) for tensor in _tensors(part))
                self._parts[kind], self._users[kind] = _with_tensors(part, zeros), set()
            for places, tensor in zip(_tensors(self._parts[kind]), _tensors(part), strict=True):
                places[rows] = tensor
            self._users[kind] |= _numbers(rows)

    def clear(self, rows: slice) -> None:
        """From now on these rows add nothing."""
        for kind in [kind for kind, users in self._users.items() if users & _numbers(rows)]:
            self._users[kind] -= _numbers(rows)
            if self._users[kind]:
                for places in _tensors(self._parts[kind]):
                    places[rows] = 0
            else:
                del self._parts[kind], self._users[kind]

    def move(self, source: int, target: int) -> None:
        """Let one row take the place of another, which is forgotten; where it stood, nothing is added."""
        if source != target:
            self.clear(slice(target, target + 1))
            for kind, users in self._users.items():
                if source in users:
                    users.add(target)
                    for places in _tensors(self._parts[kind]):
                        places[target] = places[source]
        self.clear(slice(source, source + 1))

    def view(self, rows: slice) -> tuple[tuple[Any, ...], dict[str, tuple[Any, ...]]]:
        """Prefixes and updates of some rows, in the same memory; as a `LayerAdapter` or `ExpandedAdapter` has them."""
        found: dict[str, tuple[Any, ...]] = {"prefix": ()}
        for (name, *_), part in self._parts.items():
            some = _with_tensors(part, (tensor[rows] for tensor in _tensors(part)))
            found[name] = (*found.get(name, ()), some)
        return found.pop("prefix"), found


def stacked(rows: Sequence[LayerAdapter]) -> LayerAdapter:
    """What rows add, each something else or nothing, as one for the batch."""
    same: dict[tuple, list[tuple[int, Any]]] = {}
    for row, adapter in enumerate(rows):
        for kind, part in _parts(adapter):
            same.setdefault(kind, []).append((row, part))
    found: dict[str, tuple[Any, ...]] = {"prefix": ()}
    for (name, *_), some in same.items():
        tensors = [torch.cat(fields) for fields in zip(*(_tensors(part) for _, part in some), strict=True)]
        if len(some) < len(rows):
            at = torch.tensor([row for row, _ in some], device=tensors[0].device)
            tensors = [tensor.new_zeros(len(rows), *tensor.shape[1:]).index_copy(0, at, tensor) for tensor in tensors]
        found[name] = (*found.get(name, ()), _with_tensors(some[0][1], iter(tensors)))
    return LayerAdapter(found.pop("prefix"), found)


def _parts(adapter: LayerAdapter | ExpandedAdapter) -> Iterator[tuple[tuple, Any]]:
    """Prefixes and updates, each with a key that is the same for those that can share tensors."""
    seen: Counter[tuple] = Counter()
    for name, parts in (("prefix", adapter.prefixes), *adapter.updates.items()):
        for part in parts:
            if not isinstance(part, tuple):
                raise TypeError(f"an update is a {type(part).__name__}; rows of a batch need named tuples of tensors")
            kind = name, type(part), *(field.shape[1:] if isinstance(field, Tensor) else field for field in part)
            seen[kind] += 1
            yield (*kind, seen[kind]), part


def _tensors(part: Any) -> list[Tensor]:
    return [field for field in part if isinstance(field, Tensor)]


def _with_tensors(part: Any, tensors: Iterator[Tensor]) -> Any:
    """A named tuple with other tensors in the place of its own."""
    return type(part)(*(next(tensors) if isinstance(field, Tensor) else field for field in part))


def _numbers(rows: slice) -> set[int]:
    return set(range(rows.start, rows.stop))
