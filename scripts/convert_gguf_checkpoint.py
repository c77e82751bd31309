"""Convert a GGUF file of a LLaMA-family model, quantised or not, to this project's format.

    python scripts/convert_gguf_checkpoint.py --gguf_path model.gguf --output_dir checkpoints/model

Weights are dequantised with the `gguf` library (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md); the
tokenizer is rebuilt from the vocabulary in the file.
"""

import sys
from pathlib import Path

import torch

from lit_llama.checkpoint import CONFIG_FILE
from lit_llama.conversion import write_base
from lit_llama.devices.precision import DType
from lit_llama.fields import take
from lit_llama.files import atomic_folder
from lit_llama.formats.gguf import GGUFTensors, config_from_gguf, lit_tensors, open_gguf
from lit_llama.formats.gguf_tokenizer import write_tokenizer
from lit_llama.script.command_line import run


def main(
    gguf_path: Path,
    output_dir: Path,
    dtype: DType = "float32",
    pre_tokenizer: str | None = None,
    overwrite: bool = False,
) -> None:
    """Convert one file.

    Args:
        gguf_path: GGUF file of the model.
        output_dir: folder that is written.
        dtype: number format of the weights on disk; float32 holds dequantised weights exactly.
        pre_tokenizer: way in which text is cut before the merges of BPE, as llama.cpp calls it, such as "llama-bpe",
            "qwen2" or "tekken"; needed only where the file does not say.
        overwrite: replace the folder if it exists already.
    """
    reader, fields = open_gguf(gguf_path)
    tensors = GGUFTensors(reader)
    if pre_tokenizer is not None:
        fields["tokenizer.ggml.pre"] = pre_tokenizer
    config = config_from_gguf(fields, tensors, output_dir.name, gguf_path)
    title = take(fields, "general.name", str, gguf_path, None)
    source = {"format": "gguf", "from": gguf_path.name, "name": title}
    with atomic_folder(output_dir, overwrite, CONFIG_FILE) as folder:
        write_tokenizer(fields, folder, gguf_path)
        weights = lit_tensors(fields, tensors, config, gguf_path.name)
        write_base(folder, config, weights, source, getattr(torch, dtype))
    print(f"base model: {output_dir} (scripts that open it check its files if given --verify)", file=sys.stderr)


if __name__ == "__main__":
    run(main)
