"""Base models and adapters on disk: read, write, verify. Nothing is unpickled but tensors.

A base is a folder: `lit_config.json`, the tokenizer's own files, and weights in safetensors under Lit-LLaMA's names,
sharded with Hugging Face's kind of index when large. A plain Lit-LLaMA `.pth` file is read as well.

An adapter is one safetensors file whose metadata say what it is. The Aligner authors' `.pth` files are read as well.
"""

import hashlib
import inspect
import io
import json
import re
import reprlib
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, get_args, get_origin

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from lit_llama.aligner import Aligner
from lit_llama.bias import Bias
from lit_llama.config import PRESETS, LLaMAConfig
from lit_llama.fields import check_list, check_object, check_value, naming, take
from lit_llama.files import atomic_file, check_file, parse_json, read_json, write_json
from lit_llama.hf import pairs_from_halves
from lit_llama.llama_adapter import LLaMAAdapter
from lit_llama.lora import LoRA
from lit_llama.model import LLaMA
from lit_llama.quantization import Quantize, is_quantized, quantize_layers, quantize_weight
from lit_llama.safetensors_file import Header, finite, read_tensors
from lit_llama.sharding import local_rows, shard
from lit_llama.tokenizer import TEMPLATE_DIR, TOKENIZER_FILES, Tokenizer

if TYPE_CHECKING:  # slow to import, which --help should not be
    from torch.distributed.device_mesh import DeviceMesh

CONFIG_FILE = "lit_config.json"
SHARD_BYTES = 4 * 1024**3
DType = Literal["float32", "bfloat16", "float16"]
Precision = Literal["auto", "32-true", "bf16-true", "16-true"]
PRECISIONS = {"auto": None, "32-true": torch.float32, "bf16-true": torch.bfloat16, "16-true": torch.float16}


class TensorFiles(Mapping[str, Tensor]):
    """The tensors of weight files, safetensors or torch's, as one mapping. A tensor is read when it is asked for.

    Args:
        files: the files; torch's hold tensors by name and are memory-mapped.
        ignore: pattern of names to leave out.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, holds anything but tensors, or repeats a name.
    """

    def __init__(self, files: Sequence[Path], ignore: str = "") -> None:
        self._readers: dict[str, tuple[Path, Callable[[str], Tensor]]] = {}
        for file in files:
            check_file(file)
            for name, read in _open_tensors(file):
                if re.fullmatch(ignore, name):
                    continue
                if name in self._readers:
                    raise ValueError(f"{name} is both in {self._readers[name][0]} and in {file}")
                self._readers[name] = file, read

    def __getitem__(self, name: str) -> Tensor:
        file, read = self._readers[name]
        try:
            return read(name)
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged ({error})") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)


def _open_tensors(file: Path) -> list[tuple[str, Callable[[str], Tensor]]]:
    if file.suffix == ".safetensors":
        try:
            handle = safe_open(file, framework="pt")
        except SafetensorError as error:
            raise ValueError(f"{file} is not a complete safetensors file ({error}): fetch or write it again") from None
        return [(name, handle.get_tensor) for name in handle.keys()]  # noqa: SIM118 (not a mapping)
    tensors = _load_tensors(file, file)
    return [(name, tensors.__getitem__) for name in tensors]


