"""How fast this project trains, next to PEFT and LitGPT on the same base and the same batches, in one run.

    python benchmarks/training.py --data_dir data/demo
    python benchmarks/training.py --data_dir data/alpaca --engine aligner-1 --engine peft-lora-8
    python benchmarks/training.py --row_tokens 256 --micro_batch_size 8 --engine aligner-1 --engine aligner-1-compiled

Each engine has a process of its own; they take turns, in which each trains on the same micro batches, with an optimizer
step after each. PEFT and LitGPT work as they usually do: all logits are computed, padding is masked.

| engine | what |
|---|---|
| `aligner-N`, `llama_adapter-N`, `lora-R`, `bias` | this project, padded; N prefix tokens, rank R |
| `aligner-N-packed`, ... | the same with `--pack` |
| `aligner-N-compiled`, ... | the same with `--compile`; compiled in the first round, which is not counted |
| `peft-lora-R` | PEFT's LoRA of q and v, on transformers |
| `peft-adaption-N` | PEFT's LLaMA-Adapter, in all layers but the first two |
| `peft-beft` | PEFT's vector on the output of v |
| `litgpt-lora-R` | LitGPT's LoRA of q and v, if it is installed |
"""

import gc
import itertools
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from lit_llama.aligner import Aligner
from lit_llama.base import open_base
from lit_llama.bias import Bias
from lit_llama.checkpoint import read_config
from lit_llama.config import LLaMAConfig
from lit_llama.data import Example, TokenDataset, collate, open_data, step_batches
from lit_llama.devices.precision import PRECISIONS, Precision, default_dtype
from lit_llama.files import require_extra
from lit_llama.llama_adapter import LLaMAAdapter
from lit_llama.lora import LoRA
from lit_llama.losses import supervised_loss
from lit_llama.script.command_line import run
from lit_llama.tables import markdown

ENGINES = ["aligner-1", "aligner-10", "aligner-100", "bias", "llama_adapter-10", "lora-8", "aligner-1-packed"]
ENGINES += ["lora-8-packed", "peft-lora-8", "peft-adaption-10", "peft-beft", "litgpt-lora-8"]
MB = 1e6

Step = Callable[[Sequence[Example]], None]  # trains on a micro batch


class Turn(NamedTuple):
    """What an engine reports of a turn: seconds, and the bytes above the loaded model at the highest so far."""

    seconds: float
    peak: int


