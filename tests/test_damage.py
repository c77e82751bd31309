"""Files of base models that are damaged or odd: refused in one line, or read as they were; never anything else."""

import json
import os
import random
import shutil
import struct
import warnings

import pytest
import torch
from conftest import load_script
from test_convert import bpe_fields, write_fields, write_gguf

from lit_llama.checkpoint import load_base, verify_base
from lit_llama.formats.gguf import open_gguf
from lit_llama.tokenizer import Tokenizer

convert_hf = load_script("scripts/convert_hf_checkpoint.py")
convert_gguf = load_script("scripts/convert_gguf_checkpoint.py")
SEEDS = int(os.environ.get("DAMAGE_SEEDS", "5"))  # of each kind of damage; give more to search for longer


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory, hf_checkpoint):
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(file, hf_checkpoint, bpe_fields(hf_checkpoint))
    return file


@pytest.mark.parametrize(
    ("field", "value", "found"),
    [
        ("llama.block_count", 2**31, "llama.block_count is 2147483648, expected a whole number from 1 to"),
        ("llama.block_count", 5000, "n_layer is 5000"),
        ("llama.block_count", [1, 2], r"llama.block_count is [1, 2]"),
        ("llama.block_count", None, "lacks llama.block_count"),
        ("llama.attention.head_count", 0, "llama.attention.head_count is 0"),
        ("llama.attention.head_count", "4", "llama.attention.head_count is '4'"),
        ("llama.attention.layer_norm_rms_epsilon", float("nan"), "layer_norm_rms_epsilon is nan"),
        ("llama.rope.freq_base", -1.0, "rope_base is -1"),
        ("llama.rope.scaling.type", 3, "llama.rope.scaling.type is 3"),
        ("llama.rope.scaling.factor", 1e30, "rope_scaling's factor is 1.0000"),
        ("llama.attention.sliding_window", [4], "sliding_window is [4]"),
        ("general.name", 3, "general.name is 3"),
        ("general.architecture", 3, "general.architecture is 3"),
        ("tokenizer.ggml.tokens", 3, "tokenizer.ggml.tokens is 3, expected a list"),
        ("tokenizer.ggml.tokens", [1] * 400, "tokenizer.ggml.tokens[0] is 1, expected text"),
        ("tokenizer.ggml.token_type", [1], "tokenizer.ggml.token_type has 1 entries, expected 400"),
        ("tokenizer.ggml.token_type", None, "tokenizer.ggml.token_type is None, expected a list"),
        ("tokenizer.ggml.merges", "a b", "tokenizer.ggml.merges is 'a b', expected a list"),
        ("tokenizer.ggml.merges", ["a"], "tokenizer.ggml.merges has 'a', expected two parts"),
        ("tokenizer.ggml.merges", ["a zqxj"], "the vocabulary is damaged"),
        (
            "tokenizer.ggml.bos_token_id",
            400,
            "tokenizer.ggml.bos_token_id is 400, expected a whole number from 0 to 399",
        ),
        ("tokenizer.ggml.eos_token_id", -1, "tokenizer.ggml.eos_token_id is -1"),
        ("tokenizer.ggml.add_bos_token", 1, "tokenizer.ggml.add_bos_token is 1, expected true or false"),
        ("tokenizer.ggml.model", ["gpt2"], "tokenizer.ggml.model is ['gpt2']"),
        ("tokenizer.ggml.pre", 1, "tokenizer.ggml.pre is 1"),
        ("tokenizer.chat_template", 1, "tokenizer.chat_template is 1"),
    ],
)
def test_odd_gguf_fields(command, tmp_path, tiny_gguf, field, value, found):
    write_fields(tmp_path / "x.gguf", tiny_gguf, {field: value})
    status, _, err = command(
        "scripts/convert_gguf_checkpoint.py", gguf_path=tmp_path / "x.gguf", output_dir=tmp_path / "lit"
    )
    assert (status, err.count("\n"), found in err, "x.gguf" in err) == (1, 1, True, True), err
    assert not (tmp_path / "lit").exists()


