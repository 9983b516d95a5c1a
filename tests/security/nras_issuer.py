"""Stands in for NRAS: makes detached EATs as it does, and the key set that verifies them."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from jwt.api_jws import PyJWS
from nvidia_machine import DRIVER, NONCE, NOW, VBIOS, PrivateKey, new_key, public_point

from security.attestation.nras import CHAIN_CLAIMS, ISSUER, SUBJECT, TRUE_CLAIMS

KID = "nv-eat-kid-test"
Claims = Mapping[str, object]


def _text(value: bytes) -> str:
    return base64.urlsafe_b64encode(value).rstrip(b"=").decode()


def times(nonce: bytes = NONCE) -> dict[str, object]:
    """Claims that all tokens have."""
    return {
        "iss": ISSUER,
        "iat": NOW - 60,
        "nbf": NOW - 60,
        "exp": NOW + 3540,
        "eat_nonce": nonce.hex(),
        "jti": "833480c9-6796-4fe4-b6ad-e9a58d7a67b2",
    }


def device_claims(name: str, serial: int = 7) -> dict[str, object]:
    """The claims of a sound device."""
    kind = name.partition("-")[0]
    chain = {"x-nvidia-cert-status": "valid", "x-nvidia-cert-ocsp-status": "good"}
    claims: dict[str, object] = {**times(), "measres": "success", "dbgstat": "disabled"}
    claims |= dict.fromkeys(TRUE_CLAIMS[kind], True)
    claims |= dict.fromkeys(CHAIN_CLAIMS[kind], chain)
    claims["ueid"] = str(serial)
    claims["x-nvidia-attestation-warning"] = None
    if kind == "GPU":
        claims |= {"hwmodel": "GH100 A01 GSP BROM", "x-nvidia-gpu-driver-version": DRIVER}
        claims["x-nvidia-gpu-vbios-version"] = VBIOS
    else:
        claims |= {"hwmodel": "LS_10 A01 FSP BROM"}
        claims["x-nvidia-switch-bios-version"] = "96.10.73.00.01"
    return claims


@dataclass(frozen=True)
class Issuer:
    """A signing key and its name."""

    key: PrivateKey = field(default_factory=new_key)
    kid: str = KID

    def jwk(self, **changes: object) -> dict[str, object]:
        """The public key as a JSON Web Key."""
        x, y = public_point(self.key)
        made = {"kty": "EC", "crv": "P-384", "kid": self.kid, "x": _text(x), "y": _text(y)}
        return {**made, "alg": "ES384", "use": "sig", **changes}

    def jwks(self) -> bytes:
        """A key set with this key."""
        return json.dumps({"keys": [self.jwk()]}).encode()

    def token(self, claims: Claims, **header: object) -> str:
        """A signed token."""
        # Claims of any shape: `jwt.encode` would look at them.
        return PyJWS().encode(
            json.dumps(dict(claims)).encode(),
            self.key,
            algorithm="ES384",
            headers={"kid": self.kid, **header},
        )

    def eat(
        self,
        devices: Mapping[str, Claims],
        overall: Claims | None = None,
        tokens: Mapping[str, str] | None = None,
    ) -> bytes:
        """A detached EAT.

        Args:
            devices: claims of each device's token.
            overall: claims of the overall token that differ from a good one's.
            tokens: tokens that are put in the place of devices' after the digests were made.
        """
        made = {name: self.token(claims) for name, claims in devices.items()}
        claims = {
            **times(),
            "sub": SUBJECT,
            "x-nvidia-ver": "3.0",
            "x-nvidia-overall-att-result": True,
            "submods": {
                name: ["DIGEST", ["SHA-256", hashlib.sha256(token.encode()).hexdigest()]]
                for name, token in made.items()
            },
            **(overall or {}),
        }
        return json.dumps([["JWT", self.token(claims)], {**made, **(tokens or {})}]).encode()
