"""The one door to a base model: what belongs together is opened together, and the rest is refused."""

import shutil
from dataclasses import replace

import pytest
import torch
from conftest import load_script, make_hf_checkpoint, random_aligner

from lit_llama.adapters import load_adapter, save_adapter
from lit_llama.base import open_base
from lit_llama.checkpoint import load_base
from lit_llama.combine import WeightedSum
from lit_llama.generation import generate
from lit_llama.lora import LoRA
from lit_llama.prompts import Message, prompt_style
from lit_llama.together import read_adapters

PROMPTS = ["Count to 3.", "Why?", "Name three rivers, please."]


@pytest.fixture
def other_path(base_dir, tmp_path):
    """Another Aligner of the same base, of 3 tokens, trained on another style of prompts."""
    model = load_base(base_dir)
    path = tmp_path / "other" / "aligner.safetensors"
    save_adapter(path, random_aligner(model.config, 3, init_std=1.0), model, prompt_style="metamath")
    return path


@pytest.fixture
def without_template(base_dir, tmp_path):
    folder = shutil.copytree(base_dir, tmp_path / "without-template")
    (folder / "chat_template.jinja").unlink()
    return folder


def by_hand(folder, style, adapter, n=12):
    """Answers to `PROMPTS`, from what lies below the door."""
    base = open_base(folder)
    style = prompt_style(style, base.tokenizer)
    ids = [base.tokenizer.encode(style.prompt(text), bos=style.bos) for text in PROMPTS]
    rows = generate(load_base(folder), ids, n, adapter=adapter, stop_ids=style.stop_ids)
    return [style.cut(base.tokenizer.decode(row)) for row in rows]


@pytest.mark.parametrize("for_generation", [False, True])
def test_text_list_and_stream_say_the_same(base_dir, other_path, for_generation):
    expected = by_hand(base_dir, "metamath", load_adapter(other_path))
    base = open_base(base_dir, other_path, for_generation=for_generation)
    assert base.generate(PROMPTS, max_new_tokens=12) == expected
    assert base.generate(PROMPTS, max_new_tokens=12, batch_size=2) == expected
    assert [base.generate(text, max_new_tokens=12) for text in PROMPTS] == expected
    pieces = list(base.generate(PROMPTS[0], stream=True, max_new_tokens=12))
    assert "".join(pieces) == expected[0]
    assert len(pieces) > 2
    assert "".join(base.reply([Message("user", PROMPTS[0])], max_new_tokens=12)) == expected[0]
    assert base.with_adapter(None).generate(PROMPTS, max_new_tokens=12) == by_hand(base_dir, "chat", None)


def test_a_conversation_goes_on(base_dir):
    base = open_base(base_dir)
    messages = [Message("system", "Be brief."), Message("user", "One?"), Message("assistant", "1"), Message("user", "")]
    ids = base.tokenizer.encode(base.style.render(messages), bos=base.style.bos)
    [row] = generate(base.model, [ids], 8, stop_ids=base.style.stop_ids)
    assert "".join(base.reply(messages, max_new_tokens=8)) == base.style.cut(base.tokenizer.decode(row))


def test_sampling_is_by_seed(base_dir):
    base = open_base(base_dir)
    options = {"max_new_tokens": 12, "temperature": 1.5, "top_k": 50, "top_p": 0.95}
    first, second = base.generate(PROMPTS[:1] * 2, seed=5, **options)
    assert (base.generate(PROMPTS[0], seed=5, **options), base.generate(PROMPTS[0], seed=6, **options)) == (
        first,
        second,
    )
    assert first != second


