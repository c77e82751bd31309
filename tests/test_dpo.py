"""DPO against the authors' numbers and derivations by hand."""

import csv
import json
import math
import re
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import GOLDEN, load_script
from lightning_fabric import Fabric

from lit_llama.adapters import Companion, adapter_info, load_adapter, save_adapter
from lit_llama.aligner import Aligner
from lit_llama.base import open_base
from lit_llama.checkpoint import load_base
from lit_llama.data import Batch, TokenDataset
from lit_llama.dpo_reference import cached_reference, reference_logprobs
from lit_llama.lora import LoRA
from lit_llama.losses import response_logprobs
from lit_llama.preference_losses import PAIR_LOSSES, PREFERENCE_METRICS, pair_coefficients, pair_loss
from lit_llama.states import last_state
from lit_llama.tokenizer import Tokenizer

dpo = load_script("finetune/aligner_dpo.py").main
PAIRS = [
    {"prompt": f"Count to {n}.", "chosen": " ".join(map(str, range(1, n + 1))), "rejected": "no " * (n % 4 + 1)}
    for n in range(1, 21)
]


@pytest.fixture(scope="module")
def pairs_dir(base_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, PAIRS)))
    load_script("scripts/prepare_pairs.py").main(
        data_path=folder / "pairs.jsonl", output_dir=folder / "data", validation_share=0.25, checkpoint_dir=base_dir
    )
    return folder / "data"


@pytest.fixture
def run_dpo(base_dir, pairs_dir, tmp_path):
    """Run the script; returns the rows of its metrics and its folder."""

    def call(name="dpo", **options):
        defaults = {"batch_size": 4, "micro_batch_size": 2, "max_steps": 3, "warmup_steps": 1, "eval_interval": 1}
        defaults |= {"learning_rate": 3e-2}
        paths = {"checkpoint_dir": base_dir, "data_dir": pairs_dir, "out_dir": tmp_path / name}
        dpo(**{**paths, **defaults, **options})
        with open(tmp_path / name / "metrics.csv", newline="") as file:
            rows = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
        return rows, tmp_path / name

    return call


def interleaved(chosen, rejected):
    return torch.stack([chosen, rejected], dim=1).flatten(0, 1)


@pytest.mark.parametrize("reference_name", ["base", "aligner"])
def test_numbers_are_the_authors(golden, golden_config, reference_name):
    base = load_base(GOLDEN / "lit-llama.pth", config=golden_config)
    policy = load_adapter(GOLDEN / "aligner-1.pth")
    reference = None if reference_name == "base" else load_adapter(GOLDEN / "aligner-reference.pth")
    targets = interleaved(golden["targets"], golden["rejected_targets"])
    batch = Batch(interleaved(golden["input_ids"], golden["rejected_ids"]), (targets != -1) & (torch.arange(24) > 0))
    policy_logprobs, reference_logprobs = (response_logprobs(base, adapter, batch) for adapter in (policy, reference))
    coefficients = pair_coefficients("sigmoid", beta=0.1)
    sums = pair_loss("sigmoid", policy_logprobs, reference_logprobs.detach(), batch.scored_lengths(), coefficients)
    loss = sums.metrics["loss"] / sums.count
    loss.backward()

    def expected(name):
        return golden[f"dpo-vs-{reference_name}.{name}"]

    for who, logprobs in (("policy", policy_logprobs), ("reference", reference_logprobs)):
        both = interleaved(expected(f"{who}_chosen_logps"), expected(f"{who}_rejected_logps"))
        torch.testing.assert_close(logprobs, both, atol=1e-5, rtol=1e-6)
    for name in ("chosen", "rejected"):
        mean = sums.metrics[f"{name}_reward"] / sums.count
        torch.testing.assert_close(mean, expected(f"{name}_rewards").mean(), atol=1e-5, rtol=0)
    torch.testing.assert_close(loss, expected("loss"), atol=1e-5, rtol=0)
    torch.testing.assert_close(policy.tokens.grad, expected("grad.prefix"), atol=1e-5, rtol=0)
    torch.testing.assert_close(policy.gates.grad, expected("grad.gates"), atol=1e-5, rtol=0)


