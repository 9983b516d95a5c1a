"""The relay against a stand-in head: a real gRPC ingress that opens real envelopes."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager

import grpc
import grpc.aio
import httpx
import pytest
import uvicorn
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from placement.policy import Ingress
from runtime.shard import control_pb2, control_pb2_grpc
from security import envelope
from security.errors import SecurityError
from serving.connect import HttpCarrier
from serving.relay import (
    MAX_BODY_BYTES,
    GrpcCarrier,
    HeadRoute,
    HeadUnavailable,
    Relay,
)

INSTANCE = "pipeline-0"

Answer = Callable[
    [envelope.Request, "StandInHead"],
    AsyncIterator[bytes | tuple[int, str] | tuple[int, str, int]],
]


class StandInHead(control_pb2_grpc.IngressServicer):
    """Opens requests and answers as the test says; counts what is running."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.key = X25519PrivateKey.generate()
        self.server_side = envelope.EnvelopeServer(self.key, INSTANCE)
        self.requests: list[envelope.Request] = []
        self.running = 0
        self.cancelled = asyncio.Event()
        self.address = ""
        self.dying: asyncio.Task[None] | None = None
        self._server: grpc.aio.Server | None = None

    async def Exchange(self, request, context):  # type: ignore[no-untyped-def]
        try:
            opened, sealer = self.server_side.open(request.sealed, 16 << 20)
        except SecurityError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, error.code)
        self.requests.append(opened)
        self.running += 1
        try:
            async for piece in self.answer(opened, self):
                record = sealer.head(*piece) if isinstance(piece, tuple) else sealer.body(piece)
                yield control_pb2.SealedRecord(record=record)
            yield control_pb2.SealedRecord(record=sealer.end())
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled.set()
            raise
        finally:
            self.running -= 1

    async def start(self) -> None:
        self._server = grpc.aio.server()
        control_pb2_grpc.add_IngressServicer_to_server(self, self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        await self._server.start()

    async def stop(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            await server.stop(grace=0)

    async def die(self) -> None:
        """Ends the server under the feet of the answer that calls this."""
        self.dying = asyncio.create_task(self.stop())
        await asyncio.sleep(60)


class FixedDirectory:
    """A directory whose next routes the test sets."""

    def __init__(self, *routes: HeadRoute | None) -> None:
        self.routes = list(routes)
        self.forgotten = 0

    async def route(self) -> HeadRoute:
        if self.routes[0] is None:
            raise HeadUnavailable("pipeline-0 is starting")
        return self.routes[0]

    def forget(self) -> None:
        self.forgotten += 1
        if len(self.routes) > 1:
            self.routes.pop(0)

    async def roster(self) -> bytes:
        return b"signed documents"

    async def status(self) -> Mapping[str, object]:
        return {"state": "serving", "weaknesses": ["simulated_tee"]}


def route_to(head: StandInHead, ingress: Ingress = Ingress.PLAIN) -> HeadRoute:
    public = head.key.public_key().public_bytes_raw()
    return HeadRoute(INSTANCE, head.address, public, "00" * 16, ingress, ("simulated_tee",))


async def echo(request: envelope.Request, head: StandInHead) -> AsyncIterator[object]:
    yield (201, "application/json")
    yield json.dumps([request.method, request.path, request.content_type]).encode()
    yield request.body


async def events(request: envelope.Request, head: StandInHead) -> AsyncIterator[object]:
    yield (200, "text/event-stream")
    for number in range(3):
        yield f"data: {number}\n\n".encode()
        await asyncio.sleep(0.01)


async def endless(request: envelope.Request, head: StandInHead) -> AsyncIterator[object]:
    yield (200, "text/event-stream")
    while True:
        yield b"data: x\n\n"
        await asyncio.sleep(0.01)


async def silent(request: envelope.Request, head: StandInHead) -> AsyncIterator[object]:
    await asyncio.sleep(60)
    yield (200, "application/json")


@asynccontextmanager
async def running(relay: Relay) -> AsyncIterator[httpx.AsyncClient]:
    """The relay behind a real HTTP server, on a loop of its own as in production."""
    server = uvicorn.Server(
        uvicorn.Config(relay.application, host="127.0.0.1", port=0, log_level="error")
    )
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
        yield client
    server.should_exit = True
    server.force_exit = True
    await task


@asynccontextmanager
async def head_answering(answer: Answer) -> AsyncIterator[StandInHead]:
    head = StandInHead(answer)
    await head.start()
    yield head
    if head.dying is not None:
        await head.dying
    await head.stop()


def relay_for(directory: FixedDirectory, seals_for: frozenset[Ingress] | None = None) -> Relay:
    return Relay(directory, GrpcCarrier(), seals_for or frozenset({Ingress.PLAIN}))


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 30))


