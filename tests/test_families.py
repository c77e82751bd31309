"""Each family of models, tiny and random, held against transformers' own class of it."""

import functools
import json
import warnings

import pytest
import safetensors.torch
import torch
import transformers
from conftest import FAMILIES, SPECIAL_TOKENS, load_script, make_hf_checkpoint, random_aligner
from test_packing import random_examples

from lit_llama.adapters import METHODS, save_adapter
from lit_llama.base import open_base
from lit_llama.checkpoint import load_base
from lit_llama.data import collate
from lit_llama.formats.hf import config_from_hf
from lit_llama.generation import generate
from lit_llama.lora import LoRA
from lit_llama.losses import response_logprobs
from lit_llama.seam import PROJECTIONS
from lit_llama.tuning import train

convert = load_script("scripts/convert_hf_checkpoint.py")
export = load_script("scripts/export_hf_checkpoint.py")
IDS = torch.randint(4, 390, (2, 40), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory):
    """As transformers saves it."""
    return make_hf_checkpoint(tmp_path_factory.mktemp(family) / "hf", model_type=family, **FAMILIES[family])


@torch.no_grad()
def logits_of(folder):
    """Of transformers' class, which must be a stock one unless the folder has code."""
    config = json.loads((folder / "config.json").read_text())
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code="auto_map" in config)
    assert type(model).__name__ == config["architectures"][0]
    return model(IDS).logits


same = functools.partial(torch.testing.assert_close, atol=1e-4, rtol=0)


