"""Tokenise PKU-SafeRLHF (arXiv 2406.15513), questions with two answers that were compared for safety and helpfulness.

    python scripts/prepare_beaver.py
    python scripts/prepare_beaver.py --kind supervised --output_dir data/beaver-safer

Objects with "prompt", "response_0", "response_1", "is_response_0_safe", "is_response_1_safe", "safer_response_id" and
"better_response_id". Without a file, the training set is fetched. Questions without a safe answer are left out, as the
Aligner authors do.
"""

import functools
from pathlib import Path
from typing import Any, Literal

from lit_llama.data import Item, Kind
from lit_llama.script.command_line import run
from lit_llama.script.layouts import Columns, LeftOutError, read_preference
from lit_llama.script.prepare import prepare

HUB_FILES = (
    "PKU-Alignment/PKU-SafeRLHF",
    ["data/Alpaca-7B/train.jsonl", "data/Alpaca2-7B/train.jsonl", "data/Alpaca3-8B/train.jsonl"],
)


def main(
    output_dir: Path = Path("data/beaver"),
    kind: Kind = "pairs",
    chosen_by: Literal["safer", "better"] = "safer",
    prompt_style: str = "beaver",
    validation_share: float = 0.05,
    **options: Any,
) -> None:
    """Prepare a data set.

    Args:
        output_dir: folder to write.
        kind: "pairs" for preference tuning, "supervised" for tuning on the chosen answers alone, or "unpaired" for
            tuning on answers that are each good or bad, by finetune/aligner_kto.py.
        chosen_by: what decides which answer is the chosen one: "safer_response_id", or "better_response_id", the more
            helpful one.
        prompt_style: name of the prompt style: "beaver", "alpaca", "hh", "chat" (the model's own template) or "none".
        validation_share: share of the examples that is kept for validation, drawn at random.
        options: options of all such scripts, see `prepare`.
    """
    prepare(
        functools.partial(read, kind=kind, chosen_by=chosen_by),
        kind,
        "last",
        HUB_FILES,
        output_dir=output_dir,
        prompt_style=prompt_style,
        validation_share=validation_share,
        **options,
    )


def read(columns: Columns, kind: Kind, chosen_by: str) -> Item:
    """A question with its chosen and its rejected answer."""
    row, column = columns.row, f"{chosen_by}_response_id"
    if row.get(column) not in (0, 1):
        raise ValueError(f"expected 0 or 1 under {column!r}, found {row.get(column)!r} in {sorted(row)}")
    safe = [row.get(f"is_response_{i}_safe") for i in (0, 1)]
    if not all(isinstance(value, bool) for value in safe):
        raise ValueError(f"expected true or false under 'is_response_0_safe' and 'is_response_1_safe', found {safe}")
    if not any(safe):
        raise LeftOutError("without a safe answer")
    chosen = int(row[column])
    names = {"prompt": "prompt", "chosen": f"response_{chosen}", "rejected": f"response_{1 - chosen}"}
    return read_preference(Columns({name: row[old] for name, old in names.items() if old in row}), kind)


if __name__ == "__main__":
    run(main)
