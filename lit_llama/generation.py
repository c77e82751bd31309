"""Prefill, decode, sampling: one prompt or a padded batch of them, streamed as they come."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lit_llama.model import Adapter, KVCache, LLaMA
from lit_llama.prompts import PromptStyle
from lit_llama.tokenizer import Tokenizer


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
    prompts: Sequence[str],
    adapter: Adapter | None = None,
    *,
    max_new_tokens: int,
    batch_size: int,
    what: str = "answers",
) -> list[str]:
    """Answer prompts as text, greedily, some at once.

    Args:
        model: the base model.
        tokenizer: its tokenizer.
        style: turns prompts into text, and cuts responses out of it.
        prompts: what users say.
        adapter: beside the base model, if any.
        max_new_tokens: per answer; a longer one is cut.
        batch_size: prompts at once.
        what: of the progress bar.
    """
    texts: list[str] = []
    for i in tqdm(range(0, len(prompts), batch_size), desc=what, leave=False):
        ids = [tokenizer.encode(style.prompt(prompt), bos=style.bos) for prompt in prompts[i : i + batch_size]]
        rows = generate(model, ids, max_new_tokens, adapter=adapter, stop_ids=style.stop_ids)
        texts += [style.cut(tokenizer.decode(row)) for row in rows]
    return texts


@torch.no_grad()
def stream(
    model: LLaMA,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    adapter: Adapter | None = None,
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
        adapter: beside the base model, if any.
        stop_ids: tokens that end a row.
        temperature: 0 takes the likeliest token; larger is more random.
        top_k: sample among the k likeliest tokens only.
        top_p: sample among the likeliest tokens that hold this probability together.
        generator: source of randomness, on the model's device.

    Yields:
        The next token of each row, None for rows that have ended.

    Raises:
        ValueError: a prompt is empty or leaves no room in the window, or a sampling option is out of range.
    """
    check_prompts(model, prompts)
    check_sampling(max_new_tokens, temperature, top_k, top_p)
    window = model.config.block_size

    lengths = torch.tensor([len(prompt) for prompt in prompts], device=model.device)
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt)
    cache = KVCache(model.config, len(prompts), min(longest + max_new_tokens, window), model.device, model.dtype)

    last = torch.arange(longest, device=model.device) == lengths[:, None] - 1  # (B, T)
    logits = model(ids.to(model.device), adapter, logits_at=last, cache=cache)  # (B, V)
    positions = lengths
    running = [True] * len(prompts)
    for n in range(max_new_tokens):
        tokens = sample(logits, temperature, top_k, top_p, generator)  # (B,)
        for row, (token, position) in enumerate(zip(tokens.tolist(), positions.tolist(), strict=True)):
            running[row] = running[row] and token not in stop_ids and position < window
        if not any(running):
            return
        yield [token if on else None for token, on in zip(tokens.tolist(), running, strict=True)]
        if n + 1 < max_new_tokens:
            at = positions.clamp(max=cache.length - 1)[:, None]  # rows that have ended write where nobody reads
            logits = model(tokens[:, None], adapter, cache=cache, positions=at)[:, 0]
            positions = positions + 1


def check_prompts(model: LLaMA, prompts: Sequence[Sequence[int]]) -> None:
    """Refuse prompts that cannot be continued.

    Raises:
        ValueError: one is empty, or leaves no room in the model's window.
    """
    window = model.config.block_size
    for prompt in prompts:
        if not prompt:
            raise ValueError("the prompt is empty: the model needs at least one token to continue")
        if len(prompt) >= window:
            raise ValueError(f"the prompt has {len(prompt)} tokens, the model's window is {window}: shorten the prompt")


def check_sampling(max_new_tokens: int, temperature: float, top_k: int | None, top_p: float) -> None:
    """Refuse sampling options that are out of range.

    Raises:
        ValueError: one of them is; the message names it.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if temperature < 0:
        raise ValueError(f"temperature must not be negative, got {temperature}")
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
        temperature: 0 takes the likeliest.
        top_k: keep the k likeliest.
        top_p: keep the likeliest that hold this probability together (arXiv 1904.09751), at least one.
        generator: source of randomness.

    Returns:
        Token ids (B,).
    """
    if temperature == 0:
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
