"""OpenAI's API for many adapters: chat completions, completions and the list of models.

This is the side of the main process: it checks requests, turns messages into tokens and tokens into text. What a client
asks for is done, or refused by its name. The model is in a process of its own, see `lit_llama.serving.worker`.
"""

import asyncio
import json
import os
import secrets
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from lit_llama.base import style_of
from lit_llama.generation import TextStream
from lit_llama.prompts import Message, PromptStyle, prompt_style
from lit_llama.serving.access import DOCS, Access
from lit_llama.serving.http import ApiError, Gate
from lit_llama.serving.requests import BASE, ChatRequest, CompletionRequest, Options
from lit_llama.serving.store import AdapterStore
from lit_llama.serving.worker import Job, Said, Worker
from lit_llama.tokenizer import Tokenizer

T = TypeVar("T")


@dataclass(frozen=True)
class Limits:
    """What a server accepts.

    Args:
        max_rows: number of requests that are answered at once.
        max_waiting: number of requests that may wait in addition.
        max_length: longest row in tokens, prompt included.
        timeout: seconds that an answer may take.
        temperature: temperature of requests that do not say one.

    Raises:
        ValueError: a number is out of range.
    """

    max_rows: int = 16
    max_waiting: int = 64
    max_length: int = 2048
    timeout: float = 120.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        for name, is_fine in {
            "max_rows": self.max_rows >= 1,
            "max_waiting": self.max_waiting >= 0,
            "max_length": self.max_length >= 1,
            "timeout": self.timeout > 0,
        }.items():
            if not is_fine:
                raise ValueError(f"--{name} is {getattr(self, name)}, which is too small")
        if not 0 <= self.temperature <= 2:
            raise ValueError(f"--temperature is {self.temperature}, it must be from 0 to 2")


