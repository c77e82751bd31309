"""A server for many Aligners, on LitServe: OpenAI's chat completions and completions, all rows in one batch.

Two processes. One speaks HTTP: it checks requests, turns messages into tokens and tokens into text. The other has the
model and a `Decoder`, which rows join and leave between any two tokens; it knows tokens only.
"""

import asyncio
import hmac
import json
import secrets
import time
import uuid
from collections import deque
from collections.abc import AsyncGenerator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from fastapi import HTTPException, Request
from fastapi.responses import JSONResponse, StreamingResponse
from litserve import LitAPI
from litserve.loops.continuous_batching_loop import ContinuousBatchingLoop, Output
from litserve.specs.base import LitSpec
from litserve.utils import LitAPIStatus, ResponseBufferItem
from pydantic import BaseModel, ConfigDict, Field

from lit_llama.checkpoint import Precision
from lit_llama.cli import open_base
from lit_llama.combine import Sum
from lit_llama.generation import Decoder, TextStream
from lit_llama.generation import Request as Row
from lit_llama.inference import WeightOnly
from lit_llama.model import Adapter
from lit_llama.prompts import Message, PromptStyle, prompt_style
from lit_llama.quantization import Quantize
from lit_llama.store import AlignerStore
from lit_llama.tokenizer import Tokenizer

BASE = "base"  # the model's name for no Aligner


@dataclass(frozen=True)
class Limits:
    """What a server accepts.

    Args:
        max_rows: generated at once.
        max_waiting: requests that wait for a row, beside those.
        max_length: tokens of a row, prompt included.
        timeout: seconds for a request, from its arrival.
    """

    max_rows: int = 16
    max_waiting: int = 64
    max_length: int = 2048
    timeout: float = 120.0


class Turn(BaseModel):
    """One message of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


class Options(BaseModel):
    """What chat completions and completions have in common; `aligner_scale` and `top_k` are this server's own."""

    model_config = ConfigDict(extra="allow")

    model: str = BASE
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=1)] | None = None
    seed: int | None = None
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None
    n: Literal[1] = 1
    stream: bool = False
    stream_options: dict[str, bool] | None = None
    aligner_scale: Annotated[float, Field(ge=-10, le=10)] = 1.0


class ChatRequest(Options):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Turn], Field(min_length=1)]


class CompletionRequest(Options):
    """The body of /v1/completions."""

    prompt: str


def said(uid: str, output: dict[str, Any]) -> Output:
    """Something for the client of a request."""
    return Output(uid, output, LitAPIStatus.OK)  # type: ignore[arg-type] (its annotation is not what its values are)


def done(uid: str) -> Output:
    """The end of a request."""
    return Output(uid, {}, LitAPIStatus.FINISH_STREAMING)  # type: ignore[arg-type]


