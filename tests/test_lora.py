"""LoRA against the authors' numbers, PEFT, and the counts of the paper."""

import peft
import pytest
import torch
import transformers
from conftest import GOLDEN, tiny_config

from lit_llama.adapters import load_adapter, save_adapter
from lit_llama.checkpoint import load_base
from lit_llama.combine import WeightedSum
from lit_llama.config import LLaMAConfig
from lit_llama.data import Batch
from lit_llama.formats.folding import merge
from lit_llama.generation import generate
from lit_llama.lora import LoRA
from lit_llama.losses import supervised_loss
from lit_llama.seam import PROJECTIONS


def random_lora(config, **options):
    lora = LoRA(config, **options)
    for parameter in lora.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return lora.eval()


def test_numbers_are_the_authors(golden, golden_config):
    """Their file stacks A of query and value, and B likewise."""
    base = load_base(GOLDEN / "lit-llama.pth", config=golden_config)
    theirs = torch.load(GOLDEN / "lora-r4-alpha8.pth", weights_only=True)
    lora = LoRA(golden_config, r=4, alpha=8)
    with torch.no_grad():
        for index, updates in enumerate(lora.layers):
            a, b = (theirs[f"transformer.h.{index}.attn.c_attn.lora_{name}"].chunk(2) for name in "AB")
            for name, a_part, b_part in zip("qv", a, b, strict=True):
                updates[name].a.copy_(a_part)
                updates[name].b.copy_(b_part)
    logits = base(golden["input_ids"], lora)
    torch.testing.assert_close(logits, golden["lora-r4-alpha8.logits"], atol=1e-5, rtol=0)
    scored = (golden["targets"] != -1) & (torch.arange(24) > 0)
    sums = supervised_loss(base, lora, Batch(golden["input_ids"], scored))
    torch.testing.assert_close(sums.metrics["loss"] / sums.count, golden["lora-r4-alpha8.loss"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("targets", [["q", "v"], list(PROJECTIONS)])
def test_logits_and_gradients_are_pefts(hf_checkpoint, base_dir, targets):
    """Grouped queries too. The rows of W_q and W_k are interleaved here, so B's are."""
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=[f"{target}_proj" for target in targets])
    theirs = peft.get_peft_model(transformers.LlamaForCausalLM.from_pretrained(hf_checkpoint), config)
    model = load_base(base_dir)
    ours = random_lora(model.config, r=3, alpha=5, targets=targets)
    pairs = []
    for index, layer in enumerate(theirs.base_model.model.model.layers):
        for target in targets:
            module = getattr(layer.mlp if target in ("gate", "up", "down") else layer.self_attn, f"{target}_proj")
            pairs.append((ours.layers[index][target], module, target))
    size = model.config.head_size
    with torch.no_grad():
        for update, module, target in pairs:
            b = update.b
            if target in ("q", "k"):  # pairs (i, i + hs / 2) of theirs are neighbours here
                b = b.unflatten(0, (-1, size // 2, 2)).transpose(1, 2).flatten(0, 2)
            module.lora_A["default"].weight.copy_(update.a)
            module.lora_B["default"].weight.copy_(b)
    ids = torch.randint(0, model.config.vocab_size, (2, 12))
    expected, found = theirs(ids).logits, model(ids, ours)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert (found - model(ids)).abs().max() > 0.1
    expected.square().mean().backward()
    found.square().mean().backward()
    for update, module, _ in pairs:
        torch.testing.assert_close(update.a.grad, module.lora_A["default"].weight.grad, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("targets", [["q", "v"], list(PROJECTIONS)])
def test_merged_is_the_same_and_unmerged_the_base(tiny_model, targets):
    lora = random_lora(tiny_model.config, targets=targets)
    ids = torch.randint(96, (2, 10))
    base, expected = tiny_model(ids), tiny_model(ids, lora)
    assert not torch.allclose(base, expected, atol=1e-2)
    merge(tiny_model, lora)
    torch.testing.assert_close(tiny_model(ids), expected, atol=1e-5, rtol=0)
    merge(tiny_model, WeightedSum((lora, -1.0)))
    torch.testing.assert_close(tiny_model(ids), base, atol=1e-5, rtol=0)


def test_a_quantised_base_is_tuned_but_not_merged(base_dir):
    model = load_base(base_dir, quantize="int8")
    lora = random_lora(model.config)
    model(torch.arange(9)[None], lora).sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in lora.parameters())
    with pytest.raises(ValueError, match="only into whole weights, not quantised or sharded ones"):
        merge(model, lora)


def test_a_fresh_lora_is_the_base_bit_for_bit(tiny_model):
    ids = torch.randint(96, (2, 10))
    assert torch.equal(tiny_model(ids), tiny_model(ids, LoRA(tiny_model.config, targets=PROJECTIONS)))


@pytest.mark.parametrize(
    ("name", "options", "parameters"),
    [("LLaMA-7B", {"r": 8}, 4_194_304), ("LLaMA-13B", {"r": 8}, 6_553_600), ("SmolLM2-135M", {"r": 8}, 460_800)],
)
def test_parameter_counts(name, options, parameters):
    """The papers' for 7B; 13B by hand: 40 layers, two projections, r (5120 + 5120)."""
    with torch.device("meta"):
        lora = LoRA(LLaMAConfig.from_name(name), **options)
    assert sum(parameter.numel() for parameter in lora.parameters()) == parameters


def test_dropout_is_for_training_alone(tiny_model):
    """And the recomputation of checkpointed activations drops the same."""
    lora = random_lora(tiny_model.config, dropout=0.5)
    ids = torch.randint(96, (2, 10))
    assert torch.equal(tiny_model(ids, lora), tiny_model(ids, lora))
    lora.train()
    assert not torch.equal(tiny_model(ids, lora), tiny_model(ids, lora))
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            tiny_model.checkpoint_activations()
        lora.zero_grad()
        torch.manual_seed(0)
        tiny_model(ids, lora).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in lora.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, atol=1e-6, rtol=1e-5)


def test_cached_generation_is_the_merged_models(tiny_model):
    lora = random_lora(tiny_model.config, targets=PROJECTIONS)
    prompts = [[5, 6, 7], [1, 2, 3, 4, 5, 6]]
    expected = generate(tiny_model, prompts, 8, adapter=lora)
    assert expected != generate(tiny_model, prompts, 8)
    merge(tiny_model, lora)
    assert generate(tiny_model, prompts, 8) == expected


def test_file(tmp_path, tiny_model):
    lora = random_lora(tiny_model.config, r=2, alpha=3, dropout=0.1, targets=["down", "q"])
    save_adapter(tmp_path / "lora.safetensors", lora, tiny_model)
    loaded = load_adapter(tmp_path / "lora.safetensors")
    assert loaded.sizes == lora.sizes
    ids = torch.arange(9)[None]
    assert torch.equal(tiny_model(ids, loaded), tiny_model(ids, lora))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "rank of at least 1, got 0"),
        ({"dropout": 1.0}, r"below 1, got 1\.0"),
        ({"targets": ["q", "w"]}, "some of q, k, v, o, gate, up, down, got q, w"),
        ({"targets": []}, "got none"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LoRA(tiny_config(), **options)
