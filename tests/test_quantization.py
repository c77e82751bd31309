"""A base in 4 or 8 bits, held against the float32 model that its weights stand for."""

import json
import sys

import bitsandbytes
import pytest
import torch
from conftest import load_script, make_hf_checkpoint
from test_packing import loss_and_gradients, random_examples

from lit_llama.adapters import adapter_info, save_adapter
from lit_llama.aligner import Aligner
from lit_llama.base import open_base
from lit_llama.checkpoint import load_base
from lit_llama.data import collate
from lit_llama.evaluation.answers import read_folder
from lit_llama.generation import generate
from lit_llama.losses import supervised_loss


def dequantized(wide_dir, model):
    """The float32 model with the weights that the quantised one has, by bitsandbytes' own functions."""
    reference = load_base(wide_dir)
    for name, layer in model.named_modules():
        if isinstance(layer, bitsandbytes.nn.Linear4bit):
            weight = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        elif isinstance(layer, bitsandbytes.nn.Linear8bitLt):
            weight = bitsandbytes.functional.int8_vectorwise_dequant(layer.weight.CB, layer.weight.SCB)
        else:
            continue
        before = reference.get_submodule(name).weight
        assert 1e-4 < (before - weight).norm() / before.norm() < 0.15
        before.data = weight.float()
    return reference


@pytest.fixture(scope="module")
def wide_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wide")
    make_hf_checkpoint(folder / "hf", hidden_size=64, intermediate_size=128)
    load_script("scripts/convert_hf_checkpoint.py").main(folder / "hf", folder / "base")
    return folder / "base"


@pytest.fixture
def aligner(wide_dir):
    torch.manual_seed(1)
    aligner = Aligner(load_base(wide_dir).config, 2)
    torch.nn.init.normal_(aligner.gates)
    return aligner


@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_numbers_are_those_of_the_quantised_weights(wide_dir, aligner, mode):
    model = load_base(wide_dir, quantize=mode)
    reference = dequantized(wide_dir, model)
    batch = collate(random_examples([9, 30]))
    with torch.no_grad():  # a validation before the first step must change nothing
        supervised_loss(model, aligner, batch)
    expected = loss_and_gradients(reference, aligner, [batch])
    for value, wanted in zip(loss_and_gradients(model, aligner, [batch]), expected, strict=True):
        torch.testing.assert_close(value, wanted, atol=1e-4, rtol=1e-4)
    prompts = [[1, 2, 3], [4]]
    assert generate(model, prompts, 6, adapter=aligner) == generate(reference, prompts, 6, adapter=aligner)


@pytest.mark.parametrize(("mode", "bits"), [("nf4", 4), ("int8", 8)])
def test_weights_take_as_many_bits(wide_dir, mode, bits):
    model, whole = load_base(wide_dir, quantize=mode), load_base(wide_dir)
    for name, layer in whole.transformer.h.named_modules():
        if isinstance(layer, torch.nn.Linear):
            quantized = model.transformer.h.get_submodule(name).weight
            assert quantized.nbytes * 8 == layer.weight.numel() * bits
            assert not quantized.requires_grad
    assert torch.equal(model.transformer.wte.weight, whole.transformer.wte.weight)
    assert model.fingerprint == whole.fingerprint


@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_training_and_generating(command, wide_dir, data_dir, tmp_path, mode):
    options = {"checkpoint_dir": wide_dir, "quantize": mode}
    training = {"data_dir": data_dir, "out_dir": tmp_path, "max_steps": 2, "warmup_steps": 1}
    assert command("finetune/aligner.py", **training, **options)[0] == 0
    answer = {"aligner_path": tmp_path / "aligner.safetensors", "prompt": "Hi", "max_new_tokens": 12}
    status, out, err = command("generate/aligner.py", **answer, **options)
    assert (status, len(out) > 0) == (0, True), err
    assert command("generate/aligner.py", **answer, checkpoint_dir=wide_dir)[1] == out  # as it was trained
    status, _, err = command("finetune/aligner.py", **training, checkpoint_dir=wide_dir, resume="true")
    assert f"--quantize was {mode}, is None" in err


