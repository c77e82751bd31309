"""Number formats: what a base is kept and computed in."""

import platform
from typing import Literal

import torch

DType = Literal["float32", "bfloat16", "float16"]
Precision = Literal["auto", "32-true", "bf16-true", "16-true"]
PRECISIONS: dict[Precision, torch.dtype | None] = {
    "auto": None,
    "32-true": torch.float32,
    "bf16-true": torch.bfloat16,
    "16-true": torch.float16,
}
# The instructions that multiply matrices of bfloat16, by torch's names for them.
CPU_INSTRUCTIONS = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-BF16", "sve_bf16": "Arm SVE BF16", "bf16": "Arm BF16"}


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU or CPU whose instructions have it, float32 elsewhere."""
    return torch.bfloat16 if _multiplies_bfloat16(device) else torch.float32


def what_auto_takes(device: torch.device) -> str:
    """A line for people: which number format "auto" stands for on a device, and why."""
    if device.type == "cpu" and (instructions := _cpu_instructions()) is not None:
        return f"--precision auto: bfloat16, for which this CPU has instructions ({instructions})"
    if _multiplies_bfloat16(device):
        return "--precision auto: bfloat16, which this GPU computes in"
    what = "CPU has no instructions" if device.type == "cpu" else "GPU has no units"
    return f"--precision auto: float32, as this {what} for bfloat16"


def _multiplies_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and _cpu_instructions() is not None


def _cpu_instructions() -> str | None:
    """Name of this CPU's instructions for matrices of bfloat16; None if there are none that torch would use."""
    if not torch.backends.mkldnn.is_available():  # oneDNN has the kernels
        return None
    if hasattr(torch.cpu, "get_capabilities"):
        found = torch.cpu.get_capabilities()
    elif platform.machine().lower() in ("aarch64", "arm64"):
        found = {"bf16": torch.ops.mkldnn._is_mkldnn_bf16_supported()}
    else:  # before torch 2.11; each CPU with AMX has the other ones, too
        found = {"avx512_bf16": getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()}
    return next((name for key, name in CPU_INSTRUCTIONS.items() if found.get(key)), None)
