"""Tokenised data sets on disk, and the batches made of them; `lit_llama.data_writing` writes them.

A data set is a folder: `dataset.json` says what it is, and each split is three raw little-endian arrays that are
memory-mapped, never unpickled:

    SPLIT.ids.bin      token ids of all examples, one after the other
    SPLIT.scored.bin   one byte per token: 1 if the loss scores it, 2 if it does so in an answer that is not wanted
    SPLIT.offsets.bin  int64, where each example begins, and the end

An item of a data set for supervised tuning is one example; one of preference pairs is two, chosen and rejected. One of
unpaired answers is two as well: a good or a bad answer, and the same prompt with an answer to another prompt, by which
KTO estimates how far the policy is from its reference. One for distillation is two with the same response, after the
prompt that the student reads and after the teacher's.
"""

import hashlib
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lit_llama.checkpoint import read_config
from lit_llama.files import read_json
from lit_llama.prompts import Message, PromptStyle, ScoredTurns, prompt_style
from lit_llama.tokenizer import Tokenizer

FORMAT_VERSION = 2
DATASET_FILE = "dataset.json"


class Example(NamedTuple):
    """One tokenised example.

    Args:
        ids: token ids (T).
        scored: bool (T), the tokens that the loss scores.
    """

    ids: np.ndarray
    scored: np.ndarray


Kind = Literal["supervised", "pairs", "unpaired"]  # that the scripts prepare
AnyKind = Literal[Kind, "distillation"]
PER_ITEM = {"supervised": 1, "pairs": 2, "unpaired": 2, "distillation": 2}  # examples
Conversation = Sequence[Message]
# What comes of a record: one conversation; two, of pairs or of student and teacher; or any number, good or bad.
Item = Sequence[Conversation]


def tokenize(
    tokenizer: Tokenizer, style: PromptStyle, conversations: Sequence[Conversation], scored_turns: ScoredTurns = "all"
) -> list[Example]:
    """Tokenise conversations: the assistant's turns and the tokens that end them are scored, all turns or the last.

    A turn that says itself that it is not scored is none of them; a last turn that is not complete has no such token.

    Raises:
        ValueError: the style has no place for a conversation.
    """
    segments = [style.segments(messages, scored_turns) for messages in conversations]
    encoded = iter(tokenizer.encode_batch([segment.text for pieces in segments for segment in pieces]))
    front = [tokenizer.bos_id] if style.bos and tokenizer.bos_id is not None else []
    examples = []
    for pieces, messages in zip(segments, conversations, strict=True):
        responses = [i for i, piece in enumerate(pieces) if piece.is_response]
        answers = [message for message in messages if message.role == "assistant"]
        # From the end: earlier responses may have become part of a prompt.
        wanted = {i for i, answer in zip(reversed(responses), reversed(answers), strict=False) if answer.scored}
        if scored_turns == "last":
            wanted &= {len(pieces) - 1}
        ids, scored = list(front), [False] * len(front)
        for i, piece in enumerate(pieces):
            ends = piece.is_response and (i < len(pieces) - 1 or messages[-1].complete)
            tokens = [*next(encoded), *([style.end_id] if ends else [])]
            ids += tokens
            scored += [i in wanted] * len(tokens)
        examples.append(Example(np.array(ids), np.array(scored)))
    return examples


def id_dtype(vocab_size: int) -> str:
    return "<u2" if vocab_size <= 2**16 else "<u4"


