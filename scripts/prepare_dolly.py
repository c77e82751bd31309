"""Tokenise Databricks' Dolly 15k, or any file in its layout.

    python scripts/prepare_dolly.py
    python scripts/prepare_dolly.py --data_path databricks-dolly-15k.jsonl

Objects with "instruction", "response" and perhaps "context", written by Databricks' employees
(https://huggingface.co/datasets/databricks/databricks-dolly-15k).
"""

from pathlib import Path
from typing import Any

from lit_llama.cli import run
from lit_llama.prepare import instruction_columns, prepare

READ = instruction_columns(instruction=["instruction"], input=["context"], response=["response"])
HUB_FILES = ("databricks/databricks-dolly-15k", ["databricks-dolly-15k.jsonl"])


def main(
    data_path: Path | None = None,
    output_dir: Path = Path("data/dolly"),
    prompt_style: str = "alpaca",
    validation_share: float = 0.05,
    **options: Any,
) -> None:
    """Prepare.

    Args:
        data_path: a JSON or JSON Lines file, perhaps gzipped, or a folder of such files; if not given, the public
            dataset is fetched from the Hugging Face hub.
        output_dir: the folder to write.
        prompt_style: "alpaca", "metamath", "beaver", "hh", "chat" (the model's own template) or "none".
        validation_share: share of the examples that is kept for validation, drawn at random.
        options: those of every such script, see `prepare`.
    """
    prepare(
        READ,
        "supervised",
        "last",
        HUB_FILES,
        data_path,
        output_dir=output_dir,
        prompt_style=prompt_style,
        validation_share=validation_share,
        **options,
    )


if __name__ == "__main__":
    run(main)
