"""Writing tokenised data sets: conversations in, the arrays that `lit_llama.data` reads out.

A data set is written whole or not at all, a thousand items at a time, so that memory does not grow with it.
"""

import contextlib
import hashlib
import itertools
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from lit_llama.data import (
    DATASET_FILE,
    FORMAT_VERSION,
    PER_ITEM,
    AnyKind,
    Conversation,
    Example,
    Item,
    TokenDataset,
    id_dtype,
    tokenize,
)
from lit_llama.files import atomic_folder, write_json
from lit_llama.prompts import PromptStyle, ScoredTurns
from lit_llama.tokenizer import Tokenizer

TooLong = Literal["truncate", "skip"]


@dataclass
class SplitSummary:
    """What became of the items of a split.

    Args:
        lengths: tokens in each example that was written.
        sha256: hash of the token ids and of which are scored.
        scored_tokens: tokens that the loss scores.
        truncated: items cut at the window's end, and so without the token that ends the response.
        skipped: items left out: too long, or with a prompt that fills the window alone.
        equal: pairs left out because chosen and rejected are the same tokens within the window.
        wanted: items whose answer is a good one, of unpaired answers.
        items: a hash of the text of each item that was written.
        answers: a hash of its answer, of a pair the chosen one.
    """

    lengths: list[int] = field(default_factory=list)
    sha256: str = ""
    scored_tokens: int = 0
    truncated: int = 0
    skipped: int = 0
    equal: int = 0
    wanted: int = 0
    items: "array[int]" = field(default_factory=lambda: array("q"))
    answers: "array[int]" = field(default_factory=lambda: array("q"))

    def header(self) -> dict[str, Any]:
        """What `dataset.json` says of the split."""
        return {
            "examples": len(self.lengths),
            "tokens": sum(self.lengths),
            "scored_tokens": self.scored_tokens,
            "longest": max(self.lengths),
            "sha256": self.sha256,
        }


def write_dataset(
    folder: Path,
    items: Iterable[tuple[str, Item]],
    tokenizer: Tokenizer,
    style: PromptStyle,
    max_seq_length: int,
    too_long: TooLong,
    source: str,
    *,
    kind: AnyKind = "supervised",
    scored_turns: ScoredTurns = "all",
    max_response_tokens: int | None = None,
    total: int | None = None,
    overwrite: bool = False,
) -> dict[str, SplitSummary]:
    """Tokenise a data set and write it, all or nothing, holding a thousand items in memory at a time.

    Args:
        folder: the data set.
        items: each with the name of its split, "train" or "validation".
        tokenizer: the base model's.
        style: how prompts are made.
        max_seq_length: window in tokens.
        too_long: whether longer examples are truncated or skipped.
        source: where the text came from, recorded in `dataset.json`.
        kind: items of one conversation ("supervised"), of a chosen and a rejected one ("pairs"), of any number whose
            answers say whether they are wanted ("unpaired"), or of the student's and the teacher's with the same answer
            ("distillation").
        scored_turns: which of a conversation's responses are scored, "all" or the "last".
        max_response_tokens: number of scored tokens after which an example is cut; None for no such cut.
        total: how many items there are, for the progress bar.
        overwrite: replace the data set in `folder` if there is one.

    Returns:
        What became of each split.

    Raises:
        ValueError: no example of a split is left, the folder exists, or the window is too small.
    """
    check_window(max_seq_length)
    items, per_item = _unpaired(items, source) if kind == "unpaired" else iter(items), PER_ITEM[kind]
    with atomic_folder(folder, overwrite, DATASET_FILE) as temporary, contextlib.ExitStack() as stack:
        writers = {
            split: stack.enter_context(_SplitWriter(temporary, split, tokenizer, max_seq_length, too_long, kind))
            for split in ("train", "validation")
        }
        progress = stack.enter_context(tqdm(total=total, desc="tokenising", unit="example", leave=False))
        while chunk := list(itertools.islice(items, 1000)):
            conversations = [conversation for _, item in chunk for conversation in item]
            examples = iter(tokenize(tokenizer, style, conversations, scored_turns))
            for split, item in chunk:
                assert len(item) == per_item, f"an item of {len(item)} conversations in a data set of {kind}"
                opened = [_opening(next(examples), max_response_tokens) for _ in item]
                if writers[split].write(opened, item[0][-1].wanted):
                    summary = writers[split].summary
                    own = item[:1] if kind == "unpaired" else item
                    summary.items.append(hash(tuple(map(tuple, own))))
                    summary.answers.append(hash(item[0][-1].content.strip()))
            progress.update(len(chunk))
        summaries = {split: writer.finish() for split, writer in writers.items()}
        _check_nothing_is_empty(summaries, source)
        header = {
            "format_version": FORMAT_VERSION,
            "kind": kind,
            "tokenizer": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "prompt_style": style.name,
            "prompt_fingerprint": style.fingerprint,
            "scored_turns": scored_turns,
            "max_seq_length": max_seq_length,
            "max_response_tokens": max_response_tokens,
            "source": source,
            "splits": {split: summary.header() for split, summary in summaries.items()},
        }
        write_json(temporary / DATASET_FILE, header)
    return summaries


