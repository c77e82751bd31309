"""KTO against derivations by hand: its data, its reference point, and what its runs share with other scripts."""

import csv
import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import load_script

from lit_llama import data_writing
from lit_llama.adapters import save_adapter
from lit_llama.aligner import Aligner
from lit_llama.checkpoint import load_base
from lit_llama.data import TokenDataset
from lit_llama.prompts import Message
from lit_llama.states import last_state
from lit_llama.tokenizer import Tokenizer

kto = load_script("finetune/aligner_kto.py").main
prepare = load_script("scripts/prepare_pairs.py").main
NUMBERS = range(1, 17)
PAIRS = [{"prompt": f"Count to {n}.", "chosen": " ".join(map(str, range(1, n + 1))), "rejected": "no"} for n in NUMBERS]
LABELLED = [
    {"prompt": "one", "completion": "un", "label": True},
    {"messages": [{"role": "user", "content": "two"}, {"role": "assistant", "content": "zwo"}], "kto_tag": False},
    {"instruction": "three", "output": "trois", "label": 1},
    {"prompt": "four", "completion": [{"role": "assistant", "content": "vier"}], "label": "false"},
]


def write_rows(folder, rows):
    folder.mkdir(exist_ok=True)
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "rows.jsonl"


@pytest.fixture(scope="module")
def answers_dir(base_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unpaired")
    options = {"data_path": write_rows(folder, PAIRS), "output_dir": folder / "data", "checkpoint_dir": base_dir}
    prepare(kind="unpaired", validation_share=0.25, **options)
    return folder / "data"


@pytest.fixture
def run_kto(base_dir, answers_dir, tmp_path):
    """Run the script; returns the rows of its metrics and its folder."""

    def call(name="kto", **options):
        defaults = {"batch_size": 8, "micro_batch_size": 8, "max_steps": 3, "warmup_steps": 1, "eval_interval": 1}
        defaults |= {"learning_rate": 3e-2, "precision": "32-true"}
        paths = {"checkpoint_dir": base_dir, "data_dir": answers_dir, "out_dir": tmp_path / name}
        kto(**{**paths, **defaults, **options})
        with open(tmp_path / name / "metrics.csv", newline="") as file:
            rows = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
        return rows, tmp_path / name

    return call


@pytest.fixture
def started(base_dir, tmp_path):
    """An adapter that is not the base, to be held to it."""
    torch.manual_seed(0)
    start = Aligner(load_base(base_dir).config, 2)
    torch.nn.init.normal_(start.gates)
    save_adapter(tmp_path / "start.safetensors", start)
    return {"adapter_path": tmp_path / "start.safetensors", "reference_path": Path("base")}, start


def read_items(folder, base_dir, split):
    """Prompt, answer, whether it is a good one, and the answer to another prompt, of each item."""
    tokenizer = Tokenizer(base_dir)
    data = TokenDataset(folder, split, tokenizer, kind="unpaired")
    for i in range(len(data)):
        (own, other), prompt = data[i], data.prompt(i)
        assert other.ids[: len(prompt)].tolist() == prompt
        texts = (tokenizer.decode(example.ids[example.scored].tolist()) for example in (own, other))
        answer, to_another = (re.sub(r"<[^>]*>", "", text).strip() for text in texts)
        asked = re.findall(r"Count to \d+\.|one|two|three|four", tokenizer.decode(prompt))[-1]
        yield asked, answer, data.is_wanted(i), to_another


def test_pairs_become_answers_of_their_own(answers_dir, base_dir):
    """Both answers of a pair are in the same split, each with an answer to another prompt."""
    expected = {(row["prompt"], row[name], name == "chosen") for row in PAIRS for name in ("chosen", "rejected")}
    items = {split: list(read_items(answers_dir, base_dir, split)) for split in ("train", "validation")}
    assert {item[:3] for part in items.values() for item in part} == expected
    assert [len(part) for part in items.values()] == [24, 8]
    for part in items.values():
        prompts = {prompt for prompt, *_ in part}
        assert len(prompts) == len(part) / 2
        right = {prompt: answer for prompt, answer, wanted, _ in part if wanted}
        for prompt, _, wanted, other in part:
            assert other != right[prompt]
            assert (other in right.values()) == wanted
        assert sorted(answer for _, answer, *_ in part) == sorted(other for *_, other in part)


def test_records_with_labels(base_dir, tmp_path, command):
    options = {"data_path": write_rows(tmp_path, LABELLED), "kind": "unpaired", "checkpoint_dir": base_dir}
    options |= {"output_dir": tmp_path / "data", "validation_share": 0.5}
    status, _, err = command("scripts/prepare_pairs.py", **options)
    assert status == 0, err
    items = [item for split in ("train", "validation") for item in read_items(tmp_path / "data", base_dir, split)]
    expected = {("one", "un", True), ("two", "zwo", False), ("three", "trois", True), ("four", "vier", False)}
    assert {item[:3] for item in items} == expected
    assert re.search(r"train: 2 answers \([012] of them good\)", err)
    assert "is not used" not in err


@pytest.mark.parametrize("prompts", ["aabbbc", "aabca", "abab", "ab", "abba", "aabaa"])
def test_an_answer_to_another_prompt_is_to_another_prompt(prompts):
    """However records of one prompt follow each other; and each answer is learned once."""
    items = [
        ("train", [[Message("user", prompt), Message("assistant", f"{prompt} {i}")]])
        for i, prompt in enumerate(prompts)
    ]
    made = [item for _, item in data_writing._unpaired(items, "rows")]
    assert all(own[:-1] == other[:-1] == [Message("user", own[-1].content[0])] for own, other in made)
    assert all(own[-1].content[0] != other[-1].content[0] for own, other in made)
    assert sorted((own for own, _ in made), key=str) == sorted((item for _, [item] in items), key=str)


def test_answers_to_one_prompt_alone_are_refused(base_dir, tmp_path, command):
    """Here those of validation, which would be compared with themselves."""
    options = {"data_path": write_rows(tmp_path, LABELLED[:2]), "kind": "unpaired", "checkpoint_dir": base_dir}
    status, _, err = command("scripts/prepare_pairs.py", output_dir=tmp_path / "data", **options)
    assert status == 1
    assert "all validation answers are to one prompt" in err or "all train answers are to one prompt" in err


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "completion": "b", "label": "perhaps"}, "expected true or false under 'label' or 'kto_tag'"),
        ({"prompt": "a", "completion": "b"}, "or an answer with true or false under 'label' or 'kto_tag'"),
    ],
)
def test_records_without_a_label(base_dir, tmp_path, command, row, message):
    options = {"data_path": write_rows(tmp_path, [row] * 3), "kind": "unpaired", "checkpoint_dir": base_dir}
    status, _, err = command("scripts/prepare_pairs.py", output_dir=tmp_path / "data", **options)
    assert status == 1
    assert message in err


