"""The keys and values that a generation has computed so far.

It is an explicit object that a forward is given and fills: nothing of a generation is kept on a module.
"""

import torch
from torch import Tensor

from lit_llama.config import LLaMAConfig
from lit_llama.row_adapters import RowAdapters
from lit_llama.seam import ExpandedAdapter


class LayerCache:
    """Keys and values that one layer has computed, and what an adapter adds there.

    Args:
        k: (B, nkv, S, hs), room for the keys.
        v: likewise, for the values.
        adapter: what is added; None until the first forward.
    """

    def __init__(self, k: Tensor, v: Tensor, adapter: ExpandedAdapter | None = None) -> None:
        self.k, self.v, self.adapter = k, v, adapter

    def prefill(self, k: Tensor, v: Tensor) -> None:
        """Store (B, nkv, T, hs) at positions 0 to T - 1."""
        self.k[:, :, : k.size(2)] = k
        self.v[:, :, : v.size(2)] = v

    def append(self, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, nkv, T, hs) at `positions` (B, T); return all keys and values, (B, nkv, S, hs) each."""
        rows = torch.arange(k.size(0), device=k.device)[:, None]  # (B, 1)
        self.k[rows, :, positions] = k.transpose(1, 2)  # not `scatter_`, which copies all of a cache in bfloat16
        self.v[rows, :, positions] = v.transpose(1, 2)
        return self.k, self.v


class KVCache:
    """The keys and values of rows that are generated together, and what their adapters add, with static shapes.

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
        self.row_adapters: RowAdapters | None = None  # as long as rows add different things

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

    def view(self, rows: slice, length: int) -> "KVCache":
        """Some of the rows and the first positions, in the same memory, for other prompts."""
        return KVCache(
            [LayerCache(layer.k[rows, :, :length], layer.v[rows, :, :length]) for layer in self.layers], length
        )

    def view_with_adapters(self, rows: slice, length: int) -> "KVCache":
        """The same for rows that go on, with what they add."""
        view = self.view(rows, length)
        if self.row_adapters is None:
            adapters = [layer.adapter for layer in self.layers]
        else:
            adapters = self.row_adapters.view(rows, len(self.layers))
        for layer, adapter in zip(view.layers, adapters, strict=True):
            layer.adapter = adapter
        return view

    def keep_adapters(self, rows: slice, view: "KVCache", shared: bool) -> None:
        """Keep what the forward of some prompts has found that their rows add.

        Args:
            rows: where they stand, after those that are in use already.
            view: a view of these rows, after the forward.
            shared: whether all rows in use add the same, which is then kept once.
        """
        if self.row_adapters is None and not shared:
            row_adapters = RowAdapters(self.layers[0].k.size(0))
            if rows.start:  # from now on each row's own
                row_adapters.put(slice(0, rows.start), _adapters(self.layers))
            self.row_adapters = row_adapters
        if self.row_adapters is not None:
            self.row_adapters.put(rows, _adapters(view.layers))
            return
        for layer, adapter in zip(self.layers, _adapters(view.layers), strict=True):
            layer.adapter = adapter

    def forget_adapters(self) -> None:
        """No row is in use any longer."""
        self.row_adapters = None
        for layer in self.layers:
            layer.adapter = None

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

    def drop_row(self, row: int, last: int, written: int) -> None:
        """Forget a row; the last one takes its place.

        Args:
            row: the one to forget.
            last: the last row in use.
            written: positions of the last one that hold its keys and values.
        """
        for layer in self.layers if row != last else []:
            for tensor in (layer.k, layer.v):
                tensor[row, :, :written] = tensor[last, :, :written]
        if self.row_adapters is not None:
            self.row_adapters.move(last, row)


def _adapters(layers: list[LayerCache]) -> list[ExpandedAdapter]:
    """What is added to each layer."""
    adapters = [layer.adapter for layer in layers if layer.adapter is not None]
    assert len(adapters) == len(layers), "a view without a forward"
    return adapters
