"""Never lose work: a run that is killed, stopped or refused, and what it becomes when it is resumed."""

import csv
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import training_process
from conftest import ROOT, load_script, make_hf_checkpoint
from safetensors import safe_open

from lit_llama.locks import own_folder
from lit_llama.states import last_state

finetune = load_script("finetune/aligner.py").main


def options(base_dir, data_dir, out_dir, **changes):
    values = {
        "checkpoint_dir": base_dir,
        "data_dir": data_dir,
        "out_dir": out_dir,
        "aligner_length": 2,
        "batch_size": 4,
        "micro_batch_size": 2,
        "max_steps": 60,
        "warmup_steps": 5,
        "eval_interval": 7,
        "save_interval": 3,
    }
    return values | changes


def tensors(out_dir):
    with safe_open(out_dir / "aligner.safetensors", "np") as file:
        return {name: file.get_tensor(name).tobytes() for name in file.keys()}  # noqa: SIM118


def metrics(out_dir):
    """The rows of metrics.csv, without what a clock says."""
    with open(out_dir / "metrics.csv", newline="") as file:
        return [
            {k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second")} for row in csv.DictReader(file)
        ]


@pytest.fixture(scope="module")
def uninterrupted(base_dir, data_dir, tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("whole") / "run"
    finetune(**options(base_dir, data_dir, out_dir))
    return out_dir


def assert_same_run(out_dir, expected_dir):
    assert tensors(out_dir) == tensors(expected_dir)
    assert metrics(out_dir) == metrics(expected_dir)
    state, expected = (torch.load(last_state(folder), weights_only=True) for folder in (out_dir, expected_dir))
    assert state["progress"] | {"seconds": 0} == expected["progress"] | {"seconds": 0}
    for name in expected["adapter"]:
        assert torch.equal(state["adapter"][name], expected["adapter"][name])
    for index, moments in expected["optimizer"]["state"].items():
        for name, value in moments.items():
            assert torch.equal(state["optimizer"]["state"][index][name], value)


def count_events(act):
    """Call `act` with the number of each step of the optimizer, flush and rename, before it happens and after it."""
    numbers = itertools.count(1)

    def around(function):
        def call(*args, **keywords):
            act(next(numbers))
            result = function(*args, **keywords)
            act(next(numbers))
            return result

        return call

    torch.optim.AdamW.step = around(torch.optim.AdamW.step)
    os.fsync = around(os.fsync)
    Path.replace = around(Path.replace)


def killed_at(event, **values):
    def kill(number):
        if number == event:
            os.kill(os.getpid(), signal.SIGKILL)

    count_events(kill)
    finetune(**values)


def test_killed_at_random_moments(base_dir, data_dir, tmp_path, uninterrupted):
    """Each attempt comes a few steps further, or not even to its first one; how fast it is makes no difference."""
    moments = random.Random(0)
    kills = 0
    exitcode = -signal.SIGKILL
    while exitcode == -signal.SIGKILL:
        process = training_process.start(
            killed_at, event=moments.randint(1, 80), **options(base_dir, data_dir, tmp_path, resume=True)
        )
        process.join()
        exitcode = process.exitcode
        kills += exitcode == -signal.SIGKILL
    assert exitcode == 0
    assert kills >= 10
    assert_same_run(tmp_path, uninterrupted)


def signalled(number, **values):
    def send(event):
        if event == 20:  # within the third step or so
            os.kill(os.getpid(), number)

    count_events(send)
    finetune(**values)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_and_saves(base_dir, data_dir, tmp_path, uninterrupted, number):
    values = options(base_dir, data_dir, tmp_path, save_interval=1000)
    process = training_process.start(signalled, number=number, **values)
    process.join()
    assert process.exitcode == 130
    state = last_state(tmp_path)
    assert state is not None
    step = torch.load(state, weights_only=True)["progress"]["step"]
    assert 0 < step < 10
    assert step == int(metrics(tmp_path)[-1]["step"])
    finetune(**values, resume=True)
    assert_same_run(tmp_path, uninterrupted)


def test_the_last_states_are_kept(uninterrupted):
    assert [path.name for path in sorted(uninterrupted.glob("*.pt"))] == ["state-00000057.pt", "state-00000060.pt"]


def test_a_write_that_fails_half_way_leaves_the_last_state(base_dir, data_dir, tmp_path, uninterrupted, monkeypatch):
    real_save, calls = torch.save, []

    def full_disk(state, path):
        calls.append(path)
        if len(calls) == 5:
            real_save({"adapter": state["adapter"]}, path)
            raise OSError(28, "No space left on device")
        real_save(state, path)

    values = options(base_dir, data_dir, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full_disk)
        with pytest.raises(OSError, match="No space left"):
            finetune(**values)
    assert [path.name for path in sorted(tmp_path.glob("*state*"))] == ["state-00000009.pt", "state-00000012.pt"]
    assert (tmp_path / "loss.png").is_file()  # of the validations until then
    finetune(**values, resume=True)
    assert_same_run(tmp_path, uninterrupted)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 0.5}, "--learning_rate was 0.03, is 0.5"),
        ({"seed": 3, "batch_size": 8}, "--batch_size was 4, is 8; --seed was 1337, is 3"),
        ({"checkpoint_dir": "other"}, "base was "),
        ({"data_dir": "other"}, "training data was "),
    ],
)
def test_another_run_is_not_resumed(command, base_dir, data_dir, tmp_path, uninterrupted, changes, message):
    if "checkpoint_dir" in changes:
        changes["checkpoint_dir"] = tmp_path / "base"
        load_script("scripts/convert_hf_checkpoint.py").main(make_hf_checkpoint(tmp_path / "hf", 5), tmp_path / "base")
    if "data_dir" in changes:
        changes["data_dir"] = tmp_path / "data"
        (tmp_path / "a.json").write_text('[{"instruction": "a", "output": "b"}, {"instruction": "c", "output": "d"}]')
        load_script("scripts/prepare_alpaca.py").main(
            data_path=tmp_path / "a.json", output_dir=tmp_path / "data", prompt_style="chat", checkpoint_dir=base_dir
        )
    before = tensors(uninterrupted), metrics(uninterrupted)
    values = options(base_dir, data_dir, uninterrupted, resume="true") | changes
    status, _, err = command("finetune/aligner.py", **values)
    assert status == 1
    assert "cannot be resumed with other settings: " in err
    assert message in err
    assert (tensors(uninterrupted), metrics(uninterrupted)) == before


