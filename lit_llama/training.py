"""The training loop: plan, forward, backward, step, validate, save. It knows neither the method nor the purpose."""

from __future__ import annotations

import itertools
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer
from tqdm import tqdm

from lit_llama.adapters import AnyAdapter
from lit_llama.data import Batch, TokenDataset, by_length, step_batches, steps_per_epoch
from lit_llama.losses import SUPERVISED_METRICS, LossSums
from lit_llama.plan import WARMUP_STEPS, Plan
from lit_llama.runs import Run
from lit_llama.states import Progress
from lit_llama.tables import counted

if TYPE_CHECKING:  # takes seconds to import, which --help should not cost
    from lightning_fabric import Fabric

FEW_ITEMS = 20  # of a validation split

Loss = Callable[[Batch], LossSums]
LookAhead = Callable[[Iterable[Batch]], object]
Say = Callable[[str], object]


def write_line(text: str) -> None:
    """Write a line to stderr, above the progress bar."""
    tqdm.write(text, file=sys.stderr)


def fit(
    fabric: Fabric,
    adapter: AnyAdapter,
    optimizer: Optimizer,
    loss: Loss,
    train: TokenDataset,
    validation: TokenDataset,
    plan: Plan,
    run: Run,
    *,
    measured: Mapping[str, str] = SUPERVISED_METRICS,
    look_ahead: LookAhead | None = None,
    show_answers: Callable[[], str] | None = None,
    validate_first: bool = True,
    say: Say = write_line,
) -> Progress:
    """Train an adapter.

    A first Ctrl-C or SIGTERM ends the run after its step, with a state; a second one at once.

    Args:
        fabric: chooses the device and sums over devices.
        adapter: what is trained, float32.
        optimizer: over its parameters.
        loss: loss of a batch, by the base model with the adapter.
        train: what is learned.
        validation: what is measured, all of it, before the first step, every `plan.eval_interval` steps and at the end.
        plan: how many steps, of how many items, at which learning rate.
        run: keeps the best adapter, and all that a run in a folder leaves there.
        measured: what the loss measures, with the label of its axis in the picture.
        look_ahead: is given all micro batches of a step or of a validation before the loss is given the first of them,
            each process its own ones; for a loss of which one part depends on all.
        show_answers: gives a few answers of the adapter, in lines for people, after each validation.
        validate_first: whether the validation before the first step is wanted.
        say: takes what there is to tell, a line at a time; called by the main process alone.

    Returns:
        How far the run has come, and what validation measured first and at best. The adapter has the values of the
        last step; `run.restore_best` gives it the best ones.

    Raises:
        FloatingPointError: losses or gradients are no longer finite; the best adapter so far stays.
        KeyboardInterrupt: a signal ended the run; a run in a folder has saved a state.
        ValueError: the state to resume from belongs to another run or is damaged, or another run has the folder.
    """
    plan = plan.for_items(len(train))
    learning_rate = plan.schedule()
    if not fabric.is_global_zero:
        say = _say_nothing
    data = {"training data": train.sha256, "validation data": validation.sha256}
    with run.opened(fabric, adapter, optimizer, plan, data, measured) as progress, _StopRequest() as stop:
        started = time.perf_counter() - progress.seconds
        _say_what_to_expect(train, validation, plan, say)

        def validate() -> dict[str, float]:
            adapter.eval()
            values = evaluate(fabric, loss, validation, plan.micro_batch_size, plan.pack, look_ahead)
            progress.check_finite("validation loss", values["loss"], run.place)
            answers = f"\n{show_answers()}" if show_answers else ""  # all processes, since they may share a base
            adapter.train()
            say(f"step {progress.step}: validation {in_words(values)}{answers}")
            progress.seconds = time.perf_counter() - started
            if progress.is_better(values):
                run.keep_best(adapter, progress)
            return values

        with _progress_bar(fabric, run, plan, progress) as bar:
            adapter.train()
            if validate_first and not progress.first:
                progress.first = validate()
                run.record({"step": 0, **_named("validation", progress.first), "seconds": progress.seconds})
            while not plan.is_over(progress.step, progress.best_step):
                rate = learning_rate(progress.step)
                done = _step(
                    fabric, adapter, optimizer, loss, look_ahead, train, progress.step, rate, plan, stop.requested
                )
                row = done.row
                progress.count_step(done.skipped, row["train_loss"], run.place)
                if done.skipped:
                    say(f"step {progress.step} skipped: loss or gradient is not finite ({progress.skipped} so far)")
                bar.update()
                bar.set_postfix(loss=f"{row['train_loss']:.3f}", tokens_per_s=f"{row['tokens_per_second']:.0f}")
                if progress.step % plan.eval_interval == 0 or progress.step == plan.steps:
                    row |= _named("validation", validate())
                progress.seconds = time.perf_counter() - started
                run.record({**row, "seconds": progress.seconds})
                finished = plan.is_over(progress.step, progress.best_step)
                run.save(adapter, optimizer, progress, finished or done.stop)
                if done.stop and not finished:
                    say(run.stopped())
                    fabric.barrier()  # a process that ends early may take the one that saves with it
                    raise KeyboardInterrupt
    _say_what_came_of_it(plan, progress, run, say)
    return progress


