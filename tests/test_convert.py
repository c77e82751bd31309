"""Conversions against transformers: the same logits and the same token ids from the converted folder."""

import functools
import json
import math
import warnings

import gguf
import numpy as np
import pytest
import safetensors.torch
import sentencepiece
import torch
import transformers
from conftest import AWKWARD, DEMO_BASE, load_script, make_hf_checkpoint

from lit_llama.checkpoint import load_base
from lit_llama.formats.hf import config_from_hf
from lit_llama.formats.meta import config_from_meta
from lit_llama.tokenizer import Tokenizer

convert_hf = load_script("scripts/convert_hf_checkpoint.py")
convert_gguf = load_script("scripts/convert_gguf_checkpoint.py")
convert_meta = load_script("scripts/convert_meta_checkpoint.py")
export = load_script("scripts/export_hf_checkpoint.py")

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
VARIANTS = {
    "grouped-query, tied": {},
    "multi-head, untied": {"num_key_value_heads": 4, "tie_word_embeddings": False},
    "head size of its own": {"head_dim": 16},
    "llama3 rotary": {"rope_parameters": LLAMA3_ROPE},
    "linear rotary": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
    "other constants": {"rms_norm_eps": 1e-3, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "sharded": {"max_shard_size": "20KB"},
}


def assert_same_logits(hf_folder, base_folder, dtype=torch.float32):
    expected = transformers.AutoModelForCausalLM.from_pretrained(hf_folder, dtype=dtype)
    ids = torch.randint(390, (2, 200), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(load_base(base_folder)(ids), expected(ids).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_hf_logits(tmp_path, variant):
    source = make_hf_checkpoint(tmp_path / "hf", **VARIANTS[variant])
    if variant == "sharded":
        assert len(list(source.glob("model-*.safetensors"))) > 1
    convert_hf.main(checkpoint_dir=source, output_dir=tmp_path / "lit")
    assert_same_logits(source, tmp_path / "lit")


@pytest.mark.parametrize("sharded", [False, True])
def test_hf_bin_files(tmp_path, hf_checkpoint, sharded):
    source = tmp_path / "bin"
    source.mkdir()
    for file in hf_checkpoint.iterdir():
        if file.suffix != ".safetensors":
            (source / file.name).write_bytes(file.read_bytes())
    tensors = safetensors.torch.load_file(hf_checkpoint / "model.safetensors")
    if sharded:
        weight_map = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(tensors)}
        for shard in set(weight_map.values()):
            torch.save({name: tensors[name] for name in tensors if weight_map[name] == shard}, source / shard)
        (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    else:
        torch.save(tensors, source / "pytorch_model.bin", _use_new_zipfile_serialization=False)  # as before torch 1.6
    convert_hf.main(checkpoint_dir=source, output_dir=tmp_path / "lit")
    assert_same_logits(hf_checkpoint, tmp_path / "lit")


@pytest.mark.parametrize(("window", "block_size"), [(None, 256), (512, 256), (16, 16)])
def test_mistral(command, tmp_path, window, block_size):
    """Within its sliding window it is a LLaMA, and the window is the longest context."""
    source = make_hf_checkpoint(tmp_path / "hf")
    config = json.loads((source / "config.json").read_text())
    config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": window}
    (source / "config.json").write_text(json.dumps(config))
    _, _, err = command("scripts/convert_hf_checkpoint.py", checkpoint_dir=source, output_dir=tmp_path / "lit")
    assert err.count("\n") == 2 - (block_size == 256)
    assert ("config.json: sliding_window is 16" in err) == (block_size == 16)
    expected, model = transformers.AutoModelForCausalLM.from_pretrained(source), load_base(tmp_path / "lit")
    assert (expected.config.sliding_window, model.config.block_size) == (window, block_size)
    ids = torch.randint(390, (2, block_size), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(ids), expected(ids).logits, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match=f"window of {block_size}"):
        model(torch.zeros(1, block_size + 1, dtype=torch.long))


def test_window_of_mistral_7b(hf_checkpoint):
    """Version 0.1 has 4096, and so has a config.json that does not say."""
    fields = {**json.loads((hf_checkpoint / "config.json").read_text()), "model_type": "mistral"}
    fields["max_position_embeddings"] = 32768
    for window, block_size in ((4096, 4096), ("absent", 4096), (None, 32768)):
        given = fields if window == "absent" else {**fields, "sliding_window": window}
        with warnings.catch_warnings(record=True) as said:
            assert config_from_hf(given, "x").block_size == block_size
        assert len(said) == (block_size == 4096)


def test_dtype_and_shards_of_the_output(tmp_path, hf_checkpoint, monkeypatch):
    monkeypatch.setattr(convert_hf, "write_base", functools.partial(convert_hf.write_base, shard_bytes=20_000))
    convert_hf.main(checkpoint_dir=hf_checkpoint, output_dir=tmp_path / "lit", dtype="bfloat16")
    shards = sorted((tmp_path / "lit").glob("model-*.safetensors"))
    assert len(shards) > 1
    assert all(shard.stat().st_size < 30_000 for shard in shards)
    dtypes = {tensor.dtype for shard in shards for tensor in safetensors.torch.load_file(shard).values()}
    assert dtypes == {torch.bfloat16}
    model = transformers.AutoModelForCausalLM.from_pretrained(hf_checkpoint)
    ids = torch.arange(50)[None]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
        torch.testing.assert_close(load_base(tmp_path / "lit")(ids), model(ids).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}, "rope_parameters": None}, "rope_scaling"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": "32"}, "hidden_size"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"num_hidden_layers": 2**31}, "n_layer"),
        ({"num_hidden_layers": -4}, "n_layer"),
        ({"num_hidden_layers": True}, "n_layer"),
        ({"vocab_size": 1e30}, "vocab_size"),
        ({"intermediate_size": [64]}, "intermediate_size"),
        ({"head_dim": 15}, "head_size"),
        ({"max_position_embeddings": {}}, "max_position_embeddings"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"rope_parameters": [1]}, "rope_parameters"),
        ({"rope_parameters": {"rope_type": ["llama3"], "rope_theta": 1e4}}, "rope_scaling"),
        ({"rope_parameters": {**LLAMA3_ROPE, "high_freq_factor": 1.0}}, "high_freq_factor"),
        ({"rope_parameters": {**LLAMA3_ROPE, "factor": 10**400}}, "factor"),
    ],
)
def test_hf_config_that_cannot_be_honoured(command, tmp_path, hf_checkpoint, change, field):
    source = tmp_path / "hf"
    source.mkdir()
    for file in hf_checkpoint.iterdir():
        (source / file.name).symlink_to(file)
    config = {**json.loads((source / "config.json").read_text()), **change}
    (source / "config.json").unlink()
    (source / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None or k != field}))
    status, _, err = command("scripts/convert_hf_checkpoint.py", checkpoint_dir=source, output_dir=tmp_path / "lit")
    assert status == 1
    assert field in err
    assert "config.json" in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert not (tmp_path / "lit").exists()


