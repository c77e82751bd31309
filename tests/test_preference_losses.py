"""Preference losses against TRL's own functions, and against what theory says of their start.

The numbers in golden/trl.json were made by golden/make_trl.py.
"""

import json
import math

import pytest
import torch
from conftest import GOLDEN

from lit_llama.preference_losses import PAIR_LOSSES, kto_loss, log_ratio, pair_coefficients, pair_loss

TRL = json.loads((GOLDEN / "trl.json").read_text())
NAMES = {"ipo": "ipo_mean"}  # TRL's IPO takes means over tokens


def trl_numbers(*names):
    return (torch.tensor(TRL[name]) for name in names)


def cases(*, paired):
    found = [case for case in TRL["losses"] if (case["name"] != "kto") == paired]
    return pytest.mark.parametrize("case", found, ids=[f"{case['name']}-{case['options']['beta']}" for case in found])


@cases(paired=True)
def test_pairs_equal_trl(case):
    policy, reference, lengths = trl_numbers("policy", "reference", "lengths")
    policy.requires_grad_()
    name = NAMES.get(case["name"], case["name"])
    coefficients = pair_coefficients(name, **case["options"])
    metrics, count = pair_loss(name, policy, reference, lengths, coefficients)
    loss = metrics["loss"] / count
    loss.backward()
    assert count == 5
    assert loss.item() == pytest.approx(case["loss"], rel=1e-5)
    torch.testing.assert_close(policy.grad, torch.tensor(case["gradient"]), atol=1e-6, rtol=1e-4)


@cases(paired=False)
def test_kto_equals_trl(case):
    policy, reference, lengths, wanted = trl_numbers("policy", "reference", "lengths", "good")
    other_policy, other_reference = trl_numbers("other_policy", "other_reference")
    policy.requires_grad_()
    sums = log_ratio(other_policy, other_reference, lengths)
    point = max(0.0, (sums.metrics["log_ratio"] / sums.count).item())
    assert point > 0.5
    metrics, count = kto_loss(policy, reference, lengths, wanted, point, **case["options"])
    loss = metrics["loss"] / count
    loss.backward()
    assert loss.item() == pytest.approx(case["loss"], rel=1e-5)
    torch.testing.assert_close(policy.grad, torch.tensor(case["gradient"]), atol=1e-6, rtol=1e-4)


def test_every_loss_is_compared():
    assert {NAMES.get(case["name"], case["name"]) for case in TRL["losses"]} | {"ipo"} == {*PAIR_LOSSES, "kto"}


def test_ipo_by_hand():
    """On sums, as the paper has it; the last pair does not count."""
    policy = torch.tensor([-10.0, -11.0, -7.0, -7.0, -9.0, -6.0, -1.0, -1.0])
    reference = torch.tensor([-11.0, -10.0, -7.0, -7.0, -8.0, -9.0, 0.0, 0.0])
    lengths = torch.tensor([3, 4, 5, 6, 7, 8, 0, 0])
    metrics, count = pair_loss("ipo", policy, reference, lengths, pair_coefficients("ipo", beta=0.5))
    assert count == 3
    assert metrics["loss"].item() == pytest.approx((2 - 1) ** 2 + (0 - 1) ** 2 + (-4 - 1) ** 2)


STARTS = {"sigmoid": math.log(2), "robust": math.log(2), "ipo": 25.0, "ipo_mean": 25.0, "hinge": 1.0, "apo_zero": 1.0}
VOCABULARY = 280  # of a policy that finds all tokens equally likely
STARTS["simpo"] = math.log(1 + math.exp(0.5))
STARTS["orpo"] = math.log(VOCABULARY) + 0.1 * math.log(2)


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_starts_where_theory_says(name):
    """With the default coefficients, where policy and reference agree and all tokens are equally likely."""
    lengths = torch.tensor([3, 7, 12, 1])
    logprobs = -math.log(VOCABULARY) * lengths
    reference = logprobs if PAIR_LOSSES[name].has_reference else None
    metrics, count = pair_loss(name, logprobs, reference, lengths, pair_coefficients(name))
    assert metrics["loss"].item() / count == pytest.approx(STARTS[name], rel=1e-6)
    assert metrics["margin"].item() == pytest.approx(0, abs=1e-5)


def test_orpo_is_finite_where_a_response_is_certain():
    policy = torch.tensor([0.0, -3.0, -2.0, 0.0, 0.0, 0.0], requires_grad=True)  # the last pair has nothing scored
    metrics, count = pair_loss("orpo", policy, None, torch.tensor([2, 4, 3, 5, 0, 0]), pair_coefficients("orpo"))
    metrics["loss"].backward()
    assert count == 2
    assert metrics["loss"].isfinite()
    assert policy.grad.isfinite().all()


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("sigmoid", {"beta": 0}, "--beta is 0, it must be larger than 0"),
        ("robust", {"label_smoothing": 0.5}, "--label_smoothing is 0.5, it must be at least 0 and below 0.5"),
        ("simpo", {"target_margin": -1}, "--target_margin is -1, it must be at least 0"),
        ("ipo", {"chosen_weight": -0.1}, "--chosen_weight is -0.1, it must be at least 0"),
        *(
            (name, {option: 0.25}, f"--{option} has no meaning with --loss {name}")
            for name, row in PAIR_LOSSES.items()
            for option in ("label_smoothing", "target_margin", "chosen_weight")
            if option not in row.coefficients
        ),
    ],
)
def test_coefficients_are_refused_by_name(name, given, message):
    with pytest.raises(ValueError, match=message):
        pair_coefficients(name, **given)
