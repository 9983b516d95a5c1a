"""Encrypted, ordered, bounded messages between two shards over one TCP connection.

What crosses the wire, in order:

    source -> target   hello: 8s magic | u16 version | 16s epoch | 32s edge digest     (clear)
    source -> target   Noise KK message 1, no payload
    target -> source   Noise KK message 2, no payload
    source -> target   an empty record: the source is alive and not a recording
    target -> source   an empty record: the target has taken the link
    both directions    records

    record:  u16 length of the ciphertext | ciphertext with its 16-byte tag
    message: u64 length | u64 padding | content | zero bytes, cut into records

Length and padding are inside the encryption. A message grows to the next length of Padmé
(https://lbarman.ch/blog/padme/), so that its records tell its size to about one part in 32 when it
is large, whoever is on the way and whichever machine the peer claims to be on.

The handshake's prologue binds roster, epoch, edge and direction; records are numbered by the
cipher's counter. So a record that is changed, replayed, dropped or moved, and a link of another
epoch, roster, role or direction, fails to decrypt. After any error a link is closed for good: new
links come with a new epoch. The end of a stream is not authenticated between messages; callers
treat every `LinkClosed` as a break.
"""

import contextlib
import hashlib
import logging
import socket
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Final

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from security.channel.frame import BytesLike
from security.channel.noise import (
    KEY_BYTES,
    MESSAGE_OVERHEAD,
    TAG_BYTES,
    CipherState,
    KKInitiator,
    KKResponder,
    NoiseError,
    Transport,
)
from security.errors import SecurityError

__all__ = [
    "EPOCH_BYTES",
    "MAX_MESSAGE_BYTES",
    "Edge",
    "HandshakeFailed",
    "Link",
    "LinkClosed",
    "LinkError",
    "LinkKeys",
    "LinkListener",
    "LinkTampered",
    "LinkTimeout",
    "LinkTruncated",
    "MessageTooLong",
    "connect",
]

EPOCH_BYTES: Final = 16
# More than any step a plan allows; a sender's mistake should not fill the peer's memory.
MAX_MESSAGE_BYTES: Final = 2**30

_MAGIC: Final = b"bulkhead"
_VERSION: Final = 1
_HELLO: Final = struct.Struct(f">8sH{EPOCH_BYTES}s32s")
_MESSAGE: Final = struct.Struct(">QQ")
_LENGTH: Final = struct.Struct(">H")
# A record and its length prefix stay below 65,535 bytes, and plain parts stay 512-byte aligned.
_RECORD_PLAIN: Final = 127 * 512
_RECORD_MOST: Final = 65_535 - _LENGTH.size
_RECORD_WIRE: Final = _LENGTH.size + _RECORD_PLAIN + TAG_BYTES
# Records encrypted before each system call: enough to make calls rare, few enough for the cache.
_BATCH: Final = 4
_RECEIVE_BUFFER: Final = 8 * _RECORD_WIRE
_LEAST_PADDED: Final = 256
# 4 GiB under one key, far below what AES-GCM allows, and a rekey costs microseconds.
_REKEY_RECORDS: Final = 2**16

_HANDSHAKE_SECONDS: Final = 5.0
# The longest wait for the rest of a record once a message has begun to arrive.
_STALL_SECONDS: Final = 10.0
_SEND_STALL_SECONDS: Final = 60.0
_MAX_PENDING: Final = 64
_MAX_ROLE_BYTES: Final = 64

_log = logging.getLogger(__name__)


class LinkError(SecurityError):
    """A link cannot be used, or not any more."""

    code: ClassVar[str] = "link_error"


class LinkClosed(LinkError):
    """The link ended: closed here, closed by the peer, or its connection broke."""

    code: ClassVar[str] = "link_closed"


class LinkTruncated(LinkClosed):
    """The stream ended in the middle of a message."""

    code: ClassVar[str] = "link_truncated"


class LinkTampered(LinkError):
    """Bytes arrived that the peer did not send, or not in this place."""

    code: ClassVar[str] = "link_tampered"


class MessageTooLong(LinkError):
    """A message is longer than the reader allows."""

    code: ClassVar[str] = "message_too_long"


class LinkTimeout(LinkError):
    """The peer was not there in time, or stopped in the middle of a message."""

    code: ClassVar[str] = "link_timeout"


