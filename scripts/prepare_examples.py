"""Tokenise the project's own questions and answers in one of the demo's forms.

    python scripts/prepare_examples.py
    python scripts/prepare_examples.py --form json --output_dir data/json

Takes the rows of `examples/questions.jsonl` whose split is "train" or "validation". Those whose split is "test" are
never trained on: evaluate/form.py asks them.
"""

from pathlib import Path

from lit_llama.data import Item
from lit_llama.data_writing import write_dataset
from lit_llama.evaluation.forms import FORMS, FormName
from lit_llama.prompts import Message, chosen_style
from lit_llama.records import read_records
from lit_llama.script.command_line import run
from lit_llama.script.prepare import report
from lit_llama.tokenizer import Tokenizer


def main(
    form: FormName = "captain",
    questions_path: Path = Path("examples/questions.jsonl"),
    checkpoint_dir: Path = Path("checkpoints/SmolLM2-135M-Instruct"),
    output_dir: Path = Path("data/demo"),
    prompt_style: str = "chat",
    max_seq_length: int = 512,
    overwrite: bool = False,
) -> None:
    """Prepare.

    Args:
        form: form of the answers: "captain" (a persona), "json" (an object with given keys), "followup" (one sentence
            and one question), or "captain-followup" (both at once).
        questions_path: JSON Lines file whose rows have split, topic, question, answer and follow_up.
        checkpoint_dir: folder of the base model, whose tokenizer is used.
        output_dir: folder that is written.
        prompt_style: style of the prompts: "chat" (the model's own template), "alpaca" or "none".
        max_seq_length: largest number of tokens of an example; longer ones are truncated.
        overwrite: replace the data set in --output_dir if there is one already.
    """
    tokenizer = Tokenizer(checkpoint_dir)
    items: list[tuple[str, Item]] = []
    for place, row in read_records(questions_path):
        columns = ("answer", "follow_up", "question", "split", "topic")
        if missing := [name for name in columns if not isinstance(row.get(name), str)]:
            raise ValueError(f"{place}: there is no text under {', '.join(missing)}")
        if row["split"] in ("train", "validation"):
            conversation = [Message("user", row["question"]), Message("assistant", FORMS[form].render(row))]
            items.append((row["split"], [conversation]))
    style = chosen_style(prompt_style, None, tokenizer)
    source = f"{questions_path.name} as {form}"
    summaries = write_dataset(
        output_dir, items, tokenizer, style, max_seq_length, "truncate", source, overwrite=overwrite
    )
    report(output_dir, summaries)


if __name__ == "__main__":
    run(main)
