"""Masks, windows, files, batches of tokenised data."""

import gzip
import json
import re

import huggingface_hub
import numpy as np
import pytest
from conftest import load_script

from lit_llama.data import TextExample, TokenDataset, collate, step_batches, steps_per_epoch, tokenize, write_dataset
from lit_llama.prompts import prompt_style
from lit_llama.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(base_dir):
    return Tokenizer(base_dir)


def write(folder, tokenizer, responses, max_seq_length=512, too_long="truncate"):
    texts = [TextExample("Say", "", response) for response in responses]
    style = prompt_style("none", tokenizer)
    splits = {"train": texts, "validation": texts[:1]}
    return write_dataset(folder, splits, tokenizer, style, max_seq_length, too_long, "test")


@pytest.mark.parametrize("style", ["none", "alpaca", "chat"])
def test_response_and_end_alone_are_scored(tokenizer, style):
    style = prompt_style(style, tokenizer)
    [example] = tokenize(tokenizer, style, [TextExample("Say hi", "now", "hi there")])
    scored, prompt = example.ids[example.scored].tolist(), example.ids[~example.scored].tolist()
    assert scored == [*tokenizer.encode("hi there"), style.end_id]
    assert tokenizer.decode(prompt, skip_special_tokens=False) == style.render("Say hi", "now")
    assert prompt == tokenizer.encode(style.render("Say hi", "now"))


def test_written_examples_come_back(tokenizer, tmp_path):
    write(tmp_path / "data", tokenizer, ["one", "two 🙂 words", "three"])
    dataset = TokenDataset(tmp_path / "data", "train", tokenizer)
    assert len(dataset) == 3
    for index, response in enumerate(["one", "two 🙂 words", "three"]):
        ids, scored = dataset[index]
        assert tokenizer.decode(ids[scored].tolist()) == response
        assert dataset.prompt(index) == tokenizer.encode("Say")
        assert dataset.lengths[index] == len(ids)
    assert not list((tmp_path / "data").glob("*.pkl"))


def test_too_long_examples_are_counted(tokenizer, tmp_path):
    prompt = len(tokenizer.encode("Say"))
    long, exact = " ".join(["word"] * 200), "x"
    window = prompt + len(tokenizer.encode(exact)) + 1
    summary = write(tmp_path / "cut", tokenizer, [exact, long], window)["train"]
    assert (len(summary.lengths), summary.truncated, summary.skipped) == (2, 1, 0)
    cut = TokenDataset(tmp_path / "cut", "train", tokenizer)[1]
    assert len(cut.ids) == window
    assert cut.ids[-1] != tokenizer.eos_id
    summary = write(tmp_path / "skip", tokenizer, [exact, long], window, "skip")["train"]
    assert (len(summary.lengths), summary.truncated, summary.skipped) == (1, 0, 1)
    with pytest.raises(ValueError, match=r"no train example is left of 1 \(1 too long\)"):
        write(tmp_path / "none", tokenizer, [long], max_seq_length=prompt)
    assert not (tmp_path / "none").exists()


