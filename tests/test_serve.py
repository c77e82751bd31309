"""The server, live on loopback, asked by OpenAI's own client."""

import asyncio
import concurrent.futures
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections import Counter
from contextlib import suppress

import openai
import pytest
import torch
import uvicorn
from conftest import ROOT, load_script, random_aligner

from lit_llama.adapters import METHODS, Companion, load_adapter, save_adapter
from lit_llama.checkpoint import load_base
from lit_llama.combine import WeightedSum
from lit_llama.generation import generate
from lit_llama.prompts import Message, prompt_style
from lit_llama.serving.access import Access, allowed_hosts
from lit_llama.serving.http import ApiError, Gate, _Connection, bind
from lit_llama.serving.requests import ChatRequest
from lit_llama.serving.store import AdapterStore
from lit_llama.serving.worker import Job, Rows, signals_held_back
from lit_llama.tokenizer import Tokenizer

KEY = "a secret"
TEXTS = ["Count to 3.", "Hello there", "What is 2 + 2?"]


class Server:
    """A running server, its address and what it has said on stderr."""

    def __init__(self, base_dir, adapter_dir, *more, until="ready at ", group=False, **options):
        arguments = {"checkpoint_dir": base_dir, "adapter_dir": adapter_dir, "port": 0, "precision": "32-true"}
        arguments |= options
        command = [sys.executable, ROOT / "generate" / "serve.py", *(f"--{k}={v}" for k, v in arguments.items()), *more]
        environment = {**os.environ, "ALIGNER_API_KEY": KEY, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=group
        )
        self.lines = [""]
        for line in self.process.stderr:
            self.lines.append(line)
            if until in line:
                break
        assert until in self.lines[-1], "".join(self.lines)
        self.url = self.lines[-1].split()[-1]
        self._reader = threading.Thread(target=lambda: self.lines.extend(self.process.stderr), daemon=True)
        self._reader.start()

    def wait(self):
        """Exit status and what was said, when all processes that can say something have ended."""
        status = self.process.wait(60)
        self._reader.join(60)
        assert not self._reader.is_alive(), "a process is left that holds stderr"
        return status, "".join(self.lines)


def end_by_sigterm(server):
    """Tell it to end until it has, which must be in order and without a traceback, however often it is told."""
    while server.process.poll() is None:
        server.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            server.process.wait(0.05)
    status, said = server.wait()
    assert status == 143
    assert "Traceback" not in said
    assert "leaked" not in said


def raw(url, *pieces, key=KEY, host=None, path="/v1/chat/completions", method="POST", length=None, **headers):
    """Status, headers and body of a request that is written by hand; the connection stays open for writing."""
    address = url.removeprefix("http://")
    authorization = f"Authorization: Bearer {key}\r\n" if key else ""
    length = sum(map(len, pieces)) if length is None else length
    fields = {"Content-Type": "application/json", "Content-Length": length}
    fields |= {name.replace("_", "-"): value for name, value in headers.items()}
    head = f"{method} {path} HTTP/1.1\r\nHost: {host or address}\r\n{authorization}"
    head += "".join(f"{name}: {value}\r\n" for name, value in fields.items()) + "\r\n"
    name, port = address.split(":")
    with socket.create_connection((name, int(port)), timeout=60) as connection:
        connection.sendall(head.encode())
        for piece in pieces:
            connection.sendall(piece)
        response = http.client.HTTPResponse(connection, method=method)
        response.begin()
        body = response.read()
    return response.status, response.headers, json.loads(body) if body else None


def post(url, body, **options):
    """Status and error object of a body."""
    status, _, answer = raw(url, json.dumps(body).encode(), **options)
    return status, answer.get("error")


def client(url, **options):
    return openai.OpenAI(base_url=f"{url}/v1", max_retries=0, timeout=60, **{"api_key": KEY, **options})


