"""The loop: what moves, how losses are averaged, what stops it."""

import csv
import itertools
import math
import sys

import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import load_script
from lightning_fabric import Fabric
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_llama.adapters import adapter_info, load_adapter
from lit_llama.aligner import Aligner
from lit_llama.base import open_base
from lit_llama.checkpoint import load_base
from lit_llama.data import TokenDataset
from lit_llama.losses import LossSums, supervised_loss
from lit_llama.plan import Plan
from lit_llama.prompts import Message, prompt_style
from lit_llama.runs import RunFolder
from lit_llama.samples import user_turn
from lit_llama.script.command_line import DIVERGED
from lit_llama.states import last_state
from lit_llama.tokenizer import Tokenizer
from lit_llama.training import fit

finetune = load_script("finetune/aligner.py").main


def short_run(base_dir, data_dir, out_dir, **changes):
    options = {
        "batch_size": 4,
        "micro_batch_size": 2,
        "max_steps": 2,
        "warmup_steps": 1,
        "eval_interval": 1,
        "aligner_length": 2,
    }
    finetune(checkpoint_dir=base_dir, data_dir=data_dir, out_dir=out_dir, **(options | changes))
    return torch.load(last_state(out_dir), weights_only=True)


def test_every_trainable_tensor_moves_and_no_other(base_dir, data_dir, tmp_path, monkeypatch):
    bases = []
    monkeypatch.setattr(
        "lit_llama.script.machine.open_base",
        lambda *args, **options: bases.append(open_base(*args, **options)) or bases[-1],
    )
    state = short_run(base_dir, data_dir, tmp_path)
    [model] = [base.model for base in bases]
    torch.manual_seed(1337)
    start = Aligner(model.config, 2)
    assert state["adapter"].keys() == {"tokens", "gates"}
    for name, tensor in start.state_dict().items():
        assert (state["adapter"][name] != tensor).all()
    before = load_base(base_dir).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
        assert not tensor.requires_grad


def test_loss_is_the_mean_over_all_scored_tokens_of_the_step(base_dir, data_dir, tmp_path):
    """By hand: one step of plain cross-entropy over a whole batch of unequal examples, then AdamW."""
    tokenizer = Tokenizer(base_dir)
    data = TokenDataset(data_dir, "train", tokenizer)
    n = len(data)
    state = short_run(
        base_dir, data_dir, tmp_path, batch_size=n, micro_batch_size=1, max_steps=1, weight_decay=0.1, decay="none"
    )

    torch.manual_seed(1337)
    model = load_base(base_dir)
    aligner = Aligner(model.config, 2)
    optimizer = torch.optim.AdamW(aligner.parameters(), lr=3e-2, weight_decay=0.1)
    losses = []
    for index in range(n):
        ids, scored = (torch.from_numpy(array.astype("int64")) for array in data[index][0])
        token_losses = F.cross_entropy(model(ids[None], adapter=aligner)[0, :-1], ids[1:], reduction="none")
        losses.append(token_losses[scored[1:].bool()])
    loss = torch.cat(losses).mean()
    loss.backward()
    optimizer.step()
    for name, tensor in aligner.state_dict().items():
        torch.testing.assert_close(state["adapter"][name], tensor, atol=1e-5, rtol=0)
    rows = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    assert float(rows[1]["train_loss"]) == pytest.approx(loss.item(), abs=1e-4)
    mean_of_means = torch.stack([losses_of_one.mean() for losses_of_one in losses]).mean()
    assert abs(mean_of_means - loss) > 1e-3  # the data tell the two apart


def test_micro_batches_do_not_change_the_result(base_dir, data_dir, tmp_path):
    whole = short_run(base_dir, data_dir, tmp_path / "a", batch_size=4, micro_batch_size=4)
    parts = short_run(base_dir, data_dir, tmp_path / "b", batch_size=4, micro_batch_size=1)
    for name in whole["adapter"]:
        torch.testing.assert_close(whole["adapter"][name], parts["adapter"][name], atol=1e-4, rtol=0)


def test_validation_is_the_mean_over_the_whole_set(base_dir, data_dir, tmp_path):
    short_run(base_dir, data_dir, tmp_path, micro_batch_size=2)
    rows = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    assert [row["step"] for row in rows] == ["0", "1", "2"]
    data, model = TokenDataset(data_dir, "validation", Tokenizer(base_dir)), load_base(base_dir)
    losses = []
    for index in range(len(data)):
        ids, scored = (torch.from_numpy(array.astype("int64")) for array in data[index][0])
        losses.append(F.cross_entropy(model(ids[None])[0, :-1], ids[1:], reduction="none")[scored[1:].bool()])
    assert float(rows[0]["validation_loss"]) == pytest.approx(torch.cat(losses).mean().item(), abs=1e-4)


