"""Records in the layouts that people keep them in, as the turns of conversations.

A record is read by the names of its columns:

    messages, conversations, conversation    turns in OpenAI's layout (role, content) or ShareGPT's (from, value)
    instruction, query, question, prompt     what the user says, a text or turns; perhaps what it is about under input
                                             or context, which may also stand alone
    output, response, answer, completion     the answer, a text or turns
    label, kto_tag                           whether the answer is wanted, where good and bad ones are learned from
    chosen and rejected                      answers that were compared, or whole conversations with them, as turns or
                                             as transcripts of hh-rlhf; also preferred_output and non_preferred_output
    system, system_prompt                    the system prompt
    history                                  earlier turns: pairs of what user and assistant say, or turns

Numbers are text; null, NaN and what is empty are nothing, so that the next name counts. A text may be given in parts.
"""

import json
import math
import re
import reprlib
from collections.abc import Mapping, Sequence
from numbers import Number
from typing import Any, cast

from lit_llama.data import Conversation, Item, Kind
from lit_llama.prompts import Message, Role

CONVERSATIONS = ("messages", "conversations", "conversation")
PROMPTS = ("instruction", "query", "question", "prompt")
INPUTS = ("input", "context")
ANSWERS = ("output", "response", "answer", "completion")
CHOSEN = ("chosen", "preferred_output", "preferred")
REJECTED = ("rejected", "non_preferred_output", "non_preferred")
SYSTEM = ("system", "system_prompt")
LABELS = ("label", "kto_tag")
# Columns that mean something to a conversation: where one is filled and not used, that is said.
_MEANINGFUL = (*CONVERSATIONS, *PROMPTS, *INPUTS, *ANSWERS, *SYSTEM, "history", "tools", "functions", "documents")
_MEANINGFUL += ("weight", "label", "kto_tag", "thinking", "reasoning", "reasoning_content")
_MEANINGFUL += ("image", "images", "audio", "audios", "video", "videos")
_ROLES = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "chatgpt", "bing", "bard", "bot", "model", "ai"),
    "tool": ("tool", "tools", "function", "function_call", "tool_call", "tool_response", "observation", "ipython"),
}
_ROLE = {name: role for role, names in _ROLES.items() for name in names}
_SPEAKER, _CONTENT = ("role", "from"), ("content", "value", "text")


class LeftOutError(Exception):
    """A record is sound but cannot be learned from; the message says why, and how many share it is reported."""


class Columns:
    """A record that remembers which of its columns were used.

    Args:
        row: the record.
    """

    def __init__(self, row: Mapping[str, Any]) -> None:
        self.row = row
        self._used: set[str] = set()
        self._remarks: list[str] = []

    def find(self, *names: str) -> Any:
        """The value of the first of these columns that has one, else None."""
        name = next((name for name in names if not _is_nothing(self.row.get(name))), None)
        if name is None:
            return None
        self._used.add(name)
        return self.row[name]

    def has(self, *names: str) -> bool:
        """Whether the record has one of these columns, filled or not."""
        return any(name in self.row for name in names)

    def lack(self, expected: str) -> ValueError:
        """The error of a record that lacks a column."""
        return ValueError(f"expected {expected}, found {_short(sorted(self.row))}")

    def remark(self, text: str) -> None:
        """Say something about the record, once for all records of which it is true."""
        self._remarks.append(text)

    def remarks(self) -> set[str]:
        """What is to be said about the record, if it is used."""
        unused = (name for name in _MEANINGFUL if name not in self._used and not _is_nothing(self.row.get(name)))
        return {*self._remarks, *(f"the column {name!r} is not used" for name in unused)}


def read_conversation(columns: Columns) -> Item:
    """The conversation in a record, from the user's first turn to the assistant's last.

    Raises:
        LeftOutError: nothing in it can be learned.
        ValueError: the record is in no known layout.
    """
    if columns.has("completion") and False in (columns.find("label"), columns.find("kto_tag")):
        raise LeftOutError("with an answer that is marked as not wanted")
    return [_conversation(columns)]


