"""Check an exported model against this project: the same logits, the same greedy answers.

    python scripts/verify_export.py --export_path export/captain --adapter_path out/demo/aligner.safetensors
    python scripts/verify_export.py --export_path export/captain.gguf --adapter_path out/demo/aligner.safetensors
    python scripts/verify_export.py --export_path export/lora --peft_base export/base \\
        --adapter_path out/lora/lora.safetensors

Answers prompts here, and lets the other engine read prompts and answers: transformers for a folder of
scripts/export_hf_checkpoint.py, PEFT on top for an adapter of its format, llama.cpp for a GGUF file. Prints one line;
the exit status is 1 if they differ. llama.cpp computes in other numbers than this project, with integer activations
where weights are quantised, so its logits are only expected to correlate.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from lit_llama.base import open_base
from lit_llama.files import require_extra
from lit_llama.generation import generate
from lit_llama.script.command_line import run

PROMPTS = ["Why is the sky blue?", "Name three rivers.", "How do I boil an egg?", "Write a line about the sea."]


def main(
    export_path: Path,
    checkpoint_dir: Path = Path("checkpoints/SmolLM2-135M-Instruct"),
    adapter_path: list[Path] | None = None,
    adapter_scale: list[float] | None = None,
    peft_base: Path | None = None,
    prompt: list[str] | None = None,
    prompt_style: str | None = None,
    max_new_tokens: int = 32,
    tolerance: float = 1e-3,
    least_correlation: float = 0.99,
    allow_other_base: bool = False,
) -> None:
    """Verify.

    Args:
        export_path: the exported folder, or GGUF file.
        checkpoint_dir: folder of the base model that was exported.
        adapter_path: the adapters that were exported with it.
        adapter_scale: their scales.
        peft_base: folder of the base model in Hugging Face's format, for an adapter in PEFT's.
        prompt: what to answer; may be given several times. A few questions if not given.
        prompt_style: as in generate/aligner.py.
        max_new_tokens: length of the longest answer, in tokens.
        tolerance: largest difference between logits, float32 on both sides.
        least_correlation: between the logits of a GGUF file and ours.
        allow_other_base: as in the export.
    """
    if not export_path.exists():
        raise FileNotFoundError(f"{export_path}: no such file or folder")
    base = open_base(
        checkpoint_dir,
        adapter_path,
        adapter_scale,
        prompt_style=prompt_style,
        precision="32-true",
        quantize="none",
        allow_other_base=allow_other_base,
    )
    model, tokenizer, style, adapter = base.model, base.tokenizer, base.style, base.adapter
    prompts = [tokenizer.encode(style.prompt(text), bos=style.bos) for text in prompt or PROMPTS]
    answers = generate(model, prompts, max_new_tokens, adapter=adapter, stop_ids=style.stop_ids)
    is_gguf = export_path.is_file()
    engine = llama_cpp_engine(export_path) if is_gguf else transformers_engine(export_path, peft_base)

    difference, correlation, same, total = 0.0, 1.0, 0, 0
    for ids, answer in zip(tqdm(prompts, desc="prompts", leave=False), answers, strict=True):
        text = ids + answer
        with torch.no_grad():
            ours = model(torch.tensor([text], device=model.device), adapter)[0].cpu()  # (T, V)
        theirs = engine(text)
        difference = max(difference, (ours - theirs).abs().max().item())
        correlation = min(correlation, torch.corrcoef(torch.stack([ours.flatten(), theirs.flatten()]))[0, 1].item())
        chosen = slice(len(ids) - 1, len(text) - 1)
        same += int((ours[chosen].argmax(-1) == theirs[chosen].argmax(-1)).sum())
        total += len(answer)
    agree = correlation >= least_correlation if is_gguf else difference <= tolerance and same == total
    line = (
        f"{len(prompts)} prompts: {same} of {total} greedy tokens the same, logits differ by at most {difference:.2g} "
        f"and correlate at {correlation:.6f}"
    )
    if not agree:
        raise ValueError(f"{export_path} is not what {checkpoint_dir} computes with these adapters; {line}")
    print(f"the same; {line}")


def transformers_engine(folder: Path, peft_base: Path | None) -> Callable[[list[int]], Tensor]:
    """Logits (T, V) of token ids, by transformers."""
    auto = require_extra("transformers", "export").AutoModelForCausalLM
    is_adapter = (folder / "adapter_config.json").is_file()
    if is_adapter and peft_base is None:
        raise ValueError(f"{folder} is an adapter in PEFT's format: give its base in Hugging Face's as --peft_base")
    model = auto.from_pretrained(peft_base if is_adapter else folder, trust_remote_code=True, dtype=torch.float32)
    if is_adapter:
        model = require_extra("peft", "export").PeftModel.from_pretrained(model, folder)

    @torch.no_grad()
    def logits(ids: list[int]) -> Tensor:
        return model(torch.tensor([ids])).logits[0]

    return logits


def llama_cpp_engine(path: Path) -> Callable[[list[int]], Tensor]:
    """Logits (T, V) of token ids, by llama.cpp."""
    llama = require_extra("llama_cpp", "llama-cpp").Llama(str(path), n_ctx=2048, logits_all=True, verbose=False)

    def logits(ids: list[int]) -> Tensor:
        llama.reset()
        llama.eval(ids)
        return torch.tensor(llama.scores[: len(ids)])

    return logits


if __name__ == "__main__":
    run(main)
