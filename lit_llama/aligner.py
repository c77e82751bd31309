"""Aligner: one set of global prefix tokens, shared by all layers, with a gate per layer and head (arXiv 2312.05503).

For every layer from `start_layer` and every query head h,

    out = W_o concat_h( selfattention_h + gate_h * softmax(q_h K^T / sqrt(hs)) V ),   K, V = P W_k, P W_v

where P (N, C) is the prefix, the same for every layer, and W_k, W_v, W_o are the layer's own frozen projections. The
attention itself is `lit_llama.model.CausalSelfAttention.prefix_contribution`; this module holds all that is learned.
"""

import torch
import torch.nn as nn

from lit_llama.config import LLaMAConfig
from lit_llama.seam import LayerAdapter, LayerPrefix, Positions


class Aligner(nn.Module):
    """The prefix and the gates, `N * C + (n_layer - start_layer) * nh` parameters, always float32.

    A fresh Aligner has zero gates and leaves the base model exactly as it is.

    Args:
        config: configuration of the base model; only `n_layer`, `n_head` and `n_embd` matter.
        length: number of prefix tokens N.
        start_layer: first layer that attends to the prefix, counted from 0.
        init_std: standard deviation of the tokens at the start.
        positions: which positions attend to the prefix: "all", or those of the "prompt" and none that is decoded.

    Attributes:
        sizes: those of the base model, and the arguments that built it, for its file.

    Raises:
        ValueError: fewer than one token, no layer left to attend to them, or a negative deviation.
    """

    method = "aligner"
    base_sizes = ("n_layer", "n_head", "n_embd")
    takes_rows = True

    def __init__(
        self,
        config: LLaMAConfig,
        length: int = 1,
        start_layer: int = 2,
        init_std: float = 0.1,
        positions: Positions = "all",
    ) -> None:
        super().__init__()
        if length < 1:
            raise ValueError(f"an Aligner needs at least one prefix token, got {length}")
        if not 0 <= start_layer < config.n_layer:
            raise ValueError(f"start layer {start_layer} is not one of the base's layers 0 to {config.n_layer - 1}")
        if not init_std >= 0:
            raise ValueError(f"an Aligner's init_std must be at least 0, got {init_std}")
        self.start_layer = start_layer
        sizes = {name: getattr(config, name) for name in self.base_sizes}
        self.sizes = sizes | {"length": length, "start_layer": start_layer}
        self.prompt_only = positions == "prompt"
        if self.prompt_only:  # a file that does not say it means all
            self.sizes["positions"] = positions
        tokens = torch.empty(length, config.n_embd, dtype=torch.float32)
        self.tokens = nn.Parameter(nn.init.normal_(tokens, std=init_std))
        self.gates = nn.Parameter(torch.zeros(config.n_layer - start_layer, config.n_head, dtype=torch.float32))

    def layer(self, index: int) -> LayerAdapter:
        """The same tokens for every layer, and the layer's own gates."""
        if index < self.start_layer:
            return LayerAdapter()
        prefix = LayerPrefix.of(self.tokens, self.gates[..., index - self.start_layer, :], self.prompt_only)
        return LayerAdapter((prefix,))

    @torch.no_grad()
    def scale_(self, scale: float) -> None:
        """Multiply what is added by a number: 0 is the base model, 1 leaves the adapter as it is."""
        self.gates.mul_(scale)
