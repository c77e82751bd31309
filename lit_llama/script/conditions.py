"""The options that all scripts of finetune/ have: other adapters, scales, text to keep, and the machine."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_llama.adapters import AnyAdapter, Companion
from lit_llama.base import Base
from lit_llama.checkpoint import read_config
from lit_llama.devices.quantization import bits_of
from lit_llama.files import shareable_path
from lit_llama.objective import Objective, read_kept_text
from lit_llama.plan import Plan
from lit_llama.run_files import check_out_dir
from lit_llama.runs import RunFolder
from lit_llama.script.machine import Machine
from lit_llama.together import ReadAdapter, read_adapters, scales_of
from lit_llama.tokenizer import Tokenizer

if TYPE_CHECKING:  # takes seconds to import, which --help should not cost
    from lightning_fabric import Fabric


class Conditions:
    """Under which conditions an adapter is trained.

    Args:
        also_adapter: file or run folder of an adapter that takes part in every forward and is not trained; the new one
            is trained on top of it, and is to be used together with it. May be given several times.
        also_scale: number that each of those is multiplied by: one for each, or one for all; 1 if not given.
        scale_range: two numbers, such as 0 and 1.5: each example draws its scale of the adapter between them and is
            trained for a target between the base (0 and below) and the form (1 and above), so that the adapter can be
            turned up and down evenly; if not given, the scale is 1.
        keep_weight: weight of the divergence from the base on --keep_data, which is added to the loss, so that other
            text stays as likely as it was; 0 if not given.
        keep_data: text to keep: a text file, or JSON Lines with a "text" each; best of several kinds. If not given,
            examples/plain.jsonl.
        machine: where the run computes and what it keeps; see `Machine`.

    Raises:
        ValueError: values are out of range or do not go together; the message names all of them by their options.
    """

    def __init__(
        self,
        also_adapter: list[Path] | None = None,
        also_scale: list[float] | None = None,
        scale_range: tuple[float, float] | None = None,
        keep_weight: float | None = None,
        keep_data: Path | None = None,
        **machine: Any,
    ) -> None:
        self.options = {name: value for name, value in locals().items() if name not in ("self", "machine", "__class__")}
        problems = []
        if keep_weight is not None and not keep_weight >= 0:
            problems.append(f"--keep_weight is {keep_weight}, it must be at least 0")
        if keep_data is not None and keep_weight is None:
            problems.append("--keep_data is given without a --keep_weight, so nothing would be kept: give both")
        if scale_range is not None and not scale_range[0] < scale_range[1]:
            problems.append(f"--scale_range is {scale_range}, expected a smaller and a larger number, such as 0 1.5")
        elif scale_range is not None and scale_range[1] <= 0:
            problems.append(f"--scale_range is {scale_range}, which is nowhere above 0: there is nothing to learn from")
        if also_scale and not also_adapter:
            problems.append("--also_scale is given without an --also_adapter that it could scale")
        try:
            self.machine = Machine(**machine)
        except ValueError as error:
            problems.append(str(error))
        if problems:
            raise ValueError("; ".join(problems))
        self.scale_range, self.keep_weight = scale_range, keep_weight or 0.0
        self.keep_data = keep_data or Path("examples/plain.jsonl")
        if self.keep_weight:
            self.options["keep_data"] = self.keep_data
        self._paths, self._scales = also_adapter or [], scales_of(also_scale, len(also_adapter or []))

    def without(self, refused: Mapping[str, str]) -> "Conditions":
        """These, where a script cannot honour some of them.

        Args:
            refused: names of options, each with the reason.

        Raises:
            ValueError: one of them is given.
        """
        problems = [f"--{name} is refused here: {why}" for name, why in refused.items() if self.options[name]]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def open(
        self,
        checkpoint_dir: Path,
        prompt_style: str | None,
        plan: Plan,
        out_dir: Path,
        others: Sequence[ReadAdapter] = (),
    ) -> "tuple[Fabric, Base, Objective]":
        """Start the processes of a run, and open the base model.

        Args:
            checkpoint_dir: folder of the base model.
            prompt_style: name of the style of the training prompts; if None, the base's own chat template.
            plan: whose batches the processes share, and whose seed is that of what the examples draw.
            out_dir: folder of the run.
            others: adapters that the run begins with or is held to; they are moved to the base model's device.

        Returns:
            The processes, the base model, and what is minimised on it.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: something is damaged, an adapter does not belong to the base or would be moved away by this run,
                `out_dir` is a base model's folder, or the machine is not as asked for.
        """
        machine, self._also = self.machine, read_adapters(self._paths, read_config(checkpoint_dir))
        together = [*self._also, *others]
        check_out_dir(out_dir, [one.path for one in together if one.path is not None])
        kept = None
        if self.keep_weight:
            kept = read_kept_text(self.keep_data, Tokenizer(checkpoint_dir), self.keep_weight)
        fabric, mesh = machine.launch(out_dir, plan)
        base = machine.open_base(checkpoint_dir, prompt_style, out_dir, fabric, mesh)
        base.with_adapter(together)  # moves them there, and refuses those of another base
        for one in self._also:
            assert isinstance(one.adapter, AnyAdapter)
            one.adapter.requires_grad_(False)
        frozen = [(one.adapter, scale) for one, scale in zip(self._also, self._scales, strict=True)]
        return fabric, base, Objective(base.model, plan.seed, frozen, self.scale_range, kept)

    def resume_dir(self, out_dir: Path) -> Path | None:
        """The folder of the run, if it is resumed."""
        return out_dir if self.machine.resume else None

    def run_folder(
        self,
        out_dir: Path,
        base: Base,
        options: Mapping[str, Any],
        objective: Objective,
        fingerprints: Mapping[str, str] | None = None,
    ) -> RunFolder:
        """The folder of a run, where all options are recorded.

        Args:
            out_dir: the folder.
            base: the base model, with the style of the training prompts.
            options: all keywords of a script, with these ones under "conditions".
            objective: what is minimised.
            fingerprints: hashes of what else changes the result, in addition to base and data, by name.
        """
        own = {name: value for name, value in options.items() if name != "conditions"}
        also = [
            Companion(shareable_path(path), one.content, scale)
            for path, one, scale in zip(self._paths, self._also, self._scales, strict=True)
        ]
        changing = {"also_adapter": ", ".join(one.fingerprint for one in also)} if also else {}
        changing |= {"kept text": objective.kept.fingerprint} if objective.kept else {}
        return RunFolder(
            out_dir,
            base.model,
            base.style.name,
            own | self.options | asdict(self.machine) | {"quantize": bits_of(base.model)},
            resume=self.machine.resume,
            save_interval=self.machine.save_interval,
            fingerprints=changing | (dict(fingerprints) if fingerprints else {}),
            also=also,
        )
