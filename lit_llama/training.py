"""The training loop: steps, validation, signals. It does not know which adapter it trains, or why."""

from __future__ import annotations

import itertools
import math
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer
from tqdm import tqdm

from lit_llama.adapters import AnyAdapter, save_adapter
from lit_llama.checkpoint import parameter_shapes
from lit_llama.data import Batch, TokenDataset, by_length, step_batches, steps_per_epoch
from lit_llama.hyperparameters import MAY_CHANGE, WARMUP_STEPS, LoopOptions, default_warmup, schedule
from lit_llama.losses import SUPERVISED_METRICS, LossSums
from lit_llama.model import LLaMA
from lit_llama.prompts import prompt_style
from lit_llama.runs import (
    MetricsFile,
    Progress,
    last_state,
    load_state,
    own_run,
    plot_metrics,
    run_title,
    save_state,
    set_aside,
    shareable,
    write_hyperparameters,
)
from lit_llama.samples import sample_answers
from lit_llama.tokenizer import Tokenizer

if TYPE_CHECKING:  # takes seconds to import, which --help should not cost
    from lightning.fabric import Fabric

SAVE_SECONDS = 600  # between states, however long a step takes
FEW_ITEMS = 20  # of a validation split


def fit(
    fabric: Fabric,
    model: LLaMA,
    adapter: AnyAdapter,
    optimizer: Optimizer,
    loss: Callable[[Batch], LossSums],
    tokenizer: Tokenizer,
    train: TokenDataset,
    validation: TokenDataset,
    max_steps: int,
    hyperparameters: dict[str, Any],
    *,
    measured: Mapping[str, str] = SUPERVISED_METRICS,
    fingerprints: Mapping[str, str] | None = None,
) -> None:
    """Train an adapter.

    Writes to `out_dir`: the adapter with the lowest validation loss, `hyperparameters.yaml`, `metrics.csv` with a row
    per step, `loss.png`, and states from which a run continues to the bit. Other loggers are Fabric's.

    While it runs, no other run can write to `out_dir`. A first Ctrl-C or SIGTERM ends the run after its step, with a
    state; a second one at once.

    Args:
        fabric: chooses the device and sums over devices.
        model: the base model, frozen.
        adapter: what is trained, float32.
        optimizer: over its parameters.
        loss: of a batch.
        tokenizer: the base's, to show answers at each validation.
        train: what is learned.
        validation: what is measured, all of it, before the first step, every `eval_interval` steps and at the end.
        max_steps: optimizer steps.
        hyperparameters: the script's keywords, `LoopOptions` among them. A state is refused if one that changes the
            result was another.
        measured: what the loss measures, with the label of its axis in the picture.
        fingerprints: of what else changes the result beside base and data, by name; likewise.

    Raises:
        FloatingPointError: losses or gradients are no longer finite; the best adapter so far stays on disk.
        KeyboardInterrupt: a signal ended the run; a state was saved.
        ValueError: the state to resume from belongs to another run or is damaged, or another run has the folder.
    """
    options = LoopOptions(**{field.name: hyperparameters[field.name] for field in fields(LoopOptions)})
    out_dir, pack = options.out_dir, options.pack
    adapter_path = out_dir / f"{adapter.method}.safetensors"
    warmup_steps = options.warmup_steps
    if warmup_steps is None:
        warmup_steps = default_warmup(max_steps)
        hyperparameters = hyperparameters | {"warmup_steps": warmup_steps}
    learning_rate = schedule(options.learning_rate, warmup_steps, max_steps, options.decay)
    style = prompt_style(train.header["prompt_style"], tokenizer)
    main_process = fabric.is_global_zero
    identity = {f"--{name}": value for name, value in hyperparameters.items() if name not in MAY_CHANGE}
    identity |= {
        "base": model.fingerprint,
        "precision": str(model.dtype),
        "training data": train.sha256,
        "validation data": validation.sha256,
        **(fingerprints or {}),
    }
    parameters = list(adapter.parameters())
    progress = Progress()
    if main_process:
        _say_what_to_expect(model, parameters, validation, max_steps, options.warmup_steps, warmup_steps)
    with own_run(fabric, out_dir):
        state_file = last_state(out_dir) if options.resume else None
        if state_file is not None:
            progress = load_state(state_file, adapter, optimizer, identity)
        _check_same_step(fabric, progress.step, out_dir)
        if main_process:
            if state_file is None:
                set_aside(out_dir)
            write_hyperparameters(out_dir / "hyperparameters.yaml", hyperparameters, fabric)
        for logger in fabric.loggers:
            logger.log_hyperparams(shareable(hyperparameters))
        started = time.perf_counter() - progress.seconds
        last_saved = time.monotonic()

        if pack and main_process:
            steps = range(min(50, steps_per_epoch(len(train), options.batch_size)))  # enough to tell
            plan = itertools.chain.from_iterable(_plan(train, step, options) for step in steps)
            print(f"packed; padding would be {train.padding(plan):.1%} of all positions", file=sys.stderr)

        with (
            tqdm(total=max_steps, initial=progress.step, desc="training", unit="step", disable=not main_process) as bar,
            MetricsFile(
                out_dir / "metrics.csv", measured, progress.step if state_file else None, main_process
            ) as metrics,
            _StopRequest() as stop,
        ):

            def validate() -> dict[str, float]:
                adapter.eval()
                values = evaluate(fabric, loss, validation, options.micro_batch_size, pack)
                progress.check_finite("validation loss", values["loss"], out_dir)
                better = progress.step > 0 and values["loss"] < progress.best.get("loss", math.inf)
                if better:
                    progress.best_step, progress.best = progress.step, values
                shown = sample_answers(model, adapter, tokenizer, style, validation)
                adapter.train()
                if main_process:
                    bar.write(f"step {progress.step}: validation {_in_words(values)}\n{shown}", file=sys.stderr)
                    if better:
                        save_adapter(
                            adapter_path,
                            adapter,
                            base=model,
                            prompt_style=style.name,
                            step=progress.step,
                            validation_loss=values["loss"],
                            seconds=time.perf_counter() - started,
                            hyperparameters=shareable(hyperparameters),
                        )
                return values

            def record(row: dict[str, float]) -> None:
                metrics.write(row)
                fabric.log_dict({name: value for name, value in row.items() if name != "step"}, step=int(row["step"]))

            adapter.train()
            if state_file is None:
                progress.first = validate()
                record({"step": 0, **_named("validation", progress.first), "seconds": time.perf_counter() - started})
            while progress.step < max_steps:
                step_started = time.perf_counter()
                rate = learning_rate(progress.step)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                chosen = _plan(train, progress.step, options)
                batches = _share(fabric, train, chosen, pack)
                done = _step(fabric, parameters, optimizer, loss, batches, options.max_grad_norm, stop.requested)
                progress.step += 1
                progress.count_skipped(done.skipped, done.metrics["loss"], out_dir)
                if done.skipped and main_process:
                    message = (
                        f"step {progress.step} skipped: loss or gradient is not finite ({progress.skipped} so far)"
                    )
                    bar.write(message, file=sys.stderr)
                tokens_per_second = train.lengths[np.concatenate(chosen)].sum() / (time.perf_counter() - step_started)
                bar.update()
                bar.set_postfix(loss=f"{done.metrics['loss']:.3f}", tokens_per_s=f"{tokens_per_second:.0f}")
                row = {
                    "step": progress.step,
                    **_named("train", done.metrics),
                    "learning_rate": rate,
                    "grad_norm": done.grad_norm,
                    "tokens_per_second": tokens_per_second,
                }
                finished = progress.step == max_steps
                if progress.step % options.eval_interval == 0 or finished:
                    row |= _named("validation", validate())
                progress.seconds = time.perf_counter() - started
                record({**row, "seconds": progress.seconds})
                if main_process and "validation_loss" in row:
                    plot_metrics(metrics.rows, measured, run_title(adapter, hyperparameters), out_dir / "loss.png")
                due = progress.step % options.save_interval == 0 or time.monotonic() - last_saved > SAVE_SECONDS
                if main_process and (due or finished or done.stop):
                    saved = save_state(out_dir, adapter, optimizer, progress, identity)
                    last_saved = time.monotonic()
                    if done.stop and not finished:
                        bar.write(f"stopped; {saved} is saved: continue with --resume true", file=sys.stderr)
                if done.stop and not finished:
                    fabric.barrier()  # a process that ends early may take the one that saves with it
                    raise KeyboardInterrupt
        fabric.barrier()
        if main_process:
            print(
                f"before: validation {_in_words(progress.first)}\n"
                f"after step {progress.best_step}, the best: validation {_in_words(progress.best)}\n"
                f"{progress.seconds:.0f} s; adapter: {adapter_path}",
                file=sys.stderr,
            )


