"""Rotary position embedding (arXiv 2104.09864) of interleaved pairs, with the ways to stretch it to longer contexts."""

import math

import torch
from torch import Tensor

from lit_llama.config import LLaMAConfig


def rope_frequencies(config: LLaMAConfig) -> Tensor:
    """Angle per position of each rotary pair, stretched as `config.rope_scaling` says.

    Returns:
        (hs / 2) float32, on the CPU.
    """
    exponents = torch.arange(0, config.head_size, 2, device="cpu", dtype=torch.float32) / config.head_size
    frequencies = 1.0 / config.rope_base**exponents
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    stretched = frequencies / scaling.factor
    if scaling.type == "linear":
        return stretched
    turns = scaling.original_block_size * frequencies / (2 * math.pi)  # in the original context
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return torch.lerp(stretched, frequencies, kept.clamp(0, 1))


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of interleaved pairs, in float32 (arXiv 2104.09864).

    Args:
        x: (B, heads, T, hs).
        cos: cosine of each pair's angle, (1 or B, 1, T, hs / 2).
        sin: sine of each pair's angle, likewise.

    Returns:
        (B, heads, T, hs), in the dtype of `x`.
    """
    pairs = x.float().unflatten(-1, (-1, 2))  # (B, heads, T, hs / 2, 2)
    if torch.compiler.is_compiling():  # which makes one pass of this, and nothing good of complex numbers
        a, b = pairs.unbind(-1)
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1)
    else:
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.complex(cos, sin))
    return turned.flatten(-2).type_as(x)
