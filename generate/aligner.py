"""Let the base model answer with an Aligner, or with an adapter of any other method: its file says what it is.

    python generate/aligner.py --prompt "What is the capital of France?"
    python generate/aligner.py --adapter_path out/lora --prompts_file prompts.jsonl
    python generate/aligner.py --adapter_path a.safetensors --adapter_path b.safetensors --adapter_scale 0.5
    echo "Name three rivers." | python generate/aligner.py --temperature 0.8

Only the answers go to stdout. The authors' published `.pth` files (arXiv 2312.05503) can be used as they are.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from lit_llama.decoder import GenerationRequest, check_request
from lit_llama.generation import AnswerText, decode, prefill
from lit_llama.script.answers import check_samples, print_answers, read_prompts, refuse_names
from lit_llama.script.command_line import run
from lit_llama.script.opening import open_model


def main(
    adapter_path: list[Path] = [Path("out/demo/aligner.safetensors")],  # noqa: B006
    adapter_scale: list[float] | None = None,
    prompt: list[str] | None = None,
    prompts_file: Path | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    num_samples: int = 1,
    seed: int = 1337,
    output_file: Path | None = None,
    **options: Any,
) -> None:
    """Generate.

    Args:
        adapter_path: file or run folder of the adapter; may be given several times, then the adapters are added up.
        adapter_scale: factor by which the adapter is multiplied, from 0 (the base model) to beyond 1; may be given
            once for each adapter.
        prompt: text to answer; may be given several times. Without it and a file, standard input is one prompt.
        prompts_file: file of prompts: JSON or JSON Lines with "prompt", "instruction" or FastChat's "turns", or a text
            file with one prompt per line.
        max_new_tokens: length of the longest answer, in tokens.
        temperature: randomness of sampling; 0 always takes the likeliest token.
        top_k: number of likeliest tokens that are sampled from.
        top_p: probability that the likeliest tokens must hold together; only they are sampled from.
        num_samples: number of answers to each prompt.
        seed: seed of sampling for the first answer; the next answer has the next seed.
        output_file: file to which prompt, response and model are written as JSON Lines.
        options: how the base model is opened, see `open_model`.
    """
    check_samples(num_samples, temperature)
    prompts = read_prompts(prompt, prompts_file)
    refuse_names(prompts)
    base = open_model(adapter_path, adapter_scale, **options)
    style = base.style
    texts = [style.prompt(prompt.instruction, prompt.input) for prompt in prompts]
    sampling = (base.adapter, max_new_tokens, style.stop_ids, temperature, top_k, top_p)
    requests = [GenerationRequest(base.tokenizer.encode(text, bos=style.bos), *sampling) for text in texts]
    for request in requests:
        check_request(base.model, request)

    def answer(number: int, answers_before: int) -> Iterator[str]:
        request = requests[number]._replace(generator=torch.Generator().manual_seed(seed + answers_before))
        text = AnswerText(base.tokenizer, style)
        rows = prefill(base.model, [request])  # reads the prompt in one forward, which fills the KV cache
        for [token] in decode(rows):  # samples a token and reads it in another forward, until the answer ends
            assert token is not None  # a lone row has a token until it ends
            yield text.push(token)
            if text.ended:
                break
        yield text.finish()

    print_answers(prompts, answer, model_name=base.name, num_samples=num_samples, output_file=output_file)


if __name__ == "__main__":
    run(main)