def test_a_plain_request_reaches_the_head_sealed_and_comes_back_whole() -> None:
    async def test() -> None:
        async with (
            head_answering(echo) as head,
            running(relay_for(FixedDirectory(route_to(head)))) as client,
        ):
            response = await client.post(
                "/v1/completions?x=1", content=b"secret", headers={"content-type": "text/plain"}
            )
            assert response.status_code == 201
            assert response.headers["content-type"] == "application/json"
            assert response.content == b'["POST", "/v1/completions?x=1", "text/plain"]secret'

    run(test)


def test_a_stream_passes_event_by_event() -> None:
    async def test() -> None:
        async with (
            head_answering(events) as head,
            running(relay_for(FixedDirectory(route_to(head)))) as client,
        ):
            async with client.stream("POST", "/v1/chat/completions", content=b"{}") as response:
                pieces = [piece async for piece in response.aiter_raw()]
            assert b"".join(pieces) == b"data: 0\n\ndata: 1\n\ndata: 2\n\n"
            assert len(pieces) == 3

    run(test)


@pytest.mark.parametrize("answer", [endless, silent])
def test_a_client_that_goes_away_ends_the_exchange(answer: Answer) -> None:
    async def test() -> None:
        async with (
            head_answering(answer) as head,
            running(relay_for(FixedDirectory(route_to(head)))) as client,
        ):
            asking = asyncio.create_task(client.post("/v1/completions", content=b"{}"))
            while not head.running:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
            asking.cancel()
            await asyncio.wait_for(head.cancelled.wait(), 5)
            while head.running:
                await asyncio.sleep(0.01)

    run(test)


def test_no_head_is_one_retryable_error_in_openais_shape() -> None:
    async def test() -> None:
        async with head_answering(echo) as head:
            route = route_to(head)
        for directory in (FixedDirectory(route), FixedDirectory(None)):
            async with running(relay_for(directory)) as client:
                response = await client.post("/v1/completions", content=b"{}")
                assert response.status_code == 503
                assert int(response.headers["retry-after"]) > 0
                error = response.json()["error"]
                assert error["type"] == "server_error"
                assert error["code"] == "head_unavailable"
                assert (await client.get("/v1/models")).status_code == 503

    run(test)


def test_a_request_follows_the_head_to_its_new_key() -> None:
    async def test() -> None:
        async with head_answering(echo) as gone:
            stale = route_to(gone)
        async with head_answering(echo) as head:
            directory = FixedDirectory(stale, route_to(head))
            async with running(relay_for(directory)) as client:
                assert (await client.get("/v1/models")).status_code == 201
            # A restarted head at the same address has another key and refuses the old one.
            other_key = HeadRoute(**{**_fields(route_to(head)), "shard_key": stale.shard_key})
            directory = FixedDirectory(other_key, route_to(head))
            async with running(relay_for(directory)) as client:
                assert (await client.get("/v1/models")).status_code == 201
            assert directory.forgotten == 1

    run(test)


def _fields(route: HeadRoute) -> dict[str, object]:
    return {name: getattr(route, name) for name in route.__slots__}


def test_a_stream_that_breaks_off_says_so_and_is_not_finished() -> None:
    async def dies(request: envelope.Request, head: StandInHead) -> AsyncIterator[object]:
        yield (200, "text/event-stream")
        yield b"data: 0\n\n"
        await asyncio.sleep(0.2)
        await head.die()

    async def test() -> None:
        async with (
            head_answering(dies) as head,
            running(relay_for(FixedDirectory(route_to(head)))) as client,
        ):
            response = await client.post("/v1/chat/completions", content=b"{}")
            first, last = response.text.strip().split("\n\n")
            assert first == "data: 0"
            assert json.loads(last.removeprefix("data: "))["error"]["code"] == "interrupted"
            assert "[DONE]" not in response.text

    run(test)


