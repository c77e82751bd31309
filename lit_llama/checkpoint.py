"""Base models on disk: read and verify.

A base is a folder: `lit_config.json`, the tokenizer's own files, and weights in safetensors under Lit-LLaMA's names,
sharded with Hugging Face's kind of index when large. Hugging Face's own folders are read as they are, and so is a plain
Lit-LLaMA `.pth` file.
"""

import hashlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from lit_llama.config import PRESETS, LLaMAConfig
from lit_llama.devices.quantization import Quantize, is_quantized, load_quantized, use_quantized_layers
from lit_llama.devices.sharding import local_rows, shard
from lit_llama.fields import check_object, naming, take
from lit_llama.files import read_json
from lit_llama.formats.hf_weights import HF_CONFIG_FILE, open_hf, read_hf_config
from lit_llama.model import LLaMA, parameter_shapes
from lit_llama.shapes import without_values
from lit_llama.tensor_files import TensorFiles, check_shape, refuse_names, weight_files
from lit_llama.tokenizer import TOKENIZER_FILES

if TYPE_CHECKING:  # slow to import, which --help should not be
    from torch.distributed.device_mesh import DeviceMesh

CONFIG_FILE = "lit_config.json"


def verify_base(checkpoint_dir: Path) -> int:
    """Compare every byte of a base's weights, its tokenizer and its sizes with the hashes that its conversion wrote.

    Reads the whole model. Loading alone notices files that are cut off, but no values that changed.

    Args:
        checkpoint_dir: folder of the base model.

    Returns:
        The number of files that were compared; 0, with a warning, for a model that was converted before there were
        hashes.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: something is not what the conversion wrote.
    """
    if checkpoint_dir.is_file() or is_hf(checkpoint_dir):
        kind = "bare file" if checkpoint_dir.is_file() else "Hugging Face folder"
        warnings.warn(f"{checkpoint_dir} is a {kind}, which has no hash to check", stacklevel=2)
        return 0
    read_config(checkpoint_dir)  # refuses what is not a configuration
    file = checkpoint_dir / CONFIG_FILE
    content = check_object(read_json(file), file)
    expected = take(content, "sha256", dict, file, {})
    if not expected:
        warnings.warn(f"{file} has no hash to check: convert the model again to have one", stacklevel=2)
        return 0
    found = base_hashes(checkpoint_dir, content["config"])
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            what = f"the configuration in {file}" if name == "config" else f"{checkpoint_dir / name}"
            raise ValueError(f"{what} is not what the conversion wrote (its hash differs): convert the model again")
    return len(found) - 1