class Api:
    """Answers to requests.

    Args:
        worker: has the model.
        tokenizer: the base model's.
        store: the adapters, to tell which there are; its model may be without weights.
        limits: what is accepted.
    """

    def __init__(self, worker: Worker, tokenizer: Tokenizer, store: AdapterStore, limits: Limits) -> None:
        self._worker, self._tokenizer, self._store, self._limits = worker, tokenizer, store, limits
        self._styles: dict[str | None, PromptStyle] = {}  # by name; None is the base's own
        self._store_lock = asyncio.Lock()
        self._started = int(time.time())

    async def models(self) -> dict[str, Any]:
        """GET /v1/models."""
        names = await self._in_store(self._names)
        return {"object": "list", "data": [self._model(name) for name in names]}

    async def model(self, name: str) -> dict[str, Any]:
        """GET /v1/models/{name}."""
        await self._style(name)
        return self._model(name)

    async def chat(self, request: Request, body: ChatRequest) -> Any:
        """POST /v1/chat/completions."""
        style = await self._style(body.model)
        messages = [Message(turn.role, turn.content) for turn in body.messages]

        def encode() -> list[int]:
            return self._tokenizer.encode(style.render(messages), bos=style.bos)

        return await self._answer(request, body, style, encode, is_chat=True)

    async def complete(self, request: Request, body: CompletionRequest) -> Any:
        """POST /v1/completions."""
        await self._style(body.model)  # an unknown one is refused
        style = prompt_style("none", self._tokenizer)

        def encode() -> list[int]:
            return self._tokenizer.encode(body.prompt, bos=style.bos or self._tokenizer.adds_bos)

        return await self._answer(request, body, style, encode, is_chat=False)

    def _model(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self._started, "owned_by": "lit_llama"}

    async def _in_store(self, call: Callable[..., T], *args: Any) -> T:
        """Look into the folder, in a thread: thousands of files take a while."""
        async with self._store_lock:
            return await asyncio.to_thread(call, *args)

    def _names(self) -> list[str]:
        self._store.refresh()
        return [BASE, *self._store.names()]

    async def _style(self, model: str) -> PromptStyle:
        """The prompt style of a model.

        Raises:
            ApiError: there is no such model, or it cannot be used.
        """
        try:
            name = None if model == BASE else await self._in_store(self._store.style, model)
            if name not in self._styles:  # what a chat template does is found out by rendering conversations
                self._styles[name] = style_of(None, name, self._tokenizer)
            return self._styles[name]
        except ValueError as error:
            raise ApiError(404, self._without_folder(str(error)), "model_not_found", "model") from None

    def _without_folder(self, message: str) -> str:
        """A message about a file, without where on this machine it is."""
        return message.replace(f"{self._store.folder}{os.sep}", "").replace(str(self._store.folder), "the folder")

    async def _answer(
        self, request: Request, body: Options, style: PromptStyle, encode: Callable[[], list[int]], is_chat: bool
    ) -> Any:
        try:
            ids = await asyncio.to_thread(encode)
        except ValueError as error:  # the template has no place for these turns
            raise ApiError(400, str(error), param="messages" if is_chat else "prompt") from None
        limits = self._limits
        room = limits.max_length - len(ids)
        if not ids or room < 1:
            message = f"the prompt has {len(ids)} tokens, 1 to {limits.max_length - 1} are accepted"
            raise ApiError(400, message, "context_length_exceeded", "messages" if is_chat else "prompt")
        if self._worker.active >= limits.max_rows + limits.max_waiting:
            message = f"{self._worker.active} requests are being answered or wait: try again later"
            raise ApiError(429, message, "rate_limit_exceeded")
        style = replace(style, markers=(*style.markers, *filter(None, body.stop)))
        longest = min(body.max_completion_tokens or body.max_tokens or room, room)
        job = Job(
            ids,
            None if body.model == BASE else body.model,
            body.adapter_scale,
            secrets.randbits(32) if body.seed is None else body.seed % 2**32,
            {"max_new_tokens": longest, "stop_ids": style.stop_ids, **body.sampling(limits.temperature)},
        )
        answer = Answer(self._said(job), TextStream(self._tokenizer), style, is_chat, body, len(ids))
        if not body.stream:
            return JSONResponse(await _unless_gone(request, answer.whole()))
        chunks = answer.chunks()
        first = await _unless_gone(request, anext(chunks))  # an error up to here still has a status of its own

        async def events() -> AsyncGenerator[str, None]:
            try:
                yield first
                async for chunk in chunks:
                    yield chunk
            finally:
                await chunks.aclose()

        return StreamingResponse(events(), media_type="text/event-stream")

    async def _said(self, job: Job) -> AsyncGenerator[Said, None]:
        """What the worker says to a request, within its time.

        Raises:
            ApiError: it failed.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._limits.timeout
        said = self._worker.ask(job)
        try:
            while True:
                try:
                    one = await asyncio.wait_for(anext(said), deadline - loop.time())
                except StopAsyncIteration:
                    return
                except asyncio.TimeoutError:
                    raise ApiError(504, "the request took too long") from None
                if one.error:
                    raise ApiError(one.status, self._without_folder(one.error))
                yield one
        finally:
            await said.aclose()


async def _unless_gone(request: Request, result: Awaitable[T]) -> T:
    """Wait for a result, unless the client leaves first: then nobody works for it any longer."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    wanted, left = asyncio.ensure_future(result), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({wanted, left}, return_when=asyncio.FIRST_COMPLETED)
        if not wanted.done():
            raise ApiError(499, "the client has gone")
        return wanted.result()
    finally:
        wanted.cancel()
        left.cancel()
        await asyncio.gather(wanted, left, return_exceptions=True)


