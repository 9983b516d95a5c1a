"""Revocations: who is refused and expelled, and that no list can be taken back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from security_samples import Lab

from placement.plan import Trust
from placement.verify import Claims, RegionSource
from security import errors
from security.broker.revocation import Revocations, Revoked
from security.broker.watcher import Watcher
from security.signing import sign

MACHINE = Claims(
    kind="sev-snp",
    trust=Trust.ATTESTED,
    node="ab" * 64,
    product="Genoa",
    measurement="cd" * 48,
    region=None,
    region_source=RegionSource.DECLARED,
    hardened=False,
    simulated=False,
)


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    lab = Lab(tmp_path)
    lab.install()
    return lab


def revoke(lab: Lab, kind: Revoked, value: str) -> Revocations:
    known = Revocations.open(lab.broker.revocations, lab.owner_public)
    following = known.with_one(kind, value)
    assert lab.broker.revoke(following.signed(lab.owner), "test") == following.generation
    return following


@pytest.mark.parametrize(
    ("kind", "value", "error"),
    [
        (Revoked.NODE, MACHINE.node, errors.NodeRevoked),
        (Revoked.CHIP, MACHINE.node.upper(), errors.ChipRevoked),
        (Revoked.MEASUREMENT, MACHINE.measurement.upper(), errors.MeasurementRevoked),
    ],
)
def test_claims(kind: Revoked, value: str, error: type[errors.SecurityError]) -> None:
    revocations = Revocations().with_one(kind, value)
    with pytest.raises(errors.BrokerRefusal) as caught:
        revocations.require(MACHINE)
    assert type(caught.value) is error
    revocations.require(replace(MACHINE, node="other", measurement="ef" * 48))
    if kind is Revoked.CHIP:
        revocations.require(replace(MACHINE, kind="simulated"))


def test_revoked_node_is_refused_also_after_a_restart(lab: Lab) -> None:
    revoke(lab, Revoked.NODE, "node-a")
    for _ in range(2):
        with pytest.raises(errors.NodeRevoked):
            lab.admit("stage-0")
        assert lab.audit()[-1]["code"] == "node_revoked"
        lab.broker = lab.start()
    assert lab.admit("stage-0", node="node-b").secret


def test_revoked_instance(lab: Lab) -> None:
    request = lab.request()
    watcher = lab.watch(lab.admit("stage-1"))
    revoke(lab, Revoked.INSTANCE, "pipeline-0")
    with pytest.raises(errors.InstanceRevoked):
        watcher.next(0)
    with pytest.raises(errors.InstanceRevoked):
        lab.broker.challenge("pipeline-0", "stage-0", "test")
    with pytest.raises(errors.InstanceRevoked):
        lab.broker.admit(request, "test")
    assert lab.admit("stage-0", "pipeline-1").secret, "its place is free"


def test_epoch_of_a_revoked_member_ends_for_all(lab: Lab) -> None:
    head, tail = lab.admit("stage-0"), lab.admit("stage-1", node="node-b")
    first, second = lab.watch(head), lab.watch(tail)
    epoch = lab.opened(first.next(0).roster).epoch
    revoke(lab, Revoked.NODE, "node-b")
    with pytest.raises(errors.NodeRevoked):
        second.next(0)
    assert first.next(0) == (epoch, None)
    assert first.next(0) == (b"", None)
    with pytest.raises(errors.UnknownMember):
        lab.watch(tail, epoch)
    with pytest.raises(errors.NoRoster):
        lab.broker.roster("pipeline-0")
    assert lab.audit()[-1]["code"] == "unknown_member"
    # One that was away is told when it comes back, also by a restarted broker.
    assert lab.watch(head, epoch).next(0).ended == epoch
    lab.broker = lab.start()
    first = lab.watch(head, epoch)
    assert first.next(0).ended == epoch
    lab.watch(lab.admit("stage-1", node="node-c"))
    after = lab.opened(first.next(0).roster)
    assert after.epoch != epoch and after.entry("stage-1").claims.node == "node-c"


def test_a_roster_that_was_not_taken_goes_with_its_epoch() -> None:
    watcher = Watcher()
    watcher.put(b"a roster")
    watcher.end(b"its epoch")
    assert watcher.next(0) == (b"its epoch", None)
    watcher.end(b"its epoch")
    watcher.put(b"the next roster")
    assert watcher.next(0) == (b"its epoch", b"the next roster")


def test_other_instances_are_untouched(lab: Lab) -> None:
    lab.install(generation=2, max_instances=2)
    watchers = [
        lab.watch(lab.admit(role, instance, node))
        for instance, node in (("pipeline-0", "node-a"), ("pipeline-1", "node-b"))
        for role in ("stage-0", "stage-1")
    ]
    rosters = [lab.opened(watcher.next(0).roster) for watcher in watchers]
    revoke(lab, Revoked.NODE, "node-a")
    for watcher in watchers[2:]:
        assert watcher.next(0) == (b"", None)
    assert lab.opened(lab.broker.roster("pipeline-1")[0]) == rosters[2]


def test_killed_between_a_revocation_and_what_follows(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    tail = lab.admit("stage-1")
    monkeypatch.setattr(type(lab.broker), "_expel", lambda _: None)
    revoke(lab, Revoked.NODE, "node-a")
    monkeypatch.undo()
    lab.broker = lab.start()
    with pytest.raises(errors.UnknownMember):
        lab.watch(tail)


def test_lists_never_go_back(lab: Lab) -> None:
    old = revoke(lab, Revoked.NODE, "node-x")
    new = revoke(lab, Revoked.CHIP, "AB12")
    assert lab.broker.revoke(new.signed(lab.owner), "test") == 2, "the same again"
    with pytest.raises(errors.RevocationRollback):
        lab.broker.revoke(old.signed(lab.owner), "test")
    lab.broker = lab.start()
    with pytest.raises(errors.RevocationRollback):
        lab.broker.revoke(old.with_one(Revoked.NODE, "node-y").signed(lab.owner), "test")
    dropped = replace(new, generation=3, values=old.values)
    with pytest.raises(errors.RevocationDropped):
        lab.broker.revoke(dropped.signed(lab.owner), "test")
    assert lab.audit()[-1]["code"] == "revocation_dropped"


def test_documents(lab: Lab) -> None:
    revocations = Revocations().with_one(Revoked.NODE, "node-a")
    with pytest.raises(errors.SignatureInvalid):
        lab.broker.revoke(revocations.signed(Ed25519PrivateKey.generate()), "test")
    with pytest.raises(errors.WrongDocumentKind):
        lab.broker.revoke(lab.installation().policy, "test")
    with pytest.raises(errors.MalformedInput):
        lab.broker.revoke(sign("revocation", b"{}", lab.owner).to_bytes(), "test")
    assert Revocations.open(revocations.signed(lab.owner), lab.owner_public) == revocations
    assert lab.broker.revocations == b""
