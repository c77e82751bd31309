"""The method `bias`: against PEFT's BEFT, the folded Aligner, and the life of every adapter."""

import gguf
import numpy as np
import pytest
import torch
import transformers
from conftest import load_script, make_hf_checkpoint, random_aligner
from test_convert import bpe_fields, write_gguf
from test_export import assert_same, load_exported

from lit_llama.adapters import adapter_info, load_adapter, save_adapter
from lit_llama.bias import Bias
from lit_llama.checkpoint import load_base
from lit_llama.combine import WeightedSum
from lit_llama.config import LLaMAConfig
from lit_llama.formats.folding import fold, merge
from lit_llama.states import last_state


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
            folded = fold(config, tensors, i, aligner.layer(i)).biases
            bias.vectors[i] = folded["o"] - tensors[f"transformer.h.{i}.attn.c_proj.bias"]
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
    loaded = load_adapter(tmp_path / "bias.safetensors")
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


@pytest.fixture
def biases(tmp_path, base_dir):
    """Files of one bias for each target, by target."""
    model = load_base(base_dir)
    files = {target: tmp_path / f"{target}.safetensors" for target in "ov"}
    for target, file in files.items():
        save_adapter(file, random_bias(model.config, target), model, prompt_style="chat")
    return files


@pytest.mark.parametrize("targets", ["o", "v", "ov"])
def test_exported_it_is_a_stock_llama(tmp_path, base_dir, biases, command, targets):
    arguments = [f"--adapter_path={biases[target]}" for target in targets]
    folder = tmp_path / "export"
    status, _, err = command("scripts/export_hf_checkpoint.py", *arguments, checkpoint_dir=base_dir, output_dir=folder)
    assert status == 0, err
    exported = load_exported(folder)
    assert type(exported) is transformers.LlamaForCausalLM
    assert exported.config.attention_bias
    assert_same(exported, base_dir, WeightedSum(*((load_adapter(biases[target]), 1.0) for target in targets)))
    readme = (folder / "README.md").read_text()
    assert " + bias" * len(targets) + ", exported" in readme
    assert "Stock `LlamaForCausalLM`; what the adapters add is in the weights and biases" in readme


@pytest.mark.parametrize("targets", ["o", "v", "ov"])
def test_exported_to_gguf_it_is_the_vectors(tmp_path, command, targets):
    source = make_hf_checkpoint(tmp_path / "hf")
    path, output = tmp_path / "base.gguf", tmp_path / "biased.gguf"
    write_gguf(path, source, bpe_fields(source))
    load_script("scripts/convert_gguf_checkpoint.py").main(path, tmp_path / "base")
    model = load_base(tmp_path / "base")
    vectors, arguments = {}, ["--adapter_scale=0.5"]
    for target in targets:
        bias = random_bias(model.config, target)
        file = tmp_path / f"{target}.safetensors"
        save_adapter(file, bias, model)
        arguments.append(f"--adapter_path={file}")
        name = {"o": "blk.{}.attn_output.bias", "v": "blk.{}.attn_v.bias"}[target]
        vectors |= {name.format(i): 0.5 * vector for i, vector in enumerate(bias.vectors.detach().numpy())}
    status, _, err = command("scripts/export_gguf.py", *arguments, gguf_path=path, output_path=output)
    assert status == 0, err
    before = {tensor.name for tensor in gguf.GGUFReader(path).tensors}
    added = {tensor.name: tensor.data for tensor in gguf.GGUFReader(output).tensors if tensor.name not in before}
    assert added.keys() == vectors.keys()
    for name, vector in vectors.items():
        assert added[name].dtype == np.float32
        np.testing.assert_allclose(added[name], vector, rtol=1e-6, err_msg=name)


def test_merged_by_the_script(tmp_path, base_dir, biases, command):
    """Several of one target become one, one is scaled, and those of different targets are refused."""
    model, ids = load_base(base_dir), torch.randint(4, 390, (2, 20))
    for target, file in biases.items():
        other = tmp_path / f"other-{target}.safetensors"
        save_adapter(other, random_bias(model.config, target), model)
        merged = tmp_path / f"merged-{target}.safetensors"
        arguments = [f"--adapter_path={one}" for one in (file, other)] + ["--adapter_scale=1.5", "--adapter_scale=-0.5"]
        status, _, err = command("scripts/merge_adapters.py", *arguments, output_path=merged)
        assert status == 0, err
        expected = model(ids, WeightedSum((load_adapter(file), 1.5), (load_adapter(other), -0.5)))
        torch.testing.assert_close(model(ids, load_adapter(merged)), expected, atol=1e-5, rtol=0)
        assert adapter_info(merged).prompt_style == "chat"
        scaled = tmp_path / f"scaled-{target}.safetensors"
        assert command("scripts/merge_adapters.py", adapter_path=file, adapter_scale=0.25, output_path=scaled)[0] == 0
        expected = model(ids, WeightedSum((load_adapter(file), 0.25)))
        torch.testing.assert_close(model(ids, load_adapter(scaled)), expected, atol=1e-6, rtol=0)
    arguments = [f"--adapter_path={file}" for file in biases.values()]
    status, _, err = command("scripts/merge_adapters.py", *arguments, output_path=tmp_path / "x.safetensors")
    assert (status, "cannot be one" in err, (tmp_path / "x.safetensors").exists()) == (1, True, False)


@pytest.mark.parametrize("target", ["o", "v"])
def test_it_is_trained_and_resumed_to_the_bit(base_dir, data_dir, tmp_path, target):
    options = {"checkpoint_dir": base_dir, "data_dir": data_dir, "out_dir": tmp_path, "bias_target": target}
    options |= {"max_steps": 4, "warmup_steps": 1, "save_interval": 2, "eval_interval": 2, "resume": True}
    load_script("finetune/bias.py").main(**options)
    info, expected = adapter_info(tmp_path), load_adapter(tmp_path).vectors
    assert (info.method, info.config["target"], info.step) == ("bias", target, 4)
    assert (expected != 0).all()
    last_state(tmp_path).unlink()
    load_script("finetune/bias.py").main(**options)
    assert torch.equal(load_adapter(tmp_path).vectors, expected)


def test_it_can_be_compared_with_the_others():
    compare = load_script("scripts/compare_methods.py")
    assert [compare.parse(f"bias-{target}") for target in "ov"] == [("bias", "o"), ("bias", "v")]
    assert compare.title("bias-v") == "Bias, on v"
    for name in ("bias-q", "bias-1", "bias"):
        with pytest.raises(ValueError, match=f"--method {name}: expected a method and its size"):
            compare.parse(name)