def test_adapters_share_the_model(base_dir, aligner_path, other_path):
    base = open_base(base_dir)
    one, two, none = base.with_adapter(aligner_path), base.with_adapter(str(other_path.parent)), base.with_adapter(None)
    assert all(each.model is base.model and each.tokenizer is base.tokenizer for each in (one, two, none))
    assert (base.adapter, none.adapter, base.name) == (None, None, "tiny")
    assert [each.infos[0].config["length"] for each in (one, two)] == [2, 3]
    answers = [each.generate(PROMPTS, max_new_tokens=12) for each in (base, one, two)]
    assert answers[0] == none.generate(PROMPTS, max_new_tokens=12) != answers[2]
    module = load_adapter(aligner_path)
    assert base.with_adapter(module).adapter is module
    assert base.with_adapter(module).generate(PROMPTS, max_new_tokens=12) == answers[1]


def test_scales_and_sums(base_dir, aligner_path, other_path):
    paths = [aligner_path, other_path]
    base = open_base(base_dir, paths, [-2, 4.0], prompt_style="chat")
    assert isinstance(base.adapter, WeightedSum)
    terms = (load_adapter(aligner_path), -2.0), (load_adapter(other_path), 4.0)
    expected = by_hand(base_dir, "chat", WeightedSum(*terms))
    assert base.generate(PROMPTS, max_new_tokens=12) == expected != by_hand(base_dir, "chat", None)
    assert base.with_adapter(paths, 0).generate(PROMPTS, max_new_tokens=12) == by_hand(base_dir, "chat", None)
    assert base.with_adapter(other_path, 1).adapter.method == "aligner"
    for some, scales in ((paths, [1, 2, 3]), (aligner_path, [1, 2]), (paths, [])):
        with pytest.raises(ValueError, match=f"{len(scales)} scales for . adapters"):
            base.with_adapter(some, scales)
    with pytest.raises(ValueError, match="there is a scale but no adapter"):
        open_base(base_dir, adapter_scale=0.5)


def test_style_is_asked_for_or_the_adapters_or_the_bases(base_dir, without_template, other_path, capsys):
    """The authors' files say nothing of prompts, which were Alpaca's."""
    base = open_base(base_dir)
    assert [base.style.name, base.with_adapter(other_path).style.name] == ["chat", "metamath"]
    silent = other_path.with_name("silent.safetensors")
    save_adapter(silent, load_adapter(other_path), base.model)
    assert base.with_adapter(silent).style.name == "alpaca"
    assert base.with_adapter([silent, other_path]).style.name == "alpaca"
    assert base.with_adapter(other_path).with_adapter(None).style.name == "chat"
    assert base.with_adapter(other_path).with_adapter(load_adapter(silent)).style.name == "metamath"
    assert capsys.readouterr().err == ""
    asked = open_base(base_dir, other_path, prompt_style="hh")
    assert [asked.style.name, asked.with_adapter(silent).style.name, asked.with_adapter(None).style.name] == ["hh"] * 3
    assert capsys.readouterr().err.count("hint:") == 1
    bare = open_base(without_template)
    assert [bare.style.name, bare.with_adapter(other_path).style.name] == ["none", "metamath"]
    assert bare.with_adapter(other_path).with_adapter(None).style.name == "metamath"  # asked as its adapter is


def test_names_tell_files_and_identities_tell_what_they_hold(base_dir, aligner_path, other_path, tmp_path):
    base = open_base(base_dir, [aligner_path, other_path], [0.5, 1])
    assert base.name.startswith(f"tiny + {aligner_path} (")
    assert f") x 0.5 + {other_path} (" in base.name
    copy = shutil.copy(other_path, tmp_path / "copy.safetensors")
    one, same = base.with_adapter(other_path), base.with_adapter(copy)
    assert one.name != same.name
    assert one.identity == same.identity == one.with_adapter(load_adapter(copy)).identity
    different = [
        base,
        one,
        base.with_adapter(other_path, 0.5),
        base.with_adapter(aligner_path),
        base.with_adapter(None),
    ]
    different += [open_base(base_dir, other_path, **o) for o in ({"prompt_style": "hh"}, {"precision": "bf16-true"})]
    assert len({each.identity for each in different}) == 7


