"""The training loop: steps, schedule, validation, metrics, files. It knows nothing of which adapter it trains."""

import csv
import math
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.fabric import Fabric
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer
from tqdm import tqdm

from lit_llama.data import Batch, TokenDataset, by_length, collate, step_batches, steps_per_epoch
from lit_llama.files import atomic_file, require_extra

Decay = Literal["none", "linear"]
METRICS = ["step", "train_loss", "validation_loss", "learning_rate", "tokens_per_second", "seconds"]


@dataclass(frozen=True)
class FitResult:
    """How a run ended.

    Args:
        step: optimizer steps done when the validation loss was lowest.
        validation_loss: then, per scored token.
        base_validation_loss: before the first step.
        seconds: the run took, validation included.
    """

    step: int
    validation_loss: float
    base_validation_loss: float
    seconds: float


def fit(
    fabric: Fabric,
    adapter: Module,
    optimizer: Optimizer,
    loss: Callable[[Batch], Tensor],
    train: TokenDataset,
    validation: TokenDataset,
    save: Callable[[int, float, float], None],
    *,
    out_dir: Path,
    max_steps: int,
    batch_size: int,
    micro_batch_size: int,
    learning_rate: Callable[[int], float],
    eval_interval: int,
    seed: int,
    show: Callable[[], str] | None = None,
) -> FitResult:
    """Train an adapter.

    Writes to `out_dir`: `metrics.csv` with a row per step, `loss.png`, and `state.pt` with the last adapter, optimizer
    and random state. The best adapter is written by `save`.

    Args:
        fabric: chooses the device and sums over devices.
        adapter: holds the trainable parameters, float32.
        optimizer: over those.
        loss: sum over the scored tokens of a batch.
        train: what is learned.
        validation: what is measured, all of it, before the first step, every `eval_interval` steps and at the end.
        save: called with step, validation loss and seconds whenever the validation loss is the lowest so far.
        out_dir: where files go.
        max_steps: optimizer steps.
        batch_size: examples per step, over all devices.
        micro_batch_size: examples per forward on one device.
        learning_rate: of each step, counted from 0.
        eval_interval: steps between validations.
        seed: of the order of examples.
        show: called at each validation; its text is shown.

    Raises:
        FloatingPointError: a loss is no longer finite; the best adapter so far stays on disk.
    """
    if fabric.is_global_zero:
        _set_aside(out_dir)
    parameters = [parameter for parameter in adapter.parameters() if parameter.requires_grad]
    started = time.perf_counter()
    main_process = fabric.is_global_zero
    rows: list[dict[str, float]] = []
    best_step, best_loss = 0, math.inf

    def validate(step: int) -> float:
        nonlocal best_step, best_loss
        validation_loss = evaluate(fabric, loss, validation, micro_batch_size)
        _check_finite("validation loss", validation_loss, step, best_step, out_dir)
        better = 0 < step and validation_loss < best_loss
        if better:
            best_step, best_loss = step, validation_loss
        if main_process:
            progress.write(f"step {step}: validation loss {validation_loss:.4f}", file=sys.stderr)
            if show is not None:
                progress.write(show(), file=sys.stderr)
            if better:
                save(step, validation_loss, time.perf_counter() - started)
            _save_state(out_dir / "state.pt", adapter, optimizer, step, best_step, best_loss)
        return validation_loss

    with (
        tqdm(total=max_steps, desc="training", unit="step", disable=not main_process) as progress,
        open(out_dir / "metrics.csv" if main_process else os.devnull, "w", newline="") as file,
    ):
        metrics = csv.DictWriter(file, METRICS)
        metrics.writeheader()
        for step in range(max_steps + 1):
            row: dict[str, float] = {"step": step}
            if step > 0:
                step_started = time.perf_counter()
                row["learning_rate"] = learning_rate(step - 1)
                for group in optimizer.param_groups:
                    group["lr"] = row["learning_rate"]
                chosen = step_batches(train, step - 1, batch_size, micro_batch_size, seed)
                row["train_loss"], tokens = _step(fabric, parameters, optimizer, loss, train, chosen)
                _check_finite("training loss", row["train_loss"], step, best_step, out_dir)
                row["tokens_per_second"] = tokens / (time.perf_counter() - step_started)
                progress.update()
                progress.set_postfix(loss=f"{row['train_loss']:.3f}", tokens_per_s=f"{row['tokens_per_second']:.0f}")
            if step % eval_interval == 0 or step == max_steps:
                row["validation_loss"] = validate(step)
            row["seconds"] = time.perf_counter() - started
            metrics.writerow({name: f"{value:.6g}" for name, value in row.items()})
            file.flush()
            rows.append(row)
            if main_process and "validation_loss" in row and step > 0:
                plot_losses(rows, out_dir / "loss.png")
    base_loss = rows[0]["validation_loss"]
    return FitResult(best_step, best_loss, base_loss, time.perf_counter() - started)


def _set_aside(out_dir: Path) -> None:
    """Move the files of an earlier run to `out_dir/previous`, lest they be taken for this one's."""
    out_dir.mkdir(parents=True, exist_ok=True)
    earlier = [path for path in out_dir.iterdir() if path.suffix in (".safetensors", ".pt", ".csv", ".png")]
    if earlier:
        previous = out_dir / "previous"
        shutil.rmtree(previous, ignore_errors=True)
        previous.mkdir()
        for path in earlier:
            path.rename(previous / path.name)
        tqdm.write(f"the earlier run in {out_dir} was moved to {previous}", file=sys.stderr)


