"""What finetune/aligner_distill.py asks, and what its teacher reads before each question."""

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lit_llama.data import DATASET_FILE, TokenDataset
from lit_llama.evaluation.answers import prompt_rows
from lit_llama.files import parse_json, read_text
from lit_llama.generation import Answer
from lit_llama.prompts import Message, prompt_style
from lit_llama.records import read_records
from lit_llama.samples import user_turn
from lit_llama.script.layouts import Columns, LeftOutError, read_conversation, read_question
from lit_llama.tokenizer import Tokenizer

SPLITS = ("train", "validation", "test")


class Question(NamedTuple):
    """What is asked.

    Args:
        split: "train", "validation", or "test" for what no run reads and the report asks.
        messages: a conversation up to the user's turn.
        answers: those that were given with it; empty if the teacher is to answer.
    """

    split: str
    messages: tuple[Message, ...]
    answers: tuple[Answer, ...] = ()


def read_context(path: Path | None) -> list[Message]:
    """What the teacher reads before each question.

    Args:
        path: text file of a system prompt; or, with the suffix .json, a list of turns with "role" and "content": the
            system prompt, and perhaps examples of what a user says and how it is answered.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is empty, or not a list of turns.
    """
    if path is None:
        return []
    text = read_text(path)
    if path.suffix != ".json":
        if not text.strip():
            raise ValueError(f"{path} is empty; expected a system prompt")
        return [Message("system", text.strip())]
    turns = parse_json(text, path)
    roles = ("system", "user", "assistant")
    for turn in turns if isinstance(turns, list) else [None]:
        if not isinstance(turn, dict) or turn.get("role") not in roles or not str(turn.get("content", "")).strip():
            raise ValueError(f"{path}: expected a list of turns with 'role' and 'content', found {turn!r:.80}")
    if not turns:
        raise ValueError(f"{path} is empty; expected a list of turns")
    return [Message(turn["role"], str(turn["content"]).strip()) for turn in turns]


def read_questions(
    path: Path, tokenizer: Tokenizer, answered: bool = False, validation_share: float = 0.1, seed: int = 1337
) -> list[Question]:
    """Read what is asked, each question once, with all different answers that are given to it.

    Args:
        path: a text with a question on each line; records of any layout that `lit_llama.script.layouts` reads, perhaps
            with a "split"; or the folder of a tokenised data set, whose prompts are taken.
        tokenizer: the base model's.
        answered: whether the answers in the records are taken.
        validation_share: share of the questions that is kept for validation, where the file has no splits.
        seed: seed of the draw.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a record is malformed, or there are too few questions.
    """
    if not 0 < validation_share < 1:
        raise ValueError(f"--validation_share is {validation_share}, it must lie between 0 and 1")
    if (path / DATASET_FILE).is_file():
        if answered:
            raise ValueError(f"{path} is a tokenised data set: give records with questions and answers")
        found: Iterable[tuple[str, Question]] = _prompts_of(path, tokenizer)
    else:
        found = _records_of(path, answered)
    questions: dict[tuple[Message, ...], Question] = {}
    repeats = 0  # what adds nothing
    for place, question in found:
        known = questions.setdefault(question.messages, question)
        if known is not question:
            new = tuple(answer for answer in question.answers if answer not in known.answers)
            questions[question.messages] = known._replace(answers=known.answers + new)
            repeats += not new
        if question.split not in (*SPLITS, ""):
            raise ValueError(f"{place}: the split is {question.split!r}, expected {', '.join(SPLITS)}")
    if repeats:
        what, used = ("answers", "learned") if answered else ("questions", "asked")
        print(f"{path}: {repeats} {what} repeat an earlier one and are {used} once", file=sys.stderr)
    return _with_splits(path, list(questions.values()), validation_share, seed)


def _records_of(path: Path, answered: bool) -> Iterator[tuple[str, Question]]:
    for place, row in read_records(path) if answered else prompt_rows(path):
        columns = Columns(row)
        try:
            if answered:
                [[*asked, last]] = read_conversation(columns)
                given = (Answer(last.content, bool(row.get("complete", True))),)
            else:
                asked, given = read_question(columns), ()
        except (LeftOutError, ValueError) as error:
            raise ValueError(f"{place}: {error}") from None
        yield place, Question(str(row.get("split") or ""), tuple(asked), given)


def _prompts_of(folder: Path, tokenizer: Tokenizer) -> Iterator[tuple[str, Question]]:
    for split in ("train", "validation"):
        dataset = TokenDataset(folder, split, tokenizer)
        style = prompt_style(dataset.header["prompt_style"], tokenizer)
        for i in range(len(dataset)):
            prompt = dataset.prompt(i)
            question = (Message("user", user_turn(style, tokenizer, prompt)),)
            if tokenizer.encode(style.render(question), bos=style.bos) != prompt:
                raise ValueError(
                    f"{folder}: the prompt of {split} item {i} is more than one turn of a user, which cannot be told "
                    "from its tokens: give the questions as text"
                )
            yield f"{folder}, {split} item {i}", Question(split, question)


def _with_splits(path: Path, questions: list[Question], share: float, seed: int) -> list[Question]:
    """The questions with those for validation drawn, if their file does not say which they are."""
    named = sum(bool(question.split) for question in questions)
    if 0 < named < len(questions):
        raise ValueError(f"{path}: {named} of {len(questions)} questions have a split; give one to all or to none")
    if not named:
        if len(questions) < 2:
            raise ValueError(f"{path} has {len(questions)} questions; expected at least 2, one of them for validation")
        count = min(max(1, round(share * len(questions))), len(questions) - 1)
        drawn = set(np.random.default_rng(seed).permutation(len(questions))[:count].tolist())
        questions = [one._replace(split="validation" if i in drawn else "train") for i, one in enumerate(questions)]
    for split in ("train", "validation"):
        if not any(question.split == split for question in questions):
            raise ValueError(f"{path} has no question of the split {split!r}")
    return questions
