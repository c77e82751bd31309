"""Tokenised data sets on disk, and the batches made of them.

A data set is a folder: `dataset.json` says what it is, and each split is three raw little-endian arrays that are
memory-mapped, never unpickled:

    SPLIT.ids.bin      token ids of all examples, one after the other
    SPLIT.scored.bin   one byte per token: 1 if the loss scores it
    SPLIT.offsets.bin  int64, where each example begins, and the end
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from lit_llama.files import atomic_folder, read_json, write_json
from lit_llama.prompts import PromptStyle
from lit_llama.tokenizer import Tokenizer

FORMAT_VERSION = 1
DATASET_FILE = "dataset.json"
TooLong = Literal["truncate", "skip"]


class Example(NamedTuple):
    """One tokenised example.

    Args:
        ids: token ids (T).
        scored: bool (T), the tokens that the loss scores.
    """

    ids: np.ndarray
    scored: np.ndarray


class TextExample(NamedTuple):
    """One example before tokenisation."""

    instruction: str
    input: str
    response: str


def tokenize(tokenizer: Tokenizer, style: PromptStyle, examples: Sequence[TextExample]) -> list[Example]:
    """Tokenise examples for supervised tuning: the response and the token that ends it are scored.

    Prompt and response are tokenised apart and then joined, so that the mask is exact and generation, which
    tokenises the prompt alone, meets the tokens of training.
    """
    prompts = tokenizer.encode_batch([style.render(e.instruction, e.input) for e in examples], bos=style.bos)
    responses = tokenizer.encode_batch([e.response for e in examples])
    tokenized = []
    for prompt, response in zip(prompts, responses, strict=True):
        ids = np.array([*prompt, *response, style.end_id])
        tokenized.append(Example(ids, np.arange(len(ids)) >= len(prompt)))
    return tokenized


@dataclass
class SplitSummary:
    """What became of the examples of a split.

    Args:
        lengths: tokens in each example that was written.
        sha256: of the token ids and of which are scored.
        scored_tokens: tokens that the loss scores.
        truncated: examples cut at the window's end, and so without the token that ends the response.
        skipped: examples left out: too long, or with a prompt that fills the window alone.
    """

    lengths: list[int] = field(default_factory=list)
    sha256: str = ""
    scored_tokens: int = 0
    truncated: int = 0
    skipped: int = 0


def write_dataset(
    folder: Path,
    splits: Mapping[str, Sequence[TextExample]],
    tokenizer: Tokenizer,
    style: PromptStyle,
    max_seq_length: int,
    too_long: TooLong,
    source: str,
) -> dict[str, SplitSummary]:
    """Tokenise the splits of a data set and write them, all or nothing.

    Args:
        folder: the data set; must not exist yet.
        splits: examples by the split's name.
        tokenizer: the base model's.
        style: how prompts are made.
        max_seq_length: window in tokens.
        too_long: whether longer examples are truncated or skipped.
        source: where the text came from, recorded in `dataset.json`.

    Returns:
        What became of each split.

    Raises:
        ValueError: no example of a split is left, the folder exists, or the window is too small.
    """
    if max_seq_length < 2:
        raise ValueError(f"--max_seq_length is {max_seq_length}, it must be at least 2")
    summaries: dict[str, SplitSummary] = {}
    with atomic_folder(folder) as temporary:
        for split, texts in splits.items():
            summaries[split] = _write_split(temporary, split, texts, tokenizer, style, max_seq_length, too_long)
            if not summaries[split].lengths:
                raise ValueError(
                    f"{source}: no {split} example is left of {len(texts)} ({summaries[split].skipped} too long): "
                    "give more data or a larger --max_seq_length"
                )
        header = {
            "format_version": FORMAT_VERSION,
            "tokenizer": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "prompt_style": style.name,
            "max_seq_length": max_seq_length,
            "source": source,
            "splits": {
                split: {
                    "examples": len(summary.lengths),
                    "tokens": sum(summary.lengths),
                    "scored_tokens": summary.scored_tokens,
                    "longest": max(summary.lengths),
                    "sha256": summary.sha256,
                }
                for split, summary in summaries.items()
            },
        }
        write_json(temporary / DATASET_FILE, header)
    return summaries


def _write_split(
    folder: Path,
    split: str,
    texts: Sequence[TextExample],
    tokenizer: Tokenizer,
    style: PromptStyle,
    max_seq_length: int,
    too_long: TooLong,
) -> SplitSummary:
    summary = SplitSummary()
    digest = hashlib.sha256()
    id_dtype = _id_dtype(tokenizer.vocab_size)
    with (
        open(folder / f"{split}.ids.bin", "wb") as ids_file,
        open(folder / f"{split}.scored.bin", "wb") as scored_file,
        tqdm(total=len(texts), desc=f"tokenising {split}", unit="example", leave=False) as progress,
    ):
        for start in range(0, len(texts), 1000):
            for ids, scored in tokenize(tokenizer, style, texts[start : start + 1000]):
                progress.update()
                if len(ids) > max_seq_length:
                    ids, scored = ids[:max_seq_length], scored[:max_seq_length]
                    if too_long == "skip" or not scored.any():
                        summary.skipped += 1
                        continue
                    summary.truncated += 1
                for file, array in ((ids_file, ids.astype(id_dtype)), (scored_file, scored.astype(np.uint8))):
                    file.write(array.tobytes())
                    digest.update(array.tobytes())
                summary.lengths.append(len(ids))
                summary.scored_tokens += int(scored.sum())
    offsets = np.concatenate([[0], np.cumsum(summary.lengths)])
    (folder / f"{split}.offsets.bin").write_bytes(offsets.astype("<i8").tobytes())
    summary.sha256 = digest.hexdigest()
    return summary


def _id_dtype(vocab_size: int) -> str:
    return "<u2" if vocab_size <= 2**16 else "<u4"


class TokenDataset:
    """One split of a tokenised data set, memory-mapped.

    Args:
        folder: the data set.
        split: "train" or "validation".
        tokenizer: the tokenizer of the model that will read it.
        max_seq_length: longest example that is accepted, in tokens.

    Attributes:
        header: the content of `dataset.json`.
        lengths: tokens in each example.
        sha256: of the split's content.

    Raises:
        FileNotFoundError: there is no such data set or split.
        ValueError: it was made with another tokenizer, has a longer example, or is damaged.
    """

    def __init__(self, folder: Path, split: str, tokenizer: Tokenizer, max_seq_length: int | None = None) -> None:
        file = folder / DATASET_FILE
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file; expected a data set made by one of scripts/prepare_*.py")
        self.header: dict[str, Any] = read_json(file)
        if not isinstance(self.header, dict) or self.header.get("format_version") != FORMAT_VERSION:
            raise ValueError(f"{file} is not a data set of format version {FORMAT_VERSION}: prepare it again")
        if self.header["tokenizer"] != tokenizer.fingerprint:
            raise ValueError(f"{folder} was prepared with another tokenizer than the base model's: prepare it again")
        if split not in self.header["splits"]:
            raise FileNotFoundError(f"{folder} has no split named {split}; it has {', '.join(self.header['splits'])}")
        sizes = self.header["splits"][split]
        if max_seq_length is not None and sizes["longest"] > max_seq_length:
            raise ValueError(
                f"{folder} has {split} examples of up to {sizes['longest']} tokens, --max_seq_length is "
                f"{max_seq_length}: raise it, or prepare the data again with --max_seq_length {max_seq_length}"
            )
        self._ids = self._map(folder / f"{split}.ids.bin", _id_dtype(self.header["vocab_size"]), sizes["tokens"])
        self._scored = self._map(folder / f"{split}.scored.bin", "u1", sizes["tokens"])
        self._offsets = self._map(folder / f"{split}.offsets.bin", "<i8", sizes["examples"] + 1)
        self.lengths = np.diff(self._offsets)
        self.sha256: str = sizes["sha256"]

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

    def __getitem__(self, index: int) -> Example:
        at = slice(self._offsets[index], self._offsets[index + 1])
        return Example(self._ids[at], self._scored[at].astype(bool))

    def prompt(self, index: int) -> list[int]:
        """The token ids of an example before its first scored one."""
        ids, scored = self[index]
        return ids[: scored.argmax()].tolist()


class Batch(NamedTuple):
    """Examples padded on the right to the longest.

    Args:
        ids: token ids (B, T).
        scored: bool (B, T), tokens that the loss scores; never padding.
    """

    ids: Tensor
    scored: Tensor

    def to(self, device: torch.device) -> "Batch":
        return Batch(self.ids.to(device), self.scored.to(device))


def collate(examples: Sequence[Example]) -> Batch:
    """Pad examples to one batch. Attention is causal, so what stands in the padding reaches no scored token."""
    longest = max(len(example.ids) for example in examples)
    ids = torch.zeros(len(examples), longest, dtype=torch.long)
    scored = torch.zeros(len(examples), longest, dtype=torch.bool)
    for row, example in enumerate(examples):
        ids[row, : len(example.ids)] = torch.from_numpy(example.ids.astype(np.int64))
        scored[row, : len(example.ids)] = torch.from_numpy(example.scored)
    return Batch(ids, scored)


def step_batches(
    dataset: TokenDataset, step: int, batch_size: int, micro_batch_size: int, seed: int
) -> list[list[int]]:
    """Which examples optimizer step `step` reads: a function of its arguments alone, so a run can resume anywhere.

    Each epoch is a new permutation, cut into steps of `batch_size`, the last of which may be smaller. Within a step
    examples are sorted by length before they are cut into micro batches, so that padding is small.

    Args:
        dataset: what is read.
        step: optimizer step, counted from 0.
        batch_size: examples per step.
        micro_batch_size: examples per forward.
        seed: of the permutations.

    Returns:
        Micro batches of example indices.
    """
    epoch, place = divmod(step, steps_per_epoch(len(dataset), batch_size))
    order = np.random.default_rng([seed, epoch]).permutation(len(dataset))
    chosen = order[place * batch_size : (place + 1) * batch_size]
    return by_length(dataset, chosen, micro_batch_size)


def by_length(dataset: TokenDataset, indices: np.ndarray, micro_batch_size: int) -> list[list[int]]:
    """Cut examples into micro batches of similar length."""
    ordered = indices[np.argsort(dataset.lengths[indices], kind="stable")]
    return [ordered[i : i + micro_batch_size].tolist() for i in range(0, len(ordered), micro_batch_size)]


def steps_per_epoch(examples: int, batch_size: int) -> int:
    """Optimizer steps that read every example once."""
    return -(-examples // batch_size)
