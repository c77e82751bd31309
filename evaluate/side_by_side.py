"""Did it work? Answers of the base model and of adapters to your own prompts, side by side.

    python evaluate/side_by_side.py --prompts_file p.txt --adapter_path out/mine
    python evaluate/side_by_side.py --prompts_file p.jsonl --adapter_path out/a --adapter_path out/b --matches "^Ahoy"

Prints the answers as a table and, with --matches, the share of answers in which the regular expression is found.
Writes `responses.html`, a page with all answers and a search, to --out_dir, and the answers in the layout of
`evaluate/vicuna.py`, so that `evaluate/judge.py --answers_dir` reads them. Answers are kept as they come: the same
command goes on where it was interrupted, and asks again only what has changed.
"""

import re
import sys
from pathlib import Path
from typing import Any

from lit_llama.evaluation.answers import Question, read_questions
from lit_llama.evaluation.answers_page import write_page
from lit_llama.evaluation.statistics import in_words, share_interval
from lit_llama.script.answers import search_pattern
from lit_llama.script.command_line import run
from lit_llama.script.evaluation import Answers, ask, column_names
from lit_llama.tables import markdown, side_by_side


def main(
    prompts_file: Path,
    adapter_path: list[Path],
    matches: str | None = None,
    out_dir: Path = Path("out/side-by-side"),
    shown: int = 20,
    **options: Any,
) -> None:
    """Ask.

    Args:
        prompts_file: text file with a prompt on each line; or JSON or JSON Lines with "prompt", or "instruction" and
            perhaps "input", or FastChat's "turns".
        adapter_path: file or run folder of an adapter of any method; may be given several times.
        matches: regular expression; the answers in which it is found are counted. "(?s)^Ahoy.*Salt$" wants a
            beginning and an end.
        out_dir: folder of page and answers.
        shown: number of prompts in the table; the page has all.
        options: those of every evaluation with answers, see `ask`.
    """
    pattern = search_pattern(matches)
    if shown < 0:
        raise ValueError(f"--shown is {shown}, it must be at least 0")
    questions = read_questions(prompts_file)
    named = column_names(adapter_path, "base")
    models, answers = ask(
        {"base": {}, **{name: {path: 1.0} for name, path in named.items()}}, questions, out_dir, **options
    )
    width = max(20, 84 // len(models))
    lines = side_by_side(["prompt", *models], table_rows(questions[:shown], answers), [24, *([width] * len(models))])
    print("\n".join(lines))
    if len(questions) > shown:
        print(f"... and {len(questions) - shown} more on the page\n")
    styles = {name: base.style.name for name, base in models.items()}
    if len(set(styles.values())) > 1:
        print(f"prompt styles: {', '.join(f'{name} {style}' for name, style in styles.items())}\n")
    if pattern is not None:
        print(f"Answers in which {matches} is found:\n\n{count_matches(pattern, questions, answers)}")
    page = out_dir / "responses.html"
    write_page(page, questions, answers, f"Answers to {prompts_file.name}", pattern)
    print(f"page: {page}", file=sys.stderr)


def table_rows(questions: list[Question], answers: dict[str, Answers]) -> list[list[str]]:
    """A row for each turn: the prompt, and what each model says to it."""
    rows = []
    for question in questions:
        for i, turn in enumerate(question.asked):
            rows.append([turn, *(texts[question.id][i] or "(nothing)" for texts in answers.values())])
    return rows


def count_matches(pattern: re.Pattern[str], questions: list[Question], answers: dict[str, Answers]) -> str:
    """A table of the share of each model's answers in which the pattern is found."""
    rows = []
    for name, texts in answers.items():
        found = [bool(pattern.search(turn)) for question in questions for turn in texts[question.id]]
        interval = in_words(share_interval(sum(found), len(found)), ".1%")
        rows.append([name, len(found), f"{sum(found) / len(found):.1%}", interval])
    return markdown(["model", "answers", "with it", "95% interval"], rows)


if __name__ == "__main__":
    run(main)
