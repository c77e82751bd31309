"""One face for the LLaMA family's tokenizers: Hugging Face's `tokenizer.json`, SentencePiece's `tokenizer.model`.

Both are read from the base model's folder as they came, with what `tokenizer_config.json`, `chat_template.jinja` and
`generation_config.json` add to them.
"""

import hashlib
import itertools
import os
import re
import reprlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers

from lit_llama.fields import check_object, take
from lit_llama.files import read_json, read_text

MOST_IDS = 2**24  # more than any vocabulary has

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
TEMPLATE_DIR = "additional_chat_templates"


class Tokenizer:
    """Text to token ids and back.

    Args:
        folder: holds `tokenizer.json` or `tokenizer.model`; the first is preferred.

    Attributes:
        vocab_size: one more than the highest id.
        bos_id: id of the beginning-of-sequence token, None if the model has none.
        eos_id: id of the end-of-sequence token.
        stop_ids: every id at which generation stops.
        adds_bos: whether plain text is meant to start with `bos_id`.
        adds_space: whether encoding puts a space before a text.
        chat_template: Jinja source of the model's chat format, None if it has none.
        chat_templates: the sources of all its formats by name, of which `chat_template` is the one named "default".
        special_tokens: content of the special tokens, as the chat template wants to know them.
        fingerprint: SHA-256 of the tokenizer file.

    Raises:
        FileNotFoundError: the folder holds neither file.
        ValueError: the file is not a tokenizer, or no end-of-sequence token can be found.
    """

    def __init__(self, folder: Path | str) -> None:
        folder = Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{folder}: no such folder; howto/download_weights.md says where base models come from"
            )
        settings = _read_settings(folder / "tokenizer_config.json")
        file = tokenizer_file(folder)
        added = _added(folder) if file.suffix != ".json" else {}
        try:
            self._backend = _HuggingFace(file) if file.suffix == ".json" else _SentencePiece(file, added)
        except Exception as error:  # both libraries raise bare exceptions
            raise ValueError(
                f"{file} is not a tokenizer that can be read ({error}); for Llama 3, whose tokenizer.model is in "
                "tiktoken's format, put the tokenizer.json of its Hugging Face version next to it"
            ) from None
        self._without_row: frozenset[int] = frozenset()  # ids that the model does not embed
        self.fingerprint = hashlib.sha256(file.read_bytes()).hexdigest()
        self.vocab_size = self._backend.vocab_size

        self.special_tokens = _special_tokens(folder, settings)
        stop_ids = _stop_ids(folder / "generation_config.json", self.vocab_size)
        eos_id = self._special_id("eos_token")
        if eos_id is None:
            eos_id = stop_ids[0] if stop_ids else self._backend.eos_id
        if eos_id is None:
            raise ValueError(f"{folder}: no end-of-sequence token; name one as eos_token in tokenizer_config.json")
        self.eos_id: int = eos_id
        self.stop_ids = frozenset([eos_id, *stop_ids])
        bos_id = self._special_id("bos_token")
        self.bos_id: int | None = self._backend.bos_id if bos_id is None else bos_id
        adds_bos = take(settings, "add_bos_token", bool, folder / "tokenizer_config.json", self._backend.adds_bos)
        self.adds_bos: bool = self.bos_id is not None and adds_bos
        self.adds_space = "".join(map(self.token, self.encode("a"))).startswith("\u2581")
        self.special_tokens.setdefault("eos_token", self.token(eos_id))
        if self.bos_id is not None:
            self.special_tokens.setdefault("bos_token", self.token(self.bos_id))

        self.chat_templates = _chat_templates(folder, settings)
        self.chat_template: str | None = self.chat_templates.get("default")

    def encode(self, text: str, bos: bool = False) -> list[int]:
        """Token ids of a text; special tokens written in it become their ids."""
        return self.encode_batch([text], bos)[0]

    def encode_batch(self, texts: Sequence[str], bos: bool = False) -> list[list[int]]:
        """Token ids of many texts, in parallel where the tokenizer can.

        Raises:
            ValueError: a text holds lone surrogates, as bytes that are not UTF-8 become, or a token that the model does
                not embed, see `check_vocabulary`.
        """
        for text in texts:
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"a text holds bytes that are not UTF-8, at character {error.start}") from None
        front = [self.bos_id] if bos and self.bos_id is not None else []
        rows = [front + ids for ids in self._backend.encode_batch(texts)]
        if self._without_row and (found := self._without_row.intersection(itertools.chain.from_iterable(rows))):
            raise ValueError(f"a text holds {self.token(min(found))!r}, a token that the model does not embed")
        return rows

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids."""
        return self._backend.decode(list(ids), skip_special_tokens)

    def token(self, id: int) -> str:
        """The text of one token as the vocabulary has it."""
        return self._backend.token(id)

    def is_special(self, id: int) -> bool:
        """Whether an id is a marker rather than text."""
        return id in self._backend.special_ids

    def check_vocabulary(self, rows: int) -> None:
        """Make sure that this tokenizer can belong to a model with that many embedding rows.

        Models may have rows that no token uses. Tokenizers may have tokens that the model has no row for, such as the
        padding token of some LLaMA 2 repositories, if none of them is found in ordinary text; a warning names them.
        From then on, texts that hold one are refused.

        Raises:
            ValueError: it cannot be this model's.
        """
        beyond = frozenset(range(rows, self.vocab_size))
        if beyond & self.stop_ids or self.bos_id in beyond or not beyond <= self._backend.added_ids:
            raise ValueError(
                f"the tokenizer has {self.vocab_size} tokens but the model embeds {rows}: "
                "copy the tokenizer files that came with this model into its folder"
            )
        if beyond:
            some = reprlib.repr([self.token(id) for id in sorted(beyond)])
            warnings.warn(
                f"the model does not embed {some}, which its tokenizer has: they cannot be used", stacklevel=2
            )
        self._without_row = beyond

    def _special_id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self._backend.id(token)


class _HuggingFace:
    def __init__(self, file: Path) -> None:
        self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.vocab_size = max(self._tokenizer.get_vocab().values()) + 1
        added = self._tokenizer.get_added_tokens_decoder()
        self.added_ids = frozenset(added)
        self.special_ids = frozenset(id for id, token in added.items() if token.special)
        template = self._tokenizer.encode("", add_special_tokens=True).ids
        self.adds_bos = bool(template)
        self.bos_id = template[0] if template else None
        usual = ("</s>", "<|endoftext|>", "<|end_of_text|>")
        self.eos_id = next((id for id, token in added.items() if token.content in usual), None)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def token(self, id: int) -> str:
        return self._tokenizer.id_to_token(id) or ""


class _SentencePiece:
    def __init__(self, file: Path, added: dict[str, int]) -> None:
        self._processor = sentencepiece.SentencePieceProcessor(model_file=str(file))
        pieces = self._processor.get_piece_size()
        self._added = {token: id for token, id in added.items() if id >= pieces}
        self._added_by_id = {id: token for token, id in self._added.items()}
        self.vocab_size = max([pieces - 1, *self._added_by_id]) + 1
        self.adds_bos = True
        self.bos_id = None if self._processor.bos_id() < 0 else self._processor.bos_id()
        self.eos_id = None if self._processor.eos_id() < 0 else self._processor.eos_id()
        unknown = self._processor.unk_id()
        control = [id for id in range(pieces) if self._processor.is_control(id)]
        self.added_ids = frozenset(self._added_by_id)
        self.special_ids = frozenset([*control, unknown, *self.added_ids])
        # SentencePiece never finds these in text, but chat templates write them there.
        markers = sorted(filter(None, (self.token(i) for i in self.special_ids)), key=len, reverse=True)
        self._markers = re.compile("(" + "|".join(map(re.escape, markers)) + ")") if markers else None

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        # Markers stand at the odd places. The text between them is encoded all at once, for the processor's threads.
        split = [self._markers.split(text) if self._markers else [text] for text in texts]
        between = [part for parts in split for part in parts[::2] if part]
        encoded = iter(self._processor.encode(between, num_threads=os.cpu_count() or 1) if between else [])
        rows: list[list[int]] = []
        for parts in split:
            ids: list[int] = []
            for i, part in enumerate(parts):
                if i % 2:
                    ids.append(self._added.get(part, self._processor.piece_to_id(part)))
                elif part:
                    ids.extend(next(encoded))
            rows.append(ids)
        return rows

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        if skip_special_tokens:
            return self._processor.decode([id for id in ids if id not in self.special_ids])
        text, run = "", []
        for id in ids:
            if id in self.special_ids:
                text += self._processor.decode(run) + self.token(id)
                run = []
            else:
                run.append(id)
        return text + self._processor.decode(run)

    def id(self, token: str) -> int | None:
        if token in self._added:
            return self._added[token]
        id = self._processor.piece_to_id(token)
        return None if id == self._processor.unk_id() and token != self.token(id) else id

    def token(self, id: int) -> str:
        return self._added_by_id.get(id) or self._processor.id_to_piece(id)


def tokenizer_file(folder: Path) -> Path:
    """The file of a model's tokenizer.

    Raises:
        FileNotFoundError: there is none that can be read here.
    """
    for name in TOKENIZER_FILES[:2]:
        if (folder / name).is_file():
            return folder / name
    if (folder / "tekken.json").is_file():
        raise FileNotFoundError(
            f"{folder / 'tekken.json'} is a tokenizer in Mistral's own format, which is not read here: put the "
            "tokenizer.json of the model's Hugging Face version next to it, or convert a GGUF file of the model"
        )
    raise FileNotFoundError(f"{folder} holds no tokenizer: expected tokenizer.json or tokenizer.model")


def _added(folder: Path) -> dict[str, int]:
    """Tokens that were added to a SentencePiece model after its training, by their text.

    Raises:
        ValueError: a file does not say what a token is, or gives it an id that cannot be.
    """
    file = folder / "added_tokens.json"
    listed = _read_settings(file)
    added = {text: take(listed, text, int, file, least=0, most=MOST_IDS) for text in listed}
    file = folder / "tokenizer_config.json"
    for id, token in take(_read_settings(file), "added_tokens_decoder", dict, file, {}).items():
        place = f"{file}: added_tokens_decoder[{reprlib.repr(id)}]"
        if not re.fullmatch(r"[0-9]{1,7}", id):
            raise ValueError(f"{place}: expected the id of a token")
        added[take(check_object(token, place), "content", str, place)] = int(id)
    return added


def _special_tokens(folder: Path, settings: dict[str, Any]) -> dict[str, str]:
    """The texts of the special tokens by what they are for, such as "eos_token"."""
    files = [(folder / "tokenizer_config.json", settings)]
    if "added_tokens_decoder" not in settings:  # older tokenizers name them in a file of their own
        file = folder / "special_tokens_map.json"
        files.append((file, _read_settings(file)))
    tokens: dict[str, str] = {}
    for file, fields in files:
        for name, token in fields.items():
            if token is None:
                continue
            if isinstance(token, dict) and name.endswith("_token"):
                tokens[name] = take(token, "content", str, f"{file}: {name}")
            elif (isinstance(token, str) and name.endswith("_token")) or name in ("bos_token", "eos_token"):
                tokens[name] = take(fields, name, str, file)
    return tokens


def _stop_ids(file: Path, vocab_size: int) -> list[int]:
    """The ids in a generation_config.json at which generation stops."""
    stop = _read_settings(file).get("eos_token_id")
    ids = [] if stop is None else stop if isinstance(stop, list) else [stop]
    return [take({"eos_token_id": id}, "eos_token_id", int, file, least=0, most=vocab_size - 1) for id in ids]


def _read_settings(file: Path) -> dict[str, Any]:
    return check_object(read_json(file), file) if file.is_file() else {}


def _chat_templates(folder: Path, settings: dict[str, Any]) -> dict[str, str]:
    """A model's chat templates by name, from the first of the places in which Hugging Face looks for them."""
    named = sorted((folder / TEMPLATE_DIR).glob("*.jinja"))
    files = {file.stem: file for file in named if file.is_file()}
    if (folder / "chat_template.jinja").is_file():
        files.setdefault("default", folder / "chat_template.jinja")
    if files:
        return {name: read_text(file) for name, file in files.items()}
    processor = folder / "chat_template.json"  # of models that read pictures, too
    for file, given in ((folder / "tokenizer_config.json", settings), (processor, _read_settings(processor))):
        templates: Any = given.get("chat_template")
        if isinstance(templates, list):  # [{"name": ..., "template": ...}]
            templates = {str(t.get("name")): t.get("template") for t in templates if isinstance(t, dict)}
        if isinstance(templates, str):
            templates = {"default": templates}
        if templates is not None:
            if not isinstance(templates, dict) or not all(isinstance(t, str) for kv in templates.items() for t in kv):
                raise ValueError(f"{file}: expected a text or texts by name as chat_template")
            return templates
    return {}
