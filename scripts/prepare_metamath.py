"""Tokenise MetaMathQA, or GSM8K's own problems.

    python scripts/prepare_metamath.py
    python scripts/prepare_metamath.py --data_path gsm8k/train.jsonl --output_dir data/gsm8k

Objects with "query" and "response" (MetaMathQA, arXiv 2309.12284), or with "question" and "answer" (GSM8K,
arXiv 2110.14168).
"""

from pathlib import Path
from typing import Any

from lit_llama.script.command_line import run
from lit_llama.script.layouts import read_conversation
from lit_llama.script.prepare import prepare

HUB_FILES = ("meta-math/MetaMathQA", ["MetaMathQA-395K.json"])


def main(
    output_dir: Path = Path("data/metamath"),
    prompt_style: str = "metamath",
    validation_share: float = 0.01,
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