def test_what_does_not_belong_is_refused(base_dir, other_path, tmp_path):
    base = open_base(base_dir)
    model = load_base(base_dir)
    model.fingerprint = "0" * 64
    stranger = tmp_path / "stranger.safetensors"
    save_adapter(stranger, random_aligner(model.config, 1), model)
    with pytest.raises(ValueError, match=rf"{stranger} was trained on tiny, whose weights are not those of tiny"):
        base.with_adapter(stranger)
    with pytest.warns(UserWarning, match="whose weights are not those"):
        open_base(base_dir, stranger, allow_other_base=True)
    wide = random_aligner(replace(model.config, n_embd=64), 1)
    with pytest.raises(ValueError, match="its n_embd is 64, tiny has 32"):
        base.with_adapter(wide)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.safetensors"):
        base.with_adapter("nowhere.safetensors")
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    with pytest.raises(ValueError, match="is not a complete safetensors file"):
        open_base(base_dir, tmp_path / "junk.safetensors")
    with pytest.raises(ValueError, match="stream=True is for one prompt"):
        base.generate(PROMPTS, stream=True)
    with pytest.raises(ValueError, match="batch_size is 0, it must be at least 1"):
        base.generate(PROMPTS, batch_size=0)
    assert base.generate([]) == []


def test_bits_are_those_of_training(tmp_path):
    make_hf_checkpoint(tmp_path / "hf", hidden_size=64, intermediate_size=128)
    wide_dir = tmp_path / "wide"
    load_script("scripts/convert_hf_checkpoint.py").main(tmp_path / "hf", wide_dir)
    model = load_base(wide_dir)
    paths = {bits: tmp_path / f"{bits}.safetensors" for bits in ("none", "nf4")}
    for bits, path in paths.items():
        hyperparameters = {} if bits == "none" else {"quantize": bits}
        save_adapter(path, random_aligner(model.config, 1), model, hyperparameters=hyperparameters)
    base = open_base(wide_dir, paths["nf4"])
    assert (base.quantize, "nf4" in base.weights) == ("nf4", True)
    assert base.with_adapter(None).with_adapter(paths["nf4"]).quantize == "nf4"
    with pytest.raises(ValueError, match=r"none\.safetensors was trained .* --quantize none, and this base has nf4"):
        base.with_adapter(paths["none"])
    with pytest.raises(ValueError, match=r"nf4\.safetensors was trained .* --quantize nf4, and this base has none"):
        open_base(wide_dir).with_adapter(paths["nf4"])
    with pytest.raises(ValueError, match="different --quantize"):
        open_base(wide_dir, list(paths.values()))
    whole = open_base(wide_dir, paths["nf4"], quantize="none")
    assert (whole.quantize, whole.weights) == ("none", f"{model.fingerprint[:16]} in float32")
    assert len(whole.with_adapter(list(paths.values())).infos) == 2


def test_modules_are_used_without_dropout(base_dir):
    base = open_base(base_dir)
    lora = LoRA(base.model.config, 2, dropout=0.5)
    for update in lora.layers:
        for factors in update.values():
            torch.nn.init.normal_(factors.b, std=0.5)
    with_lora = base.with_adapter(lora.train())
    assert with_lora.generate(PROMPTS, max_new_tokens=12) == with_lora.generate(PROMPTS, max_new_tokens=12)


def test_what_was_read_is_not_read_again(base_dir, other_path):
    [read] = read_adapters(other_path)
    expected = open_base(base_dir, other_path).generate(PROMPTS, max_new_tokens=12)
    other_path.unlink()
    base = open_base(base_dir, read)
    again = base.with_adapter(None).with_adapter(read)
    assert base.generate(PROMPTS, max_new_tokens=12) == again.generate(PROMPTS, max_new_tokens=12) == expected
    assert again.identity == base.identity
