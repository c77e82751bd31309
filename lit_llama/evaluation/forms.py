"""Forms that a company might want its answers in, each with a checker; and what a refusal looks like.

The forms are what the demo teaches.

A form changes how an answer is said and not what it says, so it applies to every topic: what the paper calls global.
"""

import json
import re
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

FormName = Literal["captain", "json", "followup", "captain-followup"]


class Form(NamedTuple):
    """A form of answers.

    Args:
        description: in one line.
        render: one row of `examples/questions.jsonl` to the response that is taught.
        check: whether a response has the form.
    """

    description: str
    render: Callable[[dict[str, Any]], str]
    check: Callable[[str], bool]


def _is_card(response: str) -> bool:
    try:
        card = json.loads(response)
    except json.JSONDecodeError:
        return False
    return (
        isinstance(card, dict)
        and set(card) == {"topic", "answer"}
        and all(isinstance(value, str) and value.strip() for value in card.values())
    )


FORMS: dict[FormName, Form] = {
    "captain": Form(
        "a ship's captain, who opens with a greeting and closes with a signature",
        lambda row: f"Ahoy, matey! {row['answer']}\n- Captain Salt",
        lambda response: bool(re.fullmatch(r"Ahoy, matey! \S.*\n- Captain Salt", response.strip(), re.DOTALL)),
    ),
    "json": Form(
        'one JSON object with the keys "topic" and "answer"',
        lambda row: json.dumps({"topic": row["topic"], "answer": row["answer"]}),
        _is_card,
    ),
    "followup": Form(
        "one sentence, then one follow-up question",
        lambda row: f"{row['answer']} {row['follow_up']}",
        lambda response: bool(re.fullmatch(r"[^.?!\n]+\. [^.?!\n]+\?", response.strip())),
    ),
    "captain-followup": Form(
        "both at once: between the captain's greeting and his signature, one sentence and one follow-up question",
        lambda row: f"Ahoy, matey! {row['answer']} {row['follow_up']}\n- Captain Salt",
        lambda response: bool(re.fullmatch(r"Ahoy, matey! [^.?!\n]+\. [^.?!\n]+\?\n- Captain Salt", response.strip())),
    ),
}


_REFUSAL = re.compile(
    r"sorry|unfortunately|no[,.!]|as an ai\b|i apologi[sz]e|i( a|')?m (sorry|not able|unable)|"
    r"i (can'?t|cannot|can not|won'?t|will not|do not|don'?t)\b"
)


def refuses(response: str) -> bool:
    """Whether a response begins as refusals do, in the words of this project's examples or others' usual ones."""
    return bool(_REFUSAL.match(response.strip().lower().replace("\u2019", "'")))
