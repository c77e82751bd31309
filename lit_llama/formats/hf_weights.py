"""The weights of a Hugging Face folder, as they are, under Lit-LLaMA's names."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from lit_llama.config import LLaMAConfig
from lit_llama.files import read_json
from lit_llama.formats.hf import NAMES, PROJECTIONS, config_from_hf, multipliers
from lit_llama.formats.names import LitTensors
from lit_llama.tensor_files import TensorFiles, weight_files

HF_CONFIG_FILE = "config.json"
FUSED = {"self_attn.qkv_proj": "qkv", "mlp.gate_up_proj": ("gate", "up")}  # Phi-3's, stacked of these projections


def read_hf_config(folder: Path) -> LLaMAConfig:
    """The configuration of a Hugging Face folder; the model is called what the folder is.

    Raises:
        FileNotFoundError: there is no config.json.
        ValueError: it is damaged, or the model has something that `lit_llama.model` cannot compute.
    """
    file = folder / HF_CONFIG_FILE
    return config_from_hf(read_json(file), folder.resolve().name, file)


def open_hf(folder: Path) -> tuple[LLaMAConfig, LitTensors]:
    """A Hugging Face folder with safetensors or `.bin` files: its configuration, and its weights by Lit-LLaMA's names.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, the model has something that `lit_llama.model` cannot compute, or there are too
            few or too many tensors.
    """
    config, fields = read_hf_config(folder), read_json(folder / HF_CONFIG_FILE)
    tied = config.tie_embeddings or fields.get("tie_word_embeddings") is True  # Granite's are tied but for a factor
    files = TensorFiles(weight_files(folder), r".*rotary_emb\.inv_freq" + (r"|lm_head\.weight" if tied else ""))
    tensors = LlamaTensors(files, config, multipliers(fields, config.head_size), tied)
    return config, LitTensors(tensors, NAMES, config, folder, halved_rotary=True)


class LlamaTensors(Mapping[str, Tensor]):
    """The tensors of a Hugging Face folder as transformers' LLaMA has them, read when they are asked for.

    Args:
        files: the folder's tensors.
        config: configuration of the model.
        factors: what the weights of modules are multiplied by, see `lit_llama.formats.hf.multipliers`.
        tied: the files hold no head, because it is the embedding.
    """

    def __init__(
        self, files: Mapping[str, Tensor], config: LLaMAConfig, factors: Mapping[str, float], tied: bool
    ) -> None:
        self._files, self._factors = files, factors
        self._sources: dict[str, tuple[str, slice]] = {}  # the name in the files, and which rows
        for name in files:
            fused = next((module for module in FUSED if f".{module}." in name), None)
            start = 0
            for projection in FUSED.get(fused or "", ()):
                end = start + config.width(projection)[1]
                part = name.replace(str(fused), PROJECTIONS[projection])
                self._sources[part], start = (name, slice(start, end)), end
            if fused is None:
                self._sources[name] = name, slice(None)
        embedding = self._sources.get("model.embed_tokens.weight")
        if tied and not config.tie_embeddings and embedding is not None:
            self._sources["lm_head.weight"] = embedding  # with another factor

    def __getitem__(self, name: str) -> Tensor:
        source, rows = self._sources[name]
        tensor, factor = self._files[source][rows], self._factors.get(name.split(".")[-2], 1.0)
        return tensor if factor == 1.0 else (tensor.float() * factor).to(tensor.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)
