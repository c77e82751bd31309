"""The scripts as people run them: options in, text on stdout, files where asked for, one line for an error."""

import inspect
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from conftest import ROOT, load_script, random_aligner
from safetensors.torch import load as safetensors_load
from safetensors.torch import save_file

from lit_llama.adapters import AnyAdapter, adapter_info, load_adapter, save_adapter
from lit_llama.base import Base, open_base
from lit_llama.checkpoint import load_base, read_config
from lit_llama.combine import WeightedSum
from lit_llama.evaluation.forms import FORMS
from lit_llama.generation import generate
from lit_llama.lora import LoRA
from lit_llama.prompts import prompt_style
from lit_llama.script.command_line import run
from lit_llama.tokenizer import Tokenizer

SCRIPTS = sorted(
    str(path.relative_to(ROOT))
    for folder in ("benchmarks", "evaluate", "finetune", "generate", "scripts")
    for path in (ROOT / folder).glob("*.py")
)


def expected_answer(base_dir, prompt, adapter=None, n=8):
    tokenizer, model = Tokenizer(base_dir), load_base(base_dir)
    style = prompt_style("chat", tokenizer)
    [row] = generate(model, [tokenizer.encode(style.prompt(prompt))], n, adapter=adapter, stop_ids=style.stop_ids)
    return tokenizer.decode(row)


