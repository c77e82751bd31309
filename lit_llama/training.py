"""The training loop: steps, schedule, validation, metrics, files. It knows nothing of which adapter it trains."""

import csv
import itertools
import math
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import yaml
from lightning.fabric import Fabric
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer
from tqdm import tqdm

from lit_llama.data import Batch, TokenDataset, by_length, step_batches, steps_per_epoch
from lit_llama.files import atomic_file, require_extra

Decay = Literal["none", "linear"]
METRICS = ["step", "train_loss", "validation_loss", "learning_rate", "grad_norm", "tokens_per_second", "seconds"]
SAVE_SECONDS = 600  # between states, however long a step takes
KEEP_STATES = 2
MAX_SKIPPED = 5  # steps in a row without a finite loss and gradient
MAY_CHANGE = {  # on resuming; everything else changes the result
    "checkpoint_dir",
    "data_dir",
    "out_dir",
    "save_interval",
    "resume",
    "logger",
    "precision",  # what it stands for must not change
    "micro_batch_size",
    "devices",
    "num_nodes",
    "shard_base",
    "activation_checkpointing",
}


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
    hyperparameters: dict[str, Any],
    fingerprints: dict[str, str],
    resume: bool,
    max_steps: int,
    batch_size: int,
    micro_batch_size: int,
    learning_rate: Callable[[int], float],
    max_grad_norm: float | None,
    eval_interval: int,
    save_interval: int,
    seed: int,
    pack: bool = False,
    show: Callable[[], str] | None = None,
) -> FitResult:
    """Train an adapter.

    Writes to `out_dir`: `hyperparameters.yaml`, `metrics.csv` with a row per step, `loss.png`, and states from which a
    run continues to the bit. The best adapter is written by `save`. Other loggers are Fabric's.

    A first Ctrl-C or SIGTERM ends the run after its step, with a state; a second one at once.

    Args:
        fabric: chooses the device and sums over devices.
        adapter: holds the trainable parameters, float32.
        optimizer: over those.
        loss: sum over the scored tokens of a batch.
        train: what is learned.
        validation: what is measured, all of it, before the first step, every `eval_interval` steps and at the end.
        save: called with step, validation loss and seconds whenever the validation loss is the lowest so far.
        out_dir: where files go.
        hyperparameters: the script's keywords. A state is refused if one that changes the result was another.
        fingerprints: of all else that changes the result, by name; likewise.
        resume: continue from the last state in `out_dir`, if there is one.
        max_steps: optimizer steps.
        batch_size: examples per step, over all devices.
        micro_batch_size: examples per forward on one device.
        learning_rate: of each step, counted from 0.
        max_grad_norm: scale larger gradients down to this norm.
        eval_interval: steps between validations.
        save_interval: steps between states; one is also saved every 10 minutes.
        seed: of the order of examples.
        pack: put the examples of a forward into one row instead of padding them.
        show: called at each validation, by all processes; its text is shown.

    Raises:
        FloatingPointError: losses or gradients are no longer finite; the best adapter so far stays on disk.
        KeyboardInterrupt: a signal ended the run; a state was saved.
        ValueError: the state to resume from belongs to another run.
    """
    main_process = fabric.is_global_zero
    identity = {f"--{name}": value for name, value in hyperparameters.items() if name not in MAY_CHANGE} | fingerprints
    parameters = [parameter for parameter in adapter.parameters() if parameter.requires_grad]
    progress = Progress()
    if out_dir.is_file():
        raise ValueError(f"{out_dir} is a file, expected the folder of a run")
    out_dir.mkdir(parents=True, exist_ok=True)
    state_file = last_state(out_dir) if resume else None
    if state_file is not None:
        progress = _load_state(state_file, adapter, optimizer, identity)
    _check_same_step(fabric, progress.step, out_dir)
    if main_process:
        if state_file is None:
            _set_aside(out_dir)
        _write_hyperparameters(out_dir / "hyperparameters.yaml", hyperparameters, fabric)
    for logger in fabric.loggers:
        logger.log_hyperparams({name: _plain(value) for name, value in hyperparameters.items()})
    started = time.perf_counter() - progress.seconds
    last_saved = time.monotonic()

    if pack and main_process:
        steps = range(min(50, steps_per_epoch(len(train), batch_size)))  # enough to tell
        plan = (micro for step in steps for micro in step_batches(train, step, batch_size, micro_batch_size, seed))
        print(f"packed; padding would be {train.padding(plan):.1%} of all positions", file=sys.stderr)

    with (
        tqdm(total=max_steps, initial=progress.step, desc="training", unit="step", disable=not main_process) as bar,
        MetricsFile(out_dir / "metrics.csv", progress.step if state_file else None, main_process) as metrics,
        _StopRequest() as stop,
    ):

        def validate() -> float:
            validation_loss = evaluate(fabric, loss, validation, micro_batch_size, pack)
            progress.check_finite("validation loss", validation_loss, out_dir)
            better = progress.step > 0 and validation_loss < progress.best_loss
            if better:
                progress.best_step, progress.best_loss = progress.step, validation_loss
            shown = "" if show is None else f"\n{show()}"
            if main_process:
                bar.write(f"step {progress.step}: validation loss {validation_loss:.4f}{shown}", file=sys.stderr)
                if better:
                    save(progress.step, validation_loss, time.perf_counter() - started)
            return validation_loss

        def record(row: dict[str, float]) -> None:
            metrics.write(row)
            fabric.log_dict({name: value for name, value in row.items() if name != "step"}, step=int(row["step"]))

        if state_file is None:
            progress.base_loss = validate()
            record({"step": 0, "validation_loss": progress.base_loss, "seconds": time.perf_counter() - started})
        while progress.step < max_steps:
            step_started = time.perf_counter()
            rate = learning_rate(progress.step)
            for group in optimizer.param_groups:
                group["lr"] = rate
            chosen = step_batches(train, progress.step, batch_size, micro_batch_size, seed)
            batches = _share(fabric, train, chosen, pack)
            done = _step(fabric, parameters, optimizer, loss, batches, max_grad_norm, stop.requested)
            progress.step += 1
            progress.count_skipped(done, out_dir)
            if done.skipped and main_process:
                message = f"step {progress.step} skipped: loss or gradient is not finite ({progress.skipped} so far)"
                bar.write(message, file=sys.stderr)
            tokens_per_second = train.lengths[np.concatenate(chosen)].sum() / (time.perf_counter() - step_started)
            bar.update()
            bar.set_postfix(loss=f"{done.loss:.3f}", tokens_per_s=f"{tokens_per_second:.0f}")
            row = {
                "step": progress.step,
                "train_loss": done.loss,
                "learning_rate": rate,
                "grad_norm": done.grad_norm,
                "tokens_per_second": tokens_per_second,
            }
            finished = progress.step == max_steps
            if progress.step % eval_interval == 0 or finished:
                row["validation_loss"] = validate()
            progress.seconds = time.perf_counter() - started
            record({**row, "seconds": progress.seconds})
            if main_process and "validation_loss" in row:
                plot_losses(metrics.rows, out_dir / "loss.png")
            due = progress.step % save_interval == 0 or time.monotonic() - last_saved > SAVE_SECONDS
            if main_process and (due or finished or done.stop):
                saved = _save_state(out_dir, adapter, optimizer, progress, identity)
                last_saved = time.monotonic()
                if done.stop and not finished:
                    bar.write(f"stopped; {saved} is saved: continue with --resume true", file=sys.stderr)
            if done.stop and not finished:
                fabric.barrier()  # a process that ends early may take the one that saves with it
                raise KeyboardInterrupt
    fabric.barrier()
    return FitResult(progress.best_step, progress.best_loss, progress.base_loss, progress.seconds)


