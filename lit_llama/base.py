"""The one door to a base model: model, tokenizer, adapter and prompt style that belong together.

base = open_base("checkpoints/SmolLM2-135M-Instruct", "out/demo")
base.generate("Why is the sky blue?")
base.with_adapter("out/other").generate(["Why is the sky blue?", "What is rain?"])
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, overload

import torch

from lit_llama.adapters import AdapterInfo, AnyAdapter, adapter_fingerprint, check_base, check_bits, read_adapter
from lit_llama.checkpoint import load_base, read_config
from lit_llama.combine import WeightedSum
from lit_llama.config import LLaMAConfig
from lit_llama.devices.layouts import WeightOnly, compile_decoding, lay_out, quantize_for_inference
from lit_llama.devices.precision import PRECISIONS, Precision, default_dtype
from lit_llama.devices.quantization import Quantize
from lit_llama.generation import respond, stream_text
from lit_llama.model import LLaMA
from lit_llama.prompts import Message, PromptStyle, chosen_style
from lit_llama.seam import Adapter
from lit_llama.tokenizer import Tokenizer

if TYPE_CHECKING:  # slow to import, which --help should not be
    from torch.distributed.device_mesh import DeviceMesh

Bits = Quantize | WeightOnly | Literal["none"]  # of a base's weights


@dataclass(frozen=True)
class ReadAdapter:
    """An adapter, and its file with what that says, if it comes from one.

    Args:
        adapter: the adapter.
        name: for reports.
        content: what tells it from others.
        path: its file or run folder.
        info: what the file says.
    """

    adapter: Adapter
    name: str
    content: str
    path: Path | None = None
    info: AdapterInfo | None = None


def read_adapters(
    adapters: AdapterLike | Sequence[AdapterLike] | None, config: LLaMAConfig | None = None
) -> list[ReadAdapter]:
    """Read adapters from their files, for several bases with different ones of them.

    Args:
        adapters: file or run folder of an adapter, or an adapter itself, or several; what was read already stays as it
            is.
        config: configuration of the base model, which PEFT's folders need.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged.
    """
    if adapters is None:
        return []
    read = []
    for one in adapters if isinstance(adapters, Sequence) and not isinstance(adapters, str) else [adapters]:
        if isinstance(one, ReadAdapter):
            read.append(one)
        elif isinstance(one, str | Path):
            adapter, info = read_adapter(Path(one), config=config)
            content = adapter_fingerprint(adapter)[:16]
            read.append(ReadAdapter(adapter, f"{one} ({content[:8]})", content, Path(one), info))
        elif isinstance(one, AnyAdapter):
            content = adapter_fingerprint(one)[:16]
            read.append(ReadAdapter(one, f"{one.method} ({content[:8]})", content))
        else:
            read.append(ReadAdapter(one, type(one).__name__, f"{type(one).__name__} {id(one)}"))
    return read


AdapterLike = Path | str | Adapter | ReadAdapter


@dataclass(frozen=True, eq=False)
class Base:
    """A frozen base model with what belongs to it. Several may share one model in memory.

    Args:
        model: the base model.
        tokenizer: its tokenizer.
        adapter: what is added to it, if anything; several are a `WeightedSum`.
        style: how prompts become text: as asked for, or as the adapter was trained, or the base's own chat template.
        name: what base and adapters are called, for reports.
        identity: all that an answer depends on, apart from prompt and sampling: weights, adapters with their scales
            and prompt style. Names and folders of files are not part of it.
        infos: what the files of the adapters say about themselves.
        weights: the base's fingerprint, and its dtype or number of bits; two models that differ in any of these
            answer differently.
        quantize: number of bits of the base's weights.
        asked_quantize: the number that was asked for; if None, adapters that were trained with another are refused.
        asked_style: the style that was asked for, which goes before that of any adapter.
        allow_other_base: accept adapters of other weights of the same sizes, with a warning.
    """

    model: LLaMA
    tokenizer: Tokenizer
    adapter: Adapter | None
    style: PromptStyle
    name: str
    identity: str
    infos: tuple[AdapterInfo, ...]
    weights: str
    quantize: Bits
    asked_quantize: Bits | None = None
    asked_style: str | None = None
    allow_other_base: bool = False

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.model.device

    def with_adapter(
        self, adapter: AdapterLike | Sequence[AdapterLike] | None, scale: float | Sequence[float] | None = None
    ) -> Base:
        """The same model in memory with other adapters, or none.

        The prompt style is the one that was asked for when the base was opened, or else that of the adapter's
        training; an adapter that does not come from a file keeps the style of this base.

        Args:
            adapter: file or run folder of an adapter, or an adapter itself; several are added up. A module is moved to
                the model's device and put into evaluation mode.
            scale: what each is multiplied by: one for each, or one for all; 1 if not given.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is damaged, of another base, or trained on a base with another number of bits; or there
                are too many or too few scales.
        """
        read = read_adapters(adapter, self.model.config)
        infos = _infos(read)
        keeps_style = self.asked_style is not None or (read and not infos)
        if not read and self.tokenizer.chat_template is None:  # next to an adapter, the base is asked as that is
            keeps_style = True
        style = self.style if keeps_style else style_of(None, infos[0].style if infos else None, self.tokenizer)
        return self._with(read, scale, style)

    def _with(self, read: list[ReadAdapter], scale: float | Sequence[float] | None, style: PromptStyle) -> Base:
        scales = scales_of(scale, len(read))
        warn_of_missing(read)
        for one in read:
            self._check(one)
            if isinstance(one.adapter, torch.nn.Module):
                one.adapter.to(self.device).eval()
        adapter = _add_up(read, scales)
        times = ["" if s == 1 else f" x {s:g}" for s in scales]
        names = [self.model.config.name, *(one.name + x for one, x in zip(read, times, strict=True))]
        parts = [self.weights, *(one.content + x for one, x in zip(read, times, strict=True)), style.fingerprint]
        return replace(
            self, adapter=adapter, style=style, name=" + ".join(names), identity=", ".join(parts), infos=_infos(read)
        )

    def _check(self, one: ReadAdapter) -> None:
        """Refuse an adapter that does not belong to this base."""
        if isinstance(one.adapter, AnyAdapter):
            info = one.info or AdapterInfo(one.adapter.method, one.adapter.sizes)
            check_base(one.path or Path(one.name), info, self.model, self.allow_other_base)
        if one.info is not None and self.asked_quantize is None:
            check_bits(one.path or Path(one.name), one.info, self.quantize)

    @overload
    def generate(self, prompts: str, *, stream: Literal[False] = False, **sampling: Any) -> str: ...
    @overload
    def generate(self, prompts: str, *, stream: Literal[True], **sampling: Any) -> Iterator[str]: ...
    @overload
    def generate(self, prompts: Sequence[str], *, batch_size: int = 16, **sampling: Any) -> list[str]: ...
    def generate(
        self, prompts: str | Sequence[str], *, stream: bool = False, batch_size: int = 16, **sampling: Any
    ) -> Any:
        """Answer one prompt, or many at once.

        Args:
            prompts: what a user says; one text, or several.
            stream: give the answer to one prompt piece by piece, as it comes.
            batch_size: number of prompts of a list that are answered at once.
            sampling: `max_new_tokens` (256), `temperature` (0), `top_k`, `top_p` and `seed` (1337; of a list's first
                prompt, the next one has the next).

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
        return respond(self.model, self.tokenizer, self.style, prompts, self.adapter, batch_size=batch_size, **sampling)

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
    quantize: Bits | None = None,
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
        quantize: keep the weights in fewer bits, or "none"; if not given, as the adapters were trained.
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
    read = read_adapters(adapter_path, config)  # refused before the base is loaded
    scales_of(adapter_scale, len(read))
    infos = _infos(read)
    style = style_of(prompt_style, infos[0].style if infos else None, tokenizer)
    bits = quantize or trained_bits({one.name: one.info for one in read if one.info is not None})
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = _load(checkpoint_dir, PRECISIONS[precision], device, bits, compile, for_generation, mesh)
    weights = f"{model.fingerprint[:16]} in {str(model.dtype).removeprefix('torch.') if bits == 'none' else bits}"
    base = Base(
        model, tokenizer, None, style, config.name, weights, (), weights, bits, quantize, prompt_style, allow_other_base
    )
    return base._with(read, adapter_scale, style)


