"""The examples of howto/extend.md: each block runs as it stands, on a tiny base, and does what the page says."""

import re

import pytest
import torch
import transformers
from conftest import ROOT, train_tokenizer

from lit_llama.adapters import METHODS, load_adapter
from lit_llama.checkpoint import load_base
from lit_llama.combine import PerRow
from lit_llama.data import open_data
from lit_llama.losses import supervised_loss
from lit_llama.seam import by_row
from lit_llama.tuning import train

PAGE = (ROOT / "howto" / "extend.md").read_text(encoding="utf-8")
DEMO = "checkpoints/SmolLM2-135M-Instruct"


@pytest.fixture
def run_section(tmp_path, monkeypatch, base_dir):
    """Run a section's Python blocks one after the other in a folder where the tiny base stands for the demo's."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / DEMO).symlink_to(base_dir)
    monkeypatch.chdir(tmp_path)

    def run(heading):
        section = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)
        names = {}
        for block in re.findall(r"^```python\n(.*?)^```", section[1], re.DOTALL | re.MULTILINE):
            exec(compile(block, f"howto/extend.md, {heading}", "exec"), names)
        return names

    return run


def test_every_example_is_tested():
    headings = re.findall(r"^## (.*)$", PAGE, re.MULTILINE)
    assert headings == ["A method", "A model family", "A loss", "A data set", "An evaluation"]
    assert all(f"](#{heading.lower().replace(' ', '-')})" in PAGE for heading in headings)


def test_a_method(run_section, base_dir, hf_checkpoint, monkeypatch, capsys):
    peft = pytest.importorskip("peft")
    monkeypatch.setattr("lit_llama.adapters.METHODS", dict(METHODS))  # the example adds a row
    names = run_section("A method")
    assert capsys.readouterr().out.strip()
    base, scaling, merged = load_base(base_dir), load_adapter("out/scaling"), names["base"].model
    assert scaling.s.abs().min() > 0
    torch.nn.init.normal_(scaling.s, std=0.3)
    ids = torch.randint(0, base.config.vocab_size, (2, 12))
    torch.testing.assert_close(merged(ids), base(ids, load_adapter("out/scaling")), atol=1e-5, rtol=0)
    assert torch.equal(base(ids, names["Scaling"](base.config)), base(ids))
    theirs = transformers.LlamaForCausalLM.from_pretrained(hf_checkpoint)
    config = peft.IA3Config(target_modules=["v_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(theirs, config).eval()
    parameters = [parameter for name, parameter in theirs.named_parameters() if "ia3" in name]
    with torch.no_grad():
        for parameter, s in zip(parameters, scaling.s, strict=True):
            parameter.copy_((1 + s).view_as(parameter))
        expected = theirs(ids).logits
    torch.testing.assert_close(base(ids, scaling), expected, atol=1e-4, rtol=0)
    assert (expected - base(ids)).abs().max() > 0.1


def test_a_method_whose_adapters_are_stacked(tiny_model, monkeypatch):
    """The example's class with the two changes that the page names."""
    monkeypatch.setattr("lit_llama.adapters.METHODS", dict(METHODS))
    code = re.search(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)[1]
    for old, new in (
        ("self.s[None, index]", "by_row(self.s[..., index, :], 1)"),
        ('    method = "scaling"', '    takes_rows = True\n    method = "scaling"'),
    ):
        assert code.count(old) == 1
        code = code.replace(old, new)
    names = {"by_row": by_row}
    exec(code, names)
    rows = [names["Scaling"](tiny_model.config).requires_grad_(False) for _ in range(3)]
    for row in rows:
        torch.nn.init.normal_(row.s, std=0.3)
    ids = torch.randint(96, (3, 10))
    expected = torch.cat([tiny_model(one[None], row) for one, row in zip(ids, rows, strict=True)])
    torch.testing.assert_close(tiny_model(ids, PerRow(rows)), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_family(run_section, tmp_path, tied):
    folder = tmp_path / "models" / "ernie"
    folder.mkdir(parents=True)
    config = transformers.Ernie4_5Config(
        vocab_size=train_tokenizer(folder),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        initializer_range=0.1,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    theirs = transformers.Ernie4_5ForCausalLM(config).eval()
    theirs.save_pretrained(folder)
    run_section("A model family")
    ids = torch.randint(0, config.vocab_size, (2, 20))
    with torch.no_grad():
        ours = load_base(tmp_path / "checkpoints/ernie")(ids)
        torch.testing.assert_close(ours, theirs(ids).logits, atol=1e-5, rtol=0)


def test_a_loss(run_section, capsys, tmp_path):
    names = run_section("A loss")
    model, batch, loss = names["base"].model, names["batch"], names["loss_near_the_base"]
    said = eval(capsys.readouterr().out)
    plain = supervised_loss(model, None, batch)
    expected = float(plain.metrics["loss"] / plain.count)
    assert said == pytest.approx({"loss": expected, "divergence": 0}, abs=1e-5)  # a fresh Aligner is the base
    torch.manual_seed(0)
    aligner = names["Aligner"](model.config)
    torch.nn.init.normal_(aligner.gates, std=10)
    sums, alone = loss(model, aligner, batch), supervised_loss(model, aligner, batch)
    assert sums.count == alone.count
    # The divergence from whole probabilities of all positions.
    scored = batch.scored[0, 1:]
    ours, base = (model(batch.ids, adapter)[0, :-1][scored].float().softmax(-1) for adapter in (aligner, None))
    divergence = (base * (base / ours).log()).sum()
    assert float(divergence) > 0.1
    torch.testing.assert_close(sums.metrics["divergence"], divergence.detach(), atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(sums.metrics["loss"], alone.metrics["loss"] + 0.1 * divergence, atol=1e-3, rtol=1e-4)
    sums.metrics["loss"].backward()
    assert aligner.tokens.grad.abs().sum() > 0
    measured = {"loss": "loss per scored token (nats)", "divergence": "divergence from the base (nats)"}
    file = tmp_path / "run" / "metrics.csv"
    best = train(
        names["base"], names["Aligner"](model.config), [("a b", "c d")] * 4,
        steps=2, loss=loss, measured=measured, out_dir=file.parent,
    )  # fmt: skip
    assert best["divergence"] > 0
    assert "validation_divergence" in file.read_text().splitlines()[0]


def test_a_data_set(run_section, base_dir):
    names = run_section("A data set")
    tokenizer, (train, validation) = open_data(base_dir, names["Path"]("data/capitals"), 512)
    assert (len(train), len(validation)) == (4, 2)
    answers = [tokenizer.decode(example.ids[example.scored].tolist()) for i in range(2) for example in validation[i]]
    assert [answer.split(",")[0] for answer in answers] == ["Lima", "Tehran"]


def test_an_evaluation(run_section, tmp_path, aligner_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/demo").symlink_to(aligner_path.parent)
    run_section("An evaluation")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0].split(" (")[0] for line in lines] == ["tiny", "tiny + out/demo"]
    assert all(re.search(r"\d of 4 are short, 95% interval \d+% to \d+%", line) for line in lines)
