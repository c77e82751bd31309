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
    output_dir: Path = Path("data/alpaca"),
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
