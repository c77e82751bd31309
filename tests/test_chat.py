"""A conversation in the terminal, by standard input and by a pseudo-terminal."""

import fcntl
import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios

import pytest
from conftest import ROOT, random_aligner

from lit_llama.adapters import save_adapter
from lit_llama.base import Base, open_base
from lit_llama.checkpoint import load_base
from lit_llama.prompts import Message

SCRIPT = "generate/chat.py"


@pytest.fixture
def chat(command, base_dir, monkeypatch):
    """Say lines; return what stdout and stderr show."""

    def talk(*lines, **options):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        options = {"checkpoint_dir": base_dir, "max_new_tokens": 8, **options}
        status, out, err = command(SCRIPT, **options)
        assert status == 0, err
        return out, err

    return talk


@pytest.fixture
def adapter_path(base_dir, tmp_path):
    """An Aligner that changes what the tiny base says, in the folder of a run."""
    model, path = load_base(base_dir), tmp_path / "out" / "run" / "aligner.safetensors"
    save_adapter(path, random_aligner(model.config, 3, init_std=1.0), model, prompt_style="chat")
    return path


def conversation(base, *turns, system=None):
    """The answers to a user's turns, each with all before it."""
    messages = [Message("system", system)] if system else []
    answers = []
    for turn in turns:
        messages.append(Message("user", turn))
        answers.append("".join(base.reply(messages, max_new_tokens=8)))
        messages.append(Message("assistant", answers[-1]))
    return answers


def test_history_is_kept_until_a_reset(chat, base_dir):
    base = open_base(base_dir)
    first, second = conversation(base, "One?", "And two?")
    alone = conversation(base, "And two?")[0]
    assert second != alone
    out, err = chat("One?", "", "And two?", "/reset", "And two?", "/quit", "not read")
    assert out == f"{first}\n{second}\n{alone}\n"
    assert "a new conversation begins" in err
    assert chat("One?")[0] == f"{first}\n"  # the end of standard input ends the program


def test_commands(chat, base_dir, adapter_path):
    base = open_base(base_dir, prompt_style="chat")
    adapted = base.with_adapter(adapter_path, 4)
    expected = [each.generate("One?", max_new_tokens=8) for each in (base, adapted, base)]
    assert expected[0] != expected[1]
    lines = ["One?", "/adapter run", "/scale 4", "/reset", "One?", "/adapter none", "/reset", "One?"]
    out, err = chat(*lines, adapter_dir=adapter_path.parents[1])
    assert out.splitlines() == "\n".join(expected).splitlines()
    assert f"tiny + {adapter_path.parent} (" in err
    assert ") x 4" in err
    assert chat("One?", adapter_path=adapter_path, adapter_scale=4)[0] == f"{expected[1]}\n"
    assert chat(f"/adapter {adapter_path}", "/scale 4", "One?")[0] == f"{expected[1]}\n"
    brief = conversation(base, "One?", system="Be brief.")[0]
    assert brief != expected[0]
    out, err = chat("/system Be brief.", "One?", "/system", "/reset", "One?", "/help")
    assert out == f"{brief}\n{expected[0]}\n"
    assert err.count("/adapter NAME   go on with another adapter") == 1
    assert chat("One?", system="Be brief.")[0] == f"{brief}\n"


def test_what_cannot_be_done_changes_nothing(chat, base_dir, adapter_path):
    expected = conversation(open_base(base_dir, adapter_path), "One?", "Two?")
    lines = ["One?", "/adapter nowhere", "/scale much", "/shout", "/adapter", "x " * 300, "Two?"]
    out, err = chat(*lines, adapter_path=adapter_path, adapter_dir=adapter_path.parents[1])
    assert out == "\n".join(expected) + "\n"
    errors = re.findall("error: (.*)", err)
    assert errors[0] == f"no adapter named 'nowhere' in {adapter_path.parents[1]}"
    assert errors[1:4] == [
        "/scale takes a number, such as /scale 0.5, not 'much'",
        "there is no command /shout: /help lists them",
        '/adapter takes a name, or "none" for the base model',
    ]
    assert "tokens, the model's window is 256: shorten the prompt" in errors[4]
    assert len(errors) == 5
    _, err = chat("/scale 0.5")
    assert "error: there is no adapter to scale: choose one by /adapter NAME" in err
    _, err = chat("One?", "Two?", prompt_style="alpaca")
    assert "the prompt style alpaca has place for one instruction" in err


