"""Tune an Aligner on preference pairs, by Direct Preference Optimization (arXiv 2305.18290).

    python finetune/aligner_dpo.py --data_dir data/pairs --adapter_path out/chosen/aligner.safetensors
    python finetune/aligner_dpo.py --data_dir data/pairs --adapter_path out/lora/lora.safetensors --out_dir out/lora-dpo

Needs pairs made by one of scripts/prepare_*.py with --kind pairs. Training usually starts from an adapter that was
first tuned on the chosen answers (--kind supervised); it may be of any method. Policy and reference share one base in
memory.
"""

from pathlib import Path
from typing import Any, Literal

import torch

from lit_llama.adapters import METHODS, AnyAdapter, Method, adapter_fingerprint, check_base, read_adapter
from lit_llama.base import open_base
from lit_llama.checkpoint import read_config
from lit_llama.data import Batch, open_data
from lit_llama.dpo_reference import cached_reference
from lit_llama.losses import (
    PREFERENCE_METRICS,
    LossSums,
    PreferenceLoss,
    check_preference_loss,
    preference_loss,
    response_logprobs,
)
from lit_llama.plan import Decay, Plan
from lit_llama.samples import sample_answers
from lit_llama.script.command_line import run
from lit_llama.script.machine import Machine, build_all
from lit_llama.training import fit
from lit_llama.tuning import find_learning_rate


def main(
    checkpoint_dir: Path = Path("checkpoints/SmolLM2-135M-Instruct"),
    data_dir: Path = Path("data/pairs"),
    out_dir: Path = Path("out/dpo"),
    adapter_path: Path | None = None,
    method: Method = "aligner",
    aligner_length: int = 1,  # paper: 1 and 10
    reference_path: Path | None = None,
    cache_reference: bool = False,
    beta: float = 0.1,
    loss: PreferenceLoss = "sigmoid",
    label_smoothing: float = 0.0,
    chosen_weight: float = 0.0,
    learning_rate: float | Literal["auto"] = 3e-3,  # paper: 1e-4, of which their schedule reached 1.9e-5
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
    **machine: Any,  # paper: --precision bf16-true
) -> None:
    """Fine-tune.

    Args:
        checkpoint_dir: folder of the base model, which stays as it is.
        data_dir: folder of the tokenised pairs.
        out_dir: folder for the adapter, its training states, metrics and their picture.
        adapter_path: adapter to start from, of any method; if not given, a new one.
        method: method of a new adapter; all but an Aligner have their default sizes.
        aligner_length: number of prefix tokens N of a new Aligner.
        reference_path: adapter that the policy is held to, or "base" for the base model alone; if not given, the one
            that training starts from.
        cache_reference: compute the reference's log-probabilities once, and keep them in --data_dir.
        beta: strength with which the policy is held to the reference; a small one lets it go further.
        loss: "sigmoid", DPO's own, or "ipo" (arXiv 2310.12036).
        label_smoothing: share of pairs that are taken to be the wrong way round (conservative DPO).
        chosen_weight: weight of the chosen response's cross-entropy per token, which is added to the loss; DPO alone
            may make both responses less likely.
        learning_rate: peak of the learning rate, reached at the end of warm-up; "auto" tries a few for a few steps on a
            part of the training pairs kept apart, and takes the best.
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
        machine: where the run computes and what it keeps; see `Machine`.
    """
    options = dict(locals())
    torch.manual_seed(seed)
    reference_path = reference_path or adapter_path or Path("base")
    machine, plan, _, start, held_to = build_all(
        lambda: Machine(**machine),
        lambda: Plan(
            learning_rate=learning_rate, decay=decay, batch_size=batch_size, micro_batch_size=micro_batch_size,
            epochs=epochs, max_steps=max_steps, warmup_steps=warmup_steps, max_grad_norm=max_grad_norm,
            eval_interval=eval_interval, patience=patience, seed=seed, pack=pack,
        ),
        lambda: check_preference_loss(beta, loss, label_smoothing, chosen_weight),
        lambda: read_adapter(adapter_path) if adapter_path else new_adapter(checkpoint_dir, method, aligner_length),
        lambda: (None, None) if reference_path == Path("base") else read_adapter(reference_path),
    )  # fmt: skip
    (policy, policy_info), (reference, reference_info) = start, held_to
    tokenizer, (train, validation) = open_data(checkpoint_dir, data_dir, max_seq_length, kind="pairs")
    plan = plan.for_items(len(train))
    fingerprints = {
        "start": "new" if adapter_path is None else adapter_fingerprint(policy),
        "reference": "base" if reference is None else adapter_fingerprint(reference),
    }

    fabric, mesh = machine.launch(out_dir, plan)
    base = open_base(
        checkpoint_dir, prompt_style=train.header["prompt_style"], precision=machine.precision,
        quantize=machine.quantize, device=fabric.device, mesh=mesh,
    )  # fmt: skip
    if machine.activation_checkpointing:
        base.model.checkpoint_activations()
    for path, info in ((adapter_path, policy_info), (reference_path, reference_info)):
        if info is not None:
            check_base(path, info, base.model)
    if reference is not None:
        reference.to(fabric.device).requires_grad_(False)
    if cache_reference:
        for dataset in (train, validation):
            dataset.reference = cached_reference(
                fabric, base.model, reference, dataset, data_dir, micro_batch_size, quantize=machine.quantize
            )
    optimizer = torch.optim.AdamW(policy.to(fabric.device).parameters(), weight_decay=weight_decay)

    def measure(batch: Batch) -> LossSums:
        with torch.no_grad():
            kept = batch.reference
            reference_logprobs = response_logprobs(base.model, reference, batch) if kept is None else kept
        policy_logprobs, lengths = response_logprobs(base.model, policy, batch), batch.scored_lengths()
        return preference_loss(policy_logprobs, reference_logprobs, lengths, beta, loss, label_smoothing, chosen_weight)

    def show_answers() -> str:
        return sample_answers(base.model, policy, tokenizer, base.style, validation)

    plan = find_learning_rate(
        fabric, policy, optimizer, measure, train, tokenizer, plan,
        around=3e-3, measured=PREFERENCE_METRICS, resume_dir=out_dir if machine.resume else None,
    )  # fmt: skip
    folder = machine.run_folder(out_dir, base, options, fingerprints)
    fit(
        fabric, policy, optimizer, measure, train, validation, plan, folder,
        measured=PREFERENCE_METRICS, show_answers=show_answers,
    )  # fmt: skip


def new_adapter(checkpoint_dir: Path, method: Method, aligner_length: int) -> tuple[AnyAdapter, None]:
    """A fresh adapter of any method, of which no file says anything."""
    sizes = {"length": aligner_length} if method == "aligner" else {}
    return METHODS[method](read_config(checkpoint_dir), **sizes), None


if __name__ == "__main__":
    run(main)
