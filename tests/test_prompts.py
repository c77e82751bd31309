"""Prompt styles: texts by hand, chat against transformers."""

import datetime

import pytest
import transformers
from conftest import DEMO_BASE, byte_fallback_tokenizer

from lit_llama.chat_template import at, render_chat
from lit_llama.prompts import Message, chosen_style, prompt_style
from lit_llama.tokenizer import Tokenizer


def test_alpaca(base_dir):
    style = prompt_style("alpaca", Tokenizer(base_dir))
    assert style.prompt("Add.", "1 2").endswith("\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:")
    assert style.prompt("Add.").endswith("request.\n\n### Instruction:\nAdd.\n\n### Response:")


def test_metamath(base_dir):
    style = prompt_style("metamath", Tokenizer(base_dir))
    assert style.prompt("1 + 1?").endswith("\n\n### Instruction:\n1 + 1?\n\n### Response: Let's think step by step.")


def test_none(base_dir):
    style = prompt_style("none", Tokenizer(base_dir))
    assert style.prompt("once upon") == "once upon"
    assert style.prompt("once", "upon") == "once\nupon"


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
    assert style.prompt("do", "this") == "<|user|>do\n\nthis<|end|>\n<|assistant|>"
    assert style.end_id == expected.convert_tokens_to_ids("<|end|>")


def test_chat_of_the_demo_base():
    tokenizer = Tokenizer(DEMO_BASE)
    style = prompt_style("chat", tokenizer)
    assert style.prompt("Why?").endswith("<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n")
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
    with pytest.raises(
        ValueError,
        match=r"no prompt style named 'shout'; there are chat, .*, alpaca, metamath, none, hh, beaver",
    ):
        prompt_style("shout", tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        prompt_style("chat", tokenizer)


def test_hint_at_the_chat_template(base_dir, capsys):
    """Where another style is asked for; not where an adapter was trained with it, nor where there is no template."""
    tokenizer = Tokenizer(base_dir)
    for asked, trained, name, hint in (
        ("alpaca", None, "alpaca", True),
        ("metamath", "chat", "metamath", True),
        ("alpaca", "alpaca", "alpaca", False),
        (None, "alpaca", "alpaca", False),
        (None, None, "chat", False),
        ("chat", None, "chat", False),
        ("none", None, "none", False),
    ):
        assert chosen_style(asked, trained, tokenizer).name == name
        out, err = capsys.readouterr()
        assert (out, err.count("\n"), err.startswith("hint: this base model has a chat template")) == ("", hint, hint)
    tokenizer.chat_template = None
    assert chosen_style(None, None, tokenizer, default="alpaca").name == "alpaca"
    assert chosen_style("alpaca", None, tokenizer).name == "alpaca"
    assert capsys.readouterr().err == ""


CONVERSATION = [Message("user", "one "), Message("assistant", " uno"), Message("user", "two")]


def test_dialogues(base_dir):
    tokenizer = Tokenizer(base_dir)
    style = prompt_style("hh", tokenizer)
    assert style.render(CONVERSATION) == "\n\nHuman: one\n\nAssistant: uno<|end|>\n\nHuman: two\n\nAssistant:"
    style = prompt_style("beaver", tokenizer)
    text = "BEGINNING OF CONVERSATION: USER: one ASSISTANT: uno<|end|>USER: two ASSISTANT:"
    assert style.render(CONVERSATION) == text
    pieces = [
        ("BEGINNING OF CONVERSATION: USER: one ASSISTANT:", False),
        (" uno", True),
        ("USER: two ASSISTANT:", False),
    ]
    assert style.segments(CONVERSATION) == pieces


def test_a_tokenizer_that_adds_the_space_itself(tmp_path):
    """SentencePiece begins a text with a space, so that one more between prompt and response would be two."""
    byte_fallback_tokenizer(tmp_path)
    tokenizer = Tokenizer(tmp_path)
    [_, response] = prompt_style("hh", tokenizer).segments([Message("user", "a"), Message("assistant", "ok")])
    assert response == ("ok", True)
    assert list(map(tokenizer.token, tokenizer.encode(response.text))) == ["▁ok"]
    conversation = [Message("user", "a"), Message("assistant", "ok"), Message("user", "b")]
    texts = [segment.text for segment in prompt_style("hh", tokenizer).segments(conversation)]
    assert texts == ["\n\nHuman: a\n\nAssistant:", "ok", "\n\nHuman: b\n\nAssistant:"]


# What chat models write around an answer: Llama 2's spaces, Llama 3's trimming, ChatML, a template without markers.
TEMPLATES = {
    "llama-2": (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'].strip() + ' [/INST]' }}"
        "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
        [("[INST] one [/INST]", False), (" uno ", True), ("[INST] two [/INST]", False)],
    ),
    "llama-3": (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n\n' + m['content'] | trim + '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n\n' }}{% endif %}",
        [
            ("<|user|>\n\none<|end|><|assistant|>\n\n", False),
            ("uno", True),
            ("<|user|>\n\ntwo<|end|><|assistant|>\n\n", False),
        ],
    ),
    "plain": (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
        [("user: one \nassistant: ", False), (" uno", True), ("\nuser: two\nassistant: ", False)],
    ),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_segments_are_the_templates_text(base_dir, name):
    tokenizer = Tokenizer(base_dir)
    tokenizer.chat_template, expected = TEMPLATES[name]
    style = prompt_style("chat", tokenizer)
    segments = style.segments(CONVERSATION)
    assert segments == expected
    assert style.end_id == tokenizer.eos_id
    text = "".join(segment.text + style.end * segment.is_response for segment in segments)
    assert text == render_chat(tokenizer, [{"role": m.role, "content": m.content} for m in CONVERSATION])


def test_template_that_rewrites_earlier_turns(base_dir):
    tokenizer = Tokenizer(base_dir)
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] + '<|end|>' }}{% endfor %}"
    style = prompt_style("chat", tokenizer)
    with pytest.raises(ValueError, match=r"rewrites earlier turns of a conversation.* give --scored_turns last"):
        style.segments(CONVERSATION)
    conversation = [*CONVERSATION, Message("assistant", "dos")]
    assert style.segments(conversation, "last") == [("3one <|end|> uno<|end|>two<|end|>", False), ("dos", True)]


