"""Layouts for inference on a CPU: the same numbers, or those of weights rounded by hand."""

import functools

import pytest
import torch
from conftest import random_aligner, tiny_config

from lit_llama.base import open_base
from lit_llama.decoder import GenerationRequest
from lit_llama.devices import layouts
from lit_llama.devices.layouts import Int4Linear, Int8Linear, compile_decoding, lay_out, quantize_by_torchao
from lit_llama.generation import complete, generate
from lit_llama.lora import LoRA
from lit_llama.model import LLaMA


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("length", [None, 1, 3])
def test_blocks_change_nothing(tied, length):
    torch.manual_seed(0)
    model = LLaMA(tiny_config(tie_embeddings=tied)).requires_grad_(False)
    adapter = None if length is None else random_aligner(model.config, length)
    ids = torch.randint(96, (3, 10))
    with torch.no_grad():
        expected, rows = model(ids, adapter), generate(model, ids.tolist(), 8, adapter=adapter)
        lay_out(model)
        torch.testing.assert_close(model(ids, adapter), expected, atol=1e-5, rtol=1e-5)
    assert generate(model, ids.tolist(), 8, adapter=adapter) == rows


@pytest.mark.parametrize("rows", [1, 2, 40, 80])
@pytest.mark.parametrize("outputs", [48, 128])
def test_fewer_bits_are_rounded_weights(rows, outputs):
    """By hand: 255 values at equal distances for each output, or 16 for each 32 weights, within a step of bfloat16."""
    torch.manual_seed(0)
    weight, bias, x = torch.randn(outputs, 64), torch.randn(outputs), torch.randn(2, rows, 64).bfloat16()
    step = weight.abs().amax(1, keepdim=True) / 127
    int8 = step * (weight / step).round()
    groups = weight.view(outputs, 2, 32)
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    int4 = (low + ((groups - low) / (high - low) * 15).round() * (high - low) / 15).view(outputs, 64)
    for layer, rounded in ((Int8Linear, int8), (Int4Linear, int4)):
        expected, found = x.float() @ rounded.T + bias, layer(weight, bias)(x).float()
        torch.testing.assert_close(found, expected, atol=0.15, rtol=0.02)
        assert (found - expected).abs().mean() < 0.5 * (x.float() @ (rounded - weight).T).abs().mean()


def test_a_wide_layer_is_made_whole_in_pieces(monkeypatch):
    layer, x = Int8Linear(torch.randn(50, 64)), torch.randn(40, 64).bfloat16()
    expected = layer(x)
    monkeypatch.setattr(layouts, "WHOLE_AT_ONCE", 20 * 64)
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("other", ["halves swapped", "neighbours in a byte", "outputs turned round"])
def test_another_layout_of_four_bits_is_not_taken_for_the_known_one(monkeypatch, other):
    codes_of = {
        "halves swapped": lambda codes: codes.roll(32, 0),
        "neighbours in a byte": lambda codes: codes.view(32, 2, -1).transpose(0, 1).reshape(codes.shape),
        "outputs turned round": lambda codes: codes.flip(0),
    }[other]

    def pack(codes, _):
        low, high = codes_of(codes).T.to(torch.uint8).split(32, dim=1)
        return high << 4 | low

    monkeypatch.setattr(torch.ops.aten, "_convert_weight_to_int4pack_for_cpu", pack)
    assert not layouts.layout_is_known.__wrapped__()


@pytest.mark.parametrize("quantize", ["int8-fast", "int4-fast"])
def test_generation_with_fewer_bits(command, base_dir, quantize):
    options = {"checkpoint_dir": base_dir, "prompt": "Count to 3.", "max_new_tokens": 8}
    status, _, err = command("generate/base.py", quantize=quantize, **options)
    assert status == 0, err
    ids = torch.randint(4, 390, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        bases = [open_base(base_dir, precision="bf16-true", quantize=bits) for bits in ("none", quantize)]
        both = [base.model(ids).float().flatten() for base in bases]
    correlation = torch.corrcoef(torch.stack(both))[0, 1]
    assert (0.99 if quantize == "int8-fast" else 0.8) < correlation < 1


def compiled_model(monkeypatch, backend, **sizes):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    torch.manual_seed(0)
    return LLaMA(tiny_config(**sizes)).requires_grad_(False)


def random_prompts():
    return [torch.randint(96, (length,)).tolist() for length in (5, 9, 3)]


def test_compiled_decoding_gives_the_same_tokens(monkeypatch):
    model = compiled_model(monkeypatch, "inductor", n_layer=1, unrotated_layers=[])
    lora = LoRA(model.config, 4).requires_grad_(False)
    for update in lora.layers:
        update["v"].b.normal_()
    prompts = random_prompts()
    expected = generate(model, prompts, 16, adapter=lora)
    compile_decoding(model)
    assert generate(model, prompts, 16, adapter=lora) == expected


def test_two_compiled_models_of_one_shape(monkeypatch):
    """What holds for a model is not checked at each step, and must not be taken to hold for another."""
    models = [compiled_model(monkeypatch, "aot_eager", n_layer=2, unrotated_layers=layers) for layers in ([], [0, 1])]
    ids = torch.randint(96, (2, 10))
    with torch.no_grad():
        first, second = (model(ids) for model in models)
        assert (first - second).abs().max() > 1e-3
        for model, expected in zip(models, (first, second), strict=True):
            found = compile_decoding(model).compiled(ids)
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_compiled_rows_end_at_different_times_and_others_take_their_places(monkeypatch):
    """Without a graph break, which fails. By a back end that makes no machine code, as that takes most of the time."""
    model = compiled_model(monkeypatch, "aot_eager", n_layer=2)
    aligners, prompts = [random_aligner(model.config, length) for length in (1, 3)], random_prompts()

    def answers():
        requests = [GenerationRequest(prompts[i % 3], ([*aligners, None])[i % 3], 4 + i) for i in range(6)]
        return list(complete(model, requests, 2))

    expected = answers()
    compile_decoding(model)
    assert answers() == expected


def test_torchao_rounds_weights():
    """By hand: with 255 values at equal distances for each output, no weight moves by more than half of one."""
    torch.manual_seed(0)
    model = LLaMA(tiny_config()).requires_grad_(False)
    linear = model.transformer.h[1].mlp.c_proj
    step = linear.weight.abs().amax(1) / 127  # (out)
    x = torch.randn(2, linear.in_features)
    expected = linear(x)
    quantize_by_torchao(model, "int8-fast")
    moved = (model.transformer.h[1].mlp.c_proj(x) - expected).abs()
    assert 0 < moved.max()
    assert (moved <= 1.01 * x.abs().sum(1)[:, None] * step / 2).all()


def test_narrow_layers_are_refused():
    with pytest.raises(ValueError, match="48 inputs and 32 outputs; 4-bit weights need multiples of 32 and 16"):
        Int4Linear(torch.randn(32, 48))