def _say_nothing(text: str) -> None:
    pass


def _progress_bar(fabric: Fabric, run: Run, plan: Plan, progress: Progress) -> tqdm:
    return tqdm(total=plan.steps, initial=progress.step, desc=run.what, unit="step", disable=not fabric.is_global_zero)


def _say_what_to_expect(train: TokenDataset, validation: TokenDataset, plan: Plan, say: Say) -> None:
    if len(validation) < FEW_ITEMS:
        say(
            f"the validation split has only {counted(len(validation), 'item')}, so its loss is a rough measure; "
            f"{FEW_ITEMS} or more make it steadier"
        )
    if plan.warmup_steps is None and plan.warmup < WARMUP_STEPS:
        say(
            f"--warmup_steps is lowered to {plan.warmup}, a tenth of the run: its default of {WARMUP_STEPS} is more "
            f"than the {plan.steps} steps of the run"
        )
    if plan.pack:
        steps = range(min(50, steps_per_epoch(len(train), plan.batch_size)))  # enough to tell
        batches = itertools.chain.from_iterable(_items_of(train, step, plan) for step in steps)
        say(f"packed; padding would be {train.padding(batches):.1%} of all positions")


def _say_what_came_of_it(plan: Plan, progress: Progress, run: Run, say: Say) -> None:
    if progress.step < plan.steps:
        say(
            f"ended at step {progress.step} of {plan.steps}: {plan.patience} validations in a row brought nothing "
            f"below that of step {progress.best_step}"
        )
    say(
        f"before: validation {in_words(progress.first)}\n"
        f"after step {progress.best_step}, the best: validation {in_words(progress.best)}\n"
        f"{progress.seconds:.0f} s; adapter: {run.place}"
    )
    if progress.first and progress.best["loss"] >= progress.first["loss"]:
        say("warning: no validation was better than that before training: try more steps or a lower --learning_rate")


def _items_of(dataset: TokenDataset, step: int, plan: Plan) -> list[list[int]]:
    """Micro batches of the items that an optimizer step reads."""
    return step_batches(dataset, step, plan.batch_size, plan.micro_batch_size, plan.seed)


def _named(split: str, metrics: dict[str, float]) -> dict[str, float]:
    return {f"{split}_{name}": value for name, value in metrics.items()}


def in_words(metrics: dict[str, float]) -> str:
    """What was measured, in words for people."""
    return ", ".join(
        f"{name.replace('_', ' ')} {value:.{4 if abs(value) < 10 else 1}f}" for name, value in metrics.items()
    )


class StepResult(NamedTuple):
    """What one optimizer step did.

    Args:
        row: what is recorded of it: the means of what the loss measures, learning rate, gradient norm before clipping.
        skipped: nothing was changed, because loss or gradient was not finite.
        stop: some process was asked to stop.
    """

    row: dict[str, float]
    skipped: bool
    stop: bool


