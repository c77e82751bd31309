"""Exports, held against transformers and PEFT with their own loading, attention and generation."""

import json
import re
import shutil
import sys

import gguf
import numpy as np
import peft
import pytest
import safetensors.torch
import torch
import transformers
from conftest import load_script, make_hf_checkpoint, random_aligner
from test_convert import VARIANTS, bpe_fields, write_gguf

from lit_llama.adapters import load_adapter, save_adapter
from lit_llama.checkpoint import load_base, read_config
from lit_llama.combine import WeightedSum
from lit_llama.formats import hf_export
from lit_llama.generation import generate
from lit_llama.lora import LoRA
from lit_llama.prompts import prompt_style
from lit_llama.seam import PROJECTIONS
from lit_llama.tokenizer import Tokenizer

SCRIPT = "scripts/export_hf_checkpoint.py"
export = load_script(SCRIPT)
convert = load_script("scripts/convert_hf_checkpoint.py")
HEADS = {
    "multi-head": {"num_key_value_heads": 4},
    "grouped": {"num_key_value_heads": 2, "tie_word_embeddings": False, "head_dim": 16},
}


@pytest.fixture(scope="module", params=HEADS)
def base(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    convert.main(make_hf_checkpoint(folder / "hf", **HEADS[request.param]), folder / "base")
    return folder / "base"


def save_aligner(path, base, length, start_layer=1):
    """An Aligner that changes much."""
    model = load_base(base)
    save_adapter(path, random_aligner(model.config, length, start_layer, init_std=0.5), model, prompt_style="chat")
    return path


def save_lora(path, base, targets):
    model = load_base(base)
    torch.manual_seed(0)
    lora = LoRA(model.config, r=4, alpha=8, targets=targets)
    for parameter in lora.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    save_adapter(path, lora, model, prompt_style="chat")
    return path


def assert_same(theirs, base, adapter):
    """Logits of a padded batch, and greedy tokens through their cache."""
    model = load_base(base)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 390, (2, 40), generator=generator)
    with torch.no_grad():
        ours = model(ids, adapter)
        torch.testing.assert_close(theirs(ids).logits, ours, atol=1e-4, rtol=0)
        if adapter is not None:
            assert (ours - model(ids)).abs().max() > 0.1
    padded = torch.cat([torch.cat([torch.zeros(1, 6, dtype=torch.long), ids[:1, :6]], dim=1), ids[1:, :12]])
    mask = torch.ones_like(padded)
    mask[0, :6] = 0
    found = theirs.generate(
        padded, attention_mask=mask, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    expected = generate(model, [ids[0, :6].tolist(), ids[1, :12].tolist()], 20, adapter=adapter)
    assert found[:, 12:].tolist() == expected


def load_exported(folder):
    config = json.loads((folder / "config.json").read_text())
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code="auto_map" in config)
    assert type(model).__name__ == config["architectures"][0]
    return model


@pytest.mark.parametrize("variant", VARIANTS)
def test_without_an_adapter_it_is_the_inverse_of_the_conversion(tmp_path, variant):
    source = make_hf_checkpoint(tmp_path / "hf", **VARIANTS[variant])
    convert.main(source, tmp_path / "base")
    export.main(tmp_path / "export", checkpoint_dir=tmp_path / "base")
    expected, found = ({
        name: tensor
        for file in folder.glob("*.safetensors")
        for name, tensor in safetensors.torch.load_file(file).items()
    } for folder in (source, tmp_path / "export"))  # fmt: skip
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert_same(load_exported(tmp_path / "export"), tmp_path / "base", None)
    convert.main(tmp_path / "export", tmp_path / "again" / "base")
    assert read_config(tmp_path / "again" / "base") == read_config(tmp_path / "base")


def test_shards_and_dtype(tmp_path, base, monkeypatch):
    write = hf_export.write_weights
    monkeypatch.setattr(hf_export, "write_weights", lambda *args: write(*args, shard_bytes=20_000))
    export.main(tmp_path / "export", checkpoint_dir=base, dtype="bfloat16")
    assert len(list((tmp_path / "export").glob("model-*.safetensors"))) > 2
    assert load_exported(tmp_path / "export").dtype == torch.bfloat16


