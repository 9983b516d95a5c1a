"""A client's requests and the head's answers, sealed past everything that relays them.

A request is one HPKE message (RFC 9180, base mode, single shot) to the head's X25519 key from a
verified roster; `info` binds the pipeline instance and that key. Inside are the time, a fresh
32-byte response key and the request itself with the client's credential, zero-padded to a bucket.

The answer is a stream that may be cut anywhere in transit:

    4s magic | 32s salt | records
    record: u32 length of the ciphertext | AES-256-GCM ciphertext with its tag
    plain:  u8 type | u32 length | content | zero bytes up to a bucket

Records are numbered by their nonce, begin with one HEAD and end with END, so a changed, moved,
repeated or missing record is found, and so is a missing end. Buckets hide the lengths of single
tokens (Whisper Leak, arXiv 2511.03675). The record key is HKDF-SHA256 of the response key under the
head's salt: even a request that were answered twice never meets the same key and nonce twice (the
construction of Oblivious HTTP, RFC 9458, section 4.4).

A recorded request must not be answered twice: that would spend the client's tokens and compare
answers. The head refuses a request whose time is more than five minutes from its own clock, and
remembers the response keys of younger ones. A full memory refuses instead of forgetting. A
restarted head has a new key, so nothing has to be kept on disk.
"""

import collections
import hashlib
import secrets
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import ClassVar, Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from security.errors import SecurityError

__all__ = [
    "MAX_CREDENTIAL_BYTES",
    "MAX_RETRY_AFTER_SECONDS",
    "EnvelopeClient",
    "EnvelopeError",
    "EnvelopeServer",
    "ReplayMemoryFull",
    "Request",
    "RequestMalformed",
    "RequestNotForThisHead",
    "RequestReplayed",
    "RequestStale",
    "RequestTooLong",
    "ResponseEvent",
    "ResponseHead",
    "ResponseOpener",
    "ResponseSealer",
    "ResponseTampered",
    "ResponseTruncated",
]

MAX_CLOCK_SKEW_SECONDS: Final = 300
MAX_REMEMBERED: Final = 2**18
MAX_CREDENTIAL_BYTES: Final = 8192
MAX_RETRY_AFTER_SECONDS: Final = 3600

_SUITE: Final = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)
# An encapsulated X25519 key and a tag.
_HPKE_OVERHEAD: Final = 48
_KEY_BYTES: Final = 32
_TAG_BYTES: Final = 16
_VERSION: Final = 2
# Version, time in milliseconds since 1970, response key, lengths of the five fields.
_REQUEST: Final = struct.Struct(f">BQ{_KEY_BYTES}sHHHHI")
_REQUEST_BUCKET: Final = 1024
_MAX_FIELD_BYTES: Final = {
    "method": 16,
    "path": 2048,
    "content_type": 256,
    "credential": MAX_CREDENTIAL_BYTES,
}

_RESPONSE_MAGIC: Final = b"BHR2"
_RECORD_LENGTH: Final = struct.Struct(">I")
_PLAIN: Final = struct.Struct(">BI")
_HEAD, _BODY, _END = 1, 2, 3
_BUCKETS: Final = (512, 2048, 8192, 32768)
_MAX_CONTENT: Final = _BUCKETS[-1] - _PLAIN.size
_NONCE: Final = struct.Struct(">IQ")
# Status, seconds to wait before a retry (0: not said); the content type follows.
_START: Final = struct.Struct(">HH")


class EnvelopeError(SecurityError):
    """A sealed request or answer that must not be used."""

    code: ClassVar[str] = "envelope_error"


class RequestTooLong(EnvelopeError):
    """A request is longer than its reader allows, or one of its fields is."""

    code: ClassVar[str] = "request_too_long"


class RequestNotForThisHead(EnvelopeError):
    """Sealed to another key or instance, or changed on the way: the cipher cannot tell which."""

    code: ClassVar[str] = "request_not_for_this_head"


class RequestMalformed(EnvelopeError):
    """Sealed to this head, but not a request of this version."""

    code: ClassVar[str] = "request_malformed"


class RequestStale(EnvelopeError):
    """Sealed too long ago, or by a clock that is wrong."""

    code: ClassVar[str] = "request_stale"


class RequestReplayed(EnvelopeError):
    """The same sealed request has arrived before."""

    code: ClassVar[str] = "request_replayed"


