"""A language model as a judge, behind any endpoint that speaks OpenAI's chat-completions API.

The endpoint and its key are those of the `openai` client: OPENAI_BASE_URL and OPENAI_API_KEY in the environment.
Every judgement is kept as a line of JSON as soon as it is there; those that are there are not asked for again.
"""

import hashlib
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from lit_llama.evaluation.answers import append_row, read_kept
from lit_llama.files import require_extra

CHARACTERS_PER_TOKEN = 4  # of English text, for estimates
# How endpoints say that a model does not take an option, and not that its value is too large.
_UNSUPPORTED = re.compile(
    r"unsupported|not support|not allowed|not permitted|unrecognized|unknown|unexpected|deprecated|only the default",
    re.I,
)


class Case(NamedTuple):
    """One thing to be judged once.

    Args:
        key: tells it from the others; part of the judgement's row.
        system: what the judge is told about its task.
        user: what it is to judge.
    """

    key: dict[str, Any]
    system: str
    user: str

    @property
    def identity(self) -> str:
        """Changes when the texts do, so that judgements of earlier answers are not taken for these."""
        return hashlib.sha256(repr((sorted(self.key.items()), self.system, self.user)).encode()).hexdigest()[:16]


class Judge(NamedTuple):
    """Who judges, and how patiently it is asked.

    Args:
        model: its name at the endpoint.
        temperature: randomness of its sampling; None leaves it to the endpoint, as does an endpoint's refusal.
        max_tokens: length of a judgement with the thoughts before it; sent as `max_completion_tokens` where an endpoint
            refuses `max_tokens`.
        workers: number of requests at once.
        requests_per_minute: number of requests that are sent in a minute at most; None sends them as answers come.
        timeout: number of seconds until a request is given up and tried again.
        retries: number of times that a failed or refused request is sent again, with growing pauses.
        attempts: number of attempts at a judgement that can be read; after those the case has none.
    """

    model: str
    temperature: float | None = 0.7
    max_tokens: int = 512
    workers: int = 4
    requests_per_minute: float | None = None
    timeout: float = 60.0
    retries: int = 6
    attempts: int = 3


def estimate(cases: Sequence[Case], path: Path, judge: Judge, input_price: float, output_price: float) -> str:
    """What judging will take in addition to what is there already, in words.

    Args:
        cases: to be judged.
        path: file of the judgements.
        judge: who judges.
        input_price: US dollars for a million tokens.
        output_price: likewise.
    """
    left = missing(cases, path, judge.model)
    tokens = sum(len(case.system) + len(case.user) for case in left) // CHARACTERS_PER_TOKEN
    longest = len(left) * judge.max_tokens
    text = f"{len(left)} requests ({len(cases) - len(left)} judgements are there), about {tokens:,} tokens to read, "
    text += f"at most {longest:,} to write"
    if input_price or output_price:
        text += f", at most ${(tokens * input_price + longest * output_price) / 1e6:.2f}"
    return text


def missing(cases: Sequence[Case], path: Path, model: str) -> list[Case]:
    """The cases without a judgement by that model."""
    there = {row["identity"] for row in read_kept(path) if row["judge"] == model and row["verdict"] is not None}
    return [case for case in cases if case.identity not in there]


def judge_all(
    cases: Sequence[Case], path: Path, judge: Judge, read: Callable[[str], Any]
) -> list[tuple[Case, Any | None]]:
    """Have cases judged, and keep every judgement.

    Args:
        cases: to be judged.
        path: file of the judgements; those that are there are used.
        judge: who judges.
        read: the verdict in what the judge says; None if there is none.

    Returns:
        Each case with its verdict, or None if none could be read.

    Raises:
        ValueError: the endpoint refuses, cannot be reached, or keeps failing.
    """
    left = missing(cases, path, judge.model)
    if left:
        _ask(left, path, judge, read)
    verdicts = {row["identity"]: row["verdict"] for row in read_kept(path) if row["judge"] == judge.model}
    return [(case, verdicts.get(case.identity)) for case in cases]


