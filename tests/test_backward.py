"""What is worked out again for the backward pass: gradients against autograd's own, and the memory that is kept."""

import pytest
import torch
import torch.nn.functional as F
from conftest import load_script, random_aligner

from lit_llama.backward import SHORTEST, _CausalAttention, causal_attention, rms_norm, swiglu
from lit_llama.config import LLaMAConfig
from lit_llama.lora import LoRA
from lit_llama.model import RMSNorm

kept_bytes_per_layer = load_script("benchmarks/memory.py").kept_bytes_per_layer


def value_and_gradients(function, inputs, above):
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    value = function(*inputs)
    return [value, *torch.autograd.grad(value, inputs, above)]


def heads(rows, length, nh, nkv, dtype=torch.float32):
    """Queries, keys and values as the model makes them: parts of one tensor, and a gradient for what comes of them."""
    stacked = torch.randn(rows, length, nh + 2 * nkv, 16, dtype=dtype).transpose(1, 2)
    return stacked.split([nh, nkv, nkv], dim=1), torch.randn(rows, nh, length, 16, dtype=dtype)


def sdpa(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


@pytest.mark.parametrize("length", [1, 63, 64, 150])
@pytest.mark.parametrize(("nh", "nkv"), [(6, 2), (3, 3)])
def test_attention_is_torchs(length, nh, nkv):
    inputs, above = heads(2, length, nh, nkv)
    found, expected = (value_and_gradients(f, inputs, above) for f in (_CausalAttention.apply, sdpa))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_attention_in_bfloat16_is_as_exact_as_torchs():
    inputs, above = heads(2, 150, 6, 2, torch.bfloat16)
    exact = value_and_gradients(sdpa, [x.double() for x in inputs], above.double())

    def errors(attention):
        found = value_and_gradients(attention, inputs, above)
        return torch.stack([(x - y).norm() / y.norm() for x, y in zip(found, exact, strict=True)])

    assert inputs[0].size(2) >= SHORTEST
    assert not torch.equal(causal_attention(*inputs), sdpa(*inputs))  # it has another way
    assert (errors(causal_attention) < 2 * errors(sdpa)).all()


def test_swiglu_and_norm_are_autograds():
    gate, up, above = torch.randn(3, 2, 5, 32).unbind()
    found = value_and_gradients(swiglu, [gate, up], above)
    expected = value_and_gradients(lambda gate, up: gate * torch.sigmoid(gate) * up, [gate, up], above)
    scale = torch.randn(32)
    found += value_and_gradients(lambda x: rms_norm(x, scale, 1e-5), [gate], above)
    expected += value_and_gradients(
        lambda x: x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * scale, [gate], above
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("base", "tokens"),
    [("Llama-2-7B", 16), ("SmolLM2-135M", 16), ("SmolLM2-135M", 64)],  # short ones by torch's attention, as on a GPU
)
def test_what_is_kept(base, tokens):
    config = LLaMAConfig.from_name(base)
    assert kept_bytes_per_layer(config, tokens) <= 26 * config.n_embd


def gradients(model, adapter, ids):
    logits = model(ids, adapter)
    return [logits, *torch.autograd.grad(logits.square().mean(), list(adapter.parameters()))]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("adapter", ["aligner", "lora"])
def test_gradients_of_adapters_are_autograds(tiny_model, monkeypatch, adapter, recompute):
    """With and without activation checkpointing; a LoRA needs the inputs of the projections that it updates."""
    torch.manual_seed(0)
    if adapter == "aligner":
        tuned = random_aligner(tiny_model.config, 3)
    else:
        tuned = LoRA(tiny_model.config, 2, targets=["q", "o", "gate", "up", "down"])
        for factors in tuned.parameters():
            torch.nn.init.normal_(factors, std=0.1)
    ids = torch.randint(96, (2, 40))
    monkeypatch.setattr("lit_llama.model.causal_attention", _CausalAttention.apply)
    if recompute:
        tiny_model.checkpoint_activations()
    found = gradients(tiny_model, tuned, ids)
    monkeypatch.setattr("lit_llama.model.causal_attention", sdpa)
    monkeypatch.setattr("lit_llama.model.swiglu", lambda gate, up: F.silu(gate) * up)
    monkeypatch.setattr(RMSNorm, "forward", lambda self, x: self.scale * F.rms_norm(x, x.shape[-1:], eps=self.eps))
    expected = gradients(tiny_model, tuned, ids)
    torch.testing.assert_close(found.pop(0), expected.pop(0), atol=2e-5, rtol=0)  # logits, of some 10
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
