"""Meta's own LLaMA checkpoints: names and configuration, and the joining of slices for several GPUs."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from lit_llama.config import PRESETS, LLaMAConfig, RopeScaling
from lit_llama.fields import naming, take
from lit_llama.formats.hf import within_window
from lit_llama.formats.names import LAYER
from lit_llama.tensor_files import TensorFiles

NAMES = {
    "transformer.wte.weight": ["tok_embeddings.weight"],
    "transformer.ln_f.scale": ["norm.weight"],
    "lm_head.weight": ["output.weight"],
    f"{LAYER}rms_1.scale": ["layers.{}.attention_norm.weight"],
    f"{LAYER}attn.c_attn.weight": [f"layers.{{}}.attention.w{part}.weight" for part in "qkv"],
    f"{LAYER}attn.c_proj.weight": ["layers.{}.attention.wo.weight"],
    f"{LAYER}rms_2.scale": ["layers.{}.ffn_norm.weight"],
    f"{LAYER}mlp.c_fc1.weight": ["layers.{}.feed_forward.w1.weight"],
    f"{LAYER}mlp.c_fc2.weight": ["layers.{}.feed_forward.w3.weight"],
    f"{LAYER}mlp.c_proj.weight": ["layers.{}.feed_forward.w2.weight"],
}


class MergedTensors(Mapping[str, torch.Tensor]):
    """The tensors of a model-parallel checkpoint, joined when they are asked for.

    Args:
        shards: the slices, in order.
        n_embd: the model's embedding size, which tells along which side the embedding is cut.

    Raises:
        ValueError: the shards do not hold the same names.
    """

    def __init__(self, shards: list[TensorFiles], n_embd: int) -> None:
        self._shards, self._n_embd = shards, n_embd
        for number, shard in enumerate(shards):
            if shard.keys() != shards[0].keys():
                different = sorted(shard.keys() ^ shards[0].keys())[:3]
                raise ValueError(f"consolidated.{number:02d}.pth and consolidated.00.pth differ in {different}")

    def __getitem__(self, name: str) -> torch.Tensor:
        parts = [shard[name] for shard in self._shards]
        if parts[0].dim() == 1:  # norms are repeated in every shard
            return parts[0]
        # Inputs are cut for the projections back to the embedding, outputs for all others. The embedding is cut along
        # C before Llama 3 and along the vocabulary since.
        by_columns = re.search(r"\.(wo|w2)\.weight", name) or (
            name == "tok_embeddings.weight" and parts[0].size(1) != self._n_embd
        )
        return torch.cat(parts, dim=1 if by_columns else 0)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shards[0])

    def __len__(self) -> int:
        return len(self._shards[0])


def config_from_meta(
    params: dict[str, Any],
    tensors: Mapping[str, torch.Tensor],
    name: str,
    block_size: int | None,
    place: object = "params.json",
) -> LLaMAConfig:
    """The model's configuration from params.json and, where that is silent, the shapes of the weights.

    Args:
        params: what params.json holds.
        tensors: the checkpoint's, under Meta's names.
        name: what the model is called.
        block_size: longest context in tokens; if None, that of the generation which the other values point to.
        place: the file, for error messages.

    Raises:
        ValueError: the weights are not a LLaMA's, or a value of params.json cannot be a model's.
    """
    for needed in ("tok_embeddings.weight", "layers.0.feed_forward.w1.weight"):
        if needed not in tensors:
            raise ValueError(f"the checkpoint lacks {needed}: it is not a LLaMA's")
        if tensors[needed].dim() != 2:
            raise ValueError(f"{needed} has shape {tuple(tensors[needed].shape)}, expected a matrix")
    with naming(place):
        window = take(params, "sliding_window", int, None, None, 1)  # Mistral's own files have one
        block_size = within_window(block_size or _block_size(params), window, f"{place}: sliding_window")
        stretched = take(params, "use_scaled_rope", bool, None, False)
        return LLaMAConfig(
            name=name,
            block_size=block_size,
            vocab_size=tensors["tok_embeddings.weight"].size(0),
            n_layer=params["n_layers"],
            n_head=params["n_heads"],
            n_embd=params["dim"],
            n_kv_head=take(params, "n_kv_heads", int, None, 0),
            head_size=take(params, "head_dim", int, None, 0),
            intermediate_size=tensors["layers.0.feed_forward.w1.weight"].size(0),
            norm_eps=params["norm_eps"],
            rope_base=take(params, "rope_theta", float, None, 10000.0),
            rope_scaling=RopeScaling("llama3", _rope_factor(params)) if stretched else None,
        )


def _block_size(params: dict[str, Any]) -> int:
    if params.get("use_scaled_rope"):
        return 131072  # Llama 3.1 and later
    if params.get("rope_theta") == 500000.0:
        return 8192  # Llama 3
    llama_1 = params["norm_eps"] == 1e-6 or (params["n_layers"] == 80 and "n_kv_heads" not in params)
    return 2048 if llama_1 else 4096


def _rope_factor(params: dict[str, Any]) -> float:
    """The stretching that Meta's code applies to a model of these sizes: 32 for Llama 3.2's small ones, else 8."""
    for preset in PRESETS:
        if preset.rope_scaling and (preset.n_layer, preset.n_embd) == (params["n_layers"], params["dim"]):
            return preset.rope_scaling.factor
    return take(params, "rope_scaling_factor", float, None, 8.0)
