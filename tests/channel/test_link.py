"""Links over real sockets, with a relay in between that changes what it likes."""

import contextlib
import logging
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from security.channel import link as link_module
from security.channel.link import (
    Edge,
    HandshakeFailed,
    Link,
    LinkClosed,
    LinkKeys,
    LinkListener,
    LinkTampered,
    LinkTimeout,
    LinkTruncated,
    MessageTooLong,
    connect,
)
from tests import null_cipher

EDGE = Edge("stage-0", "stage-1")
ROSTER = b"\xab" * 32
EPOCH = bytes(range(16))
SOURCE, TARGET, STRANGER = (X25519PrivateKey.from_private_bytes(bytes([n]) * 32) for n in (1, 2, 3))
MIB = 1 << 20


def _public(key: X25519PrivateKey) -> bytes:
    return key.public_key().public_bytes_raw()


def _soon(seconds: float = 5.0) -> float:
    return time.monotonic() + seconds


class Accepting(threading.Thread):
    """`LinkListener.accept` in a thread; `result` is the link or the exception."""

    def __init__(self, listener: LinkListener, **changes: object) -> None:
        super().__init__(daemon=True)
        self.listener = listener
        self.arguments = {
            "edge": EDGE,
            "roster_digest": ROSTER,
            "epoch": EPOCH,
            "keys": LinkKeys(TARGET, _public(SOURCE)),
            "deadline": _soon(),
            **changes,
        }
        self.result: Link | Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            self.result = self.listener.accept(**self.arguments)
        except Exception as error:
            self.result = error

    def link(self) -> Link:
        self.join(10)
        assert isinstance(self.result, Link), self.result
        return self.result

    def error(self) -> Exception:
        self.join(10)
        assert isinstance(self.result, Exception)
        return self.result


def _connect(port: int, **changes: object) -> Link:
    return connect(
        **{
            "address": f"127.0.0.1:{port}",
            "edge": EDGE,
            "roster_digest": ROSTER,
            "epoch": EPOCH,
            "keys": LinkKeys(SOURCE, _public(TARGET)),
            "deadline": _soon(),
            **changes,
        }
    )


@pytest.fixture
def listener() -> Iterator[LinkListener]:
    with LinkListener("127.0.0.1") as listening:
        yield listening


@pytest.fixture
def pair(listener: LinkListener) -> Iterator[tuple[Link, Link]]:
    accepting = Accepting(listener)
    with _connect(listener.port) as source, accepting.link() as target:
        yield source, target


Change = Callable[[int, bytes], list[bytes]]


