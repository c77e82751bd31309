"""Prompt styles by name: how an instruction becomes the text that the model continues, and where its answer ends."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lit_llama.files import require_extra
from lit_llama.tokenizer import Tokenizer


@dataclass(frozen=True)
class PromptStyle:
    """A prompt style for one tokenizer.

    Args:
        name: the name it is chosen by and recorded under.
        render: (instruction, input) to the prompt's text.
        bos: whether the beginning-of-sequence token is put before the text, which does not hold it.
        end_id: token that ends a response.
        stop_ids: tokens at which generation stops, `end_id` among them.
    """

    name: str
    render: Callable[[str, str], str]
    bos: bool
    end_id: int
    stop_ids: frozenset[int]


def prompt_style(name: str, tokenizer: Tokenizer) -> PromptStyle:
    """The style of that name.

    Args:
        name: "alpaca", "metamath", "chat" (the model's own chat template) or "none" (the instruction as it is).
        tokenizer: brings the chat template and the end-of-sequence token.

    Raises:
        ValueError: no such style, or "chat" for a model without a chat template.
    """
    if name == "chat":
        return _chat_style(tokenizer)
    if name not in _TEXT_STYLES:
        raise ValueError(f"no prompt style named {name!r}; there are chat, {', '.join(_TEXT_STYLES)}")
    return PromptStyle(name, _TEXT_STYLES[name], tokenizer.adds_bos, tokenizer.eos_id, tokenizer.stop_ids)


def _alpaca(instruction: str, input: str) -> str:
    """The template of Stanford Alpaca, https://github.com/tatsu-lab/stanford_alpaca#data-release."""
    if input:
        return (
            "Below is an instruction that describes a task, paired with an input that provides further context. "
            "Write a response that appropriately completes the request.\n\n"
            f"### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
        )
    return (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{instruction}\n\n### Response:"
    )


def _metamath(instruction: str, input: str) -> str:
    """The template of MetaMath (arXiv 2309.12284), Alpaca's with the opening of a chain of thought."""
    return f"{_alpaca(instruction, input)} Let's think step by step."


def _none(instruction: str, input: str) -> str:
    return f"{instruction}\n{input}" if input else instruction


_TEXT_STYLES: dict[str, Callable[[str, str], str]] = {"alpaca": _alpaca, "metamath": _metamath, "none": _none}


def _chat_style(tokenizer: Tokenizer) -> PromptStyle:
    if tokenizer.chat_template is None:
        raise ValueError("this model has no chat template (it may not be a chat model): use the prompt style alpaca")

    def render(instruction: str, input: str) -> str:
        content = f"{instruction}\n\n{input}" if input else instruction
        return render_chat(tokenizer, [{"role": "user", "content": content}])

    end_id = _turn_end(tokenizer)
    return PromptStyle("chat", render, False, end_id, tokenizer.stop_ids | {end_id})


def render_chat(tokenizer: Tokenizer, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
    """Render messages with the model's own chat template, in Jinja's sandbox, the way Hugging Face does.

    Args:
        tokenizer: brings the template and its special tokens.
        messages: `role` and `content` of each turn.
        add_generation_prompt: end with the opening of the assistant's next turn.

    Raises:
        ValueError: the template is broken or refuses the messages.
    """
    jinja2 = require_extra("jinja2", "chat")
    sandbox = require_extra("jinja2.sandbox", "chat")

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = refuse
    variables: dict[str, Any] = {**tokenizer.special_tokens, "add_generation_prompt": add_generation_prompt}
    try:
        return environment.from_string(tokenizer.chat_template).render(messages=messages, **variables)
    except jinja2.TemplateError as error:
        raise ValueError(f"the model's chat template failed: {error}") from error


def _turn_end(tokenizer: Tokenizer) -> int:
    """The marker that the template puts after an assistant's turn, or else end-of-sequence."""
    content = "answer"
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": content}]
    ids = tokenizer.encode(render_chat(tokenizer, turns, add_generation_prompt=False).rpartition(content)[2])
    return ids[0] if ids and tokenizer.is_special(ids[0]) else tokenizer.eos_id
