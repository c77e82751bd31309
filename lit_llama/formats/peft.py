"""PEFT's folders of adapters: a LoRA, or vectors that are added to the outputs of projections, its tuner `beft`.

https://huggingface.co/docs/peft/developer_guides/checkpoint, https://huggingface.co/docs/peft/package_reference/beft
"""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lit_llama.bias import Bias, Target
from lit_llama.combine import WeightedSum
from lit_llama.config import LLaMAConfig
from lit_llama.fields import check_object, take
from lit_llama.files import read_json, write_json
from lit_llama.formats.folding import added_vectors
from lit_llama.formats.hf import HF_LAYER, PROJECTIONS
from lit_llama.formats.names import halves_from_pairs, pairs_from_halves
from lit_llama.lora import LoRA
from lit_llama.safetensors_file import finite, read_tensors
from lit_llama.seam import Adapter
from lit_llama.tensor_files import check_shape, load_tensors

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
WEIGHT_FILES = (WEIGHTS_FILE, "adapter_model.bin")  # PEFT wrote the second one until version 0.6
MODULE = "base_model.model." + HF_LAYER  # and then the name of a projection


def write_peft(
    folder: Path,
    adapter: Adapter,
    config: LLaMAConfig,
    weights: Mapping[str, Tensor],
    base_name: str,
    metadata: Mapping[str, str],
) -> None:
    """Write an adapter as PEFT's adapter_config.json and adapter_model.safetensors.

    Args:
        folder: folder that exists, where both files are written.
        adapter: a LoRA, or a weighted sum of several, which becomes one; or adapters that add the same vectors at every
            position, such as prefixes of one token.
        config: configuration of the base model.
        weights: the base model's tensors by Lit-LLaMA names.
        base_name: what PEFT finds the base model by: OWNER/NAME on the hub, or a folder in Hugging Face's format.
        metadata: further texts by name for the file of the tensors, which `read_peft` returns.

    Raises:
        ValueError: the adapter is another one, or PEFT's would not do the same on this base model.
    """
    _refuse_scaled(config)
    if isinstance(adapter, WeightedSum):
        loras = [(one, scale) for one, scale in adapter.terms if isinstance(one, LoRA)]
        adapter = LoRA.merged(config, loras) if len(loras) == len(adapter.terms) else adapter
    fields, tensors = _lora(adapter, config) if isinstance(adapter, LoRA) else _vectors(adapter, config, weights)
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt", **metadata})
    common = {"task_type": "CAUSAL_LM", "base_model_name_or_path": base_name, "inference_mode": True}
    write_json(folder / CONFIG_FILE, {**fields, **common})


def _lora(lora: LoRA, config: LLaMAConfig) -> tuple[dict[str, Any], dict[str, Tensor]]:
    tensors: dict[str, Tensor] = {}
    for i in range(config.n_layer):
        for name, factors in lora.factors(i).items():
            module = MODULE.format(i) + PROJECTIONS[name]
            b = halves_from_pairs(factors.b.data, config.head_size) if name in "qk" else factors.b.data
            tensors |= {f"{module}.lora_A.weight": factors.a.data, f"{module}.lora_B.weight": b.contiguous()}
    fields = {
        "peft_type": "LORA",
        "r": lora.sizes["r"],
        "lora_alpha": lora.sizes["alpha"],
        "lora_dropout": lora.sizes["dropout"],
        "target_modules": _targets(lora.sizes["targets"]),
        "bias": "none",
        "fan_in_fan_out": False,
    }
    return fields, tensors


