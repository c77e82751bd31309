"""What a run leaves: the best values in memory, or a folder with adapter, states, metrics, picture, hyperparameters."""

from __future__ import annotations

import contextlib
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from torch import Tensor
from torch.optim import Optimizer
from tqdm import tqdm

from lit_llama.adapters import AnyAdapter, Companion, load_adapter, save_adapter
from lit_llama.files import atomic_file, shareable_path
from lit_llama.metrics import MetricsFile, plot_metrics
from lit_llama.model import LLaMA, parameter_shapes
from lit_llama.plan import Plan
from lit_llama.run_files import own_run, set_aside
from lit_llama.states import Progress, last_state, load_state, save_state

if TYPE_CHECKING:  # takes seconds to import, which --help should not cost
    from lightning_fabric import Fabric

SAVE_SECONDS = 600  # between states, however long a step takes
PICTURE_SECONDS = 10  # between two pictures of a run, each of which takes up to half a second
MAY_CHANGE = {  # on resuming; everything else changes the result
    "checkpoint_dir",
    "data_dir",
    "out_dir",
    "save_interval",
    "resume",
    "logger",
    "precision",  # what it stands for must not change
    "adapter_path",  # nor what these hold
    "also_adapter",
    "reference_path",
    "keep_data",
    "system_prompt_file",
    "teacher_adapter",
    "questions_file",
    "answer_batch_size",
    "matches",
    "asked",
    "cache_reference",
    "micro_batch_size",
    "devices",
    "num_nodes",
    "shard_base",
    "activation_checkpointing",
}


class Run:
    """A run that leaves nothing on disk. It keeps the best values in memory, and cannot be resumed.

    Args:
        what: a word or two for the progress bar.

    Attributes:
        place: where the best adapter so far is, for messages.
    """

    place = "memory"

    def __init__(self, what: str = "training") -> None:
        self.what = what
        self._best: dict[str, Tensor] = {}

    @contextlib.contextmanager
    def opened(
        self,
        fabric: Fabric,
        adapter: AnyAdapter,
        optimizer: Optimizer,
        plan: Plan,
        data: Mapping[str, str],
        measured: Mapping[str, str],
    ) -> Iterator[Progress]:
        """Begin the run, or put back what it had come to.

        Args:
            fabric: the processes of the run.
            adapter: what is trained; takes the values of the state that the run is resumed from.
            optimizer: over its parameters; takes its moments likewise.
            plan: with its number of steps.
            data: hashes of the data, by name; a run with other data is not resumed.
            measured: what the loss measures, with the label of its axis in the picture.

        Returns:
            How far the run has come, for the loop to keep.

        Raises:
            ValueError: the state belongs to another run or is damaged, or another run has the folder.
        """
        yield Progress()

    def record(self, row: dict[str, float]) -> None:
        """Note what a step measured."""

    def keep_best(self, adapter: AnyAdapter, progress: Progress) -> None:
        """Keep the adapter, which is the best one so far."""
        self._best = {name: tensor.detach().clone() for name, tensor in adapter.state_dict().items()}

    def restore_best(self, adapter: AnyAdapter) -> None:
        """Give the adapter its best values."""
        if self._best:
            adapter.load_state_dict(self._best)

    def save(self, adapter: AnyAdapter, optimizer: Optimizer, progress: Progress, ends: bool) -> None:
        """Save the state after a step, if the run ends here or one is due."""

    def stopped(self) -> str:
        """What to say when a signal has ended the run."""
        return "stopped"