def _load(
    checkpoint_dir: Path,
    dtype: torch.dtype | None,
    device: torch.device,
    bits: Bits,
    compile: bool,
    for_generation: bool,
    mesh: DeviceMesh | None,
) -> LLaMA:
    if dtype is None:  # the kernels of fast weights compute in bfloat16 anywhere
        dtype = torch.bfloat16 if bits in get_args(WeightOnly) else default_dtype(device)
    if bits in ("nf4", "int8"):
        if compile:
            raise ValueError(f"--compile does not go with bitsandbytes' {bits}: use int4-fast or int8-fast")
        return load_base(checkpoint_dir, dtype, device, mesh=mesh, quantize=bits)
    model = load_base(checkpoint_dir, dtype, device, mesh=mesh)
    if bits != "none":
        quantize_for_inference(model, bits)
    elif for_generation and device.type == "cpu" and not compile:  # the compiler lays out what it needs
        lay_out(model)
    if compile:
        compile_decoding(model)
    return model


def open_adapters(
    model: LLaMA,
    adapters: AdapterLike | Sequence[AdapterLike] | None,
    scale: float | Sequence[float] | None = None,
    allow_other_base: bool = False,
) -> tuple[Adapter | None, tuple[AdapterInfo, ...]]:
    """Adapters to be folded into a base model that is itself not opened, as exports do it weight by weight.

    Args:
        model: the base model, perhaps without its weights, but with their fingerprint.
        adapters: file or run folder of an adapter, or an adapter itself; several are added up.
        scale: what each is multiplied by: one for each, or one for all; 1 if not given.
        allow_other_base: accept adapters of other weights of the same sizes, with a warning.

    Returns:
        The adapter, if there is one, and what the files say.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged or of another base, or there are too many or too few scales.
    """
    read = read_adapters(adapters, model.config)
    warn_of_missing(read)
    for one in read:
        if one.info is not None:
            check_base(one.path or Path(one.name), one.info, model, allow_other_base)
    return _add_up(read, scales_of(scale, len(read))), _infos(read)


