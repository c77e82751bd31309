"""Let the base model answer with an Aligner.

    python generate/aligner.py --prompt "What is the capital of France?"
    python generate/aligner.py --aligner_path out/json/aligner.safetensors --prompts_file prompts.jsonl
    echo "Name three rivers." | python generate/aligner.py --temperature 0.8

Only the answers go to stdout. The authors' published `.pth` files (arXiv 2312.05503) can be used as they are.
"""

from pathlib import Path
from typing import Any

from lit_llama.cli import answer_with, run


def main(
    aligner_path: Path = Path("out/demo/aligner.safetensors"),
    prompt: list[str] | None = None,
    **options: Any,
) -> None:
    """Generate.

    Args:
        aligner_path: the Aligner.
        prompt: what to answer; may be given several times. Without it and a file, standard input is one prompt.
        options: those of every such script, see `answer_with`.
    """
    answer_with("aligner", aligner_path, prompt, **options)


if __name__ == "__main__":
    run(main)