class Batch(NamedTuple):
    """Examples as the model reads them: each a row padded on the right, or all packed into one row.

    Args:
        ids: token ids (B, T).
        scored: bool (B, T), tokens that the loss scores; never padding, nor the first of an example, which nothing
            predicts.
        lengths: lengths of the examples in a packed row.
        reference: log-probability of each example's scored tokens under a reference (E), where it was computed before.
        items: places of the items in their data set, for what is drawn for each.
        step: optimizer step that reads them, counted from 0; None where nothing is trained.
        wanted: whether each item's answer is a good one, bool (items), of unpaired answers.
    """

    ids: Tensor
    scored: Tensor
    lengths: list[int] | None = None
    reference: Tensor | None = None
    items: Sequence[int] = ()
    step: int | None = None
    wanted: Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        values = self._asdict().items()
        return self._replace(**{name: value.to(device) for name, value in values if isinstance(value, Tensor)})

    def part(self, place: int, per_item: int) -> "Batch":
        """The examples at one place of each item, as if there were no others, without padding that only these need.

        Args:
            place: their place in the item, counted from 0.
            per_item: number of examples in an item.
        """
        own = slice(place, None, per_item)
        part = self if self.reference is None else self._replace(reference=self.reference[own])
        if self.lengths is None:
            ids, scored = self.ids[own], self.scored[own]
            columns = scored.any(0).nonzero()
            length = int(columns[-1]) + 1 if len(columns) else 1  # what follows the last scored token is padding
            return part._replace(ids=ids[:, :length], scored=scored[:, :length])
        ids, scored = (torch.cat(row[0].split(self.lengths)[own])[None] for row in (self.ids, self.scored))
        return part._replace(ids=ids, scored=scored, lengths=self.lengths[own])

    def padded(self, multiple: int) -> "Batch":
        """With more padding, so that `multiple` divides the number of positions; a packed batch has none."""
        more = -self.ids.size(1) % multiple
        if self.lengths is not None or more == 0:
            return self
        return self._replace(ids=F.pad(self.ids, (0, more)), scored=F.pad(self.scored, (0, more)))

    def scored_lengths(self) -> Tensor:
        """Scored tokens of each example, (E)."""
        rows = self.scored.unbind() if self.lengths is None else self.scored[0].split(self.lengths)
        return torch.stack([row.sum() for row in rows])

    def predicts_scored(self) -> Tensor:
        """Bool (B, T), the positions whose next token is scored."""
        return F.pad(self.scored[:, 1:], (0, 1))

    def prompt(self) -> Tensor:
        """Bool (B, T), the positions before an example's first scored token."""
        before = self.scored.cumsum(1)  # scored tokens up to each position, of all examples in a row
        if self.lengths is not None:
            ends = torch.tensor(self.lengths, device=before.device).cumsum(0)
            earlier = F.pad(before[0, ends - 1], (1, 0))[:-1]  # (E), those of the examples before
            before = before - self.per_position(earlier)
        return before == 0

    def per_position(self, values: Tensor) -> Tensor:
        """A number of each example (E) at each of its positions, (B, T)."""
        if self.lengths is None:
            return values[:, None].expand(self.ids.shape)
        return values.repeat_interleave(torch.tensor(self.lengths, device=values.device))[None]

    def of_two(self) -> "tuple[Batch, Batch]":
        """The first and the second examples of items of two."""
        return self.part(0, per_item=2), self.part(1, per_item=2)


def collate(examples: Sequence[Example], pack: bool = False) -> Batch:
    """Make a batch of examples.

    Padding needs no mask: attention is causal, so what stands there reaches no scored token.

    Args:
        examples: at least one.
        pack: put all into one row, without padding.
    """
    lengths = [len(example.ids) for example in examples]
    shape = (1, sum(lengths)) if pack else (len(examples), max(lengths))
    ids, scored = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.bool)
    starts = np.cumsum([0, *lengths[:-1]]) if pack else np.arange(len(examples)) * shape[1]
    for example, start in zip(examples, starts.tolist(), strict=True):
        end = start + len(example.ids)
        ids.view(-1)[start:end] = torch.from_numpy(example.ids.astype(np.int64))
        scored.view(-1)[start + 1 : end] = torch.from_numpy(example.scored[1:])
    return Batch(ids, scored, lengths if pack else None)


def _read_header(file: Path) -> dict[str, Any]:
    """The content of `dataset.json`, with all that a split is opened by of the right type."""
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; expected a data set made by one of scripts/prepare_*.py")
    header = read_json(file)
    if not isinstance(header, dict) or header.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"{file} is not a data set of format version {FORMAT_VERSION}: prepare it again")
    splits = header.get("splits")
    found = {"": header, **{f"{name} of ": split for name, split in splits.items()}} if isinstance(splits, dict) else {}
    for place, values in found.items():
        for name, kind in (_SPLIT if place else _HEADER).items():
            value = values.get(name) if isinstance(values, dict) else None
            if type(value) is not kind or (isinstance(value, int) and value not in range(1, 2**48)):
                raise ValueError(f"{file} is damaged: {place}{name} is {value!r:.60}: prepare the data set again")
    if not found or header["kind"] not in _KINDS:
        raise ValueError(f"{file} is damaged: it lacks splits or a known kind; prepare the data set again")
    return header


