"""Questions and models' answers in FastChat's layout (https://github.com/lm-sys/FastChat, `fastchat/llm_judge`).

A question is `{"question_id", "category", "turns": [...]}` (a line of text or an object with a prompt will do, and is
written in that layout), an answer `{"question_id", "answer_id", "model_id",
"choices": [{"index", "turns": [...]}], "tstamp"}`; a file each for the questions and for each model's answers, JSON
Lines. A folder of answers holds `question.jsonl` and `model_answer/MODEL.jsonl`.
"""

import hashlib
import json
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lit_llama.base import Base
from lit_llama.files import atomic_file, check_file, read_text
from lit_llama.generation import answer_all
from lit_llama.prompts import Message
from lit_llama.records import PACKED_SUFFIXES, TEXT_SUFFIXES, read_records

QUESTIONS = "question.jsonl"
ANSWERS = "model_answer"


class Question(NamedTuple):
    """A question, perhaps of several turns.

    Args:
        id: its number or name.
        category: the kind of question, one of several.
        turns: what the user says, one after the other.
        input: what the first turn is about, for prompt styles that keep it apart.
        adapter: name of the adapter that is to answer, in a folder of them.
    """

    id: int | str
    category: str
    turns: list[str]
    input: str = ""
    adapter: str | None = None

    @property
    def asked(self) -> list[str]:
        """The turns for people and judges, the first with what it is about."""
        return [f"{self.turns[0]}\n\n{self.input}" if self.input else self.turns[0], *self.turns[1:]]


def prompt_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a file of prompts, each with its place for error messages.

    Args:
        path: JSON, JSON Lines, CSV or parquet, as `lit_llama.records` reads them; any other is a text with a prompt
            on each line, which becomes `{"prompt": line}`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no prompt, or is not in its format.
    """
    check_file(path)
    unpacked = path.with_suffix("") if path.suffix in PACKED_SUFFIXES else path
    if unpacked.suffix in (*TEXT_SUFFIXES, ".parquet"):
        yield from read_records(path)
        return
    lines = [(number, line) for number, line in enumerate(read_text(path).splitlines(), start=1) if line.strip()]
    if not lines:
        raise ValueError(f"{path} holds no prompt; expected one on each line")
    for number, line in lines:
        yield f"{path}, line {number}", {"prompt": line}


def as_question(place: str, row: dict[str, Any], number: int) -> Question:
    """A row of a file of prompts: with `prompt`, with `instruction` and perhaps `input`, or FastChat's with `turns`.

    Args:
        place: where the row stands, for error messages.
        row: the object.
        number: the question's id if the row has no `question_id`.

    Raises:
        ValueError: it is none of these.
    """
    said = next((row[name] for name in ("turns", "prompt", "instruction") if row.get(name) is not None), None)
    turns = [said] if isinstance(said, str) else said
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) for turn in turns):
        raise ValueError(
            f"{place}: expected a text under 'prompt' or 'instruction', or a list of texts under 'turns', "
            f"found {sorted(row)}"
        )
    row = {**row, "adapter": row.get("adapter", row.get("aligner"))}  # its name in older files
    fields = {}
    for name, default in (("question_id", number), ("category", "all"), ("input", ""), ("adapter", None)):
        fields[name] = default if row.get(name) is None else row[name]
        if not isinstance(fields[name], str | (int if name == "question_id" else type(default))):
            raise ValueError(f"{place}: expected a text under {name!r}, found {type(fields[name]).__name__}")
    return Question(fields["question_id"], fields["category"], turns, fields["input"], fields["adapter"])


def read_questions(path: Path) -> list[Question]:
    """The questions of a file, each once; see `prompt_rows` and `as_question` for what it may hold.

    The models that are asked are chosen by options, so a question must not name its adapter.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a row lacks something, or two have the same id.
    """
    questions: dict[int | str, Question] = {}
    for number, (place, row) in enumerate(prompt_rows(path), start=1):
        question = as_question(place, row, number)
        if question.adapter is not None:
            raise ValueError(f"{place}: names the adapter {question.adapter}; only generate/many.py goes by that")
        if question.id in questions:
            raise ValueError(f"{place}: there are two questions with the question_id {question.id}")
        questions[question.id] = question
    return list(questions.values())


def read_test_questions(path: Path) -> list[Question]:
    """The questions of a file like `examples/questions.jsonl` that no model was trained on.

    Args:
        path: records with "split" and "question"; those of the split "test" are returned.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it has no such question.
    """
    texts = [row["question"] for _, row in read_records(path) if row.get("split") == "test" and "question" in row]
    if not texts:
        raise ValueError(f"{path} has no question of the split 'test'")
    return [Question(number, "all", [text]) for number, text in enumerate(texts, start=1)]


def write_questions(path: Path, questions: Sequence[Question]) -> None:
    """Write questions in FastChat's layout, as `read_questions` reads them."""
    with atomic_file(path) as temporary:
        rows = []
        for question in questions:
            row = {"question_id": question.id, "category": question.category, "turns": question.turns}
            rows.append(row | ({"input": question.input} if question.input else {}))
        temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def answer_questions(
    base: Base,
    name: str,
    questions: Sequence[Question],
    file: Path,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 1337,
    batch_size: int = 16,
) -> None:
    """Let a model answer questions, and keep each answer as soon as all its turns are there.

    Args:
        base: the model, with its adapter.
        name: name of the model.
        questions: what is asked; those that it has answered already with these weights and settings are left out.
        file: where its answers are kept; of two to the same question the last counts.
        max_new_tokens: length of the longest answer, in tokens.
        temperature: randomness of sampling; 0 always takes the likeliest token.
        seed: seed of sampling.
        batch_size: number of questions answered at once.

    Raises:
        ValueError: a prompt is too long for the model, or its prompt style has no place for it.
    """
    settings = base.identity, max_new_tokens, temperature, seed

    def made_with(question: Question) -> str:
        said = repr((settings, question.turns, question.input))
        return hashlib.sha256(said.encode()).hexdigest()[:16]

    there = {row["question_id"]: row.get("made_with") for row in read_kept(file)}  # the last counts
    left = [question for question in questions if there.get(question.id) != made_with(question)]
    for question, turns in _conversations(base, name, left, max_new_tokens, temperature, seed, batch_size):
        row = {"question_id": question.id, "answer_id": uuid.uuid4().hex, "model_id": name}
        choices = [{"index": 0, "turns": turns}]
        append_row(file, {**row, "choices": choices, "made_with": made_with(question), "tstamp": time.time()})


