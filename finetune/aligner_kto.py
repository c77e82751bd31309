"""Tune an Aligner on answers that are each good or bad, by KTO (arXiv 2402.01306), where there are no pairs of them.

    python finetune/aligner_kto.py --data_dir data/unpaired --adapter_path out/chosen/aligner.safetensors
    python finetune/aligner_kto.py --data_dir data/unpaired --reference_path base --cache_reference

Needs answers made by one of scripts/prepare_*.py with --kind unpaired. Training usually starts from an adapter that was
first tuned on good answers (--kind supervised); it may be of any method. Policy and reference share one base in memory.
The loss stands in lit_llama/preference_losses.py. Its reference point is taken once per optimizer step, over all micro
batches and devices, and once per validation: by how much policy and reference differ, on average, on the same prompts
with answers to other prompts.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lit_llama.adapters import Method
from lit_llama.data import Batch, open_data
from lit_llama.dpo_reference import cached_reference, read_policy_and_reference, reference_logprobs
from lit_llama.losses import LossSums, response_logprobs
from lit_llama.plan import PREFERENCE_RATES, Decay, Plan
from lit_llama.preference_losses import UNPAIRED_METRICS, check_kto, kto_loss, log_ratio
from lit_llama.samples import sample_answers
from lit_llama.script.command_line import run
from lit_llama.script.conditions import Conditions
from lit_llama.script.machine import build_all
from lit_llama.training import add_up, fit
from lit_llama.tuning import find_learning_rate


def main(
    checkpoint_dir: Path = Path("checkpoints/SmolLM2-135M-Instruct"),
    data_dir: Path = Path("data/unpaired"),
    out_dir: Path = Path("out/kto"),
    adapter_path: Path | None = None,
    method: Method | None = None,  # aligner
    aligner_length: int | None = None,  # 1; paper: 1 and 10
    reference_path: Path | None = None,
    cache_reference: bool = False,
    beta: float = 0.1,
    good_weight: float = 1.0,
    bad_weight: float = 1.0,
    learning_rate: float | Literal["auto"] | None = None,
    decay: Decay = "linear",
    weight_decay: float = 0.02,
    batch_size: int = 8,  # paper: 32; the reference point is the mean of as many
    micro_batch_size: int = 8,
    epochs: int = 2,  # paper: 1
    max_steps: int | None = None,
    warmup_steps: int | None = None,  # 10, or a tenth of a run that is shorter
    max_seq_length: int = 512,
    pack: bool = False,
    max_grad_norm: float | None = None,
    eval_interval: int = 48,
    patience: int | None = None,
    seed: int = 1337,
    **conditions: Any,
) -> None:
    """Fine-tune.

    Args:
        checkpoint_dir: folder of the base model, which stays as it is.
        data_dir: folder of the tokenised answers.
        out_dir: folder for the adapter, its training states, metrics and their picture.
        adapter_path: adapter to start from, of any method; if not given, a new one.
        method: method of a new adapter, "aligner" if not given; all but an Aligner have their default sizes.
        aligner_length: number of prefix tokens N of a new Aligner, 1 if not given.
        reference_path: adapter that the policy is held to, or "base" for the base model alone; if not given, the one
            that training starts from.
        cache_reference: compute the reference's log-probabilities once, and keep them in --data_dir.
        beta: how soon an answer counts as better or worse than the reference point; a small one lets the policy go
            further from the reference.
        good_weight: weight of the good answers. The paper advises that the weights make up for a difference in number:
            good_weight times their number should be 1 to 4/3 times bad_weight times that of the bad ones.
        bad_weight: weight of the bad answers.
        learning_rate: peak of the learning rate, reached at the end of warm-up; if not given, 3e-3 for aligner and
            llama_adapter, 1e-3 for bias, 3e-4 for lora; "auto" tries a few around that for a few steps on a part of the
            training answers kept apart, and takes the best.
        decay: how the learning rate falls from the peak: "linear" to zero, or "none".
        weight_decay: weight decay of AdamW.
        batch_size: number of answers per optimizer step, over all devices.
        micro_batch_size: number of answers per forward on one device.
        epochs: number of times that every answer is read, unless --max_steps is given.
        max_steps: number of optimizer steps.
        warmup_steps: number of optimizer steps over which the learning rate rises; if not given, 10, or a tenth of a
            run of fewer steps than that.
        max_seq_length: number of tokens of the longest example that is accepted; prepare the data with this length.
        pack: put the examples of a forward into one row, without attention between them, instead of padding them.
        max_grad_norm: norm that larger gradients are scaled down to.
        eval_interval: number of optimizer steps between validations, which also show a few answers.
        patience: number of validations in a row without a lower loss after which the run ends early.
        seed: seed of the initialisation and of the order of the answers.
        conditions: what all scripts of finetune/ have: other adapters, text to keep, the machine; see `Conditions`. The
            scale of a preference is not defined, so --scale_range is refused.
    """
    options = dict(locals())
    torch.manual_seed(seed)
    refused = {"scale_range": "an answer does not say what lies between good and bad"}
    if cache_reference:
        refused["also_adapter"] = "what --cache_reference keeps does not depend on it"
    setup, plan, _, start = build_all(
        lambda: Conditions(**conditions).without(refused),
        lambda: Plan(
            learning_rate=learning_rate, decay=decay, batch_size=batch_size, micro_batch_size=micro_batch_size,
            epochs=epochs, max_steps=max_steps, warmup_steps=warmup_steps, max_grad_norm=max_grad_norm,
            eval_interval=eval_interval, patience=patience, seed=seed, pack=pack,
        ),
        lambda: check_kto(beta, good_weight, bad_weight),
        lambda: read_policy_and_reference(checkpoint_dir, adapter_path, reference_path, method, aligner_length),
    )  # fmt: skip
    policy = start.policy
    tokenizer, (train, validation) = open_data(checkpoint_dir, data_dir, max_seq_length, kind="unpaired")
    plan = plan.for_items(len(train))

    fabric, base, objective = setup.open(checkpoint_dir, train.header["prompt_style"], plan, out_dir, start.read)
    if cache_reference:
        for dataset in (train, validation):
            dataset.reference = cached_reference(
                fabric, base.model, start.reference, dataset, data_dir, micro_batch_size
            )
    optimizer = torch.optim.AdamW(policy.parameters(), weight_decay=weight_decay)

    reference_point = 0.0

    def logprobs(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        reference = reference_logprobs(base.model, objective.together(start.reference), batch)
        return response_logprobs(base.model, objective.together(policy), batch), reference, batch.scored_lengths()

    @torch.no_grad()
    def take_reference_point(batches: Iterable[Batch]) -> None:
        nonlocal reference_point
        means, *_ = add_up(fabric, (log_ratio(*logprobs(batch.part(1, per_item=2))) for batch in batches))
        reference_point = max(0.0, means["log_ratio"])

    def measure(batch: Batch) -> LossSums:
        assert batch.wanted is not None
        answers = logprobs(batch.part(0, per_item=2))
        sums = kto_loss(*answers, batch.wanted, reference_point, beta, good_weight, bad_weight)
        return objective.keep(sums, policy, batch, per_item=True)

    def show_answers() -> str:
        return sample_answers(base.model, objective.together(policy), tokenizer, base.style, validation)

    plan = find_learning_rate(
        fabric, policy, optimizer, measure, train, tokenizer, plan,
        rates=PREFERENCE_RATES, measured=objective.measured(UNPAIRED_METRICS), look_ahead=take_reference_point,
        resume_dir=setup.resume_dir(out_dir),
    )  # fmt: skip
    folder = setup.run_folder(out_dir, base, options | start.kind, objective, start.fingerprints)
    fit(
        fabric, policy, optimizer, measure, train, validation, plan, folder,
        measured=objective.measured(UNPAIRED_METRICS), look_ahead=take_reference_point, show_answers=show_answers,
    )  # fmt: skip


if __name__ == "__main__":
    run(main)
