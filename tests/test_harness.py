"""The harness's own `hf` model on an export, against ours; and local copies of data."""

import dataclasses
import functools
import json
from pathlib import Path

import datasets
import huggingface_hub
import lm_eval.tasks
import pytest
import torch
import training_process
from conftest import load_script, make_hf_checkpoint
from lm_eval.api.instance import Instance
from lm_eval.filters.extraction import RegexFilter
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import lit_llama.evaluation.tasks
from lit_llama.base import open_base
from lit_llama.evaluation.harness import HarnessModel
from lit_llama.evaluation.tasks import load_tasks, local_copy, random_questions
from lit_llama.prompts import prompt_style
from lit_llama.script.evaluation import task_model

TEXT = "the cat sat on a mat and 12 dogs ran to 3 houses of the old king"


def index_few_tasks():
    """The harness reads thousands of files for the index of all its tasks; these are those of the tests."""
    folders = [Path(lm_eval.tasks.__file__).parent / name for name in ("mmlu", "gsm8k", "arc")]
    few = functools.partial(TaskManager, include_path=folders, include_defaults=False)
    lit_llama.evaluation.tasks.TaskManager = few


@pytest.fixture(scope="module", autouse=True)
def few_tasks():
    index_few_tasks()
    yield
    lit_llama.evaluation.tasks.TaskManager = TaskManager


@pytest.fixture(scope="module")
def long_base(tmp_path_factory):
    """The tests' base with a window that GSM8K's answers fit in."""
    folder = tmp_path_factory.mktemp("long")
    convert = load_script("scripts/convert_hf_checkpoint.py").main
    convert(checkpoint_dir=make_hf_checkpoint(folder, max_position_embeddings=1024), output_dir=folder / "base")
    return folder / "base"


def test_the_chat_template_is_told_what_the_style_says_of_thinking(base_dir):
    base = open_base(base_dir)
    base.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}{{ enable_thinking }}"
    for name, told in (("chat-thinking-on", "True"), ("chat-thinking-off", "False"), ("chat", "")):
        model = HarnessModel(dataclasses.replace(base, style=prompt_style(name, base.tokenizer)))
        assert model.apply_chat_template([{"role": "user", "content": "Why? "}]) == f"Why? {told}"


def test_styles_that_would_change_nothing_are_refused(base_dir, command, tmp_path):
    for chat_template, options in ((False, {"thinking": "on"}), (True, {"prompt_style": "alpaca"})):
        with pytest.raises(ValueError, match=f"--{next(iter(options))} .* would change nothing"):
            task_model(chat_template, checkpoint_dir=base_dir, **options)
    (tmp_path / "text.txt").write_text("A text.")
    status, _, err = command("evaluate/perplexity.py", text_path=tmp_path / "text.txt", thinking="on")
    assert (status, "a text has no prompt" in err) == (1, True)


def ask(kind, *texts):
    return [Instance(kind, {}, text, i) for i, text in enumerate(texts)]


@pytest.fixture(scope="module")
def pair(base_dir, aligner_path, tmp_path_factory):
    """The harness's model of an exported base with an Aligner, and ours of the same."""
    folder = tmp_path_factory.mktemp("export") / "hf"
    export = load_script("scripts/export_hf_checkpoint.py").main
    export(checkpoint_dir=base_dir, adapter_path=[aligner_path], output_dir=folder)
    theirs = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=4, trust_remote_code=True)
    return theirs, HarnessModel(open_base(base_dir, aligner_path, precision="32-true"), batch_size=4)


def text(generator, longest):
    n = int(torch.randint(1, longest, (1,), generator=generator))
    words = TEXT.split()
    return " ".join(words[i] for i in torch.randint(len(words), (n,), generator=generator).tolist())


def test_loglikelihoods_are_those_of_hf(pair):
    """Contexts that share long starts, as examples do, ones that do not, empty ones, and several choices for one."""
    theirs, ours = pair
    generator = torch.Generator().manual_seed(0)
    shots = [text(generator, 40) + "\n\n" for _ in range(2)]
    asked = []
    for i in range(60):
        context = (shots[i % 2] * 2 if i % 3 else "") + text(generator, 20) if i % 10 else ""
        asked += [(context, " " + choice) for choice in ("the", "cat", text(generator, 6))]
    expected = theirs.loglikelihood(ask("loglikelihood", *asked), disable_tqdm=True)
    found = ours.loglikelihood(ask("loglikelihood", *asked), disable_tqdm=True)
    for (one, one_greedy), (other, other_greedy) in zip(expected, found, strict=True):
        assert one == pytest.approx(other, abs=1e-3)
        assert one_greedy == other_greedy


def test_rolling_loglikelihoods_are_those_of_hf(pair):
    theirs, ours = pair
    generator = torch.Generator().manual_seed(1)
    asked = [(text(generator, 300),) for _ in range(8)]
    assert max(len(ours.tok_encode(one)) for (one,) in asked) > ours.max_length  # several windows
    expected = theirs.loglikelihood_rolling(ask("loglikelihood_rolling", *asked), disable_tqdm=True)
    assert ours.loglikelihood_rolling(ask("loglikelihood_rolling", *asked), disable_tqdm=True) == pytest.approx(
        expected, abs=1e-3
    )


