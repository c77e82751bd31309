"""What a script says about an error, in one line."""

import errno
import re
import textwrap
import traceback
from pathlib import Path
from typing import Any

import torch

from lit_llama.devices.precision import default_dtype

USERS_ERRORS = (ValueError, OSError, ArithmeticError, ImportError)  # raised with a message that is for the user


def explain(error: Exception, options: dict[str, Any]) -> str:
    """What to tell the user of a script that ended in an error.

    Args:
        error: what was raised.
        options: the script's options by name, for what to change.

    Returns:
        A line: a user's error says what is wrong by itself, a lack of memory names the options that save some, and
        for any other error the line says that it is the program's fault and how to report it.
    """
    if is_out_of_memory(error):
        return _out_of_memory(options)
    if isinstance(error, USERS_ERRORS):
        return str(error)
    place = traceback.extract_tb(error.__traceback__)[-1]
    what = textwrap.shorten(f"{type(error).__name__}: {error}", 400)
    return (
        f"unexpected {what} ({Path(place.filename).name}:{place.lineno}). This is a fault of the program, not of your "
        "options or files: run it again with --debug and report the traceback, with the command, to its authors"
    )


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory is used up, on the CPU or on a GPU."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    wording = r"out of memory|(?:can't|cannot) allocate memory|not enough memory|CUBLAS_STATUS_ALLOC_FAILED"
    is_wording = isinstance(error, RuntimeError) and re.search(wording, str(error), re.IGNORECASE) is not None
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or is_wording


def _out_of_memory(options: dict[str, Any]) -> str:
    """What to change, of what the script has and what is not so already."""
    sizes = ["max_rows", "max_length", "max_seq_length", "max_new_tokens"]
    sizes.insert(0, "micro_batch_size" if "micro_batch_size" in options else "batch_size")
    remedies = [f"a smaller --{name}" for name in sizes if options.get(name) is not None and options[name] != 1]
    for name in ("activation_checkpointing", "shard_base"):
        if options.get(name) is False:
            remedies.append(f"--{name}" + (" with several GPUs" if name == "shard_base" else ""))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    in_float32 = {"32-true": True, "auto": default_dtype(device) == torch.float32}
    if in_float32.get(options.get("precision", ""), False):
        remedies.append("--precision bf16-true")
    if "quantize" in options and options["quantize"] is None:
        remedies.append("--quantize nf4")
    return "out of memory: " + (
        f"try {', or '.join(remedies)}" if remedies else "this needs a machine with more memory"
    )
