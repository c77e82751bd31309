"""Many clients at once against one server on this machine: is each answer what it is alone, and how fast are they?

    python generate/serve.py --adapter_dir out
    python benchmarks/serving.py
    python benchmarks/serving.py --clients 97 --requests 1000 --seconds 300
    python benchmarks/serving.py --clients 1000 --requests 1000 --models 1000 --compare false --adapter_scale 0

The questions are put to each of the server's models, greedily, sampled with a seed, and streamed. Each is first asked
alone. Then clients ask the models in turns, each client its next question, drawn at random, as soon as it has its
answer. It ends after a number of requests or of seconds, whichever comes first, with exit status 1 if an answer
differed from the one alone.
"""

import ipaddress
import json
import os
import random
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from lit_llama.script.command_line import run

QUESTIONS = ["Why is the sky blue?", "Name one river.", "What is 7 times 8?", "Tell me a story about a lamp."]
KINDS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0.8, "seed": 1, "top_p": 0.9},
    {"temperature": 0, "stream": True, "stream_options": {"include_usage": True}},
]


class Reply(NamedTuple):
    """What came back: the status, 0 if nothing did, the answer and its number of tokens."""

    status: int
    text: str = ""
    tokens: int = 0


def main(
    url: str = "http://127.0.0.1:8000",
    clients: int = 16,
    requests: int = 200,
    seconds: float = 120.0,
    max_tokens: int = 32,
    models: int = 4,
    compare: bool = True,
    adapter_scale: float = 1.0,
    seed: int = 1337,
) -> None:
    """Measure.

    Args:
        url: address of the server, which must be on this machine.
        clients: number of clients at once; no more than the server lets wait, or some are refused with status 429.
        requests: after this number of them it ends.
        seconds: after this time no more requests are sent.
        max_tokens: longest answer, in tokens.
        models: number of the server's models that are asked, the base among them.
        compare: ask each alone first, and compare the answers; otherwise only the speed is measured.
        adapter_scale: what adapters are multiplied by. At 0 all say what the base says, so that speeds with and without
            them, and with many of them, are those of the same tokens.
        seed: seed of the order.
    """
    check_loopback(url)
    for name, value in {"clients": clients, "requests": requests, "seconds": seconds, "models": models}.items():
        if value <= 0:
            raise ValueError(f"--{name} is {value}, it must be more than 0")
    with urllib.request.urlopen(to(url, "/v1/models"), timeout=60) as response:
        names = [model["id"] for model in json.load(response)["data"]][:models]
    scaled = {name: {} if name == "base" else {"adapter_scale": adapter_scale} for name in names}
    bodies = [
        {"model": name, "messages": [{"role": "user", "content": question}], "max_tokens": max_tokens, **kind, **scale}
        for question in QUESTIONS
        for kind in KINDS
        for name, scale in scaled.items()
    ]
    deadline = time.monotonic() + seconds
    alone: list[Reply] = []
    if compare:
        started = time.perf_counter()
        for body in bodies:
            if time.monotonic() > deadline or len(alone) == requests:
                break
            alone.append(ask(url, body))
            if alone[-1].status != 200:
                raise ValueError(f"status {alone[-1].status} for a request alone: {alone[-1].text or 'no answer'}")
        print(speed("one at a time", alone, time.perf_counter() - started))
        bodies = bodies[: len(alone)]
    draw, asked = random.Random(seed), min(len(names), len(bodies))
    order = [draw.choice(range(i % asked, len(bodies), len(names))) for i in range(requests)]  # each model in its turn
    started = time.perf_counter()
    replies = ask_together(url, bodies, order, clients, deadline)
    print(speed(f"{clients} clients", [reply for _, reply in replies], time.perf_counter() - started))
    statuses = Counter(reply.status for _, reply in replies)
    others = ", ".join(f"{count} x {status or 'none'}" for status, count in sorted(statuses.items()) if status != 200)
    if others:
        print(f"other statuses: {others}")
    if compare:
        equal = sum(reply.status == 200 and reply.text == alone[i].text for i, reply in replies)
        print(f"{equal} of {statuses[200]} answers equal the same request alone")
        if equal < statuses[200]:
            raise ValueError(
                "answers differ from the same requests alone; in bfloat16 some do, as rounding depends on the batch: "
                "start the server with --precision 32-true to compare"
            )


def check_loopback(url: str) -> None:
    """Make sure that a load test meets this machine alone.

    Raises:
        ValueError: the address is another's.
    """
    host = urlsplit(url).hostname or ""
    try:
        is_loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_loopback = False
    if not is_loopback:
        raise ValueError(
            f"--url is {url}: only servers on this machine are put under load, such as http://127.0.0.1:8000"
        )


def ask_together(
    url: str, bodies: list[dict[str, Any]], order: list[int], clients: int, deadline: float
) -> list[tuple[int, Reply]]:
    """Ask from many threads until there is nothing left to ask, or no time.

    Args:
        url: address of the server.
        bodies: the requests.
        order: numbers of those to send, one after the other.
        clients: threads.
        deadline: on the monotonic clock, after which nothing is sent.

    Returns:
        Number and reply of each that was sent.
    """
    left = iter(order)
    lock = threading.Lock()
    replies: list[tuple[int, Reply]] = []

    def work() -> None:
        while time.monotonic() < deadline:
            with lock:
                number = next(left, None)
            if number is None:
                return
            reply = ask(url, bodies[number])
            with lock:
                replies.append((number, reply))

    threads = [threading.Thread(target=work, daemon=True) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return replies


def ask(url: str, body: dict[str, Any]) -> Reply:
    """Send one request, read the whole answer."""
    try:
        with urllib.request.urlopen(to(url, "/v1/chat/completions", body), timeout=300) as response:
            if not body.get("stream"):
                answer = json.load(response)
                return Reply(200, answer["choices"][0]["message"]["content"], answer["usage"]["completion_tokens"])
            text, tokens = "", 0
            for line in response:
                data = line.decode().strip().removeprefix("data: ")
                if not data or data == "[DONE]":
                    continue
                event = json.loads(data)
                if "error" in event:
                    return Reply(500, event["error"]["message"])
                text += "".join(choice["delta"].get("content", "") for choice in event["choices"])
                tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
            return Reply(200, text, tokens)
    except urllib.error.HTTPError as error:
        return Reply(error.code, error.read().decode(errors="replace"))
    except OSError as error:
        return Reply(0, str(error))


def to(url: str, path: str, body: dict[str, Any] | None = None) -> urllib.request.Request:
    """A request with the key of the environment, as the server takes it from there."""
    headers = {"Content-Type": "application/json"}
    if os.environ.get("ALIGNER_API_KEY"):
        headers["Authorization"] = f"Bearer {os.environ['ALIGNER_API_KEY']}"
    return urllib.request.Request(url + path, json.dumps(body).encode() if body else None, headers)


def speed(what: str, replies: list[Reply], seconds: float) -> str:
    """A line about some replies."""
    tokens = sum(reply.tokens for reply in replies)
    return f"{what}: {len(replies)} requests, {tokens} tokens, {tokens / seconds:.1f} tokens/s"


if __name__ == "__main__":
    run(main)
