"""The files of a run in its folder: no other run writes there, and what else the folder holds is left alone."""

from __future__ import annotations

import contextlib
import itertools
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from lit_llama.adapters import FORMER_METHODS, METHODS, adapter_file
from lit_llama.checkpoint import CONFIG_FILE
from lit_llama.files import remove_temporaries
from lit_llama.formats.hf_weights import HF_CONFIG_FILE
from lit_llama.locks import own_folder

if TYPE_CHECKING:  # takes seconds to import, which --help should not cost
    from lightning_fabric import Fabric


def check_out_dir(out_dir: Path, adapters: Iterable[Path] = ()) -> None:
    """Make sure that a folder is one where a run may write.

    Args:
        out_dir: folder of the run.
        adapters: files or run folders of adapters that the run reads, and reads again when it is resumed.

    Raises:
        FileNotFoundError: there is no such adapter.
        ValueError: the folder is that of a base model, or an adapter in it would be moved away by this run.
    """
    for name in (CONFIG_FILE, HF_CONFIG_FILE):
        if (out_dir / name).is_file():
            raise ValueError(f"{out_dir} holds {name}, so it is a base model's folder: choose another one for the run")
    for path in adapters:
        file = adapter_file(path)
        if file.parent.resolve() == out_dir.resolve() and re.fullmatch(_written(), file.name):
            raise ValueError(
                f"{file} lies in {out_dir}, the folder of this run, which would move it away and write its own adapter "
                "in its place: choose another folder for the run"
            )


@contextlib.contextmanager
def own_run(fabric: Fabric, out_dir: Path) -> Iterator[None]:
    """Have the folder of a run for the processes of one run alone, without what killed ones left half written.

    Raises:
        ValueError: another run has it, or it is a file, or a base model's folder; all processes raise it.
    """
    with contextlib.ExitStack() as stack:
        problem = None
        if fabric.is_global_zero:
            try:
                check_out_dir(out_dir)
                stack.enter_context(own_folder(out_dir))
                remove_temporaries(out_dir, _written())
            except (OSError, ValueError) as error:
                problem = str(error)
        problem = fabric.broadcast(problem)
        if problem is not None:
            raise ValueError(problem)
        yield


def set_aside(out_dir: Path) -> None:
    """Move the files of an earlier run to `out_dir/previous-N`, so that they are not taken for this one's.

    Files of other names stay where they are.
    """
    earlier = [path for path in out_dir.iterdir() if re.fullmatch(_written(), path.name)]
    if earlier:
        number = next(n for n in itertools.count(1) if not (out_dir / f"previous-{n}").exists())
        previous = out_dir / f"previous-{number}"
        previous.mkdir()
        for path in earlier:
            path.rename(previous / path.name)
        tqdm.write(f"the earlier run in {out_dir} was moved to {previous}", file=sys.stderr)


def _written() -> str:
    """Pattern of the names of what runs, their loggers and their reports write to a run's folder."""
    methods = "|".join((*METHODS, *FORMER_METHODS))
    files = rf"({methods})\.safetensors|state-\d+\.pt|metrics\.csv|loss\.png|hyperparameters\.yaml"
    return rf"{files}|report\.(json|txt)|tensorboard|wandb"