def test_the_tokenizer_comes_along(tmp_path, base):
    """And where the base has no generation_config.json, one that knows where answers end."""
    shutil.copytree(base, tmp_path / "base", ignore=lambda *_: {"generation_config.json"})
    export.main(tmp_path / "export", checkpoint_dir=tmp_path / "base")
    found = transformers.AutoTokenizer.from_pretrained(tmp_path / "export")
    expected = transformers.AutoTokenizer.from_pretrained(base.parent / "hf")
    messages = [{"role": "user", "content": "Hello, you 12"}]
    for tokenize in (True, False):
        one, other = (
            each.apply_chat_template(messages, tokenize=tokenize, add_generation_prompt=True)
            for each in (found, expected)
        )
        assert one == other
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "export")
    assert generation.eos_token_id == [expected.convert_tokens_to_ids("<|end|>")]


@pytest.mark.parametrize("length", [1, 3])
def test_an_aligner(tmp_path, base, length):
    """Of one token it is a stock LlamaForCausalLM with biases."""
    file = save_aligner(tmp_path / "a.safetensors", base, length)
    export.main(tmp_path / "export", checkpoint_dir=base, adapter_path=[file])
    model = load_exported(tmp_path / "export")
    assert (type(model) is transformers.LlamaForCausalLM) == (length == 1)
    assert_same(model, base, load_adapter(file))


def test_a_trained_aligner(tmp_path, base_dir, aligner_path):
    export.main(tmp_path / "export", checkpoint_dir=base_dir, adapter_path=[aligner_path])
    with torch.no_grad():
        ids = torch.randint(4, 390, (2, 40))
        theirs = load_exported(tmp_path / "export")(ids).logits
        torch.testing.assert_close(theirs, load_base(base_dir)(ids, load_adapter(aligner_path)), atol=1e-4, rtol=0)


def test_several_scaled_at_once(tmp_path, base):
    """One token, five and two, from different layers on, and a LoRA: biases, prefixes and merged weights."""
    files = [save_aligner(tmp_path / f"{n}.safetensors", base, n, start_layer=n % 3) for n in (1, 5, 2)]
    files.append(save_lora(tmp_path / "lora.safetensors", base, ["q", "v", "o"]))
    scales = [0.5, 1.0, -0.7, 0.3]
    export.main(tmp_path / "export", checkpoint_dir=base, adapter_path=files, adapter_scale=scales)
    adapter = WeightedSum(*((load_adapter(file), scale) for file, scale in zip(files, scales, strict=True)))
    assert_same(load_exported(tmp_path / "export"), base, adapter)


@pytest.mark.parametrize("targets", [["q", "v"], list(PROJECTIONS)])
def test_a_lora_is_merged_or_pefts(tmp_path, base, targets):
    file = save_lora(tmp_path / "lora.safetensors", base, targets)
    export.main(tmp_path / "merged", checkpoint_dir=base, adapter_path=[file])
    assert_same(load_exported(tmp_path / "merged"), base, load_adapter(file))
    export.main(tmp_path / "peft", checkpoint_dir=base, adapter_path=[file], format="peft")
    stock = transformers.AutoModelForCausalLM.from_pretrained(base.parent / "hf")
    assert_same(peft.PeftModel.from_pretrained(stock, tmp_path / "peft"), base, load_adapter(file))