_HEADER = {"kind": str, "tokenizer": str, "vocab_size": int, "prompt_style": str, "prompt_fingerprint": str}
_HEADER |= {"max_seq_length": int, "source": str}
_SPLIT = {"examples": int, "tokens": int, "longest": int, "sha256": str}


class TokenDataset:
    """One split of a tokenised data set, memory-mapped: a sequence of items.

    Args:
        folder: the data set.
        split: "train" or "validation".
        tokenizer: the tokenizer of the model that will read it.
        max_seq_length: longest example that is accepted, in tokens.
        kind: what an item must be: one example, a pair of chosen and rejected, or an unpaired answer.

    Attributes:
        header: the content of `dataset.json`.
        lengths: tokens in each item.
        sha256: hash of the split's content.
        reference: log-probabilities of the examples under a reference (items, 2), for batches to carry; see
            `lit_llama.dpo_reference`.

    Raises:
        FileNotFoundError: there is no such data set or split.
        ValueError: it was made with another tokenizer, is of another kind, has a longer example, or is damaged.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        tokenizer: Tokenizer,
        max_seq_length: int | None = None,
        kind: AnyKind = "supervised",
    ) -> None:
        self.header = _read_header(folder / DATASET_FILE)
        if (self.header["tokenizer"], self.header["vocab_size"]) != (tokenizer.fingerprint, tokenizer.vocab_size):
            raise ValueError(f"{folder} was prepared with another tokenizer than the base model's: prepare it again")
        style = prompt_style(self.header["prompt_style"], tokenizer)
        if self.header["prompt_fingerprint"] != style.fingerprint:
            raise ValueError(
                f"{folder} was prepared with another {style.name} template or another token at the end of turns than "
                "the base model's: prepare it again"
            )
        if self.header["kind"] != kind:
            raise ValueError(
                f"{folder} holds {_KINDS[self.header['kind']]}, expected {_KINDS[kind]}: prepare the data with "
                f"--kind {kind}"
            )
        if split not in self.header["splits"]:
            raise FileNotFoundError(f"{folder} has no split named {split}; it has {', '.join(self.header['splits'])}")
        sizes = self.header["splits"][split]
        if max_seq_length is not None and sizes["longest"] > max_seq_length:
            raise ValueError(
                f"{folder} has {split} examples of up to {sizes['longest']} tokens, --max_seq_length is "
                f"{max_seq_length}: raise it, or prepare the data again with --max_seq_length {max_seq_length}"
            )
        self._ids = self._map(folder / f"{split}.ids.bin", id_dtype(self.header["vocab_size"]), sizes["tokens"])
        self._scored = self._map(folder / f"{split}.scored.bin", "u1", sizes["tokens"])
        self._offsets = self._map(folder / f"{split}.offsets.bin", "<i8", sizes["examples"] + 1)
        self._per_item = PER_ITEM[kind]
        self._is_unpaired = kind == "unpaired"
        self.sha256: str = sizes["sha256"]
        self._check(folder / f"{split}.offsets.bin", sizes)
        self.lengths = np.diff(self._offsets[:: self._per_item])
        self.reference: Tensor | None = None

    def _check(self, file: Path, sizes: dict[str, Any]) -> None:
        """Make sure that the files hold what was written, as `dataset.json` has it."""
        lengths, tokens = np.diff(self._offsets), len(self._ids)
        sound = self._offsets[0] == 0 and self._offsets[-1] == tokens and (lengths > 0).all()
        if not sound or lengths.max() != sizes["longest"] or len(lengths) % self._per_item:
            raise ValueError(f"{file} or {DATASET_FILE} is damaged, the lengths differ: prepare the data set again")
        digest = hashlib.sha256()
        for start, end in itertools.pairwise(self._offsets.tolist()):
            digest.update(self._ids[start:end].data)
            digest.update(self._scored[start:end].data)
        if digest.hexdigest() != self.sha256:
            raise ValueError(
                f"{file.parent} is damaged: its tokens are not those that {DATASET_FILE} has the hash of; prepare the "
                "data set again"
            )

    @staticmethod
    def _map(file: Path, dtype: str, count: int) -> np.ndarray:
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file; prepare the data set again")
        expected = count * np.dtype(dtype).itemsize
        if file.stat().st_size != expected:
            raise ValueError(f"{file} has {file.stat().st_size} bytes, expected {expected}: prepare the data set again")
        return np.memmap(file, dtype=dtype, mode="r")

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> list[Example]:
        """The examples of an item: one, or chosen and rejected, or an answer and one to another prompt."""
        bounds = self._offsets[index * self._per_item : (index + 1) * self._per_item + 1]
        spans = [slice(*span) for span in itertools.pairwise(bounds)]
        return [Example(self._ids[span], self._scored[span] > 0) for span in spans]

    def is_wanted(self, index: int) -> bool:
        """Whether an item's answer is a good one, of unpaired answers."""
        start, end = self._offsets[index * self._per_item :][:2]
        return bool(self._scored[start:end].max() < 2)

    def batch(self, indices: Sequence[int], pack: bool = False) -> Batch:
        """The examples of some items in one batch."""
        reference = None if self.reference is None else self.reference[indices].flatten()
        batch = collate([example for index in indices for example in self[index]], pack)
        wanted = torch.tensor([self.is_wanted(index) for index in indices]) if self._is_unpaired else None
        return batch._replace(reference=reference, items=indices, wanted=wanted)

    def padding(self, micro_batches: Iterable[Sequence[int]]) -> float:
        """Share of positions that are padding where these micro batches are not packed."""
        tokens = positions = 0
        lengths = np.diff(self._offsets).reshape(len(self), self._per_item)
        for indices in micro_batches:
            chosen = lengths[indices]
            tokens += chosen.sum()
            positions += chosen.size * chosen.max()
        return float(1 - tokens / positions)

    def prompt(self, index: int) -> list[int]:
        """The token ids of an item before its first scored one."""
        ids, scored = self[index][0]
        return ids[: scored.argmax()].tolist()