def test_losses_by_hand():
    """Three pairs with beta 0.5: margins of the log-ratios h are 2, 0 and -4; the last two pairs do not count."""
    policy = torch.tensor([-10.0, -11.0, -7.0, -7.0, -9.0, -6.0, -1.0, -1.0])
    reference = torch.tensor([-11.0, -10.0, -7.0, -7.0, -8.0, -9.0, 0.0, 0.0])
    lengths = torch.tensor([3, 4, 5, 6, 7, 8, 0, 0])

    def softplus(x):  # -log sigmoid(-x)
        return math.log(1 + math.exp(x))

    def sums_with(**given):
        return pair_loss("sigmoid", policy, reference, lengths, pair_coefficients("sigmoid", beta=0.5, **given))

    sums = sums_with()
    assert sums.count == 3
    values = {name: value.item() for name, value in sums.metrics.items()}
    assert values["loss"] == pytest.approx(softplus(-1) + math.log(2) + softplus(2))
    assert values["accuracy"] == pytest.approx(1 + 0.5 + 0)
    assert values["chosen_reward"] == pytest.approx(0.5 * (1 + 0 - 1))
    assert values["rejected_reward"] == pytest.approx(0.5 * (-1 + 0 + 3))
    assert values["margin"] == pytest.approx(0.5 * (2 + 0 - 4))
    assert (values["chosen_logp"], values["rejected_logp"]) == (-26, -24)
    assert (values["chosen_length"], values["rejected_length"]) == (15, 18)
    assert values.keys() == PREFERENCE_METRICS.keys()

    smooth = sums_with(label_smoothing=0.1).metrics["loss"].item()
    expected = 0.9 * (softplus(-1) + softplus(2)) + 0.1 * (softplus(1) + softplus(-2)) + math.log(2)
    assert smooth == pytest.approx(expected)
    added = sums_with(chosen_weight=0.3).metrics["loss"].item()
    assert added == pytest.approx(values["loss"] + 0.3 * (10 / 3 + 7 / 5 + 9 / 7))


@pytest.mark.parametrize("pack", [False, True])
def test_logprobs_are_those_of_the_responses_alone(base_dir, pairs_dir, pack):
    """By hand, each response by itself: no prompt, no padding, the end-of-turn token included."""
    tokenizer, model = Tokenizer(base_dir), load_base(base_dir)
    data = TokenDataset(pairs_dir, "train", tokenizer, kind="pairs")
    found = response_logprobs(model, None, data.batch([3, 0, 7], pack))
    expected = []
    for example in [example for index in (3, 0, 7) for example in data[index]]:
        ids = torch.from_numpy(example.ids.astype("int64"))
        start = len(ids) - int(example.scored.sum())
        assert ids[-1] == tokenizer.eos_id
        logprobs = F.log_softmax(model(ids[None])[0].double(), dim=-1)
        expected.append(sum(logprobs[t - 1, ids[t]] for t in range(start, len(ids))))
    torch.testing.assert_close(found.double(), torch.stack(expected), atol=1e-4, rtol=1e-5)


def test_bfloat16_logits_are_summed_in_float32(base_dir, pairs_dir):
    model = load_base(base_dir, torch.bfloat16)
    data = TokenDataset(pairs_dir, "train", Tokenizer(base_dir), kind="pairs")
    logprobs = response_logprobs(model, None, data.batch([0, 1]))
    assert logprobs.dtype == torch.float32
    assert not torch.equal(logprobs, logprobs.bfloat16().float())


