"""Prompt styles by name: how a conversation becomes text, where a turn ends, and how an answer is cut back out."""

import functools
import hashlib
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from tqdm import tqdm

from lit_llama.chat_template import one_moment, render_chat, render_undated, thinking_switch
from lit_llama.tokenizer import Tokenizer

Role = Literal["system", "user", "assistant"]
ScoredTurns = Literal["all", "last"]


class Message(NamedTuple):
    """One turn of a conversation.

    Args:
        role: whose turn.
        content: what is said.
        input: what a user's instruction is about, which each style puts in its own place.
        scored: whether training scores it, if it is the assistant's.
        wanted: whether it is a good answer, where good and bad ones are learned from.
        complete: whether it was said to its end, so that the token that ends a turn follows it.
    """

    role: Role
    content: str
    input: str = ""
    scored: bool = True
    wanted: bool = True
    complete: bool = True


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
        thought: closes a thought, as "</think>", if the model thinks before it answers.
        write: conversation that ends with a response to its text, if that is not told by the other fields.
        sample: what a prompt looks like, if that depends on the day.
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
    thought: str = ""
    write: Callable[[Sequence[Message]], str] | None = None
    sample: str | None = None

    @property
    def fingerprint(self) -> str:
        """Of all that tokenised data depend on, except for the tokenizer; it is the same on every day."""
        sample = self.prompt("instruction", "input") if self.sample is None else self.sample
        parts = sample, self.lead, self.tail, self.end, self.end_id, self.bos
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def prompt(self, instruction: str, input: str = "") -> str:
        """The text that the assistant continues, for one instruction."""
        return self.render([Message("user", instruction, input)])

    def segments(self, messages: Sequence[Message], scored_turns: ScoredTurns = "all") -> list[Segment]:
        """Cut a conversation where an assistant's turns begin and end.

        Prompts and responses are tokenised apart, so that it is exact which tokens are a response's, and generation,
        which knows the prompt alone, meets the tokens of training.

        Args:
            messages: the conversation.
            scored_turns: with "last", the text before the last response need not hold the earlier ones as they were
                generated: templates may leave out their thoughts.

        Raises:
            ValueError: the style has no place for such a conversation.
        """
        if self.strips:
            messages = [m._replace(content=m.content.strip()) if m.role == "assistant" else m for m in messages]
        segments: list[Segment] = []
        before = ""
        turns = [i for i, message in enumerate(messages) if message.role == "assistant"]
        with one_moment():
            for i in turns if messages[-1].role == "assistant" else [*turns, len(messages)]:
                prompt = self.render(messages[:i])
                if not prompt.startswith(before):
                    if scored_turns == "all":
                        raise ValueError(
                            f"the prompt style {self.name} rewrites earlier turns of a conversation, so that they "
                            "cannot be scored: give --scored_turns last, which scores the last response alone"
                        )
                    segments, before = [], ""
                segments.append(Segment(prompt[len(before) :], False))
                if i < len(messages):
                    response = self._response(prompt, messages[: i + 1])
                    added = self.adds_space and self.lead.startswith(" ")
                    segments.append(Segment(response.removeprefix(" ") if added else response, True))
                    before = prompt + response + self.end
        return segments

    def _response(self, prompt: str, messages: Sequence[Message]) -> str:
        """What stands between a prompt and the end of the turn that answers it."""
        content = messages[-1].content
        tail = self.tail if messages[-1].complete else ""
        if not self.thought or self.thought not in content:
            return self.lead + content + tail
        # The response has a thought of its own in the place of the empty one in `lead`.
        if self.write and self.end and (written := self.write(messages)).startswith(prompt):
            response = written[len(prompt) :].rpartition(self.end)[0]
            if all(part.strip() in response for part in content.removeprefix(self._opening).split(self.thought)):
                return response
        if prompt.rstrip().endswith(self._opening):
            content = content.lstrip().removeprefix(self._opening)
            content = content.removeprefix(prompt[len(prompt.rstrip()) :])
        return content + tail

    @property
    def _opening(self) -> str:
        return self.thought.replace("/", "", 1)

    def cut(self, text: str, more_may_follow: bool = False) -> str:
        """The answer in a generated text: what stands before the next turn, and after a thought that is empty.

        Args:
            text: what the model generated after the prompt.
            more_may_follow: leave off what may turn out not to belong to the answer, for streaming.
        """
        end = min((at for marker in self.markers if (at := text.find(marker)) >= 0), default=len(text))
        answer = text[:end]
        if more_may_follow and end == len(text):
            begun = [n for marker in self.markers for n in range(1, len(marker)) if text.endswith(marker[:n])]
            answer = answer[: len(answer) - max(begun, default=0)]
        if self.thought:
            answer = self._after_empty_thought(answer, more_may_follow and end == len(text))
        return answer.strip() if self.strips else answer

    def _after_empty_thought(self, text: str, more_may_follow: bool) -> str:
        rest = text
        for tag in (self._opening, self.thought):
            begun = rest.lstrip()
            if begun.startswith(tag):
                rest = begun[len(tag) :]
            elif more_may_follow and tag.startswith(begun):
                return ""
            elif tag == self.thought:
                return text
        return rest.lstrip("\n")

    def ended(self, text: str) -> bool:
        """Whether a generated text has gone on to the next turn."""
        return any(marker in text for marker in self.markers)


