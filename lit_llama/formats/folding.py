"""What an adapter becomes outside this project: weights, biases, and prefixes of a layer's own.

With one token, the softmax over the prefix is 1 for every query, so all that an Aligner adds to layer l is

    b_l = W_o concat_h(gate_h v_h),   v = P W_v

the same for every input: a bias of the output projection, exactly. An update of a projection y = W x + b that is affine
in its input and output, u(x, y) = c + M x + S y, makes it

    W' = (I + S) W + M,   b' = (I + S) b + c

Several of them add up. A longer prefix is neither, and stays one: its keys and values, worked out for each layer.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from lit_llama.config import LLaMAConfig
from lit_llama.devices.quantization import is_quantized
from lit_llama.model import CausalSelfAttention, LLaMA
from lit_llama.seam import NO_UPDATES, PROJECTIONS, Adapter, LayerAdapter, Update
from lit_llama.shapes import without_values

MODULES = {"o": "attn.c_proj", "gate": "mlp.c_fc1", "up": "mlp.c_fc2", "down": "mlp.c_proj"}  # q, k, v: attn.c_attn


def projections(
    config: LLaMAConfig, tensors: Mapping[str, Tensor], index: int, part: Literal["weight", "bias"] = "weight"
) -> dict[str, Tensor]:
    """The weights or biases of a layer's projections, by the names that adapters have for them.

    Args:
        config: configuration of the base model.
        tensors: the base model's tensors by Lit-LLaMA names.
        index: number of the layer.
        part: which of them.

    Returns:
        By the names in `lit_llama.seam.PROJECTIONS`, (out, in) or (out) each, in the memory of `tensors`; projections
        without a bias are left out.
    """
    layer = f"transformer.h.{index}"
    stacked = tensors.get(f"{layer}.attn.c_attn.{part}")
    found = {} if stacked is None else dict(zip("qkv", stacked.split(config.qkv_rows), strict=True))
    others = {name: f"{layer}.{module}.{part}" for name, module in MODULES.items()}
    return found | {name: tensors[tensor] for name, tensor in others.items() if tensor in tensors}


class FoldedPrefix(NamedTuple):
    """A longer prefix as one layer sees it.

    Args:
        k: keys (1, nh, N, hs) float32, not rotated.
        v: values (1, nh, N, hs) float32, times the gates.
    """

    k: Tensor
    v: Tensor


class FoldedLayer(NamedTuple):
    """One layer with an adapter in it.

    Args:
        weights: weights of the projections by name, (out, in) each.
        biases: biases of those projections that have one, by name, (out) float32.
        prefixes: the longer ones.
    """

    weights: dict[str, Tensor]
    biases: dict[str, Tensor]
    prefixes: list[FoldedPrefix]


@torch.no_grad()
def fold(config: LLaMAConfig, tensors: Mapping[str, Tensor], index: int, added: LayerAdapter) -> FoldedLayer:
    """Put what an adapter adds to a layer into its weights and biases, as far as possible.

    Args:
        config: configuration of the base model.
        tensors: the base model's tensors by Lit-LLaMA names, on the adapter's device.
        index: number of the layer.
        added: what the adapter adds, in evaluation mode.

    Raises:
        ValueError: an update is not affine.
    """
    refuse_prompt_only(added)
    weights, biases = (projections(config, tensors, index, part) for part in ("weight", "bias"))
    # What comes out of the prefix goes through the output projection with its update; tokens go in without.
    prefixes = added._replace(updates=NO_UPDATES)
    expanded = _attention(config, tensors, index).expand(prefixes, torch.float32).prefixes if added.prefixes else ()
    folded, folded_biases = dict(weights), {name: bias.float() for name, bias in biases.items()}
    for name, updates in added.updates.items():
        weight = weights[name].float()
        change, shift = torch.zeros_like(weight), weight.new_zeros(weight.size(0))
        for update in updates:
            c, m, s = affine_parts(update, weight, name)
            change += m if s is None else m + s @ weight
            shift += c if s is None or name not in biases else c + s @ biases[name].float()
        folded[name] = (weight + change).to(weights[name].dtype)
        if shift.any():
            folded_biases[name] = folded_biases.get(name, 0) + shift
    one_token = [prefix.v.flatten() for prefix in expanded if prefix.v.size(2) == 1]  # (nh * hs) each
    if one_token:
        folded_biases["o"] = folded_biases.get("o", 0) + folded["o"].float() @ torch.stack(one_token).sum(0)
    group, longer = config.n_head // config.n_kv_head, []
    for prefix in expanded:
        if prefix.k is not None and prefix.gates is not None:
            k, v = (heads.repeat_interleave(group, dim=1) for heads in (prefix.k, prefix.v))  # (1, nh, N, hs)
            longer.append(FoldedPrefix(k, prefix.gates * v))
    return FoldedLayer(folded, folded_biases, longer)


def refuse_prompt_only(added: LayerAdapter) -> None:
    """Refuse prefixes that no weight or bias can stand for, as those act on all positions.

    Raises:
        ValueError: the adapter acts on the prompt alone.
    """
    if any(prefix.prompt_only is not None for prefix in added.prefixes):
        raise ValueError(
            "an adapter that was trained with --positions prompt cannot be folded, merged or exported: it acts on the "
            "prompt and not on what is decoded, while weights and biases act on both"
        )


def _attention(config: LLaMAConfig, tensors: Mapping[str, Tensor], index: int) -> CausalSelfAttention:
    """A layer's attention in float32; it may have biases that were merged into it and that no configuration knows."""
    layer = f"transformer.h.{index}.attn."
    has = {name: f"{layer}{module}.bias" in tensors for name, module in (("qkv_bias", "c_attn"), ("o_bias", "c_proj"))}
    with without_values():
        attention = CausalSelfAttention(replace(config, **has), index)
    attention.load_state_dict({name: tensors[layer + name].float() for name in attention.state_dict()}, assign=True)
    return attention


