"""What the scripts share around the library: options, prompts in, text out, one line for an error.

Scripts do not import each other, so this stands in the package. It alone parses options.
Generated text goes to stdout, everything else to stderr.
"""

import inspect
import itertools
import json
import re
import resource
import signal
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

import jsonargparse
import torch

from lit_llama.checkpoint import (
    PRECISIONS,
    AdapterInfo,
    Method,
    Precision,
    adapter_info,
    check_adapter,
    load_adapter,
    load_base,
    read_config,
)
from lit_llama.combine import Sum
from lit_llama.files import atomic_file, read_records, read_text
from lit_llama.generation import TextStream, check_prompts, check_sampling, stream
from lit_llama.model import Adapter, LLaMA
from lit_llama.prompts import PromptStyle
from lit_llama.prompts import prompt_style as get_prompt_style
from lit_llama.quantization import Quantize
from lit_llama.tokenizer import Tokenizer


def run(main: Callable[..., Any]) -> None:
    """Call `main` with each of its keywords as a command-line option, and exit.

    A user's error (`ValueError`, `OSError`, ...) becomes one line on stderr and exit status 1. An option whose type is
    a list may be repeated: `--prompt A --prompt B`.

    Args:
        main: the script's function; the docstring of its module becomes the help's description.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that half-written files are cleaned up
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    try:
        jsonargparse.auto_cli(
            main,
            args=_join_repeated(main, sys.argv[1:]),
            as_positional=False,
            description=inspect.getdoc(sys.modules[main.__module__]),
            formatter_class=_HelpFormatter,
            parser_class=_Parser,
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


class _Parser(jsonargparse.ArgumentParser):
    """Says in one line what is wrong with an option, without the usage of all of them."""

    def error(self, message: str, *_: Any, **__: Any) -> NoReturn:
        message = " ".join(message.split())
        choice = re.search(r'key "(\w+)".*?Literal\[(.*?)\].*(?:Given|Got) value: (.*)', message)
        if choice:
            message = f"--{choice[1]} {choice[3]}: there are {choice[2]}"
        print(f"error: {message} (--help lists the options)", file=sys.stderr)
        sys.exit(2)


class _HelpFormatter(jsonargparse.DefaultHelpFormatter):
    """Keeps the line breaks of the script's docstring."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "".join(indent + line for line in text.splitlines(keepends=True))


