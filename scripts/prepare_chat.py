"""Tokenise conversations; every turn of the assistant is scored.

    python scripts/prepare_chat.py --data_path chats.jsonl --output_dir data/chats
    python scripts/prepare_chat.py

Objects with "messages" in OpenAI's layout (`role` and `content`) or "conversations" in ShareGPT's (`from` and
`value`). Without a file, the conversations of ShareGPT are fetched.
"""

from pathlib import Path
from typing import Any

from lit_llama.cli import run
from lit_llama.data import Item, ScoredTurns
from lit_llama.prepare import LeftOutError, messages, prepare

HUB_FILES = ("anon8231489123/ShareGPT_Vicuna_unfiltered", ["ShareGPT_V3_unfiltered_cleaned_split.json"])


def main(
    data_path: Path | None = None,
    output_dir: Path = Path("data/chat"),
    prompt_style: str = "chat",
    validation_share: float = 0.05,
    scored_turns: ScoredTurns = "all",
    **options: Any,
) -> None:
    """Prepare.

    Args:
        data_path: a JSON or JSON Lines file, perhaps gzipped, or a folder of such files; if not given, the public
            dataset is fetched from the Hugging Face hub.
        output_dir: the folder to write.
        prompt_style: "chat" (the model's own template), "hh" or "beaver"; the others have place for one turn only.
        validation_share: share of the examples that is kept for validation, drawn at random.
        scored_turns: of the assistant's turns, "all" are scored or the "last".
        options: those of every such script, see `prepare`.
    """
    prepare(
        read,
        "supervised",
        scored_turns,
        HUB_FILES,
        data_path,
        output_dir=output_dir,
        prompt_style=prompt_style,
        validation_share=validation_share,
        **options,
    )


def read(row: dict[str, Any]) -> Item:
    """The conversation from the user's first turn to the assistant's last."""
    if "messages" not in row and "conversations" not in row:
        raise ValueError(f"expected a list under 'messages' or 'conversations', found {sorted(row)}")
    turns = messages(row.get("messages", row.get("conversations")))
    first = next((i for i, turn in enumerate(turns) if turn.role == "user"), len(turns))
    turns = [turn for turn in turns[:first] if turn.role == "system"] + turns[first:]
    while turns and turns[-1].role != "assistant":
        turns.pop()
    if not turns:
        raise LeftOutError("without an answer of the assistant to a user")
    return [turns]


if __name__ == "__main__":
    run(main)
