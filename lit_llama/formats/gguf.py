"""GGUF files of LLaMA-family models (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), through `gguf`."""

import mmap
import re
import reprlib
import struct
from collections import ChainMap
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lit_llama.config import MOST_TOKENS, LLaMAConfig, RopeScaling
from lit_llama.fields import naming, take
from lit_llama.files import check_file, require_extra
from lit_llama.formats.hf import within_window
from lit_llama.formats.names import LAYER, LitTensors
from lit_llama.rotary import rope_frequencies

NAMES = {
    "transformer.wte.weight": ["token_embd.weight"],
    "transformer.ln_f.scale": ["output_norm.weight"],
    "lm_head.weight": ["output.weight"],
    f"{LAYER}rms_1.scale": ["blk.{}.attn_norm.weight"],
    f"{LAYER}attn.c_attn.weight": [f"blk.{{}}.attn_{part}.weight" for part in "qkv"],
    f"{LAYER}attn.c_attn.bias": [f"blk.{{}}.attn_{part}.bias" for part in "qkv"],
    f"{LAYER}attn.c_proj.weight": ["blk.{}.attn_output.weight"],
    f"{LAYER}attn.c_proj.bias": ["blk.{}.attn_output.bias"],
    f"{LAYER}attn.q_norm.scale": ["blk.{}.attn_q_norm.weight"],
    f"{LAYER}attn.k_norm.scale": ["blk.{}.attn_k_norm.weight"],
    f"{LAYER}rms_2.scale": ["blk.{}.ffn_norm.weight"],
    f"{LAYER}mlp.c_fc1.weight": ["blk.{}.ffn_gate.weight"],
    f"{LAYER}mlp.c_fc2.weight": ["blk.{}.ffn_up.weight"],
    f"{LAYER}mlp.c_proj.weight": ["blk.{}.ffn_down.weight"],
}


# By general.architecture, whether the rows of queries and keys have each head's rotary pairs as two halves; they are
# interleaved otherwise, as here.
HALVED_ROTARY = {"llama": False, "qwen2": True, "qwen3": True}


def open_gguf(path: Path) -> tuple[Any, dict[str, Any]]:
    """Open a file.

    Returns:
        A `gguf.GGUFReader`, and the metadata by name.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or not a GGUF file.
    """
    gguf = require_extra("gguf", "gguf")
    check_file(path)
    try:
        _check_lengths(path)
        reader = _plain(gguf.GGUFReader)(path)
        return reader, {name: field.contents() for name, field in reader.fields.items()}
    except Exception as error:  # on junk the library raises errors of any kind
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is not a complete GGUF file ({reason})") from None


def _plain(reader: Any) -> Any:
    """`gguf.GGUFReader` with the file as a plain array, as slices of a `numpy.memmap` take most of its time."""

    class Reader(reader):
        @property
        def data(self) -> np.ndarray:
            return self._data

        @data.setter
        def data(self, mapped: np.memmap) -> None:
            self._data = np.asarray(mapped)

    return Reader


_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # of a value, by its type
_STRING, _ARRAY = 8, 9
_MOST_ENTRIES = 2**22  # of all arrays; the largest vocabularies have a third of that, with types, scores and merges
_MOST_DIMENSIONS = 8


def _check_lengths(path: Path) -> None:
    """Refuse lengths and counts that the file has no room for: the library would allocate by them, or never end.

    Raises:
        ValueError: one is too large; the message names the field.
        struct.error: the file ends early.
    """
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        at, entries = 0, 0
        order = "<" if data[4:6] != b"\0\0" else ">"  # the version is a small number

        def number(format: str) -> int:
            nonlocal at
            [value] = struct.unpack_from(order + format, data, at)
            at += struct.calcsize(format)
            return value

        def skip(size: int, name: str) -> bytes:
            nonlocal at
            if size > len(data) - at:
                raise ValueError(f"{name} is longer than the file")
            at += size
            return data[at - size : at] if size < 200 else b""

        if data[:4] != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        at = 8
        tensors, fields = number("Q"), number("Q")
        for _ in range(fields):
            name = reprlib.repr(skip(number("Q"), "the name of a field").decode(errors="replace"))
            kind, length = number("I"), 1
            if kind == _ARRAY:
                kind, length = number("I"), number("Q")
                entries += length
            if entries > _MOST_ENTRIES or kind not in (*_BYTES, _STRING):
                raise ValueError(f"{name} is an array of {length} entries of type {kind}, which this code cannot read")
            if kind == _STRING:
                for _ in range(length):
                    skip(number("Q"), name)
            else:
                skip(length * _BYTES[kind], name)
        for _ in range(tensors):
            name = reprlib.repr(skip(number("Q"), "the name of a tensor").decode(errors="replace"))
            dimensions = number("I")
            if dimensions > _MOST_DIMENSIONS:
                raise ValueError(f"{name} has {dimensions} dimensions")
            skip(dimensions * 8 + 4 + 8, name)  # sizes, type and place


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


