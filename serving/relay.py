"""The relay: HTTP on one side, sealed records to the head shard on the other. Knows no Ray.

Shared by the Serve deployment (`serving.app`), which reaches the head over gRPC, and by the
client's local proxy (`serving.connect`), which reaches it through the deployment:

    plain    any method on /v1/...     read here, sealed to the head's key with the client's
                                       Authorization header, answer opened here
    sealed   POST /bulkhead/sealed     opaque both ways; the relay has no key
    both     GET /bulkhead/status      state, plan, weaknesses
             GET /bulkhead/roster      the signed documents that a client verifies by itself
             GET /bulkhead/health      200 when the head takes requests, else 503

The policy decides which of the first two exist. A client that goes away cancels the exchange, and
the head frees its slot.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol

import grpc
import grpc.aio
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from placement.policy import Ingress
from runtime.shard import control_pb2, control_pb2_grpc
from security import envelope
from security.errors import SecurityError

log = logging.getLogger("bulkhead.serving")

MAX_BODY_BYTES = 8 << 20
"""Longest request body that is taken."""

MAX_SEALED_BYTES = 16 << 20
"""Longest sealed request, as runtime/shard/control.proto says."""

MAX_ANSWER_BYTES = 64 << 20
"""Longest answer that is not a stream; it is collected before its first byte is sent."""

RETRY_AFTER_S = 2
HEALTH_TIMEOUT_S = 5.0
EVENT_STREAM = "text/event-stream"

_CHANNEL_OPTIONS = [
    ("grpc.enable_http_proxy", 0),
    ("grpc.max_send_message_length", MAX_SEALED_BYTES + 1024),
    ("grpc.max_receive_message_length", MAX_SEALED_BYTES + 1024),
    # A head that is cut off for less than this keeps its streams; one that died is noticed at once.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 45_000),
    # gRPC 1.85 ignores the option above while this one, by default a minute, is longer.
    ("grpc.http2.ping_timeout_ms", 45_000),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),
]


class HeadUnavailable(Exception):
    """No answer can be had from the head now; asking again later may work."""


class RequestRefused(Exception):
    """The head took the request and refused it before any answer began."""


class AnswerTooLong(Exception):
    """An answer that is not a stream is longer than is collected."""


@dataclass(frozen=True, slots=True)
class HeadRoute:
    """Where the head shard is and which key it has, from a roster that has been verified.

    Attributes:
        instance: name of the pipeline instance.
        address: "host:port" of its ingress.
        shard_key: X25519 public key (32 bytes).
        epoch: epoch of the roster, as hex.
        ingress: how the policy lets prompts in.
        weaknesses: names of the weaknesses in force.
        serial: the roster's serial, which only grows.
    """

    instance: str
    address: str
    shard_key: bytes
    epoch: str
    ingress: Ingress
    weaknesses: tuple[str, ...]
    serial: int = 0


class HeadDirectory(Protocol):
    """Finds the head. Implementations verify what they find against the owner's pinned key."""

    async def route(self) -> HeadRoute:
        """The route of the current epoch; raises HeadUnavailable."""

    def forget(self) -> None:
        """Says that the route did not work, so that the next one is looked up anew."""

    async def roster(self) -> bytes:
        """The signed documents of the instance, for a client; raises HeadUnavailable."""

    async def status(self) -> Mapping[str, object]:
        """What `GET /bulkhead/status` answers, as plain JSON values."""


class Carrier(Protocol):
    """Carries one sealed request to the head and its sealed answer back."""

    def exchange(self, route: HeadRoute, sealed: bytes) -> AsyncGenerator[bytes, None]:
        """Yields the answer's bytes; closing the generator aborts the request.

        Raises:
            HeadUnavailable: nobody answers, or the answer broke off.
            RequestRefused: the head refused the sealed request as such.
        """

    async def ready(self, route: HeadRoute) -> bool:
        """Whether the head takes requests now; raises HeadUnavailable where nobody answers."""


