"""Tokenise preference pairs: a prompt, a chosen and a rejected answer.

    python scripts/prepare_pairs.py --data_path pairs.jsonl --output_dir data/pairs
    python scripts/prepare_pairs.py --data_path pairs.jsonl --kind supervised --output_dir data/chosen

Objects with "chosen", "rejected" and

- "prompt", "question" or "instruction" (perhaps with "input" and "system"), each a text, or
- "conversations", ShareGPT's preference layout of `from` and `value`, or "prompt" as a list of messages, or
- neither, where chosen and rejected are whole conversations that differ in the last turn; these may also stand beside
  the prompt that they repeat.

Without a file, Intel's Orca pairs are fetched.
"""

import functools
from pathlib import Path
from typing import Any

from lit_llama.cli import run
from lit_llama.data import Item, Kind
from lit_llama.prepare import LeftOutError, messages, preference, prepare, text
from lit_llama.prompts import Message

HUB_FILES = ("Intel/orca_dpo_pairs", ["orca_rlhf.jsonl"])


def main(
    data_path: Path | None = None,
    output_dir: Path = Path("data/pairs"),
    kind: Kind = "pairs",
    prompt_style: str = "chat",
    validation_share: float = 0.05,
    **options: Any,
) -> None:
    """Prepare.

    Args:
        data_path: a JSON or JSON Lines file, perhaps gzipped, or a folder of such files; if not given, the public
            dataset is fetched from the Hugging Face hub.
        output_dir: the folder to write.
        kind: "pairs" for preference tuning, or the chosen answers alone for "supervised" tuning.
        prompt_style: "chat" (the model's own template), "hh", "beaver", "alpaca", "metamath" or "none"; the last
            three have place for one turn only.
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
    """The prompt with its chosen and its rejected answer."""
    chosen, rejected = (answers(row, column) for column in ("chosen", "rejected"))
    prompt = prompt_messages(row)
    if len(chosen) > 1 or len(rejected) > 1:  # whole conversations, which may repeat the prompt
        if kind == "pairs" and chosen[:-1] != rejected[:-1]:
            raise LeftOutError("chosen and rejected answer different prompts")
        if prompt and prompt[-1].content != chosen[-2].content:
            raise ValueError("expected one answer each under 'chosen' and 'rejected', or the prompt and an answer")
        prompt = chosen[:-1]
    return preference(prompt, chosen[-1].content, rejected[-1].content, kind)


def answers(row: dict[str, Any], column: str) -> list[Message]:
    """An answer, or a conversation that ends in one."""
    turns = messages(row[column], "assistant") if row.get(column) else []
    if not turns:
        raise ValueError(f"expected a text or messages under {column!r}, found {row.get(column)!r} in {sorted(row)}")
    if turns[-1].role != "assistant":
        raise ValueError(f"expected the assistant's answer at the end of {column!r}, found the {turns[-1].role}'s turn")
    return turns


def prompt_messages(row: dict[str, Any]) -> list[Message]:
    """The turns before the answers, in any of the layouts; none if the answers bring them."""
    name = next((name for name in ("conversations", "prompt", "question", "instruction") if row.get(name)), None)
    if name is None:
        return []
    system = [Message("system", text(row, "system"))] if row.get("system") else []
    if isinstance(row[name], str):
        return [*system, Message("user", row[name], text(row, "input") if row.get("input") else "")]
    return [*system, *messages(row[name])]


if __name__ == "__main__":
    run(main)