def test_a_head_that_cancels_calls_as_it_shuts_down_is_a_head_that_is_gone() -> None:
    class Ending(StandInHead):
        async def Exchange(self, request, context):  # type: ignore[no-untyped-def]
            await context.abort(grpc.StatusCode.CANCELLED, "shutting down")
            yield control_pb2.SealedRecord()

    async def test() -> None:
        head = Ending(echo)
        await head.start()
        async with running(relay_for(FixedDirectory(route_to(head)))) as client:
            response = await client.post("/v1/completions", content=b"{}")
            assert response.status_code == 503
            assert response.json()["error"]["code"] == "head_unavailable"
        await head.stop()

    run(test)


def test_half_an_answer_is_never_shown_as_a_whole_one() -> None:
    async def dies(request: envelope.Request, head: StandInHead) -> AsyncIterator[object]:
        yield (200, "application/json")
        yield b'{"half": '
        await head.die()

    async def test() -> None:
        async with (
            head_answering(dies) as head,
            running(relay_for(FixedDirectory(route_to(head)))) as client,
        ):
            assert (await client.post("/v1/completions", content=b"{}")).status_code == 503

    run(test)


def test_plain_requests_are_refused_where_the_policy_says_sealed() -> None:
    async def test() -> None:
        async with head_answering(echo) as head:
            directory = FixedDirectory(route_to(head, Ingress.SEALED))
            async with running(relay_for(directory)) as client:
                response = await client.post("/v1/completions", content=b"prompt")
                assert response.status_code == 403
                assert "bulkhead connect" in response.json()["error"]["message"]
            assert head.requests == []

    run(test)


def test_the_clients_proxy_seals_and_the_relay_in_between_reads_nothing() -> None:
    seen: list[bytes] = []

    class Watching(GrpcCarrier):
        async def exchange(self, route, sealed):  # type: ignore[no-untyped-def]
            seen.append(sealed)
            async for piece in super().exchange(route, sealed):
                seen.append(piece)
                yield piece

    async def test() -> None:
        async with head_answering(echo) as head:
            directory = FixedDirectory(route_to(head, Ingress.SEALED))
            middle = Relay(directory, Watching(), frozenset({Ingress.PLAIN}))
            async with running(middle) as far:
                near = Relay(directory, HttpCarrier(far), frozenset(Ingress))
                async with running(near) as client:
                    response = await client.post("/v1/completions", content=b"my secret prompt")
                    assert response.status_code == 201
                    assert response.content.endswith(b"my secret prompt")
            assert len(seen) > 1
            assert b"secret" not in b"".join(seen)

    run(test)


async def overloaded(request: envelope.Request, head: StandInHead) -> AsyncIterator[object]:
    yield (429, "application/json", 7)
    yield b'{"error": {}}'


def test_the_clients_credential_reaches_the_head_and_nobody_else(
    caplog: pytest.LogCaptureFixture,
) -> None:
    headers: list[list[tuple[bytes, bytes]]] = []
    caplog.set_level(logging.DEBUG)

    async def test() -> None:
        async with head_answering(echo) as head:
            plain = relay_for(FixedDirectory(route_to(head)))
            async with running(plain) as client:
                assert (await client.get("/v1/models")).status_code == 201
                auth = {"authorization": "Bearer sk-plain"}
                assert (await client.get("/v1/models", headers=auth)).status_code == 201
            directory = FixedDirectory(route_to(head, Ingress.SEALED))
            middle = Relay(directory, GrpcCarrier(), frozenset({Ingress.PLAIN}))
            inner = middle.application

            async def watched(scope, receive, send):  # type: ignore[no-untyped-def]
                headers.append(scope.get("headers", []))
                await inner(scope, receive, send)

            middle.application = watched  # type: ignore[assignment]
            async with running(middle) as far:
                near = Relay(directory, HttpCarrier(far), frozenset(Ingress))
                async with running(near) as client:
                    auth = {"authorization": "Bearer sk-sealed"}
                    assert (await client.get("/v1/models", headers=auth)).status_code == 201
            credentials = [request.credential for request in head.requests]
            assert credentials == ["", "Bearer sk-plain", "Bearer sk-sealed"]
            assert headers and not any(
                secret in str(headers) for secret in ("sk-plain", "sk-sealed")
            )

    run(test)
    assert not any(secret in caplog.text for secret in ("sk-plain", "sk-sealed"))


