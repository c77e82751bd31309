"""Let the base model answer, without any adapter.

    python generate/base.py --prompt "What is the capital of France?"
    python generate/base.py --prompts_file prompts.jsonl --output_file out/answers.jsonl
    echo "Name three rivers." | python generate/base.py --temperature 0.8

Only the answers go to stdout. `generate/aligner.py` shows what happens inside: prefill, and decoding token by token.
"""

from collections.abc import Iterator
from pathlib import Path

from lit_llama.base import Bits, open_base
from lit_llama.devices.precision import Precision
from lit_llama.prompts import Message
from lit_llama.script.answers import check_samples, print_answers, read_prompts, refuse_names
from lit_llama.script.command_line import run


def main(
    checkpoint_dir: Path = Path("checkpoints/SmolLM2-135M-Instruct"),
    prompt: list[str] | None = None,
    prompts_file: Path | None = None,
    prompt_style: str | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    num_samples: int = 1,
    seed: int = 1337,
    precision: Precision = "auto",
    quantize: Bits | None = None,
    compile: bool = False,
    output_file: Path | None = None,
) -> None:
    """Generate.

    Args:
        checkpoint_dir: folder of the base model.
        prompt: text to answer; may be given several times. Without it and a file, standard input is one prompt.
        prompts_file: file of prompts: JSON or JSON Lines with "prompt", "instruction" or FastChat's "turns", or a text
            file with one prompt per line.
        prompt_style: how a prompt is written for the model: "chat" (the model's own template), "alpaca", "metamath",
            "hh", "beaver" or "none" (the prompt alone); if not given, "chat", or "none" for a model without a template.
        max_new_tokens: length of the longest answer, in tokens.
        temperature: randomness of sampling; 0 always takes the likeliest token.
        top_k: number of likeliest tokens that are sampled from.
        top_p: probability that the likeliest tokens must hold together; only they are sampled from.
        num_samples: number of answers to each prompt.
        seed: seed of sampling for the first answer; the next answer has the next seed.
        precision: number format of the base model; "auto" is bf16-true on a GPU that has it and 32-true elsewhere.
        quantize: number of bits of the base model's weights: "nf4" or "int8" (bitsandbytes) saves memory,
            "int4-fast" or "int8-fast" (torchao on a GPU) saves time.
        compile: compile the decoding step, with CUDA graphs on a GPU. It takes a while, so it is for long work.
        output_file: file to which prompt, response and model are written as JSON Lines.
    """
    check_samples(num_samples, temperature)
    prompts = read_prompts(prompt, prompts_file)
    refuse_names(prompts)
    base = open_base(
        checkpoint_dir,
        prompt_style=prompt_style,
        precision=precision,
        quantize=quantize,
        compile=compile,
        for_generation=True,
    )
    sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p}

    def answer(number: int, answers_before: int) -> Iterator[str]:
        asked = Message("user", prompts[number].instruction, prompts[number].input)
        return base.reply([asked], seed=seed + answers_before, **sampling)

    print_answers(prompts, answer, model_name=base.name, num_samples=num_samples, output_file=output_file)


if __name__ == "__main__":
    run(main)
