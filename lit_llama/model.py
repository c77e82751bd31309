"""LLaMA: attention, MLP, norm. The file reads top to bottom and knows no method of tuning.

Other families differ from LLaMA by fields of the configuration: biases in the attention (Qwen2), a norm of each head's
query and key (Qwen3), layers without rotation (SmolLM3).

Names and layout of the parameters are Lit-LLaMA's: query, key and value projections stacked in `c_attn`, rotary
pairs interleaved. Shape comments use B batch, T time, C embedding, nh query heads, nkv key/value heads, hs head size,
N prefix tokens, S cache length, V vocabulary.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lit_llama.attention import attend_grouped
from lit_llama.backward import causal_attention, rms_norm, scores_in_pieces, swiglu
from lit_llama.cache import KVCache, LayerCache
from lit_llama.config import LLaMAConfig
from lit_llama.rotary import apply_rope, rope_frequencies
from lit_llama.seam import (
    NO_UPDATES,
    Adapter,
    ExpandedAdapter,
    ExpandedPrefix,
    LayerAdapter,
    LayerPrefix,
    Updates,
    after_prompt,
    updated,
)
from lit_llama.shapes import without_values

# The attention's parameters whose rows stand in the order of the rotary pairs, and how many of the parts that each is
# stacked of do so: of q, k and v the first two.
ROTARY_PARTS = {"c_attn.weight": 2, "c_attn.bias": 2, "q_norm.scale": 1, "k_norm.scale": 1}
LOGITS_AT_ONCE = 2**25  # 128 MB in float32, of which a loss makes a few copies
LOGITS_AT_ONCE_ON_CPU = 2**23  # which its caches hold


class SequenceLayout(NamedTuple):
    """Where the tokens of a forward stand; the same for every layer.

    Args:
        rope: cosine and sine of the rotary angles, (1 or B, 1, T, hs / 2) each.
        mask: (B, 1, T, S), 0 for cached positions that a query sees and minus infinity for others; None means causal
            attention within a sequence.
        positions: (B, T), where to store keys and values in the cache; None stores them from 0.
        lengths: lengths of the sequences that the only row holds, one after the other; None: a row is a sequence.
    """

    rope: tuple[Tensor, Tensor]
    mask: Tensor | None
    positions: Tensor | None
    lengths: list[int] | None


class LLaMA(nn.Module):
    """A LLaMA-family language model (arXiv 2302.13971, 2307.09288, 2407.21783).

    Args:
        config: sizes and constants.
    """

    def __init__(self, config: LLaMAConfig) -> None:
        super().__init__()
        self.config = config
        self.fingerprint = ""  # of the weights; set by whoever loads them
        self.length_multiple = 1  # of sequences for training, see `compile_blocks`
        self.compiled: Callable[..., Tensor] | None = None  # `forward` for decoding, see `lit_llama.devices.layouts`
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
        return self.head(
            self.hidden_states(ids, adapter, at=logits_at, cache=cache, positions=positions, lengths=lengths)
        )

    def hidden_states(
        self,
        ids: Tensor,
        adapter: Adapter | None = None,
        *,
        at: Tensor | None = None,
        cache: KVCache | None = None,
        positions: Tensor | None = None,
        lengths: list[int] | None = None,
    ) -> Tensor:
        """What the output head reads: the last layer's output, normed.

        Args:
            ids: see `forward`, as the other arguments.
            at: bool (B, T); at these positions alone.

        Returns:
            (B, T, C), or (n, C) for the n positions chosen by `at`, row by row.

        Raises:
            ValueError: more positions than the model's window.
        """
        longest = max(lengths) if lengths else ids.size(1)
        if longest > self.config.block_size:
            raise ValueError(f"sequence of {longest} tokens exceeds the model's window of {self.config.block_size}")
        layout = self._layout(ids, cache, positions, lengths)
        x = self.transformer.wte(ids)  # (B, T, C)
        for i, block in enumerate(self.transformer.h):
            layer_cache = None if cache is None else cache.layers[i]
            if layer_cache is not None and layer_cache.adapter is not None:
                added = layer_cache.adapter
            else:
                added = LayerAdapter() if adapter is None else adapter.layer(i)
            x = block(x, layout, added, layer_cache)
        return self.transformer.ln_f(x if at is None else x[at])  # (B, T, C) or (n, C)

    def head(self, x: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., C)."""
        return F.linear(x, self.transformer.wte.weight) if self.lm_head is None else self.lm_head(x)

    def scores(self, score: Callable[..., Tensor], hidden: Tensor, *others: Tensor) -> Tensor:
        """A number for each hidden state, such as a loss, without the logits of all of them at once.

        Args:
            score: takes a few rows of `hidden`, and the same rows of each of `others`, from which it may make logits
                by `head`; returns a number for each. It depends on nothing else that gets a gradient.
            hidden: (n, C), gets a gradient.
            others: (n, ...) each, get none.

        Returns:
            (n).
        """
        at_once = LOGITS_AT_ONCE_ON_CPU if hidden.device.type == "cpu" else LOGITS_AT_ONCE
        piece = max(1, at_once // self.config.vocab_size)
        return scores_in_pieces(score, piece, hidden, *others)

    def new_cache(self, batch_size: int, length: int) -> KVCache:
        """An empty KV cache, `batch_size` rows of `length` positions, on the model's device and in its dtype."""
        return KVCache.empty(self.config, batch_size, length, self.device, self.dtype)

    def _layout(
        self, ids: Tensor, cache: KVCache | None, positions: Tensor | None, lengths: list[int] | None
    ) -> SequenceLayout:
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
        return SequenceLayout((angles.cos(), angles.sin()), mask, positions, lengths)

    def checkpoint_activations(self) -> None:
        """From now on keep only the input of each block for the backward pass, and compute the rest again there."""
        for block in self.transformer.h:
            block.recompute = True  # type: ignore[assignment]

    def compile_blocks(self) -> None:
        """From now on let a compiled function compute each block, apart from generation.

        It is made when it is first used, and again for other shapes; so batches are to be padded to few lengths, see
        `lit_llama.data.Batch.padded`.
        """
        self.length_multiple = 64
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        for block in self.transformer.h:
            block.compiled = torch.compile(block._forward, dynamic=False)  # type: ignore[assignment]

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
        self.h = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.ln_f = RMSNorm(config.n_embd, config.norm_eps)


class Block(nn.Module):
    """Pre-norm transformer block; takes and returns (B, T, C), see `CausalSelfAttention.forward` for the rest."""

    def __init__(self, config: LLaMAConfig, index: int) -> None:
        super().__init__()
        self.rms_1 = RMSNorm(config.n_embd, config.norm_eps)
        self.attn = CausalSelfAttention(config, index)
        self.rms_2 = RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = MLP(config)
        self.recompute = False
        self.compiled: Callable[..., Tensor] | None = None  # `_forward`, see `LLaMA.compile_blocks`

    def forward(
        self, x: Tensor, layout: SequenceLayout, adapter: LayerAdapter | ExpandedAdapter, cache: LayerCache | None
    ) -> Tensor:
        compute = self._forward if self.compiled is None or cache is not None else self.compiled
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(compute, x, layout, adapter, cache, use_reentrant=False)  # type: ignore[return-value]
        return compute(x, layout, adapter, cache)

    def _forward(
        self, x: Tensor, layout: SequenceLayout, adapter: LayerAdapter | ExpandedAdapter, cache: LayerCache | None
    ) -> Tensor:
        x = x + self.attn(self.rms_1(x), layout, adapter, cache)
        return x + self.mlp(self.rms_2(x), adapter.updates)


class CausalSelfAttention(nn.Module):
    """Grouped-query causal self-attention of layer `index`, with the seam for a gated prefix."""

    def __init__(self, config: LLaMAConfig, index: int) -> None:
        super().__init__()
        self.n_head, self.n_kv_head, self.head_size = config.n_head, config.n_kv_head, config.head_size
        self.rows = config.qkv_rows
        self.rotates = index not in config.unrotated_layers
        self.c_attn = nn.Linear(config.n_embd, sum(self.rows), bias=config.qkv_bias)
        self.c_proj = nn.Linear(self.n_head * self.head_size, config.n_embd, bias=config.o_bias)
        self.q_norm = RMSNorm(self.head_size, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_size, config.norm_eps) if config.qk_norm else None

    def forward(
        self, x: Tensor, layout: SequenceLayout, adapter: LayerAdapter | ExpandedAdapter, cache: LayerCache | None
    ) -> Tensor:
        """Attend to the sequence, add the prefix's contribution, project.

        Args:
            x: (B, T, C).
            layout: where its tokens stand.
            adapter: what is added here.
            cache: this layer's, if any.

        Returns:
            (B, T, C).
        """
        q, k, v = self.qkv(x, adapter.updates, layout.rope if self.rotates else None)
        if cache is not None:
            if layout.positions is None:
                cache.prefill(k, v)
            else:
                k, v = cache.append(k, v, layout.positions)  # (B, nkv, S, hs)
        if layout.mask is not None:
            y = attend_grouped(q, k, v, layout.mask)  # (B, nh, T, hs)
        elif layout.lengths is None:
            y = causal_attention(q, k, v)  # (B, nh, T, hs)
        else:  # sequence by sequence, so that no mask of T x T is ever made
            split = zip(*(heads.split(layout.lengths, dim=2) for heads in (q, k, v)), strict=True)
            y = torch.cat([causal_attention(*heads) for heads in split], dim=2)  # (1, nh, T, hs)
        if isinstance(adapter, LayerAdapter):
            later = after_prompt(adapter)
            added = self.expand(adapter if layout.positions is None else later, q.dtype)
            if cache is not None:
                cache.adapter = added if later is adapter else self.expand(later, q.dtype)
            adapter = added
        for prefix in adapter.prefixes:
            y = y + self.prefix_contribution(q, prefix)
        y = y.transpose(1, 2).flatten(2)  # (B, T, nh * hs)
        return updated("o", self.c_proj(y), y, adapter.updates)  # (B, T, C)

    def qkv(
        self, x: Tensor, updates: Updates, rope: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, nh, T, hs), keys and values (B, nkv, T, hs) of (B, T, C); the first two normalised and rotated.

        What is not rotated, as a prefix and some families' layers, is given no angles.
        """
        y = self.c_attn(x)  # (B, T, (nh + 2 nkv) * hs)
        if any(name in updates for name in "qkv"):
            parts = y.split(self.rows, dim=-1)
            y = torch.cat([updated(name, part, x, updates) for name, part in zip("qkv", parts, strict=True)], dim=-1)
        heads = y.unflatten(-1, (-1, self.head_size)).transpose(1, 2)  # (B, nh + 2 nkv, T, hs)
        turned, v = heads.split([self.n_head + self.n_kv_head, self.n_kv_head], dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = turned.split([self.n_head, self.n_kv_head], dim=1)
            turned = torch.cat([self.q_norm(q), self.k_norm(k)], dim=1)
        if rope is not None:
            turned = apply_rope(turned, *rope)
        q, k = turned.split([self.n_head, self.n_kv_head], dim=1)
        return q, k, v

    def expand(self, adapter: LayerAdapter, dtype: torch.dtype) -> ExpandedAdapter:
        """What an adapter adds here, with the keys and values of its prefixes worked out."""
        return ExpandedAdapter(tuple(self.expand_prefix(prefix, dtype) for prefix in adapter.prefixes), adapter.updates)

    def expand_prefix(self, prefix: LayerPrefix, dtype: torch.dtype) -> ExpandedPrefix:
        """The prefix's keys and values in `dtype`."""
        _, k, v = self.qkv(prefix.tokens.to(dtype), NO_UPDATES)  # (1 or B, nkv, N, hs)
        gates = prefix.gates.to(dtype)[:, :, None, None]  # (1 or B, nh, 1, 1)
        share = None if prefix.share is None else prefix.share.to(dtype)[:, None, :, None]  # (B, 1, T, 1)
        if k.size(2) > 1:
            return ExpandedPrefix(v, k, gates, share)
        return ExpandedPrefix(gates * v.repeat_interleave(self.n_head // self.n_kv_head, dim=1), share=share)

    def prefix_contribution(self, q: Tensor, prefix: ExpandedPrefix) -> Tensor:
        """Gated attention of rotated queries (B, nh, T, hs) over the prefix, with a softmax of its own.

        The prefix stands outside the sequence: its keys are not rotated, and every position sees all of it.

        Returns:
            (B, nh, T, hs), or (1 or B, nh, 1, hs) where one token makes it the same at every position.
        """
        y = prefix.v
        if prefix.k is not None and prefix.gates is not None:  # the softmax over one token is 1 for every query
            y = prefix.gates * attend_grouped(q, prefix.k, prefix.v)  # (B, nh, T, hs)
        return y if prefix.share is None else prefix.share * y


class MLP(nn.Module):
    """SwiGLU feed-forward network."""

    def __init__(self, config: LLaMAConfig) -> None:
        super().__init__()
        self.c_fc1 = nn.Linear(config.n_embd, config.intermediate_size, bias=False)
        self.c_fc2 = nn.Linear(config.n_embd, config.intermediate_size, bias=False)
        self.c_proj = nn.Linear(config.intermediate_size, config.n_embd, bias=False)

    def forward(self, x: Tensor, updates: Updates) -> Tensor:
        gate = updated("gate", self.c_fc1(x), x, updates)
        x = swiglu(gate, updated("up", self.c_fc2(x), x, updates))  # (B, T, intermediate size)
        return updated("down", self.c_proj(x), x, updates)


class RMSNorm(nn.Module):
    """Root mean square normalisation (arXiv 1910.07467), computed in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.scale, self.eps)


def parameter_shapes(config: LLaMAConfig) -> dict[str, torch.Size]:
    """Name and shape of each parameter, in the model's order."""
    with without_values():
        return {name: parameter.shape for name, parameter in LLaMA(config).named_parameters()}
