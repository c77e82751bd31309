"""Merged adapters compute what the sum of their parts does, or are refused."""

import copy

import pytest
import torch
from conftest import random_aligner

from lit_llama.adapters import Companion, adapter_info, load_adapter, read_adapter, save_adapter
from lit_llama.bias import Bias
from lit_llama.checkpoint import load_base
from lit_llama.combine import WeightedSum
from lit_llama.formats import folding
from lit_llama.lora import LoRA

SCRIPT = "scripts/merge_adapters.py"


@pytest.fixture
def model(base_dir):
    return load_base(base_dir)


def save_lora(path, model, seed, training=None, **options):
    torch.manual_seed(seed)
    lora = LoRA(model.config, **options)
    for parameter in lora.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    save_adapter(path, lora, model, **{"prompt_style": "chat", **(training or {})})
    return path


def test_loras_side_by_side(tmp_path, model, command):
    """Of different ranks, scales and projections."""
    files = [save_lora(tmp_path / "a.safetensors", model, 1, r=4, alpha=8, targets=["q", "v"])]
    files.append(save_lora(tmp_path / "b.safetensors", model, 2, r=2, alpha=3, targets=["v", "down"]))
    arguments = [f"--adapter_path={file}" for file in files] + ["--adapter_scale=1.5", "--adapter_scale=-0.5"]
    status, _, err = command(SCRIPT, *arguments, output_path=tmp_path / "both.safetensors")
    assert status == 0, err
    merged = load_adapter(tmp_path / "both.safetensors")
    assert (merged.sizes["r"], merged.sizes["targets"]) == (6, ["q", "v", "down"])
    ids = torch.randint(4, 390, (2, 20))
    expected = model(ids, WeightedSum((load_adapter(files[0]), 1.5), (load_adapter(files[1]), -0.5)))
    torch.testing.assert_close(model(ids, merged), expected, atol=1e-5, rtol=1e-5)
    assert read_adapter(tmp_path / "both.safetensors", model=model)[1].prompt_style == "chat"


@pytest.mark.parametrize("length", [1, 3])
def test_an_aligner_turned_down(tmp_path, model, command, length):
    aligner = random_aligner(model.config, length)
    save_adapter(tmp_path / "a.safetensors", aligner, model, prompt_style="chat")
    options = {
        "adapter_path": tmp_path / "a.safetensors",
        "adapter_scale": 0.25,
        "output_path": tmp_path / "b.safetensors",
    }
    assert command(SCRIPT, **options)[0] == 0
    ids = torch.randint(4, 390, (2, 20))
    found = model(ids, load_adapter(tmp_path / "b.safetensors"))
    torch.testing.assert_close(found, model(ids, WeightedSum((aligner, 0.25))), atol=1e-6, rtol=0)
    assert adapter_info(tmp_path / "b.safetensors").base_fingerprint == model.fingerprint
    status, _, err = command(SCRIPT, **options)
    assert (status, "--overwrite" in err) == (1, True)


def test_what_is_not_exact_is_refused(tmp_path, model, command):
    for n in (1, 2):
        save_adapter(tmp_path / f"{n}.safetensors", random_aligner(model.config, n), model)
    save_lora(tmp_path / "lora.safetensors", model, 1)
    for others in (["1", "2"], ["1", "lora"]):
        arguments = [f"--adapter_path={tmp_path / name}.safetensors" for name in others]
        status, _, err = command(SCRIPT, *arguments, output_path=tmp_path / "x.safetensors")
        assert (status, "Prefixes cannot" in err) == (1, True)
        assert not (tmp_path / "x.safetensors").exists()


def test_the_file_says_what_the_parts_stand_on(tmp_path, model, command):
    """The bits of their base, and the adapters under them, apart from one that is merged as well."""
    under = save_lora(tmp_path / "under.safetensors", model, 1)
    absent, inside = Companion("absent", "0" * 16, 0.5), Companion("under", adapter_info(under).fingerprint[:16], 1.0)
    for seed, name, style in ((2, "chat", "chat"), (3, "alpaca", "alpaca")):
        training = {"also": [absent, inside], "hyperparameters": {"quantize": "nf4"}, "prompt_style": style}
        save_lora(tmp_path / f"{name}.safetensors", model, seed, training)
    save_lora(under, model, 1, {"hyperparameters": {"quantize": "nf4"}})

    def merge(*names, **options):
        paths = [f"--adapter_path={tmp_path / name}.safetensors" for name in names]
        return command(SCRIPT, *paths, output_path=tmp_path / "out.safetensors", overwrite="true", **options)

    assert merge("chat", adapter_scale=0.7)[0] == 0
    info = adapter_info(tmp_path / "out.safetensors")
    assert (info.quantize, info.also) == ("nf4", (absent, inside))
    status, _, err = merge("chat", "alpaca", "under")
    assert (status, "different prompt styles" in err, ": alpaca): the merged one is used with the first" in err) == (
        0,
        True,
        True,
    )
    info = adapter_info(tmp_path / "out.safetensors")
    assert (info.quantize, info.also, info.style) == ("nf4", (absent,), "chat")
    save_lora(under, model, 1)
    status, _, err = merge("chat", "under")
    assert (status, "were trained with different --quantize" in err) == (1, True)


def test_what_is_merged_one_after_the_other_is_not_the_sum(model):
    """A prefix passes through projections that were merged before; at once, each is as it was trained."""
    torch.manual_seed(5)
    bias, aligner, ids = Bias(model.config, "v"), random_aligner(model.config, 1), torch.randint(4, 390, (2, 20))
    torch.nn.init.normal_(bias.vectors)
    both = WeightedSum((bias, 1), (aligner, 1))
    expected, after = model(ids, both), copy.deepcopy(model)
    folding.merge(model, both)
    torch.testing.assert_close(model(ids), expected, atol=1e-5, rtol=1e-5)
    folding.merge(after, bias)
    folding.merge(after, aligner)
    assert (after(ids) - expected).abs().max() > 0.1
