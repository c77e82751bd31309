"""Prompt styles: texts by hand, chat against transformers."""

import pytest
import transformers
from conftest import DEMO_BASE

from lit_llama.prompts import prompt_style, render_chat
from lit_llama.tokenizer import Tokenizer


def test_alpaca(base_dir):
    style = prompt_style("alpaca", Tokenizer(base_dir))
    assert style.render("Add.", "1 2").endswith("\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:")
    assert style.render("Add.", "").endswith("request.\n\n### Instruction:\nAdd.\n\n### Response:")


def test_metamath(base_dir):
    style = prompt_style("metamath", Tokenizer(base_dir))
    assert style.render("1 + 1?", "").endswith(
        "\n\n### Instruction:\n1 + 1?\n\n### Response: Let's think step by step."
    )


def test_none(base_dir):
    style = prompt_style("none", Tokenizer(base_dir))
    assert style.render("once upon", "") == "once upon"
    assert style.render("once", "upon") == "once\nupon"


def test_chat_is_transformers(hf_checkpoint, base_dir):
    expected, tokenizer = transformers.AutoTokenizer.from_pretrained(hf_checkpoint), Tokenizer(base_dir)
    messages = [
        {"role": "user", "content": "hi {{ 7 * 7 }}"},
        {"role": "assistant", "content": "ho"},
        {"role": "user", "content": "x"},
    ]
    text = render_chat(tokenizer, messages)
    assert text == expected.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert "{{ 7 * 7 }}" in text
    style = prompt_style("chat", tokenizer)
    assert style.render("do", "this") == "<|user|>do\n\nthis<|end|>\n<|assistant|>"
    assert style.end_id == expected.convert_tokens_to_ids("<|end|>")


def test_chat_of_the_demo_base():
    tokenizer = Tokenizer(DEMO_BASE)
    style = prompt_style("chat", tokenizer)
    assert style.render("Why?", "").endswith("<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n")
    assert style.end_id == tokenizer.encode("<|im_end|>")[0]


def test_template_runs_in_a_sandbox(base_dir):
    tokenizer = Tokenizer(base_dir)
    tokenizer.chat_template = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(ValueError, match="chat template failed"):
        render_chat(tokenizer, [{"role": "user", "content": "x"}])


def test_template_may_refuse(base_dir):
    tokenizer = Tokenizer(base_dir)
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(ValueError, match="no system role"):
        render_chat(tokenizer, [{"role": "system", "content": "x"}])


def test_unknown_style_and_missing_template(base_dir):
    tokenizer = Tokenizer(base_dir)
    with pytest.raises(ValueError, match="no prompt style named 'shout'; there are chat, alpaca, metamath, none"):
        prompt_style("shout", tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        prompt_style("chat", tokenizer)
