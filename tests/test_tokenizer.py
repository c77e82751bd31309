"""SentencePiece's side of the tokenizer, and what the settings files add."""

import json

import pytest
from conftest import AWKWARD, DEMO_BASE, ROOT, byte_fallback_tokenizer
from test_convert import train_sentencepiece

from lit_llama.data import tokenize
from lit_llama.generation import TextStream
from lit_llama.prompts import Message, prompt_style
from lit_llama.tokenizer import Tokenizer

LLAMA2 = ROOT.parent / "shared" / "data" / "tokenizer" / "llama2-tokenizer.model"


@pytest.fixture(scope="module")
def sentencepiece_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sp")
    train_sentencepiece(folder)
    (folder / "trained.model").rename(folder / "tokenizer.model")
    return folder


def test_sentencepiece_finds_control_tokens_in_text(sentencepiece_dir):
    tokenizer = Tokenizer(sentencepiece_dir)
    plain = tokenizer.encode("a marker")
    assert tokenizer.encode("<s>a marker</s>") == [1, *plain, 2]
    assert tokenizer.decode([1, *plain, 2]) == "a marker"
    assert tokenizer.decode([1, *plain, 2], skip_special_tokens=False) == "<s>a marker</s>"
    assert tokenizer.encode("a marker", bos=True) == [1, *plain]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.adds_bos) == (1, 2, True)


def test_sentencepiece_round_trip(sentencepiece_dir):
    tokenizer = Tokenizer(sentencepiece_dir)
    for text in AWKWARD:
        if "<s>" not in text:
            assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.skipif(not LLAMA2.is_file(), reason="LLaMA 2's tokenizer is not at hand")
def test_llama2_tokenizer(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(LLAMA2.read_bytes())
    tokenizer = Tokenizer(tmp_path)
    # As LLaMA 2's own tokenizer gives them.
    assert tokenizer.encode("Hello world", bos=True) == [1, 15043, 3186]
    assert tokenizer.vocab_size == 32000
    tokenizer.check_vocabulary(32000)


def test_settings_files(base_dir, tmp_path):
    for file in base_dir.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings |= {"eos_token": {"content": "<|end|>"}, "add_bos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 2]}))
    (tmp_path / "chat_template.jinja").write_text("from its own file")
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.adds_bos
    assert tokenizer.special_tokens["eos_token"] == "<|end|>"
    assert tokenizer.stop_ids == {tokenizer.eos_id, 0, 2}
    assert tokenizer.chat_template == "from its own file"


def test_tokens_added_to_sentencepiece(sentencepiece_dir, tmp_path):
    """Chat markers that live beside tokenizer.model are found in text and decoded."""
    (tmp_path / "tokenizer.model").write_bytes((sentencepiece_dir / "tokenizer.model").read_bytes())
    size = Tokenizer(tmp_path).vocab_size
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|im_start|>": size}))
    settings = {"added_tokens_decoder": {str(size + 1): {"content": "<|im_end|>"}, "1": {"content": "<s>"}}}
    settings["eos_token"] = "<|im_end|>"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = Tokenizer(tmp_path)
    plain = tokenizer.encode("a marker")
    ids = [size, *plain, size + 1]
    assert tokenizer.encode("<|im_start|>a marker<|im_end|>") == ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|im_start|>a marker<|im_end|>"
    assert tokenizer.decode(ids) == "a marker"
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (size + 2, size + 1)
    tokenizer.check_vocabulary(size + 2)


def test_template_that_puts_bos_in_front(tmp_path):
    byte_fallback_tokenizer(tmp_path)
    tokenizer = Tokenizer(tmp_path)
    assert (tokenizer.adds_bos, tokenizer.bos_id, tokenizer.eos_id) == (True, 1, 2)
    assert tokenizer.encode("hello")[0] != 1
    assert tokenizer.encode("hello", bos=True) == [1, *tokenizer.encode("hello")]
    for name, bos in (("alpaca", True), ("none", True)):
        style = prompt_style(name, tokenizer)
        assert style.bos is bos
        [example] = tokenize(tokenizer, style, [[Message("user", "hello"), Message("assistant", "ok")]])
        assert example.ids[0] == 1
        assert example.ids.tolist().count(1) == 1


def test_end_of_sequence_of_llama_3(hf_checkpoint, tmp_path):
    content = (hf_checkpoint / "tokenizer.json").read_text().replace("<|endoftext|>", "<|end_of_text|>")
    (tmp_path / "tokenizer.json").write_text(content)
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.decode([tokenizer.eos_id], skip_special_tokens=False) == "<|end_of_text|>"


def test_marker_without_a_row_is_tolerated(tmp_path):
    """Some LLaMA 2 repositories have a padding token that the model does not embed."""
    byte_fallback_tokenizer(tmp_path)
    rows = Tokenizer(tmp_path).vocab_size
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["added_tokens"].append({**content["added_tokens"][0], "id": rows, "content": "<pad>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert Tokenizer(tmp_path).vocab_size == rows + 1
    Tokenizer(tmp_path).check_vocabulary(rows)
    with pytest.raises(ValueError, match="tokens but the model embeds"):
        Tokenizer(tmp_path).check_vocabulary(rows - 1)


def test_missing_and_broken_tokenizers(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected tokenizer\.json or tokenizer\.model"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"not a protobuf")
    with pytest.raises(ValueError, match=r"tokenizer\.model is not a tokenizer that can be read"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize(("rows", "fits"), [(0, True), (63, True), (-1, False), (600, False)])
def test_vocabulary_must_fit_the_model(base_dir, rows, fits):
    tokenizer = Tokenizer(base_dir)
    if fits:
        tokenizer.check_vocabulary(tokenizer.vocab_size + rows)
    else:
        with pytest.raises(ValueError, match=f"{tokenizer.vocab_size} tokens but the model embeds"):
            tokenizer.check_vocabulary(tokenizer.vocab_size + rows)


@pytest.mark.parametrize("text", [text for text in AWKWARD if "<s>" not in text])
@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece", "byte-fallback"])
def test_streamed_text_is_the_whole_text(sentencepiece_dir, tmp_path, kind, text):
    byte_fallback_tokenizer(tmp_path)
    tokenizer = Tokenizer({"byte-level": DEMO_BASE, "sentencepiece": sentencepiece_dir}.get(kind, tmp_path))
    ids = tokenizer.encode(text)
    stream = TextStream(tokenizer)
    pieces = [stream.push(id) for id in ids]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) + stream.flush() == tokenizer.decode(ids)


def test_bytes_that_are_no_text_are_refused(base_dir):
    with pytest.raises(ValueError, match="not UTF-8, at character 3"):
        Tokenizer(base_dir).encode("caf\udce9")
