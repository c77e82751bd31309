"""Convert a Hugging Face checkpoint of a LLaMA-family model to this project's format.

    python scripts/convert_hf_checkpoint.py --checkpoint_dir models/Llama-2-7b-hf --output_dir checkpoints/Llama-2-7b

Reads `LlamaForCausalLM` and `MistralForCausalLM` of any size, from safetensors or `.bin` files, in one part or several.
If attention has a sliding window, the longest context of the converted model is the length of that window, because up
to there the result is the same.
"""

import sys
from pathlib import Path

import torch

from lit_llama.checkpoint import CONFIG_FILE
from lit_llama.conversion import copy_tokenizer, write_base
from lit_llama.devices.precision import DType
from lit_llama.files import atomic_folder, read_json
from lit_llama.formats.hf import NAMES, config_from_hf
from lit_llama.script.command_line import run
from lit_llama.tensor_files import TensorFiles, weight_files


def main(checkpoint_dir: Path, output_dir: Path, dtype: DType | None = None, overwrite: bool = False) -> None:
    """Convert one checkpoint.

    Args:
        checkpoint_dir: folder that holds config.json, the weights and the tokenizer.
        output_dir: folder that is written.
        dtype: number format of the weights on disk; if not given, they keep the format that they have.
        overwrite: replace the folder if it exists already.
    """
    files = weight_files(checkpoint_dir)
    config_file = checkpoint_dir / "config.json"
    config = config_from_hf(read_json(config_file), output_dir.name, config_file)
    tensors = TensorFiles(
        files, ignore=r".*rotary_emb\.inv_freq" + (r"|lm_head\.weight" if config.tie_embeddings else "")
    )
    source = {"format": "hf", "from": checkpoint_dir.name}
    with atomic_folder(output_dir, overwrite, CONFIG_FILE) as folder:
        copy_tokenizer(checkpoint_dir, folder)
        write_base(folder, config, tensors, NAMES, source, dtype and getattr(torch, dtype), halved_rotary=True)
    print(f"base model: {output_dir} (scripts that open it check its files if given --verify)", file=sys.stderr)


if __name__ == "__main__":
    run(main)
