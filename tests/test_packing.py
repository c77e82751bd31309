"""Packed rows and recomputed activations: the same numbers with less."""

import numpy as np
import pytest
import torch
from conftest import load_script, tiny_config
from torch.utils._python_dispatch import TorchDispatchMode

from lit_llama.aligner import Aligner
from lit_llama.data import Example, TokenDataset, collate, step_batches
from lit_llama.losses import supervised_loss
from lit_llama.tokenizer import Tokenizer


@pytest.fixture(params=[1, 3])
def aligner(request):
    torch.manual_seed(1)
    aligner = Aligner(tiny_config(), request.param)
    torch.nn.init.normal_(aligner.gates)
    return aligner


def random_examples(lengths):
    rng = np.random.default_rng(0)
    return [Example(rng.integers(0, 96, n), np.arange(n) >= n // 3) for n in lengths]


def loss_and_gradients(model, aligner, batches):
    aligner.zero_grad()
    loss = sum(supervised_loss(model, aligner, batch).metrics["loss"] for batch in batches)
    loss.backward()
    return [loss.detach(), aligner.tokens.grad.clone(), aligner.gates.grad.clone()]


def test_packed_is_padded_is_alone(tiny_model, aligner):
    examples = random_examples([5, 17, 1, 30, 64])
    packed = collate(examples, pack=True)
    assert packed.ids.shape == (1, 5 + 17 + 1 + 30 + 64)  # more than the window, no example is
    assert packed.scored.sum() == collate(examples).scored.sum()
    expected = loss_and_gradients(tiny_model, aligner, [collate([example]) for example in examples])
    for batch in (packed, collate(examples)):
        for value, by_hand in zip(loss_and_gradients(tiny_model, aligner, [batch]), expected, strict=True):
            torch.testing.assert_close(value, by_hand, atol=1e-5, rtol=1e-5)


def test_packed_sequences_do_not_see_each_other(tiny_model, aligner):
    ids = torch.randint(0, 96, (1, 40))
    other = ids.clone()
    other[:, :15] = (ids[:, :15] + 1) % 96
    logits, changed = (tiny_model(row, aligner, lengths=[15, 25]) for row in (ids, other))
    assert torch.equal(logits[:, 15:], changed[:, 15:])
    assert not torch.equal(logits[:, :15], changed[:, :15])
    alone = tiny_model(ids[:, 15:], aligner)
    torch.testing.assert_close(logits[:, 15:], alone, atol=1e-5, rtol=1e-5)


class LargestTensor(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_no_attention_matrix_is_made(tiny_model, aligner):
    batch = collate(random_examples([64] * 32), pack=True)
    T = batch.ids.size(1)
    with LargestTensor() as largest:
        supervised_loss(tiny_model, aligner, batch).metrics["loss"].backward()
    assert 0 < largest.numel < T * T // 8


def test_too_long_a_sequence_in_a_row_is_refused(tiny_model):
    with pytest.raises(ValueError, match="sequence of 65 tokens exceeds the model's window of 64"):
        tiny_model(torch.zeros(1, 70, dtype=torch.long), lengths=[5, 65])


def test_padding_is_counted(base_dir, data_dir):
    dataset = TokenDataset(data_dir, "train", Tokenizer(base_dir))
    plan = [micro for step in range(2) for micro in step_batches(dataset, step, 4, 2, seed=1)]
    batches = [collate([dataset[i][0] for i in micro]) for micro in plan]
    tokens = sum(int(dataset.lengths[i]) for micro in plan for i in micro)
    assert dataset.padding(plan) == pytest.approx(1 - tokens / sum(batch.ids.numel() for batch in batches))


@pytest.mark.parametrize("option", ["pack", "activation_checkpointing"])
def test_options_do_not_change_the_result(base_dir, data_dir, tmp_path, option, capsys):
    states = []
    for value in (False, True):
        out_dir = tmp_path / str(value)
        load_script("finetune/aligner.py").main(
            checkpoint_dir=base_dir, data_dir=data_dir, out_dir=out_dir, max_steps=3, warmup_steps=1, **{option: value}
        )
        states.append(torch.load(out_dir / "state-00000003.pt", weights_only=True)["adapter"])
    for name in states[0]:
        tolerance = 1e-5 if option == "pack" else 0
        torch.testing.assert_close(states[0][name], states[1][name], atol=tolerance, rtol=0)
    assert ("packed; padding would be" in capsys.readouterr().err) == (option == "pack")


def test_recomputed_activations_are_not_kept(tiny_model, aligner):
    batch = collate(random_examples([60] * 4))

    def kept_bytes():
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
            supervised_loss(tiny_model, aligner, batch)
        return sum(sizes)

    expected, everything = loss_and_gradients(tiny_model, aligner, [batch]), kept_bytes()
    tiny_model.checkpoint_activations()
    for value, kept in zip(loss_and_gradients(tiny_model, aligner, [batch]), expected, strict=True):
        assert torch.equal(value, kept)
    assert kept_bytes() < everything / 2