class HandshakeFailed(LinkError):
    """Somebody answered, and did not prove to be the expected peer of this epoch and roster."""

    code: ClassVar[str] = "handshake_failed"


@dataclass(frozen=True, slots=True)
class Edge:
    """A link's place in the pipeline: `source_role` connects, `target_role` listens."""

    source_role: str
    target_role: str

    def __post_init__(self) -> None:
        for role in (self.source_role, self.target_role):
            if not (role.isascii() and 0 < len(role) <= _MAX_ROLE_BYTES):
                raise ValueError(
                    f"role: expected 1 to {_MAX_ROLE_BYTES} ASCII characters, found {role!r}"
                )


@dataclass(frozen=True, slots=True)
class LinkKeys:
    """This shard's own key and the peer's 32-byte X25519 key, as the roster states it."""

    static: X25519PrivateKey = field(repr=False)
    peer: bytes

    def __post_init__(self) -> None:
        if len(self.peer) != KEY_BYTES:
            raise ValueError(f"peer key: expected {KEY_BYTES} bytes, found {len(self.peer)}")


class Link:
    """Messages to and from one peer. One thread may send while another receives.

    Comes from `connect` or `LinkListener.accept`, already authenticated.
    """

    def __init__(self, connection: socket.socket, transport: Transport) -> None:
        self._socket = connection
        self._transport = transport
        self._closed = False
        self._send_lock = threading.Lock()
        self._receive_lock = threading.Lock()
        self._sent_records = 0
        self._received_records = 0
        self._out = memoryview(bytearray(_BATCH * _RECORD_WIRE))
        self._in = memoryview(bytearray(_RECEIVE_BUFFER))
        self._in_start = 0
        self._in_end = 0
        self._first = memoryview(bytearray(_RECORD_MOST - TAG_BYTES))
        _prepare(connection)

    def send(self, parts: Sequence[BytesLike]) -> None:
        """Send the concatenation of `parts` as one message; they are free again on return.

        Raises LinkClosed, LinkTimeout when the peer takes nothing for a minute, MessageTooLong
        above `MAX_MESSAGE_BYTES`.
        """
        views = [_bytes_of(part) for part in parts]
        length = sum(map(len, views))
        if length > MAX_MESSAGE_BYTES:
            raise MessageTooLong(
                f"message: expected at most {MAX_MESSAGE_BYTES} bytes, found {length}"
            )
        whole = _MESSAGE.size + length
        padding = _padded(whole) - whole
        pieces = [memoryview(_MESSAGE.pack(length, padding)), *views, memoryview(bytes(padding))]
        with self._send_lock:
            self._check_open()
            try:
                if whole + padding <= _RECORD_PLAIN:
                    used = self._seal(memoryview(b"".join(pieces)), 0)
                else:
                    used = 0
                    for plain in _records(pieces):
                        if used + _RECORD_WIRE > len(self._out):
                            self._socket.sendall(self._out[:used])
                            used = 0
                        used = self._seal(plain, used)
                self._socket.sendall(self._out[:used])
            except BlockingIOError:
                self._break()
                raise LinkTimeout(
                    f"the peer has taken nothing for {_SEND_STALL_SECONDS:.0f} s"
                ) from None
            except OSError as error:
                raise self._broken(error) from None
            except BaseException:
                # Part of a message may be out: whatever followed would not be understood.
                self._break()
                raise

    def receive(self, max_bytes: int) -> memoryview:
        """Wait for the next message and return it in a fresh, writable buffer of its own.

        Waits without limit for a message to begin. Raises LinkClosed, LinkTruncated, LinkTampered,
        MessageTooLong before allocating more than `max_bytes` and its padding, LinkTimeout when a
        message begun stops arriving. After any of them the link is closed.
        """
        with self._receive_lock:
            self._check_open()
            try:
                return self._receive(max_bytes)
            except OSError as error:
                raise self._broken(error) from None
            except NoiseError as error:
                self._break()
                raise LinkTampered(f"{error}; the link is closed") from None
            except BaseException:
                self._break()
                raise

    def close(self) -> None:
        """End the link and wake a thread that sends or receives. Safe to call again."""
        self._break()
        # Closing a descriptor that another thread is about to read would let it read whatever
        # connection gets that number next. Both threads leave soon after the shutdown.
        for lock in (self._send_lock, self._receive_lock):
            if not lock.acquire(timeout=1.0):
                return
            lock.release()
        self._socket.close()

    def __enter__(self) -> "Link":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _seal(self, plain: memoryview, at: int) -> int:
        """Append a record to the outgoing batch; returns its end."""
        length = len(plain) + TAG_BYTES
        start = at + _LENGTH.size
        _LENGTH.pack_into(self._out, at, length)
        self._transport.send.seal_into(plain, self._out[start : start + length])
        self._sent_records += 1
        if self._sent_records % _REKEY_RECORDS == 0:
            self._transport.send.rekey()
        return start + length

    def _open(self, cipher: memoryview, into: memoryview) -> int:
        """Decrypt a record to the start of `into`; returns the length of its plaintext."""
        length = len(cipher) - TAG_BYTES
        if not 0 < length <= len(into):
            raise LinkTampered(
                f"record: expected 1 to {len(into)} bytes, found {length}; the link is closed"
            )
        self._transport.receive.open_into(cipher, into[:length])
        self._received_records += 1
        if self._received_records % _REKEY_RECORDS == 0:
            self._transport.receive.rekey()
        return length

    def _receive(self, max_bytes: int) -> memoryview:
        filled = self._open(self._next_record(within_message=False), self._first)
        if filled < _MESSAGE.size:
            raise LinkTampered("message: its first record is too short; the link is closed")
        length, padding = _MESSAGE.unpack_from(self._first)
        if length > max_bytes:
            raise MessageTooLong(
                f"message: expected at most {max_bytes} bytes, found {length}; the link is closed"
            )
        if padding != _padded(_MESSAGE.size + length) - _MESSAGE.size - length:
            raise LinkTampered("message: its padding has the wrong length; the link is closed")
        filled -= _MESSAGE.size
        content = memoryview(bytearray(length + padding))
        if filled > len(content):
            raise LinkTampered("message: longer than it announced; the link is closed")
        content[:filled] = self._first[_MESSAGE.size : _MESSAGE.size + filled]
        while filled < len(content):
            filled += self._open(self._next_record(within_message=True), content[filled:])
        return content[:length]

    def _next_record(self, *, within_message: bool) -> memoryview:
        """The ciphertext of the next record, in the receive buffer until the next call."""
        deadline: float | None = None
        while True:
            available = self._in_end - self._in_start
            needed = _LENGTH.size
            if available >= needed:
                (length,) = _LENGTH.unpack_from(self._in, self._in_start)
                if not TAG_BYTES < length <= _RECORD_MOST:
                    raise LinkTampered(
                        f"record: expected {TAG_BYTES + 1} to {_RECORD_MOST} bytes, "
                        f"found {length}; the link is closed"
                    )
                needed += length
                if available >= needed:
                    start = self._in_start + _LENGTH.size
                    self._in_start += needed
                    return self._in[start : self._in_start]
            if available == 0:
                self._in_start = self._in_end = 0
            elif self._in_start + needed > len(self._in):
                self._in[:available] = bytes(self._in[self._in_start : self._in_end])
                self._in_start, self._in_end = 0, available
            begun = within_message or available > 0
            if begun:
                now = time.monotonic()
                deadline = deadline or now + _STALL_SECONDS
                if now >= deadline:
                    raise LinkTimeout(
                        f"the peer stopped in the middle of a message for {_STALL_SECONDS:.0f} s; "
                        "the link is closed"
                    )
            try:
                received = self._socket.recv_into(self._in[self._in_end :])
            except BlockingIOError:
                continue
            if received == 0:
                if self._closed:
                    raise LinkClosed("the link was closed here")
                if begun:
                    raise LinkTruncated("the connection ended in the middle of a message")
                raise LinkClosed("the peer closed the connection")
            self._in_end += received

    def _check_open(self) -> None:
        if self._closed:
            raise LinkClosed("the link is closed; a new epoch brings a new one")

    def _break(self) -> None:
        self._closed = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def _broken(self, error: OSError) -> LinkClosed:
        closed_here = self._closed
        self._break()
        if closed_here:
            return LinkClosed("the link was closed here")
        return LinkClosed(f"the connection broke: {error.strerror or error}")


