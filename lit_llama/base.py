"""The one door to a base model: model, tokenizer, adapter and prompt style that belong together.

base = open_base("checkpoints/SmolLM2-135M-Instruct", "out/demo")
base.generate("Why is the sky blue?")
base.with_adapter("out/other").generate(["Why is the sky blue?", "What is rain?"])
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch

from lit_llama.adapters import AdapterInfo, AnyAdapter, adapter_fingerprint, check_base, read_adapter
from lit_llama.checkpoint import load_base, read_config
from lit_llama.combine import WeightedSum
from lit_llama.devices.layouts import WeightOnly, compile_decoding, lay_out, quantize_weights
from lit_llama.devices.precision import PRECISIONS, Precision
from lit_llama.devices.quantization import Quantize
from lit_llama.generation import respond, stream_text
from lit_llama.model import LLaMA
from lit_llama.prompts import Message, PromptStyle, chosen_style
from lit_llama.seam import Adapter
from lit_llama.tokenizer import Tokenizer

if TYPE_CHECKING:  # slow to import, which --help should not be
    from torch.distributed.device_mesh import DeviceMesh

AdapterLike = Path | str | Adapter
SILENT_STYLE = "alpaca"  # of adapter files that do not say how their prompts were made, such as the authors'


@dataclass(frozen=True)
class Base:
    """A frozen base model with what belongs to it. Several may share one model in memory.

    Args:
        model: the base model.
        tokenizer: its tokenizer.
        adapter: what is added to it, if anything; several are a `WeightedSum`.
        style: how prompts become text: as asked for, or as the adapter was trained, or the base's own chat template.
        infos: what the files of the adapters say about themselves.
        weights: of the base: its fingerprint, and its dtype or number of bits; two models that differ in any of these
            answer differently.
        name: of base and adapters, for reports.
        asked_style: the style that was asked for, which goes before that of any adapter.
        allow_other_base: accept adapters of other weights of the same sizes, with a warning.
    """

    model: LLaMA
    tokenizer: Tokenizer
    adapter: Adapter | None
    style: PromptStyle
    infos: tuple[AdapterInfo, ...]
    weights: str
    name: str
    asked_style: str | None = None
    allow_other_base: bool = False

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def identity(self) -> str:
        """All that an answer depends on, apart from prompt and sampling: weights, adapters with their scales, style."""
        return f"{self.name}, {self.weights}, {self.style.name} {self.style.fingerprint}"

    def with_adapter(
        self, adapter: AdapterLike | Sequence[AdapterLike] | None, scale: float | Sequence[float] | None = None
    ) -> Base:
        """The same model in memory with other adapters, or none.

        Args:
            adapter: file or run folder of an adapter, or an adapter itself; several are added up.
            scale: what each is multiplied by: one for each, or one for all; 1 if not given.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is damaged or of another base, or there are too many or too few scales.
        """
        return self._with(_read(adapter), scale)

    def _with(self, read: list[_Read], scale: float | Sequence[float] | None) -> Base:
        scales = _scales(scale, len(read))
        for one in read:
            if one.info is not None:
                check_base(Path(one.name), one.info, self.model, self.allow_other_base)
            if isinstance(one.adapter, torch.nn.Module):
                one.adapter.to(self.device)
        infos = tuple(one.info for one in read if one.info is not None)
        if not read:
            adapter = None
        elif len(read) == 1 and scales == [1.0]:
            adapter = read[0].adapter
        else:
            adapter = WeightedSum(*((one.adapter, s) for one, s in zip(read, scales, strict=True)))
        named = [one.name + ("" if s == 1 else f" x {s:g}") for one, s in zip(read, scales, strict=True)]
        return replace(
            self,
            adapter=adapter,
            infos=infos,
            name=" + ".join([self.model.config.name, *named]),
            style=_style(self.asked_style, infos, self.tokenizer) if infos or not read else self.style,
        )

    @overload
    def generate(self, prompts: str, *, stream: bool = False, **sampling: Any) -> str | Iterator[str]: ...
    @overload
    def generate(self, prompts: Sequence[str], **sampling: Any) -> list[str]: ...
    def generate(self, prompts: str | Sequence[str], *, stream: bool = False, **sampling: Any) -> Any:
        """Answer one prompt, or many at once.

        Args:
            prompts: what a user says; one text, or several.
            stream: give the answer to one prompt piece by piece, as it comes.
            sampling: `max_new_tokens` (256), `temperature` (0), `top_k`, `top_p`, `seed`; and `batch_size`, number of
                prompts answered at once (16).

        Returns:
            A text for one prompt, a list for a list, or an iterator over pieces of text.

        Raises:
            ValueError: a prompt is empty or too long, or a sampling option is out of range.
        """
        if isinstance(prompts, str):
            pieces = self.reply([Message("user", prompts)], **sampling)
            return pieces if stream else "".join(pieces)
        if stream:
            raise ValueError("stream=True is for one prompt, given as a text and not as a list")
        return respond(self.model, self.tokenizer, self.style, prompts, self.adapter, **sampling)

    def reply(self, messages: Sequence[Message], **sampling: Any) -> Iterator[str]:
        """The assistant's next turn of a conversation, piece by piece; see `generate` for `sampling`."""
        return stream_text(self.model, self.tokenizer, self.style, messages, self.adapter, **sampling)


