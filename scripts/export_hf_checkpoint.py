"""Export a base model, with adapters in it, to Hugging Face's format.

    python scripts/export_hf_checkpoint.py --output_dir export/base
    python scripts/export_hf_checkpoint.py --adapter_path out/demo/aligner.safetensors --output_dir export/captain
    python scripts/export_hf_checkpoint.py --adapter_path out/lora/lora.safetensors --format peft \\
        --base_name HuggingFaceTB/SmolLM2-135M-Instruct --output_dir export/lora

An Aligner of one token becomes biases and a LoRA is merged: the result is a stock `LlamaForCausalLM`, or the class of
its family, which transformers, vLLM and other programs that read this format load without custom code. For longer
prefixes, a small modelling file is added, which transformers runs if given `trust_remote_code=True`. `--format peft`
writes an Aligner of one token, a bias or a LoRA without the base model, for PEFT. scripts/verify_export.py checks the
result.
"""

import sys
from pathlib import Path
from typing import Literal

import torch

from lit_llama.checkpoint import base_fingerprint, open_weights
from lit_llama.conversion import copy_tokenizer
from lit_llama.devices.precision import DType
from lit_llama.files import atomic_folder, read_json, write_json
from lit_llama.formats.hf_export import write_model
from lit_llama.formats.peft import CONFIG_FILE, write_peft
from lit_llama.formats.tokenizer_files import write_for_transformers
from lit_llama.model import LLaMA
from lit_llama.script.command_line import run
from lit_llama.script.readme import write_readme
from lit_llama.shapes import without_values
from lit_llama.together import open_adapters
from lit_llama.tokenizer import Tokenizer


def main(
    output_dir: Path,
    checkpoint_dir: Path = Path("checkpoints/SmolLM2-135M-Instruct"),
    adapter_path: list[Path] | None = None,
    adapter_scale: list[float] | None = None,
    format: Literal["transformers", "peft"] = "transformers",
    dtype: DType | None = None,
    base_name: str | None = None,
    allow_other_base: bool = False,
    overwrite: bool = False,
) -> None:
    """Export.

    Args:
        output_dir: folder that is written.
        checkpoint_dir: folder of the base model.
        adapter_path: file or run folder of an adapter of any method; may be given several times, and then the sum of
            the adapters is exported.
        adapter_scale: factor by which the adapter is multiplied, 1 if not given; may be given once for each adapter.
        format: format of the export: "transformers" is the whole model, "peft" is the adapter without its base model: a
            LoRA, or Aligners of one token and biases, which are BEFT's vectors to PEFT.
        dtype: number format of the base model's weights on disk; if not given, they keep the format that they have.
            Biases, prefixes and what --format peft writes are always float32.
        base_name: name by which PEFT and the README refer to the base model: OWNER/NAME on the hub, or a folder in
            Hugging Face's format; if not given, the name that is recorded in --checkpoint_dir.
        allow_other_base: export adapters that were trained on other weights than those in --checkpoint_dir.
        overwrite: replace the folder if it exists already.
    """
    paths = adapter_path or []
    config, tensors = open_weights(checkpoint_dir)
    base_name = base_name or config.name or checkpoint_dir.name
    with without_values():
        base = LLaMA(config)
    base.fingerprint = base_fingerprint(tensors) if paths else ""
    adapter, infos = open_adapters(base, paths, adapter_scale, allow_other_base)
    if format == "peft":
        if adapter is None:
            raise ValueError("--format peft exports an adapter without its base model: give its file as --adapter_path")
        if dtype is not None:
            raise ValueError("--format peft always writes float32: leave out --dtype")
        metadata = {"base_fingerprint": base.fingerprint, "prompt_style": infos[0].style}
        with atomic_folder(output_dir, overwrite, CONFIG_FILE) as folder:
            write_peft(folder, adapter, config, tensors, base_name, metadata)
            write_readme(folder, output_dir.name, base_name, infos, Tokenizer(checkpoint_dir))
    else:
        with atomic_folder(output_dir, overwrite, "config.json") as folder:
            write_model(folder, config, tensors, adapter, dtype and getattr(torch, dtype))
            write_tokenizer(folder, checkpoint_dir)
            write_readme(folder, output_dir.name, base_name, infos, Tokenizer(checkpoint_dir))
    print(f"{format}: {output_dir}", file=sys.stderr)


def write_tokenizer(folder: Path, checkpoint_dir: Path) -> None:
    """Copy the tokenizer's files, and add to them and to config.json what transformers wants to know."""
    copy_tokenizer(checkpoint_dir, folder)
    write_for_transformers(folder)
    tokenizer = Tokenizer(folder)
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    write_json(folder / "config.json", read_json(folder / "config.json") | ids)
    generation_file = folder / "generation_config.json"
    if not generation_file.is_file():
        write_json(generation_file, {**ids, "eos_token_id": sorted(tokenizer.stop_ids)})


if __name__ == "__main__":
    run(main)