def _say_what_to_expect(
    model: LLaMA,
    parameters: list[torch.nn.Parameter],
    validation: TokenDataset,
    max_steps: int,
    asked_warmup: int | None,
    warmup_steps: int,
) -> None:
    trainable = sum(parameter.numel() for parameter in parameters)
    total = sum(shape.numel() for shape in parameter_shapes(model.config).values())
    print(f"{trainable:,} trainable parameters on a base of {total:,}", file=sys.stderr)
    if len(validation) < FEW_ITEMS:
        print(
            f"the validation split has only {len(validation)} items, so its loss is a rough measure; {FEW_ITEMS} or "
            "more make it steadier",
            file=sys.stderr,
        )
    if asked_warmup is None and warmup_steps < WARMUP_STEPS:
        print(
            f"--warmup_steps is lowered to {warmup_steps}, a tenth of the run: its default of {WARMUP_STEPS} is more "
            f"than the {max_steps} steps of the run",
            file=sys.stderr,
        )


def _plan(dataset: TokenDataset, step: int, options: LoopOptions) -> list[list[int]]:
    return step_batches(dataset, step, options.batch_size, options.micro_batch_size, options.seed)


def _named(split: str, metrics: dict[str, float]) -> dict[str, float]:
    return {f"{split}_{name}": value for name, value in metrics.items()}


