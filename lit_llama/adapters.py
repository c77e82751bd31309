"""Adapter files: read, write, verify; and the one table of methods.

An adapter is one safetensors file whose metadata say what it is. The Aligner authors' `.pth` files and PEFT's folders
are read as well.
"""

import hashlib
import inspect
import json
import reprlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, get_args, get_origin

import torch
from safetensors.torch import save_file

from lit_llama.aligner import Aligner
from lit_llama.bias import Bias
from lit_llama.config import LLaMAConfig
from lit_llama.devices.quantization import Quantize, bits_of
from lit_llama.fields import check_list, take
from lit_llama.files import atomic_file, check_file, parse_json
from lit_llama.formats import peft
from lit_llama.formats.authors import read_authors_aligner
from lit_llama.llama_adapter import LLaMAAdapter
from lit_llama.lora import LoRA
from lit_llama.model import LLaMA
from lit_llama.prompts import PromptStyle
from lit_llama.safetensors_file import Header, finite, read_tensors
from lit_llama.shapes import without_values
from lit_llama.tensor_files import check_shape, refuse_names

FORMAT_VERSION = 1
Method = Literal["aligner", "llama_adapter", "lora", "bias"]
AnyAdapter = Aligner | LLaMAAdapter | LoRA | Bias
METHODS: dict[str, type[AnyAdapter]] = {"aligner": Aligner, "llama_adapter": LLaMAAdapter, "lora": LoRA, "bias": Bias}
FORMER_METHODS = {"adapter": "llama_adapter"}  # names in older files
SILENT_STYLE = "alpaca"  # prompt style of files that do not say how they were trained, such as the authors'
# Limits of what a file may claim before its claims are compared with its tensors. No model comes near them.
MOST_SIZE = 2**24
MOST_LAYERS = 1024


@dataclass(frozen=True)
class Companion:
    """An adapter on top of which another one was trained, and together with which that is to be used.

    Args:
        name: name of its file or run folder.
        fingerprint: the first 16 digits of its `adapter_fingerprint`.
        scale: what it was multiplied by.
    """

    name: str
    fingerprint: str
    scale: float


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
        hyperparameters: options of the training run.
        fingerprint: the `adapter_fingerprint` of what the file holds; empty in files that older code wrote.
        also: adapters on top of which it was trained; only in files of those that were.
        format_version: version of the file's format.
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
    also: tuple[Companion, ...] = ()
    format_version: int = FORMAT_VERSION

    @property
    def style(self) -> str:
        """Name of the prompt style to use with the adapter."""
        return self.prompt_style or SILENT_STYLE

    @property
    def quantize(self) -> Quantize | None:
        """How the base was quantised that the adapter was trained on."""
        return self.hyperparameters.get("quantize")


