"""Answer prompts with many adapters at once: each prompt names its own, and one base model in memory serves all.

    python generate/many.py --adapter_dir out --prompts_file prompts.jsonl

A line of the file is `{"prompt": "Why is the sky blue?", "adapter": "demo"}`. The name is that of a file in the folder,
without ".safetensors", or that of a run's folder. The adapters may be of different methods. Prompts that name none are
answered by the base model. Prompts are rows of one batch; when a row ends, the next prompt takes its place.
"""

import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from lit_llama.base import Base
from lit_llama.decoder import GenerationRequest
from lit_llama.generation import complete
from lit_llama.script.answers import adapter_in, answer_row, print_speed, read_prompts, show_prompt, write_rows
from lit_llama.script.command_line import run
from lit_llama.script.opening import open_model


def main(
    adapter_dir: Path = Path("out"),
    prompts_file: Path | None = None,
    batch_size: int = 16,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 1337,
    output_file: Path | None = None,
    **options: Any,
) -> None:
    """Generate.

    Args:
        adapter_dir: folder of the adapters.
        prompts_file: file of prompts: JSON or JSON Lines with "prompt" or "instruction", and "adapter" for the name of
            the adapter. Without a file, standard input is one prompt for the base model.
        batch_size: number of prompts answered at once.
        max_new_tokens: length of the longest answer, in tokens.
        temperature: randomness of sampling; 0 always takes the likeliest token.
        top_k: number of likeliest tokens that are sampled from.
        top_p: probability that the likeliest tokens must hold together; only they are sampled from.
        seed: seed of sampling for the first prompt; the next prompt has the next seed.
        output_file: file to which prompt, response and model are written as JSON Lines.
        options: how the base model is opened, see `open_model`.
    """
    prompts = read_prompts(None, prompts_file)
    paths = {p.adapter: adapter_in(adapter_dir, p.adapter) for p in prompts if p.adapter is not None}
    first = open_model(next(iter(paths.values()), None), None, **options)
    bases: dict[str | None, Base] = {None: first.with_adapter(None)}
    bases |= {name: first.with_adapter(path) for name, path in paths.items()}  # one model in memory

    requests: list[GenerationRequest] = []
    for i, prompt in enumerate(prompts):
        base = bases[prompt.adapter]
        ids = base.tokenizer.encode(base.style.prompt(prompt.instruction, prompt.input), bos=base.style.bos)
        sampling = (base.style.stop_ids, temperature, top_k, top_p, torch.Generator().manual_seed(seed + i))
        requests.append(GenerationRequest(ids, base.adapter, max_new_tokens, *sampling))

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