@torch.no_grad()
def biased(config: LLaMAConfig, added: LayerAdapter) -> set[str]:
    """The projections that have a bias once an adapter's layer is folded, without folding it."""
    names = set("qkv" if config.qkv_bias else "") | set("o" if config.o_bias else "")
    if any(prefix.tokens.size(1) == 1 for prefix in added.prefixes):
        names.add("o")
    for name, updates in added.updates.items():
        device = next(value.device for value in updates[0] if isinstance(value, Tensor))  # type: ignore[attr-defined]
        zero_in, zero_out = (torch.zeros(1, 1, size, device=device) for size in config.width(name))
        if any(update(zero_in, zero_out).any() for update in updates):
            names.add(name)
    return names


@torch.no_grad()
def added_vectors(config: LLaMAConfig, tensors: Mapping[str, Tensor], adapter: Adapter) -> list[dict[str, Tensor]]:
    """What an adapter adds to the outputs of projections, if that is the same at every position.

    Args:
        config: configuration of the base model.
        tensors: the base model's tensors by Lit-LLaMA names.
        adapter: prefixes of one token, biases, and sums of them.

    Returns:
        The vectors of each layer by projection, (out) float32: the same projections in all layers, with zeros where
        nothing is added.

    Raises:
        ValueError: there is more in the adapter.
    """
    added, without = [adapter.layer(i) for i in range(config.n_layer)], replace(config, qkv_bias=False, o_bias=False)
    names = set().union(*(biased(without, layer) for layer in added))
    layers: list[dict[str, Tensor]] = []
    for i, layer in enumerate(tqdm(added, desc="folding", unit="layer", leave=False)):
        weights, biases = (projections(config, tensors, i, part) for part in ("weight", "bias"))
        folded = fold(config, tensors, i, layer)
        if folded.prefixes or any(not torch.equal(folded.weights[name], weights[name]) for name in weights):
            found = "a prefix of several tokens" if folded.prefixes else "one that changes weights, as a LoRA does"
            raise ValueError(
                "this format can hold adapters that are biases of projections, as prefixes of one token are, but this "
                f"is {found}; scripts/export_hf_checkpoint.py --format transformers can export it as a whole model"
            )
        nothing = {name: torch.zeros(weights[name].size(0)) for name in PROJECTIONS if name in names}
        layers.append({name: folded.biases.get(name, zero) - biases.get(name, zero) for name, zero in nothing.items()})
    return layers


