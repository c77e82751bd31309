"""Prompt styles by name: how a conversation becomes text, where a turn ends, and how an answer is cut back out."""

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from lit_llama.files import require_extra
from lit_llama.tokenizer import Tokenizer

Role = Literal["system", "user", "assistant"]


class Message(NamedTuple):
    """One turn of a conversation.

    Args:
        role: whose turn.
        content: what is said.
        input: what a user's instruction is about, which each style puts in its own place.
    """

    role: Role
    content: str
    input: str = ""


class Segment(NamedTuple):
    """A piece of a conversation's text that is tokenised by itself.

    Args:
        text: the piece.
        is_response: the assistant said it; the token that ends a turn follows.
    """

    text: str
    is_response: bool


@dataclass(frozen=True)
class PromptStyle:
    """A prompt style for one tokenizer.

    Args:
        name: the name it is chosen by and recorded under.
        render: conversation to the text that the assistant continues.
        bos: whether the beginning-of-sequence token is put before the text, which does not hold it.
        end_id: token that ends a response.
        stop_ids: tokens at which generation stops, `end_id` among them.
        end: what `render` writes where an earlier response ends.
        lead: what stands between prompt and response, and belongs to the response.
        adds_space: the tokenizer puts a space before a text, so that a `lead` which begins with one loses it.
        tail: what stands between response and `end`.
        strips: white space around a response is not part of it.
        markers: texts with which the next turn begins, if the model goes on by itself.
    """

    name: str
    render: Callable[[Sequence[Message]], str]
    bos: bool
    end_id: int
    stop_ids: frozenset[int]
    end: str
    lead: str = ""
    adds_space: bool = False
    tail: str = ""
    strips: bool = False
    markers: tuple[str, ...] = ()

    @property
    def fingerprint(self) -> str:
        """Of all that tokenised data depend on, beside the tokenizer."""
        parts = self.prompt("instruction", "input"), self.lead, self.tail, self.end, self.end_id, self.bos
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def prompt(self, instruction: str, input: str = "") -> str:
        """The text that the assistant continues, for one instruction."""
        return self.render([Message("user", instruction, input)])

    def segments(self, messages: Sequence[Message]) -> list[Segment]:
        """Cut a conversation where an assistant's turns begin and end.

        Prompts and responses are tokenised apart, so that it is exact which tokens are a response's, and generation,
        which knows the prompt alone, meets the tokens of training.

        Raises:
            ValueError: the style has no place for such a conversation.
        """
        segments: list[Segment] = []
        before = ""
        for i, message in enumerate(messages):
            if message.role == "assistant":
                prompt = self.render(messages[:i])
                content = message.content.strip() if self.strips else message.content
                lead = self.lead.removeprefix(" ") if self.adds_space else self.lead
                segments.append(Segment(self._continuation(before, prompt), False))
                segments.append(Segment(lead + content + self.tail, True))
                before = prompt + self.lead + content + self.tail + self.end
        if messages[-1].role != "assistant":
            segments.append(Segment(self._continuation(before, self.render(messages)), False))
        return segments

    def _continuation(self, before: str, text: str) -> str:
        if not text.startswith(before):
            raise ValueError(
                f"the prompt style {self.name} rewrites earlier turns of a conversation, so that they cannot be scored"
            )
        return text[len(before) :]

    def cut(self, text: str, more_may_follow: bool = False) -> str:
        """The answer in a generated text: what stands before the next turn.

        Args:
            text: what the model generated after the prompt.
            more_may_follow: leave off what may turn out not to belong to the answer, for streaming.
        """
        end = min((at for marker in self.markers if (at := text.find(marker)) >= 0), default=len(text))
        answer = text[:end]
        if more_may_follow and end == len(text):
            begun = [n for marker in self.markers for n in range(1, len(marker)) if text.endswith(marker[:n])]
            answer = answer[: len(answer) - max(begun, default=0)]
        return answer.strip() if self.strips else answer

    def ended(self, text: str) -> bool:
        """Whether a generated text has gone on to the next turn."""
        return any(marker in text for marker in self.markers)


