"""A frozen base spread over processes (FSDP2), for bases that do not fit one device.

Each block gathers its weights just before it computes, in forward and backward, and drops them after. So every forward
and backward is a matter of all processes at once, generation included.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lit_llama.model import LLaMA

if TYPE_CHECKING:  # slow to import, which --help should not be
    from torch.distributed.device_mesh import DeviceMesh


def shard(model: LLaMA, mesh: DeviceMesh) -> LLaMA:
    """Prepare a model, best one on the meta device, to hold a share of each parameter.

    Args:
        model: changed in place.
        mesh: has a dimension "data_parallel", as that of Lightning Fabric's `ModelParallelStrategy`.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method  # takes most of a second to import

    processes = mesh["data_parallel"]
    for block in model.transformer.h:
        fully_shard(block, mesh=processes)
    fully_shard(model, mesh=processes)  # the embedding, perhaps tied, and the head
    for method in ("hidden_states", "scores"):  # which losses call instead of `forward`
        register_fsdp_forward_method(model, method)
    return model


def local_rows(tensor: Tensor, parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """This process's share of a weight.

    Args:
        tensor: the whole weight.
        parameter: a parameter of a model that `shard` prepared, in whose place the share goes.
        dtype: to convert to.
    """
    from torch.distributed.tensor import DTensor

    assert isinstance(parameter, DTensor), "a parameter that is not sharded"
    mesh = parameter.device_mesh
    shares, rank = tensor.chunk(mesh.size()), mesh.get_local_rank()
    share = shares[rank] if rank < len(shares) else tensor[:0]
    share = share.to(device=mesh.device_type, dtype=dtype, copy=True)  # a view would keep the whole weight alive
    return DTensor.from_local(
        share, mesh, parameter.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )
