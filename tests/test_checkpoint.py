"""Files: what is written comes back, and what is wrong is refused in one line."""

import json
import shutil
import warnings

import pytest
import torch
from conftest import GOLDEN, ROOT, tiny_config
from safetensors import safe_open
from safetensors.torch import load as safetensors_load
from safetensors.torch import save_file

from lit_llama.adapters import adapter_info, load_adapter, read_adapter, save_adapter
from lit_llama.aligner import Aligner
from lit_llama.base import open_base
from lit_llama.checkpoint import load_base, read_config, verify_base
from lit_llama.config import LLaMAConfig
from lit_llama.lora import LoRA
from lit_llama.model import LLaMA
from lit_llama.tensor_files import TensorFiles

RELEASED = ROOT.parent / "shared" / "released"


class Bomb:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return (open, ("exploded", "w"))


@pytest.fixture
def copied_base(base_dir, tmp_path):
    return shutil.copytree(base_dir, tmp_path / "base")


def test_base_is_frozen_and_in_evaluation_mode(base_dir):
    model = load_base(base_dir)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert (model.dtype, load_base(base_dir, torch.bfloat16).dtype) == (torch.float32, torch.bfloat16)
    assert model.config == read_config(base_dir)


def test_fingerprint_tells_weights_apart_and_not_their_dtype(base_dir, copied_base):
    model = load_base(base_dir)
    assert load_base(base_dir, torch.bfloat16).fingerprint == model.fingerprint
    weights = safetensors_load((copied_base / "model.safetensors").read_bytes())
    save_file({name: tensor.bfloat16() for name, tensor in weights.items()}, copied_base / "model.safetensors")
    assert load_base(copied_base).fingerprint == model.fingerprint
    weights["transformer.h.1.mlp.c_proj.weight"] += 0.1
    save_file(weights, copied_base / "model.safetensors")
    assert load_base(copied_base).fingerprint != model.fingerprint


def test_bare_lit_llama_file(tmp_path, golden_config):
    with pytest.raises(ValueError, match=r"not a Lit-LLaMA file of a known size \(its embedding is \(128, 64\)\)"):
        load_base(GOLDEN / "lit-llama.pth")
    with pytest.raises(ValueError, match="configuration expects"):
        load_base(GOLDEN / "lit-llama.pth", config=LLaMAConfig(**{**golden_config.to_dict(), "vocab_size": 64}))
    with torch.device("meta"):
        model = LLaMA(LLaMAConfig.from_name("7B"))
    weights = {name: torch.zeros(1).expand(tensor.shape) for name, tensor in model.state_dict().items()}
    torch.save(weights, tmp_path / "lit-llama.pth")  # the expanded zeros take no room
    with torch.device("meta"):
        config = load_base(tmp_path / "lit-llama.pth", device="meta").config
    assert (config.n_layer, config.n_head, config.norm_eps, config.block_size) == (32, 32, 1e-5, 2048)