def prompt_style(name: str, tokenizer: Tokenizer) -> PromptStyle:
    """The style of that name.

    Args:
        name: "alpaca", "metamath", "beaver", "hh", "chat" (the model's own chat template) or "none" (the instruction
            as it is).
        tokenizer: brings the chat template and the end-of-sequence token.

    Raises:
        ValueError: no such style, or "chat" for a model without a chat template.
    """
    if name == "chat":
        return _chat_style(tokenizer)
    eos, common = tokenizer.token(tokenizer.eos_id), (tokenizer.adds_bos, tokenizer.eos_id, tokenizer.stop_ids)
    if name in _DIALOGUES:
        dialogue = _DIALOGUES[name]
        return PromptStyle(
            name,
            functools.partial(dialogue.render, end=eos),
            *common,
            end=eos,
            lead=" ",
            adds_space=tokenizer.adds_space,
            strips=True,
            markers=dialogue.markers,
        )
    if name in _INSTRUCTIONS:
        instruct = _INSTRUCTIONS[name]

        def render_instruction(messages: Sequence[Message]) -> str:
            if [message.role for message in messages] != ["user"]:
                raise ValueError(
                    f"the prompt style {name} has place for one instruction, not for {_roles(messages)}: use chat"
                )
            return instruct(messages[0].content, messages[0].input)

        markers = () if name == "none" else ("\n\n### Instruction:", "\n\n### Input:", "\n\n### Response:")
        return PromptStyle(name, render_instruction, *common, end=eos, markers=markers)
    raise ValueError(f"no prompt style named {name!r}; there are chat, {', '.join([*_INSTRUCTIONS, *_DIALOGUES])}")


def _roles(messages: Sequence[Message]) -> str:
    return f"the turns {', '.join(message.role for message in messages)}"


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


def metamath(instruction: str, input: str) -> str:
    """The template of MetaMath (arXiv 2309.12284), Alpaca's with the opening of a chain of thought."""
    return f"{_alpaca(instruction, input)} Let's think step by step."


def _none(instruction: str, input: str) -> str:
    return f"{instruction}\n{input}" if input else instruction


_INSTRUCTIONS: dict[str, Callable[[str, str], str]] = {"alpaca": _alpaca, "metamath": metamath, "none": _none}


@dataclass(frozen=True)
class _Dialogue:
    """A style that names the speaker of each turn.

    Args:
        opening: what a conversation begins with.
        user: a user's turn, "{}" in the place of what is said.
        assistant: opens an assistant's turn.
        markers: see `PromptStyle`.
    """

    opening: str
    user: str
    assistant: str
    markers: tuple[str, ...]

    def render(self, messages: Sequence[Message], end: str) -> str:
        text = self.opening
        for message in messages:
            if message.role == "system":
                raise ValueError("this prompt style has no place for a system message: use chat")
            if message.role == "assistant":
                text += f"{self.assistant} {message.content.strip()}{end}"
            else:
                text += self.user.replace("{}", _with_input(message).strip())
        return text + self.assistant


_DIALOGUES = {
    # Anthropic's hh-rlhf (arXiv 2204.05862)
    "hh": _Dialogue("", "\n\nHuman: {}", "\n\nAssistant:", ("\n\nHuman:", "\n\nAssistant:")),
    # Safe RLHF's Beaver (arXiv 2310.12773)
    "beaver": _Dialogue(
        "BEGINNING OF CONVERSATION: ", "USER: {} ", "ASSISTANT:", ("USER:", "BEGINNING OF CONVERSATION:")
    ),
}


def _with_input(message: Message) -> str:
    return f"{message.content}\n\n{message.input}" if message.input else message.content


def _chat_style(tokenizer: Tokenizer) -> PromptStyle:
    if tokenizer.chat_template is None:
        raise ValueError("this model has no chat template (it may not be a chat model): use the prompt style alpaca")

    def render(messages: Sequence[Message]) -> str:
        return render_chat(tokenizer, [{"role": m.role, "content": _with_input(m)} for m in messages])

    # What the template makes of an answer tells what it writes around one.
    question, answer = {"role": "user", "content": "question"}, {"role": "assistant", "content": "\tanswer\t"}
    prompt = render_chat(tokenizer, [question])
    written = render_chat(tokenizer, [question, answer], add_generation_prompt=False)
    strips = answer["content"] not in written
    before, _, after = written.rpartition("answer" if strips else answer["content"])
    lead = before.removeprefix(prompt) if before.startswith(prompt) else ""
    ids = tokenizer.encode(after.lstrip())
    end_id = ids[0] if ids and tokenizer.is_special(ids[0]) else tokenizer.eos_id
    tail, end, _ = after.partition(tokenizer.token(end_id))
    return PromptStyle(
        "chat",
        render,
        bos=False,
        end_id=end_id,
        stop_ids=tokenizer.stop_ids | {end_id},
        end=end,
        lead=lead,
        adds_space=tokenizer.adds_space,
        tail=tail if end else "",
        strips=strips,
    )


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
    variables: dict[str, Any] = {**tokenizer.special_tokens, "add_generation_prompt": add_generation_prompt}
    try:
        return _compile(tokenizer.chat_template or "").render(messages=messages, **variables)
    except jinja2.TemplateError as error:
        raise ValueError(f"the model's chat template failed: {error}") from error


@functools.cache
def _compile(template: str) -> Any:
    jinja2 = require_extra("jinja2", "chat")
    sandbox = require_extra("jinja2.sandbox", "chat")

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = refuse
    return environment.from_string(template)
