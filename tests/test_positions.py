"""A prefix that the prompt alone attends to: what is computed at once is what is generated, in any company."""

import pytest
import torch
from conftest import random_aligner
from lm_eval.api.instance import Instance
from test_objective import examples, tune

from lit_llama.adapters import adapter_fingerprint, adapter_info, load_adapter, save_adapter
from lit_llama.aligner import Aligner
from lit_llama.base import open_base
from lit_llama.combine import OnPrompt, PerRow, WeightedSum
from lit_llama.data import collate
from lit_llama.evaluation.harness import HarnessModel
from lit_llama.formats.folding import merge
from lit_llama.generation import generate
from lit_llama.llama_adapter import LLaMAAdapter
from lit_llama.losses import response_logprobs


@pytest.fixture
def adapters(tiny_model):
    """For the prompt alone: an Aligner of one token, one of three, and a LLaMA-Adapter."""
    torch.manual_seed(0)
    config = tiny_model.config
    made = [Aligner(config, 1, 1, 1.0, "prompt"), Aligner(config, 3, 1, 1.0, "prompt")]
    made.append(LLaMAAdapter(config, 2, 1, 1.0, "prompt"))
    for adapter in made:
        torch.nn.init.normal_(adapter.gates)
    return made


def decoded(model, adapter, ids, prompt):
    """Logits from the prompt's last token on, token by token as a generation computes them."""
    cache = model.new_cache(1, ids.size(1))
    logits = [model(ids[:, :prompt], adapter, cache=cache)[:, -1]]
    for t in range(prompt, ids.size(1)):
        logits.append(model(ids[:, t : t + 1], adapter, cache=cache, positions=torch.tensor([[t]]))[:, 0])
    return torch.cat(logits)


@pytest.mark.parametrize("which", range(3))
def test_at_once_is_what_is_decoded(tiny_model, adapters, which):
    adapter, everywhere = adapters[which], random_aligner(tiny_model.config, 2)
    ids = torch.randint(96, (1, 14), generator=torch.Generator().manual_seed(1))
    prompt = torch.arange(14)[None] < 6
    for one in (adapter, WeightedSum((adapter, 0.5), (everywhere, 1.0))):
        found = tiny_model(ids, OnPrompt(one, prompt))[0, 5:]
        torch.testing.assert_close(found, decoded(tiny_model, one, ids, 6), atol=1e-4, rtol=1e-4)
    base, everything = tiny_model(ids)[0, 5:], tiny_model(ids, adapter)[0, 5:]
    found = tiny_model(ids, OnPrompt(adapter, prompt))[0, 5:]
    torch.testing.assert_close(found[0], everything[0], atol=1e-5, rtol=1e-5)  # the prompt's last token
    assert all((found[1:] - other[1:]).abs().max() > 0.1 for other in (base, everything))


def test_rows_generate_what_they_do_alone(tiny_model, adapters):
    rows = [*adapters, None, random_aligner(tiny_model.config, 2), WeightedSum((adapters[1], 2.0))]
    prompts = [[5, 6], [7, 8, 9, 10, 11, 12], [13], [1, 2, 3], [4, 4, 4, 4], [20, 21]]
    expected = [generate(tiny_model, [p], 16, adapter=one)[0] for p, one in zip(prompts, rows, strict=True)]
    assert generate(tiny_model, prompts, 16, adapter=rows) == expected
    ids = torch.randint(96, (6, 10), generator=torch.Generator().manual_seed(2))
    prompt = torch.arange(10) < torch.tensor([[2], [4], [9], [3], [3], [5]])
    together = tiny_model(ids, OnPrompt(PerRow(rows), prompt))
    for i, one in enumerate(rows):
        alone = tiny_model(ids[i : i + 1], None if one is None else OnPrompt(one, prompt[i : i + 1]))
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-4, rtol=1e-4)


def test_the_loss_knows_where_the_prompt_ends(tiny_model, adapters):
    made = examples(3)
    padded, packed = collate(made), collate(made, pack=True)
    expected = torch.stack([
        decoded(tiny_model, adapters[1], torch.from_numpy(one.ids)[None], 4).log_softmax(-1)[:-1]
        .gather(1, torch.from_numpy(one.ids)[4:, None]).sum()
        for one in made
    ])  # fmt: skip
    for batch in (padded, packed):
        torch.testing.assert_close(response_logprobs(tiny_model, adapters[1], batch), expected, atol=1e-3, rtol=1e-4)


def test_trained_saved_evaluated_and_not_folded(base_dir, data_dir, tmp_path):
    tune(base_dir, data_dir, tmp_path / "run", positions="prompt", aligner_length=2)
    adapter, info = load_adapter(tmp_path / "run"), adapter_info(tmp_path / "run")
    assert (adapter.prompt_only, info.config["positions"]) == (True, "prompt")
    base = open_base(base_dir, tmp_path / "run", 50.0, precision="32-true")
    with pytest.raises(ValueError, match="--positions prompt cannot be folded, merged or exported"):
        merge(base.model, adapter)
    everywhere = Aligner(base.model.config, 2)
    everywhere.load_state_dict(adapter.state_dict())
    assert "positions" not in everywhere.sizes, "files of those that act everywhere stay as they were"
    assert adapter_fingerprint(everywhere) != adapter_fingerprint(adapter)
    save_adapter(tmp_path / "everywhere.safetensors", everywhere)
    assert not load_adapter(tmp_path / "everywhere.safetensors").prompt_only
    context, answer = ("What is rain? " * 6).strip(), " Water from clouds."
    ids = base.tokenizer.encode(context + answer)
    prompt = len(base.tokenizer.encode(context))
    at = torch.arange(len(ids))[None] < prompt
    logits = base.model(torch.tensor([ids]), OnPrompt(base.adapter, at))[0, prompt - 1 : -1]
    expected = float(logits.log_softmax(-1).gather(1, torch.tensor(ids[prompt:])[:, None]).sum())
    both = [Instance("loglikelihood", {}, (context, one), i) for i, one in enumerate([answer, " No."])]
    for asked in (both[:1], both):  # alone, and behind a start that is computed once for both
        found = HarnessModel(base, batch_size=2).loglikelihood(asked, disable_tqdm=True)[0][0]
        assert found == pytest.approx(expected, abs=1e-3)
