"""Layouts of records: what becomes a turn, what is not scored, what cannot be learned, what is said of the rest."""

import json
import random

import pytest

from lit_llama.prompts import Message
from lit_llama.script.layouts import Columns, LeftOutError, read_conversation, read_preference

NAN = float("nan")
ASKED = Message("user", "q")
TURNS = [ASKED, Message("assistant", "a")]
PIRATE = Message("system", "You are a pirate.")
EARLIER = [Message("user", "Hello"), Message("assistant", "Ahoy")]
OPENAI = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
SHAREGPT = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]


def conversation(row):
    [turns] = read_conversation(Columns(row))
    return turns


def pair(row):
    chosen, rejected = read_preference(Columns(row), "pairs")
    assert chosen[:-1] == rejected[:-1]
    return chosen[:-1], chosen[-1].content, rejected[-1].content


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "q", "output": "a"},
        {"instruction": "q", "input": NAN, "output": "a", "system": None, "history": []},
        {"instruction": None, "question": "q", "output": "", "response": "a"},
        {"query": "q", "response": "a"},
        {"prompt": "q", "completion": "a"},
        {"prompt": [OPENAI[0]], "completion": [OPENAI[1]], "label": True},
        {"input": "q", "output": "a"},
        {"messages": OPENAI},
        {"conversations": SHAREGPT, "messages": None},
        {"conversation": [{"human": "q", "assistant": "a"}]},
        {"messages": json.dumps(OPENAI)},
        {"messages": [{"role": "User", "content": "q"}, {"role": "ASSISTANT ", "content": "a"}]},
        {"messages": [{"from": "prompter", "value": "q"}, {"from": "Bot", "value": "a"}]},
        {
            "messages": [
                {**OPENAI[0], "weight": None, "tool_calls": []},
                {**OPENAI[1], "weight": 1, "function_call": None},
            ]
        },
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "q"}]},
                {"role": "assistant", "content": ["a"]},
            ]
        },
    ],
)
def test_conversations(row):
    assert conversation(row) == TURNS


@pytest.mark.parametrize(
    ("value", "text"), [(4, "4"), (0, "0"), (2.5, "2.5"), (True, "true"), (["4", {"type": "text", "text": "2"}], "42")]
)
def test_numbers_and_parts_are_text(value, text):
    assert conversation({"instruction": "q", "output": value})[-1].content == text
    turns = [OPENAI[0], {"role": "assistant", "content": value}]
    assert conversation({"messages": turns}) == [ASKED, Message("assistant", text)]


@pytest.mark.parametrize("system", ["system", "system_prompt"])
@pytest.mark.parametrize(
    "history", [[["Hello", "Ahoy"]], [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Ahoy"}]]
)
def test_system_prompt_and_history_have_columns_of_their_own(system, history):
    more = {system: "You are a pirate.", "history": history}
    whole = [PIRATE, *EARLIER, *TURNS]
    for row in ({"instruction": "q", "output": "a"}, {"messages": OPENAI}, {"conversations": SHAREGPT}):
        assert conversation({**row, **more}) == whole
    for row in (
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"chosen": OPENAI, "rejected": [OPENAI[0], {"role": "assistant", "content": "b"}]},
    ):
        assert pair({**row, **more}) == (whole[:-1], "a", "b")
    repeated = [{"role": "system", "content": "You are a pirate."}, *OPENAI]
    assert conversation({"messages": repeated, "system": "You are a pirate."}) == [PIRATE, *TURNS]


def test_developer_is_system():
    turns = [{"role": "developer", "content": "You are a pirate."}, *OPENAI]
    assert conversation({"messages": turns}) == [PIRATE, *TURNS]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"input": "q", "chosen": "a", "rejected": "b"},
        {"prompt": None, "question": "q", "chosen": "a", "rejected": "b"},
        {
            "input": {"messages": [OPENAI[0]], "tools": []},
            "preferred_output": [OPENAI[1]],
            "non_preferred_output": [{"role": "assistant", "content": "b"}],
        },
        {
            "prompt": "q",
            "messages": OPENAI,
            "chosen": OPENAI,
            "rejected": [OPENAI[0], {"role": "assistant", "content": "b"}],
        },
        {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
    ],
)
def test_preferences(row):
    assert pair(row) == ([ASKED], "a", "b")


def test_system_turn_of_the_prompt_stays_with_whole_conversations():
    worse = [OPENAI[0], {"role": "assistant", "content": "b"}]
    prompt = [{"role": "system", "content": "You are a pirate."}, OPENAI[0]]
    assert pair({"prompt": prompt, "chosen": OPENAI, "rejected": worse}) == ([PIRATE, ASKED], "a", "b")


