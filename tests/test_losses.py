"""Losses over hidden states, a few positions at a time, against the whole matrix of logits."""

import pytest
import torch
import torch.nn.functional as F
from conftest import random_aligner
from torch.utils._python_dispatch import TorchDispatchMode

from lit_llama.checkpoint import load_base
from lit_llama.losses import divergence, token_logprobs

POSITIONS = 100
AT_ONCE = 7 * 96  # logits: of 7 positions, so that the last piece is a shorter one


class Largest(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that an operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else [out]:
            if isinstance(one, torch.Tensor):
                self.elements = max(self.elements, one.numel())
        return out


def whole_logprobs(model, hidden, tokens):
    logits = hidden.float() @ model.transformer.wte.weight.float().T
    return logits.log_softmax(-1)[torch.arange(len(tokens)), tokens]


def whole_divergence(model, teacher, student):
    weight = model.transformer.wte.weight.float().T
    p, q = (F.softmax(hidden.float() @ weight, dim=-1) for hidden in (teacher, student))
    return (p * (p / q).log()).sum(-1)


def inputs(name, dtype=torch.float32):
    hidden, teacher = torch.randn(2, POSITIONS, 32, dtype=dtype).unbind()
    tokens = torch.randint(96, (POSITIONS,))
    if name == "logprobs":
        return hidden, lambda model, x: token_logprobs(model, x, tokens), lambda m, x: whole_logprobs(m, x, tokens)
    return hidden, lambda model, x: divergence(model, teacher, x), lambda m, x: whole_divergence(m, teacher, x)


@pytest.mark.parametrize("name", ["logprobs", "divergence"])
def test_pieces_are_the_whole(tiny_model, monkeypatch, name):
    monkeypatch.setattr("lit_llama.model.LOGITS_AT_ONCE_ON_CPU", AT_ONCE)
    hidden, in_pieces, whole = inputs(name)
    weights = torch.randn(POSITIONS)  # of the positions in a loss
    found, expected = (hidden.clone().requires_grad_() for _ in range(2))
    values, wanted = in_pieces(tiny_model, found), whole(tiny_model, expected)
    torch.testing.assert_close(values, wanted, atol=1e-6, rtol=1e-6)
    (values * weights).sum().backward()
    (wanted * weights).sum().backward()
    torch.testing.assert_close(found.grad, expected.grad, atol=1e-6, rtol=1e-6)
    with torch.no_grad():
        assert torch.equal(in_pieces(tiny_model, hidden), values)


@pytest.mark.parametrize("name", ["logprobs", "divergence"])
def test_memory_is_that_of_a_piece(tiny_model, monkeypatch, name):
    monkeypatch.setattr("lit_llama.model.LOGITS_AT_ONCE_ON_CPU", AT_ONCE)
    hidden, in_pieces, _ = inputs(name, torch.bfloat16)
    tiny_model.bfloat16()
    kept = []
    note = torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x)
    with note, Largest() as largest:
        in_pieces(tiny_model, hidden.requires_grad_()).sum().backward()
    assert largest.elements <= max(AT_ONCE, POSITIONS * 32) < POSITIONS * 96  # all logits
    assert kept[-1] == POSITIONS * 32  # after those of the pieces, which are gone


def test_a_teacher_gets_no_gradient_and_agrees_with_itself(tiny_model):
    hidden = torch.randn(5, 32).requires_grad_()
    values = divergence(tiny_model, hidden, hidden)
    torch.testing.assert_close(values, torch.zeros(5), atol=1e-6, rtol=0)
    values.sum().backward()
    torch.testing.assert_close(hidden.grad, torch.zeros(5, 32), atol=1e-6, rtol=0)


def test_no_position_is_an_empty_sum(tiny_model):
    hidden = torch.randn(0, 32).requires_grad_()
    token_logprobs(tiny_model, hidden, torch.zeros(0, dtype=torch.long)).sum().backward()
    assert hidden.grad.shape == (0, 32)


def test_a_quantized_base_has_the_same_gradients_in_pieces(base_dir, monkeypatch):
    pytest.importorskip("bitsandbytes")
    model = load_base(base_dir, quantize="int8")
    aligner, ids = random_aligner(model.config, 2), torch.randint(96, (2, 12))

    def gradients(rows):
        monkeypatch.setattr("lit_llama.model.LOGITS_AT_ONCE_ON_CPU", rows * model.config.vocab_size)
        hidden = model.hidden_states(ids, aligner, at=torch.ones_like(ids, dtype=torch.bool))
        return torch.autograd.grad(token_logprobs(model, hidden, ids.flatten()).sum(), list(aligner.parameters()))

    torch.testing.assert_close(gradients(5), gradients(24), atol=1e-5, rtol=1e-5)
