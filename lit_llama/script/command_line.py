"""What the scripts share around the library: running one, prompts in, text out, one line for an error.

Scripts do not import each other, so this stands in the package.
Generated text goes to stdout, everything else to stderr.
"""

import importlib
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lit_llama.adapters import AdapterInfo, read_adapter
from lit_llama.checkpoint import load_base, read_config, verify_base
from lit_llama.combine import WeightedSum
from lit_llama.devices.layouts import WeightOnly, compile_decoding, lay_out, quantize_for_inference
from lit_llama.devices.precision import PRECISIONS, Precision
from lit_llama.devices.quantization import Quantize
from lit_llama.model import LLaMA
from lit_llama.script.errors import explain
from lit_llama.script.parser import parse
from lit_llama.seam import Adapter
from lit_llama.tokenizer import Tokenizer

DEBUG = "ALIGNER_DEBUG"  # the environment variable that asks for tracebacks


def run(main: Callable[..., Any]) -> None:
    """Call `main` with each of its keywords as a command-line option, and exit.

    A user's error (`ValueError`, `OSError`, ...) becomes one line on stderr and exit status 1; so do a lack of memory,
    with what to lower, and an unexpected error. Every script has the options `--threads` and `--debug`, those that
    open a base model have `--verify`; see `lit_llama.script.parser` for how options are written.

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
        sys.exit(1)


def _verify(checkpoint_dir: Path | None) -> None:
    if checkpoint_dir is None:
        raise ValueError("--verify checks a base model: give its folder as --checkpoint_dir")
    if os.environ.get("LOCAL_RANK", "0") == "0":  # once for all processes of a machine
        count = verify_base(checkpoint_dir)
        if count:
            print(f"{checkpoint_dir}: {count} files are what the conversion wrote", file=sys.stderr)


def open_adapters(
    paths: list[Path], scales: list[float] | None, model: LLaMA, device: torch.device, allow_other_base: bool = False
) -> tuple[Adapter | None, list[AdapterInfo]]:
    """Load adapters, each scaled, to be used at once.

    Args:
        paths: the files; none will do.
        scales: one for each, or one for all; 1 if not given.
        model: the base model that they must belong to; without weights will do, if it has their fingerprint.
        device: where to put them.
        allow_other_base: accept adapters of other weights of the same sizes, with a warning.

    Returns:
        The adapter, and what each file says about itself.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged or of another base, or there are too many or too few scales.
    """
    scales = scales or [1.0]
    if len(scales) not in (1, len(paths)):
        raise ValueError(f"{len(scales)} scales for {len(paths)} adapters: give one for each, or one for all")
    read = [read_adapter(path, None, model, allow_other_base) for path in paths]
    adapters, infos = [adapter.to(device) for adapter, _ in read], [info for _, info in read]
    if len(adapters) == 1 and scales == [1.0]:
        return adapters[0], infos
    terms = zip(adapters, scales * (len(paths) // len(scales)), strict=True)
    return WeightedSum(*terms) if adapters else None, infos


def open_base(
    checkpoint_dir: Path, precision: Precision, quantize: Quantize | WeightOnly | None = None, compile: bool = False
) -> tuple[LLaMA, Tokenizer]:
    """Load a base model for inference, on the GPU if there is one, and its tokenizer.

    Args:
        checkpoint_dir: folder of the base model.
        precision: "auto" is bf16-true on a GPU that has it and 32-true elsewhere.
        quantize: keep the blocks' weights in 4 or 8 bits.
        compile: decode by a compiled forward.

    Raises:
        FileNotFoundError: something is missing.
        ValueError: something is damaged, the two do not belong together, or what is asked for does not go together.
    """
    config, tokenizer = read_config(checkpoint_dir), Tokenizer(checkpoint_dir)
    tokenizer.check_vocabulary(config.vocab_size)
    device, dtype = torch.device("cuda" if torch.cuda.is_available() else "cpu"), PRECISIONS[precision]
    if quantize in ("nf4", "int8"):
        if compile:
            raise ValueError(f"--compile does not go with bitsandbytes' {quantize}: use int4-fast or int8-fast")
        return load_base(checkpoint_dir, dtype, device, quantize=quantize), tokenizer
    if quantize is not None:
        dtype = dtype or torch.bfloat16  # what its kernels compute in
    model = load_base(checkpoint_dir, dtype, device)
    if quantize is not None:
        quantize_for_inference(model, quantize)
    elif device.type == "cpu" and not compile:  # the compiler lays out what it needs
        lay_out(model)
    if compile:
        compile_decoding(model)
    return model, tokenizer


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
