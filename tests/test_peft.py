"""PEFT's folders, out and in, held against PEFT on transformers' own model."""

import json

import peft
import pytest
import torch
import transformers
from conftest import FAMILIES, load_script, make_hf_checkpoint, random_aligner
from safetensors.torch import load_file

from lit_llama.adapters import adapter_file, adapter_fingerprint, read_adapter, save_adapter
from lit_llama.base import open_base
from lit_llama.bias import Bias
from lit_llama.checkpoint import load_base
from lit_llama.combine import WeightedSum
from lit_llama.dpo_reference import read_policy_and_reference
from lit_llama.formats.hf import PROJECTIONS
from lit_llama.lora import LoRA

SCRIPT = "scripts/export_hf_checkpoint.py"
IDS = torch.randint(4, 390, (2, 30), generator=torch.Generator().manual_seed(0))


def random(adapter, std=0.3, seed=0):
    torch.manual_seed(seed)
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return adapter.eval()


def logits_of_peft(hf_checkpoint, folder):
    stock = transformers.LlamaForCausalLM.from_pretrained(hf_checkpoint)
    with torch.no_grad():
        return peft.PeftModel.from_pretrained(stock, folder)(IDS).logits


def save_with_peft(hf_checkpoint, folder, config, std=0.3):
    """An adapter of PEFT's own making, whose values are random."""
    model = peft.get_peft_model(transformers.LlamaForCausalLM.from_pretrained(hf_checkpoint), config)
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=std)
    model.save_pretrained(folder)
    with torch.no_grad():
        return model.eval()(IDS).logits


SUMS = {
    "aligner": {"aligner": 1.0},
    "o": {"o": 1.0},
    "v": {"v": 1.0},
    "sum": {"aligner": 0.5, "o": -1.0, "v": 2.0},
}


@pytest.mark.parametrize("kind", SUMS)
def test_one_token_and_bias_are_beft(tmp_path, hf_checkpoint, base_dir, command, kind):
    model = load_base(base_dir)
    aligner = random_aligner(model.config, 1, init_std=0.5)
    possible = {"aligner": aligner, "o": random(Bias(model.config, "o")), "v": random(Bias(model.config, "v"))}
    adapters = {name: (possible[name], scale) for name, scale in SUMS[kind].items()}
    options = []
    for name, (adapter, scale) in adapters.items():
        save_adapter(tmp_path / f"{name}.safetensors", adapter, model, prompt_style="alpaca")
        options += [f"--adapter_path={tmp_path / name}.safetensors", f"--adapter_scale={scale}"]
    folder, base_name = tmp_path / "mine", str(hf_checkpoint)
    status, _, err = command(
        SCRIPT, *options, checkpoint_dir=base_dir, output_dir=folder, format="peft", base_name=base_name
    )
    assert status == 0, err
    with torch.no_grad():
        ours = model(IDS, WeightedSum(*adapters.values()))
        assert (ours - model(IDS)).abs().max() > 0.1
    torch.testing.assert_close(logits_of_peft(hf_checkpoint, folder), ours, atol=1e-4, rtol=0)
    fields = json.loads((folder / "adapter_config.json").read_text())
    assert (fields["peft_type"], fields["base_model_name_or_path"]) == ("BEFT", base_name)
    assert f"base_model: {base_name}" in (folder / "README.md").read_text()
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert size < 2 * 4 * model.config.n_layer * (model.config.n_embd + 512)
    if kind != "sum":  # which has vectors on two projections
        base = open_base(base_dir, folder, precision="32-true")
        assert base.infos[0].style == "alpaca"
        torch.testing.assert_close(base.model(IDS, base.adapter), ours, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_token_next_to_any_family(tmp_path, family):
    """And a LoRA, whose rows of queries and keys stand in another order here."""
    folder = make_hf_checkpoint(tmp_path / "hf", model_type=family, **FAMILIES[family])
    if family == "granite":  # whose constants are in the weights of a Llama
        file = tmp_path / "aligner.safetensors"
        save_adapter(file, random_aligner(load_base(folder).config, 1))
        load_script("scripts/convert_hf_checkpoint.py").main(folder, tmp_path / "base")
        for base in (folder, tmp_path / "base"):
            with pytest.raises(ValueError, match="which makes it a Llama, and use that with PEFT"):
                load_script(SCRIPT).main(tmp_path / "x", base, [file], format="peft")
        load_script(SCRIPT).main(tmp_path / "llama", folder)
        folder = tmp_path / "llama"
    model = load_base(folder)
    adapters = {"aligner": random_aligner(model.config, 1, init_std=0.5)}
    if family != "phi3":  # whose projections are fused
        adapters["lora"] = random(LoRA(model.config, r=2, alpha=4.0, targets=["q", "k", "v"]), std=0.15)
    for name, adapter in adapters.items():
        file = tmp_path / f"{name}.safetensors"
        save_adapter(file, adapter, model, prompt_style="chat")
        load_script(SCRIPT).main(tmp_path / name, folder, [file], format="peft", base_name=str(folder))
        stock = transformers.AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            theirs = peft.PeftModel.from_pretrained(stock, tmp_path / name)(IDS).logits
            ours = model(IDS, adapter)
        torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=0)
        assert (ours - model(IDS)).abs().max() > 0.1
        if family == "granite":  # as read there it would be another adapter
            with pytest.raises(ValueError, match="which makes it a Llama, and use that with PEFT and here"):
                open_base(tmp_path / "base", tmp_path / name)


