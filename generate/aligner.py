"""Let the base model answer with an Aligner.

    python generate/aligner.py --prompt "What is the capital of France?"
    python generate/aligner.py --aligner_path out/json/aligner.safetensors --prompts_file prompts.jsonl
    echo "Name three rivers." | python generate/aligner.py --temperature 0.8

Only the answers go to stdout. The authors' published `.pth` files (arXiv 2312.05503) can be used as they are.
"""

from pathlib import Path

from lit_llama.checkpoint import Precision, adapter_info, check_adapter, load_aligner
from lit_llama.cli import answer, open_base, read_prompts, run
from lit_llama.prompts import prompt_style as get_prompt_style
from lit_llama.quantization import Quantize


def main(
    checkpoint_dir: Path = Path("checkpoints/SmolLM2-135M-Instruct"),
    aligner_path: Path = Path("out/demo/aligner.safetensors"),
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
    quantize: Quantize | None = None,
    output_file: Path | None = None,
    allow_other_base: bool = False,
) -> None:
    """Generate.

    Args:
        checkpoint_dir: folder of the base model.
        aligner_path: the Aligner.
        prompt: what to answer; may be given several times. Without it and a file, standard input is one prompt.
        prompts_file: JSON or JSON Lines with "prompt" or "instruction", or a text file with one prompt per line.
        prompt_style: "chat" (the model's own template), "alpaca", "metamath", "hh", "beaver" or "none"; if
            not given, the one that the Aligner was trained with.
        max_new_tokens: longest answer, in tokens.
        temperature: 0 takes the likeliest token; larger is more random.
        top_k: sample among the k likeliest tokens only.
        top_p: sample among the likeliest tokens that hold this probability together.
        num_samples: answers to each prompt.
        seed: of sampling.
        precision: "auto" is bf16-true on a GPU that has it and 32-true elsewhere.
        quantize: keep the base's blocks in 4 bits ("nf4") or 8 bits ("int8"); if not given, as the Aligner was trained.
        output_file: also write prompt, response and model as JSON Lines here.
        allow_other_base: use the Aligner on other weights than those it was trained on.
    """
    prompts = read_prompts(prompt, prompts_file)
    aligner = load_aligner(aligner_path)
    quantize = quantize or adapter_info(aligner_path).hyperparameters.get("quantize")
    model, tokenizer = open_base(checkpoint_dir, precision, quantize)
    info = check_adapter(aligner_path, model, allow_other_base)
    answer(
        model,
        tokenizer,
        get_prompt_style(prompt_style or info.prompt_style or "alpaca", tokenizer),  # the authors' files say nothing
        prompts,
        model_name=f"{model.config.name} + {aligner_path}",
        output_file=output_file,
        num_samples=num_samples,
        seed=seed,
        prefix=aligner.to(model.device),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
    )


if __name__ == "__main__":
    run(main)
