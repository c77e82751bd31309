"""The store of adapters: what is in the folder is what is in it."""

import gc
import weakref

import pytest
import torch
from conftest import load_script, random_aligner

from lit_llama.adapters import METHODS, adapter_fingerprint, save_adapter
from lit_llama.checkpoint import load_base
from lit_llama.combine import WeightedSum
from lit_llama.llama_adapter import LLaMAAdapter
from lit_llama.lora import LoRA
from lit_llama.model import LLaMA
from lit_llama.serving.store import AdapterStore


@pytest.fixture
def model(base_dir):
    return load_base(base_dir)


def test_aligners_are_their_files(tmp_path, model):
    aligners = {f"a/{n}": random_aligner(model.config, n, start_layer=n % 3) for n in (1, 2, 7)}
    for name, aligner in aligners.items():
        save_adapter(tmp_path / f"{name}.safetensors", aligner, model, prompt_style="chat")
    store = AdapterStore(tmp_path, model)
    assert store.names() == sorted(aligners)
    for name, expected in aligners.items():
        found, style = store.get(name), store.style(name)
        assert (found.sizes, style) == (expected.sizes, "chat")
        assert torch.equal(found.tokens, expected.tokens)
        assert torch.equal(found.gates, expected.gates)


def test_adapters_of_any_method_are_their_files(tmp_path, model):
    adapters = {name: method(model.config) for name, method in METHODS.items()}
    adapters |= {"other-lora": LoRA(model.config, 3, 8.0, targets=["q", "down"])}
    for name, adapter in adapters.items():
        for parameter in adapter.parameters():
            torch.nn.init.normal_(parameter)
        save_adapter(tmp_path / f"{name}.safetensors", adapter, model)
    store = AdapterStore(tmp_path, model)
    assert store.names() == sorted(adapters)
    for name, adapter in adapters.items():
        assert adapter_fingerprint(store.get(name)) == adapter_fingerprint(adapter)
        assert not any(parameter.requires_grad for parameter in store.get(name).parameters())


@pytest.mark.parametrize("method", METHODS.values())
def test_scaled_adapters(tmp_path, model, method):
    """As `WeightedSum` scales them; the one that is stored stays as it is."""
    adapter = method(model.config)
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter)
    save_adapter(tmp_path / "a.safetensors", adapter, model)
    store, ids = AdapterStore(tmp_path, model), torch.randint(96, (1, 10))
    found, expected = (model(ids, one) for one in (store.get("a", -0.5), WeightedSum((adapter, -0.5))))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert adapter_fingerprint(store.get("a")) == adapter_fingerprint(adapter)


def test_those_who_ask_at_the_same_time_share_one_object(tmp_path, model):
    """So that a batch in which all have it is computed as one; a file that has changed is another adapter."""
    path = tmp_path / "a" / "aligner.safetensors"
    save_adapter(path, random_aligner(model.config, 1), model)
    store = AdapterStore(tmp_path, model)
    first = store.get("a")
    assert store.get("a/aligner") is first
    assert store.get("a", 0.5) is not first
    save_adapter(path, random_aligner(model.config, 2), model)
    assert store.get("a").sizes["length"] == 2
    assert store.get("a/aligner") is not first
    known = weakref.ref(first)
    del first
    gc.collect()
    assert known() is None  # nothing is kept that nobody has


def test_files_that_say_nothing_have_alpacas_prompts(tmp_path, model):
    """The rule that open_base follows."""
    save_adapter(tmp_path / "a.safetensors", random_aligner(model.config, 1), model)
    assert AdapterStore(tmp_path, model).style("a") == "alpaca"


def test_adapters_of_a_quantised_base_are_not_served_silently_on_another(tmp_path, model):
    training = {"hyperparameters": {"quantize": "nf4"}}
    save_adapter(tmp_path / "a.safetensors", random_aligner(model.config, 1), model, **training)
    with pytest.raises(
        ValueError, match=r"a\.safetensors was trained on a base with --quantize nf4, and this base has none: give"
    ):
        AdapterStore(tmp_path, model).get("a")
    for options in ({"quantize": "nf4"}, {"quantize": "none"}):
        assert AdapterStore(tmp_path, model, **options).names() == ["a"]


def test_it_follows_the_folder(tmp_path, model):
    """New files come, changed ones change, those that vanish go; what cannot be used says why and harms no other."""
    store = AdapterStore(tmp_path, model)
    assert store.names() == []
    first = random_aligner(model.config, 1)
    save_adapter(tmp_path / "x.safetensors", first, model)
    (tmp_path / "broken.safetensors").write_bytes(b"junk")
    with torch.device("meta"):
        other = LLaMA(model.config)
    other.fingerprint = "another"
    save_adapter(tmp_path / "other.safetensors", first, other)
    (tmp_path / ".x.safetensors.half-written").write_bytes(b"")
    store.refresh()
    assert store.names() == ["x"]
    assert torch.equal(store.get("x").tokens, first.tokens)
    messages = {"broken": "not a complete", "other": "whose weights are not those"}
    for name, message in (messages | {"nobody": "no adapter named 'nobody'"}).items():
        with pytest.raises(ValueError, match=message):
            store.get(name)
    with pytest.warns(UserWarning, match="whose weights are not those"):
        assert AdapterStore(tmp_path, model, allow_other_base=True).names() == ["other", "x"]

    save_adapter(tmp_path / "x.safetensors", random_aligner(model.config, 4), model)
    store.refresh()
    assert store.get("x").tokens.size(0) == 4
    (tmp_path / "x.safetensors").unlink()
    store.refresh()
    assert store.names() == []