class RunFolder(Run):
    """A run in a folder.

    It holds the adapter with the lowest validation loss, `hyperparameters.yaml`, `metrics.csv` with a row per step,
    `loss.png`, and states from which the run continues to the bit. What Fabric's loggers write goes there too. While
    the run is open, no other run can write to its folder.

    Args:
        out_dir: the folder.
        base: the base model.
        prompt_style: name of the style of the training prompts, for the adapter's file.
        hyperparameters: all options of the run by name, to be recorded. A state is refused if one that changes the
            result was another.
        resume: continue from the last state in the folder, if there is one.
        save_interval: optimizer steps between states; one is also saved every 10 minutes.
        fingerprints: hashes of what else changes the result, in addition to base and data, by name.
        also: adapters on top of which this one is trained, for its file.
    """

    def __init__(
        self,
        out_dir: Path,
        base: LLaMA,
        prompt_style: str,
        hyperparameters: dict[str, Any],
        *,
        resume: bool = False,
        save_interval: int = 100,
        fingerprints: Mapping[str, str] | None = None,
        also: Sequence[Companion] = (),
    ) -> None:
        super().__init__()
        self.out_dir, self.place = out_dir, str(out_dir)
        self._base, self._prompt_style = base, prompt_style
        self._hyperparameters, self._fingerprints = hyperparameters, fingerprints or {}
        self._resume, self._save_interval, self._also = resume, save_interval, tuple(also)

    @contextlib.contextmanager
    def opened(
        self,
        fabric: Fabric,
        adapter: AnyAdapter,
        optimizer: Optimizer,
        plan: Plan,
        data: Mapping[str, str],
        measured: Mapping[str, str],
    ) -> Iterator[Progress]:
        self._fabric, self._measured = fabric, measured
        settled = {"learning_rate": plan.learning_rate, "warmup_steps": plan.warmup}
        self._hyperparameters = self._hyperparameters | settled
        self._identity = self._own_identity() | dict(data)
        with own_run(fabric, self.out_dir):
            state = last_state(self.out_dir) if self._resume else None
            progress = Progress() if state is None else load_state(state, adapter, optimizer, self._identity)
            _check_same_step(fabric, progress.step, self.out_dir)
            if fabric.is_global_zero:
                if state is None:
                    set_aside(self.out_dir)
                write_hyperparameters(self.out_dir / "hyperparameters.yaml", self._hyperparameters, fabric)
                trainable = sum(parameter.numel() for parameter in adapter.parameters())
                total = sum(shape.numel() for shape in parameter_shapes(self._base.config).values())
                tqdm.write(f"{trainable:,} trainable parameters on a base of {total:,}", file=sys.stderr)
            for logger in fabric.loggers:
                logger.log_hyperparams(shareable(self._hyperparameters))
            self._title = run_title(adapter, self._hyperparameters)
            self._last_saved = time.monotonic()
            keep_until = None if state is None else progress.step
            self._last_drawn, self._is_drawn = time.monotonic(), True
            with MetricsFile(
                self.out_dir / "metrics.csv", measured, keep_until, fabric.is_global_zero
            ) as self._metrics:
                try:
                    yield progress
                finally:
                    self._draw()
            fabric.barrier()  # a process that ends early may take the one that saves with it

    def _own_identity(self) -> dict[str, Any]:
        options = {f"--{name}": value for name, value in self._hyperparameters.items() if name not in MAY_CHANGE}
        return options | {"base": self._base.fingerprint, "precision": str(self._base.dtype), **self._fingerprints}

    def record(self, row: dict[str, float]) -> None:
        self._metrics.write(row)
        step = int(row["step"])
        self._fabric.log_dict({name: value for name, value in row.items() if name != "step"}, step=step)
        if "validation_loss" in row and step > 0:
            self._is_drawn = False
            if time.monotonic() - self._last_drawn > PICTURE_SECONDS:
                self._draw()

    def _draw(self) -> None:
        if self._fabric.is_global_zero and not self._is_drawn:
            plot_metrics(self._metrics.rows, self._measured, self._title, self.out_dir / "loss.png")
            self._last_drawn, self._is_drawn = time.monotonic(), True

    def keep_best(self, adapter: AnyAdapter, progress: Progress) -> None:
        if self._fabric.is_global_zero:
            save_adapter(
                self._adapter_path(adapter),
                adapter,
                base=self._base,
                prompt_style=self._prompt_style,
                step=progress.best_step,
                validation_loss=progress.best["loss"],
                seconds=progress.seconds,
                hyperparameters=shareable(self._hyperparameters),
                also=self._also,
            )

    def restore_best(self, adapter: AnyAdapter) -> None:
        adapter.load_state_dict(load_adapter(self._adapter_path(adapter)).state_dict())

    def _adapter_path(self, adapter: AnyAdapter) -> Path:
        return self.out_dir / f"{adapter.method}.safetensors"

    def save(self, adapter: AnyAdapter, optimizer: Optimizer, progress: Progress, ends: bool) -> None:
        due = progress.step % self._save_interval == 0 or time.monotonic() - self._last_saved > SAVE_SECONDS
        if self._fabric.is_global_zero and (due or ends):
            save_state(self.out_dir, adapter, optimizer, progress, self._identity)
            self._last_saved = time.monotonic()

    def stopped(self) -> str:
        return f"stopped; {last_state(self.out_dir)} is saved: continue with --resume"


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


