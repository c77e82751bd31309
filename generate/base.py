"""Let the base model answer, without any adapter.

    python generate/base.py --prompt "What is the capital of France?"
    python generate/base.py --prompts_file prompts.jsonl --output_file out/answers.jsonl
    echo "Name three rivers." | python generate/base.py --temperature 0.8

Only the answers go to stdout. `generate/aligner.py` shows what happens inside: prefill, and decoding token by token.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lit_llama.prompts import Message
from lit_llama.script.answers import check_samples, print_answers, read_prompts, refuse_names
from lit_llama.script.command_line import run
from lit_llama.script.opening import open_model


def main(
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
    base = open_model(None, None, allow_other_base=False, **options)
    sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p}

    def answer(number: int, answers_before: int) -> Iterator[str]:
        asked = Message("user", prompts[number].instruction, prompts[number].input)
        return base.reply([asked], seed=seed + answers_before, **sampling)

    print_answers(prompts, answer, model_name=base.name, num_samples=num_samples, output_file=output_file)


if __name__ == "__main__":
    run(main)