class Relay:
    """A hostile network: passes the handshake, then `change(number, record)` decides.

    `wire` is all that went from source to target. An empty list from `change` drops the record;
    `cut` ends the connection after the bytes given.
    """

    def __init__(self, port: int, change: Change = lambda number, record: [record]) -> None:
        self.change = change
        self.wire = bytearray()
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        self._target_port = port
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        source, _ = self._server.accept()
        target = socket.create_connection(("127.0.0.1", self._target_port))
        threading.Thread(target=self._back, args=(target, source), daemon=True).start()
        reader = source.makefile("rb")
        try:
            for size in (58 + 48, 2 + 16):
                self._pass(target, reader.read(size))
            number = 0
            while prefix := reader.read(2):
                record = prefix + reader.read(int.from_bytes(prefix, "big"))
                for changed in self.change(number, record):
                    self._pass(target, changed)
                number += 1
        except OSError:
            pass
        for side in (source, target):
            with contextlib.suppress(OSError):
                side.shutdown(socket.SHUT_RDWR)

    def _pass(self, target: socket.socket, content: bytes) -> None:
        if content == b"cut":
            raise OSError
        self.wire += content
        target.sendall(content)

    def _back(self, target: socket.socket, source: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while content := target.recv(65536):
                source.sendall(content)


@contextlib.contextmanager
def _relayed(listener: LinkListener, change: Change) -> Iterator[tuple[Link, Link, Relay]]:
    accepting = Accepting(listener)
    relay = Relay(listener.port, change)
    with _connect(relay.port) as source, accepting.link() as target:
        yield source, target, relay


def _unchanged(number: int, record: bytes) -> list[bytes]:
    return [record]


def _content(length: int) -> bytes:
    return (bytes(range(251)) * (length // 251 + 1))[:length]


# Messages


@pytest.mark.parametrize(
    "length", [0, 1, 239, 240, 241, 8192, 65007, 65008, 65009, 65024, 65536, 200_000, 5 * MIB + 3]
)
def test_messages_of_every_size(pair: tuple[Link, Link], length: int) -> None:
    source, target = pair
    content = _content(length)
    sender = threading.Thread(target=source.send, args=([content],), daemon=True)
    sender.start()
    received = target.receive(length)
    assert received == content
    sender.join(5)
    # The other direction of the same link.
    target.send([b"ok"])
    assert source.receive(2) == b"ok"


def test_parts_are_joined_and_the_result_is_writable(pair: tuple[Link, Link]) -> None:
    source, target = pair
    floats = memoryview(bytearray(_content(400_000))).cast("f")
    parts = [b"header", bytearray(b"x" * 100), floats, memoryview(_content(70_000))]
    source_thread = threading.Thread(target=source.send, args=(parts,), daemon=True)
    source_thread.start()
    received = target.receive(MIB)
    assert received == b"".join(bytes(part) for part in parts)
    assert not received.readonly
    received[0] = 0
    source.send([b"next"])
    assert target.receive(4) == b"next"
    assert received[0] == 0, "each message has a buffer of its own"


def test_torch_reads_a_message_in_place(pair: tuple[Link, Link]) -> None:
    torch = pytest.importorskip("torch")
    source, target = pair
    source.send([torch.arange(1000, dtype=torch.float32).numpy().data])
    received = target.receive(4000)
    values = torch.frombuffer(received, dtype=torch.float32)
    assert torch.equal(values, torch.arange(1000, dtype=torch.float32))
    values[0] = 7
    assert bytes(received[:4]) == struct.pack("f", 7)


@given(st.lists(st.integers(0, 140_000), max_size=6))
def test_records_cover_the_pieces_in_order(lengths: list[int]) -> None:
    pieces = [memoryview(_content(length)) for length in lengths]
    records = list(link_module._records(pieces))
    assert b"".join(records) == b"".join(pieces)
    assert all(len(record) == link_module._RECORD_PLAIN for record in records[:-1])
    assert all(0 < len(record) <= link_module._RECORD_PLAIN for record in records)


@given(st.integers(0, 2**30))
def test_padding_adds_little_and_leaves_few_lengths(length: int) -> None:
    padded = link_module._padded(length)
    assert max(256, length) <= padded <= max(256, length * 1.12)
    assert link_module._padded(padded) == padded


def test_both_directions_at_once(pair: tuple[Link, Link]) -> None:
    content = _content(3 * MIB)

    def pump(link: Link) -> None:
        for _ in range(5):
            link.send([content])

    senders = [threading.Thread(target=pump, args=(link,), daemon=True) for link in pair]
    received: list[bool] = []

    def drain(link: Link) -> None:
        received.extend(link.receive(3 * MIB) == content for _ in range(5))

    receivers = [threading.Thread(target=drain, args=(link,), daemon=True) for link in pair]
    for thread in senders + receivers:
        thread.start()
    for thread in senders + receivers:
        thread.join(20)
    assert received == [True] * 10


def test_rekeying_in_the_middle_of_messages(
    listener: LinkListener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_module, "_REKEY_RECORDS", 3)
    accepting = Accepting(listener)
    with _connect(listener.port) as source, accepting.link() as target:
        before = source._transport.send._key
        for length in (1, 10, 300_000, 5, 700_000):
            threading.Thread(target=source.send, args=([_content(length)],), daemon=True).start()
            assert target.receive(MIB) == _content(length)
        assert source._transport.send._key == target._transport.receive._key != before


def test_too_long_a_message_is_refused_before_its_memory_is_taken(
    pair: tuple[Link, Link], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = pair
    source.send([_content(1001)])
    with pytest.raises(MessageTooLong, match="at most 1000 bytes, found 1001"):
        target.receive(1000)
    with pytest.raises(LinkClosed):
        target.receive(10_000)
    monkeypatch.setattr(link_module, "MAX_MESSAGE_BYTES", 10)
    with pytest.raises(MessageTooLong):
        source.send([bytes(11)])


@pytest.mark.parametrize(
    "plain",
    [
        struct.pack(">QQ", 10, 0) + bytes(10),
        struct.pack(">QQ", 2**63, 2**63),
        struct.pack(">QQ", 10, 230) + bytes(241),
        b"short",
    ],
)
def test_even_the_right_peer_cannot_send_another_framing(
    pair: tuple[Link, Link], plain: bytes
) -> None:
    source, target = pair
    source._socket.sendall(source._out[: source._seal(memoryview(plain), 0)])
    with pytest.raises((LinkTampered, MessageTooLong)):
        target.receive(1000)


# Closing


def test_close_wakes_a_waiting_receive(pair: tuple[Link, Link]) -> None:
    source, target = pair
    caught: list[Exception] = []

    def wait() -> None:
        try:
            target.receive(10)
        except LinkClosed as error:
            caught.append(error)

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    time.sleep(0.1)
    start = time.monotonic()
    target.close()
    waiting.join(2)
    assert time.monotonic() - start < 1
    assert len(caught) == 1
    assert "closed here" in str(caught[0])
    target.close()
    with pytest.raises(LinkClosed):
        target.send([b"x"])
    with pytest.raises(LinkClosed, match="peer closed"):
        source.receive(10)


def test_close_wakes_a_send_that_nobody_takes(pair: tuple[Link, Link]) -> None:
    source, _ = pair
    caught: list[Exception] = []

    def send() -> None:
        try:
            source.send([bytes(64 * MIB)])
        except LinkClosed as error:
            caught.append(error)

    sending = threading.Thread(target=send, daemon=True)
    sending.start()
    time.sleep(0.2)
    assert sending.is_alive()
    source.close()
    sending.join(2)
    assert len(caught) == 1


def test_a_peer_that_takes_nothing_times_out(
    listener: LinkListener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_module, "_SEND_STALL_SECONDS", 1)
    accepting = Accepting(listener)
    with _connect(listener.port) as source, accepting.link():
        with pytest.raises(LinkTimeout):
            source.send([bytes(64 * MIB)])
        with pytest.raises(LinkClosed):
            source.send([b"x"])


# The network


def test_the_tap_sees_a_hello_and_nothing_else(listener: LinkListener) -> None:
    secret = b"the capital of France is Paris. " * 300
    with _relayed(listener, _unchanged) as (source, target, relay):
        source.send([secret])
        assert target.receive(MIB) == secret
        wire = bytes(relay.wire)
    assert wire.startswith(b"bulkhead\x00\x01" + EPOCH)
    assert all(secret[at : at + 8] not in wire for at in range(32))
    for hidden in (b"stage", ROSTER, _public(SOURCE), _public(TARGET)):
        assert hidden not in wire


def test_the_tap_would_see_a_null_cipher(listener: LinkListener) -> None:
    secret = b"the capital of France is Paris. " * 300
    with null_cipher.installed(), _relayed(listener, _unchanged) as (source, target, relay):
        source.send([secret])
        assert target.receive(MIB) == secret
        assert secret in bytes(relay.wire)
    accepting = Accepting(listener)
    with _connect(listener.port) as source, accepting.link() as target:
        sealed = bytearray(3 + 16)
        source._transport.send.seal_into(b"abc", memoryview(sealed))
        assert b"abc" not in sealed, "the real cipher is back"


def _replay() -> Change:
    return lambda number, record: [record, record] if number == 1 else [record]


def _drop() -> Change:
    return lambda number, record: [] if number == 1 else [record]


def _swap() -> Change:
    held: list[bytes] = []

    def change(number: int, record: bytes) -> list[bytes]:
        if number == 1:
            held.append(record)
            return []
        return [record, *held] if number == 2 else [record]

    return change


def _flip(position: int) -> Change:
    def change(number: int, record: bytes) -> list[bytes]:
        if number != 1:
            return [record]
        changed = bytearray(record)
        changed[position] ^= 1
        return [bytes(changed)]

    return change


def _shorten() -> Change:
    return lambda number, record: [struct.pack(">H", 3) + record[2:]] if number == 1 else [record]


def _oversize() -> Change:
    return lambda number, record: [b"\xff\xff" + bytes(65535)] if number == 1 else [record]


@pytest.mark.parametrize(
    "change",
    [_replay(), _drop(), _swap(), _flip(2), _flip(100), _flip(-1), _shorten(), _oversize()],
    ids=["replay", "drop", "swap", "first byte", "middle", "tag", "short record", "oversized"],
)
def test_changed_records_are_found(listener: LinkListener, change: Change) -> None:
    with _relayed(listener, change) as (source, target, _):
        source.send([_content(1000)])
        assert target.receive(1000) == _content(1000)
        for _ in range(3):
            source.send([_content(2000)])
        with pytest.raises(LinkTampered):
            for _ in range(3):
                assert target.receive(2000) == _content(2000)
        with pytest.raises(LinkClosed):
            target.receive(2000)


def test_a_record_sent_back_to_its_sender_is_refused(pair: tuple[Link, Link]) -> None:
    source, target = pair
    plain = memoryview(struct.pack(">QQ", 10, 230) + bytes(240))
    record = source._out[: source._seal(plain, 0)]
    target._socket.sendall(record)
    with pytest.raises(LinkTampered):
        source.receive(100)


@pytest.mark.parametrize("kept", [1, 2, 100, 65042])
def test_a_stream_cut_in_a_message_is_truncated(listener: LinkListener, kept: int) -> None:
    def change(number: int, record: bytes) -> list[bytes]:
        return [record[:kept], b"cut"]

    with _relayed(listener, change) as (source, target, _):
        with contextlib.suppress(LinkClosed):
            source.send([_content(200_000)])
        with pytest.raises(LinkTruncated):
            target.receive(MIB)


@pytest.mark.parametrize("kept", [1, 100, 65042])
def test_a_stall_in_a_message_times_out(
    listener: LinkListener, monkeypatch: pytest.MonkeyPatch, kept: int
) -> None:
    monkeypatch.setattr(link_module, "_STALL_SECONDS", 0.7)
    change: Change = lambda number, record: [record[:kept]] if number == 0 else []
    with _relayed(listener, change) as (source, target, _):
        source.send([_content(100_000)])
        with pytest.raises(LinkTimeout):
            target.receive(MIB)


def test_silence_between_messages_is_no_stall(
    pair: tuple[Link, Link], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_module, "_STALL_SECONDS", 0.3)
    source, target = pair
    threading.Timer(1.3, source.send, ([b"late"],)).start()
    assert target.receive(10) == b"late"


# Who may connect


@pytest.mark.parametrize(
    "changes",
    [
        {"keys": LinkKeys(STRANGER, _public(TARGET))},
        {"keys": LinkKeys(SOURCE, _public(STRANGER))},
        {"epoch": bytes(16)},
        {"roster_digest": b"\xcd" * 32},
        {"edge": Edge("stage-1", "stage-0")},
        {"edge": Edge("stage-0", "stage-2")},
    ],
    ids=["own key", "peer key", "epoch", "roster", "direction", "role"],
)
def test_what_differs_is_refused(listener: LinkListener, changes: dict[str, object]) -> None:
    accepting = Accepting(listener)
    with pytest.raises(HandshakeFailed):
        _connect(listener.port, **changes, deadline=_soon(0.4))
    # Whoever was refused has not used up the place of the right one.
    with _connect(listener.port), accepting.link():
        pass


@pytest.mark.parametrize("position", [8, 10, 26, 58, 100])
def test_every_part_of_the_start_is_bound(listener: LinkListener, position: int) -> None:
    accepting = Accepting(listener, deadline=_soon(0.8))
    relay = Relay(listener.port)
    passing = relay._pass

    def change_start(target: socket.socket, content: bytes) -> None:
        changed = bytearray(content)
        if len(content) == 58 + 48:
            changed[position] ^= 1
        passing(target, bytes(changed))

    relay._pass = change_start
    with pytest.raises(HandshakeFailed):
        _connect(relay.port, deadline=_soon(0.5))
    assert isinstance(accepting.error(), LinkTimeout)


def test_a_hello_swapped_to_another_expected_epoch_is_refused(listener: LinkListener) -> None:
    other = bytes(16)
    waiting = [Accepting(listener, epoch=epoch, deadline=_soon(1)) for epoch in (EPOCH, other)]
    relay = Relay(listener.port)
    passing = relay._pass
    relay._pass = lambda target, content: passing(target, content.replace(EPOCH, other))
    with pytest.raises(HandshakeFailed):
        _connect(relay.port, deadline=_soon(0.5))
    assert all(isinstance(thread.error(), LinkTimeout) for thread in waiting)


def test_a_recorded_start_does_not_take_the_place(listener: LinkListener) -> None:
    with _relayed(listener, _unchanged) as (_, _, relay):
        recorded = bytes(relay.wire)
    accepting = Accepting(listener)
    time.sleep(0.05)
    with socket.create_connection(("127.0.0.1", listener.port)) as replayed:
        replayed.sendall(recorded)
        with _connect(listener.port) as source, accepting.link() as target:
            source.send([b"real"])
            assert target.receive(4) == b"real"
        # Its first record does not decrypt under the target's fresh key.
        replayed.settimeout(2)
        assert len(replayed.recv(1000)) == 48
        with contextlib.suppress(ConnectionResetError):
            assert replayed.recv(1000) == b""


def test_silent_slow_and_garbage_connections_delay_nobody(
    listener: LinkListener, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(link_module, "_HANDSHAKE_SECONDS", 1.0)
    monkeypatch.setattr(link_module, "_MAX_PENDING", 8)
    caplog.set_level(logging.INFO)
    accepting = Accepting(listener)
    strangers = [socket.create_connection(("127.0.0.1", listener.port)) for _ in range(20)]
    slow = socket.create_connection(("127.0.0.1", listener.port))
    slow.sendall(b"bulk")
    garbage = socket.create_connection(("127.0.0.1", listener.port))
    garbage.sendall(b"GET / HTTP/1.1\r\nHost: example.org\r\nAccept: everything, at once\r\n\r\n")
    start = time.monotonic()
    with _connect(listener.port) as source, accepting.link() as target:
        assert time.monotonic() - start < 1
        source.send([b"real"])
        assert target.receive(4) == b"real"
    for stranger in [*strangers, slow, garbage]:
        stranger.settimeout(3)
        with contextlib.suppress(ConnectionResetError):
            assert stranger.recv(100) == b"", "closed without an answer"
        stranger.close()
    assert "not a link of this protocol" in caplog.text
    assert "took too long" in caplog.text


def test_a_dripping_hello_ends_at_the_deadline(
    listener: LinkListener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_module, "_HANDSHAKE_SECONDS", 0.5)
    with socket.create_connection(("127.0.0.1", listener.port)) as slow:
        start = time.monotonic()
        with pytest.raises(OSError):
            for _ in range(50):
                slow.sendall(b"b")
                time.sleep(0.1)
        assert time.monotonic() - start < 2


def test_an_impostor_that_listens_is_found() -> None:
    with LinkListener("127.0.0.1") as impostor:
        accepting = Accepting(
            impostor, keys=LinkKeys(STRANGER, _public(SOURCE)), deadline=_soon(0.5)
        )
        with pytest.raises(HandshakeFailed):
            _connect(impostor.port, deadline=_soon(0.4))
        assert isinstance(accepting.error(), LinkTimeout)


# Waiting


def test_the_source_may_come_first(listener: LinkListener) -> None:
    made: list[Link] = []
    connecting = threading.Thread(target=lambda: made.append(_connect(listener.port)), daemon=True)
    connecting.start()
    time.sleep(0.3)
    with Accepting(listener).link():
        connecting.join(5)
        made[0].close()


def test_several_edges_and_epochs_at_once(listener: LinkListener) -> None:
    edges = [Edge(f"stage-{n}", "stage-9") for n in range(4)]
    waiting = [Accepting(listener, edge=edge) for edge in edges]
    for edge, accepting in reversed(list(zip(edges, waiting, strict=True))):
        with _connect(listener.port, edge=edge) as source, accepting.link() as target:
            source.send([edge.source_role.encode()])
            assert target.receive(10) == edge.source_role.encode()


def test_the_same_expectation_twice_is_a_mistake(listener: LinkListener) -> None:
    first = Accepting(listener, deadline=_soon(0.5))
    time.sleep(0.1)
    assert isinstance(Accepting(listener).error(), ValueError)
    assert isinstance(first.error(), LinkTimeout)


def test_deadlines_closing_and_abandoning(listener: LinkListener) -> None:
    with pytest.raises(LinkTimeout, match="stage-0 did not connect to stage-1"):
        listener.accept(
            EDGE, ROSTER, EPOCH, LinkKeys(TARGET, _public(SOURCE)), deadline=_soon(0.05)
        )
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(LinkTimeout, match="not reached"):
        _connect(port, deadline=_soon(0.2))
    with pytest.raises(LinkTimeout, match="no time"):
        _connect(port, deadline=0.0)
    abandon = threading.Event()
    waiting = Accepting(listener, abandon=abandon)
    threading.Timer(0.1, abandon.set).start()
    with pytest.raises(LinkClosed, match="abandoned"):
        _connect(port, abandon=abandon)
    assert isinstance(waiting.error(), LinkClosed)
    waiting = Accepting(listener)
    listener.close()
    assert isinstance(waiting.error(), LinkClosed)


@pytest.mark.parametrize("address", ["", "host", "host:", ":1", "host:x", "host:0", "host:65536"])
def test_addresses_are_checked(address: str) -> None:
    with pytest.raises(ValueError, match="host:port"):
        _connect(1, address=address)


def test_arguments_are_checked_and_keys_not_shown() -> None:
    with pytest.raises(ValueError, match="16 bytes"):
        _connect(1, epoch=b"short")
    with pytest.raises(ValueError, match="roster digest: expected 32 bytes"):
        _connect(1, roster_digest=b"ab")
    with pytest.raises(ValueError, match="32 bytes"):
        LinkKeys(SOURCE, b"short")
    with pytest.raises(ValueError, match="role"):
        Edge("", "stage-1")
    assert "X25519" not in repr(LinkKeys(SOURCE, _public(TARGET)))
