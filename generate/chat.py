"""Talk with the base model in the terminal, with an adapter of any method or without one.

    python generate/chat.py
    python generate/chat.py --adapter_path examples/adapters/captain.safetensors --temperature 0.7

The answer appears as it comes, and the conversation so far is part of every prompt. When it grows longer than the
model's window, its oldest turns are left out. Ctrl-C ends an answer, Ctrl-D ends the program. Commands:

    /adapter NAME   go on with another adapter: a name in --adapter_dir, or a path; "none" is the base model
    /scale 0.5      multiply the adapter by a number, from 0 (the base model) to beyond 1
    /system TEXT    set the system message; without a text there is none
    /reset          begin a new conversation
    /help           show these commands
    /quit           end
"""

import contextlib
import importlib
import sys
from pathlib import Path
from typing import Any

from lit_llama.base import Base
from lit_llama.prompts import Message
from lit_llama.sampling import Sampling, check_sampling
from lit_llama.script.answers import adapter_in
from lit_llama.script.command_line import run
from lit_llama.script.opening import open_model

ROOM = 64  # tokens of the window that are kept free for an answer


def main(
    adapter_path: Path | None = None,
    adapter_scale: float = 1.0,
    adapter_dir: Path = Path("out"),
    system: str | None = None,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 1337,
    **options: Any,
) -> None:
    """Talk.

    Args:
        adapter_path: file or run folder of the adapter to begin with; if not given, the base model answers alone.
        adapter_scale: factor by which the adapter is multiplied, from 0 (the base model) to beyond 1.
        adapter_dir: folder in which the command /adapter looks for names.
        system: system message, which comes before the conversation.
        max_new_tokens: length of the longest answer, in tokens.
        temperature: randomness of sampling; 0 always takes the likeliest token.
        top_k: number of likeliest tokens that are sampled from.
        top_p: probability that the likeliest tokens must hold together; only they are sampled from.
        seed: seed of sampling for the first answer; the next answer has the next seed.
        options: how the base model is opened, see `open_model`.
    """
    check_sampling(max_new_tokens, Sampling(temperature, top_k, top_p))
    base = open_model(adapter_path, None, **options)
    sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    chat = Chat(base, adapter_dir, adapter_path, adapter_scale, system, seed, sampling)
    say(f"{chat.base.name}; /help lists the commands")
    with contextlib.suppress(ImportError):  # not on Windows
        importlib.import_module("readline")  # gives `input` line editing and a history
    while (line := read_line()) is not None:
        if line == "/quit":
            break
        try:
            if line.startswith("/"):
                chat.command(*line[1:].partition(" ")[::2])
            elif line:
                chat.ask(line)
        except (ValueError, OSError) as error:
            say(f"error: {error}")


class Chat:
    """A conversation with a base model whose adapter may change between two turns.

    Args:
        base: the base model.
        adapter_dir: folder in which adapters go by their names.
        adapter_path: adapter to begin with.
        scale: what it is multiplied by.
        system: system message, if any.
        seed: seed of the first answer.
        sampling: the options of `Base.reply`.
    """

    def __init__(
        self,
        base: Base,
        adapter_dir: Path,
        adapter_path: Path | None,
        scale: float,
        system: str | None,
        seed: int,
        sampling: dict[str, Any],
    ) -> None:
        self.base, self.adapter_dir, self.system, self.sampling = base, adapter_dir, system, sampling
        self.seed = seed
        self.turns: list[Message] = []  # user and assistant, one after the other
        self.adapter_path, self.scale = adapter_path, scale
        self._open(adapter_path, scale)

    def ask(self, text: str) -> None:
        """Print the answer to the user's next turn; both become part of the conversation."""
        self.turns.append(Message("user", text))
        pieces: list[str] = []
        try:
            messages = self._fitting()
            for piece in self.base.reply(messages, seed=self.seed, **self.sampling):
                print(piece, end="", flush=True)
                pieces.append(piece)
        except KeyboardInterrupt:
            say("\n(stopped)")
            if not pieces:
                self.turns.pop()
                return
        except Exception:
            self.turns.pop()  # it was not answered
            raise
        else:
            print(flush=True)
        self.seed += 1
        self.turns.append(Message("assistant", "".join(pieces)))

    def command(self, name: str, value: str) -> None:
        """Do what a command says, `value` being what stands after its name.

        Raises:
            ValueError: there is no such command, or it cannot be done; then nothing has changed.
        """
        value = value.strip()
        if name == "adapter":
            if not value:
                raise ValueError('/adapter takes a name, or "none" for the base model')
            self._open(None if value in ("none", "base") else self._find(value), self.scale)
            say(self.base.name)
        elif name == "scale":
            try:
                scale = float(value)
            except ValueError:
                raise ValueError(f"/scale takes a number, such as /scale 0.5, not {value!r}") from None
            if self.adapter_path is None:
                raise ValueError("there is no adapter to scale: choose one by /adapter NAME")
            self._open(self.adapter_path, scale)
            say(self.base.name)
        elif name == "system":
            self.system = value or None
            say("the system message is set" if value else "there is no system message")
        elif name == "reset":
            self.turns.clear()
            say("a new conversation begins")
        elif name == "help":
            say((__doc__ or "").partition("Commands:\n\n")[2].rstrip())
        else:
            raise ValueError(f"there is no command /{name}: /help lists them")

    def _find(self, name: str) -> Path:
        """The adapter of that name in the folder, or at that path."""
        return Path(name) if Path(name).exists() else adapter_in(self.adapter_dir, name)

    def _open(self, path: Path | None, scale: float) -> None:
        self.base = self.base.with_adapter(path, None if path is None else scale)
        self.adapter_path, self.scale = path, scale

    def _fitting(self) -> list[Message]:
        """The conversation as the model is given it, without its oldest turns if the window is too short for all.

        Raises:
            ValueError: the prompt style has no place for such a conversation, or the last turn alone is too long.
        """
        system = [Message("system", self.system)] if self.system else []
        style, window = self.base.style, self.base.model.config.block_size
        room = min(ROOM, window // 4, self.sampling["max_new_tokens"])
        for left_out in range(0, len(self.turns), 2):  # questions with their answers
            messages = [*system, *self.turns[left_out:]]
            count = len(self.base.tokenizer.encode(style.render(messages), bos=style.bos))
            if count + room <= window:
                break
        else:  # `Base.reply` refuses it if there is no room at all
            left_out = len(self.turns) - 1
        if left_out and count < window:
            del self.turns[:left_out]
            say(f"(the conversation is longer than the window of {window} tokens: {left_out} old turns are left out)")
        return messages


def read_line() -> str | None:
    """What the user types next, None at the end. Ctrl-C leaves out a line that was begun."""
    while True:
        try:
            if sys.stdin.isatty() and sys.stdout.isatty():
                return input("> ").strip()
            line = sys.stdin.readline()
            return line.strip() if line else None
        except KeyboardInterrupt:
            say("")
        except EOFError:
            say("")
            return None


def say(text: str) -> None:
    """Print what does not belong to an answer."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    run(main)
