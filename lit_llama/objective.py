"""What is minimised around a loss: frozen adapters that always take part, a scale for each example, text that is kept.

With an adapter at scale 0 a model is what it was, and at scale 1 it has the form of the examples. Nothing in ordinary
training says what lies between, so the form appears all at once. Here each example may draw its own scale s, and the
target at each of its scored positions is the mixture

    (1 - c) p_before + c p_form,    c = s, but 0 below 0 and 1 above 1

of what the model says without the adapter and of what the example says. The cross-entropy with a mixture is the mixture
of cross-entropies, so that no third forward is needed, and it has one minimum for each s:

    c (-log p_s(token)) + (1 - c) KL(p_before || p_s)

A form that is learned from a few hundred examples also makes all other text less likely. So each example may bring a
piece of plain text, on which the divergence KL(p_before || p_s) from the model without the adapter is added to the
loss. Both need one base in memory: p_before is computed in the same step and not stored.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lit_llama.combine import PerPosition, WeightedSum
from lit_llama.data import Batch, Example, collate
from lit_llama.files import read_text
from lit_llama.losses import (
    SUPERVISED_METRICS,
    LossSums,
    divergence,
    scored_hidden_states,
    supervised_loss,
    text_divergence,
    token_logprobs,
)
from lit_llama.model import LLaMA
from lit_llama.records import read_records
from lit_llama.seam import Adapter
from lit_llama.tokenizer import Tokenizer

KEPT_TOKENS = 128  # of a piece of plain text, at most
KEPT_METRICS = {"kept": "divergence on kept text (nats per token)"}


@dataclass(frozen=True)
class KeptText:
    """Plain text on which an adapter is to change nothing, in pieces.

    Args:
        pieces: those that training reads, each with all tokens scored.
        held_out: those that validation reads.
        weight: what their divergence is multiplied by in the loss.
    """

    pieces: Sequence[Example]
    held_out: Sequence[Example]
    weight: float

    @property
    def fingerprint(self) -> str:
        """Hash of the pieces."""
        digest = hashlib.sha256()
        for piece in (*self.pieces, *self.held_out):
            digest.update(len(piece.ids).to_bytes(8, "little") + piece.ids.astype("<u4").tobytes())
        return digest.hexdigest()


def read_kept_text(path: Path, tokenizer: Tokenizer, weight: float) -> KeptText:
    """Read plain text and cut it into pieces, of which each tenth is held out if there are as many.

    Args:
        path: a text file (`.txt`, `.md`), or records with a "text" each, see `lit_llama.records`.
        tokenizer: tokenizer of the base.
        weight: what the divergence is multiplied by in the loss.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a record has no text, or there is none at all.
    """
    texts = [read_text(path)] if path.suffix in (".txt", ".md") else []
    for place, record in read_records(path) if not texts else ():
        text = record.get("text")
        if not isinstance(text, str):
            raise ValueError(f'{place}: expected a record with a "text", found {", ".join(record)[:80] or "nothing"}')
        texts.append(text)
    encoded = tokenizer.encode_batch(texts, bos=True)
    parts = [part for ids in encoded for part in np.array_split(np.array(ids), -(-len(ids) // KEPT_TOKENS) or 1)]
    pieces = [Example(ids, np.ones(len(ids), dtype=bool)) for ids in parts if len(ids) > 1]
    if not pieces:
        raise ValueError(f"{path} holds no text to keep")
    held_out = pieces[9::10]
    return KeptText([piece for i, piece in enumerate(pieces) if i % 10 != 9], held_out or pieces, weight)


@dataclass(frozen=True)
class Objective:
    """What is minimised, around a loss.

    Args:
        model: the base model.
        seed: seed of the scales and of the pieces of text that examples draw.
        frozen: adapters that take part in every forward and are not trained, each with its scale.
        scale_range: what the examples of a training step draw their scales from, evenly; if None, all have scale 1.
        kept: text on which the model is to stay what it is without the adapter.
    """

    model: LLaMA
    seed: int = 0
    frozen: Sequence[tuple[Adapter, float]] = ()
    scale_range: tuple[float, float] | None = None
    kept: KeptText | None = None

    @property
    def before(self) -> Adapter | None:
        """What is added to the base without the adapter that is trained."""
        return WeightedSum(*self.frozen) if self.frozen else None

    def together(self, adapter: Adapter | None) -> Adapter | None:
        """An adapter with the frozen ones: what is trained, and what is to be used."""
        if adapter is None or not self.frozen:
            return adapter or self.before
        return WeightedSum(*self.frozen, (adapter, 1.0))

    def measured(self, names: Mapping[str, str] = SUPERVISED_METRICS) -> dict[str, str]:
        """What is measured, if a loss alone measures `names`, with the labels of the picture's axes."""
        return {**names, **(KEPT_METRICS if self.kept else {})}

    def supervised(self, adapter: Adapter, batch: Batch) -> LossSums:
        """Cross-entropy of the scored tokens, or of the target that each example's scale asks for, and the kept text.

        Args:
            adapter: what is trained.
            batch: examples of a training step, or of a validation, where the scale is 1 and the kept text is measured
                without being added to the loss.

        Returns:
            "loss" over scored tokens, and "kept", the divergence on the kept text.
        """
        if self.scale_range is None or batch.step is None:
            sums = supervised_loss(self.model, self.together(adapter), batch)
        else:
            sums = self._dialled(adapter, batch, self._scales(batch))
        return self.keep(sums, adapter, batch)

    def keep(self, sums: LossSums, adapter: Adapter, batch: Batch, per_item: bool = False) -> LossSums:
        """Add the kept text to a loss: each example brings a piece, at its own scale.

        A piece counts as much as its example does in `sums`, so that the mean over a step does not depend on how it is
        cut into micro batches.

        Args:
            sums: those of the loss.
            adapter: what is trained.
            batch: the examples.
            per_item: whether the loss counts items, such as pairs, and not scored tokens.
        """
        if self.kept is None:
            return sums
        numbers = self._draws(batch)[:, 1].tolist()
        if batch.step is None:
            drawn = [self.kept.held_out[int(number * len(self.kept.held_out))] for number in numbers]
        else:
            drawn = [self.kept.pieces[int(number * len(self.kept.pieces))] for number in numbers]
        text = collate(drawn).padded(self.model.length_multiple).to(self.model.device)
        if self.scale_range is not None and batch.step is not None:
            adapter = PerPosition(adapter, text.per_position(self._scales(batch)))
        nats = text_divergence(self.model, self.before, self.together(adapter), text)  # (n)
        means = torch.stack([part.mean() for part in nats.split(text.scored_lengths().tolist())])  # (E)
        weights = batch.scored_lengths()
        if per_item:
            counted = weights.view(len(batch.items), -1)  # (items, examples of each)
            weights = (counted.sum(1, keepdim=True) > 0).expand(counted.shape).flatten() / counted.size(1)
        kept = (weights * means).sum()
        loss = sums.metrics["loss"] + (0 if batch.step is None else self.kept.weight) * kept
        return LossSums({**sums.metrics, "loss": loss, "kept": kept}, sums.count)

    def _dialled(self, adapter: Adapter, batch: Batch, scales: Tensor) -> LossSums:
        """The cross-entropy with the mixture of what was said before and what the examples say."""
        batch = batch.padded(self.model.length_multiple)
        scaled = PerPosition(adapter, batch.per_position(scales))
        with torch.no_grad():
            before = scored_hidden_states(self.model, self.before, batch)
        after = scored_hidden_states(self.model, self.together(scaled), batch)
        share = batch.per_position(scales.clamp(0, 1))[batch.scored]  # (n)
        form = -token_logprobs(self.model, after, batch.ids[batch.scored])
        loss = share * form + (1 - share) * divergence(self.model, before, after)
        return LossSums({"loss": loss.sum()}, batch.scored.sum())

    def _scales(self, batch: Batch) -> Tensor:
        """The scale of each example, (E)."""
        assert self.scale_range is not None
        low, high = self.scale_range
        drawn = torch.from_numpy(low + (high - low) * self._draws(batch)[:, 0])
        return drawn.to(self.model.device, torch.float32)

    def _draws(self, batch: Batch) -> np.ndarray:
        """Numbers from 0 to 1 for each example, (E, 2): of its scale and of its text.

        They come from seed, step and the item's place in its data set alone, so that a run that is resumed, or cut
        differently into micro batches and devices, draws the same.
        """
        step = [] if batch.step is None else [1 + batch.step]
        drawn = np.stack([np.random.default_rng([self.seed, *step, item]).random(2) for item in batch.items])
        examples = batch.ids.size(0) if batch.lengths is None else len(batch.lengths)
        return drawn.repeat(examples // len(batch.items), axis=0)
