"""The options with which scripts open a base model, declared once.

A script whose `main` hands its `**options` on to this function has the function's options, apart from those that it
gives itself.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import torch

from lit_llama.base import Base, open_base
from lit_llama.devices.layouts import WeightOnly
from lit_llama.devices.precision import Precision, what_auto_takes
from lit_llama.together import AdapterLike, Bits


def open_model(
    adapters: AdapterLike | Sequence[AdapterLike] | None,
    scales: Sequence[float] | None,
    /,
    *,
    checkpoint_dir: Path = Path("checkpoints/SmolLM2-135M-Instruct"),
    prompt_style: str | None = None,
    thinking: Literal["on", "off"] | None = None,
    precision: Precision = "auto",
    quantize: Bits | None = None,
    compile: bool = False,
    allow_other_base: bool = False,
) -> Base:
    """Open a base model that answers, perhaps with adapters.

    Args:
        adapters: see `lit_llama.base.open_base`.
        scales: a number for each adapter.
        checkpoint_dir: folder of the base model.
        prompt_style: how a prompt is written for the model: "chat" (the model's own template), "alpaca", "metamath",
            "hh", "beaver" or "none" (the prompt alone); if not given, as the adapter was trained, and for a base model
            alone "chat", or "none" if it has no template.
        thinking: let the model think before it answers, or not, if its chat template has a switch for that; if not
            given, as the adapter was trained, or as the template has it.
        precision: number format of the base model; "auto" is bf16-true where GPU or CPU compute in it and 32-true
            elsewhere, and says which it takes.
        quantize: number of bits of the base model's weights: "nf4" or "int8" (bitsandbytes) saves memory,
            "int4-fast" or "int8-fast" (torchao on a GPU) saves time; if not given, as the adapter was trained; "none"
            keeps the weights whole.
        compile: compile the decoding step, with CUDA graphs on a GPU. It takes a while, so it is for long work.
        allow_other_base: use an adapter on other weights than those it was trained on.
    """
    if thinking is not None:
        if prompt_style not in (None, "chat"):
            raise ValueError(
                f"--thinking is a switch of the model's own chat template, not of the style {prompt_style}"
            )
        prompt_style = f"chat-thinking-{thinking}"
    base = open_base(
        checkpoint_dir,
        adapters,
        scales,
        prompt_style=prompt_style,
        precision=precision,
        quantize=quantize,
        compile=compile,
        for_generation=True,
        allow_other_base=allow_other_base,
    )
    say_precision(precision, quantize)  # of a base that could be opened
    return base


def say_precision(precision: Precision, quantize: Bits | None = None) -> None:
    """Tell which number format "auto" takes, and why.

    Args:
        precision: the option.
        quantize: number of bits of the weights; of some the kernels compute in bfloat16 anywhere.
    """
    if precision == "auto" and quantize not in get_args(WeightOnly):
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        print(what_auto_takes(device), file=sys.stderr)