@dataclass(slots=True, eq=False)
class _Expectation:
    """A peer that `LinkListener.accept` waits for."""

    prologue: bytes
    keys: LinkKeys
    claimed: bool = False
    link: Link | None = None


class LinkListener:
    """A listening socket on which the peers of any number of edges and epochs arrive.

    Every connection has a thread of its own for a few seconds at most, and the oldest unfinished
    one gives way when there are too many: one that is silent, slow or hostile delays no other.
    Raises OSError where `host` cannot be bound.
    """

    def __init__(self, host: str) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.create_server((host, 0), family=family, backlog=128)
        self.port: int = self._socket.getsockname()[1]
        self._changed = threading.Condition()
        self._expected: dict[bytes, _Expectation] = {}
        self._pending: list[socket.socket] = []
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="link-listener", daemon=True)
        self._thread.start()

    def accept(
        self,
        edge: Edge,
        roster_digest: bytes,
        epoch: bytes,
        keys: LinkKeys,
        *,
        deadline: float,
        abandon: threading.Event | None = None,
    ) -> Link:
        """Wait for the source of `edge` to connect under this roster (its SHA-256) and epoch.

        `deadline` is on `time.monotonic()`'s clock. Raises LinkTimeout after it, LinkClosed when
        the listener is closed or `abandon` is set, ValueError when the same edge and epoch is
        already waited for.
        """
        hello = _hello(edge, roster_digest, epoch)
        expectation = _Expectation(_prologue(hello, edge, roster_digest), keys)
        with self._changed:
            if hello in self._expected:
                raise ValueError(f"{edge} of this epoch is already waited for")
            self._expected[hello] = expectation
            try:
                while expectation.link is None:
                    if self._closed.is_set():
                        raise LinkClosed("the listener is closed")
                    if abandon is not None and abandon.is_set():
                        raise LinkClosed(f"waiting for {edge.source_role} was abandoned")
                    remaining = deadline - time.monotonic()
                    if remaining <= 0:
                        raise LinkTimeout(
                            f"{edge.source_role} did not connect to {edge.target_role} in time"
                        )
                    self._changed.wait(remaining if abandon is None else min(remaining, 0.05))
                return expectation.link
            finally:
                del self._expected[hello]

    def close(self) -> None:
        """Stop listening; every waiting `accept` raises LinkClosed. Links go on."""
        with self._changed:
            self._closed.set()
            pending = list(self._pending)
            self._changed.notify_all()
        for connection in [self._socket, *pending]:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._thread.join(timeout=1.0)
        self._socket.close()

    def __enter__(self) -> "LinkListener":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _listen(self) -> None:
        while not self._closed.is_set():
            try:
                connection, peer = self._socket.accept()
            except OSError:
                if self._closed.is_set():
                    return
                # Out of descriptors: give the pending handshakes a moment to return theirs.
                time.sleep(0.05)
                continue
            with self._changed:
                if self._closed.is_set():
                    connection.close()
                    return
                self._pending.append(connection)
                if len(self._pending) > _MAX_PENDING:
                    with contextlib.suppress(OSError):
                        self._pending.pop(0).shutdown(socket.SHUT_RDWR)
            threading.Thread(
                target=self._greet, args=(connection, str(peer[0])), name="link-hello", daemon=True
            ).start()

    def _greet(self, connection: socket.socket, peer: str) -> None:
        """Run one handshake; the connection becomes a link or is closed."""
        kept = False
        try:
            kept = self._respond(connection, time.monotonic() + _HANDSHAKE_SECONDS)
        except NoiseError as error:
            _log.warning("connection from %s refused: %s: %s", peer, error.code, error)
        except LinkError as error:
            # Scanners do this, and peers that see a new roster a moment before we do.
            _log.info("connection from %s refused: %s: %s", peer, error.code, error)
        except OSError as error:
            _log.info("connection from %s ended: %s", peer, error.strerror or error)
        finally:
            with self._changed:
                if connection in self._pending:
                    self._pending.remove(connection)
            if not kept:
                connection.close()

    def _respond(self, connection: socket.socket, deadline: float) -> bool:
        hello = _read(connection, _HELLO.size, deadline)
        magic, version, _, _ = _HELLO.unpack(hello)
        if magic != _MAGIC:
            raise HandshakeFailed("hello: not a link of this protocol")
        if version != _VERSION:
            raise HandshakeFailed(f"hello: expected version {_VERSION}, found {version}")
        with self._changed:
            expectation = self._expected.get(hello)
        if expectation is None:
            raise HandshakeFailed("hello: nobody waits for this edge, roster and epoch")
        handshake = KKResponder(
            expectation.keys.static, expectation.keys.peer, expectation.prologue
        )
        handshake.read_message(_read(connection, MESSAGE_OVERHEAD, deadline))
        connection.sendall(handshake.write_message())
        transport = handshake.split()
        _read_empty_record(connection, transport.receive, deadline)

        with self._changed:
            if self._expected.get(hello) is not expectation or expectation.claimed:
                raise HandshakeFailed("the edge is taken or no longer waited for")
            expectation.claimed = True
        try:
            connection.sendall(_empty_record(transport.send))
            link = Link(connection, transport)
        except OSError:
            with self._changed:
                expectation.claimed = False
            raise
        with self._changed:
            if self._expected.get(hello) is not expectation:
                raise LinkTimeout("the peer finished its handshake after the deadline")
            expectation.link = link
            self._changed.notify_all()
        return True


