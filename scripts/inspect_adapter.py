"""Look inside an Aligner: how it was trained, a picture of its gates, and what its tokens resemble.

    python scripts/inspect_adapter.py --adapter_path out/demo/aligner.safetensors
    python scripts/inspect_adapter.py --adapter_path out/demo/aligner.safetensors --checkpoint_dir checkpoints/BASE
    python scripts/inspect_adapter.py --adapter_path a.safetensors --adapter_path b.safetensors

The `.pth` files that the authors have published can be inspected too. The text is printed, and the picture is saved as
`--output_path`.
"""

import sys
import textwrap
from pathlib import Path

import torch
import torch.nn.functional as F

from lit_llama.adapters import AdapterInfo, adapter_file, read_adapter
from lit_llama.aligner import Aligner
from lit_llama.checkpoint import load_base
from lit_llama.figures import picture
from lit_llama.script.command_line import run
from lit_llama.tokenizer import Tokenizer


def main(
    adapter_path: list[str],
    checkpoint_dir: Path | None = None,
    output_path: Path | None = None,
    nearest: int = 5,
    allow_other_base: bool = False,
) -> None:
    """Inspect one Aligner, or compare two.

    Args:
        adapter_path: file or run folder of an Aligner; give two to compare them.
        checkpoint_dir: folder of the base model; if given, the vocabulary entries nearest to each token are listed.
        output_path: PNG file that is written; if not given, it has the first Aligner's name and folder, and
            ".compared" in its name if there are two.
        nearest: number of vocabulary entries that are listed for each token.
        allow_other_base: compare with the vocabulary of another base model than the one that the Aligner was trained
            on.
    """
    paths = [adapter_file(path) for path in adapter_path]
    if len(paths) > 2:
        raise ValueError(f"--adapter_path was given {len(paths)} times: give one Aligner, or two to compare them")
    aligners, infos = [], []
    for path in paths:
        aligner, info = read_adapter(path)
        if not isinstance(aligner, Aligner):
            raise ValueError(f"{path} is of the method {info.method!r}; only an Aligner can be inspected")
        aligners.append(aligner)
        infos.append(info)
    for path, info, aligner in zip(paths, infos, aligners, strict=True):
        print(describe(path, info, aligner))
        if checkpoint_dir is not None:
            print(describe_nearest(path, aligner, checkpoint_dir, nearest, allow_other_base))
    if len(aligners) == 2:
        print(describe_difference(*aligners))
    output_path = output_path or paths[0].with_suffix(".png" if len(paths) == 1 else ".compared.png")
    draw_gates(paths, aligners, output_path)
    print(f"picture: {output_path}", file=sys.stderr)


def describe(path: Path, info: AdapterInfo, aligner: Aligner) -> str:
    """What an Aligner is, how it was trained, and how large its parts are."""
    tokens, gates = aligner.tokens.detach(), aligner.gates.detach()
    magnitude = gates.abs().mean(1)
    strongest = int(magnitude.argmax()) + aligner.start_layer
    norms = tokens.norm(dim=1)
    facts = [
        ("method", info.method),
        ("prefix tokens", f"{tokens.size(0)} of {tokens.size(1)} numbers"),
        ("gates", f"layers {aligner.start_layer} to {info.config['n_layer'] - 1}, {gates.size(1)} heads each"),
        ("parameters", f"{tokens.numel() + gates.numel():,}"),
        ("file", f"{path.stat().st_size:,} bytes"),
        ("base", f"{info.base_name or 'not recorded'} {info.base_fingerprint[:12]}".strip()),
        ("prompt style", info.prompt_style or "not recorded"),
        ("best step", "not recorded" if info.step is None else str(info.step)),
        ("validation loss", "not recorded" if info.validation_loss is None else f"{info.validation_loss:.4f}"),
        ("mean |gate|", f"{gates.abs().mean():.4f}, largest in layer {strongest} ({magnitude.max():.4f})"),
        ("largest |gate|", f"{gates.abs().max():.4f}; {(gates > 0).float().mean():.0%} of the gates are positive"),
        ("token norms", f"{norms.min():.3f} to {norms.max():.3f}, mean {norms.mean():.3f}"),
    ]
    if len(tokens) > 1:
        cosines = F.cosine_similarity(tokens[:, None], tokens[None], dim=-1)
        others = cosines[~torch.eye(len(tokens), dtype=torch.bool)]
        spread = f"{others.min():.3f} to {others.max():.3f}, mean {others.mean():.3f}"
        facts.append(("cosines between tokens", spread))
    facts += [("attended to by", "the prompt alone")] if aligner.prompt_only else []
    facts += [("trained on top of", f"{one.name} (scale {one.scale:g})") for one in info.also]
    facts += [(f"  {name}", str(value)) for name, value in info.hyperparameters.items()]
    return "\n".join([str(path), *(f"  {name:28}{value}" for name, value in facts)])