def test_the_oldest_turns_go_when_the_window_is_full(chat, base_dir, monkeypatch):
    """As few as leave room for an answer; the system message stays."""
    base, reply, asked = open_base(base_dir), Base.reply, []
    turns = [f"{letter} " * 40 for letter in "abcdef"]

    def recorded(self, messages, **sampling):
        asked.append(messages)
        return reply(self, messages, **sampling)

    monkeypatch.setattr(Base, "reply", recorded)
    _, err = chat(*turns, system="Be brief.")
    left_out = [int(n) for n in re.findall(r"window of 256 tokens: (\d+) old turns are left out", err)]
    assert left_out

    def count(messages):
        return len(base.tokenizer.encode(base.style.render(messages), bos=base.style.bos))

    answers = {messages[-3].content: messages[-2] for messages in asked if len(messages) > 2}
    for turn, messages in zip(turns, asked, strict=True):
        assert [message.role for message in messages] == [
            "system",
            "user",
            *["assistant", "user"] * (len(messages) // 2 - 1),
        ]
        assert messages[-1].content == turn.strip()
        assert count(messages) + 8 <= 256
        before = turns.index(next(t for t in turns if t.strip() == messages[1].content)) - 1
        if before >= 0:
            said = turns[before].strip()
            longer = [messages[0], Message("user", said), answers[said], *messages[1:]]
            assert count(longer) + 8 > 256
    assert sum(left_out) == 2 * len(turns) - len(asked[-1])


def test_ctrl_c_ends_an_answer_and_not_the_program(chat, base_dir, monkeypatch):
    base, reply = open_base(base_dir), Base.reply
    pieces = list(base.reply([Message("user", "One?")], max_new_tokens=8))
    begun = "".join(pieces[:3])
    messages = [Message("user", "One?"), Message("assistant", begun), Message("user", "Two?")]
    expected = "".join(base.reply(messages, max_new_tokens=8))

    def interrupted(self, messages, **sampling):
        for n, piece in enumerate(reply(self, messages, **sampling)):
            if len(messages) == 1 and n == 3:
                raise KeyboardInterrupt
            yield piece

    monkeypatch.setattr(Base, "reply", interrupted)
    out, err = chat("One?", "Two?")
    assert out == f"{begun}{expected}\n"
    assert "(stopped)" in err


def test_lines_can_be_edited_on_a_terminal(base_dir):
    """A typing error is deleted, an earlier line comes back, Ctrl-C leaves a line out and Ctrl-D ends."""
    expected = conversation(open_base(base_dir), "One?", "One?")
    mine, theirs = pty.openpty()
    options = ["--checkpoint_dir", str(base_dir), "--max_new_tokens", "8", "--threads", "1", "--precision=32-true"]
    environment = {**os.environ, "TERM": "dumb", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, SCRIPT, *options],
        stdin=theirs,
        stdout=theirs,
        stderr=subprocess.DEVNULL,
        cwd=ROOT,
        env=environment,
        start_new_session=True,
        preexec_fn=take_terminal,
    )
    os.close(theirs)
    shown = ""

    def read_until(text):
        nonlocal shown
        while text not in shown:
            assert select.select([mine], [], [], 120)[0], shown
            shown += os.read(mine, 1000).decode(errors="replace").replace("\r\n", "\n")
        before, _, shown = shown.partition(text)
        return before

    try:
        read_until("> ")
        os.write(mine, b"nothing")
        read_until("nothing")
        os.write(mine, b"\x03")
        while not select.select([mine], [], [], 2)[0]:  # a signal between two keys may wait for the next one
            os.write(mine, b"\x03")
        read_until("> ")
        os.write(mine, b"Onx\x7fe?\n")
        read_until("\n")
        assert read_until("> ").strip() == expected[0].strip()
        os.write(mine, b"\x1b[A\n")
        read_until("\n")
        assert read_until("> ").strip() == expected[1].strip()
        os.write(mine, b"\x04")
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(mine)


def take_terminal():
    """Make the terminal on standard input the one of this session, so that its Ctrl-C comes here and is not ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell ignores it for what runs in its background
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
