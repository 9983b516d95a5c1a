"""Reads detached EATs of NRAS and the operator's key sets; nothing is believed here."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.ec import (
    SECP384R1,
    EllipticCurvePublicKey,
    EllipticCurvePublicNumbers,
)

from placement.document import JSON, DocumentError, Fields, decode
from security.attestation.collateral import Collateral
from security.errors import EvidenceMalformed

__all__ = ["ALGORITHM", "Token", "read_eat", "read_keys"]

ALGORITHM = "ES384"

MAX_EAT_BYTES = 1 << 18
MAX_TOKEN_BYTES = 1 << 14
MAX_DEVICES = 32
_MAX_KEY_SET_BYTES = 1 << 18
_MAX_KEYS = 64
_LATEST = 2**53
_DEVICE = re.compile(r"(GPU|SWITCH)-(0|[1-9][0-9]?)")
_JWT = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+")
_COORDINATE = re.compile(r"[A-Za-z0-9_-]{64}")


@dataclass(frozen=True, slots=True, eq=False)
class Token:
    """A JWT, parsed and not believed yet.

    Attributes:
        name: "overall", "GPU-0", "SWITCH-0", ...
        text: as it came.
        header: its protected header.
        claims: its payload.
    """

    name: str
    text: str
    header: Mapping[str, JSON]
    claims: Mapping[str, JSON]

    @property
    def device(self) -> str:
        """Kind of device: GPU or SWITCH, empty for the overall token."""
        match = _DEVICE.fullmatch(self.name)
        return match[1] if match else ""

    def text_claim(self, name: str) -> str:
        """A claim that is text, "" if it is anything else."""
        value = self.claims.get(name)
        return value if isinstance(value, str) else ""

    def time_claim(self, name: str) -> int | None:
        """A claim that is a time in seconds; None if it is anything else."""
        value = self.claims.get(name)
        # `type`, not `isinstance`: true is an int in Python, and no time.
        return value if type(value) is int and 0 < value < _LATEST else None


def read_eat(data: bytes) -> tuple[Token, dict[str, Token]]:
    """The overall token, and the devices' tokens by name.

    Raises:
        EvidenceMalformed
    """
    if len(data) > MAX_EAT_BYTES:
        raise EvidenceMalformed(f"EAT: expected at most {MAX_EAT_BYTES} bytes, found {len(data)}")
    try:
        # The strict reader takes objects; the one key that may come back is the wrapper's.
        document = decode(b'{"eat":' + data + b"}", MAX_EAT_BYTES + 8)
    except DocumentError as error:
        raise EvidenceMalformed(f"EAT: {error}") from None
    match document:
        case {"eat": [["JWT", str() as text], dict() as detached], **rest} if not rest:
            pass
        case _:
            raise EvidenceMalformed('EAT: expected [["JWT", token], {device: token, ...}]')
    if not 0 < len(detached) <= MAX_DEVICES:
        raise EvidenceMalformed(f"EAT: expected 1 to {MAX_DEVICES} devices, found {len(detached)}")
    others: dict[str, Token] = {}
    for name, value in detached.items():
        if _DEVICE.fullmatch(name) is None or not isinstance(value, str):
            raise EvidenceMalformed(
                f"EAT: expected tokens GPU-0, SWITCH-0, ..., found {name[:32]!r}"
            )
        others[name] = read_token(name, value)
    return read_token("overall", text), others


def read_token(name: str, text: str) -> Token:
    if len(text) > MAX_TOKEN_BYTES or _JWT.fullmatch(text) is None:
        raise EvidenceMalformed(
            f"{name}: expected a JWT of at most {MAX_TOKEN_BYTES} characters, found {len(text)}"
        )
    segments = text.split(".")
    try:
        header, claims = (decode(_octets(item), MAX_TOKEN_BYTES) for item in segments[:2])
        _octets(segments[2])
    except ValueError as error:  # DocumentError among them
        raise EvidenceMalformed(f"{name}: expected base64 and JSON, found other: {error}") from None
    return Token(name, text, header, claims)


def _octets(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def read_keys(
    collateral: Collateral,
) -> tuple[dict[str, tuple[EllipticCurvePublicKey, ...]], list[str]]:
    """The operator's keys by name (kid), and notes on what is no key for these tokens.

    RFC 7517, 5: a set may hold keys of other kinds, which are passed over.
    """
    keys: dict[str, tuple[EllipticCurvePublicKey, ...]] = {}
    notes: list[str] = []
    for number, data in enumerate(collateral.jwks):
        try:
            reader = Fields.of(decode(data, _MAX_KEY_SET_BYTES), f"key set {number}")
            items = reader.sections("keys", _MAX_KEYS)
        except DocumentError as error:
            notes.append(f"key set {number} was ignored: {error}")
            continue
        for item in items:
            try:
                kid, key = _read_key(item)
            except ValueError as error:  # DocumentError among them
                notes.append(f"{item.where} was ignored: {error}")
                continue
            if key not in keys.get(kid, ()):
                keys[kid] = (*keys.get(kid, ()), key)
    return keys, notes


def _read_key(item: Fields) -> tuple[str, EllipticCurvePublicKey]:
    kid = item.text("kid", 256)
    item.text("kty", 8, "EC")
    item.text("crv", 8, "P-384")
    if "alg" in item:
        item.text("alg", 8, ALGORITHM)
    if "use" in item:
        item.text("use", 8, "sig")
    x, y = (
        int.from_bytes(_octets(item.text(name, 64, _COORDINATE.pattern)), "big")
        for name in ("x", "y")
    )
    # Certificates (x5c) may stand beside the key; nothing is taken from them.
    return kid, EllipticCurvePublicNumbers(x, y, SECP384R1()).public_key()