@pytest.fixture(scope="module")
def adapter_dir(base_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("aligners")
    model = load_base(base_dir)
    for n in (1, 3):
        aligner = random_aligner(model.config, n, start_layer=n % 3, init_std=1.0)
        save_adapter(folder / "team" / f"{n}.safetensors", aligner, model, prompt_style="chat")
    (folder / "broken.safetensors").write_bytes(b"junk")
    return folder


@pytest.fixture(scope="module")
def url(base_dir, adapter_dir):
    options = {"max_rows": 4, "max_waiting": 8, "max_length": 200, "max_body_bytes": 20_000}
    more = "--allowed_origin=http://localhost:3000", "--allowed_host=my-machine"
    server = Server(base_dir, adapter_dir, *more, **options)
    try:
        yield server.url
        stream = client(server.url).chat.completions.create(model="base", messages=user("x"), stream=True)
        next(iter(stream))  # it ends while an answer is on its way
        end_by_sigterm(server)
    finally:
        server.process.kill()


def expected(base_dir, messages, adapter=None, n=12):
    """What this project generates alone."""
    tokenizer = Tokenizer(base_dir)
    style = prompt_style("chat", tokenizer)
    text = style.render([Message(message["role"], message["content"]) for message in messages])
    [row] = generate(load_base(base_dir), [tokenizer.encode(text)], n, adapter=adapter, stop_ids=style.stop_ids)
    return style.cut(tokenizer.decode(row))


def user(text):
    return [{"role": "user", "content": text}]


def ask(url, model, text, **options):
    options = {"temperature": 0, "max_tokens": 12, **options}
    return client(url).chat.completions.create(model=model, messages=user(text), **options).choices[0]


def test_models_are_the_files(url):
    assert [model.id for model in client(url).models.list()] == ["base", "team/1", "team/3"]


def test_many_at_once_are_what_each_is_alone(url, base_dir, adapter_dir):
    adapters = {"base": None} | {f"team/{n}": load_adapter(adapter_dir / f"team/{n}.safetensors") for n in (1, 3)}
    cases = [(name, text, scale) for name in adapters for text in TEXTS for scale in (1.0, -0.5)][:12]
    with concurrent.futures.ThreadPoolExecutor(len(cases)) as pool:
        asked = [pool.submit(ask, url, n, t, extra_body={"aligner_scale": s}) for n, t, s in cases]
        answers = [future.result().message.content for future in asked]
    for (name, text, scale), answer in zip(cases, answers, strict=True):
        adapter = None if name == "base" else WeightedSum((adapters[name], scale))
        assert answer == expected(base_dir, user(text), adapter)
    assert len(set(answers)) > 4


def test_adapters_of_all_methods_in_one_batch(url, base_dir, adapter_dir):
    """An adapter of each method and the base at once, each as it answers alone."""
    model = load_base(base_dir)
    adapters = {name: method(model.config) for name, method in METHODS.items()}
    for method, adapter in adapters.items():
        for parameter in adapter.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        save_adapter(adapter_dir / f"run-{method}/{method}.safetensors", adapter, model, prompt_style="chat")
    try:
        names = ["base", *(f"run-{method}" for method in adapters)]
        assert set(names) <= {model.id for model in client(url).models.list()}
        cases = [(name, scale) for name in names for scale in (1.0, 0.5)]
        with concurrent.futures.ThreadPoolExecutor(len(cases)) as pool:
            asked = [pool.submit(ask, url, n, "Hello there", extra_body={"adapter_scale": s}) for n, s in cases]
            answers = [future.result().message.content for future in asked]
    finally:
        for method in adapters:
            shutil.rmtree(adapter_dir / f"run-{method}")
    for (name, scale), answer in zip(cases, answers, strict=True):
        adapter = WeightedSum((adapters[name.removeprefix("run-")], scale)) if name != "base" else None
        assert answer == expected(base_dir, user("Hello there"), adapter), name
    assert len(set(answers)) > len(adapters)


def test_the_scale_has_two_names():
    assert ChatRequest(messages=user("x"), aligner_scale=0.5).adapter_scale == 0.5
    assert ChatRequest(messages=user("x"), adapter_scale=0.5).adapter_scale == 0.5
    with pytest.raises(ApiError, match="two names of one field"):
        ChatRequest(messages=user("x"), adapter_scale=0.5, aligner_scale=0.5)


def test_one_request_does_not_touch_another(url, base_dir, adapter_dir):
    """An Aligner that makes logits infinite gets an error of its own; a temperature next to zero is greedy."""
    model = load_base(base_dir)
    bad = random_aligner(model.config, 2)
    for values in bad.parameters():
        torch.nn.init.constant_(values, 3e38)
    save_adapter(adapter_dir / "bad.safetensors", bad, model)
    try:
        with concurrent.futures.ThreadPoolExecutor(12) as pool:
            good = [pool.submit(ask, url, "team/1", TEXTS[i % 3], temperature=1e-310) for i in range(9)]
            failing = [pool.submit(ask, url, "bad", text) for text in TEXTS]
            for future in failing:
                with pytest.raises(openai.APIStatusError, match="logits are not finite"):
                    future.result()
            answers = [future.result().message.content for future in good]
    finally:
        (adapter_dir / "bad.safetensors").unlink()
    adapter = load_adapter(adapter_dir / "team/1.safetensors")
    assert answers == 3 * [expected(base_dir, user(text), adapter) for text in TEXTS]


def test_conversations_and_streams(url, base_dir, adapter_dir):
    messages = [*user("Count."), {"role": "assistant", "content": "Two."}, *user("Why?")]
    adapter = load_adapter(adapter_dir / "team/3.safetensors")
    stream = client(url).chat.completions.create(
        model="team/3",
        messages=messages,
        temperature=0,
        max_tokens=12,
        stream=True,
        stream_options={"include_usage": True},
    )
    *chunks, last, usage = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == expected(base_dir, messages, adapter)
    assert len(chunks) > 3
    assert last.choices[0].finish_reason == "length"
    assert usage.usage.completion_tokens == 12


def test_completions_continue_a_text_as_it_stands(url, base_dir):
    tokenizer = Tokenizer(base_dir)
    [row] = generate(load_base(base_dir), [tokenizer.encode("Once upon")], 8, stop_ids=tokenizer.stop_ids)
    options = {"model": "base", "prompt": "Once upon", "temperature": 0, "max_tokens": 8}
    assert client(url).completions.create(**options).choices[0].text == tokenizer.decode(row)
    streamed = client(url).completions.create(**options, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == tokenizer.decode(row)


def test_seeds_and_stops(url, base_dir):
    sampled = [ask(url, "base", "x", temperature=1.5, seed=seed).message.content for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]
    whole = ask(url, "base", "x").message.content
    stop = whole[4:6]
    cut = ask(url, "base", "x", stop=[stop])
    assert cut.message.content == whole[: whole.index(stop)]
    assert cut.finish_reason == "stop"


def test_what_cannot_be_answered_is_refused(url):
    """By an error object of OpenAI's, which names the field; other requests do not notice."""
    turn = {"role": "user", "content": "x"}
    deep = "[" * 15_000
    cases = [
        ({"model": "nobody"}, 404, "no adapter named 'nobody'"),
        ({"model": "tem/1"}, 404, "team/1"),
        ({"model": "../secret"}, 404, "no adapter named"),
        ({"model": "broken"}, 404, "not a complete safetensors file"),
        ({"model": "x" * 300}, 404, "no adapter named"),
        ({"model": "x" * 3000}, 400, "model: String should have at most"),
        ({"model": "\ud800"}, 400, "model"),
        ({"messages": user("word " * 300)}, 400, "tokens, 1 to 199 are accepted"),
        ({"messages": user("x" * 30_000)}, 413, "the body is larger than 20000 bytes"),
        ({"messages": user("a \ud800 b")}, 400, "not UTF-8"),
        ({"messages": []}, 400, "messages: List should have at least 1 item"),
        ({"messages": [{"role": "robot", "content": "x"}]}, 400, "role"),
        ({"messages": [{"role": "user", "content": None}]}, 400, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "'image_url' are not supported"),
        ({"messages": [turn, {"role": "tool", "content": "Nile"}]}, 400, "tools are not supported"),
        ({"messages": [turn, {"role": "assistant", "tool_calls": [{"id": "1"}]}]}, 400, "tools are not supported"),
        ({"messages": [{**turn, "audio": {"id": "1"}}]}, 400, "'audio' of a turn is not supported"),
        ({"temperature": -1}, 400, "temperature"),
        ({"temperature": float("nan")}, 400, "temperature"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"stop": list("abcde")}, 400, "stop: List should have at most 4 items"),
        ({"stop": "x" * 1000}, 400, "stop.0: String should have at most 256 characters"),
        ({"temprature": 0.5}, 400, "unknown field 'temprature'; did you mean 'temperature'"),
        ({"a \ud800": 0.5}, 400, "unknown field"),
        ({"stream_options": {"usage": True}}, 400, "unknown field 'usage'"),
        ([], 400, "dictionary or object"),
    ]
    for options, status, message in cases:
        body = {"model": "base", "messages": [turn], **options} if isinstance(options, dict) else options
        found, error = post(url, body)
        assert (found, sorted(error)) == (status, ["code", "message", "param", "type"]), options
        assert message in error["message"], options
        assert error["type"] == "invalid_request_error"
        assert "/tmp" not in error["message"]
    for body in ("{", deep, f'{{"messages": {deep}', "\xff", "1" * 5000, ""):
        status, _, answer = raw(url, body.encode("latin-1"))
        assert (status, answer["error"]["type"]) == (400, "invalid_request_error"), body[:20]
    status, _, answer = raw(url, b"a=b", Content_Type="application/x-www-form-urlencoded")
    assert (status, answer["error"]["message"]) == (400, "the body must be JSON, and its Content-Type application/json")


@pytest.mark.parametrize(
    ("name", "nothing", "something"),
    [
        ("tools", [], [{"type": "function"}]),
        ("tool_choice", "none", "required"),
        ("functions", [], [{"name": "f"}]),
        ("response_format", {"type": "text"}, {"type": "json_object"}),
        ("logprobs", False, True),
        ("logprobs", False, 0),
        ("top_logprobs", 0, 2),
        ("logit_bias", {}, {"504": -100}),
        ("frequency_penalty", 0, 1.5),
        ("presence_penalty", 0.0, -1),
        ("repetition_penalty", 1.0, 1.2),
        ("n", 1, 2),
        ("n", None, True),
        ("best_of", 1, 3),
        ("echo", False, True),
        ("suffix", "", "the end"),
        ("modalities", ["text"], ["text", "audio"]),
        ("min_p", 0, 0.1),
    ],
)
def test_what_is_asked_and_not_done_is_refused_by_name(url, name, nothing, something):
    body = {"model": "base", "messages": user("x"), "max_tokens": 1}
    assert post(url, {**body, name: nothing})[0] == 200
    status, error = post(url, {**body, name: something})
    assert (status, error["param"], error["code"]) == (400, name, "unsupported_parameter")
    assert error["message"] == f"{name} is not supported by this server"


def test_ordinary_clients_are_served(url, base_dir):
    """Texts as parts, other names of roles, null and "off" as others write them."""
    messages = [{"role": "system", "content": "Be brief."}, *user("Count to 3.")]
    wanted = expected(base_dir, messages)

    def said(messages, **options):
        options = {"model": "base", "temperature": 0, "max_tokens": 12, **options}
        status, _, answer = raw(url, json.dumps({"messages": messages, **options}).encode())
        assert status == 200, answer
        return answer["choices"][0]["message"]["content"]

    parts = [{"type": "text", "text": "Count "}, {"type": "text", "text": "to 3."}]
    assert said([{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}]) == wanted
    echoed = {"role": "assistant", "content": None, "tool_calls": None, "refusal": None, "annotations": []}
    empty = expected(base_dir, [*messages, {"role": "assistant", "content": ""}, *user("x")])
    assert said([*messages, echoed, {**user("x")[0], "name": "me"}]) == empty
    nulls = dict.fromkeys(["top_p", "n", "stream", "stop", "seed", "top_k", "stream_options", "tools", "logprobs"])
    assert said(messages, **nulls) == wanted
    assert said(messages, user="me", metadata={"a": "b"}, store=False, top_k=0) == wanted
    assert said(messages, temperature=2, top_p=0, top_k=-1) == wanted
    assert said(messages, temperature=1e-310) == wanted
    assert said(messages, stop=[]) == wanted
    long = said(messages, max_tokens=-1)
    assert long.startswith(wanted)
    assert len(long) > len(wanted)
    answer = client(url).completions.create(model="base", prompt=["Once upon"], temperature=0, max_tokens=2)
    assert answer.choices[0].text


def test_paths_and_methods(url):
    assert client(url).models.retrieve("team/3").id == "team/3"
    with pytest.raises(openai.NotFoundError, match=r"team/33.*team/3\b"):
        client(url).models.retrieve("team/33")
    status, _, body = raw(url, path="/health", method="HEAD", key=None)
    assert (status, body) == (200, None)
    for method, path, status in [
        ("GET", "/nowhere", 404),
        ("PUT", "/v1/models", 405),
        ("GET", "/v1/chat/completions", 405),
        ("GET", "/docs", 404),
        ("GET", "/redoc", 404),
        ("GET", "/openapi.json", 404),
        ("GET", "/info", 404),
        ("GET", "/v1/models/", 404),
        ("GET", f"/v1/models/{'x' * 3000}", 404),
    ]:
        found, _, body = raw(url, method=method, path=path)
        assert (found, body["error"]["type"]) == (status, "invalid_request_error"), path
        assert raw(url, method=method, path=path, key=None)[0] == 401  # what there is, is for those with the key


def test_the_key_comes_before_the_body(url):
    """Who has none is told so before anything is sent that it is not to be read."""
    with pytest.raises(openai.AuthenticationError, match="wrong or missing API key"):
        client(url, api_key="another").models.list()
    for key in (None, "another", "\xe4"):
        status, headers, body = raw(url, key=key, length=1_000)
        assert (status, body["error"]["code"], headers["connection"]) == (401, "invalid_api_key", "close")
    status, _, body = raw(url, b"{", length=1_000_000_000)
    assert (status, body["error"]["message"]) == (413, "the body is larger than 20000 bytes")


def test_hosts_and_origins(url):
    """Web pages reach the server only if they are its own or allowed, under whatever name they call it."""
    port = url.rpartition(":")[2]
    for host in (f"localhost:{port}", f"LOCALHOST.:{port}", "[::1]", "my-machine", f"127.0.0.1:{port}"):
        assert raw(url, path="/v1/models", method="GET", host=host)[0] == 200, host
    for host in (
        "evil.example",
        f"evil.example:{port}",
        "localhost.evil.example",
        "10.0.0.1",
        "localhost@evil",
        "[::1",
    ):
        status, _, body = raw(url, path="/health", method="GET", host=host)
        assert (status, body["error"]["code"]) == (403, "host_not_allowed"), host
    page = "http://localhost:3000"
    asks = {"Access_Control_Request_Method": "POST", "Access_Control_Request_Headers": "authorization, content-type"}
    status, headers, _ = raw(url, method="OPTIONS", key=None, Origin=page, **asks)
    assert (status, headers["access-control-allow-origin"]) == (204, page)
    assert headers["access-control-allow-headers"] == "authorization, content-type"
    for key, status in ((KEY, 200), ("another", 401)):
        found, headers, _ = raw(url, path="/v1/models", method="GET", key=key, Origin=page)
        assert (found, headers["access-control-allow-origin"], headers["vary"]) == (status, page, "Origin")
    assert raw(url, path="/v1/models", method="GET", Origin=url)[0] == 200
    for origin in ("http://evil.example", "null", "http://[", "http://localhost:3001"):
        status, headers, body = raw(url, path="/health", method="GET", key=None, Origin=origin)
        assert (status, body["error"]["code"]) == (403, "origin_not_allowed")
        assert "access-control-allow-origin" not in headers


def test_any_address_and_wildcards():
    def allows(header, host, *more):
        access = Access(None, frozenset(), *allowed_hosts(host, list(more)), frozenset(), 1, 1.0)
        return Gate(None, access)._is_allowed_host(header)

    assert allows("192.168.0.7:8000", "0.0.0.0")
    assert allows("[fe80::1]", "::")
    assert allows("[fe80::1]:8000", "fe80::1")
    assert allows("anything", "127.0.0.1", "*")
    assert not allows("evil.example", "0.0.0.0")
    assert not allows("192.168.0.7", "127.0.0.1")
    assert not allows("", "0.0.0.0")


def test_connections_without_a_request_are_closed(monkeypatch):
    """A header that does not come, or not whole, in a first request or a later one, alone or with the one before."""
    monkeypatch.setattr("lit_llama.serving.http.HEAD_SECONDS", 0.01)

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    async def last_bytes(*pieces):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for piece in pieces:
            writer.write(piece)
            if piece == whole:
                await reader.readuntil(b"ok")
        return await asyncio.wait_for(reader.read(), 60)

    async def main():
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server.serve([listener]))
        while not server.started:
            await asyncio.sleep(0)
        answers = [
            await last_bytes(),
            await last_bytes(b"GET / HT"),
            await last_bytes(whole, b"GET"),
            await last_bytes(whole + b"GET"),
        ]
        server.should_exit = True
        await serving
        return answers

    whole = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
    config = uvicorn.Config(app, http=_Connection, ws="none", lifespan="off", log_config=None, timeout_keep_alive=1)
    listener, address = bind("127.0.0.1", 0)
    port = int(address.rpartition(":")[2])
    *rest, answered = asyncio.run(main())
    assert rest == [b""] * 3
    assert answered.endswith(b"ok")


