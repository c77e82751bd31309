"""What the scripts share around the library: running one, prompts in, text out, one line for an error.

Scripts do not import each other, so this stands in the package.
Generated text goes to stdout, everything else to stderr.
"""

import importlib
import json
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from lit_llama.adapters import AdapterInfo, Method, read_adapter
from lit_llama.checkpoint import load_base, read_config, verify_base
from lit_llama.combine import WeightedSum
from lit_llama.decoder import GenerationRequest, check_prompts
from lit_llama.devices.layouts import WeightOnly, compile_decoding, lay_out, quantize_for_inference
from lit_llama.devices.precision import PRECISIONS, Precision
from lit_llama.devices.quantization import Quantize
from lit_llama.evaluation.answers import as_question, prompt_rows
from lit_llama.files import atomic_file
from lit_llama.generation import TextStream, complete, stream
from lit_llama.model import LLaMA
from lit_llama.prompts import PromptStyle, chosen_style
from lit_llama.sampling import GREEDY_BELOW, check_sampling
from lit_llama.script.errors import explain
from lit_llama.script.parser import parse
from lit_llama.seam import Adapter
from lit_llama.serving.store import AdapterStore
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


class Prompt(NamedTuple):
    """What a user says, and who is to answer.

    Args:
        instruction: the prompt.
        input: what it is about, for styles that keep it apart.
        aligner: name of an Aligner in a folder of them.
    """

    instruction: str
    input: str = ""
    aligner: str | None = None


def read_prompts(prompt: list[str] | None, prompts_file: Path | None) -> list[Prompt]:
    """The prompts of a generation script: its `--prompt` options, a file, or standard input.

    Args:
        prompt: texts given on the command line.
        prompts_file: see `lit_llama.evaluation.answers.prompt_rows`; an object may name its `aligner`.

    Raises:
        ValueError: no prompt, or prompts from two places, or one of several turns.
    """
    if prompt and prompts_file:
        raise ValueError("give --prompt or --prompts_file, not both")
    if prompt:
        return [Prompt(text) for text in prompt]
    if prompts_file is None:
        if sys.stdin.isatty():
            raise ValueError("no prompt: give --prompt, --prompts_file, or text on standard input")
        text = sys.stdin.read().strip()
        if not text:
            raise ValueError("no prompt: standard input is empty")
        return [Prompt(text)]
    prompts = []
    for place, row in prompt_rows(prompts_file):
        question = as_question(place, row, len(prompts))
        if len(question.turns) > 1:
            raise ValueError(f"{place}: a question of {len(question.turns)} turns, and this script answers one: "
                             "evaluate/vicuna.py and evaluate/side_by_side.py answer all")  # fmt: skip
        prompts.append(Prompt(question.turns[0], question.input, question.aligner))
    return prompts


