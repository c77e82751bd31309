"""Adapters combined: several added up, each scaled, or another one for each row of a batch."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lit_llama.model import Adapter, LayerAdapter, LayerPrefix


class Sum:
    """Several adapters at once: what they contribute is scaled and added up.

    A scale of 0 is the base model, 1 the adapter as it was trained. It multiplies the gates of a prefix and the update
    of a projection.

    Args:
        terms: pairs of an adapter and its scale.
    """

    def __init__(self, *terms: tuple[Adapter, float]) -> None:
        self.terms = terms

    def layer(self, index: int) -> LayerAdapter:
        """All prefixes, and one sum of updates for each projection."""
        prefixes: list[LayerPrefix] = []
        updates: dict[str, Callable[[Tensor], Tensor]] = {}
        for adapter, scale in self.terms:
            added = adapter.layer(index)
            prefixes += [prefix._replace(gates=scale * prefix.gates) for prefix in added.prefixes]
            for name, update in added.updates.items():
                updates[name] = _plus(updates.get(name), scale, update)
        return LayerAdapter(tuple(prefixes), updates)


def _plus(
    first: Callable[[Tensor], Tensor] | None, scale: float, second: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], Tensor]:
    if first is None:
        return lambda x: scale * second(x)
    return lambda x: first(x) + scale * second(x)


class PerRow:
    """Another adapter for each row of a batch, or none; of different lengths and start layers.

    Args:
        adapters: of each row; they may have prefixes, but no updates of projections.

    Raises:
        ValueError: one has updates, as a LoRA does.
    """

    def __init__(self, adapters: Sequence[Adapter | None]) -> None:
        self.adapters = adapters

    def layer(self, index: int) -> LayerAdapter:
        """The rows' prefixes, padded to as many and to the same length."""
        added = [LayerAdapter() if adapter is None else adapter.layer(index) for adapter in self.adapters]
        if any(row.updates for row in added):
            raise ValueError("a LoRA applies to all rows of a batch; Aligners and LLaMA-Adapters can differ by row")
        return LayerAdapter(
            tuple(
                _stack([row.prefixes[j] if j < len(row.prefixes) else None for row in added])
                for j in range(max(len(row.prefixes) for row in added))
            )
        )


def _stack(prefixes: Sequence[LayerPrefix | None]) -> LayerPrefix:
    """One prefix for the batch; rows without one get a token of zeros behind closed gates."""
    some = next(prefix for prefix in prefixes if prefix is not None)
    none = LayerPrefix(torch.zeros_like(some.tokens[:, :1]), torch.zeros_like(some.gates))
    rows = [prefix or none for prefix in prefixes]
    lengths = torch.tensor([row.tokens.size(1) for row in rows], device=some.tokens.device)
    longest = int(lengths.max())
    mask = torch.arange(longest, device=lengths.device) < lengths[:, None]  # (B, N)
    tokens = pad_sequence([row.tokens[0] for row in rows], batch_first=True)  # (B, N, C)
    return LayerPrefix(tokens, torch.cat([row.gates for row in rows]), None if bool(mask.all()) else mask)
