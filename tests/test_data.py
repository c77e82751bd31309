"""Masks, windows, files, batches of tokenised data."""

import gzip
import json
import re
import shutil
import subprocess
import sys

import huggingface_hub
import numpy as np
import pytest
from conftest import load_script

from lit_llama.data import TokenDataset, collate, open_data, step_batches, steps_per_epoch, tokenize
from lit_llama.data_writing import write_dataset
from lit_llama.prompts import Message, prompt_style
from lit_llama.records import read_records
from lit_llama.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(base_dir):
    return Tokenizer(base_dir)


def turns(instruction, input, response):
    return [Message("user", instruction, input), Message("assistant", response)]


def write(folder, tokenizer, responses, max_seq_length=512, too_long="truncate"):
    items = [("train", [turns("Say", "", response)]) for response in responses]
    style = prompt_style("none", tokenizer)
    items.append(("validation", items[0][1]))
    return write_dataset(folder, items, tokenizer, style, max_seq_length, too_long, "test")


@pytest.mark.parametrize("style", ["none", "alpaca", "chat"])
def test_response_and_end_alone_are_scored(tokenizer, style):
    style = prompt_style(style, tokenizer)
    [example] = tokenize(tokenizer, style, [turns("Say hi", "now", "hi there")])
    scored, prompt = example.ids[example.scored].tolist(), example.ids[~example.scored].tolist()
    assert scored == [*tokenizer.encode("hi there"), style.end_id]
    assert tokenizer.decode(prompt, skip_special_tokens=False) == style.prompt("Say hi", "now")
    assert prompt == tokenizer.encode(style.prompt("Say hi", "now"))


def test_written_examples_come_back(tokenizer, tmp_path):
    write(tmp_path / "data", tokenizer, ["one", "two 🙂 words", "three"])
    dataset = TokenDataset(tmp_path / "data", "train", tokenizer)
    assert len(dataset) == 3
    for index, response in enumerate(["one", "two 🙂 words", "three"]):
        [(ids, scored)] = dataset[index]
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
    cut = TokenDataset(tmp_path / "cut", "train", tokenizer)[1][0]
    assert len(cut.ids) == window
    assert cut.ids[-1] != tokenizer.eos_id
    summary = write(tmp_path / "skip", tokenizer, [exact, long], window, "skip")["train"]
    assert (len(summary.lengths), summary.truncated, summary.skipped) == (1, 0, 1)
    with pytest.raises(ValueError, match=r"no train example is left \(1 too long\)"):
        write(tmp_path / "none", tokenizer, [long], max_seq_length=prompt)
    assert not (tmp_path / "none").exists()


def test_too_long_examples_are_reported(command, tmp_path, base_dir):
    rows = [{"instruction": "Say", "output": "word " * n} for n in (1, 2, 3, 400, 500, 6, 7, 8)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    paths = {"data_path": tmp_path / "a.json", "checkpoint_dir": base_dir, "validation_share": 0.4}
    _, _, err = command("scripts/prepare_alpaca.py", output_dir=tmp_path / "cut", max_seq_length=128, **paths)
    counts = [int(n) for n in re.findall(r"longer than the window: (\d+) truncated, 0 left out", err)]
    assert sum(counts) == 2
    _, _, err = command(
        "scripts/prepare_alpaca.py", output_dir=tmp_path / "skip", max_seq_length=128, too_long="skip", **paths
    )
    counts = [int(n) for n in re.findall(r"longer than the window: 0 truncated, (\d+) left out", err)]
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
    examples = tokenize(tokenizer, style, [turns("a", "", "b"), turns("a", "", "much longer text")])
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
        ("keys.json", b'[{"instruction": "a", "text": "b"}]', "example 1: expected turns under 'messages' or"),
        ("types.jsonl", b'{"instruction": {"a": 3}, "output": "b"}', "line 1: expected a text, found {'a': 3}"),
    ],
)
def test_bad_files(command, tmp_path, base_dir, name, content, message):
    (tmp_path / name).write_bytes(content)
    status, out, err = command(
        "scripts/prepare_alpaca.py",
        data_path=tmp_path / name,
        checkpoint_dir=base_dir,
        output_dir=tmp_path / "data",
        prompt_style="chat",
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
    assert "exists: choose another folder to write to, remove it, or replace it with --overwrite" in err
    assert (tmp_path / "data" / "precious").read_text() == "x"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "data"]


