"""Sizes and constants of a LLaMA-family model, and the presets of the common ones."""

import math
import re
import reprlib
from dataclasses import asdict, dataclass
from typing import Any, Literal

from lit_llama.fields import check_list, check_value, take

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
# What LLaMA does not have. A file may leave these out, because it may have been written before they were known.
_FEATURES = ("qkv_bias", "o_bias", "qk_norm", "unrotated_layers", "scaled_weights")


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
        qkv_bias: the projections of queries, keys and values have a bias (Qwen2).
        o_bias: the output projection of the attention has a bias (Llama with `attention_bias`).
        qk_norm: each head's query and key is normalised by RMSNorm before rotation (Qwen3).
        unrotated_layers: numbers of the layers whose queries and keys are not rotated (SmolLM3), in ascending order.
        scaled_weights: constants are in the weights that the model's own implementation multiplies activations by
            (Granite), so that adapters of other programs do not fit.

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
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False
    unrotated_layers: tuple[int, ...] = ()
    scaled_weights: bool = False

    def __post_init__(self) -> None:
        fill = object.__setattr__  # the dataclass is frozen
        check_value(self.name, "name", str)
        for name in ("tie_embeddings", "qkv_bias", "o_bias", "qk_norm", "scaled_weights"):
            check_value(getattr(self, name), name, bool)
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
        layers = check_list(list(self.unrotated_layers), "unrotated_layers", int, None, least=0)
        if layers != sorted(set(layers)) or (layers and layers[-1] >= self.n_layer):
            raise ValueError(
                f"unrotated_layers is {reprlib.repr(layers)}, expected numbers of layers below {self.n_layer} in "
                "ascending order"
            )
        fill(self, "unrotated_layers", tuple(layers))

    @classmethod
    def from_name(cls, name: str) -> "LLaMAConfig":
        """The preset of that name, in any case and punctuation; "7B" alone means LLaMA 7B.

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
        """The inverse of `to_dict`. What LLaMA does not have may be left out.

        Raises:
            ValueError: a field is missing or unknown, so that a file of another version is never half read; or it
                cannot be a model's.
        """
        known, found = set(cls.__dataclass_fields__), set(fields)
        missing, unknown = known - found - set(_FEATURES), found - known
        if missing or unknown:
            lacking, unknown = (reprlib.repr(sorted(names)) for names in (missing, unknown))
            raise ValueError(f"model configuration lacks {lacking} and has unknown {unknown}")
        scaling = take(fields, "rope_scaling", dict, "model configuration", default=None)
        check_value(fields.get("unrotated_layers", []), "unrotated_layers", list)
        try:
            return cls(**{**fields, "rope_scaling": RopeScaling(**scaling) if scaling else None})
        except TypeError as error:  # a field of the scaling is missing or unknown
            raise ValueError(f"rope_scaling: {error}") from None

    @property
    def qkv_rows(self) -> tuple[int, int, int]:
        """Rows of the query, key and value projections, in the order in which `c_attn` stacks them."""
        return self.n_head * self.head_size, self.n_kv_head * self.head_size, self.n_kv_head * self.head_size

    def width(self, projection: str) -> tuple[int, int]:
        """Inputs and outputs of a projection, by its name in `lit_llama.seam.PROJECTIONS`."""
        q, k, v = self.qkv_rows
        return {
            "q": (self.n_embd, q),
            "k": (self.n_embd, k),
            "v": (self.n_embd, v),
            "o": (q, self.n_embd),
            "gate": (self.n_embd, self.intermediate_size),
            "up": (self.n_embd, self.intermediate_size),
            "down": (self.intermediate_size, self.n_embd),
        }[projection]

    def to_dict(self) -> dict[str, Any]:
        """Every field, as JSON knows them."""
        return {**asdict(self), "unrotated_layers": list(self.unrotated_layers)}


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


_LLAMA_1: dict[str, Any] = {"norm_eps": 1e-6}
_LLAMA_2: dict[str, Any] = {"block_size": 4096}
_LLAMA_3: dict[str, Any] = {"block_size": 8192, "vocab_size": 128256, "rope_base": 500000.0, "n_kv_head": 8}
_LLAMA_31 = _LLAMA_3 | {"block_size": 131072, "rope_scaling": RopeScaling("llama3", factor=8.0)}
_LLAMA_32 = _LLAMA_31 | {"rope_scaling": RopeScaling("llama3", factor=32.0), "tie_embeddings": True}
_SMOLLM2: dict[str, Any] = {"block_size": 8192, "vocab_size": 49152, "rope_base": 100000.0, "tie_embeddings": True}
_SMOLLM3 = _SMOLLM2 | {"block_size": 65536, "vocab_size": 128256, "rope_base": 5e6, "norm_eps": 1e-6, "n_kv_head": 4}
_QWEN: dict[str, Any] = {"block_size": 32768, "vocab_size": 151936, "rope_base": 1e6, "norm_eps": 1e-6}
_QWEN_25 = _QWEN | {"qkv_bias": True}
_QWEN_25_LARGE = _QWEN_25 | {"vocab_size": 152064, "norm_eps": 1e-5, "n_kv_head": 8}
_QWEN_3 = _QWEN | {"block_size": 40960, "qk_norm": True, "n_kv_head": 8, "head_size": 128}
_MISTRAL: dict[str, Any] = {"block_size": 32768, "vocab_size": 32768, "rope_base": 1e6, "n_kv_head": 8}
_NEMO = _MISTRAL | {"vocab_size": 131072, "head_size": 128}
_PHI_4: dict[str, Any] = {"block_size": 16384, "vocab_size": 100352, "rope_base": 2.5e5, "n_kv_head": 10}
_TIED: dict[str, Any] = {"tie_embeddings": True}


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
    _preset(_SMOLLM3, "SmolLM3-3B", 36, 16, 2048, intermediate_size=11008, unrotated_layers=tuple(range(3, 36, 4))),
    _preset(_QWEN_25 | _TIED, "Qwen2.5-0.5B", 24, 14, 896, n_kv_head=2, intermediate_size=4864),
    _preset(_QWEN_25 | _TIED, "Qwen2.5-1.5B", 28, 12, 1536, n_kv_head=2, intermediate_size=8960),
    _preset(_QWEN_25 | _TIED, "Qwen2.5-3B", 36, 16, 2048, n_kv_head=2, intermediate_size=11008),
    _preset(_QWEN_25, "Qwen2.5-7B", 28, 28, 3584, n_kv_head=4, intermediate_size=18944, vocab_size=152064),
    _preset(_QWEN_25_LARGE, "Qwen2.5-14B", 48, 40, 5120, intermediate_size=13824),
    _preset(_QWEN_25_LARGE, "Qwen2.5-32B", 64, 40, 5120, intermediate_size=27648),
    _preset(_QWEN_3 | _TIED, "Qwen3-0.6B", 28, 16, 1024, intermediate_size=3072),
    _preset(_QWEN_3 | _TIED, "Qwen3-1.7B", 28, 16, 2048, intermediate_size=6144),
    _preset(_QWEN_3 | _TIED, "Qwen3-4B", 36, 32, 2560, intermediate_size=9728),
    _preset(_QWEN_3, "Qwen3-8B", 36, 32, 4096, intermediate_size=12288),
    _preset(_QWEN_3, "Qwen3-14B", 40, 40, 5120, intermediate_size=17408),
    _preset(_QWEN_3, "Qwen3-32B", 64, 64, 5120, intermediate_size=25600),
    _preset(_MISTRAL, "Mistral-7B-v0.3", 32, 32, 4096, intermediate_size=14336),
    _preset(_NEMO, "Mistral-Nemo-12B", 40, 32, 5120, intermediate_size=14336, block_size=131072),
    _preset(_NEMO, "Mistral-Small-24B", 40, 32, 5120, intermediate_size=32768, rope_base=1e8),
    _preset(
        {},
        "Phi-4",
        40,
        40,
        5120,
        n_kv_head=10,
        intermediate_size=17920,
        vocab_size=100352,
        block_size=16384,
        rope_base=2.5e5,
    ),
]