def test_verify_notices_every_changed_byte_that_matters(command, copied_base):
    def verify():
        options = {"checkpoint_dir": copied_base, "prompt": "hi", "max_new_tokens": 1, "prompt_style": "none"}
        return command("generate/base.py", **options, verify="true")

    status, _, err = verify()
    assert (status, "2 files are what the conversion wrote" in err) == (0, True)
    weights, tokenizer, config = (
        copied_base / name for name in ("model.safetensors", "tokenizer.json", "lit_config.json")
    )
    size = weights.stat().st_size
    changed = '"norm_eps": 2e-06'
    for file, old, new in [
        *((weights, at, bytes([weights.read_bytes()[at] ^ 1])) for at in (size // 2, size - 1)),
        (tokenizer, tokenizer.read_text().index("version"), b"V"),
        (config, config.read_text().index('"norm_eps"'), changed.encode()),
    ]:
        good = file.read_bytes()
        file.write_bytes(good[:old] + new + good[old + len(new) :])
        status, out, err = verify()
        assert (status, out, err.count("\n")) == (1, "", 1)
        assert f"{file} is not what the conversion wrote" in err
        file.write_bytes(good)
    weights.rename(copied_base / "gone")
    assert "holds no weights" in verify()[2]


def test_bases_without_a_hash_open_and_say_so(command, copied_base):
    """Those of older conversions; and the name, which a hash does not cover, may be changed."""
    file = copied_base / "lit_config.json"
    content = json.loads(file.read_text())
    content["config"]["name"] = "another"
    file.write_text(json.dumps(content))
    assert verify_base(copied_base) == 2
    del content["sha256"]
    file.write_text(json.dumps(content))
    load_base(copied_base)
    options = {"checkpoint_dir": copied_base, "prompt": "hi", "max_new_tokens": 1, "prompt_style": "none"}
    status, _, err = command("generate/base.py", **options, verify="true")
    assert (status, "warning: " in err, "has no hash to check" in err) == (0, True, True)
    with pytest.warns(UserWarning, match="no hash"):
        assert verify_base(GOLDEN / "lit-llama.pth") == 0
    status, _, err = command("scripts/inspect_adapter.py", adapter_path="x", verify="true")
    assert (status, "give its folder as --checkpoint_dir" in err) == (1, True)


def test_damaged_bases_are_refused(copied_base):
    file = copied_base / "model.safetensors"
    good = file.read_bytes()

    def refused(error, message):
        with pytest.raises(error, match=message):
            load_base(copied_base)

    for bad in (good[: len(good) // 2], good[:4], b"", b'{"weights": [1, 2]}'):
        file.write_bytes(bad)
        refused(ValueError, r"model\.safetensors is not a complete safetensors file")
    file.write_bytes(good)
    weights = safetensors_load(good)
    lacking = dict(weights)
    del lacking["transformer.ln_f.scale"]
    save_file(lacking | {"surprise": torch.zeros(1)}, file)
    refused(ValueError, r"lacks transformer\.ln_f\.scale \(1 in all\) and has unknown surprise")
    save_file(weights | {"transformer.ln_f.scale": torch.ones(7)}, file)
    refused(ValueError, r"transformer\.ln_f\.scale has shape \(7,\), the configuration expects \(32,\)")
    file.unlink()
    refused(FileNotFoundError, "holds no weights")
    (copied_base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    refused(FileNotFoundError, "lacks gone.safetensors")
    (copied_base / "model.safetensors.index.json").write_text("[]")
    refused(ValueError, "expected an object, found")
    (copied_base / "lit_config.json").write_text("{")
    refused(ValueError, r"lit_config\.json, line 1: not JSON")
    (copied_base / "lit_config.json").unlink()
    refused(FileNotFoundError, r"holds no lit_config\.json and no config\.json: give")
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        load_base(copied_base / "nowhere")


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"n_layer": 2**31}, "n_layer is 2147483648, expected a whole number from 1 to 1024"),
        ({"n_layer": 4.0}, "n_layer is 4.0"),
        ({"n_head": True}, "n_head is True"),
        ({"n_head": 0}, "n_head is 0"),
        ({"n_kv_head": 3}, "expected a multiple of n_kv_head"),
        ({"n_embd": None}, "n_embd is None"),
        ({"vocab_size": 10**30}, "vocab_size is 1000000"),
        ({"block_size": [256]}, r"block_size is \[256\]"),
        ({"head_size": 15}, "head_size is 15, expected an even number"),
        ({"norm_eps": "small"}, "norm_eps is 'small', expected a number"),
        ({"norm_eps": float("inf")}, "norm_eps is inf"),
        ({"rope_base": -1}, "rope_base is -1"),
        ({"rope_scaling": [2]}, r"rope_scaling is \[2\], expected an object"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling: .*factor"),
        ({"rope_scaling": {"type": {}, "factor": 2.0}}, "rope_scaling's type is"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "rope_scaling's factor is 0"),
        ({"tie_embeddings": 1}, "tie_embeddings is 1, expected true or false"),
        ({"name": 3}, "name is 3, expected text"),
        ({"qkv_bias": "yes"}, "qkv_bias is 'yes', expected true or false"),
        ({"unrotated_layers": 3}, "unrotated_layers is 3, expected a list"),
        ({"unrotated_layers": [0.5]}, r"unrotated_layers\[0\] is 0.5, expected a whole number"),
        ({"unrotated_layers": [4]}, r"unrotated_layers is \[4\], expected numbers of layers below 4"),
        ({"surprise": 3}, r"has unknown \['surprise'\]"),
    ],
)
def test_odd_values_of_lit_config(copied_base, change, found):
    file = copied_base / "lit_config.json"
    content = json.loads(file.read_text())
    content["config"] |= change
    file.write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match=rf"lit_config\.json: {'model configuration ' * ('surprise' in change)}.*{found}"
    ):
        load_base(copied_base)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("[" * 100_000 + "]" * 100_000, "nested more than 100 deep"),
        ('{"config":' * 100_000 + "1" + "}" * 100_000, "nested more than 100 deep"),
        ('{"config": ' + "[" * 200 + "]" * 200 + "}", "nested more than 100 deep"),
        ('{"config": ' + "9" * 5000 + "}", "too many digits"),
        (" " * 2**26, "expected a file of settings of at most"),
        ('{"config": null}', "lacks config, expected an object"),
        ("3", "expected an object, found 3"),
    ],
    ids=["lists", "objects", "shallower", "digits", "size", "null", "number"],
)
def test_json_of_any_shape_is_refused_in_one_line(copied_base, content, found):
    (copied_base / "lit_config.json").write_text(content)
    with pytest.raises(ValueError, match=rf"lit_config\.json.*{found}"):
        load_base(copied_base)