@pytest.mark.parametrize("credential", [b"x" * 8193, "Bearer é".encode("latin-1")])
def test_credentials_that_cannot_be_sealed_are_refused_without_being_repeated(
    credential: bytes,
) -> None:
    async def test() -> None:
        async with (
            head_answering(echo) as head,
            running(relay_for(FixedDirectory(route_to(head)))) as client,
        ):
            auth = {b"authorization": credential}
            response = await client.post("/v1/completions", content=b"{}", headers=auth)
            assert response.status_code == 431
            assert response.json()["error"]["code"] == "credential_refused"
            assert credential.decode("latin-1") not in response.text
            assert head.requests == []

    run(test)


def test_retry_after_reaches_the_client_through_both_relays() -> None:
    async def test() -> None:
        async with head_answering(overloaded) as head:
            directory = FixedDirectory(route_to(head))
            async with running(relay_for(directory)) as far:
                near = Relay(directory, HttpCarrier(far), frozenset(Ingress))
                async with running(near) as client:
                    for endpoint in (far, client):
                        response = await endpoint.post("/v1/completions", content=b"{}")
                        assert response.status_code == 429
                        assert response.headers["retry-after"] == "7"

    run(test)


def test_a_changed_answer_is_refused() -> None:
    class Flipping(GrpcCarrier):
        async def exchange(self, route, sealed):  # type: ignore[no-untyped-def]
            async for piece in super().exchange(route, sealed):
                yield piece[:-1] + bytes([piece[-1] ^ 1])

    async def test() -> None:
        async with head_answering(echo) as head:
            relay = Relay(FixedDirectory(route_to(head)), Flipping(), frozenset({Ingress.PLAIN}))
            async with running(relay) as client:
                response = await client.post("/v1/completions", content=b"{}")
                assert response.status_code == 502
                assert response.json()["error"]["code"] == "response_tampered"

    run(test)


def test_bodies_are_bounded_before_they_are_kept() -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(MAX_BODY_BYTES // 65536 + 2):
            yield bytes(65536)

    async def test() -> None:
        async with (
            head_answering(echo) as head,
            running(relay_for(FixedDirectory(route_to(head)))) as client,
        ):
            stated = await client.post("/v1/completions", content=bytes(MAX_BODY_BYTES + 1))
            assert stated.status_code == 413
            chunked = await client.post("/v1/completions", content=pieces())
            assert chunked.status_code == 413
            assert head.requests == []

    run(test)


def test_other_paths_and_the_deployments_own() -> None:
    async def test() -> None:
        async with running(relay_for(FixedDirectory(None))) as client:
            assert (await client.get("/nothing")).json()["error"]["code"] == "not_found"
            assert (await client.get("/bulkhead/status")).json()["weaknesses"] == ["simulated_tee"]
            assert (await client.get("/bulkhead/roster")).content == b"signed documents"
            assert (await client.get("/bulkhead/health")).status_code == 503
            assert (await client.post("/bulkhead/sealed", content=b"x")).status_code == 503

    run(test)


def test_many_streams_at_once_leave_nothing_behind() -> None:
    async def test() -> None:
        async with (
            head_answering(events) as head,
            running(relay_for(FixedDirectory(route_to(head)))) as client,
        ):
            answers = await asyncio.gather(
                *(client.post("/v1/chat/completions", content=b"{}") for _ in range(40))
            )
            assert {answer.text for answer in answers} == {"data: 0\n\ndata: 1\n\ndata: 2\n\n"}
            while head.running:
                await asyncio.sleep(0.01)
        assert threading.active_count() < 50

    run(test)


def test_what_cannot_be_sealed_is_the_clients_fault_and_no_tampered_answer(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def test() -> None:
        async with (
            head_answering(echo) as head,
            running(relay_for(FixedDirectory(route_to(head)))) as client,
        ):
            typed = {b"content-type": "application/jsön".encode("latin-1")}
            for response in (
                await client.post("/v1/completions", content=b"{}", headers=typed),
                await client.get("/v1/modelé"),
            ):
                assert response.status_code == 400
                assert response.json()["error"]["code"] == "request_malformed"
                assert response.json()["error"]["type"] == "invalid_request_error"
            assert head.requests == []

    run(test)
    assert "refused" not in caplog.text
