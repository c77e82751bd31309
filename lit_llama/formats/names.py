"""Another project's weights under Lit-LLaMA's names: stacked as they are here, with rotary pairs interleaved."""

import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from lit_llama.config import LLaMAConfig
from lit_llama.model import ROTARY_PARTS, parameter_shapes
from lit_llama.tensor_files import refuse_names

LAYER = "transformer.h.{}."


class LitTensors(Mapping[str, Tensor]):
    """Weights of another project by Lit-LLaMA's names, each put together when it is asked for.

    Args:
        tensors: the source's tensors, best read lazily.
        names: for each Lit-LLaMA parameter name, "{}" in the place of the layer's number, the names of the source's
            tensors that it is stacked of.
        config: configuration of the model.
        place: where the tensors come from, for error messages.
        halved_rotary: the source's rows have each head's rotary pairs as two halves, not interleaved.

    Raises:
        ValueError: the source lacks a tensor, or has one too many.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        names: Mapping[str, list[str]],
        config: LLaMAConfig,
        place: object,
        halved_rotary: bool = False,
    ) -> None:
        self._tensors, self._place, self._config, self._halved_rotary = tensors, place, config, halved_rotary
        self._sources = {name: source_names(name, names) for name in parameter_shapes(config)}
        needed = {part for parts in self._sources.values() for part in parts}
        if needed != set(tensors):
            refuse_names(str(place), needed - set(tensors), set(tensors) - needed)

    def __getitem__(self, name: str) -> Tensor:
        sources = self._sources[name]
        rotary = ROTARY_PARTS.get(name.partition(".attn.")[2], 0) if self._halved_rotary else 0
        try:
            parts = [self._tensors[part] for part in sources]
            parts[:rotary] = [pairs_from_halves(part, self._config.head_size) for part in parts[:rotary]]
            return torch.cat(parts) if len(parts) > 1 else parts[0]
        except (RuntimeError, IndexError) as error:  # what torch says of shapes that do not fit each other
            reason = str(error).splitlines()[0]
            raise ValueError(f"{self._place}: {', '.join(sources)} do not make {name} ({reason})") from None

    def __contains__(self, name: object) -> bool:
        return name in self._sources

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)


def source_names(name: str, names: Mapping[str, list[str]]) -> list[str]:
    """The names of `names`, see `LitTensors`, for the parameter `name`, with its layer's number in them."""
    layer = re.search(r"\.h\.(\d+)\.", name)
    if layer is None:
        return names[name]
    return [part.format(layer[1]) for part in names[name.replace(layer[0], ".h.{}.")]]


def pairs_from_halves(rows: Tensor, head_size: int) -> Tensor:
    """Reorder each head's rows (heads * hs, ...) from rotary pairs as two halves, Hugging Face's, to interleaved."""
    return rows.unflatten(0, (-1, 2, head_size // 2)).transpose(1, 2).flatten(0, 2)


def halves_from_pairs(rows: Tensor, head_size: int) -> Tensor:
    """The inverse of `pairs_from_halves`."""
    return rows.unflatten(0, (-1, head_size // 2, 2)).transpose(1, 2).flatten(0, 2)
