"""What the code wrote before the library got its rooms is still read; tests/legacy/make.py says how it was made."""

import csv
import json
import shutil

import pytest
import torch
from conftest import ROOT, load_script
from safetensors import safe_open

from lit_llama.adapters import adapter_info, load_adapter
from lit_llama.checkpoint import load_base, verify_base
from lit_llama.data import open_data
from lit_llama.generation import generate
from lit_llama.prompts import prompt_style
from lit_llama.tokenizer import Tokenizer

LEGACY = ROOT / "tests" / "legacy"
BASE = LEGACY / "base"
EXPECTED = json.loads((LEGACY / "expected.json").read_text())
METHODS = {"aligner": "aligner", "adapter": "llama_adapter", "lora": "lora", "dpo": "aligner"}  # of each file, today
RUN = {"batch_size": 2, "micro_batch_size": 1, "max_steps": 4, "warmup_steps": 1, "save_interval": 2, "decay": "none"}
RUN |= {"eval_interval": 2, "learning_rate": 0.3, "precision": "32-true", "resume": True}
CLOCK = {"seconds", "tokens_per_second"}


@pytest.fixture(scope="module")
def model():
    return load_base(BASE, torch.float32)


def tensors(file):
    with safe_open(file, "pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118


def test_the_base_computes_what_it_did(model):
    tokenizer = Tokenizer(BASE)
    assert tokenizer.encode(prompt_style("chat", tokenizer).prompt("Count to 3.")) == EXPECTED["ids"]
    with pytest.warns(UserWarning, match="has no hash to check"):
        verify_base(BASE)
    with torch.no_grad():
        logits = model(torch.tensor([EXPECTED["ids"]]))[0, -1]
    torch.testing.assert_close(logits, torch.tensor(EXPECTED["logits"]), atol=1e-4, rtol=1e-4)
    assert generate(model, [EXPECTED["ids"]], 8) == [EXPECTED["answers"]["base"]]


@pytest.mark.parametrize("name", METHODS)
def test_adapters_have_their_values_and_answer_the_same(model, name):
    file = LEGACY / f"{name}.safetensors"
    info, adapter = adapter_info(file), load_adapter(file)
    assert (info.method, info.prompt_style, info.base_name) == (METHODS[name], "chat", "base")
    assert info.base_fingerprint == model.fingerprint
    found = adapter.state_dict()
    assert all(torch.equal(found[key], value) for key, value in tensors(file).items())
    assert generate(model, [EXPECTED["ids"]], 8, adapter=adapter) == [EXPECTED["answers"][name]]


@pytest.mark.parametrize("kind", ["data", "pairs"])
def test_data_sets_are_opened_with_their_hashes(kind):
    header = json.loads((LEGACY / kind / "dataset.json").read_text())
    _, splits = open_data(BASE, LEGACY / kind, 512, header["kind"])
    assert {split.sha256 for split in splits} == {split["sha256"] for split in header["splits"].values()}
    assert [len(split) for split in splits] == [6, 2]


@pytest.mark.parametrize(("script", "name", "data"), [("aligner", "aligner", "data"), ("aligner_dpo", "dpo", "pairs")])
def test_runs_are_resumed_to_the_end_that_they_had(tmp_path, script, name, data):
    """Not to the bit: other processors round otherwise."""
    out_dir = shutil.copytree(LEGACY / name, tmp_path / "out")
    options = {"aligner_length": 2}
    if name == "dpo":
        options = {"adapter_path": LEGACY / "aligner.safetensors", "cache_reference": True}
        data_dir = shutil.copytree(LEGACY / data, tmp_path / "data")
    else:
        data_dir = LEGACY / data
    files = set(data_dir.iterdir())
    load_script(f"finetune/{script}.py").main(BASE, data_dir, out_dir, **RUN, **options)
    found = tensors(out_dir / "aligner.safetensors")
    for key, value in tensors(LEGACY / f"{name}.safetensors").items():
        torch.testing.assert_close(found[key], value, atol=1e-4, rtol=1e-3)
    rows = [list(csv.DictReader((folder / "metrics.csv").open())) for folder in (out_dir, LEGACY / name)]
    for row, expected in zip(*rows, strict=True):
        assert row.keys() == expected.keys()
        for column in expected.keys() - CLOCK:
            assert float(row[column] or 0) == pytest.approx(float(expected[column] or 0), abs=1e-3)
    assert set(data_dir.iterdir()) == files  # the reference's log-probabilities were found, not computed again