class ReplayMemoryFull(EnvelopeError):
    """More requests in ten minutes than can be remembered; try again later."""

    code: ClassVar[str] = "replay_memory_full"


class ResponseTampered(EnvelopeError):
    """Bytes arrived that the head did not send, or not in this place."""

    code: ClassVar[str] = "response_tampered"


class ResponseTruncated(EnvelopeError):
    """The answer ended before the head said so."""

    code: ClassVar[str] = "response_truncated"


@dataclass(frozen=True, slots=True)
class Request:
    """An HTTP request as the head's OpenAI layer takes it.

    `credential` is the Authorization header's value, "" where there is none. The head tells tenants
    apart by it; like the body, it is only ever in clear at the two ends.
    """

    method: str
    path: str
    content_type: str
    body: bytes = field(repr=False)
    credential: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True)
class ResponseHead:
    """What comes before the body of an answer.

    `retry_after` is HTTP's Retry-After in seconds, 1 to MAX_RETRY_AFTER_SECONDS, or None.
    """

    status: int
    content_type: str
    retry_after: int | None = None


ResponseEvent = ResponseHead | bytes


class EnvelopeClient:
    """Seals requests to one head, by the 32-byte X25519 key and instance of a verified roster."""

    def __init__(
        self, head_key: bytes, instance: str, clock: Callable[[], float] = time.time
    ) -> None:
        self._head_key = X25519PublicKey.from_public_bytes(head_key)
        self._info = _info(instance, head_key)
        self._clock = clock

    def seal(self, request: Request) -> tuple[bytes, "ResponseOpener"]:
        """The sealed request, and what opens its answer. Each is for one use.

        Raises RequestTooLong where method, path, content type or credential is too long to be
        sent, and RequestMalformed where one of them is not ASCII.
        """
        fields = [
            _field_bytes(name, text)
            for name, text in (
                ("method", request.method),
                ("path", request.path),
                ("content_type", request.content_type),
                ("credential", request.credential),
            )
        ]
        response_key = secrets.token_bytes(_KEY_BYTES)
        lengths = (*map(len, fields), len(request.body))
        start = _REQUEST.pack(_VERSION, int(self._clock() * 1000), response_key, *lengths)
        plain = b"".join([start, *fields, request.body])
        padding = -len(plain) % _REQUEST_BUCKET
        sealed = _SUITE.encrypt(plain + bytes(padding), self._head_key, info=self._info)
        return sealed, ResponseOpener(response_key)


class EnvelopeServer:
    """Opens the requests of one head; safe to use from several threads.

    `clock` gives seconds since 1970. One server per key: it remembers what the key has opened.
    """

    def __init__(
        self, private_key: X25519PrivateKey, instance: str, clock: Callable[[], float] = time.time
    ) -> None:
        self._private_key = private_key
        self._info = _info(instance, private_key.public_key().public_bytes_raw())
        self._clock = clock
        self._lock = threading.Lock()
        self._latest = 0.0
        self._seen: set[bytes] = set()
        # When each of `_seen` may be forgotten, about in that order.
        self._expiries: collections.deque[tuple[float, bytes]] = collections.deque()

    def open(self, sealed: bytes, max_bytes: int) -> tuple[Request, "ResponseSealer"]:
        """The request inside, and what seals its answer.

        Raises RequestTooLong above `max_bytes` (of `sealed`), RequestNotForThisHead,
        RequestMalformed, RequestStale, RequestReplayed or ReplayMemoryFull.
        """
        if len(sealed) > max_bytes:
            raise RequestTooLong(
                f"sealed request: expected at most {max_bytes} bytes, found {len(sealed)}"
            )
        if len(sealed) < _HPKE_OVERHEAD:
            raise RequestNotForThisHead(
                f"sealed request: expected at least {_HPKE_OVERHEAD} bytes, found {len(sealed)}"
            )
        try:
            plain = _SUITE.decrypt(sealed, self._private_key, info=self._info)
        except (InvalidTag, ValueError):
            raise RequestNotForThisHead(
                "the request does not open with this head's key and instance; "
                "fetch the current roster and seal it again"
            ) from None
        request, milliseconds, response_key = _parse_request(plain)
        self._admit(milliseconds / 1000, response_key)
        return request, ResponseSealer(response_key)

    def _admit(self, sealed_at: float, response_key: bytes) -> None:
        with self._lock:
            # A clock that is set back must not make young again what has been forgotten.
            now = self._latest = max(self._latest, self._clock())
        if abs(now - sealed_at) > MAX_CLOCK_SKEW_SECONDS:
            raise RequestStale(
                f"the request's time is {now - sealed_at:+.0f} s from the head's, expected within "
                f"{MAX_CLOCK_SKEW_SECONDS} s; check both clocks"
            )
        name = hashlib.sha256(response_key).digest()
        with self._lock:
            while self._expiries and self._expiries[0][0] < now:
                self._seen.discard(self._expiries.popleft()[1])
            if name in self._seen:
                raise RequestReplayed("this sealed request was answered before; seal a new one")
            if len(self._seen) >= MAX_REMEMBERED:
                raise ReplayMemoryFull(
                    f"{MAX_REMEMBERED} requests are remembered already; try again in a few minutes"
                )
            self._seen.add(name)
            # The latest moment at which any accepted time could still be fresh, so that entries
            # expire in the order in which they came.
            self._expiries.append((now + 2 * MAX_CLOCK_SKEW_SECONDS, name))