def main(
    checkpoint_dir: Path = Path("checkpoints/SmolLM2-135M-Instruct"),
    data_dir: Path = Path("data/demo"),
    engine: list[str] = ENGINES,
    micro_batch_size: int = 4,
    micro_batches: int = 6,
    rounds: int = 3,
    max_seq_length: int = 512,
    row_tokens: int | None = None,
    precision: Precision = "auto",
) -> None:
    """Measure.

    Args:
        checkpoint_dir: folder of the base model.
        data_dir: folder of the tokenised examples.
        engine: engines to measure, see above; may be given several times, the others are compared with the first.
        micro_batch_size: number of examples per forward.
        micro_batches: number of forwards in a turn.
        rounds: number of turns of each engine.
        max_seq_length: number of tokens of the longest example that is accepted.
        row_tokens: number of tokens of each row, cut from the examples joined one after the other; if not given, a row
            is an example with its own length.
        precision: number format of the base model; "auto" is bf16-true where GPU or CPU compute in it and 32-true
            elsewhere.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = PRECISIONS[precision] or default_dtype(device)
    config = read_config(checkpoint_dir)
    _, (train, _) = open_data(checkpoint_dir, data_dir, max_seq_length)
    if row_tokens is None:
        chosen = step_batches(train, 0, micro_batch_size * micro_batches, micro_batch_size, 0)
        batches = [[example for index in indices for example in train[index]] for indices in chosen]
    else:
        rows = equal_rows(train, row_tokens, micro_batch_size * micro_batches)
        batches = [rows[i : i + micro_batch_size] for i in range(0, len(rows), micro_batch_size)]
    tokens = sum(len(example.ids) for batch in batches for example in batch)
    scored = sum(int(example.scored.sum()) for batch in batches for example in batch)
    rate = product_rate(device, dtype)
    with tempfile.TemporaryDirectory() as folder:
        if any(name.startswith("peft") for name in engine):
            export(checkpoint_dir, Path(folder))
        engines = start_all(engine, checkpoint_dir, Path(folder), dtype, device)
        turns: dict[str, list[Turn]] = {name: [] for name in engines}
        for n in tqdm(range(rounds + 1), desc="rounds", leave=False):
            for name, (connection, _) in engines.items():
                connection.send(batches)
                turn = connection.recv()
                if n:  # the first round is warm-up
                    turns[name].append(turn)
        for connection, _ in engines.values():
            connection.send(None)
    print(
        f"{len(batches)} forwards of {micro_batch_size} examples, {tokens} tokens, {scored / tokens:.0%} scored; "
        f"{str(dtype).removeprefix('torch.')}; product of matrices: {rate / 1e9:.0f} GFLOP/s; median of {rounds} rounds"
        "\n"
    )
    speeds = {name: tokens / statistics.median(turn.seconds for turn in own) for name, own in turns.items()}
    first = next(iter(speeds))
    rows = []
    for name, speed in speeds.items():
        needed = needed_arithmetic(name, config, tokens, scored)
        peak = max(turn.peak for turn in turns[name])
        rows.append(
            [name, f"{engines[name][1]:,}", f"{speed:.0f}", f"{peak / MB:.0f}", f"{needed / tokens / 1e9:.2f}",
             f"{needed / tokens * speed / rate:.0%}", f"{speeds[first] / speed:.2f}"]
        )  # fmt: skip
    header = ["engine", "trainable", "tokens/s", "MB above the model", "GFLOP needed per token", "share of the rate"]
    print(markdown([*header, f"{first} : engine"], rows))


def equal_rows(dataset: TokenDataset, length: int, count: int) -> list[Example]:
    """Rows of one length, cut from the examples joined one after the other, again from the first where they run out."""
    joined: list[Example] = []
    for index in itertools.cycle(range(len(dataset))):
        joined += dataset[index]
        if sum(len(example.ids) for example in joined) >= length * count:
            break
    ids, scored = (np.concatenate(parts)[: length * count] for parts in zip(*joined, strict=True))
    return [Example(ids[i : i + length], scored[i : i + length]) for i in range(0, length * count, length)]


def needed_arithmetic(name: str, config: LLaMAConfig, tokens: int, scored: int) -> float:
    """Operations of the products with weights that a method cannot do without; attention comes on top."""
    widths = [config.width(one) for one in ("q", "k", "v", "o", "gate", "up", "down")]
    layer = sum(size_in * size_out for size_in, size_out in widths)
    first = 2 if any(kind in name for kind in ("aligner", "adapter", "adaption")) else 0
    layers = config.n_layer + (config.n_layer - first)  # forward, and backward to activations
    return 2.0 * layer * layers * tokens + 4.0 * config.vocab_size * config.n_embd * scored


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a product of matrices, 256 x 2048 x 8192; the best of ten."""
    x, weight = torch.randn(256, 2048, device=device, dtype=dtype), torch.randn(8192, 2048, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(10):
        started = time.perf_counter()
        for _ in range(10):
            F.linear(x, weight)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 10 * 2 * 256 * 2048 * 8192 / best


def export(checkpoint_dir: Path, folder: Path) -> None:
    """Write the base in Hugging Face's format, for PEFT."""
    script = Path(__file__).parents[1] / "scripts" / "export_hf_checkpoint.py"
    options = [f"--checkpoint_dir={checkpoint_dir}", f"--output_dir={folder}/export"]
    subprocess.run([sys.executable, str(script), *options], check=True, stderr=subprocess.DEVNULL)


def start_all(
    names: Sequence[str], checkpoint_dir: Path, folder: Path, dtype: torch.dtype, device: torch.device
) -> dict[str, tuple[Connection, int]]:
    """Start a process for each engine; what is not installed is left out by name.

    Returns:
        A connection to each, and its number of trainable parameters.
    """
    context = multiprocessing.get_context("spawn")
    engines = {}
    for name in tqdm(names, desc="engines", leave=False):
        here, there = context.Pipe()
        arguments = (there, name, checkpoint_dir, folder, dtype, device, torch.get_num_threads())
        context.Process(target=serve, args=arguments, daemon=True).start()
        there.close()  # so that the end of the process is noticed
        try:
            answer = here.recv()
        except EOFError:
            answer = "its process ended, see above"
        if isinstance(answer, str):
            print(f"{name} is left out: {answer}", file=sys.stderr)
        else:
            engines[name] = (here, answer)
    return engines


def serve(
    connection: Connection, name: str, checkpoint_dir: Path, folder: Path, dtype: torch.dtype,
    device: torch.device, threads: int,
) -> None:  # fmt: skip
    """The process of an engine: load, say how many parameters are trained, then train on what arrives."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    try:
        step, trainable = open_engine(name, checkpoint_dir, folder, dtype, device)
    except (ImportError, ValueError) as error:
        connection.send(str(error))
        return
    gc.collect()
    loaded = memory(device)
    connection.send(trainable)
    while (batches := connection.recv()) is not None:
        started = time.perf_counter()
        for batch in batches:
            step(batch)
        if device.type == "cuda":
            torch.cuda.synchronize()
        connection.send(Turn(time.perf_counter() - started, memory(device, highest=True) - loaded))


def memory(device: torch.device, highest: bool = False) -> int:
    """Bytes that are in use, or were at the highest since this was last asked without `highest`."""
    if device.type == "cuda":
        if not highest:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() if highest else torch.cuda.memory_allocated()
    if not highest:
        Path("/proc/self/clear_refs").write_text("5")  # the highest so far is what it is now
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(lines["VmHWM" if highest else "VmRSS"].split()[0])


def open_engine(
    name: str, checkpoint_dir: Path, folder: Path, dtype: torch.dtype, device: torch.device
) -> tuple[Step, int]:
    """What trains on a micro batch, and how many parameters it trains.

    Raises:
        ImportError: it is not installed.
        ValueError: there is no such engine.
    """
    if name.startswith("peft-"):
        return peft_engine(name.removeprefix("peft-"), folder / "export", dtype, device)
    if name.startswith("litgpt-"):
        return litgpt_engine(int(name.rpartition("-")[2]), checkpoint_dir, dtype, device)
    kind, *more = name.split("-")
    pack = "packed" in more
    size = int(more[0]) if more and more[0].isdecimal() else 0
    config = read_config(checkpoint_dir)
    made: dict[str, Callable[[], nn.Module]] = {
        "aligner": lambda: Aligner(config, size),
        "llama_adapter": lambda: LLaMAAdapter(config, size),
        "lora": lambda: LoRA(config, size),
        "bias": lambda: Bias(config),
    }
    if kind not in made:
        raise ValueError(f"there is no engine of this name; there are {', '.join(ENGINES)}")
    precision: Precision = next(found for found, one in PRECISIONS.items() if one == dtype)
    model, adapter = open_base(checkpoint_dir, precision=precision, device=device).model, made[kind]().to(device)
    if "compiled" in more:
        model.compile_blocks()

    def loss(examples: Sequence[Example]) -> Tensor:
        sums = supervised_loss(model, adapter, collate(examples, pack).to(device))  # type: ignore[arg-type]
        return sums.metrics["loss"] / sums.count

    return stepping(loss, adapter)


def stepping(loss: Callable[[Sequence[Example]], Tensor], module: nn.Module) -> tuple[Step, int]:
    """An optimizer step on a loss, over all parameters of a module that are trained; and how many these are."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)

    def step(examples: Sequence[Example]) -> None:
        optimizer.zero_grad()
        loss(examples).backward()
        optimizer.step()

    return step, sum(parameter.numel() for parameter in parameters)


def peft_engine(kind: str, folder: Path, dtype: torch.dtype, device: torch.device) -> tuple[Step, int]:
    """PEFT on transformers."""
    peft, transformers = require_extra("peft", "export"), require_extra("transformers", "export")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)
    what, _, size = kind.partition("-")
    if what == "lora":
        config: Any = peft.LoraConfig(r=int(size), target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    elif what == "adaption":
        layers = model.config.num_hidden_layers - 2
        config = peft.AdaptionPromptConfig(adapter_len=int(size), adapter_layers=layers, task_type="CAUSAL_LM")
    elif what == "beft" and hasattr(peft, "BeftConfig"):
        config = peft.BeftConfig(target_modules=["v_proj"], task_type="CAUSAL_LM")
    else:
        raise ValueError("this version of PEFT does not have it")
    model = peft.get_peft_model(model, config).train()

    def loss(examples: Sequence[Example]) -> Tensor:
        batch = collate(examples).to(device)
        lengths = torch.tensor([len(example.ids) for example in examples], device=device)
        mask = torch.arange(batch.ids.size(1), device=device) < lengths[:, None]
        labels = batch.ids.masked_fill(~batch.scored, -100)
        return model(input_ids=batch.ids, attention_mask=mask.long(), labels=labels).loss

    return stepping(loss, model)


def litgpt_engine(r: int, checkpoint_dir: Path, dtype: torch.dtype, device: torch.device) -> tuple[Step, int]:
    """LitGPT's LoRA on a model of the same sizes with random weights, as speed does not depend on them."""
    try:
        from litgpt import lora  # type: ignore[import-not-found]
    except ImportError:
        raise ImportError("LitGPT is not installed: pip install litgpt") from None
    base = read_config(checkpoint_dir)
    config = lora.Config(
        block_size=base.block_size, vocab_size=base.vocab_size, padded_vocab_size=base.vocab_size,
        n_layer=base.n_layer, n_head=base.n_head, n_query_groups=base.n_kv_head, n_embd=base.n_embd,
        head_size=base.head_size, intermediate_size=base.intermediate_size, rotary_percentage=1.0,
        parallel_residual=False, bias=False, norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP",
        lora_r=r, lora_alpha=16, lora_dropout=0.0, lora_query=True, lora_value=True,
    )  # fmt: skip
    model = lora.GPT(config).to(device=device, dtype=dtype)
    lora.mark_only_lora_as_trainable(model)

    def loss(examples: Sequence[Example]) -> Tensor:
        batch = collate(examples).to(device)
        logits = model(batch.ids)[:, :-1].flatten(0, 1)
        labels = batch.ids.masked_fill(~batch.scored, -100)[:, 1:].flatten()
        return F.cross_entropy(logits, labels, ignore_index=-100)

    return stepping(loss, model)


if __name__ == "__main__":
    run(main)
