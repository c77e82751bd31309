"""LLaMA-Adapter against the authors' numbers and the counts of the paper."""

import pytest
import torch
from conftest import GOLDEN

from lit_llama.adapters import load_adapter, save_adapter
from lit_llama.aligner import Aligner
from lit_llama.checkpoint import load_base
from lit_llama.config import LLaMAConfig
from lit_llama.data import Batch
from lit_llama.llama_adapter import LLaMAAdapter
from lit_llama.losses import supervised_loss


def test_numbers_are_the_authors(golden, golden_config):
    base = load_base(GOLDEN / "lit-llama.pth", config=golden_config)
    theirs = torch.load(GOLDEN / "llama-adapter-5.pth", weights_only=True)
    adapter = LLaMAAdapter(golden_config, 5)
    with torch.no_grad():
        for row, index in enumerate((2, 3)):
            adapter.tokens[row].copy_(theirs[f"transformer.h.{index}.attn.adapter_wte.weight"])
            adapter.gates[row].copy_(theirs[f"transformer.h.{index}.attn.gating_factor"].flatten())
    logits = base(golden["input_ids"], adapter)
    torch.testing.assert_close(logits, golden["llama-adapter-5.logits"], atol=1e-5, rtol=0)
    scored = (golden["targets"] != -1) & (torch.arange(24) > 0)
    sums = supervised_loss(base, adapter, Batch(golden["input_ids"], scored))
    torch.testing.assert_close(sums.metrics["loss"] / sums.count, golden["llama-adapter-5.loss"], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("name", "parameters"), [("LLaMA-7B", 1_229_760), ("SmolLM2-135M", 28 * (10 * 576 + 9))])
def test_parameter_counts(name, parameters):
    """The paper's for 7B."""
    with torch.device("meta"):
        adapter = LLaMAAdapter(LLaMAConfig.from_name(name))
    assert sum(parameter.numel() for parameter in adapter.parameters()) == parameters


def test_the_same_tokens_in_every_layer_are_an_aligner(tiny_model):
    aligner, adapter = Aligner(tiny_model.config, 3, 1), LLaMAAdapter(tiny_model.config, 3, 1)
    ids = torch.randint(96, (2, 10))
    assert torch.equal(tiny_model(ids), tiny_model(ids, adapter))  # zero gates
    torch.nn.init.normal_(aligner.gates)
    with torch.no_grad():
        adapter.tokens.copy_(aligner.tokens.expand_as(adapter.tokens))
        adapter.gates.copy_(aligner.gates)
    assert torch.equal(tiny_model(ids, adapter), tiny_model(ids, aligner))


def test_file(tmp_path, tiny_model):
    adapter = LLaMAAdapter(tiny_model.config, 3, 1)
    torch.nn.init.normal_(adapter.gates)
    save_adapter(tmp_path / "adapter.safetensors", adapter, tiny_model)
    loaded = load_adapter(tmp_path / "adapter.safetensors")
    ids = torch.arange(9)[None]
    assert torch.equal(tiny_model(ids, loaded), tiny_model(ids, adapter))


def test_impossible_sizes_are_refused(golden_config):
    with pytest.raises(ValueError, match="at least one prefix token, got 0"):
        LLaMAAdapter(golden_config, 0)
    with pytest.raises(ValueError, match="start layer 4 is not one of the base's layers 0 to 3"):
        LLaMAAdapter(golden_config, 1, start_layer=4)
