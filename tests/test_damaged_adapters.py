"""Damaged and hostile adapter files, thrown at the reader and at the store: one line each, and never other values."""

import json
import random
import struct
import tracemalloc
import warnings

import pytest
import torch
from conftest import GOLDEN, random_aligner, tiny_config
from safetensors.torch import load as safetensors_load
from safetensors.torch import save_file

from lit_llama.adapters import adapter_fingerprint, adapter_info, load_adapter, read_adapter, save_adapter
from lit_llama.aligner import Aligner
from lit_llama.lora import LoRA
from lit_llama.serving.store import AdapterStore

DEEP = "[" * 100_000 + "]" * 100_000
ODD = ["null", "true", "[]", "{}", "[1]", '{"a": 1}', '"text"', "-1", "1e30", "1e400", "NaN", "0.5", "2147483648"]
ODD += ["1000000000000", "9" * 5000, DEEP, "{", ""]


@pytest.fixture
def written(tmp_path, tiny_model):
    """An adapter's file, its metadata and its tensors."""
    tiny_model.fingerprint = "f" * 64
    file = tmp_path / "store" / "a.safetensors"
    training = {"prompt_style": "chat", "step": 7, "validation_loss": 0.5, "seconds": 3.0}
    hyperparameters = {"quantize": None, "data_dir": "data"}
    save_adapter(file, random_aligner(tiny_model.config, 3), tiny_model, hyperparameters=hyperparameters, **training)
    content = file.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return file, header["__metadata__"], safetensors_load(content)


def refusal(file):
    """How a file is refused: in one line that names it."""
    with pytest.raises((ValueError, FileNotFoundError)) as raised:
        load_adapter(file)
    message = str(raised.value)
    assert str(file) in message
    assert "\n" not in message
    assert len(message) < 1000
    return message