def test_names_do_not_lead_out_of_the_folder(tmp_path, model):
    """Links that stand in the folder do: whoever put them there meant it."""
    save_adapter(tmp_path / "secret.safetensors", random_aligner(model.config, 1), model)
    save_adapter(tmp_path / "store/.hidden.safetensors", random_aligner(model.config, 1), model)
    (tmp_path / "store/link.safetensors").symlink_to(tmp_path / "secret.safetensors")
    store = AdapterStore(tmp_path / "store", model)
    assert store.names() == ["link"]
    assert store.get("link").tokens.size(0) == 1
    for name in ("../secret", f"{tmp_path}/secret", "./link", ".hidden", "", "link\0"):
        with pytest.raises(ValueError, match="no adapter named"):
            store.get(name)


def test_runs_go_by_their_folders(tmp_path, model):
    """Those that were moved away, and those of a search, are left out; a file of the folder's name comes first."""
    files = {"demo/aligner": 1, "both": 2, "both/aligner": 3, "aligner": 4, "demo/previous-1/aligner": 5}
    files |= {"cmp/search/lr-1/aligner": 6, "cmp/one/aligner": 7, "search/aligner": 8, "demo/best": 9}
    for name, n in files.items():
        save_adapter(tmp_path / f"{name}.safetensors", random_aligner(model.config, n), model)
    (tmp_path / "cmp/search/data").mkdir()
    (tmp_path / "cmp/search/data/dataset.json").write_text("{}")
    store = AdapterStore(tmp_path, model)
    assert store.names() == ["aligner", "both", "both/aligner", "cmp/one", "demo", "demo/best", "search"]
    lengths = {"demo": 1, "demo/aligner": 1, "both": 2, "both/aligner": 3, "aligner": 4, "cmp/one": 7, "search": 8}
    assert {name: store.get(name).tokens.size(0) for name in lengths} == lengths
    for name in ("demo/previous-1", "demo/previous-1/aligner", "cmp/search/lr-1"):
        with pytest.raises(ValueError, match="belongs to an earlier run or to a search"):
            store.get(name)
    for name in ("../demo", "demo/", "demo//aligner", "x" * 3000, "\ud800", "demo\0"):
        with pytest.raises(ValueError, match="no adapter named"):
            store.get(name)


def test_runs_of_any_method_go_by_their_folders_unless_there_are_two(tmp_path, model):
    for name in ("one/lora", "two/lora"):
        save_adapter(tmp_path / f"{name}.safetensors", LoRA(model.config), model)
    save_adapter(tmp_path / "old/adapter.safetensors", LLaMAAdapter(model.config, 1), model)
    save_adapter(tmp_path / "two/aligner.safetensors", random_aligner(model.config, 1), model)
    store = AdapterStore(tmp_path, model)
    assert store.names() == ["old", "one", "two/aligner", "two/lora"]
    assert [store.get(name).method for name in ("one", "one/lora", "old")] == ["lora", "lora", "llama_adapter"]
    with pytest.raises(ValueError, match=r"no adapter named 'two'.*did you mean 'two/aligner' or 'two/lora'\?"):
        store.get("two")


def test_folders_of_peft_go_by_their_names(tmp_path, model, base_dir):
    save_adapter(tmp_path / "lora.safetensors", LoRA(model.config), model, prompt_style="chat")
    export, options = load_script("scripts/export_hf_checkpoint.py").main, {"format": "peft"}
    export(tmp_path / "store" / "mine", base_dir, [tmp_path / "lora.safetensors"], **options)
    store = AdapterStore(tmp_path / "store", model)
    assert store.names() == ["mine"]
    assert [store.get(name).method for name in ("mine", "mine/adapter_model")] == ["lora", "lora"]


def test_folders_are_needed(tmp_path, model):
    with pytest.raises(FileNotFoundError, match="no such folder of adapters"):
        AdapterStore(tmp_path / "nowhere", model)


def test_memory_is_that_of_the_numbers(tmp_path, model):
    """Each costs its numbers and bookkeeping that does not grow with them; counted where Python and torch allocate."""
    save_adapter(tmp_path / "0.safetensors", random_aligner(model.config, 1), model, prompt_style="chat")
    content = (tmp_path / "0.safetensors").read_bytes()
    for i in range(1, 50):
        (tmp_path / f"{i}.safetensors").write_bytes(content)
    store = AdapterStore(tmp_path, model)
    numbers = sum(parameter.numel() for parameter in random_aligner(model.config, 1).parameters())
    for stored in store._stored.values():
        assert stored.values is not None
        assert stored.values.untyped_storage().nbytes() == 4 * numbers