def connect(
    address: str,
    edge: Edge,
    roster_digest: bytes,
    epoch: bytes,
    keys: LinkKeys,
    *,
    deadline: float,
    abandon: threading.Event | None = None,
) -> Link:
    """Connect as the source of `edge` to the target's `address` ("host:port").

    Tries again until `deadline` (on `time.monotonic()`'s clock), since the target may not have
    seen the roster (its SHA-256) yet. Raises HandshakeFailed when a peer was reached and none
    proved itself, LinkTimeout when none was reached, LinkClosed when `abandon` is set.
    """
    host, port = _split_address(address)
    hello = _hello(edge, roster_digest, epoch)
    prologue = _prologue(hello, edge, roster_digest)
    failure: LinkError = LinkTimeout(f"{edge.target_role} at {address}: no time was left")
    pause = 0.01
    while (remaining := deadline - time.monotonic()) > 0:
        if abandon is not None and abandon.is_set():
            raise LinkClosed(f"connecting to {edge.target_role} was abandoned")
        attempt = time.monotonic() + min(remaining, _HANDSHAKE_SECONDS)
        try:
            return _initiate((host, port), hello, prologue, keys, attempt)
        except (HandshakeFailed, NoiseError) as error:
            failure = HandshakeFailed(f"{edge.target_role} at {address}: {error}")
        except OSError as error:
            # That somebody answered wrongly says more than that nobody answers now.
            if not isinstance(failure, HandshakeFailed):
                failure = LinkTimeout(
                    f"{edge.target_role} at {address} is not reached: {error.strerror or error}"
                )
        time.sleep(min(pause, max(0.0, deadline - time.monotonic())))
        pause = min(2 * pause, 0.25)
    raise failure