def open_data(
    checkpoint_dir: Path, data_dir: Path, max_seq_length: int, kind: AnyKind = "supervised"
) -> tuple[Tokenizer, tuple[TokenDataset, TokenDataset]]:
    """What a run reads: the base model's tokenizer, and both splits of a data set.

    Args:
        checkpoint_dir: folder of the base model.
        data_dir: the data set.
        max_seq_length: longest example that is accepted, in tokens; the model's window may be shorter.
        kind: what an item must be.

    Raises:
        FileNotFoundError: something is missing.
        ValueError: something is damaged, or they do not belong together.
    """
    config, tokenizer = read_config(checkpoint_dir), Tokenizer(checkpoint_dir)
    tokenizer.check_vocabulary(config.vocab_size)
    window = min(max_seq_length, config.block_size)
    train, validation = (TokenDataset(data_dir, split, tokenizer, window, kind) for split in ("train", "validation"))
    return tokenizer, (train, validation)


_KINDS = {"supervised": "examples for supervised tuning", "pairs": "pairs of a chosen and a rejected response"}
_KINDS |= {"unpaired": "answers that are good or bad", "distillation": "a teacher's answers"}


def step_batches(
    dataset: TokenDataset, step: int, batch_size: int, micro_batch_size: int, seed: int
) -> list[list[int]]:
    """Which examples optimizer step `step` reads: a function of its arguments alone, so a run can resume anywhere.

    Each epoch is a new permutation, cut into steps of `batch_size`, the last of which may be smaller. Within a step
    items are sorted by length before they are cut into micro batches, so that padding is small.

    Args:
        dataset: what is read.
        step: optimizer step, counted from 0.
        batch_size: items per step.
        micro_batch_size: items per forward.
        seed: seed of the permutations.

    Returns:
        Micro batches of item indices.
    """
    epoch, place = divmod(step, steps_per_epoch(len(dataset), batch_size))
    order = np.random.default_rng([seed, epoch]).permutation(len(dataset))
    chosen = order[place * batch_size : (place + 1) * batch_size]
    return by_length(dataset, chosen, micro_batch_size)


def by_length(dataset: TokenDataset, indices: np.ndarray, micro_batch_size: int) -> list[list[int]]:
    """Cut items into micro batches of similar length."""
    ordered = indices[np.argsort(dataset.lengths[indices], kind="stable")]
    return [ordered[i : i + micro_batch_size].tolist() for i in range(0, len(ordered), micro_batch_size)]


def steps_per_epoch(items: int, batch_size: int) -> int:
    """Optimizer steps that read every item once."""
    return -(-items // batch_size)
