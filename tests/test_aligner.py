"""The Aligner against the authors' implementation and the counts of the paper."""

import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN

from lit_llama.adapters import load_adapter
from lit_llama.aligner import Aligner
from lit_llama.checkpoint import load_base
from lit_llama.config import LLaMAConfig
from lit_llama.data import Batch
from lit_llama.generation import generate
from lit_llama.losses import supervised_loss


@pytest.fixture(scope="module")
def base(golden_config):
    return load_base(GOLDEN / "lit-llama.pth", config=golden_config)


@pytest.mark.parametrize("length", [1, 10])
def test_numbers_are_the_authors(golden, base, length):
    aligner = load_adapter(GOLDEN / f"aligner-{length}.pth")
    expected = {name: golden[f"aligner-{length}.{name}"] for name in ("logits", "loss", "grad.prefix", "grad.gates")}
    torch.testing.assert_close(base(golden["input_ids"], adapter=aligner), expected["logits"], atol=1e-5, rtol=0)

    scored = golden["targets"] != -1
    sums = supervised_loss(base, aligner, Batch(golden["input_ids"], scored & (torch.arange(24) > 0)))
    loss = sums.metrics["loss"] / sums.count
    loss.backward()
    torch.testing.assert_close(loss, expected["loss"], atol=1e-5, rtol=0)
    torch.testing.assert_close(aligner.tokens.grad, expected["grad.prefix"], atol=1e-5, rtol=0)
    torch.testing.assert_close(aligner.gates.grad, expected["grad.gates"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["base", "aligner-1", "aligner-10"])
def test_greedy_continuations_are_the_authors(golden, base, name):
    aligner = None if name == "base" else load_adapter(GOLDEN / f"{name}.pth")
    prompt, expected = golden["prompt"].tolist(), golden[f"{name}.greedy"].tolist()
    assert prompt + generate(base, [prompt], 20, adapter=aligner)[0] == expected


@pytest.mark.parametrize(
    ("name", "length", "parameters"),
    [
        ("LLaMA-7B", 1, 5_056),
        ("LLaMA-7B", 10, 41_920),
        ("LLaMA-7B", 300, 1_229_760),
        ("LLaMA-13B", 1, 6_640),
        ("LLaMA-13B", 10, 52_720),
        ("SmolLM2-135M", 1, 828),
    ],
)
def test_parameter_counts_are_the_papers(name, length, parameters):
    with torch.device("meta"):
        aligner = Aligner(LLaMAConfig.from_name(name), length)
    assert sum(parameter.numel() for parameter in aligner.parameters()) == parameters


@pytest.mark.parametrize("length", [1, 10])
def test_parameters_are_float32_on_a_bfloat16_base(golden, golden_config, length):
    model = load_base(GOLDEN / "lit-llama.pth", dtype=torch.bfloat16, config=golden_config)
    aligner = load_adapter(GOLDEN / f"aligner-{length}.pth")
    optimizer = torch.optim.AdamW(aligner.parameters())
    logits = model(golden["input_ids"], adapter=aligner)
    assert logits.dtype == torch.bfloat16
    F.cross_entropy(logits.float().flatten(0, 1), golden["input_ids"].flatten()).backward()
    optimizer.step()
    for parameter in aligner.parameters():
        assert parameter.dtype == torch.float32
        assert {state.dtype for state in optimizer.state[parameter].values()} == {torch.float32}


def test_layers_below_the_start_have_no_prefix(golden_config):
    aligner = Aligner(golden_config, 1, start_layer=3)
    assert [len(aligner.layer(index).prefixes) for index in range(4)] == [0, 0, 0, 1]


def test_impossible_sizes_are_refused(golden_config):
    with pytest.raises(ValueError, match="at least one prefix token, got 0"):
        Aligner(golden_config, 0)
    with pytest.raises(ValueError, match="start layer 4 is not one of the base's layers 0 to 3"):
        Aligner(golden_config, 1, start_layer=4)