@pytest.mark.parametrize("kind", ["transformers", "peft"])
@pytest.mark.parametrize("style", ["chat", "alpaca", "hh"])
def test_the_readmes_example_answers_as_we_do(tmp_path, base, command, monkeypatch, capsys, kind, style):
    model, tokenizer, file = load_base(base), Tokenizer(base), tmp_path / "adapter.safetensors"
    save_lora(file, base, ["q", "o"]) if kind == "peft" else save_aligner(file, base, 1)
    adapter = load_adapter(file)
    save_adapter(file, adapter, model, prompt_style=style)
    hub_name = str(base.parent / "hf")
    options = {"checkpoint_dir": base, "adapter_path": file, "output_dir": tmp_path / "mine", "base_name": hub_name}
    status, _, err = command(SCRIPT, **options, format=kind)
    assert status == 0, err
    text = (tmp_path / "mine" / "README.md").read_text()
    assert hub_name in text
    if kind == "peft":
        assert text.startswith(f"---\nbase_model: {hub_name}\nlibrary_name: peft\n---\n")
        settings = json.loads((tmp_path / "mine" / "adapter_config.json").read_text())
        assert settings["base_model_name_or_path"] == hub_name
    [code] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(code.replace("max_new_tokens=256", "max_new_tokens=8"), {})
    ids = tokenizer.encode(prompt_style(style, tokenizer).prompt("Name three rivers."), bos=tokenizer.adds_bos)
    [answer] = generate(model, [ids], 8, adapter=adapter, stop_ids=tokenizer.stop_ids)
    assert capsys.readouterr().out == tokenizer.decode(answer) + "\n"


def test_what_cannot_be_exported_is_refused(tmp_path, base, base_dir, command):
    file = save_aligner(tmp_path / "a.safetensors", base, 1)
    for more, message in (
        ({"checkpoint_dir": base_dir}, "was trained on|was made for another base"),
        ({"checkpoint_dir": base, "adapter_scale": "0.5, 2"}, "adapter_scale"),
    ):
        status, _, err = command(SCRIPT, aligner_path=file, output_dir=tmp_path / "export", **more)
        assert status in (1, 2)
        assert re.search(message, err)
        assert not (tmp_path / "export").exists()
    status, _, err = command(
        SCRIPT,
        "--aligner_scale=1",
        "--aligner_scale=2",
        aligner_path=file,
        checkpoint_dir=base,
        output_dir=tmp_path / "x",
    )
    assert (status, "2 scales for 1 adapters" in err) == (1, True)


def test_verify_export(tmp_path, base, command):
    file = save_aligner(tmp_path / "a.safetensors", base, 1)
    lora = save_lora(tmp_path / "l.safetensors", base, ["q"])
    export.main(tmp_path / "export", checkpoint_dir=base, adapter_path=[file])
    export.main(tmp_path / "peft", checkpoint_dir=base, adapter_path=[lora], format="peft")
    verify = "scripts/verify_export.py"
    status, out, _ = command(verify, export_path=tmp_path / "export", checkpoint_dir=base, aligner_path=file)
    assert status == 0
    assert re.match(r"the same; 4 prompts: (\d+) of \1 greedy tokens the same", out)
    status, _, err = command(verify, export_path=tmp_path / "export", checkpoint_dir=base)
    assert (status, "is not what" in err) == (1, True)
    options = {"export_path": tmp_path / "peft", "checkpoint_dir": base, "aligner_path": lora}
    assert command(verify, **options, peft_base=base.parent / "hf")[0] == 0
    status, _, err = command(verify, **options)
    assert (status, "give its base" in err) == (1, True)


def test_verify_export_needs_vllm_where_it_says(tmp_path, base, command):
    options = {"export_path": tmp_path / "export", "checkpoint_dir": base, "engine": "vllm"}
    export.main(tmp_path / "export", checkpoint_dir=base)
    status, _, err = command("scripts/verify_export.py", **options)
    assert (status, "--engine vllm and --vllm_python" in err) == (1, True)
    status, _, err = command("scripts/verify_export.py", **options, vllm_python=sys.executable, max_new_tokens=2)
    assert (status, "cannot read" in err, "No module named 'vllm'" in err) == (1, True, True)


