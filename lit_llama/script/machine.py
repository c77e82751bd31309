"""The options of the machine, which all scripts of finetune/ have: where a run computes, and what it keeps."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lit_llama.base import Base, open_base
from lit_llama.devices.precision import PRECISIONS, Precision, what_auto_takes
from lit_llama.devices.quantization import Quantize
from lit_llama.plan import Plan
from lit_llama.script.launch import launch, make_loggers
from lit_llama.states import recorded_setting
from lit_llama.training import write_line

# Annotations are not postponed here: to read the options' types, the parser would import what follows for them.
if TYPE_CHECKING:  # takes seconds to import, which --help should not cost
    from lightning_fabric import Fabric
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class Machine:
    """Where a run computes, and what it keeps.

    Args:
        precision: number format of the base model; "auto" is bf16-true where GPU or CPU compute in it and 32-true
            elsewhere, and says which it takes.
        quantize: number of bits in which the base's blocks are kept: 4 ("nf4") or 8 ("int8"); if not given, they stay
            whole, and adapters that were trained on a quantised base are refused, which "none" accepts.
        activation_checkpointing: compute activations again for the backward pass instead of keeping them, which takes
            less memory and more time.
        compile: let a compiler make the computation of each block, which takes a minute or more for each new length of
            a batch; lengths are rounded up to multiples of 64, so that there are few. For long runs on a GPU.
        devices: number of devices on each node.
        num_nodes: number of machines, each of which runs this script; see howto/resume_and_scale.md.
        shard_base: spread the base model over all devices, for one that does not fit on a single device.
        resume: continue the run in --out_dir from its last state, to the bit; if there is none, begin.
        save_interval: optimizer steps between states to resume from; one is also saved every 10 minutes.
        logger: a logger in addition to metrics.csv: "tensorboard" or "wandb"; may be given twice.

    Raises:
        ValueError: values are out of range or do not go together; the message names all of them by their options.
    """

    precision: Precision = "auto"
    quantize: Quantize | Literal["none"] | None = None
    activation_checkpointing: bool = False
    compile: bool = False
    devices: int = 1
    num_nodes: int = 1
    shard_base: bool = False
    resume: bool = False
    save_interval: int = 100
    logger: list[str] | None = None

    def __post_init__(self) -> None:
        problems = [
            f"--{name} is {getattr(self, name)}, it must be at least 1"
            for name in ("devices", "num_nodes", "save_interval")
            if getattr(self, name) < 1
        ]
        given = {name for name, value in vars(self).items() if value not in (False, None, "none")}
        pairs = ("quantize", "shard_base"), ("compile", "quantize"), ("compile", "shard_base")
        problems += [
            f"--{one} and --{other} do not go together: leave out one of them"
            for one, other in pairs
            if {one, other} <= given
        ]
        if problems:
            raise ValueError("; ".join(problems))

    def launch(self, out_dir: Path, plan: Plan) -> "tuple[Fabric, DeviceMesh | None]":
        """Start the processes of a run, or join those that torchrun, `fabric run` or SLURM started.

        Args:
            out_dir: folder of the run, to be refused before a base is loaded if another run has it.
            plan: whose batches the processes share.

        Returns:
            The processes, and the mesh to shard the base over, if it is to be sharded.

        Raises:
            ValueError: options do not go together, a batch cannot be shared evenly, there are not as many devices, or
                another run has the folder.
        """
        if self.compile and plan.pack:
            raise ValueError("--compile and --pack do not go together, as no two packed rows have the same lengths")
        at_once = plan.micro_batch_size * self.devices * self.num_nodes
        if plan.batch_size % at_once:
            raise ValueError(
                f"--batch_size {plan.batch_size} is not a multiple of {at_once}, which is --micro_batch_size "
                f"{plan.micro_batch_size} times --devices {self.devices} times --num_nodes {self.num_nodes}: lower "
                "--micro_batch_size or raise --batch_size"
            )
        loggers = make_loggers(self.logger or [], out_dir, self.resume)
        return launch(self.devices, self.num_nodes, self.shard_base, loggers, out_dir)

    def open_base(
        self, checkpoint_dir: Path, prompt_style: str | None, out_dir: Path, fabric: "Fabric", mesh: "DeviceMesh | None"
    ) -> Base:
        """Open the base model of a run as the options say.

        A run that is resumed keeps the number format that it began with, where the option leaves it open.

        Args:
            checkpoint_dir: folder of the base model.
            prompt_style: style of the training prompts; if None, the base's own chat template.
            out_dir: folder of the run.
            fabric: processes of the run.
            mesh: what `launch` gave to shard the base over.
        """
        precision = self.precision
        if precision == "auto":
            earlier = recorded_setting(out_dir, "precision") if self.resume else None
            resumed: list[Precision] = [name for name, dtype in PRECISIONS.items() if dtype and str(dtype) == earlier]
            precision = resumed[0] if resumed else precision
            if fabric.is_global_zero:
                as_before = f"--precision auto: {precision}, as before the run was resumed"
                write_line(as_before if resumed else what_auto_takes(fabric.device))
        base = open_base(
            checkpoint_dir,
            prompt_style=prompt_style,
            precision=precision,
            quantize=self.quantize,
            device=fabric.device,
            mesh=mesh,
        )
        if self.activation_checkpointing:
            base.model.checkpoint_activations()
        if self.compile:
            base.model.compile_blocks()
        return base


def build_all(*parts: Callable[[], Any]) -> list[Any]:
    """Make what the options ask for, and report what is wrong with all of it at once.

    Args:
        parts: each makes one thing, or raises `ValueError`.

    Returns:
        The things.

    Raises:
        ValueError: one or several parts raised one; the message has them all.
    """
    made, problems = [], []
    for part in parts:
        try:
            made.append(part())
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("; ".join(problems))
    return made