HEAD = "{% for m in messages %}{% set c = m['content'] %}{% if m['role'] == 'assistant' %}{{ '<|assistant|>' }}"
TAIL = "{{ c + '<|end|>' }}{% else %}{{ '<|user|>' + c }}{% endif %}{% endfor %}"
OPEN = "{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}"
SHUT = "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
DROP = "{% set c = c.split('</think>')[-1] %}"
KEEP = (
    "{% set t = c.split('</think>')[0].split('<think>')[-1].strip() if '</think>' in c else '' %}"
    "{% set c = c.split('</think>')[-1].lstrip() %}"
    "{% if loop.last %}{{ '<think>\n' + t + '\n</think>\n\n' }}{% endif %}"
)
# How templates think: what a prompt ends with, and what is trained for an answer with and without a thought.
THINKING = {
    "opens a thought and drops earlier ones, as R1": (HEAD + DROP + TAIL + OPEN, "<think>\n", ""),
    "opens a thought and writes the last one": (HEAD + KEEP + TAIL + OPEN, "<think>\n", ""),
    "writes the last thought, as Qwen 3": (HEAD + KEEP + TAIL + SHUT, "", "<think>\n"),
    "opens a thought without a line break": (
        HEAD + DROP + TAIL + OPEN.replace("\\n", "").replace("\n", ""),
        "<think>",
        "\n",
    ),
    "square brackets": (
        (HEAD + DROP + TAIL + OPEN).replace("<think>", "[THINK]").replace("</think>", "[/THINK]"),
        "[THINK]\n",
        "",
    ),
}


@pytest.mark.parametrize("name", THINKING)
def test_thoughts_are_closed_in_training_data(base_dir, name):
    tokenizer = Tokenizer(base_dir)
    tokenizer.chat_template, opened, opening = THINKING[name]
    style = prompt_style("chat", tokenizer)
    shut = "[/THINK]" if "[" in opened else "</think>"
    question, prompt = Message("user", "one"), "<|user|>one<|assistant|>" + opened
    for content, expected in (
        ("uno", f"{opening}\n{shut}\n\nuno"),
        (f"<think>\nhm\n{shut}\n\nuno".replace("<think>", opened.strip() or "<think>"), f"{opening}hm\n{shut}\n\nuno"),
    ):
        segments = style.segments([question, Message("assistant", content)])
        assert segments == [(prompt, False), (expected, True)]
        earlier = style.render([question, Message("assistant", content), Message("user", "two")])
        with pytest.raises(ValueError, match="give --scored_turns last"):
            style.segments([question, Message("assistant", content), Message("user", "two"), Message("assistant", "b")])
        segments = style.segments(
            [question, Message("assistant", content), Message("user", "two"), Message("assistant", "b")], "last"
        )
        assert segments == [(earlier, False), (f"{opening}\n{shut}\n\nb", True)]


def test_empty_thoughts_are_not_shown(base_dir):
    tokenizer = Tokenizer(base_dir)
    for template, opening in ((HEAD + DROP + TAIL + OPEN, ""), (HEAD + KEEP + TAIL + SHUT, "<think>")):
        tokenizer.chat_template = template
        style = prompt_style("chat", tokenizer)
        for text, answer in (
            (f"{opening}\n</think>\n\nuno\n", "uno\n"),
            ("<think>\n\n</think>\n\n uno", " uno"),
            ("hm\n</think>\n\nuno", "hm\n</think>\n\nuno"),  # a thought is shown as it was generated
            ("\n\nuno", "\n\nuno"),
            ("<b>uno</b>", "<b>uno</b>"),
        ):
            shown = ""
            for end in range(len(text) + 1):
                certain = style.cut(text[:end], more_may_follow=True)
                assert certain.startswith(shown)
                shown = certain
            assert style.cut(text).startswith(shown)
            assert style.cut(text) == (answer.strip() if style.strips else answer)