def test_a_damaged_state_is_refused(command, base_dir, data_dir, tmp_path):
    (tmp_path / "state-00000003.pt").write_bytes(b"PK\x03\x04")
    status, _, err = command("finetune/aligner.py", **options(base_dir, data_dir, tmp_path, resume="true"))
    assert status == 1
    assert "state-00000003.pt is damaged, or is not the state of a run" in err


@pytest.mark.parametrize("resume", ["true", "false"])
def test_a_second_run_in_a_folder_ends_at_once(command, base_dir, data_dir, tmp_path, uninterrupted, resume):
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with own_folder(folder):
        status, out, err = command("finetune/aligner.py", **options(base_dir, data_dir, folder, resume=resume))
    assert (status, out) == (1, "")
    assert err == f"error: another run is writing to {folder}: wait until it ends, or choose another folder\n"
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_a_full_disk_is_one_line(base_dir, data_dir, tmp_path):
    """A file may have so many bytes: the first state, 6 kB, is the first one that has more."""
    code = (
        "import resource, signal, sys; sys.path.insert(0, sys.argv.pop(1)); import aligner\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))\n"
        "from lit_llama.script.command_line import run\n"
        "run(aligner.main)"
    )
    values = options(base_dir, data_dir, tmp_path / "run", save_interval=1)
    command = [sys.executable, "-c", code, ROOT / "finetune", *(f"--{name}={value}" for name, value in values.items())]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    [line] = [line for line in result.stderr.splitlines() if "error" in line]
    assert line == "error: [Errno 27] File too large"
    assert {path.name for path in (tmp_path / "run").iterdir()} == {".lock", "hyperparameters.yaml", "metrics.csv"}


def test_what_killed_saves_left_is_removed(base_dir, data_dir, tmp_path):
    for name in (".state-00000003.pt.abcd1234", ".metrics.csv.abcd1234", ".mine.txt.abcd1234"):
        (tmp_path / name).write_text("half")
    finetune(**options(base_dir, data_dir, tmp_path, max_steps=1, warmup_steps=0))
    assert [path.name for path in tmp_path.glob(".*.*")] == [".mine.txt.abcd1234"]


def test_a_torn_line_is_dropped(base_dir, data_dir, tmp_path, uninterrupted):
    shutil.copytree(uninterrupted, tmp_path / "run")
    with open(tmp_path / "run" / "metrics.csv", "a", newline="") as file:
        file.write("6")  # of 61
    finetune(**options(base_dir, data_dir, tmp_path / "run", resume=True))
    assert_same_run(tmp_path / "run", uninterrupted)


@pytest.mark.parametrize("junk", ["junk", "4,,,,,", "4,x,,,,,", "\0" * 9, "3" + "," * 6, ""])
def test_junk_in_the_metrics_is_named(command, base_dir, data_dir, tmp_path, uninterrupted, junk):
    shutil.copytree(uninterrupted, tmp_path / "run")
    file = tmp_path / "run" / "metrics.csv"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:5], junk, *lines[6:]]) + "\n")
    values = options(base_dir, data_dir, tmp_path / "run", resume="true")
    status, _, err = command("finetune/aligner.py", **values)
    assert status == 1
    assert f"error: {file}, line 6: expected the 7 numbers of a step" in err
    assert "Traceback" not in err
    file.unlink()  # as the message says
    assert command("finetune/aligner.py", **values)[0] == 0


def test_nothing_to_resume_begins(base_dir, data_dir, tmp_path, uninterrupted):
    finetune(**options(base_dir, data_dir, tmp_path, resume=True))
    assert_same_run(tmp_path, uninterrupted)


def test_resuming_a_finished_run_changes_nothing(base_dir, data_dir, tmp_path, uninterrupted):
    shutil.copytree(uninterrupted, tmp_path / "run")
    finetune(**options(base_dir, data_dir, tmp_path / "run", resume=True))
    for file in set(uninterrupted.iterdir()) - {uninterrupted / "hyperparameters.yaml"}:  # it names the folder
        assert (tmp_path / "run" / file.name).read_bytes() == file.read_bytes()


def test_gradients_are_clipped(base_dir, data_dir, tmp_path):
    """The first update of SGD-like size: with a tiny norm, Adam's moments hold a gradient of that norm."""
    finetune(**options(base_dir, data_dir, tmp_path, max_grad_norm=1e-3, max_steps=1, warmup_steps=0))
    state = torch.load(last_state(tmp_path), weights_only=True)
    moments = [moment["exp_avg"] / 0.1 for moment in state["optimizer"]["state"].values()]  # (1 - beta1) * gradient
    norm = torch.cat([moment.flatten() for moment in moments]).norm()
    torch.testing.assert_close(norm, torch.tensor(1e-3), atol=1e-6, rtol=0)
    assert float(metrics(tmp_path)[1]["grad_norm"]) > 1e-3
