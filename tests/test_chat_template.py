"""Chat templates: every feature and every family as transformers renders them, and limits for hostile ones."""

import datetime
import json
import threading

import pytest
import transformers
from conftest import byte_fallback_tokenizer, load_script

from lit_llama.chat_template import at, one_moment, render_chat
from lit_llama.prompts import Message, prompt_style
from lit_llama.tokenizer import Tokenizer

USER = {"role": "user", "content": "What's <b>2 & 3</b>? 🦙 'x' {{ 7 * 7 }}"}
ANSWER = {"role": "assistant", "content": " Five.\n"}
AGAIN = {"role": "user", "content": "And\n\n  é?  "}
SYSTEM = {"role": "system", "content": "Be kind.\n"}
THOUGHT = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nSix."}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"b": [2, 3.5], "a": None, "é": True}}}
CONVERSATIONS = {
    "question": [USER],
    "answered": [USER, ANSWER],
    "two turns": [USER, ANSWER, AGAIN],
    "system": [SYSTEM, USER],
    "system, two turns": [SYSTEM, USER, ANSWER, AGAIN],
    "three turns": [USER, ANSWER, AGAIN, THOUGHT, USER],
    "two questions": [USER, AGAIN],
    "answer first": [ANSWER],
    "empty": [{"role": "user", "content": ""}],
    "tools": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": "5"}],
    "reasoning": [USER, {"role": "assistant", "content": "Six.", "reasoning": "hm"}, AGAIN],
    "thinking": [USER, {"role": "assistant", "content": "Six.", "thinking": "hm", "name": None}],
}
PLAIN = "{% for m in messages %}{{ m['role'] ~ ': ' ~ m['content'] ~ '\n' }}{% endfor %}"

