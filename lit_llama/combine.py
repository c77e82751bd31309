"""Adapters combined: several added up, each scaled, or another one for each row of a batch."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lit_llama.seam import PROJECTIONS, Adapter, LayerAdapter, LayerPrefix, Update


class WeightedSum:
    """Several adapters at once: what they contribute is scaled and added up.

    A scale of 0 is the base model, 1 the adapter as it was trained.

    Args:
        terms: pairs of an adapter and its scale.
    """

    def __init__(self, *terms: tuple[Adapter, float]) -> None:
        self.terms = terms

    def layer(self, index: int) -> LayerAdapter:
        """All prefixes and all updates."""
        layers = [(adapter.layer(index), scale) for adapter, scale in self.terms]
        prefixes = tuple(prefix.scaled(scale) for layer, scale in layers for prefix in layer.prefixes)
        updates = {
            name: tuple(update.scaled(scale) for layer, scale in layers for update in layer.updates.get(name, ()))
            for name in PROJECTIONS
        }
        return LayerAdapter(prefixes, {name: some for name, some in updates.items() if some})


class PerRow:
    """Another adapter for each row of a batch, or none; of different methods and sizes.

    Args:
        adapters: the adapter of each row.
    """

    def __init__(self, adapters: Sequence[Adapter | None]) -> None:
        self.adapters = adapters

    def layer(self, index: int) -> LayerAdapter:
        """The rows' prefixes, padded to as many and to the same length, and their updates likewise."""
        rows = [LayerAdapter() if adapter is None else adapter.layer(index) for adapter in self.adapters]
        most = max(len(row.prefixes) for row in rows)
        prefixes = [
            _stack_prefixes([row.prefixes[j] if j < len(row.prefixes) else None for row in rows]) for j in range(most)
        ]
        updates = {name: _stack_updates([row.updates.get(name, ()) for row in rows]) for name in PROJECTIONS}
        return LayerAdapter(tuple(prefixes), {name: some for name, some in updates.items() if some})


def _stack_prefixes(prefixes: Sequence[LayerPrefix | None]) -> LayerPrefix:
    """One prefix for the batch; rows without one get a token of zeros behind closed gates."""
    some = next(prefix for prefix in prefixes if prefix is not None)
    none = LayerPrefix(torch.zeros_like(some.tokens[:, :1]), torch.zeros_like(some.gates))
    rows = [prefix or none for prefix in prefixes]
    lengths = torch.tensor([row.tokens.size(1) for row in rows], device=some.tokens.device)
    longest = int(lengths.max())
    mask = torch.arange(longest, device=lengths.device) < lengths[:, None]  # (B, N)
    tokens = pad_sequence([row.tokens[0] for row in rows], batch_first=True)  # (B, N, C)
    return LayerPrefix(tokens, torch.cat([row.gates for row in rows]), None if bool(mask.all()) else mask)


def _stack_updates(rows: Sequence[tuple[Update, ...]]) -> tuple[Update, ...]:
    """Updates of one projection for the batch: those of a kind in one, with zeros for rows that have none of it."""
    stacked: list[Update] = []
    for kind in dict.fromkeys(type(update) for row in rows for update in row):
        of_kind = [[update for update in row if type(update) is kind] for row in rows]
        for j in range(max(map(len, of_kind))):
            stacked.append(_stack_kind([row[j] if j < len(row) else None for row in of_kind]))
    return tuple(stacked)


def _stack_kind(rows: Sequence[Any]) -> Update:
    """One update for the batch, its tensors padded with zeros to the largest."""
    some = next(row for row in rows if row is not None)
    fields: dict[str, Any] = {}
    for name, value in some._asdict().items():
        if isinstance(value, Tensor):
            parts = [value[:1] * 0 if row is None else getattr(row, name) for row in rows]
            shape = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
            fields[name] = torch.cat([_padded(part, shape) for part in parts])
        else:
            fields[name] = value
    return type(some)(**fields)


def _padded(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """A tensor (1, ...) with zeros after each dimension but the first, up to `shape`."""
    missing = [wanted - size for wanted, size in zip(shape, tensor.shape[1:], strict=True)]
    return F.pad(tensor, [part for n in reversed(missing) for part in (0, n)])
