"""Attention over a cache or a prefix: the formula in float64, whichever kernel is taken."""

import pytest
import torch

from lit_llama.attention import attend_grouped


def formula(q, k, v, mask):
    """Each query head by itself, with the keys and values of its group."""
    rows, heads = torch.broadcast_shapes(q.shape[:1], k.shape[:1])[0], q.size(1)
    k, v = (x.expand(rows, -1, -1, -1).repeat_interleave(heads // x.size(1), dim=1) for x in (k, v))
    scores = torch.einsum("bhtd,bhsd->bhts", q, k) * q.size(-1) ** -0.5
    return torch.einsum("bhts,bhsd->bhtd", (scores if mask is None else scores + mask).softmax(-1), v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("one_prefix", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("rows", "queries", "keys"), [(4, 1, 3), (4, 1, 300), (70, 1, 16), (4, 5, 3), (4, 40, 10), (4, 40, 70)]
)
def test_attention_of_a_few_queries(dtype, one_prefix, masked, rows, queries, keys):
    torch.manual_seed(0)
    q, above = torch.randn(2, rows, 6, queries, 16)
    k, v = torch.randn(2, 1 if one_prefix else rows, 2, keys, 16)
    mask = torch.zeros(rows, 1, queries, keys).masked_fill_(torch.rand(rows, 1, queries, keys) < 0.3, -torch.inf)
    mask[..., 0] = 0  # every query sees something
    mask = mask.to(dtype) if masked else None
    inputs = [x.to(dtype).requires_grad_() for x in (q, k, v)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    found, expected = attend_grouped(*inputs, mask), formula(*exact, None if mask is None else mask.double())
    tolerance = {"atol": 2e-2, "rtol": 2e-2} if dtype == torch.bfloat16 else {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(found.double(), expected, **tolerance)
    grads = torch.autograd.grad(found, inputs, above.to(dtype)), torch.autograd.grad(expected, exact, above.double())
    for one, other in zip(*grads, strict=True):
        assert (one.double() - other).norm() < (2e-2 if dtype == torch.bfloat16 else 1e-5) * other.norm()
