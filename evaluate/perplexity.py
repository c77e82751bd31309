"""How well does a base model, with and without an adapter, predict a text or a prepared data set?

    python evaluate/perplexity.py --text_path book.txt
    python evaluate/perplexity.py --text_path book.txt --adapter_path out/demo/aligner.safetensors
    python evaluate/perplexity.py --data_dir data/demo --adapter_path out/demo/aligner.safetensors

A text is read in windows that overlap, each token counted once, with half a window or more before it. Of a data set
the scored tokens count, those of the answers. An interval is the bootstrap's over windows or examples. Each of those is
kept in --out_dir as soon as it is there: the same command goes on where it was interrupted, and another adapter's finds
the base done.
"""

import hashlib
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from lit_llama.base import Base
from lit_llama.data import Example, TokenDataset, collate
from lit_llama.evaluation.answers import append_row, read_kept
from lit_llama.evaluation.statistics import bootstrap, in_words
from lit_llama.files import read_text
from lit_llama.losses import response_logprobs
from lit_llama.script.command_line import run
from lit_llama.script.evaluation import evaluated_model, refuse_style
from lit_llama.tables import markdown


class Piece(NamedTuple):
    """What a model makes of a window or an example.

    Args:
        logprob: log-probability of the scored tokens together, in nats.
        tokens: scored.
    """

    logprob: float
    tokens: int


def main(
    text_path: Path | None = None,
    data_dir: Path | None = None,
    split: Literal["train", "validation"] = "validation",
    window: int = 1024,
    out_dir: Path = Path("out/perplexity"),
    **options: Any,
) -> None:
    """Evaluate.

    Args:
        text_path: a text file.
        data_dir: or a prepared data set.
        split: split of the data set.
        window: longest context for a text, in tokens; the model's own may be shorter.
        out_dir: where log-probabilities are kept.
        options: those of the model, see `evaluated_model`.
    """
    if (text_path is None) == (data_dir is None):
        raise ValueError("give --text_path or --data_dir, one of them")
    if window < 2:
        raise ValueError(f"--window is {window}, it must be at least 2")
    refuse_style(options, "a text has no prompt, and a data set has its own")
    text = "" if text_path is None else read_text(text_path)
    base = evaluated_model(**options)
    window = min(window, base.model.config.block_size)
    if data_dir is None:
        ids = base.tokenizer.encode(text, bos=True)
        if len(ids) < 2:
            raise ValueError(f"{text_path} holds no text to predict")
        examples = list(windows(ids, window))
    else:
        dataset = TokenDataset(data_dir, split, base.tokenizer, sys.maxsize)
        examples = [example for i in range(len(dataset)) for example in dataset[i]]
    models = [base.with_adapter(None), *([] if base.adapter is None else [base])]
    found = [predict(model, examples, out_dir / "pieces.jsonl") for model in models]
    header = ["model", "tokens", "nats per token", "perplexity", "95% interval", *(["bits per byte"] if text else [])]
    rows = []
    tokens = [piece.tokens for piece in found[0]]
    for model, pieces in zip(models, found, strict=True):
        nats = [-piece.logprob for piece in pieces]
        mean, interval = sum(nats) / sum(tokens), bootstrap(nats, tokens)
        perplexities = None if interval is None else (math.exp(interval[0]), math.exp(interval[1]))
        name = f"{model.name}, {model.weights}"
        rows.append([name, f"{sum(tokens):,}", f"{mean:.4f}", f"{math.exp(mean):.2f}", in_words(perplexities, ".2f")])
        rows[-1] += [f"{sum(nats) / math.log(2) / len(text.encode()):.4f}"] if text else []
    print(markdown(header, rows))
    if base.adapter is not None:
        added = [without.logprob - with_it.logprob for without, with_it in zip(*found, strict=True)]
        interval = in_words(bootstrap(added, tokens), "+.4f")
        interval = f" (95% interval over the same pieces: {interval})" if interval else ""
        print(f"\nThe adapter changes the loss by {sum(added) / sum(tokens):+.4f} nats per token{interval}.")
    if len(examples) == 1:
        print(f"There is no interval, as all of it is one piece of {len(examples[0].ids)} tokens."
              + (" A smaller --window makes more." if text else ""), file=sys.stderr)  # fmt: skip


def windows(ids: list[int], window: int) -> Iterator[Example]:
    """Parts of a text that begin half a window apart; each scores what no earlier one did."""
    scored = 1  # nothing predicts the first token
    for begin in range(0, max(1, len(ids) - window // 2), window // 2):
        part = np.array(ids[begin : begin + window])
        yield Example(part, np.arange(begin, begin + len(part)) >= scored)
        scored = begin + len(part)


@torch.no_grad()
def predict(base: Base, examples: Sequence[Example], path: Path) -> list[Piece]:
    """The scored tokens of each example; what is kept at `path` for that model is not computed again."""
    kept = {row["identity"]: row["logprob"] for row in read_kept(path)}
    pieces = []
    for example in tqdm(examples, desc="pieces", leave=False):
        batch = collate([example])
        said = repr((base.identity, batch.ids.tolist(), batch.scored.tolist()))
        identity, tokens = hashlib.sha256(said.encode()).hexdigest()[:16], int(batch.scored.sum())
        if identity not in kept:
            kept[identity] = float(response_logprobs(base.model, base.adapter, batch.to(base.device)).sum())
            append_row(path, {"identity": identity, "model": base.name, "tokens": tokens, "logprob": kept[identity]})
        pieces.append(Piece(kept[identity], tokens))
    return pieces


if __name__ == "__main__":
    run(main)
