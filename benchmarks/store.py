"""What a folder of thousands of Aligners costs to open and to keep.

    python benchmarks/store.py
    python benchmarks/store.py --aligners 100000

Writes as many files of random one-token Aligners to a temporary folder and opens it. Linux alone: memory is what the
kernel says is resident.
"""

import gc
import os
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

from lit_llama.adapters import save_adapter
from lit_llama.aligner import Aligner
from lit_llama.checkpoint import read_config
from lit_llama.model import LLaMA
from lit_llama.script.command_line import run
from lit_llama.serving.store import AdapterStore
from lit_llama.shapes import without_values


def main(
    checkpoint_dir: Path = Path("checkpoints/SmolLM2-135M-Instruct"), aligners: int = 10_000, length: int = 1
) -> None:
    """Measure.

    Args:
        checkpoint_dir: folder of the base model; its sizes alone matter.
        aligners: how many.
        length: prefix tokens N of each.
    """
    config = read_config(checkpoint_dir)
    with without_values():
        base = LLaMA(config)
    base.fingerprint = "random"
    aligner = Aligner(config, length)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_adapter(folder / "0.safetensors", aligner, base, prompt_style="chat")
        content = (folder / "0.safetensors").read_bytes()
        for i in tqdm(range(1, aligners), desc="writing", leave=False):
            (folder / f"{i}.safetensors").write_bytes(content)
        gc.collect()
        before, started = resident_bytes(), time.perf_counter()
        store = AdapterStore(folder, base)
        seconds = time.perf_counter() - started
        gc.collect()
        added = resident_bytes() - before
        started = time.perf_counter()
        store.refresh()
        again = time.perf_counter() - started
        numbers = 4 * aligners * sum(parameter.numel() for parameter in aligner.parameters())
        print(
            f"{len(store):,} Aligners opened in {seconds:.1f} s, looked through again in {again:.3f} s; "
            f"{added / 1e6:.1f} MB, {added / numbers:.2f} times their numbers"
        )


def resident_bytes() -> int:
    """Of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    run(main)
