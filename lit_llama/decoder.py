"""Rows of text that are continued in one batch, with a KV cache. Rows join and leave between any two tokens."""

import math
import textwrap
import warnings
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lit_llama.cache import KVCache
from lit_llama.combine import PerRow
from lit_llama.model import LLaMA
from lit_llama.sampling import Sampling, check_sampling, sample
from lit_llama.seam import Adapter


class GenerationRequest(NamedTuple):
    """A prompt to be continued.

    Args:
        prompt: its token ids.
        adapter: what is added to the base model, if anything.
        max_new_tokens: after which the row ends; it also ends when the model's window is full.
        stop_ids: tokens that end the row.
        temperature: see `lit_llama.sampling.Sampling`, as the other options.
    """

    prompt: Sequence[int]
    adapter: Adapter | None = None
    max_new_tokens: int = 256
    stop_ids: frozenset[int] = frozenset()
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    generator: torch.Generator | None = None

    @property
    def sampling(self) -> Sampling:
        """How its tokens are chosen."""
        return Sampling(self.temperature, self.top_k, self.top_p, self.generator)


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
    makes room for another. What a row's adapter adds is worked out when it joins, and kept with the keys and values of
    its prompt: the other rows have nothing to do with it. A row that cannot be computed, because its adapter raises an
    error or makes its logits infinite or NaN, ends with an event that says so. The others go on as if it had never been
    there.

    Args:
        model: the base model.
        max_rows: number of rows that may run at once.
        length: tokens of the longest row, prompt included; the model's window at most.
    """

    def __init__(self, model: LLaMA, max_rows: int, length: int) -> None:
        self.model = model
        self.length = min(length, model.config.block_size)
        self.max_rows = max_rows
        self.running: list[int] = []  # numbers of the rows, in the order of the cache
        self._cache = model.new_cache(max_rows, self.length)
        self._view: KVCache | None = None  # of the running rows; None after some have joined or left
        self._requests: dict[int, GenerationRequest] = {}
        self._generated: dict[int, int] = {}
        self._errors: dict[int, str] = {}  # of rows that end with the next step
        self._written = [0] * max_rows  # positions of each row of the cache beyond which it holds zeros
        self._tokens = torch.zeros(max_rows, dtype=torch.long, device=model.device)  # the last of each row
        self._first_logits: Tensor | None = None  # (n, V) of the n rows that joined since the last step
        self._next_number = 0

    @property
    def adapter_bytes(self) -> int:
        """Memory for what the rows add, each its own, in addition to keys and values; 0 if all add the same."""
        return 0 if self._cache.row_adapters is None else self._cache.row_adapters.nbytes

    @torch.no_grad()
    def join(self, requests: Sequence[GenerationRequest]) -> list[int]:
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
        for request in requests:
            check_request(self.model, request)
        numbers = list(range(self._next_number, self._next_number + len(requests)))
        self._next_number += len(requests)
        self.running += numbers
        self._requests |= dict(zip(numbers, requests, strict=True))
        self._generated |= dict.fromkeys(numbers, 0)
        self._view = None
        if first == 0:
            self._cache.forget_adapters()  # of rows that have ended
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
        self._tokens[rows.start : rows.stop], tokens = self._sample(logits, numbers)
        events = [self._event(number, token) for number, token in zip(numbers, tokens, strict=True)]
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
        self._cache.drop_row(row, last, self._written[last])
        self._cache.clear(row, self._written[last], self._written[row])
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
        adapters = [self._requests[number].adapter for number in self.running]
        shared = all(adapter is adapters[0] for adapter in adapters)

        def forward(rows: slice) -> Tensor:
            here = slice(rows.start - first, rows.stop - first)
            view = self._cache.view(rows, self.length)
            logits = self.model(
                ids[here].to(self.model.device),
                batch_adapters(adapters[rows]),
                logits_at=last[here].to(self.model.device),
                cache=view,
            )
            self._cache.keep_adapters(rows, view, shared)
            return logits

        logits = self._together_or_alone(forward, first)
        for row, request in enumerate(requests, start=first):
            # What an earlier row left here, or the padding, is hidden by a weight of 0. That does not hide NaN.
            self._cache.clear(row, len(request.prompt), max(self._written[row], longest))
            self._written[row] = len(request.prompt)
        return logits

    def _together_or_alone(self, forward: Callable[[slice], Tensor], first: int) -> Tensor:
        """Logits (n, V) of the rows from `first` on, in one forward; if that raises, of each by itself.

        Those that raise by themselves end with the next step, by an error.
        """
        try:
            return forward(slice(first, len(self.running)))
        except Exception as error:
            problem = _describe(error)
        logits = torch.zeros(len(self.running) - first, self.model.config.vocab_size, device=self.model.device)
        for row in range(first, len(self.running)):
            try:
                logits[row - first] = forward(slice(row, row + 1))[0]
            except Exception as error:
                self._errors[self.running[row]] = _describe(error)
        if not self._errors:
            warnings.warn(f"prompts cannot be read together and are read one by one: {problem}", stacklevel=4)
        return logits

    def _decode(self) -> Tensor:
        """Logits (B, V) after the last token of each row."""
        positions = [self._position(number) for number in self.running]
        for row, position in enumerate(positions):
            self._written[row] = position + 1
        longest = min(self.length, 64 * math.ceil((max(positions) + 1) / 64))  # beyond, there is nothing to attend to
        forward = self.model.__call__
        if self.model.compiled is not None:  # for one shape: free rows take part, and nobody reads what they say
            forward = self.model.compiled
            positions, longest = positions + [0] * (self.max_rows - len(positions)), self.length
        rows = slice(0, len(positions))
        if self._view is None or self._view.length < longest:
            self._view = self._cache.view_with_adapters(rows, longest)
            if self.model.compiled is not None:
                self._view.keep_addresses()
        if self.model.compiled is not None:
            torch.compiler.cudagraph_mark_step_begin()
        at = torch.tensor(positions, device=self.model.device)[:, None]  # (B, 1)
        logits = forward(self._tokens[rows, None], cache=self._view, positions=at)
        return logits[: len(self.running), 0]

    def _position(self, number: int) -> int:
        """Where in its row the last token stands."""
        return len(self._requests[number].prompt) + self._generated[number] - 1

    def _sample(self, logits: Tensor, numbers: list[int]) -> tuple[Tensor, list[int]]:
        """A token (n) for each row, also as numbers; where there is none, `_errors` says why."""
        logits = logits.float()
        is_finite = logits.amax(-1).isfinite() & logits.amin(-1).isfinite()
        samplings = [self._requests[number].sampling for number in numbers]
        tokens = sample(logits.masked_fill_(~is_finite[:, None], 0), samplings)
        found = tokens.where(is_finite, -1).tolist()  # the only time that a step waits for the device
        for number, token in zip(numbers, found, strict=True):
            if token < 0 and number not in self._errors:
                cause = ": the values of the adapter, or its scale, are too large"
                has_adapter = self._requests[number].adapter is not None
                self._errors[number] = f"the model's logits are not finite{cause if has_adapter else ''}"
        return tokens, found

    def _event(self, number: int, token: int) -> Event:
        request = self._requests[number]
        if number in self._errors:
            return Event(number, None, "error", self._errors[number])
        if token in request.stop_ids:
            return Event(number, None, "stop")
        self._generated[number] += 1
        is_full = self._generated[number] == request.max_new_tokens or self._position(number) + 1 == self.length
        return Event(number, token, "length" if is_full else None)


def batch_adapters(adapters: Sequence[Adapter | None]) -> Adapter | None:
    """One adapter for a batch whose rows have these; if all rows have the same, it is that one."""
    return adapters[0] if all(adapter is adapters[0] for adapter in adapters) else PerRow(adapters)


def check_request(model: LLaMA, request: GenerationRequest) -> None:
    """Refuse a request that cannot be continued.

    Raises:
        ValueError: the prompt is empty, leaves no room in the model's window, or has a token that the model does not
            know; or a sampling option is out of range.
    """
    prompt, window, vocabulary = request.prompt, model.config.block_size, model.config.vocab_size
    if not prompt:
        raise ValueError("the prompt is empty: the model needs at least one token to continue")
    if len(prompt) >= window:
        raise ValueError(f"the prompt has {len(prompt)} tokens, the model's window is {window}: shorten the prompt")
    if not 0 <= min(prompt) <= max(prompt) < vocabulary:
        raise ValueError(f"the prompt has tokens from {min(prompt)} to {max(prompt)}, the model knows {vocabulary}")
    check_sampling(request.max_new_tokens, request.sampling)


def _describe(error: Exception) -> str:
    """An error in one line that is not too long."""
    text = textwrap.shorten(str(error), 300) or "no message"
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"