def test_generations_are_those_of_hf(pair):
    theirs, ours = pair
    generator = torch.Generator().manual_seed(2)
    stops = ([], ["e"], ["a", " t"])
    asked = [
        (text(generator, 20), {"until": list(stops[i % 3]), "do_sample": False, "max_gen_toks": 12}) for i in range(24)
    ]
    found = ours.generate_until(ask("generate_until", *asked), disable_tqdm=True)
    assert found == theirs.generate_until(ask("generate_until", *asked), disable_tqdm=True)
    assert len(set(map(len, found))) > 2


SUBJECTS = ("anatomy", "virology")


@pytest.fixture
def data(tmp_path):
    """MMLU with two of its subjects, and GSM8K, in the layouts that --data_dir takes."""
    for split, n in (("dev", 5), ("test", 4)):
        (tmp_path / "mmlu" / split).mkdir(parents=True)
        for subject in SUBJECTS:
            rows = "".join(f'"What, {i}?",one,two,three,four,{i % 4}\n' for i in range(n))
            head = "question,choice0,choice1,choice2,choice3,answer\n"
            (tmp_path / "mmlu" / split / f"{subject}_{split}.csv").write_text(head + rows)
    (tmp_path / "gsm8k").mkdir()
    for split in ("train", "test"):
        rows = [json.dumps({"question": f"What is {i} + 1?", "answer": f"One more.\n#### {i + 1}"}) for i in range(6)]
        (tmp_path / "gsm8k" / f"{split}.jsonl").write_text("\n".join(rows))
    return tmp_path


def test_local_copies_are_what_the_tasks_expect(data, tmp_path):
    names = [f"mmlu_{subject}" for subject in SUBJECTS]
    tasks = load_tasks([*names, "gsm8k"], data, tmp_path / "work", num_fewshot=2)
    anatomy, _, gsm8k = tasks
    assert [len(task.eval_docs) for task in tasks] == [4, 4, 6]
    doc = anatomy.eval_docs[1]
    assert anatomy.doc_to_text(doc) == "What, 1?\nA. one\nB. two\nC. three\nD. four\nAnswer:"
    assert anatomy.doc_to_target(doc) == 1
    assert "about anatomy" in anatomy.config.description
    assert gsm8k.doc_to_text(gsm8k.eval_docs[2]) == "Question: What is 2 + 1?\nAnswer:"
    chosen = random_questions(tasks, 9, seed=1)
    assert sum(map(len, chosen.values())) == 9
    assert chosen == random_questions(tasks, 9, seed=1) != random_questions(tasks, 9, seed=2)
    with pytest.raises(ValueError, match="--questions 15: there are 14"):
        random_questions(tasks, 15, seed=1)


def test_bad_data_names_the_place(data, tmp_path):
    with pytest.raises(ValueError, match="--tasks mmul: the harness has no such task"):
        load_tasks(["mmul"], None, tmp_path)
    with pytest.raises(ValueError, match="--tasks arc_easy: --data_dir has copies of mmlu and gsm8k alone"):
        load_tasks(["arc_easy"], data, tmp_path)
    file = data / "mmlu" / "test" / "anatomy_test.csv"
    file.write_text(file.read_text().replace("choice3", "wrong"))
    with pytest.raises(ValueError, match=r"anatomy_test.csv lacks the column choice3; it has question, choice0"):
        local_copy("mmlu", data, tmp_path / "work")
    file.write_text("question,choice0,choice1,choice2,choice3,answer\na,b,c,d,e,7\n")
    with pytest.raises(ValueError, match=r"anatomy_test.csv, line 2: the answer is '7', expected 0 to 3 or A to D"):
        local_copy("mmlu", data, tmp_path / "work")
    (data / "gsm8k" / "test.jsonl").write_text('{"question": "What?"}')
    with pytest.raises(ValueError, match=r"test.jsonl, line 1: expected 'question', and 'answer' with '####'"):
        local_copy("gsm8k", data, tmp_path / "work")