def test_starts_at_a_half_and_learns(run_kto, tmp_path):
    rows, folder = run_kto(max_steps=8, eval_interval=8)
    assert rows[0]["validation_loss"] == pytest.approx(0.5, abs=1e-6)
    assert (rows[0]["validation_accuracy"], rows[0]["validation_reference_point"]) == (0.5, 0)
    assert rows[-1]["validation_loss"] < 0.499
    assert rows[-1]["validation_good_reward"] > rows[-1]["validation_bad_reward"]
    assert rows[-1]["validation_accuracy"] > 0.5
    assert (folder / "loss.png").is_file()
    rows, _ = run_kto("weighted", max_steps=1, good_weight=1.2, bad_weight=0.6)
    assert rows[0]["validation_loss"] == pytest.approx(0.5 * (1.2 + 0.6) / 2, abs=1e-6)


def test_validation_by_hand(run_kto, without_pictures, started, base_dir, answers_dir):
    """The reference point is that of the whole validation set, whatever the micro batches, and is not below zero."""
    options, start = started
    [first, *_], _ = run_kto(max_steps=1, micro_batch_size=2, beta=0.2, **options)
    model = load_base(base_dir)
    data = TokenDataset(answers_dir, "validation", Tokenizer(base_dir), kind="unpaired")

    def ratio(example):
        ids, scored = torch.from_numpy(example.ids.astype("int64")), torch.from_numpy(example.scored[1:])
        with torch.no_grad():
            policy, reference = (
                -F.cross_entropy(model(ids[None], adapter)[0, :-1], ids[1:], reduction="none")[scored].sum()
                for adapter in (start, None)
            )
        return (policy - reference).item()

    own, others = zip(*(map(ratio, data[i]) for i in range(len(data))), strict=True)
    wanted = torch.tensor([data.is_wanted(i) for i in range(len(data))])
    point = sum(others) / len(others)
    scores = torch.tensor(own)
    margins = torch.where(wanted, scores - max(0, point), max(0, point) - scores)
    assert first["validation_loss"] == pytest.approx((1 - torch.sigmoid(0.2 * margins)).mean().item(), abs=1e-4)
    assert first["validation_accuracy"] == pytest.approx((margins > 0).float().mean().item())
    assert first["validation_reference_point"] == pytest.approx(0.2 * max(0, point), abs=1e-4)
    assert first["validation_good_reward"] == pytest.approx(0.2 * scores[wanted].mean().item(), abs=1e-4)
    assert first["validation_bad_reward"] == pytest.approx(0.2 * scores[~wanted].mean().item(), abs=1e-4)


