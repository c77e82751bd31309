"""A LLaMA with prefixes next to its self-attention: what an Aligner of several tokens becomes in transformers.

For every prefix and layer, with the queries q of the self-attention, normalised and rotated where those are,

    out = W_o (selfattention + sum over prefixes of softmax(q K^T / sqrt(hs)) V)

where K and V are kept for each layer as they come out of its projections, and V already holds the gates
(arXiv 2312.05503). Written by scripts/export_hf_checkpoint.py of Lit-LLaMA-Aligner.
"""

# pyright: reportAttributeAccessIssue=false, reportCallIssue=false

import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaForCausalLM, apply_rotary_pos_emb
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3ForCausalLM
from transformers.models.smollm3.configuration_smollm3 import SmolLM3Config
from transformers.models.smollm3.modeling_smollm3 import SmolLM3Attention, SmolLM3ForCausalLM


class PrefixConfig:
    """The number of tokens of each prefix of each layer, in addition to a family's own configuration."""

    def __init__(self, prefix_lengths=(), **kwargs):
        self.prefix_lengths = [list(lengths) for lengths in prefix_lengths]
        super().__init__(**kwargs)


class PrefixAttention:
    """Self-attention that also attends to prefixes, each with a softmax of its own."""

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.prefix_lengths = config.prefix_lengths[layer_idx]
        shape = (config.num_attention_heads, sum(self.prefix_lengths), self.head_dim)
        self.prefix_k = nn.Parameter(torch.zeros(shape))
        self.prefix_v = nn.Parameter(torch.zeros(shape))

    def forward(self, hidden_states, position_embeddings, **kwargs):
        output, weights = super().forward(hidden_states, position_embeddings=position_embeddings, **kwargs)
        q = self.q_proj(hidden_states).unflatten(-1, (-1, self.head_dim))
        if hasattr(self, "q_norm"):  # Qwen3
            q = self.q_norm(q)
        q = q.transpose(1, 2)
        if getattr(self, "use_rope", True):  # not in some layers of SmolLM3
            q, _ = apply_rotary_pos_emb(q, q, *position_embeddings)
        y = torch.zeros_like(q)
        prefixes = zip(*(heads.split(self.prefix_lengths, 1) for heads in (self.prefix_k, self.prefix_v)), strict=True)
        for prefix in prefixes:
            k, v = (heads.to(q.dtype).expand(q.size(0), -1, -1, -1) for heads in prefix)
            y = y + F.scaled_dot_product_attention(q, k, v, scale=self.scaling)
        added = self.o_proj(y.transpose(1, 2).flatten(2))
        if self.o_proj.bias is not None:  # `output` has it already
            added = added - self.o_proj.bias
        return output + added, weights


class PrefixForCausalLM:
    """A model some of whose layers have prefixes."""

    def __init__(self, config):
        super().__init__(config)
        for index, layer in enumerate(self.model.layers):
            if config.prefix_lengths[index]:
                layer.self_attn = self.attention_class(config, index)
        self.post_init()


class PrefixLlamaConfig(PrefixConfig, LlamaConfig):
    model_type = "prefix_llama"


class PrefixLlamaAttention(PrefixAttention, LlamaAttention):
    pass


class PrefixLlamaForCausalLM(PrefixForCausalLM, LlamaForCausalLM):
    config_class, attention_class = PrefixLlamaConfig, PrefixLlamaAttention


class PrefixQwen3Config(PrefixConfig, Qwen3Config):
    model_type = "prefix_qwen3"


class PrefixQwen3Attention(PrefixAttention, Qwen3Attention):
    pass


class PrefixQwen3ForCausalLM(PrefixForCausalLM, Qwen3ForCausalLM):
    config_class, attention_class = PrefixQwen3Config, PrefixQwen3Attention


class PrefixSmolLM3Config(PrefixConfig, SmolLM3Config):
    model_type = "prefix_smollm3"


class PrefixSmolLM3Attention(PrefixAttention, SmolLM3Attention):
    pass


class PrefixSmolLM3ForCausalLM(PrefixForCausalLM, SmolLM3ForCausalLM):
    config_class, attention_class = PrefixSmolLM3Config, PrefixSmolLM3Attention
