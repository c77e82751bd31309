"""Let the base model answer with a LLaMA-Adapter.

    python generate/llama_adapter.py --prompt "What is the capital of France?"
    python generate/llama_adapter.py --adapter_path out/json/llama_adapter.safetensors --prompts_file prompts.jsonl
    echo "Name three rivers." | python generate/llama_adapter.py --temperature 0.8

Only the answers go to stdout.
"""

from pathlib import Path
from typing import Any

from lit_llama.script.command_line import answer_with, run


def main(
    adapter_path: list[Path] = [Path("out/adapter/llama_adapter.safetensors")],  # noqa: B006
    adapter_scale: list[float] | None = None,
    prompt: list[str] | None = None,
    **options: Any,
) -> None:
    """Generate.

    Args:
        adapter_path: the LLaMA-Adapter; may be given several times, to be added up.
        adapter_scale: what it is multiplied by, from 0 (the base) to beyond 1; may be given once for each.
        prompt: what to answer; may be given several times. Without it and a file, standard input is one prompt.
        options: those of every such script, see `answer_with`.
    """
    answer_with("llama_adapter", adapter_path, adapter_scale, None, 1, prompt, **options)


if __name__ == "__main__":
    run(main)
