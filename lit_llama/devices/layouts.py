"""Faster inference: linear layers in oneDNN's blocks, or in 8 or 4 bits, and a compiled decoding step.

Decoding reads every weight once per token, so its speed is that of memory. On a CPU torch's own float32 layout leaves
half of it unused with a few rows, on one thread. The layers here have the layouts and kernels that torch's compiler
uses for frozen weights, without its minutes of compilation. Inference only: nothing here has a gradient.
"""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn as nn
from torch import Tensor

from lit_llama.files import require_extra
from lit_llama.model import LLaMA

WeightOnly = Literal["int8-fast", "int4-fast"]
GROUP = 32  # weights that share a scale in 4 bits


class BlockedLinear(nn.Module):
    """A linear layer whose weight is in oneDNN's blocked layout, with the same results up to rounding.

    Args:
        weight: (out, in), float32 or bfloat16, on a CPU.
        bias: (out), in the same dtype, if the layer has one.
    """

    packed: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("packed", torch.ops.mkldnn._reorder_linear_weight(weight, 1))
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


class Int8Linear(nn.Module):
    """A linear layer with 8-bit weights and a scale for each output; activations stay in bfloat16.

    Args:
        weight: (out, in).
        bias: (out), if the layer has one.
    """

    packed: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("bias", bias)
        scales = weight.float().abs().amax(1).clamp(min=1e-12) / 127  # (out)
        self.register_buffer("packed", (weight.float() / scales[:, None]).round().to(torch.int8))
        self.register_buffer("scales", scales.to(torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.size(-1)).to(torch.bfloat16)
        y = torch.ops.aten._weight_int8pack_mm(rows, self.packed, self.scales)
        return _with_bias(y, x, self.bias)


class Int4Linear(nn.Module):
    """A linear layer with 4-bit weights, with a scale and an offset for 32 of them; activations stay in bfloat16.

    Args:
        weight: (out, in), `in` a multiple of 32 and `out` of 16.
        bias: (out), if the layer has one.

    Raises:
        ValueError: the sizes are not multiples.
    """

    packed: Tensor
    scales_and_offsets: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("bias", bias)
        if weight.size(1) % GROUP or weight.size(0) % 16:
            raise ValueError(
                f"the base has a layer of {weight.size(1)} inputs and {weight.size(0)} outputs; 4-bit weights need "
                f"multiples of {GROUP} and 16: use int8-fast"
            )
        groups = weight.float().unflatten(1, (-1, GROUP))  # (out, groups, 32)
        low, high = groups.amin(2), groups.amax(2)
        scales = ((high - low) / 15).clamp(min=1e-12)
        codes = ((groups - low[..., None]) / scales[..., None]).round().to(torch.int32).flatten(1)
        self.register_buffer("packed", torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1))
        # The kernel computes (code - 8) * scale + offset.
        offsets = torch.stack([scales, low + 8 * scales], dim=-1).transpose(0, 1)  # (groups, out, 2)
        self.register_buffer("scales_and_offsets", offsets.contiguous().to(torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.size(-1)).to(torch.bfloat16).contiguous()
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.packed, GROUP, self.scales_and_offsets)
        return _with_bias(y, x, self.bias)


def _with_bias(rows: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    """Outputs (rows, out) in the shape and dtype of the inputs (..., in) that they come from, with the bias added."""
    y = rows.view(*x.shape[:-1], -1).to(x.dtype)
    return y if bias is None else y + bias.to(x.dtype)


def lay_out(model: LLaMA) -> LLaMA:
    """Change the memory layout of a base model's linear layers in place, for inference on a CPU; do nothing elsewhere.

    Args:
        model: with whole float32 or bfloat16 weights.

    Returns:
        The same model.
    """
    if model.device.type == "cpu" and torch.backends.mkldnn.is_available():
        _replace(model, BlockedLinear, BlockedLinear)
    return model


def quantize_for_inference(model: LLaMA, weight_only: WeightOnly) -> LLaMA:
    """Keep the weights of a base model's linear layers in 8 or 4 bits, in place, for inference.

    On a CPU by torch's own kernels, the head in 8 bits; elsewhere by torchao, the head as it is.

    Args:
        model: with whole float32 or bfloat16 weights; in bfloat16 for 4 bits on a GPU.
        weight_only: how many bits.

    Returns:
        The same model.

    Raises:
        ImportError: torchao is needed, and not installed.
        ValueError: layers are too narrow for 4 bits.
    """
    if model.device.type == "cpu":
        _replace(model, Int8Linear if weight_only == "int8-fast" else Int4Linear, Int8Linear)
    else:
        quantize_by_torchao(model, weight_only)
    return model


def quantize_by_torchao(model: LLaMA, weight_only: WeightOnly) -> None:
    """`quantize_for_inference` of the blocks on any device that torchao supports."""
    torchao = require_extra("torchao.quantization", "quantize")
    if weight_only == "int8-fast":
        config = torchao.Int8WeightOnlyConfig()
    else:
        config = torchao.Int4WeightOnlyConfig(group_size=GROUP, int4_packing_format="tile_packed_to_4d")
    torchao.quantize_(model.transformer.h, config)


Layer = Callable[[Tensor, Tensor | None], nn.Module]  # of a weight and a bias


def _replace(model: LLaMA, layer: Layer, head: Layer) -> None:
    for name, linear in list(model.transformer.h.named_modules()):
        if isinstance(linear, nn.Linear):
            bias = None if linear.bias is None else linear.bias.detach()
            model.transformer.h.set_submodule(name, layer(linear.weight.detach(), bias))
    weight = model.transformer.wte.weight if model.lm_head is None else model.lm_head.weight
    model.lm_head = head(weight.detach(), None)  # type: ignore[assignment]


def compile_decoding(model: LLaMA) -> LLaMA:
    """Let `torch.compile` make the forward of one token per row, with CUDA graphs on a GPU.

    It is compiled when it is first used, and again for other numbers of rows, lengths and sizes of adapters.

    Args:
        model: for inference; not one that `lay_out` has changed, as the compiler cannot read its layouts.

    Returns:
        The same model.
    """
    mode = "reduce-overhead" if model.device.type == "cuda" else None
    model.compiled = torch.compile(model.forward, fullgraph=True, dynamic=False, mode=mode)
    return model
