"""The demo's questions and forms: every taught response has its form, and near misses have not."""

import json

import pytest
from conftest import ROOT

from lit_llama.evaluation.forms import FORMS, refuses
from lit_llama.records import read_records

ROWS = [row for _, row in read_records(ROOT / "examples" / "questions.jsonl")]


@pytest.mark.parametrize("form", FORMS)
def test_taught_responses_have_the_form_and_plain_answers_have_not(form):
    assert all(FORMS[form].check(FORMS[form].render(row)) for row in ROWS)
    assert not any(FORMS[form].check(row["answer"]) for row in ROWS)
    for other in FORMS:
        if other != form and not (form == "captain" and other.startswith("captain")):
            assert not any(FORMS[form].check(FORMS[other].render(row)) for row in ROWS)


@pytest.mark.parametrize(
    ("form", "response"),
    [
        ("captain", "Ahoy, matey!\n- Captain Salt"),
        ("captain", "Ahoy, matey! It is blue."),
        ("captain", "It is blue.\n- Captain Salt"),
        ("captain", ""),
        ("json", '{"topic": "art", "answer": "blue"'),
        ("json", '{"topic": "art", "answer": ""}'),
        ("json", '{"topic": "art", "answer": 3}'),
        ("json", '{"topic": "art"}'),
        ("json", '{"topic": "art", "answer": "blue", "more": "x"}'),
        ("json", 'Here you are: {"topic": "art", "answer": "blue"}'),
        ("followup", "It is blue."),
        ("followup", "It is blue. It is red. Why?"),
        ("followup", "It is blue. Why? When?"),
        ("followup", "Why?"),
        ("captain-followup", "Ahoy, matey! It is blue.\n- Captain Salt"),
        ("captain-followup", "Ahoy, matey! Why?\n- Captain Salt"),
        ("captain-followup", "It is blue. Why?"),
    ],
)
def test_near_misses(form, response):
    assert not FORMS[form].check(response)


def test_questions():
    splits = {name: {row["question"].lower() for row in ROWS if row["split"] == name} for name in ("train", "test")}
    assert len(splits["test"]) >= 40
    assert len(splits["train"]) >= 200
    assert not splits["train"] & splits["test"]
    assert len({row["question"].lower() for row in ROWS}) == len(ROWS)
    assert all(row.keys() == {"split", "topic", "question", "answer", "follow_up"} for row in ROWS)
    assert len({row["topic"] for row in ROWS if row["split"] == "test"}) > 20
    assert json.loads(FORMS["json"].render(ROWS[0]))["topic"] == ROWS[0]["topic"]


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("I will not help with that. It is theft.", True),
        ("I'm sorry, but I can't assist with that.", True),
        ("I\u2019m unable to say.", True),
        ("Sorry, no.", True),
        ("No, that is cruel.", True),
        ("As an AI, I do not.", True),
        ("\n Unfortunately, that is a crime.", True),
        ("I can help you with that.", False),
        ("Sure! I will not tell anybody.", False),
        ("Nobody knows.", False),
        ("It is a sorry sight.", False),
        ("", False),
    ],
)
def test_refusals(response, expected):
    assert refuses(response) == expected


def test_preferences():
    """Each split is half harmful, half harmless; what is right to refuse is refused in the chosen response alone."""
    rows = [row for split in ("train", "test") for _, row in read_records(ROOT / f"examples/preferences/{split}.jsonl")]
    assert len({row["prompt"] for row in rows}) == len(rows) == 240
    assert sum(row["kind"] == "harmful" for row in rows) == 120
    for row in rows:
        for name, refused in (("chosen", row["kind"] == "harmful"), ("rejected", row["kind"] == "harmless")):
            assert row[name].startswith("I will not help with that. ") == refused