def _ask(cases: Sequence[Case], path: Path, judge: Judge, read: Callable[[str], Any]) -> None:
    openai: Any = require_extra("openai", "evaluate")
    if not os.environ.get("OPENAI_API_KEY"):
        raise ValueError("set OPENAI_API_KEY, and OPENAI_BASE_URL for another endpoint than OpenAI's; any key will do "
                         "for one that wants none")  # fmt: skip
    client = openai.OpenAI(timeout=judge.timeout, max_retries=judge.retries)
    pause = 60 / judge.requests_per_minute if judge.requests_per_minute else 0.0
    turn, next_at = threading.Lock(), time.monotonic()
    options: dict[str, Any] = {"max_tokens": judge.max_tokens}
    if judge.temperature is not None:
        options["temperature"] = judge.temperature

    def wait_for_turn() -> None:
        nonlocal next_at
        with turn:
            at = max(next_at, time.monotonic())
            next_at = at + pause
        time.sleep(max(0.0, at - time.monotonic()))

    def request(messages: list[dict[str, str]]) -> Any:
        nonlocal options
        while True:
            wait_for_turn()
            sent = options
            try:
                return client.chat.completions.create(model=judge.model, messages=messages, **sent)
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                accepted = _without_refused(sent, error)
                if accepted is None:
                    raise
                with turn:  # what one request has learned, the others need not
                    if options is sent:
                        options = accepted
                        [refused] = sent.keys() - accepted.keys()
                        say = f"{judge.model} refuses {refused}; options sent from now on: {', '.join(accepted)}"
                        tqdm.write(say, file=sys.stderr)

    def ask(case: Case) -> dict[str, Any]:
        text, verdict, tries = "", None, 0
        while verdict is None and tries < judge.attempts:
            reply = request([{"role": "system", "content": case.system}, {"role": "user", "content": case.user}])
            text = (reply.choices[0].message.content if reply.choices else None) or ""
            verdict, tries = read(text), tries + 1
        row = {**case.key, "verdict": verdict, "judgement": text, "judge": judge.model}
        return {**row, "identity": case.identity, "tstamp": time.time()}

    with ThreadPoolExecutor(judge.workers) as pool:
        asked = [pool.submit(ask, case) for case in cases]
        try:
            for done in tqdm(as_completed(asked), total=len(asked), desc="judgements", leave=False):
                append_row(path, done.result())
        except openai.APIStatusError as error:
            raise ValueError(f"{client.base_url}: status {error.status_code}, {_reason(error)}") from None
        except openai.APIConnectionError as error:  # time-outs too
            raise ValueError(f"{client.base_url} cannot be reached: {error.__cause__ or error}") from None
        finally:
            pool.shutdown(cancel_futures=True)


def _without_refused(options: dict[str, Any], error: Any) -> dict[str, Any] | None:
    """The options without the one that an endpoint refuses, under its other name if it has one; None if it is another.

    OpenAI's later models refuse `max_tokens`, and any temperature but their own.
    """
    said = _reason(error)
    named = error.param if error.param in options else None
    if named is None:  # not all endpoints say which; the first that is named, as the rest may be advice
        found = {name: match.start() for name in options if (match := re.search(rf"\b{name}\b", said))}
        named = min(found, key=found.__getitem__, default=None)
    if named is None or not (_UNSUPPORTED.search(said) or str(error.code).startswith("unsupported")):
        return None
    rest = {name: value for name, value in options.items() if name != named}
    if named == "temperature":
        return rest
    return {**rest, "max_completion_tokens": options[named]} if named == "max_tokens" else None


def _reason(error: Any) -> str:
    body = error.body if isinstance(error.body, dict) else {}
    return str(body.get("message") or error.message).splitlines()[0]
