"""The method `bias`: against PEFT's BEFT, the folded Aligner, and the life of every adapter."""

import pytest
import torch
import transformers
from conftest import random_aligner

from lit_llama.adapters import load_adapter, save_adapter
from lit_llama.bias import Bias
from lit_llama.checkpoint import load_base
from lit_llama.combine import WeightedSum
from lit_llama.config import LLaMAConfig
from lit_llama.formats.folding import fold, merge, projections


def random_bias(config, target="o"):
    bias = Bias(config, target)
    torch.nn.init.normal_(bias.vectors, std=0.3)
    return bias.eval()


@pytest.mark.parametrize("target", ["o", "v"])
def test_logits_and_gradients_are_befts(hf_checkpoint, base_dir, target):
    peft = pytest.importorskip("peft", minversion="0.20")
    theirs = transformers.LlamaForCausalLM.from_pretrained(hf_checkpoint)
    theirs = peft.get_peft_model(theirs, peft.BeftConfig(target_modules=[f"{target}_proj"], task_type="CAUSAL_LM"))
    model = load_base(base_dir)
    ours = random_bias(model.config, target)
    parameters = [parameter for name, parameter in theirs.named_parameters() if "beft" in name]
    assert len(parameters) == model.config.n_layer
    with torch.no_grad():
        for parameter, vector in zip(parameters, ours.vectors, strict=True):
            parameter.copy_(vector.view_as(parameter))
    ids = torch.randint(0, model.config.vocab_size, (2, 12))
    expected, found = theirs(ids).logits, model(ids, ours)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert (found - model(ids)).abs().max() > 0.1
    expected.square().mean().backward()
    found.square().mean().backward()
    for parameter, gradient in zip(parameters, ours.vectors.grad, strict=True):
        torch.testing.assert_close(gradient, parameter.grad.view_as(gradient), atol=1e-5, rtol=1e-3)


def test_a_folded_one_token_aligner_is_one(tiny_model):
    """Every number of a folded Aligner's bias can be this method's."""
    config, aligner = tiny_model.config, random_aligner(tiny_model.config, 1)
    tensors, bias = dict(tiny_model.state_dict()), Bias(tiny_model.config)
    with torch.no_grad():
        for i in range(config.n_layer):
            folded = fold(config, projections(config, tensors, i), aligner.layer(i)).biases
            bias.vectors[i] = folded.get("o", torch.zeros(config.n_embd))
    ids = torch.randint(96, (2, 10))
    torch.testing.assert_close(tiny_model(ids, bias), tiny_model(ids, aligner), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("target", "parameters"), [("o", 30 * 576), ("v", 30 * 192)])
def test_parameter_counts(target, parameters):
    bias = Bias(LLaMAConfig.from_name("SmolLM2-135M"), target)
    assert sum(parameter.numel() for parameter in bias.parameters()) == parameters


@pytest.mark.parametrize("target", ["o", "v"])
def test_fresh_is_the_base_bit_for_bit_and_merged_the_same(tiny_model, target, tmp_path):
    ids = torch.randint(96, (2, 10))
    base = tiny_model(ids)
    assert torch.equal(tiny_model(ids, Bias(tiny_model.config, target)), base)
    bias = random_bias(tiny_model.config, target)
    save_adapter(tmp_path / "bias.safetensors", bias, tiny_model)
    loaded = load_adapter(tmp_path / "bias.safetensors", "bias")
    expected = tiny_model(ids, bias)
    assert torch.equal(tiny_model(ids, loaded), expected)
    half, whole = (tiny_model(ids, WeightedSum((bias, scale))) for scale in (0.5, 1.0))
    assert torch.equal(whole, expected)
    merged = Bias.merged(tiny_model.config, [(bias, 0.25), (loaded, 0.25)])
    torch.testing.assert_close(tiny_model(ids, merged), half, atol=1e-6, rtol=0)
    loaded.scale_(0.5)
    torch.testing.assert_close(tiny_model(ids, loaded), half, atol=1e-6, rtol=0)
    merge(tiny_model, bias)
    torch.testing.assert_close(tiny_model(ids), expected, atol=1e-5, rtol=0)
    merge(tiny_model, WeightedSum((bias, -1.0)))
    torch.testing.assert_close(tiny_model(ids), base, atol=1e-5, rtol=0)


def test_different_targets_cannot_be_one(tiny_model):
    terms = [(Bias(tiny_model.config, target), 1.0) for target in "ov"]
    with pytest.raises(ValueError, match="cannot be one"):
        Bias.merged(tiny_model.config, terms)
