"""LLaMA in one file: configuration, rotary embedding, attention, KV cache, and the one seam for adapters.

Names and layout of the parameters are Lit-LLaMA's: query, key and value projections stacked in `c_attn`, rotary
pairs interleaved. Shape comments use B batch, T time, C embedding, nh query heads, nkv key/value heads, hs head size,
N prefix tokens, S cache length, V vocabulary.
"""

import math
import re
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lit_llama.fields import check_value, take

# Larger than any model's, small enough that no file can make this program build for minutes.
MOST_TOKENS = 2**24
_LARGEST = {
    "block_size": MOST_TOKENS,
    "vocab_size": 2**24,
    "n_layer": 1024,
    "n_head": 2**12,
    "n_embd": 2**18,
    "n_kv_head": 2**12,
    "head_size": 2**14,
    "intermediate_size": 2**20,
}
_FILLED = ("n_kv_head", "head_size", "intermediate_size")  # 0 if not given


@dataclass(frozen=True)
class RopeScaling:
    """Stretching of the rotary frequencies for contexts longer than the pretraining's.

    Args:
        type: "linear" divides every frequency by `factor`; "llama3" divides the low ones, keeps the high ones and
            blends between (Llama 3.1, `rope_type: llama3` in Hugging Face configs).
        factor: the divisor.
        low_freq_factor: wavelengths above `original_block_size / low_freq_factor` are divided.
        high_freq_factor: wavelengths below `original_block_size / high_freq_factor` are kept.
        original_block_size: context length before stretching, in tokens.

    Raises:
        ValueError: a field is of another type, or out of range.
    """

    type: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_block_size: int = 8192

    def __post_init__(self) -> None:
        if self.type not in ("linear", "llama3"):
            raise ValueError(f"rope_scaling's type is {reprlib.repr(self.type)}, expected 'linear' or 'llama3'")
        for name in ("factor", "low_freq_factor", "high_freq_factor"):
            value = check_value(getattr(self, name), f"rope_scaling's {name}", float, 1e-6, 1e6)
            object.__setattr__(self, name, value)
        check_value(self.original_block_size, "rope_scaling's original_block_size", int, 1, MOST_TOKENS)
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"rope_scaling's high_freq_factor is {self.high_freq_factor:g}, expected more than its "
                f"low_freq_factor, {self.low_freq_factor:g}"
            )