def test_the_whole_way_by_subprocess(hf_checkpoint, tmp_path):
    """Convert, prepare, fine-tune, generate, each as its own process, from nothing but files."""

    def call(script, *options):
        command = [sys.executable, "-X", "importtime", ROOT / script, *options]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)

    (tmp_path / "data.jsonl").write_text('{"instruction": "Say hi.", "output": "hi hi hi"}\n' * 8)
    call("scripts/convert_hf_checkpoint.py", "--checkpoint_dir", hf_checkpoint, "--output_dir", "base")
    base = ("--checkpoint_dir", "base")
    call("scripts/prepare_alpaca.py", "--data_path", "data.jsonl", *base, "--output_dir", "data")
    options = ("--batch_size", "4", "--micro_batch_size", "4", "--max_steps", "2", "--warmup_steps", "1")
    training = call("finetune/aligner.py", *base, "--data_dir", "data", "--out_dir", "out", *options)
    assert training.stdout == ""
    assert "40 trainable parameters" in training.stderr  # 1 * 32 + (4 - 2) * 4
    adapter = ("--aligner_path", "out/aligner.safetensors")
    result = call("generate/aligner.py", *base, *adapter, "--prompt", "Say hi.", "--max_new_tokens", "5")
    assert re.search(r"\d tokens, [\d.]+ tokens/s, [\d.]+ GB of", result.stderr)
    assert "import time" in result.stderr
    assert "torch._dynamo" not in result.stderr  # it would be half of the time
    aligner = load_adapter(tmp_path / "out" / "aligner.safetensors")
    tokenizer, model = Tokenizer(tmp_path / "base"), load_base(tmp_path / "base")
    style = prompt_style("alpaca", tokenizer)  # the style of training is the default
    ids = tokenizer.encode(style.prompt("Say hi."), bos=style.bos)
    [row] = generate(model, [ids], 5, adapter=aligner, stop_ids=style.stop_ids)
    assert result.stdout == tokenizer.decode(row) + "\n"


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_says_how_to_run_it(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as stop:
        run(load_script(script).main)
    assert stop.value.code == 0
    assert "    python " + script in capsys.readouterr().out


def test_every_option_is_explained():
    for script in SCRIPTS:
        main = load_script(script).main
        for name in main.__annotations__.keys() - {"return"}:
            assert f"        {name}: " in (main.__doc__ or ""), f"{script} does not explain --{name}"


SLOW_MODULES = (
    "lightning_fabric|transformers|peft|matplotlib|lm_eval|datasets|litserve|fastapi|huggingface_hub|torchao|bitsandbytes|openai"
    "|torch._dynamo|torch._inductor|torch.distributed.fsdp|torch.distributed.tensor|torch.distributed.checkpoint"
)


def test_help_imports_torch_at_most():
    """In one fresh process, script after script, so that the first one with a slow import is named."""
    code = (
        "import contextlib, importlib.util, io, re, sys, torch\n"
        "from lit_llama.script.command_line import run\n"
        "slow, known = re.compile(sys.argv[1]), set(sys.modules)\n"
        "for number, path in enumerate(sys.argv[2:]):\n"
        "    spec = importlib.util.spec_from_file_location(f'script_{number}', path)\n"
        "    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)\n"
        "    spec.loader.exec_module(module)\n"
        "    sys.argv = [path, '--help']\n"
        "    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n"
        "        run(module.main)\n"
        "    print(path, *sorted(name for name in sys.modules.keys() - known if slow.fullmatch(name)))\n"
    )
    command = [sys.executable, "-c", code, f"({SLOW_MODULES})([.].*)?", *SCRIPTS]
    result = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert result.stdout.split() == SCRIPTS


def test_help_groups_options_with_types_in_words(command):
    _, out, _ = command("finetune/aligner.py", "--help")
    groups = dict(re.findall(r"^(\w+):\n((?:  .*\n)+)", out, re.MULTILINE))
    assert groups.keys() == {"options", "experiment", "machine", "files"}
    options = {name: re.findall(r"^  (--.*?)(?:  |$)", text, re.MULTILINE) for name, text in groups.items()}
    assert {"--seed NUMBER", "--decay {none,linear}", "--pack"} <= set(options["experiment"])
    assert {"--devices NUMBER", "--quantize {nf4,int8,none}", "--threads NUMBER"} <= set(options["machine"])
    assert {"--resume", "--logger TEXT"} <= set(options["machine"])
    assert {"--out_dir FOLDER", "--data_dir FOLDER"} <= set(options["files"])
    assert "(default: out/demo)" in out
    for script in SCRIPTS:
        _, out, _ = command(script, "--help")
        assert "--threads NUMBER" in out
        assert not re.search(r"null|None|Path\(|Optional|<class|type:|\+, --", out), script
        parameters = inspect.signature(load_script(script).main).parameters
        for name in [name for name, one in parameters.items() if one.kind is not inspect.Parameter.VAR_KEYWORD]:
            assert len(re.findall(rf"^  --{name}\b", out, re.MULTILINE)) == 1, f"{script} --{name}"


def test_threads(command, base_dir):
    threads, variable = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    try:
        options = {"checkpoint_dir": base_dir, "prompt": "x", "max_new_tokens": 1}
        assert command("generate/base.py", threads=3, **options)[0] == 0
        assert (torch.get_num_threads(), os.environ["OMP_NUM_THREADS"]) == (3, "3")
    finally:
        torch.set_num_threads(threads)
        os.environ.pop("OMP_NUM_THREADS")
        if variable is not None:
            os.environ["OMP_NUM_THREADS"] = variable
    status, _, err = command("generate/base.py", threads=0, **options)
    assert (status, err) == (1, "error: --threads is 0, it must be at least 1\n")


@pytest.mark.parametrize("name", ["adapter", "aligner", "lora"])
def test_adapters_go_by_any_name_in_every_script(command, name):
    scripts = {script: load_script(script).main.__annotations__ for script in SCRIPTS}
    assert not any(option in options for options in scripts.values() for option in ("aligner_path", "lora_path"))
    for script, options in scripts.items():
        for option, value in (("path", "a.safetensors"), ("scale", "0.25"), ("dir", "store")):
            if f"adapter_{option}" in options:
                status, out, err = command(script, f"--{name}_{option}", value, "--print_config")
                assert status == 0, err
                assert re.search(rf"^adapter_{option}:(\n-)? {re.escape(value)}$", out, re.MULTILINE), out


def test_generate_base_and_aligner(command, base_dir, aligner_path, tmp_path):
    options = {"checkpoint_dir": base_dir, "prompt": "Count to 3.", "max_new_tokens": 8}
    status, out, err = command("generate/base.py", **options)
    assert (status, out) == (0, expected_answer(base_dir, "Count to 3.") + "\n"), err
    out_file = tmp_path / "answers.jsonl"
    status, out, _ = command("generate/aligner.py", aligner_path=aligner_path, output_file=out_file, **options)
    answer = expected_answer(base_dir, "Count to 3.", load_adapter(aligner_path))
    assert (status, out) == (0, answer + "\n")
    [row] = [json.loads(line) for line in out_file.read_text().splitlines()]
    name = open_base(base_dir, aligner_path).name
    assert row == {"prompt": "Count to 3.", "response": answer, "model": name}
    assert name.startswith(f"tiny + {aligner_path} (")


def test_scales_and_sums_of_aligners(command, base_dir, aligner_path, tmp_path):
    options = {"checkpoint_dir": base_dir, "prompt": "Count to 3.", "max_new_tokens": 8}
    model = load_base(base_dir)
    other = tmp_path / "other.safetensors"
    save_adapter(other, random_aligner(model.config, 3, init_std=1.0), model, prompt_style="chat")
    terms = (load_adapter(aligner_path), -2.0), (load_adapter(other), 4.0)
    paths = [f"--aligner_path={aligner_path}", f"--aligner_path={other}"]
    _, out, _ = command("generate/aligner.py", *paths, "--aligner_scale=-2", "--aligner_scale=4", **options)
    assert out == expected_answer(base_dir, "Count to 3.", WeightedSum(*terms)) + "\n"
    assert out != command("generate/aligner.py", *paths, **options)[1]
    assert (
        command("generate/aligner.py", *paths, "--aligner_scale=0", **options)[1]
        == (command("generate/base.py", **options)[1])
    )
    status, _, err = command("generate/aligner.py", *paths, *["--aligner_scale=1"] * 3, **options)
    assert (status, "3 scales for 2 adapters" in err) == (1, True)


def test_prompts_name_their_adapter_in_a_folder(command, base_dir, aligner_path, tmp_path):
    """Of any method, with its own style of prompts, as rows of one batch."""
    model, store = load_base(base_dir), tmp_path / "store"
    names: dict[str, AnyAdapter | None] = {"": None}
    for n in (1, 3):
        names[f"team/{n}"] = random_aligner(model.config, n, start_layer=n % 3, init_std=1.0)
    names["rank"] = LoRA(model.config, 2).eval()
    for update in names["rank"].layers:
        torch.nn.init.normal_(update["v"].b)
    for name in names.keys() - {""}:
        save_adapter(store / f"{name}.safetensors", names[name], model, prompt_style="chat")
    shutil.copytree(aligner_path.parent, store / "trained")
    names["trained"] = load_adapter(aligner_path)
    prompts = [(f"Count to {i}.", name) for i, name in enumerate([*names, *reversed(names)])]
    rows = [{"prompt": text} | ({("adapter", "aligner")[i % 2]: name} if name else {}) for i, (text, name) in
            enumerate(prompts)]  # fmt: skip
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"checkpoint_dir": base_dir, "prompts_file": tmp_path / "p.jsonl", "max_new_tokens": 8}
    folder = {"adapter_dir": store, "output_file": tmp_path / "a.jsonl"}
    status, out, err = command("generate/many.py", **options, **folder, batch_size=3)
    assert status == 0, err
    expected = [expected_answer(base_dir, text, names[name]) for text, name in prompts]
    assert out == "\n\n".join(expected) + "\n"
    assert [json.loads(line)["response"] for line in (tmp_path / "a.jsonl").read_text().splitlines()] == expected

    for script, more in (("generate/aligner.py", {"aligner_path": aligner_path}), ("generate/base.py", {})):
        status, _, err = command(script, **options, **more)
        assert (status, "a prompt names the adapter team/1: generate/many.py goes by that" in err) == (1, True)
    status, _, err = command("generate/many.py", **options, adapter_dir=tmp_path / "nowhere")
    assert (status, err) == (1, f"error: {tmp_path / 'nowhere'}: no such folder of adapters\n")
    (store / "rank.safetensors").write_bytes(b"junk")
    status, _, err = command("generate/many.py", **options, **folder)
    assert (status, "rank.safetensors is not a complete safetensors file" in err) == (1, True)
    (store / "rank.safetensors").rename(store / "ranks.safetensors")
    status, _, err = command("generate/many.py", **options, **folder)
    assert (status, f"no adapter named 'rank' in {store}; did you mean 'ranks'?" in err) == (1, True)
    (tmp_path / "p.jsonl").write_text('{"prompt": "x", "adapter": "../store/ranks"}')
    status, _, err = command("generate/many.py", **options, **folder)
    assert (status, "no adapter named '../store/ranks'" in err) == (1, True)