@pytest.mark.parametrize("target", ["o_proj", "v_proj"])
def test_a_beft_folder_is_an_adapter(tmp_path, hf_checkpoint, base_dir, target):
    config = peft.BeftConfig(target_modules=[target], task_type="CAUSAL_LM")
    expected = save_with_peft(hf_checkpoint, tmp_path, config)
    base = open_base(base_dir, tmp_path, precision="32-true")
    assert (base.infos[0].method, base.infos[0].base_name) == ("bias", str(hf_checkpoint))
    torch.testing.assert_close(base.model(IDS, base.adapter), expected, atol=1e-4, rtol=0)
    assert base.infos[0].style == "chat"


LORAS = {
    "q and v": {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]},
    "all, by sqrt(r)": {
        "r": 4,
        "lora_alpha": 3,
        "use_rslora": True,
        "target_modules": [name.rpartition(".")[2] for name in PROJECTIONS.values()],
    },
    "some layers": {"r": 2, "target_modules": ["k_proj", "down_proj"], "layers_to_transform": [1, 3]},
}


@pytest.mark.parametrize("name", LORAS)
def test_a_lora_folder_is_an_adapter(tmp_path, hf_checkpoint, base_dir, name):
    config = peft.LoraConfig(**LORAS[name], task_type="CAUSAL_LM")
    expected = save_with_peft(hf_checkpoint, tmp_path, config)
    model = load_base(base_dir)
    adapter, info = read_adapter(tmp_path, model=model)
    assert info.method == "lora"
    torch.testing.assert_close(model(IDS, adapter), expected, atol=1e-4, rtol=0)
    with_other = open_base(base_dir, precision="32-true").with_adapter(tmp_path)
    assert adapter_fingerprint(with_other.adapter) == adapter_fingerprint(adapter)


def test_a_lora_goes_out_and_comes_back(tmp_path, base_dir, command):
    model, file = load_base(base_dir), tmp_path / "lora.safetensors"
    lora = random(LoRA(model.config, r=3, alpha=5.0, targets=["q", "k", "up"]))
    save_adapter(file, lora, model, prompt_style="alpaca")
    options = {"checkpoint_dir": base_dir, "adapter_path": file, "output_dir": tmp_path / "mine", "format": "peft"}
    assert command(SCRIPT, **options)[0] == 0
    back, info = read_adapter(tmp_path / "mine", model=model)
    assert adapter_fingerprint(back) == adapter_fingerprint(lora)
    assert (info.base_fingerprint, info.prompt_style) == (model.fingerprint, "alpaca")


@pytest.mark.parametrize("scales", [(0.5,), (1.0, -0.5)])
def test_scaled_loras_and_sums_of_them_go_out_as_one(tmp_path, hf_checkpoint, base_dir, command, scales):
    model = load_base(base_dir)
    loras = [random(LoRA(model.config, r=2 + i, targets=["q", "k", "down"][: 2 + i]), std=0.2) for i in range(2)]
    for i, lora in enumerate(loras):
        save_adapter(tmp_path / f"{i}.safetensors", lora, model, prompt_style="chat")
    terms = list(zip(loras, scales, strict=False))
    given = [f"--adapter_path={tmp_path / str(i)}.safetensors" for i in range(len(terms))]
    given += [f"--adapter_scale={scale}" for scale in scales]
    options = {"checkpoint_dir": base_dir, "output_dir": tmp_path / "mine", "format": "peft"}
    status, _, err = command(SCRIPT, *given, **options)
    assert status == 0, err
    stock = transformers.AutoModelForCausalLM.from_pretrained(hf_checkpoint)
    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(stock, tmp_path / "mine")(IDS).logits
    torch.testing.assert_close(theirs, model(IDS, WeightedSum(*terms)), atol=1e-4, rtol=0)


