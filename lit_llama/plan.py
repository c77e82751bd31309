"""What a run is asked to do: how many steps, of how many items, at which learning rate, and when it ends."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from lit_llama.data import steps_per_epoch

Decay = Literal["none", "linear"]
WARMUP_STEPS = 10
LEARNING_RATES = {"aligner": 3e-2, "llama_adapter": 3e-2, "lora": 3e-3, "bias": 1e-2}  # peak, by method
PREFERENCE_RATES = {method: rate / 10 for method, rate in LEARNING_RATES.items()}
_LEAST = {
    "learning_rate": 0,
    "seed": 0,
    "warmup_steps": 0,
    "max_grad_norm": 0,
    "batch_size": 1,
    "micro_batch_size": 1,
    "epochs": 1,
    "max_steps": 1,
    "eval_interval": 1,
    "patience": 1,
}


@dataclass(frozen=True)
class Plan:
    """What the loop reads, with any adapter, loss or data. The defaults are those of the demo.

    Args:
        learning_rate: peak; None for that of the adapter's method, or "auto", both to be settled by
            `lit_llama.tuning.find_learning_rate` before training.
        decay: how the learning rate falls from the peak: "linear" reaches zero just after the last step.
        batch_size: items per optimizer step, over all devices.
        micro_batch_size: items per forward on one device.
        epochs: how often every item is read, unless `max_steps` is given.
        max_steps: optimizer steps.
        warmup_steps: optimizer steps of the learning rate's rise; None for 10, or a tenth of a run of fewer steps.
        max_grad_norm: larger gradients are scaled down to this norm.
        eval_interval: optimizer steps between validations; the last step is always followed by one.
        patience: number of validations in a row without a lower loss after which the run ends; None for no such end.
        seed: seed of the order of items.
        pack: put the examples of a forward into one row instead of padding them.

    Raises:
        ValueError: values are out of range; the message names all of them by their options.
    """

    learning_rate: float | Literal["auto"] | None = 3e-2
    decay: Decay = "linear"
    batch_size: int = 4
    micro_batch_size: int = 4
    epochs: int = 2
    max_steps: int | None = None
    warmup_steps: int | None = None
    max_grad_norm: float | None = None
    eval_interval: int = 48
    patience: int | None = None
    seed: int = 1337
    pack: bool = False

    def __post_init__(self) -> None:
        values = {name: getattr(self, name) for name in _LEAST}
        problems = [
            f"--{name} is {value}, it must be at least {_LEAST[name]}"
            for name, value in values.items()
            if value not in (None, "auto") and not value >= _LEAST[name]
        ]
        if self.max_grad_norm == 0:
            problems.append("--max_grad_norm is 0, it must be larger, or left out")
        if self.max_steps is not None and self.warmup_steps is not None and 1 <= self.max_steps < self.warmup_steps:
            problems.append(
                f"--warmup_steps {self.warmup_steps} is more than --max_steps {self.max_steps}: lower --warmup_steps"
            )
        if problems:
            raise ValueError("; ".join(problems))

    def for_items(self, items: int) -> Plan:
        """The plan for a data set of so many items, with its `max_steps`.

        Raises:
            ValueError: warm-up is longer than the run.
        """
        if self.max_steps is not None:
            return self
        steps = self.epochs * steps_per_epoch(items, self.batch_size)
        if self.warmup_steps is not None and self.warmup_steps > steps:
            raise ValueError(
                f"--warmup_steps {self.warmup_steps} is more than the {steps} steps of the {self.epochs} epochs: lower "
                "--warmup_steps"
            )
        return replace(self, max_steps=steps)

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        assert self.max_steps is not None, "the length of a run is known by `for_items`"
        return self.max_steps

    @property
    def warmup(self) -> int:
        """Optimizer steps of the learning rate's rise."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        return WARMUP_STEPS if self.steps >= WARMUP_STEPS else -(-self.steps // 10)

    def schedule(self) -> Callable[[int], float]:
        """The learning rate of each optimizer step, counted from 0."""
        peak, warmup, steps = self.learning_rate, self.warmup, self.steps
        assert isinstance(peak, int | float), "`find_learning_rate` comes before training"

        def rate(step: int) -> float:
            if step < warmup:
                return peak * (step + 1) / warmup
            if self.decay == "none":
                return peak
            return peak * (steps - step) / (steps - warmup)

        return rate

    def has_lost_patience(self, step: int, best_step: int) -> bool:
        """Whether the last `patience` validations measured nothing below that of `best_step`."""
        since_best = step // self.eval_interval - best_step // self.eval_interval
        return since_best >= (self.patience or math.inf)

    def is_over(self, step: int, best_step: int) -> bool:
        """Whether the run ends after `step`, if the lowest validation loss so far is that of `best_step`."""
        return step >= self.steps or self.has_lost_patience(step, best_step)
