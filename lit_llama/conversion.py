"""Writing a base model's folder from another project's weights, one shard in memory at a time."""

import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from lit_llama.checkpoint import CONFIG_FILE, base_hashes, parameter_shapes
from lit_llama.config import LLaMAConfig
from lit_llama.files import write_json
from lit_llama.formats.hf import pairs_from_halves
from lit_llama.tensor_files import check_shape, refuse_names
from lit_llama.tokenizer import TEMPLATE_DIR, TOKENIZER_FILES, Tokenizer, tokenizer_file

SHARD_BYTES = 4 * 1024**3


def write_base(
    folder: Path,
    config: LLaMAConfig,
    tensors: Mapping[str, Tensor],
    names: Mapping[str, list[str]],
    source: dict[str, Any],
    dtype: torch.dtype | None = None,
    halved_rotary: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Convert a base model's weights and write them with its configuration, one shard in memory at a time.

    Args:
        folder: where to write, with the tokenizer in it already; see `lit_llama.files.atomic_folder`.
        config: the model's configuration.
        tensors: the source's tensors, best read lazily.
        names: for each Lit-LLaMA parameter name, "{}" in the place of the layer's number, the names of the source's
            tensors that it is stacked of.
        source: where the model came from, kept in `lit_config.json`.
        dtype: number format of the weights on disk; as they come if None.
        halved_rotary: the source's query and key rows have each head's rotary pairs as two halves, not interleaved.
        shard_bytes: largest shard.

    Raises:
        ValueError: the source lacks a tensor, has one too many, or one of another shape than the configuration says;
            or the tokenizer already in `folder` is not this model's.
    """
    Tokenizer(folder).check_vocabulary(config.vocab_size)
    shapes = parameter_shapes(config)
    sources = {name: source_names(name, names) for name in shapes}
    needed = {part for parts in sources.values() for part in parts}
    if needed != set(tensors):
        refuse_names(source["from"], needed - set(tensors), set(tensors) - needed)

    def read(name: str) -> Tensor:
        try:
            parts = [tensors[part] for part in sources[name]]
            if halved_rotary and len(parts) == 3:  # query, key, value
                parts[:2] = [pairs_from_halves(part, config.head_size) for part in parts[:2]]
            tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
        except (RuntimeError, IndexError) as error:  # what torch says of shapes that do not fit each other
            reason = str(error).splitlines()[0]
            raise ValueError(f"{source['from']}: {', '.join(sources[name])} do not make {name} ({reason})") from None
        check_shape(name, tensor.shape, shapes[name], source["from"])
        return tensor.to(dtype=dtype).contiguous()

    write_weights(folder, ({name: read(name)} for name in shapes), len(shapes), shard_bytes)
    fields = config.to_dict()
    write_json(folder / CONFIG_FILE, {"config": fields, "source": source, "sha256": base_hashes(folder, fields)})


def write_weights(
    folder: Path, groups: Iterable[dict[str, Tensor]], total: int, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write tensors as safetensors under Hugging Face's names of files, one shard in memory at a time.

    Args:
        folder: where to write; nobody reads it yet.
        groups: tensors by name, those that come together in one shard.
        total: how many groups there are.
        shard_bytes: largest shard, unless a group is larger.
    """
    shards: list[list[str]] = []
    waiting: dict[str, Tensor] = {}
    total_bytes = waiting_bytes = 0

    def write() -> None:
        save_file(waiting, folder / f"shard-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(waiting))
        waiting.clear()

    for group in tqdm(groups, total=total, desc="weights", leave=False):
        size = sum(tensor.nbytes for tensor in group.values())
        if waiting and waiting_bytes + size > shard_bytes:
            write()
            waiting_bytes = 0
        waiting |= group
        waiting_bytes += size
        total_bytes += size
    write()
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards):
        file = "model.safetensors" if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{i}").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)


def source_names(name: str, names: Mapping[str, list[str]]) -> list[str]:
    """The names of `names`, see `write_base`, for the parameter `name`, with its layer's number in them."""
    layer = re.search(r"\.h\.(\d+)\.", name)
    if layer is None:
        return names[name]
    return [part.format(layer[1]) for part in names[name.replace(layer[0], ".h.{}.")]]


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
