"""The model and its seam, against the golden numbers and hand derivations."""

import json

import pytest
import torch
from conftest import GOLDEN, random_aligner, tiny_config

from lit_llama.aligner import Aligner
from lit_llama.checkpoint import load_base
from lit_llama.config import PRESETS, LLaMAConfig, RopeScaling
from lit_llama.model import LLaMA
from lit_llama.rotary import rope_frequencies


def test_base_logits_are_the_authors(golden, golden_config):
    model = load_base(GOLDEN / "lit-llama.pth", config=golden_config)
    torch.testing.assert_close(model(golden["input_ids"]), golden["base.logits"], atol=1e-5, rtol=0)


# Parameter counts as their publishers give them.
@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("7B", 6_738_415_616),
        ("LLaMA 13B", 13_015_864_320),
        ("30B", 32_528_943_616),
        ("65b", 65_285_660_672),
        ("Llama-2-70B", 68_976_648_192),
        ("Llama-3-8B", 8_030_261_248),
        ("Llama-3-70B", 70_553_706_496),
        ("Llama-3.2-1B", 1_235_814_400),
        ("Llama-3.2-3B", 3_212_749_824),
        ("TinyLlama-1.1B", 1_100_048_384),
        ("SmolLM2-135M", 134_515_008),
        ("SmolLM2-360M", 361_821_120),
        ("SmolLM2-1.7B", 1_711_376_384),
        ("SmolLM3-3B", 3_075_098_624),
        ("Qwen2.5-0.5B", 494_032_768),
        ("Qwen2.5-1.5B", 1_543_714_304),
        ("Qwen2.5-3B", 3_085_938_688),
        ("Qwen2.5-7B", 7_615_616_512),
        ("Qwen2.5-14B", 14_770_033_664),
        ("Qwen2.5-32B", 32_763_876_352),
        ("Qwen3-0.6B", 596_049_920),
        ("Qwen3-1.7B", 1_720_574_976),
        ("Qwen3-4B", 4_022_468_096),
        ("Qwen3-8B", 8_190_735_360),
        ("Qwen3-14B", 14_768_307_200),
        ("Qwen3-32B", 32_762_123_264),
        ("Mistral-7B-v0.3", 7_248_023_552),
        ("Mistral-Nemo-12B", 12_247_782_400),
        ("Mistral-Small-24B", 23_572_403_200),
        ("Phi-4", 14_659_507_200),
    ],
)
def test_presets(name, parameters):
    with torch.device("meta"):
        assert sum(p.numel() for p in LLaMA(LLaMAConfig.from_name(name)).parameters()) == parameters


def test_unknown_preset_is_refused():
    with pytest.raises(ValueError, match=r"no preset named 'GPT-2'.*LLaMA-7B"):
        LLaMAConfig.from_name("GPT-2")


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.name)
def test_config_survives_json(preset):
    assert LLaMAConfig.from_dict(json.loads(json.dumps(preset.to_dict()))) == preset


def test_config_from_before_there_were_other_families():
    fields = LLaMAConfig().to_dict()
    for feature in ("qkv_bias", "o_bias", "qk_norm", "unrotated_layers"):
        del fields[feature]
    assert LLaMAConfig.from_dict(fields) == LLaMAConfig()


def test_config_with_unknown_field_is_refused():
    with pytest.raises(ValueError, match=r"lacks \[\] and has unknown \['colour'\]"):
        LLaMAConfig.from_dict({**tiny_config().to_dict(), "colour": "red"})


@pytest.mark.parametrize("length", [1, 3])
def test_zero_gates_are_the_base_bit_for_bit(tiny_model, length):
    ids = torch.randint(96, (2, 10))
    assert torch.equal(tiny_model(ids), tiny_model(ids, adapter=Aligner(tiny_model.config, length)))