class Answer:
    """One answer on its way from tokens to JSON.

    Args:
        said: what the worker says.
        decoder: turns tokens into text.
        style: cuts the answer out of the text.
        is_chat: a chat completion, not the continuation of a text.
        body: the client's request.
        prompt_tokens: for the count.
    """

    def __init__(
        self,
        said: AsyncGenerator[Said, None],
        decoder: TextStream,
        style: PromptStyle,
        is_chat: bool,
        body: Options,
        prompt_tokens: int,
    ) -> None:
        self._said, self._decoder, self._style, self._is_chat, self._body = said, decoder, style, is_chat, body
        self._prompt_tokens, self._new_tokens = prompt_tokens, 0
        self._finish = "length"
        prefix = "chatcmpl" if is_chat else "cmpl"
        self._head = {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": body.model}

    async def pieces(self) -> AsyncGenerator[str, None]:
        """The text as it becomes certain."""
        text, shown = "", ""
        try:
            async for one in self._said:
                self._finish = one.finish or self._finish
                if one.token is not None:
                    self._new_tokens += 1
                    text += self._decoder.push(one.token)
                certain = self._style.cut(text, more_may_follow=True)
                yield certain[len(shown) :]
                shown = certain
                if self._style.ended(text):
                    self._finish = "stop"
                    break
        finally:
            await self._said.aclose()
        yield self._style.cut(text + self._decoder.flush())[len(shown) :]

    async def whole(self) -> dict[str, Any]:
        """The answer as one object."""
        text = "".join([piece async for piece in self.pieces()])
        content = {"message": {"role": "assistant", "content": text}} if self._is_chat else {"text": text}
        choice = {"index": 0, **content, "finish_reason": self._finish, "logprobs": None}
        kind = "chat.completion" if self._is_chat else "text_completion"
        return {**self._head, "object": kind, "choices": [choice], "usage": self._usage()}

    async def chunks(self) -> AsyncGenerator[str, None]:
        """The answer as server-sent events."""
        pieces = self.pieces()
        piece = await anext(pieces)  # what fails before there is anything to say is an error with a status
        try:
            if self._is_chat:
                yield self._chunk({"role": "assistant", "content": piece})
            elif piece:
                yield self._chunk({"content": piece})
            async for piece in pieces:
                if piece:
                    yield self._chunk({"content": piece})
            yield self._chunk({}, self._finish)
            if self._body.stream_options.include_usage:
                yield self._event({"choices": [], "usage": self._usage()})
            yield "data: [DONE]\n\n"
        except ApiError as error:
            yield f"data: {json.dumps(error.body, ensure_ascii=False)}\n\n"
        finally:
            await pieces.aclose()

    def _chunk(self, delta: dict[str, str], finish: str | None = None) -> str:
        content: dict[str, Any] = {"delta": delta} if self._is_chat else {"text": delta.get("content", "")}
        return self._event({"choices": [{"index": 0, **content, "finish_reason": finish, "logprobs": None}]})

    def _event(self, fields: dict[str, Any]) -> str:
        kind = "chat.completion.chunk" if self._is_chat else "text_completion"
        return f"data: {json.dumps({**self._head, 'object': kind, **fields}, ensure_ascii=False)}\n\n"

    def _usage(self) -> dict[str, int]:
        total = self._prompt_tokens + self._new_tokens
        return {"prompt_tokens": self._prompt_tokens, "completion_tokens": self._new_tokens, "total_tokens": total}


def make_app(api: Api, access: Access, page: Path) -> FastAPI:
    """The whole application: routes, errors, and `Gate` before them.

    Args:
        api: answers requests.
        access: who may ask for what; the API is described where anybody may ask for that.
        page: HTML at "/".
    """
    docs, openapi = (path if path in access.open_paths else None for path in DOCS)
    app = FastAPI(title="Adapters", docs_url=docs, openapi_url=openapi, redoc_url=None, redirect_slashes=False)

    async def health() -> dict[str, str]:
        return {"status": "ok"}

    async def show_page() -> FileResponse:
        return FileResponse(page)

    app.add_api_route("/", show_page, methods=["GET", "HEAD"], include_in_schema=False)
    for path, answer in (("/health", health), ("/v1/models", api.models), ("/v1/models/{name:path}", api.model)):
        app.add_api_route(path, answer, methods=["GET"])
        app.add_api_route(path, answer, methods=["HEAD"], include_in_schema=False)
    app.add_api_route("/v1/chat/completions", api.chat, methods=["POST"])
    app.add_api_route("/v1/completions", api.complete, methods=["POST"])
    app.add_exception_handler(ApiError, _refused)
    app.add_exception_handler(HTTPException, _no_such_route)
    app.add_exception_handler(RequestValidationError, _malformed)
    app.add_middleware(Gate, access=access)
    return app


async def _refused(_: Request, error: Any) -> JSONResponse:
    return JSONResponse(error.body, error.status)


async def _no_such_route(request: Request, error: Any) -> JSONResponse:
    path = request.url.path[:100]
    known = {404: f"there is nothing at {path}", 405: f"{path} does not take the method {request.method}"}
    refusal = ApiError(error.status_code, known.get(error.status_code, str(error.detail)))
    return JSONResponse(refusal.body, refusal.status, error.headers)


async def _malformed(request: Request, error: Any) -> JSONResponse:
    """Say what is wrong with a body that is not JSON, or whose fields are not what they should be."""
    found = error.errors()
    param = None
    if "json" not in request.headers.get("content-type", ""):
        message = "the body must be JSON, and its Content-Type application/json"
    elif found[0]["type"] == "json_invalid":
        message = f"the body is not JSON: {found[0]['ctx']['error']} at character {found[0]['loc'][-1]}"
    else:
        message = "; ".join(f"{'.'.join(map(str, one['loc'][1:]))}: {one['msg']}" for one in found[:5])
        param = next((str(name) for name in found[0]["loc"][1:2]), None)
    refusal = ApiError(400, message.removeprefix(": "), param=param)
    return JSONResponse(refusal.body, refusal.status)