def test_split_is_seeded(tmp_path, base_dir, tokenizer):
    rows = [{"instruction": f"q{n}", "input": "", "output": f"a{n}"} for n in range(20)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    prepare = load_script("scripts/prepare_alpaca.py").main

    def validation(folder, seed):
        paths = {"checkpoint_dir": base_dir, "output_dir": tmp_path / folder}
        prepare(data_path=tmp_path / "a.json", validation_share=0.25, seed=seed, **paths)
        dataset = TokenDataset(tmp_path / folder, "validation", tokenizer)
        assert len(dataset) == 5
        return [dataset[i][0].ids.tolist() for i in range(5)]

    assert validation("one", 1) == validation("same", 1) != validation("other", 2)


QUESTION, ANSWER, WORSE = "1 + 2?", "three", "four"
OTHERS = {"1 + 2?": "5 + 6?", "1 2": "5 6", "three": "eleven", "four": "nine"}
SHAREGPT = [{"from": "human", "value": QUESTION}]
HH = "\n\nHuman: {}\n\nAssistant: {}"
SAFETY = {"is_response_0_safe": False, "is_response_1_safe": True, "safer_response_id": 1, "better_response_id": 0}
LAYOUTS = {  # name: script, record, prompt style; the first three have an input
    "alpaca": ("alpaca", {"instruction": "Add.", "input": "1 2", "output": ANSWER}, "alpaca"),
    "dolly": ("dolly", {"instruction": "Add.", "context": "1 2", "response": ANSWER, "category": "math"}, "alpaca"),
    "input": (
        "pairs",
        {"instruction": "Add.", "input": "1 2", "chosen": ANSWER, "rejected": WORSE},
        "chat",
    ),
    "metamath": ("metamath", {"query": QUESTION, "response": ANSWER, "type": "GSM_AnsAug"}, "metamath"),
    "gsm8k": ("metamath", {"question": QUESTION, "answer": ANSWER}, "metamath"),
    "openai": (
        "chat",
        {"messages": [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]},
        "chat",
    ),
    "sharegpt": ("chat", {"conversations": [*SHAREGPT, {"from": "gpt", "value": ANSWER}]}, "chat"),
    "hh": ("hh", {"chosen": HH.format(QUESTION, ANSWER), "rejected": HH.format(QUESTION, WORSE)}, "hh"),
    "beaver": ("beaver", {"prompt": QUESTION, "response_0": WORSE, "response_1": ANSWER, **SAFETY}, "beaver"),
    "pairs": ("pairs", {"prompt": QUESTION, "chosen": ANSWER, "rejected": WORSE}, "chat"),
    "orca": ("pairs", {"system": "", "question": QUESTION, "chosen": ANSWER, "rejected": WORSE}, "chat"),
    "sharegpt-pairs": (
        "pairs",
        {
            "conversations": SHAREGPT,
            "chosen": {"from": "gpt", "value": ANSWER},
            "rejected": {"from": "gpt", "value": WORSE},
        },
        "chat",
    ),
    "repeated-prompt": (
        "pairs",
        {
            "prompt": QUESTION,
            **{
                name: [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": answer}]
                for name, answer in (("chosen", ANSWER), ("rejected", WORSE))
            },
        },
        "chat",
    ),
    "implicit-prompt": (
        "pairs",
        {
            name: [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": answer}]
            for name, answer in (("chosen", ANSWER), ("rejected", WORSE))
        },
        "chat",
    ),
}
WITH_PAIRS = ("hh", "beaver", "pairs")


def prepare(script, rows, folder, base_dir, **options):
    folder.mkdir(exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"output_dir": folder / "data", "validation_share": 0.5, "checkpoint_dir": base_dir} | options
    load_script(f"scripts/prepare_{script}.py").main(data_path=folder / "rows.jsonl", **options)
    return folder / "data"


def scored_text(tokenizer, example):
    return tokenizer.decode(example.ids[example.scored].tolist())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(tmp_path, base_dir, tokenizer, layout):
    """Each layout comes out as prompt and responses."""
    script, row, style_name = LAYOUTS[layout]
    text = json.dumps(row)
    for old, new in OTHERS.items():
        text = text.replace(old, new)
    folder = prepare(script, [row, row, json.loads(text)], tmp_path, base_dir, validation_share=0.01)
    kind = "pairs" if script in WITH_PAIRS else "supervised"
    style = prompt_style(style_name, tokenizer)

    def found(split):
        dataset = TokenDataset(folder, split, tokenizer, kind=kind)
        assert dataset.header["prompt_style"] == style_name
        for i in range(len(dataset)):
            assert dataset.lengths[i] == sum(len(example.ids) for example in dataset[i])
            assert all(example.ids[-1] == style.end_id and example.scored[-1] for example in dataset[i])
            prompt = tokenizer.decode(dataset.prompt(i), skip_special_tokens=False)
            yield prompt, [scored_text(tokenizer, example).strip() for example in dataset[i]]

    first = style.prompt("Add.", "1 2") if "instruction" in row else style.prompt(QUESTION)
    second = style.prompt("Add.", "5 6") if "instruction" in row else style.prompt("5 + 6?")
    items = [(first, [ANSWER, WORSE])] * 2 + [(second, ["eleven", "nine"])]
    expected = [(prompt, answers if kind == "pairs" else answers[:1]) for prompt, answers in items]
    assert sorted([*found("train"), *found("validation")]) == sorted(expected)
    assert len(list(found("validation"))) == 1


@pytest.mark.parametrize("layout", ["hh", "beaver", "sharegpt-pairs"])
def test_chosen_answers_alone(tmp_path, base_dir, tokenizer, layout):
    script, row, _ = LAYOUTS[layout]
    folder = prepare(script, [row, row], tmp_path, base_dir, kind="supervised")
    [example] = TokenDataset(folder, "train", tokenizer)[0]
    assert scored_text(tokenizer, example).strip() == ANSWER
    with pytest.raises(ValueError, match=r"holds examples for supervised tuning, expected pairs .* --kind pairs"):
        TokenDataset(folder, "train", tokenizer, kind="pairs")
    pairs = prepare(script, [row, row], tmp_path / "pairs", base_dir)
    with pytest.raises(ValueError, match="holds pairs of a chosen and a rejected response, expected"):
        TokenDataset(pairs, "train", tokenizer)


def test_the_first_tokens_of_a_response_alone(tmp_path, base_dir, tokenizer):
    """Each response ends after so many tokens, and the prompt is whole; a shorter one keeps the token that ends it."""
    script, row, _ = LAYOUTS["pairs"]
    whole = TokenDataset(prepare(script, [row, row], tmp_path / "a", base_dir), "train", tokenizer, kind="pairs")
    lengths = [int(example.scored.sum()) for example in whole[0]]
    count = max(lengths) - 1
    assert count > 0
    folder = prepare(script, [row, row], tmp_path / "b", base_dir, max_response_tokens=count)
    for example, expected in zip(TokenDataset(folder, "train", tokenizer, kind="pairs")[0], whole[0], strict=True):
        end = int(expected.scored.argmax()) + count
        assert example.ids.tolist() == expected.ids[:end].tolist()
        assert example.scored.tolist() == expected.scored[:end].tolist()


def test_better_is_not_safer(tmp_path, base_dir, tokenizer):
    _, row, _ = LAYOUTS["beaver"]
    folder = prepare("beaver", [row, row], tmp_path, base_dir, chosen_by="better")
    chosen, rejected = TokenDataset(folder, "train", tokenizer, kind="pairs")[0]
    assert [scored_text(tokenizer, example).strip() for example in (chosen, rejected)] == [WORSE, ANSWER]


TURNS = [("system", "Be brief."), ("user", "one"), ("assistant", "uno"), ("user", "two"), ("assistant", "dos")]


def test_every_turn_of_the_assistant_is_scored(tmp_path, base_dir, tokenizer):
    """The ids are those of the chat template over the whole conversation; scored are the answers and their ends."""
    rows = [{"messages": [{"role": role, "content": content} for role, content in TURNS]}] * 2
    end = tokenizer.encode("<|end|>")
    for scored_turns, expected in (
        ("all", [*tokenizer.encode("uno"), *end, *tokenizer.encode("dos"), *end]),
        ("last", [*tokenizer.encode("dos"), *end]),
    ):
        folder = prepare("chat", rows, tmp_path / scored_turns, base_dir, scored_turns=scored_turns)
        [(ids, scored)] = TokenDataset(folder, "train", tokenizer)[0]
        text = "<|system|>Be brief.<|end|>\n<|user|>one<|end|>\n<|assistant|>uno<|end|>\n"
        text += "<|user|>two<|end|>\n<|assistant|>dos<|end|>"
        assert tokenizer.decode(ids.tolist(), skip_special_tokens=False) == text
        assert ids[scored].tolist() == expected


def test_pairs_score_the_last_turn(tmp_path, base_dir, tokenizer):
    dialogue = "\n\nHuman: one\n\nAssistant: uno\n\nHuman: two\n\nAssistant:"
    rows = [{"chosen": f"{dialogue} dos", "rejected": f"{dialogue} tres"}] * 2
    chosen, rejected = TokenDataset(prepare("hh", rows, tmp_path, base_dir), "train", tokenizer, kind="pairs")[0]
    assert scored_text(tokenizer, chosen) == " dos"
    assert scored_text(tokenizer, rejected) == " tres"
    text = tokenizer.decode(chosen.ids.tolist(), skip_special_tokens=False)
    assert text == "\n\nHuman: one\n\nAssistant: uno<|end|>\n\nHuman: two\n\nAssistant: dos<|end|>"


def test_a_pair_is_cut_or_left_out_whole(command, tmp_path, base_dir):
    rows = [{"prompt": f"{n}", "chosen": "a", "rejected": "b " * (100 if n == 3 else 1)} for n in range(8)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    paths = {"data_path": tmp_path / "a.jsonl", "checkpoint_dir": base_dir, "max_seq_length": 64}
    _, _, err = command("scripts/prepare_pairs.py", output_dir=tmp_path / "skip", too_long="skip", **paths)
    assert "train: 6 pairs" in err
    assert "longer than the window: 0 truncated, 1 left out" in err
    _, _, err = command("scripts/prepare_pairs.py", output_dir=tmp_path / "cut", **paths)
    assert "train: 7 pairs" in err
    assert "longer than the window: 1 truncated, 0 left out" in err


@pytest.mark.parametrize(
    ("script", "row", "message"),
    [
        ("alpaca", {"instruction": "a", "output": " "}, "1 record left out: without a response"),
        ("alpaca", {"instruction": "", "output": "b"}, "1 record left out: without a prompt"),
        (
            "hh",
            {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: d"},
            "different prompts",
        ),
        (
            "hh",
            {"chosen": "\n\nHuman: a", "rejected": "\n\nHuman: a"},
            "the last turn of 'chosen' is not the assistant's",
        ),
        ("pairs", {"prompt": "a", "chosen": "b", "rejected": " b"}, "chosen and rejected are the same"),
        ("pairs", {"prompt": "a", "chosen": "b", "rejected": ""}, "without a response"),
        ("alpaca", {"instruction": "a", "output": None}, "without a response"),
        ("alpaca", {"instruction": "a", "output": float("nan")}, "without a response"),
        ("chat", {"messages": [{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}]}, "calls of tools"),
        (
            "chat",
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]},
            "without a response that is scored",
        ),
        ("chat", {"messages": [{"role": "user", "content": "a"}]}, "without an answer of the assistant"),
        ("chat", {"messages": [{"role": "assistant", "content": "a"}]}, "without an answer of the assistant to a user"),
        ("alpaca", {"instruction": "a \ud83d", "output": "b"}, "with a lone surrogate"),
        (
            "beaver",
            {"prompt": "a", "response_0": "b", "response_1": "c", **SAFETY, "is_response_1_safe": False},
            "without a safe answer",
        ),
    ],
)
def test_what_is_left_out_is_counted(command, tmp_path, base_dir, script, row, message):
    sound = next(sound for name, sound, _ in LAYOUTS.values() if name == script)
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, [sound, row, sound])))
    paths = {"data_path": tmp_path / "a.jsonl", "checkpoint_dir": base_dir, "output_dir": tmp_path / "data"}
    status, _, err = command(f"scripts/prepare_{script}.py", **paths)
    assert status == 0, err
    assert "1 record left out: " in err
    assert message in err


