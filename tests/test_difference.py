"""Paired differences, by hand."""

import json

import pytest


def write(folder, name, scores, **config):
    """Results of one task as the harness's, each score with a second one by another filter."""
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps({"config": {"model_name": name, **config}}))
    rows = []
    for i, score in scores.items():
        row = {"task": "sums", "doc_id": i, "doc_hash": f"h{i}", "metrics": ["acc", "word_perplexity"]}
        row |= {"word_perplexity": [-3.0, 2], "filter": "none", "acc": score}
        rows += [row, {**row, "filter": "first", "acc": 1.0}]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def given(*folders):
    return [f"--results_dir={folder}" for folder in folders]


def cells(out):
    """Of the rows of the table."""
    lines = [line for line in out.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]


def test_question_by_question(command, tmp_path):
    """Of 100 questions 10 are lost, 30 gained: the mean is 0.2, its standard error sqrt(0.4 - 0.2**2) / 10 = 0.06."""
    before = {i: float(i < 50) for i in range(100)}
    after = {i: float(10 <= i < 80) for i in range(100)}
    first, second = write(tmp_path / "a", "base", before), write(tmp_path / "b", "tuned", after)
    status, out, err = command("evaluate/difference.py", *given(first, second))
    assert (status, err) == (0, "")
    reference, tuned, *others = cells(out)
    assert reference == ["acc", "base", "100", "50.00%", "", "", "", ""]
    assert tuned[:5] + tuned[6:] == ["acc", "tuned", "100", "70.00%", "+20.00%", "10", "30"]
    low, high = [float(end.rstrip("%")) for end in tuned[5].split(" to ")]
    assert (low, high) == pytest.approx((20 - 1.96 * 6, 20 + 1.96 * 6), abs=1.0)
    assert [row[0] for row in others] == ["acc, first"] * 2
    assert others[1][4:6] == ["+0.00%", ""]  # no interval, as an interval of width zero would claim certainty
    assert "several metrics (acc, acc, first), and the results do not say which counts" in out


def test_the_metric_that_counts(command, tmp_path):
    """Comes first, and is named."""
    folders = [write(tmp_path / name, name, {0: 1.0, 1: 0.0}, metric_that_counts="acc, first") for name in "ab"]
    status, out, _ = command("evaluate/difference.py", *given(*folders))
    assert status == 0
    assert out.startswith("**acc, first** is the metric that counts")
    assert [row[0] for row in cells(out)] == ["**acc, first**"] * 2 + ["acc"] * 2


def test_results_that_do_not_match(command, tmp_path):
    first = write(tmp_path / "a", "base", {0: 1.0, 1: 0.0})
    half, none = write(tmp_path / "b", "half", {1: 1.0, 2: 0.0}), write(tmp_path / "c", "none", {7: 1.0})
    status, out, err = command("evaluate/difference.py", *given(first, half))
    assert status == 0
    assert "1 questions in common" in err
    assert "+100.00%" in out
    assert "have no question with acc in common" in command("evaluate/difference.py", *given(first, none))[2]
    assert "twice or more" in command("evaluate/difference.py", results_dir=first)[2]
    missing = command("evaluate/difference.py", *given(first, str(tmp_path / "d")))
    assert missing[0] == 1
    assert "holds no results.json" in missing[2]
