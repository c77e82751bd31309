"""Several processes, on the CPU over gloo: the same adapter, whoever shares the work and the base."""

import json
import os
import subprocess
import sys

import pytest
import torch
import training_process
from conftest import ROOT, load_script
from test_packing import random_examples
from torch.distributed.device_mesh import init_device_mesh

from lit_llama.aligner import Aligner
from lit_llama.checkpoint import load_base
from lit_llama.data import collate
from lit_llama.generation import generate
from lit_llama.losses import supervised_loss
from lit_llama.training import last_state

STEPS = 8  # two epochs of 15 examples, so that two processes share the last three
KINDS = {"one": (), "data parallel": ("--devices=2",), "sharded": ("--devices=2", "--shard_base=true")}


@pytest.fixture(scope="module")
def odd_data_dir(base_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("odd")
    rows = [{"instruction": f"Count to {n}.", "output": " ".join(map(str, range(n)))} for n in range(1, 21)]
    (folder / "a.json").write_text(json.dumps(rows))
    load_script("scripts/prepare_alpaca.py").main(
        folder / "a.json", output_dir=folder / "data", validation_share=0.25, checkpoint_dir=base_dir
    )
    return folder / "data"


def train(kind, base_dir, data_dir, out_dir, *more, launcher=(sys.executable,)):
    """Run the script in processes of its own; return the result of the last step."""
    options = {"aligner_length": 2, "batch_size": 4, "micro_batch_size": 1, "max_steps": STEPS, "warmup_steps": 1}
    options |= {"checkpoint_dir": base_dir, "data_dir": data_dir, "out_dir": out_dir, "eval_interval": 4}
    arguments = [f"--{name}={value}" for name, value in options.items()]
    command = [*launcher, ROOT / "finetune" / "aligner.py", *arguments, "--save_interval=4", *KINDS[kind], *more]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 0, result.stderr
    return torch.load(last_state(out_dir), weights_only=True)["adapter"]


@pytest.fixture(scope="module")
def runs(base_dir, odd_data_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return {kind: (folder / kind, train(kind, base_dir, odd_data_dir, folder / kind)) for kind in KINDS}


def assert_same(found, expected):
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["data parallel", "sharded"])
def test_two_processes_train_the_same_adapter(runs, kind):
    assert_same(runs[kind][1], runs["one"][1])


@pytest.mark.parametrize(("before", "after"), [("one", "sharded"), ("sharded", "data parallel"), ("sharded", "one")])
def test_resuming_with_other_processes(runs, base_dir, odd_data_dir, tmp_path, before, after):
    (tmp_path / "state-00000004.pt").write_bytes((runs[before][0] / "state-00000004.pt").read_bytes())
    assert_same(train(after, base_dir, odd_data_dir, tmp_path, "--resume=true"), runs["one"][1])


def test_torchrun(runs, base_dir, odd_data_dir, tmp_path):
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    assert_same(train("sharded", base_dir, odd_data_dir, tmp_path, launcher=torchrun), runs["one"][1])


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
    loss = supervised_loss(model, aligner, collate(random_examples([9, 20])))
    loss.backward()
    text = generate(model, [[1, 2, 3], [4]], 6, prefix=aligner)
    again = supervised_loss(model, aligner, collate(random_examples([9, 20])))
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
    options = {"folder": tmp_path, "base_dir": base_dir, "recompute": recompute}
    processes = [training_process.start(compute_sharded, rank=rank, **options) for rank in range(2)]
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    expected = compute(load_base(base_dir), recompute)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for one in found:
        for name, value in expected.items():
            torch.testing.assert_close(one[name], value, atol=1e-5, rtol=1e-5)
    assert torch.equal(found[0]["held"] + found[1]["held"], found[0]["whole"])
    assert (found[0]["held"] <= found[0]["whole"] / 2 + 64).all()