def test_starts_at_log_2(run_dpo, base_dir, tmp_path):
    """Policy and reference agree at the start: a new adapter and the base, or an adapter and itself."""
    torch.manual_seed(0)
    start = Aligner(load_base(base_dir).config, 2)
    torch.nn.init.normal_(start.gates)
    save_adapter(tmp_path / "start.safetensors", start)
    for name, options in (("new", {}), ("started", {"adapter_path": tmp_path / "start.safetensors"})):
        rows, folder = run_dpo(name, **options)
        assert rows[0]["validation_loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert rows[1]["train_loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert (rows[0]["validation_accuracy"], rows[0]["validation_margin"]) == (0.5, 0)
        assert rows[-1]["validation_loss"] < math.log(2) - 0.005
        assert rows[-1]["validation_accuracy"] > 0.5
        assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
        assert adapter_info(folder / "aligner.safetensors").validation_loss < math.log(2)
    against_base, _ = run_dpo("base", adapter_path=tmp_path / "start.safetensors", reference_path=Path("base"))
    assert abs(against_base[0]["validation_loss"] - math.log(2)) > 1e-3


@pytest.mark.parametrize("name", [name for name in PAIR_LOSSES if name != "sigmoid"])
def test_the_other_losses(run_dpo, without_pictures, name, monkeypatch):
    """Each is learned from the data, asks a reference if it has one, and records the coefficients that it used."""
    asked = []
    monkeypatch.setitem(
        dpo.__globals__, "reference_logprobs", lambda *args: asked.append(args) or reference_logprobs(*args)
    )
    rows, folder = run_dpo(loss=name, max_steps=8, eval_interval=8)
    assert rows[-1]["validation_loss"] < rows[0]["validation_loss"]
    assert rows[-1]["validation_accuracy"] > 0.5
    assert bool(asked) == PAIR_LOSSES[name].has_reference
    options = yaml.safe_load((folder / "hyperparameters.yaml").read_text())
    assert {key: options[key] for key in PAIR_LOSSES[name].coefficients} == PAIR_LOSSES[name].coefficients
    if PAIR_LOSSES[name].has_reference:
        assert (rows[0]["validation_accuracy"], rows[0]["validation_margin"]) == (0.5, 0)


def test_validation_measures_all_pairs(run_dpo, without_pictures, base_dir, pairs_dir, tmp_path):
    """By hand over the whole validation set, an Aligner against the base, micro batches of unequal size."""
    torch.manual_seed(0)
    model = load_base(base_dir)
    start = Aligner(model.config, 2)
    torch.nn.init.normal_(start.gates)
    save_adapter(tmp_path / "start.safetensors", start)
    options = {"adapter_path": tmp_path / "start.safetensors", "reference_path": Path("base"), "beta": 0.2}
    [first, *_], _ = run_dpo(max_steps=1, micro_batch_size=2, **options)

    data = TokenDataset(pairs_dir, "validation", Tokenizer(base_dir), kind="pairs")
    assert len(data) == 5
    ratios, logprobs, lengths = [], [], []
    for index in range(5):
        for example in data[index]:
            ids, scored = torch.from_numpy(example.ids.astype("int64")), torch.from_numpy(example.scored[1:])
            with torch.no_grad():
                policy, reference = (
                    -F.cross_entropy(model(ids[None], adapter)[0, :-1], ids[1:], reduction="none")[scored].sum().item()
                    for adapter in (start, None)
                )
            ratios.append(policy - reference)
            logprobs.append(policy)
            lengths.append(scored.sum().item())

    def mean(values):
        return sum(values) / 5

    margins = [0.2 * (chosen - rejected) for chosen, rejected in zip(ratios[::2], ratios[1::2], strict=True)]
    expected = {
        "loss": mean(math.log(1 + math.exp(-margin)) for margin in margins),
        "accuracy": mean(margin > 0 for margin in margins),
        "chosen_reward": 0.2 * mean(ratios[::2]),
        "rejected_reward": 0.2 * mean(ratios[1::2]),
        "margin": mean(margins),
        "chosen_logp": mean(logprobs[::2]),
        "rejected_logp": mean(logprobs[1::2]),
        "chosen_length": mean(lengths[::2]),
        "rejected_length": mean(lengths[1::2]),
    }
    found = {name: first[f"validation_{name}"] for name in expected}
    assert found == pytest.approx(expected, abs=1e-4, rel=1e-4)


def test_one_copy_of_the_base(run_dpo, without_pictures, monkeypatch, tmp_path, base_dir):
    """The reference is an Aligner of its own, and what is loaded is loaded once and stays as it is."""
    models = []
    monkeypatch.setattr(
        "lit_llama.script.machine.open_base",
        lambda *args, **more: models.append(open_base(*args, **more)) or models[-1],
    )
    reference = Aligner(load_base(base_dir).config, 3)
    torch.nn.init.normal_(reference.gates)
    save_adapter(tmp_path / "reference.safetensors", reference)
    run_dpo(reference_path=tmp_path / "reference.safetensors")
    [model] = [base.model for base in models]
    before = load_base(base_dir).state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_cached_reference_gives_the_same(run_dpo, without_pictures, base_dir, pairs_dir, tmp_path, monkeypatch):
    plain, _ = run_dpo("plain")
    cached, folder = run_dpo("cached", cache_reference=True)
    files = sorted(pairs_dir.glob("reference-*.safetensors"))
    assert len(files) == 2  # training and validation
    for before, after in zip(plain, cached, strict=True):
        for name in before.keys() - {"seconds", "tokens_per_second"}:
            assert after[name] == pytest.approx(before[name], abs=2e-4, rel=1e-4), name

    state = torch.load(last_state(folder), weights_only=True)["adapter"]
    monkeypatch.setitem(cached_reference.__globals__, "_compute", None)  # it is not computed again
    run_dpo("again", cache_reference=True)
    again = torch.load(last_state(tmp_path / "again"), weights_only=True)["adapter"]
    assert all(torch.equal(state[name], again[name]) for name in state)
    assert sorted(pairs_dir.glob("reference-*.safetensors")) == files


def test_cache_is_keyed_by_what_it_depends_on(base_dir, pairs_dir, tmp_path):
    model, tokenizer = load_base(base_dir), Tokenizer(base_dir)
    train, validation = (TokenDataset(pairs_dir, split, tokenizer, kind="pairs") for split in ("train", "validation"))
    fabric = Fabric(accelerator="cpu", devices=1)
    aligner = Aligner(model.config, 1)
    torch.nn.init.normal_(aligner.gates)
    other = Aligner(model.config, 1)
    other.load_state_dict({**aligner.state_dict(), "gates": aligner.gates + 1e-3})

    def ask(model=model, reference=None, dataset=train):
        values = cached_reference(fabric, model, reference, dataset, tmp_path, 2)
        return values, len(list(tmp_path.iterdir()))

    first, count = ask()
    assert count == 1
    assert first.shape == (15, 2)
    for n, changed in enumerate(
        [
            {"reference": aligner},
            {"reference": other},
            {"dataset": validation},
            {"model": load_base(base_dir, torch.bfloat16)},
            {"model": load_base(base_dir, quantize="int8")},
        ],
        start=2,
    ):
        assert ask(**changed)[1] == n
    assert torch.equal(ask()[0], first)
    for damaged in (lambda content: b"damaged", lambda content: content[:-1] + bytes([content[-1] ^ 1])):
        for file in tmp_path.iterdir():
            file.write_bytes(damaged(file.read_bytes()))
        assert torch.equal(ask()[0], first)  # computed again


@pytest.mark.parametrize("method", ["llama_adapter", "lora"])
def test_the_other_methods(run_dpo, without_pictures, base_dir, method, tmp_path):
    """From a new adapter and from a file, with the file as its reference, resumed to the bit."""
    rows, folder = run_dpo("new", method=method)
    assert rows[0]["validation_loss"] == pytest.approx(math.log(2), abs=1e-6)
    file = folder / f"{method}.safetensors"
    assert adapter_info(file).method == method
    options = {"adapter_path": file, "save_interval": 2, "max_steps": 4}
    rows, whole = run_dpo("whole", **options)
    assert rows[0]["validation_loss"] == pytest.approx(math.log(2), abs=1e-6)
    expected = torch.load(last_state(whole), weights_only=True)["adapter"]
    last_state(whole).unlink()
    run_dpo("whole", resume=True, **options)
    found = torch.load(last_state(whole), weights_only=True)["adapter"]
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_resuming_from_another_start_is_refused(run_dpo, without_pictures, base_dir, tmp_path):
    config = load_base(base_dir).config
    for name in "ab":
        save_adapter(tmp_path / f"{name}.safetensors", Aligner(config, 1))
    run_dpo(adapter_path=tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"reference was \w+, is \w+; start was \w+, is \w+"):
        run_dpo(adapter_path=tmp_path / "b.safetensors", resume=True)


def test_dropout_is_not_the_references(run_dpo, without_pictures, base_dir, tmp_path):
    lora = LoRA(load_base(base_dir).config, dropout=0.5)
    for parameter in lora.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    save_adapter(tmp_path / "lora.safetensors", lora)
    rows, _ = run_dpo(adapter_path=tmp_path / "lora.safetensors")
    assert rows[0]["validation_loss"] == pytest.approx(math.log(2), abs=1e-6)  # none in validation
    assert abs(rows[1]["train_loss"] - math.log(2)) > 1e-3  # but in training, of the policy


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0}, "--beta is 0, it must be larger"),
        ({"label_smoothing": 0.5}, r"--label_smoothing is 0\.5, it must be at least 0 and below 0\.5"),
        ({"loss": "ipo", "label_smoothing": 0.1}, "--label_smoothing has no meaning with --loss ipo"),
        ({"loss": "orpo", "chosen_weight": 1}, "--chosen_weight has no meaning with --loss orpo"),
        ({"loss": "orpo", "reference_path": "base"}, "--loss orpo has no reference: leave out --reference_path"),
        ({"loss": "simpo", "cache_reference": True}, "--loss simpo has no reference: leave out --cache_reference"),
        ({"loss": "ppo"}, r"--loss .*ppo.*: there are 'sigmoid', ?'robust'"),
        ({"adapter_path": "nowhere.safetensors"}, r"nowhere\.safetensors: no such file"),
        ({"reference_path": "nowhere.safetensors"}, r"nowhere\.safetensors: no such file"),
        ({"method": "prompt"}, "--method .*prompt.*: there are 'aligner'"),
    ],
)
def test_bad_options(command, base_dir, pairs_dir, tmp_path, options, message):
    paths = {"checkpoint_dir": base_dir, "data_dir": pairs_dir, "out_dir": tmp_path / "out", "warmup_steps": 1}
    status, _, err = command("finetune/aligner_dpo.py", **paths, **options)
    assert status in (1, 2)
    assert re.search(message, err), err


