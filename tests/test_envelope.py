"""Sealed requests reach one head once; answers arrive whole or not at all."""

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from security import envelope
from security.envelope import (
    EnvelopeClient,
    EnvelopeError,
    EnvelopeServer,
    ReplayMemoryFull,
    Request,
    RequestMalformed,
    RequestNotForThisHead,
    RequestReplayed,
    RequestStale,
    RequestTooLong,
    ResponseHead,
    ResponseOpener,
    ResponseSealer,
    ResponseTampered,
    ResponseTruncated,
)

HEAD = X25519PrivateKey.from_private_bytes(bytes(range(32)))
HEAD_KEY = HEAD.public_key().public_bytes_raw()
REQUEST = Request(
    "POST",
    "/v1/completions",
    "application/json",
    b'{"prompt": "secret words"}',
    "Bearer sk-credential",
)
LIMIT = 1 << 20


class Clock:
    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def client(clock: Clock) -> EnvelopeClient:
    return EnvelopeClient(HEAD_KEY, "run-1", clock)


@pytest.fixture
def server(clock: Clock) -> EnvelopeServer:
    return EnvelopeServer(HEAD, "run-1", clock)


def _records(stream: bytes) -> tuple[bytes, list[bytes]]:
    start, rest, records = stream[:36], stream[36:], []
    while rest:
        end = 4 + int.from_bytes(rest[:4], "big")
        records.append(rest[:end])
        rest = rest[end:]
    return start, records


def _answer(sealer: ResponseSealer, *bodies: bytes) -> bytes:
    head = sealer.head(200, "text/event-stream")
    return head + b"".join(map(sealer.body, bodies)) + sealer.end()


def test_round_trip(client: EnvelopeClient, server: EnvelopeServer) -> None:
    sealed, opener = client.seal(REQUEST)
    request, sealer = server.open(sealed, LIMIT)
    assert request == REQUEST
    stream = _answer(sealer, b"one", b"", b"two" * 30_000)
    events = opener.feed(stream)
    opener.finish()
    assert events[0] == ResponseHead(200, "text/event-stream")
    assert b"".join(events[1:]) == b"one" + b"two" * 30_000
    for secret in (b"secret", b"prompt", b"completions", b"event-stream", b"two", b"sk-cred"):
        assert secret not in sealed + stream
    assert "sk-cred" not in repr(request) and "secret" not in repr(request)


@pytest.mark.parametrize("seconds", [None, 1, envelope.MAX_RETRY_AFTER_SECONDS])
def test_retry_after_comes_with_the_head(seconds: int | None) -> None:
    sealer = ResponseSealer(bytes(32))
    events = ResponseOpener(bytes(32)).feed(sealer.head(429, "application/json", seconds))
    assert events == [ResponseHead(429, "application/json", seconds)]


@pytest.mark.parametrize("seconds", [-1, 0, envelope.MAX_RETRY_AFTER_SECONDS + 1])
def test_retry_after_out_of_bounds_is_a_bug_here_and_tampering_there(seconds: int) -> None:
    with pytest.raises(AssertionError):
        ResponseSealer(bytes(32)).head(429, "", seconds)
    if seconds > 0:
        sealer = ResponseSealer(bytes(32))
        start = envelope._RESPONSE_MAGIC + sealer._salt
        record = sealer._record(envelope._HEAD, envelope._START.pack(429, seconds))
        with pytest.raises(ResponseTampered, match="head is malformed"):
            ResponseOpener(bytes(32)).feed(start + record)


@given(body=st.binary(max_size=5000), content=st.binary(max_size=5000), data=st.data())
def test_any_bytes_cut_anywhere(body: bytes, content: bytes, data: st.DataObject) -> None:
    sealed, opener = EnvelopeClient(HEAD_KEY, "run-1").seal(Request("POST", "/", "", body))
    request, sealer = EnvelopeServer(HEAD, "run-1").open(sealed, LIMIT)
    assert request.body == body
    stream, events = _answer(sealer, content), []
    while stream:
        size = data.draw(st.integers(1, 700))
        events += opener.feed(stream[:size])
        stream = stream[size:]
    opener.finish()
    assert b"".join(events[1:]) == content


