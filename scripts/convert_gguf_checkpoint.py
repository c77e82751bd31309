"""Convert a GGUF file of a LLaMA-family model, quantised or not, to this project's format.

    python scripts/convert_gguf_checkpoint.py --gguf_path model.gguf --output_dir checkpoints/model

Weights are dequantised with the `gguf` library (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md); the
tokenizer is rebuilt from the vocabulary in the file.
"""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as HuggingFaceTokenizer

from lit_llama.checkpoint import DType, write_base
from lit_llama.cli import run
from lit_llama.files import atomic_folder, check_file, require_extra, write_json
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

CONTROL, USER_DEFINED = 3, 4  # token types of tokenizer.ggml.token_type


def main(gguf_path: Path, output_dir: Path, dtype: DType = "float32", pre_tokenizer: str | None = None) -> None:
    """Convert one file.

    Args:
        gguf_path: the GGUF file.
        output_dir: the folder to write; must not exist yet.
        dtype: of the weights on disk. float32 holds dequantised weights exactly.
        pre_tokenizer: how text is cut before BPE's merges: smollm, llama-bpe or gpt-2; for files that do not say.
    """
    gguf = require_extra("gguf", "gguf")
    check_file(gguf_path)
    try:
        reader = gguf.GGUFReader(gguf_path)
    except (ValueError, IndexError, KeyError) as error:
        raise ValueError(f"{gguf_path} is not a complete GGUF file ({error})") from None
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = GGUFTensors(reader)
    if pre_tokenizer is not None:
        fields["tokenizer.ggml.pre"] = pre_tokenizer
    config = config_from_gguf(fields, tensors, name=output_dir.name)
    source = {"format": "gguf", "from": gguf_path.name, "name": fields.get("general.name")}
    with atomic_folder(output_dir) as folder:
        write_tokenizer(fields, folder)
        write_base(folder, config, tensors, NAMES, source, getattr(torch, dtype))
    print(f"base model: {output_dir}", file=sys.stderr)


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


def write_tokenizer(fields: dict[str, Any], folder: Path) -> None:
    """Rebuild the tokenizer's files from the vocabulary of a GGUF file."""
    kind = fields.get("tokenizer.ggml.model")
    tokens = fields["tokenizer.ggml.tokens"]
    if kind == "gpt2":
        _write_bpe(fields, folder / "tokenizer.json")
    elif kind == "llama":
        _write_sentencepiece(fields, folder / "tokenizer.model")
    else:
        raise ValueError(f"tokenizer.ggml.model is {kind!r}; only gpt2 (BPE) and llama (SentencePiece) will do")
    adds_bos = kind == "llama" or fields.get("tokenizer.ggml.pre") in _LLAMA3  # as llama.cpp has it
    settings: dict[str, Any] = {"add_bos_token": fields.get("tokenizer.ggml.add_bos_token", adds_bos)}
    for name in ("bos", "eos", "unknown", "padding"):
        id = fields.get(f"tokenizer.ggml.{name}_token_id")
        if id is not None:
            settings[{"unknown": "unk", "padding": "pad"}.get(name, name) + "_token"] = tokens[id]
    if "tokenizer.chat_template" in fields:
        settings["chat_template"] = fields["tokenizer.chat_template"]
    write_json(folder / "tokenizer_config.json", settings)


# By tokenizer.ggml.pre, how text is cut before merging; see llama.cpp's src/llama-vocab.cpp.
_LLAMA3 = ("llama-bpe", "llama3", "llama-v3")
_LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _pre_tokenizer(name: str) -> pre_tokenizers.PreTokenizer:
    if name in _LLAMA3:
        split = pre_tokenizers.Split(Regex(_LLAMA3_PATTERN), behavior="isolated")
        return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name == "gpt-2":
        return byte_level
    if name == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    raise ValueError(
        f"tokenizer.ggml.pre is {name!r}; smollm, llama-bpe and gpt-2 are known: give the right one as "
        "--pre_tokenizer, or convert the Hugging Face checkpoint of this model instead"
    )


def _write_bpe(fields: dict[str, Any], file: Path) -> None:
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    pre = fields.get("tokenizer.ggml.pre", "missing")
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    vocabulary = {token: id for id, token in enumerate(tokens)}
    # Llama 3 takes a word that is in the vocabulary whole even where its merges would not lead there.
    model = models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre in _LLAMA3)
    tokenizer = HuggingFaceTokenizer(model)
    tokenizer.pre_tokenizer = _pre_tokenizer(pre)
    tokenizer.decoder = decoders.ByteLevel()
    added = [
        AddedToken(token, special=kind == CONTROL, normalized=False)
        for token, kind in zip(tokens, types, strict=True)
        if kind in (CONTROL, USER_DEFINED)
    ]
    tokenizer.add_tokens(added)
    tokenizer.save(str(file))


def _write_sentencepiece(fields: dict[str, Any], file: Path) -> None:
    require_extra("google.protobuf", "gguf")
    proto = require_extra("sentencepiece.sentencepiece_model_pb2", "gguf")
    model = proto.ModelProto()
    rows = zip(
        fields["tokenizer.ggml.tokens"],
        fields["tokenizer.ggml.scores"],
        fields["tokenizer.ggml.token_type"],
        strict=True,
    )
    for piece, score, kind in rows:
        model.pieces.add(piece=piece, score=score, type=kind)
    trainer = model.trainer_spec
    trainer.model_type, trainer.byte_fallback, trainer.vocab_size = trainer.BPE, True, len(model.pieces)
    for name, attribute in (("unknown", "unk_id"), ("bos", "bos_id"), ("eos", "eos_id"), ("padding", "pad_id")):
        setattr(trainer, attribute, fields.get(f"tokenizer.ggml.{name}_token_id", -1))
    trainer.bos_piece, trainer.eos_piece = (
        "" if id < 0 else model.pieces[id].piece for id in (trainer.bos_id, trainer.eos_id)
    )
    normalizer = model.normalizer_spec
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = fields.get("tokenizer.ggml.add_space_prefix", True)
    normalizer.remove_extra_whitespaces = fields.get("tokenizer.ggml.remove_extra_whitespaces", False)
    normalizer.escape_whitespaces = True
    file.write_bytes(model.SerializeToString())


if __name__ == "__main__":
    run(main)
