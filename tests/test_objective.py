"""Frozen adapters, scales and kept text, against losses computed by hand from all logits."""

import json
import warnings

import pytest
import torch
import torch.nn.functional as F
from conftest import load_script, random_aligner
from test_combine import random_lora

from lit_llama.adapters import adapter_fingerprint, adapter_info, load_adapter
from lit_llama.aligner import Aligner
from lit_llama.base import open_base
from lit_llama.bias import Bias
from lit_llama.combine import OnPrompt, PerPosition, WeightedSum
from lit_llama.data import Example as One
from lit_llama.data import collate
from lit_llama.losses import supervised_loss
from lit_llama.objective import KeptText, Objective, read_kept_text
from lit_llama.tokenizer import Tokenizer


def examples(count, length=12, prompt=4):
    made = []
    for i in range(count):
        ids = torch.randint(96, (length + i,), generator=torch.Generator().manual_seed(i)).numpy()
        made.append(One(ids, torch.arange(length + i).ge(prompt).numpy()))
    return made


def training_batch(items, pack=False, step=3):
    made = examples(8)
    return collate([made[i] for i in items], pack)._replace(items=items, step=step)


def random_bias(config):
    bias = Bias(config)
    torch.nn.init.normal_(bias.vectors, std=0.5)
    return bias


def adapters(config):
    return [random_aligner(config, 1), random_aligner(config, 5), random_lora(config, ["q", "up"]), random_bias(config)]


@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("pack", [False, True])
def test_each_example_has_its_own_scale(tiny_model, which, pack):
    adapter, scales = adapters(tiny_model.config)[which], torch.tensor([0.0, 0.5, -1.5])
    made = examples(3)
    batch = collate(made, pack)
    scaled = PerPosition(adapter, batch.per_position(scales))
    found = tiny_model(batch.ids, scaled, lengths=batch.lengths)
    for i, (example, scale) in enumerate(zip(made, scales.tolist(), strict=True)):
        ids = torch.from_numpy(example.ids)[None]
        start = sum(batch.lengths[:i]) if pack else 0
        own = found[0 if pack else i, start : start + ids.size(1)]
        torch.testing.assert_close(own, tiny_model(ids, WeightedSum((adapter, scale)))[0], atol=1e-4, rtol=1e-4)


def test_without_options_it_is_the_loss_alone(tiny_model):
    aligner, batch = random_aligner(tiny_model.config, 2), training_batch([0, 1, 2])
    found = Objective(tiny_model).supervised(aligner, batch)
    expected = supervised_loss(tiny_model, aligner, batch)
    assert found.metrics.keys() == {"loss"}
    torch.testing.assert_close(found.metrics["loss"], expected.metrics["loss"], atol=0, rtol=0)


def by_hand(model, objective, adapter, batch, scales):
    """The cross-entropy with the mixture, by soft targets, less the entropy that the divergence leaves out."""
    total = 0
    for row, scale in enumerate(scales):
        at = batch.predicts_scored()[row]
        after = model(batch.ids[row : row + 1], WeightedSum(*objective.frozen, (adapter, scale)))[0, at]
        before = model(batch.ids[row : row + 1], objective.before)[0, at].softmax(-1)
        c = min(max(scale, 0), 1)
        target = (1 - c) * before + c * F.one_hot(batch.ids[row, batch.scored[row]], before.size(-1))
        entropy = -(before * before.log()).sum()
        total = total + F.cross_entropy(after, target, reduction="sum") - (1 - c) * entropy
    return total


def test_the_target_is_the_mixture_of_before_and_form(tiny_model):
    aligner, frozen = random_aligner(tiny_model.config, 2), random_aligner(tiny_model.config, 3)
    objective = Objective(tiny_model, 7, [(frozen, 0.5)], (-0.5, 1.5))
    batch = training_batch([4, 0, 2, 7, 5])
    scales = objective._scales(batch).tolist()
    assert min(scales) < 0.3 < 1 < max(scales), scales
    found = objective.supervised(aligner, batch).metrics["loss"]
    expected = by_hand(tiny_model, objective, aligner, batch, scales)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-5)
    for own, other in zip(
        torch.autograd.grad(found, aligner.parameters()),
        torch.autograd.grad(expected, aligner.parameters()),
        strict=True,
    ):
        torch.testing.assert_close(own, other, atol=1e-3, rtol=1e-4)


def test_validation_measures_the_form_at_scale_one(tiny_model):
    aligner, batch = random_aligner(tiny_model.config, 2), training_batch([0, 1])._replace(step=None)
    found = Objective(tiny_model, scale_range=(0, 1)).supervised(aligner, batch).metrics["loss"]
    torch.testing.assert_close(found, supervised_loss(tiny_model, aligner, batch).metrics["loss"], atol=0, rtol=0)


def kept_text(weight=2.0):
    return KeptText(examples(6, 9, prompt=1), examples(2, 5, prompt=1), weight)