def test_files_that_come_change_and_vanish(url, base_dir, adapter_dir):
    file = adapter_dir / "new.safetensors"
    shutil.copy(adapter_dir / "team/1.safetensors", file)
    first = ask(url, "new", "Hello there").message.content
    assert first == expected(base_dir, user("Hello there"), load_adapter(file))
    assert "new" in [model.id for model in client(url).models.list()]
    shutil.copy(adapter_dir / "team/3.safetensors", file)
    assert ask(url, "new", "Hello there").message.content == (
        expected(base_dir, user("Hello there"), load_adapter(file))
    )
    file.write_bytes(b"junk")
    with pytest.raises(openai.NotFoundError, match="not a complete safetensors"):
        ask(url, "new", "x")
    file.unlink()
    with pytest.raises(openai.NotFoundError, match="no adapter named"):
        ask(url, "new", "x")
    assert "new" not in [model.id for model in client(url).models.list()]


def test_clients_that_leave_make_room(url, base_dir):
    """More streams than there are rows and places to wait are begun and left; then there is room for others."""
    for _ in range(16):
        stream = client(url).chat.completions.create(model="base", messages=user("x"), temperature=0, stream=True)
        next(iter(stream))
        stream.close()
    assert ask(url, "base", "x").message.content == expected(base_dir, user("x"))


