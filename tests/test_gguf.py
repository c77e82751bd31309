"""GGUF files of other families and of models with biases, held against transformers and llama.cpp."""

import functools
import json
import unicodedata
import urllib.request
from contextlib import contextmanager

import gguf
import pytest
import torch
from conftest import AWKWARD, load_script, make_hf_checkpoint, random_aligner
from test_convert import assert_same_logits, bpe_fields, write_gguf

from lit_llama.adapters import load_adapter, save_adapter
from lit_llama.bias import Bias
from lit_llama.checkpoint import load_base
from lit_llama.combine import WeightedSum
from lit_llama.formats.gguf_tokenizer import PRE_TOKENIZERS
from lit_llama.tokenizer import Tokenizer

SCRIPT = "scripts/export_gguf.py"
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
    with llama_cpp(file) as ask:  # it tells nothing of a token that ends the text or is half a character
        answer = ask("/completion", prompt=ids, n_predict=1, logit_bias=[[40, 1000]], n_probs=10_000)
    found = {entry["id"]: entry["logprob"] for entry in answer["completion_probabilities"][0]["top_logprobs"]}
    return torch.tensor([found[id] for id in range(len(found))])


FAMILIES = {
    "qwen2": ("qwen2", {"model_type": "qwen2"}),
    "qwen2, untied": ("qwen2", {"model_type": "qwen2", "tie_word_embeddings": False}),
    "qwen3": ("qwen3", {"model_type": "qwen3", "head_dim": 16}),
    "llama with biases": ("llama", {"attention_bias": True}),
}


def make_gguf(folder, family, quantization=None):
    """A GGUF file of a family's tiny model, and the base that it is converted to."""
    architecture, changes = FAMILIES[family]
    source = make_hf_checkpoint(folder / "hf", **changes)
    write_gguf(folder / "x.gguf", source, bpe_fields(source), quantization, architecture=architecture)
    convert.main(gguf_path=folder / "x.gguf", output_dir=folder / "lit")
    return folder / "x.gguf", folder / "lit"


def log_probabilities(model, ids, adapter=None):
    with torch.no_grad():
        return model(torch.tensor([ids]), adapter)[0, -1].log_softmax(0)


IDS = list(range(5, 45))
same = functools.partial(torch.testing.assert_close, atol=1e-3, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits(tmp_path, family):
    file, base = make_gguf(tmp_path, family)
    assert_same_logits(tmp_path / "hf", base)
    same(log_probabilities(load_base(base), IDS), logits_of_llama_cpp(file, IDS))


@pytest.mark.parametrize("quantization", [None, gguf.GGMLQuantizationType.Q8_0])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_token_and_bias_are_folded(tmp_path, command, family, quantization):
    """llama.cpp computes what we do; what comes back in is a model that computes it without an adapter."""
    file, base = make_gguf(tmp_path, family, quantization)
    model = load_base(base)
    bias = Bias(model.config, "v")
    torch.nn.init.normal_(bias.vectors, std=0.3)
    save_adapter(tmp_path / "bias.safetensors", bias, model)
    save_adapter(tmp_path / "aligner.safetensors", random_aligner(model.config, 1, init_std=0.5), model)
    options = {"gguf_path": file, "output_path": tmp_path / "out.gguf"}
    adapters = [f"--adapter_path={tmp_path / name}.safetensors" for name in ("bias", "aligner")]
    status, _, err = command(SCRIPT, *adapters, **options)
    if family == "qwen3":
        assert (status, "adds biases to the projection o, and llama.cpp reads only those of v" in err) == (1, True)
        adapters = adapters[:1]
        status, _, err = command(SCRIPT, *adapters, **options)
    assert status == 0, err
    terms = [(load_adapter(option.partition("=")[2]), 1.0) for option in adapters]
    ours = log_probabilities(model, IDS, WeightedSum(*terms))
    assert (ours - log_probabilities(model, IDS)).abs().max() > 0.1
    convert.main(gguf_path=tmp_path / "out.gguf", output_dir=tmp_path / "again")
    torch.testing.assert_close(log_probabilities(load_base(tmp_path / "again"), IDS), ours, atol=1e-4, rtol=0)
    theirs = logits_of_llama_cpp(tmp_path / "out.gguf", IDS)
    if quantization is None:
        same(theirs, ours)
    else:  # llama.cpp rounds activations too; the rows have moved with their blocks as they were
        same(theirs, ours, atol=0.2)
        before, after = (
            {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors} for path in (file, tmp_path / "out.gguf")
        )
        rows = [sorted(map(bytes, tensors["blk.1.attn_q.weight"].data)) for tensors in (before, after)]
        assert rows[0] == rows[1]
        assert after["blk.1.attn_q.weight"].tensor_type == quantization


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
