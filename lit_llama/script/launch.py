"""The processes of a run, and the loggers that it reports to in addition to its own files."""

from __future__ import annotations

import atexit
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lit_llama.devices.sharding import shard
from lit_llama.files import require_extra
from lit_llama.locks import check_not_owned
from lit_llama.states import last_state

if TYPE_CHECKING:  # takes seconds to import, which --help should not cost
    from lightning_fabric import Fabric
    from lightning_fabric.loggers.logger import Logger
    from torch.distributed.device_mesh import DeviceMesh


def launch(
    devices: int = 1,
    num_nodes: int = 1,
    shard_base: bool = False,
    loggers: Sequence[Logger] = (),
    out_dir: Path | None = None,
) -> tuple[Fabric, DeviceMesh | None]:
    """Start the processes of a run, or join those that torchrun, `fabric run` or SLURM started.

    Args:
        devices: on each node: GPUs if there are any, otherwise processes on the CPU.
        num_nodes: machines.
        shard_base: the processes will hold a share of the base each, not a copy.
        loggers: loggers in addition to `metrics.csv`.
        out_dir: folder of the run, to be refused before a base is loaded if another run has it.

    Returns:
        The processes, and the mesh to shard the base over.

    Raises:
        ValueError: there are not as many devices, or another run has the folder.
    """
    from lightning_fabric import Fabric
    from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
    from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
    from lightning_fabric.strategies.model_parallel import ModelParallelStrategy
    from lightning_fabric.utilities.exceptions import MisconfigurationException

    environments = TorchElasticEnvironment.detect(), SLURMEnvironment.detect(), "LT_CLI_USED" in os.environ
    if num_nodes > 1 and not any([*environments, "MASTER_ADDR" in os.environ]):
        raise ValueError(
            f"--num_nodes {num_nodes}: start the script on each machine with torchrun, `fabric run` or SLURM, see "
            "howto/resume_and_scale.md"
        )
    # Fabric's `setup_module` would apply `shard` too, but then initialise the weights at random before they are loaded.
    world_size = devices * num_nodes
    strategy = ModelParallelStrategy(shard, world_size, tensor_parallel_size=1) if shard_base else "auto"
    try:
        fabric = Fabric(strategy=strategy, devices=devices, num_nodes=num_nodes, loggers=list(loggers))
    except (MisconfigurationException, ValueError) as error:
        raise ValueError(f"--devices {devices} --num_nodes {num_nodes}: {error}") from None
    # Fabric takes processes that it did not start for runs of their own where it expects a single one.
    started = world_size
    if TorchElasticEnvironment.detect():
        started = int(os.environ["WORLD_SIZE"])
    elif SLURMEnvironment.detect():
        started = int(os.environ["SLURM_NTASKS"])
    if started != world_size:
        raise ValueError(
            f"{started} processes were started, --devices {devices} --num_nodes {num_nodes} make {world_size}: let "
            "--devices be the processes on each node"
        )
    if os.environ.get("LT_CLI_USED") != "1":  # `fabric run` has launched already
        fabric.launch()
    atexit.register(_leave)
    problem = None
    if out_dir is not None and fabric.is_global_zero:
        try:
            check_not_owned(out_dir)
        except ValueError as error:
            problem = str(error)
    problem = fabric.broadcast(problem)  # so that all processes end
    if problem is not None:
        raise ValueError(problem)
    return fabric, strategy.device_mesh if isinstance(strategy, ModelParallelStrategy) else None


def join_processes() -> None:
    """Join the processes that torchrun started, each with a GPU of its own if there are any; none will do.

    They share work, not a model: each has it whole.
    """
    from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment

    if not TorchElasticEnvironment.detect():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    atexit.register(_leave)


def _leave() -> None:
    """Close the process group: its threads abort an interpreter that exits while they run."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def make_loggers(names: Sequence[str], out_dir: Path, resume: bool) -> list[Logger]:
    """Loggers of Fabric by name: "tensorboard", "wandb".

    Args:
        names: which.
        out_dir: folder of the run; they write to folders in it.
        resume: the run may go on from a state, so that what was logged after it is void.

    Raises:
        ValueError: no such logger.
        ImportError: one is not installed.
    """
    loggers: list[Logger] = []
    for name in names:
        if name == "tensorboard":
            require_extra("tensorboard", "tensorboard")
            from lightning_fabric.loggers.tensorboard import TensorBoardLogger

            state = last_state(out_dir) if resume else None
            purge: dict[str, Any] = {} if state is None else {"purge_step": int(state.stem.rpartition("-")[2]) + 1}
            loggers.append(TensorBoardLogger(out_dir, name="tensorboard", version="", **purge))
        elif name == "wandb":
            require_extra("wandb", "wandb")
            wandb = require_extra("pytorch_lightning.loggers", "wandb").WandbLogger  # which Fabric takes as well
            loggers.append(wandb(name=out_dir.name, save_dir=out_dir, project="aligner"))
        else:
            raise ValueError(f"--logger {name}: there are tensorboard and wandb; metrics.csv is always on")
    return loggers