def _conversations(
    base: Base,
    name: str,
    left: Sequence[Question],
    max_new_tokens: int,
    temperature: float,
    seed: int,
    batch_size: int,
) -> Iterator[tuple[Question, list[str]]]:
    """Each question with the answers to all its turns, as soon as the last of them is there."""
    said: dict[int | str, list[str]] = {question.id: [] for question in left}
    turn = 0
    while left:
        conversations = []
        for question in left:
            messages = [Message("user", question.turns[0], question.input)]
            for answer, following in zip(said[question.id], question.turns[1:], strict=False):
                messages += [Message("assistant", answer), Message("user", following)]
            conversations.append(messages)
        what = f"answers of {name}" + (f", turn {turn + 1}" if turn or len(left[0].turns) > 1 else "")
        given = answer_all(
            base.model, base.tokenizer, base.style, conversations, base.adapter, max_new_tokens=max_new_tokens,
            batch_size=batch_size, seeds=[seed] * len(left), what=what, temperature=temperature,
        )  # fmt: skip
        for question, answer in zip(left, given, strict=True):
            said[question.id].append(answer.text)
            if len(question.turns) == turn + 1:
                yield question, said[question.id]
        turn += 1
        left = [question for question in left if len(question.turns) > turn]


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
        folder: folder of questions and answers.
        models: whose; all, in the order of their names, if None.

    Raises:
        FileNotFoundError: something is missing.
        ValueError: a model has not answered, or there is no such model.
    """
    files, questions = answer_files(folder), read_questions(folder / QUESTIONS)
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
    """Add a line to a JSON Lines file; half a line that an interruption left at its end is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+") as file:
        if file.tell():
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                file.truncate(path.read_bytes().rfind(b"\n") + 1)
        file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())


def read_kept(path: Path) -> Iterator[dict[str, Any]]:
    """The rows that `append_row` wrote, without one that was cut short; none if there is no file."""
    if path.is_file():
        for line in path.read_bytes().splitlines():
            try:
                yield json.loads(line)
            except ValueError:
                continue