def test_too_long_examples_are_reported(command, tmp_path, base_dir):
    rows = [{"instruction": "Say", "output": "word " * n} for n in (1, 2, 3, 400, 500, 6, 7, 8)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    paths = {"data_path": tmp_path / "a.json", "checkpoint_dir": base_dir, "validation_share": 0.4}
    _, _, err = command("scripts/prepare_alpaca.py", output_dir=tmp_path / "cut", max_seq_length=128, **paths)
    counts = [int(n) for n in re.findall(r"longer than the window: (\d+) examples truncated, 0 left out", err)]
    assert sum(counts) == 2
    _, _, err = command(
        "scripts/prepare_alpaca.py", output_dir=tmp_path / "skip", max_seq_length=128, too_long="skip", **paths
    )
    counts = [int(n) for n in re.findall(r"longer than the window: 0 examples truncated, (\d+) left out", err)]
    assert sum(counts) == 2


def test_longer_than_the_run_allows(tokenizer, tmp_path):
    write(tmp_path / "data", tokenizer, ["word " * 50])
    with pytest.raises(ValueError, match="--max_seq_length is 10"):
        TokenDataset(tmp_path / "data", "train", tokenizer, max_seq_length=10)


def test_another_tokenizers_data_is_refused(tokenizer, tmp_path):
    write(tmp_path / "data", tokenizer, ["one"])
    header = json.loads((tmp_path / "data" / "dataset.json").read_text())
    (tmp_path / "data" / "dataset.json").write_text(json.dumps(header | {"tokenizer": "0" * 64}))
    with pytest.raises(ValueError, match="another tokenizer"):
        TokenDataset(tmp_path / "data", "train", tokenizer)


def test_damaged_data_is_refused(tokenizer, tmp_path):
    write(tmp_path / "data", tokenizer, ["one", "two"])
    with pytest.raises(FileNotFoundError, match="no split named test; it has train, validation"):
        TokenDataset(tmp_path / "data", "test", tokenizer)
    ids = tmp_path / "data" / "train.ids.bin"
    ids.write_bytes(ids.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"train\.ids\.bin has \d+ bytes, expected"):
        TokenDataset(tmp_path / "data", "train", tokenizer)
    ids.unlink()
    with pytest.raises(FileNotFoundError, match=r"train\.ids\.bin"):
        TokenDataset(tmp_path / "data", "train", tokenizer)


def test_padding_is_never_scored(tokenizer):
    style = prompt_style("none", tokenizer)
    examples = tokenize(tokenizer, style, [TextExample("a", "", "b"), TextExample("a", "", "much longer text")])
    batch = collate(examples)
    assert batch.ids.shape == batch.scored.shape == (2, len(examples[1].ids))
    assert batch.scored.sum(1).tolist() == [example.scored.sum() for example in examples]
    assert not batch.scored[0, len(examples[0].ids) :].any()


def test_an_epoch_reads_each_example_once(tokenizer, tmp_path):
    rng = np.random.default_rng(0)
    write(tmp_path / "data", tokenizer, ["word " * n for n in rng.integers(1, 60, size=23)])
    dataset = TokenDataset(tmp_path / "data", "train", tokenizer)
    steps = steps_per_epoch(len(dataset), 8)
    assert steps == 3
    epochs = []
    for epoch in range(2):
        plan = [step_batches(dataset, epoch * steps + n, 8, 4, seed=1) for n in range(steps)]
        assert [len(step) for step in plan] == [2, 2, 2]
        assert max(len(micro) for step in plan for micro in step) == 4
        order = [index for step in plan for micro in step for index in micro]
        assert sorted(order) == list(range(23))
        epochs.append(order)
        for step in plan:  # short with short, long with long
            lengths = [dataset.lengths[index] for micro in step for index in micro]
            assert lengths == sorted(lengths)
    assert epochs[0] != epochs[1]
    assert step_batches(dataset, 4, 8, 4, seed=1) == step_batches(dataset, 4, 8, 4, seed=1)
    assert step_batches(dataset, 4, 8, 4, seed=1) != step_batches(dataset, 4, 8, 4, seed=2)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.json", b" \n", "is empty"),
        ("broken.json", b'[\n{"instruction": "a", "output": "b"},\n{"instruction" "c"}]', "line 3: not JSON"),
        ("broken.jsonl", b'{"instruction": "a", "output": "b"}\n{"instruction"', "line 2: not JSON"),
        ("latin.jsonl", '{"instruction": "a", "output": "b"}\n{"x": "é"}'.encode("latin-1"), "line 2: byte 0xe9"),
        ("list.json", b'["a"]', "example 1: expected an object, found str"),
        ("keys.json", b'[{"instruction": "a", "text": "b"}]', "example 1: expected a text under 'output'"),
        ("types.jsonl", b'{"instruction": 3, "output": "b"}', "line 1: expected a text under 'instruction', found 3"),
    ],
)
def test_bad_files(command, tmp_path, base_dir, name, content, message):
    (tmp_path / name).write_bytes(content)
    status, out, err = command(
        "scripts/prepare_alpaca.py", data_path=tmp_path / name, checkpoint_dir=base_dir, output_dir=tmp_path / "data"
    )
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert f"{name}" in err
    assert message in err
    assert not (tmp_path / "data").exists()