@pytest.fixture(scope="module")
def small_server(base_dir, adapter_dir):
    server = Server(base_dir, adapter_dir, max_rows=1, max_waiting=1, timeout=0.2, docs=True)
    yield server
    server.process.kill()


def test_a_full_queue_and_slow_requests(small_server):
    url = small_server.url
    statuses = set()
    while 429 not in statuses:  # who comes while two others are being answered, or wait, which they do not for long
        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            asked = [pool.submit(ask, url, "base", "x", max_tokens=200) for _ in range(6)]
            ended = concurrent.futures.as_completed(asked)
            statuses |= {getattr(future.exception(), "status_code", 200) for future in ended}
    assert statuses <= {200, 429, 504}
    status, _, body = raw(url, b"{", length=1_000)
    assert (status, body["error"]["message"]) == (408, "the body did not come within 0.2 seconds")
    for path in ("/openapi.json", "/docs"):
        with urllib.request.urlopen(url + path) as response:
            assert response.status == 200
    status, _, described = raw(url, path="/openapi.json", method="GET", key=None)
    assert (status, described["paths"]["/v1/models"].keys()) == (200, {"get"})
    for path in ("/v1/models", "/v1/models/base"):
        assert raw(url, path=path, method="HEAD")[0] == 200


def test_the_servers_temperature_is_that_of_requests_that_do_not_say():
    def temperature(**options):
        return ChatRequest(messages=user("x"), **options).sampling(0.25)["temperature"]

    assert temperature() == temperature(temperature=None) == 0.25
    assert (temperature(temperature=1), temperature(temperature=0)) == (1, 0)
    assert temperature(temperature=1, top_p=0) == 0


