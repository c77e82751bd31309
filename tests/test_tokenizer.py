"""SentencePiece's side of the tokenizer, and what the settings files add."""

import json

import pytest
from conftest import AWKWARD, DEMO_BASE, ROOT
from test_convert import train_sentencepiece

from lit_llama.generation import TextStream
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
@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
def test_streamed_text_is_the_whole_text(sentencepiece_dir, kind, text):
    tokenizer = Tokenizer(DEMO_BASE if kind == "byte-level" else sentencepiece_dir)
    ids = tokenizer.encode(text)
    stream = TextStream(tokenizer)
    pieces = [stream.push(id) for id in ids]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) + stream.flush() == tokenizer.decode(ids)
