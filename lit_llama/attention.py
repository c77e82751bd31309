"""Attention of a few queries over many keys: those of a cache, or of a prefix."""

import torch
import torch.nn.functional as F
from torch import Tensor


def attend_grouped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention that is not causal, of a cached sequence or a prefix, with the queries of a group in one product.

    Heads of a group read the same keys, so that their queries may stand one after the other as if in time. On a CPU
    and not in float32, plain products of matrices take a fraction of the fused kernel's time with one query in each of
    many rows, and half to three quarters with more of them, their gradient included; but the backward pass keeps the
    attention's weights, (B, nh, T, S).

    Args:
        q: (B, nh, T, hs).
        k: (1 or B, nkv, S, hs).
        v: likewise.
        mask: (B, 1, T, S), added to the scores; None means that every query sees all keys.

    Returns:
        (B, nh, T, hs).
    """
    B, nh, T, hs = q.shape
    nkv, S = k.shape[1:3]
    queries = q.reshape(B, nkv, -1, hs)  # (B, nkv, group * T, hs)
    if mask is not None and T > 1:
        mask = mask.repeat(1, 1, nh // nkv, 1)  # (B, 1, group * T, S)
    is_plain = q.device.type == "cpu" and q.dtype != torch.float32 and (T == 1 or mask is None)
    if is_plain and B * nkv * T * S >= 2048:
        queries = queries * hs**-0.5
        if mask is None and S < (64 if T > 1 else 32):  # torch's softmax is slow along a last dimension that is short
            y = (k @ queries.mT).softmax(-2).mT @ v
        else:
            scores = queries @ k.mT  # (B, nkv, group * T, S)
            y = (scores if mask is None else scores + mask).softmax(-1) @ v
    else:
        k, v = (heads.expand(B, -1, -1, -1) for heads in (k, v))
        y = F.scaled_dot_product_attention(queries, k, v, attn_mask=mask)
    return y.view(B, nh, T, hs)
