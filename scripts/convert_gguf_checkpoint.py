"""Convert a GGUF file of a LLaMA-family model, quantised or not, to this project's format.

    python scripts/convert_gguf_checkpoint.py --gguf_path model.gguf --output_dir checkpoints/model

Weights are dequantised with the `gguf` library (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md); the
tokenizer is rebuilt from the vocabulary in the file.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as HuggingFaceTokenizer

from lit_llama.checkpoint import CONFIG_FILE, DType, write_base
from lit_llama.cli import run
from lit_llama.files import atomic_folder, require_extra, write_json
from lit_llama.gguf_files import NAMES, GGUFTensors, config_from_gguf, open_gguf

CONTROL, USER_DEFINED = 3, 4  # token types of tokenizer.ggml.token_type


def main(
    gguf_path: Path,
    output_dir: Path,
    dtype: DType = "float32",
    pre_tokenizer: str | None = None,
    overwrite: bool = False,
) -> None:
    """Convert one file.

    Args:
        gguf_path: the GGUF file.
        output_dir: the folder to write.
        dtype: of the weights on disk. float32 holds dequantised weights exactly.
        pre_tokenizer: how text is cut before BPE's merges: smollm, llama-bpe or gpt-2; for files that do not say.
        overwrite: replace the folder if it exists.
    """
    reader, fields = open_gguf(gguf_path)
    tensors = GGUFTensors(reader)
    if pre_tokenizer is not None:
        fields["tokenizer.ggml.pre"] = pre_tokenizer
    config = config_from_gguf(fields, tensors, name=output_dir.name)
    source = {"format": "gguf", "from": gguf_path.name, "name": fields.get("general.name")}
    with atomic_folder(output_dir, overwrite, CONFIG_FILE) as folder:
        write_tokenizer(fields, folder)
        write_base(folder, config, tensors, NAMES, source, getattr(torch, dtype))
    print(f"base model: {output_dir} (scripts that open it check it with --verify true)", file=sys.stderr)


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
