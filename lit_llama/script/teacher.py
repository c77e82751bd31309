"""What finetune/aligner_distill.py learns from: the teacher's answers to questions, which are kept on disk.

A folder holds, for each teacher with its prompt and way of sampling, by a hash of all that the answers depend on:

    answers-HASH.json     what made them
    answers-HASH.jsonl    the conversations, in OpenAI's layout; each is there as soon as it is answered
    tokens-HASH/          a tokenised data set of all that was asked, for the student and for the teacher

Runs that are started together share a folder: one that needs what another is writing waits for it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from lit_llama.base import Base
from lit_llama.data import DATASET_FILE, Conversation, Item
from lit_llama.data_writing import write_dataset
from lit_llama.evaluation.answers import append_row, read_kept
from lit_llama.files import write_json
from lit_llama.generation import Answer, answer_all
from lit_llama.locks import turn
from lit_llama.prompts import Message
from lit_llama.sampling import GREEDY_BELOW
from lit_llama.script.questions import Question

if TYPE_CHECKING:  # takes seconds to import, which --help should not cost
    from lightning_fabric import Fabric


def check_teacher(
    system_prompt_file: Path | None,
    teacher_adapter: Sequence[Path] | None,
    take_answers: bool,
    temperature: float,
    answers: int,
    **counts: int,
) -> None:
    """Refuse options that make no teacher, or no report.

    Args:
        system_prompt_file: what the teacher reads before each question.
        teacher_adapter: files of its adapters.
        take_answers: whether its answers are given.
        temperature: randomness of its answers.
        answers: number of its answers to each question.
        counts: other options that must be at least 1, by name.

    Raises:
        ValueError: names all of them.
    """
    problems = []
    if not system_prompt_file and not teacher_adapter:
        problems.append("the base model alone has nothing to teach: give --system_prompt_file or --teacher_adapter")
    for name, value in {"answers": answers, **counts}.items():
        if value < 1:
            problems.append(f"--{name} is {value}, it must be at least 1")
    if take_answers and (answers > 1 or temperature > 0):
        problems.append("--take_answers takes all answers of the file, so --answers and --temperature have no meaning")
    elif answers > 1 and temperature < GREEDY_BELOW:
        problems.append(f"--answers {answers} with --temperature {temperature:g} repeats one answer: raise the latter")
    if problems:
        raise ValueError("; ".join(problems))


def that_fit(
    fabric: Fabric, teacher: Base, context: Sequence[Message], questions: Sequence[Question], max_new_tokens: int
) -> list[Question]:
    """The questions after which the teacher has room for the longest answer, in training and in the report.

    Args:
        fabric: the processes of the run, of which the first one says how many are left out.
        teacher: the base model, with the adapters of the teacher.
        context: what only the teacher reads before each question.
        questions: what is to be asked, of all splits.
        max_new_tokens: length of the longest answer, in tokens.

    Raises:
        ValueError: the base has no place for a system prompt, or no question to learn or to validate leaves room in
            its window.
    """
    if context and teacher.tokenizer.chat_template is None:
        raise ValueError(
            "the base model has no chat template, and so no place for a system prompt: take a chat model, or distil "
            "an adapter alone (--teacher_adapter without --system_prompt_file)"
        )
    style, window = teacher.style, teacher.model.config.block_size
    texts = [style.render([*context, *one.messages]) for one in questions]
    lengths = [len(ids) for ids in teacher.tokenizer.encode_batch(texts, bos=style.bos)]
    fit = [one for one, length in zip(questions, lengths, strict=True) if length + max_new_tokens < window]
    for split in ("train", "validation"):
        if not any(one.split == split for one in fit):
            shortest = min(length for one, length in zip(questions, lengths, strict=True) if one.split == split)
            raise ValueError(
                f"no question of the split {split!r} leaves room for an answer: the teacher's shortest prompt has "
                f"{shortest} tokens, and the model's window is {window}: shorten the system prompt, or lower "
                f"--max_new_tokens {max_new_tokens}"
            )
    if fabric.is_global_zero and len(fit) < len(questions):
        left_out = f"{len(questions) - len(fit)} of {len(questions)} questions"
        print(f"left out, as they are too long for the model's window: {left_out}", file=sys.stderr)
    return fit


def teach(
    fabric: Fabric,
    teacher: Base,
    context: Sequence[Message],
    questions: Sequence[Question],
    folder: Path,
    *,
    answers: int = 1,
    seed: int = 1337,
    **sampling: Any,
) -> Path:
    """Let the teacher answer, unless it has done so before, and tokenise what the student learns.

    Every process computes all answers, since those that share a sharded base must compute in step; the first one
    writes.

    Args:
        fabric: the processes of the run.
        teacher: the base model, with the adapters of the teacher.
        context: what only the teacher reads before each question.
        questions: what is asked, as `that_fit` gives them; those with answers keep them, and those of the split "test"
            are left alone.
        folder: where answers are kept.
        answers: number of answers to each question.
        seed: seed of sampling.
        sampling: `temperature`, `max_new_tokens` and `batch_size` of `lit_llama.generation.answer_all`.

    Returns:
        The folder of the tokenised data set.
    """
    questions = [one for one in questions if one.split != "test"]
    made_with = {"teacher": teacher.identity, "context": _as_turns(context), "seed": seed}
    made_with |= {name: value for name, value in sampling.items() if name != "batch_size"}
    open_questions = [one for one in questions if not one.answers]
    kept = folder / f"answers-{_hash(made_with)}.jsonl"
    if open_questions and fabric.is_global_zero:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(kept.with_suffix(".json"), made_with)
    asked = [(one, number) for one in open_questions for number in range(answers)]
    with _alone(fabric, kept):
        said = _answered(fabric, teacher, context, asked, kept, seed, **sampling)
    if fabric.is_global_zero:
        _report_cut_answers(said, teacher, sampling["max_new_tokens"])
    by_question: dict[tuple[Message, ...], list[Answer]] = {}
    for (one, _), answer in zip(asked, said, strict=True):
        by_question.setdefault(one.messages, []).append(answer)
    items = [
        (one.split, _item(context, one.messages, answer))
        for one in questions
        for answer in one.answers or by_question[one.messages]
    ]
    return _tokenised(fabric, teacher, items, folder)


def _answered(
    fabric: Fabric,
    teacher: Base,
    context: Sequence[Message],
    asked: Sequence[tuple[Question, int]],
    kept: Path,
    seed: int,
    **sampling: Any,
) -> list[Answer]:
    """The teacher's answers, those of an earlier run from a file."""
    known = fabric.broadcast(_read_answers(kept) if fabric.is_global_zero else {})
    left = [(one, number) for one, number in asked if _key(one.messages, number) not in known]
    if left and fabric.is_global_zero:
        tqdm.write(f"the teacher answers {len(left)} of {len(asked)} questions; kept in {kept}", file=sys.stderr)
    given = answer_all(
        teacher.model, teacher.tokenizer, teacher.style, [[*context, *one.messages] for one, _ in left],
        teacher.adapter, seeds=[_seed(seed, one, number) for one, number in left], what="teacher's answers", **sampling,
    )  # fmt: skip
    for (one, number), answer in zip(left, given, strict=True):
        answer = answer if answer.complete else Answer(answer.text.rstrip("\ufffd"), False)  # half a character
        known[_key(one.messages, number)] = answer
        if fabric.is_global_zero:
            turns = [*_as_turns(one.messages), {"role": "assistant", "content": answer.text}]
            append_row(kept, {"split": one.split, "messages": turns, "number": number, "complete": answer.complete})
    return [known[_key(one.messages, number)] for one, number in asked]


