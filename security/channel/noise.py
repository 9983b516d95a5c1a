"""Noise_KK_25519_AESGCM_SHA256: both sides know each other's static key beforehand.

The Noise Protocol Framework, revision 34 (https://noiseprotocol.org/noise.html), restricted to the
one pattern and one suite that links use, so there is nothing to negotiate and nothing to downgrade:

    KK:
      -> s
      <- s
      ...
      -> e, es, ss
      <- e, ee, se

The first message can be replayed by whoever recorded it (section 7.7, payload security): it carries
no payload here, and a responder waits for a first transport record before it believes its peer.
"""

import hashlib
import hmac
import struct
from dataclasses import dataclass
from typing import ClassVar, Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from security.channel.frame import BytesLike
from security.errors import SecurityError

__all__ = [
    "KEY_BYTES",
    "MESSAGE_OVERHEAD",
    "PROTOCOL",
    "TAG_BYTES",
    "CipherState",
    "KKInitiator",
    "KKResponder",
    "NoiseError",
    "Transport",
]

PROTOCOL: Final = "Noise_KK_25519_AESGCM_SHA256"
KEY_BYTES: Final = 32
TAG_BYTES: Final = 16
# Both handshake messages are an ephemeral key and an encrypted payload.
MESSAGE_OVERHEAD: Final = KEY_BYTES + TAG_BYTES

# 2^64-1 is reserved for rekeying (section 5.1).
_REKEY_NONCE: Final = 2**64 - 1
_NONCE: Final = struct.Struct(">IQ")


class NoiseError(SecurityError):
    """A message that the expected peer did not write, or that is not the next one."""

    code: ClassVar[str] = "noise_error"


class CipherState:
    """One direction of encryption: a key and a counter (section 5.1).

    Not safe for two threads at once. A failed decryption leaves the counter where it was; the
    caller must not go on.
    """

    __slots__ = ("_aead", "_key", "_nonce")

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._aead = AESGCM(key)
        self._nonce = 0

    def encrypt(self, associated: bytes, plaintext: bytes) -> bytes:
        """EncryptWithAd: the ciphertext with its tag appended."""
        return self._aead.encrypt(self._next(), plaintext, associated)

    def decrypt(self, associated: bytes, ciphertext: bytes) -> bytes:
        """DecryptWithAd. Raises NoiseError where key, counter, `associated` or bytes differ."""
        nonce = self._next()
        try:
            return self._aead.decrypt(nonce, ciphertext, associated)
        except InvalidTag:
            self._nonce -= 1
            raise NoiseError("a message does not decrypt under the expected keys") from None

    def seal_into(self, plaintext: BytesLike, out: memoryview) -> None:
        """Encrypt a transport record into `out`, exactly len(plaintext) + 16 bytes long."""
        self._aead.encrypt_into(self._next(), plaintext, None, out)

    def open_into(self, ciphertext: BytesLike, out: memoryview) -> None:
        """Decrypt a transport record into `out`, exactly len(ciphertext) - 16 bytes long.

        Raises NoiseError, and then nothing in `out` may be used.
        """
        nonce = self._next()
        try:
            self._aead.decrypt_into(nonce, ciphertext, None, out)
        except InvalidTag:
            self._nonce -= 1
            raise NoiseError("a record does not decrypt as the next one") from None

    def rekey(self) -> None:
        """Replace the key by one from which the old one cannot be had; the counter goes on."""
        zeros = bytes(KEY_BYTES)
        self._key = self._aead.encrypt(_NONCE.pack(0, _REKEY_NONCE), zeros, b"")[:KEY_BYTES]
        self._aead = AESGCM(self._key)

    def _next(self) -> bytes:
        nonce = self._nonce
        if nonce >= _REKEY_NONCE:
            raise NoiseError("the record counter is used up; open a new link")
        self._nonce = nonce + 1
        return _NONCE.pack(0, nonce)


@dataclass(frozen=True, slots=True)
class Transport:
    """What a finished handshake leaves: a cipher for each direction, and the transcript's hash."""

    send: CipherState
    receive: CipherState
    handshake_hash: bytes


class _SymmetricState:
    """The chaining key, the transcript and the handshake's cipher (section 5.2)."""

    def __init__(self, prologue: bytes) -> None:
        # The protocol's name is shorter than a hash, so it is padded rather than hashed.
        self.hash = PROTOCOL.encode().ljust(hashlib.sha256().digest_size, b"\0")
        self._chaining_key = self.hash
        self._cipher: CipherState | None = None
        self.mix_hash(prologue)

    def mix_hash(self, content: bytes) -> None:
        self.hash = hashlib.sha256(self.hash + content).digest()

    def mix_key(self, secret: bytes) -> None:
        self._chaining_key, key = _hkdf(self._chaining_key, secret)
        self._cipher = CipherState(key)

    def encrypt_and_hash(self, plaintext: bytes) -> bytes:
        assert self._cipher is not None
        ciphertext = self._cipher.encrypt(self.hash, plaintext)
        self.mix_hash(ciphertext)
        return ciphertext

    def decrypt_and_hash(self, ciphertext: bytes) -> bytes:
        assert self._cipher is not None
        plaintext = self._cipher.decrypt(self.hash, ciphertext)
        self.mix_hash(ciphertext)
        return plaintext

    def split(self) -> tuple[CipherState, CipherState]:
        first, second = _hkdf(self._chaining_key, b"")
        return CipherState(first), CipherState(second)


