"""How fast this project generates, next to transformers and llama.cpp on the same base, in one run.

    python benchmarks/generation.py
    python benchmarks/generation.py --gguf_path checkpoints/SmolLM2-135M-Instruct.Q4_1.gguf
    python benchmarks/generation.py --batch_size 32 --engine none --engine aligner-1-each --engine aligner-10-each

Engines take turns, some rounds; the table has the median of each and its ratio to the first. Prompts and adapters are
random: speed does not depend on what they say. Every row generates the same number of tokens.

| engine | what |
|---|---|
| `transformers` | its `generate`, greedy, on an export of the base |
| `llama.cpp` | the GGUF file, if xllamacpp is installed; one row only |
| `none`, `aligner-N`, `lora-R` | this project, with no adapter, an Aligner of N tokens, a LoRA of rank R |
| `aligner-N-each` | a different Aligner of N tokens for each row |
| `temperature`, `top-k`, `top-p` | without an adapter, each row sampled with a generator of its own; see `SAMPLINGS` |
| `int8-fast`, `int4-fast` | this project without an adapter, `--quantize` |
| `compiled`, `int4-fast-compiled`, ... | the same with `--compile` |

The last column is the memory that each row takes for its adapter, in addition to keys and values; none where all rows
have the same. The wheels of xllamacpp for Linux are built for AVX2, without the AVX-512 that a build of llama.cpp for
the machine itself may use.
"""

import functools
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from lit_llama.aligner import Aligner
from lit_llama.base import open_base
from lit_llama.checkpoint import read_config
from lit_llama.config import LLaMAConfig
from lit_llama.decoder import Decoder, GenerationRequest
from lit_llama.devices.precision import PRECISIONS, Precision, default_dtype
from lit_llama.files import require_extra
from lit_llama.formats.llama_cpp import Continuation, LlamaCpp
from lit_llama.lora import LoRA
from lit_llama.script.command_line import run
from lit_llama.seam import Adapter
from lit_llama.tables import markdown

SAMPLINGS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 1.0},
    "top-k": {"temperature": 1.0, "top_k": 50},
    "top-p": {"temperature": 1.0, "top_p": 0.9},
}
ENGINES = ["transformers", "llama.cpp", "none", "aligner-1", "aligner-10", "lora-8", "int8-fast", "int4-fast"]


class Speed(NamedTuple):
    """Tokens per second, of all rows together; and bytes that each row takes for its adapter."""

    prefill: float
    decode: float
    adapter_bytes: float = 0


Engine = Callable[[list[list[int]], int], Speed]


def main(
    checkpoint_dir: Path = Path("checkpoints/SmolLM2-135M-Instruct"),
    gguf_path: Path | None = None,
    engine: list[str] = ENGINES,
    batch_size: list[int] = [1],  # noqa: B006
    prompt_tokens: int = 64,
    new_tokens: int = 48,
    rounds: int = 5,
    precision: Precision = "auto",
) -> None:
    """Measure.

    Args:
        checkpoint_dir: folder of the base model.
        gguf_path: the same base for llama.cpp; without it that engine is left out.
        engine: which to measure, see above; may be given several times, the others are compared with the first.
        batch_size: rows at once; may be given several times.
        prompt_tokens: in each row.
        new_tokens: generated in each row.
        rounds: how often every engine has its turn.
        precision: number format of the base model; "auto" is bf16-true where GPU or CPU compute in it and 32-true
            elsewhere, and says which it takes.
    """
    config = read_config(checkpoint_dir)
    torch.manual_seed(0)
    for rows in batch_size:
        names = [
            name for name in engine if name != "llama.cpp" or (rows == 1 and gguf_path is not None and has_llama_cpp())
        ]
        engines = {name: open_engine(name, checkpoint_dir, gguf_path, config, rows, precision) for name in names}
        prompts = torch.randint(5, config.vocab_size, (rows, prompt_tokens)).tolist()
        speeds: dict[str, list[Speed]] = {name: [] for name in names}
        for n in tqdm(range(rounds + 1), desc=f"rounds of {rows} rows", leave=False):
            for name, measure in engines.items():
                speed = measure(prompts, new_tokens)
                if n:  # the first round is warm-up
                    speeds[name].append(speed)
        print(f"{rows} rows, {prompt_tokens} + {new_tokens} tokens, median of {rounds} rounds, tokens/s\n")
        first = statistics.median(speed.decode for speed in speeds[names[0]])
        cells = []
        for name in names:
            prefill, decode, adapter_bytes = (statistics.median(values) for values in zip(*speeds[name], strict=True))
            cells.append([name, f"{prefill:.0f}", f"{decode:.1f}", f"{decode / first:.2f}", f"{adapter_bytes:,.0f}"])
        print(markdown(["engine", "prefill", "decode", f"decode : {names[0]}", "bytes per row"], cells) + "\n")


def has_llama_cpp() -> bool:
    """Whether xllamacpp is installed."""
    try:
        require_extra("xllamacpp", "llama-cpp")
    except ImportError:
        return False
    return True