def test_tokens_of_any_usual_length_look_alike(
    client: EnvelopeClient, server: EnvelopeServer
) -> None:
    sealed, _ = client.seal(REQUEST)
    _, sealer = server.open(sealed, LIMIT)
    sealer.head(200, "")
    assert len({len(sealer.body(b"x" * length)) for length in (1, 100, 300, 500)}) == 1
    lengths = {
        len(client.seal(Request("POST", "/", "", b"x" * length))[0]) for length in (1, 10, 500)
    }
    assert len(lengths) == 1


def test_requests_for_another_key_or_instance_are_refused(
    client: EnvelopeClient, clock: Clock
) -> None:
    sealed, _ = client.seal(REQUEST)
    for other in (
        EnvelopeServer(X25519PrivateKey.generate(), "run-1", clock),
        EnvelopeServer(HEAD, "run-2", clock),
    ):
        with pytest.raises(RequestNotForThisHead):
            other.open(sealed, LIMIT)


def test_changed_and_cut_requests_are_refused(
    client: EnvelopeClient, server: EnvelopeServer
) -> None:
    sealed, _ = client.seal(REQUEST)
    for at in (0, 31, 32, 100, len(sealed) - 1):
        changed = bytearray(sealed)
        changed[at] ^= 0x80
        with pytest.raises(RequestNotForThisHead):
            server.open(bytes(changed), LIMIT)
    for length in (0, 31, 32, 47, 48, len(sealed) - 1):
        with pytest.raises(RequestNotForThisHead):
            server.open(sealed[:length], LIMIT)
    with pytest.raises(RequestNotForThisHead):
        server.open(bytes(len(sealed)), LIMIT)
    # None of this used up the request itself.
    assert server.open(sealed, LIMIT)[0] == REQUEST


def test_a_whole_request_is_answered_once(
    client: EnvelopeClient, server: EnvelopeServer, clock: Clock
) -> None:
    sealed, _ = client.seal(REQUEST)
    server.open(sealed, LIMIT)
    for age in (0, 299, 300):
        clock.now = 1_800_000_000.0 + age
        with pytest.raises(RequestReplayed):
            server.open(sealed, LIMIT)
    for age in (301, 100_000):
        clock.now = 1_800_000_000.0 + age
        with pytest.raises(RequestStale, match="clock"):
            server.open(sealed, LIMIT)


def test_a_clock_set_back_brings_no_replay(
    client: EnvelopeClient, server: EnvelopeServer, clock: Clock
) -> None:
    sealed, _ = client.seal(REQUEST)
    server.open(sealed, LIMIT)
    clock.now += 700
    server.open(client.seal(REQUEST)[0], LIMIT)
    clock.now -= 700
    with pytest.raises(RequestStale):
        server.open(sealed, LIMIT)


def test_a_request_from_a_fast_clock_is_remembered_long_enough(
    server: EnvelopeServer, clock: Clock
) -> None:
    sealed, _ = EnvelopeClient(HEAD_KEY, "run-1", lambda: clock.now + 299).seal(REQUEST)
    server.open(sealed, LIMIT)
    start = clock.now
    for age in range(0, 599, 23):
        clock.now = start + age
        with pytest.raises(RequestReplayed):
            server.open(sealed, LIMIT)
    clock.now = start + 601
    with pytest.raises(RequestStale):
        server.open(sealed, LIMIT)


