"""Adapters combined: several added up, each scaled, or another one for each row of a batch."""

from collections.abc import Sequence

from lit_llama.row_adapters import RowAdapters
from lit_llama.seam import PROJECTIONS, Adapter, LayerAdapter


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
        """The rows' prefixes and updates, each kind of them with zeros for rows that have none."""
        rows = RowAdapters(len(self.adapters))
        for row, adapter in enumerate(self.adapters):
            if adapter is not None:
                rows.put(slice(row, row + 1), adapter.layer(index))
        return LayerAdapter(*rows.view(slice(0, len(self.adapters))))