@pytest.mark.parametrize(
    ("script", "row", "message"),
    [
        ("chat", {"text": "a"}, "line 1: expected turns under 'messages' or 'conversations', or an answer under"),
        (
            "chat",
            {"messages": [{"role": "narrator", "content": "a"}]},
            "line 1: unknown role 'narrator'; there are system",
        ),
        (
            "hh",
            {"chosen": "hi", "rejected": "ho"},
            "line 1: expected whole conversations under 'chosen' and 'rejected'",
        ),
        ("hh", {"chosen": 1}, "line 1: expected an answer or turns under 'rejected'"),
        ("beaver", {"prompt": "a", "safer_response_id": 2}, "expected 0 or 1 under 'safer_response_id', found 2"),
        ("beaver", {"prompt": "a", "safer_response_id": 1}, "expected true or false under 'is_response_0_safe'"),
        ("pairs", {"prompt": "a", "chosen": "b"}, "expected an answer or turns under 'rejected'"),
        ("pairs", {"prompt": "a", "chosen": SHAREGPT, "rejected": "c"}, "has 0 usable examples, expected at least 2"),
        ("pairs", {"prompt": "a", "chosen": [[]], "rejected": "c"}, "expected a part of a text, found []"),
        (
            "pairs",
            {name: [*SHAREGPT, {"from": "gpt", "value": name}] for name in ("chosen", "rejected")} | {"prompt": "a"},
            "expected one answer each under 'chosen' and 'rejected', or the prompt and an answer",
        ),
    ],
)
def test_malformed_records_are_refused(command, tmp_path, base_dir, script, row, message):
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    paths = {
        "data_path": tmp_path / "a.jsonl",
        "checkpoint_dir": base_dir,
        "output_dir": tmp_path / "data",
        "prompt_style": "chat",
    }
    status, out, err = command(f"scripts/prepare_{script}.py", **paths)
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert message in err
    assert not (tmp_path / "data").exists()


