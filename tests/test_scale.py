"""What is said of a dial, against numbers made by hand."""

import pytest
import torch
from conftest import load_script

from lit_llama.base import open_base

scale = load_script("evaluate/scale.py")


def test_evenness_and_the_power_of_the_cost():
    rows = [
        {"scale": s, "divergence": 0.3 * s * s, "captain": share}
        for s, share in [(1.5, 0.875), (1.0, 0.9), (-0.5, 0.0), (0.5, 0.25), (0.0, 0.125)]
    ]
    assert scale.in_words(rows)[1:] == [
        "answers with captain: the largest step is 65.0%, between 0.5 and 1",
        "divergence: grows with the scale to the power of 2.00 (least squares of the logarithms)",
    ]
    assert scale.in_words(rows[:1]) == [""], "one scale says nothing of the way there"


def test_divergence_on_a_text_is_torchs(base_dir, aligner_path, tmp_path):
    text = "The heron is a bird that lives near rivers. " * 9
    (tmp_path / "text.txt").write_text(text)
    base = open_base(base_dir, aligner_path, 20.0)
    ids = base.tokenizer.encode(text, bos=True)
    parts = [torch.tensor([ids[i : i + 40]]) for i in range(0, len(ids), 40)]
    total = sum(
        float(torch.distributions.kl_divergence(*(
            torch.distributions.Categorical(logits=base.model(part, one)[0, :-1]) for one in (None, base.adapter)
        )).sum())
        for part in parts
    )  # fmt: skip
    found = scale.divergence_on(base, tmp_path / "text.txt", window=40)
    assert found == pytest.approx(total / (len(ids) - len(parts)), rel=1e-4)
    assert found > 0.001
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match="holds no text"):
        scale.divergence_on(base, tmp_path / "empty.txt")