def test_byte_level_tokenizer_is_the_original(hf_checkpoint, base_dir):
    expected, tokenizer = transformers.AutoTokenizer.from_pretrained(hf_checkpoint), Tokenizer(base_dir)
    for text in [*AWKWARD, "<|user|>hi<|end|>\n<|assistant|>"]:
        ids = tokenizer.encode(text)
        assert ids == expected.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
        assert tokenizer.decode(ids) == expected.decode(ids, skip_special_tokens=True)


def test_meta_shards_are_merged(tmp_path, hf_checkpoint):
    """Cut a model the way Meta's model parallelism does, and convert it back."""
    model = transformers.AutoModelForCausalLM.from_pretrained(hf_checkpoint)
    heads = {"wq": 4, "wk": 2}
    names = {
        "wq": "self_attn.q_proj",
        "wk": "self_attn.k_proj",
        "wv": "self_attn.v_proj",
        "wo": "self_attn.o_proj",
        "w1": "mlp.gate_proj",
        "w2": "mlp.down_proj",
        "w3": "mlp.up_proj",
    }
    weights = model.state_dict()
    for embedding_dim in (0, 1):  # Llama 3 cuts the vocabulary, older ones the embedding size
        folder = tmp_path / f"meta{embedding_dim}"
        folder.mkdir()
        shards = [{}, {}]

        def put(name, tensor, dim, shards=shards):
            for shard, part in zip(shards, tensor.chunk(2, dim) if dim is not None else [tensor] * 2, strict=True):
                shard[name] = part.clone()

        put("tok_embeddings.weight", weights["model.embed_tokens.weight"], embedding_dim)
        put("output.weight", weights["lm_head.weight"], 0)
        put("norm.weight", weights["model.norm.weight"], None)
        put("rope.freqs", torch.ones(4), None)
        for layer in range(4):
            put(f"layers.{layer}.attention_norm.weight", weights[f"model.layers.{layer}.input_layernorm.weight"], None)
            put(
                f"layers.{layer}.ffn_norm.weight",
                weights[f"model.layers.{layer}.post_attention_layernorm.weight"],
                None,
            )
            for meta, hf in names.items():
                weight = weights[f"model.layers.{layer}.{hf}.weight"]
                if meta in heads:  # Meta's rotary pairs are interleaved, Hugging Face's halved
                    weight = weight.view(heads[meta], 2, 4, 32).transpose(1, 2).reshape(-1, 32)
                block = "attention" if hf.startswith("self_attn") else "feed_forward"
                put(f"layers.{layer}.{block}.{meta}.weight", weight, 1 if meta in ("wo", "w2") else 0)
        for number, shard in enumerate(shards):
            torch.save(shard, folder / f"consolidated.{number:02d}.pth")
        params = {"dim": 32, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "norm_eps": 1e-6, "vocab_size": -1}
        (folder / "params.json").write_text(json.dumps(params))
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (folder / file).write_bytes((hf_checkpoint / file).read_bytes())
        convert_meta.main(checkpoint_dir=folder, output_dir=tmp_path / f"lit{embedding_dim}")
        assert_same_logits(hf_checkpoint, tmp_path / f"lit{embedding_dim}")
        config = load_base(tmp_path / f"lit{embedding_dim}").config
        assert (config.name, config.block_size) == (f"lit{embedding_dim}", 2048)