def test_the_reference_point_is_that_of_the_step(run_kto, without_pictures, started):
    """Other micro batches, packed ones and a cached reference train the same adapter."""
    options, _ = started
    options |= {"beta": 0.5, "eval_interval": 3}
    found, points = {}, []
    for name, more in {
        "whole": {"micro_batch_size": 8},
        "small": {"micro_batch_size": 2},
        "packed": {"micro_batch_size": 4, "pack": True},
        "cached": {"micro_batch_size": 4, "cache_reference": True},
    }.items():
        rows, folder = run_kto(name, **options, **more)
        found[name] = torch.load(last_state(folder), weights_only=True)["adapter"]
        points.append(rows[1]["train_reference_point"])
    assert points == pytest.approx(points[:1] * 4, abs=1e-4)
    for name in ("small", "packed", "cached"):
        for key, expected in found["whole"].items():
            torch.testing.assert_close(found[name][key], expected, atol=2e-4, rtol=0)


def test_resumed_to_the_bit(run_kto, without_pictures, started):
    options, _ = started
    options |= {"save_interval": 2, "max_steps": 4}
    _, whole = run_kto("whole", **options)
    expected = torch.load(last_state(whole), weights_only=True)["adapter"]
    last_state(whole).unlink()
    run_kto("whole", resume=True, **options)
    found = torch.load(last_state(whole), weights_only=True)["adapter"]
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_learning_rate_auto_keeps_good_and_bad_apart(run_kto, without_pictures, capsys):
    """A part of the training answers is held out, with what each is."""
    rows, _ = run_kto(learning_rate="auto", max_steps=10)
    assert "--learning_rate auto takes" in capsys.readouterr().err
    assert rows[-1]["validation_good_reward"] > rows[-1]["validation_bad_reward"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0, "good_weight": -1}, "--beta is 0, it must be larger than 0; --good_weight is -1"),
        ({"good_weight": 0, "bad_weight": 0}, "--good_weight and --bad_weight are both 0"),
        (
            {"data_dir": "pairs"},
            "holds pairs of a chosen and a rejected response, expected answers that are good or bad",
        ),
    ],
)
def test_bad_options(command, base_dir, answers_dir, tmp_path, options, message):
    if "data_dir" in options:
        prepare(data_path=write_rows(tmp_path, PAIRS), output_dir=tmp_path / "pairs", checkpoint_dir=base_dir)
        options = {"data_dir": tmp_path / "pairs"}
    paths = {"checkpoint_dir": base_dir, "data_dir": answers_dir, "out_dir": tmp_path / "out", "max_steps": 1}
    status, _, err = command("finetune/aligner_kto.py", **{**paths, **options})
    assert status == 1
    assert message in err
