"""Tokenise a file of instructions and answers in Alpaca's layout.

    python scripts/prepare_alpaca.py --data_path alpaca_data.json --output_dir data/alpaca

The file is a JSON array or JSON Lines of objects with "instruction", "output" and perhaps "input", as in
https://github.com/tatsu-lab/stanford_alpaca.
"""

from pathlib import Path

import numpy as np

from lit_llama.cli import report_dataset, run
from lit_llama.data import TextExample, TooLong, write_dataset
from lit_llama.files import read_records
from lit_llama.prompts import prompt_style as get_prompt_style
from lit_llama.tokenizer import Tokenizer


def main(
    data_path: Path,
    checkpoint_dir: Path = Path("checkpoints/SmolLM2-135M-Instruct"),
    output_dir: Path = Path("data/alpaca"),
    prompt_style: str = "alpaca",
    max_seq_length: int = 512,
    too_long: TooLong = "truncate",
    validation_share: float = 0.05,
    seed: int = 1337,
) -> None:
    """Prepare.

    Args:
        data_path: the JSON or JSON Lines file.
        checkpoint_dir: folder of the base model, for its tokenizer.
        output_dir: the folder to write; must not exist yet.
        prompt_style: "alpaca", "chat" (the model's own template) or "none".
        max_seq_length: window in tokens.
        too_long: "truncate" longer examples at the window's end or "skip" them; either way they are counted.
        validation_share: share of the examples that is kept for validation, drawn at random.
        seed: of that draw.
    """
    if not 0 < validation_share < 1:
        raise ValueError(f"--validation_share is {validation_share}, it must lie between 0 and 1")
    tokenizer = Tokenizer(checkpoint_dir)
    examples = [read_example(place, row) for place, row in read_records(data_path)]
    order = np.random.default_rng(seed).permutation(len(examples))
    cut = max(1, round(validation_share * len(examples)))
    splits = {"train": [examples[i] for i in order[cut:]], "validation": [examples[i] for i in order[:cut]]}
    style = get_prompt_style(prompt_style, tokenizer)
    summaries = write_dataset(output_dir, splits, tokenizer, style, max_seq_length, too_long, source=data_path.name)
    report_dataset(output_dir, summaries)


def read_example(place: str, row: dict[str, object]) -> TextExample:
    """An object of the file as an example.

    Raises:
        ValueError: a field is missing or no text; the message names the place.
    """
    for field in ("instruction", "output"):
        if not isinstance(row.get(field), str):
            raise ValueError(f"{place}: expected a text under {field!r}, found {row.get(field)!r} in {sorted(row)}")
    return TextExample(str(row["instruction"]), str(row.get("input") or ""), str(row["output"]))


if __name__ == "__main__":
    run(main)
