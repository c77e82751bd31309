"""Compiled blocks: the same losses and gradients, few compilations, and what they do not go with."""

import functools

import numpy as np
import pytest
import torch
from conftest import random_aligner, tiny_config
from torch._dynamo.utils import counters

from lit_llama.aligner import Aligner
from lit_llama.data import Batch, Example
from lit_llama.lora import LoRA
from lit_llama.losses import supervised_loss
from lit_llama.model import LLaMA
from lit_llama.objective import KeptText, Objective
from lit_llama.plan import Plan
from lit_llama.script.machine import Machine

LENGTHS = [40, 23, 64]  # which are rounded up to one


def losses_and_gradients(model, adapter):
    results = []
    for length in LENGTHS:
        ids = (torch.arange(2 * length) * 7 % 96).view(2, length)
        sums = supervised_loss(model, adapter, Batch(ids, torch.arange(length).expand(2, -1) >= 5))
        results += [sums.metrics["loss"], *torch.autograd.grad(sums.metrics["loss"], list(adapter.parameters()))]
    return results


def check_compiled(recompute):
    torch.manual_seed(0)
    model = LLaMA(tiny_config(n_layer=5)).requires_grad_(False)
    lora = LoRA(model.config, 2)
    for factors in lora.parameters():
        torch.nn.init.normal_(factors, std=0.1)
    adapters = [random_aligner(model.config, 2, start_layer=0), lora]
    expected = [losses_and_gradients(model, adapter) for adapter in adapters]
    model.compile_blocks()
    if recompute:
        model.checkpoint_activations()
    for adapter, wanted in zip(adapters, expected, strict=True):
        for one, other in zip(losses_and_gradients(model, adapter), wanted, strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    return model


@pytest.mark.parametrize("recompute", [False, True])
def test_losses_and_gradients_are_the_same(monkeypatch, recompute):
    """By a back end that makes no machine code, as that takes most of the time."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    model = check_compiled(recompute)
    assert not counters["graph_break"]
    # For each adapter: the first layer, whose input gets no gradient, one without rotation, and all others.
    assert counters["stats"]["unique_graphs"] <= 6
    assert model(torch.zeros(1, 5, dtype=torch.long)).shape == (1, 5, 96)


def test_scales_kept_text_and_prefixes_of_the_prompt(monkeypatch):
    """What an adapter is multiplied by at each position is padded as the batch is."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = LLaMA(tiny_config(n_layer=2)).requires_grad_(False)
    lora, on_prompt = LoRA(model.config, 2), Aligner(model.config, 1, 0, positions="prompt")
    for one in [*lora.parameters(), *on_prompt.parameters()]:
        torch.nn.init.normal_(one, std=0.1)
    pieces = [Example(np.arange(5, 5 + length), np.ones(length, dtype=bool)) for length in (9, 30)]
    dial = Objective(model, scale_range=(0.0, 1.5), kept=KeptText(pieces, pieces, 1.0))
    ids = (torch.arange(80) * 7 % 96).view(2, 40)
    batch = Batch(ids, torch.arange(40).expand(2, -1) >= 5, items=[0, 1], step=0)

    def losses():
        return [dial.supervised(adapter, batch).metrics for adapter in (lora, on_prompt)]

    expected = losses()
    model.compile_blocks()
    for found, wanted in zip(losses(), expected, strict=True):
        for name in ("loss", "kept"):
            torch.testing.assert_close(found[name], wanted[name], atol=1e-3, rtol=1e-4)


@pytest.mark.slow
def test_machine_code_gives_the_same():
    torch._dynamo.reset()
    check_compiled(recompute=False)


def test_what_does_not_go_together_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--compile and --quantize do not go together"):
        Machine(compile=True, quantize="nf4")
    with pytest.raises(ValueError, match="--compile and --shard_base do not go together"):
        Machine(compile=True, shard_base=True)
    with pytest.raises(ValueError, match="--compile and --pack do not go together"):
        Machine(compile=True).launch(tmp_path, Plan(pack=True))