def test_records_that_cannot_be_used_are_left_out(command, tmp_path, base_dir):
    """A line that is not JSON, an unknown layout, a record that the template refuses: counted, with their places."""
    base = tmp_path / "base"
    shutil.copytree(base_dir, base)
    settings = json.loads((base / "tokenizer_config.json").read_text())
    template = settings.pop("chat_template", None) or (base / "chat_template.jinja").read_text()
    refusal = "{% if messages|length > 1 and messages[1].role == 'user' %}{{ raise_exception('two users') }}{% endif %}"
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    (base / "chat_template.jinja").write_text(refusal + template)
    sound = [json.dumps({"messages": [{"role": "user", "content": f"q{n}"}, OPENAI_ANSWER]}) for n in range(6)]
    refused = json.dumps({"messages": [{"role": "user", "content": "q"}] * 2 + [OPENAI_ANSWER]})
    lines = [sound[0], '{"messages": ', sound[1], '{"text": "x"}', refused, "3", *sound[2:]]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    paths = {"data_path": tmp_path / "a.jsonl", "checkpoint_dir": base}
    status, _, err = command("scripts/prepare_chat.py", output_dir=tmp_path / "data", **paths)
    assert status == 0, err
    assert "a.jsonl, line 2: not JSON (Expecting value)" in err
    assert "a.jsonl, line 4: expected turns under" in err
    assert "a.jsonl, line 5: the model's chat template failed: two users" in err
    assert "line 6" not in err  # the first are shown
    assert "4 records left out as unusable" in err
    assert "train: 5 examples" in err
    for options, message in (
        ({"strict": True}, "a.jsonl, line 2: not JSON"),
        (
            {"max_bad_share": 0.3},
            "4 of 10 records of a.jsonl cannot be used, more than --max_bad_share 0.3; the first: ",
        ),
    ):
        status, _, err = command("scripts/prepare_chat.py", output_dir=tmp_path / "no", **paths, **options)
        assert (status, err.count("\n")) == (1, 1)
        assert message in err
        assert not (tmp_path / "no").exists()


