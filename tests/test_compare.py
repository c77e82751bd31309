"""The comparison of methods, on a tiny base."""

import csv
import functools
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, load_script

from lit_llama.adapters import adapter_info
from lit_llama.data import TokenDataset
from lit_llama.data_writing import hold_out
from lit_llama.locks import own_folder
from lit_llama.script.command_line import run
from lit_llama.tokenizer import Tokenizer

compare = load_script("scripts/compare_methods.py")


@pytest.fixture
def calls(monkeypatch):
    """Scripts run in this process, which is faster; those that were are listed."""
    done = []

    def in_process(command):
        script = command[1].removeprefix(f"{ROOT}/")
        done.append((script, dict(option.removeprefix("--").split("=", 1) for option in command[2:])))
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", command[1:])
            try:
                run(load_script(script).main)
            except SystemExit as stop:
                return SimpleNamespace(returncode=stop.code)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(compare, "subprocess", SimpleNamespace(run=in_process))
    return done


@pytest.fixture
def call(base_dir, data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "RATES", [1e-3, 3e-3, 1e-2, 3e-2, 1e-1])
    (tmp_path / "q.jsonl").write_text('{"split": "test", "question": "Is it red?"}\n' * 3)
    return functools.partial(
        compare.main,
        checkpoint_dir=base_dir,
        data_dir=data_dir,
        out_dir=tmp_path / "out",
        method=["aligner-2", "lora-3"],
        seed=[1, 2],
        steps=3,
        search_steps=2,
        form="captain",
        questions_path=tmp_path / "q.jsonl",
        max_new_tokens=3,
    )


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_table_search_and_restart(call, calls, tmp_path, capsys, data_dir, base_dir):
    call()
    out = tmp_path / "out"
    searched = read(out / "search.csv")
    rates = {name: [row for row in searched if row["method"] == name] for name in ("aligner-2", "lora-3")}
    for rows in rates.values():  # the best is inside of what was tried, or at the end of all there are
        losses = [float(row["validation_loss"]) for row in rows]
        best = losses.index(min(losses))
        tried = [float(row["learning_rate"]) for row in rows]
        assert tried == compare.RATES[compare.RATES.index(tried[0]) :][: len(tried)]
        assert len(tried) >= 3
        assert best > 0 or tried[0] == compare.RATES[0]
        assert best < len(tried) - 1 or tried[-1] == compare.RATES[-1]
    # The search saw training data alone, of which it held out its own validation.
    assert {options["data_dir"] for _, options in calls[: len(searched)]} == {str(out / "search" / "data")}
    assert {options["data_dir"] for _, options in calls[len(searched) :]} == {str(data_dir)}

    results = read(out / "results.csv")
    assert [row["method"] for row in results] == ["base", "aligner-2", "aligner-2", "lora-3", "lora-3"]
    assert [row["trainable_parameters"] for row in results] == [
        "0",
        "72",
        "72",
        "1344",
        "1344",
    ]  # 4 * 3 * (32 + 32 + 32 + 16)
    for row in results[1:]:
        assert float(row["learning_rate"]) == float(
            min(rates[row["method"]], key=lambda one: float(one["validation_loss"]))["learning_rate"]
        )
        info = adapter_info(row["adapter_path"])
        assert float(row["validation_loss"]) == info.validation_loss
        assert info.hyperparameters["seed"] == int(row["seed"])
        assert info.step == 3
    assert float(results[0]["validation_loss"]) == pytest.approx(float(results[1]["base_loss"]))
    assert {row["compliance"] for row in results} == {"0"}
    table, progress = capsys.readouterr()
    numbers = [tuple(map(int, found)) for found in re.findall(r"^run (\d+) of (\d+): training", progress, re.M)]
    assert [number for number, _ in numbers] == list(range(1, len(calls) + 1))
    assert [planned for _, planned in numbers] == sorted(planned for _, planned in numbers)
    first = sum(len(compare.first_rates(name)) for name in rates) + 2 * 2  # two seeds of each
    assert (numbers[0], numbers[-1]) == ((1, first), (len(calls), len(calls)))
    assert table == (out / "table.md").read_text()
    losses = [float(row["validation_loss"]) for row in results[1:3]]
    assert f"| Aligner, N = 2 | 72 | {float(results[1]['learning_rate']):g} | {np.mean(losses):.4f} ± " in table
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")

    trained = len(calls)
    call()
    assert len(calls) == trained  # nothing is done twice
    out_again, progress = capsys.readouterr()
    assert out_again == table
    assert progress.count("found trained") == trained
    call(seed=[1, 2, 3], rates_from=out)
    assert [options["seed"] for _, options in calls[trained:]] == ["3", "3"]
    with pytest.raises(ValueError, match="was made with other settings"):
        call(batch_size=2, micro_batch_size=2, rates_from=out)


