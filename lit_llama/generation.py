"""Prefill, decode, sampling: one prompt or a padded batch of them, streamed as they come."""

import math
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from lit_llama.cache import KVCache
from lit_llama.combine import PerRow
from lit_llama.model import LLaMA
from lit_llama.prompts import Message, PromptStyle
from lit_llama.seam import Adapter
from lit_llama.tokenizer import Tokenizer

GREEDY_BELOW = 1e-5  # temperatures below this divide differences of logits by so little that nothing is left to chance


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


def respond(
    model: LLaMA,
    tokenizer: Tokenizer,
    style: PromptStyle,
    prompts: Sequence[str | tuple[str, str]],
    adapter: Adapter | None = None,
    *,
    max_new_tokens: int = 256,
    batch_size: int = 16,
    seed: int = 1337,
    what: str = "answers",
    **sampling: Any,
) -> list[str]:
    """Answer prompts as text, some at once.

    Args:
        model: the base model.
        tokenizer: its tokenizer.
        style: turns prompts into text, and cuts responses out of it.
        prompts: what users say, or instructions with their inputs.
        adapter: what is added to the base model, if anything.
        max_new_tokens: per answer; a longer one is cut.
        batch_size: number of prompts answered at once.
        seed: of sampling, for the first prompt; the next one has the next.
        what: title of the progress bar.
        sampling: `temperature`, `top_k` and `top_p` of `Request`; greedy if not given.
    """
    pairs = [(prompt, "") if isinstance(prompt, str) else prompt for prompt in prompts]
    requests = [
        Request(
            tokenizer.encode(style.prompt(*pair), bos=style.bos),
            adapter,
            max_new_tokens,
            style.stop_ids,
            generator=torch.Generator(model.device).manual_seed(seed + i),
            **sampling,
        )
        for i, pair in enumerate(pairs)
    ]
    rows = tqdm(complete(model, requests, batch_size), total=len(requests), desc=what, leave=False)
    return [style.cut(tokenizer.decode(row)) for row in rows]


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
        seed: of sampling.
        sampling: `temperature`, `top_k` and `top_p` of `stream`; greedy if not given.

    Raises:
        ValueError: the style has no place for such a conversation, the prompt is empty or leaves no room in the
            window, or a sampling option is out of range.
    """
    ids = tokenizer.encode(style.render(messages), bos=style.bos)
    generator = torch.Generator(model.device).manual_seed(seed)
    decoder, text, shown = TextStream(tokenizer), "", ""
    for [token] in stream(
        model, [ids], max_new_tokens, adapter=adapter, stop_ids=style.stop_ids, generator=generator, **sampling
    ):
        assert token is not None  # a lone row has a token until the stream ends
        text += decoder.push(token)
        certain = style.cut(text, more_may_follow=True)
        yield certain[len(shown) :]
        shown = certain
        if style.ended(text):
            break
    yield style.cut(text + decoder.flush())[len(shown) :]


def stream(
    model: LLaMA,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    adapter: Adapter | Sequence[Adapter | None] | None = None,
    stop_ids: frozenset[int] = frozenset(),
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Iterator[list[int | None]]:
    """Continue a batch of prompts, one token per row at a time.

    Args:
        model: the base model.
        prompts: token ids of each row; lengths may differ.
        max_new_tokens: per row. A row also ends when the model's window is full.
        adapter: beside the base model, if any; or one for each row.
        stop_ids: tokens that end a row.
        temperature: 0 takes the likeliest token; larger is more random.
        top_k: sample among the k likeliest tokens only.
        top_p: sample among the likeliest tokens that hold this probability together.
        generator: source of randomness, on the model's device.

    Yields:
        The next token of each row, None for rows that have ended.

    Raises:
        ValueError: a prompt is empty or leaves no room in the window, or a sampling option is out of range; or a row
            cannot be computed, for example because its logits are not finite.
    """
    adapters = list(adapter) if isinstance(adapter, Sequence) else [adapter] * len(prompts)
    options = (max_new_tokens, stop_ids, temperature, top_k, top_p, generator)
    requests = [Request(prompt, one, *options) for prompt, one in zip(prompts, adapters, strict=True)]
    decoder = Decoder(model, len(prompts), max(map(len, prompts)) + max_new_tokens)
    rows = decoder.join(requests)
    while decoder.running:
        events = decoder.step()
        _raise_errors(events)
        tokens = {event.row: event.token for event in events if event.token is not None}
        if tokens:
            yield [tokens.get(row) for row in rows]


class Request(NamedTuple):
    """A prompt to be continued.

    Args:
        prompt: its token ids.
        adapter: beside the base model, if any.
        max_new_tokens: after which the row ends; it also ends when the model's window is full.
        stop_ids: tokens that end the row.
        temperature: 0 takes the likeliest token; larger is more random.
        top_k: sample among the k likeliest tokens only.
        top_p: sample among the likeliest tokens that hold this probability together.
        generator: source of randomness, on the model's device.
    """

    prompt: Sequence[int]
    adapter: Adapter | None = None
    max_new_tokens: int = 256
    stop_ids: frozenset[int] = frozenset()
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    generator: torch.Generator | None = None


class Event(NamedTuple):
    """What happened to a row in one step.

    Args:
        row: its number, as `Decoder.join` gave it.
        token: the next one; None if the row ended at a stop token, which is not part of the text, or by an error.
        finish: why the row ended, if it did: at a "stop" token, at its greatest "length", or by an "error".
        error: what went wrong, for the one who asked for the row.
    """

    row: int
    token: int | None
    finish: Literal["stop", "length", "error"] | None
    error: str | None = None


class Decoder:
    """Rows of text that are continued together, a token at a time. Rows join and leave between any two tokens.

    All running rows share each forward, even if their adapters differ; the cache is allocated once, and a row that ends
    makes room for another. A row that cannot be computed, because its adapter raises an error or makes its logits
    infinite or NaN, ends with an event that says so. The other rows go on as if it had never been there.

    Args:
        model: the base model.
        max_rows: how many may run at once.
        length: longest row, prompt included; the model's window at most.
    """

    def __init__(self, model: LLaMA, max_rows: int, length: int) -> None:
        self.model = model
        self.length = min(length, model.config.block_size)
        self.max_rows = max_rows
        self.running: list[int] = []  # numbers of the rows, in the order of the cache
        self._cache = model.new_cache(max_rows, self.length)
        self._view: KVCache | None = None  # of the running rows; None after some have joined or left
        self._adapter: Adapter | None = None
        self._requests: dict[int, Request] = {}
        self._generated: dict[int, int] = {}
        self._errors: dict[int, str] = {}  # of rows that end with the next step
        self._written = [0] * max_rows  # positions of each row of the cache beyond which it holds zeros
        self._tokens = torch.zeros(max_rows, dtype=torch.long, device=model.device)  # the last of each row
        self._first_logits: Tensor | None = None  # (n, V) of the n rows that joined since the last step
        self._next_number = 0

    @torch.no_grad()
    def join(self, requests: Sequence[Request]) -> list[int]:
        """Read prompts; their first tokens come with the next step.

        Returns:
            A number for each row.

        Raises:
            ValueError: there is no room for as many, a prompt is empty or leaves no room in the window, or a sampling
                option is out of range.
        """
        first = len(self.running)
        if first + len(requests) > self.max_rows:
            raise ValueError(f"{first + len(requests)} rows, there is room for {self.max_rows}")
        assert self._first_logits is None, "rows joined twice without a step"
        check_prompts(self.model, [request.prompt for request in requests])
        for request in requests:
            check_sampling(request.max_new_tokens, request.temperature, request.top_k, request.top_p)
        numbers = list(range(self._next_number, self._next_number + len(requests)))
        self._next_number += len(requests)
        self.running += numbers
        self._requests |= dict(zip(numbers, requests, strict=True))
        self._generated |= dict.fromkeys(numbers, 0)
        self._view = None
        self._first_logits = self._prefill(first)
        return numbers

    @torch.no_grad()
    def step(self) -> list[Event]:
        """The next token of each row; of those that have just joined, if some have."""
        if self._first_logits is not None:
            logits, self._first_logits = self._first_logits, None
            rows = range(len(self.running) - logits.size(0), len(self.running))
        else:
            logits, rows = self._decode(), range(len(self.running))
        numbers = [self.running[row] for row in rows]
        tokens = self._sample(logits, numbers)
        self._tokens[rows.start : rows.stop] = tokens
        events = [self._event(number, token) for number, token in zip(numbers, tokens.tolist(), strict=True)]
        for event in events:
            if event.finish:
                self.leave(event.row)
        return events

    def leave(self, number: int) -> None:
        """End a row; the last one takes its place in the cache."""
        row, last = self.running.index(number), len(self.running) - 1
        assert self._first_logits is None or row < last - self._first_logits.size(0), (
            "a row left before its first token"
        )
        if row != last:
            self._cache.move_row(last, row)
            self._tokens[row] = self._tokens[last]
            self._written[row] = self._written[last]
            self.running[row] = self.running[last]
        self.running.pop()
        del self._requests[number], self._generated[number]
        self._errors.pop(number, None)
        self._view = None

    def _prefill(self, first: int) -> Tensor:
        """Logits (n, V) after the prompts of the rows from `first` on, which have just joined."""
        requests = [self._requests[number] for number in self.running[first:]]
        prompts = [list(request.prompt) for request in requests]
        longest = max(map(len, prompts))
        # Padded with tokens of its own, so that a row meets no other ones because others are longer.
        ids = torch.tensor([prompt + prompt[-1:] * (longest - len(prompt)) for prompt in prompts])  # (n, T)
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        last = torch.arange(ids.size(1)) == lengths[:, None] - 1  # (n, T)

        def forward(rows: slice) -> Tensor:
            here = slice(rows.start - first, rows.stop - first)
            return self.model(
                ids[here].to(self.model.device),
                together([request.adapter for request in requests[here]]),
                logits_at=last[here].to(self.model.device),
                cache=self._cache.view(rows, self.length),
            )

        logits = self._together_or_alone(forward, first)
        for row, request in enumerate(requests, start=first):
            # What an earlier row left here, or the padding, is hidden by a weight of 0. That does not hide NaN.
            self._cache.clear(row, len(request.prompt), max(self._written[row], longest))
            self._written[row] = len(request.prompt)
        return logits

    def _decode(self) -> Tensor:
        """Logits (B, V) after the last token of each row."""
        positions = torch.tensor([self._position(number) for number in self.running], device=self.model.device)
        for row, number in enumerate(self.running):
            self._written[row] = self._position(number) + 1

        def forward(rows: slice) -> Tensor:
            if rows == slice(0, len(self.running)):
                return self._decode_together()
            [adapter] = [self._requests[number].adapter for number in self.running[rows]]
            cache = self._cache.view(rows, self.length)
            return self.model(self._tokens[rows, None], adapter, cache=cache, positions=positions[rows, None])[:, 0]

        return self._together_or_alone(forward, 0)

    def _together_or_alone(self, forward: Callable[[slice], Tensor], first: int) -> Tensor:
        """Logits (n, V) of the rows from `first` on, in one forward; if that raises, of each by itself.

        Those that raise by themselves end with the next step, by an error.
        """
        try:
            return forward(slice(first, len(self.running)))
        except Exception as error:
            self._view = None
            problem = _describe(error)
        logits = torch.zeros(len(self.running) - first, self.model.config.vocab_size, device=self.model.device)
        for row in range(first, len(self.running)):
            try:
                logits[row - first] = forward(slice(row, row + 1))[0]
            except Exception as error:
                self._errors[self.running[row]] = _describe(error)
        if not self._errors:  # then every step will be as slow
            warnings.warn(f"rows cannot be computed together and are computed one by one: {problem}", stacklevel=4)
        return logits

    def _decode_together(self) -> Tensor:
        """`_decode` of all rows in one forward."""
        positions = [self._position(number) for number in self.running]
        adapters = [self._requests[number].adapter for number in self.running]
        longest = min(self.length, 64 * math.ceil((max(positions) + 1) / 64))  # beyond, there is nothing to attend to
        forward = self.model.__call__
        if self.model.compiled is not None:  # for one shape: free rows take part, and nobody reads what they say
            free = self.max_rows - len(positions)
            positions, adapters, longest = positions + [0] * free, adapters + adapters[:1] * free, self.length
        rows = slice(0, len(positions))
        if self._view is None:
            self._adapter = together(adapters)
            self._view = self._cache.view(rows, longest)
            if self.model.compiled is not None:
                self._view.keep_addresses()
        elif self.model.compiled is not None:
            forward = self.model.compiled  # what the adapters add is in the view by now
            torch.compiler.cudagraph_mark_step_begin()
        elif self._view.length < longest:
            self._view = self._cache.view(rows, longest, previous=self._view)
        at = torch.tensor(positions, device=self.model.device)[:, None]  # (B, 1)
        logits = forward(self._tokens[rows, None], self._adapter, cache=self._view, positions=at)
        return logits[: len(self.running), 0]

    def _position(self, number: int) -> int:
        """Where in its row the last token stands."""
        return len(self._requests[number].prompt) + self._generated[number] - 1

    def _sample(self, logits: Tensor, numbers: list[int]) -> Tensor:
        """A token (n) for each row; where there is none, `_errors` says why."""
        tokens = logits.argmax(-1)
        for row, (number, is_finite) in enumerate(zip(numbers, logits.isfinite().all(-1).tolist(), strict=True)):
            request = self._requests[number]
            if number in self._errors:
                continue
            if not is_finite:
                self._errors[number] = (
                    "the model's logits are not finite: the values of the adapter, or its scale, are too large"
                    if request.adapter is not None
                    else "the model's logits are not finite"
                )
            elif request.temperature >= GREEDY_BELOW:
                options = request.temperature, request.top_k, request.top_p, request.generator
                try:
                    tokens[row] = sample(logits[row : row + 1], *options)[0]
                except Exception as error:
                    self._errors[number] = _describe(error)
        return tokens

    def _event(self, number: int, token: int) -> Event:
        request = self._requests[number]
        if number in self._errors:
            return Event(number, None, "error", self._errors[number])
        if token in request.stop_ids:
            return Event(number, None, "stop")
        self._generated[number] += 1
        is_full = self._generated[number] == request.max_new_tokens or self._position(number) + 1 == self.length
        return Event(number, token, "length" if is_full else None)


def complete(
    model: LLaMA,
    requests: Sequence[Request],
    max_rows: int,
    stops: Callable[[int, list[int]], bool] | None = None,
) -> Iterator[list[int]]:
    """Continue any number of prompts to their ends, some at once; when one ends, the next takes its place.

    Args:
        model: the base model.
        requests: the prompts; those with the longest answers had better come first.
        max_rows: at once.
        stops: tells of a request, by its number, and its new tokens whether it has ended by what it says.

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