def test_supervised_data_are_refused(command, base_dir, data_dir, tmp_path):
    status, _, err = command(
        "finetune/aligner_dpo.py", checkpoint_dir=base_dir, data_dir=data_dir, out_dir=tmp_path / "out"
    )
    assert status == 1
    assert "holds examples for supervised tuning, expected pairs" in err


def test_start_and_reference_belong_to_the_base_as_it_is(run_dpo, base_dir, tmp_path):
    """They were trained on a quantised base, on top of another adapter."""
    model, paths = load_base(base_dir), {name: tmp_path / f"{name}.safetensors" for name in ("style", "top")}
    save_adapter(paths["style"], Aligner(model.config, 2), model)
    companion = Companion("style", adapter_info(paths["style"]).fingerprint[:16], 1.0)
    save_adapter(paths["top"], Aligner(model.config), model, also=[companion], hyperparameters={"quantize": "nf4"})
    for options in ({"adapter_path": paths["top"]}, {"reference_path": paths["top"]}):
        with pytest.raises(ValueError, match="trained on a base with --quantize nf4, and this base has none"):
            run_dpo(**options)
    with pytest.warns(UserWarning, match=r"top\.safetensors .* was trained on top of style \(scale 1\): use both"):
        _, alone = run_dpo("alone", adapter_path=paths["top"], quantize="none", max_steps=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*on top of")
        _, both = run_dpo(
            "both", adapter_path=paths["top"], also_adapter=[paths["style"]], quantize="none", max_steps=1
        )
    infos = [adapter_info(folder) for folder in (alone, both)]
    assert [info.quantize for info in infos] == [None, None]
    assert [[one.fingerprint for one in info.also] for info in infos] == [[], [companion.fingerprint]]


def test_a_run_does_not_start_from_its_own_folder(run_dpo, base_dir, tmp_path):
    """Where a run writes its adapter, which would be the start when it is resumed."""
    model = load_base(base_dir)
    save_adapter(tmp_path / "dpo/aligner.safetensors", Aligner(model.config), model)
    for name in ("adapter_path", "reference_path"):
        with pytest.raises(ValueError, match="the folder of this run, which would move it away"):
            run_dpo(**{name: tmp_path / "dpo"})
    assert [path.name for path in (tmp_path / "dpo").iterdir()] == ["aligner.safetensors"]


def test_options_of_a_new_adapter_are_not_for_another(run_dpo, base_dir, tmp_path):
    model = load_base(base_dir)
    save_adapter(tmp_path / "a.safetensors", Aligner(model.config, 2), model)
    for options, message in (
        ({"method": "lora"}, "--method lora is for a new adapter, and that of .* has aligner: leave it out"),
        ({"aligner_length": 9}, "--aligner_length 9 is for a new adapter, and that of .* has 2: leave it out"),
    ):
        with pytest.raises(ValueError, match=message):
            run_dpo(adapter_path=tmp_path / "a.safetensors", **options)
    with pytest.raises(ValueError, match="--aligner_length is the length of an Aligner, and --method is lora"):
        run_dpo(method="lora", aligner_length=3)
    _, folder = run_dpo(adapter_path=tmp_path / "a.safetensors", max_steps=1)
    recorded = adapter_info(folder).hyperparameters
    assert (recorded["method"], recorded["aligner_length"]) == ("aligner", 2)