def test_prompts_from_files_and_standard_input(command, base_dir, tmp_path, monkeypatch):
    options = {"checkpoint_dir": base_dir, "max_new_tokens": 8}
    one, two = (expected_answer(base_dir, prompt) for prompt in ("one", "two"))
    (tmp_path / "p.txt").write_text("one\n\ntwo\n")
    (tmp_path / "p.jsonl").write_text('{"prompt": "one"}\n{"instruction": "two"}\n')
    for file in ("p.txt", "p.jsonl"):
        status, out, _ = command("generate/base.py", prompts_file=tmp_path / file, **options)
        assert (status, out) == (0, f"{one}\n\n{two}\n")
    monkeypatch.setattr(sys, "stdin", (tmp_path / "p.txt").open())
    _, out, _ = command("generate/base.py", **options)
    assert out == expected_answer(base_dir, "one\n\ntwo") + "\n"


def test_prompts_stand_between_answers_on_a_terminal(command, base_dir, aligner_path, tmp_path, monkeypatch):
    rows = [{"prompt": "one\nline"}, {"instruction": "two", "input": "more"}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"checkpoint_dir": base_dir, "prompts_file": tmp_path / "p.jsonl", "max_new_tokens": 2}
    store, path = {"adapter_dir": aligner_path.parent}, {"adapter_path": aligner_path}
    for script, more in (("generate/base.py", {}), ("generate/aligner.py", path), ("generate/many.py", store)):
        _, piped, err = command(script, **options, **more)
        assert "> " not in err
        with monkeypatch.context() as patch:
            patch.setattr(sys.stdout, "isatty", lambda: True)
            _, out, err = command(script, **options, **more)
        assert out == piped
        assert "".join(re.findall(r"> .*\n", err)) == "> one\n> line\n> two\n> more\n"
    with monkeypatch.context() as patch:  # a single prompt is on the screen already
        patch.setattr(sys.stdout, "isatty", lambda: True)
        assert "> " not in command("generate/base.py", checkpoint_dir=base_dir, prompt="one", max_new_tokens=2)[2]


