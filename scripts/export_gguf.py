"""Put an Aligner of one token, or a bias, into a GGUF file for llama.cpp, Ollama, LM Studio and programs built on them.

    python scripts/export_gguf.py --gguf_path checkpoints/SmolLM2-135M-Instruct.Q4_1.gguf \\
        --adapter_path out/demo/aligner.safetensors --output_path export/captain.gguf

Copies the file, quantised or not, with all its metadata and every tensor byte for byte, and adds a bias to each layer.
An Aligner of one token is a bias of the attention's output projection, which is `blk.L.attn_output.bias` in the file. A
bias of the value projection is `blk.L.attn_v.bias`. Those of several adapters are added up, and to those that the file
has. The model gets another name in the file, so that engines can tell it from the base model. The copy is read back and
compared before it is moved to its place.

llama.cpp's Qwen2 has no place for a bias of the output projection, but its LLaMA does, and computes the same: a file of
that family becomes one of architecture `llama`. The rows of queries and keys stand in another order there, so they are
moved, whole rows with their quantised blocks as they are. llama.cpp's Qwen3 has a place for biases of the value
projection alone.
"""

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from lit_llama.checkpoint import base_fingerprint
from lit_llama.config import LLaMAConfig
from lit_llama.files import atomic_file, require_extra
from lit_llama.formats.folding import added_vectors
from lit_llama.formats.gguf import GGUFTensors, config_from_gguf, lit_tensors, open_gguf
from lit_llama.formats.names import pairs_from_halves
from lit_llama.model import LLaMA
from lit_llama.script.command_line import run
from lit_llama.seam import Adapter
from lit_llama.shapes import without_values
from lit_llama.together import open_adapters

BIASES = {"v": "blk.{}.attn_v.bias", "o": "blk.{}.attn_output.bias"}
# By the architecture of the source, that of the new file, and the projections whose biases llama.cpp reads there.
ARCHITECTURES = {"llama": ("llama", "vo"), "qwen2": ("llama", "vo"), "qwen3": ("qwen3", "v")}


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
    config = config_from_gguf(fields, weights, gguf_path.stem, gguf_path)
    tensors = lit_tensors(fields, weights, config, gguf_path.name)
    with without_values():
        base = LLaMA(config)
    base.fingerprint = base_fingerprint(tensors)
    adapter, _ = open_adapters(base, adapter_path, adapter_scale, allow_other_base)
    assert adapter is not None
    source = fields["general.architecture"]
    architecture, readable = ARCHITECTURES[source]
    biases = fold_all(config, tensors, weights, adapter, readable)
    contents = with_biases(reader, biases, config.head_size if source != architecture else None)
    name = name or f"{fields.get('general.name') or gguf_path.stem} {output_path.stem}"
    metadata = {
        re.sub(rf"\A{source}\.", f"{architecture}.", field.name): field
        for field in reader.fields.values()
        if not field.name.startswith("GGUF.") and field.name not in ("general.architecture", "general.name")
    }
    with atomic_file(output_path) as temporary:
        write(temporary, reader, architecture, name, metadata, contents)
        verify(temporary, architecture, name, metadata, contents)
    print(f"gguf: {output_path}", file=sys.stderr)


def fold_all(
    config: LLaMAConfig,
    tensors: Mapping[str, Tensor],
    source: Mapping[str, Tensor],
    adapter: Adapter,
    readable: str,
) -> dict[str, np.ndarray]:
    """The biases of the new file by name, float32: the source's own, if it has them, and what the adapter adds.

    Args:
        config: configuration of the base model.
        tensors: its weights by Lit-LLaMA's names.
        source: the tensors of its file.
        adapter: what is folded.
        readable: the projections whose biases llama.cpp reads.

    Raises:
        ValueError: there is more in the adapter than biases that llama.cpp reads.
    """
    layers = added_vectors(config, tensors, adapter)
    if others := layers[0].keys() - set(readable):
        raise ValueError(
            f"the adapter adds biases to the projection {' and '.join(sorted(others))}, and llama.cpp reads only those "
            f"of {' and '.join(readable)} in a model of this architecture; scripts/export_hf_checkpoint.py takes all"
        )
    biases: dict[str, np.ndarray] = {}
    for i, vectors in enumerate(layers):
        for projection, vector in vectors.items():
            name = BIASES[projection].format(i)
            biases[name] = (vector + source[name] if name in source else vector).numpy()
    return biases


Contents = dict[str, tuple[np.ndarray, Any]]  # by the names of tensors, data as they are in the file, and their type


def with_biases(reader: Any, biases: dict[str, np.ndarray], head_size: int | None) -> Contents:
    """The tensors of an open GGUF file with biases among them.

    Args:
        reader: the file.
        biases: by name, float32; in the place of the file's own.
        head_size: size of a head, if the rows of queries and keys are to be moved from two halves to pairs.
    """
    contents: Contents = {}
    for tensor in reader.tensors:
        data = tensor.data
        if head_size is not None and re.search(r"\.attn_[qk]\.", tensor.name):
            data = pairs_from_halves(torch.from_numpy(np.array(data)), head_size).numpy()
        contents[tensor.name] = data, tensor.tensor_type
    float32 = require_extra("gguf", "gguf").GGMLQuantizationType.F32
    return contents | {name: (bias, float32) for name, bias in biases.items()}


def write(
    path: Path, reader: Any, architecture: str, name: str, metadata: Mapping[str, Any], contents: Contents
) -> None:
    """Write a GGUF file with the metadata and the byte order of an open one."""
    gguf = require_extra("gguf", "gguf")
    writer = gguf.GGUFWriter(path, architecture, endianess=reader.endianess)
    writer.data_alignment = reader.alignment
    writer.add_name(name)
    for key, field in metadata.items():
        kind = field.types[0]
        sub_type = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(key, field.contents(), kind, sub_type=sub_type)
    for tensor, (data, kind) in contents.items():
        writer.add_tensor_info(tensor, data.shape, data.dtype, data.nbytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for data, _ in tqdm(contents.values(), desc="writing", unit="tensor", leave=False):
        writer.write_tensor_data(data, tensor_endianess=reader.endianess)
    writer.close()


def verify(path: Path, architecture: str, name: str, metadata: Mapping[str, Any], contents: Contents) -> None:
    """Read a file back and compare it with what it should be.

    Raises:
        ValueError: they differ.
    """
    copy, fields = open_gguf(path)
    found = {tensor.name: tensor for tensor in copy.tensors}
    same = found.keys() == contents.keys() and all(
        found[tensor].tensor_type == kind and np.array_equal(found[tensor].data, data)
        for tensor, (data, kind) in contents.items()
    )
    expected = {key: field.contents() for key, field in metadata.items()}
    expected |= {"general.architecture": architecture, "general.name": name}
    if not same or any(fields[key] != value for key, value in expected.items()):
        raise ValueError(f"{path} was not written as it should be; is there room on the disk?")


if __name__ == "__main__":
    run(main)
