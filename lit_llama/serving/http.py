"""What stands between the network and the server's API: hosts, origins, keys, limits of bodies, errors, signals.

Everything here happens before a request is parsed, so that nobody without a key costs more than a header.
"""

import asyncio
import hmac
import ipaddress
import json
import re
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import uvicorn
from tqdm import tqdm
from uvicorn.protocols.http.h11_impl import H11Protocol

from lit_llama.serving.access import Access
from lit_llama.serving.worker import ENDING, Worker

HEAD_SECONDS = 10.0  # in which a request's header must have come
DRAIN_SECONDS = 2.0  # in which the rest of a refused body may come
GRACE_SECONDS = 5.0  # that answers have left when the server is told to end


class ApiError(Exception):
    """An error that goes to a client, as OpenAI's error object.

    Args:
        status: HTTP's.
        message: for people.
        code: for programs, one of OpenAI's where there is one.
        param: the field that it is about.
    """

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param

    @property
    def body(self) -> dict[str, Any]:
        """The error object. What cannot be sent as UTF-8 is written by its number."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        message = self.message.encode("utf-8", "backslashreplace").decode()
        param = self.param and self.param.encode("utf-8", "backslashreplace").decode()
        return {"error": {"message": message, "type": kind, "param": param, "code": self.code}}


class Gate:
    """ASGI middleware that lets through what `Access` allows, and answers what goes wrong with an error object."""

    def __init__(self, app: Any, access: Access) -> None:
        self._app, self._access = app, access

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        headers = {name: value.decode("latin-1") for name, value in reversed(scope["headers"])}
        is_from_page = b"origin" in headers and self._is_allowed_origin(headers)
        has_begun = False

        async def tracked_send(message: Any) -> None:
            nonlocal has_begun
            if message["type"] == "http.response.start":
                has_begun = True
                if is_from_page:
                    cors = (b"access-control-allow-origin", headers[b"origin"].encode("latin-1")), (b"vary", b"Origin")
                    message = {**message, "headers": [*message.get("headers", []), *cors]}
            await send(message)

        try:
            self._check(headers, is_from_page)
            if scope["method"] == "OPTIONS" and b"access-control-request-method" in headers:
                await _preflight(headers, tracked_send)
                return
            self._check_key(scope["path"], headers)
            if scope["method"] == "POST":
                receive = await self._with_body(headers, receive)
            await self._app(scope, receive, tracked_send)
            return
        except _ClientGoneError:
            return
        except ApiError as error:
            refusal = error
        except asyncio.CancelledError:  # uvicorn is ending and has waited for long enough
            refusal = ApiError(503, ENDING)
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            request = f"{scope['method']} {scope['path']!r:.100}"
            tqdm.write(f"error: {request}: {error!r:.500} ({place.filename}:{place.lineno})", file=sys.stderr)
            refusal = ApiError(500, "the server failed on this request; its log says more")
        if not has_begun:
            await _refuse(refusal, receive, tracked_send)

    def _check(self, headers: dict[bytes, str], is_from_page: bool) -> None:
        host = headers.get(b"host", "")
        if not self._is_allowed_host(host):
            raise ApiError(
                403,
                f"this server does not answer under the name {host[:100]!r}; if that is one of its names, start it "
                "with --allowed_host and the name",
                "host_not_allowed",
            )
        if b"origin" in headers and not is_from_page:
            raise ApiError(
                403,
                f"pages of {headers[b'origin'][:100]!r} may not use this server, unless it is started with "
                "--allowed_origin and the origin",
                "origin_not_allowed",
            )

    def _is_allowed_host(self, header: str) -> bool:
        parts = re.fullmatch(r"(\[[^\[\]]*\]|[^:\[\]]*)(:\d*)?", header)
        if parts is None:
            return False
        name = parts[1].lower().removesuffix(".")
        if "*" in self._access.hosts or name in self._access.hosts:
            return True
        try:
            ipaddress.ip_address(name.strip("[]"))  # an address is not a name that someone else's DNS could answer for
        except ValueError:
            return False
        return self._access.any_address

    def _is_allowed_origin(self, headers: dict[bytes, str]) -> bool:
        origin = headers[b"origin"]
        own = (f"{scheme}://{headers.get(b'host', '')}".lower() for scheme in ("http", "https"))  # as a proxy has TLS
        return origin.lower() in own or origin in self._access.origins or "*" in self._access.origins

    def _check_key(self, path: str, headers: dict[bytes, str]) -> None:
        if self._access.api_key is None or path in self._access.open_paths:
            return
        scheme, _, key = headers.get(b"authorization", "").partition(" ")
        wanted = self._access.api_key.encode()
        if scheme.lower() != "bearer" or not hmac.compare_digest(key.strip().encode("latin-1"), wanted):
            raise ApiError(401, "wrong or missing API key: send it as a bearer token", "invalid_api_key")

    async def _with_body(self, headers: dict[bytes, str], receive: Any) -> Any:
        """`receive` for the app, after the whole body has come."""
        too_long = ApiError(413, f"the body is larger than {self._access.max_body_bytes} bytes")
        if int(headers.get(b"content-length") or 0) > self._access.max_body_bytes:
            raise too_long
        pieces, length = [], 0
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._access.body_seconds
        more = True
        while more:
            try:
                message = await asyncio.wait_for(receive(), deadline - loop.time())
            except asyncio.TimeoutError:
                raise ApiError(408, f"the body did not come within {self._access.body_seconds:g} seconds") from None
            if message["type"] == "http.disconnect":
                raise _ClientGoneError
            pieces.append(message.get("body", b""))
            length += len(pieces[-1])
            more = message.get("more_body", False)
            if length > self._access.max_body_bytes:
                raise too_long
        messages = [{"type": "http.request", "body": b"".join(pieces), "more_body": False}]

        async def next_message() -> Any:
            return messages.pop() if messages else await receive()

        return next_message


class _ClientGoneError(Exception):
    """There is nobody to answer."""


async def _preflight(headers: dict[bytes, str], send: Any) -> None:
    """Tell a browser that a page of another origin may ask."""
    wanted = headers.get(b"access-control-request-headers", "authorization, content-type")
    allowed = {"methods": "GET, POST", "headers": wanted}
    fields = [(f"access-control-allow-{name}".encode(), value.encode("latin-1")) for name, value in allowed.items()]
    fields.append((b"access-control-max-age", b"600"))
    await send({"type": "http.response.start", "status": 204, "headers": fields})
    await send({"type": "http.response.body"})


async def _refuse(error: ApiError, receive: Any, send: Any) -> None:
    """Answer, then take what the client is still sending for a while: if it is cut off, it may not read the answer."""
    body = json.dumps(error.body, ensure_ascii=False).encode()
    fields = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
    headers = [(name.encode(), value.encode()) for name, value in fields.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": True})

    async def drain() -> None:
        while (await receive()).get("more_body", False):
            pass

    if error.status != 408:
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(drain(), DRAIN_SECONDS)
    await send({"type": "http.response.body"})


class _Connection(H11Protocol):
    """uvicorn's protocol, which also closes connections on which no whole header comes: uvicorn waits for ever."""

    _patience: asyncio.TimerHandle | None = None

    @property
    def _is_waiting(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._be_patient()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._be_patient()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._patience is not None:
            self._patience.cancel()

    def _be_patient(self) -> None:
        if not self._is_waiting and self._patience is not None:
            self._patience.cancel()
            self._patience = None
        elif self._is_waiting and self._patience is None:
            self._patience = self.loop.call_later(HEAD_SECONDS, self._lose_patience)

    def _lose_patience(self) -> None:
        self._patience = None
        if self._is_waiting:
            self.transport.close()


class _Server(uvicorn.Server):
    """uvicorn's server, which also listens to the worker, leaves signals to `Ending` and says when it is ready."""

    def __init__(self, config: uvicorn.Config, worker: Worker, address: str) -> None:
        super().__init__(config)
        self._worker, self._address = worker, address
        self.has_lost_worker = False

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._worker.listen(self._lost_worker)
        await super().startup(sockets)
        tqdm.write(f"ready at {self._address}", file=sys.stderr)

    def _lost_worker(self) -> None:
        self.has_lost_worker = self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().call_later(GRACE_SECONDS, self._worker.end_answers)
        await super().shutdown(sockets)


class Ending:
    """How signals end the server: the first SIGINT or SIGTERM does, once and in order; those after it change nothing.

    While the model is loaded, it raises; afterwards it calls `then`.
    """

    def __init__(self) -> None:
        self._signal: int | None = None
        self.then: Callable[[], None] = self.raise_signal
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, number: int, _: Any) -> None:
        if self._signal is not None:
            return
        for ignored in (signal.SIGINT, signal.SIGTERM):
            signal.signal(ignored, signal.SIG_IGN)  # what follows takes some seconds at most
        self._signal = number
        self.then()

    def raise_signal(self) -> None:
        """End this process as the signal that came would have, if one did."""
        if self._signal == signal.SIGINT:
            raise KeyboardInterrupt
        if self._signal is not None:
            sys.exit(128 + self._signal)