def new_adapter(config: LLaMAConfig, method: Method, aligner_length: int | None = None) -> AnyAdapter:
    """A new adapter with the default sizes of its method.

    Args:
        config: configuration of the base model.
        method: a key of `METHODS`.
        aligner_length: number of prefix tokens, of an Aligner alone; 1 if not given.

    Raises:
        ValueError: another method is given a number of tokens, or an Aligner one below 1.
    """
    if aligner_length is None:
        return METHODS[method](config)
    if method != "aligner":
        raise ValueError(f"--aligner_length is the length of an Aligner, and --method is {method}: leave it out")
    return Aligner(config, aligner_length)


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
            `hyperparameters`, `also`. What is given here goes before what `base` says.

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
    said = {name: value for name, value in asdict(info).items() if name != "also" or value}  # older code knows no also
    metadata = {name: json.dumps(value, default=str) for name, value in said.items()}
    with atomic_file(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def adapter_file(path: Path | str) -> Path:
    """The file of an adapter. The folder of a training run, or PEFT's of an adapter, stands for the adapter in it.

    Args:
        path: the file, or a folder with one file named after a method, such as `aligner.safetensors`, or as PEFT does.

    Raises:
        FileNotFoundError: there is no such file, or the folder does not hold exactly one.
    """
    path = Path(path)
    if not path.is_dir():
        check_file(path)
        return path
    names = [f"{method}.safetensors" for method in (*METHODS, *FORMER_METHODS)]
    found = [name for name in (*names, *peft.WEIGHT_FILES) if (path / name).is_file()]
    if found[1:] == [peft.WEIGHT_FILES[1]]:  # PEFT's older format, kept next to its newer one
        found.pop()
    if len(found) != 1:
        raise FileNotFoundError(
            f"{path} is a folder and holds {' and '.join(found) or 'no adapter'}; expected the file of an adapter, or "
            f"a training run's folder, with one of {', '.join(names)} in it, or PEFT's folder of an adapter"
        )
    return path / found[0]


def load_adapter(path: Path | str) -> AnyAdapter:
    """Load an adapter for use: this project's file of any method, or an Aligner of the authors'.

    PEFT's folders need the base model's sizes as well: see `read_adapter` and `lit_llama.base.open_base`.

    Args:
        path: the file, or the folder of its training run.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or not an adapter.
    """
    return read_adapter(path)[0]


def adapter_info(path: Path | str) -> AdapterInfo:
    """What an adapter file says about itself, or what its tensors tell if it is one of the authors'.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or not an adapter.
    """
    return read_adapter(path)[1]


def read_adapter(
    path: Path | str,
    model: LLaMA | None = None,
    allow_other_base: bool = False,
    config: LLaMAConfig | None = None,
) -> tuple[AnyAdapter, AdapterInfo]:
    """Load an adapter for use, together with what its file says about itself. The file is read once.

    Args:
        path: the file, or the folder of its training run.
        model: the base model that it must belong to, see `check_base`; any base if None.
        allow_other_base: accept an adapter that was trained on other weights of the same sizes, with a warning.
        config: configuration of the base model, which PEFT's folders need; the configuration of `model` if not given.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, not an adapter, or of another base.
    """
    path = adapter_file(path)
    config = model.config if config is None and model is not None else config

    def check(info: AdapterInfo, shapes: Mapping[str, Sequence[int]]) -> AnyAdapter:
        adapter = _matching(path, info, shapes)
        if model is not None:
            check_base(path, info, model, allow_other_base)
        return adapter

    if peft.is_peft(path):
        adapter, info = _read_peft(path, config)
        check(info, {name: tensor.shape for name, tensor in adapter.state_dict().items()})
        return adapter.eval(), info
    if path.suffix == ".safetensors":

        def check_header(header: Header) -> tuple[AnyAdapter, AdapterInfo]:
            info = _parse_info(path, header.metadata)
            return check(info, header.shapes), info

        (adapter, info), tensors = read_tensors(path, check_header)
    else:
        tensors, sizes = read_authors_aligner(path)
        info = AdapterInfo("aligner", sizes)
        adapter = check(info, {name: tensor.shape for name, tensor in tensors.items()})
    adapter.load_state_dict(tensors, assign=True)
    if info.fingerprint and adapter_fingerprint(adapter) != info.fingerprint:
        raise ValueError(f"{path} is damaged: its values are not those of its fingerprint; fetch or write it again")
    return adapter.eval(), info


def _read_peft(path: Path, config: LLaMAConfig | None) -> tuple[AnyAdapter, AdapterInfo]:
    if config is None:
        raise ValueError(f"{path.parent} is an adapter in PEFT's format, which can be used only with its base model")
    adapter, base_name, recorded = peft.read_peft(path, config)
    fingerprint, style = recorded.get("base_fingerprint", ""), recorded.get("prompt_style", "chat")
    return adapter, AdapterInfo(adapter.method, adapter.sizes, base_name, fingerprint, style)


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
    also = check_list(values.get("also", []), "also", dict, path)
    kinds = Companion.__annotations__.items()
    values["also"] = tuple(Companion(*(take(one, *kind, f"{path}, also") for kind in kinds)) for one in also)
    values["method"] = FORMER_METHODS.get(method, method)
    if values["method"] not in METHODS:
        raise ValueError(f"{path}: method is {method[:100]!r}, expected one of {', '.join(METHODS)}")
    values["hyperparameters"] = take(values, "hyperparameters", dict, path, {})
    bits, known = take(values["hyperparameters"], "quantize", str, f"{path}, hyperparameters", None), get_args(Quantize)
    if bits not in (None, *known):
        raise ValueError(f"{path}, hyperparameters: quantize is {bits[:100]!r}, expected one of {', '.join(known)}")
    return AdapterInfo(**values)


def _matching(path: Path, info: AdapterInfo, shapes: Mapping[str, Sequence[int]]) -> AnyAdapter:
    """The adapter that a file's metadata tell of, without memory for its values, if its tensors have these shapes."""
    adapter = adapter_without_values(info.method, info.config, f"{path}, config")
    expected = adapter.state_dict()
    if expected.keys() != shapes.keys():
        refuse_names(path, expected.keys() - shapes.keys(), shapes.keys() - expected.keys())
    for name, tensor in expected.items():
        check_shape(name, torch.Size(shapes[name]), tensor.shape, str(path))
    return adapter


def adapter_without_values(method: str, sizes: Mapping[str, Any], place: str = "the adapter's sizes") -> AnyAdapter:
    """Build an adapter on the meta device, which has shapes but no memory: its values are to be loaded into it.

    Args:
        method: a key of `METHODS`.
        sizes: `sizes` of the adapter, out of a file that anybody may have written.
        place: where they come from, for error messages.

    Raises:
        ValueError: the method has no such adapter.
    """
    build = METHODS[method]
    kinds = dict.fromkeys(build.base_sizes, int) | {
        name: parameter.annotation
        for name, parameter in inspect.signature(build, eval_str=True).parameters.items()
        if name not in ("config", "init_std")  # which no adapter that has its values depends on
        and (name != "positions" or name in sizes)  # all, if a file does not say it
    }
    lacking, unknown = sorted(kinds.keys() - sizes.keys()), sorted(sizes.keys() - kinds.keys())
    if lacking or unknown:
        raise ValueError(
            f"{place}: not that of method {method!r}: it lacks {lacking} and has unknown {reprlib.repr(unknown)}"
        )
    for name, kind in kinds.items():
        if kind in (int, float):
            take(sizes, name, kind, place, least=int(name in build.base_sizes), most=MOST_SIZE)
        elif kind in (bool, str):
            take(sizes, name, kind, place)
        elif get_origin(kind) is Literal:
            if sizes[name] not in get_args(kind):
                found = reprlib.repr(sizes[name])
                raise ValueError(f"{place}: {name} is {found}, expected one of {', '.join(get_args(kind))}")
        else:
            check_list(sizes[name], name, str, place)
    if sizes["n_layer"] > MOST_LAYERS:
        raise ValueError(f"{place}: n_layer is {sizes['n_layer']}, expected {MOST_LAYERS} at most")
    base = {name: value for name, value in sizes.items() if name in LLaMAConfig.__dataclass_fields__}
    own = {name: value for name, value in sizes.items() if name not in base}
    try:
        with without_values():
            return build(LLaMAConfig(**base), **own)
    except (ValueError, RuntimeError) as error:  # torch knows no tensors of 2**63 bytes
        raise ValueError(f"{place}: {error}") from None


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
            raise ValueError(f"{message}; --allow_other_base uses it all the same")
        warnings.warn(message, stacklevel=2)


def adapter_fingerprint(adapter: AnyAdapter) -> str:
    """Hash of what an adapter computes: its method, under the name that it first had, its sizes and values."""
    first = {name: former for former, name in FORMER_METHODS.items()}.get(adapter.method, adapter.method)
    digest = hashlib.sha256(json.dumps([first, adapter.sizes]).encode())
    for name, tensor in sorted(adapter.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
