"""One token for each row out of logits: the likeliest, or drawn at a temperature."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

GREEDY_BELOW = 1e-5  # temperatures below this divide differences of logits by so little that nothing is left to chance
BLOCK = 256  # weights that are drawn from together, before one of them is drawn


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
        rows: how each is chosen. Those with a temperature draw numbers from their generators.

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
    if V % BLOCK:
        logits = F.pad(logits, (0, -V % BLOCK), value=-torch.inf)  # (B, V and a few)
    weights = (logits - logits.amax(-1, keepdim=True)).div_(temperatures).exp_()  # the largest is 1, however cold
    top_ks = {i: row.top_k for i, row in enumerate(rows) if row.top_k is not None and row.top_k < V}
    if top_ks:
        at, k = torch.tensor(list(top_ks), device=device), torch.tensor(list(top_ks.values()), device=device)[:, None]
        some = weights if len(top_ks) == len(rows) else weights[at]
        floors = weights.new_zeros(len(rows), 1)
        floors[at] = some.topk(max(top_ks.values())).values.gather(1, k - 1)
        weights.masked_fill_(weights < floors, 0)
    tokens = _draw(weights, rows)
    top_ps = {i: row.top_p for i, row in enumerate(rows) if row.top_p < 1}
    if top_ps:
        at = torch.tensor(list(top_ps), device=device)
        some = weights if len(top_ps) == len(rows) else weights[at]
        shares = torch.tensor(list(top_ps.values()), device=device) * _sums(some)
        tokens[at] = _within_shares(shares, some, tokens[at], [rows[i] for i in top_ps])
    return tokens


def _within_shares(shares: Tensor, weights: Tensor, tokens: Tensor, rows: Sequence[Sampling]) -> Tensor:
    """Tokens (n) that are among the likeliest of their rows, drawn again where they are not.

    Nothing is put in order. A token is among the likeliest that hold a share if those likelier than it hold less. If
    it is not, none of those less likely is either, and the next one is drawn from the likelier ones. What is accepted
    in the end is distributed as if drawn from the likeliest alone: FlashInfer's rejection sampling, see
    https://flashinfer.ai/2025/03/10/sampling.html.

    Args:
        shares: sums (n) of weights that the likeliest hold at least.
        weights: (n, V).
        tokens: tokens (n) drawn from them.
        rows: the rows' generators.
    """
    likelier = weights.where(weights > weights.gather(1, tokens[:, None]), 0)  # (n, V)
    outside = (_sums(likelier) >= shares).nonzero()[:, 0].tolist()
    if outside:
        again, rows = torch.tensor(outside, device=weights.device), [rows[i] for i in outside]
        likelier = likelier[again]
        tokens[again] = _within_shares(shares[again], likelier, _draw(likelier, rows), rows)
    return tokens


def _draw(weights: Tensor, rows: Sequence[Sampling]) -> Tensor:
    """A token (B) for each row of weights (B, V): first a block, then one of the block.

    A running sum over the whole vocabulary would take far longer.
    """
    chances = torch.stack([torch.rand(2, generator=row.generator) for row in rows]).to(weights.device)  # (B, 2)
    blocks = weights.unflatten(-1, (-1, BLOCK))  # (B, blocks, 256)
    block = _place(blocks.sum(-1), chances[:, :1])
    return block * BLOCK + _place(blocks[torch.arange(len(rows), device=weights.device), block], chances[:, 1:])


def _place(weights: Tensor, chances: Tensor) -> Tensor:
    """Index (B) of the weight (B, n) in whose part of the sum a chance (B, 1), from 0 to less than 1, falls."""
    ends = weights.cumsum(-1)
    return ((ends > chances * ends[:, -1:]) & (weights > 0)).int().argmax(-1)


def _sums(weights: Tensor) -> Tensor:
    """Sums (B) of weights (B, V), by blocks, so that rounding does not depend on the number of rows."""
    return weights.unflatten(-1, (-1, BLOCK)).sum(-1).sum(-1)


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
