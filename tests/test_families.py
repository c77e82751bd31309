"""Each family of models, tiny and random, held against transformers' own class of it."""

import functools
import json

import pytest
import torch
import transformers
from conftest import FAMILIES, load_script, make_hf_checkpoint, random_aligner
from test_packing import random_examples

from lit_llama.adapters import METHODS, save_adapter
from lit_llama.base import open_base
from lit_llama.checkpoint import load_base
from lit_llama.data import collate
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
