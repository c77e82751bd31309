"""GGUF files of LLaMA-family models (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), through `gguf`."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lit_llama.files import check_file, require_extra
from lit_llama.model import LLaMAConfig, RopeScaling, rope_frequencies

LAYER = "transformer.h.{}."
NAMES = {
    "transformer.wte.weight": ["token_embd.weight"],
    "transformer.ln_f.scale": ["output_norm.weight"],
    "lm_head.weight": ["output.weight"],
    f"{LAYER}rms_1.scale": ["blk.{}.attn_norm.weight"],
    f"{LAYER}attn.c_attn.weight": [
        f"blk.{{}}.attn_{part}.weight" for part in "qkv"
    ],  # rotary pairs interleaved here too
    f"{LAYER}attn.c_proj.weight": ["blk.{}.attn_output.weight"],
    f"{LAYER}rms_2.scale": ["blk.{}.ffn_norm.weight"],
    f"{LAYER}mlp.c_fc1.weight": ["blk.{}.ffn_gate.weight"],
    f"{LAYER}mlp.c_fc2.weight": ["blk.{}.ffn_up.weight"],
    f"{LAYER}mlp.c_proj.weight": ["blk.{}.ffn_down.weight"],
}


def open_gguf(path: Path) -> tuple[Any, dict[str, Any]]:
    """Open a file.

    Returns:
        A `gguf.GGUFReader`, and the metadata by name.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or no GGUF file.
    """
    gguf = require_extra("gguf", "gguf")
    check_file(path)
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError) as error:
        raise ValueError(f"{path} is not a complete GGUF file ({error})") from None
    return reader, {name: field.contents() for name, field in reader.fields.items()}


class GGUFTensors(Mapping[str, torch.Tensor]):
    """The weights of a GGUF file, dequantised when they are asked for.

    Args:
        reader: an open `gguf.GGUFReader`.

    Attributes:
        rope_factors: divisors of the rotary frequencies, if the file has them; they are no weight.
    """

    def __init__(self, reader: Any) -> None:
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        factors = self._tensors.pop("rope_freqs.weight", None)
        self.rope_factors = None if factors is None else torch.tensor(factors.data)

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self._tensors[name]
        try:
            values = require_extra("gguf", "gguf").dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            raise ValueError(f"{name} is in {tensor.tensor_type.name}, which the gguf library cannot decode") from None
        return torch.from_numpy(np.array(values, np.float32))

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def config_from_gguf(fields: dict[str, Any], tensors: GGUFTensors, name: str) -> LLaMAConfig:
    """The model's configuration from the metadata of a GGUF file.

    Raises:
        ValueError: the model has something that `lit_llama.model` cannot compute; the message names the field.
    """
    architecture = fields.get("general.architecture")
    if architecture != "llama":
        raise ValueError(f"general.architecture is {architecture!r}; only llama can be converted")
    if not fields.get("tokenizer.ggml.tokens"):
        raise ValueError("the file lacks tokenizer.ggml.tokens: it has no vocabulary")
    for field in ("llama.expert_count", "llama.attention.sliding_window"):
        if fields.get(field):
            raise ValueError(f"{field} is {fields[field]}, which this model cannot do")

    def size(field: str, default: Any = None) -> Any:
        value = fields.get(f"llama.{field}", default)
        if value is None:
            raise ValueError(f"the file lacks llama.{field}")
        return value

    n_head, n_embd = size("attention.head_count"), size("embedding_length")
    head_size = size("attention.key_length", n_embd // n_head)
    for field in ("rope.dimension_count", "attention.value_length"):
        if size(field, head_size) != head_size:
            raise ValueError(f"llama.{field} is {size(field)}, but only the head size {head_size} is supported")
    config = LLaMAConfig(
        name=name,
        block_size=size("context_length"),
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        n_layer=size("block_count"),
        n_head=n_head,
        n_embd=n_embd,
        n_kv_head=size("attention.head_count_kv", n_head),
        head_size=head_size,
        intermediate_size=size("feed_forward_length"),
        norm_eps=round(size("attention.layer_norm_rms_epsilon"), 10),  # stored as float32
        rope_base=size("rope.freq_base", 10000.0),
        rope_scaling=_linear_scaling(fields),
        tie_embeddings="output.weight" not in tensors,
    )
    return config if tensors.rope_factors is None else _with_llama3_scaling(config, tensors.rope_factors)


def _linear_scaling(fields: dict[str, Any]) -> RopeScaling | None:
    kind = fields.get("llama.rope.scaling.type", "linear")
    factor = fields.get("llama.rope.scaling.factor", fields.get("llama.rope.scale_linear", 1.0))
    if kind not in ("none", "linear"):
        raise ValueError(f"llama.rope.scaling.type is {kind!r}; only none and linear can be converted")
    return None if kind == "none" or factor in (0.0, 1.0) else RopeScaling("linear", factor)


def _with_llama3_scaling(config: LLaMAConfig, factors: torch.Tensor) -> LLaMAConfig:
    """GGUF stores Llama 3's stretching as one divisor for each frequency, the largest of them being the factor."""
    scaled = replace(config, rope_scaling=RopeScaling("llama3", factor=factors.max().item()))
    if not torch.allclose(rope_frequencies(config) / rope_frequencies(scaled), factors, rtol=1e-4):
        raise ValueError("rope_freqs.weight is not Llama 3's stretching of the rotary frequencies")
    return scaled
