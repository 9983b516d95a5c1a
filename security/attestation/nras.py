"""Tokens of NVIDIA's Remote Attestation Service (NRAS): somebody else's verdict on the devices.

A detached EAT is a JSON list of two: ["JWT", overall token], and an object with a token for each
device ("GPU-0", "SWITCH-0"). The overall token names the others by SHA-256. All are ES384, signed
by keys that the operator has put among the collateral as JSON Web Key Sets: a token never brings
its own key.

This is kind "nras", and only `bulkhead attest check` judges it. A policy cannot name the kind, so
that the broker never admits on it: it would put a service on the network in the place of the
operator's own references, and its nonce is all that ties it to the devices. The pins and what is
revoked are those of kind "nvidia".
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jwt
from cryptography.hazmat.primitives.asymmetric.ec import (
    EllipticCurvePublicKey,
)
from jwt.api_jws import PyJWS

from placement.document import JSON
from security.attestation.collateral import Collateral
from security.attestation.errors import (
    FreshnessUnproven,
    NrasAlgorithmRefused,
    NrasClaimRefused,
    NrasDeviceRepeated,
    NrasDigestMismatch,
    NrasIssuerRefused,
    NrasKeyAmbiguous,
    NrasKeyMissing,
    NrasNonceMismatch,
    NrasNotCurrent,
    NrasSignatureInvalid,
    NrasTooOld,
)
from security.attestation.nras_token import ALGORITHM, Token, read_eat, read_keys
from security.attestation.verdict import Expectations, FunctionRule, Verdict, judge

__all__ = [
    "CHAIN_CLAIMS",
    "COUNT_RULES",
    "DEVICE_RULES",
    "ISSUER",
    "KIND",
    "OVERALL_RULES",
    "PIN_RULES",
    "SUBJECT",
    "TOKEN_RULES",
    "TRUE_CLAIMS",
    "Asked",
    "TokenRule",
    "verify_nras",
]

KIND = "nras"
ISSUER = "https://nras.attestation.nvidia.com"
SUBJECT = "NVIDIA-PLATFORM-ATTESTATION"
CLAIMS_VERSION = "3.0"

_HEADER = frozenset({"alg", "kid", "typ"})

TRUE_CLAIMS: Mapping[str, tuple[str, ...]] = {
    "GPU": (
        "secboot",
        "x-nvidia-gpu-arch-check",
        "x-nvidia-gpu-attestation-report-parsed",
        "x-nvidia-gpu-attestation-report-nonce-match",
        "x-nvidia-gpu-attestation-report-signature-verified",
        "x-nvidia-gpu-attestation-report-cert-chain-fwid-match",
        "x-nvidia-gpu-driver-rim-fetched",
        "x-nvidia-gpu-driver-rim-schema-validated",
        "x-nvidia-gpu-driver-rim-signature-verified",
        "x-nvidia-gpu-driver-rim-version-match",
        "x-nvidia-gpu-driver-rim-measurements-available",
        "x-nvidia-gpu-vbios-rim-fetched",
        "x-nvidia-gpu-vbios-rim-schema-validated",
        "x-nvidia-gpu-vbios-rim-signature-verified",
        "x-nvidia-gpu-vbios-rim-version-match",
        "x-nvidia-gpu-vbios-rim-measurements-available",
        "x-nvidia-gpu-vbios-index-no-conflict",
    ),
    "SWITCH": (
        "secboot",
        "x-nvidia-switch-arch-check",
        "x-nvidia-switch-attestation-report-parsed",
        "x-nvidia-switch-attestation-report-nonce-match",
        "x-nvidia-switch-attestation-report-signature-verified",
        "x-nvidia-switch-attestation-report-cert-chain-fwid-match",
        "x-nvidia-switch-bios-rim-fetched",
        "x-nvidia-switch-bios-rim-schema-validated",
        "x-nvidia-switch-bios-rim-signature-verified",
        "x-nvidia-switch-bios-rim-version-match",
        "x-nvidia-switch-bios-rim-measurements-available",
    ),
}
CHAIN_CLAIMS: Mapping[str, tuple[str, ...]] = {
    "GPU": (
        "x-nvidia-gpu-attestation-report-cert-chain",
        "x-nvidia-gpu-driver-rim-cert-chain",
        "x-nvidia-gpu-vbios-rim-cert-chain",
    ),
    "SWITCH": (
        "x-nvidia-switch-attestation-report-cert-chain",
        "x-nvidia-switch-bios-rim-cert-chain",
    ),
}


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """A token, the others, and what they are judged by.

    Attributes:
        token: the one that is looked at.
        overall: the overall token.
        others: the devices' tokens by name.
        keys: the operator's keys by name (kid).
        expected: pins of the policy; None to judge soundness only.
        now: Unix time in seconds.
        bound_to: the nonce (32 bytes); None if it is not known.
    """

    token: Token
    overall: Token
    others: Mapping[str, Token]
    keys: Mapping[str, tuple[EllipticCurvePublicKey, ...]]
    expected: Expectations | None
    now: int
    bound_to: bytes | None


TokenRule = FunctionRule[Asked]
"""A rule about one token."""


def verify_nras(
    token: bytes,
    collateral: Collateral,
    expected: Expectations | None,
    now: int,
    bound_to: bytes | None,
) -> Verdict:
    """Judges a detached EAT.

    Args:
        token: the JSON list.
        collateral: the operator's key sets (`jwks`).
        expected: of kind "nvidia"; None to judge soundness only.
        now: Unix time in seconds.
        bound_to: the nonce (32 bytes) that was given to NRAS; None if it is not known.

    Returns:
        a verdict on the overall token; one for each device is in its `devices`.

    Raises:
        EvidenceMalformed: it does not parse.
    """
    overall, others = read_eat(token)
    keys, notes = read_keys(collateral)
    if bound_to is None and expected is None:
        notes.append("freshness was not judged")

    def judged(item: Token, rules: tuple[TokenRule, ...], remarks: tuple[str, ...]) -> Verdict:
        subject = Asked(item, overall, others, keys, expected, now, bound_to)
        return Verdict(
            kind=f"{KIND}-{item.device.lower()}" if item.device else KIND,
            product=_architecture(item) if item.device else "",
            measurement="",
            identity=_serial(item) if item.device else "",
            fields=_fields(item),
            checks=judge(rules, subject),
            notes=remarks,
            devices=tuple(devices) if not item.device else (),
        )

    devices: list[Verdict] = []
    for _, item in sorted(others.items()):
        warning = item.claims.get("x-nvidia-attestation-warning")
        remarks = () if warning is None else (f"{item.name}: NRAS warns: {str(warning)[:256]}",)
        rules = TOKEN_RULES + DEVICE_RULES
        devices.append(judged(item, rules if expected is None else rules + PIN_RULES, remarks))
    rules = TOKEN_RULES + OVERALL_RULES
    return judged(overall, rules if expected is None else rules + COUNT_RULES, tuple(notes))


def _serial(token: Token) -> str:
    """ueid: serial number of the leaf certificate in decimal digits; hex as policies write it."""
    text = token.text_claim("ueid")
    if re.fullmatch("[0-9]{1,49}", text) is None:
        return ""
    return int(text).to_bytes(21, "big").lstrip(b"\0").hex()


def _architecture(token: Token) -> str:
    chip = token.text_claim("hwmodel").partition(" ")[0]
    if chip == "GH100":
        return "Hopper"
    return "Blackwell" if re.fullmatch("GB[12][0-9]{2}", chip) else chip.replace("_", "")[:16]


def _fields(token: Token) -> dict[str, str]:
    names = ("iss", "iat", "nbf", "exp", "eat_nonce", "hwmodel", "ueid", "measres", "dbgstat")
    more = (
        "x-nvidia-overall-att-result",
        "x-nvidia-gpu-driver-version",
        "x-nvidia-gpu-vbios-version",
        "x-nvidia-switch-bios-version",
    )
    return {name: str(token.claims[name])[:256] for name in (*names, *more) if name in token.claims}


# -- rules of every token ---------------------------------------------------------------------


def _algorithm(subject: Asked) -> None:
    header = subject.token.header
    found = header.get("alg")
    if found != ALGORITHM:
        raise NrasAlgorithmRefused(f"{subject.token.name} alg", ALGORITHM, str(found)[:32])
    extra = sorted(header.keys() - _HEADER)
    if extra:
        # jwk, jku, x5c, x5u would let a token say by which key it is to be believed; crit and b64
        # change what is signed.
        raise NrasAlgorithmRefused(
            f"{subject.token.name} header", "alg, kid and typ only", ", ".join(extra)[:64]
        )


def _signature(subject: Asked) -> None:
    token = subject.token
    kid = token.header.get("kid")
    known = subject.keys.get(kid, ()) if isinstance(kid, str) else ()
    if not known:
        raise NrasKeyMissing(
            f"{token.name} kid",
            "a key of the operator's key sets",
            f"{str(kid)[:64]}, which none of them has",
            "add NVIDIA's key set to the collateral",
        )
    if len(known) > 1:
        raise NrasKeyAmbiguous(f"{token.name} kid", "one key of that name", str(len(known)))
    try:
        PyJWS().decode_complete(token.text, known[0], algorithms=[ALGORITHM])
    except jwt.PyJWTError:
        raise NrasSignatureInvalid(
            f"{token.name} signature", "one by the operator's key of that name", "another"
        ) from None


def _issuer(subject: Asked) -> None:
    found = subject.token.text_claim("iss")
    if found != ISSUER:
        raise NrasIssuerRefused(f"{subject.token.name} iss", ISSUER, found[:64] or "none")


def _dates(subject: Asked) -> None:
    token, now = subject.token, subject.now
    issued, start, end = (token.time_claim(name) for name in ("iat", "nbf", "exp"))
    if issued is None or start is None or end is None:
        raise NrasNotCurrent(f"{token.name} dates", "iat, nbf and exp", "fewer")
    if not (issued <= now and start <= now < end):
        raise NrasNotCurrent(
            f"{token.name} dates", f"a token valid at {now}", f"one for {start} to {end}"
        )


def _age(subject: Asked) -> None:
    if subject.expected is None or subject.expected.requirements.maximum_age_s is None:
        return
    most, issued = subject.expected.requirements.maximum_age_s, subject.token.time_claim("iat")
    if issued is None or subject.now - issued > most:
        age = "a token without iat" if issued is None else f"{subject.now - issued} s"
        raise NrasTooOld(f"{subject.token.name} age", f"at most {most} s", age)


def _nonce(subject: Asked) -> None:
    expected = subject.expected
    if expected is not None and expected.requirements.opens("freshness"):
        return
    if subject.bound_to is None:
        if expected is not None:
            raise FreshnessUnproven(
                f"{subject.token.name} eat_nonce", "a challenge to compare it with", "none"
            )
        return
    found = subject.token.text_claim("eat_nonce")
    if found != subject.bound_to.hex():
        raise NrasNonceMismatch(
            f"{subject.token.name} eat_nonce",
            f"{subject.bound_to.hex()[:16]}...",
            f"{found[:16]}..." if found else "none",
        )


# -- rules of the overall token ---------------------------------------------------------------


def _claim(subject: Asked, name: str, wanted: JSON) -> None:
    found = subject.token.claims.get(name)
    if found != wanted or type(found) is not type(wanted):
        raise NrasClaimRefused(
            f"{subject.token.name} {name}", json.dumps(wanted), json.dumps(found)[:64]
        )


def _overall(subject: Asked) -> None:
    _claim(subject, "sub", SUBJECT)
    _claim(subject, "x-nvidia-ver", CLAIMS_VERSION)
    _claim(subject, "x-nvidia-overall-att-result", True)


def _digests(subject: Asked) -> None:
    wanted: JSON = {
        name: ["DIGEST", ["SHA-256", hashlib.sha256(token.text.encode()).hexdigest()]]
        for name, token in subject.others.items()
    }
    found = subject.token.claims.get("submods")
    if found == wanted:
        return
    names = sorted(found)[:8] if isinstance(found, dict) else []
    differing = [
        name
        for name in subject.others
        if not isinstance(found, dict)
        or not isinstance(wanted, dict)
        or found.get(name) != wanted[name]
    ]
    raise NrasDigestMismatch(
        "overall submods",
        f"digests of exactly the tokens {', '.join(sorted(subject.others))[:128]}",
        f"{', '.join(names)[:128] or 'none'}, differing at {', '.join(differing)[:128] or 'none'}",
    )


def _distinct(subject: Asked) -> None:
    found: dict[str, str] = {}
    for name, token in sorted(subject.others.items()):
        serial = _serial(token)
        other = found.setdefault(serial, name)
        if not serial or other != name:
            raise NrasDeviceRepeated(
                f"{name} ueid",
                "a serial number of its own",
                f"that of {other}" if serial else "none",
            )


def _count(pin: str, device: str) -> TokenRule:
    def look(subject: Asked) -> None:
        assert subject.expected is not None
        number = sum(token.device == device for token in subject.others.values())
        subject.expected.require_pin(pin, str(number))

    return TokenRule(f"nras.pin.{pin}", f"policy, requirements.nvidia.{pin}", look)


# -- rules of a device's token ----------------------------------------------------------------


def _results(subject: Asked) -> None:
    for name in TRUE_CLAIMS[subject.token.device]:
        _claim(subject, name, True)


def _measurements(subject: Asked) -> None:
    _claim(subject, "measres", "success")


def _debug(subject: Asked) -> None:
    _claim(subject, "dbgstat", "disabled")


def _chains(subject: Asked) -> None:
    for name in CHAIN_CLAIMS[subject.token.device]:
        found = subject.token.claims.get(name)
        chain = found if isinstance(found, dict) else {}
        for field, wanted in (
            ("x-nvidia-cert-status", "valid"),
            ("x-nvidia-cert-ocsp-status", "good"),
        ):
            if chain.get(field) != wanted:
                raise NrasClaimRefused(
                    f"{subject.token.name} {name} {field}", wanted, str(chain.get(field))[:64]
                )


def _revoked(subject: Asked) -> None:
    assert subject.expected is not None
    subject.expected.refuse_revoked(f"{subject.token.name} ueid", _serial(subject.token))


def _pin(name: str, claims: Mapping[str, Callable[[Token], str]]) -> TokenRule:
    def look(subject: Asked) -> None:
        assert subject.expected is not None
        value = claims.get(subject.token.device)
        if value is not None:
            subject.expected.require_pin(name, value(subject.token))

    return TokenRule(f"nras.pin.{name}", f"policy, requirements.nvidia.{name}", look)


_DOCUMENT = "NVIDIA Attestation Suite, NRAS, EAT claims version 3"

TOKEN_RULES: tuple[TokenRule, ...] = (
    TokenRule("nras.token.algorithm", "RFC 7515, 4.1; RFC 8725, 3.1 and 3.10", _algorithm),
    TokenRule("nras.token.signature", "RFC 7515, 5.2; RFC 7518, 3.4 (ES384)", _signature),
    TokenRule("nras.token.issuer", "RFC 7519, 4.1.1 iss", _issuer),
    TokenRule("nras.token.dates", "RFC 7519, 4.1.4 exp, 4.1.5 nbf, 4.1.6 iat", _dates),
    TokenRule("nras.token.age", "policy, requirements.nvidia.maximum_age_s", _age),
    TokenRule("nras.token.nonce", "RFC 9711, eat_nonce claim", _nonce),
)
"""Asked of every token."""

OVERALL_RULES: tuple[TokenRule, ...] = (
    TokenRule("nras.overall.result", f"{_DOCUMENT}, x-nvidia-overall-att-result", _overall),
    TokenRule(
        "nras.overall.digests", "RFC 9711, submods claim, Detached-Submodule-Digest", _digests
    ),
    TokenRule("nras.overall.distinct", "RFC 9711, ueid claim", _distinct),
)
"""Asked of the overall token."""

DEVICE_RULES: tuple[TokenRule, ...] = (
    TokenRule("nras.device.results", f"{_DOCUMENT}, x-nvidia-gpu-*, x-nvidia-switch-*", _results),
    TokenRule("nras.device.measurements", f"{_DOCUMENT}, measres", _measurements),
    TokenRule("nras.device.debug", f"{_DOCUMENT}, dbgstat", _debug),
    TokenRule(
        "nras.device.chains",
        f"{_DOCUMENT}, *-cert-chain: x-nvidia-cert-status, x-nvidia-cert-ocsp-status",
        _chains,
    ),
)
"""Asked of each device's token."""

COUNT_RULES: tuple[TokenRule, ...] = (_count("gpus", "GPU"), _count("switches", "SWITCH"))
"""Asked of the overall token where a policy is given."""

PIN_RULES: tuple[TokenRule, ...] = (
    TokenRule("nras.policy.revoked", "policy, requirements.nvidia.revoked", _revoked),
    _pin("architecture", {"GPU": _architecture}),
    _pin("driver", {"GPU": lambda token: token.text_claim("x-nvidia-gpu-driver-version")}),
    _pin(
        "vbios",
        {
            "GPU": lambda token: token.text_claim("x-nvidia-gpu-vbios-version").upper(),
            "SWITCH": lambda token: token.text_claim("x-nvidia-switch-bios-version").upper(),
        },
    ),
    _pin("device", {"GPU": _serial, "SWITCH": _serial}),
)
"""Asked of each device's token where a policy is given."""
