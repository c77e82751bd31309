"""How well does a base model, with and without an adapter, predict a text or a prepared data set?

    python evaluate/perplexity.py --text_path book.txt
    python evaluate/perplexity.py --text_path book.txt --adapter_path out/demo/aligner.safetensors
    python evaluate/perplexity.py --data_dir data/demo --adapter_path out/demo/aligner.safetensors

A text is read in windows that overlap, each token counted once, with half a window or more before it. Of a data set
the scored tokens count, those of the answers. An interval is the bootstrap's over windows or examples.
"""

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from lit_llama.checkpoint import Precision
from lit_llama.cli import open_with_adapters, run
from lit_llama.data import TokenDataset, collate
from lit_llama.files import read_text
from lit_llama.inference import WeightOnly
from lit_llama.losses import response_logprobs
from lit_llama.model import Adapter, LLaMA
from lit_llama.quantization import Quantize


class Piece(NamedTuple):
    """What is predicted at once.

    Args:
        logprob: of the counted tokens together, in nats.
        tokens: counted.
    """

    logprob: float
    tokens: int


def main(
    checkpoint_dir: Path = Path("checkpoints/SmolLM2-135M-Instruct"),
    adapter_path: list[Path] | None = None,
    adapter_scale: list[float] | None = None,
    text_path: Path | None = None,
    data_dir: Path | None = None,
    split: Literal["train", "validation"] = "validation",
    window: int = 1024,
    precision: Precision = "auto",
    quantize: Quantize | WeightOnly | None = None,
    allow_other_base: bool = False,
) -> None:
    """Evaluate.

    Args:
        checkpoint_dir: folder of the base model.
        adapter_path: an adapter of any method; may be given several times, to be added up.
        adapter_scale: what it is multiplied by; may be given once for each.
        text_path: a text file.
        data_dir: or a prepared data set.
        split: of the data set.
        window: longest context for a text, in tokens; the model's own may be shorter.
        precision: "auto" is bf16-true on a GPU that has it and 32-true elsewhere.
        quantize: keep the weights in fewer bits.
        allow_other_base: use the adapter on other weights than those it was trained on.
    """
    if (text_path is None) == (data_dir is None):
        raise ValueError("give --text_path or --data_dir, one of them")
    if window < 2:
        raise ValueError(f"--window is {window}, it must be at least 2")
    text = "" if text_path is None else read_text(text_path)
    base = open_with_adapters(checkpoint_dir, adapter_path, adapter_scale, precision, quantize, allow_other_base)
    window = min(window, base.model.config.block_size)
    if data_dir is None:
        ids = base.tokenizer.encode(text, bos=True)
        if len(ids) < 2:
            raise ValueError(f"{text_path} holds no text to predict")
    else:
        dataset = TokenDataset(data_dir, split, base.tokenizer, sys.maxsize)
    print("| model | tokens | nats per token | perplexity | 95% interval |" + (" bits per byte |" if text else ""))
    print("|---|---:|---:|---:|---|" + ("---:|" if text else ""))
    models: list[tuple[str, Adapter | None]] = [(base.name.split(" + ")[0], None)]
    if base.adapter is not None:
        models.append(("+ " + base.name.partition(" + ")[2], base.adapter))
    for name, adapter in models:
        pieces = predict_text(base.model, adapter, ids, window) if text else predict_data(base.model, adapter, dataset)
        found = list(pieces)
        tokens, nats = sum(piece.tokens for piece in found), -sum(piece.logprob for piece in found)
        low, high = interval(found)
        line = (
            f"| {name} | {tokens:,} | {nats / tokens:.4f} | {math.exp(nats / tokens):.2f} | {low:.2f} to {high:.2f} |"
        )
        print(line + (f" {nats / math.log(2) / len(text.encode()):.4f} |" if text else ""), flush=True)


@torch.no_grad()
def predict_text(model: LLaMA, adapter: Adapter | None, ids: list[int], window: int) -> Iterator[Piece]:
    """Every token but the first, once, in windows that begin half a window apart."""
    counted = 1  # tokens that need no more prediction
    for begin in tqdm(range(0, max(1, len(ids) - window // 2), window // 2), desc="windows", leave=False):
        part = torch.tensor(ids[begin : begin + window], device=model.device)
        at = torch.arange(begin + 1, begin + len(part), device=model.device) >= counted
        chosen = torch.cat([at, at.new_zeros(1)])[None]  # (1, T): position t predicts token t + 1
        logits = model(part[None], adapter, logits_at=chosen).float()
        logprobs = -torch.nn.functional.cross_entropy(logits, part[1:][at], reduction="none")
        counted = begin + len(part)
        yield Piece(float(logprobs.sum()), len(logprobs))


@torch.no_grad()
def predict_data(model: LLaMA, adapter: Adapter | None, dataset: TokenDataset) -> Iterator[Piece]:
    """The scored tokens of each example."""
    for i in tqdm(np.argsort(-dataset.lengths).tolist(), desc="examples", leave=False):
        batch = collate(dataset[i]).to(model.device)
        yield Piece(float(response_logprobs(model, adapter, batch).sum()), int(batch.scored.sum()))


def interval(pieces: list[Piece], resamples: int = 2000, seed: int = 1337) -> tuple[float, float]:
    """The 95% bootstrap interval of the perplexity over pieces."""
    logprobs, tokens = np.array(pieces).T
    draws = np.random.default_rng(seed).integers(len(pieces), size=(resamples, len(pieces)))
    low, high = np.percentile(np.exp(-logprobs[draws].sum(1) / tokens[draws].sum(1)), [2.5, 97.5])
    return float(low), float(high)


if __name__ == "__main__":
    run(main)
