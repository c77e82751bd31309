"""SentencePiece's side of the tokenizer, and what the settings files add."""

import json
import warnings

import pytest
import tokenizers
import transformers
from conftest import AWKWARD, DEMO_BASE, ROOT, byte_fallback_tokenizer, train_tokenizer
from test_convert import train_sentencepiece

from lit_llama.conversion import copy_tokenizer
from lit_llama.data import tokenize
from lit_llama.formats.tokenizer_files import write_for_transformers
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
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.vocab_size == rows + 1
    with pytest.warns(UserWarning, match=r"does not embed \['<pad>'\], which its tokenizer has"):
        tokenizer.check_vocabulary(rows)
    assert tokenizer.encode("hello") == Tokenizer(tmp_path).encode("hello")
    with pytest.raises(ValueError, match="a text holds '<pad>', a token that the model does not embed"):
        tokenizer.encode("hello <pad>")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": rows}))
    with pytest.raises(ValueError, match="tokens but the model embeds"):  # where an answer ends does occur
        Tokenizer(tmp_path).check_vocabulary(rows)
    (tmp_path / "generation_config.json").unlink()
    Tokenizer(tmp_path).check_vocabulary(3 * rows)  # rows that no token uses
    with pytest.raises(ValueError, match="tokens but the model embeds"):
        Tokenizer(tmp_path).check_vocabulary(rows - 1)


def test_tekken_is_refused_by_name(tmp_path):
    (tmp_path / "tekken.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"tekken\.json is a tokenizer in Mistral's own format"):
        Tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"put the tokenizer\.json of the model's Hugging Face version next to"):
        copy_tokenizer(tmp_path, tmp_path / "other")


def test_missing_and_broken_tokenizers(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected tokenizer\.json or tokenizer\.model"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"not a protobuf")
    with pytest.raises(ValueError, match=r"tokenizer\.model is not a tokenizer that can be read"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize(("rows", "fits"), [(0, True), (63, True), (600, True), (-1, False)])
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


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("tokenizer_config.json", [], r"expected an object, found \[\]"),
        ("tokenizer_config.json", {"eos_token": 3}, "eos_token is 3, expected text"),
        ("tokenizer_config.json", {"eos_token": {"text": "x"}}, "eos_token lacks content"),
        ("tokenizer_config.json", {"bos_token": ["<s>"]}, "bos_token is"),
        ("tokenizer_config.json", {"add_bos_token": "yes"}, "add_bos_token is 'yes', expected true or false"),
        ("tokenizer_config.json", {"added_tokens_decoder": [1]}, r"added_tokens_decoder is \[1\], expected an object"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "y"}}}, r"\['x'\]: expected the id"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"-1": {"content": "y"}}}, r"\['-1'\]: expected the id"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"999": "y"}}, "expected an object, found 'y'"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"999": {"content": 1}}}, "content is 1, expected text"),
        ("tokenizer_config.json", {"chat_template": 5}, "chat_template"),
        ("added_tokens.json", {"<x>": 2**40}, "<x> is 1099511627776, expected a whole number from 0 to"),
        ("added_tokens.json", {"<x>": None}, "lacks <x>"),
        ("added_tokens.json", ["<x>"], "expected an object"),
        ("generation_config.json", {"eos_token_id": -1}, "eos_token_id is -1, expected a whole number from 0 to"),
        ("generation_config.json", {"eos_token_id": "2"}, "eos_token_id is '2'"),
        ("generation_config.json", {"eos_token_id": [2, 1e30]}, "eos_token_id is 1e"),
        ("generation_config.json", {"eos_token_id": {"a": 1}}, "eos_token_id is"),
        ("generation_config.json", 7, "expected an object, found 7"),
    ],
)
def test_odd_settings_are_refused_by_file_and_key(sentencepiece_dir, tmp_path, name, content, found):
    (tmp_path / "tokenizer.model").write_bytes((sentencepiece_dir / "tokenizer.model").read_bytes())
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"{name}.*{found}"):
        Tokenizer(tmp_path)


def byte_level_kind(folder, post_processor=None, **settings):
    train_tokenizer(folder)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    if post_processor is not None:
        special = [("<|endoftext|>", 0), ("<|end|>", 3)]
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(post_processor, special_tokens=special)
        tokenizer.save(str(folder / "tokenizer.json"))
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def byte_fallback_kind(folder, **settings):
    byte_fallback_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "bos_token": "<s>", **settings}))


