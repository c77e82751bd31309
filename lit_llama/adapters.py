"""Adapter files: read, write, verify; and the one table of methods.

An adapter is one safetensors file whose metadata say what it is. The Aligner authors' `.pth` files are read as well.
"""

import hashlib
import inspect
import io
import json
import re
import reprlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, get_args, get_origin

import torch
from safetensors.torch import save_file
from torch import Tensor

from lit_llama.aligner import Aligner
from lit_llama.bias import Bias
from lit_llama.config import LLaMAConfig
from lit_llama.devices.quantization import Quantize, bits_of
from lit_llama.fields import check_list, take
from lit_llama.files import atomic_file, check_file, parse_json
from lit_llama.llama_adapter import LLaMAAdapter
from lit_llama.lora import LoRA
from lit_llama.model import LLaMA
from lit_llama.prompts import PromptStyle
from lit_llama.safetensors_file import Header, finite, read_tensors
from lit_llama.tensor_files import check_shape, load_tensors, refuse_names

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


class OpenedBase(Protocol):
    """The part of `lit_llama.base.Base` that an adapter's file records."""

    @property
    def model(self) -> LLaMA: ...
    @property
    def style(self) -> PromptStyle: ...


def save_adapter(
    path: Path | str, adapter: AnyAdapter, base: OpenedBase | LLaMA | None = None, **training: Any
) -> None:
    """Write an adapter to one safetensors file, atomically.

    Args:
        path: the file to write.
        adapter: what to write.
        base: the base that it was trained on. The file records its name, its fingerprint, how it was quantised, and,
            of a base that `open_base` returned, the prompt style.
        training: other fields of `AdapterInfo` to record: `prompt_style`, `step`, `validation_loss`, `seconds`,
            `hyperparameters`. What is given here goes before what `base` says.

    Raises:
        ValueError: the adapter has values that are not finite.
    """
    path = Path(path)
    if base is not None:
        model = base if isinstance(base, LLaMA) else base.model
        training |= {"base_name": model.config.name, "base_fingerprint": model.fingerprint}
        if not isinstance(base, LLaMA):
            training.setdefault("prompt_style", base.style.name)
        if bits := bits_of(model):
            training["hyperparameters"] = {"quantize": bits, **training.get("hyperparameters", {})}
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
        refuse_names(path, expected.keys() - shapes.keys(), shapes.keys() - expected.keys())
    for name, tensor in expected.items():
        check_shape(name, torch.Size(shapes[name]), tensor.shape, str(path))
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
    method = take(values, "method", str, path)
    take(values, "config", dict, path)
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
    tensors = load_tensors(path, io.BytesIO(data))
    shared = "global_value_embedding.weight"
    if shared not in tensors:
        raise ValueError(f"{path} is not an Aligner: it has no {shared}")
    layers = _authors_layers(path, tensors)
    gates = [f"transformer.h.{i}.attn.gating_factor" for i in layers]
    aliases = [f"transformer.h.{i}.attn.adapter_wte.weight" for i in layers]
    unknown = set(tensors) - {shared, *gates, *aliases}
    if unknown:
        refuse_names(path, set(), unknown)
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
