"""The server's second process, which has the model, and the pipe between the two.

The main process speaks HTTP. The worker has the model and a `Decoder`, which rows join and leave between any two
tokens; it knows tokens only. Each notices the other's death: a pipe whose other end is gone reads as ended, however the
process that held it ended.
"""

import asyncio
import multiprocessing
import os
import queue
import signal
import sys
import threading
import warnings
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from tqdm import tqdm

from lit_llama.base import open_base
from lit_llama.decoder import Decoder, GenerationRequest, check_request
from lit_llama.devices.precision import Precision
from lit_llama.model import LLaMA
from lit_llama.serving.store import AdapterStore
from lit_llama.together import Bits

PROMPT_TOKENS = 512  # padding included, that are read between two tokens of the other rows, unless one prompt has more
ENDING = "the server is ending: try again later"


@dataclass(frozen=True)
class Opening:
    """What a worker needs to know in order to open the model.

    Args:
        checkpoint_dir: folder of the base model.
        adapter_dir: folder of the adapters.
        max_rows: number of requests that are answered at once.
        max_length: longest row in tokens, prompt included.
        precision: number format of the base model; "auto" is bf16-true where GPU or CPU compute in it and 32-true
            elsewhere, and says which it takes.
        quantize: keep the weights in fewer bits: "nf4" or "int8", by bitsandbytes, to save memory; "int4-fast" or
            "int8-fast", by torchao on a GPU, for speed. If this is not given, adapters that were trained on a
            quantised base are refused; "none" accepts them on whole weights.
        compile: compile the decoding step, with CUDA graphs on a GPU; this takes a while at the first requests.
        allow_other_base: accept adapters that were trained on other weights.
    """

    checkpoint_dir: Path
    adapter_dir: Path
    max_rows: int = 16
    max_length: int = 2048
    precision: Precision = "auto"
    quantize: Bits | None = None
    compile: bool = False
    allow_other_base: bool = False


class Job(NamedTuple):
    """A request to the worker.

    Args:
        prompt: token ids.
        adapter: name of an adapter in the folder; None is the base model alone.
        scale: number that the adapter is multiplied by.
        seed: seed of sampling, 0 to 2**64 - 1.
        options: other arguments of `lit_llama.decoder.GenerationRequest`.
    """

    prompt: list[int]
    adapter: str | None
    scale: float
    seed: int
    options: dict[str, Any]


class Said(NamedTuple):
    """What the worker says to a request. The last time it has a `finish` or an `error`.

    Args:
        token: the next one, if there is one.
        finish: why the answer ended, if it did.
        error: why there is no more of it.
        status: HTTP's, of the error.
    """

    token: int | None = None
    finish: Literal["stop", "length", "error"] | None = None
    error: str = ""
    status: int = 500