def test_memory_is_bounded_and_empties(
    client: EnvelopeClient, server: EnvelopeServer, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(envelope, "MAX_REMEMBERED", 2)
    server.open(client.seal(REQUEST)[0], LIMIT)
    server.open(client.seal(REQUEST)[0], LIMIT)
    with pytest.raises(ReplayMemoryFull):
        server.open(client.seal(REQUEST)[0], LIMIT)
    clock.now += 601
    server.open(client.seal(REQUEST)[0], LIMIT)
    assert len(server._seen) == len(server._expiries) == 1


def test_limits_of_requests(client: EnvelopeClient, server: EnvelopeServer) -> None:
    sealed, _ = client.seal(REQUEST)
    with pytest.raises(RequestTooLong):
        server.open(sealed, len(sealed) - 1)
    with pytest.raises(RequestTooLong, match="path"):
        client.seal(Request("GET", "/" * 2049, "", b""))
    with pytest.raises(RequestMalformed, match="method"):
        client.seal(Request("GÉT", "/", "", b""))
    longest = "x" * envelope.MAX_CREDENTIAL_BYTES
    assert server.open(client.seal(Request("GET", "/", "", b"", longest))[0], LIMIT)[0].credential
    with pytest.raises(RequestTooLong, match="credential") as refused:
        client.seal(Request("GET", "/", "", b"", longest + "x"))
    assert "xxx" not in str(refused.value)
    with pytest.raises(RequestMalformed, match="credential"):
        client.seal(Request("GET", "/", "", b"", "Bearer é"))


@given(st.binary(max_size=2000))
def test_sealed_nonsense_only_raises_named_errors(plain: bytes) -> None:
    sealed = envelope._SUITE.encrypt(
        plain, HEAD.public_key(), info=envelope._info("run-1", HEAD_KEY)
    )
    with pytest.raises(EnvelopeError):
        EnvelopeServer(HEAD, "run-1").open(sealed, LIMIT)


def test_two_answers_to_one_response_key_share_no_key_stream() -> None:
    first, second = ResponseSealer(bytes(32)), ResponseSealer(bytes(32))
    assert first.head(200, "")[36:] != second.head(200, "")[36:]


def _opener_and_parts() -> tuple[ResponseOpener, bytes, list[bytes]]:
    key = bytes(range(32))
    start, records = _records(_answer(ResponseSealer(key), b"a", b"b", b"c"))
    assert len(records) == 5
    return ResponseOpener(key), start, records


@pytest.mark.parametrize("kept", range(5))
def test_truncated_answers_are_found(kept: int) -> None:
    opener, start, records = _opener_and_parts()
    opener.feed(start + b"".join(records[:kept]) + records[kept][:-1])
    with pytest.raises(ResponseTruncated):
        opener.finish()


def test_no_answer_at_all_is_truncated() -> None:
    opener, start, _ = _opener_and_parts()
    with pytest.raises(ResponseTruncated):
        opener.finish()
    opener.feed(start)
    with pytest.raises(ResponseTruncated):
        opener.finish()


@pytest.mark.parametrize(
    "order",
    [(1, 0, 2, 3, 4), (0, 2, 1, 3, 4), (0, 1, 1, 2), (0, 2), (0, 4), (4,), (0, 1, 2, 3, 4, 4)],
)
def test_reordered_repeated_and_missing_records_are_found(order: tuple[int, ...]) -> None:
    opener, start, records = _opener_and_parts()
    with pytest.raises(ResponseTampered):
        opener.feed(start + b"".join(records[index] for index in order))
    with pytest.raises(ResponseTampered, match="before"):
        opener.feed(b"")


@given(st.data())
def test_every_changed_byte_is_found(data: st.DataObject) -> None:
    opener, start, records = _opener_and_parts()
    stream = bytearray(start + b"".join(records))
    stream[data.draw(st.integers(0, len(stream) - 1))] ^= data.draw(st.integers(1, 255))
    # A changed length may promise more than will ever come.
    with pytest.raises((ResponseTampered, ResponseTruncated)):
        opener.feed(bytes(stream))
        opener.finish()


def test_an_answer_for_another_request_is_refused() -> None:
    _, start, records = _opener_and_parts()
    with pytest.raises(ResponseTampered):
        ResponseOpener(bytes(32)).feed(start + records[0])


def test_huge_record_is_refused_before_it_is_awaited() -> None:
    opener, start, _ = _opener_and_parts()
    with pytest.raises(ResponseTampered, match="bucket"):
        opener.feed(start + b"\xff\xff\xff\xff")
    with pytest.raises(ResponseTampered, match="begin"):
        ResponseOpener(bytes(32)).feed(b"HTTP/1.1 502 Bad Gateway")


def test_misuse_of_the_sealer_is_a_bug() -> None:
    sealer = ResponseSealer(bytes(32))
    with pytest.raises(AssertionError):
        sealer.body(b"x")
    sealer.head(200, "")
    sealer.end()
    with pytest.raises(AssertionError):
        sealer.body(b"x")
