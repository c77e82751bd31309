"""Tokenise conversations; every turn of the assistant is scored.

    python scripts/prepare_chat.py --data_path chats.jsonl --output_dir data/chats
    python scripts/prepare_chat.py

Objects with "messages" in OpenAI's layout (`role` and `content`) or "conversations" in ShareGPT's (`from` and
`value`), or in another layout that howto/prepare_data.md lists. Without a file, the conversations of ShareGPT are
fetched.
"""

from pathlib import Path
from typing import Any

from lit_llama.data import ScoredTurns
from lit_llama.script.command_line import run
from lit_llama.script.layouts import read_conversation
from lit_llama.script.prepare import prepare

HUB_FILES = ("anon8231489123/ShareGPT_Vicuna_unfiltered", ["ShareGPT_V3_unfiltered_cleaned_split.json"])


def main(
    output_dir: Path = Path("data/chat"),
    prompt_style: str = "chat",
    validation_share: float = 0.05,
    scored_turns: ScoredTurns = "all",
    **options: Any,
) -> None:
    """Prepare a data set.

    Args:
        output_dir: folder to write.
        prompt_style: name of the prompt style: "chat" (the model's own template), "hh" or "beaver"; the others have
            room for one turn only.
        validation_share: share of the examples that is kept for validation, drawn at random.
        scored_turns: which of the assistant's turns are learned, "all" or the "last".
        options: options of all such scripts, see `prepare`.
    """
    prepare(
        read_conversation,
        "supervised",
        scored_turns,
        HUB_FILES,
        output_dir=output_dir,
        prompt_style=prompt_style,
        validation_share=validation_share,
        **options,
    )


if __name__ == "__main__":
    run(main)
