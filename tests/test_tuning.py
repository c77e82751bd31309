"""Training on a list of pairs, the search for a learning rate, and runs that end when nothing gets better."""

import csv
import inspect
import math
import re

import numpy as np
import pytest
import torch
import yaml
from conftest import load_script
from safetensors.torch import load_file

from lit_llama.adapters import METHODS, adapter_info
from lit_llama.aligner import Aligner
from lit_llama.base import open_base
from lit_llama.data import collate, tokenize
from lit_llama.lora import LoRA
from lit_llama.losses import supervised_loss
from lit_llama.plan import PREFERENCE_RATES, Plan
from lit_llama.prompts import Message
from lit_llama.states import last_state
from lit_llama.tuning import RATES, find_learning_rate, search_rates, train

finetune = load_script("finetune/aligner.py").main
PAIRS = [(f"Count to {n}.", " ".join(map(str, range(n)))) for n in range(1, 21)]


@pytest.fixture(scope="module")
def base(base_dir):
    return open_base(base_dir)


def loss_by_hand(base, adapter, pairs):
    """Cross-entropy per token of the responses and the tokens that end them."""
    conversations = [[Message("user", prompt), Message("assistant", response)] for prompt, response in pairs]
    examples = tokenize(base.tokenizer, base.style, conversations)
    assert all(example.ids[example.scored][-1] == base.tokenizer.eos_id for example in examples)
    with torch.no_grad():
        sums = supervised_loss(base.model, adapter, collate(examples))
    return (sums.metrics["loss"] / sums.count).item()


@pytest.mark.parametrize("out_dir", [None, "run"])
def test_an_adapter_is_trained_on_pairs(base, tmp_path, out_dir):
    """It ends with its best values, and what is returned is what these measure on pairs that were not learned."""
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    torch.manual_seed(6)
    adapter = LoRA(base.model.config, 2)
    folder = None if out_dir is None else tmp_path / out_dir
    rates = {
        "learning_rate": 3.0,
        "decay": "none",
        "warmup_steps": 0,
    }  # too high, so that the last step is not the best
    measured = train(base, adapter, PAIRS, steps=12, eval_interval=1, validation_share=0.2, out_dir=folder, **rates)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.model.state_dict().items())
    held_out = [PAIRS[i] for i in _drawn(4)]
    assert measured["loss"] == pytest.approx(loss_by_hand(base, adapter, held_out), abs=1e-4)
    assert measured["loss"] < loss_by_hand(base, None, held_out) - 0.1
    assert not adapter.training
    if folder is None:
        assert list(tmp_path.iterdir()) == []
    else:
        info = adapter_info(folder)
        assert (info.prompt_style, info.validation_loss) == (base.style.name, measured["loss"])
        assert info.hyperparameters["learning_rate"] == 3.0
        rows = list(csv.DictReader((folder / "metrics.csv").open()))
        losses = [float(row["validation_loss"]) for row in rows[1:]]
        assert min(losses) < losses[-1]
        assert min(losses) == pytest.approx(measured["loss"], abs=1e-4)


def _drawn(count):
    return sorted(np.random.default_rng(1337).permutation(len(PAIRS)).tolist()[:count])


def test_few_pairs_and_conversations(base):
    """With too few pairs to hold some out, validation measures those that are learned; a prompt may have turns."""
    turns = [Message("user", "Hi!"), Message("assistant", "Hello."), Message("user", "And you?")]
    aligner = Aligner(base.model.config)
    measured = train(base, aligner, [(turns, "Fine."), ("Who?", "Me.")], steps=2)
    conversations = [[*turns, Message("assistant", "Fine.")], [Message("user", "Who?"), Message("assistant", "Me.")]]
    examples = tokenize(base.tokenizer, base.style, conversations, "last")
    with torch.no_grad():
        sums = supervised_loss(base.model, aligner, collate(examples))
    assert measured["loss"] == pytest.approx((sums.metrics["loss"] / sums.count).item(), abs=1e-4)


def test_a_base_with_another_adapter_is_refused(base):
    """It would take no part in the loss; the adapter itself may be there, to be trained further."""
    first, second = Aligner(base.model.config), Aligner(base.model.config)
    with pytest.raises(ValueError, match=r"tiny \+ aligner .*the base has an adapter that would take no part"):
        train(base.with_adapter(first), second, PAIRS, steps=1)
    train(base.with_adapter(first), first, PAIRS, steps=1)


@pytest.mark.parametrize(
    ("pairs", "options", "message"),
    [
        ([], {}, "there is nothing to train on"),
        ([("a", "b"), ("a", " ")], {}, r"pairs\[1\] has an empty response"),
        ([("a", "b")], {"batch_size": 0, "patience": 0}, "--batch_size is 0.*--patience is 0"),
    ],
)
def test_bad_pairs(base, pairs, options, message):
    with pytest.raises(ValueError, match=message):
        train(base, Aligner(base.model.config), pairs, **options)


@pytest.mark.parametrize("best", RATES)
def test_the_search_goes_on_while_the_border_is_the_best(best):
    losses = search_rates(lambda rate: abs(math.log(rate / best)), RATES[4:7])
    tried = list(losses)
    assert min(losses, key=losses.__getitem__) == best
    assert tried == RATES[RATES.index(tried[0]) :][: len(tried)]
    assert set(RATES[4:7]) <= set(tried)
    assert best not in (tried[0], tried[-1]) or best in (RATES[0], RATES[-1])


def run(base_dir, data_dir, out_dir, **changes):
    options = {"batch_size": 4, "micro_batch_size": 4, "max_steps": 12, "warmup_steps": 1, "eval_interval": 3}
    finetune(checkpoint_dir=base_dir, data_dir=data_dir, out_dir=out_dir, **(options | changes))