def _describe(error: Exception) -> str:
    """An error in one line that is not too long."""
    text = textwrap.shorten(str(error), 300) or "no message"
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"


def together(adapters: Sequence[Adapter | None]) -> Adapter | None:
    """One adapter for a batch whose rows have these; the same for all is that one."""
    return adapters[0] if all(adapter is adapters[0] for adapter in adapters) else PerRow(adapters)


def check_prompts(model: LLaMA, prompts: Sequence[Sequence[int]]) -> None:
    """Refuse prompts that cannot be continued.

    Raises:
        ValueError: one is empty, leaves no room in the model's window, or has a token that the model does not know.
    """
    window, vocabulary = model.config.block_size, model.config.vocab_size
    for prompt in prompts:
        if not prompt:
            raise ValueError("the prompt is empty: the model needs at least one token to continue")
        if len(prompt) >= window:
            raise ValueError(f"the prompt has {len(prompt)} tokens, the model's window is {window}: shorten the prompt")
        if not 0 <= min(prompt) <= max(prompt) < vocabulary:
            raise ValueError(f"the prompt has tokens from {min(prompt)} to {max(prompt)}, the model knows {vocabulary}")


def check_sampling(max_new_tokens: int, temperature: float, top_k: int | None, top_p: float) -> None:
    """Refuse sampling options that are out of range.

    Raises:
        ValueError: one of them is; the message names it.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be a number from 0 on, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")


def sample(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one token per row.

    Args:
        logits: (B, V).
        temperature: 0, or less than `GREEDY_BELOW`, takes the likeliest.
        top_k: keep the k likeliest.
        top_p: keep the likeliest that hold this probability together (arXiv 1904.09751), at least one.
        generator: source of randomness.

    Returns:
        Token ids (B,).
    """
    if temperature < GREEDY_BELOW:
        return logits.argmax(-1)
    logits = logits.float()
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature  # the largest stays finite, however cold
    if top_k is not None:
        least = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < least, -torch.inf)
    probabilities = logits.softmax(-1)
    if top_p < 1:
        ranked, order = probabilities.sort(descending=True)
        before = ranked.cumsum(-1) - ranked  # probability held by likelier tokens
        probabilities = probabilities.scatter(-1, order, ranked.masked_fill(before >= top_p, 0))
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


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
