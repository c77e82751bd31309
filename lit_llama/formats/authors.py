"""The Aligner files of the paper's authors: a `.pth` of torch, with the shared tokens repeated for each layer."""

import io
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from lit_llama.safetensors_file import finite
from lit_llama.tensor_files import load_tensors, refuse_names


def read_authors_aligner(path: Path) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Read an Aligner that the authors' code has written.

    Args:
        path: the file.

    Returns:
        The tensors under this project's names, and the `sizes` of the Aligner.

    Raises:
        ValueError: the file is damaged or not an Aligner, or its aliases are not what they should repeat.
    """
    data = path.read_bytes()
    tensors = load_tensors(path, io.BytesIO(data))
    shared = "global_value_embedding.weight"
    if shared not in tensors:
        raise ValueError(f"{path} is not an Aligner: it has no {shared}")
    layers = _layers(path, tensors)
    gates = [f"transformer.h.{i}.attn.gating_factor" for i in layers]
    aliases = [f"transformer.h.{i}.attn.adapter_wte.weight" for i in layers]
    unknown = set(tensors) - {shared, *gates, *aliases}
    if unknown:
        refuse_names(path, set(), unknown)
    for name, tensor in tensors.items():
        is_plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and tensor.is_floating_point()
        if not is_plain or tensor.nbytes > len(data):  # a tensor may claim to be larger than what it is stored in
            raise ValueError(f"{path}: {name} is not a tensor of floating-point numbers, all of them in the file")
    tokens = tensors[shared]
    if tokens.dim() != 2:
        raise ValueError(f"{path}: {shared} has shape {tuple(tokens.shape)}, expected (tokens, embedding)")
    for alias in aliases:
        if alias in tensors and not torch.equal(tensors[alias], tokens):
            raise ValueError(f"{path}: {alias} differs from {shared}, which an Aligner shares with every layer")
    heads = {tensors[gate].numel() for gate in gates}
    if len(heads) > 1:
        raise ValueError(f"{path}: gating_factor tensors have different numbers of heads: {sorted(heads)}")
    values = {"tokens": tokens, "gates": torch.stack([tensors[gate].flatten() for gate in gates])}
    sizes = {"n_layer": layers[-1] + 1, "n_head": heads.pop(), "n_embd": tokens.size(1)}
    sizes |= {"length": tokens.size(0), "start_layer": layers[0]}
    return {name: finite(path, name, tensor) for name, tensor in values.items()}, sizes


def _layers(path: Path, tensors: Mapping[str, Tensor]) -> list[int]:
    """The layers that have gates, in order, which must follow one another."""
    layers = sorted(
        int(m[1]) for name in tensors if (m := re.fullmatch(r"transformer\.h\.(\d+)\.attn\.gating_factor", name))
    )
    if not layers or layers != list(range(layers[0], layers[-1] + 1)):
        raise ValueError(
            f"{path} is not an Aligner: expected gating_factor tensors of consecutive layers, found {layers}"
        )
    return layers