def open_engine(
    name: str, checkpoint_dir: Path, gguf_path: Path | None, config: LLaMAConfig, rows: int, precision: Precision
) -> Engine:
    """Load one engine.

    Raises:
        ValueError: there is no such engine.
    """
    if name == "transformers":
        return transformers_engine(checkpoint_dir, precision)
    if name == "llama.cpp":
        assert gguf_path is not None
        return llama_cpp_engine(gguf_path)
    compiled = name.endswith("compiled")
    name = name.removesuffix("compiled").removesuffix("-") or "none"
    quantize = name if name in ("int8-fast", "int4-fast") else None
    model = open_base(
        checkpoint_dir, precision=precision, quantize=quantize, compile=compiled, for_generation=True
    ).model
    kind, _, rest = name.partition("-")
    size = rest.removesuffix("-each")
    if name in ("none", "int8-fast", "int4-fast", *SAMPLINGS):
        adapters: list[Adapter | None] = [None] * rows
    elif kind == "aligner" and size.isdecimal():
        one = random_aligner(config, int(size), model.device)
        each = rest.endswith("-each")
        adapters = [random_aligner(config, int(size), model.device) if each else one for _ in range(rows)]
    elif kind == "lora" and size.isdecimal():
        adapters = [LoRA(config, int(size)).to(model.device).eval()] * rows
    else:
        raise ValueError(f"no engine named {name}: there are {', '.join(ENGINES)} and aligner-N-each")

    def measure(prompts: list[list[int]], new_tokens: int) -> Speed:
        decoder = Decoder(model, rows, len(prompts[0]) + new_tokens)
        options = SAMPLINGS.get(name, {})
        requests = [
            GenerationRequest(prompt, one, new_tokens, generator=torch.Generator().manual_seed(i), **options)
            for i, (prompt, one) in enumerate(zip(prompts, adapters, strict=True))
        ]
        started = time.perf_counter()
        decoder.join(requests)
        decoder.step()
        prefilled = time.perf_counter()
        adapter_bytes = decoder.adapter_bytes / rows
        while decoder.running:
            decoder.step()
        ended = time.perf_counter()
        return speed(prompts, new_tokens, prefilled - started, ended - prefilled)._replace(adapter_bytes=adapter_bytes)

    return measure


def random_aligner(config: LLaMAConfig, length: int, device: torch.device) -> Aligner:
    """One with open gates."""
    aligner = Aligner(config, length)
    torch.nn.init.normal_(aligner.gates, std=0.1)
    return aligner.to(device)


def speed(prompts: list[list[int]], new_tokens: int, prefill: float, decode: float) -> Speed:
    """From seconds; the first new token is the prefill's."""
    return Speed(sum(map(len, prompts)) / prefill, len(prompts) * (new_tokens - 1) / decode)


def transformers_engine(checkpoint_dir: Path, precision: Precision) -> Engine:
    """transformers' `generate`, timed whole and with one new token alone."""
    transformers = require_extra("transformers", "export")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = PRECISIONS[precision] or default_dtype(device)
    with tempfile.TemporaryDirectory() as folder:
        script = Path(__file__).parents[1] / "scripts" / "export_hf_checkpoint.py"
        options = [f"--checkpoint_dir={checkpoint_dir}", f"--output_dir={folder}/export"]
        subprocess.run([sys.executable, str(script), *options], check=True, stderr=subprocess.DEVNULL)
        model = transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/export", dtype=dtype).to(device)

    def seconds(ids: torch.Tensor, n: int) -> float:
        started = time.perf_counter()
        found = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=n,
            min_new_tokens=n,
            do_sample=False,
            pad_token_id=0,
        )
        assert found.size(1) == ids.size(1) + n
        return time.perf_counter() - started

    def measure(prompts: list[list[int]], new_tokens: int) -> Speed:
        ids = torch.tensor(prompts, device=device)
        prefill = seconds(ids, 1)
        return speed(prompts, new_tokens, prefill, seconds(ids, new_tokens) - prefill)

    return measure


def llama_cpp_engine(path: Path) -> Engine:
    """llama.cpp, on as many threads as torch has, by its own clock.

    In a process of its own: both use GNU's OpenMP, which lets threads sleep at every barrier if the process has more of
    them than there are cores, so that torch would decode at half its speed.
    """
    process = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))

    def measure(prompts: list[list[int]], new_tokens: int) -> Speed:
        told = process.submit(continued, path, torch.get_num_threads(), prompts[0], new_tokens).result()
        return speed(prompts[:1], new_tokens, told.prefill_seconds, told.decode_seconds)

    return measure


def continued(path: Path, threads: int, prompt: list[int], new_tokens: int) -> Continuation:
    """What llama.cpp makes of a prompt."""
    return opened(path, threads).complete(prompt, new_tokens, likeliest=0, fresh=True)


@functools.cache
def opened(path: Path, threads: int) -> LlamaCpp:
    """llama.cpp with a file open."""
    return LlamaCpp(path, threads=threads)


if __name__ == "__main__":
    run(main)
