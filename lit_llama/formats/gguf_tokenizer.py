"""Tokenizers of GGUF files: the files that transformers would have, rebuilt from the vocabulary in the metadata."""

import reprlib
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from lit_llama.fields import check_list, take
from lit_llama.files import require_extra, write_json
from lit_llama.formats.tokenizer_files import put_in_front

NORMAL, CONTROL, USER_DEFINED, BYTE = 1, 3, 4, 6  # token types of tokenizer.ggml.token_type

# How text is cut before the merges of BPE, by tokenizer.ggml.pre: the patterns of the models' own tokenizer.json, which
# llama.cpp's src/llama-vocab.cpp quotes.
_GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _GPT4.replace("{1,3}", "")  # digits one by one
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SEED = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PATTERNS = {
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3"), _GPT4),
    **dict.fromkeys(("dbrx", "smaug-bpe"), _GPT4),  # Phi-4; others made of Llama 3
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _QWEN2),
    "tekken": _TEKKEN,  # Mistral Nemo and Small
    "seed-coder": _SEED,  # Seed-OSS
}
_DIGITS_APART = ("smollm", "refact")  # SmolLM2; Granite
PRE_TOKENIZERS = ("gpt-2", *_DIGITS_APART, *_PATTERNS)
# Here a piece that is in the vocabulary is one token even where its merges would not lead there, and a text begins with
# a token of its own unless the file says otherwise.
_WHOLE_PIECES = ("llama-bpe", "llama3", "llama-v3", "falcon3", "tekken")


def write_tokenizer(fields: dict[str, Any], folder: Path, place: object) -> None:
    """Rebuild the tokenizer's files from the vocabulary of a GGUF file.

    Args:
        fields: the file's metadata.
        folder: where to write.
        place: the file, for error messages.

    Raises:
        ValueError: the vocabulary is of another kind, or damaged; the message names the field.
    """
    kind = fields.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise ValueError(
            f"{place}: tokenizer.ggml.model is {kind!r}; only gpt2 (BPE) and llama (SentencePiece) can be converted"
        )
    tokens = check_list(fields["tokenizer.ggml.tokens"], "tokenizer.ggml.tokens", str, place)
    named: dict[str, str] = {}
    for name, setting in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        id = take(fields, f"tokenizer.ggml.{name}_token_id", int, place, None, 0, len(tokens) - 1)
        if id is not None:
            named[f"{setting}_token"] = tokens[id]
    adds_bos = kind == "llama" or fields.get("tokenizer.ggml.pre") in _WHOLE_PIECES
    adds_bos = take(fields, "tokenizer.ggml.add_bos_token", bool, place, adds_bos)
    settings: dict[str, Any] = {"add_bos_token": adds_bos, **named}
    try:
        if kind == "gpt2":
            tokenizer = _bpe(fields, tokens, list(named.values()), place)
            put_in_front(tokenizer, named["bos_token"] if adds_bos and "bos_token" in named else None)
            tokenizer.save(str(folder / "tokenizer.json"))
            settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # transformers takes tokenizer.json as it is
        else:
            _write_sentencepiece(fields, tokens, folder / "tokenizer.model", place)
    except (ValueError, OSError, ImportError):
        raise
    except Exception as error:  # the tokenizers library raises bare exceptions
        raise ValueError(f"{place}: the vocabulary is damaged ({error})") from None
    if "tokenizer.chat_template" in fields:
        settings["chat_template"] = take(fields, "tokenizer.chat_template", str, place)
    front = "tokenizer.chat_template."  # of templates with a name
    named = {key.removeprefix(front): take(fields, key, str, place) for key in fields if key.startswith(front)}
    if named:
        named |= {"default": settings["chat_template"]} if "chat_template" in settings else {}
        settings["chat_template"] = [{"name": name, "template": source} for name, source in named.items()]
    write_json(folder / "tokenizer_config.json", settings)


