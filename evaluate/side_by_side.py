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

from lit_llama.devices.layouts import WeightOnly
from lit_llama.devices.precision import Precision
from lit_llama.devices.quantization import Quantize
from lit_llama.evaluation.answers import (
    ANSWERS,
    QUESTIONS,
    Question,
    answer_questions,
    read_folder,
    read_questions,
    write_questions,
)
from lit_llama.evaluation.answers_page import write_page
from lit_llama.evaluation.statistics import in_words, share_interval
from lit_llama.script.command_line import column_names, open_columns, run, side_by_side


def main(
    prompts_file: Path,
    adapter_path: list[Path],
    checkpoint_dir: Path = Path("checkpoints/SmolLM2-135M-Instruct"),
    matches: str | None = None,
    out_dir: Path = Path("out/side-by-side"),
    shown: int = 20,
    prompt_style: str | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 1337,
    batch_size: int = 16,
    precision: Precision = "auto",
    quantize: Quantize | WeightOnly | None = None,
    allow_other_base: bool = False,
) -> None:
    """Ask.

    Args:
        prompts_file: a text file with a prompt on each line; or JSON or JSON Lines with "prompt", or "instruction" and
            perhaps "input", or FastChat's "turns".
        adapter_path: an adapter of any method, its file or its run's folder; may be given several times.
        checkpoint_dir: folder of the base model.
        matches: a regular expression; the answers in which it is found are counted. "(?s)^Ahoy.*Salt$" wants a
            beginning and an end.
        out_dir: where page and answers go.
        shown: number of prompts in the table; the page has all.
        prompt_style: of all; if not given, the one that each adapter was trained with, and the base's own chat template
            for the base.
        max_new_tokens: longest answer, in tokens.
        temperature: 0 takes the likeliest token; larger is more random.
        seed: of sampling.
        batch_size: number of prompts answered at once.
        precision: "auto" is bf16-true on a GPU that has it and 32-true elsewhere.
        quantize: keep the base's weights in fewer bits; if not given, as the adapters were trained.
        allow_other_base: use adapters on other weights than those they were trained on.
    """
    try:
        pattern = None if matches is None else re.compile(matches)
    except re.error as error:
        raise ValueError(f"--matches {matches}: not a regular expression ({error})") from None
    if shown < 0:
        raise ValueError(f"--shown is {shown}, it must be at least 0")
    questions = read_questions(prompts_file)
    paths = {"base": None, **column_names(adapter_path, "base")}
    base, tokenizer, columns = open_columns(checkpoint_dir, paths, prompt_style, precision, quantize, allow_other_base)
    write_questions(out_dir / QUESTIONS, questions)
    for column in columns:
        answer_questions(
            base,
            tokenizer,
            column,
            questions,
            out_dir / ANSWERS / f"{column.name}.jsonl",
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            batch_size=batch_size,
        )
    names = [column.name for column in columns]
    _, answers = read_folder(out_dir, names)
    width = max(20, 84 // len(names))
    lines = side_by_side(["prompt", *names], table_rows(questions[:shown], answers), [24, *([width] * len(names))])
    print("\n".join(lines))
    if len(questions) > shown:
        print(f"... and {len(questions) - shown} more on the page\n")
    styles = {column.name: column.style.name for column in columns}
    if len(set(styles.values())) > 1:
        print(f"prompt styles: {', '.join(f'{name} {style}' for name, style in styles.items())}\n")
    if pattern is not None:
        print(f"Answers in which {matches} is found:\n")
        print("| model | answers | with it | 95% interval |\n|---|---:|---:|---|")
        for name in names:
            found = [bool(pattern.search(turn)) for question in questions for turn in answers[name][question.id]]
            interval = in_words(share_interval(sum(found), len(found)), ".1%")
            print(f"| {name} | {len(found)} | {sum(found) / len(found):.1%} | {interval} |")
    page = out_dir / "responses.html"
    write_page(page, questions, answers, f"Answers to {prompts_file.name}", pattern)
    print(f"page: {page}", file=sys.stderr)


def table_rows(questions: list[Question], answers: dict[str, dict[int | str, list[str]]]) -> list[list[str]]:
    """A row for each turn: the prompt, and what each model says to it."""
    rows = []
    for question in questions:
        for i, turn in enumerate(question.asked):
            rows.append([turn, *(texts[question.id][i] or "(nothing)" for texts in answers.values())])
    return rows


if __name__ == "__main__":
    run(main)