def test_a_rate_that_diverges_is_not_chosen(call, calls, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "RATES", [1e-2, 3e-2, 1e30])
    call(method=["aligner-1"], seed=[1], search_steps=20, steps=2, form=None)
    searched = {float(row["learning_rate"]): float(row["validation_loss"]) for row in read(tmp_path / "out/search.csv")}
    assert searched[1e30] == float("inf")
    assert float(read(tmp_path / "out" / "results.csv")[1]["learning_rate"]) in (1e-2, 3e-2)


def test_a_method_that_diverges_has_no_answers(call, calls, tmp_path, capsys):
    """It is neither asked nor takes the base's answers, and the table says what became of it."""
    (tmp_path / "out").mkdir()
    searched = "method,learning_rate,validation_loss\naligner-1,1e30,1\nlora-3,0.001,1\n"
    (tmp_path / "out" / "search.csv").write_text(searched)
    call(method=["aligner-1", "lora-3"], seed=[1], rates_from=tmp_path / "out", steps=20)
    results = {row["method"]: row for row in read(tmp_path / "out" / "results.csv")}
    assert [results[name]["compliance"] for name in ("base", "aligner-1", "lora-3")] == ["0", "", "0"]
    assert re.search(
        r"^\| Aligner, N = 1 +\| +\| 1e\+30 +\| diverged +\| diverged +\| +\|$", capsys.readouterr().out, re.M
    )


def test_a_run_that_was_refused_has_not_diverged(call, calls, tmp_path, base_dir, data_dir):
    """A folder with a row of metrics that another run holds ends the comparison, which can be continued."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "search.csv").write_text("method,learning_rate,validation_loss\naligner-1,0.1,1\n")
    options = {"method": ["aligner-1"], "seed": [1], "rates_from": tmp_path / "out", "form": None}
    call(**options)
    run_dir = tmp_path / "out" / "runs" / "aligner-1-rate-0.1-seed-1"
    (run_dir / "result.json").unlink()
    with own_folder(run_dir), pytest.raises(OSError, match=r"aligner\.py failed with status 1 for"):
        call(**options)
    assert not (run_dir / "result.json").exists()


def test_other_questions_are_asked(call, calls, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "search.csv").write_text("method,learning_rate,validation_loss\naligner-1,0.1,1\n")
    options = {"method": ["aligner-1"], "seed": [1], "rates_from": tmp_path / "out"}
    call(**options)
    [file] = (tmp_path / "out" / "runs").glob("*/aligner.answers.jsonl")
    first = file.read_text()
    assert first.count("\n") == 3
    call(**options)
    assert file.read_text() == first
    (tmp_path / "q.jsonl").write_text(
        '{"split": "test", "question": "Is it red?"}\n' * 2 + '{"split": "test", "question": "Why?"}'
    )
    call(**options)
    assert file.read_text().count("\n") == 4
    call(**options, max_new_tokens=4)
    assert file.read_text().count("\n") == 7


def test_held_out_data_are_training_data(base_dir, data_dir, tmp_path):
    tokenizer = Tokenizer(base_dir)
    source = TokenDataset(data_dir, "train", tokenizer)
    hold_out(source, tokenizer, tmp_path / "search", 0.25)
    train, validation = (TokenDataset(tmp_path / "search", split, tokenizer) for split in ("train", "validation"))
    assert (len(train), len(validation)) == (12, 4)

    def contents(dataset):
        return [(one.ids.tolist(), one.scored.tolist()) for index in range(len(dataset)) for one in dataset[index]]

    assert sorted(contents(train) + contents(validation)) == sorted(contents(source))
    with pytest.raises(ValueError, match="1% of 16 items cannot be held out"):
        hold_out(source, tokenizer, tmp_path / "small", 0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "aligner"}, "--method aligner: expected a method and its size, such as aligner-1"),
        ({"method": "prompt-3"}, "--method prompt-3: expected"),
        ({"rates_from": "nowhere"}, "nowhere/search.csv: no such file; --rates_from takes the --out_dir"),
    ],
)
def test_bad_options(command, base_dir, data_dir, tmp_path, options, message):
    paths = {"checkpoint_dir": base_dir, "data_dir": data_dir, "out_dir": tmp_path / "out"}
    status, _, err = command("scripts/compare_methods.py", **paths, **options)
    assert status == 1
    assert message in err


def test_a_script_that_fails_is_reported(call, tmp_path):
    """By a process of its own, with a batch that cannot be cut into micro batches."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "search.csv").write_text("method,learning_rate,validation_loss\naligner-1,0.1,1\n")
    with pytest.raises(OSError, match=r"aligner\.py failed with status 1 for .*aligner-1-rate-0\.1-seed-1"):
        call(method=["aligner-1"], rates_from=tmp_path / "out", steps=3, batch_size=3, micro_batch_size=2)
