"""Several processes, on the CPU over gloo: the same adapter, whoever shares the work and the base."""

import csv
import json
import os
import shutil
import subprocess
import sys
import unittest.mock
from typing import NamedTuple

import pytest
import torch
import training_process
from conftest import FAMILIES, ROOT, load_script, make_hf_checkpoint
from test_packing import random_examples
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from lit_llama.aligner import Aligner
from lit_llama.checkpoint import load_base
from lit_llama.data import TokenDataset, collate, step_batches
from lit_llama.generation import generate
from lit_llama.losses import supervised_loss
from lit_llama.states import last_state
from lit_llama.tokenizer import Tokenizer
from lit_llama.training import _share

STEPS = 8  # two epochs of 15 examples, so that two processes share the last three
KINDS = {"one": (), "data parallel": ("--devices=2",), "sharded": ("--devices=2", "--shard_base=true")}


@pytest.fixture(scope="module")
def odd_data_dir(base_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("odd")
    rows = [{"instruction": f"Count to {n}.", "output": " ".join(map(str, range(n)))} for n in range(1, 21)]
    (folder / "a.json").write_text(json.dumps(rows))
    load_script("scripts/prepare_alpaca.py").main(
        data_path=folder / "a.json", output_dir=folder / "data", validation_share=0.25, checkpoint_dir=base_dir
    )
    return folder / "data"


class Rank(NamedTuple):
    """As much of Fabric as sharing the work needs."""

    global_rank: int
    world_size: int
    device: torch.device = torch.device("cpu")


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("pack", [False, True])
def test_every_example_is_scored_by_one_process(base_dir, odd_data_dir, world_size, pack):
    dataset = TokenDataset(odd_data_dir, "train", Tokenizer(base_dir))
    chosen = step_batches(dataset, 3, 4, 1, seed=0)  # the last three
    shares = [list(_share(Rank(rank, world_size), dataset, chosen, pack)) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1  # they compute in step
    scored = [batch for share in shares for batch in share if batch.scored.any()]
    assert all((batch.lengths is not None) == pack for batch in scored)
    found = sorted(batch.ids[batch.scored].tolist() for batch in scored)
    expected = [dataset[index][0] for indices in chosen for index in indices]
    assert found == sorted(ids[scored].tolist() for ids, scored in expected)


@pytest.mark.parametrize("option", ["shard_base", "activation_checkpointing", "pack"])
def test_options_reach_the_model(base_dir, data_dir, tmp_path, monkeypatch, option):
    script = load_script("finetune/aligner.py")
    seen = []

    def look(model, aligner, batch):
        weight = model.transformer.h[0].attn.c_attn.weight
        seen.append((isinstance(weight, DTensor), model.transformer.h[0].recompute, batch.lengths is not None))
        return supervised_loss(model, aligner, batch)

    monkeypatch.setattr("lit_llama.objective.supervised_loss", look)
    paths = {"checkpoint_dir": base_dir, "data_dir": data_dir, "out_dir": tmp_path}
    with unittest.mock.patch.dict(os.environ):  # where Fabric notes the address of a process group
        script.main(max_steps=1, warmup_steps=1, **paths, **{option: True})
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    torch.set_num_threads(1)  # Fabric has raised it for a process group
    assert set(seen) == {(option == "shard_base", option == "activation_checkpointing", option == "pack")}


def train(kind, base_dir, data_dir, out_dir, *more, launcher=None, script="aligner"):
    """Run a script of finetune/ in processes of its own; return the result of the last step.

    Args:
        launcher: what starts all processes, such as torchrun. Without one they are forked, which saves the imports.
    """
    options = {"batch_size": 4, "micro_batch_size": 1, "max_steps": STEPS, "warmup_steps": 1}
    options |= {"checkpoint_dir": base_dir, "data_dir": data_dir, "out_dir": out_dir, "eval_interval": 4}
    options["precision"] = "32-true"  # also in processes that a launcher starts
    arguments = [f"--{name}={value}" for name, value in options.items()]
    more = [*more, "--aligner_length=2"] if script == "aligner" else more
    arguments += ["--save_interval=4", *KINDS[kind], *more]
    if launcher is None:
        ended = training_process.run_script(f"finetune/{script}.py", *arguments, processes=1 if kind == "one" else 2)
    else:
        command = [*launcher, ROOT / "finetune" / f"{script}.py", *arguments]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        ended = [subprocess.run(command, capture_output=True, text=True, env=environment)]
    for result in ended:
        assert result.returncode == 0, result.stderr
    return torch.load(last_state(out_dir), weights_only=True)["adapter"]


@pytest.fixture(scope="module")
def runs(base_dir, odd_data_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    launchers = {"data parallel": (sys.executable,)}  # the script starts the other process itself
    return {
        kind: (folder / kind, train(kind, base_dir, odd_data_dir, folder / kind, launcher=launchers.get(kind)))
        for kind in KINDS
    }


def prepare_pairs(base_dir, folder, kind):
    rows = [
        {"prompt": f"Count to {n}.", "chosen": " ".join(map(str, range(n))), "rejected": "no"} for n in range(1, 21)
    ]
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = {"data_path": folder / "a.jsonl", "validation_share": 0.25, "checkpoint_dir": base_dir}
    load_script("scripts/prepare_pairs.py").main(output_dir=folder / "data", kind=kind, **options)
    return folder / "data"


@pytest.fixture(scope="module")
def odd_pairs_dir(base_dir, tmp_path_factory):
    return prepare_pairs(base_dir, tmp_path_factory.mktemp("pairs"), "pairs")


@pytest.fixture(scope="module")
def odd_answers_dir(base_dir, tmp_path_factory):
    return prepare_pairs(base_dir, tmp_path_factory.mktemp("answers"), "unpaired")


def assert_same(found, expected):
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["data parallel", "sharded"])
def test_two_processes_train_the_same_adapter(runs, kind):
    assert_same(runs[kind][1], runs["one"][1])


@pytest.mark.parametrize(
    ("script", "kind", "more"),
    [
        ("lora", "sharded", ["--lora_targets=q", "--lora_targets=down", "--activation_checkpointing=true"]),
        ("aligner_dpo", "sharded", ["--cache_reference=true", "--learning_rate=3e-2"]),
        ("aligner_kto", "sharded", ["--learning_rate=3e-2", "--beta=1"]),
    ],
)
def test_two_processes_tune_the_same_by_the_other_scripts(
    base_dir, odd_data_dir, odd_pairs_dir, odd_answers_dir, tmp_path, script, kind, more
):
    data_dir = {"aligner_dpo": odd_pairs_dir, "aligner_kto": odd_answers_dir}.get(script, odd_data_dir)
    found = []
    for one in ("one", kind):
        folder = tmp_path / one
        shutil.copytree(data_dir, folder / "data")  # the cache is each one's own
        found.append(train(one, base_dir, folder / "data", folder / "out", *more, script=script))
        measured = [row["validation_loss"] for row in csv.DictReader((folder / "out" / "metrics.csv").open())]
        assert float(measured[-1]) < float(measured[0])
    assert_same(*found)


@pytest.mark.parametrize(("before", "after"), [("one", "sharded"), ("sharded", "data parallel"), ("sharded", "one")])
def test_resuming_with_other_processes(runs, base_dir, odd_data_dir, tmp_path, before, after):
    (tmp_path / "state-00000004.pt").write_bytes((runs[before][0] / "state-00000004.pt").read_bytes())
    assert_same(train(after, base_dir, odd_data_dir, tmp_path, "--resume=true"), runs["one"][1])


def test_torchrun(runs, base_dir, odd_data_dir, tmp_path):
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    assert_same(train("sharded", base_dir, odd_data_dir, tmp_path, launcher=torchrun), runs["one"][1])


def test_a_signal_stops_all_processes_after_a_state(base_dir, odd_data_dir, tmp_path):
    """The process that writes the state must not be ended by one that is done: that one waits until it is written."""
    (tmp_path / "signalled.py").write_text(SIGNALLED.format(root=str(ROOT)))
    options = {"checkpoint_dir": base_dir, "data_dir": odd_data_dir, "out_dir": tmp_path / "out", "max_steps": 50}
    options |= {"aligner_length": 2, "batch_size": 4, "micro_batch_size": 1, "warmup_steps": 1, "eval_interval": 9999}
    command = [sys.executable, tmp_path / "signalled.py", *(f"--{name}={value}" for name, value in options.items())]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    result = subprocess.run([*command, "--devices=2"], capture_output=True, text=True, env=environment)
    assert result.returncode == 130, result.stderr
    assert "continue with --resume" in result.stderr
    state = last_state(tmp_path / "out")
    assert state is not None
    assert state.name < "state-00000005.pt"


# The main process signals itself in its third step, and begins to write the state only when the other one has come to
# the barrier, or has left without waiting there.
SIGNALLED = """
import os, pathlib, signal, sys, time, torch
sys.path.insert(0, {root!r} + "/finetune")
import aligner
from lightning_fabric import Fabric
from lit_llama.script.command_line import run
other = int(os.environ.get("LOCAL_RANK", 0)) == 1
file = pathlib.Path(__file__)
waits, left, written = (file.with_suffix(suffix) for suffix in (".waits", ".left", ".written"))
save, step, barrier, steps = torch.save, torch.optim.AdamW.step, Fabric.barrier, []

def count(self, *args):
    steps.append(step(self, *args))
    if len(steps) == 3 and not other:
        os.kill(os.getpid(), signal.SIGTERM)

def save_late(*args):
    while not waits.exists() and not left.exists():
        time.sleep(0.01)
    save(*args)
    written.touch()

def wait(self):
    if other and steps:
        waits.touch()
    barrier(self)

torch.save, torch.optim.AdamW.step, Fabric.barrier = save_late, count, wait
try:
    run(aligner.main)
finally:
    assert not other or written.exists(), "the other process has left before the state was written"
    left.touch()
"""


def test_processes_that_nobody_asked_for_are_refused(command, base_dir, data_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0"), ("LOCAL_RANK", "0"), ("GROUP_RANK", "0")):
        monkeypatch.setenv(name, value)
    paths = {"checkpoint_dir": base_dir, "data_dir": data_dir, "out_dir": tmp_path / "out"}
    status, _, err = command("finetune/aligner.py", warmup_steps=1, **paths)
    assert status == 1
    assert "error: 2 processes were started, --devices 1 --num_nodes 1 make 1" in err
    assert not (tmp_path / "out").exists()


def compute(model, recompute):
    """Loss, gradients and a continuation."""
    if recompute:
        model.checkpoint_activations()
    torch.manual_seed(1)
    aligner = Aligner(model.config, 3)
    torch.nn.init.normal_(aligner.gates)
    loss = supervised_loss(model, aligner, collate(random_examples([9, 20]))).metrics["loss"]
    loss.backward()
    text = generate(model, [[1, 2, 3], [4]], 6, adapter=aligner)
    again = supervised_loss(model, aligner, collate(random_examples([9, 20]))).metrics["loss"]
    return {
        "loss": loss.detach(),
        "tokens": aligner.tokens.grad,
        "gates": aligner.gates.grad,
        "text": torch.tensor(text),
        "again": again.detach(),
    }


def compute_sharded(rank, folder, base_dir, recompute):
    store = torch.distributed.FileStore(str(folder / "store"), 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    model = load_base(base_dir, mesh=init_device_mesh("cpu", (2,), mesh_dim_names=("data_parallel",)))
    held = torch.tensor([parameter.to_local().numel() for parameter in model.parameters()])
    whole = torch.tensor([parameter.numel() for parameter in model.parameters()])
    torch.save(compute(model, recompute) | {"held": held, "whole": whole}, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("recompute", [False, True])
def test_each_process_holds_its_share_alone(base_dir, tmp_path, recompute):
    if recompute:  # of a model with biases and norms of heads as well, from a Hugging Face folder as it is
        base_dir = make_hf_checkpoint(tmp_path / "hf", model_type="qwen3", **FAMILIES["qwen3"])
    options = {"folder": tmp_path, "base_dir": base_dir, "recompute": recompute}
    processes = [training_process.start(compute_sharded, rank=rank, **options) for rank in range(2)]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    expected = compute(load_base(base_dir), recompute)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for one in found:
        for name, value in expected.items():
            torch.testing.assert_close(one[name], value, atol=1e-5, rtol=1e-5)
    assert torch.equal(found[0]["held"] + found[1]["held"], found[0]["whole"])
    assert (found[0]["held"] <= found[0]["whole"] / 2 + 64).all()