def base_hashes(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """SHA-256 of what a base computes with: each file of weights, the tokenizer, and the configuration but its name.

    Args:
        folder: the base's.
        config: fields of the configuration as they are in its file, which may be older than some fields.
    """
    files = weight_files(folder) + [folder / name for name in TOKENIZER_FILES[:2] if (folder / name).is_file()]
    hashes = {}
    for file in tqdm(files, desc="hashing", unit="file", leave=False):
        digest = hashlib.sha256()
        with open(file, "rb") as content:
            while block := content.read(2**20):
                digest.update(block)
        hashes[file.name] = digest.hexdigest()
    sizes = json.dumps({**config, "name": ""}, sort_keys=True)
    return hashes | {"config": hashlib.sha256(sizes.encode()).hexdigest()}


def read_config(checkpoint_dir: Path) -> LLaMAConfig:
    """The configuration of a base model's folder.

    Raises:
        FileNotFoundError: no such folder, or it is not a base model's.
        ValueError: its configuration is malformed, or this model cannot compute it.
    """
    if not checkpoint_dir.is_dir():
        raise FileNotFoundError(
            f"{checkpoint_dir}: no such folder; howto/download_weights.md says where base models come from"
        )
    if is_hf(checkpoint_dir):
        return read_hf_config(checkpoint_dir)
    file = checkpoint_dir / CONFIG_FILE
    if not file.is_file():
        raise FileNotFoundError(
            f"{checkpoint_dir} holds no {CONFIG_FILE} and no {HF_CONFIG_FILE}: give a Hugging Face folder, or convert "
            "the model with one of scripts/convert_*_checkpoint.py"
        )
    fields = take(check_object(read_json(file), file), "config", dict, file)
    with naming(file):
        return LLaMAConfig.from_dict(fields)


def is_hf(checkpoint_dir: Path) -> bool:
    """Whether a base model's folder is in Hugging Face's format."""
    return not (checkpoint_dir / CONFIG_FILE).is_file() and (checkpoint_dir / HF_CONFIG_FILE).is_file()


def open_weights(path: Path, config: LLaMAConfig | None = None) -> tuple[LLaMAConfig, Mapping[str, Tensor]]:
    """A base model on disk: its configuration, and its weights by Lit-LLaMA's names, read when they are asked for.

    Args:
        path: a folder of a conversion script, a Hugging Face folder, or a plain Lit-LLaMA `.pth` file.
        config: sizes of a `.pth` file that are not those of a known preset.

    Raises:
        FileNotFoundError: something is missing.
        ValueError: the files are damaged, or this model cannot compute what they hold.
    """
    if path.is_file():
        tensors = TensorFiles([path])
        return config or _infer_config(path, tensors), tensors
    if is_hf(path):
        return open_hf(path)
    return config or read_config(path), TensorFiles(weight_files(path))


def load_base(
    path: Path | str,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    config: LLaMAConfig | None = None,
    *,
    mesh: "DeviceMesh | None" = None,
    quantize: Quantize | None = None,
) -> LLaMA:
    """Load a base model, frozen, one tensor at a time. `verify_base` notices values that changed on the disk.

    Args:
        path: a folder of a conversion script, a Hugging Face folder, or a plain Lit-LLaMA `.pth` file.
        dtype: number format of the weights in memory.
        device: where to put the weights.
        config: sizes of a `.pth` file that are not those of a known preset.
        mesh: shard the weights over these processes, see `lit_llama.devices.sharding`.
        quantize: keep the blocks' weights in 4 or 8 bits, see `lit_llama.devices.quantization`.

    Returns:
        The model; its `fingerprint` is the weights'.

    Raises:
        FileNotFoundError: something is missing.
        ValueError: the files are damaged, or weights and configuration do not fit each other.
    """
    path, device = Path(path), torch.device(device)
    config, tensors = open_weights(path, config)
    with without_values():
        model = LLaMA(config)
    expected = {name: parameter.shape for name, parameter in model.named_parameters()}
    if expected.keys() != tensors.keys():
        refuse_names(path, expected.keys() - tensors.keys(), tensors.keys() - expected.keys())
    if mesh is not None:
        shard(model, mesh)
    if quantize is not None:
        use_quantized_layers(model, quantize, dtype)
    weights: dict[str, Tensor] = {}
    digest = hashlib.sha256()
    for name, shape in sorted(expected.items()):
        tensor = tensors[name]
        check_shape(name, tensor.shape, shape, str(path))
        digest.update(_sample(name, tensor))
        layer = model.get_submodule(name.rpartition(".")[0])
        if mesh is not None:
            weights[name] = local_rows(tensor, model.get_parameter(name), dtype)
        elif is_quantized(layer) and name.endswith(".weight"):
            load_quantized(layer, tensor, device, dtype)
        else:
            weights[name] = tensor.to(device=device, dtype=dtype)
    model.load_state_dict(weights, assign=True, strict=quantize is None)  # names were compared above
    model.fingerprint = digest.hexdigest()
    # The 4-bit kernels that bitsandbytes has for evaluation on a CPU give wrong gradients. Nothing else tells the
    # modes apart.
    return model.requires_grad_(False).train(quantize is not None)


def model_without_weights(config: LLaMAConfig, tensors: Mapping[str, Tensor]) -> LLaMA:
    """A model on the meta device with the fingerprint of some weights, to tell what belongs to them.

    Args:
        config: configuration of the model.
        tensors: its weights by their Lit-LLaMA names; a few values of each are read.
    """
    with without_values():
        model = LLaMA(config)
    model.fingerprint = base_fingerprint(tensors)
    return model


def base_fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """The `LLaMA.fingerprint` of a base's weights, by their Lit-LLaMA names, without loading it."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(_sample(name, tensors[name]))
    return digest.hexdigest()


def _sample(name: str, tensor: Tensor) -> bytes:
    """Name, shape and 64 values of a tensor, rounded to bfloat16 so that float32 and bfloat16 copies agree."""
    flat = tensor.flatten()
    values = flat[:: max(1, flat.numel() // 64)][:64].to(torch.bfloat16)
    return f"{name} {tuple(tensor.shape)}".encode() + values.contiguous().view(torch.int16).numpy().tobytes()


def _infer_config(path: Path, tensors: TensorFiles) -> LLaMAConfig:
    """The preset with the sizes of a bare Lit-LLaMA file, which says nothing about itself."""
    shapes = {name: tensors[name].shape for name in tensors}
    for preset in PRESETS:
        if shapes == parameter_shapes(preset):
            # Lit-LLaMA computes with this epsilon and window for every generation of LLaMA.
            return replace(preset, name=path.stem, norm_eps=1e-5, block_size=2048)
    embedding = shapes.get("transformer.wte.weight")
    found = f"its embedding is {tuple(embedding)}" if embedding else "it has no transformer.wte.weight"
    raise ValueError(
        f"{path} is not a Lit-LLaMA file of a known size ({found}): "
        "pass config=LLaMAConfig(...), or convert the original model with one of scripts/convert_*_checkpoint.py"
    )