def test_preferences_start_from_a_folder_of_peft(tmp_path, hf_checkpoint, base_dir):
    save_with_peft(hf_checkpoint, tmp_path, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    start = read_policy_and_reference(base_dir, tmp_path, None, None, None)
    assert (start.policy.method, start.reference.method) == ("lora", "lora")
    assert start.policy is not start.reference


def test_an_older_file_of_tensors_is_read(tmp_path, hf_checkpoint, base_dir):
    expected = save_with_peft(hf_checkpoint, tmp_path, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    both = adapter_file(tmp_path)
    torch.save(load_file(both), tmp_path / "adapter_model.bin")
    assert adapter_file(tmp_path) == both
    both.unlink()
    model = load_base(base_dir)
    torch.testing.assert_close(model(IDS, read_adapter(tmp_path, model=model)[0]), expected, atol=1e-4, rtol=0)


REFUSED = {
    "DoRA": ({"use_dora": True}, "use_dora is 'True'"),
    "a bias": ({"bias": "lora_only"}, "bias is 'lora_only', expected one of none"),
    "ranks": ({"rank_pattern": {"layers.0.self_attn.q_proj": 3}}, "rank_pattern"),
    "PiSSA": ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
    "the head": ({"target_modules": ["q_proj", "lm_head"]}, r"holds base_model.model.(lm_head|model.embed_tokens)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_pefts_lora_can_beyond_ours_is_refused(tmp_path, hf_checkpoint, base_dir, name):
    changes, message = REFUSED[name]
    save_with_peft(hf_checkpoint, tmp_path, peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **changes}))
    with pytest.raises(ValueError, match=message):
        read_adapter(tmp_path, model=load_base(base_dir))


def test_refusals(tmp_path, hf_checkpoint, base_dir, tiny_model):
    save_with_peft(hf_checkpoint, tmp_path / "beft", peft.BeftConfig(target_modules=["o_proj", "v_proj"]))
    model = load_base(base_dir)
    with pytest.raises(ValueError, match=r"_proj.beft_bias, .*which adapters of this project do not have"):
        read_adapter(tmp_path / "beft", model=model)
    save_with_peft(hf_checkpoint, tmp_path / "ia3", peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    with pytest.raises(ValueError, match="peft_type is 'IA3'; PEFT's LORA and BEFT"):
        read_adapter(tmp_path / "ia3", model=model)
    save_with_peft(hf_checkpoint, tmp_path / "o", peft.BeftConfig(target_modules=["o_proj"]))
    with pytest.raises(ValueError, match="only with its base model"):
        read_adapter(tmp_path / "o")
    config = transformers.LlamaConfig(**{**json.loads((hf_checkpoint / "config.json").read_text()), "hidden_size": 48})
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "wide")
    save_with_peft(tmp_path / "wide", tmp_path / "other", peft.BeftConfig(target_modules=["o_proj"]))
    with pytest.raises(ValueError, match=r"has shape \(1, 48\), the configuration expects \(1, 32\)"):
        read_adapter(tmp_path / "other", model=model)


def test_what_peft_cannot_hold_is_refused(tmp_path, base_dir, command):
    model, options = load_base(base_dir), {"checkpoint_dir": base_dir, "format": "peft", "output_dir": tmp_path / "x"}
    for name, adapter, more, message in (
        ("longer", random_aligner(model.config, 2), {}, "a prefix of several tokens"),
        ("typed", random_aligner(model.config, 1), {"dtype": "bfloat16"}, "always writes float32: leave out --dtype"),
        ("nothing", Bias(model.config), {}, "adds nothing"),
    ):
        save_adapter(tmp_path / f"{name}.safetensors", adapter, model)
        status, _, err = command(SCRIPT, **options, **more, adapter_path=tmp_path / f"{name}.safetensors")
        assert (status, message in err) == (1, True), err
    save_adapter(tmp_path / "lora.safetensors", random(LoRA(model.config)), model)
    both = [f"--adapter_path={tmp_path / name}.safetensors" for name in ("typed", "lora")]
    status, _, err = command(SCRIPT, *both, **options)
    assert (
        status,
        "changes weights, as a LoRA does; scripts/export_hf_checkpoint.py --format transformers" in err,
    ) == (
        1,
        True,
    )
    status, _, err = command(SCRIPT, **options)
    assert (status, "without its base model" in err) == (1, True)
    assert not (tmp_path / "x").exists()


def test_verify_export(tmp_path, hf_checkpoint, base_dir, command):
    model, file = load_base(base_dir), tmp_path / "a.safetensors"
    save_adapter(file, random_aligner(model.config, 1, init_std=0.5), model, prompt_style="chat")
    load_script(SCRIPT).main(tmp_path / "mine", base_dir, [file], format="peft")
    options = {"export_path": tmp_path / "mine", "checkpoint_dir": base_dir, "adapter_path": file}
    status, out, err = command("scripts/verify_export.py", **options, peft_base=hf_checkpoint)
    assert (status, out.startswith("the same")) == (0, True), err
