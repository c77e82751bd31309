"""Hugging Face's names and configuration of LLaMA-family models, from and to this project's."""

import re
import reprlib
import warnings
from typing import Any, NamedTuple

from lit_llama.config import MOST_TOKENS, LLaMAConfig, RopeScaling
from lit_llama.fields import check_list, check_object, naming, take
from lit_llama.formats.names import LAYER

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
    f"{LAYER}attn.c_attn.bias": [f"{HF_LAYER}{PROJECTIONS[name]}.bias" for name in "qkv"],
    f"{LAYER}attn.c_proj.weight": [f"{HF_LAYER}{PROJECTIONS['o']}.weight"],
    f"{LAYER}attn.c_proj.bias": [f"{HF_LAYER}{PROJECTIONS['o']}.bias"],
    f"{LAYER}attn.q_norm.scale": [f"{HF_LAYER}self_attn.q_norm.weight"],
    f"{LAYER}attn.k_norm.scale": [f"{HF_LAYER}self_attn.k_norm.weight"],
    f"{LAYER}rms_2.scale": [f"{HF_LAYER}post_attention_layernorm.weight"],
    f"{LAYER}mlp.c_fc1.weight": [f"{HF_LAYER}{PROJECTIONS['gate']}.weight"],
    f"{LAYER}mlp.c_fc2.weight": [f"{HF_LAYER}{PROJECTIONS['up']}.weight"],
    f"{LAYER}mlp.c_proj.weight": [f"{HF_LAYER}{PROJECTIONS['down']}.weight"],
}


class Family(NamedTuple):
    """What a `model_type` means where config.json is silent.

    Args:
        qkv_bias: the field that says whether the projections of queries, keys and values have a bias, or what is so in
            every model of the family.
        o_bias: likewise, for the output projection of the attention.
        qk_norm: each head's query and key has a norm.
        defaults: values of fields that are absent, where they are not those of `LlamaConfig`.
    """

    qkv_bias: str | bool = "attention_bias"
    o_bias: str | bool = "attention_bias"
    qk_norm: bool = False
    defaults: dict[str, Any] = {}  # noqa: RUF012 (never changed)