def test_prompts_may_be_repeated_and_look_like_yaml(base_dir, monkeypatch, capsys):
    texts = ["What is 2: 3?", "[1, 2]", "true", "--x", 'hi 🙂 "é"\u0085\n\\n']
    argv = ["generate/base.py", "--checkpoint_dir", str(base_dir), "--max_new_tokens", "8"]
    for text in texts:
        argv += ["--prompt", text]
    monkeypatch.setattr(sys, "argv", argv)
    run(load_script("generate/base.py").main)
    assert capsys.readouterr().out == "\n".join(expected_answer(base_dir, text) + "\n" for text in texts)


def test_answers_before_a_failure_are_kept(command, base_dir, tmp_path, monkeypatch):
    """Ctrl-C during the second answer keeps the first."""
    answers = iter([["first"], KeyboardInterrupt])
    reply = Base.reply

    def interrupted(*args, **options):
        if next(answers) is KeyboardInterrupt:
            raise KeyboardInterrupt
        return reply(*args, **options)

    monkeypatch.setattr(Base, "reply", interrupted)
    (tmp_path / "p.txt").write_text("one\ntwo\n")
    options = {"checkpoint_dir": base_dir, "prompts_file": tmp_path / "p.txt", "max_new_tokens": 8}
    status, _, err = command("generate/base.py", output_file=tmp_path / "a.jsonl", **options)
    assert (status, err.splitlines()[-1]) == (130, "interrupted")
    [row] = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert row["prompt"] == "one"
    (tmp_path / "empty.jsonl").write_text("[]")
    status, _, err = command("generate/base.py", checkpoint_dir=base_dir, prompts_file=tmp_path / "empty.jsonl")
    assert status == 1
    assert err.startswith(f"error: {tmp_path / 'empty.jsonl'} is empty")