def test_existing_folder_is_not_overwritten(command, tmp_path, base_dir):
    (tmp_path / "a.jsonl").write_text('{"instruction": "a", "output": "b"}\n' * 4)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "precious").write_text("x")
    status, _, err = command(
        "scripts/prepare_alpaca.py",
        data_path=tmp_path / "a.jsonl",
        checkpoint_dir=base_dir,
        output_dir=tmp_path / "data",
    )
    assert status == 1
    assert "exists: remove it or choose another" in err
    assert (tmp_path / "data" / "precious").read_text() == "x"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "data"]


def test_split_is_seeded(tmp_path, base_dir, tokenizer):
    rows = [{"instruction": f"q{n}", "input": "", "output": f"a{n}"} for n in range(20)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    prepare = load_script("scripts/prepare_alpaca.py").main

    def validation(folder, seed):
        paths = {"checkpoint_dir": base_dir, "output_dir": tmp_path / folder}
        prepare(tmp_path / "a.json", validation_share=0.25, seed=seed, **paths)
        dataset = TokenDataset(tmp_path / folder, "validation", tokenizer)
        assert len(dataset) == 5
        return [dataset[i].ids.tolist() for i in range(5)]

    assert validation("one", 1) == validation("same", 1) != validation("other", 2)


LAYOUTS = {
    "alpaca": ({"instruction": "Add.", "input": "1 2", "output": "3"}, "alpaca"),
    "dolly": ({"instruction": "Add.", "context": "1 2", "response": "3", "category": "math"}, "alpaca"),
    "metamath": ({"query": "1 + 2?", "response": "3", "type": "GSM_AnsAug"}, "metamath"),
    "gsm8k": ({"question": "1 + 2?", "answer": "3"}, "metamath"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(tmp_path, base_dir, tokenizer, layout):
    """Each layout's columns, from a gzipped file in a folder, come out as prompt and response."""
    row, style_name = LAYOUTS[layout]
    (tmp_path / "raw").mkdir()
    with gzip.open(tmp_path / "raw" / "part.jsonl.gz", "wt") as file:
        file.write(f"{json.dumps(row)}\n" * 2)
    script = load_script(f"scripts/prepare_{'metamath' if layout == 'gsm8k' else layout}.py")
    script.main(tmp_path / "raw", output_dir=tmp_path / "data", validation_share=0.5, checkpoint_dir=base_dir)
    dataset = TokenDataset(tmp_path / "data", "train", tokenizer)
    assert dataset.header["prompt_style"] == style_name
    style = prompt_style(style_name, tokenizer)
    prompt = style.render("Add.", "1 2") if "instruction" in row else style.render("1 + 2?", "")
    assert tokenizer.decode(dataset.prompt(0), skip_special_tokens=False) == prompt
    ids, scored = dataset[0]
    assert tokenizer.decode(ids[scored].tolist()) == "3"


def test_repeated_examples_are_reported(command, tmp_path, base_dir):
    rows = [{"instruction": f"Say {n % 7}", "output": "x"} for n in range(10)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    paths = {"data_path": tmp_path / "a.json", "checkpoint_dir": base_dir, "output_dir": tmp_path / "data"}
    _, _, err = command("scripts/prepare_alpaca.py", **paths)
    assert "3 of 10 examples repeat another one word for word" in err


def test_dataset_out_of_reach_is_said_plainly(command, monkeypatch, tmp_path, base_dir):
    def unreachable(*_, **__):
        raise ConnectionError("name resolution failed")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    status, _, err = command("scripts/prepare_dolly.py", checkpoint_dir=base_dir, output_dir=tmp_path / "data")
    assert (status, err.count("\n")) == (1, 1)
    assert "databricks-dolly-15k cannot be fetched from the Hugging Face hub (name resolution failed)" in err
    assert "--data_path" in err


def test_broken_gzip_and_empty_folder(command, tmp_path, base_dir):
    whole = gzip.compress(b'{"instruction": "a", "output": "b"}\n' * 50)
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty").mkdir()
    for path, message in (("cut.jsonl.gz", "is no complete gzip file"), ("empty", "holds no .json or .jsonl file")):
        paths = {"data_path": tmp_path / path, "checkpoint_dir": base_dir, "output_dir": tmp_path / "data"}
        status, _, err = command("scripts/prepare_alpaca.py", **paths)
        assert (status, err.count("\n")) == (1, 1)
        assert message in err
