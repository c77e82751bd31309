"""The adapters that come with the repo: what their files say, and what the demo's base answers with them."""

import pytest
from conftest import DEMO_BASE, ROOT

from lit_llama import open_base
from lit_llama.adapters import read_adapter
from lit_llama.base import Base
from lit_llama.evaluation.forms import FORMS, FormName
from lit_llama.records import read_records

ADAPTERS = ROOT / "examples" / "adapters"
TRAINED: list[FormName] = ["captain", "followup", "json"]


def test_there_is_one_for_each_of_these_forms():
    assert sorted(path.stem for path in ADAPTERS.iterdir()) == TRAINED


@pytest.mark.parametrize("form", TRAINED)
def test_the_file_says_where_it_comes_from(form):
    path = ADAPTERS / f"{form}.safetensors"
    adapter, info = read_adapter(path)  # checked against the hash of its values
    assert info.fingerprint
    assert (info.method, info.base_name, info.prompt_style) == ("aligner", "SmolLM2-135M-Instruct", "chat")
    assert info.base_fingerprint.startswith("dd0a5163020bfa0a")
    assert sum(parameter.numel() for parameter in adapter.parameters()) == 828
    assert path.stat().st_size < 5000
    assert info.hyperparameters["data_dir"] == f"data/{form}"
    folders = [value for value in info.hyperparameters.values() if str(value).startswith(("/", "~", ".."))]
    assert folders == []


@pytest.fixture(scope="module")
def demo_base() -> Base:
    if not DEMO_BASE.is_dir():
        pytest.skip("the demo's base is not there; make base fetches it")
    return open_base(DEMO_BASE, for_generation=True)


@pytest.mark.parametrize("form", TRAINED)
def test_the_demos_base_answers_in_the_form(demo_base, form):
    rows = [row for _, row in read_records(ROOT / "examples" / "questions.jsonl") if row["split"] == "test"]
    questions = [row["question"] for row in rows[:2]]
    check = FORMS[form].check
    aligned = demo_base.with_adapter(ADAPTERS / f"{form}.safetensors")  # refused for a base of other weights
    answers = aligned.generate(questions, max_new_tokens=64)
    assert all(check(answer) for answer in answers), answers
    if form == "captain":
        assert not any(check(answer) for answer in demo_base.generate(questions, max_new_tokens=32))
