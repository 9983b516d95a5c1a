"""What a member's secret is for: sealing it, and authenticating calls with it."""

from __future__ import annotations

import hashlib
import hmac

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from security.errors import BrokerReplyInvalid, MalformedInput
from security.signing import length_prefixed

SECRET_BYTES = 32
_SUITE = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)


def member_secret(
    broker_key: Ed25519PrivateKey, salt: bytes, instance: str, role: str, shard_key: bytes
) -> bytes:
    """The secret of one admission: HKDF-SHA-256 (RFC 5869) of the broker's private key.

    So a restarted broker knows its members by what lies in its database, which holds no secret.

    Args:
        broker_key: the broker's signing key.
        salt: random bytes of this admission.
        instance, role, shard_key: who was admitted.
    """
    info = length_prefixed(
        [b"bulkhead/v1/derived-secret", instance.encode(), role.encode(), shard_key]
    )
    derive = HKDF(SHA256(), SECRET_BYTES, salt=salt, info=info)
    return derive.derive(broker_key.private_bytes_raw())


def _info(instance: str, role: str, nonce: bytes) -> bytes:
    return length_prefixed([b"bulkhead/v1/member-secret", instance.encode(), role.encode(), nonce])


def seal_secret(secret: bytes, shard_key: bytes, instance: str, role: str, nonce: bytes) -> bytes:
    """Encrypts a member secret to a shard's key (HPKE, RFC 9180, base mode).

    Raises:
        MalformedInput: the key is no point that a secret can be agreed with.
    """
    try:
        public = X25519PublicKey.from_public_bytes(shard_key)
        return _SUITE.encrypt(secret, public, info=_info(instance, role, nonce))
    except ValueError:
        raise MalformedInput("shard key: expected an X25519 public key of full order") from None


def open_secret(
    sealed: bytes, key: X25519PrivateKey, instance: str, role: str, nonce: bytes
) -> bytes:
    """Decrypts what `seal_secret` gave; raises BrokerReplyInvalid."""
    try:
        secret: bytes = _SUITE.decrypt(sealed, key, info=_info(instance, role, nonce))
    except (InvalidTag, ValueError):
        raise BrokerReplyInvalid(
            "member secret: expected one sealed to this shard's key, found another"
        ) from None
    if len(secret) != SECRET_BYTES:
        raise BrokerReplyInvalid(f"member secret: expected {SECRET_BYTES} bytes")
    return secret


def member_mac(secret: bytes, method: str, instance: str, role: str, payload: bytes) -> bytes:
    """Authenticates one call of a member (HMAC-SHA-256, RFC 2104).

    A call can be replayed by whoever saw it. That gains nothing: a replayed Watch can claim that a
    member is present, a replayed RenewEpoch names an epoch that is no longer current; both only
    refuse service, which whoever sits on the path can do anyway.
    """
    message = length_prefixed(
        [b"bulkhead/v1/member", method.encode(), instance.encode(), role.encode(), payload]
    )
    return hmac.digest(secret, message, hashlib.sha256)