class ResponseSealer:
    """Seals one answer: `head` once, `body` any number of times, `end` once, in this order.

    The bytes returned are to be sent in order; how they are cut on the way does not matter. Not for
    several threads at once.
    """

    def __init__(self, response_key: bytes) -> None:
        self._salt = secrets.token_bytes(_KEY_BYTES)
        self._cipher = _response_cipher(response_key, self._salt)
        self._count = 0
        self._ended = False

    def head(self, status: int, content_type: str, retry_after: int | None = None) -> bytes:
        """The start of the answer; see ResponseHead."""
        assert self._count == 0, "the head comes first, and once"
        assert retry_after is None or 1 <= retry_after <= MAX_RETRY_AFTER_SECONDS
        content = _START.pack(status, retry_after or 0) + _field_bytes("content_type", content_type)
        return _RESPONSE_MAGIC + self._salt + self._record(_HEAD, content)

    def body(self, content: bytes) -> bytes:
        """A piece of the body, in as many records as it needs."""
        assert self._count > 0, "the head comes before the body"
        return b"".join(
            self._record(_BODY, content[at : at + _MAX_CONTENT])
            for at in range(0, len(content), _MAX_CONTENT)
        )

    def end(self) -> bytes:
        """The mark without which the answer counts as cut off."""
        assert self._count > 0, "the head comes before the end"
        record = self._record(_END, b"")
        self._ended = True
        return record

    def _record(self, kind: int, content: bytes) -> bytes:
        assert not self._ended, "nothing follows the end"
        used = _PLAIN.size + len(content)
        bucket = next(size for size in _BUCKETS if size >= used)
        plain = (_PLAIN.pack(kind, len(content)) + content).ljust(bucket, b"\0")
        sealed = self._cipher.encrypt(_NONCE.pack(0, self._count), plain, None)
        self._count += 1
        return _RECORD_LENGTH.pack(len(sealed)) + sealed


