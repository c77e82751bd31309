"""What preference tuning minimises: a table of losses over pairs, and the loss over answers that are good or bad.

A loss sees a pair as two scores, c of the chosen and r of the rejected response. With a reference, a response y to the
prompt x scores log pi(y|x) - log pi_ref(y|x), and without one log pi(y|x), pi being the policy. A score is the sum over
the response's scored tokens, or their mean. s is the logistic function, e the label smoothing, g the target margin.

    loss      score  reference  formula                                                     at the start
    sigmoid   sum    yes        -(1-e) log s(beta (c-r)) - e log s(-beta (c-r))             log 2           DPO [1], [2]
    robust    sum    yes        (-(1-e) log s(beta (c-r)) + e log s(-beta (c-r))) / (1-2e)  log 2           rDPO [3]
    ipo       sum    yes        (c - r - 1 / (2 beta))^2                                    1 / (4 beta^2)  IPO [4]
    ipo_mean  mean   yes        the same                                                    1 / (4 beta^2)  IPO [5]
    hinge     sum    yes        max(0, 1 - beta (c-r))                                      1               SLiC [6]
    apo_zero  sum    yes        1 - s(beta c) + s(beta r)                                   1               APO [7]
    simpo     mean   no         -(1-e) log s(beta (c-r) - g) - e log s(g - beta (c-r))      log(1 + exp g)  SimPO [8]
    orpo      mean   no         -c - beta log s(o(c) - o(r)), o(z) = z - log(1 - exp z)     beta log 2 - c  ORPO [9]

The start is where policy and reference agree; without a reference, where the policy finds both responses of a pair
equally likely per token, and e = 0.

[1] arXiv 2305.18290, equation 7. [2] https://ericmitchell.ai/cdpo.pdf, equation 3, for the label smoothing. [3] arXiv
2403.00409, the unbiased loss. [4] arXiv 2310.12036, equation 17, on sums as it stands there. [5] On means: TRL's "ipo",
which TRL's authors confirmed with those of the paper. [6] arXiv 2305.10425, in the form of "hinge-norm" of arXiv
2309.06657. [7] arXiv 2408.06266, equation 7. [8] arXiv 2405.14734, equation 6; the label smoothing is TRL's. [9] arXiv
2403.07691, equations 4, 6 and 7; beta is the paper's lambda, and TRL's beta. Its first term is the cross-entropy of the
chosen response per token; TRL takes it over the prompt as well.

DPO is content to make both responses unlikelier, the rejected one more so. So the cross-entropy of the chosen response
per token, which ORPO has, can be added to the other losses, times `chosen_weight` (arXiv 2404.19733, equation 1).

KTO (arXiv 2402.01306, equations 7 and 8) needs no pairs. An answer y scores log pi(y|x) - log pi_ref(y|x), summed; z is
the reference point, by how much policy and reference differ on answers to other prompts:

    a good answer:  good_weight (1 - s(beta (score - z)))          1/2 good_weight at the start
    a bad answer:   bad_weight (1 - s(beta (z - score)))           1/2 bad_weight at the start
    z = max(0, mean of log pi(y'|x) - log pi_ref(y'|x)), y' an answer to another prompt; no gradient flows into it
"""

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_llama.losses import LossSums

PairLoss = Literal["sigmoid", "robust", "ipo", "ipo_mean", "hinge", "apo_zero", "simpo", "orpo"]

# What a loss over pairs measures, and the label of its axis in a picture.
PREFERENCE_METRICS = {
    "loss": "loss per pair",
    "accuracy": "reward accuracy",
    "chosen_reward": "reward (nats)",
    "rejected_reward": "reward (nats)",
    "margin": "reward (nats)",
    "chosen_logp": "log-probability of a response (nats)",
    "rejected_logp": "log-probability of a response (nats)",
    "chosen_length": "scored tokens of a response",
    "rejected_length": "scored tokens of a response",
}


UNPAIRED_METRICS = {
    "loss": "loss per answer",
    "accuracy": "reward accuracy",
    "good_reward": "reward (nats)",
    "bad_reward": "reward (nats)",
    "reference_point": "reward (nats)",
    "good_logp": "log-probability of an answer (nats)",
    "bad_logp": "log-probability of an answer (nats)",
}


def _sigmoid(
    chosen: Tensor, rejected: Tensor, beta: float, label_smoothing: float, target_margin: float = 0.0
) -> Tensor:
    logit = beta * (chosen - rejected) - target_margin
    return -(1 - label_smoothing) * F.logsigmoid(logit) - label_smoothing * F.logsigmoid(-logit)