def bind(host: str, port: int) -> tuple[socket.socket, str]:
    """Take a port without listening on it yet: clients that come before the model is loaded are refused.

    Args:
        host: name or address to listen on.
        port: 0 is any that is free.

    Returns:
        The socket, and its address for people.

    Raises:
        ValueError: the port cannot be taken.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        if sys.platform != "win32":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        reason = str(error).rstrip(".")
        raise ValueError(f"cannot listen on {host}, port {port}: {reason}; choose another --port or --host") from None
    shown = f"[{host}]" if ":" in host else host
    return listener, f"http://{shown}:{listener.getsockname()[1]}"


def serve(app: Any, worker: Worker, listener: socket.socket, address: str, ending: Ending) -> None:
    """Serve until a signal comes or the worker dies.

    Args:
        app: answers requests.
        worker: has the model, which is loaded.
        listener: a bound socket.
        address: the listener's address, to be printed when it listens.
        ending: how signals end the server.

    Raises:
        ValueError: the worker died.
    """
    config = uvicorn.Config(
        app,
        http=_Connection,
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="critical",  # errors are told in one line by `Gate`
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(GRACE_SECONDS) + 2,
    )
    server = _Server(config, worker, address)

    def stop() -> None:
        server.should_exit = True

    ending.then = stop
    server.run(sockets=[listener])
    ending.raise_signal()
    if server.has_lost_worker:
        raise ValueError(f"the model is gone: {worker.end_of_process()}")