@contextlib.contextmanager
def _alone(fabric: Fabric, path: Path) -> Iterator[None]:
    """Be the only run that writes to a path; another run with the same teacher is waited for."""
    with contextlib.ExitStack() as stack:
        if fabric.is_global_zero:
            path.parent.mkdir(parents=True, exist_ok=True)
            message = f"another run is writing {path}, which this one uses too: waiting for it"
            lock = path.with_name(f".{path.stem}.lock")
            stack.enter_context(turn(lock, lambda: tqdm.write(message, file=sys.stderr)))
        yield


def _report_cut_answers(answers: Sequence[Answer], teacher: Base, max_new_tokens: int) -> None:
    cut = sum(not answer.complete for answer in answers)
    if cut:
        thinks = "; this model may think before it answers, and --prompt_style chat-thinking-off lets it answer at once"
        tqdm.write(
            f"{cut} of {len(answers)} answers are cut at --max_new_tokens {max_new_tokens}, and do not teach to end "
            f"there{thinks if teacher.style.thought else ''}",
            file=sys.stderr,
        )


def _seed(seed: int, question: Question, number: int) -> int:
    """Seed of one answer, which does not depend on what else is asked."""
    return int(_hash([seed, _key(question.messages, number)]), 16) >> 1  # a generator takes 63 bits


def _read_answers(kept: Path) -> dict[str, Answer]:
    return {
        _key([Message(**turn) for turn in row["messages"][:-1]], row["number"]): Answer(
            row["messages"][-1]["content"], row["complete"]
        )
        for row in read_kept(kept)
    }


def _key(messages: Iterable[Message], number: int) -> str:
    return json.dumps([_as_turns(messages), number])


def _as_turns(messages: Iterable[Message]) -> list[dict[str, str]]:
    return [
        {"role": one.role, "content": one.content} | ({"input": one.input} if one.input else {}) for one in messages
    ]


def _item(context: Sequence[Message], question: Conversation, answer: Answer) -> Item:
    """What the student reads, and what the teacher reads."""
    last = Message("assistant", answer.text, complete=answer.complete)
    return [[*question, last], [*context, *question, last]]


def _tokenised(fabric: Fabric, teacher: Base, items: list[tuple[str, Item]], folder: Path) -> Path:
    """The folder of a tokenised data set, whose name is a hash of what is in it."""
    count = len(items)
    items = [(split, item) for split, item in items if item[0][-1].content.strip()]
    if fabric.is_global_zero and len(items) < count:
        tqdm.write(f"{count - len(items)} of {count} answers are empty and are left out", file=sys.stderr)
    style = teacher.style
    data = folder / f"tokens-{_hash([teacher.tokenizer.fingerprint, style.fingerprint, items])}"
    with _alone(fabric, data):
        if fabric.is_global_zero and not (data / DATASET_FILE).is_file():
            window = teacher.model.config.block_size
            options: Mapping[str, Any] = {"kind": "distillation", "scored_turns": "last", "total": len(items)}
            write_dataset(data, items, teacher.tokenizer, style, window, "skip", "a teacher's answers", **options)
    fabric.barrier()
    return data


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