@pytest.mark.parametrize("length", [2**63, 2**40, 2**24])
@pytest.mark.parametrize("kind", [0, 8, 9, 6])
def test_gguf_lengths_that_the_file_has_no_room_for(tmp_path, length, kind):
    """The library would read on beyond the file's end until memory ends."""
    name, header = b"some.array", struct.pack("<4sIQQ", b"GGUF", 3, 0, 1)
    field = struct.pack("<Q", len(name)) + name + struct.pack("<IIQ", 9, kind, length)
    (tmp_path / "x.gguf").write_bytes(header + field)
    with pytest.raises(ValueError, match=r"x\.gguf is not a complete GGUF file \('some\.array' is an array of"):
        open_gguf(tmp_path / "x.gguf")
    text = struct.pack("<Q", len(name)) + name + struct.pack("<IQ", 8, length)
    (tmp_path / "x.gguf").write_bytes(header + text)
    with pytest.raises(ValueError, match=r"'some\.array' is longer than the file"):
        open_gguf(tmp_path / "x.gguf")
    for counts in ((length, 0), (0, length)):
        (tmp_path / "x.gguf").write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, *counts))
        with pytest.raises(ValueError, match="not a complete GGUF file"):
            open_gguf(tmp_path / "x.gguf")


ODD = [None, True, -1, 0, 2**31, 1e30, -1e-310, float("nan"), "", "x", "\ud800", [], {}, [[]], {"a": None}, 10**100]


def damaged(data, rng):
    """A bit flipped, an end cut off, a block of zeros, or bytes that were not there."""
    at = rng.randrange(len(data))
    kind = rng.choice(["flip", "flip", "cut", "zeros", "more"])
    if kind == "flip":
        return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
    if kind == "cut":
        return data[:at]
    return data[:at] + (bytes(8) + data[at + 8 :] if kind == "zeros" else rng.randbytes(8) + data[at:])


def odd_values(value, rng):
    """A JSON value with another one somewhere inside, or a key that is gone."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.1:
        return rng.choice(ODD)
    value = value.copy()
    key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
    if isinstance(value, dict) and rng.random() < 0.2:
        del value[key]
    else:
        value[key] = odd_values(value[key], rng)
    return value


def damage(file, rng):
    """Damage a file in place."""
    good = file.read_bytes()
    if file.suffix == ".json" and rng.random() < 0.7:
        file.write_text(json.dumps(odd_values(json.loads(good), rng)))
    else:
        file.write_bytes(damaged(good, rng))


def refused_in_one_line(path, read):
    """Whether reading raises an error that scripts turn into one line; any other error is the test's failure."""
    message = None
    try:
        read()
    except (ValueError, OSError) as error:
        message = str(error)
    assert message is None or path.parent.name in message or path.name in message, f"{message!r} names no file"
    assert "\n" not in (message or "")
    return message is not None


@pytest.mark.parametrize(
    "name",
    ["lit_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"],
)
@pytest.mark.parametrize("seed", range(SEEDS))
def test_damaged_base(base_dir, tmp_path, name, seed):
    """It is refused, --verify notices it, or nothing that is computed changes."""
    base = shutil.copytree(base_dir, tmp_path / "base")
    (base / "generation_config.json").write_text('{"eos_token_id": [3, 0], "transformers_version": "5"}')
    text, ids = "<|user|>Hello 12<|end|>", torch.arange(9)[None]
    expected = load_base(base)(ids), Tokenizer(base).encode(text)
    damage(base / name, random.Random(f"{name} {seed}"))
    if refused_in_one_line(base / name, lambda: (load_base(base), Tokenizer(base))):
        return
    if not refused_in_one_line(base / name, lambda: verify_base(base)):
        assert torch.equal(load_base(base)(ids), expected[0])
        assert Tokenizer(base).encode(text) == expected[1]


@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"])
def test_damaged_hf_checkpoint(hf_checkpoint, tmp_path, name, seed):
    source = shutil.copytree(hf_checkpoint, tmp_path / "hf")
    damage(source / name, random.Random(f"{name} {seed}"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        converted = not refused_in_one_line(source / name, lambda: convert_hf.main(source, tmp_path / "lit"))
    assert (tmp_path / "lit").exists() == converted


@pytest.mark.parametrize("seed", range(4 * SEEDS))
def test_damaged_gguf(tiny_gguf, tmp_path, seed):
    """In its metadata or anywhere, in turn."""
    rng, data = random.Random(seed), tiny_gguf.read_bytes()
    head = len(data) if seed % 4 == 0 else 12_000
    (tmp_path / "x.gguf").write_bytes(damaged(data[:head], rng) + data[head:])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        refused = refused_in_one_line(
            tmp_path / "x.gguf", lambda: convert_gguf.main(tmp_path / "x.gguf", tmp_path / "lit")
        )
    assert (tmp_path / "lit").exists() != refused
