"""Number formats: what a base is kept and computed in."""

from typing import Literal

import torch

DType = Literal["float32", "bfloat16", "float16"]
Precision = Literal["auto", "32-true", "bf16-true", "16-true"]
PRECISIONS = {"auto": None, "32-true": torch.float32, "bf16-true": torch.bfloat16, "16-true": torch.float16}


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU that has it, float32 elsewhere."""
    return (
        torch.bfloat16
        if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        else torch.float32
    )
