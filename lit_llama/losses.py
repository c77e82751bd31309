"""What training minimises and validation measures. Always in float32, also where the model computes in fewer bits.

A loss returns sums over a micro batch and how many things they are sums over, because micro batches differ in that and
the mean is over all of an optimizer step, or of a data set.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_llama.combine import OnPrompt
from lit_llama.data import Batch
from lit_llama.model import LLaMA
from lit_llama.seam import Adapter

# What a loss measures, and the label of its axis in a picture.
SUPERVISED_METRICS = {"loss": "cross-entropy per scored token (nats)"}
DISTILLATION_METRICS = {
    "loss": "divergence per scored token (nats)",
    "agreement": "share of tokens on which both agree",
}


class LossSums(NamedTuple):
    """What a loss adds up over a micro batch.

    Args:
        metrics: scalars by name; "loss" is the one that is minimised. Where not all things count for a metric, it is
            a tensor (2) of its sum and of how many things that is over.
        count: number of things that the scalars are sums over: scored tokens, or pairs.
    """

    metrics: dict[str, Tensor]
    count: Tensor


def supervised_loss(model: LLaMA, adapter: Adapter | None, batch: Batch) -> LossSums:
    """Cross-entropy of the scored tokens.

    Args:
        model: the base model.
        adapter: what is tuned, if anything.
        batch: examples, padded or packed.

    Returns:
        "loss" over scored tokens.
    """
    return LossSums({"loss": -_scored_logprobs(model, adapter, batch).sum()}, batch.scored.sum())


def response_logprobs(model: LLaMA, adapter: Adapter | None, batch: Batch) -> Tensor:
    """Log-probability of each example's scored tokens together.

    Args:
        model: the base model.
        adapter: what is added to it, if anything.
        batch: examples, padded or packed.

    Returns:
        (E,) float32, E being the number of examples.
    """
    tokens = _scored_logprobs(model, adapter, batch)
    return torch.stack([part.sum() for part in tokens.split(batch.scored_lengths().tolist())])


def _scored_logprobs(model: LLaMA, adapter: Adapter | None, batch: Batch) -> Tensor:
    """Log-probability of each scored token, float32 (n); logits are computed for those alone."""
    return token_logprobs(model, scored_hidden_states(model, adapter, batch), batch.ids[batch.scored])


def scored_hidden_states(model: LLaMA, adapter: Adapter | None, batch: Batch, prompt: Tensor | None = None) -> Tensor:
    """Hidden states (n, C) at the positions whose next tokens are scored.

    Args:
        model: the base model.
        adapter: what is added to it, if anything.
        batch: examples, padded or packed; of a compiled model, padded to its lengths.
        prompt: bool (B, T), the positions of the prompt; if None, those before an example's first scored token.
    """
    batch = batch.padded(model.length_multiple)
    if adapter is not None:
        adapter = OnPrompt(adapter, batch.prompt() if prompt is None else prompt)
    return model.hidden_states(batch.ids, adapter, at=batch.predicts_scored(), lengths=batch.lengths)


def text_divergence(model: LLaMA, before: Adapter | None, after: Adapter | None, text: Batch) -> Tensor:
    """Divergence of what a model says of plain text with an adapter from what it says without.

    Text has no prompt. So what acts on a prompt alone acts on the first half of each piece, and what is left of it in
    the second half is a part of the divergence.

    Args:
        model: the base model.
        before: what is added to it without the adapter, if anything; gets no gradient.
        after: what is added to it with the adapter.
        text: pieces of text, all of whose tokens are scored.

    Returns:
        KL(before || after) at each scored token (n), float32, in nats.
    """
    text = text.padded(model.length_multiple)
    at = torch.arange(text.ids.size(1), device=text.ids.device)
    half = at < text.per_position(text.scored_lengths() // 2 + 1)  # (B, T)
    with torch.no_grad():
        wanted = scored_hidden_states(model, before, text, half)
    return divergence(model, wanted, scored_hidden_states(model, after, text, half))


def token_logprobs(model: LLaMA, hidden: Tensor, tokens: Tensor) -> Tensor:
    """Log-probability of a token at each position.

    The logits of a few positions at a time are all that is ever kept, here and in the backward pass.

    Args:
        model: the base model.
        hidden: its hidden states (n, C) at n positions, see `LLaMA.hidden_states`.
        tokens: ids of the tokens that follow (n).

    Returns:
        (n) float32, in nats.
    """

    def score(hidden: Tensor, tokens: Tensor) -> Tensor:
        return -F.cross_entropy(model.head(hidden).float(), tokens, reduction="none")

    return model.scores(score, hidden, tokens)


def divergence(model: LLaMA, teacher: Tensor, student: Tensor) -> Tensor:
    """Kullback-Leibler divergence KL(teacher || student) of the next token's distributions at each position.

    The logits of a few positions at a time are all that is ever kept, here and in the backward pass.

    Args:
        model: the base model, whose head both share.
        teacher: hidden states (n, C) that the distributions to be learned are made of; they get no gradient.
        student: hidden states (n, C) at the same positions.

    Returns:
        (n) float32, in nats.
    """

    def score(student: Tensor, teacher: Tensor) -> Tensor:
        wanted, found = (model.head(hidden).float().log_softmax(-1) for hidden in (teacher, student))  # (k, V)
        return F.kl_div(found, wanted, reduction="none", log_target=True).sum(-1)

    return model.scores(score, student, teacher)


def distillation_loss(
    model: LLaMA, student: Adapter | None, teacher: Adapter | None, for_student: Batch, for_teacher: Batch
) -> LossSums:
    """Divergence KL(teacher || student) of the distributions of the scored tokens (arXiv 1503.02531).

    Args:
        model: the base model of both.
        student: what is tuned.
        teacher: what is added to the base model for the teacher, if anything; gets no gradient.
        for_student: examples as the student reads them.
        for_teacher: examples with the same scored tokens, as the teacher reads them.

    Returns:
        "loss" over scored tokens; and in validation "agreement", the tokens that both find likeliest.
    """
    with torch.no_grad():
        wanted = scored_hidden_states(model, teacher, for_teacher)
    found = scored_hidden_states(model, student, for_student)
    metrics = {"loss": divergence(model, wanted, found).sum()}
    if not torch.is_grad_enabled():  # in training it would cost two more products with the head

        def agree(found: Tensor, wanted: Tensor) -> Tensor:
            return (model.head(found).argmax(-1) == model.head(wanted).argmax(-1)).float()

        metrics["agreement"] = model.scores(agree, found, wanted).sum()
    return LossSums(metrics, for_student.scored.sum())