OPENAI_ANSWER = {"role": "assistant", "content": "yes"}


def test_empty_answers_and_weight_0_are_not_scored(tmp_path, base_dir, tokenizer):
    """They stand in the text, as the model will meet them, but neither they nor their ends are learned."""
    turns = [("user", "one"), ("assistant", ""), ("user", "two"), ("assistant", "dos"), ("user", "three")]
    messages = [{"role": role, "content": content} for role, content in turns]
    rows = [{"messages": [*messages, {**OPENAI_ANSWER, "weight": 0}, messages[0], {**OPENAI_ANSWER, "weight": 1}]}] * 2
    [(ids, scored)] = TokenDataset(prepare("chat", rows, tmp_path, base_dir), "train", tokenizer)[0]
    end = tokenizer.encode("<|end|>")
    assert ids[scored].tolist() == [*tokenizer.encode("dos"), *end, *tokenizer.encode("yes"), *end]
    text = tokenizer.decode(ids.tolist(), skip_special_tokens=False)
    assert text.count("<|end|>") == 8
    assert "<|assistant|><|end|>" in text


def test_columns_without_use_are_named(command, tmp_path, base_dir):
    rows = [{**LAYOUTS["openai"][1], "tools": [{"name": "w"}] if n < 3 else None} for n in range(5)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    paths = {"data_path": tmp_path / "a.json", "checkpoint_dir": base_dir, "output_dir": tmp_path / "data"}
    _, _, err = command("scripts/prepare_chat.py", **paths)
    assert "3 records: the column 'tools' is not used" in err


def test_equal_pairs_and_repeated_answers_are_counted(command, tmp_path, base_dir):
    rows = [{"prompt": f"{n}", "chosen": "w " * (80 if n < 3 else 2) + "a", "rejected": "w " * 80} for n in range(12)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    paths = {"data_path": tmp_path / "a.jsonl", "checkpoint_dir": base_dir, "max_seq_length": 64}
    _, _, err = command("scripts/prepare_pairs.py", output_dir=tmp_path / "data", validation_share=0.4, **paths)
    equal = re.findall(r"(\d+) pairs? left out: chosen and rejected are equal within the window", err)
    assert sum(map(int, equal)) == 3
    assert re.search(r"validation: (\d) of \1 answers also stand in the training split, 0 of them with the same", err)
    assert "repeat another" not in err
    rows = [{"instruction": f"Say {n % 6}", "output": f"x{n % 6}"} for n in range(12)]
    (tmp_path / "b.json").write_text(json.dumps(rows))
    paths = {"data_path": tmp_path / "b.json", "checkpoint_dir": base_dir}
    _, _, err = command("scripts/prepare_alpaca.py", output_dir=tmp_path / "b", validation_share=0.1, **paths)
    assert "validation: 1 of 1 answers also stand in the training split, 1 of them with the same prompt" in err
    (tmp_path / "c.json").write_text(json.dumps(rows[:6]))
    paths["data_path"] = tmp_path / "c.json"
    _, _, err = command("scripts/prepare_alpaca.py", output_dir=tmp_path / "c", **paths)
    assert "also stand" not in err


def test_styles_for_one_turn_refuse_conversations(command, tmp_path, base_dir):
    rows = [{"messages": [{"role": role, "content": content} for role, content in TURNS]}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    paths = {"data_path": tmp_path / "a.json", "checkpoint_dir": base_dir, "output_dir": tmp_path / "data"}
    _, _, err = command("scripts/prepare_chat.py", prompt_style="alpaca", **paths)
    assert (
        "example 1: the prompt style alpaca has place for one instruction, not for the turns system, user: use" in err
    )
    _, _, err = command("scripts/prepare_chat.py", prompt_style="hh", **paths)
    assert "example 1: this prompt style has no place for a system message: use chat" in err


def test_gzipped_files_in_a_folder(tmp_path, base_dir, tokenizer):
    row = {"instruction": "Add.", "input": "1 2", "output": "3"}
    (tmp_path / "raw").mkdir()
    with gzip.open(tmp_path / "raw" / "a.jsonl.gz", "wt", encoding="utf-8-sig") as file:
        file.write(f"{json.dumps(row)}\n" * 2)
    with gzip.open(tmp_path / "raw" / "b.json.gz", "wt", encoding="utf-8-sig") as file:
        json.dump([row, row], file)
    paths = {"output_dir": tmp_path / "data", "checkpoint_dir": base_dir}
    load_script("scripts/prepare_alpaca.py").main(data_path=tmp_path / "raw", validation_share=0.25, **paths)
    assert len(TokenDataset(tmp_path / "data", "train", tokenizer)) == 3


def test_conversation_that_the_assistant_opens(tmp_path, base_dir, tokenizer):
    """What it says before the user answers nothing and is left away."""
    rows = [{"conversations": [{"from": "bing", "value": "Hello!"}, *SHAREGPT, {"from": "gpt", "value": ANSWER}]}] * 2
    dataset = TokenDataset(prepare("chat", rows, tmp_path, base_dir), "train", tokenizer)
    style = prompt_style("chat", tokenizer)
    assert dataset.prompt(0) == tokenizer.encode(style.prompt(QUESTION))
    assert scored_text(tokenizer, dataset[0][0]) == ANSWER


def test_another_template_is_refused(tmp_path, base_dir, tokenizer):
    folder = prepare("chat", [LAYOUTS["openai"][1]] * 2, tmp_path, base_dir)
    other = Tokenizer(base_dir)
    assert other.chat_template is not None
    other.chat_template = other.chat_template.replace("<|user|>", "<|user|>\n").replace("'<|' +", "'<|>' +")
    with pytest.raises(ValueError, match="prepared with another chat template or another token"):
        TokenDataset(folder, "train", other)
    header = json.loads((folder / "dataset.json").read_text())
    for damage, message in (({"kind": "triples"}, "lacks splits or a known kind"), ({}, "lacks splits")):
        broken = {**header, **damage} if damage else {k: v for k, v in header.items() if k != "splits"}
        (folder / "dataset.json").write_text(json.dumps(broken))
        with pytest.raises(ValueError, match=message):
            TokenDataset(folder, "train", tokenizer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": -1}, "--seed is -1, it must be at least 0"),
        ({"max_seq_length": 1}, "--max_seq_length is 1, it must be at least 2"),
        ({"max_response_tokens": 0}, "--max_response_tokens is 0, it must be at least 1"),
        ({"validation_share": 1}, "--validation_share is 1.0, it must lie between 0 and 1"),
        ({"kind": "pairs"}, "unrecognized arguments: --kind=pairs"),
        ({"prompt_style": "shout"}, "no prompt style named 'shout'"),
        ({"data_path": "nowhere.json"}, "nowhere.json: no such file"),
    ],
)
def test_bad_options_of_preparation(command, tmp_path, base_dir, options, message):
    (tmp_path / "a.jsonl").write_text('{"instruction": "a", "output": "b"}\n' * 4)
    paths = {"data_path": tmp_path / "a.jsonl", "checkpoint_dir": base_dir, "output_dir": tmp_path / "data"}
    status, out, err = command("scripts/prepare_alpaca.py", **({"prompt_style": "chat"} | paths | options))
    assert (status != 0, out, err.count("\n")) == (True, "", 1)
    assert message in err
    assert not (tmp_path / "data").exists()


def test_records_are_read_one_at_a_time(tmp_path):
    """A long file is not parsed before its first record is given out."""
    (tmp_path / "a.json").write_text(json.dumps([{"n": n, "x": "y" * 1000} for n in range(1000)])[:-1] + ", broken")
    records = read_records(tmp_path / "a.json")
    assert next(records) == (f"{tmp_path / 'a.json'}, example 1", {"n": 0, "x": "y" * 1000})
    with pytest.raises(ValueError, match=r"a\.json, line 1: not JSON"):
        list(records)


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
    status, _, err = command(
        "scripts/prepare_dolly.py", prompt_style="chat", checkpoint_dir=base_dir, output_dir=tmp_path / "data"
    )
    assert (status, err.count("\n")) == (1, 1)
    assert "databricks-dolly-15k cannot be fetched from the Hugging Face hub (name resolution failed)" in err
    assert "give a local copy of databricks-dolly-15k.jsonl as --data_path" in err


def test_datasets_are_asked_for():
    """In a process that has imported nothing else: the hub's client imports its parts as they are used."""
    code = (
        "import huggingface_hub; from lit_llama.script.prepare import fetch_dataset\n"
        "huggingface_hub.hf_hub_download = lambda *asked, **_: '-'.join(asked)\n"
        "print(*fetch_dataset('who/what', ['a.json', 'b.json']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "who/what-a.json who/what-b.json\n"


def test_broken_gzip_and_empty_folder(command, tmp_path, base_dir):
    whole = gzip.compress(b'{"instruction": "a", "output": "b"}\n' * 50)
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty").mkdir()
    for path, message in (("cut.jsonl.gz", "is not a complete gzip file"), ("empty", "holds no .json, .jsonl")):
        paths = {
            "data_path": tmp_path / path,
            "checkpoint_dir": base_dir,
            "output_dir": tmp_path / "data",
            "prompt_style": "chat",
        }
        status, _, err = command("scripts/prepare_alpaca.py", **paths)
        assert (status, err.count("\n")) == (1, 1)
        assert message in err


def test_any_table_of_instructions(command, tmp_path, base_dir, tokenizer):
    """Columns of any names, which need not be those that a layout knows."""
    rows = [{"q": f"Count to {n}.", "about": "slowly", "who": "You count.", "a": n, "question": "no"} for n in range(9)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"data_path": tmp_path / "a.jsonl", "checkpoint_dir": base_dir, "output_dir": tmp_path / "data"}
    columns = {"instruction_column": "q", "response_column": "a", "input_column": "about", "system_column": "who"}
    status, _, err = command("scripts/prepare_instructions.py", **options, **columns)
    assert status == 0, err
    assert "9 records: the column 'question' is not used" in err
    train = TokenDataset(tmp_path / "data", "train", tokenizer)
    texts = [tokenizer.decode(train[i][0].ids.tolist()) for i in range(len(train))]
    assert len(texts) == 8
    assert all("You count." in text and "Count to" in text and "slowly" in text for text in texts)
    columns["response_column"] = "answer"
    status, _, err = command("scripts/prepare_instructions.py", "--overwrite", **options, **columns)
    assert status == 1
    assert "expected a column named 'answer', found ['a', 'about', 'q', 'question', 'who']" in err


def test_rows_of_one_length_for_a_benchmark(base_dir, data_dir):
    """The examples one after the other, and again from the first, cut into rows."""
    train, _ = open_data(base_dir, data_dir, 512)[1]
    rows = load_script("benchmarks/training.py").equal_rows(train, 7, 50)
    assert [len(row.ids) for row in rows] == [7] * 50
    ids, scored = (np.concatenate([part[i] for j in range(len(train)) for part in train[j]]) for i in (0, 1))
    assert np.array_equal(np.concatenate([row.ids for row in rows]), np.resize(ids, 350))
    assert np.array_equal(np.concatenate([row.scored for row in rows]), np.resize(scored, 350))
