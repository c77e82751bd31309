"""Adapters combined, against what each does alone and against sums made by hand."""

import copy
from typing import NamedTuple

import pytest
import torch
from conftest import random_aligner
from torch import nn

from lit_llama.adapters import METHODS
from lit_llama.aligner import Aligner
from lit_llama.combine import PerRow, WeightedSum
from lit_llama.decoder import Decoder, GenerationRequest
from lit_llama.formats.folding import merge
from lit_llama.generation import generate
from lit_llama.llama_adapter import LLaMAAdapter
from lit_llama.lora import LoRA
from lit_llama.seam import LayerAdapter, LayerPrefix


def random_lora(config, targets):
    lora = LoRA(config, r=4, targets=targets)
    for parameter in lora.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return lora.requires_grad_(False)


@pytest.fixture
def mixed(tiny_model):
    """One for each row: different lengths and start layers, a LLaMA-Adapter, a sum, and none."""
    config = tiny_model.config
    adapter = LLaMAAdapter(config, 4, start_layer=1)
    torch.nn.init.normal_(adapter.gates)
    one, two, five = random_aligner(config, 1, 2, 1.0), random_aligner(config, 2, 0, 1.0), random_aligner(config, 5)
    return [one, None, two, five, adapter, WeightedSum((one, 0.5), (five, -1.5))]


def test_each_row_has_its_own(tiny_model, mixed):
    ids = torch.randint(96, (len(mixed), 10))
    expected = torch.cat([tiny_model(row[None], adapter) for row, adapter in zip(ids, mixed, strict=True)])
    torch.testing.assert_close(tiny_model(ids, PerRow(mixed)), expected, atol=1e-5, rtol=0)
    assert (expected - tiny_model(ids)).abs().amax((1, 2)).gt(0.05).tolist() == [row is not None for row in mixed]


@pytest.mark.parametrize("order", [slice(None), slice(None, None, -1), slice(0, 2), slice(1, 2)])
def test_rows_generate_what_they_do_alone(tiny_model, mixed, order):
    prompts = [[5, 6], [7, 8, 9, 10, 11, 12], [13], [1, 2, 3], [4, 4, 4, 4], [20, 21]]
    rows = list(zip(prompts, mixed, strict=True))[order]
    expected = [generate(tiny_model, [prompt], 16, adapter=adapter)[0] for prompt, adapter in rows]
    found = generate(tiny_model, [prompt for prompt, _ in rows], 16, adapter=[one for _, one in rows])
    assert found == expected


class Shift(NamedTuple):
    """An update that adds a vector (1 or B, out), another kind than a LoRA's."""

    vector: torch.Tensor

    def __call__(self, x, y):
        return self.vector[:, None]

    def scaled(self, scale):
        return Shift(scale * self.vector)


class Shifts:
    def __init__(self, config, target):
        self.vectors, self.target = 0.3 * torch.randn(config.n_layer, config.width(target)[1]), target

    def layer(self, index):
        return LayerAdapter(updates={self.target: (Shift(self.vectors[None, index]),)})


def test_each_row_has_its_own_updates(tiny_model):
    """LoRAs of unequal ranks and targets, updates of another kind, a prefix, a sum of all kinds, and none."""
    config = tiny_model.config
    wide, narrow = random_lora(config, ["q", "v", "down"]), LoRA(config, r=2, targets=["v", "o"])
    torch.nn.init.normal_(narrow.layers[1]["v"].b)
    shifts, aligner = [Shifts(config, target) for target in "ov"], random_aligner(config, 2, 0, 1.0)
    everything = WeightedSum((wide, 0.5), (narrow, 2.0), (shifts[0], -1.0), (aligner, 1.0), (wide, 0.25))
    rows = [wide, None, narrow.eval(), *shifts, aligner, everything]
    ids = torch.randint(96, (len(rows), 10))
    expected = torch.cat([tiny_model(row[None], adapter) for row, adapter in zip(ids, rows, strict=True)])
    torch.testing.assert_close(tiny_model(ids, PerRow(rows)), expected, atol=1e-5, rtol=0)
    assert (expected - tiny_model(ids)).abs().amax((1, 2)).gt(0.01).tolist() == [row is not None for row in rows]
    prompts = [[5, 6], [7, 8, 9, 10, 11, 12], [13], [1, 2, 3], [4, 4, 4, 4], [20, 21], [9, 9]]
    alone = [generate(tiny_model, [prompt], 8, adapter=row)[0] for prompt, row in zip(prompts, rows, strict=True)]
    assert generate(tiny_model, prompts, 8, adapter=rows) == alone


