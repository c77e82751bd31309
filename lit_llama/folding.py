"""What an adapter becomes outside this project: weights, biases, and prefixes of a layer's own.

With one token, the softmax over the prefix is 1 whatever the query, so all that an Aligner adds to layer l is

    b_l = W_o concat_h(gate_h v_h),   v = P W_v

the same for every input: a bias of the output projection, exactly. A LoRA is a change of the weights. Several of them
add up. A longer prefix is neither, and stays one: its keys and values, worked out for each layer.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lit_llama.model import CausalSelfAttention, ExpandedPrefix, LayerAdapter, LLaMAConfig


def projections(config: LLaMAConfig, tensors: Mapping[str, Tensor], index: int) -> dict[str, Tensor]:
    """The weights of a layer's projections, by the names that adapters have for them.

    Args:
        config: the base model's.
        tensors: its weights by Lit-LLaMA names.
        index: of the layer.

    Returns:
        "q", "k", "v", "o", "gate", "up" and "down", (out, in) each.
    """
    layer = f"transformer.h.{index}"
    heads = (config.n_head, config.n_kv_head, config.n_kv_head)
    qkv = tensors[f"{layer}.attn.c_attn.weight"].split([n * config.head_size for n in heads])
    others = {"o": "attn.c_proj", "gate": "mlp.c_fc1", "up": "mlp.c_fc2", "down": "mlp.c_proj"}
    return dict(zip("qkv", qkv, strict=True)) | {
        name: tensors[f"{layer}.{module}.weight"] for name, module in others.items()
    }


class FoldedLayer(NamedTuple):
    """One layer with an adapter in it.

    Args:
        weights: of the projections by name, "q", "k", "v", "o", "gate", "up", "down", (out, in) each.
        bias: of the output projection, (C) float32; None if there is no prefix of one token.
        prefixes: the others, with keys and values (1, nh, N, hs) float32, the values times the gates.
    """

    weights: dict[str, Tensor]
    bias: Tensor | None
    prefixes: list[ExpandedPrefix]


@torch.no_grad()
def fold(config: LLaMAConfig, weights: Mapping[str, Tensor], added: LayerAdapter) -> FoldedLayer:
    """Put what an adapter adds to a layer into its weights, as far as possible.

    Args:
        config: the base model's.
        weights: of the layer's projections by name, (out, in) each.
        added: what the adapter adds.
    """
    with torch.device("meta"):
        attention = CausalSelfAttention(config)
    stacked = torch.cat([weights[name].float() for name in "qkv"])
    attention.load_state_dict({"c_attn.weight": stacked, "c_proj.weight": weights["o"].float()}, assign=True)
    expanded = [attention.expand(prefix, torch.float32) for prefix in added.prefixes]
    # What comes out of the prefix goes through the output projection with its update; tokens go in without.
    updated = {
        name: (weight.float() + added.updates[name](torch.eye(weight.size(1))).T).to(weight.dtype)
        if name in added.updates
        else weight
        for name, weight in weights.items()
    }
    one_token = [prefix.v.flatten() for prefix in expanded if prefix.v.size(2) == 1]  # (nh * hs) each
    bias = updated["o"].float() @ torch.stack(one_token).sum(0) if one_token else None
    return FoldedLayer(updated, bias, [prefix for prefix in expanded if prefix.v.size(2) > 1])
