"""LLaMA with one global token: the model, the Aligner, and what trains and runs them.

What a notebook needs can be imported from here:

    from lit_llama import open_base, Aligner, train, save_adapter, load_adapter
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_llama.adapters import load_adapter, save_adapter
    from lit_llama.aligner import Aligner
    from lit_llama.base import open_base
    from lit_llama.tuning import train

__version__ = "0.1.0"
__all__ = ["Aligner", "load_adapter", "open_base", "save_adapter", "train"]

_MODULES = {
    "Aligner": "aligner",
    "load_adapter": "adapters",
    "open_base": "base",
    "save_adapter": "adapters",
    "train": "tuning",
}


def __getattr__(name: str) -> Any:
    """Import a name of `__all__` when it is first asked for, so that `--help` of the scripts stays quick."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
