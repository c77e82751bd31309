"""What a run is given: the options of the loop, what may contradict what, the length of a run, its learning rate."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lit_llama.data import steps_per_epoch

Decay = Literal["none", "linear"]
WARMUP_STEPS = 10
MAY_CHANGE = {  # on resuming; everything else changes the result
    "checkpoint_dir",
    "data_dir",
    "out_dir",
    "save_interval",
    "resume",
    "logger",
    "precision",  # what it stands for must not change
    "adapter_path",  # nor what these hold
    "reference_path",
    "cache_reference",
    "micro_batch_size",
    "devices",
    "num_nodes",
    "shard_base",
    "activation_checkpointing",
}


@dataclass(frozen=True)
class LoopOptions:
    """The hyperparameters that the loop reads, whatever is trained.

    Args:
        out_dir: where files go.
        resume: continue from the last state in `out_dir`, if there is one.
        batch_size: items per optimizer step, over all devices.
        micro_batch_size: items per forward on one device.
        learning_rate: peak.
        decay: how it falls from there.
        warmup_steps: optimizer steps of its rise; None for `default_warmup`.
        max_grad_norm: scale larger gradients down to this norm.
        eval_interval: optimizer steps between validations.
        save_interval: optimizer steps between states; one is also saved every 10 minutes.
        seed: of the order of items.
        pack: put the examples of a forward into one row instead of padding them.
    """

    out_dir: Path
    resume: bool
    batch_size: int
    micro_batch_size: int
    learning_rate: float
    decay: Decay
    warmup_steps: int | None
    max_grad_norm: float | None
    eval_interval: int
    save_interval: int
    seed: int
    pack: bool


def check_hyperparameters(values: dict[str, Any]) -> None:
    """Refuse hyperparameters that contradict themselves or each other, all problems at once.

    Args:
        values: the keywords of a fine-tuning script.

    Raises:
        ValueError: names each option, what was given and what is possible.
    """
    problems = [
        f"--{name} is {values[name]}, it must be at least {least}"
        for name, least in _LEAST.items()
        if values.get(name) is not None and not values[name] >= least
    ]
    if values["max_grad_norm"] == 0:
        problems.append("--max_grad_norm is 0, it must be larger, or left out")
    if values.get("beta") == 0:
        problems.append("--beta is 0, it must be larger")
    if not 0 <= values.get("label_smoothing", 0) < 0.5:
        problems.append(f"--label_smoothing is {values['label_smoothing']}, it must be at least 0 and below 0.5")
    if values.get("loss") == "ipo" and values["label_smoothing"]:
        problems.append("--label_smoothing has no meaning with --loss ipo: leave out one of them")
    if not problems:
        at_once = values["micro_batch_size"] * values["devices"] * values["num_nodes"]
        if values["batch_size"] % at_once:
            problems.append(
                f"--batch_size {values['batch_size']} is not a multiple of {at_once}, which is --micro_batch_size "
                f"{values['micro_batch_size']} times --devices {values['devices']} times --num_nodes "
                f"{values['num_nodes']}: lower --micro_batch_size or raise --batch_size"
            )
        if values["quantize"] and values["shard_base"]:
            problems.append("--quantize and --shard_base do not go together: leave out one of them")
    if problems:
        raise ValueError("; ".join(problems))


_LEAST = {
    "seed": 0,
    "learning_rate": 0,
    "weight_decay": 0,
    "beta": 0,
    "chosen_weight": 0,
    "aligner_init_std": 0,
    "adapter_init_std": 0,
    "warmup_steps": 0,
    "batch_size": 1,
    "micro_batch_size": 1,
    "epochs": 1,
    "max_steps": 1,
    "max_seq_length": 2,
    "eval_interval": 1,
    "save_interval": 1,
    "max_grad_norm": 0,
    "devices": 1,
    "num_nodes": 1,
}


def total_steps(examples: int, batch_size: int, epochs: int, max_steps: int | None, warmup_steps: int | None) -> int:
    """Optimizer steps of a run: `max_steps` if given, otherwise those of `epochs`.

    Raises:
        ValueError: warm-up is longer than the run.
    """
    steps = max_steps or epochs * steps_per_epoch(examples, batch_size)
    if warmup_steps is not None and warmup_steps > steps:
        length = "--max_steps" if max_steps else f"the {epochs} epochs' length of"
        raise ValueError(f"--warmup_steps {warmup_steps} is more than {length} {steps}: lower --warmup_steps")
    return steps


def default_warmup(max_steps: int) -> int:
    """Optimizer steps of warm-up where nobody has asked for a number: a tenth of a run that is shorter than that."""
    return WARMUP_STEPS if max_steps >= WARMUP_STEPS else -(-max_steps // 10)


def schedule(learning_rate: float, warmup_steps: int, max_steps: int, decay: Decay) -> Callable[[int], float]:
    """The learning rate of each optimizer step, counted from 0.

    Args:
        learning_rate: the peak, reached by a linear rise.
        warmup_steps: steps of the rise.
        max_steps: steps of the run.
        decay: "none" stays at the peak; "linear" falls from there, to reach zero just after the last step.
    """

    def rate(step: int) -> float:
        if step < warmup_steps:
            return learning_rate * (step + 1) / warmup_steps
        if decay == "none":
            return learning_rate
        return learning_rate * (max_steps - step) / (max_steps - warmup_steps)

    return rate
