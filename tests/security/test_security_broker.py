"""Every rule of the broker: what it admits, what it refuses and why, when it issues an epoch."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from security_samples import HARDWARE, OPEN, SIMULATED, Lab

from security import errors
from security.attestation import appraise
from security.attestation.enrolled import EnrolledCollector, Enrolment, Enrolments
from security.attestation.evidence import Binding, Evidence
from security.attestation.simulated import SimulatedCollector
from security.broker import broker_pb2
from security.broker.admission import AdmissionRequest
from security.broker.instances import INSTANCE_IDLE_S
from security.broker.members import member_mac
from security.broker.nonces import MAX_NONCES_PER_PEER
from security.broker.store import BrokerStore
from security.broker.watcher import WatchClosed
from security.roster import LIFETIME_S
from security.signing import public_bytes, sign


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    lab = Lab(tmp_path)
    lab.install()
    return lab


def refused(lab: Lab, error: type[errors.SecurityError], request: AdmissionRequest) -> str:
    """Asserts that a request is refused for one reason, which is in the log; returns the reason."""
    with pytest.raises(errors.SecurityError) as caught:
        lab.broker.admit(request, "test")
    assert type(caught.value) is error
    last = lab.audit()[-1]
    assert (last["event"], last["method"], last["code"]) == ("refused", "admit", error.code)
    assert last["reason"] == str(caught.value)
    return str(caught.value)


def test_codes_are_distinct() -> None:
    kinds = [
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type)
        and issubclass(kind, errors.SecurityError)
        and kind is not errors.AdmissionRefused
    ]
    assert len({kind.code for kind in kinds}) == len(kinds)


# -- installation ------------------------------------------------------------------------------


def test_nothing_installed(tmp_path: Path) -> None:
    with pytest.raises(errors.NothingInstalled):
        Lab(tmp_path).broker.challenge("pipeline-0", "stage-0", "test")


@pytest.mark.parametrize("kind", ["policy", "template", "manifest", "certificate"])
def test_documents_of_another_owner(tmp_path: Path, kind: str) -> None:
    lab, other = Lab(tmp_path / "a"), Lab(tmp_path / "b")
    foreign = getattr(other.installation(lab.broker.public_key), kind)
    installation = replace(lab.installation(), **{kind: foreign})
    with pytest.raises(errors.SignatureInvalid):
        lab.broker.install(installation, "test")
    assert lab.audit()[-1]["code"] == "signature_invalid"


def test_documents_swapped_for_each_other(tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    installation = lab.installation()
    with pytest.raises(errors.WrongDocumentKind):
        lab.broker.install(replace(installation, policy=installation.template), "test")


def test_unsigned_enrolments(tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    payload = Enrolments().to_bytes(lab.template().digest)
    forged = sign("enrolment", payload, Ed25519PrivateKey.generate()).to_bytes()
    with pytest.raises(errors.SignatureInvalid):
        lab.broker.install(replace(lab.installation(), enrolments=forged), "test")


def test_certificate_for_another_broker(tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    other = public_bytes(Ed25519PrivateKey.generate())
    with pytest.raises(errors.CertificateRefused):
        lab.broker.install(lab.installation(other), "test")


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"policy_digest": "1" * 64}, errors.PolicyDigestMismatch),
        ({"manifest_digest": "1" * 64}, errors.ManifestDigestMismatch),
        ({"weaknesses": ()}, errors.TemplateRejected),
        ({"expires_at": 1_700_000_000}, errors.TemplateExpired),
    ],
)
def test_templates_refused_at_installation(
    tmp_path: Path, changes: dict[str, object], error: type[errors.SecurityError]
) -> None:
    lab = Lab(tmp_path)
    with pytest.raises(error):
        lab.install(**changes)
    assert lab.audit()[-1]["code"] == error.code
    assert lab.broker.certificate == b""


def test_template_with_evidence_beyond_the_policy(tmp_path: Path) -> None:
    lab = Lab(tmp_path, HARDWARE)
    template = lab.template()
    roles = tuple(replace(role, evidence=("simulated",)) for role in template.roles)
    with pytest.raises(errors.TemplateRejected, match="evidence"):
        lab.install(roles=roles)


def test_generation_never_goes_back(lab: Lab) -> None:
    lab.install(generation=5)
    for generation in (5, 4):
        with pytest.raises(errors.GenerationRollback):
            lab.install(generation=generation, max_instances=2)
    lab.install(generation=5)  # the very same documents again
    restarted = lab.broker = lab.start()
    with pytest.raises(errors.GenerationRollback):
        restarted.install(lab.installation(generation=4), "test")


def test_installed_documents_survive_a_restart(lab: Lab) -> None:
    key = lab.broker.public_key
    lab.broker = lab.start()
    assert lab.broker.public_key == key
    assert lab.admit("stage-0").secret


def test_files_are_private(lab: Lab) -> None:
    assert lab.home.stat().st_mode & 0o777 == 0o700
    assert (lab.home / "broker.key").stat().st_mode & 0o777 == 0o600


def other_home(lab: Lab, change: str) -> None:
    """Ends the broker and changes its database behind its back."""
    lab.close()
    with closing(sqlite3.connect(lab.home / "broker.db")) as database:
        database.executescript(change)


def test_members_survive_a_restart(lab: Lab) -> None:
    head, tail = lab.admit("stage-0"), lab.admit("stage-1")
    lab.broker = lab.start()
    first = lab.watch(head)
    lab.watch(tail)
    keys = [entry.shard_key for entry in lab.opened(first.next(0).roster).entries]
    assert keys == [shard.key.public_key().public_bytes_raw() for shard in (head, tail)]


def test_retired_and_replaced_members_stay_so_after_a_restart(lab: Lab) -> None:
    old, new = lab.admit("stage-0"), lab.admit("stage-0")
    lab.broker = lab.start()
    lab.watch(new)
    with pytest.raises(errors.NotTheMember):
        lab.watch(old)
    lab.broker.retire("pipeline-0", "test")
    lab.broker = lab.start()
    with pytest.raises(errors.UnknownMember):
        lab.watch(new)


def test_no_nonce_from_before_a_restart(lab: Lab) -> None:
    unused, used = lab.request(), lab.request()
    lab.broker.admit(used, "test")
    lab.broker = lab.start()
    refused(lab, errors.NonceUnknown, unused)
    refused(lab, errors.NonceUnknown, used)


def test_two_brokers_on_one_home(lab: Lab) -> None:
    with pytest.raises(errors.StateInUse):
        BrokerStore(lab.home)


def test_database_of_another_version(lab: Lab) -> None:
    other_home(lab, "PRAGMA user_version = 99")
    with pytest.raises(errors.StateOtherVersion, match="expected version 1, found 99"):
        lab.start()


def test_database_of_something_else(lab: Lab) -> None:
    other_home(lab, "PRAGMA application_id = 7")
    with pytest.raises(errors.StateDamaged):
        lab.start()


@pytest.mark.parametrize("content", [b"damaged" * 1000, None])
def test_damaged_database(lab: Lab, content: bytes | None) -> None:
    lab.close()
    path = lab.home / "broker.db"
    if content is None:
        whole = bytearray(path.read_bytes())
        whole[4096:] = bytes(len(whole) - 4096)
        content = bytes(whole)
    path.write_bytes(content)
    with pytest.raises(errors.StateDamaged):
        lab.start()


def test_damaged_member(lab: Lab) -> None:
    lab.admit("stage-0")
    other_home(lab, "UPDATE members SET entry = x'00'")
    with pytest.raises(errors.StateDamaged):
        lab.start()


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ("DELETE FROM audit WHERE sequence = (SELECT max(sequence) FROM audit)", "AuditTruncated"),
        (
            "UPDATE audit SET body = x'20' WHERE sequence = (SELECT max(sequence) FROM audit)",
            "AuditEntryEdited",
        ),
        ("DELETE FROM head", "AuditHeadForged"),
        ("UPDATE head SET signed = x'00'", "AuditHeadForged"),
    ],
)
def test_changed_end_of_the_log_stops_the_broker(lab: Lab, change: str, error: str) -> None:
    other_home(lab, change)
    with pytest.raises(getattr(errors, error)):
        lab.start()


def test_key_of_another_broker(lab: Lab, tmp_path: Path) -> None:
    lab.close()
    (lab.home / "broker.key").unlink()
    with pytest.raises(errors.AuditHeadForged):
        lab.start()


def test_what_cannot_be_made_durable_is_refused(lab: Lab) -> None:
    request = lab.request()
    lab.close()
    with pytest.raises(errors.StateUnwritable):
        lab.broker.admit(request, "test")
    with pytest.raises(errors.UnknownMember):
        lab.broker.watch("pipeline-0", "stage-0", b"", b"", "test")


def test_files_of_an_earlier_version_are_taken_over(lab: Lab) -> None:
    installation = lab.installation(generation=5)
    lab.close()
    message = broker_pb2.InstallRequest(
        policy=installation.policy,
        template=installation.template,
        manifest=installation.manifest,
        certificate=installation.certificate,
    )
    for path in lab.home.glob("broker.db*"):
        path.unlink()
    (lab.home / "installed").write_bytes(message.SerializeToString())
    generation = {"owner": lab.owner_public.hex(), "generation": 5}
    (lab.home / "generation").write_text(json.dumps(generation))
    lab.broker = lab.start()
    assert lab.admit("stage-0").secret
    with pytest.raises(errors.GenerationRollback):
        lab.install(generation=4)
    assert not (lab.home / "installed").exists()


@pytest.mark.parametrize("name", ["installed", "generation"])
def test_damaged_files_of_an_earlier_version(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\xff\xff")
    with pytest.raises(errors.MalformedInput, match="remove"):
        BrokerStore(tmp_path)


# -- admission: refusals -----------------------------------------------------------------------


def test_unknown_nonce(lab: Lab) -> None:
    refused(lab, errors.NonceUnknown, replace(lab.request(), nonce=b"n" * 32))


def test_used_nonce(lab: Lab) -> None:
    request = lab.request()
    lab.broker.admit(request, "test")
    refused(lab, errors.NonceUsed, request)


def test_a_refusal_spends_the_nonce(lab: Lab) -> None:
    request = lab.request(bind=lambda b: replace(b, cluster="other"))
    refused(lab, errors.WrongCluster, request)
    refused(lab, errors.NonceUsed, request)


def test_expired_nonce(lab: Lab) -> None:
    request = lab.request()
    lab.clock.now += 61
    refused(lab, errors.NonceExpired, request)


def test_nonce_of_another_role(lab: Lab) -> None:
    other = lab.request("stage-1")
    request = replace(lab.request("stage-0"), nonce=other.nonce)
    refused(lab, errors.NonceForOtherRole, request)


def test_nonce_of_another_instance(lab: Lab) -> None:
    other = lab.request(instance="pipeline-1")
    refused(lab, errors.NonceForOtherInstance, replace(lab.request(), nonce=other.nonce))


def test_nonces_of_one_peer_are_bounded(lab: Lab) -> None:
    first = lab.request()
    for _ in range(MAX_NONCES_PER_PEER):
        lab.broker.challenge("pipeline-0", "stage-0", "test")
    refused(lab, errors.NonceUnknown, first)


def test_unknown_role(lab: Lab) -> None:
    with pytest.raises(errors.UnknownRole):
        lab.broker.challenge("pipeline-0", "stage-7", "test")
    assert lab.audit()[-1]["code"] == "unknown_role"
    refused(lab, errors.UnknownRole, replace(lab.request(), role="stage-7"))


@pytest.mark.parametrize(
    ("bind", "error"),
    [
        (lambda b: replace(b, role="stage-1"), errors.RoleSwapped),
        (lambda b: replace(b, shard_key=b"k" * 32), errors.ShardKeySwapped),
        (lambda b: replace(b, instance="pipeline-9"), errors.InstanceSwapped),
        (lambda b: replace(b, nonce=b"n" * 32), errors.NonceSwapped),
        (lambda b: replace(b, cluster="other"), errors.WrongCluster),
        (lambda b: replace(b, broker_key=b"b" * 32), errors.WrongBroker),
        (lambda b: replace(b, policy_digest="0" * 64), errors.WrongPolicy),
        (lambda b: replace(b, manifest_digest="0" * 64), errors.WrongManifest),
        (lambda b: replace(b, gpu_evidence_digest="0" * 64), errors.GpuEvidenceUnexpected),
    ],
)
def test_evidence_bound_to_something_else(
    lab: Lab, bind: Callable[[Binding], Binding], error: type[errors.SecurityError]
) -> None:
    request = lab.request(bind=bind)
    honest = lab.request().binding
    refused(lab, error, request)
    # The same evidence with a lie about what it is bound to.
    other = lab.request()
    lie = replace(honest, nonce=other.nonce, shard_key=other.shard_key)
    refused(
        lab,
        errors.EvidenceNotBound,
        replace(other, binding=lie, evidence=request.evidence),
    )


def test_wrong_manifest_names_the_file(lab: Lab) -> None:
    request = replace(
        lab.request(bind=lambda b: replace(b, manifest_digest="0" * 64)),
        notes=("chat_template.jinja: expected sha256 aa, found bb\nforged line",),
    )
    reason = refused(lab, errors.WrongManifest, request)
    assert "chat_template.jinja: expected sha256 aa, found bb?forged line" in reason


def test_expired_template(lab: Lab) -> None:
    lab.install(generation=2, expires_at=int(lab.clock.now) + 10)
    request = lab.request()
    lab.clock.now += 11
    refused(lab, errors.TemplateExpired, request)
    with pytest.raises(errors.TemplateExpired):
        lab.broker.challenge("pipeline-0", "stage-0", "test")


def test_simulated_evidence_where_the_policy_does_not_name_it(tmp_path: Path) -> None:
    lab = Lab(tmp_path, HARDWARE)
    lab.install()
    refused(lab, errors.EvidenceKindRefused, lab.request())


def test_simulated_evidence_for_an_enrolled_role(tmp_path: Path) -> None:
    lab = Lab(tmp_path, OPEN)
    lab.install()
    refused(lab, errors.EvidenceKindRefused, lab.request())


def test_kind_without_a_verifier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(appraise, "MACHINE_VERIFIERS", {})
    lab = Lab(tmp_path, HARDWARE)
    lab.install()
    refused(
        lab,
        errors.EvidenceKindUnsupported,
        lab.request(collect=lambda data: Evidence("sev-snp", data)),
    )


@pytest.mark.parametrize("position", [0, 70, -1])
def test_changed_evidence(lab: Lab, position: int) -> None:
    request = lab.request()
    body = bytearray(request.evidence.body)
    body[position] ^= 1
    changed = replace(request, evidence=Evidence("simulated", bytes(body)))
    refused(lab, errors.EvidenceSignatureInvalid, changed)


def test_short_evidence(lab: Lab) -> None:
    request = replace(lab.request(), evidence=Evidence("simulated", b"x" * 64))
    refused(lab, errors.EvidenceMalformed, request)


def test_unpinned_measurement(tmp_path: Path) -> None:
    pinned = SIMULATED.replace(
        "ingress:", f"measurements: {{simulated: ['{'ab' * 32}']}}\ningress:"
    )
    lab = Lab(tmp_path, pinned)
    weaknesses = ("simulated_tee", "unhardened", "plain_ingress")
    lab.install(weaknesses=weaknesses)
    assert "measurement" in refused(lab, errors.ClaimsRejected, lab.request())
    good = SimulatedCollector("node-a", measurement="ab" * 32).collect
    assert lab.broker.admit(lab.request(collect=good), "test")


def test_wrong_region(tmp_path: Path) -> None:
    lab = Lab(tmp_path, SIMULATED.replace("ingress:", "regions: [eu]\ningress:"))
    roles = tuple(replace(role, regions=("eu",)) for role in lab.template().roles)
    lab.install(roles=roles)
    assert "region" in refused(lab, errors.ClaimsRejected, lab.request())
    elsewhere = SimulatedCollector("node-a", "us").collect
    refused(lab, errors.ClaimsRejected, lab.request(collect=elsewhere))
    assert lab.broker.admit(lab.request(collect=SimulatedCollector("n", "eu").collect), "test")


def test_separate_nodes(tmp_path: Path) -> None:
    lab = Lab(tmp_path, SIMULATED + "separate_nodes: true\n")
    lab.install()
    lab.admit("stage-0", node="node-a")
    assert "node" in refused(lab, errors.ClaimsRejected, lab.request("stage-1", node="node-a"))
    lab.admit("stage-1", node="node-b")
    lab.admit("stage-0", node="node-a")  # a replacement is not its own neighbour


def test_too_many_instances(lab: Lab) -> None:
    lab.admit("stage-0")
    refused(lab, errors.TooManyInstances, lab.request(instance="pipeline-1"))
    lab.broker.retire("pipeline-0", "test")
    lab.admit("stage-0", "pipeline-1")


def test_a_forgotten_instance_makes_room(lab: Lab) -> None:
    watcher = lab.watch(lab.admit("stage-0"))
    lab.clock.now += INSTANCE_IDLE_S + 1
    refused(lab, errors.TooManyInstances, lab.request(instance="pipeline-1"))
    watcher.close()
    lab.clock.now += INSTANCE_IDLE_S + 1
    lab.admit("stage-0", "pipeline-1")


@pytest.mark.parametrize(
    "change",
    [
        {"shard_key": b"short"},
        {"nonce": b"short"},
        {"link_address": "nowhere"},
        {"link_address": ""},
        {"link_address": "host:99\n"},
        {"ingress_address": ""},
        {"ingress_address": "host"},
        {"notes": ("x",) * 17},
        {"notes": ("x" * 513,)},
        {"instance": "../x"},
        {"evidence": Evidence("simulated", bytes((1 << 20) + 1))},
    ],
)
def test_malformed_admissions(lab: Lab, change: dict[str, object]) -> None:
    refused(lab, errors.MalformedInput, replace(lab.request(), **change))  # type: ignore[arg-type]


def test_ingress_is_for_the_head_only(lab: Lab) -> None:
    request = replace(lab.request("stage-1"), ingress_address="10.0.0.1:1")
    refused(lab, errors.MalformedInput, request)


def test_shard_key_of_low_order(lab: Lab) -> None:
    class LowOrder:
        def public_key(self) -> LowOrder:
            return self

        def public_bytes_raw(self) -> bytes:
            return bytes(32)

    request = lab.request(key=LowOrder())  # type: ignore[arg-type]
    refused(lab, errors.MalformedInput, request)


# -- enrolled nodes ----------------------------------------------------------------------------

NODE_KEY = Ed25519PrivateKey.from_private_bytes(b"\x09" * 32)


def enrolled_lab(tmp_path: Path) -> Lab:
    enrolment = Enrolment("node-a", public_bytes(NODE_KEY), "eu", 1_900_000_000)
    lab = Lab(tmp_path, OPEN, Enrolments((enrolment,)))
    lab.install()
    return lab


def test_enrolled_node(tmp_path: Path) -> None:
    lab = enrolled_lab(tmp_path)
    assert lab.broker.admit(
        lab.request(collect=EnrolledCollector("node-a", NODE_KEY).collect), "test"
    )


def test_node_that_is_not_enrolled(tmp_path: Path) -> None:
    collect = EnrolledCollector("node-b", NODE_KEY).collect
    lab = enrolled_lab(tmp_path)
    refused(lab, errors.NodeNotEnrolled, lab.request(collect=collect))


def test_enrolled_node_with_another_key(tmp_path: Path) -> None:
    collect = EnrolledCollector("node-a", Ed25519PrivateKey.generate()).collect
    lab = enrolled_lab(tmp_path)
    refused(lab, errors.EvidenceSignatureInvalid, lab.request(collect=collect))


def test_expired_enrolment(tmp_path: Path) -> None:
    lab = enrolled_lab(tmp_path)
    lab.clock.now = 1_900_000_000.0
    collect = EnrolledCollector("node-a", NODE_KEY).collect
    refused(lab, errors.EnrolmentExpired, lab.request(collect=collect))


def test_enrolled_statement_for_other_data(tmp_path: Path) -> None:
    lab = enrolled_lab(tmp_path)
    collector = EnrolledCollector("node-a", NODE_KEY)
    request = lab.request(collect=lambda _: collector.collect(b"\x01" * 64))
    refused(lab, errors.EvidenceNotBound, request)


def test_enrolled_node_for_an_attested_role(lab: Lab) -> None:
    collect = EnrolledCollector("node-a", NODE_KEY).collect
    refused(lab, errors.EvidenceKindRefused, lab.request(collect=collect))


def test_enrolments_round_trip() -> None:
    enrolments = Enrolments((Enrolment("n", b"k" * 32, None, 5),))
    assert Enrolments.from_bytes(enrolments.to_bytes("1" * 64), "1" * 64) == enrolments
    with pytest.raises(errors.MalformedInput, match="once"):
        Enrolments.from_bytes(Enrolments(enrolments.nodes * 2).to_bytes("1" * 64), "1" * 64)


def test_a_struck_off_node_cannot_come_back_with_an_older_list(tmp_path: Path) -> None:
    lab = enrolled_lab(tmp_path)
    older = lab.installation().enrolments
    lab.enrolments = Enrolments()
    newer = lab.installation(generation=2)
    # Every document is the owner's; only whoever sits on the way has put them together.
    with pytest.raises(errors.EnrolmentsForOtherTemplate):
        lab.broker.install(replace(newer, enrolments=older), "test")
    lab.broker.install(newer, "test")
    collect = EnrolledCollector("node-a", NODE_KEY).collect
    refused(lab, errors.NodeNotEnrolled, lab.request(collect=collect))


# -- rosters and epochs ------------------------------------------------------------------------


def test_epoch_when_all_are_admitted_and_watch(lab: Lab) -> None:
    head, tail = lab.admit("stage-0"), lab.admit("stage-1", node="node-b")
    first = lab.watch(head)
    assert first.next(0).roster is None
    with pytest.raises(errors.NoRoster):
        lab.broker.roster("pipeline-0")
    second = lab.watch(tail)
    roster = lab.opened(first.next(0).roster)
    assert lab.opened(second.next(0).roster) == roster
    assert [entry.role for entry in roster.entries] == ["stage-0", "stage-1"]
    assert roster.entry("stage-1").shard_key == tail.key.public_key().public_bytes_raw()
    assert roster.entry("stage-1").claims.node == "node-b"
    assert roster.head.ingress_address == "10.0.0.1:5000"
    assert (roster.instance, roster.cluster) == ("pipeline-0", "lab")
    assert (roster.policy_digest, roster.manifest_digest) == (
        lab.policy.digest,
        lab.manifest.digest,
    )
    assert "simulated_tee" in roster.weaknesses
    assert first.next(0).roster is None


def test_replaced_member_gives_a_new_epoch_once_all_watch(lab: Lab) -> None:
    head, tail = lab.admit("stage-0"), lab.admit("stage-1")
    first, old = lab.watch(head), lab.watch(tail)
    before = lab.opened(first.next(0).roster)
    replacement = lab.admit("stage-1")
    with pytest.raises(errors.NotTheMember):
        old.next(0)
    with pytest.raises(errors.NotTheMember):
        lab.watch(tail)
    assert first.next(0).roster is None
    second = lab.watch(replacement)
    after = lab.opened(first.next(0).roster)
    assert lab.opened(second.next(0).roster) == after
    assert after.epoch != before.epoch and after.serial > before.serial
    key = replacement.key.public_key().public_bytes_raw()
    assert after.entry("stage-1").shard_key == key


def test_absent_member_holds_up_the_epoch_but_need_not_attest_again(lab: Lab) -> None:
    head, tail = lab.admit("stage-0"), lab.admit("stage-1")
    first, second = lab.watch(head), lab.watch(tail)
    epoch = lab.opened(first.next(0).roster).epoch
    second.close()
    lab.broker.renew_epoch("pipeline-0", "stage-0", epoch, head.mac("renew", epoch), "test")
    assert first.next(0).roster is None
    again = lab.watch(tail, epoch)
    assert lab.opened(again.next(0).roster).epoch == lab.opened(first.next(0).roster).epoch != epoch


def test_returning_member_with_the_current_epoch_is_told_nothing(lab: Lab) -> None:
    head, tail = lab.admit("stage-0"), lab.admit("stage-1")
    lab.watch(head)
    second = lab.watch(tail)
    document = second.next(0).roster
    epoch = lab.opened(document).epoch
    second.close()
    assert lab.watch(tail, epoch).next(0).roster is None
    assert lab.watch(tail).next(0).roster == document


def test_newer_stream_of_a_member_replaces_the_older(lab: Lab) -> None:
    head, tail = lab.admit("stage-0"), lab.admit("stage-1")
    old = lab.watch(head)
    new = lab.watch(head)
    with pytest.raises(WatchClosed):
        old.next(0)
    lab.watch(tail)
    assert new.next(0).roster is not None


def test_renewal_is_idempotent(lab: Lab) -> None:
    head, tail = lab.admit("stage-0"), lab.admit("stage-1")
    first, second = lab.watch(head), lab.watch(tail)
    epoch = lab.opened(first.next(0).roster).epoch
    second.next(0)
    for shard in (head, tail, head):
        lab.broker.renew_epoch("pipeline-0", shard.role, epoch, shard.mac("renew", epoch), "test")
    renewed = lab.opened(first.next(0).roster)
    assert renewed.epoch != epoch
    assert first.next(0).roster is None
    assert lab.opened(second.next(0).roster) == renewed


def test_calls_without_the_member_secret(lab: Lab) -> None:
    head = lab.admit("stage-0")
    forged = member_mac(b"s" * 32, "watch", "pipeline-0", "stage-0", b"")
    with pytest.raises(errors.NotTheMember):
        lab.broker.watch("pipeline-0", "stage-0", b"", forged, "test")
    with pytest.raises(errors.NotTheMember):  # a MAC for one method is none for another
        lab.broker.renew_epoch("pipeline-0", "stage-0", b"", head.mac("watch"), "test")
    with pytest.raises(errors.UnknownMember):
        lab.broker.watch("pipeline-0", "stage-1", b"", forged, "test")
    with pytest.raises(errors.NotTheMember):
        lab.broker.report("pipeline-0", "stage-0", "text", forged, "test")


def test_report_is_one_bounded_line(lab: Lab) -> None:
    head = lab.admit("stage-0")
    text = "first\n{second}"
    lab.broker.report("pipeline-0", "stage-0", text, head.mac("report", text.encode()), "test")
    assert lab.audit()[-1]["text"] == "first?{second}"
    with pytest.raises(errors.MalformedInput):
        lab.broker.report("pipeline-0", "stage-0", "x" * 501, b"", "test")


def test_new_installation_ends_all_instances(lab: Lab) -> None:
    head = lab.admit("stage-0")
    watcher = lab.watch(head)
    lab.install(generation=2)
    with pytest.raises(errors.UnknownMember):
        watcher.next(0)
    with pytest.raises(errors.UnknownMember):
        lab.watch(head)


def test_retired_instance(lab: Lab) -> None:
    watcher = lab.watch(lab.admit("stage-0"))
    lab.broker.retire("pipeline-0", "test")
    with pytest.raises(errors.UnknownMember):
        watcher.next(0)
    lab.broker.retire("pipeline-0", "test")


def test_new_edition_at_half_life_keeps_the_epoch(lab: Lab) -> None:
    head, tail = lab.admit("stage-0"), lab.admit("stage-1")
    first = lab.watch(head)
    lab.watch(tail)
    original = first.next(0).roster
    roster = lab.opened(original)
    assert lab.broker.roster("pipeline-0")[0] == original
    lab.clock.now += LIFETIME_S // 2 + 1
    edition = lab.opened(lab.broker.roster("pipeline-0")[0])
    assert edition.epoch == roster.epoch
    assert edition.expires_at > roster.expires_at and edition.serial > roster.serial
    assert first.next(0).roster is None
    # Links are bound to the digest of the edition that the epoch began with.
    assert lab.watch(tail).next(0).roster == original


def test_serial_grows_across_a_restart(lab: Lab) -> None:
    def serial() -> int:
        head, tail = lab.admit("stage-0"), lab.admit("stage-1")
        first = lab.watch(head)
        lab.watch(tail)
        return lab.opened(first.next(0).roster).serial

    before = serial()
    lab.clock.now += 1
    lab.broker = lab.start()
    assert serial() > before


def test_log_holds_no_secret(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    shard = lab.admit("stage-0")
    lab.watch(shard)
    lab.close()
    text = repr(lab.audit()) + caplog.text
    database = (lab.home / "broker.db").read_bytes()
    private = shard.key.private_bytes_raw()
    for secret in (shard.secret, private, (lab.home / "broker.key").read_bytes()[40:60]):
        assert secret.hex() not in text and repr(secret)[2:-1] not in text
        assert secret not in database and secret.hex().encode() not in database


def test_no_roster_outlives_the_template(lab: Lab) -> None:
    expiry = int(lab.clock.now) + LIFETIME_S
    lab.install(generation=2, expires_at=expiry)
    head, tail = lab.admit("stage-0"), lab.admit("stage-1")
    watcher = lab.watch(head)
    lab.watch(tail)
    epoch = lab.opened(watcher.next(0).roster).epoch
    lab.clock.now = expiry - 3600
    assert lab.opened(lab.broker.roster("pipeline-0")[0]).expires_at == expiry
    lab.clock.now = expiry
    lab.broker.renew_epoch("pipeline-0", "stage-0", epoch, head.mac("renew", epoch), "test")
    assert watcher.next(0).roster is None
    assert lab.audit()[-1]["code"] == "template_expired"


def test_generation_never_goes_back_even_without_what_was_installed(lab: Lab) -> None:
    lab.install(generation=5)
    lab.close()
    with closing(sqlite3.connect(lab.home / "broker.db")) as database, database:
        database.execute("UPDATE installed SET template = x'00'")
    again = lab.broker = lab.start()
    with pytest.raises(errors.NothingInstalled):
        again.challenge("pipeline-0", "stage-0", "test")
    older = lab.installation(generation=4)
    with pytest.raises(errors.GenerationRollback):
        again.install(older, "test")
    assert again.install(lab.installation(generation=5), "test") == 5
