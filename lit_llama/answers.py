"""Questions and models' answers in FastChat's layout (https://github.com/lm-sys/FastChat, `fastchat/llm_judge`).

A question is `{"question_id", "category", "turns": [...]}`, an answer `{"question_id", "answer_id", "model_id",
"choices": [{"index", "turns": [...]}], "tstamp"}`; a file each for the questions and for each model's answers, JSON
Lines. A folder of answers holds `question.jsonl` and `model_answer/MODEL.jsonl`.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lit_llama.records import read_records

QUESTIONS = "question.jsonl"
ANSWERS = "model_answer"


class Question(NamedTuple):
    """A question, perhaps of several turns.

    Args:
        id: its number or name.
        category: of several.
        turns: what the user says, one after the other.
    """

    id: int | str
    category: str
    turns: list[str]


def read_questions(path: Path) -> list[Question]:
    """The questions of a file, each once.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a row lacks something, or two have the same id.
    """
    questions: dict[int | str, Question] = {}
    for place, row in read_records(path):
        turns = row.get("turns")
        if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) for turn in turns):
            raise ValueError(f"{place}: expected a list of texts under 'turns', found {sorted(row)}")
        id, category = row.get("question_id"), row.get("category", "all")
        if not isinstance(id, int | str) or not isinstance(category, str):
            raise ValueError(f"{place}: expected a number under 'question_id' and a text under 'category'")
        if id in questions:
            raise ValueError(f"{place}: there are two questions with the question_id {id}")
        questions[id] = Question(id, category, turns)
    return list(questions.values())


def read_answers(path: Path) -> dict[int | str, list[str]]:
    """A model's answers by question, a text for each turn; of answers to the same question the last.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a row is not in the layout.
    """
    answers: dict[int | str, list[str]] = {}
    for place, row in read_records(path):
        try:
            answers[row["question_id"]] = [str(turn) for turn in row["choices"][0]["turns"]]
        except (KeyError, IndexError, TypeError):
            raise ValueError(f"{place}: expected 'question_id' and 'choices': [{{'turns': [...]}}]") from None
    return answers


def answer_files(folder: Path) -> dict[str, Path]:
    """The files of answers in a folder, by model.

    Raises:
        FileNotFoundError: there are none.
    """
    files = {file.stem: file for file in sorted((folder / ANSWERS).glob("*.jsonl"))}
    if not files:
        raise FileNotFoundError(f"{folder / ANSWERS} holds no answers: write them with evaluate/vicuna.py")
    return files


def read_folder(
    folder: Path, models: list[str] | None = None
) -> tuple[list[Question], dict[str, dict[int | str, list[str]]]]:
    """The questions of a folder, and the answers of models to all of them.

    Args:
        folder: of questions and answers.
        models: whose; all, in the order of their names, if None.

    Raises:
        FileNotFoundError: something is missing.
        ValueError: a model has not answered, or there is no such model.
    """
    questions, files = read_questions(folder / QUESTIONS), answer_files(folder)
    answers = {}
    for name in models or files:
        if name not in files:
            raise ValueError(f"{folder} has no answers of {name}: there are {', '.join(files)}")
        answers[name] = read_answers(files[name])
        lacking = [question.id for question in questions if question.id not in answers[name]]
        if lacking:
            raise ValueError(
                f"{files[name]} lacks answers to {len(lacking)} of {len(questions)} questions, the first is "
                f"{lacking[0]}: run evaluate/vicuna.py again, which goes on where it stopped"
            )
    return questions, answers


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Add a line to a JSON Lines file, whatever an interruption left at its end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+") as file:
        if file.tell():
            file.seek(-1, 2)
            if file.read(1) != b"\n":  # half a line, which `read_kept` leaves out
                file.write(b"\n")
        file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())


def read_kept(path: Path) -> Iterator[dict[str, Any]]:
    """The rows that `append_row` wrote, without one that was cut short; none if there is no file."""
    if path.is_file():
        for line in path.read_bytes().splitlines():
            try:
                yield json.loads(line)
            except ValueError:
                continue
