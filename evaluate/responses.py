"""Put models' answers side by side on a page, for people who would rather look than read tables.

    python evaluate/responses.py --answers_dir out/vicuna

Writes one HTML file that needs nothing else, `responses.html` in --answers_dir: a row for each prompt, a column for
each model, with a search and a choice of categories. The answers are those of `evaluate/vicuna.py`
or `evaluate/side_by_side.py`.
"""

from pathlib import Path

from lit_llama.evaluation.answers import read_folder
from lit_llama.evaluation.answers_page import write_page
from lit_llama.script.command_line import run


def main(
    answers_dir: Path = Path("out/vicuna"),
    model: list[str] | None = None,
    output_path: Path | None = None,
    title: str = "Answers side by side",
) -> None:
    """Write the page.

    Args:
        answers_dir: folder of questions and answers, from `evaluate/vicuna.py`.
        model: name of a model whose answers are shown; may be given several times, in the order of the columns; if not
            given, all models.
        output_path: file of the page; if not given, `responses.html` in --answers_dir.
        title: title of the page.
    """
    questions, answers = read_folder(answers_dir, model)
    output_path = output_path or answers_dir / "responses.html"
    write_page(output_path, questions, answers, title)
    print(f"{output_path}: {len(questions)} prompts, {len(answers)} models")


if __name__ == "__main__":
    run(main)