def test_in_place_converted_and_exported(folder, tmp_path):
    """The numbers are transformers', and the fingerprint is one and the same."""
    expected, ours = logits_of(folder), load_base(folder)
    same(ours(IDS), expected)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert all(not name.endswith("bias") or p.abs().max() > 0.1 for name, p in theirs.named_parameters())
    found = theirs.generate(IDS[:1, :8], max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert generate(ours, IDS[:1, :8].tolist(), 24) == found[:, 8:].tolist()
    convert.main(folder, tmp_path / "base")
    for name, base in (("one", folder), ("two", tmp_path / "base")):
        export.main(tmp_path / name, checkpoint_dir=base)
        same(logits_of(tmp_path / name), expected)
    for again in (tmp_path / "base", tmp_path / "one", tmp_path / "two"):
        model = load_base(again)
        same(model(IDS), expected)
        assert model.fingerprint == ours.fingerprint


def test_a_trained_aligner_folds(folder, family, tmp_path):
    """Three steps, then one token in a stock class, and two in a class with prefixes."""
    base, classes = open_base(folder), {"qwen3": "Qwen3", "smollm3": "SmolLM3"}
    pairs = [(f"Count to {n}.", " ".join(map(str, range(n)))) for n in range(1, 9)]
    for length in (1, 2):
        aligner = random_aligner(base.model.config, length)
        train(base, aligner, pairs, steps=3, learning_rate=0.1)
        save_adapter(tmp_path / f"{length}.safetensors", aligner, base, prompt_style="chat")
        export.main(tmp_path / str(length), checkpoint_dir=folder, adapter_path=[tmp_path / f"{length}.safetensors"])
        ours = base.model(IDS, aligner)
        assert (ours - base.model(IDS)).abs().max() > 0.1
        same(logits_of(tmp_path / str(length)), ours)
        if length == 1:
            same(load_base(tmp_path / "1")(IDS), ours)
        [name] = json.loads((tmp_path / str(length) / "config.json").read_text())["architectures"]
        assert name == f"{'Prefix' * (length > 1)}{classes.get(family, 'Llama')}ForCausalLM"


def test_a_lora_merges(folder, tmp_path):
    model = load_base(folder)
    torch.manual_seed(0)
    lora = LoRA(model.config, r=4, alpha=8, targets=list(PROJECTIONS))
    for parameter in lora.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    save_adapter(tmp_path / "lora.safetensors", lora, model)
    export.main(tmp_path / "export", checkpoint_dir=folder, adapter_path=[tmp_path / "lora.safetensors"])
    assert (model(IDS, lora) - model(IDS)).abs().max() > 0.1
    same(logits_of(tmp_path / "export"), model(IDS, lora))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains(folder, method):
    """From the base's own loss, bit for bit, to a lower one; the gradient of a preference is there as well."""
    base = open_base(folder)
    adapter = METHODS[method](base.model.config)
    assert torch.equal(base.model(IDS, adapter), base.model(IDS))
    batch = collate(random_examples([9, 20]))
    pairs = [("Name a river.", "The Rhine, matey!"), ("Name a sea.", "The Baltic, matey!")]
    before = response_logprobs(base.model, None, batch)
    train(base, adapter, pairs * 4, steps=3, batch_size=8, learning_rate=0.03, validation_share=0)
    policy = response_logprobs(base.model, adapter, batch)
    torch.nn.functional.logsigmoid(0.1 * (policy - before)[0] - 0.1 * (policy - before)[1]).backward()
    assert all(parameter.grad.isfinite().all() for parameter in adapter.parameters())


SIZES = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "gemma2"}, "model_type is 'gemma2'.*Llama 3.2, Qwen3 and SmolLM3 have models of its sizes"),
        ({"model_type": "llama4_text"}, "model_type is 'llama4_text'.*Llama 3.1, 3.2 and 3.3 are dense"),
        ({"model_type": "qwen3_moe"}, "model_type is 'qwen3_moe'.*dense models, such as Qwen3-8B"),
        ({"model_type": "mixtral"}, "model_type is 'mixtral'.*mixture of experts"),
        ({"model_type": "qwen2_5_vl"}, "model_type is 'qwen2_5_vl'.*models of text alone"),
        ({"model_type": "gpt2"}, "model_type is 'gpt2'.*possible are llama, mistral, qwen2, qwen3"),
        ({"model_type": ["qwen2"]}, "model_type is"),
        ({"model_type": "qwen2", "final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0.*without softcaps"),
        ({"model_type": "mistral", "num_local_experts": 8}, "num_local_experts is 8.*dense models"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 64, "max_window_layers": 4},
            "use_sliding_window is true.*set it to false in that file for texts of at most 64 tokens",
        ),
        (
            {"model_type": "qwen3", "layer_types": ["full_attention", "sliding_attention"] * 4},
            "layer_types has 'sliding_attention'.*can be opened",
        ),
        (
            {"model_type": "qwen2", "rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            "rope_scaling is of type 'yarn'.*take it out of that file",
        ),
        (
            {"model_type": "phi3", "rope_scaling": {"type": "longrope"}},
            r"'longrope'.*Phi-4",
        ),
        (
            {"model_type": "phi3", "rope_parameters": {"partial_rotary_factor": 0.75}},
            "partial_rotary_factor is 0.75",
        ),
        ({"model_type": "internlm3", "qkv_bias": True, "bias": True}, "bias is True.*without a bias in the MLP"),
        (
            {"model_type": "smollm3", "no_rope_layers": [1, 0]},
            "no_rope_layers has 2 entries, expected one for each",
        ),
        ({"model_type": "smollm3", "num_hidden_layers": 2**31}, "num_hidden_layers is 2147483648"),
    ],
)
def test_refused_models_name_the_field_and_what_can_be_used_instead(fields, message):
    with pytest.raises(ValueError, match=rf"config\.json: .*{message}"):
        config_from_hf({**SIZES, **fields}, "x")


def test_what_config_json_may_leave_out():
    """As transformers' own configurations fill it in."""
    for model_type in FAMILIES:
        theirs = transformers.AutoConfig.for_model(model_type, **SIZES)
        with warnings.catch_warnings(record=True):  # a sliding window
            ours = config_from_hf({**SIZES, "model_type": model_type}, "x")
            full = config_from_hf(theirs.to_dict(), "x")
        assert ours == full
    assert config_from_hf({**SIZES, "model_type": "smollm3"}, "x").unrotated_layers == (3, 7)


def test_dynamic_rotary_is_plain_within_the_context(tmp_path):
    """InternLM3's; and its biases as its own code has them, which is where Qwen2's are."""
    rope = {"rope_type": "dynamic", "factor": 6.0, "rope_theta": 5e5}
    source = make_hf_checkpoint(tmp_path / "hf", model_type="qwen2", rope_parameters=rope)
    ids = torch.randint(4, 390, (1, 256))
    expected = transformers.AutoModelForCausalLM.from_pretrained(source)(ids).logits
    config = json.loads((source / "config.json").read_text())
    config |= {"model_type": "internlm3", "qkv_bias": True, "head_dim": 8}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="rope_scaling is of type 'dynamic', which changes nothing up to"):
        same(load_base(source)(ids), expected)


