"""A frozen base in 4 or 8 bits, by bitsandbytes; the adapter on top stays in float32.

Lightning Fabric has a plugin for bitsandbytes, which refuses CPUs, cannot replace the layers of a model on the meta
device by 8-bit ones, and accepts a file that lacks weights. So its layers are used here directly: they go wherever
bitsandbytes does, and a weight at a time is quantised.
"""

import logging
from typing import Any, Literal

import torch
import torch.nn as nn
from torch import Tensor

from lit_llama.files import require_extra
from lit_llama.model import LLaMA

Quantize = Literal["nf4", "int8"]
_BLOCK = 64  # weights that share a scale in 4 bits


def use_quantized_layers(model: LLaMA, quantize: Quantize, dtype: torch.dtype) -> None:
    """Replace the linear layers of all blocks by empty quantised ones, which `load_quantized` fills.

    The embedding, the head and the norms stay as they are.

    Args:
        model: on the meta device; changed in place.
        quantize: "nf4" (arXiv 2305.14314) or "int8" (arXiv 2208.07339).
        dtype: to compute in.

    Raises:
        ImportError: bitsandbytes is not installed.
        ValueError: the layers are too narrow for 4 bits.
    """
    # It says on each use that int8 casts its inputs to float16, and which faster kernels could be installed.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    bitsandbytes = require_extra("bitsandbytes", "quantize")
    options: dict[str, Any] = {"device": "meta"}
    for name, layer in list(model.transformer.h.named_modules()):
        if isinstance(layer, nn.Linear):
            sizes = layer.in_features, layer.out_features, layer.bias is not None
            if quantize == "nf4":
                if layer.in_features % _BLOCK:  # its CPU kernels return something else then
                    raise ValueError(
                        f"the base has layers of {layer.in_features} inputs, nf4 needs a multiple of {_BLOCK}: use int8"
                    )
                new = bitsandbytes.nn.Linear4bit(*sizes, compute_dtype=dtype, quant_type="nf4", **options)
            else:
                new = bitsandbytes.nn.Linear8bitLt(*sizes, has_fp16_weights=False, threshold=6.0, **options)
            model.transformer.h.set_submodule(name, new)


def is_quantized(layer: nn.Module) -> bool:
    """Whether a layer is one that `use_quantized_layers` made."""
    return type(layer).__module__.startswith("bitsandbytes.")


def bits_of(model: LLaMA) -> Quantize | None:
    """How `use_quantized_layers` changed a model's layers; None if it did not."""
    layer = model.get_submodule("transformer.h.0.attn.c_attn")
    if not is_quantized(layer):
        return None
    return "nf4" if type(layer).__name__ == "Linear4bit" else "int8"


def load_quantized(layer: nn.Module, weight: Tensor, device: torch.device, dtype: torch.dtype) -> None:
    """Quantise a weight on the device and put it into a layer that `use_quantized_layers` made.

    Raises:
        ValueError: bitsandbytes does not support the device.
    """
    nn_ = require_extra("bitsandbytes", "quantize").nn
    try:
        if isinstance(layer, nn_.Linear4bit):
            parameter = nn_.Params4bit(weight.to(dtype), requires_grad=False, quant_type="nf4", module=layer)
        else:
            parameter = nn_.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        layer.weight = parameter.to(device)
    except (RuntimeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"bitsandbytes cannot quantise on {device.type} ({reason}): leave out --quantize") from None
