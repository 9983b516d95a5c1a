"""Keys of sealed units: in memory, wrapped in a file, and the key pairs that they are wrapped for.

`sealed_keys.json` lies beside the sealed checkpoint's files and is not part of its manifest: it
holds each unit's key once for each recipient (the owner's recovery key, the broker's unsealing
key), as an HPKE message (RFC 9180, base mode) whose info binds sealing, unit and recipient. Whoever
replaces it can only refuse service: `sealing.json`, which the manifest covers, commits to all keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from placement.document import DocumentError, Fields, decode, encode
from security.errors import (
    KeyFileError,
    MalformedInput,
    NotARecipient,
    SealedKeysMalformed,
    UnsealKeyMissing,
    WrappedKeyInvalid,
)
from security.sealing.cipher import KEY_BYTES
from security.sealing.document import MAX_UNITS, SEALING_ID_BYTES, UNIT_PATTERN
from security.signing import length_prefixed, read_key_file, write_key_file

SEALED_KEYS_FILE: Final = "sealed_keys.json"
MAX_RECIPIENTS: Final = 16
MAX_SEALED_KEYS_BYTES: Final = 32 << 20

_FORMAT: Final = "bulkhead-sealed-keys-1"
_KEYS_FORMAT: Final = "bulkhead-unseal-keys-1"
_MAX_KEYS_BYTES: Final = 1 << 20
_SUITE: Final = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)
# An encapsulated X25519 key, the unit's key, a tag.
_WRAPPED_BYTES: Final = 32 + KEY_BYTES + 16


class UnsealKeys(Mapping[str, bytes]):
    """The keys of some units, by unit; lives in memory only and shows no key in its repr."""

    def __init__(self, keys: Mapping[str, bytes]) -> None:
        for unit, key in keys.items():
            if len(key) != KEY_BYTES:
                raise ValueError(f"key of {unit}: expected {KEY_BYTES} bytes, found {len(key)}")
        self._keys = dict(keys)

    def __getitem__(self, unit: str) -> bytes:
        return self._keys[unit]

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def __repr__(self) -> str:
        return f"UnsealKeys({', '.join(sorted(self._keys))})"

    def only(self, units: list[str]) -> UnsealKeys:
        """The keys of these units, as far as there are any."""
        return UnsealKeys({unit: self._keys[unit] for unit in units if unit in self._keys})

    def to_bytes(self) -> bytes:
        """For a pipe to a rank, or for what a broker seals to a shard. Holds the keys."""
        return encode(
            {"format": _KEYS_FORMAT, "keys": {unit: key.hex() for unit, key in self.items()}}
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> UnsealKeys:
        """Parses what `to_bytes` wrote; raises SealedKeysMalformed, which quotes no key."""
        try:
            reader = Fields.of(decode(data, _MAX_KEYS_BYTES), "unseal keys")
            reader.text("format", 32, _KEYS_FORMAT)
            document = reader.mapping("keys")
            reader.finish()
            if len(document) > MAX_UNITS:
                raise DocumentError(f"unseal keys: expected at most {MAX_UNITS}")
            keys = Fields.of(document, "unseal keys")
            return cls({unit: keys.octets(unit, KEY_BYTES) for unit in document})
        except DocumentError:
            raise SealedKeysMalformed(
                "unseal keys: expected units with keys of 32 bytes, found another document"
            ) from None


@dataclass(frozen=True, slots=True)
class WrappedKeys:
    """The content of `sealed_keys.json`.

    Attributes:
        sealing_id: of the checkpoint that the keys open.
        recipients: by recipient's public key (32 bytes), the wrapped key of each unit.
    """

    sealing_id: bytes
    recipients: dict[bytes, dict[str, bytes]]

    def to_bytes(self) -> bytes:
        """The canonical encoding."""
        return encode(
            {
                "format": _FORMAT,
                "sealing_id": self.sealing_id.hex(),
                "recipients": [
                    {
                        "recipient": recipient.hex(),
                        "keys": [
                            {"unit": unit, "wrapped": wrapped.hex()}
                            for unit, wrapped in sorted(units.items())
                        ],
                    }
                    for recipient, units in sorted(self.recipients.items())
                ],
            }
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> WrappedKeys:
        """Parses what `to_bytes` wrote, and nothing else; raises SealedKeysMalformed."""
        try:
            reader = Fields.of(decode(data, MAX_SEALED_KEYS_BYTES), SEALED_KEYS_FILE)
            reader.text("format", 32, _FORMAT)
            sealing_id = reader.octets("sealing_id", SEALING_ID_BYTES)
            recipients = dict(
                _read_recipient(item) for item in reader.sections("recipients", MAX_RECIPIENTS)
            )
            reader.finish()
        except DocumentError as error:
            raise SealedKeysMalformed(str(error)) from None
        wrapped = cls(sealing_id, recipients)
        if wrapped.to_bytes() != data:
            raise SealedKeysMalformed(
                f"{SEALED_KEYS_FILE}: expected the canonical encoding, found another one"
            )
        return wrapped

    def unwrap(self, key: X25519PrivateKey, units: list[str] | None = None) -> UnsealKeys:
        """The keys of some units, or of all that were wrapped for this key.

        Raises:
            NotARecipient: none are for this key.
            UnsealKeyMissing: one of the units is not among them.
            WrappedKeyInvalid: one does not open.
        """
        public = key.public_key().public_bytes_raw()
        wrapped = self.recipients.get(public)
        if wrapped is None:
            raise NotARecipient(
                f"{SEALED_KEYS_FILE}: expected keys wrapped for {public.hex()[:16]}..., found "
                f"{', '.join(f'{other.hex()[:16]}...' for other in self.recipients) or 'none'}; "
                "use the key that the checkpoint was sealed with"
            )
        opened: dict[str, bytes] = {}
        for unit in wrapped if units is None else units:
            if unit not in wrapped:
                raise UnsealKeyMissing(
                    f"{SEALED_KEYS_FILE}: expected a key of {unit} wrapped for "
                    f"{public.hex()[:16]}..., found none"
                )
            try:
                opened[unit] = _SUITE.decrypt(
                    wrapped[unit], key, info=_info(self.sealing_id, unit, public)
                )
            except (InvalidTag, ValueError):
                raise WrappedKeyInvalid(
                    f"{SEALED_KEYS_FILE}: {unit}: expected a key wrapped for this recipient, unit "
                    "and checkpoint, found a changed or another one"
                ) from None
            if len(opened[unit]) != KEY_BYTES:
                raise WrappedKeyInvalid(f"{SEALED_KEYS_FILE}: {unit}: expected {KEY_BYTES} bytes")
        return UnsealKeys(opened)


def wrap_keys(keys: UnsealKeys, sealing_id: bytes, recipients: list[bytes]) -> WrappedKeys:
    """Wraps keys for each recipient's X25519 public key (32 bytes).

    An owner who has a new broker opens the old file with the recovery key and wraps again.

    Raises:
        MalformedInput: a recipient's key is no point that a secret can be agreed with.
    """
    wrapped: dict[bytes, dict[str, bytes]] = {}
    for recipient in recipients:
        try:
            public = X25519PublicKey.from_public_bytes(recipient)
            wrapped[recipient] = {
                unit: _SUITE.encrypt(key, public, info=_info(sealing_id, unit, recipient))
                for unit, key in keys.items()
            }
        except ValueError:
            raise MalformedInput(
                "recipient: expected an X25519 public key of full order, found another"
            ) from None
    return WrappedKeys(sealing_id, wrapped)


def _info(sealing_id: bytes, unit: str, recipient: bytes) -> bytes:
    return length_prefixed([b"bulkhead/v1/sealed-key", sealing_id, unit.encode(), recipient])


def _read_recipient(reader: Fields) -> tuple[bytes, dict[str, bytes]]:
    recipient = reader.octets("recipient", 32)
    keys: dict[str, bytes] = {}
    for item in reader.sections("keys", MAX_UNITS):
        unit = item.text("unit", 16, UNIT_PATTERN)
        keys[unit] = item.octets("wrapped", _WRAPPED_BYTES)
        item.finish()
    reader.finish()
    return recipient, keys


# -- key pairs ----------------------------------------------------------------------------------


def create_unsealing_key(path: Path) -> X25519PrivateKey:
    """Makes a fresh X25519 key and writes it as PKCS#8 PEM, mode 0600, never over another file.

    Raises:
        KeyFileError: the file exists or cannot be written.
    """
    key = X25519PrivateKey.generate()
    write_key_file(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return key


def load_unsealing_key(path: Path) -> X25519PrivateKey:
    """Reads a private key that only its owner can read; raises KeyFileError."""
    pem = read_key_file(path, private=0o077)
    try:
        key = load_pem_private_key(pem, password=None)
    except (ValueError, TypeError):
        raise KeyFileError(f"{path}: expected an unencrypted PKCS#8 PEM key") from None
    if not isinstance(key, X25519PrivateKey):
        raise KeyFileError(f"{path}: expected an X25519 key, found another algorithm")
    return key


def unsealing_public_pem(public_key: bytes) -> bytes:
    """The PEM form of an X25519 public key (32 bytes)."""
    return X25519PublicKey.from_public_bytes(public_key).public_bytes(
        Encoding.PEM, PublicFormat.SubjectPublicKeyInfo
    )


def load_unsealing_public(path: Path) -> bytes:
    """Reads a PEM public key and returns its 32 bytes; raises KeyFileError."""
    pem = read_key_file(path, private=0)
    try:
        key = load_pem_public_key(pem)
    except ValueError:
        raise KeyFileError(f"{path}: expected a PEM public key") from None
    if not isinstance(key, X25519PublicKey):
        raise KeyFileError(f"{path}: expected an X25519 key, found another algorithm")
    return key.public_bytes_raw()