def write_header(file, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def test_flipped_bits_and_torn_ends_never_give_other_values(written, tiny_model):
    """What still loads is what was written: a bit has changed that says nothing about the values, such as a step's."""
    file, _, _ = written
    content, rng, loaded = file.read_bytes(), random.Random(0), 0
    expected = adapter_fingerprint(load_adapter(file))
    start = 8 + int.from_bytes(content[:8], "little")
    bits = [*rng.sample(range(8 * start), 120), *rng.sample(range(8 * start, 8 * len(content)), 120)]
    for bit in bits:
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        try:
            adapter = load_adapter(file)
        except (ValueError, FileNotFoundError):
            continue
        assert bit < 8 * start, "a flipped bit in the values was not noticed"
        assert adapter_fingerprint(adapter) == expected
        loaded += 1
    assert loaded < 80
    for length in [*range(0, 200, 7), *rng.sample(range(len(content)), 50), len(content) - 1]:
        file.write_bytes(content[:length])
        assert "not a complete safetensors file" in refusal(file)
    file.write_bytes(content + b"\0")
    assert "not a complete safetensors file" in refusal(file)


def test_metadata_of_any_type(written, tiny_model):
    """Every field, and every size in `config`, with every odd value: refused by name, or what it was."""
    file, metadata, tensors = written
    store = AdapterStore(file.parent, tiny_model)
    before = adapter_fingerprint(store.get("a"))
    sizes = json.loads(metadata["config"])
    cases = [(key, {**metadata, key: odd}) for key in metadata for odd in ODD]
    for key in sizes:
        for odd in ODD[:-4]:
            cases.append((key, {**metadata, "config": json.dumps({**sizes, key: json.loads(odd)})}))
    for hyperparameters in ('{"quantize": []}', '{"quantize": "int3"}'):
        cases.append(("quantize", {**metadata, "hyperparameters": hyperparameters}))
    for key, changed in cases:
        save_file(tensors, file, metadata=changed)
        store.refresh()
        try:
            adapter, info = read_adapter(file)
        except ValueError:
            assert key in refusal(file)
            with pytest.raises(ValueError, match=r"a\.safetensors") as raised:
                store.get("a")
            assert str(file.parent) not in str(raised.value)
            assert store.names() == []
        else:
            assert adapter_fingerprint(adapter) == before
            assert isinstance(info.hyperparameters, dict)
            assert info.prompt_style is None or isinstance(info.prompt_style, str)


def test_headers_that_lie(written, tiny_model):
    """Sizes are compared before memory is taken for them."""
    file, metadata, tensors = written
    data = b"".join(tensor.numpy().tobytes() for tensor in (tensors["gates"], tensors["tokens"]))
    gates, tokens = tensors["gates"].nbytes, len(data)
    good = {
        "__metadata__": metadata,
        "gates": {"dtype": "F32", "shape": list(tensors["gates"].shape), "data_offsets": [0, gates]},
        "tokens": {"dtype": "F32", "shape": list(tensors["tokens"].shape), "data_offsets": [gates, tokens]},
    }
    write_header(file, good, data)
    assert load_adapter(file).sizes["length"] == 3
    huge = {"dtype": "F32", "shape": [10**12, 32], "data_offsets": [gates, gates + 4 * 32 * 10**12]}
    lies = [{**good, "tokens": {**good["tokens"], key: json.loads(odd)}} for key in huge for odd in ODD[:-5]]
    lies += [{**good, "tokens": huge}, {**good, "tokens": {**good["tokens"], "dtype": "I32"}}, {**good, "more": 1}]
    lies += [{**good, "__metadata__": odd} for odd in (1, [], {"config": 1}, None)]
    lies += [[], 1, json.dumps(good).encode().replace(b'"gates": {', b'"tokens": {'), b"\xff\xfe", b"", DEEP.encode()]
    config = {"n_layer": 1000, "n_head": 1, "n_embd": 2**24, "length": 2**24, "start_layer": 0}
    lies += [{**good, "__metadata__": {**metadata, "config": json.dumps(config)}}]
    tracemalloc.start()
    for lie in lies:
        write_header(file, lie, data)
        refusal(file)
    for length in (2**63, 2**64 - 1, 2**40, len(data) + 10**6, 0):
        write_header(file, good, data, length)
        refusal(file)
    with open(file, "wb") as sparse:  # a terabyte that takes no room
        sparse.write(struct.pack("<Q", 2**40 - 8))
        sparse.truncate(2**40)
    refusal(file)
    assert tracemalloc.get_traced_memory()[1] < 2**26
    tracemalloc.stop()
    save_adapter(file, LoRA(tiny_model.config), tiny_model)
    sizes = LoRA(tiny_model.config).sizes
    for changes in ({"n_layer": 10**9}, {"n_layer": 1024}, {"r": 10**7}, {"alpha": "x"}, {"targets": [1]}):
        save_file(tensors, file, metadata={**metadata, "method": '"lora"', "config": json.dumps(sizes | changes)})
        refusal(file)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite(written, value, tmp_path, tiny_model):
    file, metadata, tensors = written
    tensors["gates"][0, 1] = value
    save_file(tensors, file, metadata=metadata)
    assert "gates holds 1 values that are not finite, of 12" in refusal(file)
    aligner = Aligner(tiny_model.config, 1)
    with torch.no_grad():
        aligner.tokens[0, 3] = value
    before = file.read_bytes()
    with pytest.raises(ValueError, match="tokens holds 1 values that are not finite, of 32"):
        save_adapter(file, aligner, tiny_model)
    assert file.read_bytes() == before
    theirs = torch.load(GOLDEN / "aligner-1.pth", weights_only=True)
    theirs["global_value_embedding.weight"].view(-1)[5] = value
    theirs = {name: tensor for name, tensor in theirs.items() if "adapter_wte" not in name}
    torch.save(theirs, tmp_path / "theirs.pth")
    assert "tokens holds 1 values that are not finite" in refusal(tmp_path / "theirs.pth")


def test_authors_files_that_lie(tmp_path):
    theirs = torch.load(GOLDEN / "aligner-1.pth", weights_only=True)
    theirs = {name: tensor for name, tensor in theirs.items() if "adapter_wte" not in name}
    shared = "global_value_embedding.weight"
    for tensor in (
        torch.zeros(1).expand(10**6, 10**6),
        torch.zeros(2, 2, dtype=torch.int64),
        torch.zeros(2, 2).to_sparse(),
        torch.zeros(10**6, 10**6, device="meta"),
        torch.zeros(0, 32),
    ):
        torch.save({**theirs, shared: tensor}, tmp_path / "a.pth")
        refusal(tmp_path / "a.pth")
    gates = next(name for name in theirs if "gating" in name)
    torch.save({**theirs, gates: torch.zeros(3)}, tmp_path / "a.pth")
    assert "different numbers of heads" in refusal(tmp_path / "a.pth")
    content = (GOLDEN / "aligner-1.pth").read_bytes()
    for length in range(0, len(content), len(content) // 20):
        (tmp_path / "a.pth").write_bytes(content[:length])
        refusal(tmp_path / "a.pth")


def test_files_without_a_hash_still_load(written):
    file, metadata, tensors = written
    assert len(adapter_info(file).fingerprint) == 64
    del metadata["fingerprint"]
    tensors["gates"] += 1
    save_file(tensors, file, metadata=metadata)
    adapter, info = read_adapter(file)
    assert torch.equal(adapter.gates, tensors["gates"])
    assert info.fingerprint == ""


def test_a_file_is_opened_once(written, tiny_model, monkeypatch):
    """Another file may take the name at any moment: metadata and values come from the one that was opened."""
    file, _, _ = written
    other = file.with_name("other")
    save_adapter(other, random_aligner(tiny_model.config, 5), tiny_model, prompt_style="none")
    parse = json.loads

    def replace_file(text):  # called between header and values
        if other.exists():
            other.replace(file)
        return parse(text)

    monkeypatch.setattr("lit_llama.files.json.loads", replace_file)
    adapter, info = read_adapter(file)
    assert (adapter.sizes["length"], info.config["length"], info.prompt_style) == (3, 3, "chat")
    assert read_adapter(file)[0].sizes["length"] == 5
    content = file.read_bytes()

    def write_over(text):
        file.write_bytes(content[:-40])
        return parse(text)

    monkeypatch.setattr("lit_llama.files.json.loads", write_over)
    assert "changed while it was read" in refusal(file)


def test_links_are_followed_once(tmp_path, tiny_model):
    """Links to the folder itself, to each other, to nothing and to themselves; a folder that may be linked twice."""
    store = tmp_path / "store"
    save_adapter(store / "a/x.safetensors", random_aligner(tiny_model.config, 1), tiny_model)
    save_adapter(tmp_path / "elsewhere/y.safetensors", random_aligner(tiny_model.config, 2), tiny_model)
    for name, target in {
        "Self": ".",
        "a/Up": "..",
        "a/loop": "loop",
        "a/loop.safetensors": "loop.safetensors",
        "gone.safetensors": "nothing",
        "again": "a",
        "linked": "../elsewhere",
        "linked2": "../elsewhere",
    }.items():
        (store / name).symlink_to(target)
    (store / "folder.safetensors").mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = AdapterStore(store, tiny_model)
    assert found.names() == ["a/x", "linked/y"]
    assert found.get("linked2/y").sizes["length"] == 2
    for name in ("gone", "a/loop", "x" * 300, "x" * 100_000, "\ud800", "folder"):
        with pytest.raises(ValueError, match="no adapter named"):
            found.get(name)
    with pytest.raises(ValueError, match=r"did you mean 'a/x'\?"):
        found.get("a/xx")


def test_a_base_of_other_sizes_is_told_before_anything_is_read(written):
    file, _, _ = written
    with torch.device("meta"):
        other = type("Base", (), {"config": tiny_config(n_embd=64), "fingerprint": ""})
    with pytest.raises(ValueError, match="its n_embd is 32, tiny has 64"):
        read_adapter(file, model=other)  # type: ignore[arg-type]