def test_what_cannot_be_quantised_is_refused(command, wide_dir, data_dir, tmp_path, monkeypatch):
    def unsupported(*_):
        raise RuntimeError("no kernel")

    options = {"checkpoint_dir": wide_dir, "data_dir": data_dir, "out_dir": tmp_path / "out"}
    options |= {"quantize": "nf4", "warmup_steps": 1}
    monkeypatch.setattr(bitsandbytes.nn.Params4bit, "to", unsupported)
    status, _, err = command("finetune/aligner.py", **options)
    assert status == 1
    assert "error: bitsandbytes cannot quantise on cpu (no kernel): leave out --quantize" in err
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    status, _, err = command("finetune/aligner.py", **options)
    assert (status, err.splitlines()[-1]) == (1, "error: this needs bitsandbytes: pip install -e '.[quantize]'")
    status, _, err = command("finetune/aligner.py", **(options | {"quantize": "nf3"}))
    assert (status, err) == (2, "error: --quantize nf3: there are 'nf4', 'int8', 'none' (--help lists the options)\n")


@pytest.mark.parametrize("bits", [None, "nf4", "int8"])
def test_the_bits_of_the_base_are_recorded(wide_dir, aligner, tmp_path, bits):
    """Whoever writes the file, so that it can be used on the base that it was trained on."""
    base = open_base(wide_dir, quantize=bits)
    save_adapter(tmp_path / "a.safetensors", aligner, base, hyperparameters={"seed": 1})
    expected = {"seed": 1} | ({"quantize": bits} if bits else {})
    assert adapter_info(tmp_path / "a.safetensors").hyperparameters == expected


def test_too_narrow_for_four_bits(base_dir):
    with pytest.raises(ValueError, match="layers of 32 inputs, nf4 needs a multiple of 64: use int8"):
        load_base(base_dir, quantize="nf4")


def test_evaluations_use_the_bits_and_the_style_of_training(command, wide_dir, aligner, tmp_path):
    """What the adapter's file records holds in every script, as in generate."""
    file, prompts, questions = (tmp_path / "run" / "aligner.safetensors", tmp_path / "p.txt", tmp_path / "q.jsonl")
    training = {"prompt_style": "metamath", "hyperparameters": {"quantize": "nf4"}}
    save_adapter(file, aligner, base=load_base(wide_dir), **training)
    texts = ["One and two.", "The cat sat.", "Three dogs.", "Why?"]
    prompts.write_text("\n".join(texts))
    questions.write_text("".join(json.dumps({"split": "test", "question": text}) + "\n" for text in texts))
    sizes = {"checkpoint_dir": wide_dir, "max_new_tokens": 12}
    generated = tmp_path / "generated.jsonl"
    options = {"adapter_path": file, "prompts_file": prompts, "output_file": generated, **sizes}
    assert command("generate/aligner.py", **options)[0] == 0
    expected = [json.loads(line)["response"] for line in generated.read_text().splitlines()]
    save_adapter(tmp_path / "other.safetensors", aligner, base=load_base(wide_dir), prompt_style="metamath")
    options["adapter_path"] = tmp_path / "other.safetensors"
    assert command("generate/aligner.py", **options)[0] == 0
    assert expected != [json.loads(line)["response"] for line in generated.read_text().splitlines()]

    out = tmp_path / "out"
    status, _, err = command("evaluate/vicuna.py", f"--model=run={file}", questions_path=prompts, out_dir=out, **sizes)
    assert status == 0, err
    answers = read_folder(out, ["run"])[1]["run"]
    assert [answers[i][0] for i in range(1, 5)] == expected
    options = {"adapter_path": file.parent, "out_dir": tmp_path / "refusal", "pairs_path": prompts, **sizes}
    status, _, err = command("evaluate/refusal.py", **options)
    assert status == 0, err
    assert json.loads((tmp_path / "refusal" / "report.json").read_text())["models"][1]["answers"] == expected
    options = {"adapter_path": file.parent, "out_dir": tmp_path / "scale", "questions_path": questions, **sizes}
    status, _, err = command("evaluate/scale.py", scale=1.0, **options)
    assert status == 0, err
    assert json.loads((tmp_path / "scale" / "scale.json").read_text())["answers"]["1"] == expected

    both = [f"--adapter_path={file}", f"--adapter_path={tmp_path / 'other.safetensors'}"]
    status, _, err = command("evaluate/side_by_side.py", *both, prompts_file=prompts, out_dir=out, **sizes)
    assert status == 1
    assert "the adapters were trained with different --quantize (" in err
    assert f"{file} (" in err
    assert "): nf4, " in err
