"""Tokenise Anthropic's hh-rlhf (arXiv 2204.05862), dialogues with a chosen and a rejected end.

    python scripts/prepare_hh.py
    python scripts/prepare_hh.py --kind supervised --output_dir data/hh-chosen
    python scripts/prepare_hh.py --data_path helpful-base/train.jsonl.gz --output_dir data/helpful

Objects with "chosen" and "rejected", each a whole dialogue after "\\n\\nHuman:" and "\\n\\nAssistant:". Without a file,
the harmless-base training set is fetched. The last turn alone is learned.
"""

import functools
from pathlib import Path
from typing import Any

from lit_llama.data import Kind
from lit_llama.script.command_line import run
from lit_llama.script.layouts import read_preference
from lit_llama.script.prepare import prepare

HUB_FILES = ("Anthropic/hh-rlhf", ["harmless-base/train.jsonl.gz"])


def main(
    output_dir: Path = Path("data/hh"),
    kind: Kind = "pairs",
    prompt_style: str = "hh",
    validation_share: float = 0.05,
    **options: Any,
) -> None:
    """Prepare a data set.

    Args:
        output_dir: folder to write.
        kind: "pairs" for preference tuning, "supervised" for tuning on the chosen answers alone, or "unpaired" for
            tuning on answers that are each good or bad, by finetune/aligner_kto.py.
        prompt_style: name of the prompt style: "hh", "beaver" or "chat"; the others have room for one turn only.
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
