"""Tune an Aligner on preference pairs, by Direct Preference Optimization (arXiv 2305.18290).

    python finetune/aligner_dpo.py --data_dir data/pairs --adapter_path out/chosen/aligner.safetensors
    python finetune/aligner_dpo.py --data_dir data/pairs --adapter_path out/lora/lora.safetensors --out_dir out/lora-dpo

Needs pairs made by one of scripts/prepare_*.py with --kind pairs. Training usually starts from an adapter that was
first tuned on the chosen answers (--kind supervised); it may be of any method. Policy and reference share one base in
memory.
"""

from pathlib import Path

import torch

from lit_llama.adapters import METHODS, Method, adapter_fingerprint, check_adapter, load_adapter
from lit_llama.aligner import Aligner
from lit_llama.checkpoint import load_base, read_config
from lit_llama.data import Batch, open_data
from lit_llama.devices.precision import PRECISIONS, Precision
from lit_llama.devices.quantization import Quantize
from lit_llama.dpo_reference import cached_reference
from lit_llama.hyperparameters import Decay, check_hyperparameters, total_steps
from lit_llama.losses import PREFERENCE_METRICS, LossSums, PreferenceLoss, preference_loss, response_logprobs
from lit_llama.script.command_line import run
from lit_llama.script.launch import launch, make_loggers
from lit_llama.training import fit


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
    learning_rate: float = 3e-3,  # paper: 1e-4, of which their schedule reached 1.9e-5
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
    seed: int = 1337,
    eval_interval: int = 48,
    save_interval: int = 100,
    resume: bool = False,
    logger: list[str] | None = None,
    precision: Precision = "auto",  # paper: bf16-true
    quantize: Quantize | None = None,
    activation_checkpointing: bool = False,
    devices: int = 1,
    num_nodes: int = 1,
    shard_base: bool = False,
) -> None:
    """Fine-tune.

    Args:
        checkpoint_dir: folder of the base model, which stays as it is.
        data_dir: tokenised pairs.
        out_dir: where the adapter, its training state, metrics and their picture go.
        adapter_path: what to start from, of any method; if not given, a new adapter.
        method: of a new adapter: "aligner", "adapter" or "lora"; the last two in their default sizes.
        aligner_length: prefix tokens N of a new Aligner.
        reference_path: adapter that the policy is held to, or "base" for the base model alone; if not given, what
            training starts from.
        cache_reference: compute the reference's log-probabilities once, and keep them in --data_dir.
        beta: how strongly the policy is held to the reference; small is loose.
        loss: "sigmoid", DPO's own, or "ipo" (arXiv 2310.12036).
        label_smoothing: share of pairs taken to be the wrong way round (conservative DPO).
        chosen_weight: of the chosen response's cross-entropy per token, added to the loss; DPO alone may make both
            responses unlikelier.
        learning_rate: peak, reached at the end of warm-up.
        decay: how the learning rate falls from the peak: "linear" to zero, or "none".
        weight_decay: of AdamW.
        batch_size: pairs per optimizer step, over all devices.
        micro_batch_size: pairs per forward on one device.
        epochs: how often every pair is read, unless --max_steps is given.
        max_steps: optimizer steps.
        warmup_steps: optimizer steps over which the learning rate rises; if not given, 10, or a tenth of a run of
            fewer steps than that.
        max_seq_length: longer examples are refused; prepare the data with this length.
        pack: put the examples of a forward into one row, without attention between them, instead of padding them.
        max_grad_norm: scale larger gradients down to this norm.
        seed: of initialisation and the order of pairs.
        eval_interval: optimizer steps between validations, which also show a few answers.
        save_interval: optimizer steps between states to resume from; one is also saved every 10 minutes.
        resume: continue the run in --out_dir from its last state, to the bit; if there is none, begin.
        logger: "tensorboard" or "wandb", beside metrics.csv; may be given twice.
        precision: of the base model; "auto" is bf16-true on a GPU that has it and 32-true elsewhere.
        quantize: keep the base's blocks in 4 bits ("nf4") or 8 bits ("int8").
        activation_checkpointing: compute activations again for the backward pass instead of keeping them.
        devices: how many to use on each node.
        num_nodes: machines, each of which runs this script; see howto/resume_and_scale.md.
        shard_base: spread the base over all devices, for one that does not fit a device.
    """
    hyperparameters = dict(locals())
    check_hyperparameters(hyperparameters)
    tokenizer, (train, validation) = open_data(checkpoint_dir, data_dir, max_seq_length, kind="pairs")
    max_steps = total_steps(len(train), batch_size, epochs, max_steps, warmup_steps)

    torch.manual_seed(seed)
    config = read_config(checkpoint_dir)
    if adapter_path is not None:
        policy = load_adapter(adapter_path)
    else:
        policy = Aligner(config, aligner_length) if method == "aligner" else METHODS[method](config)
    reference_path = reference_path or adapter_path or Path("base")
    reference = None if reference_path == Path("base") else load_adapter(reference_path)

    fabric, mesh = launch(devices, num_nodes, shard_base, make_loggers(logger or [], out_dir, resume), out_dir)
    model = load_base(checkpoint_dir, PRECISIONS[precision], fabric.device, mesh=mesh, quantize=quantize)
    if activation_checkpointing:
        model.checkpoint_activations()
    policy.to(fabric.device)
    if adapter_path is not None:
        check_adapter(adapter_path, model)
    if reference is not None:
        check_adapter(reference_path, model)
        reference.to(fabric.device).requires_grad_(False)
    if cache_reference:
        for dataset in (train, validation):
            dataset.reference = cached_reference(
                fabric, model, reference, dataset, data_dir, micro_batch_size, quantize
            )
    optimizer = torch.optim.AdamW(policy.parameters(), weight_decay=weight_decay)

    def measure(batch: Batch) -> LossSums:
        reference_logprobs = batch.reference
        if reference_logprobs is None:
            with torch.no_grad():
                reference_logprobs = response_logprobs(model, reference, batch)
        policy_logprobs = response_logprobs(model, policy, batch)
        lengths = batch.scored_lengths()
        return preference_loss(policy_logprobs, reference_logprobs, lengths, beta, loss, label_smoothing, chosen_weight)

    fit(
        fabric,
        model,
        policy,
        optimizer,
        measure,
        tokenizer,
        train,
        validation,
        max_steps,
        hyperparameters,
        measured=PREFERENCE_METRICS,
        fingerprints={
            "start": "new" if adapter_path is None else adapter_fingerprint(load_adapter(adapter_path)),
            "reference": "base" if reference is None else adapter_fingerprint(reference),
        },
    )


if __name__ == "__main__":
    run(main)