@contextmanager
def signals_held_back() -> Iterator[None]:
    """Let signals that end the server wait until the worker has all that it begins with; else it prints a traceback.

    The worker inherits a mask, as Ctrl-C and service managers reach both processes and the main one ends the two. The
    mask alone does not hold the main process: the signal goes to another of its threads, and Python then runs the
    handler in this one.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    came: list[int] = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, set(handlers))
    for number in handlers:
        signal.signal(number, lambda number, _: came.append(number))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number in came[:1]:
            signal.raise_signal(number)


class Worker:
    """The main process's end. Create it, `wait_until_ready`, and `listen` from an event loop; `close` it at the end.

    Args:
        opening: what the worker opens.
    """

    def __init__(self, opening: Opening) -> None:
        context = multiprocessing.get_context("spawn")  # which hands on no socket that is open here
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=work, args=(theirs, opening), name="model", daemon=True)
        try:
            with signals_held_back():
                self._process.start()
            theirs.close()
        except BaseException:  # such as the signal that was held back
            if self._process.pid is not None:
                self._process.kill()
            raise
        self._answers: dict[int, asyncio.Queue[Said]] = {}
        self._next_number = 0
        self._is_ending = False

    @property
    def active(self) -> int:
        """How many requests are being answered or wait."""
        return len(self._answers)

    def wait_until_ready(self) -> None:
        """Wait until the model is loaded.

        Raises:
            ValueError: it cannot be.
        """
        try:
            error = self._connection.recv()
        except (EOFError, OSError):
            error = f"while the model was loaded, {self.end_of_process()}"
        if error is not None:
            raise ValueError(error)

    def listen(self, ended: Callable[[], None]) -> None:
        """Hand what the worker says to those who wait for it, in the running event loop.

        Args:
            ended: called there if the worker dies.
        """
        loop = asyncio.get_running_loop()

        def deliver(batch: list[tuple[int, Said]]) -> None:
            for number, said in batch:
                if number in self._answers:  # else nobody waits any longer
                    self._answers[number].put_nowait(said)

        def died() -> None:
            self.end_answers("the model's process ended")
            ended()

        def read() -> None:
            try:
                while True:
                    loop.call_soon_threadsafe(deliver, self._connection.recv())
            except (EOFError, OSError):
                call = died
            except RuntimeError:  # the loop is closed: the server has ended
                return
            try:
                loop.call_soon_threadsafe(call)
            except RuntimeError:
                return

        threading.Thread(target=read, daemon=True, name="from the model").start()

    async def ask(self, job: Job) -> AsyncGenerator[Said, None]:
        """What the worker says to a request, to the end of it. Leaving early cancels it."""
        number, self._next_number = self._next_number, self._next_number + 1
        answers = self._answers[number] = asyncio.Queue[Said]()
        has_ended = False
        try:
            if self._is_ending:
                answers.put_nowait(Said(error=ENDING, status=503))
            else:
                self._send(number, job)
            while not has_ended:
                said = await answers.get()
                has_ended = bool(said.finish or said.error)
                yield said
        finally:
            del self._answers[number]
            if not has_ended:
                self._send(number, None)

    def end_answers(self, reason: str = ENDING) -> None:
        """End all answers, and those that are asked for later, with an error."""
        self._is_ending = True
        for answers in self._answers.values():
            answers.put_nowait(Said(error=reason, status=503))

    def close(self) -> None:
        """End the worker, at once: it has nothing to lose, and may be busy opening a large model."""
        self._process.kill()
        self._process.join()
        self._connection.close()

    def end_of_process(self) -> str:
        """How the worker ended, for people."""
        self._process.join(5)
        code = self._process.exitcode
        if code is not None and code < 0:
            hint = "; there may be too little memory" if code == -9 else ""
            return f"its process was killed by signal {-code}{hint}"
        return f"its process ended with exit status {code}"

    def _send(self, number: int, job: Job | None) -> None:
        with suppress(OSError):  # it has died, which `listen` notices
            self._connection.send((number, job))


def work(connection: Connection, opening: Opening) -> None:
    """The worker's life: open the model, then answer what comes through the pipe until it ends.

    Args:
        connection: its end of the pipe. It first says None, or why the model cannot be opened.
        opening: what to open.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # service managers send it to both processes; see `Worker`
    warnings.showwarning = lambda message, *_, **__: tqdm.write(f"warning: {message}", file=sys.stderr)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore of the system, which would be missed when this is killed
    inbox: queue.SimpleQueue[tuple[int, Job | None]] = queue.SimpleQueue()

    def read() -> None:
        try:
            while True:
                inbox.put(connection.recv())
        except (EOFError, OSError):
            os._exit(0)  # the main process is gone, or done with this one; nothing here needs an orderly end

    threading.Thread(target=read, daemon=True, name="requests").start()
    try:
        model = open_base(
            opening.checkpoint_dir,
            precision=opening.precision,
            quantize=opening.quantize,
            compile=opening.compile,
            for_generation=True,
        ).model
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the main process, which opens the adapters too, has said it
            store = AdapterStore(opening.adapter_dir, model, opening.allow_other_base, opening.quantize)
        rows = Rows(model, store, opening.max_rows, opening.max_length)
    except Exception as error:  # of any kind: the main process says it in one line
        connection.send(str(error) or type(error).__name__)
        return
    connection.send(None)
    while True:
        while not inbox.empty() or not rows.busy:
            rows.take(*inbox.get())
        said = rows.step()
        if said:
            connection.send(said)


