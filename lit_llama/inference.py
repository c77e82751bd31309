"""Linear layers laid out for fast inference on a CPU: in oneDNN's blocks, or in 8 or 4 bits.

Decoding reads every weight once per token, so its speed is that of memory. torch's own float32 layout leaves half of it
unused with a few rows, on one thread. These are the layouts and kernels that torch's compiler uses for frozen weights,
without its minutes of compilation. Inference only: nothing here has a gradient.
"""

from typing import Literal

import torch
import torch.nn as nn
from torch import Tensor

from lit_llama.model import LLaMA

WeightOnly = Literal["int8-weights", "int4-weights"]
GROUP = 32  # weights that share a scale in 4 bits


class BlockedLinear(nn.Module):
    """A linear layer whose weight is in oneDNN's blocked layout, with the same results up to rounding.

    Args:
        weight: (out, in), float32 or bfloat16, on a CPU.
    """

    packed: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("packed", torch.ops.mkldnn._reorder_linear_weight(weight, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, None, "none", [], "")


class Int8Linear(nn.Module):
    """A linear layer with 8-bit weights and a scale for each output; activations stay in bfloat16.

    Args:
        weight: (out, in).
    """

    packed: Tensor
    scales: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        scales = weight.float().abs().amax(1).clamp(min=1e-12) / 127  # (out)
        self.register_buffer("packed", (weight.float() / scales[:, None]).round().to(torch.int8))
        self.register_buffer("scales", scales.to(torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.size(-1)).to(torch.bfloat16)
        y = torch.ops.aten._weight_int8pack_mm(rows, self.packed, self.scales)
        return y.view(*x.shape[:-1], -1).to(x.dtype)


class Int4Linear(nn.Module):
    """A linear layer with 4-bit weights, with a scale and an offset for 32 of them; activations stay in bfloat16.

    Args:
        weight: (out, in), `in` a multiple of 32 and `out` of 16.

    Raises:
        ValueError: the sizes are not multiples.
    """

    packed: Tensor
    scales_and_offsets: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        if weight.size(1) % GROUP or weight.size(0) % 16:
            raise ValueError(
                f"the base has a layer of {weight.size(1)} inputs and {weight.size(0)} outputs; 4-bit weights need "
                f"multiples of {GROUP} and 16: use int8-weights"
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
        return y.view(*x.shape[:-1], -1).to(x.dtype)


LAYERS = {None: BlockedLinear, "int8-weights": Int8Linear, "int4-weights": Int4Linear}


def lay_out(model: LLaMA, weight_only: WeightOnly | None = None) -> LLaMA:
    """Change a base model's linear layers, in place, for inference on a CPU.

    Args:
        model: with whole float32 or bfloat16 weights.
        weight_only: keep weights in 8 or 4 bits, the head in 8; if None, as they are, laid out anew.

    Returns:
        The same model.

    Raises:
        ValueError: the model is not on a CPU, or its layers are too narrow for 4 bits.
    """
    if model.device.type != "cpu":
        raise ValueError(f"--quantize {weight_only} is for CPUs, the base is on {model.device.type}: use nf4 or int8")
    if weight_only is None and not torch.backends.mkldnn.is_available():
        return model
    layer = LAYERS[weight_only]
    for name, linear in list(model.transformer.h.named_modules()):
        if isinstance(linear, nn.Linear):
            model.transformer.h.set_submodule(name, layer(linear.weight.detach()))
    head = model.transformer.wte.weight if model.lm_head is None else model.lm_head.weight
    model.lm_head = (layer if weight_only is None else Int8Linear)(head.detach())  # type: ignore[assignment]
    return model
