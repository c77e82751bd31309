"""Tokenise Anthropic's hh-rlhf (arXiv 2204.05862), dialogues with a chosen and a rejected end.

    python scripts/prepare_hh.py
    python scripts/prepare_hh.py --kind supervised --output_dir data/hh-chosen
    python scripts/prepare_hh.py --data_path helpful-base/train.jsonl.gz --output_dir data/helpful

Objects with "chosen" and "rejected", each a whole dialogue after "\\n\\nHuman:" and "\\n\\nAssistant:". Without a file,
the harmless-base training set is fetched. The last turn alone is learned.
"""

import functools
import re
from pathlib import Path
from typing import Any

from lit_llama.cli import run
from lit_llama.data import Item, Kind
from lit_llama.prepare import LeftOutError, preference, prepare, text
from lit_llama.prompts import Message

HUB_FILES = ("Anthropic/hh-rlhf", ["harmless-base/train.jsonl.gz"])


def main(
    data_path: Path | None = None,
    output_dir: Path = Path("data/hh"),
    kind: Kind = "pairs",
    prompt_style: str = "hh",
    validation_share: float = 0.05,
    **options: Any,
) -> None:
    """Prepare.

    Args:
        data_path: a JSON or JSON Lines file, perhaps gzipped, or a folder of such files; if not given, the public
            dataset is fetched from the Hugging Face hub.
        output_dir: the folder to write.
        kind: "pairs" for preference tuning, or the chosen answers alone for "supervised" tuning.
        prompt_style: "hh", "beaver" or "chat"; the others have place for one turn only.
        validation_share: share of the examples that is kept for validation, drawn at random.
        options: those of every such script, see `prepare`.
    """
    prepare(
        functools.partial(read, kind=kind),
        kind,
        "last",
        HUB_FILES,
        data_path,
        output_dir=output_dir,
        prompt_style=prompt_style,
        validation_share=validation_share,
        **options,
    )


def read(row: dict[str, Any], kind: Kind) -> Item:
    """The dialogue with its chosen and its rejected end."""
    chosen, rejected = dialogue(text(row, "chosen")), dialogue(text(row, "rejected"))
    if kind == "pairs" and chosen[:-1] != rejected[:-1]:
        raise LeftOutError("chosen and rejected answer different prompts")
    return preference(chosen[:-1], chosen[-1].content, rejected[-1].content, kind)


def dialogue(transcript: str) -> list[Message]:
    """The turns of a transcript; the last is the assistant's."""
    opening, *parts = re.split(r"\n\n(Human|Assistant):", transcript)
    if opening.strip() or not parts:
        raise ValueError(f"expected a dialogue that begins with '\\n\\nHuman:', found {transcript[:60]!r}")
    turns = [
        Message("user" if speaker == "Human" else "assistant", said.strip())
        for speaker, said in zip(parts[::2], parts[1::2], strict=True)
    ]
    if turns[-1].role != "assistant":
        raise LeftOutError("the last turn is not the assistant's")
    return turns


if __name__ == "__main__":
    run(main)