@dataclass
class Progress:
    """How far a run has come; all that its state holds beside tensors.

    Args:
        step: optimizer steps done, skipped ones included.
        best_step: step of the lowest validation loss.
        best_loss: that loss.
        base_loss: validation loss before the first step.
        skipped: steps skipped because loss or gradient was not finite.
        skipped_in_a_row: of those, the last ones without a good step between.
        seconds: the run took, over all its parts.
    """

    step: int = 0
    best_step: int = 0
    best_loss: float = math.inf
    base_loss: float = math.nan
    skipped: int = 0
    skipped_in_a_row: int = 0
    seconds: float = 0.0

    def check_finite(self, what: str, value: float, out_dir: Path) -> None:
        """Stop a run whose loss is no number.

        Raises:
            FloatingPointError: it is none.
        """
        if math.isfinite(value):
            return
        if self.step == 0:
            raise FloatingPointError(f"the base model's {what} is {value}: try --precision 32-true")
        kept = (
            f"the adapter of step {self.best_step} stays in {out_dir}" if self.best_step else "no adapter was written"
        )
        raise FloatingPointError(
            f"training diverged: the {what} is {value} at step {self.step}; {kept}; try a lower --learning_rate"
        )

    def count_skipped(self, done: "StepResult", out_dir: Path) -> None:
        """Count a step that was skipped.

        Raises:
            FloatingPointError: several in a row were.
        """
        self.skipped += done.skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if done.skipped else 0
        if self.skipped_in_a_row == MAX_SKIPPED:
            what = "training loss" if not math.isfinite(done.loss) else "gradient"
            self.check_finite(what, math.nan, out_dir)