FEATURES = {
    "block trimming": """
    {% for m in messages %}
        {% if loop.first %}
    first
        {% endif %}
        {{- m.role }}
    {% endfor %}
    end
""",
    "white space control": "a  {%- for m in messages -%}  {{- m.role -}}  {%- endfor %}  b\n\n",
    "comments and raw": "{# no #}x{% raw %}{{ y }}{% endraw %}{#- none -#}  z",
    "tojson": "{{ messages | tojson }}{{ {'a': '<é&\\'>', 'b': none} | tojson }}",
    "tojson with options": "{{ messages | tojson(indent=2) }}{{ {'b': 1, 'a': [1, 2]} | tojson(sort_keys=true) }}"
    "{{ [1, 'é'] | tojson(ensure_ascii=true, separators=(',', ':')) }}{{ [1] | tojson(indent=4) }}",
    "raise_exception": "{{ raise_exception('never') }}",
    "raise_exception sometimes": "{% if messages | length > 1 %}{{ raise_exception('one turn') }}{% endif %}ok",
    "strftime_now": "{{ strftime_now('a day') }}{{ strftime_now is defined }}",
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}\n{{ m.content }}\n"
    "{% endgeneration %}\n{% else %}{{ m.content }}{% endif %}{% endfor %}",
    "generation and names": "{% set x = 1 %}{%- generation -%} {% set x = 2 %}{{ x }} {%- endgeneration -%}{{ x }}",
    "loop controls": "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.content }}"
    "{% if loop.index > 2 %}{% break %}{% endif %}{% else %}none{% endfor %}",
    "loop variables": "{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ loop.revindex0 }}{{ loop.last }}"
    "{{ loop.previtem.role if not loop.first }}{{ loop.nextitem.role if loop.nextitem is defined }}"
    "{{ loop.cycle('a', 'b') }}{{ loop.changed(m.role) }}{% endfor %}",
    "loop over a filter": "{% for m in messages | rejectattr('role', 'equalto', 'system') %}"
    "{{ loop.length }}{{ loop.last }}{{ m.content }}{% endfor %}",
    "loop with a condition": "{% for m in messages if m.role != 'user' %}{{ loop.index }}{{ m.content }}"
    "{% else %}only the user{% endfor %}",
    "loop over a dictionary": "{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}"
    "{% for k in messages[0] %}{{ k }}{% endfor %}{% for x in nothing %}{{ x }}{% endfor %}",
    "recursive loop": "{% for x in [1, [2, [3, 4]], 5] recursive %}"
    "{% if x is iterable %}<{{ loop(x) }}>{% else %}{{ loop.depth }}:{{ x }}{% endif %}{% endfor %}",
    "tools and documents": "{{ tools is none }}{{ documents is none }}{{ tools is defined }}{{ tools }}"
    "{% if tools %}no{% endif %}{{ custom_tools is defined }}{{ builtin_tools is defined }}",
    "special tokens": "{{ bos_token }}|{{ eos_token }}|{{ unk_token is defined }}|{{ pad_token is defined }}",
    "generation prompt": "{{ add_generation_prompt }}{% if not add_generation_prompt %}done{% endif %}",
    "namespace": "{% set ns = namespace(found=false, n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{% if m.role == 'system' %}{% set ns.found = true %}{% endif %}{% endfor %}{{ ns.found }}{{ ns.n }}",
    "namespace with a private name": "{% set ns = namespace(_x=1) %}{{ ns._x }}",
    "namespace that gets a private name": "{% set ns = namespace() %}{% set ns._x = 1 %}{{ ns._x }}",
    "namespace of pairs": "{% set ns = namespace([('a', 1)], self=2) %}{{ ns.a }}{{ ns.self }}",
    "dict": "{{ dict(a=1, **messages[0]) }}{{ dict([('k', 'v')]).k }}{{ dict.fromkeys(['a', 'b'], 0) }}",
    "macros": "{% macro turn(m, open='<', shut='>') -%}{{ open ~ m.role ~ shut }}{{ caller() if caller }}"
    "{%- endmacro %}{% for m in messages %}{{ turn(m, shut=']') }}{% call turn(m) %}{{ m.content }}{% endcall %}"
    "{% endfor %}",
    "a macro that calls itself": "{% macro f(n) %}{{ n }}{% if n %}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(20) }}",
    "blocks": "{% set x %}a{{ messages[0].role }}{% endset %}{{ x | upper }}{% set y | trim %}  b  {% endset %}["
    "{{ y }}]"
    "{% filter replace('a', 'b') %}banana{{ x }}{% endfilter %}{% with z = 1 %}{{ z }}{% endwith %}",
    "slices": "{{ messages[1:] | length }}{{ messages[-1].content[:4] }}{{ messages[0].content[::-1] }}"
    "{% set rest = messages[1:] if messages[0].role == 'system' else messages %}{{ rest | length }}"
    "{{ rest[5] is defined }}",
    "methods of texts": "{% for m in messages if m.content %}{% set c = m.content %}{{ c.strip().split('?')[-1] }}"
    "{{ c.upper() }}{{ c.replace('\\n', '/') }}{{ c.startswith('W') }}{{ c.lstrip('\\n') }}{{ c.center(50, '*') }}"
    "{{ c.splitlines() | length }}{{ ', '.join(['a', 'b']) }}{{ c.find('x') }}{{ '{}-{:>5}'.format(m.role, 1) }}"
    "{% endfor %}",
    "operators": "{{ 7 // 2 }}{{ 7 % 4 }}{{ 2 ** 10 }}{{ -3 + 1.5 }}{{ 'ab' * 3 }}{{ [1] * 2 + [3] }}"
    "{{ '%s %03d' % ('x', 5) }}"
    "{{ 'a' ~ 1 ~ none }}{{ 1 < 2 <= 2 }}{{ 'a' in 'abc' and 3 not in [1] }}{{ {'a': 1}['a'] }}{{ (1, 2)[1] }}",
    "filters": "{{ messages | map(attribute='role') | list | join(', ') }}"
    "{{ messages | selectattr('role', 'eq', 'user')"
    " | list | length }}{{ messages | first | length }}{{ 'a b' | title }}{{ [3, 1, 2] | sort }}"
    "{{ 'x' | default('y') }}"
    "{{ z | default('y') }}{{ '<a>' | e }}{{ '<a>' | safe }}{{ [1, 2, 3] | batch(2) | list }}{{ 5 | string }}"
    "{{ 'a\nb' | indent(2, true) }}{{ '3' | int + 1 }}{{ messages[0] | dictsort }}{{ [1, 1] | unique | list }}"
    "{{ messages | groupby('role') | map('first') | list }}{{ {'a': 1} | items | list }}{{ [1, 2] | sum }}"
    "{{ 'é' | urlencode }}"
    "{{ '%s!' | format('x') }}{{ 'abcdef' | truncate(4, true) }}{{ 'aXb' | replace('X', '-') }}"
    "{{ ['a'] | map('upper') | list }}"
    "{{ [1, 2, 3] | slice(2) | list }}{{ [0, 1] | select | list }}{{ 'a b c' | wordwrap(2) }}{{ [[1]] | pprint }}",
    "tests": "{{ messages is sequence }}{{ messages[0] is mapping }}{{ messages[0].content is string }}"
    "{{ x is undefined }}"
    "{{ none is none }}{{ 3 is odd }}{{ 'a' is in ['a'] }}{{ 1 is number }}{{ true is true }}"
    "{{ messages is iterable }}",
    "values as text": "{{ none }}{{ true }}{{ [1, 'a', none] }}{{ {'a': (1, 2)} }}{{ x }}{{ 1.0 }}{{ messages }}"
    "{{ 1e30 }}",
    "helpers": "{% set j = joiner(', ') %}{% for m in messages %}{{ j() }}{{ m.role }}{% endfor %}"
    "{% set c = cycler('a', 'b') %}{{ c.next() }}{{ c.next() }}{{ range(3) | list }}",
    "reasoning under its names": "{% for m in messages %}{{ m.reasoning_content }}|{{ m.thinking }}|"
    "{{ m.reasoning }};{% endfor %}",
    "what is null": "{% for m in messages %}{{ 'content' in m }}{{ m.name is defined }}{% endfor %}",
    "changes what it must not": "{{ messages.append(1) }}",
    "breaks out": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "adds a number to a text": "{{ 1 + messages[0].content }}",
    "divides by zero": "{{ 1 / 0 }}",
    "unknown tag": "{% shout %}",
    "unknown filter": "{{ messages | shout }}",
    "undefined member": "{{ messages[0].foo.bar }}",
    "includes a file": "{% include 'x' %}",
}

