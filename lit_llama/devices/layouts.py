"""Faster inference: linear layers in oneDNN's blocks, or in 8 or 4 bits, and a compiled decoding step.

Decoding reads every weight once per token, so its speed is that of memory. On a CPU torch's own float32 layout leaves
half of it unused with a few rows, on one thread. The layers here have the layouts and kernels that torch's compiler
uses for frozen weights, without its minutes of compilation. Inference only: nothing here has a gradient.
"""

import functools
from collections.abc import Callable, Sequence
from types import FunctionType, MethodType
from typing import Any, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from lit_llama.files import require_extra
from lit_llama.model import LLaMA

WeightOnly = Literal["int8-fast", "int4-fast"]
GROUP = 32  # weights that share a scale in 4 bits
BLOCK = 64  # outputs that stand next to each other in torch's layout of 4-bit weights
# Rows of inputs from which on it is faster to make whole weights for the product, which then are dropped. Torch's
# kernels for few bits are made for few rows.
WHOLE_FROM_INT8, WHOLE_FROM_INT4 = 32, 128
WHOLE_AT_ONCE = 2**25  # weights, which matters for a head: 64 MB


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
        if rows.size(0) < WHOLE_FROM_INT8:
            y = torch.ops.aten._weight_int8pack_mm(rows, self.packed, self.scales)
        else:
            pieces = self.packed.split(max(1, WHOLE_AT_ONCE // x.size(-1)))
            y = torch.cat([F.linear(rows, piece.to(torch.bfloat16)) for piece in pieces], -1) * self.scales
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
        self.whole_from = WHOLE_FROM_INT4 if weight.size(0) % BLOCK == 0 and layout_is_known() else None

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.size(-1)).to(torch.bfloat16).contiguous()
        if self.whole_from is None or rows.size(0) < self.whole_from:
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.packed, GROUP, self.scales_and_offsets)
        else:
            y = rows @ whole_weight(self.packed, self.scales_and_offsets)
        return _with_bias(y, x, self.bias)


def whole_weight(packed: Tensor, scales_and_offsets: Tensor) -> Tensor:
    """The weight (in, out) that 4-bit codes stand for, in bfloat16.

    The kernel for few rows does not round it, so that numbers differ a little with the number of rows; 4 bits round
    thirty times as much.

    Args:
        packed: (out, in / 2) bytes, in fact (out / 64, in, 32): of 64 outputs, a byte has the code of one of the first
            32 in its lower bits, and that of the output 32 places on in its upper ones.
        scales_and_offsets: (in / 32, out, 2); a weight is (code - 8) * scale + offset.
    """
    n_in, n_out = 2 * packed.size(1), packed.size(0)
    blocks = packed.view(-1, n_in, BLOCK // 2).transpose(0, 1)  # (in, out / 64, 32)
    codes = packed.new_empty(n_in, n_out // BLOCK, 2, BLOCK // 2, dtype=torch.bfloat16)
    codes[:, :, 0], codes[:, :, 1] = blocks & 15, blocks >> 4
    scales, offsets = scales_and_offsets.permute(2, 0, 1).contiguous()[:, :, None]  # (in / 32, 1, out) each
    groups = codes.view(-1, GROUP, n_out)
    return torch.addcmul(offsets.sub(scales, alpha=8), groups, scales, out=groups).view(n_in, n_out)


@functools.cache
def layout_is_known() -> bool:
    """Whether torch packs 4-bit weights on this machine as `whole_weight` reads them; it depends on the processor."""
    codes = (torch.arange(BLOCK * GROUP, dtype=torch.int32).square() // 7 % 16).view(BLOCK, GROUP)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    low, high = codes.T.to(torch.uint8).split(BLOCK // 2, dim=1)  # (32, 32) each
    return torch.equal(packed.flatten(), (high << 4 | low).flatten())


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
        model: for inference, and not to be changed any more; not one that `lay_out` has changed, as the compiler cannot
            read its layouts.

    Returns:
        The same model.
    """
    options: dict[str, Any] = {"triton.cudagraphs": True} if model.device.type == "cuda" else {}
    if hasattr(torch.compiler, "skip_all_guards_unsafe"):  # of torch 2.8, as the option
        options["guard_filter_fn"] = _apart_from_the_model
    model.rope_frequencies = model.rope_frequencies.to(model.device)  # else the program would have to
    # A copy for each model, as those checks are what tells programs apart that come from one function.
    forward = type(model).forward
    own = FunctionType(forward.__code__.replace(), forward.__globals__, argdefs=forward.__defaults__)
    own.__kwdefaults__ = forward.__kwdefaults__
    model.compiled = torch.compile(MethodType(own, model), fullgraph=True, dynamic=False, options=options or None)
    return model


def _apart_from_the_model(guards: Sequence[Any]) -> list[bool]:
    """Of the conditions under which a compiled program holds, those that are to be checked at each step.

    Thousands of them say that the model has not changed. It has not, and to check them takes a tenth of a step.
    """
    return [guard.name.split(".")[0] != "self" for guard in guards]