def _conversation(columns: Columns) -> Conversation:
    listed = columns.find(*CONVERSATIONS)
    if listed is not None or (columns.has(*CONVERSATIONS) and not columns.has(*ANSWERS)):
        turns = _cut(columns, _turns(columns, _listed(listed)))
    elif columns.has(*ANSWERS):
        turns = [*_prompt(columns, PROMPTS), *_answer(columns, columns.find(*ANSWERS))]
    elif columns.has(*CHOSEN):
        raise ValueError("a record with 'chosen' is a preference: use scripts/prepare_pairs.py")
    else:
        raise columns.lack(f"turns under {_either(CONVERSATIONS[:2])}, or an answer under {_either(ANSWERS)}")
    return _opened(columns, turns)


def read_question(columns: Columns) -> list[Message]:
    """The conversation in a record up to the user's last turn, which is to be answered; an answer to it is not used.

    Raises:
        ValueError: the record is in no known layout, or the user says nothing.
    """
    listed = columns.find(*CONVERSATIONS)
    turns = _prompt(columns, PROMPTS) if listed is None else _turns(columns, _listed(listed))
    end = max((i + 1 for i, turn in enumerate(turns) if turn.role == "user"), default=0)
    if not end or not (turns[end - 1].content + turns[end - 1].input).strip():
        raise ValueError("the question is empty")
    return _opened(columns, turns[:end])


def read_columns(
    columns: Columns, instruction: str, response: str, input: str | None = None, system: str | None = None
) -> Item:
    """The conversation of one turn in a record whose columns are known by name.

    Args:
        columns: the record.
        instruction: name of the column of what the user says.
        response: name of the column of the answer.
        input: name of the column of the text that the instruction is about, if there is one.
        system: name of the column of the system prompt, if there is one.

    Raises:
        LeftOutError: nothing in it can be learned.
        ValueError: the record lacks one of these columns.
    """
    names = [name for name in (instruction, response, input, system) if name is not None]
    if missing := [name for name in names if not columns.has(name)]:
        raise columns.lack(f"a column named {_either(missing)}")
    asked, about, told, answer = (
        "" if name is None else content_text(columns.find(name)) for name in (instruction, input, system, response)
    )
    opening = [Message("system", told)] if told else []
    return [[*opening, Message("user", asked, about), Message("assistant", answer)]]


def read_preference(columns: Columns, kind: Kind) -> Item:
    """The conversation with the chosen and with the rejected answer, with the chosen one alone, or with a marked one.

    Args:
        columns: the record.
        kind: "pairs"; "supervised" for the chosen answer alone; "unpaired" for answers of which each says whether it is
            wanted: the chosen and the rejected one, or the one of a record with a label.

    Raises:
        LeftOutError: nothing in it can be learned.
        ValueError: the record is in no known layout.
    """
    if kind == "unpaired" and not columns.has(*CHOSEN, *REJECTED):
        return [_labelled(columns)]
    conversations = [_compared(columns, CHOSEN)]
    if kind != "supervised":
        conversations.append(_compared(columns, REJECTED))
    prompts = ("prompt", "question", "instruction", "query", "conversations", "messages", "conversation")
    prompt = _prompt(columns, prompts) if columns.has(*prompts, *INPUTS) else []
    if any(len(turns) > 1 for turns in conversations):  # whole conversations, which may repeat the prompt
        before = conversations[0][:-1]
        if any(turns[:-1] != before for turns in conversations):
            raise LeftOutError("chosen and rejected answer different prompts")
        if prompt and prompt[-1].content and prompt[-1].content != before[-1].content:
            raise ValueError("expected one answer each under 'chosen' and 'rejected', or the prompt and an answer")
        prompt = [*(turn for turn in prompt if turn.role == "system" and turn not in before), *before]
    elif not columns.has(*prompts, *INPUTS):
        raise columns.lack("whole conversations under 'chosen' and 'rejected', or a prompt under 'prompt'")
    answers = [turns[-1] for turns in conversations]
    if kind != "supervised" and answers[0].content.strip() == answers[1].content.strip():
        raise LeftOutError("chosen and rejected are the same")
    answers[1:] = [answer._replace(wanted=False) for answer in answers[1:]]
    return [_opened(columns, [*prompt, answer]) for answer in answers]


