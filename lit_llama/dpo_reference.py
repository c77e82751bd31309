"""Log-probabilities of a preference data set under the reference of DPO, computed once and kept on disk."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from lit_llama.adapters import AnyAdapter, adapter_fingerprint
from lit_llama.data import TokenDataset, by_length
from lit_llama.files import atomic_file
from lit_llama.losses import response_logprobs
from lit_llama.model import LLaMA

if TYPE_CHECKING:  # takes seconds to import, which --help should not cost
    from lightning.fabric import Fabric


def cached_reference(
    fabric: Fabric,
    model: LLaMA,
    reference: AnyAdapter | None,
    dataset: TokenDataset,
    folder: Path,
    micro_batch_size: int,
    quantize: str | None = None,
) -> Tensor:
    """The reference's log-probabilities, from a file in `folder` or computed and written there.

    The file's name is a hash of all that they depend on: the base's weights, its dtype and quantisation, the reference
    and the data. What it holds is what a forward computes to within rounding, since batches are composed otherwise.

    Args:
        fabric: whose processes share the work; a sharded base computes in step.
        model: the base model.
        reference: adapter of the reference, if any.
        dataset: the pairs.
        folder: folder of the file.
        micro_batch_size: pairs per forward.
        quantize: how the base is quantised.

    Returns:
        (items, 2) float32, on the CPU: chosen and rejected.
    """
    key = {
        "base": model.fingerprint,
        "dtype": str(model.dtype),
        "quantize": quantize,
        "reference": None if reference is None else adapter_fingerprint(reference),
        "data": dataset.sha256,
        "pairs": len(dataset),
    }
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()
    path = folder / f"reference-{digest[:16]}.safetensors"
    kept = fabric.broadcast(_read(path, len(dataset)) if fabric.is_global_zero else None)
    if kept is not None:
        return kept
    logprobs = _compute(fabric, model, reference, dataset, micro_batch_size)
    if fabric.is_global_zero:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as temporary:
            metadata = {name: str(value) for name, value in key.items()} | {"sha256": _hash(logprobs)}
            save_file({"logprobs": logprobs}, temporary, metadata=metadata)
        tqdm.write(f"the reference's log-probabilities are kept in {path}", file=sys.stderr)
    return logprobs


def _read(path: Path, pairs: int) -> Tensor | None:
    """What an earlier run wrote; None if there is none, or it is damaged or cannot be checked."""
    try:
        with safe_open(path, "pt") as file:
            logprobs, written = file.get_tensor("logprobs"), (file.metadata() or {}).get("sha256")
    except (OSError, SafetensorError):
        return None
    expected = logprobs.shape == (pairs, 2) and logprobs.dtype == torch.float32 and written == _hash(logprobs)
    return logprobs if expected else None


def _hash(logprobs: Tensor) -> str:
    return hashlib.sha256(logprobs.numpy().tobytes()).hexdigest()


@torch.no_grad()
def _compute(
    fabric: Fabric, model: LLaMA, reference: AnyAdapter | None, dataset: TokenDataset, micro_batch_size: int
) -> Tensor:
    logprobs = torch.zeros(len(dataset), 2)
    plan = by_length(dataset, np.arange(len(dataset)), micro_batch_size)
    steps = range(0, len(plan), fabric.world_size)
    for start in tqdm(steps, desc="reference", unit="batch", leave=False, disable=not fabric.is_global_zero):
        place = start + fabric.global_rank
        indices = plan[min(place, len(plan) - 1)]  # too many processes repeat the last ones
        batch = dataset.batch(indices).to(fabric.device)
        values = response_logprobs(model, reference, batch).view(-1, 2).cpu()
        if place < len(plan):
            logprobs[indices] = values
    if fabric.world_size > 1:
        logprobs = fabric.all_reduce(logprobs.to(fabric.device), reduce_op="sum").cpu()  # type: ignore[union-attr]
    return logprobs
