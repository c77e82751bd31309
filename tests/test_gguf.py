"""GGUF files of other families and of models with biases, held against transformers and llama.cpp."""

import json
import unicodedata
import urllib.request
from contextlib import contextmanager

import pytest
import torch
import transformers
from conftest import AWKWARD, load_script, train_tokenizer
from test_convert import assert_same_logits, bpe_fields, write_gguf

from lit_llama.checkpoint import load_base
from lit_llama.formats.gguf_tokenizer import PRE_TOKENIZERS
from lit_llama.tokenizer import Tokenizer

convert = load_script("scripts/convert_gguf_checkpoint.py")


@contextmanager
def llama_cpp(file):
    """Asks llama.cpp's server, with a file open, by path and body."""
    xllamacpp = pytest.importorskip("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.warmup, params.cpuparams.n_threads = str(file), 256, False, 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)

    def ask(path, **body):
        request = urllib.request.Request(server.listening_address + path, json.dumps(body).encode())
        with urllib.request.urlopen(request) as response:
            return json.load(response)

    yield ask


def logits_of_llama_cpp(file, ids):
    """Log-probabilities (V) of what follows token ids."""
    with llama_cpp(file) as ask:
        answer = ask("/completion", prompt=ids, n_predict=1, temperature=0, n_probs=10_000)
    found = {entry["id"]: entry["logprob"] for entry in answer["completion_probabilities"][0]["top_logprobs"]}
    return torch.tensor([found[id] for id in range(len(found))])


def make_family(folder, kind, **changes):
    """A tiny model of transformers' class for `model_type` kind; biases and norms are random, not zero and one."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": train_tokenizer(folder),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "initializer_range": 0.1,
    }
    config = transformers.AutoConfig.for_model(kind, **{**sizes, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, float("norm" in name), 0.3)
    model.save_pretrained(folder)
    return folder


FAMILIES = {
    "qwen2": ("qwen2", "qwen2", {}),
    "qwen2, tied": ("qwen2", "qwen2", {"tie_word_embeddings": True}),
    "llama with biases": ("llama", "llama", {"attention_bias": True}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_logits(tmp_path, family):
    architecture, kind, changes = FAMILIES[family]
    source = make_family(tmp_path / "hf", kind, **changes)
    write_gguf(tmp_path / "x.gguf", source, bpe_fields(source), architecture=architecture)
    convert.main(gguf_path=tmp_path / "x.gguf", output_dir=tmp_path / "lit")
    assert_same_logits(source, tmp_path / "lit")
    ids = list(range(5, 45))
    with torch.no_grad():
        ours = load_base(tmp_path / "lit")(torch.tensor([ids]))[0, -1].log_softmax(0)
    torch.testing.assert_close(ours, logits_of_llama_cpp(tmp_path / "x.gguf", ids), atol=1e-3, rtol=0)


PRE_TEXTS = [
    *AWKWARD,
    "1234567 and ½ or ٣٤",
    "don't WON'T I'LL\n\n  x\r\n\ty ",
    "camelCaseHTTPServer über-Straße École ǅ日本語の文",
    "a/b//\n/c ... !!!\n\n\n  end   ",
]


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_pre_tokenizers_cut_as_llama_cpp_does(tmp_path, hf_checkpoint, pre):
    write_gguf(tmp_path / "x.gguf", hf_checkpoint, bpe_fields(hf_checkpoint, pre=pre))
    convert.main(gguf_path=tmp_path / "x.gguf", output_dir=tmp_path / "lit")
    tokenizer = Tokenizer(tmp_path / "lit")
    with llama_cpp(tmp_path / "x.gguf") as ask:
        for text in PRE_TEXTS:
            if pre == "qwen2":  # whose own tokenizer composes characters, as llama.cpp does not
                text = unicodedata.normalize("NFC", text)
            theirs = ask("/tokenize", content=text, add_special=True, parse_special=True)["tokens"]
            assert tokenizer.encode(text, bos=tokenizer.adds_bos) == theirs, text
