"""Tokens of NRAS, by an issuer that stands in for it."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace

import jwt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nras_issuer import KID, Issuer, device_claims, times
from nvidia_machine import DRIVER, NONCE, NOW, VBIOS

from placement.requirements import Requirements
from security.attestation import nras
from security.attestation.collateral import Collateral
from security.attestation.nras import verify_nras
from security.attestation.nras_token import MAX_EAT_BYTES, MAX_TOKEN_BYTES
from security.attestation.verdict import Expectations, Verdict
from security.errors import AppraisalError, EvidenceMalformed

ISSUER = Issuer()
PAPERS = Collateral(jwks=(ISSUER.jwks(),))
EXPECTED = Expectations(
    "nvidia",
    Requirements(
        pins={
            "architecture": ("Hopper",),
            "driver": (DRIVER,),
            "vbios": (VBIOS, "96.10.73.00.01"),
            "device": ("07",),
            "gpus": ("1",),
            "switches": ("0",),
        }
    ),
    None,
)


def requiring(**changes: object) -> Expectations:
    return replace(EXPECTED, requirements=replace(EXPECTED.requirements, **changes))


def judged(
    token: bytes,
    expected: Expectations | None = EXPECTED,
    papers: Collateral = PAPERS,
    now: int = NOW,
    bound_to: bytes | None = NONCE,
) -> Verdict:
    return verify_nras(token, papers, expected, now, bound_to)


def codes(verdict: Verdict) -> set[str]:
    return {failure.code for failure in verdict.failures}


def eat(
    gpu: Mapping[str, object] | None = None, overall: Mapping[str, object] | None = None
) -> bytes:
    """An EAT with one GPU."""
    return ISSUER.eat({"GPU-0": {**device_claims("GPU-0"), **(gpu or {})}}, overall)


def test_a_token_is_accepted() -> None:
    verdict = judged(eat())
    verdict.require()
    assert (verdict.kind, verdict.notes) == ("nras", ())
    (one,) = verdict.devices
    assert (one.kind, one.product, one.identity) == ("nras-gpu", "Hopper", "07")


def test_gpus_and_switches() -> None:
    names = ("GPU-0", "GPU-1", "SWITCH-0")
    devices = {name: device_claims(name, 7 + i) for i, name in enumerate(names)}
    pins = {**EXPECTED.requirements.pins, "gpus": ("2",), "switches": ("1",)}
    pins["device"] = ("07", "08", "09")
    verdict = judged(ISSUER.eat(devices), requiring(pins=pins))
    verdict.require()
    assert [one.kind for one in verdict.devices] == ["nras-gpu", "nras-gpu", "nras-switch"]


@pytest.mark.parametrize("ueid", ["7", "", "x", None])
def test_one_device_counts_once(ueid: object) -> None:
    devices = {"GPU-0": device_claims("GPU-0"), "GPU-1": {**device_claims("GPU-1"), "ueid": ueid}}
    found = codes(judged(ISSUER.eat(devices), None))
    assert found == {"nras_device_repeated"}


def test_freshness() -> None:
    assert codes(judged(eat(), bound_to=b"x" * 32)) == {"nras_nonce_mismatch"}
    assert codes(judged(eat(), bound_to=None)) == {"freshness_unproven"}
    judged(eat(), requiring(open=("freshness",)), bound_to=None).require()
    verdict = judged(eat(), None, bound_to=None)
    verdict.require()
    assert verdict.notes == ("freshness was not judged",)
    assert codes(judged(eat({"eat_nonce": "00"}))) == {"nras_nonce_mismatch"}
    assert codes(judged(eat({"eat_nonce": 5}))) == {"nras_nonce_mismatch"}


@pytest.mark.parametrize(
    ("now", "code"),
    [(NOW - 61, "nras_not_current"), (NOW + 3540, "nras_not_current"), (NOW + 3539, None)],
)
def test_dates(now: int, code: str | None) -> None:
    assert codes(judged(eat(), now=now)) == ({code} if code else set())


def test_a_token_of_the_future() -> None:
    times = {"iat": NOW + 1, "nbf": NOW - 1}
    assert codes(judged(eat(times, times))) == {"nras_not_current"}


@pytest.mark.parametrize("claim", ["iat", "nbf", "exp"])
@pytest.mark.parametrize("value", [None, "soon", True, 0, 2**60])
def test_dates_of_another_shape(claim: str, value: object) -> None:
    assert codes(judged(eat(overall={claim: value}))) == {"nras_not_current"}


def test_age() -> None:
    judged(eat(), requiring(maximum_age_s=60)).require()
    assert codes(judged(eat(), requiring(maximum_age_s=59))) == {"nras_too_old"}


@pytest.mark.parametrize("issuer", ["https://nras.example.com", "", None])
def test_issuer(issuer: object) -> None:
    assert codes(judged(eat(overall={"iss": issuer}))) == {"nras_issuer_refused"}
    assert codes(judged(eat({"iss": issuer}))) == {"nras_issuer_refused"}


# -- keys and algorithms ----------------------------------------------------------------------


def test_no_key() -> None:
    for papers in (
        Collateral(),
        Collateral(jwks=(b'{"keys":[]}',)),
        Collateral(jwks=(Issuer(kid="another").jwks(),)),
    ):
        assert codes(judged(eat(), papers=papers)) == {"nras_key_missing"}


def test_another_key() -> None:
    stranger = Collateral(jwks=(Issuer().jwks(),))
    assert codes(judged(eat(), papers=stranger)) == {"nras_signature_invalid"}
    both = Collateral(jwks=(ISSUER.jwks(), Issuer().jwks()))
    assert codes(judged(eat(), papers=both)) == {"nras_key_ambiguous"}
    judged(eat(), papers=Collateral(jwks=(ISSUER.jwks(), ISSUER.jwks()))).require()


@pytest.mark.parametrize(
    "change",
    [
        {"kty": "RSA"},
        {"crv": "P-256"},
        {"alg": "ES256"},
        {"use": "enc"},
        {"x": "AAAA"},
        {"x": "A" * 64},
        {"kid": 7},
    ],
)
def test_keys_of_another_shape_are_ignored(change: dict[str, object]) -> None:
    bad = json.dumps({"keys": [ISSUER.jwk(**change)]}).encode()
    verdict = judged(eat(), papers=Collateral(jwks=(bad,)))
    assert codes(verdict) == {"nras_key_missing"}
    assert any("was ignored" in note for note in verdict.notes)
    more = json.dumps({"keys": [ISSUER.jwk(**change), ISSUER.jwk()]}).encode()
    judged(eat(), papers=Collateral(jwks=(b"no JSON", more))).require()


def assembled(header: Mapping[str, object], signature: bytes = b"") -> str:
    claims = {**times(), "submods": {}}
    parts = [json.dumps(part).encode() for part in (header, claims)] + [signature or b"\0" * 96]
    return ".".join(base64.urlsafe_b64encode(part).rstrip(b"=").decode() for part in parts)


@pytest.mark.parametrize(
    "header",
    [
        {"alg": "none", "kid": KID},
        {"alg": "None", "kid": KID},
        {"alg": "HS384", "kid": KID},
        {"alg": "ES256", "kid": KID},
        {"kid": KID},
        {"alg": ["ES384"], "kid": KID},
    ],
)
def test_other_algorithms(header: dict[str, object]) -> None:
    text = assembled(header)
    token = json.dumps([["JWT", text], {"GPU-0": text}]).encode()
    assert {"nras_algorithm_refused", "nras_signature_invalid"} <= codes(judged(token, None))


def test_a_public_key_is_no_secret() -> None:
    """HS384 with the public key as its secret, which a careless verifier takes."""
    x, y = (str(ISSUER.jwk()[name]) for name in ("x", "y"))
    header = {"kid": KID}
    text = jwt.encode(times(), x + y, algorithm="HS384", headers=header)
    token = json.dumps([["JWT", text], {"GPU-0": text}]).encode()
    assert {"nras_algorithm_refused", "nras_signature_invalid"} <= codes(judged(token, None))


@pytest.mark.parametrize("name", ["jwk", "jku", "x5c", "x5u", "x5t", "crit", "b64"])
def test_a_token_brings_no_key(name: str) -> None:
    thief = Issuer()
    value: object = thief.jwk() if name == "jwk" else ["exp"] if name == "crit" else "x"
    header = {"alg": "ES384", "kid": KID, name: value}
    text = assembled(header)
    token = json.dumps([["JWT", text], {"GPU-0": text}]).encode()
    assert {"nras_algorithm_refused", "nras_signature_invalid"} <= codes(judged(token, None))


@pytest.mark.parametrize("kid", [None, "", 5, ["x"], "../key"])
def test_other_names_of_keys(kid: object) -> None:
    text = assembled({"alg": "ES384", "kid": kid})
    token = json.dumps([["JWT", text], {"GPU-0": text}]).encode()
    assert "nras_key_missing" in codes(judged(token, None))


def test_a_changed_signature_or_payload() -> None:
    whole = json.loads(eat())
    head, body, tail = whole[0][1].split(".")
    flipped = "A" if tail[0] != "A" else "B"
    claims = json.loads(base64.urlsafe_b64decode(body + "=="))
    changed = base64.urlsafe_b64encode(json.dumps(claims | {"x": 1}).encode()).rstrip(b"=").decode()
    for text in (f"{head}.{body}.{flipped}{tail[1:]}", f"{head}.{changed}.{tail}"):
        token = json.dumps([["JWT", text], whole[1]]).encode()
        assert codes(judged(token)) == {"nras_signature_invalid"}


# -- results ----------------------------------------------------------------------------------


def test_the_overall_token_names_exactly_the_others() -> None:
    good = device_claims("GPU-0")
    other = ISSUER.token({**good, "jti": "another"})
    assert codes(judged(ISSUER.eat({"GPU-0": good}, tokens={"GPU-0": other}))) == {
        "nras_digest_mismatch"
    }
    other = ISSUER.token({**good, "ueid": "8"})
    assert codes(judged(ISSUER.eat({"GPU-0": good}, tokens={"GPU-1": other}))) == {
        "nras_digest_mismatch",
        "pin_refused",
    }
    for submods in ({}, None, {"GPU-0": ["DIGEST", ["SHA-1", "00"]]}, [], "x"):
        assert codes(judged(eat(overall={"submods": submods}))) == {"nras_digest_mismatch"}
    two = json.loads(ISSUER.eat({"GPU-0": good, "GPU-1": {**good, "ueid": "8"}}))
    del two[1]["GPU-1"]
    assert codes(judged(json.dumps(two).encode())) == {"nras_digest_mismatch"}


@pytest.mark.parametrize("value", [False, None, 1, "true"])
def test_the_overall_result(value: object) -> None:
    token = eat(overall={"x-nvidia-overall-att-result": value})
    assert codes(judged(token)) == {"nras_claim_refused"}


@pytest.mark.parametrize(
    "overall", [{"sub": "another"}, {"x-nvidia-ver": "2.0"}, {"x-nvidia-ver": None}]
)
def test_another_kind_of_token(overall: dict[str, object]) -> None:
    assert codes(judged(eat(overall=overall))) == {"nras_claim_refused"}


@pytest.mark.parametrize(
    ("claim", "value"),
    [
        *((claim, False) for claim in nras.TRUE_CLAIMS["GPU"]),
        *((claim, 1) for claim in nras.TRUE_CLAIMS["GPU"]),
        ("measres", "failure"),
        ("measres", None),
        ("dbgstat", "enabled"),
        ("dbgstat", None),
        *((claim, None) for claim in nras.CHAIN_CLAIMS["GPU"]),
        *(
            (
                claim,
                {"x-nvidia-cert-status": "valid", "x-nvidia-cert-ocsp-status": "revoked"},
            )
            for claim in nras.CHAIN_CLAIMS["GPU"]
        ),
        (
            nras.CHAIN_CLAIMS["GPU"][0],
            {"x-nvidia-cert-status": "expired", "x-nvidia-cert-ocsp-status": "good"},
        ),
    ],
)
def test_a_result_that_a_sound_device_does_not_get(claim: str, value: object) -> None:
    assert codes(judged(eat({claim: value}))) == {"nras_claim_refused"}


def test_a_switch_that_is_not_sound() -> None:
    for claim in nras.TRUE_CLAIMS["SWITCH"]:
        devices = {"SWITCH-0": {**device_claims("SWITCH-0"), claim: False}}
        assert codes(judged(ISSUER.eat(devices), None)) == {"nras_claim_refused"}


def test_warnings_are_noted() -> None:
    verdict = judged(eat({"x-nvidia-attestation-warning": "firmware is old"}))
    verdict.require()
    assert verdict.devices[0].notes == ("GPU-0: NRAS warns: firmware is old",)


@pytest.mark.parametrize(
    ("pin", "value"),
    [
        ("architecture", "Blackwell"),
        ("driver", "1"),
        ("vbios", "1"),
        ("device", "08"),
        ("gpus", "8"),
        ("switches", "4"),
    ],
)
def test_pins(pin: str, value: str) -> None:
    pins = {**EXPECTED.requirements.pins, pin: (value,)}
    assert codes(judged(eat(), requiring(pins=pins))) == {"pin_refused"}
    del pins[pin]
    assert codes(judged(eat(), requiring(pins=pins))) == {"pin_missing"}
    judged(eat(), requiring(pins=pins, open=(pin,))).require()


def test_the_policy_revokes_a_device() -> None:
    assert codes(judged(eat(), requiring(revoked=("07",)))) == {"revoked_identity"}


# -- shapes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "token",
    [
        b"",
        b"[]",
        b"{}",
        b'[["JWT","a.b.c"],{}]',
        b'[["JWT","a.b.c"],{"GPU-0":7}]',
        b'[["JWT","a.b.c"],{"CPU-0":"a.b.c"}]',
        b'[["JWT","a.b.c"],{"GPU-0":"a.b.c"}]',
        b'[["JWT","a.b"],{"GPU-0":"a.b"}]',
        b'[["JWS","a.b.c"],{"GPU-0":"a.b.c"}]',
        b'[["JWT","a.b.c"],{"GPU-0":"a.b.c"}],"more":[]',
        b"[" * 5000,
        b"[1.5]",
        b'[["JWT","' + b"a" * (MAX_TOKEN_BYTES + 1) + b'.b.c"],{"GPU-0":"a.b.c"}]',
        b" " * (MAX_EAT_BYTES + 1),
        json.dumps([["JWT", "a.b.c"], {f"GPU-{i}": "a.b.c" for i in range(33)}]).encode(),
    ],
)
def test_what_is_no_eat(token: bytes) -> None:
    with pytest.raises(EvidenceMalformed):
        judged(token)


def test_duplicate_claims_are_malformed() -> None:
    body = base64.urlsafe_b64encode(b'{"iss":"a","iss":"b"}').rstrip(b"=").decode()
    head, _, tail = ISSUER.token(times()).split(".")
    text = f"{head}.{body}.{tail}"
    with pytest.raises(EvidenceMalformed, match="twice"):
        judged(json.dumps([["JWT", text], {"GPU-0": text}]).encode())


def test_rules_have_distinct_names_and_sources() -> None:
    rules = [
        *nras.TOKEN_RULES,
        *nras.OVERALL_RULES,
        *nras.DEVICE_RULES,
        *nras.COUNT_RULES,
        *nras.PIN_RULES,
    ]
    assert len({rule.name for rule in rules}) == len(rules)
    assert all(rule.name.startswith("nras.") and rule.source for rule in rules)


_GOOD = eat()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(_GOOD) - 1), st.integers(0, 255)), max_size=3))
def test_any_changed_eat_is_refused_by_name_or_is_the_same(changes: list[tuple[int, int]]) -> None:
    data = bytearray(_GOOD)
    for offset, value in changes:
        data[offset] = value
    with suppress(AppraisalError):
        verdict = judged(bytes(data), None)
        if verdict.holds:
            assert json.loads(bytes(data)) == json.loads(_GOOD)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_are_refused_by_name(data: bytes) -> None:
    with pytest.raises(AppraisalError):
        judged(data, None)


def test_keys_are_bounded() -> None:
    many = json.dumps({"keys": [ISSUER.jwk(kid=f"k{i}") for i in range(65)]}).encode()
    assert codes(judged(eat(), papers=Collateral(jwks=(many,)))) == {"nras_key_missing"}