def test_one_token_is_a_bias(tiny_model):
    """With N=1 the adapter is W_o concat_h(g_h v_h), added to the output projection of each layer (design, fact 2)."""
    config, aligner = tiny_model.config, random_aligner(tiny_model.config, 1)
    ids = torch.randint(96, (2, 10))
    expected = tiny_model(ids, adapter=aligner)
    handles = []
    for index in range(1, config.n_layer):
        attention = tiny_model.transformer.h[index].attn
        values = slice((config.n_head + config.n_kv_head) * config.head_size, None)
        value = attention.c_attn.weight[values] @ aligner.tokens[0] + attention.c_attn.bias[values]
        value = value.view(config.n_kv_head, config.head_size)
        group = config.n_head // config.n_kv_head
        heads = [aligner.gates[index - 1, h] * value[h // group] for h in range(config.n_head)]
        bias = attention.c_proj.weight @ torch.cat(heads)
        handles.append(attention.c_proj.register_forward_hook(lambda _m, _i, out, bias=bias: out + bias))
    folded = tiny_model(ids)
    for handle in handles:
        handle.remove()
    assert not torch.allclose(folded, tiny_model(ids), atol=1e-3)
    torch.testing.assert_close(folded, expected, atol=1e-5, rtol=0)


def test_one_token_through_attention_is_one_token_as_a_bias(tiny_model):
    """The same token twice takes the path through the softmax, and weighs as much as once."""
    one, two = random_aligner(tiny_model.config, 1), random_aligner(tiny_model.config, 2)
    with torch.no_grad():
        two.tokens.copy_(one.tokens.expand(2, -1))
        two.gates.copy_(one.gates)
    ids = torch.randint(96, (2, 10))
    torch.testing.assert_close(tiny_model(ids, adapter=one), tiny_model(ids, adapter=two), atol=1e-5, rtol=0)


def test_logits_at_chooses_positions(tiny_model):
    ids = torch.randint(96, (3, 8))
    at = torch.rand(3, 8) < 0.4
    torch.testing.assert_close(tiny_model(ids, logits_at=at), tiny_model(ids)[at], atol=1e-6, rtol=0)


@pytest.mark.parametrize("length", [None, 1, 3])
def test_cached_decoding_is_the_full_forward(tiny_model, length):
    """A padded batch of unequal prompts, decoded token by token, gives what each row gets alone and uncached."""
    adapter = None if length is None else random_aligner(tiny_model.config, length)
    rows = torch.randint(96, (3, 12))
    lengths = torch.tensor([2, 7, 5])
    prompts = rows[:, :7].masked_fill(torch.arange(7) >= lengths[:, None], 0)
    cache = tiny_model.new_cache(3, 16)
    tiny_model(prompts, adapter, cache=cache)
    for n in range(4):
        positions = lengths[:, None] + n
        logits = tiny_model(rows.gather(1, positions), adapter, cache=cache, positions=positions)
        for row in range(3):
            alone = tiny_model(rows[row : row + 1, : lengths[row] + n + 1], adapter)[0, -1]
            torch.testing.assert_close(logits[row, 0], alone, atol=1e-5, rtol=0)


def test_several_cached_tokens_at_once(tiny_model):
    ids = torch.randint(96, (2, 9))
    cache = tiny_model.new_cache(2, 9)
    tiny_model(ids[:, :4], cache=cache)
    logits = tiny_model(ids[:, 4:], cache=cache, positions=torch.arange(4, 9).expand(2, -1))
    torch.testing.assert_close(logits, tiny_model(ids)[:, 4:], atol=1e-5, rtol=0)


def test_window_is_enforced(tiny_model):
    with pytest.raises(ValueError, match="65 tokens exceeds the model's window of 64"):
        tiny_model(torch.zeros(1, 65, dtype=torch.long))
    with pytest.raises(ValueError, match="65 positions exceeds"):
        tiny_model.new_cache(1, 65)


def test_rotary_frequencies_stay_float32(tiny_model):
    assert tiny_model.to(torch.bfloat16).rope_frequencies.dtype == torch.float32


def test_linear_scaling_divides_every_frequency():
    plain, scaled = tiny_config(), tiny_config(rope_scaling=RopeScaling("linear", factor=4.0))
    torch.testing.assert_close(rope_frequencies(scaled), rope_frequencies(plain) / 4)


@pytest.mark.parametrize(
    ("changes", "message"), [({"n_kv_head": 3}, "expected a multiple"), ({"head_size": 7}, "expected an even number")]
)
def test_contradictory_config_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        LLaMA(tiny_config(**changes))