class ResponseOpener:
    """Opens one answer from pieces cut anywhere: `feed` each, then `finish`."""

    def __init__(self, response_key: bytes) -> None:
        self._response_key = response_key
        self._cipher: AESGCM | None = None
        self._buffer = bytearray()
        self._count = 0
        self._ended = False
        self._failed = False

    def feed(self, piece: bytes) -> list[ResponseEvent]:
        """What `piece` completes: first a ResponseHead, then pieces of the body as bytes.

        Raises ResponseTampered; the answer is then lost, and every later call raises again.
        """
        if self._failed:
            raise ResponseTampered("the answer was tampered with before")
        self._buffer += piece
        try:
            return list(self._events())
        except ResponseTampered:
            self._failed = True
            raise

    def finish(self) -> None:
        """Say that no piece follows. Raises ResponseTruncated unless the head said so too."""
        if not self._ended:
            raise ResponseTruncated(
                f"the answer ended after {self._count} records without its end mark; ask again"
            )

    def _events(self) -> Iterator[ResponseEvent]:
        if self._cipher is None:
            start = len(_RESPONSE_MAGIC) + _KEY_BYTES
            if not _RESPONSE_MAGIC.startswith(bytes(self._buffer[: len(_RESPONSE_MAGIC)])):
                raise ResponseTampered("the answer does not begin like a sealed one")
            if len(self._buffer) < start:
                return
            self._cipher = _response_cipher(
                self._response_key, bytes(self._buffer[len(_RESPONSE_MAGIC) : start])
            )
            del self._buffer[:start]
        while len(self._buffer) >= _RECORD_LENGTH.size:
            if self._ended:
                break
            (length,) = _RECORD_LENGTH.unpack_from(self._buffer)
            if length - _TAG_BYTES not in _BUCKETS:
                raise ResponseTampered(f"record: no bucket has {length} bytes")
            end = _RECORD_LENGTH.size + length
            if len(self._buffer) < end:
                return
            sealed = bytes(self._buffer[_RECORD_LENGTH.size : end])
            del self._buffer[:end]
            event = self._open(self._cipher, sealed)
            if event is not None:
                yield event
        if self._ended and self._buffer:
            raise ResponseTampered("bytes follow the end of the answer")

    def _open(self, cipher: AESGCM, sealed: bytes) -> ResponseEvent | None:
        try:
            plain = cipher.decrypt(_NONCE.pack(0, self._count), sealed, None)
        except InvalidTag:
            raise ResponseTampered(f"record {self._count} is not the one the head sent") from None
        kind, length = _PLAIN.unpack_from(plain)
        content, padding = plain[_PLAIN.size :][:length], plain[_PLAIN.size + length :]
        expected = (_HEAD,) if self._count == 0 else (_BODY, _END)
        if kind not in expected or len(content) != length or any(padding):
            raise ResponseTampered(f"record {self._count} is malformed")
        self._count += 1
        if kind == _BODY:
            return content
        if kind == _END:
            self._ended = True
            return None
        if length < _START.size or not content[_START.size :].isascii():
            raise ResponseTampered("the answer's head is malformed")
        status, retry_after = _START.unpack_from(content)
        if retry_after > MAX_RETRY_AFTER_SECONDS:
            raise ResponseTampered("the answer's head is malformed")
        return ResponseHead(status, content[_START.size :].decode("ascii"), retry_after or None)


def _info(instance: str, head_key: bytes) -> bytes:
    return b"".join(
        len(part).to_bytes(4, "big") + part
        for part in (b"bulkhead/v1/request", instance.encode(), head_key)
    )


def _field_bytes(name: str, text: str) -> bytes:
    encoded = text.encode("ascii", "strict") if text.isascii() else b""
    if len(encoded) != len(text):
        raise RequestMalformed(f"{name}: expected ASCII characters")
    if len(encoded) > _MAX_FIELD_BYTES[name]:
        raise RequestTooLong(
            f"{name}: expected at most {_MAX_FIELD_BYTES[name]} bytes, found {len(encoded)}"
        )
    return encoded


def _parse_request(plain: bytes) -> tuple[Request, int, bytes]:
    if len(plain) < _REQUEST.size:
        raise RequestMalformed(
            f"request: expected at least {_REQUEST.size} bytes, found {len(plain)}"
        )
    version, milliseconds, response_key, *lengths = _REQUEST.unpack_from(plain)
    if version != _VERSION:
        raise RequestMalformed(
            f"request: expected version {_VERSION}, found {version}; run the same release of "
            "Bulkhead on both sides"
        )
    end = _REQUEST.size + sum(lengths)
    padding = len(plain) - end
    if not 0 <= padding < _REQUEST_BUCKET or any(plain[end:]):
        raise RequestMalformed("request: its lengths do not add up")
    texts: list[str] = []
    at = _REQUEST.size
    for (name, most), length in zip(_MAX_FIELD_BYTES.items(), lengths[:-1], strict=True):
        content = plain[at : at + length]
        if length > most:
            raise RequestTooLong(f"{name}: expected at most {most} bytes, found {length}")
        if not content.isascii():
            raise RequestMalformed(f"{name}: expected ASCII characters")
        texts.append(content.decode("ascii"))
        at += length
    method, path, content_type, credential = texts
    request = Request(method, path, content_type, plain[at:end], credential)
    return request, milliseconds, response_key


def _response_cipher(response_key: bytes, salt: bytes) -> AESGCM:
    derivation = HKDF(hashes.SHA256(), _KEY_BYTES, salt, b"bulkhead/v1/response")
    return AESGCM(derivation.derive(response_key))
