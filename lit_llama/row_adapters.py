"""What each row of a batch adds to the layers, in tensors that have a place for every row.

Rows join and leave by writing to their own places; those of others stay as they are.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lit_llama.seam import ExpandedAdapter, LayerAdapter


class RowAdapters:
    """What each row of a batch adds to each layer.

    Prefixes and updates that differ in nothing but their numbers share tensors, of all layers. Rows that have none of a
    kind have zeros there, which add nothing.

    Args:
        places: number of rows.
    """

    def __init__(self, places: int) -> None:
        self._places = places
        self._parts: dict[tuple, Any] = {}  # prefixes and updates, named tuples of tensors (layers, places, ...)
        self._users: dict[tuple, set[int]] = {}  # of each, the rows that have it
        self._layers: dict[tuple, set[int]] = {}  # of each, the layers in which a row has it, or one that has ended

    @property
    def nbytes(self) -> int:
        """Memory of all rows."""
        return sum(tensor.nbytes for part in self._parts.values() for tensor in _tensors(part))

    def put(self, rows: slice, layers: Sequence[LayerAdapter | ExpandedAdapter]) -> None:
        """Write what some rows add.

        Args:
            rows: their places.
            layers: to each layer, in tensors of one row each, or of a single row if all of them add the same.

        Raises:
            TypeError: an update is not a named tuple.
        """
        self.clear(rows)
        for layer, adapter in enumerate(layers):
            for kind, part in _parts(adapter):
                if kind not in self._parts:
                    shape = len(layers), self._places
                    zeros = (tensor.new_zeros(*shape, *tensor.shape[1:]) for tensor in _tensors(part))
                    self._parts[kind], self._users[kind], self._layers[kind] = _with_tensors(part, zeros), set(), set()
                for places, tensor in zip(_tensors(self._parts[kind]), _tensors(part), strict=True):
                    places[layer, rows] = tensor
                self._users[kind] |= _numbers(rows)
                self._layers[kind].add(layer)

    def clear(self, rows: slice) -> None:
        """From now on these rows add nothing."""
        for kind in [kind for kind, users in self._users.items() if users & _numbers(rows)]:
            self._users[kind] -= _numbers(rows)
            if self._users[kind]:
                for places in _tensors(self._parts[kind]):
                    places[:, rows] = 0
            else:
                del self._parts[kind], self._users[kind], self._layers[kind]

    def move(self, source: int, target: int) -> None:
        """Let one row take the place of another, which is forgotten; where it stood, nothing is added."""
        if source != target:
            self.clear(slice(target, target + 1))
            for kind, users in self._users.items():
                if source in users:
                    users.add(target)
                    for places in _tensors(self._parts[kind]):
                        places[:, target] = places[:, source]
        self.clear(slice(source, source + 1))

    def view(self, rows: slice, n_layer: int) -> list[ExpandedAdapter]:
        """What some rows add to each layer, in the same memory."""
        found: list[dict[str, tuple[Any, ...]]] = [{"prefix": ()} for _ in range(n_layer)]
        for kind, part in self._parts.items():
            name = kind[0]
            for layer in self._layers[kind]:
                some = _with_tensors(part, (places[layer, rows] for places in _tensors(part)))
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


def _numbers(rows: slice) -> set[int]:
    return set(range(rows.start, rows.stop))