def test_auto_finds_a_rate_and_changes_nothing_else(base_dir, data_dir, tmp_path, capsys, monkeypatch):
    """The run is the one with the rate given as a number, to the bit; resumed, it does not search again."""
    run(base_dir, data_dir, tmp_path / "auto", learning_rate="auto", save_interval=6)
    said = capsys.readouterr().err
    found = yaml.safe_load((tmp_path / "auto" / "hyperparameters.yaml").read_text())["learning_rate"]
    assert found in RATES
    assert f"--learning_rate auto takes {found:g}: " in said
    assert "training items kept apart" in said
    assert said.count("diverged") + said.count("  the lowest") >= 1
    assert adapter_info(tmp_path / "auto").hyperparameters["learning_rate"] == found
    run(base_dir, data_dir, tmp_path / "given", learning_rate=found)
    expected = load_file(tmp_path / "given" / "aligner.safetensors")
    assert all(
        torch.equal(tensor, expected[name])
        for name, tensor in load_file(tmp_path / "auto" / "aligner.safetensors").items()
    )

    last_state(tmp_path / "auto").unlink()
    monkeypatch.setattr("lit_llama.tuning.search_rates", None)
    run(base_dir, data_dir, tmp_path / "auto", learning_rate="auto", save_interval=6, resume=True)
    assert f"--learning_rate auto: {found:g}, as before the run was resumed" in capsys.readouterr().err
    assert all(
        torch.equal(tensor, expected[name])
        for name, tensor in load_file(tmp_path / "auto" / "aligner.safetensors").items()
    )
    run(base_dir, data_dir, tmp_path / "auto", learning_rate=found, save_interval=6, resume=True)


@pytest.mark.parametrize("method", METHODS)
def test_each_method_has_a_rate_of_its_own(base, method):
    """That of its script in finetune/, in a plan that leaves the rate open."""
    default = inspect.signature(load_script(f"finetune/{method}.py").main).parameters["learning_rate"].default
    adapter = METHODS[method](base.model.config)
    settled = find_learning_rate(None, adapter, None, None, None, base.tokenizer, Plan(learning_rate=None))
    assert settled == Plan(learning_rate=default)
    of_preferences = find_learning_rate(
        None, adapter, None, None, None, base.tokenizer, Plan(learning_rate=None), rates=PREFERENCE_RATES
    )
    assert of_preferences.learning_rate == default / 10


def test_the_search_begins_around_the_rate_of_the_method(base, monkeypatch, capsys):
    tried = []

    def search(measure, first):
        tried.extend(first)
        return {first[1]: 1.0}

    monkeypatch.setattr("lit_llama.tuning.search_rates", search)
    train(base, LoRA(base.model.config), PAIRS, learning_rate="auto", steps=1)
    assert tried == [1e-3, 3e-3, 1e-2]


def test_a_trial_measures_some_of_the_data_once(base, monkeypatch, capsys):
    """Few of the items that are kept apart tell rates apart, and what is measured before training is not needed."""
    monkeypatch.setattr("lit_llama.tuning.MOST_KEPT_APART", 2)
    measured = []

    def loss(model, adapter, batch):
        measured.extend([] if torch.is_grad_enabled() else [len(batch.items)])
        return supervised_loss(model, adapter, batch)

    train(base, Aligner(base.model.config), PAIRS * 5, learning_rate="auto", steps=2, loss=loss)
    trials = re.search(r"on 2 training items kept apart\n((?: +\S+  \S+.*\n)+)", capsys.readouterr().err)[1].count("\n")
    assert measured[:trials] == [2] * trials
    assert sum(measured[trials:]) == 2 * 10  # the run itself, before and after its steps


def test_too_few_data_to_search(base, tmp_path):
    with pytest.raises(ValueError, match="cannot be held out"):
        train(base, Aligner(base.model.config), PAIRS[:2], learning_rate="auto")


def validations(out_dir):
    rows = csv.DictReader((out_dir / "metrics.csv").open())
    return {int(row["step"]): float(row["validation_loss"]) for row in rows if row["validation_loss"]}


def test_patience_ends_a_run_that_gets_no_better(base_dir, data_dir, tmp_path, capsys):
    """With a rate that is too high, so that the loss rises; resumed or not, it ends at the same step."""
    options = {"max_steps": 60, "learning_rate": 30.0, "decay": "none", "patience": 3, "save_interval": 4}
    run(base_dir, data_dir, tmp_path / "whole", **options)
    measured = validations(tmp_path / "whole")
    steps = [step for step in measured if step > 0]
    best = min(steps, key=measured.__getitem__)
    end = steps[-1]
    assert end == best + 3 * 3 < 60
    line = f"ended at step {end} of 60: 3 validations in a row brought nothing below that of step {best}"
    assert line in capsys.readouterr().err.splitlines()
    assert int(last_state(tmp_path / "whole").stem.rpartition("-")[2]) == end
    assert adapter_info(tmp_path / "whole").step == best

    for name in ("whole", "earlier"):  # from its last state, and from the one before
        folder = tmp_path / "whole"
        if name == "earlier":
            last_state(folder).unlink()
        run(base_dir, data_dir, folder, **options, resume=True)
        assert validations(folder) == measured
        assert line in capsys.readouterr().err.splitlines()


def test_patience_is_counted_from_the_best():
    plan = Plan(max_steps=100, eval_interval=5, patience=2)
    assert [step for step in range(1, 31) if plan.is_over(step, best_step=15)] == [25, 26, 27, 28, 29, 30]
    assert not Plan(max_steps=100, eval_interval=5).is_over(99, best_step=5)
    assert Plan(max_steps=100, eval_interval=5).is_over(100, best_step=100)