def lit_tensors(fields: dict[str, Any], tensors: GGUFTensors, config: LLaMAConfig, place: object) -> LitTensors:
    """The weights of a GGUF file under Lit-LLaMA's names.

    llama.cpp's LLaMA looks for each bias of the attention by itself, so that a file may have those of the values alone:
    zeros stand for those that it leaves out.

    Args:
        fields: the metadata by name.
        tensors: the file's.
        config: the model's configuration.
        place: the file, for error messages.

    Raises:
        ValueError: the file lacks a tensor, or has one too many.
    """
    sizes = dict(zip(("attn_q", "attn_k", "attn_v"), config.qkv_rows, strict=True)) if config.qkv_bias else {}
    sizes |= {"attn_output": config.n_embd} if config.o_bias else {}
    zeros = {f"blk.{i}.{name}.bias": torch.zeros(size) for i in range(config.n_layer) for name, size in sizes.items()}
    absent = {name: zero for name, zero in zeros.items() if name not in tensors}
    complete: Mapping[str, torch.Tensor] = ChainMap(absent, tensors)  # type: ignore[arg-type]
    return LitTensors(complete, NAMES, config, place, HALVED_ROTARY[fields["general.architecture"]])


def config_from_gguf(fields: dict[str, Any], tensors: GGUFTensors, name: str, place: object) -> LLaMAConfig:
    """The model's configuration from the metadata of a GGUF file.

    Args:
        fields: the metadata by name.
        tensors: the file's.
        name: what the model is called.
        place: the file, for error messages.

    Raises:
        ValueError: the model has something that `lit_llama.model` cannot compute; the message names the field.
    """
    with naming(place):
        return _config(fields, tensors, name, place)


def _config(fields: dict[str, Any], tensors: GGUFTensors, name: str, place: object) -> LLaMAConfig:
    kind = fields.get("general.architecture")
    if kind not in HALVED_ROTARY:
        raise ValueError(
            f"general.architecture is {reprlib.repr(kind)}, and only {', '.join(HALVED_ROTARY)} can be converted; some "
            "other families can be from their Hugging Face folders, see howto/download_weights.md"
        )
    tokens = take(fields, "tokenizer.ggml.tokens", list, None, [])
    if not tokens:
        raise ValueError("it lacks tokenizer.ggml.tokens, so it has no vocabulary")
    if take(fields, f"{kind}.expert_count", int, None, 0):
        raise ValueError(f"{kind}.expert_count is not 0, which this model cannot do")

    def size(field: str, *default: int) -> int:
        return take(fields, f"{kind}.{field}", int, None, *default, least=1, most=MOST_TOKENS)

    n_head, n_embd = size("attention.head_count"), size("embedding_length")
    head_size = size("attention.key_length", n_embd // n_head)
    for field in ("rope.dimension_count", "attention.value_length"):
        if size(field, head_size) != head_size:
            raise ValueError(f"{kind}.{field} is {size(field)}, but only the head size {head_size} is supported")
    window = take(fields, f"{kind}.attention.sliding_window", int, None, None, 0) or None  # 0 means none
    config = LLaMAConfig(
        name=name,
        block_size=within_window(size("context_length"), window, f"{place}: {kind}.attention.sliding_window"),
        vocab_size=len(tokens),
        n_layer=size("block_count"),
        n_head=n_head,
        n_embd=n_embd,
        n_kv_head=size("attention.head_count_kv", n_head),
        head_size=head_size,
        intermediate_size=size("feed_forward_length"),
        # stored as float32
        norm_eps=round(take(fields, f"{kind}.attention.layer_norm_rms_epsilon", float, None), 10),
        rope_base=take(fields, f"{kind}.rope.freq_base", float, None, 10000.0),
        rope_scaling=_linear_scaling(fields, kind),
        tie_embeddings="output.weight" not in tensors,
        qkv_bias=kind == "qwen2" or any(re.search(r"attn_[qkv]\.bias", name) for name in tensors),
        o_bias=any(name.endswith(".attn_output.bias") for name in tensors),
        qk_norm=kind == "qwen3",
    )
    return config if tensors.rope_factors is None else _with_llama3_scaling(config, tensors.rope_factors)


def _linear_scaling(fields: dict[str, Any], kind: str) -> RopeScaling | None:
    scaling = take(fields, f"{kind}.rope.scaling.type", str, None, "linear")
    older = take(fields, f"{kind}.rope.scale_linear", float, None, 1.0)
    factor = take(fields, f"{kind}.rope.scaling.factor", float, None, older)
    if scaling not in ("none", "linear"):
        raise ValueError(f"{kind}.rope.scaling.type is {reprlib.repr(scaling)}; only none and linear can be converted")
    return None if scaling == "none" or factor in (0.0, 1.0) else RopeScaling("linear", factor)


def _with_llama3_scaling(config: LLaMAConfig, factors: torch.Tensor) -> LLaMAConfig:
    """GGUF stores Llama 3's stretching as one divisor for each frequency, the largest of them being the factor."""
    frequencies = rope_frequencies(config)
    if factors.shape == frequencies.shape and factors.dtype == torch.float32:
        scaled = replace(config, rope_scaling=RopeScaling("llama3", factor=factors.max().item()))
        if torch.allclose(frequencies / rope_frequencies(scaled), factors, rtol=1e-4):
            return scaled
    raise ValueError("rope_freqs.weight is not Llama 3's stretching of the rotary frequencies")