def test_meta_checkpoint_with_a_sliding_window_and_a_head_size():
    """Mistral's own files are Meta's layout."""
    params = {"dim": 8, "n_layers": 1, "n_heads": 2, "head_dim": 6, "norm_eps": 1e-5, "sliding_window": 64}
    tensors = {name: torch.zeros(9, 8) for name in ("tok_embeddings.weight", "layers.0.feed_forward.w1.weight")}
    for block_size in (None, 100):
        with pytest.warns(UserWarning, match="block_size is 64, not"):
            config = config_from_meta(params, tensors, "x", block_size)
        assert (config.name, config.block_size, config.head_size) == ("x", 64, 6)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"dim": None}, "lacks dim"),
        ({"dim": "64"}, "n_embd is '64'"),
        ({"n_layers": 2**31}, "n_layer is 2147483648, expected a whole number from 1 to 1024"),
        ({"n_kv_heads": -1}, "n_kv_head is -1"),
        ({"n_kv_heads": 3}, "expected a multiple of n_kv_head"),
        ({"norm_eps": [1e-5]}, "norm_eps is"),
        ({"rope_theta": {}}, "rope_theta is"),
        ({"use_scaled_rope": 1e30}, "use_scaled_rope is 1e"),
    ],
)
def test_odd_params_of_a_meta_checkpoint(command, tmp_path, change, found):
    params = {"dim": 4, "n_layers": 1, "n_heads": 2, "norm_eps": 1e-5, **change}
    (tmp_path / "params.json").write_text(json.dumps(params))
    names = ("tok_embeddings.weight", "layers.0.feed_forward.w1.weight")
    torch.save({name: torch.zeros(9, 4) for name in names}, tmp_path / "consolidated.00.pth")
    status, _, err = command("scripts/convert_meta_checkpoint.py", checkpoint_dir=tmp_path, output_dir=tmp_path / "lit")
    assert (status, err.count("\n")) == (1, 1)
    assert "params.json" in err
    assert found in err