def _load_tensors(file: Path, source: Path | io.BytesIO) -> dict[str, Tensor]:
    """The tensors by name that torch has saved in a file, which is mapped into memory if `source` is its path."""
    try:
        try:
            tensors = torch.load(source, map_location="cpu", mmap=isinstance(source, Path), weights_only=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            tensors = torch.load(source, map_location="cpu", weights_only=True)  # torch's format before 1.6
    except Exception as error:  # junk makes torch's unpickler raise errors of any kind
        raise ValueError(
            f"{file} is not a file of tensors that torch can read without running code in it; nothing was run "
            f"({type(error).__name__})"
        ) from None
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ValueError(f"{file}: expected tensors by name, found {type(tensors).__name__}")
    return tensors


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a model's folder, by Hugging Face's names: safetensors or `.bin`, one or sharded.

    Raises:
        FileNotFoundError: there is no such folder, no weights in it, or a shard is missing.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if index.is_file():
            weight_map = take(check_object(read_json(index), index), "weight_map", dict, index)
            for tensor, shard in weight_map.items():
                check_value(shard, f"{index}: file of {tensor}", str)
                if Path(shard).name != shard:
                    raise ValueError(f"{index}: file of {tensor} is {shard!r}, expected the name of a file beside it")
            files = [folder / shard for shard in sorted(set(weight_map.values()))]
            if not files:
                raise ValueError(f"{index} names no weights")
            missing = [file.name for file in files if not file.is_file()]
            if missing:
                some = ", ".join(missing[:3]) + (f", ... ({len(missing)} files)" if len(missing) > 3 else "")
                raise FileNotFoundError(f"{folder} lacks {some}, which {index.name} names")
            return files
        if (folder / name).is_file():
            return [folder / name]
    raise FileNotFoundError(f"{folder} holds no weights: expected model.safetensors or pytorch_model.bin, or an index")


def parameter_shapes(config: LLaMAConfig) -> dict[str, torch.Size]:
    """Name and shape of each parameter, in the model's order."""
    with torch.device("meta"):
        return {name: parameter.shape for name, parameter in LLaMA(config).named_parameters()}


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
        dtype: of the weights on disk; as they come if None.
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
        _refuse_names(source["from"], needed - set(tensors), set(tensors) - needed)

    def read(name: str) -> Tensor:
        try:
            parts = [tensors[part] for part in sources[name]]
            if halved_rotary and len(parts) == 3:  # query, key, value
                parts[:2] = [pairs_from_halves(part, config.head_size) for part in parts[:2]]
            tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
        except (RuntimeError, IndexError) as error:  # what torch says of shapes that do not fit each other
            reason = str(error).splitlines()[0]
            raise ValueError(f"{source['from']}: {', '.join(sources[name])} do not make {name} ({reason})") from None
        _check_shape(name, tensor.shape, shapes[name], source["from"])
        return tensor.to(dtype=dtype).contiguous()

    write_weights(folder, ({name: read(name)} for name in shapes), len(shapes), shard_bytes)
    write_json(
        folder / CONFIG_FILE, {"config": config.to_dict(), "source": source, "sha256": _base_hashes(folder, config)}
    )


def verify_base(checkpoint_dir: Path) -> int:
    """Compare every byte of a base's weights, its tokenizer and its sizes with the hashes that its conversion wrote.

    Reads the whole model. Loading alone notices files that are cut off, but no values that changed.

    Args:
        checkpoint_dir: folder of the base model.

    Returns:
        The number of files that were compared; 0, with a warning, for a model that was converted before there were
        hashes.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: something is not what the conversion wrote.
    """
    if checkpoint_dir.is_file():
        warnings.warn(f"{checkpoint_dir} is a bare file, which has no hash to check", stacklevel=2)
        return 0
    config, file = read_config(checkpoint_dir), checkpoint_dir / CONFIG_FILE
    expected = take(check_object(read_json(file), file), "sha256", dict, file, {})
    if not expected:
        warnings.warn(f"{file} has no hash to check: convert the model again to have one", stacklevel=2)
        return 0
    found = _base_hashes(checkpoint_dir, config)
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            what = f"the configuration in {file}" if name == "config" else f"{checkpoint_dir / name}"
            raise ValueError(f"{what} is not what the conversion wrote (its hash differs): convert the model again")
    return len(found) - 1


def _base_hashes(folder: Path, config: LLaMAConfig) -> dict[str, str]:
    """SHA-256 of what a base computes with: each file of weights, the tokenizer, and the configuration but its name."""
    files = weight_files(folder) + [folder / name for name in TOKENIZER_FILES[:2] if (folder / name).is_file()]
    hashes = {}
    for file in tqdm(files, desc="hashing", unit="file", leave=False):
        digest = hashlib.sha256()
        with open(file, "rb") as content:
            while block := content.read(2**20):
                digest.update(block)
        hashes[file.name] = digest.hexdigest()
    sizes = json.dumps({**config.to_dict(), "name": ""}, sort_keys=True)
    return hashes | {"config": hashlib.sha256(sizes.encode()).hexdigest()}


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
    if not any((source / name).is_file() for name in TOKENIZER_FILES[:2]):
        raise FileNotFoundError(
            f"{source} holds no tokenizer: expected tokenizer.json or tokenizer.model beside the weights"
        )
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    for file in sorted((source / TEMPLATE_DIR).glob("*.jinja")):
        (target / TEMPLATE_DIR).mkdir(exist_ok=True)
        shutil.copyfile(file, target / TEMPLATE_DIR / file.name)


def read_config(checkpoint_dir: Path) -> LLaMAConfig:
    """The configuration of a base model's folder.

    Raises:
        FileNotFoundError: no such folder, or it is not a converted model.
        ValueError: `lit_config.json` is malformed.
    """
    if not checkpoint_dir.is_dir():
        raise FileNotFoundError(
            f"{checkpoint_dir}: no such folder; convert a base model with one of scripts/convert_*_checkpoint.py"
        )
    file = checkpoint_dir / CONFIG_FILE
    if not file.is_file():
        raise FileNotFoundError(
            f"{checkpoint_dir} holds no {CONFIG_FILE}: convert the model with one of scripts/convert_*_checkpoint.py"
        )
    fields = take(check_object(read_json(file), file), "config", dict, file)
    with naming(file):
        return LLaMAConfig.from_dict(fields)


def load_base(
    path: Path | str,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    config: LLaMAConfig | None = None,
    *,
    mesh: "DeviceMesh | None" = None,
    quantize: Quantize | None = None,
) -> LLaMA:
    """Load a base model, frozen, one tensor at a time. `verify_base` notices values that changed on the disk.

    Args:
        path: a folder written by one of the conversion scripts, or a plain Lit-LLaMA `.pth` file.
        dtype: of the weights in memory; if None, bfloat16 on a GPU that has it and float32 elsewhere.
        device: where to put the weights.
        config: sizes of a `.pth` file that are no known preset's.
        mesh: shard the weights over these processes, see `lit_llama.sharding`.
        quantize: keep the blocks' weights in 4 or 8 bits, see `lit_llama.quantization`.

    Returns:
        The model; its `fingerprint` is the weights'.

    Raises:
        FileNotFoundError: something is missing.
        ValueError: the files are damaged, or weights and configuration do not fit each other.
    """
    path, device = Path(path), torch.device(device)
    if path.is_file():
        tensors = TensorFiles([path])
        config = config or _infer_config(path, tensors)
    else:
        config = config or read_config(path)
        tensors = TensorFiles(weight_files(path))
    with torch.device("meta"):
        model = LLaMA(config)
    expected = {name: parameter.shape for name, parameter in model.named_parameters()}
    if expected.keys() != tensors.keys():
        _refuse_names(path, expected.keys() - tensors.keys(), tensors.keys() - expected.keys())
    dtype = dtype or default_dtype(device)
    if mesh is not None:
        shard(model, mesh)
    if quantize is not None:
        quantize_layers(model, quantize, dtype)
    weights: dict[str, Tensor] = {}
    digest = hashlib.sha256()
    for name, shape in sorted(expected.items()):
        tensor = tensors[name]
        _check_shape(name, tensor.shape, shape, str(path))
        digest.update(_sample(name, tensor))
        layer = model.get_submodule(name.rpartition(".")[0])
        if mesh is not None:
            weights[name] = local_rows(tensor, model.get_parameter(name), dtype)
        elif is_quantized(layer):
            quantize_weight(layer, tensor, device, dtype)
        else:
            weights[name] = tensor.to(device=device, dtype=dtype)
    model.load_state_dict(weights, assign=True, strict=quantize is None)  # names were compared above
    model.fingerprint = digest.hexdigest()
    # The 4-bit kernels that bitsandbytes has for evaluation on a CPU give wrong gradients. Nothing else tells the
    # modes apart.
    return model.requires_grad_(False).train(quantize is not None)


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU that has it, float32 elsewhere."""
    return (
        torch.bfloat16
        if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        else torch.float32
    )


def base_fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """The `LLaMA.fingerprint` of a base's weights, by their Lit-LLaMA names, without loading it."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(_sample(name, tensors[name]))
    return digest.hexdigest()


def _sample(name: str, tensor: Tensor) -> bytes:
    """Name, shape and 64 values of a tensor, rounded to bfloat16 so that float32 and bfloat16 copies agree."""
    flat = tensor.flatten()
    values = flat[:: max(1, flat.numel() // 64)][:64].to(torch.bfloat16)
    return f"{name} {tuple(tensor.shape)}".encode() + values.contiguous().view(torch.int16).numpy().tobytes()


def _check_shape(name: str, found: torch.Size, expected: torch.Size, where: str) -> None:
    if found != expected:
        raise ValueError(f"{where}: {name} has shape {tuple(found)}, the configuration expects {tuple(expected)}")


def _refuse_names(path: Path | str, missing: set[str], unknown: set[str]) -> NoReturn:
    def some(names: set[str]) -> str:
        first = [name if name.isprintable() else ascii(name) for name in sorted(names)[:3]]
        return f"{', '.join(first)}{', ...' if len(names) > 3 else ''} ({len(names)} in all)"

    parts = [f"{word} {some(names)}" for word, names in (("lacks", missing), ("has unknown", unknown)) if names]
    raise ValueError(f"{path}: the weights are not those of the configured model: it {' and '.join(parts)}")


def _infer_config(path: Path, tensors: TensorFiles) -> LLaMAConfig:
    """The preset with the sizes of a bare Lit-LLaMA file, which says nothing about itself."""
    shapes = {name: tensors[name].shape for name in tensors}
    for preset in PRESETS:
        if shapes == parameter_shapes(preset):
            # Lit-LLaMA computes with this epsilon and window whatever the generation.
            return replace(preset, name=path.stem, norm_eps=1e-5, block_size=2048)
    embedding = shapes.get("transformer.wte.weight")
    found = f"its embedding is {tuple(embedding)}" if embedding else "it has no transformer.wte.weight"
    raise ValueError(
        f"{path} is not a Lit-LLaMA file of a known size ({found}): "
        "pass config=LLaMAConfig(...), or convert the original model with one of scripts/convert_*_checkpoint.py"
    )


FORMAT_VERSION = 1
Method = Literal["aligner", "llama_adapter", "lora", "bias"]
AnyAdapter = Aligner | LLaMAAdapter | LoRA | Bias
METHODS: dict[str, type[AnyAdapter]] = {"aligner": Aligner, "llama_adapter": LLaMAAdapter, "lora": LoRA, "bias": Bias}
FORMER_METHODS = {"adapter": "llama_adapter"}  # names in older files
# Limits of what a file may claim before its claims are compared with its tensors. No model comes near them.
MOST_SIZE = 2**24
MOST_LAYERS = 1024


@dataclass(frozen=True)
class AdapterInfo:
    """What an adapter file says about itself.

    Args:
        method: a key of `METHODS`.
        config: its `sizes`.
        base_name: name of the base model it was trained on.
        base_fingerprint: the base's `LLaMA.fingerprint`; empty if unknown.
        prompt_style: the style of its training prompts.
        step: optimizer steps done.
        validation_loss: at that step.
        seconds: training took.
        hyperparameters: of the training run.
        fingerprint: the `adapter_fingerprint` of what the file holds; empty in files that older code wrote.
        format_version: of the file.
    """

    method: str
    config: dict[str, Any]
    base_name: str = ""
    base_fingerprint: str = ""
    prompt_style: str | None = None
    step: int | None = None
    validation_loss: float | None = None
    seconds: float | None = None
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    fingerprint: str = ""
    format_version: int = FORMAT_VERSION


def save_adapter(path: Path | str, adapter: AnyAdapter, base: LLaMA | None = None, **training: Any) -> None:
    """Write an adapter to one safetensors file, atomically.

    Args:
        path: the file to write.
        adapter: what to write.
        base: the model it was trained on, to be recorded.
        training: `prompt_style`, `step`, `validation_loss`, `seconds`, `hyperparameters` of `AdapterInfo`.

    Raises:
        ValueError: it has values that are not finite.
    """
    path = Path(path)
    if base is not None:
        training |= {"base_name": base.config.name, "base_fingerprint": base.fingerprint}
    tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in adapter.state_dict().items()}
    for name, tensor in tensors.items():
        finite(path, name, tensor)
    info = AdapterInfo(adapter.method, adapter.sizes, fingerprint=adapter_fingerprint(adapter), **training)
    metadata = {name: json.dumps(value, default=str) for name, value in asdict(info).items()}
    with atomic_file(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def adapter_file(path: Path | str) -> Path:
    """The file of an adapter. The folder of a training run stands for the adapter in it.

    Args:
        path: the file, or a folder with one file named after a method, such as `aligner.safetensors`.

    Raises:
        FileNotFoundError: there is no such file, or the folder does not hold exactly one.
    """
    path = Path(path)
    if not path.is_dir():
        check_file(path)
        return path
    names = [f"{method}.safetensors" for method in (*METHODS, *FORMER_METHODS)]
    found = [name for name in names if (path / name).is_file()]
    if len(found) != 1:
        raise FileNotFoundError(
            f"{path} is a folder and holds {' and '.join(found) or 'no adapter'}; expected the file of an adapter, or "
            f"a training run's folder, with one of {', '.join(names)} in it"
        )
    return path / found[0]


def load_adapter(path: Path | str, method: Method | None = None) -> AnyAdapter:
    """Load an adapter for use: this project's file of any method, or an Aligner of the authors'.

    Args:
        path: the file, or the folder of its training run.
        method: the only one that is accepted.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, not an adapter, or of another method.
    """
    return read_adapter(path, method)[0]


def read_adapter(
    path: Path | str, method: Method | None = None, model: LLaMA | None = None, allow_other_base: bool = False
) -> tuple[AnyAdapter, AdapterInfo]:
    """Load an adapter for use, together with what its file says about itself. The file is read once.

    Args:
        path: the file, or the folder of its training run.
        method: the only one that is accepted.
        model: the base model that it must belong to, see `check_base`; any base if None.
        allow_other_base: accept an adapter that was trained on other weights of the same sizes, with a warning.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, not an adapter, of another method, or of another base.
    """
    path = adapter_file(path)

    def check(info: AdapterInfo, shapes: Mapping[str, Sequence[int]]) -> AnyAdapter:
        if method is not None and info.method != method:
            raise ValueError(
                f"{path} is of method {info.method!r}, expected {method!r}; generate/{info.method}.py is for it"
            )
        adapter = _without_values(path, info, shapes)
        if model is not None:
            check_base(path, info, model, allow_other_base)
        return adapter

    if path.suffix == ".safetensors":

        def check_header(header: Header) -> tuple[AnyAdapter, AdapterInfo]:
            info = _parse_info(path, header.metadata)
            return check(info, header.shapes), info

        (adapter, info), tensors = read_tensors(path, check_header)
    else:
        tensors, info = _read_authors(path)
        adapter = check(info, {name: tensor.shape for name, tensor in tensors.items()})
    adapter.load_state_dict(tensors, assign=True)
    if info.fingerprint and adapter_fingerprint(adapter) != info.fingerprint:
        raise ValueError(f"{path} is damaged: its values are not those of its fingerprint; fetch or write it again")
    return adapter.eval(), info


def _without_values(path: Path, info: AdapterInfo, shapes: Mapping[str, Sequence[int]]) -> AnyAdapter:
    """The adapter that a file's metadata tell of, without memory for its values, if its tensors have these shapes."""
    place = f"{path}, config"
    method = METHODS[info.method]
    kinds = dict.fromkeys(method.base_sizes, int) | {
        name: parameter.annotation
        for name, parameter in inspect.signature(method).parameters.items()
        if name not in ("config", "init_std")  # of the start alone
    }
    names = set(kinds)
    if info.config.keys() != names:
        lacking, unknown = names - info.config.keys(), info.config.keys() - names
        raise ValueError(
            f"{place}: not that of method {info.method!r}: it lacks {sorted(lacking)} and has unknown "
            f"{reprlib.repr(sorted(unknown))}"
        )
    for name, kind in kinds.items():
        if kind in (int, float):
            take(info.config, name, kind, place, least=int(kind is int and name != "start_layer"), most=MOST_SIZE)
        elif get_origin(kind) is Literal:
            if info.config[name] not in get_args(kind):
                found = reprlib.repr(info.config[name])
                raise ValueError(f"{place}: {name} is {found}, expected one of {', '.join(get_args(kind))}")
        else:
            check_list(info.config[name], name, str, place)
    if info.config["n_layer"] > MOST_LAYERS:
        raise ValueError(f"{place}: n_layer is {info.config['n_layer']}, expected {MOST_LAYERS} at most")
    base = {name: value for name, value in info.config.items() if name in LLaMAConfig.__dataclass_fields__}
    own = {name: value for name, value in info.config.items() if name not in base}
    try:
        with torch.device("meta"):
            adapter = method(LLaMAConfig(**base), **own)
    except (ValueError, RuntimeError) as error:  # torch knows no tensors of 2**63 bytes
        raise ValueError(f"{place}: {error}") from None
    expected = adapter.state_dict()
    if expected.keys() != shapes.keys():
        _refuse_names(path, expected.keys() - shapes.keys(), shapes.keys() - expected.keys())
    for name, tensor in expected.items():
        _check_shape(name, torch.Size(shapes[name]), tensor.shape, str(path))
    return adapter


def adapter_fingerprint(adapter: AnyAdapter) -> str:
    """Hash of what an adapter computes: its method, under the name that it first had, its sizes and values."""
    first = {name: former for former, name in FORMER_METHODS.items()}.get(adapter.method, adapter.method)
    digest = hashlib.sha256(json.dumps([first, adapter.sizes]).encode())
    for name, tensor in sorted(adapter.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def adapter_info(path: Path | str) -> AdapterInfo:
    """What an adapter file says about itself, or what its tensors tell if it is one of the authors'.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or not an adapter.
    """
    return read_adapter(path)[1]


def _parse_info(path: Path, metadata: Mapping[str, str]) -> AdapterInfo:
    """What an adapter file's metadata say, each field of the type that it should have."""
    if "format_version" not in metadata:
        raise ValueError(f"{path} is a safetensors file but not an adapter: its metadata lack a format_version")
    values = {name: parse_json(value, f"{path}, {name}") for name, value in metadata.items()}
    if take(values, "format_version", int, path) != FORMAT_VERSION:
        raise ValueError(f"{path}: format_version is {values['format_version']}, this code reads {FORMAT_VERSION}")
    unknown = values.keys() - AdapterInfo.__dataclass_fields__.keys()
    if unknown:
        raise ValueError(f"{path}: the metadata are not an adapter's: unknown {reprlib.repr(sorted(unknown))}")
    for name, default in (("base_name", ""), ("base_fingerprint", ""), ("fingerprint", ""), ("prompt_style", None)):
        values[name] = take(values, name, str, path, default)
    for name, kind in (("step", int), ("seconds", float)):
        values[name] = take(values, name, kind, path, None, least=0)
    values["validation_loss"] = take(values, "validation_loss", float, path, None)
    take(values, "config", dict, path)
    method = take(values, "method", str, path)
    values["method"] = FORMER_METHODS.get(method, method)
    if values["method"] not in METHODS:
        raise ValueError(f"{path}: method is {method[:100]!r}, expected one of {', '.join(METHODS)}")
    values["hyperparameters"] = take(values, "hyperparameters", dict, path, {})
    bits, known = take(values["hyperparameters"], "quantize", str, f"{path}, hyperparameters", None), get_args(Quantize)
    if bits not in (None, *known):
        raise ValueError(f"{path}, hyperparameters: quantize is {bits[:100]!r}, expected one of {', '.join(known)}")
    return AdapterInfo(**values)


def check_adapter(path: Path, model: LLaMA, allow_other_base: bool = False) -> AdapterInfo:
    """Make sure that an adapter file belongs to a base model, see `read_adapter`; return what it says about itself."""
    return read_adapter(path, None, model, allow_other_base)[1]


def check_base(path: Path, info: AdapterInfo, model: LLaMA, allow_other_base: bool = False) -> None:
    """Make sure that an adapter belongs to a base model.

    Args:
        path: its file, for messages.
        info: what that says about itself.
        model: the base model; without weights will do, if it has their fingerprint.
        allow_other_base: accept an adapter that was trained on other weights of the same sizes, with a warning.

    Raises:
        ValueError: sizes differ, or the weights do and `allow_other_base` is false.
    """
    for name, found in info.config.items():
        expected = getattr(model.config, name, found)  # what is none of the base's sizes fits any base
        if found != expected:
            raise ValueError(
                f"{path} was made for another base: its {name} is {found}, {model.config.name or 'this base'} has "
                f"{expected}; use the base it was trained on ({info.base_name or 'not recorded'})"
            )
    if info.base_fingerprint and info.base_fingerprint != model.fingerprint:
        message = f"{path} was trained on {info.base_name}, whose weights are not those of {model.config.name}"
        if not allow_other_base:
            raise ValueError(f"{message}; --allow_other_base true uses it all the same")
        warnings.warn(message, stacklevel=2)


def _authors_layers(path: Path, tensors: Mapping[str, Tensor]) -> list[int]:
    layers = sorted(
        int(m[1]) for name in tensors if (m := re.fullmatch(r"transformer\.h\.(\d+)\.attn\.gating_factor", name))
    )
    if not layers or layers != list(range(layers[0], layers[-1] + 1)):
        raise ValueError(
            f"{path} is not an Aligner: expected gating_factor tensors of consecutive layers, found {layers}"
        )
    return layers


def _read_authors(path: Path) -> tuple[dict[str, Tensor], AdapterInfo]:
    """The tensors of the authors' format under this project's names, and their sizes; aliases are checked."""
    data = path.read_bytes()
    tensors = _load_tensors(path, io.BytesIO(data))
    shared = "global_value_embedding.weight"
    if shared not in tensors:
        raise ValueError(f"{path} is not an Aligner: it has no {shared}")
    layers = _authors_layers(path, tensors)
    gates = [f"transformer.h.{i}.attn.gating_factor" for i in layers]
    aliases = [f"transformer.h.{i}.attn.adapter_wte.weight" for i in layers]
    unknown = set(tensors) - {shared, *gates, *aliases}
    if unknown:
        _refuse_names(path, set(), unknown)
    for name, tensor in tensors.items():
        is_plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and tensor.is_floating_point()
        if not is_plain or tensor.nbytes > len(data):  # a tensor may claim to be larger than what it is stored in
            raise ValueError(f"{path}: {name} is not a tensor of floating-point numbers, all of them in the file")
    tokens = tensors[shared]
    if tokens.dim() != 2:
        raise ValueError(f"{path}: {shared} has shape {tuple(tokens.shape)}, expected (tokens, embedding)")
    for alias in aliases:
        if alias in tensors and not torch.equal(tensors[alias], tokens):
            raise ValueError(f"{path}: {alias} differs from {shared}, which an Aligner shares with every layer")
    heads = {tensors[gate].numel() for gate in gates}
    if len(heads) > 1:
        raise ValueError(f"{path}: gating_factor tensors have different numbers of heads: {sorted(heads)}")
    values = {"tokens": tokens, "gates": torch.stack([tensors[gate].flatten() for gate in gates])}
    sizes = {"n_layer": layers[-1] + 1, "n_head": heads.pop(), "n_embd": tokens.size(1)}
    info = AdapterInfo("aligner", {**sizes, "length": tokens.size(0), "start_layer": layers[0]})
    return {name: finite(path, name, tensor) for name, tensor in values.items()}, info
