"""Options as people write them: flags, lists, other names, files of options; and one line for what goes wrong."""

import errno
import sys
from pathlib import Path
from typing import Literal

import pytest
import torch
from conftest import load_script

from lit_llama.script.command_line import run
from lit_llama.script.errors import explain
from lit_llama.script.parser import parse


def script(
    resume: bool = False,
    keep: bool = True,
    batch_size: int = 4,
    name: list[str] | None = None,
    decay: Literal["none", "linear"] = "none",
    adapter_path: Path | None = None,
    adapter_scale: float = 1.0,
) -> None:
    """Do nothing.

    Args:
        resume: go on.
        keep: keep it.
        batch_size: how many.
        name: names.
        decay: how.
        adapter_path: a file.
        adapter_scale: how much.
    """


def refusal(args, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(script, args)
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "resume", "keep"),
    [
        ([], False, True),
        (["--resume"], True, True),
        (["--resume", "true", "--keep", "false"], True, False),
        (["--resume=True", "--keep=False"], True, False),
        (["--resume", "--no_keep"], True, False),
        (["--resume", "--batch_size", "4"], True, True),
        (["--resume", "--no_resume"], False, True),
        (["--resume", "false"], False, True),
    ],
)
def test_flags_need_no_value(args, resume, keep):
    options = parse(script, args)
    assert (options["resume"], options["keep"], options["batch_size"]) == (resume, keep, 4)


def test_flags_of_all_scripts():
    assert parse(script, [])["debug"] is False
    assert parse(script, ["--debug"])["debug"] is True


def test_wrong_values_are_named(capsys):
    assert refusal(["--resume", "perhaps"], capsys) == (
        "error: --resume perhaps: there are 'true', 'false' (--help lists the options)\n"
    )
    assert "--batch_size two: expected NUMBER" in refusal(["--batch_size", "two"], capsys)
    assert "--decay cosine: there are 'none', 'linear'" in refusal(["--decay", "cosine"], capsys)
    assert "no_batch_size" in refusal(["--no_batch_size"], capsys)
    assert "expected" in refusal(["--batch_size", "--resume"], capsys)


def test_help_shows_flags_without_a_value(capsys):
    with pytest.raises(SystemExit):
        parse(script, ["--help"])
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "--resume go on." in lines
    assert "--keep keep it. (on; --no_keep turns it off)" in lines
    assert "--batch_size NUMBER how many. (default: 4)" in lines


def test_lists_are_repeated_and_taken_as_they_are():
    texts = ['a "quote"', "--dashes", "[1, 2]", "é\n🦙", ""]
    args = [part for text in texts for part in ("--name", text)]
    assert parse(script, [*args, "--resume"])["name"] == texts


@pytest.mark.parametrize("method", ["adapter", "aligner", "llama_adapter", "lora"])
def test_files_of_options_know_other_names(method, tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text(f"{method}_path: out/demo\n{method}_scale: 5e-1\nresume: true\nname: ['1', x]\n")
    options = parse(script, ["--config", str(file), "--batch_size", "2"])
    found = (str(options["adapter_path"]), options["adapter_scale"], options["resume"], options["batch_size"])
    assert found == ("out/demo", 0.5, True, 2)


@pytest.mark.parametrize("name", ["int8-fast", "int8-weights"])
def test_former_names_of_quantisations(name, tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text(f"quantize: {name}\n")
    for args in (["--quantize", name], [f"--quantize={name}"], ["--config", str(file)]):
        assert parse(load_script("generate/base.py").main, args)["quantize"] == "int8-fast"
    assert parse(load_script("generate/base.py").main, ["--quantize", "nf4"])["quantize"] == "nf4"


@pytest.mark.parametrize("content", ["[1, 2]", "a: [", "unknown: 1", "batch_size: two"])
def test_bad_files_of_options(content, tmp_path, capsys):
    file = tmp_path / "options.yaml"
    file.write_text(content)
    err = refusal(["--config", str(file)], capsys)
    assert err.count("\n") == 1


def test_what_is_lacking_is_named(tmp_path, capsys):
    assert refusal(["--config", str(tmp_path / "none.yaml")], capsys) == (
        f"error: --config: {tmp_path / 'none.yaml'}: no such file (--help lists the options)\n"
    )
    with pytest.raises(SystemExit):
        parse(load_script("scripts/prepare_instructions.py").main, ["--data_path", "a.json"])
    assert "error: these options are required: --instruction_column, --response_column (" in capsys.readouterr().err


OUT_OF_MEMORY = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_out_of_memory_says_what_to_lower(error):
    options = {"micro_batch_size": 4, "batch_size": 64, "max_seq_length": 512, "shard_base": False, "max_rows": 1}
    assert explain(error, options) == (
        "out of memory: try a smaller --micro_batch_size, or a smaller --max_seq_length, "
        "or --shard_base with several GPUs"
    )
    assert "--batch_size" in explain(error, {"batch_size": 8})
    assert "--precision bf16-true" in explain(error, {"precision": "32-true"})
    assert "--quantize" in explain(error, {"quantize": None})
    assert explain(error, {"quantize": "nf4"}) == "out of memory: this needs a machine with more memory"


def test_memory_that_a_cpu_does_not_have():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8)
    assert explain(raised.value, {"micro_batch_size": 2}) == "out of memory: try a smaller --micro_batch_size"


def fails() -> None:
    """Fail as only a fault of the program does."""
    raise KeyError("layer\nthree")


@pytest.mark.parametrize("how", ["--debug", "variable", "neither"])
def test_unexpected_errors_say_so(how, monkeypatch, capsys):
    monkeypatch.setenv("ALIGNER_DEBUG", "1" if how == "variable" else "0")
    monkeypatch.setattr(sys, "argv", ["script.py", *(["--debug"] if how == "--debug" else [])])
    with pytest.raises(SystemExit) as stop:
        run(fails)
    err = capsys.readouterr().err
    assert stop.value.code == 1
    last = err.splitlines()[-1]
    assert last.startswith("error: unexpected KeyError: 'layer\\nthree' (test_parser.py:")
    assert "--debug" in last
    assert ("Traceback" in err) == (how != "neither")
    assert how != "neither" or err.count("\n") == 1
