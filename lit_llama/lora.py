"""LoRA: low-rank updates of a frozen model's projections (arXiv 2106.09685).

For each chosen projection W,

    y = W x + (alpha / r) B A dropout(x),   A (r, in), B (out, r)

with B zero at the start. The updates are handed to the model with the forward pass, as prefixes are, and not built into
its layers: one frozen base, quantised or sharded too, serves any number of them. `merge` makes them part of the weights
for good.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from lit_llama.model import LayerAdapter, LLaMA, LLaMAConfig
from lit_llama.quantization import is_quantized

PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")


class LowRank(nn.Module):
    """The update of one projection, `r * (in + out)` parameters, always float32.

    Args:
        size_in: width of the projection's input.
        size_out: width of its output.
        r: rank.
        alpha: the update is multiplied by alpha / r.
        dropout: share of the input that is zeroed in training.
    """

    def __init__(self, size_in: int, size_out: int, r: int, alpha: float, dropout: float) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.empty(r, size_in, dtype=torch.float32))
        self.b = nn.Parameter(torch.zeros(size_out, r, dtype=torch.float32))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))
        self.scale = alpha / r
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """What is added to the projection of (..., in), (..., out)."""
        low = F.linear(self.dropout(x), self.a.to(x.dtype))  # (..., r)
        return F.linear(low * self.scale, self.b.to(x.dtype))

    def weight(self) -> Tensor:
        """What is added to the projection's weight, (out, in)."""
        return self.scale * self.b @ self.a


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
        self.sizes = {
            "n_layer": config.n_layer,
            "n_head": config.n_head,
            "n_embd": config.n_embd,
            "n_kv_head": config.n_kv_head,
            "head_size": config.head_size,
            "intermediate_size": config.intermediate_size,
            "r": r,
            "alpha": alpha,
            "dropout": dropout,
            "targets": targets,
        }
        query, key = config.n_head * config.head_size, config.n_kv_head * config.head_size
        widths = {
            "q": (config.n_embd, query),
            "k": (config.n_embd, key),
            "v": (config.n_embd, key),
            "o": (query, config.n_embd),
            "gate": (config.n_embd, config.intermediate_size),
            "up": (config.n_embd, config.intermediate_size),
            "down": (config.intermediate_size, config.n_embd),
        }
        self.layers = nn.ModuleList(
            nn.ModuleDict({name: LowRank(*widths[name], r, alpha, dropout) for name in targets})
            for _ in range(config.n_layer)
        )

    def layer(self, index: int) -> LayerAdapter:
        """The layer's updates."""
        return LayerAdapter(updates=self.layers[index])  # type: ignore[arg-type] (a ModuleDict is a mapping in all but type)


def merge(model: LLaMA, lora: LoRA) -> None:
    """Add a LoRA to the weights of a base model, in place, so that the model alone computes what both did.

    Raises:
        ValueError: the weights are quantised, or sharded over processes.
    """
    _add_to_weights(model, lora, 1.0)


def unmerge(model: LLaMA, lora: LoRA) -> None:
    """Take a merged LoRA out again; what is left of it are the rounding errors of the weights' dtype.

    Raises:
        ValueError: the weights are quantised, or sharded over processes.
    """
    _add_to_weights(model, lora, -1.0)


@torch.no_grad()
def _add_to_weights(model: LLaMA, lora: LoRA, sign: float) -> None:
    from torch.distributed.tensor import DTensor  # slow to import

    block: Any
    updates: Any
    for block, updates in zip(model.transformer.h, lora.layers, strict=True):
        attention, mlp = block.attn, block.mlp
        for linear in (attention.c_attn, attention.c_proj, mlp.c_fc1, mlp.c_fc2, mlp.c_proj):
            if is_quantized(linear) or isinstance(linear.weight, DTensor):
                raise ValueError("a LoRA can be merged only into whole weights, not quantised or sharded ones")
        heads = (attention.n_head, attention.n_kv_head, attention.n_kv_head)
        q, k, v = attention.c_attn.weight.split([n * attention.head_size for n in heads])
        weights = {"q": q, "k": k, "v": v, "o": attention.c_proj.weight}
        weights |= {"gate": mlp.c_fc1.weight, "up": mlp.c_fc2.weight, "down": mlp.c_proj.weight}
        for name, update in updates.items():
            weight = weights[name]
            weight.copy_(weight.float() + sign * update.weight().to(weight.device))