class Model(LitAPI):
    """The process with the model.

    Args:
        checkpoint_dir: folder of the base model.
        aligner_dir: folder of the Aligners.
        precision: of the base model.
        quantize: keep its weights in fewer bits.
        compile: compile the decoding step.
        allow_other_base: accept Aligners of other weights of the same sizes.
        limits: what is accepted.
        options: of `LitAPI`.
    """

    def __init__(
        self,
        checkpoint_dir: Path,
        aligner_dir: Path,
        precision: Precision,
        quantize: Quantize | WeightOnly | None,
        compile: bool,
        allow_other_base: bool,
        limits: Limits,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self._open = (checkpoint_dir, precision, quantize, compile)
        self._aligners = (aligner_dir, allow_other_base)
        self.limits = limits

    def setup(self, device: str) -> None:
        model, _ = open_base(*self._open)
        self._store = AlignerStore(self._aligners[0], model, self._aligners[1])
        self._decoder = Decoder(model, self.limits.max_rows, self.limits.max_length)
        # LitServe adds requests in one thread while another is in `step`: these two are all that both touch.
        self._waiting: deque[tuple[str, dict[str, Any]]] = deque()
        self._cancellations: deque[tuple[str, str]] = deque()
        self._uids: dict[int, str] = {}  # of running rows
        self._deadlines: dict[int, float] = {}
        self._finished: list[Output] = []

    def add_request(self, uid: str, request: dict[str, Any]) -> None:
        """Queue a row, or the end of one: a request that names another by "cancel"."""
        if "cancel" in request:
            self._cancellations.append((uid, request["cancel"]))
        else:
            self._waiting.append((uid, request))

    def has_capacity(self) -> bool:
        return True  # rows wait here, so that those who wait can be cancelled

    def has_active_requests(self) -> bool:
        return bool(self._waiting or self._cancellations or self._decoder.running or self._finished)

    def step(self, _: list[Output] | None) -> list[Output]:
        """Let rows go that nobody waits for and rows in for which there is room, then a token for each."""
        while self._cancellations:
            self._cancel(*self._cancellations.popleft())
        while self._waiting and len(self._decoder.running) < self._decoder.max_rows:
            uid, request = self._waiting.popleft()
            try:
                [number] = self._decoder.join([self._row(request)])
            except Exception as error:  # of this row alone, such as a damaged file of its Aligner
                status = 400 if isinstance(error, ValueError) else 500
                self._finished += [said(uid, {"error": str(error), "status": status}), done(uid)]
                continue
            self._uids[number], self._deadlines[number] = uid, request["deadline"]
            break  # one prompt between two tokens of the others
        outputs = []
        for event in self._decoder.step() if self._decoder.running else []:
            uid = self._uids[event.row]
            if event.error is None:
                outputs.append(said(uid, {"token": event.token, "finish": event.finish}))
            else:
                outputs.append(said(uid, {"error": event.error, "status": 500}))
            if event.finish:
                outputs.append(done(uid))
                del self._uids[event.row], self._deadlines[event.row]
        for number in [number for number, deadline in self._deadlines.items() if deadline < time.time()]:
            self._end(number, {"error": "the request took too long", "status": 504})
        outputs += self._finished
        self._finished = []
        return outputs

    def encode_response(self, output: dict[str, Any]) -> dict[str, Any]:
        return output

    def _row(self, request: dict[str, Any]) -> Row:
        adapter: Adapter | None = None
        if request["aligner"] != BASE:
            adapter, _ = self._store.get(request["aligner"])
            if request["scale"] != 1:
                adapter = Sum((adapter, request["scale"]))
        generator = torch.Generator(self._decoder.model.device).manual_seed(request["seed"])
        return Row(request["prompt"], adapter, generator=generator, **request["options"])

    def _cancel(self, uid: str, cancelled: str) -> None:
        self._finished.append(done(uid))
        for entry in [entry for entry in list(self._waiting) if entry[0] == cancelled]:
            self._waiting.remove(entry)
            self._finished.append(done(cancelled))
        for number in [number for number, running in self._uids.items() if running == cancelled]:
            self._end(number, {})

    def _end(self, number: int, last: dict[str, Any]) -> None:
        self._decoder.leave(number)
        uid = self._uids.pop(number)
        del self._deadlines[number]
        if last:
            self._finished.append(said(uid, last))
        self._finished.append(done(uid))


class Loop(ContinuousBatchingLoop):
    """LitServe's, which sleeps while there is nothing to do."""

    async def run(self, lit_api: Model, *args: Any, **options: Any) -> None:  # type: ignore[override]
        if lit_api.has_active_requests():
            await super().run(lit_api, *args, **options)
        else:
            await asyncio.sleep(0.005)


class OpenAI(LitSpec):
    """The process that speaks HTTP.

    Args:
        tokenizer: the base model's.
        store: the Aligners, to tell which there are; the model may be without weights.
        limits: what is accepted.
        api_key: what clients must send as a bearer token, if anything.
    """

    response_buffer: dict[str, ResponseBufferItem]  # these three are set by LitServe
    request_queue: Any
    response_queue_id: Any

    def __init__(self, tokenizer: Tokenizer, store: AlignerStore, limits: Limits, api_key: str | None) -> None:
        super().__init__()
        self.api_path = "/v1/chat/completions"
        self._tokenizer, self._store, self._limits, self._api_key = tokenizer, store, limits, api_key
        self._active = 0
        self.add_endpoint(self.api_path, self.chat_completions, ["POST"])
        self.add_endpoint("/v1/completions", self.completions, ["POST"])
        self.add_endpoint("/v1/models", self.models, ["GET"])

    def __getstate__(self) -> dict[str, Any]:
        return {"api_path": self.api_path}  # the model's process needs none of it

    @property
    def stream(self) -> bool:
        return True

    def decode_request(self, request: Any, context_kwargs: Any) -> Any:
        return request

    def encode_response(self, output: Any, context_kwargs: Any) -> Any:
        return output

    def authorize(self, request: Request) -> None:
        """Refuse requests without the key, if there is one."""
        if self._api_key is None:
            return
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(given.encode(), self._api_key.encode()):
            raise HTTPException(401, "wrong or missing API key: send it as a bearer token")

    async def models(self, request: Request) -> dict[str, Any]:
        """The base and all Aligners that can be used."""
        self.authorize(request)
        await asyncio.to_thread(self._store.refresh)
        names = [BASE, *self._store.names()]
        return {
            "object": "list",
            "data": [{"id": name, "object": "model", "created": 0, "owned_by": "lit-llama-aligner"} for name in names],
        }

    async def chat_completions(self, request: Request, body: ChatRequest) -> Any:
        """Answer a conversation."""
        self.authorize(request)
        style = self._style(body)
        try:
            text = style.render([Message(turn.role, turn.content) for turn in body.messages])
        except ValueError as error:
            raise HTTPException(400, str(error)) from None
        return await self._answer(request, body, style, text, "chat.completion")

    async def completions(self, request: Request, body: CompletionRequest) -> Any:
        """Continue a text as it stands."""
        self.authorize(request)
        self._style(body)
        return await self._answer(request, body, prompt_style("none", self._tokenizer), body.prompt, "text_completion")

    def _style(self, body: Options) -> PromptStyle:
        """Of the Aligner's training, once it is certain that there is such an Aligner."""
        trained = None
        if body.model != BASE:
            try:
                _, trained = self._store.get(body.model)
            except ValueError as error:
                raise HTTPException(404, str(error)) from None
        default = "none" if self._tokenizer.chat_template is None else "chat"
        return prompt_style(trained or default, self._tokenizer)

    async def _answer(self, request: Request, body: Options, style: PromptStyle, text: str, kind: str) -> Any:
        ids = self._tokenizer.encode(text, bos=style.bos or (kind == "text_completion" and self._tokenizer.adds_bos))
        room = self._limits.max_length - len(ids)
        if not ids or room < 1:
            raise HTTPException(
                400, f"the prompt has {len(ids)} tokens, 1 to {self._limits.max_length - 1} are accepted"
            )
        if self._active >= self._limits.max_rows + self._limits.max_waiting:
            raise HTTPException(429, f"{self._active} requests are being answered or wait: try again later")
        stops = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
        style = replace(style, markers=(*style.markers, *filter(None, stops)))
        sampling = {"temperature": body.temperature, "top_k": body.top_k, "top_p": body.top_p}
        wanted = body.max_completion_tokens or body.max_tokens or room
        payload = {
            "prompt": ids,
            "aligner": body.model,
            "scale": body.aligner_scale,
            "seed": secrets.randbits(32) if body.seed is None else body.seed % 2**32,
            "deadline": time.time() + self._limits.timeout,
            "options": {"max_new_tokens": min(wanted, room), "stop_ids": style.stop_ids, **sampling},
        }
        answer = Answer(self, payload, style, kind, body, len(ids))
        if not body.stream:
            return await answer.whole(request)
        chunks = answer.chunks()
        first = await anext(chunks)  # an error up to here still has a status of its own

        async def events() -> AsyncGenerator[str, None]:
            try:
                yield first
                async for chunk in chunks:
                    yield chunk
            finally:
                await chunks.aclose()

        return StreamingResponse(events(), media_type="text/event-stream")

    async def _tokens(self, payload: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """What the model's process says to a request; leaving early cancels it.

        Raises:
            HTTPException: it failed.
        """
        uid, queue, event = str(uuid.uuid4()), deque[Any](), asyncio.Event()
        self.response_buffer[uid] = ResponseBufferItem(response_queue=queue, event=event)
        self._active += 1
        self._send(uid, payload)
        finished = False
        stream = self.data_streamer(queue, event, send_status=True)
        try:
            while True:
                try:
                    data, status = await asyncio.wait_for(anext(stream), self._limits.timeout + 5)
                except StopAsyncIteration:
                    finished = True
                    return
                except asyncio.TimeoutError:
                    raise HTTPException(504, "the request took too long") from None
                if status == LitAPIStatus.ERROR:
                    raise HTTPException(500, "the model failed; see the server's log")
                said = json.loads(data)
                if "error" in said:
                    raise HTTPException(said.get("status", 400), said["error"])
                yield said
        finally:
            self._active -= 1
            del self.response_buffer[uid]
            if not finished:
                self._send(str(uuid.uuid4()), {"cancel": uid})

    def _send(self, uid: str, payload: dict[str, Any]) -> None:
        self.request_queue.put((self.response_queue_id, uid, time.monotonic(), payload))


class Answer:
    """One answer on its way from tokens to JSON.

    Args:
        spec: where its tokens come from.
        payload: the request to the model's process.
        style: cuts the answer out of the text.
        kind: "chat.completion" or "text_completion".
        body: the client's request.
        prompt_tokens: for the count.
    """

    def __init__(
        self, spec: OpenAI, payload: dict[str, Any], style: PromptStyle, kind: str, body: Options, prompt_tokens: int
    ) -> None:
        self._spec, self._payload, self._style, self._body = spec, payload, style, body
        self._is_chat = kind == "chat.completion"
        self._prompt_tokens, self._new_tokens = prompt_tokens, 0
        self._finish = "length"
        prefix = "chatcmpl" if self._is_chat else "cmpl"
        self._head = {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": body.model}
        self._object = kind

    async def pieces(self) -> AsyncGenerator[str, None]:
        """The text as it becomes certain."""
        decoder, text, shown = TextStream(self._spec._tokenizer), "", ""
        tokens = self._spec._tokens(self._payload)
        try:
            async for said in tokens:
                if not said:
                    continue
                self._finish = said["finish"] or self._finish
                if said["token"] is not None:
                    self._new_tokens += 1
                    text += decoder.push(said["token"])
                certain = self._style.cut(text, more_may_follow=True)
                yield certain[len(shown) :]
                shown = certain
                if self._style.ended(text):
                    self._finish = "stop"
                    break
        finally:
            await tokens.aclose()
        yield self._style.cut(text + decoder.flush())[len(shown) :]

    async def whole(self, request: Request) -> dict[str, Any]:
        """The answer as one object; a client that has gone ends it."""
        text = ""
        pieces = self.pieces()
        try:
            async for piece in pieces:
                text += piece
                if await request.is_disconnected():
                    raise HTTPException(499, "the client has gone")
        finally:
            await pieces.aclose()
        content = {"message": {"role": "assistant", "content": text}} if self._is_chat else {"text": text}
        choice = {"index": 0, **content, "finish_reason": self._finish, "logprobs": None}
        return {**self._head, "object": self._object, "choices": [choice], "usage": self._usage()}

    async def chunks(self) -> AsyncGenerator[str, None]:
        """The answer as server-sent events."""
        pieces = self.pieces()
        try:
            piece = await anext(pieces)
            if self._is_chat:
                yield self._chunk({"role": "assistant", "content": piece})
            elif piece:
                yield self._chunk({"content": piece})
            async for piece in pieces:
                if piece:
                    yield self._chunk({"content": piece})
            yield self._chunk({}, self._finish)
            if (self._body.stream_options or {}).get("include_usage"):
                yield self._event({"choices": [], "usage": self._usage()})
            yield "data: [DONE]\n\n"
        except HTTPException as error:
            yield self._event({"error": error_object(error.status_code, error.detail)})
        finally:
            await pieces.aclose()

    def _chunk(self, delta: dict[str, str], finish: str | None = None) -> str:
        content: dict[str, Any] = {"delta": delta} if self._is_chat else {"text": delta.get("content", "")}
        return self._event({"choices": [{"index": 0, **content, "finish_reason": finish, "logprobs": None}]})

    def _event(self, fields: dict[str, Any]) -> str:
        kind = "chat.completion.chunk" if self._is_chat else self._object
        return f"data: {json.dumps({**self._head, 'object': kind, **fields}, ensure_ascii=False)}\n\n"

    def _usage(self) -> dict[str, int]:
        total = self._prompt_tokens + self._new_tokens
        return {"prompt_tokens": self._prompt_tokens, "completion_tokens": self._new_tokens, "total_tokens": total}


def error_object(status: int, message: str) -> dict[str, Any]:
    """An error as OpenAI's clients expect it."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"message": message, "type": kind, "param": None, "code": status}


class MaxBody:
    """Refuses requests with larger bodies than a number of bytes, before they are read whole."""

    def __init__(self, app: Any, max_bytes: int) -> None:
        self._app, self._max_bytes = app, max_bytes

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        body, more = b"", scope["method"] == "POST"
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self._max_bytes:
                error = error_object(413, f"the body is larger than {self._max_bytes} bytes")
                return await JSONResponse({"error": error}, 413)(scope, receive, send)
        messages = [{"type": "http.request", "body": body, "more_body": False}]
        return await self._app(scope, lambda: _next(messages, receive), send)


async def _next(messages: list[Any], receive: Any) -> Any:
    return messages.pop() if messages else await receive()
