"""LLaMA with one global token: the model, the Aligner, and what trains and runs them."""

__version__ = "0.1.0"