_QWEN = {"max_position_embeddings": 32768, "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
FAMILIES = {
    "llama": Family(),
    "mistral": Family(
        False,
        False,
        defaults={"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    ),
    "qwen2": Family(True, False, defaults=_QWEN),
    "qwen3": Family(qk_norm=True, defaults={**_QWEN, "head_dim": 128}),
    "smollm3": Family(
        defaults={
            "max_position_embeddings": 32768,
            "rope_theta": 2e6,
            "tie_word_embeddings": True,
            "use_sliding_window": False,
            "no_rope_layer_interval": 4,
        }
    ),
    "phi3": Family(False, False, defaults={"max_position_embeddings": 4096, "rms_norm_eps": 1e-5}),
    "granite": Family(),
    "seed_oss": Family(
        o_bias="attention_out_bias",
        defaults={"max_position_embeddings": 524288, "attention_bias": True, "head_dim": 128},
    ),
    # Its `bias` is that of the MLP as well, which is refused.
    "internlm3": Family(
        "qkv_bias", False, defaults={"max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "head_dim": 128}
    ),
}
# What can be used instead of other families that people ask for, by a pattern of their `model_type`.
INSTEAD = {
    r"gemma.*|.*gemma": "a Gemma has other norms and activations, softcaps or sliding layers; Llama 3.2, Qwen3 and "
    "SmolLM3 have models of its sizes",
    r"llama4.*": "Llama 4 is a mixture of experts; Llama 3.1, 3.2 and 3.3 are dense",
    r".*moe.*|mixtral|deepseek_v\d+|gpt_oss|qwen3_next": "it is a mixture of experts; dense models, such as Qwen3-8B "
    "or Mistral 7B, can be opened",
    r".*(vl|vision|omni|audio).*|mllama|mistral3|llava.*": "it also reads pictures or sound; models of text alone, "
    "such as Qwen2.5 or Llama 3.2 1B and 3B, can be opened",
}
# Fields that no model may set to anything else, and what to do about it.
ONLY: dict[str, tuple[tuple[Any, ...], str]] = {
    "hidden_act": (("silu",), "models with SwiGLU can be opened"),
    "mlp_bias": ((False,), "models without a bias in the MLP can be opened"),
    "bias": ((False,), "models without a bias in the MLP can be opened"),
    "partial_rotary_factor": ((1.0,), "models that rotate whole heads can be opened, such as Phi-4 (14B)"),
    "quantization_config": ((None,), "take the model before it was quantised, and give --quantize"),
    "attn_logit_softcapping": ((None,), "models without softcaps can be opened"),
    "final_logit_softcapping": ((None,), "models without softcaps can be opened"),
    "num_local_experts": ((None, 0), "dense models can be opened"),
    "num_experts": ((None, 0), "dense models can be opened"),
}


def config_from_hf(fields: Any, name: str, place: object = "config.json") -> LLaMAConfig:
    """The model's configuration from a config.json; fields that are absent have transformers' defaults.

    Args:
        fields: what the file holds.
        name: what the model is called.
        place: the file, for error messages.

    Raises:
        ValueError: the model has something that `lit_llama.model` cannot compute; the message names the field and what
            can be used instead.
    """
    with naming(place):
        return _config(check_object(fields, None), name, place)


def _config(fields: dict[str, Any], name: str, place: object) -> LLaMAConfig:
    family = _family(fields)
    fields = {**family.defaults, **fields}
    rope = take(fields, "rope_parameters", dict, None, {}) or take(fields, "rope_scaling", dict, None, {})
    for field, (values, instead) in ONLY.items():
        for found in (fields, rope):
            if found.get(field, values[0]) not in values:
                raise ValueError(f"{field} is {reprlib.repr(found[field])}, which this model cannot do: {instead}")
    required = ("num_attention_heads", "hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size")
    missing = [field for field in required if fields.get(field) is None]
    if missing:
        raise ValueError(f"it lacks {', '.join(missing)} and is not a LLaMA-family model's")

    def size(field: str, default: Any = None, most: int = MOST_TOKENS) -> int:
        return take(fields, field, int, None, default, 1, most)

    def says(field: str | bool) -> bool:
        return take(fields, field, bool, None, False) if isinstance(field, str) else field

    n_head, n_embd = size("num_attention_heads"), size("hidden_size")
    head_size = size("head_dim", n_embd // n_head)
    block_size = within_window(size("max_position_embeddings", 2048), _window(fields), f"{place}: sliding_window")
    factors = multipliers(fields, head_size)
    return LLaMAConfig(
        name=name,
        block_size=block_size,
        vocab_size=fields["vocab_size"],
        n_layer=fields["num_hidden_layers"],
        n_head=n_head,
        n_embd=n_embd,
        n_kv_head=size("num_key_value_heads", n_head),
        head_size=head_size,
        intermediate_size=fields["intermediate_size"],
        norm_eps=take(fields, "rms_norm_eps", float, None, 1e-6),
        rope_base=take(rope, "rope_theta", float, None, take(fields, "rope_theta", float, None, 10000.0)),
        rope_scaling=_rope_scaling(rope, place),
        tie_embeddings=take(fields, "tie_word_embeddings", bool, None, False)
        and factors["embed_tokens"] == factors["lm_head"],
        qkv_bias=says(family.qkv_bias),
        o_bias=says(family.o_bias),
        qk_norm=family.qk_norm,
        unrotated_layers=_unrotated_layers(fields) if fields.get("model_type") == "smollm3" else (),
        scaled_weights=any(factor != 1 for factor in factors.values()),
    )


def _family(fields: dict[str, Any]) -> Family:
    kind = fields.get("model_type", "llama")
    if isinstance(kind, str) and kind in FAMILIES:
        return FAMILIES[kind]
    reasons = [instead for pattern, instead in INSTEAD.items() if re.fullmatch(pattern, str(kind))]
    instead = reasons[0] if reasons else f"possible are {', '.join(FAMILIES)}"
    raise ValueError(f"model_type is {reprlib.repr(kind)}, which this model cannot do: {instead}")


def multipliers(fields: dict[str, Any], head_size: int) -> dict[str, float]:
    """What the weights and biases of modules are multiplied by, so that a LLaMA computes what Granite does.

    Granite multiplies activations by four constants; other families multiply none.

    Args:
        fields: what config.json holds.
        head_size: size of a head.

    Returns:
        By the module's own name, such as "q_proj"; modules that are not in it stay as they are.
    """
    if fields.get("model_type") != "granite":
        return {"embed_tokens": 1.0, "lm_head": 1.0}

    def factor(field: str) -> float:
        return take(fields, field, float, None, 1.0, 1e-6, 1e6)

    return {
        "embed_tokens": factor("embedding_multiplier"),
        "q_proj": factor("attention_multiplier") * head_size**0.5,  # instead of 1 / sqrt(hs)
        "o_proj": factor("residual_multiplier"),
        "down_proj": factor("residual_multiplier"),
        "lm_head": 1 / factor("logits_scaling"),
    }


def _window(fields: dict[str, Any]) -> int | None:
    """How many tokens each token of every layer attends to, with itself; None for all.

    Raises:
        ValueError: some layers have a sliding window, and others none.
    """
    types = check_list(fields.get("layer_types") or [], "layer_types", str, None)
    other = [kind for kind in types if kind != "full_attention"]
    if other:
        raise ValueError(
            f"layer_types has {reprlib.repr(other[0])}, which this model cannot do: models whose layers all attend to "
            "all tokens, or all through the same sliding window, can be opened"
        )
    window = take(fields, "sliding_window", int, None, None, 1, MOST_TOKENS)
    if "use_sliding_window" not in fields:
        return window
    slides = take(fields, "use_sliding_window", bool, None, False) and window is not None
    if slides and not types and take(fields, "max_window_layers", int, None, 0) < _layers(fields):
        raise ValueError(
            "use_sliding_window is true, which this model cannot do, because some layers slide and others do not: set "
            f"it to false in that file for texts of at most {window} tokens, up to which the result is the same"
        )
    return None


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


def _layers(fields: dict[str, Any]) -> int:
    return take(fields, "num_hidden_layers", int, None, least=1, most=2**10)


def _unrotated_layers(fields: dict[str, Any]) -> tuple[int, ...]:
    """The numbers of the layers without rotation, as SmolLM3 gives them: a 0 for each in a list, or every so many."""
    n_layer = _layers(fields)
    rotated = fields.get("no_rope_layers")
    if rotated is None:
        interval = take(fields, "no_rope_layer_interval", int, None, 4, 1)
        return tuple(range(interval - 1, n_layer, interval))
    rotated = check_list(rotated, "no_rope_layers", int, None, 0)
    if len(rotated) < n_layer:
        raise ValueError(f"no_rope_layers has {len(rotated)} entries, expected one for each of {n_layer} layers")
    return tuple(i for i in range(n_layer) if not rotated[i])


# What to do about rotary embeddings that are stretched in other ways.
_ROPE_INSTEAD = {
    "yarn": ": if it was added to lengthen the context of a published model, as to Qwen's, take it out of that file",
    "longrope": ": Phi-4 (14B) and the 4k versions of Phi-3 do without it",
}
_LLAMA3_FIELDS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def _rope_scaling(rope: dict[str, Any], place: object) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind == "dynamic":  # stretches only what is longer than max_position_embeddings
        warnings.warn(
            f"{place}: rope_scaling is of type 'dynamic', which changes nothing up to max_position_embeddings: that is "
            "the longest context here",
            stacklevel=3,
        )
        return None
    if kind not in ("linear", "llama3"):
        raise ValueError(
            f"rope_scaling is of type {reprlib.repr(kind)}; this model can do default, linear, llama3 and dynamic"
            f"{_ROPE_INSTEAD.get(str(kind), '')}"
        )
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
    """The fields of a config.json as transformers 5 writes them, with those that 4 reads.

    The model is a stock Llama, or a Qwen2, Qwen3 or SmolLM3 if it has what they have. Qwen2 alone has biases on q, k
    and v but not on o; in the other classes all four have one, or none.

    Raises:
        ValueError: no stock class computes the configuration.
    """
    if config.qk_norm and config.unrotated_layers:
        raise ValueError("no stock class of transformers has both norms of heads and layers without rotation")
    biased, square = config.qkv_bias or config.o_bias, config.n_head * config.head_size == config.n_embd
    kind, architecture = "llama", "LlamaForCausalLM"
    more: dict[str, Any] = {"attention_bias": biased, "mlp_bias": False}
    if config.qk_norm:
        kind, architecture, more = "qwen3", "Qwen3ForCausalLM", {"attention_bias": biased, "use_sliding_window": False}
    elif config.unrotated_layers:
        rotated = [int(i not in config.unrotated_layers) for i in range(config.n_layer)]
        more |= {"no_rope_layers": rotated, "pad_token_id": None}  # that of its class may not be in the vocabulary
        kind, architecture = "smollm3", "SmolLM3ForCausalLM"
    elif config.qkv_bias and not config.o_bias and square:
        kind, architecture, more = "qwen2", "Qwen2ForCausalLM", {"use_sliding_window": False}
    scaling = config.rope_scaling
    rope: dict[str, Any] = {"rope_type": "default" if scaling is None else scaling.type}
    if scaling is not None:
        rope["factor"] = scaling.factor
        if scaling.type == "llama3":
            rope |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
            rope["original_max_position_embeddings"] = scaling.original_block_size
    return {
        "architectures": [architecture],
        "model_type": kind,
        **more,
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "hidden_size": config.n_embd,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.block_size,
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
