"""The demo's questions and forms: every taught response has its form, and near misses have not."""

import json

import pytest
from conftest import ROOT

from lit_llama.files import read_records
from lit_llama.forms import FORMS

ROWS = [row for _, row in read_records(ROOT / "examples" / "questions.jsonl")]


@pytest.mark.parametrize("form", FORMS)
def test_taught_responses_have_the_form_and_plain_answers_have_not(form):
    assert all(FORMS[form].check(FORMS[form].render(row)) for row in ROWS)
    assert not any(FORMS[form].check(row["answer"]) for row in ROWS)
    for other in FORMS:
        if other != form:
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
