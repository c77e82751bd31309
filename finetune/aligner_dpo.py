"""Tune an Aligner on preference pairs, by Direct Preference Optimization (arXiv 2305.18290) or a loss of its family.

    python finetune/aligner_dpo.py --data_dir data/pairs --adapter_path out/chosen/aligner.safetensors
    python finetune/aligner_dpo.py --data_dir data/pairs --adapter_path out/lora/lora.safetensors --out_dir out/lora-dpo
    python finetune/aligner_dpo.py --data_dir data/pairs --loss orpo --out_dir out/orpo

Needs pairs made by one of scripts/prepare_*.py with --kind pairs. Training usually starts from an adapter that was
first tuned on the chosen answers (--kind supervised); it may be of any method. Policy and reference share one base in
memory. The losses and their sources stand in lit_llama/preference_losses.py; for answers without pairs there is
finetune/aligner_kto.py.
"""

from pathlib import Path
from typing import Any, Literal

import torch

from lit_llama.adapters import Method
from lit_llama.data import Batch, open_data
from lit_llama.dpo_reference import cached_reference, read_policy_and_reference, reference_logprobs
from lit_llama.losses import LossSums, response_logprobs
from lit_llama.plan import PREFERENCE_RATES, Decay, Plan
from lit_llama.preference_losses import (
    PAIR_LOSSES,
    PREFERENCE_METRICS,
    PairLoss,
    check_reference,
    pair_coefficients,
    pair_loss,
)
from lit_llama.samples import sample_answers
from lit_llama.script.command_line import run
from lit_llama.script.conditions import Conditions
from lit_llama.script.machine import build_all
from lit_llama.training import fit
from lit_llama.tuning import find_learning_rate


