"""Files of base models that are damaged or odd: refused in one line, or read as they were; never anything else."""

import struct

import pytest
from test_convert import bpe_fields, write_fields, write_gguf

from lit_llama.gguf_files import open_gguf


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
    with pytest.raises(ValueError, match=r"x\.gguf is not a complete GGUF file \(some\.array is an array of"):
        open_gguf(tmp_path / "x.gguf")
    text = struct.pack("<Q", len(name)) + name + struct.pack("<IQ", 8, length)
    (tmp_path / "x.gguf").write_bytes(header + text)
    with pytest.raises(ValueError, match=r"some\.array is longer than the file"):
        open_gguf(tmp_path / "x.gguf")
    for counts in ((length, 0), (0, length)):
        (tmp_path / "x.gguf").write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, *counts))
        with pytest.raises(ValueError, match="not a complete GGUF file"):
            open_gguf(tmp_path / "x.gguf")
