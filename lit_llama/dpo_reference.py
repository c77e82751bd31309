"""Preference tuning's policy and reference, and the reference's log-probabilities, which may be kept on disk."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from lit_llama.adapters import AnyAdapter, Method, adapter_fingerprint, new_adapter
from lit_llama.aligner import Aligner
from lit_llama.checkpoint import read_config
from lit_llama.data import Batch, TokenDataset, by_length
from lit_llama.devices.quantization import bits_of
from lit_llama.files import atomic_file
from lit_llama.losses import response_logprobs
from lit_llama.model import LLaMA
from lit_llama.seam import Adapter
from lit_llama.together import ReadAdapter, read_adapters

if TYPE_CHECKING:  # takes seconds to import, which --help should not cost
    from lightning_fabric import Fabric


class PolicyAndReference(NamedTuple):
    """The adapter that preference tuning trains, and what it is held to.

    Args:
        policy: the adapter that is trained.
        reference: the adapter that it is held to, which stays as it is; None for the base model alone.
        read: both, with what their files say if they come from files.
        fingerprints: hashes of both, by name, for the record of a run.
    """

    policy: AnyAdapter
    reference: AnyAdapter | None
    read: list[ReadAdapter]
    fingerprints: dict[str, str]

    @property
    def kind(self) -> dict[str, str | int | None]:
        """The options `method` and `aligner_length` as the policy has them, for the record of a run."""
        length = self.policy.sizes["length"] if isinstance(self.policy, Aligner) else None
        return {"method": self.policy.method, "aligner_length": length}


def read_policy_and_reference(
    checkpoint_dir: Path,
    adapter_path: Path | None,
    reference_path: Path | None,
    method: Method | None,
    aligner_length: int | None,
) -> PolicyAndReference:
    """What preference tuning starts from. Whether it belongs to the base model is checked where that is opened.

    Args:
        checkpoint_dir: folder of the base model.
        adapter_path: file of the policy at the start; None for a new adapter.
        reference_path: file of the reference, or "base" for the base model alone; None for the policy at its start.
        method: method of a new adapter; an Aligner if not given.
        aligner_length: number of prefix tokens of a new Aligner; 1 if not given.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file is damaged, or it holds another adapter than the options ask for.
    """
    config = read_config(checkpoint_dir)
    new = None if adapter_path else new_adapter(config, method or "aligner", aligner_length)
    read = read_adapters(adapter_path or new, config)
    reference_path = reference_path or adapter_path or Path("base")
    if reference_path != Path("base"):
        read += read_adapters(reference_path, config)
    policy, reference = read[0].adapter, read[1].adapter if read[1:] else None
    assert isinstance(policy, AnyAdapter)
    assert isinstance(reference, AnyAdapter | None)
    fingerprints = {
        "start": "new" if adapter_path is None else adapter_fingerprint(policy),
        "reference": "base" if reference is None else adapter_fingerprint(reference.requires_grad_(False)),
    }
    start = PolicyAndReference(policy, reference, read, fingerprints)
    for name, asked in {"method": method, "aligner_length": aligner_length}.items():
        if asked not in (None, found := start.kind[name]):
            raise ValueError(
                f"--{name} {asked} is for a new adapter, and that of {adapter_path} has {found or 'none'}: leave it out"
            )
    return start


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
) -> Tensor:
    """The reference's log-probabilities, from a file in `folder` or computed and written there.

    The file's name is a hash of all that they depend on: the base's weights, its dtype and quantisation, the reference
    and the data. What it holds is what a forward computes to within rounding, as its batches hold other examples.

    Args:
        fabric: whose processes share the work; a sharded base computes in step.
        model: the base model.
        reference: adapter of the reference, if any.
        dataset: the pairs.
        folder: folder of the file.
        micro_batch_size: pairs per forward.

    Returns:
        (items, 2) float32, on the CPU: chosen and rejected.
    """
    key = {
        "base": model.fingerprint,
        "dtype": str(model.dtype),
        "quantize": bits_of(model),
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