class StepResult(NamedTuple):
    """What one optimizer step did.

    Args:
        loss: mean over its scored tokens.
        grad_norm: before clipping.
        skipped: nothing was changed, because loss or gradient was not finite.
        stop: some process was asked to stop.
    """

    loss: float
    grad_norm: float
    skipped: bool
    stop: bool


def _step(
    fabric: Fabric,
    parameters: list[torch.nn.Parameter],
    optimizer: Optimizer,
    loss: Callable[[Batch], Tensor],
    batches: Iterable[Batch],
    max_grad_norm: float | None,
    stop: bool,
) -> StepResult:
    """One optimizer step over all micro batches of all devices, `batches` being this one's."""
    sums = torch.tensor([0.0, 0.0, float(stop)], device=fabric.device)  # loss, scored tokens, requests to stop
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    for batch in batches:
        batch_loss = loss(batch)
        batch_loss.backward()
        sums[0] += batch_loss.detach()
        sums[1] += batch.scored.sum()
    loss_sum, scored, stops = _sum_over_devices(fabric, sums).tolist()
    for parameter in parameters:
        assert parameter.grad is not None
        # Divided only here: gradients of a mean would vanish in a float16 base.
        parameter.grad = _sum_over_devices(fabric, parameter.grad) / scored
    grad_norm = float(torch.nn.utils.clip_grad_norm_(parameters, math.inf if max_grad_norm is None else max_grad_norm))
    skipped = not (math.isfinite(loss_sum) and math.isfinite(grad_norm))
    if not skipped:
        optimizer.step()
    return StepResult(loss_sum / scored, grad_norm, skipped, stops > 0)


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


class MetricsFile:
    """`metrics.csv`, a row per step, each on disk before the next step begins.

    Args:
        path: the file.
        keep_until: keep the rows of an earlier part of the run up to this step; None begins anew.
        writes: whether this process writes at all.

    Attributes:
        rows: those written so far, with numbers as the file has them.
    """

    def __init__(self, path: Path, keep_until: int | None, writes: bool) -> None:
        self.rows: list[dict[str, float]] = []
        if keep_until is not None and path.is_file():
            with open(path, newline="") as file:
                rows = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
            self.rows = [row for row in rows if row["step"] <= keep_until]
        self._writes = writes
        if writes:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as temporary, open(temporary, "w", newline="") as file:
                writer = csv.DictWriter(file, METRICS)
                writer.writeheader()
                writer.writerows(map(_as_text, self.rows))
            self._file = open(path, "a", newline="")  # noqa: SIM115 (closed by __exit__)

    def __enter__(self) -> "MetricsFile":
        return self

    def __exit__(self, *_: object) -> None:
        if self._writes:
            self._file.close()

    def write(self, row: dict[str, float]) -> None:
        """Add a row."""
        self.rows.append(row)
        if self._writes:
            csv.DictWriter(self._file, METRICS).writerow(_as_text(row))
            self._file.flush()
            os.fsync(self._file.fileno())


def _as_text(row: dict[str, float]) -> dict[str, str]:
    return {name: f"{value:.6g}" for name, value in row.items()}


class _StopRequest:
    """Turns the first Ctrl-C or SIGTERM into a request that the loop reads; the second one acts as ever."""

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> "_StopRequest":
        self._handlers = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _ask(self, *_: object) -> None:
        self.requested = True
        self.__exit__()
        tqdm.write("stopping after this step; once more stops at once", file=sys.stderr)


def last_state(out_dir: Path) -> Path | None:
    """The newest state of a run, if it has one."""
    return max(out_dir.glob("state-*.pt"), default=None)