def _unpaired(items: Iterable[tuple[str, Item]], source: str) -> Iterator[tuple[str, Item]]:
    """Each answer as an item of its own, with its prompt's conversation that ends in an answer to another prompt.

    Records of one prompt that follow each other are taken together, as one prompt with several answers. An answer to
    another prompt is one to the prompt before; for the first prompt of a split it is one to the last that differs.

    Raises:
        ValueError: a split has answers to a single prompt.
    """
    runs: dict[str, list[Item]] = {}  # of answers to one prompt, by split: the first one, and the last two

    def with_others(item: Item, others: Item) -> Iterator[Item]:
        for i, conversation in enumerate(item):
            yield [conversation, [*conversation[:-1], others[i % len(others)][-1]]]

    for split, item in items:
        known = runs.setdefault(split, [])
        if known and _prompt(known[-1]) == _prompt(item):
            known[-1] = [*known[-1], *item]
            continue
        if len(known) > 1:
            yield from ((split, one) for one in with_others(known[-1], known[-2]))
        runs[split] = [*known[:1], *known[1:][-1:], item]
    for split, known in runs.items():
        if len(known) == 1:
            raise ValueError(
                f"{source}: all {split} answers are to one prompt, and KTO compares each with an answer to another "
                "prompt: give answers to more prompts, or a larger --validation_share"
            )
        yield from ((split, one) for one in with_others(known[-1], known[-2]))
        last = known[-1] if _prompt(known[-1]) != _prompt(known[0]) else known[-2]
        yield from ((split, one) for one in with_others(known[0], last))


def _prompt(item: Item) -> Conversation:
    return item[0][:-1]


def _opening(example: Example, scored_tokens: int | None) -> Example:
    """An example up to the last of so many scored tokens."""
    scored = np.flatnonzero(example.scored)
    if scored_tokens is None or len(scored) <= scored_tokens:
        return example
    end = scored[scored_tokens - 1] + 1
    return Example(example.ids[:end], example.scored[:end])


def _check_nothing_is_empty(summaries: dict[str, SplitSummary], source: str) -> None:
    for split, summary in summaries.items():
        if not summary.lengths:
            equal = f", {summary.equal} pairs equal within the window" if summary.equal else ""
            raise ValueError(
                f"{source}: no {split} example is left ({summary.skipped} too long{equal}): "
                "give more data or a larger --max_seq_length"
            )


def check_window(max_seq_length: int) -> None:
    """Refuse a window that has no place for a prompt and a response.

    Raises:
        ValueError: it is too small.
    """
    if max_seq_length < 2:
        raise ValueError(f"--max_seq_length is {max_seq_length}, it must be at least 2")


class _SplitWriter:
    """The files of one split, as they are written."""

    def __init__(
        self, folder: Path, split: str, tokenizer: Tokenizer, max_seq_length: int, too_long: TooLong, kind: AnyKind
    ) -> None:
        self._offsets_path = folder / f"{split}.offsets.bin"
        self._files = [open(folder / f"{split}.{name}.bin", "wb") for name in ("ids", "scored")]  # noqa: SIM115
        self._dtypes = id_dtype(tokenizer.vocab_size), "u1"
        self._max_seq_length, self._too_long, self._kind = max_seq_length, too_long, kind
        self._digest = hashlib.sha256()
        self.summary = SplitSummary()

    def __enter__(self) -> "_SplitWriter":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files:
            file.close()

    def write(self, item: list[Example], wanted: bool) -> bool:
        """Add the examples of one item, whose answer is wanted or not, or leave it out; whether it was added."""
        window, was_cut = self._max_seq_length, False
        if any(len(example.ids) > window for example in item):
            item = [Example(ids[:window], scored[:window]) for ids, scored in item]
            if self._too_long == "skip" or not all(example.scored.any() for example in item):
                self.summary.skipped += 1
                return False
            was_cut = True
        if self._kind == "pairs" and np.array_equal(item[0].ids, item[1].ids):
            self.summary.equal += 1
            return False
        scored = [example.ids[example.scored] for example in item]
        if self._kind == "distillation" and not np.array_equal(scored[0], scored[1]):
            raise ValueError("the prompt style writes answers differently after the teacher's prompt: use another base")
        self.summary.truncated += was_cut
        for example in item:
            marks = example.scored * (1 if wanted else 2)
            for file, values, dtype in zip(self._files, (example.ids, marks), self._dtypes, strict=True):
                data = values.astype(dtype).tobytes()
                file.write(data)
                self._digest.update(data)
            self.summary.lengths.append(len(example.ids))
            self.summary.scored_tokens += int(example.scored.sum())
        self.summary.wanted += wanted
        return True

    def finish(self) -> SplitSummary:
        """Close the files and say what is in them."""
        self.__exit__()
        offsets = np.concatenate([[0], np.cumsum(self.summary.lengths)])
        self._offsets_path.write_bytes(offsets.astype("<i8").tobytes())
        self.summary.sha256 = self._digest.hexdigest()
        return self.summary


def hold_out(dataset: TokenDataset, tokenizer: Tokenizer, folder: Path, share: float, seed: int = 1337) -> None:
    """Write a data set made of a training split alone, for choices that the validation split must not see.

    Args:
        dataset: whose items are used.
        tokenizer: the one it was made with.
        folder: the new data set; must not exist yet.
        share: share of the items that becomes the new validation split, drawn at random.
        seed: seed of the draw.

    Raises:
        ValueError: there is too little data.
    """
    count = round(share * len(dataset))
    if not 0 < count < len(dataset):
        raise ValueError(f"{share:.0%} of {len(dataset)} items cannot be held out: give more data")
    order = np.random.default_rng(seed).permutation(len(dataset))
    window = dataset.header["max_seq_length"]
    with atomic_folder(folder) as temporary:
        splits = {}
        for split, indices in (("train", order[count:]), ("validation", order[:count])):
            with _SplitWriter(temporary, split, tokenizer, window, "truncate", dataset.header["kind"]) as writer:
                for index in indices:
                    writer.write(dataset[index], dataset.is_wanted(index))
                splits[split] = writer.finish().header()
        source = f"training split of {dataset.header['source']}"
        write_json(temporary / DATASET_FILE, {**dataset.header, "source": source, "splits": splits})