def write_gguf(file, hf_folder, tokenizer_fields, quantization=None, rope_factors=None, architecture="llama"):
    """A GGUF file of a tiny transformers model, with the `gguf` library's own writer; llama's rows are put in pairs."""
    model = transformers.AutoModelForCausalLM.from_pretrained(hf_folder)
    config = model.config
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_context_length(256)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if head_dim := getattr(config, "head_dim", None):
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
        writer.add_rope_dimension_count(head_dim)
    tokenizer_fields(writer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if part in name and architecture == "llama":
                tensor = tensor.view(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
        values = tensor.float().numpy()
        if quantization is not None and values.ndim == 2:
            packed = gguf.quantize(values, quantization)
            writer.add_tensor(names.get_name(name, (".weight", ".bias")), packed, raw_dtype=quantization)
        else:
            writer.add_tensor(names.get_name(name, (".weight", ".bias")), values)
    if rope_factors is not None:
        writer.add_tensor("rope_freqs.weight", rope_factors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def bpe_fields(hf_folder, pre="gpt-2"):
    def write(writer):
        content = json.loads((hf_folder / "tokenizer.json").read_text())
        vocabulary = sorted(content["model"]["vocab"].items(), key=lambda item: item[1])
        special = {token["content"] for token in content["added_tokens"]}
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list([token for token, _ in vocabulary])
        writer.add_token_types([3 if token in special else 1 for token, _ in vocabulary])
        writer.add_token_merges([" ".join(merge) for merge in content["model"]["merges"]])
        writer.add_bos_token_id(dict(vocabulary)["<|endoftext|>"])
        writer.add_eos_token_id(dict(vocabulary)["<|end|>"])
        templates = {"default": "{{ messages[0]['content'] }}", "rag": "of documents"}
        writer.add_chat_template([{"name": name, "template": source} for name, source in templates.items()])

    return write


def assert_exported_ids(base, target):
    """Exported, transformers begins and reads every text as this project does."""
    export.main(target, checkpoint_dir=base)
    theirs, ours = transformers.AutoTokenizer.from_pretrained(target), Tokenizer(base)
    for text in [*AWKWARD, "<unk>", "</s>x", "<|user|>hi<|end|>\n<|assistant|>"]:
        assert theirs(text).input_ids == ours.encode(text, bos=ours.adds_bos)
        assert theirs(text, add_special_tokens=False).input_ids == ours.encode(text)


def test_gguf_logits_and_tokenizer(tmp_path, hf_checkpoint):
    write_gguf(tmp_path / "f32.gguf", hf_checkpoint, bpe_fields(hf_checkpoint))
    convert_gguf.main(gguf_path=tmp_path / "f32.gguf", output_dir=tmp_path / "lit")
    assert_same_logits(hf_checkpoint, tmp_path / "lit")
    expected, tokenizer = transformers.AutoTokenizer.from_pretrained(hf_checkpoint), Tokenizer(tmp_path / "lit")
    for text in [*AWKWARD, "<|user|>hi<|end|>"]:
        assert tokenizer.encode(text) == expected.encode(text, add_special_tokens=False)
    assert tokenizer.eos_id == expected.convert_tokens_to_ids("<|end|>")
    assert not tokenizer.adds_bos
    assert_exported_ids(tmp_path / "lit", tmp_path / "export")
    assert tokenizer.chat_templates == {"default": "{{ messages[0]['content'] }}", "rag": "of documents"}


def test_gguf_untied_with_the_older_key_of_linear_scaling(tmp_path):
    rope = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    source = make_hf_checkpoint(tmp_path / "hf", tie_word_embeddings=False, rope_parameters=rope)

    def fields(writer):
        bpe_fields(source)(writer)
        writer.add_float32("llama.rope.scale_linear", 4.0)

    write_gguf(tmp_path / "model.gguf", source, fields)
    convert_gguf.main(gguf_path=tmp_path / "model.gguf", output_dir=tmp_path / "lit")
    assert_same_logits(source, tmp_path / "lit")


def test_gguf_tokenizer_of_llama_3(tmp_path):
    """Digits in groups of three, words of the vocabulary whole, begin-of-text in front, as its own tokenizer does."""
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    )
    source = make_hf_checkpoint(tmp_path / "hf")
    content = json.loads((source / "tokenizer.json").read_text())
    # A word that no merge leads to.
    content["model"]["vocab"]["zqx"] = len(content["model"]["vocab"])
    content["model"]["ignore_merges"] = True
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, byte_level]}
    (source / "tokenizer.json").write_text(json.dumps(content))
    source = make_hf_checkpoint_around(source, vocab_size=len(content["model"]["vocab"]))
    write_gguf(tmp_path / "model.gguf", source, bpe_fields(source, pre="llama-bpe"))
    convert_gguf.main(gguf_path=tmp_path / "model.gguf", output_dir=tmp_path / "lit")
    expected, tokenizer = transformers.AutoTokenizer.from_pretrained(source), Tokenizer(tmp_path / "lit")
    for text in [*AWKWARD, "1234567 zqx", "don't\n\n  x"]:
        assert tokenizer.encode(text) == expected.encode(text, add_special_tokens=False)
    assert content["model"]["vocab"]["zqx"] in tokenizer.encode("zqx")
    assert tokenizer.adds_bos
    assert tokenizer.encode("x", bos=True)[0] == tokenizer.bos_id
    assert_exported_ids(tmp_path / "lit", tmp_path / "export")