def _vectors(
    adapter: Adapter, config: LLaMAConfig, weights: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    layers = added_vectors(config, weights, adapter)
    if not layers[0]:
        raise ValueError("the adapter adds nothing, so that there is nothing to write")
    tensors = {
        f"{MODULE.format(i)}{PROJECTIONS[name]}.beft_bias": (
            halves_from_pairs(vector, config.head_size) if name in "qk" else vector
        )[None].contiguous()
        for i, vectors in enumerate(layers)
        for name, vector in vectors.items()
    }
    return {"peft_type": "BEFT", "target_modules": _targets(layers[0])}, tensors


def _targets(names: Iterable[str]) -> list[str]:
    return [PROJECTIONS[name].rpartition(".")[2] for name in names]


def is_peft(file: Path) -> bool:
    """Whether a file holds the tensors of an adapter in PEFT's format."""
    return file.name in WEIGHT_FILES and (file.parent / CONFIG_FILE).is_file()


def read_peft(file: Path, config: LLaMAConfig) -> tuple[LoRA | Bias, str, dict[str, str]]:
    """Read an adapter from PEFT's folder.

    Args:
        file: the folder's file of tensors.
        config: configuration of the base model, whose sizes PEFT does not write.

    Returns:
        The adapter, the name of its base model, and the texts in the file of tensors.

    Raises:
        ValueError: it is damaged, made for a model of other sizes, or something that the methods of this project cannot
            compute; the message names it.
    """
    place = file.parent / CONFIG_FILE
    fields = check_object(read_json(place), place)
    if file.suffix == ".safetensors":
        metadata, tensors = read_tensors(file, lambda header: header.metadata)
    else:
        metadata, tensors = {}, {name: finite(file, name, one) for name, one in load_tensors(file, file).items()}
    kind = take(fields, "peft_type", str, place)
    readers = {"LORA": _read_lora, "BEFT": _read_vectors}
    if kind not in readers:
        raise ValueError(f"{place}: peft_type is {kind[:40]!r}; PEFT's {' and '.join(readers)} can be read here")
    _refuse_scaled(config)
    adapter = readers[kind](file, fields, tensors, config)
    return adapter, take(fields, "base_model_name_or_path", str, place, ""), metadata


def _refuse_scaled(config: LLaMAConfig) -> None:
    if config.scaled_weights:
        raise ValueError(
            "the base model (Granite) multiplies by constants what a PEFT adapter adds, which are in its weights here: "
            "export it by scripts/export_hf_checkpoint.py, which makes it a Llama, and use that with PEFT and here"
        )


# Settings that do not change what the tensors mean. Every other one has to be off: null, false or empty.
_HARMLESS = {
    *("peft_type", "task_type", "base_model_name_or_path", "revision", "auto_mapping", "inference_mode"),
    *("peft_version", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "init_weights"),
    *("megatron_core", "fan_in_fan_out", "qalora_group_size", "eva_config", "ensure_weight_tying"),
}
_INITIALISATIONS = (True, False, "gaussian", "orthogonal", "eva")  # others change the weights of the base model, too


def _refuse_others(fields: dict[str, Any], understood: set[str], place: Path) -> None:
    for name, value in fields.items():
        if value and name not in _HARMLESS | understood:
            raise ValueError(f"{place}: {name} is {str(value)[:80]!r}, which adapters of this project cannot compute")


def _read_lora(file: Path, fields: dict[str, Any], tensors: dict[str, Tensor], config: LLaMAConfig) -> LoRA:
    place = file.parent / CONFIG_FILE
    understood = {"r", "lora_alpha", "lora_dropout", "use_rslora", "init_lora_weights", "bias"}
    _refuse_others(fields, understood, place)
    for name, possible in (("bias", ("none",)), ("init_lora_weights", _INITIALISATIONS)):
        if (found := fields.get(name, possible[0])) not in possible:
            raise ValueError(f"{place}: {name} is {found!r}, expected one of {', '.join(map(str, possible))}")
    rank = take(fields, "r", int, place, least=1, most=2**16)
    alpha = take(fields, "lora_alpha", float, place)
    if take(fields, "use_rslora", bool, place, False):  # scales by alpha / sqrt(r)
        alpha *= math.sqrt(rank)
    part_of = {
        f"{MODULE.format(i)}{PROJECTIONS[name]}.lora_{part.upper()}.weight": (i, name, part)
        for i in range(config.n_layer)
        for name in PROJECTIONS
        for part in "ab"
    }
    _check_names(file, tensors, part_of)
    targets = [name for name in PROJECTIONS if any(part_of[tensor][1] == name for tensor in tensors)]
    lora = LoRA(config, rank, alpha, take(fields, "lora_dropout", float, place, 0.0), targets)
    for tensor, (i, name, part) in part_of.items():
        if name in targets:
            parameter = lora.factors(i)[name].get_parameter(part)
            values = _values(file, tensors, tensor, parameter.shape)
            parameter.data = pairs_from_halves(values, config.head_size) if (name in "qk" and part == "b") else values
    return lora


def _read_vectors(file: Path, fields: dict[str, Any], tensors: dict[str, Tensor], config: LLaMAConfig) -> Bias:
    _refuse_others(fields, set(), file.parent / CONFIG_FILE)
    possible: tuple[Target, ...] = ("o", "v")
    names: dict[Target, list[str]] = {
        target: [f"{MODULE.format(i)}{PROJECTIONS[target]}.beft_bias" for i in range(config.n_layer)]
        for target in possible
    }
    target: Target = "v" if tensors.keys() & set(names["v"]) else "o"
    _check_names(file, tensors, names[target])
    bias = Bias(config, target)
    shape = torch.Size([1, bias.vectors.size(1)])
    bias.vectors.data = torch.cat([_values(file, tensors, name, shape) for name in names[target]])
    return bias


def _check_names(file: Path, tensors: Mapping[str, Tensor], possible: Iterable[str]) -> None:
    if not tensors or (unknown := tensors.keys() - set(possible)):
        some = ", ".join(sorted(unknown)[:3]) if tensors else "nothing"
        raise ValueError(
            f"{file} holds {some}, which adapters of this project do not have on this base model: a LoRA can be on any "
            "projection of its layers, and beft on o_proj or on v_proj"
        )


def _values(file: Path, tensors: Mapping[str, Tensor], name: str, shape: torch.Size) -> Tensor:
    """A tensor of the file, or zeros: PEFT leaves out layers that an adapter is not applied to."""
    if name not in tensors:
        return torch.zeros(shape)
    check_shape(name, tensors[name].shape, shape, str(file))
    return tensors[name]
