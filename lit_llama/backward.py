"""Computations that keep little for the backward pass, each with its own rule for the gradient.

Autograd keeps what every single operation read. The functions here keep what cannot be had again cheaply.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


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
