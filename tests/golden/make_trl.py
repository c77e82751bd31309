"""Makes `trl.json`: preference losses and their gradients on random numbers, computed by the functions of TRL 1.16.

    python -m venv /tmp/trl && /tmp/trl/bin/pip install trl==1.16.0 && /tmp/trl/bin/python tests/golden/make_trl.py

TRL's trainers compute a loss from a model and a batch. Here the model is a table of log-probabilities per token, and
the trainer an object that has nothing but what its method reads.
"""

import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import torch
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_trainer import KTOTrainer

LENGTHS = [[3, 5], [9, 2], [4, 4], [7, 8], [1, 6]]  # of the chosen and the rejected response of each pair
WIDTH = 12
GOOD = [True, False, True, True, False, False, True, False, True, True]
DPO = {
    "sigmoid": [{"beta": 0.1}, {"beta": 1.5}],
    "robust": [{"beta": 0.5, "label_smoothing": 0.2}],
    "ipo": [{"beta": 0.3}],
    "hinge": [{"beta": 0.1}, {"beta": 1.0}],
    "apo_zero": [{"beta": 0.7}],
}
CPO = {"simpo": [{"beta": 2.0, "target_margin": 0.5}, {"beta": 2.5, "target_margin": 1.2, "label_smoothing": 0.1}]}
ORPO = {"orpo": [{"beta": 0.1}, {"beta": 1.0}]}
KTO = {"kto": [{"beta": 0.1}, {"beta": 0.5, "good_weight": 1.5, "bad_weight": 0.8}]}


class Trainer(SimpleNamespace):
    """What the methods of TRL's trainers read of themselves."""

    def __init__(self, **more):
        same = lambda value: value  # noqa: E731
        accelerator = SimpleNamespace(device=torch.device("cpu"), gather=same, gather_for_metrics=same)
        super().__init__(
            accelerator=accelerator, model=SimpleNamespace(training=False), aux_loss_enabled=False, ld_alpha=None,
            _metrics=defaultdict(lambda: defaultdict(list)), precompute_ref_logps=True, use_weighting=False,
            f_divergence_type="reverse_kl", loss_weights=[1.0], _total_train_tokens=0, label_smoothing=0.0, alpha=0.0,
            **more,
        )  # fmt: skip


def token_table(sums, lengths):
    """Log-probabilities per token (E, WIDTH - 1) with these sums, and the mask of responses (E, WIDTH)."""
    mask = torch.zeros(len(lengths), WIDTH, dtype=torch.long)
    table = []
    for row, (total, length) in enumerate(zip(sums, lengths, strict=True)):
        mask[row, 2 : 2 + length] = 1
        table.append(torch.cat([torch.zeros(1), (total / length).expand(length), torch.zeros(WIDTH - 2 - length)]))
    return torch.stack(table), mask


def a_model(table):
    """A model that has these log-probabilities, whatever it is asked."""
    nothing = torch.zeros_like(table)
    outputs = SimpleNamespace(log_probs=table, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())
    return lambda **_: outputs


def dpo(name, options, policy, reference, lengths):
    order = [*range(0, len(lengths), 2), *range(1, len(lengths), 2)]  # all chosen, then all rejected
    table, mask = token_table(policy[order], lengths[order].tolist())
    inputs = {"completion_mask": mask, "input_ids": mask, "attention_mask": mask}
    inputs |= {"ref_chosen_logps": reference[::2], "ref_rejected_logps": reference[1::2]}
    trainer = Trainer(loss_types=[name])
    vars(trainer).update(options)
    return DPOTrainer._compute_loss(trainer, a_model(table), inputs, False)


def kto(name, options, policy, reference, lengths, other_policy, other_reference):
    table, mask = token_table(policy, lengths.tolist())
    batch = {"completion_mask": mask, "input_ids": mask, "attention_mask": mask, "label": torch.tensor(GOOD)}
    batch |= {"ref_logps": reference, "ref_KL_logps": other_reference}
    trainer = Trainer(loss_type=name, calculate_KL=True, beta=options["beta"])
    trainer.desirable_weight, trainer.undesirable_weight = options.get("good_weight", 1), options.get("bad_weight", 1)
    trainer._compute_kl_logps = lambda model, batch: other_policy
    return KTOTrainer._compute_loss(trainer, a_model(table), batch, False)


def simpo(name, options, policy, reference, lengths):
    options = {**options, "simpo_gamma": options["target_margin"]}
    trainer = Trainer(loss_type=name)
    vars(trainer).update(options)
    means = policy / lengths
    return CPOTrainer.cpo_loss(trainer, means[::2], means[1::2])[0].mean()


def orpo(name, options, policy, reference, lengths):
    means = policy / lengths
    odds_ratio = ORPOTrainer.odds_ratio_loss(Trainer(**options), means[::2], means[1::2])[0]
    return -means[::2].mean() - odds_ratio.mean()  # its trainer subtracts it from the cross-entropy


def main():
    torch.manual_seed(0)
    lengths = torch.tensor(LENGTHS).flatten()
    reference = -2 * lengths * torch.rand(10)
    policy = (reference + 2 * torch.randn(10)).clamp(max=-0.1)
    numbers = {"lengths": lengths.tolist(), "policy": policy.tolist(), "reference": reference.tolist(), "good": GOOD}
    other_reference = -3 * lengths * torch.rand(10)
    other_policy = other_reference + torch.randn(10) + 1
    numbers |= {"other_policy": other_policy.tolist(), "other_reference": other_reference.tolist(), "losses": []}
    for table, compute in ((DPO, dpo), (CPO, simpo), (ORPO, orpo), (KTO, kto)):
        others = (other_policy, other_reference) if compute is kto else ()
        for name, options in ((key, value) for key, values in table.items() for value in values):
            leaf = policy.clone().requires_grad_()
            loss = compute(name, options, leaf, reference, lengths, *others)
            loss.backward()
            result = {"name": name, "options": options, "loss": loss.item(), "gradient": leaf.grad.tolist()}
            numbers["losses"].append(result)
    Path(__file__).with_name("trl.json").write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    main()