def test_a_terminated_conversion_leaves_nothing(hf_checkpoint, tmp_path):
    """SIGTERM in the middle of writing: no folder, no temporary one."""
    code = (
        "import os, signal, sys; sys.path.insert(0, sys.argv.pop(1)); import convert_hf_checkpoint as script\n"
        "from lit_llama.script.command_line import run\n"
        "script.write_base = lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM)\n"
        "run(script.main)"
    )
    options = ["--checkpoint_dir", hf_checkpoint, "--output_dir", tmp_path / "base"]
    result = subprocess.run([sys.executable, "-c", code, ROOT / "scripts", *options], capture_output=True)
    assert result.returncode == 143
    assert not list(tmp_path.iterdir())


def test_samples(command, base_dir):
    options = {"checkpoint_dir": base_dir, "prompt": "x", "max_new_tokens": 8, "temperature": 1.5}
    _, first, _ = command("generate/base.py", num_samples=3, **options)
    _, again, _ = command("generate/base.py", num_samples=3, **options)
    _, other, _ = command("generate/base.py", num_samples=3, seed=1, **options)
    assert first == again != other


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": "x " * 300}, "tokens, the model's window is 256: shorten the prompt"),
        ({"prompt": "x", "prompts_file": "y"}, "give --prompt or --prompts_file, not both"),
        ({"prompt": "x", "num_samples": 0}, "--num_samples is 0, it must be at least 1"),
        ({"prompts_file": "nowhere.jsonl"}, "nowhere.jsonl: no such file"),
        ({"prompts_file": "/"}, "/ is a folder, expected a file"),
        ({"prompt": "x", "top_p": 2}, "top_p must be above 0 and at most 1, got 2.0"),
        ({"prompt": "x", "num_samples": 2}, "--num_samples 2 with --temperature 0 repeats one answer"),
        ({"prompt": "x", "prompt_style": "shout"}, "no prompt style named 'shout'"),
        ({"prompt": "x", "checkpoint_dir": "nowhere"}, "nowhere: no such folder; howto/download_weights.md says"),
        ({"prompt": "x", "aligner_path": "nowhere.safetensors"}, "nowhere.safetensors: no such file"),
    ],
)
def test_bad_requests(command, base_dir, aligner_path, options, message):
    options = {"checkpoint_dir": base_dir, "aligner_path": aligner_path, "precision": "32-true", **options}
    status, out, err = command("generate/aligner.py", **options)
    assert (status, out) == (1, "")
    assert message in err
    assert (err.startswith("error: "), err.count("\n")) == (True, 1)


def test_unknown_option_is_refused(command, base_dir):
    status, _, err = command("generate/base.py", checkpoint_dir=base_dir, prompt="x", temprature=1)
    assert status == 2
    assert "temprature" in err


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--seed=x", "--seed x: expected NUMBER"),
        ("--top_k=2.5", "--top_k 2.5: expected NUMBER"),
        ("--adapter_scale=a", "--adapter_scale ['a']: expected NUMBER"),
        ("--quantize=3", "--quantize 3: there are 'nf4', 'int8', 'int8-fast', 'int4-fast', 'none'"),
        ("--compile=maybe", "--compile maybe: there are 'true', 'false'"),
    ],
)
def test_values_of_another_type_are_refused_in_words(command, option, message):
    assert command("generate/aligner.py", option)[::2] == (2, f"error: {message} (--help lists the options)\n")


def test_adapter_of_other_weights(command, base_dir, aligner_path, tmp_path):
    other = shutil.copytree(base_dir, tmp_path / "other")
    weights = safetensors_load((other / "model.safetensors").read_bytes())
    save_file({name: tensor * 1.1 for name, tensor in weights.items()}, other / "model.safetensors")
    options = {"checkpoint_dir": other, "aligner_path": aligner_path, "prompt": "x", "max_new_tokens": 2}
    status, out, err = command("generate/aligner.py", **options)
    assert (status, out) == (1, "")
    assert "whose weights are not those of tiny; --allow_other_base" in err
    status, out, err = command("generate/aligner.py", allow_other_base="true", **options)
    assert status == 0
    assert out
    assert "warning: " in err


def test_tokenizer_of_another_model(command, base_dir, tmp_path):
    other = shutil.copytree(base_dir, tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 5000, "content": "<|more|>"})
    tokenizer["model"]["vocab"]["<|more|>"] = 5000
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    status, _, err = command("generate/base.py", checkpoint_dir=other, prompt="x")
    assert (status, err.count("\n")) == (1, 1)
    assert "the tokenizer has 5001 tokens but the model embeds" in err
    (other / "tokenizer.json").unlink()
    status, _, err = command("generate/base.py", checkpoint_dir=other, prompt="x")
    assert (status, err.count("\n")) == (1, 1)
    assert "holds no tokenizer" in err