class _KKHandshake:
    """What both sides of the pattern share."""

    def __init__(self, static: X25519PrivateKey, peer: bytes, prologue: bytes) -> None:
        if len(peer) != KEY_BYTES:
            raise ValueError(f"peer key: expected {KEY_BYTES} bytes, found {len(peer)}")
        self._static = static
        self._peer = peer
        self._symmetric = _SymmetricState(prologue)
        self._ephemeral = self._new_ephemeral()
        self._peer_ephemeral = b""
        self._steps = 0

    def _new_ephemeral(self) -> X25519PrivateKey:
        return X25519PrivateKey.generate()

    def _step(self, expected: int) -> None:
        if self._steps != expected:
            raise NoiseError("a handshake message is out of turn; start a new handshake")
        self._steps += 1

    def _write(self, secrets: "_Secrets", payload: bytes) -> bytes:
        public = self._ephemeral.public_key().public_bytes_raw()
        self._symmetric.mix_hash(public)
        self._mix(secrets)
        return public + self._symmetric.encrypt_and_hash(payload)

    def _read(self, secrets: "_Secrets", message: bytes) -> bytes:
        if len(message) < MESSAGE_OVERHEAD:
            raise NoiseError(
                f"handshake message: expected at least {MESSAGE_OVERHEAD} bytes, "
                f"found {len(message)}"
            )
        self._peer_ephemeral = message[:KEY_BYTES]
        self._symmetric.mix_hash(self._peer_ephemeral)
        self._mix(secrets)
        return self._symmetric.decrypt_and_hash(message[KEY_BYTES:])

    def _mix(self, secrets: "_Secrets") -> None:
        for own, peer in secrets:
            private = self._static if own == "s" else self._ephemeral
            public = self._peer if peer == "s" else self._peer_ephemeral
            try:
                secret = private.exchange(X25519PublicKey.from_public_bytes(public))
            except ValueError:
                # cryptography refuses an all-zero result: a key of small order.
                raise NoiseError("the peer's key is of small order") from None
            self._symmetric.mix_key(secret)


# Own key, peer's key: "e"phemeral or "s"tatic. The spec names the initiator's key first.
_Secrets = tuple[tuple[str, str], ...]


class KKInitiator(_KKHandshake):
    """The side that speaks first: `write_message`, `read_message`, `split`."""

    def __init__(self, static: X25519PrivateKey, peer: bytes, prologue: bytes) -> None:
        super().__init__(static, peer, prologue)
        self._symmetric.mix_hash(static.public_key().public_bytes_raw())
        self._symmetric.mix_hash(peer)

    def write_message(self, payload: bytes = b"") -> bytes:
        """`e, es, ss`. A payload here is open to replay; links send none."""
        self._step(0)
        return self._write((("e", "s"), ("s", "s")), payload)

    def read_message(self, message: bytes) -> bytes:
        """`e, ee, se`; returns the payload. Raises NoiseError."""
        self._step(1)
        return self._read((("e", "e"), ("s", "e")), message)

    def split(self) -> Transport:
        """The transport ciphers, once both messages have passed."""
        self._step(2)
        send, receive = self._symmetric.split()
        return Transport(send, receive, self._symmetric.hash)


class KKResponder(_KKHandshake):
    """The side that listens: `read_message`, `write_message`, `split`."""

    def __init__(self, static: X25519PrivateKey, peer: bytes, prologue: bytes) -> None:
        super().__init__(static, peer, prologue)
        self._symmetric.mix_hash(peer)
        self._symmetric.mix_hash(static.public_key().public_bytes_raw())

    def read_message(self, message: bytes) -> bytes:
        """`e, es, ss`; returns the payload. Raises NoiseError."""
        self._step(0)
        return self._read((("s", "e"), ("s", "s")), message)

    def write_message(self, payload: bytes = b"") -> bytes:
        """`e, ee, se`."""
        self._step(1)
        return self._write((("e", "e"), ("e", "s")), payload)

    def split(self) -> Transport:
        """The transport ciphers, once both messages have passed."""
        self._step(2)
        receive, send = self._symmetric.split()
        return Transport(send, receive, self._symmetric.hash)


def _hkdf(chaining_key: bytes, secret: bytes) -> tuple[bytes, bytes]:
    """HKDF of section 4.3 with two outputs."""
    extracted = hmac.digest(chaining_key, secret, "sha256")
    first = hmac.digest(extracted, b"\x01", "sha256")
    return first, hmac.digest(extracted, first + b"\x02", "sha256")
