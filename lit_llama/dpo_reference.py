"""Preference tuning's policy and reference, and the reference's log-probabilities, which may be kept on disk."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from lit_llama.adapters import METHODS, AdapterInfo, AnyAdapter, Method, adapter_fingerprint, check_base, read_adapter
from lit_llama.checkpoint import read_config
from lit_llama.data import Batch, TokenDataset, by_length
from lit_llama.files import atomic_file
from lit_llama.losses import response_logprobs
from lit_llama.model import LLaMA
from lit_llama.seam import Adapter

if TYPE_CHECKING:  # takes seconds to import, which --help should not cost
    from lightning_fabric import Fabric


class PolicyAndReference(NamedTuple):
    """The adapter that preference tuning trains, and what it is held to.

    Args:
        policy: the adapter that is trained.
        reference: the adapter that it is held to; None for the base model alone.
        files: those that they were read from, with what each says about itself.
        fingerprints: hashes of both, by name, for the record of a run.
    """

    policy: AnyAdapter
    reference: AnyAdapter | None
    files: list[tuple[Path, AdapterInfo]]
    fingerprints: dict[str, str]

    def join(self, model: LLaMA, device: torch.device) -> None:
        """Move both to the base model's device; raises ValueError if they do not belong to that base model."""
        for path, info in self.files:
            check_base(path, info, model)
        self.policy.to(device)
        if self.reference is not None:
            self.reference.to(device).requires_grad_(False)


def read_policy_and_reference(
    checkpoint_dir: Path, adapter_path: Path | None, reference_path: Path | None, method: Method, aligner_length: int
) -> PolicyAndReference:
    """What preference tuning starts from.

    Args:
        checkpoint_dir: folder of the base model.
        adapter_path: file of the policy at the start; None for a new adapter.
        reference_path: file of the reference, or "base" for the base model alone; None for the policy at its start.
        method: method of a new adapter.
        aligner_length: number of prefix tokens of a new Aligner.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file is damaged, or the adapter does not fit the base model.
    """
    reference_path = reference_path or adapter_path or Path("base")
    config, files = read_config(checkpoint_dir), []
    if adapter_path is None:
        sizes: dict[str, Any] = {"length": aligner_length} if method == "aligner" else {}
        policy = METHODS[method](config, **sizes)
    else:
        policy, info = read_adapter(adapter_path, config=config)
        files.append((adapter_path, info))
    reference = None
    if reference_path != Path("base"):
        reference, info = read_adapter(reference_path, config=config)
        files.append((reference_path, info))
    fingerprints = {
        "start": "new" if adapter_path is None else adapter_fingerprint(policy),
        "reference": "base" if reference is None else adapter_fingerprint(reference),
    }
    return PolicyAndReference(policy, reference, files, fingerprints)


@torch.no_grad()
def reference_logprobs(model: LLaMA, reference: Adapter | None, batch: Batch) -> Tensor:
    """The reference's log-probability of each example (E): the one that the batch carries, or else computed."""
    return response_logprobs(model, reference, batch) if batch.reference is None else batch.reference


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
