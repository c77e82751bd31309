"""One token for each row out of logits: the likeliest, or drawn at a temperature."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

GREEDY_BELOW = 1e-5  # temperatures below this divide differences of logits by so little that nothing is left to chance
BLOCK = 256  # weights that are drawn from together, before one of them is drawn
RANKED = 128  # likeliest tokens that are put in order first; most often these hold `top_p`


class Sampling(NamedTuple):
    """How the next token of a row is chosen.

    Args:
        temperature: 0, or less than `GREEDY_BELOW`, takes the likeliest; larger is more random.
        top_k: draw from the k likeliest tokens, and from those that are as likely as the last of them.
        top_p: draw from the likeliest tokens that hold this probability together (arXiv 1904.09751), at least one, and
            from those that are as likely as the last of them.
        generator: source of randomness, on the CPU, so that a row costs no launch on a GPU; None is torch's own.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    generator: torch.Generator | None = None


def sample(logits: Tensor, rows: Sequence[Sampling]) -> Tensor:
    """Choose a token for each row, all in one pass. What a row gets does not depend on the others.

    Args:
        logits: (B, V), finite.
        rows: how each is chosen. Those with a temperature draw two numbers from their generators.

    Returns:
        Token ids (B).
    """
    logits = logits.float()  # in bfloat16, a CPU takes several times as long
    drawn = [i for i, row in enumerate(rows) if row.temperature >= GREEDY_BELOW]
    if len(drawn) == len(rows):
        return _draw_tokens(logits, rows)
    tokens = logits.argmax(-1)
    if drawn:
        at = torch.tensor(drawn, device=logits.device)
        tokens[at] = _draw_tokens(logits[at], [rows[i] for i in drawn])
    return tokens


def _draw_tokens(logits: Tensor, rows: Sequence[Sampling]) -> Tensor:
    """A token (B) for each row, out of float32 logits (B, V)."""
    device, V = logits.device, logits.size(-1)
    temperatures = torch.tensor([min(row.temperature, 1e30) for row in rows], device=device)[:, None]  # (B, 1)
    weights = F.pad(logits, (0, -V % BLOCK), value=-torch.inf)  # (B, V and a few)
    weights = (weights - weights.amax(-1, keepdim=True)).div_(temperatures).exp_()  # the largest is 1, however cold
    top_ks = {i: row.top_k for i, row in enumerate(rows) if row.top_k is not None and row.top_k < V}
    top_ps = {i: row.top_p for i, row in enumerate(rows) if row.top_p < 1}
    for limits, least in ((top_ks, _least_of_top_k), (top_ps, _least_of_top_p)):
        if limits:
            at = torch.tensor(list(limits), device=device)
            values = torch.tensor(list(limits.values()), device=device)[:, None]
            floors = weights.new_zeros(len(rows), 1)
            floors[at] = least(weights if len(limits) == len(rows) else weights[at], values)
            weights.masked_fill_(weights < floors, 0)
    chances = torch.stack([torch.rand(2, generator=row.generator) for row in rows]).to(device)  # (B, 2)
    blocks = weights.unflatten(-1, (-1, BLOCK))  # (B, blocks, 256)
    block = _draw(blocks.sum(-1), chances[:, 0])  # a running sum over the whole vocabulary would take far longer
    return block * BLOCK + _draw(blocks[torch.arange(len(rows), device=device), block], chances[:, 1])


def _draw(weights: Tensor, chances: Tensor) -> Tensor:
    """Index (B) of the weight (B, n) in whose part of the sum a chance (B), from 0 to less than 1, falls."""
    ends = weights.cumsum(-1)
    return ((ends > chances[:, None] * ends[:, -1:]) & (weights > 0)).int().argmax(-1)


def _least_of_top_k(weights: Tensor, top_k: Tensor) -> Tensor:
    """The k-th largest (B, 1) of the weights (B, V)."""
    return weights.topk(int(top_k.max())).values.gather(1, top_k - 1)


def _least_of_top_p(weights: Tensor, top_p: Tensor, ranked: int = RANKED) -> Tensor:
    """The least (B, 1) of the largest weights (B, V) that hold the share `top_p` (B, 1) of the sum.

    Only the largest are put in order; where these do not hold enough, sixteen times as many.
    """
    sums = weights.unflatten(-1, (-1, BLOCK)).sum(-1).sum(-1, keepdim=True)  # (B, 1)
    largest = weights.topk(min(ranked, weights.size(-1))).values  # (B, ranked)
    place = (largest.cumsum(-1) < top_p * sums).sum(-1, keepdim=True)  # (B, 1)
    floors = largest.gather(1, place.clamp(max=largest.size(-1) - 1))
    if ranked < weights.size(-1):
        short = (place[:, 0] == ranked).nonzero()[:, 0]
        if short.numel():
            floors[short] = _least_of_top_p(weights[short], top_p[short], 16 * ranked)
    return floors


def check_sampling(max_new_tokens: int, sampling: Sampling) -> None:
    """Refuse options that are out of range.

    Raises:
        ValueError: one of them is; the message names it.
    """
    temperature, top_k, top_p, generator = sampling
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be a number from 0 on, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
    if generator is not None and generator.device.type != "cpu":
        raise ValueError(f"the generator must be on the CPU, found one on {generator.device}: use torch.Generator()")
