"""What training minimises and validation measures. Always in float32, also where the model computes in fewer bits.

A loss returns sums over a micro batch and how many things they are sums over, because micro batches differ in that and
the mean is over all of an optimizer step, or of a data set.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_llama.data import Batch
from lit_llama.model import LLaMA
from lit_llama.seam import Adapter

PreferenceLoss = Literal["sigmoid", "ipo"]

# What each loss measures, and the label of its axis in a picture.
SUPERVISED_METRICS = {"loss": "cross-entropy per scored token (nats)"}
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


class LossSums(NamedTuple):
    """What a loss adds up over a micro batch.

    Args:
        metrics: scalars by name; "loss" is the one that is minimised.
        count: number of things that they are sums over: scored tokens, or pairs.
    """

    metrics: dict[str, Tensor]
    count: Tensor


def supervised_loss(model: LLaMA, adapter: Adapter | None, batch: Batch) -> LossSums:
    """Cross-entropy of the scored tokens.

    Args:
        model: the base model.
        adapter: what is tuned, if anything.
        batch: examples, padded or packed.

    Returns:
        "loss" over scored tokens.
    """
    return LossSums({"loss": -_scored_logprobs(model, adapter, batch).sum()}, batch.scored.sum())


def response_logprobs(model: LLaMA, adapter: Adapter | None, batch: Batch) -> Tensor:
    """Log-probability of each example's scored tokens together.

    Args:
        model: the base model.
        adapter: what is added to it, if anything.
        batch: examples, padded or packed.

    Returns:
        (E,) float32, E being the number of examples.
    """
    tokens = _scored_logprobs(model, adapter, batch)
    return torch.stack([part.sum() for part in tokens.split(batch.scored_lengths().tolist())])


def _scored_logprobs(model: LLaMA, adapter: Adapter | None, batch: Batch) -> Tensor:
    """Log-probability of each scored token, float32 (n); logits are computed for those alone."""
    predicts_scored = F.pad(batch.scored[:, 1:], (0, 1))  # position t predicts token t + 1
    hidden = model.hidden_states(batch.ids, adapter, at=predicts_scored, lengths=batch.lengths)  # (n, C)
    return token_logprobs(model, hidden, batch.ids[batch.scored])


def token_logprobs(model: LLaMA, hidden: Tensor, tokens: Tensor) -> Tensor:
    """Log-probability of a token at each position.

    The logits of a few positions at a time are all that is ever kept, here and in the backward pass.

    Args:
        model: the base model.
        hidden: its hidden states (n, C) at n positions, see `LLaMA.hidden_states`.
        tokens: ids of the tokens that follow (n).

    Returns:
        (n) float32, in nats.
    """

    def score(hidden: Tensor, tokens: Tensor) -> Tensor:
        return -F.cross_entropy(model.head(hidden).float(), tokens, reduction="none")

    return model.scores(score, hidden, tokens)


def divergence(model: LLaMA, teacher: Tensor, student: Tensor) -> Tensor:
    """Kullback-Leibler divergence KL(teacher || student) of the next token's distributions at each position.

    The logits of a few positions at a time are all that is ever kept, here and in the backward pass.

    Args:
        model: the base model, whose head both share.
        teacher: hidden states (n, C) that the distributions to be learned are made of; they get no gradient.
        student: hidden states (n, C) at the same positions.

    Returns:
        (n) float32, in nats.
    """

    def score(student: Tensor, teacher: Tensor) -> Tensor:
        wanted, found = (model.head(hidden).float().log_softmax(-1) for hidden in (teacher, student))  # (k, V)
        return F.kl_div(found, wanted, reduction="none", log_target=True).sum(-1)

    return model.scores(score, student, teacher)


def preference_loss(
    policy: Tensor,
    reference: Tensor,
    lengths: Tensor,
    beta: float = 0.1,
    kind: PreferenceLoss = "sigmoid",
    label_smoothing: float = 0.0,
    chosen_weight: float = 0.0,
) -> LossSums:
    """Direct Preference Optimization (arXiv 2305.18290), over pairs.

    With the margin h of a pair, how much more the policy than the reference prefers the chosen response,

        h = (policy_chosen - reference_chosen) - (policy_rejected - reference_rejected)
        "sigmoid":  -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h)
        "ipo":      (h - 1 / (2 beta))^2

    e is the label smoothing, the share of pairs that are taken to be the wrong way round (conservative DPO, equation 3
    of https://ericmitchell.ai/cdpo.pdf); IPO is equation 17 of arXiv 2310.12036, on summed log-probabilities. DPO alone
    is content to make both responses unlikelier, the rejected one more so. So the cross-entropy of the chosen response
    may be added (arXiv 2404.19733, equation 1):

        + chosen_weight (-policy_chosen / length_chosen)

    Args:
        policy: log-probabilities of the responses under the policy, (2 P): chosen, rejected, chosen, ...
        reference: the same under the reference.
        lengths: scored tokens of each response, (2 P); a pair without any is not counted.
        beta: how strongly the policy is held to the reference; small is loose.
        kind: "sigmoid" or "ipo".
        label_smoothing: e, from 0 to below 1/2.
        chosen_weight: weight of the chosen response's cross-entropy per token.

    Returns:
        The `PREFERENCE_METRICS` over pairs. A reward is beta (policy - reference); accuracy counts the pairs whose
        chosen response has the higher one, and half of those where both are equal, as at a start from the reference.

    Raises:
        ValueError: a coefficient is out of range.
    """
    check_preference_loss(beta, kind, label_smoothing, chosen_weight)
    rewards = beta * (policy - reference)
    chosen_reward, rejected_reward = rewards.view(-1, 2).unbind(1)  # (P) each
    margin = chosen_reward - rejected_reward
    if kind == "sigmoid":
        loss = -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)
    else:
        loss = (margin / beta - 1 / (2 * beta)) ** 2
    chosen_logp, rejected_logp = policy.view(-1, 2).unbind(1)
    chosen_length, rejected_length = lengths.view(-1, 2).unbind(1)
    values = {
        "loss": loss,
        "accuracy": (margin.sign() + 1) / 2,
        "chosen_reward": chosen_reward,
        "rejected_reward": rejected_reward,
        "margin": margin,
        "chosen_logp": chosen_logp,
        "rejected_logp": rejected_logp,
        "chosen_length": chosen_length,
        "rejected_length": rejected_length,
    }
    if chosen_weight:
        values["loss"] = loss - chosen_weight * chosen_logp / chosen_length.clamp(min=1)
    counted = chosen_length + rejected_length > 0
    return LossSums({name: (value * counted).sum() for name, value in values.items()}, counted.sum())


def check_preference_loss(
    beta: float, kind: PreferenceLoss = "sigmoid", label_smoothing: float = 0.0, chosen_weight: float = 0.0
) -> None:
    """Refuse coefficients with which `preference_loss` has no meaning.

    Raises:
        ValueError: names all of them by their options.
    """
    problems = []
    if not beta > 0:
        problems.append(f"--beta is {beta:g}, it must be larger than 0")
    if not 0 <= label_smoothing < 0.5:
        problems.append(f"--label_smoothing is {label_smoothing}, it must be at least 0 and below 0.5")
    if kind == "ipo" and label_smoothing:
        problems.append("--label_smoothing has no meaning with --loss ipo: leave out one of them")
    if not chosen_weight >= 0:
        problems.append(f"--chosen_weight is {chosen_weight}, it must be at least 0")
    if problems:
        raise ValueError("; ".join(problems))