def test_files_of_a_run(base_dir, aligner_path):
    out_dir = aligner_path.parent
    files = {"aligner.safetensors", "state-00000003.pt", "metrics.csv", "loss.png", "hyperparameters.yaml", ".lock"}
    assert {path.name for path in out_dir.iterdir()} == files
    assert load_file(aligner_path).keys() == {"tokens", "gates"}
    info = adapter_info(aligner_path)
    assert (info.method, info.prompt_style, info.base_name) == ("aligner", "chat", "tiny")
    assert info.base_fingerprint == load_base(base_dir).fingerprint
    assert info.hyperparameters["learning_rate"] == 3e-2
    best = min(
        (
            row
            for row in csv.DictReader((out_dir / "metrics.csv").open())
            if row["validation_loss"] and row["step"] != "0"
        ),
        key=lambda row: float(row["validation_loss"]),
    )
    assert info.step == int(best["step"])
    assert info.validation_loss == pytest.approx(float(best["validation_loss"]), abs=1e-4)
    assert load_adapter(aligner_path).tokens.shape == (2, 32)
    assert (out_dir / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_divergence_stops_and_keeps_the_last_good_file(base_dir, data_dir, tmp_path):
    """The loss is lost after step 22: the next five are skipped, and the adapter of step 20 stays."""
    tokenizer, model = Tokenizer(base_dir), load_base(base_dir)
    aligner = Aligner(model.config, 1)
    train, validation = (TokenDataset(data_dir, split, tokenizer) for split in ("train", "validation"))
    micro_batches = itertools.count()  # 4 at each of 2 validations, and one a step

    def loss(batch):
        sums = supervised_loss(model, aligner, batch)
        return sums if next(micro_batches) < 2 + 22 else LossSums({"loss": sums.metrics["loss"] * math.nan}, sums.count)

    plan = Plan(learning_rate=1e-3, decay="none", max_steps=30, warmup_steps=0, eval_interval=20, seed=0)
    with pytest.raises(
        FloatingPointError,
        match=r"training loss is nan at step 27; the adapter of step 20 stays in .*lower --learning_rate",
    ):
        fit(
            Fabric(accelerator="cpu", devices=1),
            aligner,
            torch.optim.AdamW(aligner.parameters()),
            loss,
            train,
            validation,
            plan,
            RunFolder(tmp_path, model, "chat", {}),
        )
    assert adapter_info(tmp_path / "aligner.safetensors").step == 20
    assert all(
        tensor.isfinite().all() for tensor in load_adapter(tmp_path / "aligner.safetensors").state_dict().values()
    )
    assert [row["step"] for row in csv.DictReader((tmp_path / "metrics.csv").open())] == [str(n) for n in range(27)]


def test_divergence_is_one_line(command, base_dir, data_dir, tmp_path):
    short_run(base_dir, data_dir, tmp_path)
    good = (tmp_path / "aligner.safetensors").read_bytes()
    options = {"checkpoint_dir": base_dir, "data_dir": data_dir, "out_dir": tmp_path}
    status, _, err = command(
        "finetune/aligner.py", learning_rate=1e30, warmup_steps=0, eval_interval=99, epochs=9, **options
    )
    assert status == DIVERGED
    assert "error: training diverged: the training loss is nan at step 6; no adapter was written" in err
    assert (tmp_path / "previous-1" / "aligner.safetensors").read_bytes() == good
    assert not (tmp_path / "aligner.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "messages"),
    [
        ({"warmup_steps": 9, "max_steps": 5}, ["--warmup_steps 9 is more than --max_steps 5"]),
        (
            {"batch_size": 6, "micro_batch_size": 4},
            ["--batch_size 6 is not a multiple of 4, which is --micro_batch_size 4"],
        ),
        ({"devices": 3}, ["--batch_size 4 is not a multiple of 12, which is --micro_batch_size 4 times --devices 3"]),
        ({"max_grad_norm": 0}, ["--max_grad_norm is 0, it must be larger"]),
        ({"aligner_init_std": -1}, ["an Aligner's init_std must be at least 0, got -1"]),
        (
            {"batch_size": 0, "devices": 0, "aligner_length": 0, "quantize": "nf4", "shard_base": "true"},
            ["--batch_size is 0", "--devices is 0", "at least one prefix token, got 0", "--quantize and --shard_base"],
        ),
        ({"num_nodes": 2, "batch_size": 8}, ["--num_nodes 2: start the script on each machine with torchrun"]),
        ({"num_nodes": 0}, ["--num_nodes is 0, it must be at least 1"]),
        ({"quantize": "nf4", "shard_base": "true"}, ["--quantize and --shard_base do not go together"]),
        ({"logger": "csv"}, ["--logger csv: there are tensorboard and wandb"]),
        ({"seed": -1}, ["--seed is -1"]),
        ({"batch_size": 0, "learning_rate": -1}, ["--batch_size is 0", "--learning_rate is -1"]),
        ({"max_seq_length": 10}, ["--max_seq_length is 10: raise it"]),
        ({"aligner_length": 0}, ["at least one prefix token"]),
        ({"aligner_start_layer": 9}, ["start layer 9"]),
        ({"data_dir": "nowhere"}, ["nowhere/dataset.json: no such file"]),
        ({"checkpoint_dir": "nowhere"}, ["nowhere: no such folder; howto/download_weights.md says"]),
    ],
)
def test_bad_options(command, base_dir, data_dir, tmp_path, options, messages):
    paths = {"checkpoint_dir": base_dir, "data_dir": data_dir, "out_dir": tmp_path / "out"}
    options = {**paths, "warmup_steps": 1, **options}
    status, out, err = command("finetune/aligner.py", **options)
    assert (status, out) == (1, "")
    [line] = [line for line in err.splitlines() if line.startswith("error: ")]
    assert all(message in line for message in messages)
    assert not (tmp_path / "out").exists()


def test_schedule_counts_optimizer_steps():
    def rates(warmup_steps, max_steps, decay):
        plan = Plan(learning_rate=0.8, warmup_steps=warmup_steps, max_steps=max_steps, decay=decay)
        rate = plan.schedule()
        return [rate(step) for step in range(max_steps)]

    assert rates(4, 6, "none") == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8, 0.8])
    assert rates(2, 6, "linear") == pytest.approx([0.4, 0.8, 0.8, 0.6, 0.4, 0.2])
    assert rates(0, 2, "none") == [0.8, 0.8]
    assert rates(3, 3, "linear") == pytest.approx([0.8 / 3, 1.6 / 3, 0.8])


