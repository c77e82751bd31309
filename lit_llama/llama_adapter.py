"""LLaMA-Adapter: prefix tokens for each layer, with a gate per layer and head (arXiv 2303.16199).

What an Aligner does, in every formula, but for one thing: the tokens P_l (N, C) of each layer are its own. Compare
`lit_llama.aligner`.
"""

import torch
import torch.nn as nn

from lit_llama.config import LLaMAConfig
from lit_llama.seam import LayerAdapter, LayerPrefix, Positions


class LLaMAAdapter(nn.Module):
    """The prefixes and the gates, `(n_layer - start_layer) * (N * C + nh)` parameters, always float32.

    A fresh LLaMA-Adapter has zero gates and leaves the base model exactly as it is.

    Args:
        config: configuration of the base model; only `n_layer`, `n_head` and `n_embd` matter.
        length: number of prefix tokens N in each layer.
        start_layer: first layer with a prefix, counted from 0.
        init_std: standard deviation of the tokens at the start.
        positions: which positions attend to the prefix: "all", or those of the "prompt" and none that is decoded.

    Attributes:
        sizes: those of the base model, and the arguments that built it, for its file.

    Raises:
        ValueError: fewer than one token, no layer left to attend to them, or a negative deviation.
    """

    method = "llama_adapter"
    base_sizes = ("n_layer", "n_head", "n_embd")
    takes_rows = True

    def __init__(
        self,
        config: LLaMAConfig,
        length: int = 10,
        start_layer: int = 2,
        init_std: float = 0.1,
        positions: Positions = "all",
    ) -> None:
        super().__init__()
        if length < 1:
            raise ValueError(f"a LLaMA-Adapter needs at least one prefix token, got {length}")
        if not 0 <= start_layer < config.n_layer:
            raise ValueError(f"start layer {start_layer} is not one of the base's layers 0 to {config.n_layer - 1}")
        if not init_std >= 0:
            raise ValueError(f"a LLaMA-Adapter's init_std must be at least 0, got {init_std}")
        self.start_layer = start_layer
        sizes = {name: getattr(config, name) for name in self.base_sizes}
        self.sizes = sizes | {"length": length, "start_layer": start_layer}
        self.prompt_only = positions == "prompt"
        if self.prompt_only:  # a file that does not say it means all
            self.sizes["positions"] = positions
        layers = config.n_layer - start_layer
        tokens = torch.empty(layers, length, config.n_embd, dtype=torch.float32)
        self.tokens = nn.Parameter(nn.init.normal_(tokens, std=init_std))
        self.gates = nn.Parameter(torch.zeros(layers, config.n_head, dtype=torch.float32))

    def layer(self, index: int) -> LayerAdapter:
        """The layer's own tokens and gates."""
        if index < self.start_layer:
            return LayerAdapter()
        own = index - self.start_layer
        prefix = LayerPrefix.of(self.tokens[..., own, :, :], self.gates[..., own, :], self.prompt_only)
        return LayerAdapter((prefix,))

    @torch.no_grad()
    def scale_(self, scale: float) -> None:
        """Multiply what is added by a number: 0 is the base model, 1 leaves the adapter as it is."""
        self.gates.mul_(scale)
