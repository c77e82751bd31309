"""Let the base model answer with an Aligner.

    python generate/aligner.py --prompt "What is the capital of France?"
    python generate/aligner.py --adapter_path out/json/aligner.safetensors --prompts_file prompts.jsonl
    python generate/aligner.py --adapter_path a.safetensors --adapter_path b.safetensors --adapter_scale 0.5
    python generate/aligner.py --aligner_dir out --prompts_file prompts.jsonl
    echo "Name three rivers." | python generate/aligner.py --temperature 0.8

Only the answers go to stdout. The authors' published `.pth` files (arXiv 2312.05503) can be used as they are.
"""

from pathlib import Path
from typing import Any

from lit_llama.script.command_line import answer_with, run


def main(
    adapter_path: list[Path] = [Path("out/demo/aligner.safetensors")],  # noqa: B006
    adapter_scale: list[float] | None = None,
    aligner_dir: Path | None = None,
    batch_size: int = 16,
    prompt: list[str] | None = None,
    **options: Any,
) -> None:
    """Generate.

    Args:
        adapter_path: the Aligner; may be given several times, to be added up.
        adapter_scale: what it is multiplied by, from 0 (the base) to beyond 1; may be given once for each.
        aligner_dir: instead, a folder of Aligners. Prompts of a JSON file name theirs under "aligner" by its path
            in the folder without ".safetensors"; those that do not are answered by the base.
        batch_size: prompts at once, for a folder.
        prompt: what to answer; may be given several times. Without it and a file, standard input is one prompt.
        options: those of every such script, see `answer_with`.
    """
    answer_with("aligner", adapter_path, adapter_scale, aligner_dir, batch_size, prompt, **options)


if __name__ == "__main__":
    run(main)