class Rows:
    """The bookkeeping between requests and a decoder's rows.

    Args:
        model: the base model.
        store: the adapters.
        max_rows: number of rows that are generated at once.
        max_length: longest row in tokens, prompt included.
    """

    def __init__(self, model: LLaMA, store: AdapterStore, max_rows: int, max_length: int) -> None:
        self._model, self._store, self._sizes = model, store, (max_rows, max_length)
        self._decoder = Decoder(model, *self._sizes)
        self._waiting: deque[tuple[int, Job]] = deque()
        self._numbers: dict[int, int] = {}  # of the requests, by the decoder's rows

    @property
    def busy(self) -> bool:
        """Whether there is something to do."""
        return bool(self._waiting or self._decoder.running)

    def take(self, number: int, job: Job | None) -> None:
        """Queue a request; or let the row of one go for which nobody waits any longer."""
        if job is not None:
            self._waiting.append((number, job))
            return
        self._waiting = deque(entry for entry in self._waiting if entry[0] != number)
        for row in [row for row, running in self._numbers.items() if running == number]:
            del self._numbers[row]
            self._decoder.leave(row)

    def step(self) -> list[tuple[int, Said]]:
        """Let rows in if there is room, then a token for each; what there is to say about it, by request."""
        joining, said = self._next_requests()
        try:
            rows = self._decoder.join(list(joining.values())) if joining else []
        except Exception as error:
            return said + self._fail(error, *joining)
        self._numbers |= dict(zip(rows, joining, strict=True))
        try:
            events = self._decoder.step() if self._decoder.running else []
        except Exception as error:
            return said + self._fail(error)
        for event in events:
            said.append((self._numbers[event.row], Said(event.token, event.finish, event.error or "")))
            if event.finish:
                del self._numbers[event.row]
        return said

    def _next_requests(self) -> tuple[dict[int, GenerationRequest], list[tuple[int, Said]]]:
        """Some of the requests that wait, if there is room; and what is said to those that are refused."""
        joining: dict[int, GenerationRequest] = {}
        said: list[tuple[int, Said]] = []
        longest = 0
        while self._waiting and len(self._decoder.running) + len(joining) < self._decoder.max_rows:
            number, job = self._waiting[0]
            longest = max(longest, len(job.prompt))
            if joining and longest * (len(joining) + 1) > PROMPT_TOKENS:
                break
            self._waiting.popleft()
            try:
                request = self._request(job)
                check_request(self._model, request)
            except Exception as error:  # of this row alone, such as a file that has vanished
                said.append((number, Said(error=str(error), status=400)))
            else:
                joining[number] = request
        return joining, said

    def _fail(self, error: Exception, *joining: int) -> list[tuple[int, Said]]:
        """End all rows by an error that no row alone has caused: memory, the device. Later ones find a new decoder."""
        tqdm.write(f"error: the model failed: {type(error).__name__}: {error}", file=sys.stderr)
        reason = f"the model failed ({type(error).__name__}); the server's log says more"
        failed = [(number, Said(error=reason)) for number in (*self._numbers.values(), *joining)]
        self._numbers.clear()
        del self._decoder  # its memory is free before there is another
        self._decoder = Decoder(self._model, *self._sizes)
        return failed

    def _request(self, job: Job) -> GenerationRequest:
        adapter = None if job.adapter is None else self._store.get(job.adapter, job.scale)
        generator = torch.Generator().manual_seed(job.seed)
        return GenerationRequest(job.prompt, adapter, generator=generator, **job.options)