def answer(
    model: LLaMA,
    tokenizer: Tokenizer,
    style: PromptStyle,
    prompts: list[Prompt],
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
        prompts: what to answer.
        model_name: recorded in `output_file`.
        output_file: JSON Lines of prompt, response and model, written at the end.
        num_samples: answers to each prompt.
        seed: of sampling.
        adapter: beside the base model, if any.
        sampling: `max_new_tokens`, `temperature`, `top_k`, `top_p` of `lit_llama.generation.stream`.
    """
    if num_samples < 1:
        raise ValueError(f"--num_samples is {num_samples}, it must be at least 1")
    if num_samples > 1 and sampling["temperature"] < GREEDY_BELOW:
        temperature = sampling["temperature"]
        raise ValueError(
            f"--num_samples {num_samples} with --temperature {temperature:g} repeats one answer: raise the temperature"
        )
    check_sampling(**sampling)
    encoded = [tokenizer.encode(style.prompt(*prompt[:2]), bos=style.bos) for prompt in prompts]
    check_prompts(model, encoded)
    generator = torch.Generator(model.device).manual_seed(seed)
    rows: list[dict[str, str]] = []
    new_tokens, seconds = 0, 0.0
    try:
        for (instruction, input, _), ids in zip(prompts, encoded, strict=True):
            for _ in range(num_samples):
                if rows:
                    print()
                if len(prompts) > 1:
                    show_prompt(instruction, input)
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
            write_rows(output_file, rows)
    print(f"{new_tokens} tokens, {new_tokens / max(seconds, 1e-9):.1f} tokens/s, {peak_memory()}", file=sys.stderr)


def show_prompt(instruction: str, input: str = "") -> None:
    """Print a prompt before its answer where a person reads along: on stderr, if stdout is a terminal."""
    if sys.stdout.isatty():
        lines = f"{instruction}\n{input}".strip().splitlines()
        print("\n".join(f"> {line}" for line in lines), file=sys.stderr, flush=True)


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    """Write JSON Lines, whole or not at all."""
    with atomic_file(path) as temporary:
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        temporary.write_text("".join(lines), encoding="utf-8")


def answer_with(
    method: Method,
    adapter_path: list[Path],
    adapter_scale: list[float] | None,
    aligner_dir: Path | None,
    batch_size: int,
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
    quantize: Quantize | WeightOnly | None = None,
    compile: bool = False,
    output_file: Path | None = None,
    allow_other_base: bool = False,
) -> None:
    """Print the answers of a base model with an adapter, or several at once.

    Args:
        method: what the adapters must be.
        adapter_path: the adapters.
        adapter_scale: what each is multiplied by, or all.
        aligner_dir: instead, a folder of Aligners, of which each prompt may name one.
        batch_size: rows at once, for a folder.
        prompt: what to answer, from the command line.
        checkpoint_dir: folder of the base model.
        prompts_file: JSON or JSON Lines with "prompt", "instruction" or FastChat's "turns", or a text file with one
            prompt per line.
        prompt_style: "chat" (the model's own template), "alpaca", "metamath", "hh", "beaver" or "none"; if
            not given, the one that the first adapter was trained with.
        max_new_tokens: longest answer, in tokens.
        temperature: 0 takes the likeliest token; larger is more random.
        top_k: sample among the k likeliest tokens only.
        top_p: sample among the likeliest tokens that hold this probability together.
        num_samples: answers to each prompt.
        seed: of sampling.
        precision: "auto" is bf16-true on a GPU that has it and 32-true elsewhere.
        quantize: keep the base's weights in fewer bits: "nf4" or "int8" to save memory
            (by bitsandbytes), "int4-fast" or "int8-fast" for speed; if not given, as the adapter was trained.
        compile: compile the decoding step, with CUDA graphs on a GPU; takes a while, so for long work.
        output_file: also write prompt, response and model as JSON Lines here.
        allow_other_base: use the adapter on other weights than those it was trained on.
    """
    prompts = read_prompts(prompt, prompts_file)
    sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    if aligner_dir is not None:
        if num_samples > 1 or adapter_scale is not None:
            raise ValueError("--aligner_dir goes with one sample and without scales")
        model, tokenizer = open_base(checkpoint_dir, precision, quantize, compile)
        store = AdapterStore(aligner_dir, model, allow_other_base, quantize)
        answer_each(model, tokenizer, prompt_style, store, prompts, output_file, batch_size, seed, **sampling)
        return
    named = next((prompt.aligner for prompt in prompts if prompt.aligner is not None), None)
    if named is not None:
        raise ValueError(f"a prompt names the Aligner {named}: give --aligner_dir, the folder that it is in")
    read = [read_adapter(path, method) for path in adapter_path]  # refused before the base is loaded
    quantize = quantize or read[0][1].hyperparameters.get("quantize")
    model, tokenizer = open_base(checkpoint_dir, precision, quantize, compile)
    adapter, infos = open_adapters(adapter_path, adapter_scale, model, model.device, allow_other_base)
    scales = "" if adapter_scale is None else f" x {' '.join(f'{scale:g}' for scale in adapter_scale)}"
    answer(
        model,
        tokenizer,
        chosen_style(prompt_style, infos[0].prompt_style or "alpaca", tokenizer),  # the authors' files say nothing
        prompts,
        model_name=f"{model.config.name} + {' + '.join(map(str, adapter_path))}{scales}",
        output_file=output_file,
        num_samples=num_samples,
        seed=seed,
        adapter=adapter,
        **sampling,
    )


def answer_each(
    model: LLaMA,
    tokenizer: Tokenizer,
    prompt_style: str | None,
    store: AdapterStore,
    prompts: list[Prompt],
    output_file: Path | None,
    batch_size: int,
    seed: int,
    **sampling: Any,
) -> None:
    """Print the answer to each prompt by the Aligner that it names, many at once, in their order.

    Args:
        model: the base model.
        tokenizer: its tokenizer.
        prompt_style: if None, that of each Aligner's training, or "chat".
        store: where the Aligners are.
        prompts: what to answer; one without a name is answered by the base.
        output_file: JSON Lines of prompt, response and model, written at the end.
        batch_size: rows at once; when one ends, the next prompt takes its place.
        seed: of sampling, for the first prompt; the next one has the next.
        sampling: `max_new_tokens`, `temperature`, `top_k`, `top_p` of `lit_llama.decoder.GenerationRequest`.

    Raises:
        ValueError: a prompt names an Aligner that is not there or cannot be used.
    """
    requests: list[GenerationRequest] = []
    styles: list[PromptStyle] = []
    by_training: dict[str | None, PromptStyle] = {}
    for i, prompt in enumerate(prompts):
        aligner, trained = None, None
        if prompt.aligner is not None:
            aligner, trained = store.get(prompt.aligner), store.style(prompt.aligner)
        if trained not in by_training:
            by_training[trained] = chosen_style(prompt_style, trained, tokenizer)
        style = by_training[trained]
        ids = tokenizer.encode(style.prompt(prompt.instruction, prompt.input), bos=style.bos)
        generator = torch.Generator(model.device).manual_seed(seed + i)
        requests.append(GenerationRequest(ids, aligner, stop_ids=style.stop_ids, generator=generator, **sampling))
        styles.append(style)
    started = time.perf_counter()
    rows: list[dict[str, str]] = []
    tokens = tqdm(complete(model, requests, batch_size), total=len(prompts), desc="answers", leave=False)
    n = 0
    for prompt, style, ids in zip(prompts, styles, tokens, strict=True):
        response = style.cut(tokenizer.decode(ids))
        if rows:
            tqdm.write("", file=sys.stdout)
        if len(prompts) > 1:
            show_prompt(prompt.instruction, prompt.input)
        tqdm.write(response, file=sys.stdout)
        source = model.config.name + (f" + {prompt.aligner}" if prompt.aligner is not None else "")
        rows.append({"prompt": prompt.instruction, "response": response, "model": source})
        n += len(ids)
    if output_file is not None:
        write_rows(output_file, rows)
    seconds = time.perf_counter() - started
    print(f"{n} tokens, {n / seconds:.1f} tokens/s, {peak_memory()}", file=sys.stderr)


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