def _labelled(columns: Columns) -> Conversation:
    """The conversation of a record whose label says whether its answer is wanted."""
    if not columns.has(*LABELS):
        raise columns.lack(f"'chosen' and 'rejected', or an answer with true or false under {_either(LABELS)}")
    label = columns.find(*LABELS)
    wanted = {"true": True, "1": True, "false": False, "0": False}.get(str(label).strip().lower())
    if wanted is None:
        raise ValueError(f"expected true or false under {_either(LABELS)}, found {_short(label)}")
    *before, answer = _conversation(columns)
    return [*before, answer._replace(wanted=wanted)]


def content_text(value: Any) -> str:
    """The text that a value stands for: a number's digits, the parts of a text joined, nothing for null and NaN.

    Raises:
        LeftOutError: it has a part that is not text, as a picture.
        ValueError: it stands for no text.
    """
    if _is_nothing(value):
        return ""
    if isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, str | Number):
        return str(value)
    if isinstance(value, list):
        return "".join(map(_part, value))
    raise ValueError(f"expected a text, found {_short(value)}")


def _part(part: Any) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise ValueError(f"expected a part of a text, found {_short(part)}")
    kind = part.get("type") or "text"
    if kind not in ("text", "input_text", "output_text"):
        raise LeftOutError(f"with a part of a message that is not text ({kind})")
    return content_text(part.get("text"))


def _is_nothing(value: Any) -> bool:
    """Whether there is nothing: null, a number that is none, an empty text or list."""
    return value is None or (isinstance(value, float) and not math.isfinite(value)) or value in ("", [], {})


def _short(value: Any) -> str:
    shortener = reprlib.Repr()
    shortener.maxstring = shortener.maxother = 60
    shortener.maxlist = 12
    return shortener.repr(value)


def _either(names: Sequence[str]) -> str:
    return " or ".join(map(repr, names))


def _listed(value: Any) -> Any:
    """A list of turns, which tables hold as JSON."""
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        try:
            return json.loads(value)
        except (json.JSONDecodeError, RecursionError):
            raise ValueError(f"expected turns as a list or as JSON, found {_short(value)}") from None
    return value


def _is_turns(value: Any) -> bool:
    """Whether a value is turns and not the parts of a text."""
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, dict) and any(name in first for name in _SPEAKER)


def _turns(columns: Columns, value: Any) -> list[Message]:
    """Turns in OpenAI's layout, ShareGPT's, or with the speakers as keys."""
    turns = []
    for one in value if isinstance(value, list) else [] if value is None else [value]:
        if not isinstance(one, dict):
            raise ValueError(f"expected a turn with 'role' and 'content', found {_short(one)}")
        if any(name in one for name in _SPEAKER):
            turns.append(_turn(columns, one))
        elif one and all(str(name).lower() in _ROLE for name in one):  # {"human": ..., "assistant": ...}
            turns += [_message(name, text, True) for name, text in one.items()]
        else:
            raise ValueError(f"expected a turn with 'role' and 'content', found {_short(sorted(one))}")
    return turns


def _turn(columns: Columns, turn: dict[str, Any]) -> Message:
    filled = {name: value for name, value in turn.items() if not _is_nothing(value)}
    if "tool_calls" in filled or "function_call" in filled:
        raise LeftOutError("with calls of tools, which are not rendered")
    for name in ("thinking", "reasoning", "reasoning_content", "images", "tools"):
        if name in filled:
            columns.remark(f"{name!r} of a turn is not used")
    weight = turn.get("weight")
    if not _is_nothing(weight) and weight not in (0, 1):
        columns.remark("weights of turns that are neither 0 nor 1 count as 1")
    is_scored = weight is None or weight != 0
    if not any(name in turn for name in _CONTENT):
        raise ValueError(f"expected a text under {_either(_CONTENT[:2])} of a turn, found {_short(sorted(turn))}")
    content = next((filled[name] for name in _CONTENT if name in filled), None)
    speaker = next((filled[name] for name in _SPEAKER if name in filled), None)
    return _message(speaker, content, is_scored and turn.get("train") is not False)