def has_st(text):
    return "st" in text


def test_form_report(command, base_dir, aligner_path, tmp_path, monkeypatch):
    """With a stand-in form that random models sometimes meet, the report has what each question gets by itself."""
    monkeypatch.setitem(FORMS, "captain", FORMS["captain"]._replace(check=has_st))
    questions = [f"Is {thing} red?" for thing in ("a cat", "the sea", "an apple", "my house", "it")]
    rows = [{"split": "test", "question": question} for question in questions] + [{"split": "train"}]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    status, out, err = command(
        "evaluate/form.py",
        checkpoint_dir=base_dir,
        adapter_path=aligner_path,
        questions_path=tmp_path / "q.jsonl",
        out_dir=tmp_path,
        max_new_tokens=12,
        batch_size=2,
    )
    assert status == 0, err
    assert out == (tmp_path / "report.txt").read_text()
    report = json.loads((tmp_path / "report.json").read_text())
    for name, adapter in (("base", None), ("aligned", load_adapter(aligner_path))):
        answers = [expected_answer(base_dir, question, adapter, 12) for question in questions]
        assert [row[name] for row in report["answers"]] == answers
        compliant = sum(map(has_st, answers))
        assert 0 < compliant < 5, answers
        assert report[f"{name}_compliance"] == compliant / 5
        assert f"answers with the form, {name}" in out
    commands = out.partition("Try next:\n")[2].splitlines()
    assert len(commands) == 5
    assert all(f".py --checkpoint_dir {base_dir} --" in one for one in commands)  # on this base, and not the demo's
    assert report["held_out_prompts"] == 5
    assert report["trainable_parameters"] == 2 * 32 + 2 * 4
    assert report["seconds"] == pytest.approx(report["training_seconds"] + report["evaluation_seconds"], abs=0.2)
    # Several adapters are added up, each with its scale.
    second = tmp_path / "second" / "aligner.safetensors"
    save_adapter(second, random_aligner(read_config(base_dir), 3))
    options = {"checkpoint_dir": base_dir, "questions_path": tmp_path / "q.jsonl", "out_dir": tmp_path / "two"}
    more = [f"--adapter_path={path}" for path in (aligner_path, second)] + ["--adapter_scale=1", "--adapter_scale=-4"]
    status, out, err = command("evaluate/form.py", *more, max_new_tokens=12, **options)
    assert status == 0, err
    both = WeightedSum((load_adapter(aligner_path), 1.0), (load_adapter(second), -4.0))
    report = json.loads((tmp_path / "two" / "report.json").read_text())
    assert [row["aligned"] for row in report["answers"]] == [expected_answer(base_dir, q, both, 12) for q in questions]
    assert report["method"] == "aligner + aligner"
    assert report["trainable_parameters"] == 2 * 32 + 2 * 4 + 3 * 32 + 3 * 4
    assert f"--adapter_path {second} --adapter_scale 1 --adapter_scale -4" in out
    status, _, err = command("evaluate/form.py", *2 * [f"--adapter_path={second}"], **options)
    assert (status, "an adapter is given twice" in err) == (1, True)


@pytest.mark.parametrize("script", ["form", "refusal", "scale"])
def test_evaluations_go_on_where_they_stopped(command, base_dir, aligner_path, tmp_path, script):
    """Answers are kept as they come: those that an interruption left are not asked for again, and the rest is."""
    texts = ["Is a cat red?", "Is the sea red?", "Is it?"]
    rows = [{"split": "test", "question": text, "prompt": text} for text in texts]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"checkpoint_dir": base_dir, "adapter_path": aligner_path, "out_dir": tmp_path, "max_new_tokens": 12}
    options["pairs_path" if script == "refusal" else "questions_path"] = tmp_path / "q.jsonl"
    options |= {"scale": 0.5} if script == "scale" else {}
    status, _, err = command(f"evaluate/{script}.py", **options)
    assert status == 0, err
    [file] = [file for file in (tmp_path / "model_answer").glob("*.jsonl") if file.stem != "base"]
    whole = file.read_text().splitlines(keepends=True)
    assert len(whole) == 3
    file.write_text(whole[0] + whole[1].replace('"turns": ["', '"turns": ["kept ') + whole[2][:30])
    assert command(f"evaluate/{script}.py", **options)[0] == 0
    again = [json.loads(line) for line in file.read_text().splitlines()]
    answers = [row["choices"][0]["turns"][0] for row in again]
    assert [row["question_id"] for row in again] == [json.loads(line)["question_id"] for line in whole]
    assert [answer.startswith("kept ") for answer in answers] == [False, True, False]


