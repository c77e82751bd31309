"""Writing a base model, with adapters in it, as a Hugging Face folder that stock programs load."""

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from lit_llama.config import LLaMAConfig
from lit_llama.files import write_json
from lit_llama.formats.folding import FoldedLayer, biased, fold
from lit_llama.formats.hf import HF_LAYER, NAMES, PROJECTIONS, config_to_hf
from lit_llama.formats.names import halves_from_pairs, source_names
from lit_llama.model import ROTARY_PARTS
from lit_llama.seam import Adapter, LayerAdapter
from lit_llama.tensor_files import write_weights

MODELING_FILE = Path(__file__).with_name("modeling_prefix_llama.py")
NORMS = ("rms_1.scale", "rms_2.scale", "attn.q_norm.scale", "attn.k_norm.scale")  # of a layer, where it has them


def write_model(
    folder: Path,
    config: LLaMAConfig,
    tensors: Mapping[str, Tensor],
    adapter: Adapter | None,
    dtype: torch.dtype | None,
) -> None:
    """Write weights and config.json, one shard and one layer in memory at a time.

    A base model without an adapter keeps its class. What is folded into one that has no place for it there makes it
    another: a bias of the output projection makes a Qwen2 a Llama with `attention_bias`, which computes the same.

    Args:
        folder: where to write; nobody reads it yet.
        config: configuration of the base model.
        tensors: its weights by Lit-LLaMA's names, best read lazily.
        adapter: what is folded into them, if anything.
        dtype: number format of the weights on disk; as they come if None. Biases and prefixes are float32.

    Raises:
        ValueError: the adapter adds something that no class of transformers has a place for.
    """
    added = [LayerAdapter() if adapter is None else adapter.layer(i) for i in range(config.n_layer)]
    longer = [[length for prefix in layer.prefixes if (length := prefix.tokens.size(1)) > 1] for layer in added]
    biases = set().union(*(biased(config, layer) for layer in added))
    if not biases <= set("qkvo"):
        raise ValueError(
            f"the adapter adds biases to {', '.join(sorted(biases - set('qkvo')))}, where a stock LLaMA has none"
        )
    has_qkv = bool(biases & set("qkv"))
    # A class with biases on q, k and v alone is Qwen2's, which the modelling file of longer prefixes does not know.
    is_qwen2 = has_qkv and config.qkv_bias and not any(longer)
    has_o = "o" in biases or (has_qkv and not is_qwen2)
    fields = config_to_hf(replace(config, qkv_bias=has_qkv, o_bias=has_o))
    names = "qkvo" if fields.get("attention_bias") else "qkv" if has_qkv else ""

    def groups() -> Iterator[dict[str, Tensor]]:
        outside = [name for name in tensors if ".h." not in name]
        yield {NAMES[name][0]: tensors[name].to(dtype) for name in outside}
        for i in range(config.n_layer):
            layer = fold(config, tensors, i, added[i])
            yield layer_tensors(i, layer, names, config.head_size, dtype) | norms(i, tensors, config.head_size, dtype)

    write_weights(folder, groups(), 1 + config.n_layer)
    if any(longer):
        shutil.copyfile(MODELING_FILE, folder / MODELING_FILE.name)
        stem = f"Prefix{fields['architectures'][0].removesuffix('ForCausalLM')}"
        fields |= {
            "architectures": [f"{stem}ForCausalLM"],
            "model_type": f"prefix_{fields['model_type']}",
            "auto_map": {
                "AutoConfig": f"{MODELING_FILE.stem}.{stem}Config",
                "AutoModelForCausalLM": f"{MODELING_FILE.stem}.{stem}ForCausalLM",
            },
            "prefix_lengths": longer,
        }
    fields["dtype"] = str(dtype or tensors["transformer.wte.weight"].dtype).removeprefix("torch.")
    write_json(folder / "config.json", fields)


def layer_tensors(
    index: int, layer: FoldedLayer, biases: str, head_size: int, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """A layer's projections under Hugging Face's names, where each head's rotary pairs stand as two halves.

    Args:
        index: number of the layer.
        layer: what is written.
        biases: projections that have a bias in every layer; it is zero where there is nothing to add.
        head_size: size of a head.
        dtype: number format of the weights; as they come if None.
    """
    found: dict[str, Tensor] = {}
    for name, weight in layer.weights.items():
        module = HF_LAYER.format(index) + PROJECTIONS[name]
        rows = halves_from_pairs(weight, head_size) if name in "qk" else weight
        found[f"{module}.weight"] = rows.to(dtype).contiguous()
        if name in biases:
            bias = layer.biases.get(name, torch.zeros(weight.size(0)))
            found[f"{module}.bias"] = halves_from_pairs(bias, head_size) if name in "qk" else bias
    if layer.prefixes:
        keys, values = ([getattr(prefix, part)[0] for prefix in layer.prefixes] for part in "kv")  # (nh, N, hs) each
        k, v = torch.cat(keys, dim=1), torch.cat(values, dim=1)
        pairs = k.transpose(1, 2).flatten(0, 1)  # (nh * hs, N)
        k = halves_from_pairs(pairs, head_size).unflatten(0, (-1, head_size)).transpose(1, 2)
        attention = HF_LAYER.format(index) + "self_attn"
        found |= {f"{attention}.prefix_k": k.contiguous(), f"{attention}.prefix_v": v.contiguous()}
    return found


def norms(index: int, tensors: Mapping[str, Tensor], head_size: int, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """A layer's norms under Hugging Face's names; those of heads in the order of its rotary pairs."""
    found: dict[str, Tensor] = {}
    for norm in NORMS:
        name = f"transformer.h.{index}.{norm}"
        if name in tensors:
            rotary = norm.removeprefix("attn.") in ROTARY_PARTS
            scale = halves_from_pairs(tensors[name], head_size) if rotary else tensors[name]
            found[source_names(name, NAMES)[0]] = scale.to(dtype)
    return found