def _robust(chosen: Tensor, rejected: Tensor, beta: float, label_smoothing: float) -> Tensor:
    as_given, swapped = F.logsigmoid(beta * (chosen - rejected)), F.logsigmoid(-beta * (chosen - rejected))
    return (-(1 - label_smoothing) * as_given + label_smoothing * swapped) / (1 - 2 * label_smoothing)


def _ipo(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    return (chosen - rejected - 1 / (2 * beta)) ** 2


def _hinge(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    return F.relu(1 - beta * (chosen - rejected))


def _apo_zero(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    return 1 - torch.sigmoid(beta * chosen) + torch.sigmoid(beta * rejected)


def _orpo(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    return -chosen - beta * F.logsigmoid(_log_odds(chosen) - _log_odds(rejected))


def _log_odds(z: Tensor) -> Tensor:
    """Of something with log-probability z (P); what is certain has infinite odds, which are cut at a million."""
    z = z.clamp(max=-1e-6)
    return z - torch.log(-torch.expm1(z))


class _Row(NamedTuple):
    """One row of the table.

    Args:
        formula: the loss of each pair (P), of the scores of chosen and rejected (P) and the coefficients.
        has_reference: whether a score is relative to a reference.
        per_token: whether a score is a mean over tokens.
        coefficients: those that have a meaning, with the values that they have if they are not given.
    """

    formula: Callable[..., Tensor]
    has_reference: bool
    per_token: bool
    coefficients: Mapping[str, float]


_SMOOTH = {"beta": 0.1, "label_smoothing": 0.0, "chosen_weight": 0.0}
_PLAIN = {"beta": 0.1, "chosen_weight": 0.0}
PAIR_LOSSES: dict[str, _Row] = {
    "sigmoid": _Row(_sigmoid, True, False, _SMOOTH),
    "robust": _Row(_robust, True, False, _SMOOTH | {"label_smoothing": 0.1}),
    "ipo": _Row(_ipo, True, False, _PLAIN),
    "ipo_mean": _Row(_ipo, True, True, _PLAIN),
    "hinge": _Row(_hinge, True, False, _PLAIN),
    "apo_zero": _Row(_apo_zero, True, False, _PLAIN),
    "simpo": _Row(_sigmoid, False, True, _SMOOTH | {"beta": 2.0, "target_margin": 0.5}),
    "orpo": _Row(_orpo, False, True, {"beta": 0.1}),
}


def pair_coefficients(loss: PairLoss, **given: float | None) -> dict[str, float]:
    """The coefficients of a loss, those that are not given with its defaults.

    Args:
        loss: a name in `PAIR_LOSSES`.
        given: beta, label_smoothing, target_margin, chosen_weight; None for one that is not given.

    Raises:
        ValueError: coefficients are out of range, or have no meaning with this loss; names all by their options.
    """
    known = PAIR_LOSSES[loss].coefficients
    values = dict(known) | {name: value for name, value in given.items() if value is not None}
    problems = [f"--{name} has no meaning with --loss {loss}: leave it out" for name in values if name not in known]
    if not values["beta"] > 0:
        problems.append(f"--beta is {values['beta']:g}, it must be larger than 0")
    if not 0 <= values.get("label_smoothing", 0) < 0.5:
        problems.append(f"--label_smoothing is {values['label_smoothing']}, it must be at least 0 and below 0.5")
    problems += [
        f"--{name} is {values[name]}, it must be at least 0"
        for name in ("target_margin", "chosen_weight")
        if not values.get(name, 0) >= 0
    ]
    if problems:
        raise ValueError("; ".join(problems))
    return values


def check_reference(loss: PairLoss, **given: object) -> None:
    """Refuse a reference where a loss has none.

    Args:
        loss: a name in `PAIR_LOSSES`.
        given: options of the reference, by their names; one that is not given is None or False.

    Raises:
        ValueError: names those that are given.
    """
    names = " and ".join(f"--{name}" for name, value in given.items() if value)
    if names and not PAIR_LOSSES[loss].has_reference:
        raise ValueError(f"--loss {loss} has no reference: leave out {names}")


def pair_loss(
    loss: PairLoss, policy: Tensor, reference: Tensor | None, lengths: Tensor, coefficients: Mapping[str, float]
) -> LossSums:
    """A loss over pairs.

    Args:
        loss: a name in `PAIR_LOSSES`.
        policy: log-probabilities of the responses under the policy, (2 P): chosen, rejected, chosen, ...
        reference: the same under the reference, of a loss that has one.
        lengths: scored tokens of each response, (2 P); a pair without any is not counted.
        coefficients: those of `pair_coefficients`.

    Returns:
        The `PREFERENCE_METRICS` over pairs. A reward is beta times the score; accuracy counts the pairs whose chosen
        response has the higher one, and half of those where both are equal, as at a start from the reference.
    """
    row, own = PAIR_LOSSES[loss], dict(coefficients)
    chosen_weight = own.pop("chosen_weight", 0.0)
    scores = policy - reference if row.has_reference and reference is not None else policy
    if row.per_token:
        scores = scores / lengths.clamp(min=1)
    chosen, rejected = scores.view(-1, 2).unbind(1)  # (P) each
    chosen_logp, rejected_logp = policy.view(-1, 2).unbind(1)
    chosen_length, rejected_length = lengths.view(-1, 2).unbind(1)
    values = {
        "loss": row.formula(chosen, rejected, **own) - chosen_weight * chosen_logp / chosen_length.clamp(min=1),
        "accuracy": ((chosen - rejected).sign() + 1) / 2,
        "chosen_reward": own["beta"] * chosen,
        "rejected_reward": own["beta"] * rejected,
        "margin": own["beta"] * (chosen - rejected),
        "chosen_logp": chosen_logp,
        "rejected_logp": rejected_logp,
        "chosen_length": chosen_length,
        "rejected_length": rejected_length,
    }
    counted = chosen_length + rejected_length > 0
    return LossSums({name: (value * counted).sum() for name, value in values.items()}, counted.sum())


def check_kto(beta: float, good_weight: float, bad_weight: float) -> None:
    """Refuse coefficients with which KTO has no meaning.

    Raises:
        ValueError: names all of them by their options.
    """
    weights = {"good_weight": good_weight, "bad_weight": bad_weight}
    problems = [] if beta > 0 else [f"--beta is {beta:g}, it must be larger than 0"]
    problems += [f"--{name} is {weight}, it must be at least 0" for name, weight in weights.items() if not weight >= 0]
    if good_weight == bad_weight == 0:
        problems.append("--good_weight and --bad_weight are both 0: nothing would be learned")
    if problems:
        raise ValueError("; ".join(problems))


def log_ratio(policy: Tensor, reference: Tensor, lengths: Tensor) -> LossSums:
    """How much likelier answers are under the policy than under the reference, for KTO's reference point.

    Args:
        policy: log-probabilities of answers to other prompts under the policy, (E).
        reference: the same under the reference.
        lengths: scored tokens of each, (E); one without any is not counted.

    Returns:
        "log_ratio" over answers; KTO's reference point is its mean, but at least 0.
    """
    counted = lengths > 0
    return LossSums({"log_ratio": ((policy - reference) * counted).sum()}, counted.sum())


def kto_loss(
    policy: Tensor,
    reference: Tensor,
    lengths: Tensor,
    wanted: Tensor,
    reference_point: float,
    beta: float = 0.1,
    good_weight: float = 1.0,
    bad_weight: float = 1.0,
) -> LossSums:
    """Kahneman-Tversky optimisation, over answers that are good or bad.

    Args:
        policy: log-probabilities of the answers under the policy, (E).
        reference: the same under the reference.
        lengths: scored tokens of each answer, (E); one without any is not counted.
        wanted: whether each answer is a good one, bool (E).
        reference_point: z, the same for all micro batches of a step.
        beta: how soon an answer counts as better or worse than the reference point.
        good_weight: weight of the good answers.
        bad_weight: weight of the bad answers.

    Returns:
        The `UNPAIRED_METRICS` over answers. A reward is beta times the score; accuracy counts the good answers above
        the reference point and the bad ones below it, and half of those that are on it, as at a start from the
        reference.
    """
    score = policy - reference
    margin = torch.where(wanted, score - reference_point, reference_point - score)
    weight = torch.where(wanted, good_weight, bad_weight)
    counted = lengths > 0
    values = {
        "loss": weight * (1 - torch.sigmoid(beta * margin)),
        "accuracy": (margin.sign() + 1) / 2,
        "reference_point": torch.full_like(score, beta * reference_point),
    }
    metrics = {name: (value * counted).sum() for name, value in values.items()}
    for name, own in (("good", wanted & counted), ("bad", ~wanted & counted)):
        metrics[f"{name}_reward"] = torch.stack([(beta * score * own).sum(), own.sum()])
        metrics[f"{name}_logp"] = torch.stack([(policy * own).sum(), own.sum()])
    return LossSums(metrics, counted.sum())