def _message(speaker: Any, content: Any, is_scored: bool) -> Message:
    role = _ROLE.get(str(speaker).strip().lower())
    if role is None:
        raise ValueError(f"unknown role {_short(speaker)}; there are {', '.join(_ROLE)}")
    if role == "tool":
        raise LeftOutError("with calls of tools, which are not rendered")
    text = content_text(content)
    if role != "assistant":
        return Message(cast(Role, role), text)
    return Message("assistant", text, scored=is_scored and text.strip() != "")


def _cut(columns: Columns, turns: list[Message]) -> list[Message]:
    """The turns from the user's first to the assistant's last, and the system prompt before them."""
    first = next((i for i, turn in enumerate(turns) if turn.role == "user"), len(turns))
    before = [turn for turn in turns[:first] if turn.role == "system"]
    last = max((i for i, turn in enumerate(turns) if turn.role == "assistant"), default=-1)
    if last < first:
        raise LeftOutError("without an answer of the assistant to a user")
    if len(before) < first:
        columns.remark("what the assistant says before the user's first turn is left away")
    if last < len(turns) - 1:
        columns.remark("what follows the assistant's last turn is left away")
    return [*before, *turns[first : last + 1]]


def _prompt(columns: Columns, names: Sequence[str]) -> list[Message]:
    """What the user says, a text or turns; of a record with an input alone that."""
    if not columns.has(*names, *INPUTS):
        raise columns.lack(f"a prompt under {_either(names)}")
    value = columns.find(*(names if columns.has(*names) else INPUTS))
    if isinstance(value, dict) and "messages" in value:  # OpenAI's preferences
        for name in value.keys() & {"tools"}:
            columns.remark(f"{name!r} of the input is not used")
        value = value["messages"]
    if _is_turns(value):
        return _turns(columns, value)
    about = columns.find(*INPUTS) if columns.has(*names) else None
    return [Message("user", content_text(value), content_text(about))]


def _answer(columns: Columns, value: Any) -> list[Message]:
    return _turns(columns, value) if _is_turns(value) else [Message("assistant", content_text(value))]


def _compared(columns: Columns, names: Sequence[str]) -> list[Message]:
    """An answer that was compared, or a conversation that ends in one."""
    value = columns.find(*names)
    if not columns.has(*names):
        raise columns.lack(f"an answer or turns under {_either(names[:2])}")
    is_transcript = isinstance(value, str) and re.match(r"\s*\n\n(Human|Assistant):", value)
    turns = _transcript(value) if is_transcript else _answer(columns, value)
    if not turns or turns[-1].role != "assistant":
        raise LeftOutError(f"the last turn of {names[0]!r} is not the assistant's")
    return turns


def _transcript(text: str) -> list[Message]:
    """The turns of a dialogue in hh-rlhf's layout."""
    _, *parts = re.split(r"\n\n(Human|Assistant):", text)
    return [
        Message("user" if speaker == "Human" else "assistant", said.strip())
        for speaker, said in zip(parts[::2], parts[1::2], strict=True)
    ]


def _opened(columns: Columns, turns: Sequence[Message]) -> list[Message]:
    """The turns with the system prompt and the history that stand in columns of their own."""
    system = columns.find(*SYSTEM)
    opening = [] if system is None else [Message("system", content_text(system))]
    start = next((i for i, turn in enumerate(turns) if turn.role != "system"), len(turns))
    opening = [*(turn for turn in opening if turn not in turns[:start]), *turns[:start]]
    history = _listed(columns.find("history")) or []
    for one in history if isinstance(history, list) else [history]:
        if isinstance(one, list | tuple) and len(one) == 2:
            opening += [_message(role, text, True) for role, text in zip(("user", "assistant"), one, strict=True)]
        elif _is_turns(one):
            opening += _turns(columns, one)
        else:
            raise ValueError(f"expected pairs of texts or turns under 'history', found {_short(one)}")
    return [*opening, *turns[start:]]
