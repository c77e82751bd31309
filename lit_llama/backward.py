"""Computations that keep little for the backward pass, each with its own rule for the gradient.

Autograd keeps what every single operation read. The functions here keep what cannot be had again cheaply.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

QUERIES_AT_ONCE = 64  # in attention on a CPU: their weights for all keys stay in its caches
SHORTEST = 32  # sequence for which that is faster than torch's kernel


def scores_in_pieces(score: Callable[..., Tensor], piece: int, hidden: Tensor, *others: Tensor) -> Tensor:
    """A number for each row, worked out for a few rows at a time.

    What a piece needs, such as its logits, is dropped before the next piece begins. That works because a row's score
    depends on this row alone: its gradient (C) is found with the score, and multiplied in the backward pass by what
    comes from above. Nothing is computed twice.

    Args:
        score: takes rows (k, C) of `hidden`, and the same rows of each of `others`; returns (k).
        piece: number of rows at a time.
        hidden: (n, C), gets a gradient.
        others: (n, ...) each, get none.

    Returns:
        (n).
    """
    if torch.is_grad_enabled() and hidden.requires_grad:
        return _ScoresInPieces.apply(score, piece, hidden, *others)  # type: ignore[return-value]
    parts = zip(*(tensor.split(piece) for tensor in (hidden, *others)), strict=True)
    return torch.cat([score(*part) for part in parts])


class _ScoresInPieces(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, score: Callable[..., Tensor], piece: int, hidden: Tensor, *others: Tensor) -> Tensor:
        scores, slopes = [], []
        for rows, *more in zip(*(tensor.split(piece) for tensor in (hidden, *others)), strict=True):
            with torch.enable_grad():
                leaf = rows.detach().requires_grad_()
                values = score(leaf, *more)
                slopes += torch.autograd.grad(values.sum(), leaf)  # (k, C)
            scores.append(values.detach())
        ctx.save_for_backward(torch.cat(slopes))
        return torch.cat(scores)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        (slopes,) = ctx.saved_tensors
        none = [None] * (len(ctx.needs_input_grad) - 3)
        return None, None, (grad[:, None] * slopes).to(slopes.dtype), *none


def keeps_for_backward(x: Tensor) -> bool:
    """Whether autograd would keep something of a computation with `x`. A compiler decides itself what it keeps."""
    return torch.is_grad_enabled() and x.requires_grad and not torch.compiler.is_compiling()


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """SiLU of `gate` times `up` (arXiv 2002.05202), of which these two are kept."""
    return _SwiGLU.apply(gate, up) if keeps_for_backward(gate) else F.silu(gate) * up  # type: ignore[return-value]


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


def rms_norm(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Root mean square normalisation over the last dimension (arXiv 1910.07467), computed in float32.

    Args:
        x: (..., C); it alone is kept.
        scale: (C), what is normalised is multiplied by it; gets no gradient.
        eps: added to the mean square.
    """
    if x.device.type == "cpu" and keeps_for_backward(x):  # elsewhere torch has a kernel that keeps as little
        return _RMSNorm.apply(x, scale, eps)  # type: ignore[return-value]
    return scale * F.rms_norm(x, x.shape[-1:], eps=eps)


class _RMSNorm(torch.autograd.Function):
    """With r = 1 / sqrt(mean(x^2) + eps) and g the gradient times `scale`: dx = r (g - r^2 mean(g x) x)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.eps = eps
        return scale * F.rms_norm(x, x.shape[-1:], eps=eps)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        saved, scale = ctx.saved_tensors
        x, g = saved.float(), (grad * scale).float()
        r = (torch.linalg.vecdot(x, x)[..., None] / x.size(-1) + ctx.eps).rsqrt()
        along = r * r * torch.linalg.vecdot(g, x)[..., None] / x.size(-1)
        return g.addcmul_(x, along, value=-1).mul_(r).type_as(saved), None, None


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention, of which queries, keys and values alone are kept.

    On a CPU in bfloat16, torch's own kernel takes three times as long in the backward pass. Here products of matrices
    do the work, for some queries at a time, and the query heads that share keys and values are rows of one matrix.

    Args:
        q: (B, nh, T, hs).
        k: (B, nkv, T, hs).
        v: (B, nkv, T, hs).

    Returns:
        (B, nh, T, hs).
    """
    if keeps_for_backward(v):
        v = v.contiguous()  # else all that it is a part of would be kept
    fits = q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.size(2) >= SHORTEST
    if fits and not torch.compiler.is_compiling():
        return _CausalAttention.apply(q, k, v)  # type: ignore[return-value]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.size(1) != k.size(1))


class _CausalAttention(torch.autograd.Function):
    """With P = softmax(q k^T / sqrt(hs)) for some queries at a time, which the backward pass computes again."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        groups, keys, values = _as_groups(q, k, v)
        out = torch.empty_like(groups)
        for at in _some_queries(q):
            _, weights = _attention_weights(groups[:, :, at], keys[:, : at.stop])
            out[:, :, at] = (weights @ values[:, : at.stop]).view_as(out[:, :, at])
        return out.view(q.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        q, k, v = ctx.saved_tensors
        groups, keys, values = _as_groups(q, k, v)
        above = grad.reshape(groups.shape)
        dq = torch.empty_like(groups)
        dk, dv = (torch.zeros_like(x, dtype=torch.float32) for x in (keys, values))
        for at in _some_queries(q):
            rows, weights = _attention_weights(groups[:, :, at], keys[:, : at.stop])
            dout = above[:, :, at].flatten(1, 2)  # (B * nkv, group * n, hs)
            dv[:, : at.stop] += weights.mT @ dout
            dweights = dout @ values[:, : at.stop].mT  # (B * nkv, group * n, at.stop)
            dscores = torch.ops.aten._softmax_backward_data(dweights, weights, -1, q.dtype)
            dq[:, :, at] = (dscores @ keys[:, : at.stop]).view_as(dq[:, :, at])
            dk[:, : at.stop] += dscores.mT @ rows
        dq *= q.size(-1) ** -0.5
        return dq.view(q.shape), dk.type_as(k).view(k.shape), dv.type_as(v).view(v.shape)


def _as_groups(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (B * nkv, group, T, hs), keys and values (B * nkv, T, hs), each without gaps."""
    B, nkv, T, hs = k.shape
    return q.reshape(B * nkv, -1, T, hs), k.reshape(B * nkv, T, hs), v.reshape(B * nkv, T, hs)


def _some_queries(q: Tensor) -> Iterator[slice]:
    T = q.size(2)
    for start in range(0, T, QUERIES_AT_ONCE):
        yield slice(start, min(start + QUERIES_AT_ONCE, T))


def _attention_weights(queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of the last n queries (B * nkv, group, n, hs) to all keys (B * nkv, S, hs).

    Returns:
        The queries divided by sqrt(hs), as rows (B * nkv, group * n, hs), and their weights (B * nkv, group * n, S).
    """
    n, S = queries.size(2), keys.size(1)
    rows = (queries * queries.size(-1) ** -0.5).flatten(1, 2)
    scores = rows @ keys.mT
    future = torch.full((n, n), -torch.inf, dtype=scores.dtype, device=scores.device).triu(1)
    scores.unflatten(1, (-1, n))[..., S - n :] += future
    return rows, scores.softmax(-1)