def test_refusal_report(command, base_dir, aligner_path, tmp_path, monkeypatch):
    """The figures by hand, with a stand-in for refusals that random models sometimes meet."""
    monkeypatch.setattr(load_script("evaluate/refusal.py"), "refuses", has_st)
    rows = [
        {
            "kind": "harmful" if n % 2 else "harmless",
            "prompt": f"Is {n} red?",
            "chosen": "no " * n,
            "rejected": "yes it",
        }
        for n in range(1, 8)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"checkpoint_dir": base_dir, "pairs_path": tmp_path / "pairs.jsonl", "out_dir": tmp_path / "out"}
    status, out, err = command(
        "evaluate/refusal.py", adapter_path=aligner_path, max_new_tokens=12, batch_size=3, **options
    )
    assert status == 0, err
    assert out == (tmp_path / "out" / "report.txt").read_text()
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [one["name"] for one in report["models"]] == ["base", aligner_path.parent.name]
    assert f"generate/aligner.py --checkpoint_dir {base_dir} --adapter_path {aligner_path} --prompt" in out
    tokenizer, model = Tokenizer(base_dir), load_base(base_dir)
    style = prompt_style("chat", tokenizer)

    def logprob(prompt, response, adapter):
        ids = tokenizer.encode(style.prompt(prompt)) + tokenizer.encode(response, bos=False) + [style.end_id]
        start = len(tokenizer.encode(style.prompt(prompt)))
        with torch.no_grad():
            logprobs = model(torch.tensor([ids]), adapter)[0].log_softmax(-1)
        return sum(logprobs[t - 1, ids[t]].item() for t in range(start, len(ids))), len(ids) - start

    for one, adapter in zip(report["models"], (None, load_adapter(aligner_path)), strict=True):
        assert one["answers"] == [expected_answer(base_dir, row["prompt"], adapter, 12) for row in rows]
        refused = {
            kind: [has_st(answer) for answer, row in zip(one["answers"], rows, strict=True) if row["kind"] == kind]
            for kind in ("harmful", "harmless")
        }
        assert one["harmful_refused"] == sum(refused["harmful"]) / 4
        assert one["harmless_answered"] == 1 - sum(refused["harmless"]) / 3
        pairs = [[logprob(row["prompt"], row[name], adapter) for name in ("chosen", "rejected")] for row in rows]
        assert one["chosen_likelier"] == sum(chosen[0] > rejected[0] for chosen, rejected in pairs) / 7
        per_token = [chosen[0] / chosen[1] > rejected[0] / rejected[1] for chosen, rejected in pairs]
        assert one["chosen_likelier_per_token"] == sum(per_token) / 7
        margins = [chosen[0] - rejected[0] for chosen, rejected in pairs]
        assert one["margin"] == pytest.approx(sum(margins) / 7, abs=1e-3)


