"""Convert a Hugging Face checkpoint of a LLaMA-family model to this project's format.

    python scripts/convert_hf_checkpoint.py --checkpoint_dir models/Llama-2-7b-hf --output_dir checkpoints/Llama-2-7b

Reads `LlamaForCausalLM` of any size, and Mistral without a sliding window; safetensors or `.bin`, single or sharded.
"""

import sys
from pathlib import Path
from typing import Any

import torch

from lit_llama.checkpoint import DType, TensorFiles, copy_tokenizer, weight_files, write_base
from lit_llama.cli import run
from lit_llama.files import atomic_folder, read_json
from lit_llama.model import LLaMAConfig, RopeScaling

LAYER = "transformer.h.{}."
NAMES = {
    "transformer.wte.weight": ["model.embed_tokens.weight"],
    "transformer.ln_f.scale": ["model.norm.weight"],
    "lm_head.weight": ["lm_head.weight"],
    f"{LAYER}rms_1.scale": ["model.layers.{}.input_layernorm.weight"],
    f"{LAYER}attn.c_attn.weight": [f"model.layers.{{}}.self_attn.{part}_proj.weight" for part in "qkv"],
    f"{LAYER}attn.c_proj.weight": ["model.layers.{}.self_attn.o_proj.weight"],
    f"{LAYER}rms_2.scale": ["model.layers.{}.post_attention_layernorm.weight"],
    f"{LAYER}mlp.c_fc1.weight": ["model.layers.{}.mlp.gate_proj.weight"],
    f"{LAYER}mlp.c_fc2.weight": ["model.layers.{}.mlp.up_proj.weight"],
    f"{LAYER}mlp.c_proj.weight": ["model.layers.{}.mlp.down_proj.weight"],
}


def main(checkpoint_dir: Path, output_dir: Path, dtype: DType | None = None) -> None:
    """Convert one checkpoint.

    Args:
        checkpoint_dir: folder with config.json, weights and tokenizer.
        output_dir: the folder to write; must not exist yet.
        dtype: of the weights on disk; if not given, as they are.
    """
    files = weight_files(checkpoint_dir)
    config = config_from_hf(read_json(checkpoint_dir / "config.json"), name=output_dir.name)
    tensors = TensorFiles(
        files, ignore=r".*rotary_emb\.inv_freq" + (r"|lm_head\.weight" if config.tie_embeddings else "")
    )
    source = {"format": "hf", "from": checkpoint_dir.name}
    with atomic_folder(output_dir) as folder:
        copy_tokenizer(checkpoint_dir, folder)
        write_base(folder, config, tensors, NAMES, source, dtype and getattr(torch, dtype), halved_rotary=True)
    print(f"base model: {output_dir}", file=sys.stderr)


def config_from_hf(fields: dict[str, Any], name: str) -> LLaMAConfig:
    """The model's configuration from a config.json; fields that are absent have transformers' defaults.

    Raises:
        ValueError: the model has something that `lit_llama.model` cannot compute; the message names the field.
    """
    if not isinstance(fields, dict):
        raise ValueError(f"config.json: expected an object, found {type(fields).__name__}")
    allowed: dict[str, tuple[Any, ...]] = {
        "model_type": ("llama", "mistral"),
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "sliding_window": (None,),
        "partial_rotary_factor": (1.0,),
        "quantization_config": (None,),
    }
    if fields.get("model_type") == "mistral" and "sliding_window" not in fields:
        fields = {**fields, "sliding_window": 4096}
    for field, values in allowed.items():
        if fields.get(field, values[0]) not in values:
            raise ValueError(
                f"config.json has {field} {fields[field]!r}, which this model cannot do; possible: "
                f"{', '.join(map(str, values))}"
            )
    required = ("num_attention_heads", "hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size")
    missing = [field for field in required if field not in fields]
    if missing:
        raise ValueError(f"config.json lacks {', '.join(missing)}: it is not a LLaMA-family model's")
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    n_head, n_embd = fields["num_attention_heads"], fields["hidden_size"]
    return LLaMAConfig(
        name=name,
        block_size=fields.get("max_position_embeddings", 2048),
        vocab_size=fields["vocab_size"],
        n_layer=fields["num_hidden_layers"],
        n_head=n_head,
        n_embd=n_embd,
        n_kv_head=fields.get("num_key_value_heads") or n_head,
        head_size=fields.get("head_dim") or n_embd // n_head,
        intermediate_size=fields["intermediate_size"],
        norm_eps=fields.get("rms_norm_eps", 1e-6),
        rope_base=float(rope.get("rope_theta", fields.get("rope_theta", 10000.0))),
        rope_scaling=_rope_scaling(rope),
        tie_embeddings=fields.get("tie_word_embeddings", False),
    )


_LLAMA3_FIELDS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def _rope_scaling(rope: dict[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    needs = {"linear": ("factor",), "llama3": _LLAMA3_FIELDS}.get(kind, ())
    missing = [field for field in needs if field not in rope]
    if missing:
        raise ValueError(f"config.json has rope_scaling of type {kind!r} without {', '.join(missing)}")
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling("linear", factor=rope["factor"])
    if kind == "llama3":
        return RopeScaling(
            "llama3",
            factor=rope["factor"],
            low_freq_factor=rope["low_freq_factor"],
            high_freq_factor=rope["high_freq_factor"],
            original_block_size=rope["original_max_position_embeddings"],
        )
    raise ValueError(f"config.json has rope_scaling of type {kind!r}; this model can do default, linear and llama3")


if __name__ == "__main__":
    run(main)
