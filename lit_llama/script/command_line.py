"""What the scripts share around the library: running one, prompts in, text out, one line for an error.

Scripts do not import each other, so this stands in the package.
Generated text goes to stdout, everything else to stderr.
"""

import importlib
import os
import shlex
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lit_llama.checkpoint import verify_base
from lit_llama.script.errors import explain
from lit_llama.script.parser import parse

DEMO_BASE = Path("checkpoints/SmolLM2-135M-Instruct")  # what scripts take if no base model is given
DIVERGED = 3  # exit status of training whose loss or gradient is no longer finite
DEBUG = "ALIGNER_DEBUG"  # the environment variable that asks for tracebacks


def run(main: Callable[..., Any]) -> None:
    """Call `main` with each of its keywords as a command-line option, and exit.

    A user's error (`ValueError`, `OSError`, ...) becomes one line on stderr and exit status 1; so do a lack of memory,
    with what to lower, and an unexpected error. Training that diverged has a status of its own, `DIVERGED`. Every
    script has the options `--threads` and `--debug`, those that open a base model have `--verify`; see
    `lit_llama.script.parser` for how options are written.

    Args:
        main: the script's function; the docstring of its module becomes the help's description.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that half-written files are cleaned up
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    options: dict[str, Any] = {}
    try:
        options = parse(main, sys.argv[1:])
        if options.pop("debug"):
            os.environ[DEBUG] = "1"  # for the processes that a script starts, too
        threads = options.pop("threads")
        if threads is not None:
            if threads < 1:
                raise ValueError(f"--threads is {threads}, it must be at least 1")
            torch.set_num_threads(threads)
            os.environ["OMP_NUM_THREADS"] = str(threads)  # for the processes that a script starts
        if options.pop("verify", False):
            _verify(options["checkpoint_dir"])
        main(**options)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has seen enough
        sys.stderr.close()
        sys.exit(0)
    except Exception as error:
        if os.environ.get(DEBUG, "0") != "0":
            traceback.print_exc()
        print(f"error: {explain(error, options)}", file=sys.stderr)
        sys.exit(DIVERGED if isinstance(error, FloatingPointError) else 1)


def _verify(checkpoint_dir: Path | None) -> None:
    if checkpoint_dir is None:
        raise ValueError("--verify checks a base model: give its folder as --checkpoint_dir")
    if os.environ.get("LOCAL_RANK", "0") == "0":  # once for all processes of a machine
        count = verify_base(checkpoint_dir)
        if count:
            print(f"{checkpoint_dir}: {count} files are what the conversion wrote", file=sys.stderr)


def try_next(checkpoint_dir: Path, *commands: str) -> list[str]:
    """The last lines of a report: what to run next on the same base model.

    Args:
        checkpoint_dir: folder of the base model.
        commands: each begins with the name of a script, which has the option --checkpoint_dir.
    """
    python = ".venv/bin/python" if Path(sys.prefix) == Path.cwd() / ".venv" else "python"
    base = "" if checkpoint_dir == DEMO_BASE else f" --checkpoint_dir {shlex.quote(str(checkpoint_dir))}"
    scripts = (command.partition(" ") for command in commands)
    return ["", "Try next:", *(f"  {python} {script}{base} {options}" for script, _, options in scripts)]


def peak_memory() -> str:
    """The largest memory that this process has used so far, in words."""
    if torch.cuda.is_available():
        return f"{torch.cuda.max_memory_allocated() / 1e9:.2f} GB of GPU memory"
    try:
        resource = importlib.import_module("resource")
    except ImportError:  # Windows
        return "memory unknown"
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes there, KiB elsewhere
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9:.2f} GB of memory"
