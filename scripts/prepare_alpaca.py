"""Tokenise instructions and answers in Alpaca's layout.

    python scripts/prepare_alpaca.py --data_path alpaca_data.json --output_dir data/alpaca
    python scripts/prepare_alpaca.py

Objects with "instruction", "output" and perhaps "input", as in https://github.com/tatsu-lab/stanford_alpaca, or in
another layout that howto/prepare_data.md lists. Without a file, the cleaned Alpaca of 51,760 examples is fetched.
"""

from pathlib import Path
from typing import Any

from lit_llama.script.command_line import run
from lit_llama.script.layouts import read_conversation
from lit_llama.script.prepare import prepare

HUB_FILES = ("yahma/alpaca-cleaned", ["alpaca_data_cleaned.json"])


def main(
    data_path: Path | None = None,
    output_dir: Path = Path("data/alpaca"),
    prompt_style: str = "alpaca",
    validation_share: float = 0.05,
    **options: Any,
) -> None:
    """Prepare.

    Args:
        data_path: JSON, JSON Lines, CSV (perhaps packed), parquet, a folder of such files or one of `save_to_disk`; if
            not given, the public dataset is fetched from the Hugging Face hub.
        output_dir: the folder to write.
        prompt_style: "alpaca", "metamath", "beaver", "hh", "chat" (the model's own template) or "none".
        validation_share: share of the examples that is kept for validation, drawn at random.
        options: those of every such script, see `prepare`.
    """
    prepare(
        read_conversation,
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
