"""The keys and values that a generation has computed so far.

It is an explicit object that a forward is given and fills: nothing of a generation is kept on a module.
"""

import torch
from torch import Tensor

from lit_llama.config import LLaMAConfig
from lit_llama.seam import ExpandedAdapter


class LayerCache:
    """Keys and values that one layer has computed, and what an adapter adds there.

    Args:
        k: (B, nkv, S, hs), room for the keys.
        v: likewise, for the values.
    """

    def __init__(self, k: Tensor, v: Tensor) -> None:
        self.k, self.v = k, v
        self.adapter: ExpandedAdapter | None = None  # from the first forward on

    def prefill(self, k: Tensor, v: Tensor) -> None:
        """Store (B, nkv, T, hs) at positions 0 to T - 1."""
        self.k[:, :, : k.size(2)] = k
        self.v[:, :, : v.size(2)] = v

    def append(self, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, nkv, T, hs) at `positions` (B, T); return all keys and values, (B, nkv, S, hs) each."""
        at = positions[:, None, :, None].expand(-1, k.size(1), -1, k.size(3))  # (B, nkv, T, hs)
        return self.k.scatter_(2, at, k), self.v.scatter_(2, at, v)


class KVCache:
    """The keys and values of one generation with one adapter, with static shapes.

    A row's cache index is its position, so rows of unequal length are padded on the right and need no offsets: what
    the padding wrote lies beyond the row's position, where attention has weight 0 until a token overwrites it. Only
    finite values may lie there, as 0 times infinity or NaN is NaN.

    Args:
        layers: the cache of each layer.
        length: positions S kept for each row.
    """

    def __init__(self, layers: list[LayerCache], length: int) -> None:
        self.layers = layers
        self.length = length

    @classmethod
    def empty(
        cls, config: LLaMAConfig, batch_size: int, length: int, device: torch.device, dtype: torch.dtype
    ) -> "KVCache":
        """Room for `batch_size` rows of `length` positions.

        Raises:
            ValueError: more positions than the model's window.
        """
        if length > config.block_size:
            raise ValueError(f"a KV cache of {length} positions exceeds the model's window of {config.block_size}")
        shape = (batch_size, config.n_kv_head, length, config.head_size)

        def room() -> Tensor:
            return torch.zeros(shape, device=device, dtype=dtype)

        return cls([LayerCache(room(), room()) for _ in range(config.n_layer)], length)

    def view(self, rows: slice, length: int, previous: "KVCache | None" = None) -> "KVCache":
        """Some of the rows and the first positions, in the same memory.

        Args:
            rows: which.
            length: positions of each row.
            previous: a view of the same rows, whose generation goes on; if None, another one begins.
        """
        layers = [LayerCache(layer.k[rows, :, :length], layer.v[rows, :, :length]) for layer in self.layers]
        if previous is not None:
            for layer, old in zip(layers, previous.layers, strict=True):
                layer.adapter = old.adapter
        return KVCache(layers, length)

    def keep_addresses(self) -> None:
        """Tell the compiler that these tensors stay where they are, so that CUDA graphs need not copy them."""
        for layer in self.layers:
            for tensor in (layer.k, layer.v):
                torch._dynamo.mark_static_address(tensor, guard=False)

    def clear(self, row: int, start: int, stop: int) -> None:
        """Write zeros over some positions of a row."""
        for layer in self.layers:
            layer.k[row, :, start:stop] = 0
            layer.v[row, :, start:stop] = 0

    def move_row(self, source: int, target: int) -> None:
        """Copy one row's keys and values over another's."""
        for layer in self.layers:
            layer.k[target], layer.v[target] = layer.k[source], layer.v[source]