def test_without_network_copies_are_asked_for(command, long_base, tmp_path, monkeypatch):
    """At once, without retries; nothing listens on that port."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", tmp_path)
    message = "the Hugging Face hub cannot be reached, and its cache on this machine lacks the data of"
    for script, task in (("mmlu", "mmlu: give --data_dir"), ("gsm8k", "gsm8k_cot: give --data_dir")):
        status, out, err = command(f"evaluate/{script}.py", checkpoint_dir=long_base, out_dir=tmp_path / "out")
        assert (status, out) == (1, "")
        assert f"error: {message} {task}" in err
    status, _, err = command("evaluate/harness.py", tasks="arc_easy", checkpoint_dir=long_base, out_dir=tmp_path)
    assert err.endswith(f"{message} arc_easy\n")


@pytest.mark.parametrize("chat", [False, True])
def test_script_resumes(command, long_base, aligner_path, data, tmp_path, chat, monkeypatch):
    options = {
        "checkpoint_dir": long_base,
        "adapter_path": aligner_path,
        "allow_other_base": "true",
        "tasks": "mmlu_anatomy,gsm8k",
        "data_dir": data,
        "out_dir": tmp_path / "out",
        "num_fewshot": 0,
        "questions": 6,
        "chat_template": str(chat).lower(),
    }
    status, out, err = command("evaluate/harness.py", **options)
    assert status == 0, err
    assert "|anatomy" in out
    assert "exact_match" in out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    samples = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert (
        sum(sample["task"] == "mmlu_anatomy" for sample in samples) == results["n-samples"]["mmlu_anatomy"]["effective"]
    )
    if chat:
        assert all("user" in str(sample["arguments"]) for sample in samples)
    # Every answer is kept: the same again asks the model nothing.
    monkeypatch.setattr(HarnessModel, "_logits", None)
    monkeypatch.setattr("lit_llama.evaluation.harness.complete", None)
    assert command("evaluate/harness.py", **options)[1] == out


def test_two_processes_find_what_one_does(command, long_base, data, tmp_path):
    options = {"checkpoint_dir": long_base, "data_dir": data, "tasks": "mmlu_anatomy,gsm8k", "num_fewshot": 0}
    alone = command("evaluate/harness.py", out_dir=tmp_path / "one", **options)[1]
    arguments = [f"--{name}={value}" for name, value in (options | {"out_dir": tmp_path / "two"}).items()]
    both = training_process.run_script("evaluate/harness.py", *arguments, processes=2, before=index_few_tasks)
    for done in both:
        assert done.returncode == 0, done.stderr
    assert [done.stdout for done in both] == [alone, ""]
    assert "anatomy" in alone


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("So 3 + 4 = 7. The answer is: 7", "7"),
        ("The answer is 1,234.", "1,234"),
        ("the answer is $18.50 per day", "18.50"),
        ("The answer is: -5", "-5"),
        ("The answer is 3. No: the final answer is 4", "4"),
        ("The answer is 12 apples, of 30.", "12"),
        ("The answer is: .5", ".5"),
        ("I have 7 apples", "[invalid]"),
        ("The answer is seven", "[invalid]"),
    ],
)
def test_the_number_that_counts(text, number):
    answer = load_script("evaluate/gsm8k.py").ANSWER
    assert RegexFilter(answer, group_select=-1).apply([[text]], [{}]) == [[number]]


def test_gsm8k_with_the_prompt_of_metamath(command, long_base, data, tmp_path):
    options = {"checkpoint_dir": long_base, "data_dir": data, "out_dir": tmp_path / "out", "questions": 2}
    status, out, err = command("evaluate/gsm8k.py", setting="metamath", **options)
    assert status == 0, err
    assert "GSM8K, metamath, 2 questions" in out
    config = json.loads((tmp_path / "out" / "results.json").read_text())["config"]
    assert config["metric_that_counts"] == "exact_match, strict-match"
    folder = f"--results_dir={tmp_path / 'out'}"
    status, out, _ = command("evaluate/difference.py", folder, folder)
    assert out.startswith("**exact_match, strict-match** is the metric that counts")
    sample = json.loads((tmp_path / "out" / "samples.jsonl").read_text().splitlines()[0])
    assert sample["arguments"][0][0].endswith("### Response: Let's think step by step.")


@pytest.mark.slow
def test_mmlu_by_category_and_subject(command, long_base, data, tmp_path):
    """All 57 subjects are needed; here each has the same questions."""
    for split in ("dev", "test"):
        text = (data / "mmlu" / split / f"anatomy_{split}.csv").read_text()
        for category in ("stem", "other", "social_sciences", "humanities"):
            for name in TaskManager()._index[f"mmlu_{category}_tasks"].tags:
                (data / "mmlu" / split / f"{name.removeprefix('mmlu_')}_{split}.csv").write_text(text)
    options = {"checkpoint_dir": long_base, "data_dir": data / "mmlu", "out_dir": tmp_path / "out", "questions": 60}
    status, out, err = command("evaluate/mmlu.py", setting="zero-shot", **options)
    assert status == 0, err
    assert "| all | 60 |" in out
    assert "| STEM |" in out
    table = (tmp_path / "out" / "subjects.md").read_text()
    rows = [line.split(" | ") for line in table.split("| subject |")[1].splitlines()[2:]]
    assert sum(int(row[2]) for row in rows) == 60
    assert (tmp_path / "out" / "subjects.png").stat().st_size > 10_000
    # By continuation: the choice of the greatest log-likelihood per byte is the answer.
    status, out, err = command("evaluate/mmlu.py", setting="continuation", **options)
    assert status == 0, err
    right = 0
    for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines():
        sample = json.loads(line)
        assert "\n\nQuestion: " in sample["arguments"][0][0]  # not the letters of "standard"
        choices = sample["doc"]["choices"]
        rates = [float(found[0]) / len(choice) for found, choice in zip(sample["filtered_resps"], choices, strict=True)]
        right += max(range(4), key=rates.__getitem__) == sample["target"]
    assert f"| all | 60 | {right / 60:.1%} (" in out