def test_runs_are_reproducible(base_dir, data_dir, tmp_path):
    first, second = (short_run(base_dir, data_dir, tmp_path / name) for name in "ab")
    other = short_run(base_dir, data_dir, tmp_path / "c", seed=1)
    assert all(torch.equal(first["adapter"][name], second["adapter"][name]) for name in first["adapter"])
    assert not torch.equal(first["adapter"]["tokens"], other["adapter"]["tokens"])
    assert first["progress"]["step"] == 2


@pytest.mark.parametrize(
    ("options", "warmup_steps"),
    [({"max_steps": 3}, 1), ({"max_steps": 10}, 10), ({"max_steps": 12, "warmup_steps": 12}, 12), ({}, 10)],
)
def test_warm_up_that_nobody_asked_for_is_no_longer_than_the_run(
    command, base_dir, data_dir, tmp_path, options, warmup_steps
):
    paths = {"checkpoint_dir": base_dir, "data_dir": data_dir, "out_dir": tmp_path}
    status, _, err = command("finetune/aligner.py", batch_size=2, micro_batch_size=2, **paths, **options)
    assert status == 0, err
    assert yaml.safe_load((tmp_path / "hyperparameters.yaml").read_text())["warmup_steps"] == warmup_steps
    lowered = (
        "--warmup_steps is lowered to 1, a tenth of the run: its default of 10 is more than the 3 steps of the run"
    )
    assert (lowered in err) == (warmup_steps == 1)
    rates = [
        float(row["learning_rate"]) for row in csv.DictReader((tmp_path / "metrics.csv").open()) if row["train_loss"]
    ]
    assert rates[warmup_steps - 1] == max(rates) == pytest.approx(3e-2)


@pytest.mark.parametrize("learning_rate", [3e-2, 300.0])
def test_a_run_that_made_the_loss_no_lower_says_so(command, base_dir, data_dir, tmp_path, learning_rate):
    paths = {"checkpoint_dir": base_dir, "data_dir": data_dir, "out_dir": tmp_path}
    status, _, err = command("finetune/aligner.py", max_steps=4, learning_rate=learning_rate, **paths)
    assert status == 0, err
    losses = [
        float(row["validation_loss"])
        for row in csv.DictReader((tmp_path / "metrics.csv").open())
        if row["validation_loss"]
    ]
    assert (min(losses[1:]) >= losses[0]) == (learning_rate > 1)
    assert ("no validation was better than that before training" in err) == (learning_rate > 1)


