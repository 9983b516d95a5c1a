"""Fuzzes tokens of NRAS and key sets.

    python -m tests.fuzz.fuzz_nras -runs=1000000 /tmp/corpus

`--seeds DIRECTORY` writes a small corpus of tokens made from nothing and ends.
"""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "security"))

if __name__ == "__main__":
    import atheris

    with atheris.instrument_imports(include=["security", "placement", "jwt"]):
        import security.attestation.nras  # noqa: F401

from nras_issuer import KID, Issuer, device_claims
from nvidia_machine import NONCE, NOW

from security.attestation.collateral import Collateral
from security.attestation.nras import verify_nras
from security.errors import SecurityError

ISSUER = Issuer()
KEYS = Collateral(jwks=(ISSUER.jwks(),))
EAT = ISSUER.eat({"GPU-0": device_claims("GPU-0")})
HEADER = {"alg": "ES384", "kid": KID}


def one_input(data: bytes) -> None:
    """The first byte says what the others are; only named errors may come out.

    An EAT as it is, a key set, or the claims or the header of a token that nobody has signed.
    """
    if not data:
        return
    body = data[1:]
    try:
        match data[0] % 4:
            case 0:
                verify_nras(body, KEYS, None, NOW, NONCE)
            case 1:
                verify_nras(EAT, Collateral(jwks=(body,)), None, NOW, NONCE)
            case 2:
                _unsigned(json.dumps(HEADER).encode(), body)
            case _:
                _unsigned(body, b"{}")
    except SecurityError:
        pass


def _unsigned(header: bytes, claims: bytes) -> None:
    parts = (base64.urlsafe_b64encode(part).rstrip(b"=") for part in (header, claims, bytes(96)))
    text = b".".join(parts).decode()
    token = json.dumps([["JWT", text], {"GPU-0": text}]).encode()
    assert not verify_nras(token, KEYS, None, NOW, NONCE).holds, "a token that nobody signed"


def write_seeds(directory: Path) -> None:
    """Writes valid inputs of every shape, about 10 kB."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, data in (
        ("eat", b"\0" + EAT),
        ("keys", b"\1" + ISSUER.jwks()),
        ("claims", b"\2" + json.dumps(device_claims("GPU-0")).encode()),
        ("header", b"\3" + json.dumps(HEADER).encode()),
    ):
        (directory / name).write_bytes(data)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--seeds"]:
        write_seeds(Path(sys.argv[2]))
    else:
        atheris.Setup(sys.argv, one_input)
        atheris.Fuzz()
