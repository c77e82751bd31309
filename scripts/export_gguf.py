"""Put an Aligner of one token, or a bias, into a GGUF file for llama.cpp, Ollama, LM Studio and programs built on them.

    python scripts/export_gguf.py --gguf_path checkpoints/SmolLM2-135M-Instruct.Q4_1.gguf \\
        --adapter_path out/demo/aligner.safetensors --output_path export/captain.gguf

Copies the file, quantised or not, with all its metadata and every tensor byte for byte, and adds a bias to each layer.
An Aligner of one token is a bias of the attention's output projection, which is `blk.L.attn_output.bias` in the file. A
bias of the value projection is `blk.L.attn_v.bias`. Those of several adapters are added up. The model gets another name
in the file, so that engines can tell it from the base model. The copy is read back and compared before it is moved to
its place.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from lit_llama.base import open_adapters
from lit_llama.checkpoint import base_fingerprint
from lit_llama.config import LLaMAConfig
from lit_llama.files import atomic_file, require_extra
from lit_llama.formats.folding import added_vectors
from lit_llama.formats.gguf import HALVED_ROTARY, NAMES, GGUFTensors, config_from_gguf, open_gguf, with_zero_biases
from lit_llama.formats.names import LitTensors
from lit_llama.model import LLaMA
from lit_llama.script.command_line import run
from lit_llama.seam import Adapter

BIASES = {"v": "blk.{}.attn_v.bias", "o": "blk.{}.attn_output.bias"}  # that llama.cpp's LLaMA looks for


def main(
    gguf_path: Path,
    output_path: Path,
    adapter_path: list[Path],
    adapter_scale: list[float] | None = None,
    name: str | None = None,
    overwrite: bool = False,
    allow_other_base: bool = False,
) -> None:
    """Export.

    Args:
        gguf_path: GGUF file of the base model.
        output_path: file that is written.
        adapter_path: file or run folder of an Aligner of one token, or of a bias; may be given several times, and then
            the sum of the adapters is exported.
        adapter_scale: factor by which the adapter is multiplied, 1 if not given; may be given once for each adapter.
        name: name of the model in the file (`general.name`), which engines show; if not given, the name of the base
            model and that of the new file.
        overwrite: replace the file if it exists already.
        allow_other_base: export an adapter that was trained on other weights, such as the same model's before it was
            quantised.
    """
    if output_path.exists() and not overwrite:
        raise ValueError(f"{output_path} exists already; --overwrite replaces it")
    reader, fields = open_gguf(gguf_path)
    weights = GGUFTensors(reader)
    if any(name.endswith((".attn_v.bias", ".attn_output.bias")) for name in weights):
        raise ValueError(f"{gguf_path} has biases already: export from the base model, with all adapters at once")
    config = config_from_gguf(fields, weights, gguf_path.stem, gguf_path)
    halved = HALVED_ROTARY[fields["general.architecture"]]
    tensors = LitTensors(with_zero_biases(weights, config), NAMES, config, gguf_path.name, halved)
    with torch.device("meta"):
        base = LLaMA(config)
    base.fingerprint = base_fingerprint(tensors)
    adapter, _ = open_adapters(base, adapter_path, adapter_scale, allow_other_base)
    assert adapter is not None
    biases = fold_all(config, tensors, adapter)
    name = name or f"{fields.get('general.name') or gguf_path.stem} {output_path.stem}"
    with atomic_file(output_path) as temporary:
        write(temporary, reader, biases, name)
        verify(temporary, reader, biases, name)
    print(f"gguf: {output_path}", file=sys.stderr)


def fold_all(config: LLaMAConfig, tensors: Mapping[str, Tensor], adapter: Adapter) -> dict[str, np.ndarray]:
    """The biases by name, float32; zeros for layers to which the adapter adds nothing.

    Raises:
        ValueError: there is more in the adapter than biases that llama.cpp reads.
    """
    layers = added_vectors(config, tensors, adapter)
    if others := layers[0].keys() - BIASES.keys():
        raise ValueError(
            f"the adapter adds a bias to the projection {', '.join(sorted(others))}; llama.cpp's LLaMA has them on "
            f"{' and '.join(BIASES)}"
        )
    return {
        BIASES[name].format(i): vector.numpy() for i, vectors in enumerate(layers) for name, vector in vectors.items()
    }


def write(path: Path, reader: Any, biases: dict[str, np.ndarray], name: str) -> None:
    """Copy an open GGUF file with biases added and a name of its own."""
    gguf = require_extra("gguf", "gguf")
    writer = gguf.GGUFWriter(path, reader.fields[gguf.Keys.General.ARCHITECTURE].contents(), endianess=reader.endianess)
    writer.data_alignment = reader.alignment
    writer.add_name(name)
    written = (gguf.Keys.General.ARCHITECTURE, gguf.Keys.General.NAME)
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in written:
            continue
        kind = field.types[0]
        sub_type = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, sub_type=sub_type)
    tensors = [(tensor.name, tensor.data, tensor.tensor_type) for tensor in reader.tensors]
    tensors += [(name, bias, gguf.GGMLQuantizationType.F32) for name, bias in biases.items()]
    for name, data, kind in tensors:
        writer.add_tensor_info(name, data.shape, data.dtype, data.nbytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, data, _ in tqdm(tensors, desc="writing", unit="tensor", leave=False):
        writer.write_tensor_data(data, tensor_endianess=reader.endianess)
    writer.close()


def verify(path: Path, reader: Any, biases: dict[str, np.ndarray], name: str) -> None:
    """Read a copy back and compare it with its source.

    Raises:
        ValueError: they differ.
    """
    copy, fields = open_gguf(path)
    found = {tensor.name: tensor for tensor in copy.tensors}
    same = len(found) == len(reader.tensors) + len(biases) and all(
        found[tensor.name].tensor_type == tensor.tensor_type and np.array_equal(found[tensor.name].data, tensor.data)
        for tensor in reader.tensors
    )
    same = same and all(np.array_equal(found[name].data, bias) for name, bias in biases.items())
    expected = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    expected["general.name"] = name
    if not same or any(fields[key] != value for key, value in expected.items()):
        raise ValueError(f"{path} was not written as it should be; is there room on the disk?")


if __name__ == "__main__":
    run(main)