def _pre_tokenizer(name: str) -> pre_tokenizers.PreTokenizer:
    if name in _PATTERNS:
        split = pre_tokenizers.Split(Regex(_PATTERNS[name]), behavior="isolated")
        return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name == "gpt-2":
        return byte_level
    if name in _DIGITS_APART:
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    raise ValueError(
        f"tokenizer.ggml.pre is {reprlib.repr(name)}; known are {', '.join(PRE_TOKENIZERS)}: give the right one as "
        "--pre_tokenizer, or convert the Hugging Face checkpoint of this model instead"
    )


def _for_each(fields: dict[str, Any], name: str, kind: type, tokens: list[str], place: object) -> list[Any]:
    """A field that has one value for each token."""
    name = f"tokenizer.ggml.{name}"
    values = check_list(fields.get(name), name, kind, place)
    if len(values) != len(tokens):
        raise ValueError(f"{place}: {name} has {len(values)} entries, expected {len(tokens)}, one for each token")
    return values


def _bpe(fields: dict[str, Any], tokens: list[str], named: list[str], place: object) -> Tokenizer:
    pre = take(fields, "tokenizer.ggml.pre", str, place, "missing")
    merges = []
    for merge in check_list(fields.get("tokenizer.ggml.merges"), "tokenizer.ggml.merges", str, place):
        left, space, right = merge.partition(" ")
        if not (left and space and right) or " " in right:
            raise ValueError(f"{place}: tokenizer.ggml.merges has {reprlib.repr(merge)}, expected two parts")
        merges.append((left, right))
    vocabulary = {token: id for id, token in enumerate(tokens)}
    model = models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre in _WHOLE_PIECES)
    tokenizer = Tokenizer(model)
    if pre == "qwen2":  # llama.cpp leaves this to its callers
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _pre_tokenizer(pre)
    tokenizer.decoder = decoders.ByteLevel()
    types = _for_each(fields, "token_type", int, tokens, place)
    added = [
        AddedToken(token, special=kind == CONTROL or token in named, normalized=False)
        for token, kind in zip(tokens, types, strict=True)
        if kind in (CONTROL, USER_DEFINED) or token in named
    ]
    tokenizer.add_tokens(added)
    return tokenizer


def _write_sentencepiece(fields: dict[str, Any], tokens: list[str], file: Path, place: object) -> None:
    require_extra("google.protobuf", "gguf")
    proto = require_extra("sentencepiece.sentencepiece_model_pb2", "gguf")
    model = proto.ModelProto()
    scores = _for_each(fields, "scores", float, tokens, place)
    for piece, score, kind in zip(tokens, scores, _for_each(fields, "token_type", int, tokens, place), strict=True):
        if not NORMAL <= kind <= BYTE:
            raise ValueError(f"{place}: tokenizer.ggml.token_type has {kind}, expected {NORMAL} to {BYTE}")
        model.pieces.add(piece=piece, score=score, type=kind)
    trainer = model.trainer_spec
    trainer.model_type, trainer.byte_fallback, trainer.vocab_size = trainer.BPE, True, len(model.pieces)
    for name, attribute in (("unknown", "unk_id"), ("bos", "bos_id"), ("eos", "eos_id"), ("padding", "pad_id")):
        setattr(trainer, attribute, fields.get(f"tokenizer.ggml.{name}_token_id", -1))  # checked above
    trainer.bos_piece, trainer.eos_piece = (
        "" if id < 0 else model.pieces[id].piece for id in (trainer.bos_id, trainer.eos_id)
    )
    normalizer = model.normalizer_spec
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = take(fields, "tokenizer.ggml.add_space_prefix", bool, place, True)
    squeeze = take(fields, "tokenizer.ggml.remove_extra_whitespaces", bool, place, False)
    normalizer.remove_extra_whitespaces = squeeze
    normalizer.escape_whitespaces = True
    file.write_bytes(model.SerializeToString())