def test_sigterm_ends_it_while_the_model_is_loaded(base_dir, adapter_dir):
    """While an answer is on its way, it ends the server of the other tests."""
    server = Server(base_dir, adapter_dir, until="the model is being loaded")
    assert server.lines[1].startswith("warning: broken cannot be used: broken.safetensors is not a complete")
    assert server.lines[-1].startswith(f"2 adapters in {adapter_dir}, and 1 that cannot be used; ")
    end_by_sigterm(server)


def test_a_warning_is_one_line_though_two_processes_open_the_adapters(base_dir, tmp_path):
    model = load_base(base_dir)
    also = [Companion("style", "0" * 16, 0.5)]
    save_adapter(tmp_path / "top.safetensors", random_aligner(model.config, 1), model, also=also)
    server = Server(base_dir, tmp_path)
    said = [line for line in server.lines if "on top of" in line or "Warning" in line]
    end_by_sigterm(server)
    assert len(said) == 1
    assert said[0].startswith(f"warning: {tmp_path / 'top.safetensors'}")


def test_a_signal_waits_until_the_worker_has_started():
    """Whichever thread the system hands it to; a worker whose pipe breaks while it begins prints a traceback."""
    came = []
    before = signal.signal(signal.SIGTERM, lambda number, _: came.append(number))
    idle = threading.Event()
    other = threading.Thread(target=idle.wait)
    other.start()
    try:
        with signals_held_back():
            os.kill(os.getpid(), signal.SIGTERM)
            for _ in range(10_000):  # handlers run between two steps of the interpreter
                assert not came
        assert came == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)
        idle.set()
        other.join()


