"""The one door to a base model: model, tokenizer, adapter and prompt style that belong together.

base = open_base("checkpoints/SmolLM2-135M-Instruct", "out/demo")
base.generate("Why is the sky blue?")
base.with_adapter("out/other").generate(["Why is the sky blue?", "What is rain?"])
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, overload

import torch

from lit_llama.adapters import AdapterInfo
from lit_llama.checkpoint import load_base, read_config
from lit_llama.devices.layouts import WeightOnly, compile_decoding, lay_out, quantize_for_inference
from lit_llama.devices.memory import keep_freed_memory
from lit_llama.devices.precision import PRECISIONS, Precision, default_dtype
from lit_llama.generation import respond, stream_text
from lit_llama.model import LLaMA
from lit_llama.prompts import Message, PromptStyle, chosen_style
from lit_llama.seam import Adapter
from lit_llama.together import (
    AdapterLike,
    Bits,
    ReadAdapter,
    add_up,
    check_adapters,
    infos_of,
    read_adapters,
    scales_of,
    trained_bits,
)
from lit_llama.tokenizer import Tokenizer

if TYPE_CHECKING:  # slow to import, which --help should not be
    from torch.distributed.device_mesh import DeviceMesh


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
        infos = infos_of(read)
        keeps_style = self.asked_style is not None or (read and not infos)
        if not read and self.tokenizer.chat_template is None:  # next to an adapter, the base is asked as that is
            keeps_style = True
        style = self.style if keeps_style else style_of(None, infos[0].style if infos else None, self.tokenizer)
        return self._with(read, scale, style)

    def _with(self, read: list[ReadAdapter], scale: float | Sequence[float] | None, style: PromptStyle) -> Base:
        scales = scales_of(scale, len(read))
        bits = self.quantize if self.asked_quantize is None else None
        check_adapters(read, self.model, bits, allow_other_base=self.allow_other_base)
        for one in read:
            if isinstance(one.adapter, torch.nn.Module):
                one.adapter.to(self.device).eval()
        adapter = add_up(read, scales)
        times = ["" if s == 1 else f" x {s:g}" for s in scales]
        names = [self.model.config.name, *(one.name + x for one, x in zip(read, times, strict=True))]
        parts = [self.weights, *(one.content + x for one, x in zip(read, times, strict=True)), style.fingerprint]
        return replace(
            self, adapter=adapter, style=style, name=" + ".join(names), identity=", ".join(parts), infos=infos_of(read)
        )

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

    On a CPU the process keeps the memory of tensors that are gone, see `lit_llama.devices.memory`.

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
    infos = infos_of(read)
    style = style_of(prompt_style, infos[0].style if infos else None, tokenizer)
    bits = quantize or trained_bits({one.name: one.info for one in read if one.info is not None})
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = _load(checkpoint_dir, PRECISIONS[precision], device, bits, compile, for_generation, mesh)
    if device.type == "cpu":
        keep_freed_memory()
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