def _step(
    fabric: Fabric,
    parameters: list[torch.nn.Parameter],
    optimizer: Optimizer,
    loss: Callable[[Batch], Tensor],
    dataset: TokenDataset,
    chosen: list[list[int]],
) -> tuple[float, int]:
    """One optimizer step over all micro batches of all devices: mean loss of its scored tokens, and tokens read."""
    mine = chosen[fabric.global_rank :: fabric.world_size]
    batches = [collate([dataset[i] for i in indices]) for indices in mine]
    total = torch.zeros(2, device=fabric.device)  # loss, scored tokens
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    for batch in batches:
        batch_loss = loss(batch.to(fabric.device))
        batch_loss.backward()
        total += torch.stack([batch_loss.detach(), batch.scored[:, 1:].sum().to(batch_loss)])
    loss_sum, scored = _sum_over_devices(fabric, total).tolist()
    for parameter in parameters:
        assert parameter.grad is not None
        # Divided only here: gradients of a mean would vanish in a float16 base.
        parameter.grad = _sum_over_devices(fabric, parameter.grad) / scored
    optimizer.step()
    return loss_sum / scored, int(sum(dataset.lengths[i] for indices in chosen for i in indices))


@torch.no_grad()
def evaluate(fabric: Fabric, loss: Callable[[Batch], Tensor], dataset: TokenDataset, micro_batch_size: int) -> float:
    """Mean loss of the scored tokens of a whole data set."""
    batches = by_length(dataset, np.arange(len(dataset)), micro_batch_size)[fabric.global_rank :: fabric.world_size]
    total = torch.zeros(2, dtype=torch.float64)  # loss, scored tokens
    for indices in batches:
        batch = collate([dataset[i] for i in indices])
        total += torch.tensor([float(loss(batch.to(fabric.device))), float(batch.scored[:, 1:].sum())])
    loss_sum, scored = _sum_over_devices(fabric, total).tolist()
    return loss_sum / scored


def _sum_over_devices(fabric: Fabric, value: Tensor) -> Tensor:
    if fabric.world_size == 1:
        return value
    return fabric.all_reduce(value.to(fabric.device), reduce_op="sum")  # type: ignore[return-value]


def launch(devices: int) -> Fabric:
    """Start the processes of a run: on GPUs if there are any, otherwise on the CPU.

    Raises:
        ValueError: there are not as many devices.
    """
    try:
        fabric = Fabric(accelerator="auto", devices=devices)
    except MisconfigurationException as error:
        raise ValueError(f"--devices {devices}: {error}") from None
    fabric.launch()
    return fabric


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
    if not problems and values["batch_size"] % (values["micro_batch_size"] * values["devices"]):
        problems.append(
            f"--batch_size {values['batch_size']} is not a multiple of --micro_batch_size {values['micro_batch_size']}"
            f" times --devices {values['devices']}"
        )
    if problems:
        raise ValueError("; ".join(problems))


_LEAST = {
    "seed": 0,
    "learning_rate": 0,
    "weight_decay": 0,
    "warmup_steps": 0,
    "batch_size": 1,
    "micro_batch_size": 1,
    "epochs": 1,
    "max_steps": 1,
    "max_seq_length": 2,
    "eval_interval": 1,
    "devices": 1,
}


def total_steps(examples: int, batch_size: int, epochs: int, max_steps: int | None, warmup_steps: int) -> int:
    """Optimizer steps of a run: `max_steps` if given, otherwise those of `epochs`.

    Raises:
        ValueError: warm-up is longer than the run.
    """
    steps = max_steps or epochs * steps_per_epoch(examples, batch_size)
    if warmup_steps > steps:
        length = "--max_steps" if max_steps else f"the {epochs} epochs' length of"
        raise ValueError(f"--warmup_steps {warmup_steps} is more than {length} {steps}: the peak would not be reached")
    return steps


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


def _check_finite(what: str, value: float, step: int, best_step: int, out_dir: Path) -> None:
    if not math.isfinite(value):
        kept = f"the adapter of step {best_step} stays in {out_dir}" if best_step else "no adapter was written yet"
        if step == 0:
            raise FloatingPointError(f"the base model's {what} is {value}: try --precision 32-true")
        raise FloatingPointError(
            f"training diverged: the {what} is {value} at step {step}; {kept}; try a lower --learning_rate"
        )


def _save_state(file: Path, adapter: Module, optimizer: Optimizer, step: int, best_step: int, best_loss: float) -> None:
    state = {
        "adapter": adapter.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": step,
        "best_step": best_step,
        "best_loss": best_loss,
        "random": torch.get_rng_state(),
    }
    with atomic_file(file) as temporary:
        torch.save(state, temporary)


def plot_losses(rows: list[dict[str, float]], path: Path) -> None:
    """Draw training and validation loss over the steps, if matplotlib is installed.

    Args:
        rows: those of `metrics.csv`.
        path: the PNG to write.
    """
    try:
        figure = require_extra("matplotlib.figure", "plot").Figure(figsize=(7, 4), layout="constrained")
    except ImportError:
        return
    axes = figure.subplots()
    for name, style in (("train_loss", {"alpha": 0.5}), ("validation_loss", {"marker": "o"})):
        points = [(row["step"], row[name]) for row in rows if name in row]
        axes.plot(*zip(*points, strict=True), label=name.replace("_", " "), **style)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("cross-entropy per scored token (nats)")
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
