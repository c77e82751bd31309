"""Check an exported model against this project: the same logits, the same greedy answers.

    python scripts/verify_export.py --export_path export/captain --adapter_path examples/adapters/captain.safetensors
    python scripts/verify_export.py --export_path export/captain.gguf \\
        --adapter_path examples/adapters/captain.safetensors
    python scripts/verify_export.py --export_path export/lora --peft_base export/base \\
        --adapter_path out/lora/lora.safetensors
    python scripts/verify_export.py --export_path export/captain --adapter_path examples/adapters/captain.safetensors \\
        --engine vllm --vllm_python ~/vllm/bin/python --n_prompts 20

Answers prompts here, and lets the other engine read prompts and answers: transformers for a folder of
scripts/export_hf_checkpoint.py, PEFT on top for an adapter of its format, llama.cpp for a GGUF file, vLLM for a folder
if asked for. Prints one line; the exit status is 1 if they differ. llama.cpp computes in other numbers than this
project, with integer activations where weights are quantised, so they are only expected to correlate. vLLM runs
in an environment of its own, because it wants its own version of PyTorch.
"""

import inspect
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from lit_llama.base import open_base
from lit_llama.files import require_extra
from lit_llama.formats.llama_cpp import LlamaCpp
from lit_llama.generation import generate
from lit_llama.script.command_line import run

PROMPTS = [
    *("Why is the sky blue?", "Name three rivers.", "How do I boil an egg?", "Write a line about the sea."),
    *("What is a prime number?", "Who wrote Hamlet?", "Give me a tip for sleeping well.", "What do bees eat?"),
    *("Translate 'good morning' into French.", "How far away is the moon?", "What is 17 times 3?", "Name a fruit."),
    *("Why do leaves fall?", "Explain what a bank does.", "What is the capital of Peru?", "How is paper made?"),
    *("Tell me a short joke.", "What makes bread rise?", "How many days has a leap year?", "What is an atom?"),
]