def make_hf_checkpoint_around(folder, vocab_size):
    """A model for a tokenizer that was changed by hand."""
    config = transformers.AutoConfig.from_pretrained(folder)
    config.vocab_size = vocab_size
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("changes", "block_size", "factor"),
    [
        ({"norm_eps": 1e-6}, 2048, None),
        ({"norm_eps": 1e-5, "n_layers": 80}, 2048, None),  # LLaMA 65B
        ({"norm_eps": 1e-5, "n_layers": 80, "n_kv_heads": 8}, 4096, None),  # Llama 2 70B
        ({"norm_eps": 1e-5}, 4096, None),
        ({"norm_eps": 1e-5, "rope_theta": 500000.0}, 8192, None),
        ({"norm_eps": 1e-5, "rope_theta": 500000.0, "use_scaled_rope": True}, 131072, 8.0),
        ({"norm_eps": 1e-5, "n_layers": 16, "dim": 2048, "use_scaled_rope": True}, 131072, 32.0),  # Llama 3.2 1B
    ],
)
def test_generation_of_a_meta_checkpoint(changes, block_size, factor):
    params = {"dim": 4096, "n_layers": 32, "n_heads": 32, **changes}
    tensors = {"tok_embeddings.weight": torch.zeros(10, 2), "layers.0.feed_forward.w1.weight": torch.zeros(7, 2)}
    config = config_from_meta(params, tensors, "x", None)
    assert config.block_size == block_size
    assert (config.rope_scaling and config.rope_scaling.factor) == factor


def test_gguf_quantised_weights_and_llama3_rotary(tmp_path):
    source = make_hf_checkpoint(
        tmp_path / "hf", rope_parameters={**LLAMA3_ROPE, "original_max_position_embeddings": 8192}
    )
    # llama.cpp's convert_hf_to_gguf.py stores these divisors of the frequencies.
    frequencies = 500000.0 ** (-np.arange(0, 8, 2) / 8)
    wavelengths = 2 * math.pi / frequencies
    smooth = (8192 / wavelengths - 1.0) / (4.0 - 1.0)
    factors = np.where(wavelengths < 8192 / 4, 1.0, np.where(wavelengths > 8192, 8.0, 1 / ((1 - smooth) / 8 + smooth)))
    quantization = gguf.GGMLQuantizationType.Q8_0
    write_gguf(tmp_path / "q8.gguf", source, bpe_fields(source), quantization, factors.astype(np.float32))
    convert_gguf.main(gguf_path=tmp_path / "q8.gguf", output_dir=tmp_path / "lit")

    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                packed = gguf.quantize(parameter.numpy(), quantization)
                parameter.copy_(torch.tensor(gguf.dequantize(packed, quantization)))
    ids = torch.randint(390, (1, 200))
    with torch.no_grad():
        torch.testing.assert_close(load_base(tmp_path / "lit")(ids), model(ids).logits, atol=1e-5, rtol=0)


