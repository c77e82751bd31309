"""Distillation against transformers' distributions, and the teacher's answers on disk."""

import contextlib
import csv
import json
import shutil

import pytest
import torch
import training_process
import transformers
from conftest import load_script, make_hf_checkpoint, random_aligner

from lit_llama.adapters import adapter_info, load_adapter, save_adapter
from lit_llama.checkpoint import load_base, read_config
from lit_llama.data import TokenDataset
from lit_llama.locks import turn
from lit_llama.losses import distillation_loss
from lit_llama.script.questions import read_questions
from lit_llama.states import last_state
from lit_llama.tokenizer import Tokenizer

QUESTIONS = [f"What is {n} and {n}?" for n in range(1, 13)]
PROMPT = "Answer as a very old clock would."
TURNS = [
    {"role": "system", "content": PROMPT},
    {"role": "user", "content": "Hm?"},
    {"role": "assistant", "content": "Tick, tock."},
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    (folder / "prompt.txt").write_text(f"{PROMPT}\n")
    (folder / "turns.json").write_text(json.dumps(TURNS))
    (folder / "questions.txt").write_text("\n".join(QUESTIONS))
    return folder


@pytest.fixture
def options(base_dir, files, tmp_path):
    sizes = {"batch_size": 4, "micro_batch_size": 2, "max_steps": 4, "warmup_steps": 1, "eval_interval": 2}
    sizes |= {"max_new_tokens": 12, "asked": 2, "answer_batch_size": 4, "validation_share": 0.25}
    paths = {"checkpoint_dir": base_dir, "questions_file": files / "questions.txt", "data_dir": tmp_path / "data"}
    return {**paths, **sizes, "out_dir": tmp_path / "out", "system_prompt_file": files / "prompt.txt"}


@pytest.fixture
def distil(options):
    def call(**changes):
        load_script("finetune/aligner_distill.py").main(**{**options, **changes})

    return call


def taught(folder, tokenizer, split="train"):
    [data] = folder.glob("tokens-*")
    return TokenDataset(data, split, tokenizer, kind="distillation")


def metrics(out_dir):
    with open(out_dir / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_the_first_validation_is_what_transformers_says(distil, options, hf_checkpoint, files, capsys):
    """Divergence and agreement of the base without and with the prompt, by hand, from the text on."""
    distil(max_steps=1, system_prompt_file=files / "turns.json")
    model = transformers.AutoModelForCausalLM.from_pretrained(hf_checkpoint)
    tokenizer = transformers.AutoTokenizer.from_pretrained(hf_checkpoint)
    [kept] = options["data_dir"].glob("answers-*.jsonl")
    divergence = agreement = count = 0
    for row in map(json.loads, kept.read_text().splitlines()):
        *asked, answer = row["messages"]
        if row["split"] == "train" or not answer["content"].strip():
            continue
        answer_ids = tokenizer(answer["content"] + ("<|end|>" if row["complete"] else ""))["input_ids"]
        logits = []
        for before in ([], TURNS):
            prompt = tokenizer.apply_chat_template([*before, *asked], add_generation_prompt=True, tokenize=False)
            ids = torch.tensor([tokenizer(prompt)["input_ids"] + answer_ids])
            with torch.no_grad():
                logits.append(model(ids).logits[0, -len(answer_ids) - 1 : -1])
        student, teacher = (torch.distributions.Categorical(logits=some) for some in logits)
        divergence += torch.distributions.kl_divergence(teacher, student).sum().item()
        agreement += (student.logits.argmax(-1) == teacher.logits.argmax(-1)).sum().item()
        count += len(answer_ids)
    first = metrics(options["out_dir"])[0]
    assert float(first["validation_loss"]) == pytest.approx(divergence / count, rel=1e-4)
    assert float(first["validation_agreement"]) == pytest.approx(agreement / count, rel=1e-4)


@pytest.mark.parametrize("pack", [False, True])
def test_loss_and_gradient_are_those_of_whole_logits(distil, options, base_dir, pack):
    distil(max_steps=1)
    model, student, teacher = load_base(base_dir), random_aligner(read_config(base_dir), 2), None
    data = taught(options["data_dir"], Tokenizer(base_dir))
    sums = distillation_loss(model, student, teacher, *data.batch([0, 3, 5], pack).of_two())
    sums.metrics["loss"].backward()
    gradient, student.tokens.grad = student.tokens.grad, None
    loss = count = 0
    for i in (0, 3, 5):
        logits = []
        for example, adapter in zip(data[i], (student, teacher), strict=True):
            ids = torch.from_numpy(example.ids.astype(int))[None]
            logits.append(model(ids, adapter)[0, :-1][torch.from_numpy(example.scored[1:])])
        target, found = logits[1].log_softmax(-1), logits[0].log_softmax(-1)
        loss += (target.exp() * (target - found)).sum()
        count += len(target)
    loss.backward()
    assert sums.count == count
    torch.testing.assert_close(sums.metrics["loss"], loss.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradient, student.tokens.grad, rtol=1e-3, atol=1e-4)


def test_an_answer_that_was_cut_does_not_teach_to_end(distil, options, base_dir, files):
    rows = [
        {"question": "One?", "answer": "It is one.", "split": "train"},
        {"question": "Two?", "answer": "It is two and", "split": "train", "complete": False},
        {"question": "Three?", "answer": "It is three.", "split": "validation"},
    ]
    (files / "given.jsonl").write_text("\n".join(map(json.dumps, rows)))
    distil(max_steps=1, questions_file=files / "given.jsonl", take_answers=True)
    tokenizer = Tokenizer(base_dir)
    data = taught(options["data_dir"], tokenizer)
    scored = [[one.ids[one.scored].tolist() for one in data[i]] for i in range(len(data))]
    assert [tokenizer.decode(ids) for ids, _ in scored] == ["It is one.", "It is two and"]
    assert all(ids == of_teacher for ids, of_teacher in scored)
    assert [ids[-1] == tokenizer.eos_id for ids, _ in scored] == [True, False]
    assert not list(options["data_dir"].glob("answers-*"))


def test_answers_are_kept_for_what_made_them(distil, options, files, capsys):
    distil(max_steps=1)
    said = capsys.readouterr().err
    assert "answers 12 of 12" in said
    [kept] = options["data_dir"].glob("answers-*.jsonl")
    text = kept.read_text()
    cut = sum(not json.loads(line)["complete"] for line in text.splitlines())
    assert f"{cut} of 12 answers are cut at --max_new_tokens 12, and do not teach to end there\n" in said
    kept.write_text(text[: len(text) // 2])  # as a killed run leaves it
    distil(max_steps=1, learning_rate=1e-2)
    said = capsys.readouterr().err
    assert "answers 7 of 12" in said or "answers 6 of 12" in said
    assert sorted(kept.read_text().splitlines()) == sorted(text.splitlines())
    (files / "other.txt").write_text("Answer as a very young clock would.")
    for changes in ({"temperature": 0.5}, {"system_prompt_file": files / "other.txt"}):
        distil(max_steps=1, **changes)
        assert "answers 12 of 12" in capsys.readouterr().err
    assert len(list(options["data_dir"].glob("answers-*.jsonl"))) == 3


def test_several_answers_to_a_question(distil, options, base_dir):
    distil(max_steps=1, answers=3, temperature=1.5)
    [kept] = options["data_dir"].glob("answers-*.jsonl")
    rows = list(map(json.loads, kept.read_text().splitlines()))
    assert len(rows) == 36
    assert len({row["messages"][-1]["content"] for row in rows}) > 24
    of_split = {split: {row["messages"][0]["content"] for row in rows if row["split"] == split} for split in
                ("train", "validation")}  # fmt: skip
    assert not of_split["train"] & of_split["validation"]
    learned = [row for row in rows if row["split"] == "train" and row["messages"][-1]["content"].strip()]
    assert len(taught(options["data_dir"], Tokenizer(base_dir))) == len(learned) > 20


def test_resumed_to_the_bit(distil, tmp_path):
    distil(out_dir=tmp_path / "whole")
    distil(out_dir=tmp_path / "parts", save_interval=1)
    for state in (tmp_path / "parts").glob("state-*4.pt"):
        state.unlink()
    assert last_state(tmp_path / "parts")
    distil(out_dir=tmp_path / "parts", save_interval=1, resume=True)
    whole, parts = (load_adapter(tmp_path / name).state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_two_processes_that_share_the_base_do_what_one_does(distil, options, tmp_path):
    distil()
    one = metrics(options["out_dir"])
    options |= {"out_dir": tmp_path / "two", "data_dir": tmp_path / "data of two", "devices": 2, "shard_base": "true"}
    arguments = [f"--{name}={value}" for name, value in options.items()]
    first, second = training_process.run_script("finetune/aligner_distill.py", *arguments, processes=2)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr[-2000:]
    assert "held-out question" in first.stdout
    assert second.stdout == ""
    for row, row_of_two in zip(one, metrics(tmp_path / "two"), strict=True):
        for name in ("train_loss", "validation_loss"):
            if row[name]:
                assert float(row_of_two[name]) == pytest.approx(float(row[name]), rel=1e-3)


def test_a_teacher_of_adapters_is_learned(distil, options, base_dir, capsys, tmp_path):
    """A bias learns an Aligner of one token, which is one, whatever the data set of questions."""
    base = load_base(base_dir)
    save_adapter(tmp_path / "teacher.safetensors", random_aligner(base.config, 1), base, prompt_style="chat")
    distil(
        system_prompt_file=None, teacher_adapter=[tmp_path / "teacher.safetensors"], teacher_scale=[8.0], method="bias",
        max_steps=60, eval_interval=60, learning_rate=3e-2, matches="[aeiou]",
    )  # fmt: skip
    rows = metrics(options["out_dir"])
    assert float(rows[-1]["validation_loss"]) < 0.1 * float(rows[0]["validation_loss"])
    report = capsys.readouterr().out
    assert (options["out_dir"] / "report.txt").read_text() == report
    for words in ("in the form, student", "of 2", "0 tokens, 0 bytes of cache", "nats per token before", "teacher"):
        assert words in report
    assert "the prompt's cost" not in report  # there is no prompt
    cost = json.loads((options["out_dir"] / "report.json").read_text())["cost"]
    assert cost["teacher"]["tokens"] == cost["student"]["tokens"]


def test_the_report_counts_what_the_prompt_costs(distil, options, base_dir, capsys):
    distil(max_steps=1)
    tokenizer, config = Tokenizer(base_dir), read_config(base_dir)
    tokens = len(tokenizer.encode(f"<|system|>{PROMPT}<|end|>\n"))
    size = tokens * 2 * config.n_layer * config.n_kv_head * config.head_size * 4
    assert f"{tokens} tokens, {size:,} bytes of cache" in capsys.readouterr().out


def test_a_lora_learns_at_the_rate_of_a_lora(distil, options):
    """The rate that was taken is what the adapter's file and the table of metrics say."""
    distil(max_steps=1, method="lora", decay="none", warmup_steps=0)
    assert adapter_info(options["out_dir"]).hyperparameters["learning_rate"] == 3e-3
    assert float(metrics(options["out_dir"])[1]["learning_rate"]) == 3e-3


def test_prompts_of_a_prepared_data_set_are_asked(distil, options, base_dir, tmp_path):
    rows = [{"instruction": question, "output": "?"} for question in QUESTIONS]
    (tmp_path / "alpaca.json").write_text(json.dumps(rows))
    load_script("scripts/prepare_alpaca.py").main(
        data_path=tmp_path / "alpaca.json", checkpoint_dir=base_dir, output_dir=tmp_path / "prepared",
        prompt_style="chat", validation_share=0.25,
    )  # fmt: skip
    distil(max_steps=1, questions_file=tmp_path / "prepared")
    [kept] = options["data_dir"].glob("answers-*.jsonl")
    rows = list(map(json.loads, kept.read_text().splitlines()))
    assert sorted(row["messages"][0]["content"] for row in rows) == sorted(QUESTIONS)
    assert sum(row["split"] == "validation" for row in rows) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"system_prompt_file": ""}, "prompt.txt is empty; expected a system prompt"),
        ({"system_prompt_file": "word " * 400}, "no question of the split 'train' leaves room for an answer"),
        ({"questions_file": "Hm?\nHm?\n"}, "has 1 questions; expected at least 2"),
        ({"questions_file": "\n\n"}, "holds no prompt"),
        ({"answers": 2}, "--answers 2 with --temperature 0 repeats one answer"),
        ({"max_new_tokens": 0, "asked": 0}, "--max_new_tokens is 0, it must be at least 1; --asked is 0"),
        ({"answer_batch_size": 0}, "--answer_batch_size is 0, it must be at least 1"),
        ({"take_answers": True, "answers": 5}, "--take_answers takes all answers of the file, so --answers and"),
        ({"take_answers": True, "temperature": 0.9}, "--take_answers takes all answers of the file, so --answers and"),
        ({"validation_share": 1}, "--validation_share is 1"),
        ({"method": "lora", "aligner_length": 9}, "--aligner_length is the length of an Aligner, and --method is lora"),
        ({"matches": "("}, "not a regular expression"),
        ({"teacher_scale": 0.5}, "there is a scale but no adapter"),
    ],
)
def test_bad_requests(command, options, tmp_path, changes, message):
    for name in ("system_prompt_file", "questions_file"):
        if name in changes:
            (tmp_path / "prompt.txt").write_text(changes[name])
            changes = {**changes, name: tmp_path / "prompt.txt"}
    status, out, err = command("finetune/aligner_distill.py", **{**options, **changes})
    assert (status, out) == (1, "")
    assert message in err
    assert "Traceback" not in err


def test_bad_requests_about_the_teacher(command, options, base_dir, tmp_path):
    del options["system_prompt_file"]
    status, _, err = command("finetune/aligner_distill.py", **options)
    assert status == 1
    assert "the base model alone has nothing to teach" in err
    other = load_base(base_dir)
    other.fingerprint = "another"
    save_adapter(tmp_path / "other.safetensors", random_aligner(other.config, 1), other, prompt_style="chat")
    status, _, err = command("finetune/aligner_distill.py", **options, teacher_adapter=tmp_path / "other.safetensors")
    assert status == 1
    assert "whose weights are not those of" in err


def test_a_base_without_a_chat_template_has_no_place_for_a_prompt(command, options, tmp_path):
    (tmp_path / "hf").mkdir()
    make_hf_checkpoint(tmp_path / "hf")
    for file in (tmp_path / "hf").glob("*"):
        if file.name == "chat_template.jinja":
            file.unlink()
        elif file.name == "tokenizer_config.json":
            settings = json.loads(file.read_text())
            settings.pop("chat_template", None)
            file.write_text(json.dumps(settings))
    load_script("scripts/convert_hf_checkpoint.py").main(checkpoint_dir=tmp_path / "hf", output_dir=tmp_path / "base")
    status, _, err = command("finetune/aligner_distill.py", **{**options, "checkpoint_dir": tmp_path / "base"})
    assert status == 1
    assert "no chat template, and so no place for a system prompt" in err


def test_questions_that_repeat_are_asked_once(distil, options, files, capsys):
    (files / "twice.txt").write_text("\n".join([*QUESTIONS, *QUESTIONS[:5]]))
    distil(max_steps=1, questions_file=files / "twice.txt")
    err = capsys.readouterr().err
    assert "5 questions repeat an earlier one and are asked once" in err
    assert "answers 12 of 12" in err


def test_answers_to_one_question_do_not_repeat_it(base_dir, tmp_path, capsys):
    rows = [{"question": asked, "answer": answer} for asked in ("One?", "Two?") for answer in ("a", "b", "a")]
    (tmp_path / "given.jsonl").write_text("\n".join(map(json.dumps, rows)))
    questions = read_questions(tmp_path / "given.jsonl", Tokenizer(base_dir), answered=True)
    assert [[answer.text for answer in one.answers] for one in questions] == [["a", "b"]] * 2
    assert capsys.readouterr().err.endswith("2 answers repeat an earlier one and are learned once\n")


def test_questions_that_are_too_long_are_in_no_split(distil, options, tmp_path, capsys):
    """Neither in training nor in the report, which asks those of validation if no question of the test is left."""
    long = "word " * 80  # 240 tokens in a window of 256
    rows = [{"question": long + split, "split": split} for split in ("train", "validation", "test")]
    rows += [{"question": f"Who {verb}?", "split": "train"} for verb in ("is it", "was it", "will it be")]
    rows += [{"question": f"Who {verb}?", "split": "validation"} for verb in ("came", "went")]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    distil(max_steps=1, questions_file=tmp_path / "questions.jsonl")
    out, err = capsys.readouterr()
    assert "left out, as they are too long for the model's window: 3 of " in err
    report = json.loads((options["out_dir"] / "report.json").read_text())
    assert [row["question"] for row in report["answers"]] == ["Who came?", "Who went?"]
    assert f"generate/aligner.py --checkpoint_dir {options['checkpoint_dir']} --adapter_path" in out


def test_a_run_waits_for_another_with_the_same_teacher(distil, options, monkeypatch, capsys):
    """Each of two runs that are started together would ask the teacher all questions; the second takes the answers."""
    distil(max_steps=1)
    [kept] = options["data_dir"].glob("answers-*.jsonl")
    answers = kept.read_text()
    kept.write_text("")
    other_run = contextlib.ExitStack()
    other_run.enter_context(turn(kept.with_name(f".{kept.stem}.lock"), before_waiting=pytest.fail))

    def other_run_ends(seconds):
        kept.write_text(answers)
        other_run.close()

    monkeypatch.setattr("lit_llama.locks.time.sleep", other_run_ends)
    capsys.readouterr()
    distil(max_steps=1)
    err = capsys.readouterr().err
    assert f"another run is writing {kept}, which this one uses too: waiting for it" in err
    assert "the teacher answers" not in err
    assert kept.read_text() == answers


def test_a_teacher_that_thinks_is_told_not_to(distil, options, base_dir, tmp_path):
    """The prompt style is that of the teacher, of the student's data and of the adapter."""
    base = shutil.copytree(base_dir, tmp_path / "thinks")
    template = base / "chat_template.jinja"
    thought = "<think>\n\n</think>\n\n"
    switch = "{% if add_generation_prompt and enable_thinking is false %}" + thought + "{% endif %}"
    template.write_text(template.read_text() + switch.replace("is false", "is defined and not enable_thinking"))
    rows = [{"question": question, "answer": "Tick."} for question in QUESTIONS]
    (tmp_path / "given.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options |= {"checkpoint_dir": base, "questions_file": tmp_path / "given.jsonl", "take_answers": True}
    distil(**{**options, "max_steps": 1, "prompt_style": "chat-thinking-off"})
    tokenizer = Tokenizer(base)
    data = taught(options["data_dir"], tokenizer)
    assert data.header["prompt_style"] == adapter_info(options["out_dir"]).prompt_style == "chat-thinking-off"
    for example in data[0]:
        before_answer = example.ids[: example.scored.argmax()].tolist()
        assert tokenizer.decode(before_answer).endswith(thought)