@pytest.mark.parametrize("quantization", [None, gguf.GGMLQuantizationType.Q8_0])
def test_gguf(tmp_path, quantization):
    """The copy has the source's bytes, and biases with which transformers computes what we do."""
    source = make_hf_checkpoint(tmp_path / "hf")
    path, output = tmp_path / "base.gguf", tmp_path / "folded.gguf"
    write_gguf(path, source, bpe_fields(source), quantization)
    load_script("scripts/convert_gguf_checkpoint.py").main(path, tmp_path / "base")
    files = [save_aligner(tmp_path / "a.safetensors", tmp_path / "base", 1)]
    files.append(save_aligner(tmp_path / "b.safetensors", tmp_path / "base", 1, start_layer=2))
    script = load_script("scripts/export_gguf.py")
    script.main(path, output, adapter_path=files, adapter_scale=[1.0, 0.5])

    before, after = gguf.GGUFReader(path), gguf.GGUFReader(output)
    for name, field in before.fields.items():
        if not name.startswith("GGUF.") and name != "general.name":
            assert (after.fields[name].types, after.fields[name].contents()) == (field.types, field.contents())
    assert after.fields["general.name"].contents() == "base folded"  # after the files, the source has no name
    tensors = {tensor.name: tensor for tensor in after.tensors}
    for tensor in before.tensors:
        copy = tensors.pop(tensor.name)
        assert (copy.tensor_type, copy.shape.tolist()) == (tensor.tensor_type, tensor.shape.tolist())
        assert copy.data.tobytes() == tensor.data.tobytes()
    assert list(tensors) == [f"blk.{i}.attn_output.bias" for i in range(4)]

    model = transformers.AutoModelForCausalLM.from_pretrained(source, attention_bias=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and quantization is not None:
                packed = gguf.quantize(parameter.numpy(), quantization)
                parameter.copy_(torch.tensor(gguf.dequantize(packed, quantization)))
            elif name.endswith("bias"):
                parameter.zero_()
        for layer, tensor in zip(model.model.layers, tensors.values(), strict=True):
            assert tensor.data.dtype == np.float32
            layer.self_attn.o_proj.bias.copy_(torch.tensor(tensor.data))
    adapter = WeightedSum((load_adapter(files[0]), 1.0), (load_adapter(files[1]), 0.5))
    assert_same(model, tmp_path / "base", adapter)


def test_gguf_refusals(tmp_path, command):
    source = make_hf_checkpoint(tmp_path / "hf")
    path, output = tmp_path / "base.gguf", tmp_path / "folded.gguf"
    write_gguf(path, source, bpe_fields(source))
    load_script("scripts/convert_gguf_checkpoint.py").main(path, tmp_path / "base")
    one, two = (save_aligner(tmp_path / f"{n}.safetensors", tmp_path / "base", n) for n in (1, 2))
    lora = save_lora(tmp_path / "lora.safetensors", tmp_path / "base", ["q"])
    script = "scripts/export_gguf.py"
    status, _, err = command(script, gguf_path=path, output_path=output, aligner_path=two)
    assert (status, "this is a prefix of several tokens" in err, output.exists()) == (1, True, False)
    status, _, err = command(script, gguf_path=path, output_path=output, aligner_path=lora)
    assert (status, "this is one that changes weights, as a LoRA does" in err) == (1, True)
    assert command(script, gguf_path=path, output_path=output, aligner_path=one)[0] == 0
    content = output.read_bytes()
    options = {"gguf_path": path, "output_path": output, "aligner_path": one, "aligner_scale": 0.5}
    status, _, err = command(script, **options)
    assert (status, "--overwrite" in err, output.read_bytes()) == (1, True, content)
    assert (
        command(
            script, "--overwrite=true", "--aligner_scale=0.5", gguf_path=path, output_path=output, aligner_path=one
        )[0]
        == 0
    )
    assert output.read_bytes() != content
    options |= {"output_path": tmp_path / "named.gguf", "name": "Captain Salt"}
    assert command(script, **options)[0] == 0
    assert gguf.GGUFReader(tmp_path / "named.gguf").fields["general.name"].contents() == "Captain Salt"
    status, _, err = command(script, gguf_path=output, output_path=tmp_path / "x.gguf", aligner_path=one)
    assert (status, "whose weights are not those of" in err) == (1, True)  # they have the Aligner in them