@pytest.mark.parametrize("method", METHODS.values())
def test_rows_with_adapters_that_differ_in_their_values_alone(tiny_model, method):
    """They are asked together what they add to a layer; one that is scaled apart."""
    config, asked = tiny_model.config, []

    class Counted(method):
        takes_rows = True

        def layer(self, index):
            asked.append(index)
            return super().layer(index)

    rows = [Counted(config), Counted(config), None, WeightedSum((Counted(config), 0.5)), Counted(config)]
    for row in filter(None, rows):
        for parameter in (row.terms[0][0] if isinstance(row, WeightedSum) else row).parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    ids = torch.randint(96, (len(rows), 10))
    with torch.no_grad():
        expected = torch.cat([tiny_model(one[None], adapter) for one, adapter in zip(ids, rows, strict=True)])
        before, asked[:] = [rows[0].state_dict()[name].clone() for name in rows[0].state_dict()], []
        torch.testing.assert_close(tiny_model(ids, PerRow(rows)), expected, atol=1e-5, rtol=0)
    assert sorted(asked) == sorted(2 * list(range(config.n_layer)))
    order = [4, 3, 0, 1]  # in which rows that are asked together do not stand next to each other, and all have some
    with torch.no_grad():
        found = tiny_model(ids[order], PerRow([rows[i] for i in order]))
    torch.testing.assert_close(found, expected[order], atol=1e-5, rtol=0)
    assert all(map(torch.equal, before, rows[0].state_dict().values()))
    with torch.inference_mode():
        torch.testing.assert_close(tiny_model(ids, PerRow(rows)), expected, atol=1e-5, rtol=0)


def test_rows_whose_adapters_differ_in_more_than_their_values(tiny_model):
    """The same shapes, but other arguments, methods or modes."""
    config = tiny_model.config
    loras = [LoRA(config, 4, alpha) for alpha in (1.0, 16.0)] + [LoRA(config, 4, 16.0, dropout=0.5)]
    prefixes = [Aligner(config, 2, positions=positions) for positions in ("all", "prompt", "prompt")]

    class Doubled(Aligner):
        def layer(self, index):
            prefix = LayerPrefix.of(self.tokens, 2 * self.gates[index - self.start_layer])
            return LayerAdapter((prefix,) if index >= self.start_layer else ())

    rows = [*loras, *prefixes, LLaMAAdapter(config, 2), *(Doubled(config, 2) for _ in range(config.n_layer))]
    for row in rows:
        for parameter in row.eval().parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    prompts = torch.randint(96, (len(rows), 10)).tolist()
    alone = [generate(tiny_model, [prompt], 8, adapter=row)[0] for prompt, row in zip(prompts, rows, strict=True)]
    assert generate(tiny_model, prompts, 8, adapter=rows) == alone
    ids = torch.tensor(prompts)
    expected = torch.cat([tiny_model(row[None], adapter) for row, adapter in zip(ids, rows, strict=True)])
    torch.testing.assert_close(tiny_model(ids, PerRow(rows)), expected, atol=1e-5, rtol=0)
    trained = copy.deepcopy(loras[2]).train()  # with its dropout
    found = tiny_model(ids[:2], PerRow([trained, loras[2]]))
    away = [(one - tiny_model(row[None], loras[2])).abs().max() for one, row in zip(found, ids, strict=False)]
    assert away[0] > 0.01
    assert away[1] < 1e-5