def main(
    export_path: Path,
    checkpoint_dir: Path = Path("checkpoints/SmolLM2-135M-Instruct"),
    adapter_path: list[Path] | None = None,
    adapter_scale: list[float] | None = None,
    peft_base: Path | None = None,
    engine: Literal["auto", "vllm"] = "auto",
    vllm_python: Path | None = None,
    prompt: list[str] | None = None,
    n_prompts: int = 4,
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
        engine: program that reads the export: "auto" is transformers, PEFT or llama.cpp, by what the export is; "vllm"
            is vLLM, for a folder of scripts/export_hf_checkpoint.py without custom code.
        vllm_python: the Python of the environment that vLLM is installed in.
        prompt: what to answer; may be given several times. Some questions if not given.
        n_prompts: number of those questions, at most 20.
        prompt_style: as in generate/aligner.py.
        max_new_tokens: length of the longest answer, in tokens.
        tolerance: largest difference between logits, float32 on both sides.
        least_correlation: least correlation of a GGUF file's log-probabilities with ours.
        allow_other_base: as in the export.
    """
    if not export_path.exists():
        raise FileNotFoundError(f"{export_path}: no such file or folder")
    if (engine == "vllm") != (vllm_python is not None):
        raise ValueError("--engine vllm and --vllm_python, which says where vLLM is, are given together or not at all")
    if vllm_python is not None and shutil.which(vllm_python) is None:
        raise FileNotFoundError(f"--vllm_python {vllm_python}: no such program; howto/export.md says how to make it")
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
    prompts = [tokenizer.encode(style.prompt(text), bos=style.bos) for text in prompt or PROMPTS[:n_prompts]]
    answers = generate(model, prompts, max_new_tokens, adapter=adapter, stop_ids=style.stop_ids)

    @torch.no_grad()
    def logits(ids: list[int]) -> Tensor:
        return model(torch.tensor([ids], device=model.device), adapter)[0].cpu()  # (T, V)

    if vllm_python is not None:
        agree, line = compare_with_vllm(vllm_python, export_path, prompts, answers, logits, tolerance)
    elif export_path.is_file():
        agree, line = compare_with_llama_cpp(export_path, prompts, answers, logits, least_correlation)
    else:
        read = transformers_engine(export_path, peft_base)
        agree, line = compare(read, prompts, answers, logits, tolerance)
    if not agree:
        raise ValueError(f"{export_path} is not what {checkpoint_dir} computes with these adapters; {line}")
    print(f"the same; {line}")


LIKELIEST = 50  # tokens at each place that llama.cpp is asked about
Logits = Callable[[list[int]], Tensor]  # (T, V) of token ids


def compare(
    read: Logits,
    prompts: list[list[int]],
    answers: list[list[int]],
    logits: Logits,
    tolerance: float,
) -> tuple[bool, str]:
    """Whether an engine's logits are ours, and a line on it."""
    difference, same, total = 0.0, 0, 0
    for ids, answer in zip(tqdm(prompts, desc="prompts", leave=False), answers, strict=True):
        ours, theirs = logits(ids + answer), read(ids + answer)
        difference = max(difference, (ours - theirs).abs().max().item())
        chosen = slice(len(ids) - 1, len(ids + answer) - 1)
        same += int((ours[chosen].argmax(-1) == theirs[chosen].argmax(-1)).sum())
        total += len(answer)
    line = (
        f"{len(prompts)} prompts: {same} of {total} greedy tokens the same, logits differ by at most {difference:.2g}"
    )
    return difference <= tolerance and same == total, line


def compare_with_llama_cpp(
    path: Path, prompts: list[list[int]], answers: list[list[int]], logits: Logits, least_correlation: float
) -> tuple[bool, str]:
    """The same for llama.cpp, which tells the log-probabilities of the likeliest tokens at each place."""
    llama_cpp = LlamaCpp(path, threads=torch.get_num_threads(), exact=True)
    difference, correlation, same, total = 0.0, 1.0, 0, 0
    for ids, answer in zip(tqdm(prompts, desc="prompts", leave=False), answers, strict=True):
        ours = logits(ids + answer)[len(ids) - 1 : -1].log_softmax(-1)  # (tokens of the answer, V)
        pairs = []
        for place, logprobs in enumerate(ours):
            for told in llama_cpp.complete(ids + answer[:place], 1, LIKELIEST).logprobs:  # of one place, if at all
                pairs.append(torch.stack([logprobs[list(told)], torch.tensor(list(told.values()))]))
                same += max(told, key=lambda token: told[token]) == int(logprobs.argmax())
                total += 1
        both = torch.cat(pairs, dim=1)  # (2, tokens of the answer * LIKELIEST)
        difference = max(difference, (both[0] - both[1]).abs().max().item())
        correlation = min(correlation, torch.corrcoef(both)[0, 1].item())
    line = (
        f"llama.cpp, {len(prompts)} prompts: {same} of {total} greedy tokens the same, log-probabilities of the "
        f"{LIKELIEST} likeliest tokens differ by at most {difference:.2g} and correlate at {correlation:.4f}"
    )
    return correlation >= least_correlation, line


def compare_with_vllm(
    python: Path,
    folder: Path,
    prompts: list[list[int]],
    answers: list[list[int]],
    logits: Logits,
    tolerance: float,
) -> tuple[bool, str]:
    """The same for vLLM, which tells the likeliest token of each place and the log-probability of the one there."""
    texts = [ids + answer for ids, answer in zip(prompts, answers, strict=True)]
    read = ask_vllm(python, folder, texts)
    difference, same, total = 0.0, 0, 0
    for ids, text, places in zip(tqdm(prompts, desc="prompts", leave=False), texts, read["texts"], strict=True):
        chosen = slice(len(ids) - 1, len(text) - 1)
        ours = logits(text)[chosen].log_softmax(-1)  # (tokens of the answer, V)
        likeliest, logprobs = (torch.tensor(values)[chosen] for values in zip(*places, strict=True))
        taken = ours.gather(-1, torch.tensor(text[len(ids) :])[:, None])[:, 0]
        difference = max(difference, (taken - logprobs).abs().max().item())
        same += int((ours.argmax(-1) == likeliest).sum())
        total += len(taken)
    line = (
        f"vLLM {read['version']}, {len(prompts)} prompts: {same} of {total} greedy tokens the same, log-probabilities "
        f"of the answers' tokens differ by at most {difference:.2g}"
    )
    return difference <= tolerance and same == total, line


def ask_vllm(python: Path, folder: Path, texts: list[list[int]]) -> Any:
    """What `read_with_vllm` writes, run by the Python of another environment.

    Raises:
        ValueError: it fails; the message is the last line of what it said.
    """
    code = f"{inspect.getsource(read_with_vllm)}\nread_with_vllm()"
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR", **os.environ}
    settings.pop("PYTHONPATH", None)  # this project is not part of that environment
    with tempfile.TemporaryDirectory() as scratch:
        asked, answered = Path(scratch) / "texts.json", Path(scratch) / "read.json"
        asked.write_text(json.dumps(texts))
        command = [str(python), "-c", code, str(folder.absolute()), str(asked), str(answered)]
        done = subprocess.run(command, env=settings, cwd=scratch, capture_output=True, text=True)
        if done.returncode or not answered.is_file():
            said = done.stderr.strip().splitlines() or ["it says nothing"]
            raise ValueError(f"vLLM, run by {python}, cannot read {folder}: {said[-1]}")
        return json.loads(answered.read_text())


def read_with_vllm() -> None:
    """Read texts with vLLM, in its own environment. Arguments: a model's folder, a file of texts, the file to write.

    Of each text but its first token: the likeliest token there, and the log-probability of the one that is there.
    """
    import json
    import sys

    import vllm  # type: ignore[import-not-found]

    folder, asked, answered = sys.argv[1:]
    with open(asked) as file:
        prompts = [{"prompt_token_ids": ids} for ids in json.load(file)]
    longest = max(len(prompt["prompt_token_ids"]) for prompt in prompts) + 1
    engine = vllm.LLM(folder, dtype="float32", max_model_len=longest, enforce_eager=True, skip_tokenizer_init=True)
    sampling = vllm.SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1, detokenize=False)
    texts = []
    for output in engine.generate(prompts, sampling):
        ids, places = output.prompt_token_ids, output.prompt_logprobs
        likeliest = [next(id for id, found in place.items() if found.rank == 1) for place in places[1:]]
        logprobs = [place[id].logprob for id, place in zip(ids[1:], places[1:], strict=True)]
        texts.append(list(zip(likeliest, logprobs, strict=True)))
    with open(answered, "w") as file:
        json.dump({"version": vllm.__version__, "texts": texts}, file)


def transformers_engine(folder: Path, peft_base: Path | None) -> Logits:
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


if __name__ == "__main__":
    run(main)