def warn_of_missing(read: Sequence[ReadAdapter]) -> None:
    """Say which adapters some of these were trained on top of, if they are not there."""
    there = {one.content for one in read}
    for one in read:
        for companion in one.info.also if one.info is not None else ():
            if companion.fingerprint not in there:
                warnings.warn(
                    f"{one.name} was trained on top of {companion.name} (scale {companion.scale:g}): add that adapter, "
                    "as it learned only what is missing there",
                    stacklevel=2,
                )


def _add_up(read: Sequence[ReadAdapter], scales: Sequence[float]) -> Adapter | None:
    """One adapter alone as it is, several or scaled ones as a sum."""
    if len(read) == 1 and scales[0] == 1:
        return read[0].adapter
    return WeightedSum(*((one.adapter, s) for one, s in zip(read, scales, strict=True))) if read else None


def _infos(read: Sequence[ReadAdapter]) -> tuple[AdapterInfo, ...]:
    return tuple(one.info for one in read if one.info is not None)


def scales_of(scale: float | Sequence[float] | None, count: int) -> list[float]:
    """A scale for each of some adapters, from one for each, or one for all, or none, which is 1."""
    if scale is None:
        return [1.0] * count
    scales = [float(scale)] if isinstance(scale, int | float) else [float(one) for one in scale]
    if count == 0:
        raise ValueError("there is a scale but no adapter that it could scale")
    if len(scales) not in (1, count):
        raise ValueError(f"{len(scales)} scales for {count} adapters: give one for each, or one for all")
    return scales * (count // len(scales))


def style_of(asked: str | None, trained: str | None, tokenizer: Tokenizer) -> PromptStyle:
    """The rule for prompts: what was asked for, or the first adapter's training, or the base's own template.

    Args:
        asked: name of the style that was asked for, if one was.
        trained: the `style` of the first adapter's file, if there is one.
        tokenizer: tokenizer of the base.

    Raises:
        ValueError: there is no such style, or the base's chat template fails.
    """
    return chosen_style(asked, trained, tokenizer, "none" if tokenizer.chat_template is None else "chat")


def trained_bits(infos: dict[str, AdapterInfo]) -> Bits:
    """The number of bits of the bases that adapters were trained on.

    Args:
        infos: what each adapter's file says, by its name.

    Raises:
        ValueError: they differ.
    """
    bits: dict[str, Any] = {name: info.quantize or "none" for name, info in infos.items()}
    if len(set(bits.values())) > 1:
        found = ", ".join(f"{name}: {value}" for name, value in bits.items())
        raise ValueError(f"the adapters were trained with different --quantize ({found}): give the one to use here")
    return next(iter(bits.values()), "none")