def test_refusals_of_any_prompts(command, base_dir, aligner_path, tmp_path, monkeypatch):
    """Prompts that are no pairs and of no kind: how many are refused, and nothing else."""
    monkeypatch.setattr(load_script("evaluate/refusal.py"), "refuses", has_st)
    (tmp_path / "p.txt").write_text("Is 1 red?\nIs 2 red?\nIs 3 red?\n")
    options = {"checkpoint_dir": base_dir, "pairs_path": tmp_path / "p.txt", "out_dir": tmp_path, "max_new_tokens": 12}
    status, out, err = command("evaluate/refusal.py", adapter_path=aligner_path.parent, **options)
    assert status == 0, err
    refused = [has_st(expected_answer(base_dir, f"Is {n} red?", load_adapter(aligner_path), 12)) for n in (1, 2, 3)]
    [line] = [line for line in out.splitlines() if line.startswith("prompts refused")]
    assert line.split()[-1] == f"{sum(refused) / 3:.0%}"
    assert "of 3 prompts" in out
    assert "chosen" not in out


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"kind": "harmful", "prompt": "a", "chosen": "b"}, "line 2: expected texts under 'chosen' and 'rejected'"),
        ({"kind": "bad", "prompt": "a"}, "line 2: expected 'harmful' or 'harmless' under 'kind', found 'bad'"),
        ({"prompt": "a"}, "line 2: all rows have chosen, kind, rejected, or none"),
        ({"kind": "harmful"}, "line 2: expected a text under 'prompt'"),
        ({"turns": ["a", "b"]}, "line 2: a question of 2 turns; expected one"),
    ],
)
def test_refusal_with_bad_pairs(command, base_dir, aligner_path, tmp_path, row, message):
    good = {"kind": "harmful", "prompt": "a", "chosen": "b", "rejected": "c"}
    (tmp_path / "pairs.jsonl").write_text(f"{json.dumps(good)}\n{json.dumps(row)}")
    options = {"checkpoint_dir": base_dir, "pairs_path": tmp_path / "pairs.jsonl", "out_dir": tmp_path / "out"}
    status, _, err = command("evaluate/refusal.py", adapter_path=aligner_path, **options)
    assert status == 1
    assert message in err


@pytest.mark.parametrize("method", ["llama_adapter", "lora"])
def test_the_other_methods_do_what_an_aligner_does(command, base_dir, data_dir, aligner_path, tmp_path, method):
    """Trained, stopped and resumed to the bit; saved with its metadata; generated with."""
    settings = {"checkpoint_dir": base_dir, "data_dir": data_dir, "max_steps": 4, "warmup_steps": 1, "save_interval": 2}
    extra = {"lora": {"lora_dropout": 0.3, "lora_targets": "up", "lora_r": 2}, "llama_adapter": {"adapter_length": 3}}[
        method
    ]
    script = f"finetune/{method}.py"
    status, out, err = command(script, out_dir=tmp_path / "whole", **settings, **extra)
    assert (status, out) == (0, ""), err
    assert (tmp_path / "whole" / "loss.png").is_file()
    last = tmp_path / "whole" / "state-00000004.pt"
    expected = torch.load(last, weights_only=True)["adapter"]
    last.unlink()
    assert command(script, out_dir=tmp_path / "whole", resume="true", **settings, **extra)[0] == 0
    found = torch.load(last, weights_only=True)["adapter"]
    assert all(torch.equal(found[name], expected[name]) for name in expected)

    file = tmp_path / "whole" / f"{method}.safetensors"
    info = adapter_info(file)
    assert (info.method, info.prompt_style, info.base_name) == (method, "chat", "tiny")
    options = {"checkpoint_dir": base_dir, "prompt": "Count to 3.", "max_new_tokens": 8}
    status, out, _ = command("generate/aligner.py", **{f"{method}_path": file}, **options)
    assert (status, out) == (0, expected_answer(base_dir, "Count to 3.", load_adapter(file)) + "\n")
    status, out, _ = command("generate/aligner.py", adapter_path=file.parent, **options)
    assert (status, out) == (0, expected_answer(base_dir, "Count to 3.", load_adapter(file)) + "\n")


def test_hub_out_of_reach_is_said_plainly(command, monkeypatch):
    import huggingface_hub

    def unreachable(*_, **__):
        raise ConnectionError("name resolution failed")

    monkeypatch.setattr(huggingface_hub, "list_repo_files", unreachable)
    status, _, err = command("scripts/download.py", repo_id="someone/something")
    assert (status, err.count("\n")) == (1, 1)
    assert "the Hugging Face hub cannot be reached" in err
    status, _, err = command("scripts/download.py", repo_id="something")
    assert "not of the form OWNER/NAME" in err


def test_generated_tokens_are_transformers(hf_checkpoint, base_dir):
    model = transformers.AutoModelForCausalLM.from_pretrained(hf_checkpoint)
    prompt = list(range(5, 25))
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=30, do_sample=False, eos_token_id=None)
    assert generate(load_base(base_dir), [prompt], 30) == [expected[0, 20:].tolist()]