def _initiate(
    address: tuple[str, int], hello: bytes, prologue: bytes, keys: LinkKeys, deadline: float
) -> Link:
    handshake = KKInitiator(keys.static, keys.peer, prologue)
    connection = socket.create_connection(address, timeout=max(0.001, deadline - time.monotonic()))
    try:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(hello + handshake.write_message())
        handshake.read_message(_read(connection, MESSAGE_OVERHEAD, deadline))
        transport = handshake.split()
        connection.sendall(_empty_record(transport.send))
        _read_empty_record(connection, transport.receive, deadline)
        return Link(connection, transport)
    except BaseException as error:
        connection.close()
        if isinstance(error, LinkError | OSError):
            raise HandshakeFailed(f"the handshake did not finish: {error}") from None
        raise


def _hello(edge: Edge, roster_digest: bytes, epoch: bytes) -> bytes:
    if len(epoch) != EPOCH_BYTES:
        raise ValueError(f"epoch: expected {EPOCH_BYTES} bytes, found {len(epoch)}")
    if len(roster_digest) != hashlib.sha256().digest_size:
        raise ValueError(f"roster digest: expected 32 bytes, found {len(roster_digest)}")
    digest = hashlib.sha256(
        _joined(
            b"bulkhead/v1/edge",
            roster_digest,
            edge.source_role.encode(),
            edge.target_role.encode(),
        )
    ).digest()
    return _HELLO.pack(_MAGIC, _VERSION, epoch, digest)


