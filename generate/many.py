"""Answer prompts with many adapters at once: each prompt names its own, and one base model in memory serves all.

    python generate/many.py --adapter_dir out --prompts_file prompts.jsonl

A line of the file is `{"prompt": "Why is the sky blue?", "adapter": "demo"}`. The name is that of a file in the folder,
without ".safetensors", or that of a run's folder. The adapters may be of different methods. Prompts that name none are
answered by the base model. Prompts are rows of one batch; when a row ends, the next prompt takes its place.
"""

import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from lit_llama.base import Base, Bits, open_base
from lit_llama.decoder import GenerationRequest
from lit_llama.devices.precision import Precision
from lit_llama.generation import complete
from lit_llama.script.answers import adapter_in, answer_row, print_speed, read_prompts, show_prompt, write_rows
from lit_llama.script.command_line import run


def main(
    adapter_dir: Path = Path("out"),
    prompts_file: Path | None = None,
    batch_size: int = 16,
    checkpoint_dir: Path = Path("checkpoints/SmolLM2-135M-Instruct"),
    prompt_style: str | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 1337,
    precision: Precision = "auto",
    quantize: Bits | None = None,
    compile: bool = False,
    output_file: Path | None = None,
    allow_other_base: bool = False,
) -> None:
    """Generate.

    Args:
        adapter_dir: folder of the adapters.
        prompts_file: file of prompts: JSON or JSON Lines with "prompt" or "instruction", and "adapter" for the name of
            the adapter. Without a file, standard input is one prompt for the base model.
        batch_size: number of prompts answered at once.
        checkpoint_dir: folder of the base model.
        prompt_style: how prompts are written for the model: "chat" (the model's own template), "alpaca", "metamath",
            "hh", "beaver" or "none"; if not given, as each adapter was trained.
        max_new_tokens: length of the longest answer, in tokens.
        temperature: randomness of sampling; 0 always takes the likeliest token.
        top_k: number of likeliest tokens that are sampled from.
        top_p: probability that the likeliest tokens must hold together; only they are sampled from.
        seed: seed of sampling for the first prompt; the next prompt has the next seed.
        precision: number format of the base model; "auto" is bf16-true on a GPU that has it and 32-true elsewhere.
        quantize: number of bits of the base model's weights: "nf4" or "int8" (bitsandbytes) saves memory,
            "int4-fast" or "int8-fast" (torchao on a GPU) saves time; if not given, as the first adapter was
            trained.
        compile: compile the decoding step, with CUDA graphs on a GPU. It takes a while, so it is for long work.
        output_file: file to which prompt, response and model are written as JSON Lines.
        allow_other_base: use adapters on other weights than those they were trained on.
    """
    prompts = read_prompts(None, prompts_file)
    paths = {p.adapter: adapter_in(adapter_dir, p.adapter) for p in prompts if p.adapter is not None}
    first = open_base(
        checkpoint_dir,
        next(iter(paths.values()), None),
        prompt_style=prompt_style,
        precision=precision,
        quantize=quantize,
        compile=compile,
        for_generation=True,
        allow_other_base=allow_other_base,
    )
    bases: dict[str | None, Base] = {None: first.with_adapter(None)}
    bases |= {name: first.with_adapter(path) for name, path in paths.items()}  # one model in memory

    requests: list[GenerationRequest] = []
    for i, prompt in enumerate(prompts):
        base = bases[prompt.adapter]
        ids = base.tokenizer.encode(base.style.prompt(prompt.instruction, prompt.input), bos=base.style.bos)
        options = (base.style.stop_ids, temperature, top_k, top_p, torch.Generator(base.device).manual_seed(seed + i))
        requests.append(GenerationRequest(ids, base.adapter, max_new_tokens, *options))

    started, new_tokens = time.perf_counter(), 0
    rows: list[dict[str, str]] = []
    answers = complete(first.model, requests, batch_size)
    for prompt, ids in zip(prompts, tqdm(answers, total=len(prompts), desc="answers", leave=False), strict=True):
        base = bases[prompt.adapter]
        response = base.style.cut(base.tokenizer.decode(ids))
        if rows:
            tqdm.write("", file=sys.stdout)
        if len(prompts) > 1:
            show_prompt(prompt)
        tqdm.write(response, file=sys.stdout)
        rows.append(answer_row(prompt, response, base.name))
        new_tokens += len(ids)
    if output_file is not None:
        write_rows(output_file, rows)
    print_speed(new_tokens, time.perf_counter() - started)


if __name__ == "__main__":
    run(main)