def open_base(
    checkpoint_dir: Path | str,
    adapter_path: AdapterLike | Sequence[AdapterLike] | None = None,
    adapter_scale: float | Sequence[float] | None = None,
    *,
    prompt_style: str | None = None,
    precision: Precision = "auto",
    quantize: Quantize | WeightOnly | None = None,
    compile: bool = False,
    for_generation: bool = False,
    allow_other_base: bool = False,
    device: torch.device | str | None = None,
    mesh: DeviceMesh | None = None,
) -> Base:
    """Load a frozen base model with its tokenizer, and the adapters that are to be used with it.

    Args:
        checkpoint_dir: folder of the base model.
        adapter_path: file or run folder of an adapter of any method; several are added up.
        adapter_scale: what each adapter is multiplied by: one for each, or one for all; 1 if not given.
        prompt_style: how prompts become text; if not given, as the first adapter was trained, and for the base alone
            its own chat template if it has one.
        precision: number format of the base.
        quantize: keep the weights in fewer bits; if not given, as the adapters were trained.
        compile: decode by a compiled forward.
        for_generation: lay the weights out for generation alone, which is faster; adapters cannot be trained on them.
        allow_other_base: accept adapters of other weights of the same sizes, with a warning.
        device: where to put the weights; the GPU if there is one.
        mesh: shard the weights over these processes.

    Raises:
        FileNotFoundError: something is missing.
        ValueError: something is damaged, does not belong together, or the adapters were trained with different bits.
    """
    checkpoint_dir = Path(checkpoint_dir)
    config, tokenizer = read_config(checkpoint_dir), Tokenizer(checkpoint_dir)
    tokenizer.check_vocabulary(config.vocab_size)
    read = _read(adapter_path)  # refused before the base is loaded
    infos = tuple(one.info for one in read if one.info is not None)
    style = _style(prompt_style, infos, tokenizer)
    quantize = quantize or trained_bits({one.name: one.info for one in read if one.info is not None})
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = _load(checkpoint_dir, PRECISIONS[precision], device, quantize, compile, for_generation, mesh)
    weights = f"{model.fingerprint[:16]} in {quantize or str(model.dtype).removeprefix('torch.')}"
    base = Base(model, tokenizer, None, style, (), weights, config.name, prompt_style, allow_other_base)
    return base._with(read, adapter_scale)


def _load(
    checkpoint_dir: Path,
    dtype: torch.dtype | None,
    device: torch.device,
    quantize: Quantize | WeightOnly | None,
    compile: bool,
    for_generation: bool,
    mesh: DeviceMesh | None,
) -> LLaMA:
    if quantize in ("nf4", "int8"):
        if compile:
            raise ValueError(f"--compile does not go with bitsandbytes' {quantize}: use int4-weights or int8-weights")
        return load_base(checkpoint_dir, dtype, device, mesh=mesh, quantize=quantize)
    if quantize is not None:
        dtype = dtype or torch.bfloat16  # what its kernels compute in
    model = load_base(checkpoint_dir, dtype, device, mesh=mesh)
    if quantize is not None:
        quantize_weights(model, quantize)
    elif for_generation and device.type == "cpu" and not compile:  # the compiler lays out what it needs
        lay_out(model)
    if compile:
        compile_decoding(model)
    return model


@dataclass(frozen=True)
class _Read:
    """An adapter with what its file says, if it comes from one, and a name for reports."""

    adapter: Adapter
    info: AdapterInfo | None
    name: str


def _read(adapters: AdapterLike | Sequence[AdapterLike] | None) -> list[_Read]:
    """Adapters, each file opened once."""
    if adapters is None:
        return []
    several = adapters if isinstance(adapters, Sequence) and not isinstance(adapters, str) else [adapters]
    read = []
    for one in several:
        if isinstance(one, (str, Path)):
            adapter, info = read_adapter(Path(one))
            read.append(_Read(adapter, info, f"{one} ({adapter_fingerprint(adapter)[:8]})"))
        else:
            read.append(_Read(one, None, _name(one)))
    return read


def _name(adapter: Adapter) -> str:
    if isinstance(adapter, AnyAdapter):
        return f"{adapter.method} ({adapter_fingerprint(adapter)[:8]})"
    return type(adapter).__name__


def _scales(scale: float | Sequence[float] | None, count: int) -> list[float]:
    given = [1.0] if scale is None else [scale] if isinstance(scale, int | float) else scale
    scales = [float(one) for one in given]
    if len(scales) not in (1, count):
        raise ValueError(f"{len(scales)} scales for {count} adapters: give one for each, or one for all")
    return scales * (count // len(scales) if count else 0)


def _style(asked: str | None, infos: Sequence[AdapterInfo], tokenizer: Tokenizer) -> PromptStyle:
    """The rule for prompts: what was asked for, or the first adapter's training, or the base's own template."""
    trained = (infos[0].prompt_style or SILENT_STYLE) if infos else None
    return chosen_style(asked, trained, tokenizer, "none" if tokenizer.chat_template is None else "chat")


def trained_bits(infos: dict[str, AdapterInfo]) -> Quantize | None:
    """The number of bits of the bases that adapters were trained on, by the names of the adapters.

    Raises:
        ValueError: they differ.
    """
    bits = {name: info.hyperparameters.get("quantize") for name, info in infos.items()}
    if len(set(bits.values())) > 1:
        found = ", ".join(f"{name}: {value or 'none'}" for name, value in bits.items())
        raise ValueError(f"the adapters were trained with different --quantize ({found}): give the one to use here")
    return next(iter(bits.values()), None)
