"""Processes of their own, forked from a server that has imported everything and started no thread."""

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from conftest import load_script

finetune = load_script("finetune/aligner.py").main
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["pytest", "transformers", "lit_llama.script.command_line", "lit_llama.training"])


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
