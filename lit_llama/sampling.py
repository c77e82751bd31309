"""One token out of logits: greedy, or drawn at a temperature, among the likeliest."""

import math

import torch
from torch import Tensor

GREEDY_BELOW = 1e-5  # temperatures below this divide differences of logits by so little that nothing is left to chance


def sample(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one token per row.

    Args:
        logits: (B, V).
        temperature: 0, or less than `GREEDY_BELOW`, takes the likeliest.
        top_k: keep the k likeliest.
        top_p: keep the likeliest that hold this probability together (arXiv 1904.09751), at least one.
        generator: source of randomness.

    Returns:
        Token ids (B,).
    """
    if temperature < GREEDY_BELOW:
        return logits.argmax(-1)
    logits = logits.float()
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature  # the largest stays finite, however cold
    if top_k is not None:
        least = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < least, -torch.inf)
    probabilities = logits.softmax(-1)
    if top_p < 1:
        ranked, order = probabilities.sort(descending=True)
        before = ranked.cumsum(-1) - ranked  # probability held by likelier tokens
        probabilities = probabilities.scatter(-1, order, ranked.masked_fill(before >= top_p, 0))
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


def check_sampling(max_new_tokens: int, temperature: float, top_k: int | None, top_p: float) -> None:
    """Refuse sampling options that are out of range.

    Raises:
        ValueError: one of them is; the message names it.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be a number from 0 on, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
