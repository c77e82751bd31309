"""LoRA: low-rank updates of a frozen model's projections (arXiv 2106.09685).

For each chosen projection W,

    y = W x + (alpha / r) B A dropout(x),   A (r, in), B (out, r)

with B zero at the start.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from lit_llama.config import LLaMAConfig
from lit_llama.seam import PROJECTIONS, LayerAdapter, by_row


class LowRank(NamedTuple):
    """B A x.

    Args:
        a: (1 or B, r, in).
        b: (1 or B, out, r), times alpha / r.
        dropout: share of the input that is zeroed.
    """

    a: Tensor
    b: Tensor
    dropout: float = 0.0

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        x = F.dropout(x, self.dropout) if self.dropout else x
        return _times(_times(x, self.a), self.b)  # (B, T, out)

    def scaled(self, scale: float) -> "LowRank":
        return self._replace(b=scale * self.b)


def _times(x: Tensor, weight: Tensor) -> Tensor:
    """(B, T, in) times (1 or B, out, in), each row with its own weight or all with the same."""
    weight = weight.to(x.dtype)
    return F.linear(x, weight[0]) if weight.size(0) == 1 else x @ weight.mT


class Factors(nn.Module):
    """A and B of one projection, `r * (in + out)` parameters, always float32."""

    def __init__(self, size_in: int, size_out: int, r: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.empty(r, size_in, dtype=torch.float32))
        self.b = nn.Parameter(torch.zeros(size_out, r, dtype=torch.float32))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))


class LoRA(nn.Module):
    """Low-rank updates in all layers. A fresh LoRA leaves the base model exactly as it is.

    Args:
        config: configuration of the base model.
        r: rank.
        alpha: updates are multiplied by alpha / r.
        dropout: share of the projections' inputs that is zeroed in training, for the update alone.
        targets: the projections to update: of the attention's "q", "k", "v", "o", the MLP's "gate", "up", "down".

    Attributes:
        sizes: those of the base model, and the arguments that built it, for its file.

    Raises:
        ValueError: a rank below one, a dropout that is no share, an unknown projection, or none.
    """

    method = "lora"
    base_sizes = ("n_layer", "n_head", "n_embd", "n_kv_head", "head_size", "intermediate_size")
    takes_rows = True

    def __init__(
        self,
        config: LLaMAConfig,
        r: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        targets: Sequence[str] = ("q", "v"),
    ) -> None:
        super().__init__()
        if r < 1:
            raise ValueError(f"a LoRA needs a rank of at least 1, got {r}")
        if not 0 <= dropout < 1:
            raise ValueError(f"a LoRA's dropout must be at least 0 and below 1, got {dropout}")
        if not targets or not set(targets) <= set(PROJECTIONS):
            raise ValueError(f"a LoRA updates some of {', '.join(PROJECTIONS)}, got {', '.join(targets) or 'none'}")
        targets = [name for name in PROJECTIONS if name in targets]  # each once, in the order of the computation
        self.sizes: dict[str, Any] = {name: getattr(config, name) for name in self.base_sizes}
        self.sizes |= {"r": r, "alpha": alpha, "dropout": dropout, "targets": targets}
        self.factor = alpha / r
        self.dropout = dropout
        self.layers = nn.ModuleList(
            nn.ModuleDict({name: Factors(*config.width(name), r) for name in targets}) for _ in range(config.n_layer)
        )

    def layer(self, index: int) -> LayerAdapter:
        """The layer's updates."""
        dropout = self.dropout if self.training else 0.0
        return LayerAdapter(
            updates={
                name: (LowRank(by_row(one.a, 2), self.factor * by_row(one.b, 2), dropout),)
                for name, one in self.factors(index).items()
            }
        )

    def factors(self, index: int) -> Mapping[str, Factors]:
        """A and B of a layer's projections, by name."""
        return self.layers[index]  # type: ignore[return-value] (a ModuleDict is a mapping in all but type)

    @torch.no_grad()
    def scale_(self, scale: float) -> None:
        """Multiply what is added by a number."""
        for name, parameter in self.named_parameters():
            if name.endswith(".b"):
                parameter.mul_(scale)

    @classmethod
    @torch.no_grad()
    def merged(cls, config: LLaMAConfig, terms: Sequence[tuple["LoRA", float]]) -> "LoRA":
        """One LoRA that adds what several do, each scaled: B1 A1 s1 + B2 A2 s2 = [B1 s1, B2 s2] [A1; A2]."""
        rank = sum(lora.sizes["r"] for lora, _ in terms)
        merged = cls(config, rank, rank, targets=[name for lora, _ in terms for name in lora.sizes["targets"]])
        for index in range(config.n_layer):
            first = 0
            for lora, scale in terms:
                rows = slice(first, first := first + lora.sizes["r"])
                for name, own in lora.factors(index).items():
                    wide = merged.factors(index)[name]
                    wide.a[rows], wide.b[:, rows] = own.a, scale * lora.factor * own.b
        return merged
