"""A second device that is not the CPU, as far as torch can imitate one here: tensors made on the wrong one are noticed.

Its tensors say that they are on the device "second", which torch keeps for backends that are not part of it, and hold
their numbers in a tensor on the CPU. An operation that meets tensors of both devices raises an error, as on a GPU; a
lone number may be on the CPU. `test_second_device.py` runs this file.

Covered: training with its gradients and optimizer, prefill, decode, sampling, rows that join and leave with adapters of
their own, and what the server's worker does with requests. Not covered: kernels of a GPU and their rounding, memory,
speed, streams, fused attention, `--compile`, quantisation and more than one device.
"""

import copy

import pytest
import torch
import torch.utils._pytree as pytree
from conftest import random_aligner
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from lit_llama.adapters import save_adapter
from lit_llama.data import Batch
from lit_llama.decoder import Decoder, GenerationRequest
from lit_llama.generation import generate
from lit_llama.losses import supervised_loss
from lit_llama.serving.store import AdapterStore
from lit_llama.serving.worker import Job, Rows

_setup_privateuseone_for_python_backend("second")
SECOND, CPU = torch.device("second", 0), torch.device("cpu")
COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class OnSecond(torch.Tensor):
    """A tensor of the second device."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, inner.stride(), inner.storage_offset(), dtype=inner.dtype, device=SECOND
        )

    def __init__(self, inner):
        self.inner = inner

    def tolist(self):
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


@torch.library.impl("aten::empty_strided", "privateuseone")
def empty_strided(size, stride, *, dtype=None, **_):  # `torch.tensor` goes past the mode below
    return OnSecond(torch.empty_strided(size, stride, dtype=dtype))


@torch.library.impl("aten::_copy_from", "privateuseone")
def copy_from(source, target, non_blocking=False):
    target.inner.copy_(source)
    return target


class Factories(TorchDispatchMode):
    """Makes tensors on the second device where they are asked for there."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


def compute(func, args, kwargs):
    """An operation on the numbers of its tensors, if all of them are on one device."""
    if func is torch.ops.aten._fused_sdp_choice.default:
        return 0  # no fused kernel
    if func is torch.ops.aten._conj.default:
        func = torch.conj_physical  # a wrapper has no mark that says it is to be conjugated later
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    second = [tensor for tensor in tensors if isinstance(tensor, OnSecond)]
    first = [tensor for tensor in tensors if not isinstance(tensor, OnSecond) and tensor.dim() > 0]
    if second and first and func not in COPIES:
        raise RuntimeError(f"{func}: tensors on two devices")
    asked = kwargs.get("device")
    is_second = bool(second) if asked is None else torch.device(asked).type == "second"
    if func is torch.ops.aten.copy_.default:
        is_second = isinstance(args[0], OnSecond)
    if asked is not None:
        kwargs = {**kwargs, "device": CPU}
    wrappers = {id(tensor.inner): tensor for tensor in second}
    args, kwargs = pytree.tree_map_only(OnSecond, lambda tensor: tensor.inner, (args, kwargs))
    found = func(*args, **kwargs)
    if is_second:
        found = pytree.tree_map_only(
            torch.Tensor, lambda tensor: wrappers[id(tensor)] if id(tensor) in wrappers else OnSecond(tensor), found
        )
    return found


@pytest.fixture
def on_second():
    with Factories():
        yield


def test_errors_of_two_devices(on_second):
    there = torch.ones(3, device=SECOND)
    assert (there + 1).device == SECOND
    assert (2 * there).cpu().tolist() == [2, 2, 2]
    with pytest.raises(RuntimeError, match="two devices"):
        there + torch.ones(3)


def test_generate(tiny_model, on_second):
    adapters = [None, random_aligner(tiny_model.config, 1), random_aligner(tiny_model.config, 3)]
    prompts = [[5, 6], [7, 8, 9, 10], [11]]
    expected = generate(tiny_model, prompts, 8, adapter=adapters)
    tiny_model.to(SECOND)
    there = [adapter and adapter.to(SECOND) for adapter in adapters]
    assert generate(tiny_model, prompts, 8, adapter=there) == expected


def test_sample(tiny_model, on_second):
    """Rows with their own options and generators get what they get on the CPU."""
    options = [{}, {"temperature": 1.0}, {"temperature": 0.8, "top_k": 5}, {"temperature": 1.2, "top_p": 0.6}]

    def run():
        requests = [
            GenerationRequest([5 + i, 6], None, 8, generator=torch.Generator().manual_seed(i), **some)
            for i, some in enumerate(options)
        ]
        decoder, found = Decoder(tiny_model, 4, 32), {}
        for request in requests:  # each joins while the others go on
            found[decoder.join([request])[0]] = []
            for event in decoder.step():
                found[event.row].append(event.token)
        while decoder.running:
            for event in decoder.step():
                found[event.row].append(event.token)
        return found

    expected = run()
    tiny_model.to(SECOND)
    assert run() == expected


def test_train(tiny_model, on_second):
    """Losses of three steps, and what is learned."""
    aligner = random_aligner(tiny_model.config, 2).requires_grad_(True)
    ids = torch.tensor([[5, 6, 7, 8, 9], [4, 3, 2, 0, 0]])
    batch = Batch(ids, torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 0, 0]]).bool())

    def run(device):
        own = copy.deepcopy(aligner).to(device)
        optimizer = torch.optim.AdamW(own.parameters(), lr=0.1)
        losses = []
        for _ in range(3):
            sums = supervised_loss(tiny_model, own, batch.to(device))
            (sums.metrics["loss"] / sums.count).backward()
            losses.append(sums.metrics["loss"].item())
            optimizer.step()
            optimizer.zero_grad()
        return losses, [parameter.detach().cpu() for parameter in own.parameters()]

    expected = run(CPU)
    tiny_model.to(SECOND)
    torch.testing.assert_close(run(SECOND), expected, atol=1e-5, rtol=0)


def test_serve(tmp_path, tiny_model, on_second):
    """The worker's rows: requests that wait, each with another adapter, a scale and a seed."""
    for n in (1, 2):
        save_adapter(tmp_path / f"a{n}.safetensors", random_aligner(tiny_model.config, n), tiny_model)

    def run():
        rows = Rows(tiny_model, AdapterStore(tmp_path, tiny_model), max_rows=2, max_length=32)
        for i, (name, scale) in enumerate([("a1", 1.0), ("a2", 0.5), (None, 1.0)]):
            rows.take(i, Job([5 + i, 6], name, scale, i, {"max_new_tokens": 6, "temperature": 0.9 * i}))
        said = []
        while rows.busy:
            said += rows.step()
        return said

    expected = run()
    tiny_model.to(SECOND)
    assert run() == expected
    assert {one.finish for _, one in expected} == {None, "length"}
