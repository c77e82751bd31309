"""Convert a Hugging Face checkpoint of a LLaMA-family model to this project's format.

    python scripts/convert_hf_checkpoint.py --checkpoint_dir models/Llama-2-7b-hf --output_dir checkpoints/Llama-2-7b

Scripts open a Hugging Face folder as it is, so this is for those who want one in Lit-LLaMA's layout, with hashes that
`--verify` checks. It reads Llama, Mistral, Qwen2, Qwen2.5, Qwen3 (dense), SmolLM3, Phi-3 and Phi-4 with plain rotary
embedding, Granite 3 (dense), Seed-OSS and InternLM3 of any size, from safetensors or `.bin` files, in one part or
several. If attention has a sliding window, the longest context of the converted model is the length of that window,
because up to there the result is the same.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch

from lit_llama.checkpoint import CONFIG_FILE
from lit_llama.conversion import copy_tokenizer, write_base
from lit_llama.devices.precision import DType
from lit_llama.files import atomic_folder
from lit_llama.formats.hf_weights import open_hf
from lit_llama.script.command_line import run


def main(checkpoint_dir: Path, output_dir: Path, dtype: DType | None = None, overwrite: bool = False) -> None:
    """Convert one checkpoint.

    Args:
        checkpoint_dir: folder that holds config.json, the weights and the tokenizer.
        output_dir: folder that is written.
        dtype: number format of the weights on disk; if not given, they keep the format that they have.
        overwrite: replace the folder if it exists already.
    """
    config, tensors = open_hf(checkpoint_dir)
    config = replace(config, name=output_dir.name)
    source = {"format": "hf", "from": checkpoint_dir.name}
    with atomic_folder(output_dir, overwrite, CONFIG_FILE) as folder:
        copy_tokenizer(checkpoint_dir, folder)
        write_base(folder, config, tensors, source, dtype and getattr(torch, dtype))
    print(f"base model: {output_dir} (scripts that open it check its files if given --verify)", file=sys.stderr)


if __name__ == "__main__":
    run(main)
