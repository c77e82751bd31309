"""Bias: one free vector for each layer, added to the output of a projection: y = W x + b_l.

On the output projection it is what a one-token Aligner becomes when folded, but with every number of b_l free instead
of W_o concat_h(g_{l,h} v_{l,h}). On the value projection it is PEFT's BEFT (arXiv 2509.15974).
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from lit_llama.config import LLaMAConfig
from lit_llama.seam import LayerAdapter, by_row

Target = Literal["o", "v"]


class Constant(NamedTuple):
    """The update that adds the same vector, (1 or B, out), at every position."""

    vector: Tensor

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        return self.vector[:, None].to(y.dtype)  # (1 or B, 1, out)

    def scaled(self, scale: float) -> "Constant":
        return Constant(scale * self.vector)


class Bias(nn.Module):
    """A vector for each layer, zero at the start, always float32.

    Args:
        config: configuration of the base model.
        target: projection that the vectors are added to: "o", C wide, or "v", nkv * hs wide.
    """

    method = "bias"
    base_sizes = ("n_layer", "n_head", "n_embd", "n_kv_head", "head_size")
    takes_rows = True

    def __init__(self, config: LLaMAConfig, target: Target = "o") -> None:
        super().__init__()
        self.sizes = {name: getattr(config, name) for name in self.base_sizes} | {"target": target}
        self.target: Target = target
        self.vectors = nn.Parameter(torch.zeros(config.n_layer, config.width(target)[1], dtype=torch.float32))

    def layer(self, index: int) -> LayerAdapter:
        return LayerAdapter(updates={self.target: (Constant(by_row(self.vectors[..., index, :], 1)),)})

    def scale_(self, scale: float) -> None:
        self.vectors.data.mul_(scale)

    @classmethod
    def merged(cls, config: LLaMAConfig, terms: Sequence[tuple["Bias", float]]) -> "Bias":
        merged = cls(config, terms[0][0].target)
        if any(bias.target != merged.target for bias, _ in terms):
            raise ValueError("a bias of the output projection and one of the value projection cannot be one")
        merged.vectors.data = torch.stack([scale * bias.vectors.data for bias, scale in terms]).sum(0)
        return merged
