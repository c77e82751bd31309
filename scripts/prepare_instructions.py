"""Tokenise any table of instructions and responses, of which you say the names of the columns.

    python scripts/prepare_instructions.py --data_path my.csv --instruction_column q --response_column a
    python scripts/prepare_instructions.py --data_path my.jsonl --instruction_column task --input_column text \\
        --response_column result --output_dir data/mine

prepare_alpaca.py, prepare_dolly.py and prepare_metamath.py do the same for public data sets, whose columns they know.
"""

import functools
from pathlib import Path
from typing import Any

from lit_llama.script.command_line import run
from lit_llama.script.layouts import read_columns
from lit_llama.script.prepare import prepare


def main(
    data_path: Path,
    instruction_column: str,
    response_column: str,
    input_column: str | None = None,
    system_column: str | None = None,
    output_dir: Path = Path("data/instructions"),
    prompt_style: str = "chat",
    validation_share: float = 0.05,
    **options: Any,
) -> None:
    """Prepare a data set.

    Args:
        data_path: file of records: JSON, JSON Lines, CSV (these may be compressed) or parquet; or a folder of such
            files, or one that `save_to_disk` wrote.
        instruction_column: name of the column that holds what the user says.
        response_column: name of the column that holds the answer.
        input_column: name of the column that holds the text which the instruction is about, if there is one.
        system_column: name of the column that holds the system prompt, if there is one.
        output_dir: folder to write.
        prompt_style: name of the prompt style: "chat" (the model's own template), "alpaca", "metamath", "beaver", "hh"
            or "none".
        validation_share: share of the examples that is kept for validation, drawn at random.
        options: options of all such scripts, see `prepare`.
    """
    prepare(
        functools.partial(
            read_columns,
            instruction=instruction_column,
            response=response_column,
            input=input_column,
            system=system_column,
        ),
        "supervised",
        "last",
        None,
        data_path=data_path,
        output_dir=output_dir,
        prompt_style=prompt_style,
        validation_share=validation_share,
        **options,
    )


if __name__ == "__main__":
    run(main)
