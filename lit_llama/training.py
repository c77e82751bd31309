"""The training loop: steps, schedule, validation, metrics, files. It does not know which adapter it trains, or why."""

from __future__ import annotations

import csv
import itertools
import math
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
import yaml
from torch import Tensor
from torch.optim import Optimizer
from tqdm import tqdm

from lit_llama.checkpoint import AnyAdapter, parameter_shapes, save_adapter
from lit_llama.data import Batch, TokenDataset, by_length, step_batches, steps_per_epoch
from lit_llama.files import atomic_file, require_extra
from lit_llama.generation import generate
from lit_llama.losses import SUPERVISED_METRICS, Sums
from lit_llama.model import LLaMA
from lit_llama.prompts import PromptStyle, prompt_style
from lit_llama.tokenizer import Tokenizer

if TYPE_CHECKING:  # takes seconds to import, which --help should not cost
    from lightning.fabric import Fabric

Decay = Literal["none", "linear"]
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
        warmup_steps: optimizer steps of its rise.
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
    warmup_steps: int
    max_grad_norm: float | None
    eval_interval: int
    save_interval: int
    seed: int
    pack: bool


def fit(
    fabric: Fabric,
    model: LLaMA,
    adapter: AnyAdapter,
    optimizer: Optimizer,
    loss: Callable[[Batch], Sums],
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

    A first Ctrl-C or SIGTERM ends the run after its step, with a state; a second one at once.

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
        ValueError: the state to resume from belongs to another run.
    """
    options = LoopOptions(**{field.name: hyperparameters[field.name] for field in fields(LoopOptions)})
    out_dir, pack = options.out_dir, options.pack
    adapter_path = out_dir / f"{adapter.method}.safetensors"
    learning_rate = schedule(options.learning_rate, options.warmup_steps, max_steps, options.decay)
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
        trainable = sum(parameter.numel() for parameter in parameters)
        total = sum(shape.numel() for shape in parameter_shapes(model.config).values())
        print(f"{trainable:,} trainable parameters on a base of {total:,}", file=sys.stderr)
    if out_dir.is_file():
        raise ValueError(f"{out_dir} is a file, expected the folder of a run")
    out_dir.mkdir(parents=True, exist_ok=True)
    state_file = last_state(out_dir) if options.resume else None
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
        steps = range(min(50, steps_per_epoch(len(train), options.batch_size)))  # enough to tell
        plan = itertools.chain.from_iterable(_plan(train, step, options) for step in steps)
        print(f"packed; padding would be {train.padding(plan):.1%} of all positions", file=sys.stderr)

    with (
        tqdm(total=max_steps, initial=progress.step, desc="training", unit="step", disable=not main_process) as bar,
        MetricsFile(out_dir / "metrics.csv", measured, progress.step if state_file else None, main_process) as metrics,
        _StopRequest() as stop,
    ):

        def validate() -> dict[str, float]:
            adapter.eval()
            values = evaluate(fabric, loss, validation, options.micro_batch_size, pack)
            progress.check_finite("validation loss", values["loss"], out_dir)
            better = progress.step > 0 and values["loss"] < progress.best.get("loss", math.inf)
            if better:
                progress.best_step, progress.best = progress.step, values
            shown = _show_answers(model, adapter, tokenizer, style, validation)
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
                        hyperparameters=hyperparameters,
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
            progress.count_skipped(done, out_dir)
            if done.skipped and main_process:
                message = f"step {progress.step} skipped: loss or gradient is not finite ({progress.skipped} so far)"
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
                plot_metrics(metrics.rows, measured, _run_title(adapter, hyperparameters), out_dir / "loss.png")
            due = progress.step % options.save_interval == 0 or time.monotonic() - last_saved > SAVE_SECONDS
            if main_process and (due or finished or done.stop):
                saved = _save_state(out_dir, adapter, optimizer, progress, identity)
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


def _plan(dataset: TokenDataset, step: int, options: LoopOptions) -> list[list[int]]:
    return step_batches(dataset, step, options.batch_size, options.micro_batch_size, options.seed)


def _named(split: str, metrics: dict[str, float]) -> dict[str, float]:
    return {f"{split}_{name}": value for name, value in metrics.items()}


def _in_words(metrics: dict[str, float]) -> str:
    return ", ".join(
        f"{name.replace('_', ' ')} {value:.{4 if abs(value) < 10 else 1}f}" for name, value in metrics.items()
    )


def _show_answers(
    model: LLaMA, adapter: AnyAdapter, tokenizer: Tokenizer, style: PromptStyle, dataset: TokenDataset
) -> str:
    """Answers to two prompts of a data set, as text."""
    prompts = [dataset.prompt(i) for i in range(min(2, len(dataset)))]
    rows = generate(model, prompts, 32, adapter=adapter)  # without an end, as sharded bases compute in step
    answers = [list(itertools.takewhile(lambda id: id not in style.stop_ids, row)) for row in rows]
    pairs = zip(map(tokenizer.decode, prompts), map(tokenizer.decode, answers), strict=True)
    return "\n".join(f"    ...{prompt[-60:]!r} -> {answer!r}" for prompt, answer in pairs)


@dataclass
class Progress:
    """How far a run has come; all that its state holds beside tensors.

    Args:
        step: optimizer steps done, skipped ones included.
        best_step: step of the lowest validation loss.
        best: what validation measured then.
        first: what it measured before the first step.
        skipped: steps skipped because loss or gradient was not finite.
        skipped_in_a_row: of those, the last ones without a good step between.
        seconds: the run took, over all its parts.
    """

    step: int = 0
    best_step: int = 0
    best: dict[str, float] = field(default_factory=dict)
    first: dict[str, float] = field(default_factory=dict)
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

    def count_skipped(self, done: StepResult, out_dir: Path) -> None:
        """Count a step that was skipped.

        Raises:
            FloatingPointError: several in a row were.
        """
        self.skipped += done.skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if done.skipped else 0
        if self.skipped_in_a_row == MAX_SKIPPED:
            what = "training loss" if not math.isfinite(done.metrics["loss"]) else "gradient"
            self.check_finite(what, math.nan, out_dir)


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
    loss: Callable[[Batch], Sums],
    batches: Iterable[Batch],
    max_grad_norm: float | None,
    stop: bool,
) -> StepResult:
    """One optimizer step over all micro batches of all devices, `batches` being this one's."""
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)

    def losses() -> Iterator[Sums]:
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