def write_hyperparameters(path: Path, hyperparameters: dict[str, Any], fabric: Fabric) -> None:
    """Write what `--config` reads, and as comments where the run took place."""
    folder = Path(__file__).parent
    git = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or an installed copy
        commit = "unknown"
    device = torch.cuda.get_device_name(fabric.device) if fabric.device.type == "cuda" else platform.processor()
    recorded = shareable(hyperparameters)
    again = ["python", shareable_path(Path(sys.argv[0])), "--config", shareable_path(path), "--out_dir ANOTHER"]
    for name, value in hyperparameters.items():
        if name != "out_dir" and any(map(_is_elsewhere, _paths(value))):
            again += [f"--{name} FOLDER/{shareable_path(one)}" for one in _paths(value)]
    notes = {
        "repeat with": " ".join(again),
        "commit": commit,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "lightning-fabric", "tokenizers", "safetensors", "numpy")},
        "device": f"{fabric.world_size} x {device or platform.machine()} ({fabric.device.type})",
        "platform": platform.platform(),
    }
    lines = [f"# {name}: {value}\n" for name, value in notes.items()]
    values = {name: value for name, value in recorded.items() if name != "resume"}
    with atomic_file(path) as temporary:
        temporary.write_text("".join(lines) + yaml.safe_dump(values, sort_keys=False), encoding="utf-8")


def shareable(hyperparameters: dict[str, Any]) -> dict[str, Any]:
    """Hyperparameters as adapters, `hyperparameters.yaml` and loggers record them: no folders of this machine."""
    return {name: _shareable(value) for name, value in hyperparameters.items()}


def _shareable(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_shareable(one) for one in value]
    return shareable_path(value) if isinstance(value, Path) else value


def _paths(value: Any) -> list[Path]:
    return [one for one in (value if isinstance(value, list) else [value]) if isinstance(one, Path)]


def _is_elsewhere(path: Path) -> bool:
    return path.is_absolute() and not path.is_relative_to(Path.cwd())


def run_title(adapter: AnyAdapter, hyperparameters: Mapping[str, Any]) -> str:
    """What tells the picture of a run from those of others."""
    count = sum(parameter.numel() for parameter in adapter.parameters())
    folders = {name: Path(hyperparameters.get(name, "")).name for name in ("out_dir", "checkpoint_dir", "data_dir")}
    named = {"learning rate": "learning_rate", "beta": "beta", "batch": "batch_size", "seed": "seed"}
    settings = [f"{words} {hyperparameters[name]:g}" for words, name in named.items() if name in hyperparameters]
    return (
        f"{folders['out_dir']}: {type(adapter).__name__} of {count:,} parameters\n"
        f"{folders['checkpoint_dir']} on {folders['data_dir']}, {', '.join(settings)}"
    )
