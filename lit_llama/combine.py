"""Adapters combined: several added up, each scaled, or another one for each row of a batch, or at each position."""

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from lit_llama.row_adapters import placed
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


class PerPosition:
    """An adapter whose contribution is multiplied by a number of its own at each position of a batch.

    Args:
        adapter: the adapter.
        share: the numbers, (B, T).
    """

    def __init__(self, adapter: Adapter, share: Tensor) -> None:
        self.adapter, self.share = adapter, share

    def layer(self, index: int) -> LayerAdapter:
        """All prefixes and updates, each with its share."""
        prefixes, updates = self.adapter.layer(index)
        return LayerAdapter(
            tuple(_times_share(prefix, self.share) for prefix in prefixes),
            {name: tuple(Shared(update, self.share) for update in some) for name, some in updates.items()},
        )


class OnPrompt:
    """An adapter on whole sequences, of which it is known where the prompt ends: what acts there alone ends there too.

    Args:
        adapter: the adapter.
        prompt: bool (B, T), the positions of the prompt.
    """

    def __init__(self, adapter: Adapter, prompt: Tensor) -> None:
        self.adapter, self.prompt = adapter, prompt

    def layer(self, index: int) -> LayerAdapter:
        """All prefixes and updates, the former at their positions."""
        added = self.adapter.layer(index)
        return added._replace(prefixes=tuple(map(self._placed, added.prefixes)))

    def _placed(self, prefix: LayerPrefix) -> LayerPrefix:
        if prefix.prompt_only is None:
            return prefix
        acts = self.prompt | ~prefix.prompt_only[:, None]  # (B, T)
        return _times_share(prefix._replace(prompt_only=None), acts.float())


def _times_share(prefix: LayerPrefix, share: Tensor) -> LayerPrefix:
    return prefix._replace(share=share if prefix.share is None else prefix.share * share)


class Shared(NamedTuple):
    """An update that is multiplied by `share` (B, T) at each position."""

    update: Update
    share: Tensor

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        return self.share[..., None].to(y.dtype) * self.update(x, y)

    def scaled(self, scale: float) -> "Shared":
        return self._replace(update=self.update.scaled(scale))


class PerRow:
    """Another adapter for each row of a batch, or none; of different methods and sizes.

    For generation: it has the values that the adapters have now, and they get no gradients.

    Args:
        adapters: the adapter of each row.
    """

    def __init__(self, adapters: Sequence[Adapter | None]) -> None:
        self._n_rows = len(adapters)
        alike: dict[Any, list[tuple[int, Adapter]]] = {}
        for row, adapter in enumerate(adapters):
            if adapter is not None:
                alike.setdefault(_kind(adapter) or row, []).append((row, adapter))
        self._parts = [([row for row, _ in some], _as_one([one for _, one in some])) for some in alike.values()]

    @torch.no_grad()
    def layer(self, index: int) -> LayerAdapter:
        """The rows' prefixes and updates, each kind of them with zeros for rows that have none."""
        return placed([(rows, adapter.layer(index)) for rows, adapter in self._parts], self._n_rows)


def _kind(adapter: Any) -> tuple | None:
    """The same for adapters that differ in their values alone; None for one whose `layer` takes no rows."""
    takes_rows = vars(type(adapter)).get("takes_rows", False)  # not inherited, as `layer` may be another
    return (type(adapter), adapter.training, repr(adapter.sizes)) if takes_rows else None


def _as_one(adapters: Sequence[Any]) -> Adapter:
    """Adapters of a kind as one whose parameters have a dimension for rows in front."""
    if len(adapters) == 1:
        return adapters[0]
    values = zip(*(adapter.parameters() for adapter in adapters), strict=True)
    stacks = {id(some[0]): nn.Parameter(torch.stack([one.detach() for one in some]), False) for some in values}
    return copy.deepcopy(adapters[0], stacks)  # a copy in which these take the place of its own