def sentencepiece_kind(folder, added=None, **settings):
    train_sentencepiece(folder)
    (folder / "trained.model").rename(folder / "tokenizer.model")
    if settings:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if added is not None:
        (folder / "added_tokens.json").write_text(json.dumps(added))


WRITTEN = {
    "byte-level": lambda folder: byte_level_kind(folder),
    "byte-level, BOS by the setting alone": lambda folder: byte_level_kind(folder, add_bos_token=True),
    "byte-level, BOS by the template": lambda folder: byte_level_kind(folder, "<|endoftext|> $A"),
    "byte-level, BOS and EOS by the template": lambda folder: byte_level_kind(folder, "<|endoftext|> $A <|end|>"),
    "byte-level, BOS but for the setting": lambda folder: byte_level_kind(
        folder, "<|endoftext|> $A", add_bos_token=False
    ),
    "byte fallback": lambda folder: byte_fallback_kind(folder),
    "byte fallback, Llama 2's class": lambda folder: byte_fallback_kind(
        folder, tokenizer_class="LlamaTokenizer", add_bos_token=True, legacy=False
    ),
    "SentencePiece alone": lambda folder: sentencepiece_kind(folder),
    "SentencePiece with markers": lambda folder: sentencepiece_kind(
        folder, {"<|im_start|>": 400, "<|im_end|>": 390}, bos_token="<s>", eos_token="<|im_end|>", unk_token="<unk>"
    ),
    "SentencePiece without BOS": lambda folder: sentencepiece_kind(folder, add_bos_token=False),
}


@pytest.mark.parametrize("kind", WRITTEN)
def test_transformers_reads_what_is_written_for_it_as_the_same_ids(tmp_path, kind):
    WRITTEN[kind](tmp_path)
    file = tmp_path / "tokenizer_config.json"
    template = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }} {{ eos_token }}\n{% endfor %}"
    settings = json.loads(file.read_text()) if file.is_file() else {}
    (tmp_path / "chat_template.jinja").write_text(template)
    ours = Tokenizer(tmp_path)
    texts = [*AWKWARD, "a </s><s> b", "<unk> and <|end|>x", "<|im_start|>user\nHi<|im_end|>\n"]
    before = [ours.encode(text, bos=ours.adds_bos) for text in texts]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_for_transformers(tmp_path)
    theirs, again = transformers.AutoTokenizer.from_pretrained(tmp_path), Tokenizer(tmp_path)
    assert settings.keys() <= json.loads(file.read_text()).keys()
    for text, ids in zip(texts, before, strict=True):
        assert theirs(text).input_ids == ids
        assert again.encode(text, bos=again.adds_bos) == ids
        assert theirs(text, add_special_tokens=False).input_ids == again.encode(text)
    messages = [{"role": "user", "content": "Hello, you 12"}, {"role": "assistant", "content": " it's  ok"}]
    text = theirs.apply_chat_template(messages, tokenize=False)
    assert theirs.apply_chat_template(messages)["input_ids"] == ours.encode(text)
    assert prompt_style("chat", ours).bos is False


@pytest.mark.skipif(not LLAMA2.is_file(), reason="LLaMA 2's tokenizer is not at hand")
def test_llama2_tokenizer_for_transformers(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(LLAMA2.read_bytes())
    ours = Tokenizer(tmp_path)
    texts = [*AWKWARD, *(ROOT / "README.md").read_text().splitlines(), "<s>[INST] hi [/INST] ok </s>"]
    expected = [ours.encode(text, bos=True) for text in texts]
    write_for_transformers(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert [theirs(text).input_ids for text in texts] == expected


def test_what_transformers_reads_otherwise_is_warned_of(tmp_path):
    """A piece that its user defined is found by SentencePiece without a space before what follows."""
    train_sentencepiece(tmp_path, user_defined_symbols=["<note>"])
    (tmp_path / "trained.model").rename(tmp_path / "tokenizer.model")
    model = (tmp_path / "tokenizer.model").read_bytes()
    with pytest.warns(UserWarning, match="transformers reads 'a<note>"):
        write_for_transformers(tmp_path)
    assert (tmp_path / "tokenizer.model").read_bytes() == model
