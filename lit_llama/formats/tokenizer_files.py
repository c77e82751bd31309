"""Tokenizer files for transformers and what is built on it: the same ids there as here, the first token included."""

import warnings
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, processors

from lit_llama.files import read_json, write_json
from lit_llama.tokenizer import Tokenizer

SPACE = "\u2581"  # SentencePiece's


def put_in_front(tokenizer: tokenizers.Tokenizer, bos: str | None) -> None:
    """Let a tokenizer begin plain text with a token, or with none, and end it with none.

    Args:
        tokenizer: changed in place.
        bos: the token, one of the vocabulary's.
    """
    if bos is None:
        tokenizer.post_processor = None  # type: ignore[assignment]
    else:
        special = [(bos, tokenizer.token_to_id(bos))]
        tokenizer.post_processor = processors.TemplateProcessing(f"{bos} $A", f"{bos} $A $B:1", special)


def write_for_transformers(folder: Path) -> None:
    """Make the tokenizer files of a folder mean to transformers what they mean here.

    `tokenizer.json` is written where there is only SentencePiece's `tokenizer.model`. Its first token is that of this
    project, because transformers takes it from there and not from `add_bos_token`. The class in `tokenizer_config.json`
    becomes the one that takes the file as it is: `LlamaTokenizer` would rebuild it with another treatment of spaces.

    Args:
        folder: has the tokenizer's files as they came; texts that transformers would read as other ids all the same
            are warned of.
    """
    ours, file = Tokenizer(folder), folder / "tokenizer.json"
    bos = ours.token(ours.bos_id) if ours.adds_bos and ours.bos_id is not None else None
    if file.is_file():
        theirs = tokenizers.Tokenizer.from_file(str(file))
    else:
        theirs = _from_sentencepiece(folder / "tokenizer.model", ours)
    if theirs.encode("").ids != ours.encode("", bos=ours.adds_bos):
        put_in_front(theirs, bos)
        theirs.save(str(file))
    elif not file.is_file():
        theirs.save(str(file))
    different = next((text for text in _samples(theirs) if _differ(theirs, ours, text)), None)
    if different is not None:
        warnings.warn(f"transformers reads {different!r} as other tokens than this project does", stacklevel=2)
    settings_file = folder / "tokenizer_config.json"
    settings: dict[str, Any] = read_json(settings_file) if settings_file.is_file() else {}
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": ours.adds_bos}
    settings.setdefault("eos_token", ours.special_tokens["eos_token"])
    if ours.bos_id is not None:
        settings.setdefault("bos_token", ours.special_tokens["bos_token"])
    write_json(settings_file, settings)


def _from_sentencepiece(file: Path, ours: Tokenizer) -> tokenizers.Tokenizer:
    """The tokenizer of a SentencePiece model of pair merges, which is the LLaMA family's.

    Its merges are all pairs of pieces that make a piece, the pieces with the highest scores first.
    """
    processor = sentencepiece.SentencePieceProcessor(model_file=str(file))
    ids = range(processor.get_piece_size())
    vocabulary = {processor.id_to_piece(id): id for id in ids}
    others = (processor.is_control, processor.is_unknown, processor.is_byte, processor.is_unused)
    text_pieces = {piece: id for piece, id in vocabulary.items() if not any(kind(id) for kind in others)}
    merges: list[tuple[float, int, int, tuple[str, str]]] = []
    whole: list[str] = []  # pieces that no merge leads to: found in text as they stand, if at all
    for piece, id in text_pieces.items():
        pairs = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        pairs = [(left, right) for left, right in pairs if left in text_pieces and right in text_pieces]
        merges += [(-processor.get_score(id), text_pieces[a], text_pieces[b], (a, b)) for a, b in pairs]
        if len(piece) > 1 and not pairs and id in processor.encode(piece.replace(SPACE, " ")):
            whole.append(piece)
    markers = {ours.token(id): id for id in range(ours.vocab_size) if ours.is_special(id)}
    tokenizer = tokenizers.Tokenizer(
        models.BPE(
            vocabulary | markers,
            [pair for *_, pair in sorted(merges)],
            unk_token=processor.id_to_piece(processor.unk_id()),
            fuse_unk=True,
            byte_fallback=any(processor.is_byte(id) for id in ids),
        )
    )
    spaces = normalizers.Replace(" ", SPACE)
    prepend = ours.adds_space
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if prepend else spaces
    steps: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prepend else steps)
    tokenizer.add_tokens([AddedToken(piece, special=False, normalized=False) for piece in whole])
    tokenizer.add_tokens([AddedToken(marker, special=True, normalized=False) for marker in markers])
    return tokenizer


def _samples(tokenizer: tokenizers.Tokenizer) -> list[str]:
    texts = ["Hello world", "  two spaces,  a tab\t1234\n\n and ﬁ é 漢字 🙂 ", "", "it's <b>x</b>"]
    markers = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    return texts + [f"a{marker}b {marker}\n" for marker in markers[:100]]


def _differ(theirs: tokenizers.Tokenizer, ours: Tokenizer, text: str) -> bool:
    with_bos = theirs.encode(text).ids, ours.encode(text, bos=ours.adds_bos)
    without = theirs.encode(text, add_special_tokens=False).ids, ours.encode(text)
    return with_bos[0] != with_bos[1] or without[0] != without[1]
