"""What the scripts share around the library: options, prompts in, text out, one line for an error.

Generated text goes to stdout, everything else to stderr.
"""

import inspect
import json
import resource
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonargparse
import numpy as np
import torch

from lit_llama.data import SplitSummary
from lit_llama.files import atomic_file, read_records, read_text
from lit_llama.generation import TextStream, stream
from lit_llama.model import LLaMA, Prefix
from lit_llama.prompts import PromptStyle
from lit_llama.tokenizer import Tokenizer


def run(main: Callable[..., Any]) -> None:
    """Call `main` with each of its keywords as a command-line option, and exit.

    A user's error (`ValueError`, `OSError`, ...) becomes one line on stderr and exit status 1. An option whose type is
    a list may be repeated: `--prompt A --prompt B`.

    Args:
        main: the script's function; the docstring of its module becomes the help's description.
    """
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    try:
        jsonargparse.auto_cli(
            main,
            args=_join_repeated(main, sys.argv[1:]),
            as_positional=False,
            description=inspect.getdoc(sys.modules[main.__module__]),
            formatter_class=_HelpFormatter,
        )
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has seen enough
        sys.stderr.close()
        sys.exit(0)
    except (ValueError, OSError, ArithmeticError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


class _HelpFormatter(jsonargparse.DefaultHelpFormatter):
    """Keeps the line breaks of the script's docstring."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "".join(indent + line for line in text.splitlines(keepends=True))


def _join_repeated(main: Callable[..., Any], args: list[str]) -> list[str]:
    """Turn every `--name A --name B` of a list option into the one `--name=["A", "B"]` that the parser takes."""
    values: dict[str, list[str]] = {
        f"--{name}": []
        for name, parameter in inspect.signature(main).parameters.items()
        if "list[" in str(parameter.annotation)
    }
    rest: list[str] = []
    remaining = iter(args)
    for arg in remaining:
        option, equals, value = arg.partition("=")
        if option not in values:
            rest.append(arg)
        elif equals:
            values[option].append(value)
        else:
            values[option].append(next(remaining, ""))
    return rest + [f"{option}={json.dumps(given)}" for option, given in values.items() if given]


def read_prompts(prompt: list[str] | None, prompts_file: Path | None) -> list[tuple[str, str]]:
    """The prompts of a generation script: its `--prompt` options, a file, or standard input.

    Args:
        prompt: texts given on the command line.
        prompts_file: `.json` or `.jsonl` of objects with `prompt`, or with `instruction` and perhaps `input`; any
            other file holds one prompt per line.

    Returns:
        (instruction, input) pairs.

    Raises:
        ValueError: no prompt, or prompts from two places.
    """
    if prompt and prompts_file:
        raise ValueError("give --prompt or --prompts_file, not both")
    if prompt:
        return [(text, "") for text in prompt]
    if prompts_file is None:
        if sys.stdin.isatty():
            raise ValueError("no prompt: give --prompt, --prompts_file, or text on standard input")
        text = sys.stdin.read().strip()
        if not text:
            raise ValueError("no prompt: standard input is empty")
        return [(text, "")]
    if prompts_file.suffix in (".json", ".jsonl"):
        prompts = []
        for place, row in read_records(prompts_file):
            instruction = row.get("prompt", row.get("instruction"))
            if not isinstance(instruction, str):
                raise ValueError(f"{place}: expected a text under 'prompt' or 'instruction', found {sorted(row)}")
            prompts.append((instruction, row.get("input", "")))
        return prompts
    prompts = [(line, "") for line in read_text(prompts_file).splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"{prompts_file} is empty; expected one prompt per line")
    return prompts


def answer(
    model: LLaMA,
    tokenizer: Tokenizer,
    style: PromptStyle,
    prompts: list[tuple[str, str]],
    *,
    model_name: str,
    output_file: Path | None,
    num_samples: int,
    seed: int,
    prefix: Prefix | None = None,
    **sampling: Any,
) -> None:
    """Print the model's answer to each prompt as it comes, then speed and memory on stderr.

    Args:
        model: the base model.
        tokenizer: its tokenizer.
        style: turns prompts into text.
        prompts: (instruction, input) pairs.
        model_name: recorded in `output_file`.
        output_file: JSON Lines of prompt, response and model, written at the end.
        num_samples: answers to each prompt.
        seed: of sampling.
        prefix: the adapter, if any.
        sampling: `max_new_tokens`, `temperature`, `top_k`, `top_p` of `lit_llama.generation.stream`.
    """
    if num_samples > 1 and sampling["temperature"] == 0:
        raise ValueError(f"--num_samples {num_samples} with --temperature 0 repeats one answer: raise the temperature")
    generator = torch.Generator(model.device).manual_seed(seed)
    rows: list[dict[str, str]] = []
    new_tokens, seconds = 0, 0.0
    for instruction, input in prompts:
        ids = tokenizer.encode(style.render(instruction, input), bos=style.bos)
        for _ in range(num_samples):
            if rows:
                print()
            text, decoder = "", TextStream(tokenizer)
            started = time.perf_counter()
            for [token] in stream(
                model, [ids], prefix=prefix, stop_ids=style.stop_ids, generator=generator, **sampling
            ):
                new_tokens += 1
                piece = decoder.push(token)  # type: ignore[arg-type] (a lone row has a token or the stream ends)
                text += piece
                print(piece, end="", flush=True)
            seconds += time.perf_counter() - started
            rest = decoder.flush()
            print(rest)
            row = {"instruction": instruction, "input": input} if input else {"prompt": instruction}
            rows.append({**row, "response": text + rest, "model": model_name})
    if output_file is not None:
        with atomic_file(output_file) as temporary:
            temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"{new_tokens} tokens, {new_tokens / max(seconds, 1e-9):.1f} tokens/s, {peak_memory()}", file=sys.stderr)


def report_dataset(folder: Path, summaries: dict[str, SplitSummary]) -> None:
    """Say on stderr what became of the examples of each split of a new data set."""
    for split, summary in summaries.items():
        tokens = sum(summary.lengths)
        percentiles = np.percentile(summary.lengths, [5, 50, 95, 100]).astype(int)
        print(
            f"{split}: {len(summary.lengths)} examples, {tokens} tokens, {summary.scored_tokens / tokens:.0%} scored; "
            "lengths 5%, 50%, 95%, longest: " + ", ".join(map(str, percentiles)),
            file=sys.stderr,
        )
        if summary.truncated or summary.skipped:
            print(
                f"{split}: longer than the window: {summary.truncated} examples truncated, {summary.skipped} left out",
                file=sys.stderr,
            )
    print(f"data set: {folder}", file=sys.stderr)


def default_device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def peak_memory() -> str:
    """The largest memory that this process has used so far, in words."""
    if torch.cuda.is_available():
        return f"{torch.cuda.max_memory_allocated() / 1e9:.2f} GB of GPU memory"
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes there, KiB elsewhere
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9:.2f} GB of memory"