def _add_up(fabric: Fabric, losses: Iterable[Sums], stop: bool = False) -> tuple[dict[str, float], float, float]:
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


class MetricsFile:
    """`metrics.csv`, a row per step, each on disk before the next step begins.

    Args:
        path: the file.
        measured: names of what training and validation measure.
        keep_until: keep the rows of an earlier part of the run up to this step; None begins anew.
        writes: whether this process writes at all.

    Attributes:
        rows: those written so far, with numbers as the file has them.
    """

    def __init__(self, path: Path, measured: Iterable[str], keep_until: int | None, writes: bool) -> None:
        self.rows: list[dict[str, float]] = []
        if keep_until is not None and path.is_file():
            with open(path, newline="") as file:
                rows = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
            self.rows = [row for row in rows if row["step"] <= keep_until]
        self._columns = ["step", *(f"{split}_{name}" for name in measured for split in ("train", "validation"))]
        self._columns += ["learning_rate", "grad_norm", "tokens_per_second", "seconds"]
        self._writes = writes
        if writes:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as temporary, open(temporary, "w", newline="") as file:
                writer = csv.DictWriter(file, self._columns)
                writer.writeheader()
                writer.writerows(map(_as_text, self.rows))
            self._file = open(path, "a", newline="")  # noqa: SIM115 (closed by __exit__)

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writes:
            self._file.close()

    def write(self, row: dict[str, float]) -> None:
        """Add a row."""
        self.rows.append(row)
        if self._writes:
            csv.DictWriter(self._file, self._columns).writerow(_as_text(row))
            self._file.flush()
            os.fsync(self._file.fileno())


def _as_text(row: dict[str, float]) -> dict[str, str]:
    return {name: f"{value:.6g}" for name, value in row.items()}


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


def last_state(out_dir: Path) -> Path | None:
    """The newest state of a run, if it has one."""
    return max(out_dir.glob("state-*.pt"), default=None)


def _save_state(
    out_dir: Path, adapter: AnyAdapter, optimizer: Optimizer, progress: Progress, identity: dict[str, Any]
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


def _load_state(path: Path, adapter: AnyAdapter, optimizer: Optimizer, identity: dict[str, Any]) -> Progress:
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
    fabric: Fabric, loss: Callable[[Batch], Sums], dataset: TokenDataset, micro_batch_size: int, pack: bool = False
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


def _run_title(adapter: AnyAdapter, hyperparameters: Mapping[str, Any]) -> str:
    """What tells the picture of a run from those of others."""
    count = sum(parameter.numel() for parameter in adapter.parameters())
    folders = {name: Path(hyperparameters.get(name, "")).name for name in ("out_dir", "checkpoint_dir", "data_dir")}
    named = {"learning rate": "learning_rate", "beta": "beta", "batch": "batch_size", "seed": "seed"}
    settings = [f"{words} {hyperparameters[name]:g}" for words, name in named.items() if name in hyperparameters]
    return (
        f"{folders['out_dir']}: {type(adapter).__name__} of {count:,} parameters\n"
        f"{folders['checkpoint_dir']} on {folders['data_dir']}, {', '.join(settings)}"
    )


def plot_metrics(rows: list[dict[str, float]], measured: Mapping[str, str], title: str, path: Path) -> None:
    """Draw what training and validation measured over the steps, if matplotlib is installed.

    Args:
        rows: those of `metrics.csv`.
        measured: what to draw, with the label of its axis; names with the same label share one.
        title: of the picture.
        path: the PNG to write.
    """
    try:
        matplotlib_figure = require_extra("matplotlib.figure", "plot")
    except ImportError:
        return
    labels = list(dict.fromkeys(measured.values()))
    figure = matplotlib_figure.Figure(figsize=(7, 1.5 + 3 * len(labels)), layout="constrained")
    figure.suptitle(title, fontsize="medium")
    for axes, label in zip(figure.subplots(len(labels), sharex=True, squeeze=False).flat, labels, strict=True):
        names = [name for name in measured if measured[name] == label]
        for i, name in enumerate(names):
            for split, look in (("train", {"alpha": 0.4}), ("validation", {"marker": "o"})):
                points = [(row["step"], row[f"{split}_{name}"]) for row in rows if f"{split}_{name}" in row]
                axes.plot(*zip(*points, strict=True), label=f"{split} {name}".replace("_", " "), color=f"C{i}", **look)
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        if "accuracy" in label:
            axes.yaxis.set_major_formatter("{x:.0%}")
        above = {"loc": "lower left", "bbox_to_anchor": (0, 1), "frameon": False}
        axes.legend(fontsize="small", ncols=max(2, len(names)), **above)
    axes.set_xlabel("optimizer step")
    figure.align_ylabels()
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