def test_ctrl_c_ends_it_once(base_dir, adapter_dir):
    """It goes to both processes."""
    server = Server(base_dir, adapter_dir, group=True)
    os.killpg(server.process.pid, signal.SIGINT)
    status, said = server.wait()
    assert (status, said.splitlines()[-1]) == (130, "interrupted")
    assert "Traceback" not in said


def test_no_process_outlives_the_other(small_server, base_dir, adapter_dir):
    """Whichever is killed: what holds stderr after that would keep `wait` from returning."""
    small_server.process.kill()
    assert small_server.wait()[0] == -signal.SIGKILL

    server = Server(base_dir, adapter_dir)
    listing = subprocess.run(
        ["ps", "-ww", "-o", "pid=,args=", "--ppid", str(server.process.pid)], capture_output=True, text=True
    ).stdout
    [worker] = [int(line.split()[0]) for line in listing.splitlines() if "spawn_main" in line]
    os.kill(worker, signal.SIGKILL)
    status, said = server.wait()
    assert status == 1
    assert said.splitlines()[-1].startswith("error: the model is gone: its process was killed by signal 9")
    assert "Traceback" not in said


def test_what_cannot_be_served_is_said_at_the_start(base_dir, adapter_dir, tmp_path, command):
    """A template that fails, a port that another program has: before a model is loaded."""
    folder = tmp_path / "base"
    shutil.copytree(base_dir, folder)
    (folder / "chat_template.jinja").write_text("{{ nothing.at.all }}")
    status, _, said = command("generate/serve.py", checkpoint_dir=folder, adapter_dir=adapter_dir, port=0)
    assert (status, len(said.splitlines())) == (1, 1)
    assert said.startswith("error: the model's chat template failed")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, _, said = command("generate/serve.py", checkpoint_dir=base_dir, adapter_dir=adapter_dir, port=port)
    assert (status, len(said.splitlines())) == (1, 1)
    assert said.startswith(f"error: cannot listen on 127.0.0.1, port {port}")


