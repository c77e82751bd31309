"""Tokenise Databricks' Dolly 15k, or any file in its layout.

    python scripts/prepare_dolly.py
    python scripts/prepare_dolly.py --data_path databricks-dolly-15k.jsonl

Objects with "instruction", "response" and perhaps "context", written by Databricks' employees
(https://huggingface.co/datasets/databricks/databricks-dolly-15k).
"""

from pathlib import Path
from typing import Any

from lit_llama.script.command_line import run
from lit_llama.script.layouts import read_conversation
from lit_llama.script.prepare import prepare

HUB_FILES = ("databricks/databricks-dolly-15k", ["databricks-dolly-15k.jsonl"])


def main(
    output_dir: Path = Path("data/dolly"),
    prompt_style: str = "alpaca",
    validation_share: float = 0.05,
    **options: Any,
) -> None:
    """Prepare a data set.

    Args:
        output_dir: folder to write.
        prompt_style: name of the prompt style: "alpaca", "metamath", "beaver", "hh", "chat" (the model's own template)
            or "none".
        validation_share: share of the examples that is kept for validation, drawn at random.
        options: options of all such scripts, see `prepare`.
    """
    prepare(
        read_conversation,
        "supervised",
        "last",
        HUB_FILES,
        output_dir=output_dir,
        prompt_style=prompt_style,
        validation_share=validation_share,
        **options,
    )


if __name__ == "__main__":
    run(main)