def test_a_sliding_window_is_the_longest_context(command, tmp_path):
    source = make_hf_checkpoint(tmp_path / "hf", model_type="phi3", sliding_window=20, **SPECIAL_TOKENS)
    status, _, err = command("generate/base.py", checkpoint_dir=source, prompt="Hi", max_new_tokens=2)
    assert (status, err.count("sliding_window is 20, and up to that many tokens")) == (0, 1)
    same(load_base(source)(IDS[:, :20]), logits_of(source)[:, :20])
    with pytest.raises(ValueError, match="window of 20"):
        load_base(source)(IDS)


def test_a_folder_with_a_tensor_too_few_or_too_many(tmp_path):
    source = make_hf_checkpoint(tmp_path / "hf", model_type="qwen2")
    file = source / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    bias = tensors.pop("model.layers.1.self_attn.k_proj.bias")
    safetensors.torch.save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"it lacks model\.layers\.1\.self_attn\.k_proj\.bias"):
        load_base(source)
    safetensors.torch.save_file({**tensors, "model.layers.1.self_attn.k_proj.bias": bias[1:]}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"k_proj\.bias.* do not make|c_attn\.bias has shape"):
        load_base(source)
    config = json.loads((source / "config.json").read_text()) | {"model_type": "llama"}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"has unknown model\.layers\.0\.self_attn\.k_proj\.bias"):
        load_base(source)


def test_bin_files_in_place(tmp_path):
    source = make_hf_checkpoint(tmp_path / "hf", model_type="qwen3", **FAMILIES["qwen3"])
    expected = load_base(source)
    torch.save(safetensors.torch.load_file(source / "model.safetensors"), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    assert load_base(source).fingerprint == expected.fingerprint
    same(load_base(source)(IDS), expected(IDS))


@pytest.mark.parametrize("bits", ["nf4", "int8", "int8-fast", "int4-fast"])
def test_fewer_bits_keep_biases_and_norms(tmp_path, bits):
    """Biases of the size of the outputs, so that the logits without them are others altogether."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "attention_bias": True, "head_dim": 32}
    source = make_hf_checkpoint(tmp_path / "hf", model_type="qwen3", **sizes)
    precision = "32-true" if bits in ("nf4", "int8") else "bf16-true"
    whole, fewer = (open_base(source, precision=precision, quantize=one).model for one in ("none", bits))
    for name, parameter in whole.named_parameters():
        if parameter.dim() == 1:
            kept = dict([*fewer.named_parameters(), *fewer.named_buffers()])[name]
            assert torch.equal(kept, parameter), name
    both = torch.stack([model(IDS).float().flatten() for model in (whole, fewer)])
    assert 0.9 < torch.corrcoef(both)[0, 1] < 1


def test_scripts_take_a_folder_as_it_is(command, tmp_path):
    """Prepare, train, generate, evaluate; the adapter belongs to the converted base as well."""
    folder = make_hf_checkpoint(tmp_path / "hf", model_type="qwen2")
    rows = [{"instruction": f"Count to {n}.", "output": " ".join(map(str, range(n)))} for n in range(1, 21)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))

    def done(script, **options):
        status, out, err = command(script, **options)
        assert status == 0, err
        return out

    preparing = {"data_path": tmp_path / "rows.json", "output_dir": tmp_path / "data", "prompt_style": "chat"}
    done("scripts/prepare_alpaca.py", checkpoint_dir=folder, validation_share=0.2, **preparing)
    training = {"data_dir": tmp_path / "data", "out_dir": tmp_path / "run", "max_steps": 2, "aligner_length": 1}
    done("finetune/aligner.py", checkpoint_dir=folder, batch_size=2, micro_batch_size=2, warmup_steps=1, **training)
    convert.main(folder, tmp_path / "lit" / "hf")
    found = []
    for base in (folder, tmp_path / "lit" / "hf"):
        options = {"checkpoint_dir": base, "adapter_path": tmp_path / "run"}
        texts = [done("generate/aligner.py", prompt="Count to 3.", max_new_tokens=8, **options)]
        texts.append(done("evaluate/perplexity.py", data_dir=tmp_path / "data", **options))
        export.main(tmp_path / "export" / base.parent.name, options["checkpoint_dir"], [options["adapter_path"]])
        texts.append(done("scripts/verify_export.py", export_path=tmp_path / "export" / base.parent.name, **options))
        found.append(texts)
    assert found[0] == found[1]
