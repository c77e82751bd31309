"""Processes of their own, forked from a server that has imported everything and started no thread."""

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from conftest import ROOT, load_script

finetune = load_script("finetune/aligner.py").main
_context = multiprocessing.get_context("forkserver")
_IMPORTED = (
    "pytest transformers matplotlib.pyplot lightning_fabric torch._dynamo torch.distributed.tensor "
    "torch.distributed.fsdp lit_llama.script.command_line lit_llama.training"
)
_context.set_forkserver_preload(_IMPORTED.split())


def start(target: Callable[..., None] = finetune, **options: Any) -> BaseProcess:
    """Start `finetune/aligner.py`, or another function, with these options."""
    process = _context.Process(target=_run, args=(target, options), daemon=True)
    process.start()
    return process


def _run(target: Callable[..., None], options: dict[str, Any]) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    torch.set_num_threads(1)
    try:
        target(**options)
    except KeyboardInterrupt:
        os._exit(130)


def run_script(
    path: str, *arguments: str, processes: int = 1, before: Callable[[], None] | None = None
) -> list[subprocess.CompletedProcess[str]]:
    """Run a script with command-line options to its end, in so many processes that work together.

    It is what `python` or `torchrun --nproc_per_node` do, without the seconds that Python needs to import everything.
    Several processes find each other as torchrun's do, through a store whose port the system chooses.

    Args:
        path: the script's, from the root of the repo.
        arguments: its options.
        processes: how many.
        before: called in each process before the script.

    Returns:
        What each process said, and how it ended.
    """
    environment = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    if processes > 1:
        store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_RUN_ID": "tests"}
        environment |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "WORLD_SIZE": str(processes), "GROUP_RANK": "0"}
        environment |= {"TORCHELASTIC_RESTART_COUNT": "0", "LOCAL_WORLD_SIZE": str(processes)}
    with tempfile.TemporaryDirectory() as folder:
        started = []
        for rank in range(processes):
            said = [Path(folder) / f"{rank}.{name}" for name in ("out", "err")]
            one = environment | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {})
            process = _context.Process(target=_run_script, args=(str(ROOT / path), arguments, one, said, before))
            process.start()
            started.append((process, said))
        ended = []
        for process, said in started:
            process.join()
            assert process.exitcode is not None
            out, err = (file.read_text() for file in said)
            ended.append(subprocess.CompletedProcess([path, *arguments], process.exitcode, out, err))
        return ended


def _run_script(
    path: str,
    arguments: tuple[str, ...],
    environment: Mapping[str, str],
    said: list[Path],
    before: Callable[[], None] | None,
) -> None:
    for descriptor, file in enumerate(said, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), descriptor)
    os.environ.update(environment)
    torch.set_num_threads(1)
    sys.argv = [path, *arguments]
    sys.path.insert(0, str(Path(path).parent))
    if before is not None:
        before()
    try:
        runpy.run_path(path, run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # which a process of multiprocessing leaves out
