"""Adapters that are used together: read from their files, checked against the base and each other, and added up.

Whoever uses adapters reads and checks them here: to answer, to serve, to train with them or from them, to export them.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lit_llama.adapters import AdapterInfo, AnyAdapter, adapter_fingerprint, check_base, read_adapter
from lit_llama.combine import WeightedSum
from lit_llama.config import LLaMAConfig
from lit_llama.devices.layouts import WeightOnly
from lit_llama.devices.quantization import Quantize
from lit_llama.model import LLaMA
from lit_llama.seam import Adapter

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


AdapterLike = Path | str | Adapter | ReadAdapter


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
            content = (info.fingerprint or adapter_fingerprint(adapter))[:16]
            read.append(ReadAdapter(adapter, f"{one} ({content[:8]})", content, Path(one), info))
        elif isinstance(one, AnyAdapter):
            content = adapter_fingerprint(one)[:16]
            read.append(ReadAdapter(one, f"{one.method} ({content[:8]})", content))
        else:
            read.append(ReadAdapter(one, type(one).__name__, f"{type(one).__name__} {id(one)}"))
    return read


def check_adapters(
    read: Sequence[ReadAdapter],
    model: LLaMA,
    bits: Bits | None,
    *,
    allow_other_base: bool = False,
    allow_other_bits: bool = False,
) -> None:
    """Make sure that adapters belong to a base model, and say which adapters they need are not there.

    Args:
        read: all adapters that are used at once.
        model: the base model; without weights will do, if it has their fingerprint.
        bits: number of bits of its weights, or "none"; None if somebody chose that number for these adapters.
        allow_other_base: accept adapters that were trained on other weights of the same sizes, with a warning.
        allow_other_bits: accept adapters that were trained on weights of another number of bits, with a warning.

    Raises:
        ValueError: one of them was trained on a base of other sizes, other weights or another number of bits.
    """
    there = {one.content for one in read}
    for one in read:
        path = one.path or Path(one.name)
        if isinstance(one.adapter, AnyAdapter):
            info = one.info or AdapterInfo(one.adapter.method, one.adapter.sizes)
            check_base(path, info, model, allow_other_base)
        if one.info is None:
            continue
        if bits is not None:
            _check_bits(path, one.info, bits, allow_other_bits)
        for companion in one.info.also:
            if companion.fingerprint not in there:
                warnings.warn(
                    f"{one.name} was trained on top of {companion.name} (scale {companion.scale:g}): use both "
                    "together, as it learned only what is missing there",
                    stacklevel=2,
                )


def _check_bits(path: Path, info: AdapterInfo, bits: Bits, allow_other_bits: bool) -> None:
    trained = info.quantize or "none"
    if trained == bits:
        return
    message = f"{path} was trained on a base with --quantize {trained}, and this base has {bits}"
    if not allow_other_bits:
        raise ValueError(
            f"{message}: give --quantize {trained} to use it as it was trained, or --quantize {bits} to use it on this "
            "base all the same"
        )
    warnings.warn(f"{message}: its answers can differ there from those that it was trained for", stacklevel=3)


def open_adapters(
    model: LLaMA,
    adapters: AdapterLike | Sequence[AdapterLike] | None,
    scale: float | Sequence[float] | None = None,
    allow_other_base: bool = False,
) -> tuple[Adapter | None, tuple[AdapterInfo, ...]]:
    """Adapters to be folded into a base model that is itself not opened, as exports do it weight by weight.

    Args:
        model: the base model, perhaps without its weights, but with their fingerprint.
        adapters: file or run folder of an adapter, or an adapter itself; several are added up. Those that were trained
            on quantised weights are accepted with a warning, as whole ones are what is exported.
        scale: what each is multiplied by: one for each, or one for all; 1 if not given.
        allow_other_base: accept adapters of other weights of the same sizes, with a warning.

    Returns:
        The adapter, if there is one, and what the files say.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged or of another base, or there are too many or too few scales.
    """
    read = read_adapters(adapters, model.config)
    check_adapters(read, model, "none", allow_other_base=allow_other_base, allow_other_bits=True)
    return add_up(read, scales_of(scale, len(read))), infos_of(read)


def add_up(read: Sequence[ReadAdapter], scales: Sequence[float]) -> Adapter | None:
    """One adapter alone as it is, several or scaled ones as a sum; None if there are none."""
    if len(read) == 1 and scales[0] == 1:
        return read[0].adapter
    return WeightedSum(*((one.adapter, s) for one, s in zip(read, scales, strict=True))) if read else None


def infos_of(read: Sequence[ReadAdapter]) -> tuple[AdapterInfo, ...]:
    """What the files of those that come from files say."""
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
        raise ValueError(
            f"the adapters were trained with different --quantize ({found}): to use them together, give one of these"
        )
    return next(iter(bits.values()), "none")
