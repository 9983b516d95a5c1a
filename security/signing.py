"""Signed documents: Ed25519 (RFC 8032) over a domain, a kind and a payload.

What is signed is ``"bulkhead/v1/" + kind`` and the payload, each preceded by its length, so a
signature over one kind of document can never be shown as one over another. Signatures cover the
payload's bytes as they are; nothing is parsed before the signature holds.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from security.errors import KeyFileError, MalformedInput, SignatureInvalid, WrongDocumentKind

DOMAIN = "bulkhead/v1/"
KINDS = frozenset(
    {
        "policy",
        "template",
        "manifest",
        "broker",
        "roster",
        "enrolment",
        "audit-head",
        "revocation",
    }
)

MAX_PAYLOAD_BYTES = 32 << 20
"""Longest payload that is read; a manifest of a hundred thousand tensors stays below it."""

KEY_BYTES = 32
SIGNATURE_BYTES = 64
_MAX_KEY_FILE_BYTES = 4096
_MAGIC = b"BKHD-SD1"
_HEADER = struct.Struct(">8sB32s64sI")


def length_prefixed(parts: Iterable[bytes]) -> bytes:
    """Joins parts so that no two different sequences of parts give the same bytes.

    Each part is preceded by its length as eight bytes, big-endian.
    """
    return b"".join(struct.pack(">Q", len(part)) + part for part in parts)


@dataclass(frozen=True, slots=True)
class SignedDocument:
    """A payload with its signature; worth nothing until `open_signed` has checked it.

    Attributes:
        kind: one of `KINDS`.
        payload: the signed bytes.
        signature: 64 bytes.
        key: public key of the signer (32 bytes), a hint only: verification uses the key that the
            verifier expects.
    """

    kind: str
    payload: bytes
    signature: bytes
    key: bytes

    def to_bytes(self) -> bytes:
        """Magic, kind length, key, signature, payload length (big-endian), kind, payload."""
        kind = self.kind.encode("ascii")
        return (
            _HEADER.pack(_MAGIC, len(kind), self.key, self.signature, len(self.payload))
            + kind
            + self.payload
        )

    @classmethod
    def from_bytes(cls, data: bytes, max_payload: int = MAX_PAYLOAD_BYTES) -> SignedDocument:
        """Parses what `to_bytes` wrote, checking every length first.

        Raises:
            MalformedInput: another format, another length than stated, or an unknown kind.
        """
        if not _HEADER.size < len(data) <= _HEADER.size + 64 + max_payload:
            raise MalformedInput(
                f"signed document: expected {_HEADER.size + 1} to "
                f"{_HEADER.size + 64 + max_payload} bytes, found {len(data)}"
            )
        magic, kind_length, key, signature, payload_length = _HEADER.unpack_from(data)
        if magic != _MAGIC:
            raise MalformedInput("signed document: expected one that Bulkhead wrote, found another")
        if _HEADER.size + kind_length + payload_length != len(data):
            raise MalformedInput(
                f"signed document: expected {_HEADER.size + kind_length + payload_length} bytes as "
                f"its header states, found {len(data)}"
            )
        raw_kind = data[_HEADER.size : _HEADER.size + kind_length]
        kind = raw_kind.decode("ascii", errors="replace")
        if kind not in KINDS:
            raise MalformedInput(f"signed document: expected one of {sorted(KINDS)}, found another")
        return cls(kind, data[_HEADER.size + kind_length :], signature, key)


def sign(kind: str, payload: bytes, key: Ed25519PrivateKey) -> SignedDocument:
    """Signs a payload as a document of one kind.

    Raises:
        ValueError: the kind is not one of `KINDS` or the payload is too long (caller's mistake).
    """
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {sorted(KINDS)}, found {kind!r}")
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise ValueError(
            f"{kind}: expected at most {MAX_PAYLOAD_BYTES} bytes, found {len(payload)}"
        )
    return SignedDocument(kind, payload, key.sign(_signed_bytes(kind, payload)), public_bytes(key))


def open_signed(kind: str, document: SignedDocument | bytes, public_key: bytes) -> bytes:
    """Checks kind and signature and returns the payload.

    Args:
        kind: the kind that the caller wants.
        document: the document, parsed or as bytes.
        public_key: the key that must have signed it (32 bytes), never taken from the document.

    Raises:
        MalformedInput: the bytes are not a signed document.
        WrongDocumentKind: it is of another kind.
        SignatureInvalid: another key signed it, or it was changed.
    """
    if isinstance(document, (bytes, bytearray, memoryview)):
        document = SignedDocument.from_bytes(bytes(document))
    if document.kind != kind:
        raise WrongDocumentKind(f"signed document: expected a {kind}, found a {document.kind}")
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(
            document.signature, _signed_bytes(kind, document.payload)
        )
    except (InvalidSignature, ValueError):
        raise SignatureInvalid(
            f"{kind}: expected a signature by {public_key.hex()[:16]}..., found one that claims "
            f"{document.key.hex()[:16]}... and does not verify; sign it with the right key"
        ) from None
    return document.payload


def _signed_bytes(kind: str, payload: bytes) -> bytes:
    return length_prefixed([(DOMAIN + kind).encode("ascii"), payload])


def public_bytes(key: Ed25519PrivateKey | Ed25519PublicKey) -> bytes:
    """The 32 bytes of a public key."""
    public = key.public_key() if isinstance(key, Ed25519PrivateKey) else key
    return public.public_bytes(Encoding.Raw, PublicFormat.Raw)


def create_key_file(path: Path) -> Ed25519PrivateKey:
    """Makes a fresh Ed25519 key and writes it as PKCS#8 PEM, mode 0600, never over another file.

    Raises:
        KeyFileError: the file exists or cannot be written.
    """
    key = Ed25519PrivateKey.generate()
    write_key_file(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return key


def write_key_file(path: Path, pem: bytes) -> None:
    """Writes a key, mode 0600, never over another file; raises KeyFileError."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(pem)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise KeyFileError(f"{path}: could not write a new key: {error.strerror}") from None


def load_key_file(path: Path) -> Ed25519PrivateKey:
    """Reads a private key that only its owner can read.

    Raises:
        KeyFileError: missing, a link, open to group or others, too long, or not Ed25519 PEM.
    """
    pem = read_key_file(path, private=stat.S_IRWXG | stat.S_IRWXO)
    try:
        key = load_pem_private_key(pem, password=None)
    except (ValueError, TypeError):
        # The parser's own message could quote the file.
        raise KeyFileError(f"{path}: expected an unencrypted PKCS#8 PEM key") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise KeyFileError(f"{path}: expected an Ed25519 key, found another algorithm")
    return key


def write_public_key(path: Path, public_key: bytes) -> None:
    """Writes a public key as PEM, replacing the file."""
    pem = Ed25519PublicKey.from_public_bytes(public_key).public_bytes(
        Encoding.PEM, PublicFormat.SubjectPublicKeyInfo
    )
    path.write_bytes(pem)


def load_public_key(path: Path) -> bytes:
    """Reads a PEM public key and returns its 32 bytes.

    Raises:
        KeyFileError: missing, too long, or not Ed25519 PEM.
    """
    pem = read_key_file(path, private=0)
    try:
        key = load_pem_public_key(pem)
    except ValueError:
        raise KeyFileError(f"{path}: expected a PEM public key") from None
    if not isinstance(key, Ed25519PublicKey):
        raise KeyFileError(f"{path}: expected an Ed25519 key, found another algorithm")
    return public_bytes(key)


def read_key_file(path: Path, private: int) -> bytes:
    """Reads a small regular file none of whose `private` mode bits is set; raises KeyFileError."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise KeyFileError(f"{path}: could not read the key: {error.strerror}") from None
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_size > _MAX_KEY_FILE_BYTES:
            raise KeyFileError(
                f"{path}: expected a regular file of at most {_MAX_KEY_FILE_BYTES} bytes"
            )
        if status.st_mode & private:
            raise KeyFileError(
                f"{path}: expected mode 0600, found {stat.S_IMODE(status.st_mode):04o}; "
                f"run chmod 600 on it, and make a new key if others could read this one"
            )
        return file.read(_MAX_KEY_FILE_BYTES)
