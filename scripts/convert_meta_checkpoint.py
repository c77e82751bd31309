"""Convert Meta's own LLaMA checkpoint to this project's format.

    python scripts/convert_meta_checkpoint.py --checkpoint_dir models/llama-2-7b --output_dir checkpoints/Llama-2-7B

The folder holds `params.json` and `consolidated.00.pth`, `consolidated.01.pth` and so on, which are the slices of one
model for that many GPUs; they are joined. `tokenizer.model` is in the same folder or in the one above.
"""

import sys
from pathlib import Path

import torch

from lit_llama.checkpoint import CONFIG_FILE
from lit_llama.conversion import copy_tokenizer, write_base
from lit_llama.devices.precision import DType
from lit_llama.fields import check_object
from lit_llama.files import atomic_folder, read_json
from lit_llama.formats.meta import NAMES, MergedTensors, config_from_meta
from lit_llama.formats.names import LitTensors
from lit_llama.script.command_line import run
from lit_llama.tensor_files import TensorFiles


def main(
    checkpoint_dir: Path,
    output_dir: Path,
    dtype: DType | None = None,
    block_size: int | None = None,
    overwrite: bool = False,
) -> None:
    """Convert one checkpoint.

    Args:
        checkpoint_dir: folder that holds params.json and the files consolidated.NN.pth.
        output_dir: folder that is written.
        dtype: number format of the weights on disk; if not given, they keep the format that they have.
        block_size: longest context in tokens, which params.json does not say; if not given, it is that of the LLaMA
            generation that the other values point to.
        overwrite: replace the folder if it exists already.
    """
    params_file = checkpoint_dir / "params.json"
    params = check_object(read_json(params_file), params_file)
    missing = [field for field in ("dim", "n_layers", "n_heads", "norm_eps") if params.get(field) is None]
    if missing:
        raise ValueError(f"{params_file} lacks {', '.join(missing)}")
    files = sorted(checkpoint_dir.glob("consolidated.*.pth"))
    if not files:
        raise FileNotFoundError(f"{checkpoint_dir} holds no weights: expected consolidated.00.pth, ...")
    tensors = MergedTensors([TensorFiles([file], ignore=r"rope\.freqs") for file in files], params["dim"])
    config = config_from_meta(params, tensors, output_dir.name, block_size, params_file)
    has_tokenizer = (checkpoint_dir / "tokenizer.model").is_file() or (checkpoint_dir / "tokenizer.json").is_file()
    with atomic_folder(output_dir, overwrite, CONFIG_FILE) as folder:
        copy_tokenizer(checkpoint_dir if has_tokenizer else checkpoint_dir.parent, folder)
        source = {"format": "meta", "from": checkpoint_dir.name}
        weights = LitTensors(tensors, NAMES, config, checkpoint_dir.name)
        write_base(folder, config, weights, source, dtype and getattr(torch, dtype))
    print(f"base model: {output_dir} (scripts that open it check its files if given --verify)", file=sys.stderr)


if __name__ == "__main__":
    run(main)