@dataclass(frozen=True)
class LLaMAConfig:
    """Sizes and constants of a LLaMA-family model.

    Args:
        name: what the model is called, for reports and adapter files.
        block_size: longest context, in tokens.
        vocab_size: rows of the embedding.
        n_layer: transformer blocks.
        n_head: query heads.
        n_embd: embedding size C.
        n_kv_head: key/value heads; as many as query heads if not given.
        head_size: size of a head; `n_embd // n_head` if not given.
        intermediate_size: width of the MLP; 2/3 of 4C rounded up to a multiple of 256 if not given.
        norm_eps: epsilon of RMSNorm.
        rope_base: base of the rotary frequencies.
        rope_scaling: stretching of the rotary frequencies, if any.
        tie_embeddings: the output projection is the embedding.

    Raises:
        ValueError: a field is of another type, out of range, or contradicts another one.
    """

    name: str = ""
    block_size: int = 2048
    vocab_size: int = 32000
    n_layer: int = 32
    n_head: int = 32
    n_embd: int = 4096
    n_kv_head: int = 0
    head_size: int = 0
    intermediate_size: int = 0
    norm_eps: float = 1e-5
    rope_base: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_embeddings: bool = False

    def __post_init__(self) -> None:
        fill = object.__setattr__  # the dataclass is frozen
        check_value(self.name, "name", str)
        check_value(self.tie_embeddings, "tie_embeddings", bool)
        for name, most in _LARGEST.items():
            check_value(getattr(self, name), name, int, 0 if name in _FILLED else 1, most)
        for name, most in (("norm_eps", 1.0), ("rope_base", 1e15)):
            fill(self, name, check_value(getattr(self, name), name, float, 1e-30, most))
        if self.head_size % 2:
            raise ValueError(f"head_size is {self.head_size}, expected an even number: rotary embedding turns pairs")
        fill(self, "n_kv_head", self.n_kv_head or self.n_head)
        fill(self, "head_size", self.head_size or self.n_embd // self.n_head)
        fill(self, "intermediate_size", self.intermediate_size or 256 * math.ceil(8 * self.n_embd / 3 / 256))
        check_value(self.head_size, "head_size", int, 1)  # more heads than the embedding has values
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head is {self.n_head}, expected a multiple of n_kv_head, {self.n_kv_head}")

    @classmethod
    def from_name(cls, name: str) -> "LLaMAConfig":
        """The preset of that name, whatever its case and punctuation; "7B" alone means LLaMA 7B.

        Raises:
            ValueError: no such preset.
        """
        wanted = _plain(name)
        for preset in PRESETS:
            if _plain(preset.name) in (wanted, "llama" + wanted):
                return preset
        raise ValueError(f"no preset named {name!r}; there are {', '.join(p.name for p in PRESETS)}")

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "LLaMAConfig":
        """The inverse of `to_dict`.

        Raises:
            ValueError: a field is missing or unknown, so that a file of another version is never half read; or it
                cannot be a model's.
        """
        expected, found = set(cls.__dataclass_fields__), set(fields)
        if expected != found:
            lacking, unknown = (reprlib.repr(sorted(names)) for names in (expected - found, found - expected))
            raise ValueError(f"model configuration lacks {lacking} and has unknown {unknown}")
        scaling = take(fields, "rope_scaling", dict, "model configuration", default=None)
        try:
            return cls(**{**fields, "rope_scaling": RopeScaling(**scaling) if scaling else None})
        except TypeError as error:  # a field of the scaling is missing or unknown
            raise ValueError(f"rope_scaling: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """Every field, as JSON knows them."""
        return asdict(self)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


_LLAMA_1: dict[str, Any] = {"norm_eps": 1e-6}
_LLAMA_2: dict[str, Any] = {"block_size": 4096}
_LLAMA_3: dict[str, Any] = {"block_size": 8192, "vocab_size": 128256, "rope_base": 500000.0, "n_kv_head": 8}
_LLAMA_31 = _LLAMA_3 | {"block_size": 131072, "rope_scaling": RopeScaling("llama3", factor=8.0)}
_LLAMA_32 = _LLAMA_31 | {"rope_scaling": RopeScaling("llama3", factor=32.0), "tie_embeddings": True}
_SMOLLM2: dict[str, Any] = {"block_size": 8192, "vocab_size": 49152, "rope_base": 100000.0, "tie_embeddings": True}


def _preset(family: dict[str, Any], name: str, n_layer: int, n_head: int, n_embd: int, **sizes: Any) -> LLaMAConfig:
    return LLaMAConfig(name=name, n_layer=n_layer, n_head=n_head, n_embd=n_embd, **(family | sizes))


PRESETS = [
    _preset(_LLAMA_1, "LLaMA-7B", 32, 32, 4096),
    _preset(_LLAMA_1, "LLaMA-13B", 40, 40, 5120),
    _preset(_LLAMA_1, "LLaMA-30B", 60, 52, 6656),
    _preset(_LLAMA_1 | {"norm_eps": 1e-5}, "LLaMA-65B", 80, 64, 8192),
    _preset(_LLAMA_2, "Llama-2-7B", 32, 32, 4096),
    _preset(_LLAMA_2, "Llama-2-13B", 40, 40, 5120),
    _preset(_LLAMA_2, "Llama-2-70B", 80, 64, 8192, n_kv_head=8, intermediate_size=28672),
    _preset(_LLAMA_3, "Llama-3-8B", 32, 32, 4096, intermediate_size=14336),
    _preset(_LLAMA_3, "Llama-3-70B", 80, 64, 8192, intermediate_size=28672),
    _preset(_LLAMA_31, "Llama-3.1-8B", 32, 32, 4096, intermediate_size=14336),
    _preset(_LLAMA_31, "Llama-3.1-70B", 80, 64, 8192, intermediate_size=28672),
    _preset(_LLAMA_32, "Llama-3.2-1B", 16, 32, 2048, intermediate_size=8192),
    _preset(_LLAMA_32, "Llama-3.2-3B", 28, 24, 3072, intermediate_size=8192),
    _preset({}, "TinyLlama-1.1B", 22, 32, 2048, n_kv_head=4, intermediate_size=5632),
    _preset(_SMOLLM2, "SmolLM2-135M", 30, 9, 576, n_kv_head=3, intermediate_size=1536),
    _preset(_SMOLLM2, "SmolLM2-360M", 32, 15, 960, n_kv_head=5, intermediate_size=2560),
    _preset(_SMOLLM2, "SmolLM2-1.7B", 24, 32, 2048, intermediate_size=8192, rope_base=130000.0),
]


class LayerPrefix(NamedTuple):
    """What one layer attends to beside its own sequence: one prefix for the whole batch, or one for each row.

    Args:
        tokens: (1 or B, N, C), in the place of the layer's input embeddings.
        gates: (1 or B, nh), what each query head's contribution is multiplied by.
        mask: bool (B, N), which tokens there are, for rows with fewer than N but at least one; None means all.
    """

    tokens: Tensor
    gates: Tensor
    mask: Tensor | None = None


class ExpandedPrefix(NamedTuple):
    """A prefix as the heads of one layer see it.

    Args:
        k: (1 or B, nh, N, hs), not rotated.
        v: (1 or B, nh, N, hs), times the gates.
        mask: bool (B, 1, 1, N), which tokens there are; None means all.
    """

    k: Tensor
    v: Tensor
    mask: Tensor | None


Updates = Mapping[str, Callable[[Tensor], Tensor]]
NO_UPDATES: Updates = MappingProxyType({})


class LayerAdapter(NamedTuple):
    """What an adapter adds to one layer; nothing, unless said otherwise.

    Args:
        prefixes: what the attention attends to beside its sequence, each with a softmax of its own.
        updates: what is added to the outputs of projections, each as a function of the projection's input, by name:
            "q", "k", "v", "o" of the attention, "gate", "up", "down" of the MLP.
    """

    prefixes: tuple[LayerPrefix, ...] = ()
    updates: Updates = NO_UPDATES


class Adapter(Protocol):
    """Anything that says what it adds to each layer, such as an Aligner."""

    def layer(self, index: int) -> LayerAdapter:
        """What is added to layer `index`, counted from 0."""
        ...


class Places(NamedTuple):
    """Where the tokens of a forward stand; the same for every layer.

    Args:
        rope: cosine and sine of the rotary angles, (1 or B, 1, T, hs / 2) each.
        mask: (B, 1, T, S), 0 for cached positions that a query sees and minus infinity for others; None means causal
            attention within a sequence.
        positions: (B, T), where to store keys and values in the cache; None stores them from 0.
        lengths: of the sequences that the only row holds, one after the other; None means that a row is a sequence.
    """

    rope: tuple[Tensor, Tensor]
    mask: Tensor | None
    positions: Tensor | None
    lengths: list[int] | None


class LayerCache:
    """Keys and values that one layer has computed, those of its prefixes included.

    Args:
        k: (B, nkv, S, hs), room for the keys.
        v: likewise, for the values.
    """

    def __init__(self, k: Tensor, v: Tensor) -> None:
        self.k, self.v = k, v
        self.prefixes: tuple[ExpandedPrefix, ...] = ()
        self.added: LayerAdapter | None = None  # beside those prefixes, once they are there

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
        layers: of each layer.
        length: positions S kept for each row.
    """

    def __init__(self, layers: list[LayerCache], length: int) -> None:
        self.layers = layers
        self.length = length

    @classmethod
    def empty(cls, model: "LLaMA", batch_size: int, length: int) -> "KVCache":
        """Room for `batch_size` rows of `length` positions.

        Raises:
            ValueError: more positions than the model's window.
        """
        config = model.config
        if length > config.block_size:
            raise ValueError(f"a KV cache of {length} positions exceeds the model's window of {config.block_size}")
        shape = (batch_size, config.n_kv_head, length, config.head_size)

        def room() -> Tensor:
            return torch.zeros(shape, device=model.device, dtype=model.dtype)

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
                layer.prefixes, layer.added = old.prefixes, old.added
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


class LLaMA(nn.Module):
    """A LLaMA-family language model (arXiv 2302.13971, 2307.09288, 2407.21783).

    Args:
        config: sizes and constants.

    Raises:
        ValueError: the configuration contradicts itself.
    """

    def __init__(self, config: LLaMAConfig) -> None:
        super().__init__()
        if config.head_size % 2:
            raise ValueError(f"head_size {config.head_size} is odd; rotary embedding turns pairs")
        self.config = config
        self.fingerprint = ""  # of the weights; set by whoever loads them
        self.compiled: Callable[..., Tensor] | None = None  # `forward` for decoding, see `lit_llama.inference`
        self.transformer = Transformer(config)
        self.lm_head = None if config.tie_embeddings else nn.Linear(config.n_embd, config.vocab_size, bias=False)
        # Not a buffer: casting the model to bfloat16 must not touch the frequencies.
        self.rope_frequencies = rope_frequencies(config)

    @property
    def device(self) -> torch.device:
        return self.transformer.wte.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.transformer.wte.weight.dtype

    def forward(
        self,
        ids: Tensor,
        adapter: Adapter | None = None,
        *,
        logits_at: Tensor | None = None,
        cache: KVCache | None = None,
        positions: Tensor | None = None,
        lengths: list[int] | None = None,
    ) -> Tensor:
        """Next-token logits.

        Args:
            ids: token ids (B, T). Rows of unequal length are padded on the right.
            adapter: adds to the layers what it chooses; an object of its own, so that one base serves any number.
            logits_at: bool (B, T); compute logits at these positions alone.
            cache: filled as a side effect. Without `positions` the rows start at 0 (prefill).
            positions: (B, T), where in the cached sequences `ids` stand (decode); needs `cache`.
            lengths: the only row holds sequences of these lengths, one after the other, that do not see each other
                (packing); T is their sum.

        Returns:
            Logits (B, T, V), or (n, V) for the n positions chosen by `logits_at`, row by row.

        Raises:
            ValueError: more positions than the model's window.
        """
        T = ids.size(1)
        longest = max(lengths) if lengths else T
        if longest > self.config.block_size:
            raise ValueError(f"sequence of {longest} tokens exceeds the model's window of {self.config.block_size}")
        places = self._places(ids, cache, positions, lengths)
        x = self.transformer.wte(ids)  # (B, T, C)
        for i, block in enumerate(self.transformer.h):
            layer_cache = None if cache is None else cache.layers[i]
            added = layer_cache and layer_cache.added
            if added is None:
                added = LayerAdapter() if adapter is None else adapter.layer(i)
            x = block(x, places, added, layer_cache)
        if logits_at is not None:
            x = x[logits_at]  # (n, C)
        x = self.transformer.ln_f(x)
        return F.linear(x, self.transformer.wte.weight) if self.lm_head is None else self.lm_head(x)

    def _places(
        self, ids: Tensor, cache: KVCache | None, positions: Tensor | None, lengths: list[int] | None
    ) -> Places:
        T, mask = ids.size(1), None
        if positions is not None:
            assert cache is not None, "positions without a cache"
            unseen = torch.arange(cache.length, device=ids.device) > positions[:, None, :, None]  # (B, 1, T, S)
            mask = torch.zeros_like(unseen, dtype=self.dtype).masked_fill_(unseen, -torch.inf)
            at = positions
        elif lengths is not None:
            assert (ids.size(0), T) == (1, sum(lengths)), "lengths that do not fill one row"
            at = torch.cat([torch.arange(length, device=ids.device) for length in lengths])[None]  # (1, T)
        else:
            at = torch.arange(T, device=ids.device)[None]  # (1, T)
        angles = at[:, None, :, None] * self._frequencies_on(ids.device)  # (1 or B, 1, T, hs / 2)
        return Places((angles.cos(), angles.sin()), mask, positions, lengths)

    def checkpoint_activations(self) -> None:
        """From now on keep only the input of each block for the backward pass, and compute the rest again there."""
        for block in self.transformer.h:
            block.recompute = True  # type: ignore[assignment]

    def _frequencies_on(self, device: torch.device) -> Tensor:
        if self.rope_frequencies.device != device:
            with torch.inference_mode(False):  # an inference tensor kept here would break later training
                self.rope_frequencies = self.rope_frequencies.to(device)
        return self.rope_frequencies


class Transformer(nn.Module):
    """Embedding, blocks and final norm."""

    def __init__(self, config: LLaMAConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = RMSNorm(config.n_embd, config.norm_eps)


class Block(nn.Module):
    """Pre-norm transformer block; takes and returns (B, T, C), see `CausalSelfAttention.forward` for the rest."""

    def __init__(self, config: LLaMAConfig) -> None:
        super().__init__()
        self.rms_1 = RMSNorm(config.n_embd, config.norm_eps)
        self.attn = CausalSelfAttention(config)
        self.rms_2 = RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = MLP(config)
        self.recompute = False

    def forward(self, x: Tensor, places: Places, adapter: LayerAdapter, cache: LayerCache | None) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._forward, x, places, adapter, cache, use_reentrant=False)  # type: ignore[return-value]
        return self._forward(x, places, adapter, cache)

    def _forward(self, x: Tensor, places: Places, adapter: LayerAdapter, cache: LayerCache | None) -> Tensor:
        x = x + self.attn(self.rms_1(x), places, adapter, cache)
        return x + self.mlp(self.rms_2(x), adapter.updates)


class CausalSelfAttention(nn.Module):
    """Grouped-query causal self-attention, with the seam for a gated prefix."""

    def __init__(self, config: LLaMAConfig) -> None:
        super().__init__()
        self.n_head, self.n_kv_head, self.head_size = config.n_head, config.n_kv_head, config.head_size
        self.c_attn = nn.Linear(config.n_embd, (self.n_head + 2 * self.n_kv_head) * self.head_size, bias=False)
        self.c_proj = nn.Linear(self.n_head * self.head_size, config.n_embd, bias=False)

    def forward(self, x: Tensor, places: Places, adapter: LayerAdapter, cache: LayerCache | None) -> Tensor:
        """Attend to the sequence, add the prefix's contribution, project.

        Args:
            x: (B, T, C).
            places: where its tokens stand.
            adapter: what is added here.
            cache: this layer's, if any.

        Returns:
            (B, T, C).
        """
        q, k, v = self.qkv(x, adapter.updates, places.rope)
        if cache is not None:
            if places.positions is None:
                cache.prefill(k, v)
            else:
                k, v = cache.append(k, v, places.positions)  # (B, nkv, S, hs)
        if places.lengths is None:
            y = self.attend(q, k, v, places.mask, is_causal=places.mask is None)  # (B, nh, T, hs)
        else:  # sequence by sequence, so that no mask of T x T is ever made
            split = zip(*(heads.split(places.lengths, dim=2) for heads in (q, k, v)), strict=True)
            y = torch.cat([self.attend(*heads, is_causal=True) for heads in split], dim=2)  # (1, nh, T, hs)
        prefixes = tuple(self.expand(prefix, q.dtype) for prefix in adapter.prefixes)
        if cache is not None:
            if cache.added is None:
                cache.prefixes, cache.added = prefixes, LayerAdapter(updates=adapter.updates)
            prefixes = cache.prefixes
        for prefix in prefixes:
            y = y + self.prefix_contribution(q, prefix)
        y = y.transpose(1, 2).flatten(2)  # (B, T, nh * hs)
        return updated("o", self.c_proj(y), y, adapter.updates)  # (B, T, C)

    def qkv(
        self, x: Tensor, updates: Updates, rope: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Project (B, T, C) to queries (B, nh, T, hs), keys and values (B, nkv, T, hs), and rotate the first two."""
        sizes = [self.n_head, self.n_kv_head, self.n_kv_head]
        y = self.c_attn(x)  # (B, T, (nh + 2 nkv) * hs)
        if any(name in updates for name in "qkv"):
            parts = y.split([n * self.head_size for n in sizes], dim=-1)
            y = torch.cat([updated(name, part, x, updates) for name, part in zip("qkv", parts, strict=True)], dim=-1)
        heads = y.unflatten(-1, (-1, self.head_size)).transpose(1, 2)  # (B, nh + 2 nkv, T, hs)
        if rope is None:
            q, k, v = heads.split(sizes, dim=1)
            return q, k, v
        turned, v = heads.split([self.n_head + self.n_kv_head, self.n_kv_head], dim=1)
        q, k = apply_rope(turned, *rope).split(sizes[:2], dim=1)
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Attention of queries (B, nh, T, hs) over keys and values (B, nkv, S, hs); returns (B, nh, T, hs)."""
        grouped = self.n_head != self.n_kv_head
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=grouped)

    def expand(self, prefix: LayerPrefix, dtype: torch.dtype) -> ExpandedPrefix:
        """The prefix's keys and values in `dtype`.

        The gates stand before the sum over tokens instead of after it, so that they are multiplied once.
        """
        _, k, v = self.qkv(prefix.tokens.to(dtype), NO_UPDATES)  # (1 or B, nkv, N, hs)
        k, v = (heads.repeat_interleave(self.n_head // self.n_kv_head, dim=1) for heads in (k, v))
        mask = None if prefix.mask is None else prefix.mask[:, None, None, :]
        return ExpandedPrefix(k, prefix.gates.to(dtype)[:, :, None, None] * v, mask)

    def prefix_contribution(self, q: Tensor, prefix: ExpandedPrefix) -> Tensor:
        """Gated attention of rotated queries (B, nh, T, hs) over the prefix, with a softmax of its own.

        The prefix stands outside the sequence: its keys are not rotated, and every position sees all of it.

        Returns:
            (B, nh, T, hs), or (1 or B, nh, 1, hs) where one token makes it the same at every position.
        """
        k, v, mask = prefix
        if v.size(2) == 1:  # the softmax over one token is 1, whatever the query
            return v
        k, v = (heads.expand(q.size(0), -1, -1, -1) for heads in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, nh, T, hs)


class MLP(nn.Module):
    """SwiGLU feed-forward network."""

    def __init__(self, config: LLaMAConfig) -> None:
        super().__init__()
        self.c_fc1 = nn.Linear(config.n_embd, config.intermediate_size, bias=False)
        self.c_fc2 = nn.Linear(config.n_embd, config.intermediate_size, bias=False)
        self.c_proj = nn.Linear(config.intermediate_size, config.n_embd, bias=False)

    def forward(self, x: Tensor, updates: Updates) -> Tensor:
        gate = updated("gate", self.c_fc1(x), x, updates)
        x = F.silu(gate) * updated("up", self.c_fc2(x), x, updates)  # (B, T, intermediate size)
        return updated("down", self.c_proj(x), x, updates)


def updated(projection: str, y: Tensor, x: Tensor, updates: Updates) -> Tensor:
    """The output `y` of a projection of `x`, with what an adapter adds to it."""
    return y + updates[projection](x) if projection in updates else y


class RMSNorm(nn.Module):
    """Root mean square normalisation (arXiv 1910.07467), computed in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * F.rms_norm(x, x.shape[-1:], eps=self.eps)


def rope_frequencies(config: LLaMAConfig) -> Tensor:
    """Angle per position of each rotary pair, stretched as `config.rope_scaling` says.

    Returns:
        (hs / 2) float32, on the CPU.
    """
    exponents = torch.arange(0, config.head_size, 2, device="cpu", dtype=torch.float32) / config.head_size
    frequencies = 1.0 / config.rope_base**exponents
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    stretched = frequencies / scaling.factor
    if scaling.type == "linear":
        return stretched
    turns = scaling.original_block_size * frequencies / (2 * math.pi)  # in the original context
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return torch.lerp(stretched, frequencies, kept.clamp(0, 1))


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of interleaved pairs, in float32 (arXiv 2104.09864).

    Args:
        x: (B, heads, T, hs).
        cos: of each pair's angle, (1 or B, 1, T, hs / 2).
        sin: likewise.

    Returns:
        (B, heads, T, hs), in the dtype of `x`.
    """
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # (B, heads, T, hs / 2)
    return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2).type_as(x)
