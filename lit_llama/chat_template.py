"""Chat templates, rendered as Hugging Face's transformers renders them: the same filters, functions and tags.

https://huggingface.co/docs/transformers/main/en/chat_templating
"""

import datetime
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from lit_llama.files import require_extra
from lit_llama.tokenizer import Tokenizer

MAX_SOURCE = 200_000
SWITCHES = ("enable_thinking", "thinking")  # of Qwen3, SmolLM3 and others; of Granite and DeepSeek
_now: ContextVar[datetime.datetime | None] = ContextVar("now", default=None)


@contextmanager
def at(moment: datetime.datetime) -> Iterator[None]:
    """Let templates that ask for the time be told this one."""
    token = _now.set(moment)
    try:
        yield
    finally:
        _now.reset(token)


@contextmanager
def one_moment() -> Iterator[None]:
    """Let all renderings within be told the same time, so that midnight does not come between them."""
    with at(_now.get() or datetime.datetime.now()):
        yield


def render_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool = True,
    **variables: Any,
) -> str:
    """Render messages with the model's own chat template, in a sandbox, with a limit on its work.

    Args:
        tokenizer: brings the template and its special tokens.
        messages: `role` and `content` of each turn, and what else the template knows.
        add_generation_prompt: end with the opening of the assistant's next turn.
        variables: other names that the template may use.

    Raises:
        ValueError: there is no template, it is broken, it does too much, or it refuses the messages; in one line.
    """
    limits = require_extra("lit_llama.template_limits", "chat")
    source = check_template(tokenizer)
    values = {"tools": None, "documents": None, **tokenizer.special_tokens, **variables}
    messages = [_as_transformers(message) for message in messages]
    try:
        template = _compile(source)
        with limits.limited(limits.size(messages), len(source)):
            return template.render(messages=messages, add_generation_prompt=add_generation_prompt, **values)
    except Exception as error:  # a template may raise what Python raises
        raise ValueError(f"the model's chat template failed: {_one_line(error)}") from None


def render_undated(tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
    """Render as on no particular day, so that the text tells templates apart and is the same tomorrow.

    A template that can do without the date is rendered without it.

    Raises:
        ValueError: as `render_chat`.
    """
    if "strftime_now" not in check_template(tokenizer):
        return render_chat(tokenizer, messages, **variables)
    undefined = require_extra("jinja2", "chat").Undefined(name="strftime_now")
    try:
        return render_chat(tokenizer, messages, strftime_now=undefined, **variables)
    except ValueError:
        with at(datetime.datetime(2024, 7, 26)):
            return render_chat(tokenizer, messages, **variables)


def thinking_switch(tokenizer: Tokenizer) -> str:
    """The variable by which a model's chat template lets it think before it answers, or not.

    Raises:
        ValueError: the template has no such switch.
    """
    source = check_template(tokenizer)
    meta = require_extra("jinja2.meta", "chat")
    try:
        asked = meta.find_undeclared_variables(_environment().parse(source))
    except Exception as error:
        raise ValueError(f"the model's chat template failed: {_one_line(error)}") from None
    found = [name for name in SWITCHES if name in asked]
    if not found:
        raise ValueError(
            f"the model's chat template has no switch for thinking, which would be called {' or '.join(SWITCHES)}: "
            "leave out --thinking"
        )
    return found[0]


def check_template(tokenizer: Tokenizer) -> str:
    """The source of the template that a conversation is rendered with.

    Raises:
        ValueError: there is none, or it is too long.
    """
    source = tokenizer.chat_template
    if source is None and tokenizer.chat_templates.keys() - {"default"}:
        raise ValueError(
            f"this model has chat templates named {', '.join(sorted(tokenizer.chat_templates))}, but no default: "
            "put the one to use into chat_template.jinja in the folder of the base model"
        )
    if source is None:
        raise ValueError("this model has no chat template (it may not be a chat model): use the prompt style alpaca")
    if len(source) > MAX_SOURCE:
        raise ValueError(f"the model's chat template has {len(source)} characters, expected at most {MAX_SOURCE}")
    return source


def _as_transformers(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as templates are given it: nothing that is null, and a thought under each name that is used for it."""
    given = {key: value for key, value in message.items() if value is not None}
    names = ("reasoning_content", "thinking", "reasoning")
    thought = next((given[name] for name in names if name in given), None)
    return given if thought is None else {"thinking": thought, **given, "reasoning_content": thought}


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    text = text if len(text) <= 300 else text[:300] + "..."
    line = getattr(error, "lineno", None)
    known = type(error).__module__.startswith(("jinja2", "lit_llama"))
    return (text if known and text else f"{type(error).__name__}: {text}") + (f" (line {line})" if line else "")


@functools.lru_cache(maxsize=32)
def _compile(source: str) -> Any:
    limits = require_extra("lit_llama.template_limits", "chat")
    with limits.limited(0, len(source)):
        return _environment().from_string(source)


class _Dict:
    """Makes dictionaries, and gives no way to the type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )  # without the escapes of HTML, which Jinja's own filter writes


def _strftime_now(format: str) -> str:
    return (_now.get() or datetime.datetime.now()).strftime(format)


@functools.cache
def _environment() -> Any:
    jinja2 = require_extra("jinja2", "chat")
    extensions = require_extra("jinja2.ext", "chat")
    limits = require_extra("lit_llama.template_limits", "chat")

    class Generation(extensions.Extension):
        """`{% generation %}`, with which templates mark what the assistant says; it writes what stands in it."""

        tags = {"generation"}  # noqa: RUF012 (as Jinja has it)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_written"), [], [], body).set_lineno(line)

        def _written(self, caller: Any) -> str:
            return caller()

    class SafeNamespace(jinja2.utils.Namespace):
        """Jinja's, without names that begin with an underscore."""

        def __init__(*args: Any, **kwargs: Any) -> None:
            space, *rest = args
            values = dict(*rest, **kwargs)
            jinja2.utils.Namespace.__init__(space)
            for name, value in values.items():
                space[name] = value

        def __setitem__(self, name: str, value: Any) -> None:
            if str(name).startswith("_"):
                raise jinja2.exceptions.SecurityError(f"the name {name} begins with an underscore")
            super().__setitem__(name, value)

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = limits.LimitedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(
        raise_exception=refuse, strftime_now=_strftime_now, dict=_Dict(), namespace=SafeNamespace
    )
    environment.count_filters()
    return environment
