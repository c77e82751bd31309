"""llama.cpp reads exported GGUF files: the same log-probabilities as ours, and the demo's form in its answers."""

import json

import pytest
import torch
from conftest import DEMO_BASE, ROOT, load_script, make_hf_checkpoint
from test_convert import bpe_fields, write_gguf
from test_export import save_aligner

from lit_llama.adapters import load_adapter
from lit_llama.checkpoint import load_base
from lit_llama.evaluation.forms import FORMS
from lit_llama.formats.llama_cpp import LlamaCpp
from lit_llama.generation import generate

BASE = DEMO_BASE.with_name(DEMO_BASE.name + ".Q4_1.gguf")
CAPTAIN = ROOT / "examples" / "adapters" / "captain.safetensors"
export = load_script("scripts/export_gguf.py")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a tiny base as GGUF and converted, an Aligner for it, and both in one GGUF file."""
    folder = tmp_path_factory.mktemp("tiny")
    source = make_hf_checkpoint(folder / "hf")
    write_gguf(folder / "base.gguf", source, bpe_fields(source))
    load_script("scripts/convert_gguf_checkpoint.py").main(folder / "base.gguf", folder / "base")
    aligner = save_aligner(folder / "a.safetensors", folder / "base", 1)
    export.main(folder / "base.gguf", folder / "folded.gguf", adapter_path=[aligner])
    return folder


def test_tokens_and_their_probabilities(tiny):
    model, adapter = load_base(tiny / "base"), load_adapter(tiny / "a.safetensors")
    llama_cpp = LlamaCpp(tiny / "folded.gguf", length=256, exact=True)
    for prompt in torch.randint(5, 390, (4, 20), generator=torch.Generator().manual_seed(0)).tolist():
        told = llama_cpp.complete(prompt, 3, likeliest=10_000)
        assert [told.tokens] == generate(model, [prompt], 3, adapter=adapter)
        with torch.no_grad():
            ours = model(torch.tensor([prompt + told.tokens]), adapter)[0, len(prompt) - 1 : -1].log_softmax(-1)
        theirs = torch.tensor([[place[token] for token in range(ours.size(1))] for place in told.logprobs])
        torch.testing.assert_close(theirs, ours, atol=1e-3, rtol=0)
        assert min(told.prefill_seconds, told.decode_seconds) > 0


def test_verify_export(tiny, command):
    options = {"export_path": tiny / "folded.gguf", "checkpoint_dir": tiny / "base", "n_prompts": 2}
    options |= {"max_new_tokens": 8, "least_correlation": 0.9999}
    status, out, err = command("scripts/verify_export.py", **options, adapter_path=tiny / "a.safetensors")
    assert status == 0, err
    assert "the same; llama.cpp, 2 prompts: 16 of 16 greedy tokens the same" in out, out
    status, _, err = command("scripts/verify_export.py", **options, prompt_style="alpaca")
    assert (status, "is not what" in err) == (1, True), err


def shares_in_form(folder, questions):
    """Of the base's answers and of those with the Aligner folded into it; and the last answer."""
    if not BASE.is_file():
        pytest.skip("run make base first")
    export.main(BASE, folder / "captain.gguf", adapter_path=[CAPTAIN], allow_other_base=True)
    shares = []
    for path in (BASE, folder / "captain.gguf"):
        llama_cpp = LlamaCpp(path, length=512)
        texts = [llama_cpp.reply(question, 64) for question in questions]
        shares.append(sum(map(FORMS["captain"].check, texts)) / len(texts))
    return shares, texts[-1]


def held_out():
    rows = [json.loads(line) for line in (ROOT / "examples" / "questions.jsonl").read_text().splitlines()]
    return [row["question"] for row in rows if row["split"] == "test"]


def test_answers_have_the_demos_form(tmp_path):
    assert shares_in_form(tmp_path, held_out()[:2])[0] == [0, 1]


@pytest.mark.slow
def test_all_answers_have_the_demos_form(tmp_path):
    """RESULTS.md has what it prints."""
    shares, text = shares_in_form(tmp_path, held_out())
    print(shares, text)
    assert shares[0] == 0
    assert shares[1] >= 0.9