def test_templates_that_demand(base_dir):
    """Some take no conversation without a system message, no answer at the end, no white space, no odd order."""
    tokenizer = Tokenizer(base_dir)
    chat = "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    chat += "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    demands = {
        "system": "{% if messages[0]['role'] != 'system' %}{{ raise_exception('no system message') }}{% endif %}",
        "question": "{% if messages[-1]['role'] != 'user' %}{{ raise_exception('no question') }}{% endif %}",
        "trimmed": "{% for m in messages if m.content != m.content | trim %}{{ raise_exception('space') }}{% endfor %}",
    }
    conversation = [Message("system", "be"), Message("user", "one"), Message("assistant", "uno")]
    for demand, check in demands.items():
        tokenizer.chat_template = check + chat
        style = prompt_style("chat", tokenizer)
        assert style.fingerprint
        assert (style.lead, style.tail, style.end, style.strips) == ("", "", "<|end|>", demand == "trimmed")
        segments = style.segments(conversation)
        assert segments == [("<|system|>be<|end|><|user|>one<|end|><|assistant|>", False), ("uno", True)]
    tokenizer.chat_template = demands["system"] + chat
    with pytest.raises(ValueError, match="chat template failed: no system message"):
        prompt_style("chat", tokenizer).prompt("one")


def test_a_template_that_fails_is_said_when_the_style_is_made(base_dir):
    tokenizer = Tokenizer(base_dir)
    for template in ("{{ raise_exception('never') }}", "{% shout %}", "{{ 1 + messages[0].content }}", "{{ 1 / 0 }}"):
        tokenizer.chat_template = template
        with pytest.raises(ValueError, match=r"\Athe model's chat template failed: [^\n]*\Z"):
            prompt_style("chat", tokenizer)


KNOWN = {"llama-2": "8eab20d1", "llama-3": "3a20e897", "plain": "b6c84966"}


def test_fingerprints(base_dir):
    """They stay what they were, since data sets record them, and a template that reads the date changes none."""
    tokenizer = Tokenizer(base_dir)
    known = {}
    for name, (template, _) in TEMPLATES.items():
        tokenizer.chat_template = template
        known[name] = prompt_style("chat", tokenizer).fingerprint[:8]
    assert known == KNOWN
    dated = "{% if strftime_now is defined %}{{ strftime_now('%c') }}{% else %}26 Jul 2024{% endif %}"
    for date in (dated, "{{ strftime_now('%c') }}"):
        tokenizer.chat_template = date + TEMPLATES["plain"][0]
        different = set()
        for day in (1, 2):
            with at(datetime.datetime(2025, 1, day)):
                style = prompt_style("chat", tokenizer)
                assert f"Jan  {day}" in style.prompt("one")
                different.add(style.fingerprint)
        assert len(different) == 1
    tokenizer.chat_template = dated + TEMPLATES["plain"][0]
    with_date = prompt_style("chat", tokenizer).fingerprint
    tokenizer.chat_template = "26 Jul 2024" + TEMPLATES["plain"][0]  # what it was before templates were told the date
    assert prompt_style("chat", tokenizer).fingerprint == with_date


def test_templates_that_strip_one_side(base_dir):
    tokenizer = Tokenizer(base_dir)
    conversation = [Message("user", "one"), Message("assistant", " uno \n"), *CONVERSATION]
    for strip in ("lstrip", "rstrip"):
        tokenizer.chat_template = TEMPLATES["plain"][0].replace("m['content']", f"m['content'].{strip}()")
        segments = prompt_style("chat", tokenizer).segments(conversation)
        assert [segment.text for segment in segments if segment.is_response] == ["uno", "uno"]


def test_an_answer_is_cut_out(base_dir):
    tokenizer = Tokenizer(base_dir)
    hh, alpaca = prompt_style("hh", tokenizer), prompt_style("alpaca", tokenizer)
    text = " Fine.\n\nHuman: And you?\n\nAssistant: Fine."
    assert hh.cut(text) == "Fine."
    assert (hh.ended(" Fine.\n\nHuman"), hh.ended(text)) == (False, True)
    assert alpaca.cut("Fine.\n\n### Heading\n\n### Instruction:\nMore") == "Fine.\n\n### Heading"
    assert prompt_style("beaver", tokenizer).cut(" Fine. USER: no") == "Fine."
    assert prompt_style("chat", tokenizer).cut(" as it is\n") == " as it is\n"


@pytest.mark.parametrize("text", [" Fine.\n\nHuman: And you?", " Fine.\n\nHumming", " a\n\nb \n"])
def test_a_stream_shows_nothing_that_is_cut_later(base_dir, text):
    """Shown piece by piece, the answer is the one that is cut out of the whole."""
    style, shown = prompt_style("hh", Tokenizer(base_dir)), ""
    for end in range(len(text) + 1):
        certain = style.cut(text[:end], more_may_follow=True)
        assert certain.startswith(shown)
        shown = certain
    assert style.cut(text).startswith(shown)