def test_kept_text_adds_its_divergence(tiny_model):
    aligner, batch = random_aligner(tiny_model.config, 2), training_batch([0, 1, 2])
    objective = Objective(tiny_model, 1, kept=kept_text())
    found = objective.supervised(aligner, batch)
    drawn = [objective.kept.pieces[int(6 * number)] for number in objective._draws(batch)[:, 1]]
    assert len({id(piece) for piece in drawn}) > 1
    kept = 0
    for piece, scored in zip(drawn, batch.scored_lengths(), strict=True):
        ids = torch.from_numpy(piece.ids)[None]
        before, after = (
            torch.distributions.Categorical(logits=tiny_model(ids, one)[0, :-1]) for one in (None, aligner)
        )
        kept = kept + scored * torch.distributions.kl_divergence(before, after).mean()
    torch.testing.assert_close(found.metrics["kept"], kept, atol=1e-3, rtol=1e-4)
    alone = supervised_loss(tiny_model, aligner, batch).metrics["loss"]
    torch.testing.assert_close(found.metrics["loss"], alone + 2 * kept, atol=1e-3, rtol=1e-4)
    fresh = objective.supervised(load_fresh(tiny_model), batch)
    assert abs(float(fresh.metrics["kept"].detach())) < 1e-3, "an adapter that adds nothing diverges nowhere"


@torch.no_grad()
def test_kept_text_is_half_a_prompt(tiny_model):
    """A prefix for the prompt alone acts on the first half of each piece, and the second half shows what it left."""
    aligner, batch = Aligner(tiny_model.config, 2, 1, positions="prompt"), training_batch([0, 1, 2])
    aligner.load_state_dict(random_aligner(tiny_model.config, 2).state_dict())
    objective = Objective(tiny_model, 1, kept=kept_text())
    found = objective.supervised(aligner, batch).metrics["kept"]
    kept = 0
    for number, scored in zip(objective._draws(batch)[:, 1], batch.scored_lengths(), strict=True):
        ids = torch.from_numpy(objective.kept.pieces[int(6 * number)].ids)[None]
        half = torch.arange(ids.size(1))[None] < (ids.size(1) + 1) // 2
        before, after = (
            torch.distributions.Categorical(logits=tiny_model(ids, one)[0, :-1])
            for one in (None, OnPrompt(aligner, half))
        )
        kept = kept + scored * torch.distributions.kl_divergence(before, after).mean()
    torch.testing.assert_close(found, kept, atol=1e-3, rtol=1e-4)
    assert found > 0.1


def load_fresh(model):
    aligner = random_aligner(model.config, 2)
    aligner.scale_(0)
    return aligner


@pytest.mark.parametrize("pack", [False, True])
def test_a_step_cut_differently_draws_the_same(tiny_model, pack):
    aligner = random_aligner(tiny_model.config, 2)
    objective = Objective(tiny_model, 5, scale_range=(0, 1.5), kept=kept_text())

    def total(*parts):
        sums = [objective.supervised(aligner, training_batch(items, pack)) for items in parts]
        return [sum(float(one.metrics[name].detach()) for one in sums) for name in ("loss", "kept")]

    assert total([3, 0, 6, 2]) == pytest.approx(total([6], [2, 3], [0]), rel=1e-3)
    at = [objective.supervised(aligner, training_batch([0, 1], step=step)) for step in (3, 4)]
    kept = [float(one.metrics["kept"].detach()) for one in at]
    assert kept[0] != pytest.approx(kept[1], rel=1e-3), "each step draws"


def test_pairs_weigh_their_text_equally(tiny_model):
    aligner = random_aligner(tiny_model.config, 2)
    objective = Objective(tiny_model, 5, kept=kept_text())
    made = examples(8)

    def kept(*items, scored=True):
        batch = collate([made[2 * i + j] for i in items for j in (0, 1)])._replace(items=items, step=0)
        if not scored:
            batch = batch._replace(scored=torch.zeros_like(batch.scored))
        sums = supervised_loss(tiny_model, aligner, batch)
        return float(objective.keep(sums, aligner, batch, per_item=True).metrics["kept"].detach())

    assert kept(0, 3, 1) == pytest.approx(kept(0) + kept(3) + kept(1), rel=1e-3)
    assert kept(0, scored=False) == 0, "a batch that fills the place of none counts nothing"


def test_kept_text_is_read_in_pieces(base_dir, tmp_path):
    tokenizer = Tokenizer(base_dir)
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": f"Text {i} is short."}) for i in range(20)))
    kept = read_kept_text(tmp_path / "a.jsonl", tokenizer, 1.0)
    assert [len(kept.pieces), len(kept.held_out)] == [18, 2]
    assert tokenizer.decode(kept.held_out[0].ids.tolist()) == "Text 9 is short."
    (tmp_path / "b.txt").write_text("many words " * 200)
    kept = read_kept_text(tmp_path / "b.txt", tokenizer, 1.0)
    lengths = [len(piece.ids) for piece in kept.pieces]
    assert max(lengths) <= 128
    assert max(lengths) - min(lengths) <= 1
    (tmp_path / "c.jsonl").write_text('{"question": "no"}')
    with pytest.raises(ValueError, match=r'c\.jsonl, line 1.*with a "text", found question'):
        read_kept_text(tmp_path / "c.jsonl", tokenizer, 1.0)