def test_a_failing_step_ends_its_rows_alone(base_dir, adapter_dir, capsys):
    """What no row alone has caused, such as missing memory, ends those that run; the next ones are answered."""
    model = load_base(base_dir)
    rows = Rows(model, AdapterStore(adapter_dir, model), 2, 50)
    options = {"max_new_tokens": 3, "stop_ids": frozenset()}
    for number in range(3):
        rows.take(number, Job([5, 6, 7], None, 1.0, 0, options))
    rows.take(9, Job([5, 6, 7], "nobody", 1.0, 0, options))
    rows.step()
    rows.step()  # two run, one waits
    rows._decoder._tokens = None  # any damage will do
    failed = dict(rows.step())
    assert sorted(failed) == [0, 1]
    assert {(said.status, said.error) for said in failed.values()} == {
        (500, "the model failed (TypeError); the server's log says more")
    }
    assert "TypeError" in capsys.readouterr().err
    said = []
    while rows.busy:
        said += rows.step()
    assert [one.token for number, one in said if number == 2] == generate(model, [[5, 6, 7]], 3)[0]
    assert [(one.status, "nobody" in one.error) for number, one in said if number == 9] == [(400, True)]


def test_the_benchmark_asks_each_model_in_its_turn(url, monkeypatch, capsys):
    """With a scale of 0 all answer as the base does; otherwise each answer is that of the same request alone."""
    monkeypatch.setenv("ALIGNER_API_KEY", KEY)
    benchmark = load_script("benchmarks/serving.py")
    asked, ask = [], benchmark.ask
    monkeypatch.setattr(benchmark, "ask", lambda url, body: asked.append(body) or ask(url, body))
    options = {"url": url, "clients": 3, "max_tokens": 4, "models": 3}
    benchmark.main(requests=9, compare=False, adapter_scale=0, **options)
    assert Counter(body["model"] for body in asked) == {"base": 3, "team/1": 3, "team/3": 3}
    assert all(body.get("adapter_scale") == (None if body["model"] == "base" else 0) for body in asked)
    benchmark.main(requests=40, **options)
    out = capsys.readouterr().out
    assert "36 requests" in out
    assert "40 of 40 answers equal the same request alone" in out


def test_the_page(url, base_dir):
    """In headless Chromium, where it and playwright are installed."""
    playwright = pytest.importorskip("playwright.sync_api")
    executable = shutil.which("chromium") or pytest.skip("no chromium")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(url)
        page.wait_for_selector("#keyed", state="visible")
        page.fill("#key", KEY)
        page.press("#key", "Tab")
        page.wait_for_selector("select option[value='team/3']", state="attached")
        for i, name in enumerate(("base", "team/1", "team/3")):
            page.locator("section select").nth(i).select_option(name)
        page.fill("#prompt", "Hello there")
        page.fill("#length", "12")
        page.click("#go")
        page.wait_for_function("[...document.querySelectorAll('section small')].every(note => note.textContent)")
        answers = [output.text_content() for output in page.locator("output").all()]
        browser.close()
    assert answers[0] == expected(base_dir, user("Hello there"))
    assert len(set(answers)) > 1