@pytest.mark.parametrize(
    "weight_map", [3, [], {}, {"a": 3}, {"a": ["x"]}, {"a": None}, {"a": "../a"}, {"a": "/etc/passwd"}]
)
def test_odd_index(copied_base, weight_map):
    (copied_base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json"):
        load_base(copied_base)


@pytest.mark.parametrize("content", ["bomb", "json", "empty", "not tensors", "Repository not found", "Gateway", "no"])
def test_nothing_but_tensors_is_unpickled(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "weights.pth"
    if content == "bomb":
        torch.save({"weight": Bomb()}, file)
    elif content == "json":
        file.write_text('{"weight": [1, 2]}')
    elif content == "empty":
        file.write_bytes(b"")
    elif content == "not tensors":
        torch.save({"weight": [1, 2]}, file)
    else:
        file.write_text(content)
    for load in (load_base, load_adapter):
        with pytest.raises(ValueError, match=r"weights\.pth"):
            load(file)
    assert not (tmp_path / "exploded").exists()


def test_aligner_file_says_what_it_is(tmp_path, tiny_model):
    tiny_model.fingerprint = "f" * 64
    aligner = Aligner(tiny_model.config, 3, 1)
    torch.nn.init.normal_(aligner.gates)
    save_adapter(tmp_path / "a.safetensors", aligner, tiny_model, prompt_style="chat", step=7, validation_loss=0.5)
    loaded = load_adapter(tmp_path / "a.safetensors")
    ids = torch.arange(9)[None]
    assert torch.equal(tiny_model(ids, adapter=loaded), tiny_model(ids, adapter=aligner))
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert set(file.keys()) == {"tokens", "gates"}
        assert json.loads(file.metadata()["config"])["length"] == 3
    info = read_adapter(tmp_path / "a.safetensors", model=tiny_model)[1]
    assert (info.method, info.base_name, info.step, info.validation_loss) == ("aligner", "tiny", 7, 0.5)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_an_opened_base_tells_the_file_its_name_fingerprint_and_prompt_style(tmp_path, base_dir):
    base = open_base(base_dir, prompt_style="metamath")
    save_adapter(tmp_path / "a.safetensors", Aligner(base.model.config, 3, 1), base, step=7)
    info = read_adapter(tmp_path / "a.safetensors", model=base.model)[1]
    assert (info.base_name, info.base_fingerprint) == (base.model.config.name, base.model.fingerprint)
    assert (info.prompt_style, info.step) == ("metamath", 7)
    save_adapter(tmp_path / "b.safetensors", Aligner(base.model.config, 3, 1), base, prompt_style="hh")
    assert adapter_info(tmp_path / "b.safetensors").prompt_style == "hh"


def test_a_run_folder_stands_for_its_adapter(tmp_path, tiny_model):
    save_adapter(tmp_path / "run/aligner.safetensors", Aligner(tiny_model.config, 3, 1), tiny_model, step=7)
    save_adapter(tmp_path / "run/other.safetensors", Aligner(tiny_model.config, 1), tiny_model)
    assert load_adapter(tmp_path / "run").sizes["length"] == 3
    assert read_adapter(tmp_path / "run", model=tiny_model)[1].step == 7
    with pytest.raises(FileNotFoundError, match=r"is a folder and holds no adapter; expected .* aligner\.safetensors"):
        load_adapter(tmp_path)
    save_adapter(tmp_path / "run/lora.safetensors", LoRA(tiny_model.config), tiny_model)
    with pytest.raises(FileNotFoundError, match=r"holds aligner\.safetensors and lora\.safetensors; expected"):
        load_adapter(tmp_path / "run")


def test_adapter_of_another_base(tmp_path, tiny_model):
    file = tmp_path / "a.safetensors"
    save_adapter(file, Aligner(tiny_config(n_embd=64), 1), tiny_model)
    with pytest.raises(ValueError, match=r"made for another base: its n_embd is 64, tiny has 32"):
        read_adapter(file, model=tiny_model)[1]
    tiny_model.fingerprint = "a" * 64
    save_adapter(file, Aligner(tiny_model.config, 1), tiny_model)
    tiny_model.fingerprint = "b" * 64
    with pytest.raises(ValueError, match="--allow_other_base"):
        read_adapter(file, model=tiny_model)[1]
    with pytest.warns(UserWarning, match="whose weights are not those of tiny"):
        read_adapter(file, model=tiny_model, allow_other_base=True)[1]
    tiny_model.fingerprint = "a" * 64
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_adapter(file, model=tiny_model)[1]


def test_what_is_no_aligner_is_refused(tmp_path, base_dir, tiny_model):
    with pytest.raises(ValueError, match="not an adapter: its metadata lack a format_version"):
        load_adapter(base_dir / "model.safetensors")
    with pytest.raises(FileNotFoundError, match=r"gone\.safetensors: no such file"):
        load_adapter(tmp_path / "gone.safetensors")
    file = tmp_path / "a.safetensors"
    save_adapter(file, Aligner(tiny_model.config, 1))
    with safe_open(file, "pt") as handle:
        metadata = handle.metadata()
    tensors = safetensors_load(file.read_bytes())
    save_file(tensors, file, metadata={**metadata, "method": '"lora"'})
    with pytest.raises(ValueError, match=r"config: not that of method 'lora': it lacks .*'r'.* unknown .*'length'"):
        load_adapter(file)
    save_file(tensors, file, metadata={**metadata, "format_version": "99"})
    with pytest.raises(ValueError, match="format_version is 99, this code reads 1"):
        load_adapter(file)
    save_file(tensors, file, metadata={"format_version": "1"})
    with pytest.raises(ValueError, match="lacks method, expected text"):
        load_adapter(file)
    save_file(tensors, file, metadata={**metadata, "config": "{"})
    with pytest.raises(ValueError, match=r"a\.safetensors, config, line 1: not JSON"):
        load_adapter(file)
    save_file({"tokens": tensors["tokens"]}, file, metadata=metadata)
    with pytest.raises(ValueError, match="lacks gates"):
        load_adapter(file)
    save_file({**tensors, "gates": torch.zeros(1, 1)}, file, metadata=metadata)
    with pytest.raises(ValueError, match="gates has shape"):
        load_adapter(file)


def test_authors_format(tmp_path):
    """bfloat16, the gates as (1, nh, 1, 1), the shared tokens repeated under each layer's name."""
    tokens = torch.randn(10, 64).bfloat16()
    tensors = {"global_value_embedding.weight": tokens}
    for layer in (2, 3, 4):
        tensors[f"transformer.h.{layer}.attn.gating_factor"] = torch.full((1, 8, 1, 1), float(layer)).bfloat16()
        tensors[f"transformer.h.{layer}.attn.adapter_wte.weight"] = tokens
    file = tmp_path / "aligner.pth"
    torch.save(tensors, file)
    aligner = load_adapter(file)
    assert aligner.tokens.dtype == torch.float32
    assert torch.equal(aligner.tokens, tokens.float())
    assert torch.equal(aligner.gates, torch.tensor([2.0, 3.0, 4.0])[:, None].expand(3, 8))
    assert adapter_info(file).config == {"n_layer": 5, "n_head": 8, "n_embd": 64, "length": 10, "start_layer": 2}

    torch.save(tensors | {"transformer.h.3.attn.adapter_wte.weight": tokens + 1}, file)
    with pytest.raises(ValueError, match="which an Aligner shares"):
        load_adapter(file)
    torch.save({name: t for name, t in tensors.items() if "h.3." not in name}, file)
    with pytest.raises(ValueError, match=r"consecutive layers, found \[2, 4\]"):
        load_adapter(file)
    torch.save(tensors | {"lm_head.weight": tokens}, file)
    with pytest.raises(ValueError, match=r"unknown lm_head\.weight"):
        load_adapter(file)


@pytest.mark.skipif(not RELEASED.is_dir(), reason="the authors' released adapters are not at hand")
@pytest.mark.parametrize(("pattern", "parameters"), [("aligner1Token*", 5056), ("aligner10*", 41920), ("*DPO*", 5056)])
def test_released_adapters(pattern, parameters):
    [file] = RELEASED.glob(pattern)
    aligner = load_adapter(file)
    assert sum(parameter.numel() for parameter in aligner.parameters()) == parameters
    config = LLaMAConfig.from_name("Llama-2-7B")
    assert aligner.gates.shape == (30, 32)
    assert aligner.gates.abs().mean() > 0
    with torch.device("meta"):
        read_adapter(file, model=LLaMA(config))


def test_the_same_name_in_two_files(tmp_path):
    for name in "ab":
        save_file({"x": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match="x is both in"):
        TensorFiles([tmp_path / "a.safetensors", tmp_path / "b.safetensors"])