def _join_repeated(main: Callable[..., Any], args: list[str]) -> list[str]:
    """Turn every `--name A --name B` of a list option into the one `--name=["A", "B"]` that the parser takes.

    The parser reads YAML, in whose double quotes any character can be written by its number.
    """
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

    def quote(text: str) -> str:
        return '"' + "".join(c if c.isascii() and c.isalnum() else f"\\U{ord(c):08X}" for c in text) + '"'

    return rest + [f"{option}=[{', '.join(map(quote, given))}]" for option, given in values.items() if given]


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
    else:
        prompts = [(line, "") for line in read_text(prompts_file).splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"{prompts_file} holds no prompt")
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
    adapter: Adapter | None = None,
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
        adapter: beside the base model, if any.
        sampling: `max_new_tokens`, `temperature`, `top_k`, `top_p` of `lit_llama.generation.stream`.
    """
    if num_samples < 1:
        raise ValueError(f"--num_samples is {num_samples}, it must be at least 1")
    if num_samples > 1 and sampling["temperature"] == 0:
        raise ValueError(f"--num_samples {num_samples} with --temperature 0 repeats one answer: raise the temperature")
    check_sampling(**sampling)
    encoded = [tokenizer.encode(style.prompt(*prompt), bos=style.bos) for prompt in prompts]
    check_prompts(model, encoded)
    generator = torch.Generator(model.device).manual_seed(seed)
    rows: list[dict[str, str]] = []
    new_tokens, seconds = 0, 0.0
    try:
        for (instruction, input), ids in zip(prompts, encoded, strict=True):
            for _ in range(num_samples):
                if rows:
                    print()
                decoder, text, shown, n = TextStream(tokenizer), "", "", 0
                started = time.perf_counter()
                for [token] in stream(
                    model, [ids], adapter=adapter, stop_ids=style.stop_ids, generator=generator, **sampling
                ):
                    assert token is not None  # a lone row has a token until the stream ends
                    n += 1
                    text += decoder.push(token)
                    certain = style.cut(text, more_may_follow=True)
                    print(certain[len(shown) :], end="", flush=True)
                    shown = certain
                    if style.ended(text):
                        break
                seconds += time.perf_counter() - started
                new_tokens += n
                response = style.cut(text + decoder.flush())
                print(response[len(shown) :])
                row = {"instruction": instruction, "input": input} if input else {"prompt": instruction}
                rows.append({**row, "response": response, "model": model_name})
    finally:  # what was answered before an interruption is kept
        if output_file is not None and rows:
            with atomic_file(output_file) as temporary:
                lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                temporary.write_text("".join(lines), encoding="utf-8")
    print(f"{new_tokens} tokens, {new_tokens / max(seconds, 1e-9):.1f} tokens/s, {peak_memory()}", file=sys.stderr)


def answer_with(
    method: Method,
    adapter_path: Path,
    prompt: list[str] | None,
    checkpoint_dir: Path = Path("checkpoints/SmolLM2-135M-Instruct"),
    prompts_file: Path | None = None,
    prompt_style: str | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    num_samples: int = 1,
    seed: int = 1337,
    precision: Precision = "auto",
    quantize: Quantize | None = None,
    output_file: Path | None = None,
    allow_other_base: bool = False,
) -> None:
    """Print the answers of a base model with an adapter.

    Args:
        method: what the adapter must be.
        adapter_path: the adapter.
        prompt: what to answer, from the command line.
        checkpoint_dir: folder of the base model.
        prompts_file: JSON or JSON Lines with "prompt" or "instruction", or a text file with one prompt per line.
        prompt_style: "chat" (the model's own template), "alpaca", "metamath", "hh", "beaver" or "none"; if
            not given, the one that the adapter was trained with.
        max_new_tokens: longest answer, in tokens.
        temperature: 0 takes the likeliest token; larger is more random.
        top_k: sample among the k likeliest tokens only.
        top_p: sample among the likeliest tokens that hold this probability together.
        num_samples: answers to each prompt.
        seed: of sampling.
        precision: "auto" is bf16-true on a GPU that has it and 32-true elsewhere.
        quantize: keep the base's blocks in 4 bits ("nf4") or 8 bits ("int8"); if not given, as the adapter was trained.
        output_file: also write prompt, response and model as JSON Lines here.
        allow_other_base: use the adapter on other weights than those it was trained on.
    """
    prompts = read_prompts(prompt, prompts_file)
    adapter = load_adapter(adapter_path, method)
    quantize = quantize or adapter_info(adapter_path).hyperparameters.get("quantize")
    model, tokenizer = open_base(checkpoint_dir, precision, quantize)
    info = check_adapter(adapter_path, model, allow_other_base)
    answer(
        model,
        tokenizer,
        get_prompt_style(prompt_style or info.prompt_style or "alpaca", tokenizer),  # the authors' files say nothing
        prompts,
        model_name=f"{model.config.name} + {adapter_path}",
        output_file=output_file,
        num_samples=num_samples,
        seed=seed,
        adapter=adapter.to(model.device),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
    )


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
    infos = [check_adapter(path, model, allow_other_base) for path in paths]
    adapters = [load_adapter(path).to(device) for path in paths]
    if len(adapters) == 1 and scales == [1.0]:
        return adapters[0], infos
    terms = zip(adapters, scales * (len(paths) // len(scales)), strict=True)
    return Sum(*terms) if adapters else None, infos


def open_base(checkpoint_dir: Path, precision: Precision, quantize: Quantize | None = None) -> tuple[LLaMA, Tokenizer]:
    """Load a base model, on the GPU if there is one, and its tokenizer.

    Args:
        checkpoint_dir: folder of the base model.
        precision: "auto" is bf16-true on a GPU that has it and 32-true elsewhere.
        quantize: keep the blocks' weights in 4 or 8 bits.

    Raises:
        FileNotFoundError: something is missing.
        ValueError: something is damaged, or the two do not belong together.
    """
    config, tokenizer = read_config(checkpoint_dir), Tokenizer(checkpoint_dir)
    tokenizer.check_vocabulary(config.vocab_size)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return load_base(checkpoint_dir, PRECISIONS[precision], device, quantize=quantize), tokenizer


def side_by_side(header: list[str], rows: list[list[str]], widths: list[int]) -> list[str]:
    """Lines of a table for people: texts in columns, wrapped, the long ones shortened.

    Args:
        header: a title for each column.
        rows: a text for each column.
        widths: of the columns, in characters.
    """

    def line(cells: Iterable[str]) -> str:
        return "  ".join(f"{cell:{width}}" for cell, width in zip(cells, widths, strict=True)).rstrip()

    lines = [line(header), line("-" * width for width in widths)]
    for row in rows:
        cells = [
            textwrap.wrap(textwrap.shorten(text, 4 * width), width) for text, width in zip(row, widths, strict=True)
        ]
        lines += [line(part) for part in itertools.zip_longest(*cells, fillvalue="")]
        lines.append("")
    return lines


def peak_memory() -> str:
    """The largest memory that this process has used so far, in words."""
    if torch.cuda.is_available():
        return f"{torch.cuda.max_memory_allocated() / 1e9:.2f} GB of GPU memory"
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes there, KiB elsewhere
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9:.2f} GB of memory"
