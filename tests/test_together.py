"""Whoever uses an adapter checks what belongs to it: its base, the base's bits, the adapters that it was trained on."""

import warnings

import pytest
from conftest import random_aligner

from lit_llama.adapters import Companion, adapter_fingerprint, adapter_info, save_adapter
from lit_llama.base import open_base
from lit_llama.checkpoint import load_base
from lit_llama.serving.store import AdapterStore
from lit_llama.together import open_adapters

BITS = r"top\.safetensors was trained on a base with --quantize nf4, and this base has none"
MISSING = r"top.* was trained on top of style \(scale 0\.5\): use both together"


@pytest.fixture
def model(base_dir):
    return load_base(base_dir)


@pytest.fixture
def style_path(tmp_path, model):
    save_adapter(tmp_path / "style.safetensors", random_aligner(model.config, 2), model, prompt_style="chat")
    return tmp_path / "style.safetensors"


def save_top(path, model, **hyperparameters):
    """An adapter that was trained on top of `style_path`, perhaps on a quantised base."""
    style = adapter_fingerprint(random_aligner(model.config, 2))[:16]
    training = {"also": [Companion("style", style, 0.5)], "hyperparameters": hyperparameters, "prompt_style": "chat"}
    save_adapter(path, random_aligner(model.config, 1), model, **training)
    return path


def answer(base_dir, path, *companions):
    open_base(base_dir).with_adapter([path, *companions])


def export(base_dir, path, *companions):
    open_adapters(load_base(base_dir), [path, *companions])


def serve(base_dir, path, *companions):
    AdapterStore(path.parent, load_base(base_dir)).get(path.stem)


@pytest.mark.parametrize("door", [answer, serve])
def test_other_bits_are_refused(base_dir, model, style_path, tmp_path, door):
    with pytest.warns(UserWarning, match=MISSING) if door is serve else warnings.catch_warnings():
        door(base_dir, save_top(tmp_path / "top.safetensors", model), style_path)
    save_top(tmp_path / "top.safetensors", model, quantize="nf4")
    with pytest.raises(ValueError, match=f"{BITS}: give --quantize nf4"):
        door(base_dir, tmp_path / "top.safetensors", style_path)


def test_an_export_warns_of_other_bits(base_dir, model, style_path, tmp_path):
    with pytest.warns(UserWarning, match=BITS):
        export(base_dir, save_top(tmp_path / "top.safetensors", model, quantize="nf4"), style_path)


@pytest.mark.parametrize("door", [answer, export, serve])
def test_companions_that_are_missing_are_named(base_dir, model, tmp_path, style_path, door):
    path = save_top(tmp_path / "top.safetensors", model)
    with pytest.warns(UserWarning, match=MISSING):
        door(base_dir, path)
    if door is not serve:  # where a request has one adapter
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            door(base_dir, path, style_path)


def test_a_frozen_adapter_of_other_bits_is_refused_unless_they_are_chosen(command, base_dir, data_dir, model, tmp_path):
    path = tmp_path / "frozen.safetensors"
    save_adapter(path, random_aligner(model.config, 1), model, hyperparameters={"quantize": "nf4"})
    options = {"checkpoint_dir": base_dir, "data_dir": data_dir, "also_adapter": path, "max_steps": 1}
    status, _, err = command("finetune/aligner.py", **options, out_dir=tmp_path / "run")
    assert (status, "give --quantize nf4 to use it as it was trained, or --quantize none" in err) == (1, True)
    assert command("finetune/aligner.py", **options, out_dir=tmp_path / "run", quantize="none")[0] == 0
    assert adapter_info(tmp_path / "run").quantize is None
