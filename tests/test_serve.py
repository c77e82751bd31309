"""The server, live on loopback, asked by OpenAI's own client."""

import concurrent.futures
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager

import openai
import pytest
import torch
from conftest import ROOT, random_aligner

from lit_llama.checkpoint import load_adapter, load_base, save_adapter
from lit_llama.combine import Sum
from lit_llama.generation import generate
from lit_llama.prompts import Message, prompt_style
from lit_llama.tokenizer import Tokenizer

KEY = "a secret"
TEXTS = ["Count to 3.", "Hello there", "What is 2 + 2?"]


@contextmanager
def served(base_dir, aligner_dir, **options):
    """A running server's address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = {"checkpoint_dir": base_dir, "aligner_dir": aligner_dir, "port": port, **options}
    command = [sys.executable, ROOT / "generate" / "serve.py", *(f"--{k}={v}" for k, v in arguments.items())]
    process = subprocess.Popen(command, env={**os.environ, "ALIGNER_API_KEY": KEY, "OMP_NUM_THREADS": "1"})
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            assert process.poll() is None, "the server ended"
            try:
                urllib.request.urlopen(f"{url}/health").close()
                break
            except OSError:
                time.sleep(0.25)
        yield url
    finally:
        process.terminate()
        process.wait(60)


def client(url, **options):
    return openai.OpenAI(base_url=f"{url}/v1", max_retries=0, timeout=60, **{"api_key": KEY, **options})


@pytest.fixture(scope="module")
def aligner_dir(base_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("aligners")
    model = load_base(base_dir)
    for n in (1, 3):
        aligner = random_aligner(model.config, n, start_layer=n % 3, init_std=1.0)
        save_adapter(folder / "team" / f"{n}.safetensors", aligner, model, prompt_style="chat")
    (folder / "broken.safetensors").write_bytes(b"junk")
    return folder


@pytest.fixture(scope="module")
def url(base_dir, aligner_dir):
    with served(base_dir, aligner_dir, max_rows=4, max_waiting=8, max_length=200, max_body_bytes=20_000) as url:
        yield url


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


def test_many_at_once_are_what_each_is_alone(url, base_dir, aligner_dir):
    adapters = {"base": None} | {f"team/{n}": load_adapter(aligner_dir / f"team/{n}.safetensors") for n in (1, 3)}
    cases = [(name, text, scale) for name in adapters for text in TEXTS for scale in (1.0, -0.5)][:12]
    with concurrent.futures.ThreadPoolExecutor(len(cases)) as pool:
        asked = [pool.submit(ask, url, n, t, extra_body={"aligner_scale": s}) for n, t, s in cases]
        answers = [future.result().message.content for future in asked]
    for (name, text, scale), answer in zip(cases, answers, strict=True):
        adapter = None if name == "base" else Sum((adapters[name], scale))
        assert answer == expected(base_dir, user(text), adapter)
    assert len(set(answers)) > 4


def test_one_request_does_not_touch_another(url, base_dir, aligner_dir):
    """An Aligner that makes logits infinite gets an error of its own; a temperature next to zero is greedy."""
    model = load_base(base_dir)
    bad = random_aligner(model.config, 2)
    for values in bad.parameters():
        torch.nn.init.constant_(values, 3e38)
    save_adapter(aligner_dir / "bad.safetensors", bad, model)
    try:
        with concurrent.futures.ThreadPoolExecutor(12) as pool:
            good = [pool.submit(ask, url, "team/1", TEXTS[i % 3], temperature=1e-310) for i in range(9)]
            failing = [pool.submit(ask, url, "bad", text) for text in TEXTS]
            for future in failing:
                with pytest.raises(openai.APIStatusError, match="logits are not finite"):
                    future.result()
            answers = [future.result().message.content for future in good]
    finally:
        (aligner_dir / "bad.safetensors").unlink()
    adapter = load_adapter(aligner_dir / "team/1.safetensors")
    assert answers == 3 * [expected(base_dir, user(text), adapter) for text in TEXTS]


def test_conversations_and_streams(url, base_dir, aligner_dir):
    messages = [*user("One?"), {"role": "assistant", "content": "Two."}, *user("Three?")]
    adapter = load_adapter(aligner_dir / "team/3.safetensors")
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


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        ({"model": "nobody"}, 404, "no Aligner named 'nobody'"),
        ({"model": "../secret"}, 404, "no Aligner named"),
        ({"model": "broken"}, 404, "not a complete safetensors file"),
        ({"messages": user("word " * 300)}, 400, "tokens, 1 to 199 are accepted"),
        ({"messages": user("x" * 30_000)}, 413, "the body is larger than 20000 bytes"),
        ({"messages": []}, 400, "messages: List should have at least 1 item"),
        ({"messages": [{"role": "robot", "content": "x"}]}, 400, "role"),
        ({"temperature": -1}, 400, "temperature"),
        ({"n": 2}, 400, "n: Input should be 1"),
        ({"max_tokens": 0}, 400, "max_tokens"),
    ],
)
def test_what_cannot_be_answered_is_refused(url, options, status, message):
    with pytest.raises(openai.APIStatusError) as caught:
        client(url).chat.completions.create(**{"model": "base", "messages": user("x"), **options})
    assert caught.value.status_code == status
    assert message in caught.value.message


def test_malformed_bodies_and_wrong_keys(url):
    with pytest.raises(openai.AuthenticationError, match="wrong or missing API key"):
        client(url, api_key="another").models.list()
    request = urllib.request.Request(f"{url}/v1/chat/completions", b"{", {"Content-Type": "application/json"})
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request)
    assert caught.value.code == 400
    assert json.load(caught.value)["error"]["type"] == "invalid_request_error"


def test_files_that_come_change_and_vanish(url, base_dir, aligner_dir):
    file = aligner_dir / "new.safetensors"
    shutil.copy(aligner_dir / "team/1.safetensors", file)
    first = ask(url, "new", "Hello there").message.content
    assert first == expected(base_dir, user("Hello there"), load_adapter(file))
    assert "new" in [model.id for model in client(url).models.list()]
    shutil.copy(aligner_dir / "team/3.safetensors", file)
    assert ask(url, "new", "Hello there").message.content == (
        expected(base_dir, user("Hello there"), load_adapter(file))
    )
    file.write_bytes(b"junk")
    with pytest.raises(openai.NotFoundError, match="not a complete safetensors"):
        ask(url, "new", "x")
    file.unlink()
    with pytest.raises(openai.NotFoundError, match="no Aligner named"):
        ask(url, "new", "x")
    assert "new" not in [model.id for model in client(url).models.list()]


def test_clients_that_leave_make_room(url, base_dir):
    """More streams than there are rows and places to wait are begun and left; then there is room for others."""
    for _ in range(16):
        stream = client(url).chat.completions.create(model="base", messages=user("x"), temperature=0, stream=True)
        next(iter(stream))
        stream.close()
    assert ask(url, "base", "x").message.content == expected(base_dir, user("x"))


def test_a_full_queue_and_slow_requests(base_dir, aligner_dir):
    with served(base_dir, aligner_dir, max_rows=1, max_waiting=1, timeout=0.2) as url:
        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            asked = [pool.submit(ask, url, "base", "x", max_tokens=200) for _ in range(6)]
            statuses = sorted(
                getattr(future.exception(), "status_code", 200) for future in concurrent.futures.as_completed(asked)
            )
        assert set(statuses) <= {200, 429, 504}
        assert 429 in statuses
        assert ask(url, "base", "x", max_tokens=1).finish_reason in ("length", "stop")


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
