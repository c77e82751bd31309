"""What each row of a batch adds to the layers, in tensors that have room for every row.

Rows join and leave by writing to their own places; those of others stay as they are.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_llama.seam import ExpandedAdapter, LayerAdapter


class Places(NamedTuple):
    """Room for one kind of prefix or update, for every row in every layer.

    Args:
        part: the prefix or update, of tensors (layers, rows, ...); zeros, which add nothing, where a row has none.
        users: rows that have it.
        layers: those in which a row has it, or had it.
    """

    part: Any
    users: set[int]
    layers: set[int]

    @classmethod
    def like(cls, part: Any, layers: int, rows: int) -> "Places":
        """Room for what is like this one, which is of one row or a few in one layer."""
        zeros = (tensor.new_zeros(layers, rows, *tensor.shape[1:]) for tensor in _tensors(part))
        return cls(_with_tensors(part, zeros), set(), set())


class RowAdapters:
    """What each row of a batch adds to each layer.

    Prefixes and updates that differ in nothing but their numbers share tensors.

    Args:
        rows: number of rows.
    """

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._kinds: dict[tuple, Places] = {}

    @property
    def nbytes(self) -> int:
        """Memory of all rows."""
        return sum(tensor.nbytes for places in self._kinds.values() for tensor in _tensors(places.part))

    def put(self, rows: slice, layers: Sequence[LayerAdapter | ExpandedAdapter]) -> None:
        """Write what some rows add.

        Args:
            rows: which.
            layers: to each layer, in tensors of one row each, or of a single row if all of them add the same.

        Raises:
            TypeError: an update is not a named tuple.
        """
        self.clear(rows)
        for layer, adapter in enumerate(layers):
            for kind, part in _parts(adapter):
                if kind not in self._kinds:
                    self._kinds[kind] = Places.like(part, len(layers), self._rows)
                places = self._kinds[kind]
                places.users.update(_numbers(rows))
                places.layers.add(layer)
                for room, tensor in zip(_tensors(places.part), _tensors(part), strict=True):
                    room[layer, rows] = tensor

    def clear(self, rows: slice) -> None:
        """From now on these rows add nothing."""
        for kind, places in list(self._kinds.items()):
            if places.users.isdisjoint(_numbers(rows)):
                continue
            places.users.difference_update(_numbers(rows))
            if places.users:
                for room in _tensors(places.part):
                    room[:, rows] = 0
            else:
                del self._kinds[kind]

    def move(self, source: int, target: int) -> None:
        """Let one row take the place of another, which is forgotten; where it stood, nothing is added."""
        if source != target:
            self.clear(slice(target, target + 1))
            for places in self._kinds.values():
                if source in places.users:
                    places.users.add(target)
                    for room in _tensors(places.part):
                        room[:, target] = room[:, source]
        self.clear(slice(source, source + 1))

    def view(self, rows: slice, n_layer: int) -> list[ExpandedAdapter]:
        """What some rows add to each layer, in the same memory."""
        found: list[dict[str, tuple[Any, ...]]] = [{"prefix": ()} for _ in range(n_layer)]
        for (name, *_), places in self._kinds.items():
            for layer in places.layers:
                some = _with_tensors(places.part, (room[layer, rows] for room in _tensors(places.part)))
                found[layer][name] = (*found[layer].get(name, ()), some)
        return [ExpandedAdapter(parts.pop("prefix"), parts) for parts in found]


def placed(parts: Sequence[tuple[list[int], LayerAdapter]], n_rows: int) -> LayerAdapter:
    """What rows of a batch add, each something else or nothing, as one for the batch.

    Args:
        parts: numbers of some rows, and what these add.
        n_rows: number of all.

    Raises:
        TypeError: an update is not a named tuple, or an adapter's tensors have another number of rows than it has.
    """
    same: dict[tuple, list[tuple[list[int], Any]]] = {}
    for rows, adapter in parts:
        for kind, part in _parts(adapter):
            same.setdefault(kind, []).append((rows, part))
    found: dict[str, tuple[Any, ...]] = {"prefix": ()}
    for (name, *_), some in same.items():
        at = [row for rows, _ in some for row in rows]
        tensors = [_joined(fields) for fields in zip(*(_tensors(part) for _, part in some), strict=True)]
        sizes = [tensor.size(0) for tensor in tensors]
        if any(size != len(at) for size in sizes):
            raise TypeError(f"tensors of {sizes} rows for what {len(at)} add: see `takes_rows` in lit_llama.seam")
        if at != list(range(n_rows)):
            to = torch.tensor(at, device=tensors[0].device)
            tensors = [tensor.new_zeros(n_rows, *tensor.shape[1:]).index_copy(0, to, tensor) for tensor in tensors]
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


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))  # which copies even a single one


def _tensors(part: Any) -> list[Tensor]:
    return [field for field in part if isinstance(field, Tensor)]


def _with_tensors(part: Any, tensors: Iterator[Tensor]) -> Any:
    """A named tuple with other tensors in the place of its own."""
    return type(part)(*(next(tensors) if isinstance(field, Tensor) else field for field in part))


def _numbers(rows: slice) -> range:
    return range(rows.start, rows.stop)
