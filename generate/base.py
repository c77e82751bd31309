"""Let the base model answer, without any adapter.

    python generate/base.py --prompt "What is the capital of France?"
    python generate/base.py --prompts_file prompts.jsonl --output_file out/answers.jsonl
    echo "Name three rivers." | python generate/base.py --temperature 0.8

Only the answers go to stdout.
"""

from pathlib import Path

from lit_llama.devices.layouts import WeightOnly
from lit_llama.devices.precision import Precision
from lit_llama.devices.quantization import Quantize
from lit_llama.prompts import chosen_style
from lit_llama.script.command_line import answer, open_base, read_prompts, run


def main(
    checkpoint_dir: Path = Path("checkpoints/SmolLM2-135M-Instruct"),
    prompt: list[str] | None = None,
    prompts_file: Path | None = None,
    prompt_style: str = "chat",
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
) -> None:
    """Generate.

    Args:
        checkpoint_dir: folder of the base model.
        prompt: what to answer; may be given several times. Without it and a file, standard input is one prompt.
        prompts_file: JSON or JSON Lines with "prompt", "instruction" or FastChat's "turns", or a text file with one
            prompt per line.
        prompt_style: "chat" (the model's own template), "alpaca", "metamath", "hh", "beaver" or "none".
        max_new_tokens: longest answer, in tokens.
        temperature: 0 takes the likeliest token; larger is more random.
        top_k: sample among the k likeliest tokens only.
        top_p: sample among the likeliest tokens that hold this probability together.
        num_samples: answers to each prompt.
        seed: of sampling.
        precision: "auto" is bf16-true on a GPU that has it and 32-true elsewhere.
        quantize: keep the weights in fewer bits: "nf4" or "int8" to save memory
            (by bitsandbytes), "int4-fast" or "int8-fast" for speed.
        compile: compile the decoding step, with CUDA graphs on a GPU; takes a while, so for long work.
        output_file: also write prompt, response and model as JSON Lines here.
    """
    prompts = read_prompts(prompt, prompts_file)
    model, tokenizer = open_base(checkpoint_dir, precision, quantize, compile)
    answer(
        model,
        tokenizer,
        chosen_style(prompt_style, None, tokenizer),
        prompts,
        model_name=model.config.name,
        output_file=output_file,
        num_samples=num_samples,
        seed=seed,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
    )


if __name__ == "__main__":
    run(main)