def _step(
    fabric: Fabric,
    adapter: AnyAdapter,
    optimizer: Optimizer,
    loss: Loss,
    look_ahead: LookAhead | None,
    train: TokenDataset,
    step: int,
    rate: float,
    plan: Plan,
    stop: bool,
) -> StepResult:
    """One optimizer step, counted from 0, over all micro batches of all devices."""
    started = time.perf_counter()
    for group in optimizer.param_groups:
        group["lr"] = rate
    parameters = list(adapter.parameters())
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    chosen = _items_of(train, step, plan)
    if look_ahead is not None:
        look_ahead(_share(fabric, train, chosen, plan.pack, step))

    def losses() -> Iterator[LossSums]:
        for batch in _share(fabric, train, chosen, plan.pack, step):
            sums = loss(batch)
            sums.metrics["loss"].backward()
            yield sums

    metrics, count, stops = add_up(fabric, losses(), stop)
    for parameter in parameters:
        assert parameter.grad is not None
        # Divided only here: gradients of a mean would vanish in a float16 base.
        parameter.grad = _sum_over_devices(fabric, parameter.grad) / count
    grad_norm = float(torch.nn.utils.clip_grad_norm_(parameters, plan.max_grad_norm or math.inf))
    skipped = not (math.isfinite(metrics["loss"]) and math.isfinite(grad_norm))
    if not skipped:
        optimizer.step()
    tokens_per_second = train.lengths[np.concatenate(chosen)].sum() / (time.perf_counter() - started)
    row = {"step": step + 1, **_named("train", metrics), "learning_rate": rate, "grad_norm": grad_norm}
    return StepResult(row | {"tokens_per_second": tokens_per_second}, skipped, stops > 0)


def add_up(fabric: Fabric, losses: Iterable[LossSums], stop: bool = False) -> tuple[dict[str, float], float, float]:
    """Means over the micro batches of all devices, how much was counted, how many processes want to stop."""
    names: list[str] = []
    total = torch.zeros(0)
    for sums in losses:
        names = names or list(sums.metrics)
        parts = [value if value.ndim else torch.stack([value, sums.count]) for value in sums.metrics.values()]
        values = torch.cat([*parts, sums.count[None]]).detach().float()  # sum and count of each metric, and the count
        total = values if len(total) == 0 else total + values
    *values, count, stops = _sum_over_devices(fabric, torch.cat([total, total.new_tensor([stop])])).tolist()
    means = zip(names, values[::2], values[1::2], strict=True)
    return {name: value / own for name, value, own in means if own}, count, stops


def _share(
    fabric: Fabric, dataset: TokenDataset, chosen: list[list[int]], pack: bool, step: int | None = None
) -> Iterator[Batch]:
    """This process's micro batches.

    Every process gets as many, because those that share a sharded base must compute in step: where there are too few,
    one is repeated with nothing scored.
    """
    for start in range(0, len(chosen), fabric.world_size):
        place = start + fabric.global_rank
        batch = dataset.batch(chosen[min(place, len(chosen) - 1)], pack)._replace(step=step).to(fabric.device)
        if place >= len(chosen):
            batch = batch._replace(scored=torch.zeros_like(batch.scored))
        yield batch


class _StopRequest:
    """Turns the first Ctrl-C or SIGTERM into a request that the loop reads; the second one ends the process at once."""

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> _StopRequest:
        alone = threading.current_thread() is not threading.main_thread()  # where no signal arrives
        numbers = () if alone else (signal.SIGINT, signal.SIGTERM)
        self._handlers = {number: signal.signal(number, self._ask) for number in numbers}
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
    fabric: Fabric,
    loss: Loss,
    dataset: TokenDataset,
    micro_batch_size: int,
    pack: bool = False,
    look_ahead: LookAhead | None = None,
) -> dict[str, float]:
    """Means of what a loss measures over a whole data set."""
    plan = by_length(dataset, np.arange(len(dataset)), micro_batch_size)
    if look_ahead is not None:
        look_ahead(_share(fabric, dataset, plan, pack))
    return add_up(fabric, (loss(batch) for batch in _share(fabric, dataset, plan, pack)))[0]


def _sum_over_devices(fabric: Fabric, value: Tensor) -> Tensor:
    if fabric.world_size == 1:
        return value
    return fabric.all_reduce(value.to(fabric.device), reduce_op="sum")  # type: ignore[return-value]
