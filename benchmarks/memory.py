"""What fits where: the memory that fine-tuning takes, counted and not estimated.

    python benchmarks/memory.py
    python benchmarks/memory.py --micro_batch_size 1 --devices 4

Counts the bytes that autograd keeps for the backward pass, per token and layer, by running layers of each base's real
widths on the CPU with a few tokens; the rest is multiplication. Prints a table in Markdown. Allocators and libraries
come on top, and the loss: a few copies of the logits of the scored tokens.
"""

from dataclasses import replace

import torch
from tqdm import tqdm

from lit_llama.aligner import Aligner
from lit_llama.config import LLaMAConfig
from lit_llama.model import LLaMA, parameter_shapes
from lit_llama.script.command_line import run
from lit_llama.shapes import without_values
from lit_llama.tables import markdown

BASES = ["Llama-2-7B", "Llama-2-13B", "Llama-2-70B"]
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # a weight, its share of a block's 8-bit scale, of that scale's scale
GB = 1e9


def main(
    base: list[str] = BASES,
    micro_batch_size: int = 8,
    tokens: int = 512,
    start_layer: int = 2,
    devices: int = 8,
) -> None:
    """Count.

    Args:
        base: presets by name; may be given several times.
        micro_batch_size: examples per forward.
        tokens: in each example.
        start_layer: first layer of the Aligner; layers below it keep nothing.
        devices: that a sharded base is spread over.
    """
    print(f"GB on each device, bfloat16, {micro_batch_size} examples of {tokens} tokens per forward, N = 1\n")
    header = ["base", "weights", "activations", "...checkpointed", "one device", "...checkpointed", "...and nf4"]
    rows = []
    for name in tqdm(base, desc="bases", leave=False):
        config = LLaMAConfig.from_name(name)
        shapes = parameter_shapes(config)
        weights = 2 * sum(shape.numel() for shape in shapes.values())
        blocks = 2 * sum(shape.numel() for name, shape in shapes.items() if ".h." in name)
        layers = config.n_layer - start_layer
        per_token = kept_bytes_per_layer(config)
        at_once = micro_batch_size * tokens
        activations = layers * per_token * at_once
        checkpointed = (layers * 2 * config.n_embd + per_token) * at_once  # each layer's input, and one layer whole
        nf4 = weights - blocks + blocks / 2 * NF4_BYTES
        # What is gathered at a time: embedding and head, a block and the next one.
        sharded = weights / devices + (weights - blocks) + 2 * blocks / config.n_layer
        sizes = [weights, activations, checkpointed, weights + activations]
        sizes += [part + checkpointed for part in (weights, nf4, sharded)]
        rows.append([name, *(f"{size / GB:.1f}" for size in sizes)])
    print(markdown([*header, f"...and sharded over {devices}"], rows))


def kept_bytes_per_layer(config: LLaMAConfig, tokens: int = 16) -> float:
    """Bytes per token that one more layer keeps for the backward pass, weights excluded."""
    kept = []
    for n_layer in (1, 2):
        small = replace(config, n_layer=n_layer, vocab_size=8)
        with without_values():
            model = LLaMA(small)
        model = model.to(torch.bfloat16).to_empty(device="cpu").requires_grad_(False)
        aligner = Aligner(small, length=1, start_layer=0)
        frozen = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        storages: dict[int, int] = {}

        def keep(tensor: torch.Tensor, storages: dict[int, int] = storages, frozen: set[int] = frozen) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in frozen:
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            logits = model(
                torch.zeros(1, tokens, dtype=torch.long), aligner
            )  # kept alive, so that no address is reused
        kept.append(sum(storages.values()))
        del logits
    return (kept[1] - kept[0]) / tokens


if __name__ == "__main__":
    run(main)
