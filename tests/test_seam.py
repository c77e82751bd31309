"""The contract of `lit_llama.seam`, kept with methods that the library does not have, written here."""

from typing import NamedTuple

import pytest
import torch
from conftest import random_aligner
from torch import Tensor

from lit_llama.combine import PerRow, WeightedSum
from lit_llama.formats.folding import affine_parts, biased, fold, merge, projections
from lit_llama.generation import generate
from lit_llama.seam import PROJECTIONS, LayerAdapter


class ScaleAndShift(NamedTuple):
    """LLaMA-Adapter v2's change of a projection (arXiv 2304.15010), s * (y + b), as an update; IA3's where b is 0."""

    gain: Tensor  # (1 or B, out), s - 1
    shift: Tensor  # (1 or B, out), s * b

    def __call__(self, x, y):
        return self.gain[:, None] * y + self.shift[:, None]

    def scaled(self, scale):
        return ScaleAndShift(scale * self.gain, scale * self.shift)


class Squared(NamedTuple):
    vector: Tensor

    def __call__(self, x, y):
        return self.vector[:, None] * y.square()

    def scaled(self, scale):
        return Squared(scale * self.vector)


class Method:
    """Updates of a kind in every layer, drawn at random for all projections or for some."""

    def __init__(self, config, kind=ScaleAndShift, names=PROJECTIONS, std=0.1):
        def draw(name):
            return kind(*(std * torch.randn(1, config.width(name)[1]) for _ in kind._fields))

        self.layers = [{name: (draw(name),) for name in names} for _ in range(config.n_layer)]

    def layer(self, index):
        return LayerAdapter(updates=self.layers[index])


def test_what_is_affine_in_input_and_output_folds_exactly(tiny_model):
    """By hand: s * (W x + b) in every projection of every layer."""
    config, method = tiny_model.config, Method(tiny_model.config)
    ids = torch.randint(96, (2, 10))
    expected, base = tiny_model(ids, method), tiny_model(ids)
    assert (expected - base).abs().max() > 0.1
    tensors = dict(tiny_model.state_dict())
    for i in range(config.n_layer):
        weights = projections(config, tensors, i)
        folded = fold(config, tensors, i, method.layer(i))
        assert biased(config, method.layer(i)) == set(folded.biases) == set(PROJECTIONS)
        for name in PROJECTIONS:
            [update] = method.layers[i][name]
            torch.testing.assert_close(folded.weights[name], (1 + update.gain[0])[:, None] * weights[name])
            before = projections(config, tensors, i, "bias").get(name, torch.zeros(()))
            torch.testing.assert_close(folded.biases[name], (1 + update.gain[0]) * before + update.shift[0])
    merge(tiny_model, method)
    torch.testing.assert_close(tiny_model(ids), expected, atol=1e-4, rtol=0)


def test_a_base_with_biases_keeps_them(tiny_model):
    """By hand: s * (W x + b + c) of a base that has biases; and a one-token prefix's values get the base's bias."""
    config = tiny_model.config
    shifts = Method(config, names=["q", "v", "o", "down"])
    merge(tiny_model, shifts)  # now it has biases
    second = WeightedSum((Method(config, names=["v", "o", "down"]), 1.0), (random_aligner(config, 1), 1.0))
    ids = torch.randint(96, (2, 10))
    expected, base = tiny_model(ids, second), tiny_model(ids)
    assert (expected - base).abs().max() > 0.1
    merge(tiny_model, second)
    torch.testing.assert_close(tiny_model(ids), expected, atol=1e-4, rtol=0)


def test_what_is_not_affine_is_refused_by_name(tiny_model):
    with pytest.raises(ValueError, match="Squared, an update of the projection 'gate', is not affine"):
        merge(tiny_model, Method(tiny_model.config, Squared, ["gate"], std=1.0))


def test_the_parts_of_an_update():
    update = ScaleAndShift(torch.tensor([[0.5, -1.0]]), torch.tensor([[2.0, 3.0]]))
    c, m, s = affine_parts(update, torch.zeros(2, 3), "q")
    assert c.tolist() == [2, 3]
    assert torch.equal(m, torch.zeros(2, 3))
    assert torch.equal(s, torch.diag(torch.tensor([0.5, -1.0])))


def test_contributions_add_and_every_update_sees_the_bases_output(tiny_model):
    first, second = Method(tiny_model.config, names=["v"]), Method(tiny_model.config, names=["v"])
    both = Method(tiny_model.config, names=["v"])
    for i, layer in enumerate(both.layers):
        layer["v"] = (
            ScaleAndShift(*(a - 2 * b for a, b in zip(first.layers[i]["v"][0], second.layers[i]["v"][0], strict=True))),
        )
    ids = torch.randint(96, (2, 10))
    found = tiny_model(ids, WeightedSum((first, 1.0), (second, -2.0)))
    torch.testing.assert_close(found, tiny_model(ids, both), atol=1e-5, rtol=0)


def test_rows_have_updates_of_their_own(tiny_model):
    rows = [Method(tiny_model.config), None, Method(tiny_model.config, names=["o", "up"]), Method(tiny_model.config)]
    prompts = [[5, 6], [7, 8, 9, 10, 11, 12], [13], [1, 2, 3]]
    alone = [generate(tiny_model, [prompt], 8, adapter=row)[0] for prompt, row in zip(prompts, rows, strict=True)]
    assert generate(tiny_model, prompts, 8, adapter=rows) == alone
    ids = torch.randint(96, (4, 10))
    expected = torch.cat([tiny_model(row[None], adapter) for row, adapter in zip(ids, rows, strict=True)])
    torch.testing.assert_close(tiny_model(ids, PerRow(rows)), expected, atol=1e-5, rtol=0)