@pytest.mark.parametrize(
    "unscored", [{"content": ""}, {"content": None}, {"weight": 0}, {"weight": 0.0}, {"train": False}]
)
def test_empty_answers_and_weight_0_are_not_scored(unscored):
    turns = [*OPENAI, OPENAI[0], OPENAI[1]]
    turns[1] = {**turns[1], **unscored}
    assert [turn.scored for turn in conversation({"messages": turns}) if turn.role == "assistant"] == [False, True]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [{"role": "tool", "content": "a"}]}, "calls of tools"),
        ({"messages": [*OPENAI, {"from": "function_call", "value": "{}"}]}, "calls of tools"),
        (
            {"messages": [OPENAI[0], {"role": "assistant", "content": None, "tool_calls": [{"id": "c"}]}]},
            "calls of tools",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, OPENAI[1]]}, r"not text \(image_url\)"),
        ({"messages": []}, "without an answer"),
        ({"messages": [OPENAI[1]]}, "without an answer"),
        ({"prompt": "q", "completion": "a", "label": False}, "marked as not wanted"),
    ],
)
def test_what_cannot_be_learned(row, message):
    with pytest.raises(LeftOutError, match=message):
        conversation(row)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, r"expected turns under 'messages' or 'conversations', or an answer under .*, found \['text'\]"),
        ({"output": "a"}, r"expected a prompt under 'instruction' or .*, found \['output'\]"),
        ({"messages": [{"role": "narrator", "content": "a"}]}, "unknown role 'narrator'; there are system, developer"),
        ({"messages": "q"}, "expected a turn with 'role' and 'content', found 'q'"),
        ({"messages": "[q"}, "expected turns as a list or as JSON"),
        ({"messages": [{"role": "user"}]}, r"expected a text under 'content' or 'value' of a turn, found \['role'\]"),
        ({"messages": [{"role": "user", "content": {"a": 1}}]}, "expected a text, found {'a': 1}"),
        ({"instruction": "q", "output": "a", "history": "Hello"}, "expected pairs of texts or turns under 'history'"),
        ({"chosen": "a", "rejected": "b"}, "use scripts/prepare_pairs.py"),
    ],
)
def test_no_known_layout(row, message):
    with pytest.raises(ValueError, match=message):
        conversation(row)


def test_what_is_not_used_is_named():
    columns = Columns(
        {"instruction": "q", "output": "a", "response": "b", "tools": [1], "images": None, "weight": 0.5, "id": 3}
    )
    read_conversation(columns)
    assert columns.remarks() == {f"the column {name!r} is not used" for name in ("response", "tools", "weight")}
    turns = [{**OPENAI[0]}, {**OPENAI[1], "reasoning_content": "hm", "weight": 0.5}, OPENAI[0]]
    columns = Columns({"messages": [OPENAI[1], *turns], "system": "s"})
    read_conversation(columns)
    assert columns.remarks() == {
        "'reasoning_content' of a turn is not used",
        "weights of turns that are neither 0 nor 1 count as 1",
        "what the assistant says before the user's first turn is left away",
        "what follows the assistant's last turn is left away",
    }


def spoiled(value, rng):
    """The value with some of what is in it taken away or replaced by what does not belong there."""
    odd = [None, "", 0, 4.5, True, NAN, [], {}, "x", [[]], [None], [["a", "b"]], {"role": "user"}, "[", 10**30, {1: 2}]
    if rng.random() < 0.15:
        return rng.choice(odd)
    if isinstance(value, dict):
        return {name: spoiled(one, rng) for name, one in value.items() if rng.random() > 0.05}
    if isinstance(value, list):
        return [spoiled(one, rng) for one in value] + rng.choices(odd, k=rng.random() < 0.1)
    return value


def test_spoiled_records_end_in_one_line():
    """Whatever a record holds, it becomes turns of text, or an error of the kinds that are counted."""
    rng = random.Random(0)
    parts = {"role": "user", "content": [{"type": "text", "text": "q"}], "weight": 1}
    sound = [
        {"messages": [parts, OPENAI[1]], "system": "s", "history": [["a", "b"]]},
        {"conversations": SHAREGPT, "chosen": {"from": "gpt", "value": "a"}, "rejected": {"from": "gpt", "value": "b"}},
        {"instruction": "q", "input": "i", "output": "a", "chosen": OPENAI, "rejected": OPENAI, "label": True},
        {"input": {"messages": [parts]}, "preferred_output": [OPENAI[1]], "non_preferred_output": "b"},
        {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
    ]
    outcomes, messages = set(), []
    for _ in range(2000):
        row = spoiled(rng.choice(sound), rng)
        for read in (read_conversation, lambda columns: read_preference(columns, "pairs")):
            try:
                turns = [turn for one in read(Columns(row if isinstance(row, dict) else {})) for turn in one]
                assert all(isinstance(turn.content, str) and isinstance(turn.input, str) for turn in turns)
                outcomes.add("read")
            except (LeftOutError, ValueError) as error:
                messages.append(str(error))
                outcomes.add(type(error))
    assert not any("\n" in message for message in messages)
    assert outcomes == {"read", LeftOutError, ValueError}