def main(
    checkpoint_dir: Path = Path("checkpoints/SmolLM2-135M-Instruct"),
    data_dir: Path = Path("data/pairs"),
    out_dir: Path = Path("out/dpo"),
    adapter_path: Path | None = None,
    method: Method | None = None,  # aligner
    aligner_length: int | None = None,  # 1; paper: 1 and 10
    reference_path: Path | None = None,
    cache_reference: bool = False,
    loss: PairLoss = "sigmoid",
    beta: float | None = None,  # 0.1 as in the paper; 2 of SimPO
    label_smoothing: float | None = None,  # 0; 0.1 of robust
    target_margin: float | None = None,  # 0.5 of SimPO
    chosen_weight: float | None = None,  # 0
    learning_rate: float | Literal["auto"] | None = None,  # paper: 1e-4, of which their schedule reached 1.9e-5
    decay: Decay = "linear",  # paper: none
    weight_decay: float = 0.02,
    batch_size: int = 4,  # paper: 32 pairs, counted as 64 examples
    micro_batch_size: int = 4,
    epochs: int = 2,  # paper: 3
    max_steps: int | None = None,
    warmup_steps: int | None = None,  # 10, or a tenth of a run that is shorter
    max_seq_length: int = 512,
    pack: bool = False,
    max_grad_norm: float | None = None,
    eval_interval: int = 48,
    patience: int | None = None,
    seed: int = 1337,
    **conditions: Any,  # paper: --precision bf16-true
) -> None:
    """Fine-tune.

    Args:
        checkpoint_dir: folder of the base model, which stays as it is.
        data_dir: folder of the tokenised pairs.
        out_dir: folder for the adapter, its training states, metrics and their picture.
        adapter_path: adapter to start from, of any method; if not given, a new one.
        method: method of a new adapter, "aligner" if not given; all but an Aligner have their default sizes.
        aligner_length: number of prefix tokens N of a new Aligner, 1 if not given.
        reference_path: adapter that the policy is held to, or "base" for the base model alone; if not given, the one
            that training starts from.
        cache_reference: compute the reference's log-probabilities once, and keep them in --data_dir.
        loss: "sigmoid", DPO's own; "robust", "ipo", "ipo_mean", "hinge" or "apo_zero", which also have a reference;
            "simpo" or "orpo", which have none. lit_llama/preference_losses.py has the formulas.
        beta: strength with which the policy is held to the reference: a small one lets it go further. SimPO's is the
            scale of its margin, ORPO's the weight of the odds ratio. If not given, 0.1, or 2 with simpo.
        label_smoothing: share of pairs that are taken to be the wrong way round, with sigmoid, robust and simpo. If not
            given, 0, or 0.1 with robust.
        target_margin: margin that simpo aims at, 0.5 if not given.
        chosen_weight: weight of the chosen response's cross-entropy per token, which is added to the loss; DPO alone
            may make both responses less likely. If not given, 0; orpo has that term already.
        learning_rate: peak of the learning rate, reached at the end of warm-up; if not given, 3e-3 for aligner and
            llama_adapter, 1e-3 for bias, 3e-4 for lora; "auto" tries a few around that for a few steps on a part of the
            training pairs kept apart, and takes the best.
        decay: how the learning rate falls from the peak: "linear" to zero, or "none".
        weight_decay: weight decay of AdamW.
        batch_size: number of pairs per optimizer step, over all devices.
        micro_batch_size: number of pairs per forward on one device.
        epochs: number of times that every pair is read, unless --max_steps is given.
        max_steps: number of optimizer steps.
        warmup_steps: number of optimizer steps over which the learning rate rises; if not given, 10, or a tenth of a
            run of fewer steps than that.
        max_seq_length: number of tokens of the longest example that is accepted; prepare the data with this length.
        pack: put the examples of a forward into one row, without attention between them, instead of padding them.
        max_grad_norm: norm that larger gradients are scaled down to.
        eval_interval: number of optimizer steps between validations, which also show a few answers.
        patience: number of validations in a row without a lower loss after which the run ends early.
        seed: seed of the initialisation and of the order of the pairs.
        conditions: what all scripts of finetune/ have: other adapters, text to keep, the machine; see `Conditions`. The
            scale of a preference is not defined, so --scale_range is refused.
    """
    options = dict(locals())
    torch.manual_seed(seed)
    has_reference = PAIR_LOSSES[loss].has_reference
    refused = {"scale_range": "a pair does not say what lies between its responses"}
    if cache_reference:
        refused["also_adapter"] = "what --cache_reference keeps does not depend on it"
    setup, plan, coefficients, _, start = build_all(
        lambda: Conditions(**conditions).without(refused),
        lambda: Plan(
            learning_rate=learning_rate, decay=decay, batch_size=batch_size, micro_batch_size=micro_batch_size,
            epochs=epochs, max_steps=max_steps, warmup_steps=warmup_steps, max_grad_norm=max_grad_norm,
            eval_interval=eval_interval, patience=patience, seed=seed, pack=pack,
        ),
        lambda: pair_coefficients(
            loss, beta=beta, label_smoothing=label_smoothing, target_margin=target_margin, chosen_weight=chosen_weight
        ),
        lambda: check_reference(loss, reference_path=reference_path, cache_reference=cache_reference),
        lambda: read_policy_and_reference(checkpoint_dir, adapter_path, reference_path, method, aligner_length),
    )  # fmt: skip
    policy = start.policy
    tokenizer, (train, validation) = open_data(checkpoint_dir, data_dir, max_seq_length, kind="pairs")
    plan = plan.for_items(len(train))

    fabric, base, objective = setup.open(checkpoint_dir, train.header["prompt_style"], plan, out_dir, start.read)
    if cache_reference:
        for dataset in (train, validation):
            dataset.reference = cached_reference(
                fabric, base.model, start.reference, dataset, data_dir, micro_batch_size
            )
    optimizer = torch.optim.AdamW(policy.parameters(), weight_decay=weight_decay)

    def measure(batch: Batch) -> LossSums:
        held_to = objective.together(start.reference)
        reference = reference_logprobs(base.model, held_to, batch) if has_reference else None
        logprobs = response_logprobs(base.model, objective.together(policy), batch)
        sums = pair_loss(loss, logprobs, reference, batch.scored_lengths(), coefficients)
        return objective.keep(sums, policy, batch, per_item=True)

    def show_answers() -> str:
        return sample_answers(base.model, objective.together(policy), tokenizer, base.style, validation)

    plan = find_learning_rate(
        fabric, policy, optimizer, measure, train, tokenizer, plan,
        rates=PREFERENCE_RATES, measured=objective.measured(PREFERENCE_METRICS), resume_dir=setup.resume_dir(out_dir),
    )  # fmt: skip
    folder = setup.run_folder(out_dir, base, options | coefficients | start.kind, objective, start.fingerprints)
    fit(
        fabric, policy, optimizer, measure, train, validation, plan, folder,
        measured=objective.measured(PREFERENCE_METRICS), show_answers=show_answers,
    )  # fmt: skip


if __name__ == "__main__":
    run(main)
