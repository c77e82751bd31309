"""Tokenise preferences: a prompt with a chosen and a rejected answer, or with one that is good or bad.

    python scripts/prepare_pairs.py --data_path pairs.jsonl --output_dir data/pairs
    python scripts/prepare_pairs.py --data_path pairs.jsonl --kind supervised --output_dir data/chosen
    python scripts/prepare_pairs.py --data_path thumbs.jsonl --kind unpaired --output_dir data/unpaired

Objects with "chosen", "rejected" and

- "prompt", "question" or "instruction" (perhaps with "input" and "system"), each a text, or
- "conversations", ShareGPT's preference layout of `from` and `value`, or "prompt" as a list of messages, or
- neither, where chosen and rejected are whole conversations that differ in the last turn; these may also stand next to
  the prompt that they repeat,

or in another layout that howto/prepare_data.md lists. With --kind unpaired, each of the two answers is learned by
itself, or there is one, in a layout of supervised tuning, with true or false under "label" or "kto_tag". Without a
file, Intel's Orca pairs are fetched.
"""

import functools
from pathlib import Path
from typing import Any

from lit_llama.data import Kind
from lit_llama.script.command_line import run
from lit_llama.script.layouts import read_preference
from lit_llama.script.prepare import prepare

HUB_FILES = ("Intel/orca_dpo_pairs", ["orca_rlhf.jsonl"])


def main(
    output_dir: Path = Path("data/pairs"),
    kind: Kind = "pairs",
    prompt_style: str = "chat",
    validation_share: float = 0.05,
    **options: Any,
) -> None:
    """Prepare a data set.

    Args:
        output_dir: folder to write.
        kind: "pairs" for preference tuning, "supervised" for tuning on the chosen answers alone, or "unpaired" for
            tuning on answers that are each good or bad, by finetune/aligner_kto.py.
        prompt_style: name of the prompt style: "chat" (the model's own template), "hh", "beaver", "alpaca", "metamath"
            or "none"; the last three have room for one turn only.
        validation_share: share of the examples that is kept for validation, drawn at random.
        options: options of all such scripts, see `prepare`.
    """
    prepare(
        functools.partial(read_preference, kind=kind),
        kind,
        "last",
        HUB_FILES,
        output_dir=output_dir,
        prompt_style=prompt_style,
        validation_share=validation_share,
        **options,
    )


if __name__ == "__main__":
    run(main)
