"""The folder of a run: states to resume from, metrics, their picture, and the hyperparameters."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import itertools
import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from torch import Tensor
from torch.optim import Optimizer
from tqdm import tqdm

from lit_llama.adapters import AnyAdapter
from lit_llama.figures import picture
from lit_llama.files import atomic_file, read_text, remove_temporaries, require_extra, shareable_path
from lit_llama.locks import own_folder

if TYPE_CHECKING:  # takes seconds to import, which --help should not cost
    from lightning.fabric import Fabric

KEEP_STATES = 2
MAX_SKIPPED = 5  # steps in a row without a finite loss and gradient
WRITTEN = r".+\.safetensors|state-\d+\.pt|metrics\.csv|loss\.png|hyperparameters\.yaml"


@contextlib.contextmanager
def own_run(fabric: Fabric, out_dir: Path) -> Iterator[None]:
    """Have the folder of a run for the processes of one run alone, without what killed ones left half written.

    Raises:
        ValueError: another run has it, or it is a file; all processes raise it.
    """
    with contextlib.ExitStack() as stack:
        problem = None
        if fabric.is_global_zero:
            try:
                stack.enter_context(own_folder(out_dir))
                remove_temporaries(out_dir, WRITTEN)
            except (OSError, ValueError) as error:
                problem = str(error)
        problem = fabric.broadcast(problem)
        if problem is not None:
            raise ValueError(problem)
        yield


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

    def count_skipped(self, skipped: bool, loss: float, out_dir: Path) -> None:
        """Count a step that was skipped.

        Args:
            skipped: whether the step was.
            loss: of the step.
            out_dir: where the best adapter so far is.

        Raises:
            FloatingPointError: several in a row were.
        """
        self.skipped += skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        if self.skipped_in_a_row == MAX_SKIPPED:
            what = "training loss" if not math.isfinite(loss) else "gradient"
            self.check_finite(what, math.nan, out_dir)


class MetricsFile:
    """`metrics.csv`, a row per step, each on disk before the next step begins.

    Args:
        path: the file.
        measured: names of what training and validation measure.
        keep_until: keep the rows of an earlier part of the run up to this step; None begins a new file.
        writes: whether this process writes at all.

    Raises:
        ValueError: the rows to keep are not such rows; the message names the line.

    Attributes:
        rows: those written so far, with numbers as the file has them.
    """

    def __init__(self, path: Path, measured: Iterable[str], keep_until: int | None, writes: bool) -> None:
        self._columns = ["step", *(f"{split}_{name}" for name in measured for split in ("train", "validation"))]
        self._columns += ["learning_rate", "grad_norm", "tokens_per_second", "seconds"]
        self.rows: list[dict[str, float]] = []
        if keep_until is not None and path.is_file():
            self.rows = [row for row in _read_metrics(path, self._columns) if row["step"] <= keep_until]
        self._writes = writes
        if writes:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, self._columns)
                writer.writeheader()
                writer.writerows(map(_as_text, self.rows))
            self._file = open(path, "a", newline="", encoding="utf-8")  # noqa: SIM115 (closed by __exit__)

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


def _read_metrics(path: Path, columns: list[str]) -> list[dict[str, float]]:
    """The rows of a `metrics.csv`, without a last line that a kill has torn."""
    text = read_text(path)
    lines = text[: text.rfind("\n") + 1].splitlines()
    names = lines[0].split(",") if lines else []
    if "step" not in names or not set(names) <= set(columns):
        raise ValueError(f"{path}, line 1: expected the columns {', '.join(columns)}, found {', '.join(names)!r:.80}")
    rows: list[dict[str, float]] = []
    for number, line in enumerate(lines[1:], start=2):
        try:
            row = {name: float(value) for name, value in zip(names, line.split(","), strict=True) if value}
            if not row["step"] > (rows[-1]["step"] if rows else -1):
                raise ValueError
        except (ValueError, KeyError):
            raise ValueError(
                f"{path}, line {number}: expected the {len(names)} numbers of a step after the one before, found "
                f"{line!r:.80}; mend the line, or remove the file to go on without the earlier rows"
            ) from None
        rows.append(row)
    return rows


def last_state(out_dir: Path) -> Path | None:
    """The newest state of a run, if it has one."""
    return max(out_dir.glob("state-*.pt"), default=None)


def save_state(
    out_dir: Path, adapter: AnyAdapter, optimizer: Optimizer, progress: Progress, identity: dict[str, Any]
) -> Path:
    """Write the state of a run and remove all but the newest few.

    Args:
        out_dir: folder of the run.
        adapter: what is trained.
        optimizer: over its parameters.
        progress: how far the run has come.
        identity: all that changes the result, by name.

    Returns:
        The file.
    """
    state = {
        "adapter": adapter.state_dict(),
        "optimizer": optimizer.state_dict(),
        "progress": asdict(progress),
        "identity": identity,
        "random": torch.get_rng_state(),
        "cuda_random": torch.cuda.get_rng_state_all(),
    }
    path = out_dir / f"state-{progress.step:08d}.pt"
    content = io.BytesIO()  # where torch itself writes a file, a full disk is no OSError
    torch.save({**state, "sha256": _digest(state).hex()}, content)
    with atomic_file(path) as temporary:
        temporary.write_bytes(content.getbuffer())
    for old in sorted(out_dir.glob("state-*.pt"))[:-KEEP_STATES]:
        old.unlink()
    return path


def _digest(value: Any) -> bytes:
    """Hash of tensors and plain values in dictionaries and lists."""
    if isinstance(value, Tensor):
        content = repr((value.dtype, tuple(value.shape))).encode()
        content += value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    elif isinstance(value, dict):
        content = b"".join(_digest(name) + _digest(one) for name, one in value.items())
    elif isinstance(value, list | tuple):
        content = b"".join(map(_digest, value))
    else:
        content = repr(value).encode()
    return hashlib.sha256(content).digest()


def load_state(path: Path, adapter: AnyAdapter, optimizer: Optimizer, identity: dict[str, Any]) -> Progress:
    """Put a run's state back.

    Args:
        path: of the state. Those written before states held a hash are read as they are.
        adapter: takes the trained values.
        optimizer: over its parameters; takes its moments.
        identity: all that changes the result, by name.

    Returns:
        How far the run had come.

    Raises:
        ValueError: the file is damaged, or of a run that differs in something that changes the result.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        written = state.pop("sha256", None)
        if state.keys() != _STATE or written not in (None, _digest(state).hex()):
            raise ValueError
        earlier = state["identity"]
        different = [
            f"{name} was {earlier.get(name)}, is {identity.get(name)}"
            for name in sorted(earlier.keys() | identity.keys())
            if earlier.get(name) != identity.get(name)
        ]
    except Exception as error:  # junk makes torch's unpickler raise errors of any kind
        raise _not_a_state(path, error) from None
    if different:
        raise ValueError(f"{path} cannot be resumed with other settings: {'; '.join(different)}")
    try:
        adapter.load_state_dict(state["adapter"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
        if state["cuda_random"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["cuda_random"][: torch.cuda.device_count()])
        return Progress(**state["progress"])
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:  # one without a hash
        raise _not_a_state(path, error) from None


_STATE = {"adapter", "optimizer", "progress", "identity", "random", "cuda_random"}


def _not_a_state(path: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{path} is damaged, or is not the state of a run ({type(error).__name__}): remove it to go on from the state "
        "before it, or from the beginning if there is none"
    )


def set_aside(out_dir: Path) -> None:
    """Move the files of an earlier run to `out_dir/previous-N`, so that they are not taken for this one's."""
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
    elsewhere = [name for name, value in hyperparameters.items() if _is_elsewhere(value)]
    again = ["python", shareable_path(Path(sys.argv[0])), "--config", shareable_path(path), "--out_dir ANOTHER"]
    again += [f"--{name} FOLDER/{recorded[name]}" for name in elsewhere if name != "out_dir"]
    notes = {
        "repeat with": " ".join(again),
        "commit": commit,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "lightning", "tokenizers", "safetensors", "numpy")},
        "device": f"{fabric.world_size} x {device or platform.machine()} ({fabric.device.type})",
        "platform": platform.platform(),
    }
    lines = [f"# {name}: {value}\n" for name, value in notes.items()]
    values = {name: value for name, value in recorded.items() if name != "resume"}
    with atomic_file(path) as temporary:
        temporary.write_text("".join(lines) + yaml.safe_dump(values, sort_keys=False), encoding="utf-8")


