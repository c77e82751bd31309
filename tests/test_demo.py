"""What the demo promises, on the real base; and the GPU path."""

import json

import pytest
import torch
from conftest import DEMO_BASE, load_script

from lit_llama.aligner import Aligner
from lit_llama.checkpoint import load_base


@pytest.mark.slow
@pytest.mark.parametrize(("form", "least"), [("captain", 0.9), ("json", 0.9), ("followup", 0.5)])
def test_one_token_carries_a_form(tmp_path, form, least):
    """The followup form is too much for one token: RESULTS.md has 65% for it, and 94% with ten."""
    torch.set_num_threads(torch.get_num_interop_threads())
    data_dir, out_dir = tmp_path / "data", tmp_path / "out"
    load_script("scripts/prepare_examples.py").main(form, checkpoint_dir=DEMO_BASE, output_dir=data_dir)
    load_script("finetune/aligner.py").main(DEMO_BASE, data_dir=data_dir, out_dir=out_dir)
    load_script("evaluate/form.py").main(form, out_dir=out_dir, checkpoint_dir=DEMO_BASE)
    report = json.loads((out_dir / "report.json").read_text())
    assert report["held_out_prompts"] >= 20
    assert report["trainable_parameters"] == 828
    assert report["aligned_compliance"] >= least
    assert report["base_compliance"] <= 0.05


@pytest.mark.gpu
@pytest.mark.parametrize("length", [1, 3])
def test_gpu_in_bfloat16_is_near_the_cpu_in_float32(base_dir, length):
    ids = torch.arange(5, 60)[None]
    logits = {}
    for device in ("cpu", "cuda"):
        model = load_base(base_dir, device=device)
        torch.manual_seed(0)
        aligner = Aligner(model.config, length)
        torch.nn.init.normal_(aligner.gates)
        logits[model.dtype] = model(ids.to(device), adapter=aligner.to(device)).float().cpu()
    exact = logits[torch.float32]
    assert (logits[torch.bfloat16] - exact).norm() / exact.norm() < 0.03