FAMILIES = {
    "Llama 2": "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}"
    "{% set sys = messages[0]['content'] %}"
    "{% else %}{% set rest = messages %}{% set sys = false %}{% endif %}{% for m in rest %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}"
    "{% if loop.index0 == 0 and sys != false %}{% set text = '<<SYS>>\\n' + sys + '\\n<</SYS>>\\n\\n' + m['content'] %}"
    "{% else %}{% set text = m['content'] %}{% endif %}{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + text.strip() + ' [/INST]' }}{% elif m['role'] == 'assistant' %}"
    "{{ ' ' + text.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
    "Llama 3": "{% for m in messages %}"
    "{% set text = '<|header|>' + m['role'] + '<|/header|>\n\n' + m['content'] | trim + "
    "'<|eot|>' %}{% if loop.index0 == 0 %}{% set text = bos_token + text %}{% endif %}{{ text }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|header|>assistant<|/header|>\n\n' }}{% endif %}",
    "Llama 3.1, tools and dates": """{{- bos_token }}
{%- if not date is defined %}
    {%- if strftime_now is defined %}
        {%- set date = strftime_now("today") %}
    {%- else %}
        {%- set date = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = "" %}
{%- endif %}
{{- "<|header|>system<|/header|>\\n\\nDate: " + date + "\\n\\n" }}
{%- if tools is not none %}
    {%- for t in tools %}{{- t | tojson(indent=4) }}{{- "\\n\\n" }}{%- endfor %}
{%- endif %}
{{- system }}{{- "<|eot|>" }}
{%- for m in messages %}
    {%- if not (m.role == 'tool' or 'tool_calls' in m) %}
        {{- '<|header|>' + m['role'] + '<|/header|>\\n\\n' + m['content'] | trim + '<|eot|>' }}
    {%- elif 'tool_calls' in m %}
        {%- if not m.tool_calls | length == 1 %}{{- raise_exception("one call at a time") }}{%- endif %}
        {%- set call = m.tool_calls[0].function %}
        {{- '{"name": "' + call.name + '", "parameters": ' }}{{- call.arguments | tojson }}{{- "}<|eot|>" }}
    {%- else %}
        {{- "<|header|>ipython<|/header|>\\n\\n" }}
        {%- if m.content is mapping or m.content is iterable and m.content is not string %}
            {{- m.content | tojson }}
        {%- else %}{{- m.content }}{%- endif %}
        {{- "<|eot|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|header|>assistant<|/header|>\\n\\n' }}{%- endif %}
""",
    "Mistral": "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% elif m['role'] == 'assistant' %}{{ m['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}",
    "Mistral with a dated system prompt": "{%- set default = 'It is ' + strftime_now('some day') + '.' -%}"
    "{{ bos_token }}"
    "{%- if messages[0]['role'] == 'system' -%}{%- set system = messages[0]['content'] -%}"
    "{%- set rest = messages[1:] -%}"
    "{%- else -%}{%- set system = default -%}{%- set rest = messages -%}{%- endif -%}"
    "{{ '[SYSTEM]' + system + '[/SYSTEM]' }}{%- for m in rest -%}{%- if m['role'] == 'user' -%}"
    "{{ '[INST]' + m['content'] + '[/INST]' }}{%- else -%}{{ m['content'] + eos_token }}{%- endif -%}{%- endfor -%}",
    "Zephyr, TinyLlama": "{% for message in messages %}\n{% if message['role'] == 'user' %}\n"
    "{{ '<|user|>\n' + message['content'] + "
    "eos_token }}\n{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n"
    "{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}",
    "ChatML": "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "SmolLM2, Qwen 2": "{% for m in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content']"
    " + '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "Qwen 3": """{%- set ns = namespace(last=messages | length - 1, looking=true) %}
{%- for m in messages[::-1] %}
    {%- set i = (messages | length - 1) - loop.index0 %}
    {%- if ns.looking and m.role == 'user' and m.content is string %}
        {%- set ns.looking = false %}{%- set ns.last = i %}
    {%- endif %}
{%- endfor %}
{%- for m in messages %}
    {%- set content = m.content if m.content is string else '' %}
    {%- if m.role == 'assistant' %}
        {%- set thought = '' %}
        {%- if m.reasoning_content is string %}
            {%- set thought = m.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last and (loop.last or thought) %}
            {{- '<|im_start|>assistant\\n<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}
            {{- content.lstrip('\\n') }}
        {%- else %}{{- '<|im_start|>assistant\\n' + content }}{%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- else %}{{- '<|im_start|>' + m.role + '\\n' + content + '<|im_end|>\\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}""",
    "R1": "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}"
    "{{ bos_token }}"
    "{%- for m in messages %}{%- if m['role'] == 'system' %}{{ m['content'] }}{%- elif m['role'] == 'user' %}"
    "{{ '<|User|>' + m['content'] }}{%- elif m['content'] is not none %}{% set text = m['content'] %}"
    "{% if '</think>' in text %}{% set text = text.split('</think>')[-1] %}{% endif %}"
    "{{ '<|Assistant|>' + text + eos_token }}{%- endif %}{%- endfor -%}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\\n' }}{% endif %}",
    "Phi": "{% for m in messages %}{% if m['role'] == 'system' %}{{ '<|system|>\n' + m['content'] + '<|end|>\n' }}"
    "{% elif m['role'] == 'user' %}{{ '<|user|>\n' + m['content'] + '<|end|>\n' }}{% elif m['role'] == 'assistant' %}"
    "{{ '<|assistant|>\n' + m['content'] + '<|end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
    "Gemma": "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Alternate!') }}{% endif %}"
    "{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<turn>' + role + '\n' + m['content'] | trim + "
    "'</turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<turn>model\n' }}{% endif %}",
    "Vicuna": "{% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content }} {% elif m.role == 'assistant' %}"
    "ASSISTANT: {{ m.content }}</s>{% else %}{{ m.content }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}",
    "Hermes, tools": "{%- macro typed(p) %}{% if p is mapping %}{{ p | tojson }}{% else %}{{ p }}{% endif %}"
    "{%- endmacro %}"
    "{%- for m in messages %}{%- if m.role == 'assistant' and m.tool_calls %}{{ '<|im_start|>assistant' }}"
    "{%- for call in m.tool_calls %}{{ '\\n<tool_call>\\n' }}"
    "{%- set call = call.function if call.function is defined else call %}"
    "{{ '{\\\"name\\\": \\\"' ~ call.name ~ '\\\", \\\"arguments\\\": ' ~ typed(call.arguments) ~ '}\\n</tool_call>' }}"
    "{%- endfor %}{{ '<|im_end|>\\n' }}{%- elif m.role == 'tool' %}"
    "{%- if loop.previtem and loop.previtem.role != 'tool' %}"
    "{{ '<|im_start|>tool\\n' }}{%- endif %}{{ '<tool_response>\\n' ~ m.content ~ '\\n</tool_response>' }}"
    "{%- if not loop.last and loop.nextitem.role != 'tool' or loop.last %}{{ '<|im_end|>' }}{%- endif %}"
    "{%- else %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}",
}


@pytest.fixture
def tokenizer(base_dir):
    return Tokenizer(base_dir)


@pytest.fixture(scope="module")
def expected(hf_checkpoint):
    return transformers.AutoTokenizer.from_pretrained(hf_checkpoint)


@pytest.mark.parametrize("name", [*FEATURES, *FAMILIES])
def test_templates_render_as_in_transformers(tokenizer, expected, name):
    source = tokenizer.chat_template = {**FEATURES, **FAMILIES}[name]
    rendered = 0
    for conversation, messages in CONVERSATIONS.items():
        for prompt in (True, False):
            try:
                text = expected.apply_chat_template(
                    messages, chat_template=source, add_generation_prompt=prompt, tokenize=False
                )
            except Exception:  # of any kind
                with pytest.raises(ValueError, match=r"\Athe model's chat template failed: [^\n]+\Z"):
                    render_chat(tokenizer, messages, prompt)
            else:
                assert render_chat(tokenizer, messages, prompt) == text, conversation
                rendered += 1
    fails = (
        "raise_exception",
        "namespace with",
        "namespace that",
        "changes",
        "breaks",
        "adds",
        "divides",
        "un",
        "includes",
    )
    assert rendered or name.startswith(fails)


SWITCHED = {  # by the switch's name, a template that has it
    "enable_thinking": FAMILIES["Qwen 3"],
    "enable_thinking, set where it is not": "{% if enable_thinking is not defined %}{% set enable_thinking = true %}"
    "{% endif %}{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{{ '' if enable_thinking else '<think>\n\n</think>\n' }}{% endif %}",
    "thinking": "{% if thinking %}Think. {% endif %}{% for m in messages %}"
    "{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}",
}


@pytest.mark.parametrize("name", SWITCHED)
def test_thinking_is_switched_as_in_transformers(tokenizer, expected, name):
    tokenizer.chat_template, switch = SWITCHED[name], name.partition(",")[0]
    prompts = set()
    for thinking in (True, False):
        style = prompt_style(f"chat-thinking-{'on' if thinking else 'off'}", tokenizer)
        prompts.add(style.prompt("one"))
        text = expected.apply_chat_template(
            [{"role": "user", "content": "one"}],
            chat_template=SWITCHED[name],
            add_generation_prompt=True,
            tokenize=False,
            **{switch: thinking},
        )
        assert style.prompt("one") == text
        assert style.fingerprint != prompt_style("chat", tokenizer).fingerprint or thinking == (switch != "thinking")
    assert len(prompts) == 2
    # Where it does not think, the empty thought is a part of the prompt and not of what is learned.
    segments = style.segments([Message("user", "one"), Message("assistant", "uno")])
    assert [segment.text for segment in segments] == [text, "uno"]


def test_templates_without_a_switch_refuse_it(tokenizer):
    tokenizer.chat_template = FAMILIES["R1"]
    with pytest.raises(ValueError, match="no switch for thinking, which would be called enable_thinking or thinking"):
        prompt_style("chat-thinking-off", tokenizer)


def test_the_date(tokenizer):
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y, %H:%M:%S.%f') }}"
    with at(datetime.datetime(2025, 1, 31, 12, 30)):
        assert render_chat(tokenizer, [USER]) == "31 Jan 2025, 12:30:00.000000"
    with one_moment():
        assert len({render_chat(tokenizer, [USER]) for _ in range(100)}) == 1
    assert render_chat(tokenizer, [USER]) != render_chat(tokenizer, [USER])


def test_one_line_says_what_a_template_raised(tokenizer):
    for source, reason in (
        ("{{ raise_exception('two\nlines') }}", "two lines"),
        ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
        ("{{ 1 + messages[0].content }}", "TypeError: unsupported operand"),
        ("a\nb {% if %}", r"Expected an expression.* \(line 2\)"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{" + "(" * 3000 + ")" * 3000 + "}}", "RecursionError"),
        ("{% for i in x %}" * 30 + "{% endfor %}" * 30, "SyntaxError"),
        ("{{ raise_exception('x' * 10000) }}", r"x{300}\.\.\."),
    ):
        tokenizer.chat_template = source
        with pytest.raises(ValueError, match=rf"\Athe model's chat template failed: {reason}[^\n]*\Z"):
            render_chat(tokenizer, [USER])
    tokenizer.chat_template = "x" * 300_000
    with pytest.raises(ValueError, match="has 300000 characters, expected at most 200000"):
        render_chat(tokenizer, [USER])


GROWS = "{% set n = namespace(s='a', l=[1]) %}{% for i in range(99) %}{% set X %}{% endfor %}"
HOSTILE = [
    "{{ 'a' * 10**10 }}",
    "{{ [1] * 10**10 }}",
    "{{ 10 ** (10 ** 10) }}",
    "{{ '%10000000000d' % 1 }}",
    "{{ '%*d' % (10**10, 1) }}",
    "{{ '%10000000000d' | format(1) }}",
    "{{ '{:10000000000}'.format(1) }}",
    "{{ '{:{}}'.format(1, 10**10) }}",
    "{{ 'a' | center(10**10) }}",
    "{{ 'a'.center(10**10) }}",
    "{{ 'a'.zfill(10**10) }}",
    "{{ ('\t' * 10000).expandtabs(10**6) }}",
    "{{ ('a' * 10**5).replace('', 'b' * 10**6) }}",
    "{{ ('a' * 10**5) | replace('a', 'b' * 10**6) }}",
    "{{ ('a' * 10**5) | join('b' * 10**6) }}",
    "{{ ('b' * 10**6).join('a' * 10**5) }}",
    "{{ ('\n' * 10**5) | indent(10**6) }}",
    "{{ (1).to_bytes(10**10, 'big') }}",
    "{{ lipsum(10**9) }}",
    "{{ [[1]] | tojson(indent=10**10) }}",
    "{{ [1] | batch(10**10, 0) | list }}",
    "{{ [1] | slice(10**10) | list }}",
    "{% for i in range(10**9) %}{% endfor %}",
    "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "{% for i in range(100000) recursive %}{{ loop(range(100000)) if loop.depth < 3 }}{% endfor %}",
    "{% set x %}{% for i in range(100000) %}" + "z" * 10000 + "{% endfor %}{% endset %}",
    "{{ range(100000) | map('center', 100000) | list }}",
    "{% for i in range(100000) %}{{ range(100000) | sort }}{% endfor %}",
    "{% for i in range(100000) %}{% set y = 1 in range(100000) | select('even') %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(99) }}",
    GROWS.replace("X", "n.s = n.s + n.s"),
    GROWS.replace("X", "n.s = n.s ~ n.s"),
    GROWS.replace("{% set X %}", "{% set n.s %}{{ n.s }}{{ n.s }}{% endset %}"),
    GROWS.replace("X", "n.l = n.l + n.l"),
    GROWS.replace("X", "n.l = [n.l, n.l]"),
    GROWS.replace("X", "n.l = {1: n.l, 2: n.l}"),
    GROWS.replace("X", "n.l = namespace(a=n.l, b=n.l)") + "{{ n.l }}",
    "{% set x = 'a' * 10**6 %}{% for i in range(100000) %}{% set y = x[1:] %}{% endfor %}",
    "{% set x = 'a' * 10**6 %}{% for i in range(100000) %}{% set y = 'b' in x %}{% endfor %}",
    "{% set x = 'a' * 10**6 %}{% for i in range(100000) %}{% set y = x.count('b') %}{% endfor %}",
]


@pytest.mark.parametrize("source", HOSTILE)
def test_work_is_bounded(tokenizer, source):
    tokenizer.chat_template = source
    with pytest.raises(ValueError, match=r"more work than any conversation needs|OverflowError: Range too big"):
        render_chat(tokenizer, [USER])


def test_limits_leave_room_for_long_conversations(tokenizer):
    messages = [SYSTEM, *[USER, {"role": "assistant", "content": "word " * 2000}] * 500]
    for name in ("Llama 2", "Qwen 3", "Hermes, tools"):
        tokenizer.chat_template = FAMILIES[name]
        assert len(render_chat(tokenizer, messages)) > 5_000_000
    tokenizer.chat_template = (
        "{% set n = namespace(kept=[], text='') %}{% for m in messages %}{% set n.kept = n.kept + [m] %}{% endfor %}"
        "{% for m in n.kept %}{{ m.content }}{% endfor %}"
    )
    short = [{"role": "user", "content": "Yes, please."}] * 1000
    assert render_chat(tokenizer, short) == "Yes, please." * 1000


def test_threads_do_not_share_limits_or_dates(base_dir):
    """Renderings side by side, one of which is stopped by its limit."""
    results = {}

    def work(number):
        tokenizer = Tokenizer(base_dir)
        tokenizer.chat_template = PLAIN + "{{ strftime_now('%Y') }}" + ("{{ 'a' * 10**10 }}" if number == 2000 else "")
        with at(datetime.datetime(number, 1, 1)):
            try:
                results[number] = {render_chat(tokenizer, [USER])[-4:] for _ in range(50)}
            except ValueError as error:
                results[number] = str(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(1998, 2003)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert "more work" in results.pop(2000)
    assert results == {number: {str(number)} for number in (1998, 1999, 2001, 2002)}


def write_files(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))


NAMED = [{"name": "default", "template": "of the list"}, {"name": "tool_use", "template": "of tools"}]


@pytest.mark.parametrize(
    ("files", "text"),
    [
        ({"tokenizer_config.json": {"chat_template": "of the settings"}}, "of the settings"),
        ({"tokenizer_config.json": {"chat_template": NAMED}}, "of the list"),
        ({"tokenizer_config.json": {"chat_template": NAMED}, "chat_template.jinja": "of the file"}, "of the file"),
        ({"chat_template.jinja": "of the file", "additional_chat_templates/rag.jinja": "rag"}, "of the file"),
        ({"additional_chat_templates/default.jinja": "named default"}, "named default"),
        ({"tokenizer_config.json": {"chat_template": "x"}, "additional_chat_templates/rag.jinja": "rag"}, None),
        ({"tokenizer_config.json": {"chat_template": NAMED[1:]}}, None),
    ],
)
def test_places_of_templates_are_those_of_transformers(base_dir, tmp_path, files, text):
    (tmp_path / "tokenizer.json").write_bytes((base_dir / "tokenizer.json").read_bytes())
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}
    write_files(tmp_path, {**files, "tokenizer_config.json": settings | files.get("tokenizer_config.json", {})})
    expected, tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path), Tokenizer(tmp_path)
    if text is None:
        with pytest.raises(ValueError, match="no default"):
            expected.apply_chat_template([USER], tokenize=False)
        with pytest.raises(ValueError, match=r"has chat templates named (rag|tool_use), but no default"):
            render_chat(tokenizer, [USER])
    else:
        assert expected.apply_chat_template([USER], tokenize=False) == render_chat(tokenizer, [USER]) == text


def test_templates_are_copied_with_a_base(hf_checkpoint, tmp_path):
    write_files(tmp_path, {"chat_template.jinja": "plain", "additional_chat_templates/rag.jinja": "rag"})
    for file in hf_checkpoint.iterdir():
        if file.is_file() and file.name != "chat_template.jinja":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    load_script("scripts/convert_hf_checkpoint.py").main(checkpoint_dir=tmp_path, output_dir=tmp_path / "base")
    assert Tokenizer(tmp_path / "base").chat_templates == {"default": "plain", "rag": "rag"}
    folder = tmp_path / "base" / "additional_chat_templates"
    assert folder.stat().st_mode == (tmp_path / "additional_chat_templates").stat().st_mode


def test_template_of_a_processor(base_dir, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((base_dir / "tokenizer.json").read_bytes())
    write_files(tmp_path, {"tokenizer_config.json": {"eos_token": "<|end|>"}})
    write_files(tmp_path, {"chat_template.json": {"chat_template": "of the processor"}})
    assert render_chat(Tokenizer(tmp_path), [USER]) == "of the processor"
    write_files(tmp_path, {"tokenizer_config.json": {"eos_token": "<|end|>", "chat_template": [{"name": 3}]}})
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: expected a text or texts by name as chat_template"):
        Tokenizer(tmp_path)


def test_special_tokens_of_older_tokenizers(tmp_path):
    byte_fallback_tokenizer(tmp_path)
    template = "{{ bos_token }}|{{ eos_token }}|{{ unk_token }}"
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template, "eos_token": "<0x00>"}
    tokens = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}, "unk_token": "<unk>"}
    write_files(tmp_path, {"tokenizer_config.json": settings, "special_tokens_map.json": tokens})
    expected = transformers.AutoTokenizer.from_pretrained(tmp_path).apply_chat_template([USER], tokenize=False)
    assert render_chat(Tokenizer(tmp_path), [USER]) == expected == "<s>|</s>|<unk>"