def _save_state(
    out_dir: Path, adapter: Module, optimizer: Optimizer, progress: Progress, identity: dict[str, Any]
) -> Path:
    """Write the state of a run and remove all but the newest few."""
    state = {
        "adapter": adapter.state_dict(),
        "optimizer": optimizer.state_dict(),
        "progress": asdict(progress),
        "identity": identity,
        "random": torch.get_rng_state(),
        "cuda_random": torch.cuda.get_rng_state_all(),
    }
    path = out_dir / f"state-{progress.step:08d}.pt"
    with atomic_file(path) as temporary:
        torch.save(state, temporary)
    for old in sorted(out_dir.glob("state-*.pt"))[:-KEEP_STATES]:
        old.unlink()
    return path


def _load_state(path: Path, adapter: Module, optimizer: Optimizer, identity: dict[str, Any]) -> Progress:
    """Put a run's state back.

    Raises:
        ValueError: the file is damaged, or of a run that differs in something that changes the result.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        earlier = state["identity"]
    except Exception as error:
        raise ValueError(f"{path} is no state of a run ({type(error).__name__}): remove it to go on without") from None
    different = [
        f"{name} was {earlier.get(name)}, is {identity.get(name)}"
        for name in sorted(earlier.keys() | identity.keys())
        if earlier.get(name) != identity.get(name)
    ]
    if different:
        raise ValueError(f"{path} cannot be resumed with other settings: {'; '.join(different)}")
    adapter.load_state_dict(state["adapter"])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["random"])
    if state["cuda_random"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda_random"][: torch.cuda.device_count()])
    return Progress(**state["progress"])


def _set_aside(out_dir: Path) -> None:
    """Move the files of an earlier run to `out_dir/previous-N`, lest they be taken for this one's."""
    earlier = [
        path
        for path in out_dir.iterdir()
        if path.suffix in (".safetensors", ".pt", ".csv", ".png", ".yaml")
        or path.stem in ("report", "tensorboard", "wandb")
    ]
    if earlier:
        number = next(n for n in itertools.count(1) if not (out_dir / f"previous-{n}").exists())
        previous = out_dir / f"previous-{number}"
        previous.mkdir()
        for path in earlier:
            path.rename(previous / path.name)
        tqdm.write(f"the earlier run in {out_dir} was moved to {previous}", file=sys.stderr)


@torch.no_grad()
def evaluate(
    fabric: Fabric, loss: Callable[[Batch], Tensor], dataset: TokenDataset, micro_batch_size: int, pack: bool = False
) -> float:
    """Mean loss of the scored tokens of a whole data set."""
    total = torch.zeros(2, dtype=torch.float64)  # loss, scored tokens
    for batch in _share(fabric, dataset, by_length(dataset, np.arange(len(dataset)), micro_batch_size), pack):
        total += torch.tensor([float(loss(batch)), float(batch.scored.sum())])
    loss_sum, scored = _sum_over_devices(fabric, total).tolist()
    return loss_sum / scored


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


def _write_hyperparameters(path: Path, hyperparameters: dict[str, Any], fabric: Fabric) -> None:
    """Write what `--config` reads, and as comments where the run took place."""
    folder = Path(__file__).parent
    git = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or an installed copy
        commit = "unknown"
    device = torch.cuda.get_device_name(fabric.device) if fabric.device.type == "cuda" else platform.processor()
    notes = {
        "repeat with": f"python {sys.argv[0]} --config {path} --out_dir ANOTHER",
        "commit": commit,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "lightning", "tokenizers", "safetensors", "numpy")},
        "device": f"{fabric.world_size} x {device or platform.machine()} ({fabric.device.type})",
        "platform": platform.platform(),
    }
    lines = [f"# {name}: {value}\n" for name, value in notes.items()]
    values = {name: _plain(value) for name, value in hyperparameters.items() if name != "resume"}
    with atomic_file(path) as temporary:
        temporary.write_text("".join(lines) + yaml.safe_dump(values, sort_keys=False), encoding="utf-8")


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


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
    "aligner_init_std": 0,
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


def total_steps(examples: int, batch_size: int, epochs: int, max_steps: int | None, warmup_steps: int) -> int:
    """Optimizer steps of a run: `max_steps` if given, otherwise those of `epochs`.

    Raises:
        ValueError: warm-up is longer than the run.
    """
    steps = max_steps or epochs * steps_per_epoch(examples, batch_size)
    if warmup_steps > steps:
        length = "--max_steps" if max_steps else f"the {epochs} epochs' length of"
        raise ValueError(f"--warmup_steps {warmup_steps} is more than {length} {steps}: lower --warmup_steps")
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