def test_samples_are_for_people(command, base_dir, data_dir, tmp_path):
    """The user's turn, the answer and the wanted one, without what the template adds; few items are named."""
    paths = {"checkpoint_dir": base_dir, "data_dir": data_dir, "out_dir": tmp_path}
    status, _, err = command("finetune/aligner.py", max_steps=1, **paths)
    assert status == 0, err
    assert "the validation split has only 4 items, so its loss is a rough measure" in err
    samples = err[err.index("step 0: validation") : err.index("step 1: validation")].splitlines()
    kinds = [line[4:11] for line in samples if line.startswith("    ") and line[4] != " "]
    assert kinds == ["user:  ", "answer:", "wanted:"] * 2
    tokenizer = Tokenizer(base_dir)
    style = prompt_style("chat", tokenizer)
    data = TokenDataset(data_dir, "validation", tokenizer)
    for index, line in enumerate(line for line in samples if line.startswith("    user:")):
        turn = line.removeprefix("    user:").strip().replace(" slowly", "\n\nslowly")
        assert tokenizer.encode(style.prompt(turn)) == data.prompt(index)
    wanted = [line.removeprefix("    wanted:").strip() for line in samples if line.startswith("    wanted:")]
    for index, text in enumerate(wanted):
        ids, scored = data[index][0]
        assert tokenizer.decode(ids[scored].tolist()).startswith(text.removesuffix(" ..."))
        assert "<|" not in text


@pytest.mark.parametrize("name", ["alpaca", "metamath", "hh", "beaver", "none", "chat"])
def test_the_users_turn_is_cut_out_of_a_prompt(base_dir, name):
    tokenizer = Tokenizer(base_dir)
    style = prompt_style(name, tokenizer)

    def cut(messages):
        return user_turn(style, tokenizer, tokenizer.encode(style.render(messages), bos=style.bos))

    assert cut([Message("user", "Who are you?")]) == "Who are you?"
    assert cut([Message("user", "Who are you?", "at all")]).startswith("Who are you?")
    if name in ("hh", "beaver", "chat"):
        assert cut([Message("user", "Hi!"), Message("assistant", "Hello."), Message("user", "And you?")]) == "And you?"
    assert user_turn(style, tokenizer, tokenizer.encode("something else")) == "something else"


def test_what_is_shared_names_no_folder_of_the_machine(command, base_dir, data_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = {"checkpoint_dir": base_dir, "data_dir": data_dir, "out_dir": tmp_path / "out"}
    status, _, err = command("finetune/aligner.py", max_steps=1, **paths)
    assert status == 0, err
    text = (tmp_path / "out" / "hyperparameters.yaml").read_text()
    recorded = adapter_info(tmp_path / "out" / "aligner.safetensors").hyperparameters
    for values in (yaml.safe_load(text), recorded):
        assert (values["checkpoint_dir"], values["data_dir"], values["out_dir"]) == ("tiny", "alpaca", "out")
    assert str(tmp_path.parent) not in text
    assert "--config out/hyperparameters.yaml --out_dir ANOTHER --checkpoint_dir FOLDER/tiny" in text
    assert command("finetune/aligner.py", max_steps=1, resume="true", **paths)[0] == 0


def test_a_run_can_be_repeated_from_its_own_output(command, base_dir, data_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path.parent)
    first, second = tmp_path / "first", tmp_path / "second"
    options = {"checkpoint_dir": base_dir, "data_dir": data_dir, "max_steps": 2, "warmup_steps": 1, "resume": "true"}
    assert command("finetune/aligner.py", out_dir=first, learning_rate=0.01, **options)[0] == 0
    text = (first / "hyperparameters.yaml").read_text()
    for name in ("commit", "torch", "lightning-fabric", "python", "device"):
        assert f"# {name}: " in text
    assert yaml.safe_load(text)["learning_rate"] == 0.01
    status, _, err = command("finetune/aligner.py", config=first / "hyperparameters.yaml", out_dir=second)
    assert status == 0, err
    expected, found = (load_file(folder / "aligner.safetensors") for folder in (first, second))
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_tensorboard_shows_each_step_once(base_dir, data_dir, tmp_path):
    """The steps after the last state are void: the resumed run takes them again."""
    options = {"max_steps": 6, "save_interval": 3, "eval_interval": 3, "logger": ["tensorboard"], "resume": True}
    short_run(base_dir, data_dir, tmp_path, **options)
    last_state(tmp_path).unlink()
    short_run(base_dir, data_dir, tmp_path, **options)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    with open(tmp_path / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for name in ("train_loss", "validation_loss", "learning_rate", "grad_norm"):
        found = [(event.step, event.value) for event in events.Scalars(name)]
        expected = [(int(row["step"]), float(row[name])) for row in rows if row[name]]
        assert found == [(step, pytest.approx(value, rel=1e-4)) for step, value in expected]


def test_a_logger_that_is_not_installed(command, base_dir, data_dir, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    paths = {"checkpoint_dir": base_dir, "data_dir": data_dir, "out_dir": tmp_path / "out"}
    status, _, err = command("finetune/aligner.py", logger="wandb", warmup_steps=1, **paths)
    assert (status, err) == (1, "error: this needs wandb: pip install -e '.[wandb]'\n")