def _prologue(hello: bytes, edge: Edge, roster_digest: bytes) -> bytes:
    return _joined(
        b"bulkhead/v1/link",
        hello,
        roster_digest,
        edge.source_role.encode(),
        edge.target_role.encode(),
        b"source connects to target",
    )


def _joined(*fields: bytes) -> bytes:
    return b"".join(len(content).to_bytes(4, "big") + content for content in fields)


def _split_address(address: str) -> tuple[str, int]:
    host, colon, port = address.rpartition(":")
    if not (colon and host and port.isascii() and port.isdigit() and 0 < int(port) < 2**16):
        raise ValueError(f"address: expected host:port, found {address!r}")
    return host.strip("[]"), int(port)


def _remaining(deadline: float) -> float:
    remaining = deadline - time.monotonic()
    if remaining <= 0:
        raise LinkTimeout("the handshake took too long")
    return remaining


def _read(connection: socket.socket, length: int, deadline: float) -> bytes:
    """Exactly `length` bytes, however slowly they drip, but not after `deadline`."""
    received = bytearray()
    while len(received) < length:
        connection.settimeout(_remaining(deadline))
        try:
            some = connection.recv(length - len(received))
        except TimeoutError:
            continue
        if not some:
            raise LinkClosed("the peer closed the connection during the handshake")
        received += some
    return bytes(received)


def _empty_record(cipher: CipherState) -> bytes:
    record = bytearray(_LENGTH.pack(TAG_BYTES) + bytes(TAG_BYTES))
    cipher.seal_into(b"", memoryview(record)[_LENGTH.size :])
    return bytes(record)


def _read_empty_record(connection: socket.socket, cipher: CipherState, deadline: float) -> None:
    record = _read(connection, _LENGTH.size + TAG_BYTES, deadline)
    if record[: _LENGTH.size] != _LENGTH.pack(TAG_BYTES):
        raise HandshakeFailed("the peer's first record is not the empty one")
    cipher.open_into(record[_LENGTH.size :], memoryview(bytearray()))


def _prepare(connection: socket.socket) -> None:
    """From the handshake's deadlines to a link's: the kernel watches, calls stay single."""
    connection.settimeout(None)
    tcp, whole = socket.IPPROTO_TCP, socket.SOL_SOCKET
    connection.setsockopt(tcp, socket.TCP_NODELAY, 1)
    connection.setsockopt(whole, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(tcp, socket.TCP_KEEPIDLE, 5)
    connection.setsockopt(tcp, socket.TCP_KEEPINTVL, 3)
    connection.setsockopt(tcp, socket.TCP_KEEPCNT, 3)
    connection.setsockopt(tcp, socket.TCP_USER_TIMEOUT, 15_000)
    # A timeout of Python's own would poll before every call.
    connection.setsockopt(whole, socket.SO_RCVTIMEO, struct.pack("ll", 0, 500_000))
    connection.setsockopt(whole, socket.SO_SNDTIMEO, struct.pack("ll", int(_SEND_STALL_SECONDS), 0))


def _bytes_of(part: BytesLike) -> memoryview:
    view = memoryview(part)
    return view if view.format == "B" and view.ndim == 1 else view.cast("B")


def _padded(length: int) -> int:
    """The length of Padmé: at most one part in 2 log2(length) longer, few values possible."""
    if length <= _LEAST_PADDED:
        return _LEAST_PADDED
    exponent = length.bit_length() - 1
    mask = (1 << (exponent - exponent.bit_length())) - 1
    return (length + mask) & ~mask


def _records(pieces: Sequence[memoryview]) -> Iterator[memoryview]:
    """Cut the concatenation of `pieces` into records, copying only those that span two pieces."""
    gathered = bytearray()
    for piece in pieces:
        at = 0
        if gathered:
            at = min(len(piece), _RECORD_PLAIN - len(gathered))
            gathered += piece[:at]
            if len(gathered) < _RECORD_PLAIN:
                continue
            yield memoryview(gathered)
            gathered = bytearray()
        while len(piece) - at >= _RECORD_PLAIN:
            yield piece[at : at + _RECORD_PLAIN]
            at += _RECORD_PLAIN
        gathered += piece[at:]
    if gathered:
        yield memoryview(gathered)
