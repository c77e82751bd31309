"""From prompts to answers: prefill and decode, a token or a text at a time; whole lists of prompts."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from lit_llama.decoder import Decoder, Event, GenerationRequest
from lit_llama.model import LLaMA
from lit_llama.prompts import Message, PromptStyle
from lit_llama.seam import Adapter
from lit_llama.tokenizer import Tokenizer


def prefill(model: LLaMA, requests: Sequence[GenerationRequest]) -> Decoder:
    """Read prompts whole, in one forward.

    Args:
        model: the base model.
        requests: the prompts, each a row of the batch.

    Returns:
        The rows, with the keys and values of their prompts in the cache and the logits of their first new tokens.

    Raises:
        ValueError: a prompt is empty or leaves no room in the window, or a sampling option is out of range.
    """
    longest = max((len(request.prompt) + request.max_new_tokens for request in requests), default=0)
    decoder = Decoder(model, len(requests), longest)
    decoder.join(requests)
    return decoder


def decode(decoder: Decoder) -> Iterator[list[int | None]]:
    """Continue rows to their ends, one token at a time: sample it, and let the model read it.

    Args:
        decoder: the rows, after `prefill`.

    Yields:
        The next token of each row, None for rows that have ended.

    Raises:
        ValueError: a row cannot be computed, for example because its logits are not finite.
    """
    rows = list(decoder.running)
    while decoder.running:
        events = decoder.step()
        _raise_errors(events)
        tokens = {event.row: event.token for event in events if event.token is not None}
        if tokens:
            yield [tokens.get(row) for row in rows]


def stream(
    model: LLaMA,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    adapter: Adapter | Sequence[Adapter | None] | None = None,
    **options: Any,
) -> Iterator[list[int | None]]:
    """Continue a batch of prompts, one token per row at a time.

    Args:
        model: the base model.
        prompts: token ids of each row; lengths may differ.
        max_new_tokens: most new tokens of a row. A row also ends when the model's window is full.
        adapter: what is added to the base model, if anything; or one adapter for each row.
        options: `stop_ids`, `temperature`, `top_k`, `top_p` and `generator` of `GenerationRequest`.

    Yields:
        The next token of each row, None for rows that have ended.

    Raises:
        ValueError: a prompt is empty or leaves no room in the window, or a sampling option is out of range; or a row
            cannot be computed, for example because its logits are not finite.
    """
    adapters = list(adapter) if isinstance(adapter, Sequence) else [adapter] * len(prompts)
    requests = [
        GenerationRequest(prompt, one, max_new_tokens, **options) for prompt, one in zip(prompts, adapters, strict=True)
    ]
    yield from decode(prefill(model, requests))


def generate(model: LLaMA, prompts: Sequence[Sequence[int]], max_new_tokens: int, **options: Any) -> list[list[int]]:
    """Continue each prompt to its end.

    Args:
        model: the base model.
        prompts: token ids of each row; lengths may differ.
        max_new_tokens: per row.
        options: the other arguments of `stream`.

    Returns:
        The new tokens of each row, without the stop token.
    """
    rows: list[list[int]] = [[] for _ in prompts]
    for tokens in stream(model, prompts, max_new_tokens, **options):
        for row, token in zip(rows, tokens, strict=True):
            if token is not None:
                row.append(token)
    return rows


def complete(
    model: LLaMA,
    requests: Sequence[GenerationRequest],
    max_rows: int,
    stops: Callable[[int, list[int]], bool] | None = None,
) -> Iterator[list[int]]:
    """Continue any number of prompts to their ends, some of them at once; when one ends, the next takes its place.

    Args:
        model: the base model.
        requests: the prompts; those with the longest answers had better come first.
        max_rows: number of prompts continued at once.
        stops: given the number of a request and its new tokens, says whether its text has come to an end.

    Yields:
        The new tokens of each, in order, without the stop token, as soon as it and all before it have ended.

    Raises:
        ValueError: a request is refused by `Decoder.join`, or cannot be computed; the message says which.
    """
    if max_rows < 1:
        raise ValueError(f"batch_size is {max_rows}, it must be at least 1")
    longest = max((len(request.prompt) + request.max_new_tokens for request in requests), default=0)
    decoder = Decoder(model, min(max_rows, len(requests)), longest)
    texts: list[list[int]] = []
    ended: set[int] = set()
    given = joined = 0
    while given < len(requests):
        if joined < len(requests) and len(decoder.running) < decoder.max_rows:
            numbers = decoder.join(requests[joined : joined + decoder.max_rows - len(decoder.running)])
            joined += len(numbers)
            texts += [[] for _ in numbers]
        events = decoder.step()
        _raise_errors(events)
        for event in events:
            texts[event.row] += [] if event.token is None else [event.token]
            if event.finish is None and stops is not None and stops(event.row, texts[event.row]):
                decoder.leave(event.row)
                ended.add(event.row)
            elif event.finish:
                ended.add(event.row)
        while given in ended:
            yield texts[given]
            given += 1


def _raise_errors(events: Sequence[Event]) -> None:
    """For callers who want all rows or none."""
    for event in events:
        if event.error is not None:
            raise ValueError(f"prompt {event.row + 1} cannot be continued: {event.error}")


class Answer(NamedTuple):
    """What a model says to a conversation.

    Args:
        text: the answer, without what does not belong to it.
        complete: whether the model came to its end, so that nothing is cut off.
    """

    text: str
    complete: bool


def answer_all(
    model: LLaMA,
    tokenizer: Tokenizer,
    style: PromptStyle,
    conversations: Sequence[Sequence[Message]],
    adapter: Adapter | None = None,
    *,
    max_new_tokens: int = 256,
    batch_size: int = 16,
    seeds: Sequence[int] | None = None,
    what: str = "answers",
    **sampling: Any,
) -> Iterator[Answer]:
    """Continue conversations with the assistant's next turn, some of them at once.

    Args:
        model: the base model.
        tokenizer: its tokenizer.
        style: turns conversations into text, and cuts responses out of it.
        conversations: conversations that end with what a user says.
        adapter: what is added to the base model, if anything.
        max_new_tokens: per answer; a longer one is cut.
        batch_size: number of conversations continued at once.
        seeds: seed of sampling for each conversation; if not given, they are counted from 1337.
        what: title of the progress bar.
        sampling: `temperature`, `top_k` and `top_p` of `GenerationRequest`; greedy if not given.

    Yields:
        An answer to each, in order, as soon as it and all before it are there.

    Raises:
        ValueError: the style has no place for a conversation, one leaves no room in the model's window, or a sampling
            option is out of range.
    """
    seeds = range(1337, 1337 + len(conversations)) if seeds is None else seeds
    requests = [
        GenerationRequest(
            tokenizer.encode(style.render(conversation), bos=style.bos),
            adapter,
            max_new_tokens,
            style.stop_ids,
            generator=torch.Generator().manual_seed(seed),
            **sampling,
        )
        for conversation, seed in zip(conversations, seeds, strict=True)
    ]
    rows = tqdm(complete(model, requests, batch_size), total=len(requests), desc=what, leave=False)
    for request, row in zip(requests, rows, strict=True):
        text = tokenizer.decode(row)
        most = min(max_new_tokens, model.config.block_size - len(request.prompt))
        yield Answer(style.cut(text), len(row) < most or style.ended(text))


def respond(
    model: LLaMA,
    tokenizer: Tokenizer,
    style: PromptStyle,
    prompts: Sequence[str | tuple[str, str]],
    adapter: Adapter | None = None,
    *,
    seed: int = 1337,
    **options: Any,
) -> list[str]:
    """Answer prompts as text, some of them at once.

    Args:
        model: the base model.
        tokenizer: its tokenizer.
        style: turns prompts into text, and cuts responses out of it.
        prompts: what users say, or instructions with their inputs.
        adapter: what is added to the base model, if anything.
        seed: seed of sampling for the first prompt; the next one has the next.
        options: others of `answer_all`.
    """
    pairs = [(prompt, "") if isinstance(prompt, str) else prompt for prompt in prompts]
    conversations = [[Message("user", *pair)] for pair in pairs]
    options["seeds"] = range(seed, seed + len(pairs))
    return [answer.text for answer in answer_all(model, tokenizer, style, conversations, adapter, **options)]


def stream_text(
    model: LLaMA,
    tokenizer: Tokenizer,
    style: PromptStyle,
    messages: Sequence[Message],
    adapter: Adapter | None = None,
    *,
    max_new_tokens: int = 256,
    seed: int = 1337,
    **sampling: Any,
) -> Iterator[str]:
    """The assistant's next turn of a conversation, in pieces of text that are certain.

    Args:
        model: the base model.
        tokenizer: its tokenizer.
        style: turns messages into text, and cuts the answer out of it.
        messages: the conversation so far.
        adapter: what is added to the base model, if anything.
        max_new_tokens: longest answer, in tokens.
        seed: seed of sampling.
        sampling: `temperature`, `top_k` and `top_p` of `stream`; greedy if not given.

    Raises:
        ValueError: the style has no place for such a conversation, the prompt is empty or leaves no room in the
            window, or a sampling option is out of range.
    """
    ids = tokenizer.encode(style.render(messages), bos=style.bos)
    generator = torch.Generator().manual_seed(seed)
    answer = AnswerText(tokenizer, style)
    request = GenerationRequest(ids, adapter, max_new_tokens, style.stop_ids, generator=generator, **sampling)
    for [token] in decode(prefill(model, [request])):
        assert token is not None  # a lone row has a token until the stream ends
        yield answer.push(token)
        if answer.ended:
            break
    yield answer.finish()


class TextStream:
    """Turns tokens into text as they come, holding back a character until all its bytes are there.

    Args:
        tokenizer: decodes.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        # ids[start:end] are the tokens last given out, as `known`. Decoding begins there and not at the first token
        # that is new, as tokenizers treat the first token of a text apart.
        self._start = self._end = 0
        self._known = ""

    def push(self, id: int) -> str:
        """Add a token; return the text that became certain, possibly empty."""
        self._ids.append(id)
        return self._advance(flush=False)

    def flush(self) -> str:
        """The rest, incomplete characters included."""
        return self._advance(flush=True)

    def _advance(self, flush: bool) -> str:
        text = self._tokenizer.decode(self._ids[self._start :])
        if text.endswith("\ufffd") and not flush:
            return ""
        new = text[len(self._known) :]
        self._start, self._end = self._end, len(self._ids)
        self._known = self._tokenizer.decode(self._ids[self._start :])
        return new


class AnswerText:
    """Turns the tokens of one answer into its text as they come, without what does not belong to the answer.

    Args:
        tokenizer: decodes.
        style: prompt style; tells where the answer ends.
    """

    def __init__(self, tokenizer: Tokenizer, style: PromptStyle) -> None:
        self._stream, self._style = TextStream(tokenizer), style
        self._text = self._shown = ""

    @property
    def ended(self) -> bool:
        """Whether the model has gone on to the next turn."""
        return self._style.ended(self._text)

    def push(self, token: int) -> str:
        """Add a token; return the text that became certain, possibly empty."""
        self._text += self._stream.push(token)
        return self._show(self._style.cut(self._text, more_may_follow=True))

    def finish(self) -> str:
        """The rest of the answer."""
        return self._show(self._style.cut(self._text + self._stream.flush()))

    def _show(self, certain: str) -> str:
        new, self._shown = certain[len(self._shown) :], certain
        return new