def test_gguf_sentencepiece_vocabulary(tmp_path, hf_checkpoint):
    original = train_sentencepiece(tmp_path)
    pieces = range(original.get_piece_size())

    def kind(id):
        checks = (original.is_unknown, original.is_control, original.is_byte)
        return next((type for check, type in zip(checks, (2, 3, 6), strict=True) if check(id)), 1)

    def fields(writer):
        writer.add_tokenizer_model("llama")
        writer.add_token_list([original.id_to_piece(id) for id in pieces])
        writer.add_token_scores([original.get_score(id) for id in pieces])
        writer.add_token_types([kind(id) for id in pieces])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)

    source = make_hf_checkpoint(tmp_path / "hf", vocab_size=len(pieces))
    write_gguf(tmp_path / "model.gguf", source, fields)
    convert_gguf.main(gguf_path=tmp_path / "model.gguf", output_dir=tmp_path / "lit")
    tokenizer = Tokenizer(tmp_path / "lit")
    assert_exported_ids(tmp_path / "lit", tmp_path / "export")
    for text in AWKWARD:
        if "<s>" not in text:
            assert tokenizer.encode(text) == original.encode(text)
            assert tokenizer.decode(tokenizer.encode(text)) == original.decode(original.encode(text))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.adds_bos) == (1, 2, True)


def train_sentencepiece(folder, **options):
    """A small SentencePiece model with LLaMA's settings."""
    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join([*AWKWARD, "the quick brown fox jumps over the lazy dog"] * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(folder / "trained"),
        vocab_size=360,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "trained.model"))


def test_gguf_of_another_architecture_is_refused(command, tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "gemma")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    status, _, err = command(
        "scripts/convert_gguf_checkpoint.py", gguf_path=tmp_path / "x.gguf", output_dir=tmp_path / "lit"
    )
    assert (status, err.count("\n")) == (1, 1)
    assert "general.architecture is 'gemma'" in err


def write_fields(file, source, changes):
    """A copy of a GGUF file with other metadata, None for none, in whatever type they come."""
    reader = gguf.GGUFReader(source)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")} | changes
    writer = gguf.GGUFWriter(file, "llama")
    writer.kv_data[0].clear()
    for name, value in fields.items():
        if value is not None:
            kind = gguf.GGUFValueType.INT64 if type(value) is int else gguf.GGUFValueType.get_type(value)
            sub_type = gguf.GGUFValueType.get_type(value[0]) if isinstance(value, list) else None
            writer.add_key_value(name, value, kind, sub_type=sub_type)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_with_a_sliding_window(tmp_path, hf_checkpoint):
    write_gguf(tmp_path / "whole.gguf", hf_checkpoint, bpe_fields(hf_checkpoint))
    write_fields(tmp_path / "x.gguf", tmp_path / "whole.gguf", {"llama.attention.sliding_window": 16})
    with pytest.warns(UserWarning, match=r"llama\.attention\.sliding_window is 16, .* block_size is 16, not 256"):
        convert_gguf.main(gguf_path=tmp_path / "x.gguf", output_dir=tmp_path / "lit")
    assert load_base(tmp_path / "lit").config.block_size == 16


def test_gguf_with_unknown_pre_tokenizer_is_refused(tmp_path, hf_checkpoint):
    write_gguf(tmp_path / "x.gguf", hf_checkpoint, bpe_fields(hf_checkpoint, pre="klingon"))
    with pytest.raises(ValueError, match=r"tokenizer\.ggml\.pre is 'klingon'"):
        convert_gguf.main(gguf_path=tmp_path / "x.gguf", output_dir=tmp_path / "lit")
    assert not (tmp_path / "lit").exists()


def test_demo_base_tokenizer():
    """The ids that SmolLM2's own tokenizer gives."""
    text = "<|im_start|>user\nHello world 123, it's é!<|im_end|>"
    ids = [1, 4093, 198, 19556, 905, 216, 33, 34, 35, 28, 357, 506, 26411, 17, 2]
    tokenizer = Tokenizer(DEMO_BASE)
    assert tokenizer.encode(text) == ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    for text in AWKWARD:
        assert tokenizer.decode(tokenizer.encode(text)) == text