def describe_nearest(path: Path, aligner: Aligner, checkpoint_dir: Path, nearest: int, allow_other_base: bool) -> str:
    """The vocabulary entries whose embeddings have the largest cosine with each prefix token."""
    tokenizer, model = Tokenizer(checkpoint_dir), load_base(checkpoint_dir)
    read_adapter(path, model=model, allow_other_base=allow_other_base)  # refuses one of another base
    embeddings = F.normalize(model.transformer.wte.weight.float(), dim=1)  # (V, C)
    cosines = F.normalize(aligner.tokens.detach(), dim=1) @ embeddings.T  # (N, V)
    lines = ["  nearest in the vocabulary (cosine)"]
    for index, row in enumerate(cosines):
        values, ids = row.topk(nearest)
        entries = (
            f"{tokenizer.decode([id], skip_special_tokens=False)!r} {value:.3f}"
            for id, value in zip(ids.tolist(), values.tolist(), strict=True)
        )
        lines.append(f"    token {index}: {', '.join(entries)}")
    return "\n".join(lines)


def describe_difference(first: Aligner, second: Aligner) -> str:
    """How two Aligners differ, in what they have in common."""
    lines = ["difference"]
    for name in ("tokens", "gates"):
        a, b = getattr(first, name).detach(), getattr(second, name).detach()
        if a.shape != b.shape:
            lines.append(f"  {name}: {tuple(a.shape)} and {tuple(b.shape)}, not comparable")
            continue
        cosine = F.cosine_similarity(a.flatten(), b.flatten(), dim=0)
        relative = (a - b).norm() / a.norm()
        lines.append(f"  {name}: cosine {cosine:.4f}, |a - b| / |a| {relative:.4f}, largest {(a - b).abs().max():.4f}")
    return "\n".join(lines)


def _last_parts(path: Path) -> str:
    """The name of an adapter's file with that of its folder, as the files of all runs have the same name."""
    return "/".join(path.absolute().parts[-2:])


def draw_gates(paths: list[Path], aligners: list[Aligner], output_path: Path) -> None:
    """Draw the gates over layers and heads, and their mean size per layer; of two Aligners also the difference."""
    panels = [
        (_last_parts(path), aligner.start_layer, aligner.gates.detach())
        for path, aligner in zip(paths, aligners, strict=True)
    ]
    comparable = len(panels) == 2 and panels[0][1] == panels[1][1] and panels[0][2].shape == panels[1][2].shape
    if comparable:
        panels.append(("second - first", panels[0][1], panels[1][2] - panels[0][2]))
    names = " and ".join(dict.fromkeys(title for title, *_ in panels[: len(aligners)]))
    with picture(output_path, f"Gates of {names}", 4.5 * (len(panels) + 1), 5) as figure:
        maps = figure.subplots(1, len(panels) + 1, sharey=True)  # the first layer on top
        limit = max(float(gates.abs().max()) for _, _, gates in panels) or 1.0
        for axes, (title, start, gates) in zip(maps, panels, strict=False):
            extent = (-0.5, gates.size(1) - 0.5, start + len(gates) - 0.5, start - 0.5)
            image = axes.imshow(gates, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", extent=extent)
            axes.set_xlabel("head")
            axes.locator_params("x", integer=True)
            axes.set_title(textwrap.fill(title, 40), fontsize="small")
            maps[-1].plot(gates.abs().mean(1), range(start, start + len(gates)), marker=".", label=axes.get_title())
        maps[0].set_ylabel("layer")
        maps[0].locator_params("y", integer=True)
        figure.colorbar(image, ax=list(maps[:-1]), label="gate")
        maps[-1].set_title("mean |gate| per layer", fontsize="small")
        maps[-1].set(xlabel="mean |gate|", xlim=(0, None))
        last = max(start + len(gates) for _, start, gates in panels) - 0.5
        maps[-1].set_ylim(last, min(start for _, start, _ in panels) - 0.5)
        maps[-1].tick_params(labelleft=True)
        maps[-1].grid(alpha=0.3)
        if len(panels) > 1:
            figure.legend(*maps[-1].get_legend_handles_labels(), fontsize="small", ncols=3, loc="outside lower center")


if __name__ == "__main__":
    run(main)
