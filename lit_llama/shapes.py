"""Modules as shapes alone: to look at names and sizes, or to be given weights that are read from a file."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


@contextmanager
def without_values() -> Iterator[None]:
    """Make modules on the meta device, where parameters have shapes and take no memory."""
    with torch.device("meta"), _NotInitialised():
        yield


class _NotInitialised(TorchFunctionMode):
    """Skip `torch.nn.init`: for random numbers on the meta device torch imports its compiler, which takes a second."""

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)