CHAT_STYLES = {"chat": None, "chat-thinking-on": True, "chat-thinking-off": False}  # by what the switch is set to


def chat_switch(style: str, tokenizer: Tokenizer) -> dict[str, bool]:
    """What a style tells the model's chat template of thinking, under the template's own name for it; often nothing."""
    thinking = CHAT_STYLES.get(style)
    return {} if thinking is None else {thinking_switch(tokenizer): thinking}


def prompt_style(name: str, tokenizer: Tokenizer) -> PromptStyle:
    """The style of that name.

    Args:
        name: "alpaca", "metamath", "beaver", "hh", "chat" (the model's own chat template), "chat-thinking-on" and
            "chat-thinking-off" (the same where it has a switch for that), or "none" (the instruction as it is).
        tokenizer: brings the chat template and the end-of-sequence token.

    Raises:
        ValueError: no such style, or "chat" for a model without a chat template.
    """
    if name in CHAT_STYLES:
        return _chat_style(tokenizer, name)
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
    raise ValueError(
        f"no prompt style named {name!r}; there are {', '.join([*CHAT_STYLES, *_INSTRUCTIONS, *_DIALOGUES])}"
    )


def chosen_style(asked: str | None, trained: str | None, tokenizer: Tokenizer, default: str = "chat") -> PromptStyle:
    """The style that was asked for; without one that of an adapter's training, or the default.

    On a model with a chat template, a hint on stderr says so where another style is asked for, unless the adapter was
    trained with it.

    Raises:
        ValueError: as `prompt_style`.
    """
    style = prompt_style(asked or trained or default, tokenizer)
    if asked not in (None, trained, *CHAT_STYLES, "none") and tokenizer.chat_template is not None:
        hint = f"hint: this base model has a chat template: --prompt_style chat may suit it better than {asked}"
        tqdm.write(hint, file=sys.stderr)
    return style


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


# What a model's prompt ends with if it is to think first, and what closes a thought.
_OPENING = re.compile(r"([<\[])(think|thinking|thought|reasoning)([>\]])\s*\Z", re.IGNORECASE)
_CLOSING = re.compile(r"[<\[]/(think|thinking|thought|reasoning)[>\]]", re.IGNORECASE)


def _chat_style(tokenizer: Tokenizer, name: str) -> PromptStyle:
    switch = chat_switch(name, tokenizer)

    def turns(messages: Sequence[Message]) -> list[dict[str, str]]:
        return [{"role": message.role, "content": _with_input(message)} for message in messages]

    def render(messages: Sequence[Message]) -> str:
        return render_chat(tokenizer, turns(messages), **switch)

    def write(messages: Sequence[Message]) -> str:
        return render_chat(tokenizer, turns(messages), add_generation_prompt=False, **switch)

    # What the template makes of an answer tells what it writes around one. Some templates demand a system message, a
    # question at the end, or texts without white space around them.
    system, question = Message("system", "system"), Message("user", "question")
    with one_moment():
        asked, prompt = _first_rendered(render, [[question], [system, question]])
        answers = [Message("assistant", content) for content in ("\tanswer\t", "answer")]
        answered = [[*asked, answer, *more] for answer in answers for more in ([], [question])]
        conversation, written = _first_rendered(write, answered)
    answer = conversation[len(asked)].content
    strips = "\tanswer\t" not in written
    before, found, after = written.rpartition("answer" if strips else answer)
    before, after = before.removesuffix("\t"), after.removeprefix("\t")  # of templates that strip one side alone
    lead = before.removeprefix(prompt) if before.startswith(prompt) else ""
    ids = tokenizer.encode(after.lstrip()) if found else []
    end_id = ids[0] if ids and tokenizer.is_special(ids[0]) else tokenizer.eos_id
    tail, end, _ = after.partition(tokenizer.token(end_id))
    thought = ""
    if opening := _OPENING.search(prompt):
        thought = f"{opening[1]}/{opening[2]}{opening[3]}"
        if thought not in lead:  # an answer without a thought closes the one that the prompt opens
            lead = ("\n" if prompt.endswith("\n") else "\n\n") + thought + "\n\n" + lead
    elif closing := _CLOSING.search(lead):
        thought = closing[0]
    return PromptStyle(
        name,
        render,
        bos=False,
        end_id=end_id,
        stop_ids=tokenizer.stop_ids | {end_id},
        end=end,
        lead=lead,
        adds_space=tokenizer.adds_space,
        tail=tail if end else "",
        strips=strips,
        thought=thought,
        write=write,
        sample=render_undated(tokenizer, turns([*asked[:-1], Message("user", "instruction", "input")]), **switch),
    )


def _first_rendered(
    render: Callable[[Sequence[Message]], str], conversations: Sequence[list[Message]]
) -> tuple[list[Message], str]:
    """The first conversation that a template accepts, and its text; the first error, if it accepts none."""
    errors: list[ValueError] = []
    for messages in conversations:
        try:
            return messages, render(messages)
        except ValueError as error:
            errors.append(error)
    raise errors[0]
