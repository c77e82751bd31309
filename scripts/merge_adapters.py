"""Make one adapter file of several, or of one at another scale, where that is exact.

    python scripts/merge_adapters.py --adapter_path a/lora.safetensors --adapter_path b/lora.safetensors \\
        --adapter_scale 1 --adapter_scale 0.5 --output_path out/both.safetensors
    python scripts/merge_adapters.py --adapter_path a.safetensors --adapter_scale 0.7 --output_path out/70.safetensors

Several LoRAs become one whose rank is the sum of their ranks, and several biases of one projection become their sum. A
single adapter of any method can be scaled. The new file also records what the parts stand on: the number of bits of
their base, and the adapters on top of which they were trained, apart from those that are merged as well. Several
Aligners cannot become one, because each has a softmax of its own. But scripts/export_hf_checkpoint.py and
scripts/export_gguf.py can export them together, and generate/aligner.py can answer with any number of them at once.
"""

import sys
import warnings
from pathlib import Path
from typing import Any

from lit_llama.adapters import AnyAdapter, save_adapter
from lit_llama.config import LLaMAConfig
from lit_llama.files import shareable_path
from lit_llama.model import LLaMA
from lit_llama.script.command_line import run
from lit_llama.shapes import without_values
from lit_llama.together import infos_of, read_adapters, scales_of, trained_bits


def main(
    adapter_path: list[Path],
    output_path: Path,
    adapter_scale: list[float] | None = None,
    overwrite: bool = False,
) -> None:
    """Merge.

    Args:
        adapter_path: file or run folder of an adapter; may be given several times.
        output_path: file that is written.
        adapter_scale: factor by which the adapters are multiplied, 1 if not given; give one for all of them, or one for
            each.
        overwrite: replace the file if it exists already.
    """
    if output_path.exists() and not overwrite:
        raise ValueError(f"{output_path} exists already; --overwrite replaces it")
    scales = scales_of(adapter_scale, len(adapter_path))
    read = read_adapters(adapter_path)
    infos, adapters = infos_of(read), [one.adapter for one in read if isinstance(one.adapter, AnyAdapter)]
    if len({(info.base_fingerprint, info.base_name) for info in infos}) > 1:
        raise ValueError(
            f"the adapters were trained on different base models: {', '.join(info.base_name for info in infos)}"
        )
    bits = trained_bits({one.name: info for one, info in zip(read, infos, strict=True)})
    first, styles = infos[0], {info.style: one.name for one, info in zip(read, infos, strict=True)}
    if len(styles) > 1:
        found = ", ".join(f"{name}: {style}" for style, name in styles.items())
        warnings.warn(
            f"the adapters were trained with different prompt styles ({found}): the merged one is used with the first",
            stacklevel=1,
        )
    sizes = {name: size for name, size in first.config.items() if name in LLaMAConfig.__dataclass_fields__}
    with without_values():
        base = LLaMA(LLaMAConfig(name=first.base_name, vocab_size=1, **sizes))  # for its sizes and fingerprint alone
    base.fingerprint = first.base_fingerprint
    make_one = getattr(adapters[0], "merged", None)
    if len(adapters) == 1:
        merged = adapters[0]
        merged.scale_(scales[0])
    elif len({type(adapter) for adapter in adapters}) == 1 and make_one is not None:
        merged = make_one(base.config, list(zip(adapters, scales, strict=True)))
    else:
        raise ValueError(
            f"{', '.join(info.method for info in infos)}: only several LoRAs, or several biases, can become one. "
            "Prefixes cannot, because each has a softmax of its own: export them together, or give all of them to "
            "generate/aligner.py"
        )
    made_of: dict[str, Any] = {
        "merged": [list(part) for part in zip(map(shareable_path, adapter_path), scales, strict=True)]
    }
    if bits != "none":
        made_of["quantize"] = bits
    inside = {one.content for one in read}
    needed = {(one.fingerprint, one.scale): one for info in infos for one in info.also if one.fingerprint not in inside}
    also = tuple(needed.values())
    save_adapter(output_path, merged, base, prompt_style=first.prompt_style, hyperparameters=made_of, also=also)
    print(f"{merged.method}: {output_path}", file=sys.stderr)


if __name__ == "__main__":
    run(main)