def shareable(hyperparameters: dict[str, Any]) -> dict[str, Any]:
    """Hyperparameters as adapters, `hyperparameters.yaml` and loggers record them: no folders of this machine."""
    return {
        name: shareable_path(value) if isinstance(value, Path) else value for name, value in hyperparameters.items()
    }


def _is_elsewhere(value: Any) -> bool:
    return isinstance(value, Path) and value.is_absolute() and not value.is_relative_to(Path.cwd())


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


def plot_metrics(rows: list[dict[str, float]], measured: Mapping[str, str], title: str, path: Path) -> None:
    """Draw what training and validation measured over the steps, if matplotlib is installed.

    Args:
        rows: those of `metrics.csv`.
        measured: what to draw, with the label of its axis; names with the same label share one.
        title: of the picture.
        path: the PNG to write.
    """
    labels = list(dict.fromkeys(measured.values()))
    try:
        require_extra("matplotlib.figure", "plot")
    except ImportError:
        return
    with picture(path, title, 7, 1.5 + 3 * len(labels)) as figure:
        for axes, label in zip(figure.subplots(len(labels), sharex=True, squeeze=False).flat, labels, strict=True):
            names = [name for name in measured if measured[name] == label]
            for i, name in enumerate(names):
                for split, look in (("train", {"alpha": 0.4}), ("validation", {"marker": "o"})):
                    points = [(row["step"], row[f"{split}_{name}"]) for row in rows if f"{split}_{name}" in row]
                    words = f"{split} {name}".replace("_", " ")
                    axes.plot(*zip(*points, strict=True), label=words, color=f"C{i}", **look)
            axes.set_ylabel(label)
            axes.grid(alpha=0.3)
            if "accuracy" in label:
                axes.yaxis.set_major_formatter("{x:.0%}")
            above = {"loc": "lower left", "bbox_to_anchor": (0, 1), "frameon": False}
            axes.legend(fontsize="small", ncols=max(2, len(names)), **above)
        axes.set_xlabel("optimizer step")
        figure.align_ylabels()