def tune(base_dir, data_dir, out_dir, script="finetune/aligner.py", **options):
    defaults = {"batch_size": 4, "micro_batch_size": 2, "max_steps": 4, "warmup_steps": 1, "eval_interval": 4}
    folders = {"checkpoint_dir": base_dir, "data_dir": data_dir, "out_dir": out_dir}
    load_script(script).main(**folders, **(defaults | {"save_interval": 1} | options))
    return load_adapter(out_dir)


@pytest.fixture
def conditions(aligner_path, tmp_path):
    text = tmp_path / "plain.txt"
    text.write_text("The heron is a bird that lives near rivers. " * 20)
    return {"also_adapter": [aligner_path], "scale_range": (0.0, 1.5), "keep_weight": 1.0, "keep_data": text}


def test_a_run_resumes_and_says_what_it_stands_on(base_dir, data_dir, tmp_path, conditions, aligner_path):
    whole = tune(base_dir, data_dir, tmp_path / "whole", **conditions)
    tune(base_dir, data_dir, tmp_path / "cut", **conditions)
    (tmp_path / "cut" / "state-00000004.pt").unlink()
    resumed = tune(base_dir, data_dir, tmp_path / "cut", **conditions, resume=True)
    assert adapter_fingerprint(resumed) == adapter_fingerprint(whole)
    differently = tune(base_dir, data_dir, tmp_path / "one", **conditions, micro_batch_size=1)
    torch.testing.assert_close(differently.gates, whole.gates, atol=1e-4, rtol=1e-3)
    header = (tmp_path / "whole" / "metrics.csv").read_text().splitlines()[0]
    assert {"train_kept", "validation_kept"} <= set(header.split(","))
    [companion] = adapter_info(tmp_path / "whole").also
    assert (companion.name, companion.scale) == ("aligner.safetensors", 1)
    assert companion.fingerprint == adapter_fingerprint(load_adapter(aligner_path))[:16]
    with pytest.warns(UserWarning, match=r"trained on top of aligner\.safetensors \(scale 1\): use both together"):
        base = open_base(base_dir, tmp_path / "whole")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        both = base.with_adapter([aligner_path, tmp_path / "whole"])
    ids = torch.tensor([[5, 6, 7]])
    expected = WeightedSum((load_adapter(aligner_path), 1.0), (whole, 1.0))
    torch.testing.assert_close(both.model(ids, both.adapter), base.model(ids, expected), atol=0, rtol=0)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"scale_range": (0.0, 1.0)}, "--scale_range was"),
        ({"keep_weight": 2.0}, "--keep_weight was 1.0, is 2.0"),
        ({"keep_data": None}, "kept text was"),
        ({"also_scale": [0.5]}, "--also_scale was None"),
        ({"also_adapter": None}, "also_adapter was"),
    ],
)
def test_a_run_is_not_resumed_under_other_conditions(base_dir, data_dir, tmp_path, conditions, changed, said):
    tune(base_dir, data_dir, tmp_path / "run", **conditions, max_steps=1)
    if "keep_data" in changed:
        changed = {"keep_data": tmp_path / "other.txt"}
        changed["keep_data"].write_text("Something else altogether. " * 20)
    with pytest.raises(ValueError, match=said):
        tune(base_dir, data_dir, tmp_path / "run", **(conditions | changed), max_steps=1, resume=True)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"scale_range": (1.0, 0.0)}, "expected a smaller and a larger number"),
        ({"scale_range": (-1.0, 0.0)}, "nowhere above 0"),
        ({"keep_weight": -1.0, "also_scale": [1.0]}, "--keep_weight is -1.0.*--also_scale is given without"),
        ({"keep_data": "a.txt"}, "--keep_data is given without a --keep_weight"),
    ],
)
def test_conditions_without_meaning_are_refused(base_dir, data_dir, tmp_path, options, said):
    with pytest.raises(ValueError, match=said):
        tune(base_dir, data_dir, tmp_path / "out", **options)


def test_text_to_keep_is_read_before_the_base(base_dir, data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("lit_llama.script.machine.open_base", pytest.fail)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl"):
        tune(base_dir, data_dir, tmp_path / "out", keep_weight=1.0, keep_data=tmp_path / "nowhere.jsonl")


def test_preferences_refuse_the_scale_by_name(command, base_dir, data_dir):
    status, _, err = command("finetune/aligner_dpo.py", "--scale_range", "0", "1", checkpoint_dir=base_dir)
    assert (status, "--scale_range is refused here: a pair does not say" in err) == (1, True), err
