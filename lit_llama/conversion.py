"""Writing a base model's folder from another project's weights."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_llama.checkpoint import CONFIG_FILE, base_hashes
from lit_llama.config import LLaMAConfig
from lit_llama.files import write_json
from lit_llama.model import parameter_shapes
from lit_llama.tensor_files import SHARD_BYTES, check_shape, write_weights
from lit_llama.tokenizer import TEMPLATE_DIR, TOKENIZER_FILES, Tokenizer, tokenizer_file


def write_base(
    folder: Path,
    config: LLaMAConfig,
    tensors: Mapping[str, Tensor],
    source: dict[str, Any],
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a base model's weights with its configuration, one shard in memory at a time.

    Args:
        folder: where to write, with the tokenizer in it already; see `lit_llama.files.atomic_folder`.
        config: the model's configuration.
        tensors: the weights by Lit-LLaMA's names, such as `lit_llama.formats.names.LitTensors`.
        source: where the model came from, kept in `lit_config.json`; "from" names it in error messages.
        dtype: number format of the weights on disk; as they come if None.
        shard_bytes: largest shard.

    Raises:
        ValueError: a tensor has another shape than the configuration says; or the tokenizer already in `folder` is not
            this model's.
    """
    Tokenizer(folder).check_vocabulary(config.vocab_size)
    shapes = parameter_shapes(config)

    def read(name: str) -> Tensor:
        tensor = tensors[name]
        check_shape(name, tensor.shape, shapes[name], source["from"])
        return tensor.to(dtype=dtype).contiguous()

    write_weights(folder, ({name: read(name)} for name in shapes), len(shapes), shard_bytes)
    fields = config.to_dict()
    write_json(folder / CONFIG_FILE, {"config": fields, "source": source, "sha256": base_hashes(folder, fields)})


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy a model's tokenizer files as they are.

    Raises:
        FileNotFoundError: there is no tokenizer in `source`.
    """
    tokenizer_file(source)
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    for file in sorted((source / TEMPLATE_DIR).glob("*.jinja")):
        (target / TEMPLATE_DIR).mkdir(exist_ok=True)
        shutil.copyfile(file, target / TEMPLATE_DIR / file.name)
