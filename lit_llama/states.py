"""How far a run has come, and the files from which it is resumed to the bit."""

from __future__ import annotations

import hashlib
import io
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lit_llama.adapters import AnyAdapter
from lit_llama.files import atomic_file

KEEP_STATES = 2
MAX_SKIPPED = 5  # steps in a row without a finite loss and gradient


@dataclass
class Progress:
    """How far a run has come: all that its state holds in addition to tensors.

    Args:
        step: optimizer steps done, skipped ones included.
        best_step: step of the lowest validation loss.
        best: what validation measured then.
        first: what it measured before the first step.
        skipped: steps skipped because loss or gradient was not finite.
        skipped_in_a_row: how many of those came last, without a good step between.
        seconds: what the run took, over all its parts.
    """

    step: int = 0
    best_step: int = 0
    best: dict[str, float] = field(default_factory=dict)
    first: dict[str, float] = field(default_factory=dict)
    skipped: int = 0
    skipped_in_a_row: int = 0
    seconds: float = 0.0

    def check_finite(self, what: str, value: float, place: str) -> None:
        """Stop a run whose loss is not a number.

        Args:
            what: what was measured.
            value: its value.
            place: where the best adapter so far stays.

        Raises:
            FloatingPointError: the value is not finite.
        """
        if math.isfinite(value):
            return
        if self.step == 0:
            raise FloatingPointError(f"the base model's {what} is {value}: try --precision 32-true")
        kept = f"the adapter of step {self.best_step} stays in {place}" if self.best_step else "no adapter was written"
        raise FloatingPointError(
            f"training diverged: the {what} is {value} at step {self.step}; {kept}; try a lower --learning_rate"
        )

    def count_step(self, skipped: bool, loss: float, place: str) -> None:
        """Count an optimizer step.

        Args:
            skipped: whether the step changed nothing, because its loss or gradient was not finite.
            loss: loss of the step.
            place: where the best adapter so far stays.

        Raises:
            FloatingPointError: several steps in a row were skipped.
        """
        self.step += 1
        self.skipped += skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        if self.skipped_in_a_row == MAX_SKIPPED:
            what = "training loss" if not math.isfinite(loss) else "gradient"
            self.check_finite(what, math.nan, place)

    def is_better(self, measured: dict[str, float]) -> bool:
        """Whether this validation has the lowest loss of a trained adapter so far; if so, it is noted."""
        better = self.step > 0 and measured["loss"] < self.best.get("loss", math.inf)
        if better:
            self.best_step, self.best = self.step, measured
        return better


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


def recorded_setting(out_dir: Path, name: str) -> Any:
    """The value of an option in the newest state of a run; None if there is no state, or it does not say.

    Raises:
        ValueError: the state is damaged.
    """
    path = last_state(out_dir)
    return None if path is None else _read(path)["identity"].get(name)


def load_state(path: Path, adapter: AnyAdapter, optimizer: Optimizer, identity: dict[str, Any]) -> Progress:
    """Put a run's state back.

    Args:
        path: file of the state. Those written before states held a hash are read as they are.
        adapter: takes the trained values.
        optimizer: over its parameters; takes its moments.
        identity: all that changes the result, by name.

    Returns:
        How far the run had come.

    Raises:
        ValueError: the file is damaged, or of a run that differs in something that changes the result.
    """
    state = _read(path)
    earlier = state["identity"]
    different = []
    for name in sorted(earlier.keys() | identity.keys()):
        if name in ("--method", "--aligner_length") and identity.get("start", "new") != "new":
            continue  # those of the adapter that training started from; older code recorded what did not apply
        before, now = earlier.get(name), identity.get(name)
        is_new = name not in earlier or name not in identity  # an option that other code has, and that is off here
        if before != now and not (is_new and not before and not now):
            different.append(f"{name} was {before}, is {now}")
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


def _read(path: Path) -> dict[str, Any]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        written = state.pop("sha256", None)
        if state.keys() != _STATE or written not in (None, _digest(state).hex()):
            raise ValueError
        state["identity"].keys()
    except Exception as error:  # junk makes torch's unpickler raise errors of any kind
        raise _not_a_state(path, error) from None
    return state


_STATE = {"adapter", "optimizer", "progress", "identity", "random", "cuda_random"}


def _not_a_state(path: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{path} is damaged, or is not the state of a run ({type(error).__name__}): remove it to go on from the state "
        "before it, or from the beginning if there is none"
    )
