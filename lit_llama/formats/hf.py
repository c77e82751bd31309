"""Hugging Face's names and configuration of LLaMA-family models, from and to this project's."""

import reprlib
import warnings
from typing import Any

from torch import Tensor

from lit_llama.config import MOST_TOKENS, LLaMAConfig, RopeScaling
from lit_llama.fields import check_object, naming, take

LAYER = "transformer.h.{}."
PROJECTIONS = {name: f"self_attn.{name}_proj" for name in "qkvo"} | {
    name: f"mlp.{name}_proj" for name in ("gate", "up", "down")
}  # what this project's adapters call them
HF_LAYER = "model.layers.{}."
NAMES = {
    "transformer.wte.weight": ["model.embed_tokens.weight"],
    "transformer.ln_f.scale": ["model.norm.weight"],
    "lm_head.weight": ["lm_head.weight"],
    f"{LAYER}rms_1.scale": [f"{HF_LAYER}input_layernorm.weight"],
    f"{LAYER}attn.c_attn.weight": [f"{HF_LAYER}{PROJECTIONS[name]}.weight" for name in "qkv"],
    f"{LAYER}attn.c_proj.weight": [f"{HF_LAYER}{PROJECTIONS['o']}.weight"],
    f"{LAYER}rms_2.scale": [f"{HF_LAYER}post_attention_layernorm.weight"],
    f"{LAYER}mlp.c_fc1.weight": [f"{HF_LAYER}{PROJECTIONS['gate']}.weight"],
    f"{LAYER}mlp.c_fc2.weight": [f"{HF_LAYER}{PROJECTIONS['up']}.weight"],
    f"{LAYER}mlp.c_proj.weight": [f"{HF_LAYER}{PROJECTIONS['down']}.weight"],
}


def config_from_hf(fields: Any, name: str, place: object = "config.json") -> LLaMAConfig:
    """The model's configuration from a config.json; fields that are absent have transformers' defaults.

    Args:
        fields: what the file holds.
        name: what the model is called.
        place: the file, for error messages.

    Raises:
        ValueError: the model has something that `lit_llama.model` cannot compute; the message names the field.
    """
    with naming(place):
        return _config(check_object(fields, None), name, place)


def _config(fields: dict[str, Any], name: str, place: object) -> LLaMAConfig:
    allowed: dict[str, tuple[Any, ...]] = {
        "model_type": ("llama", "mistral"),
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "partial_rotary_factor": (1.0,),
        "quantization_config": (None,),
    }
    for field, values in allowed.items():
        if fields.get(field, values[0]) not in values:
            raise ValueError(
                f"{field} is {reprlib.repr(fields[field])}, which this model cannot do; possible: "
                f"{', '.join(map(str, values))}"
            )
    required = ("num_attention_heads", "hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size")
    missing = [field for field in required if fields.get(field) is None]
    if missing:
        raise ValueError(f"it lacks {', '.join(missing)} and is not a LLaMA-family model's")

    def size(field: str, default: Any = None, most: int = MOST_TOKENS) -> int:
        return take(fields, field, int, None, default, 1, most)

    n_head, n_embd = size("num_attention_heads"), size("hidden_size")
    block_size = size("max_position_embeddings", 2048)
    if "sliding_window" in fields or fields.get("model_type") == "mistral":
        window = size("sliding_window", 4096 if "sliding_window" not in fields else None)
        block_size = within_window(block_size, window, f"{place}: sliding_window")
    rope = take(fields, "rope_parameters", dict, None, {}) or take(fields, "rope_scaling", dict, None, {})
    rope_base = take(rope, "rope_theta", float, None, take(fields, "rope_theta", float, None, 10000.0))
    return LLaMAConfig(
        name=name,
        block_size=block_size,
        vocab_size=fields["vocab_size"],
        n_layer=fields["num_hidden_layers"],
        n_head=n_head,
        n_embd=n_embd,
        n_kv_head=size("num_key_value_heads", n_head),
        head_size=size("head_dim", n_embd // n_head),
        intermediate_size=fields["intermediate_size"],
        norm_eps=take(fields, "rms_norm_eps", float, None, 1e-6),
        rope_base=rope_base,
        rope_scaling=_rope_scaling(rope),
        tie_embeddings=take(fields, "tie_word_embeddings", bool, None, False),
    )


def within_window(block_size: int, window: int | None, what: str) -> int:
    """The longest context in which attention through a sliding window is ordinary attention; warns if it is shorter.

    Args:
        block_size: the model's own longest context, in tokens.
        window: how many tokens each token attends to, with itself; None means all.
        what: the field that says so, for the warning.
    """
    if window is None or window >= block_size:
        return block_size
    warnings.warn(
        f"{what} is {window}, and up to that many tokens this model computes the same without a sliding window: "
        f"block_size is {window}, not {block_size}",
        stacklevel=3,
    )
    return window


_LLAMA3_FIELDS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def _rope_scaling(rope: dict[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind not in ("linear", "llama3"):
        raise ValueError(f"rope_scaling is of type {reprlib.repr(kind)}; this model can do default, linear and llama3")
    needs = _LLAMA3_FIELDS if kind == "llama3" else ("factor",)
    missing = [field for field in needs if rope.get(field) is None]
    if missing:
        raise ValueError(f"rope_scaling of type {kind!r} lacks {', '.join(missing)}")
    if kind == "linear":
        return RopeScaling("linear", factor=rope["factor"])
    return RopeScaling(
        "llama3",
        factor=rope["factor"],
        low_freq_factor=rope["low_freq_factor"],
        high_freq_factor=rope["high_freq_factor"],
        original_block_size=rope["original_max_position_embeddings"],
    )


def config_to_hf(config: LLaMAConfig) -> dict[str, Any]:
    """The fields of a `LlamaForCausalLM`'s config.json, as transformers 5 writes them, with those that 4 reads."""
    scaling = config.rope_scaling
    rope: dict[str, Any] = {"rope_type": "default" if scaling is None else scaling.type}
    if scaling is not None:
        rope["factor"] = scaling.factor
        if scaling.type == "llama3":
            rope |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
            rope["original_max_position_embeddings"] = scaling.original_block_size
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "hidden_size": config.n_embd,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.block_size,
        "mlp_bias": False,
        "num_attention_heads": config.n_head,
        "num_hidden_layers": config.n_layer,
        "num_key_value_heads": config.n_kv_head,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {**rope, "rope_theta": config.rope_base},
        "rope_scaling": None if scaling is None else rope,
        "rope_theta": config.rope_base,
        "tie_word_embeddings": config.tie_embeddings,
        "vocab_size": config.vocab_size,
    }


def pairs_from_halves(rows: Tensor, head_size: int) -> Tensor:
    """Reorder each head's rows (heads * hs, ...) from rotary pairs as two halves, Hugging Face's, to interleaved."""
    return rows.unflatten(0, (-1, 2, head_size // 2)).transpose(1, 2).flatten(0, 2)


def halves_from_pairs(rows: Tensor, head_size: int) -> Tensor:
    """The inverse of `pairs_from_halves`."""
    return rows.unflatten(0, (-1, head_size // 2, 2)).transpose(1, 2).flatten(0, 2)