def _in_words(metrics: dict[str, float]) -> str:
    return ", ".join(
        f"{name.replace('_', ' ')} {value:.{4 if abs(value) < 10 else 1}f}" for name, value in metrics.items()
    )


class StepResult(NamedTuple):
    """What one optimizer step did.

    Args:
        metrics: means over all that its micro batches count.
        grad_norm: before clipping.
        skipped: nothing was changed, because loss or gradient was not finite.
        stop: some process was asked to stop.
    """

    metrics: dict[str, float]
    grad_norm: float
    skipped: bool
    stop: bool


def _step(
    fabric: Fabric,
    parameters: list[torch.nn.Parameter],
    optimizer: Optimizer,
    loss: Callable[[Batch], LossSums],
    batches: Iterable[Batch],
    max_grad_norm: float | None,
    stop: bool,
) -> StepResult:
    """One optimizer step over all micro batches of all devices, `batches` being this one's."""
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)

    def losses() -> Iterator[LossSums]:
        for batch in batches:
            sums = loss(batch)
            sums.metrics["loss"].backward()
            yield sums

    metrics, count, stops = _add_up(fabric, losses(), stop)
    for parameter in parameters:
        assert parameter.grad is not None
        # Divided only here: gradients of a mean would vanish in a float16 base.
        parameter.grad = _sum_over_devices(fabric, parameter.grad) / count
    grad_norm = float(torch.nn.utils.clip_grad_norm_(parameters, math.inf if max_grad_norm is None else max_grad_norm))
    skipped = not (math.isfinite(metrics["loss"]) and math.isfinite(grad_norm))
    if not skipped:
        optimizer.step()
    return StepResult(metrics, grad_norm, skipped, stops > 0)


def _add_up(fabric: Fabric, losses: Iterable[LossSums], stop: bool = False) -> tuple[dict[str, float], float, float]:
    """Means over the micro batches of all devices, how much was counted, how many processes want to stop."""
    names: list[str] = []
    total = torch.zeros(0)
    for sums in losses:
        names = names or list(sums.metrics)
        values = torch.stack([*(value.detach() for value in sums.metrics.values()), sums.count]).float()
        total = values if len(total) == 0 else total + values
    *values, count, stops = _sum_over_devices(fabric, torch.cat([total, total.new_tensor([stop])])).tolist()
    return {name: value / count for name, value in zip(names, values, strict=True)}, count, stops


def _share(fabric: Fabric, dataset: TokenDataset, chosen: list[list[int]], pack: bool) -> Iterator[Batch]:
    """This process's micro batches.

    Every process gets as many, because those that share a sharded base must compute in step: where there are too few,
    one is repeated with nothing scored.
    """
    for start in range(0, len(chosen), fabric.world_size):
        place = start + fabric.global_rank
        batch = dataset.batch(chosen[min(place, len(chosen) - 1)], pack).to(fabric.device)
        if place >= len(chosen):
            batch = batch._replace(scored=torch.zeros_like(batch.scored))
        yield batch


class _StopRequest:
    """Turns the first Ctrl-C or SIGTERM into a request that the loop reads; the second one acts as ever."""

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> _StopRequest:
        self._handlers = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _ask(self, *_: object) -> None:
        self.requested = True
        self.__exit__()
        tqdm.write("stopping after this step; once more stops at once", file=sys.stderr)


@torch.no_grad()
def evaluate(
    fabric: Fabric, loss: Callable[[Batch], LossSums], dataset: TokenDataset, micro_batch_size: int, pack: bool = False
) -> dict[str, float]:
    """Means of what a loss measures over a whole data set."""
    plan = by_length(dataset, np.arange(len(dataset)), micro_batch_size)
    return _add_up(fabric, (loss(batch) for batch in _share(fabric, dataset, plan, pack)))[0]


def _check_same_step(fabric: Fabric, step: int, out_dir: Path) -> None:
    """Make sure that all processes begin at the same step.

    Raises:
        ValueError: they do not, as some do not see the states.
    """
    if fabric.world_size > 1:
        bounds = torch.tensor([step, -step], device=fabric.device)
        largest, negative_smallest = fabric.all_reduce(bounds, reduce_op="max").tolist()  # type: ignore[union-attr]
        if largest != -negative_smallest:
            raise ValueError(
                f"processes found states of step {-negative_smallest} and {largest} in {out_dir}: "
                "it must be a folder that all of them see"
            )


def _sum_over_devices(fabric: Fabric, value: Tensor) -> Tensor:
    if fabric.world_size == 1:
        return value
    return fabric.all_reduce(value.to(fabric.device), reduce_op="sum")  # type: ignore[return-value]
