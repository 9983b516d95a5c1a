from __future__ import annotations

from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from placement.plan import Trust
from placement.verify import Claims
from security import errors
from security.roster import (
    CLOCK_SKEW_S,
    LIFETIME_S,
    Roster,
    RosterEntry,
    RosterExpectation,
    open_roster,
)
from security.signing import public_bytes, sign

KEY = Ed25519PrivateKey.from_private_bytes(b"\x05" * 32)
PUBLIC = public_bytes(KEY)
NOW = 1_800_000_000
CLAIMS = Claims("simulated", Trust.ATTESTED, "node-a", "x", "", None, "declared", False, True)
ROSTER = Roster(
    instance="pipeline-0",
    cluster="lab",
    epoch=b"e" * 16,
    serial=7,
    template_digest="a" * 64,
    policy_digest="b" * 64,
    manifest_digest="c" * 64,
    entries=(
        RosterEntry("stage-0", b"0" * 32, "10.0.0.1:1", "10.0.0.1:2", CLAIMS),
        RosterEntry("stage-1", b"1" * 32, "[fd00::1]:1", "", replace(CLAIMS, region="eu")),
    ),
    weaknesses=("simulated_tee",),
    issued_at=NOW,
    expires_at=NOW + LIFETIME_S,
)
EXPECTATION = RosterExpectation(
    instance="pipeline-0",
    cluster="lab",
    template_digest="a" * 64,
    policy_digest="b" * 64,
    manifest_digest="c" * 64,
    roles=("stage-0", "stage-1"),
    role="stage-1",
    shard_key=b"1" * 32,
    after_serial=6,
)


def opened(roster: Roster, now: int = NOW) -> Roster:
    return open_roster(sign("roster", roster.to_bytes(), KEY).to_bytes(), PUBLIC, EXPECTATION, now)


def test_round_trip() -> None:
    assert opened(ROSTER) == ROSTER


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"instance": "pipeline-1"}, errors.RosterForOtherInstance),
        ({"cluster": "other"}, errors.RosterForOtherCluster),
        ({"template_digest": "0" * 64}, errors.RosterForOtherTemplate),
        ({"policy_digest": "0" * 64}, errors.RosterForOtherPolicy),
        ({"manifest_digest": "0" * 64}, errors.RosterForOtherManifest),
        ({"serial": 6}, errors.RosterOutOfDate),
        ({"issued_at": NOW + CLOCK_SKEW_S + 1}, errors.RosterFromFuture),
        ({"expires_at": NOW}, errors.RosterExpired),
        ({"entries": ROSTER.entries[:1]}, errors.RosterMemberMismatch),
        ({"entries": ROSTER.entries[::-1]}, errors.RosterMemberMismatch),
        (
            {"entries": (ROSTER.entries[0], replace(ROSTER.entries[1], shard_key=b"2" * 32))},
            errors.RosterMemberMismatch,
        ),
        ({"entries": ()}, errors.MalformedInput),
        ({"entries": ROSTER.entries[:1] * 2}, errors.MalformedInput),
        (
            {"entries": (replace(ROSTER.entries[0], link_address="x"), ROSTER.entries[1])},
            errors.MalformedInput,
        ),
    ],
)
def test_refusals(change: dict[str, object], error: type[errors.SecurityError]) -> None:
    with pytest.raises(errors.SecurityError) as caught:
        opened(replace(ROSTER, **change))  # type: ignore[arg-type]
    assert type(caught.value) is error


def test_signed_by_somebody_else() -> None:
    document = sign("roster", ROSTER.to_bytes(), Ed25519PrivateKey.generate())
    with pytest.raises(errors.SignatureInvalid):
        open_roster(document, PUBLIC, EXPECTATION, NOW)


def test_digest_covers_every_field() -> None:
    changes: tuple[dict[str, object], ...] = (
        {"epoch": b"f" * 16},
        {"serial": 8},
        {"weaknesses": ()},
        {"expires_at": NOW + 1},
        {"entries": (ROSTER.entries[0], replace(ROSTER.entries[1], link_address="10.0.0.9:1"))},
    )
    digests = {replace(ROSTER, **change).digest for change in changes}  # type: ignore[arg-type]
    assert len(digests | {ROSTER.digest}) == len(changes) + 1


def test_missing_role() -> None:
    with pytest.raises(errors.RosterMemberMismatch):
        ROSTER.entry("stage-2")