class GrpcCarrier:
    """Carries over gRPC straight to the head's ingress; channels are kept."""

    def __init__(self) -> None:
        self._address = ""
        self._channel: grpc.aio.Channel | None = None

    async def exchange(self, route: HeadRoute, sealed: bytes) -> AsyncGenerator[bytes, None]:
        """See `Carrier.exchange`."""
        stub = control_pb2_grpc.IngressStub(self._channel_to(route.address))
        call = stub.Exchange(control_pb2.SealedRequest(sealed=sealed))
        try:
            async for message in call:
                yield message.record
        except grpc.aio.AioRpcError as error:
            if error.code() == grpc.StatusCode.INVALID_ARGUMENT:
                raise RequestRefused(error.details() or "refused") from None
            raise HeadUnavailable(
                f"the head shard at {route.address}: {error.code().name.lower()}"
            ) from None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            # Nobody cancelled us: gRPC also raises this when the head ends a call as cancelled,
            # as a server that is shutting down does.
            raise HeadUnavailable(f"the head shard at {route.address}: cancelled") from None
        finally:
            call.cancel()

    async def ready(self, route: HeadRoute) -> bool:
        """See `Carrier.ready`."""
        stub = control_pb2_grpc.IngressStub(self._channel_to(route.address))
        try:
            reply = await stub.Health(control_pb2.HealthRequest(), timeout=HEALTH_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise HeadUnavailable(
                f"the head shard at {route.address}: {error.code().name.lower()}"
            ) from None
        return bool(reply.ready)

    def _channel_to(self, address: str) -> grpc.aio.Channel:
        # The old channel is left to its calls in flight; it closes when the last one lets it go.
        if self._channel is None or self._address != address:
            self._channel = grpc.aio.insecure_channel(address, options=_CHANNEL_OPTIONS)
            self._address = address
        return self._channel


class Relay:
    """The HTTP side. `application` is the ASGI application.

    Args:
        directory: finds the head.
        carrier: reaches it.
        seals_for: ingress rules under which plain requests are taken and sealed here. Ray's side
            may for `plain` only; the proxy on a client's own machine for both.
    """

    def __init__(
        self, directory: HeadDirectory, carrier: Carrier, seals_for: frozenset[Ingress]
    ) -> None:
        self._directory = directory
        self._carrier = carrier
        self._seals_for = seals_for
        self.application = Starlette(
            routes=[
                Route("/v1/{rest:path}", _Endpoint(self._plain)),
                Route("/bulkhead/sealed", _Endpoint(self._sealed), methods=["POST"]),
                Route("/bulkhead/status", self._status, methods=["GET"]),
                Route("/bulkhead/roster", self._roster, methods=["GET"]),
                Route("/bulkhead/health", self._health, methods=["GET"]),
                Route("/{rest:path}", self._not_found),
            ]
        )

    # -- plain requests ------------------------------------------------------------------------

    async def _plain(self, request: Request, send: Send) -> None:
        route = await self._directory.route()
        if route.ingress not in self._seals_for:
            await _send(
                send,
                error_response(
                    403,
                    "the policy says ingress: sealed, so this endpoint takes no plain requests; "
                    "run `bulkhead connect` on your machine and send them there",
                    "plain_ingress_refused",
                ),
            )
            return
        body = await _read_body(request, MAX_BODY_BYTES)
        query = f"?{request.url.query}" if request.url.query else ""
        inner = envelope.Request(
            method=request.method,
            path=request.url.path + query,
            content_type=request.headers.get("content-type", ""),
            body=body,
            credential=_credential(request),
        )
        answer = self._ask(route, inner)
        async with aclosing(answer):
            await self._send_answer(answer, send)

    async def _ask(
        self, route: HeadRoute, request: envelope.Request
    ) -> AsyncGenerator[envelope.ResponseEvent, None]:
        """Asks the head; once more when the head has changed and no answer had begun."""
        for attempt in range(2):
            sealed, opener = envelope.EnvelopeClient(route.shard_key, route.instance).seal(request)
            begun = False
            try:
                async with aclosing(self._carrier.exchange(route, sealed)) as pieces:
                    async for piece in pieces:
                        for event in opener.feed(piece):
                            begun = True
                            yield event
                opener.finish()
                return
            except (HeadUnavailable, RequestRefused, envelope.ResponseTruncated) as error:
                self._directory.forget()
                if begun or attempt:
                    raise HeadUnavailable(str(error)) from None
                again = await self._directory.route()
                if again.shard_key == route.shard_key:
                    raise HeadUnavailable(str(error)) from None
                route = again

    async def _send_answer(self, answer: AsyncIterator[envelope.ResponseEvent], send: Send) -> None:
        head = await anext(answer)
        assert isinstance(head, envelope.ResponseHead), "an answer begins with its head"
        if head.content_type.split(";")[0].strip() == EVENT_STREAM:
            await _send_events(head, answer, send)
            return
        # Collected, so that an answer that breaks off is one clear error instead of half a body.
        body = bytearray()
        async for event in answer:
            assert isinstance(event, bytes), "the body follows the head"
            body += event
            if len(body) > MAX_ANSWER_BYTES:
                raise AnswerTooLong
        response = Response(bytes(body), head.status, media_type=head.content_type)
        if head.retry_after is not None:
            response.headers["retry-after"] = str(head.retry_after)
        await _send(send, response)

    # -- sealed requests -----------------------------------------------------------------------

    async def _sealed(self, request: Request, send: Send) -> None:
        route = await self._directory.route()
        sealed = await _read_body(request, MAX_SEALED_BYTES)
        async with aclosing(self._carrier.exchange(route, sealed)) as pieces:
            try:
                first = await anext(pieces)
            except (StopAsyncIteration, HeadUnavailable):
                self._directory.forget()
                raise
            headers = [
                (b"content-type", b"application/octet-stream"),
                (b"cache-control", b"no-store"),
            ]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": first, "more_body": True})
            try:
                async for piece in pieces:
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
            except HeadUnavailable as error:
                # The client sees an answer without its end mark, which it cannot mistake.
                self._directory.forget()
                log.warning("a sealed answer broke off: %s", error)
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    # -- about the deployment ------------------------------------------------------------------

    async def _status(self, request: Request) -> Response:
        return JSONResponse(dict(await self._directory.status()))

    async def _roster(self, request: Request) -> Response:
        try:
            content = await self._directory.roster()
        except HeadUnavailable as error:
            return unavailable_response(str(error))
        return Response(content, media_type="application/octet-stream")

    async def _health(self, request: Request) -> Response:
        try:
            route = await self._directory.route()
            if await self._carrier.ready(route):
                return JSONResponse({"ready": True})
        except HeadUnavailable as error:
            self._directory.forget()
            return unavailable_response(str(error))
        return unavailable_response("the head shard has no epoch; it is starting or recovering")

    async def _not_found(self, request: Request) -> Response:
        return error_response(
            404, f"no such path: {request.url.path[:200]}; the API is under /v1", "not_found"
        )


class _Endpoint:
    """An ASGI endpoint that stops its work when the client goes away."""

    def __init__(self, work: Callable[[Request, Send], Coroutine[object, object, None]]) -> None:
        self._work = work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sender = _OnceSender(send)
        request = Request(scope, receive)
        body_read = asyncio.Event()
        request.state.body_read = body_read
        work = asyncio.ensure_future(self._answer(request, sender))
        # Only one task may wait for the client at a time, and the body comes first.
        gone = asyncio.ensure_future(_wait_for_disconnect(receive, body_read))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            tasks = [task for task in (work, gone) if not task.done()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if work.done() and not work.cancelled():
            work.result()

    async def _answer(self, request: Request, send: _OnceSender) -> None:
        try:
            await self._work(request, send)
        except ClientDisconnect:
            return
        except Exception as error:
            if send.started:
                raise
            await _send(send, _failure_response(error))


class _OnceSender:
    """Passes messages on and remembers whether the answer has started."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.started = False

    async def __call__(self, message: object) -> None:
        self.started = True
        await self._send(message)  # type: ignore[arg-type]


class _BodyTooLongError(Exception):
    def __init__(self, limit: int) -> None:
        super().__init__(f"the request's body is longer than {limit} bytes")


class _CredentialRefusedError(Exception):
    """The Authorization header cannot be sealed; the text never holds it."""


async def _wait_for_disconnect(receive: Receive, body_read: asyncio.Event) -> None:
    await body_read.wait()
    while (await receive())["type"] != "http.disconnect":
        pass


async def _read_body(request: Request, limit: int) -> bytes:
    """Reads the request's body; raises _BodyTooLongError as soon as it is."""
    stated = request.headers.get("content-length", "")
    if stated.isdecimal() and int(stated) > limit:
        raise _BodyTooLongError(limit)
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > limit:
            raise _BodyTooLongError(limit)
    request.state.body_read.set()
    return bytes(body)


def _credential(request: Request) -> str:
    """The client's Authorization header, which only the head may use.

    Raises _CredentialRefusedError where it is too long or not ASCII, as HTTP wants it to be.
    """
    credential = request.headers.get("authorization", "")
    if not credential.isascii() or len(credential) > envelope.MAX_CREDENTIAL_BYTES:
        raise _CredentialRefusedError(
            f"Authorization: expected at most {envelope.MAX_CREDENTIAL_BYTES} ASCII characters, "
            f"found {len(credential)} characters; send a shorter key"
        )
    return credential


async def _send_events(
    head: envelope.ResponseHead, answer: AsyncIterator[envelope.ResponseEvent], send: Send
) -> None:
    headers = [
        (b"content-type", head.content_type.encode("latin-1")),
        (b"cache-control", b"no-cache"),
        (b"x-accel-buffering", b"no"),
    ]
    await send({"type": "http.response.start", "status": head.status, "headers": headers})
    try:
        async for event in answer:
            assert isinstance(event, bytes), "the body follows the head"
            await send({"type": "http.response.body", "body": event, "more_body": True})
    except (HeadUnavailable, SecurityError) as error:
        log.warning("a stream broke off: %s", error)
        # In the shape in which OpenAI's clients raise an error from inside a stream.
        told = json.dumps(_error_body(_INTERRUPTED, "server_error", "interrupted"))
        last = f"data: {told}\n\n".encode()
        await send({"type": "http.response.body", "body": last, "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


_INTERRUPTED = (
    "the answer was interrupted because the head shard went away; the request can be sent again"
)


async def _send(send: Send | _OnceSender, response: Response) -> None:
    await send(
        {
            "type": "http.response.start",
            "status": response.status_code,
            "headers": response.raw_headers,
        }
    )
    await send({"type": "http.response.body", "body": bytes(response.body), "more_body": False})


def _failure_response(error: Exception) -> Response:
    """The response for what went wrong before an answer had started."""
    match error:
        case _BodyTooLongError():
            return error_response(413, f"{error}; send less", "request_too_long")
        case _CredentialRefusedError():
            return error_response(431, str(error), "credential_refused")
        case envelope.RequestTooLong():
            return error_response(414, str(error), error.code)
        case envelope.RequestMalformed():
            return error_response(400, str(error), error.code)
        case RequestRefused():
            return error_response(400, f"the head refused the request: {error}", "refused")
        case HeadUnavailable():
            return unavailable_response(str(error))
        case AnswerTooLong():
            return error_response(
                502, "the answer is too long to be sent at once; ask for a stream", "too_long"
            )
        case StopAsyncIteration():
            return unavailable_response("the head shard gave no answer")
        case SecurityError():
            log.error("answer refused: %s: %s", error.code, error)
            return error_response(502, f"the answer did not verify: {error}", error.code)
        case _:
            # Its text could quote the request.
            log.error("relay failed: %s", type(error).__name__)
            return error_response(500, "internal error in the relay", "internal_error")


def unavailable_response(reason: str) -> Response:
    """The one retryable error: the head cannot be reached now."""
    response = error_response(
        503, f"no shard answers now ({reason}); send the request again", "head_unavailable"
    )
    response.headers["retry-after"] = str(RETRY_AFTER_S)
    return response


def error_response(status: int, message: str, code: str) -> Response:
    """An error in OpenAI's shape."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse(_error_body(message, kind, code), status)


def _error_body(message: str, kind: str, code: str) -> dict[str, dict[str, str | None]]:
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}