def affine_parts(update: Update, weight: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """The parts of an update u(x, y) = c + M x + S y, found by asking it for zero, the unit inputs and unit outputs.

    Args:
        update: with tensors for one row, in evaluation mode.
        weight: weight of the projection, (out, in), on the update's device; its sizes alone matter.
        name: name of the projection, for the message.

    Returns:
        c (out), M (out, in), and S (out, out) or None where the output plays no part; float32.

    Raises:
        ValueError: the update is something else: it does not give these sums at random inputs.
    """

    def ask(x: Tensor, y: Tensor) -> Tensor:
        return update(x[None], y[None]).expand(1, *y.shape)[0].float()

    size_out, size_in = weight.shape
    with weight.device:
        c = ask(torch.zeros(1, size_in), torch.zeros(1, size_out))[0]
        m = (ask(torch.eye(size_in), torch.zeros(size_in, size_out)) - c).T
        s = (ask(torch.zeros(size_out, size_in), torch.eye(size_out)) - c).T
    s = s if s.any() else None
    random = torch.Generator().manual_seed(0)
    x, y = (torch.randn(4, size, generator=random).to(weight.device) for size in (size_in, size_out))
    expected = c + x @ m.T + (0 if s is None else y @ s.T)
    found = ask(x, y)
    if not torch.allclose(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max())):
        raise ValueError(
            f"{type(update).__name__}, an update of the projection {name!r}, is not affine in its input and output, so "
            "it cannot be folded into a weight and a bias"
        )
    return c, m, s


@torch.no_grad()
def merge(model: LLaMA, adapter: Adapter) -> None:
    """Put an adapter into the weights of a base model, in place, so that the model alone computes what both did.

    Merging `WeightedSum((adapter, -1))` takes a merged LoRA or Bias out again; what is left of it are the rounding
    errors of the weights' dtype. Several adapters are merged at once, as their `WeightedSum`: a prefix that is merged
    after another adapter passes through the projections as that one left them, and adds something else.

    Raises:
        ValueError: the weights are quantised, or sharded over processes; or the adapter has a prefix of several tokens,
            which no weight stands for.
    """
    from torch.distributed.tensor import DTensor  # slow to import

    layers = [adapter.layer(i) for i in range(model.config.n_layer)]
    for layer in layers:
        refuse_prompt_only(layer)
    if any(prefix.tokens.size(1) > 1 for layer in layers for prefix in layer.prefixes):
        raise ValueError("a prefix of several tokens cannot be merged into weights: its attention depends on the query")
    tensors = {name: parameter.data for name, parameter in model.named_parameters()}
    block: Any
    for i, (block, added) in enumerate(zip(model.transformer.h, layers, strict=True)):
        for linear in (block.attn.c_attn, *(block.get_submodule(module) for module in MODULES.values())):
            if is_quantized(linear) or isinstance(linear.weight, DTensor):
                raise ValueError("an adapter can be merged only into whole weights, not quantised or sharded ones")
        weights, folded = projections(model.config, tensors, i), fold(model.config, tensors, i, added)
        for name in PROJECTIONS:
            weights[name].copy_(folded.weights[name])
        if any(name in folded.biases for name in "qkv"):
            qkv = [folded.biases.get(name, weights[name].new_zeros(weights[name].size(0))) for name in "qkv"]
            _set_bias(block.attn.c_attn, torch.cat(qkv))
        for name, module in MODULES.items():
            if name in folded.biases:
                _set_bias(block.get_submodule(module), folded.biases[name])


def _set_bias(linear: torch.nn.Linear, bias: Tensor) -> None:
    linear.bias = torch.nn.Parameter(bias.to(linear.weight), requires_grad=False)