def test_memory_of_rows_does_not_depend_on_who_joined_with_whom(tiny_model):
    requests = [
        GenerationRequest([5], random_aligner(tiny_model.config, 3, start_layer=layer), 9) for layer in (0, 2, 0, 2)
    ]
    decoders = [Decoder(tiny_model, 4, 64) for _ in range(2)]
    decoders[0].join(requests)
    for request in requests:
        decoders[1].join([request])
        decoders[1].step()
    assert decoders[0].adapter_bytes == decoders[1].adapter_bytes > 0


def test_what_says_that_it_takes_rows_and_does_not(tiny_model):
    class Vectors(nn.Module):
        takes_rows, sizes = True, {"any": 1}

        def __init__(self):
            super().__init__()
            self.vectors = nn.Parameter(torch.randn(tiny_model.config.n_layer, tiny_model.config.n_embd))

        def layer(self, index):
            return LayerAdapter(updates={"o": (Shift(self.vectors[None, index]),)})

    with pytest.raises(TypeError, match=r"tensors of \[1\] rows for what 3 add: see `takes_rows`"):
        tiny_model(torch.ones(3, 4, dtype=torch.long), PerRow([Vectors() for _ in range(3)]))


@pytest.mark.parametrize("length", [1, 3])
def test_scales_of_zero_and_one_are_the_base_and_the_adapter_bit_for_bit(tiny_model, length):
    ids, aligner = torch.randint(96, (2, 10)), random_aligner(tiny_model.config, length)
    assert torch.equal(tiny_model(ids, WeightedSum((aligner, 0.0))), tiny_model(ids))
    assert torch.equal(tiny_model(ids, WeightedSum((aligner, 1.0))), tiny_model(ids, aligner))


def test_one_token_aligners_add_up_to_a_sum_of_biases(tiny_model):
    """By hand: W_o concat_h(gate_h v_h) of each, in every layer."""
    config = tiny_model.config
    first, second = random_aligner(config, 1), random_aligner(config, 1, start_layer=2)
    with torch.no_grad():
        second.tokens.normal_()
    ids = torch.randint(96, (2, 10))
    found = tiny_model(ids, WeightedSum((first, 0.7), (second, -0.4)))
    group, values = config.n_head // config.n_kv_head, config.n_kv_head * config.head_size
    for index, block in enumerate(tiny_model.transformer.h):
        bias = block.attn.c_proj.bias.clone()
        for aligner, scale in ((first, 0.7), (second, -0.4)):
            if index >= aligner.start_layer:
                v = block.attn.c_attn.weight[-values:] @ aligner.tokens[0] + block.attn.c_attn.bias[-values:]
                heads = v.view(config.n_kv_head, -1).repeat_interleave(group, dim=0)  # (nh, hs)
                gates = aligner.gates[index - aligner.start_layer]
                bias += scale * block.attn.c_proj.weight @ (gates[:, None] * heads).flatten()
        block.attn.c_proj.bias = torch.nn.Parameter(bias)
    torch.testing.assert_close(tiny_model(ids), found, atol=1e-5, rtol=0)


def test_loras_add_up_to_both_merged(tiny_model):
    first, second = random_lora(tiny_model.config, ["q", "v"]), random_lora(tiny_model.config, ["q", "o"])
    ids = torch.randint(96, (2, 10))
    found, half = tiny_model(ids, WeightedSum((first, 1.0), (second, 1.0))), tiny_model(ids, WeightedSum((first, 0.5)))
    with torch.no_grad():
        for name, parameter in first.named_parameters():
            parameter.mul_(0.5 if name.endswith("b") else 1.0)
    torch.testing.assert_close(half, tiny_model(ids, first), atol=1e-5, rtol=0)
    with torch.no_grad():
        for name, parameter in first.named_parameters():
            parameter.mul_(2.0 if name.endswith("b") else 1.0)
    merge(tiny_model, first)
    merge(tiny_model, second)
    torch.testing.assert_close(tiny_model(ids), found, atol=1e-5, rtol=0)
