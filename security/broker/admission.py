"""What a shard sends to be admitted, and the checks that need nothing but the documents.

What evidence is said to be bound to is compared, field by field, with what it must be; afterwards
evidence over the stated binding is evidence over the expected one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from placement.plan import NAME, REGION, RoleTemplate
from placement.verify import Claims, PlanRejected, verify_claims, verify_separation
from security.attestation.evidence import MAX_EVIDENCE_BYTES, Binding, Evidence, evidence_digest
from security.broker.documents import OwnedDocuments
from security.broker.nonces import NONCE_BYTES
from security.broker.store import printable
from security.errors import (
    BrokerRefusal,
    ClaimsRejected,
    GpuEvidenceSwapped,
    GpuEvidenceUnexpected,
    InstanceSwapped,
    MalformedInput,
    NonceSwapped,
    RoleSwapped,
    ShardKeySwapped,
    WrongBroker,
    WrongCluster,
    WrongManifest,
    WrongPolicy,
)
from security.roster import ADDRESS

MAX_NOTES = 16
MAX_NOTE_LENGTH = 512


@dataclass(frozen=True, slots=True)
class AdmissionRequest:
    """What a shard sends to be admitted; `binding` is what it states its evidence to be over."""

    nonce: bytes
    instance: str
    role: str
    shard_key: bytes
    link_address: str
    ingress_address: str
    binding: Binding
    evidence: Evidence
    notes: tuple[str, ...]
    device_evidence: bytes = b""
    region: str = ""


def check_name(what: str, value: str) -> None:
    """Refuses what is no name; raises MalformedInput."""
    if re.fullmatch(NAME, value) is None:
        raise MalformedInput(f"{what}: expected a name matching {NAME}, found {value[:64]!r}")


def check_shape(request: AdmissionRequest) -> None:
    """Checks lengths and patterns before anything is looked up or hashed; raises MalformedInput."""
    check_name("instance", request.instance)
    if len(request.nonce) != NONCE_BYTES:
        raise MalformedInput(f"nonce: expected {NONCE_BYTES} bytes, found {len(request.nonce)}")
    if len(request.shard_key) != 32:
        raise MalformedInput(f"shard_key: expected 32 bytes, found {len(request.shard_key)}")
    if len(request.evidence.body) > MAX_EVIDENCE_BYTES:
        raise MalformedInput(
            f"evidence: expected at most {MAX_EVIDENCE_BYTES} bytes, found "
            f"{len(request.evidence.body)}"
        )
    if len(request.device_evidence) > MAX_EVIDENCE_BYTES:
        raise MalformedInput(
            f"device_evidence: expected at most {MAX_EVIDENCE_BYTES} bytes, found "
            f"{len(request.device_evidence)}"
        )
    for name, address in (
        ("link_address", request.link_address),
        ("ingress_address", request.ingress_address),
    ):
        if (address or name == "link_address") and re.fullmatch(ADDRESS, address) is None:
            raise MalformedInput(f"{name}: expected host:port, found {address[:64]!r}")
    if request.region and re.fullmatch(REGION, request.region) is None:
        raise MalformedInput(f"region: expected a name like eu-west, found {request.region[:64]!r}")
    if len(request.notes) > MAX_NOTES or any(len(n) > MAX_NOTE_LENGTH for n in request.notes):
        raise MalformedInput(f"notes: expected at most {MAX_NOTES} of {MAX_NOTE_LENGTH} characters")


def check_ingress(request: AdmissionRequest, role: RoleTemplate) -> None:
    """The first stage takes requests, no other does; raises MalformedInput."""
    if (request.ingress_address != "") != (role.stage == 0):
        raise MalformedInput(
            f"ingress_address: expected one for the first stage and none for others, "
            f"found {request.ingress_address!r} for {role.name}"
        )


def check_binding(
    request: AdmissionRequest, documents: OwnedDocuments, broker_public: bytes
) -> None:
    """Compares what the evidence is said to be over, field by field, with what it must be.

    Raises:
        NonceSwapped, InstanceSwapped, RoleSwapped, ShardKeySwapped, WrongCluster, WrongBroker,
        WrongPolicy, WrongManifest, GpuEvidenceSwapped, GpuEvidenceUnexpected
    """
    stated = request.binding
    cluster = documents.template.cluster
    devices = evidence_digest(request.device_evidence)
    if devices and not documents.policy.demanded_devices():
        raise GpuEvidenceUnexpected(
            "evidence: expected none of devices, as the policy lists none, found some"
        )
    checks: tuple[tuple[str, str, str, type[BrokerRefusal]], ...] = (
        ("nonce", stated.nonce.hex(), request.nonce.hex(), NonceSwapped),
        ("instance", stated.instance, request.instance, InstanceSwapped),
        ("role", stated.role, request.role, RoleSwapped),
        ("shard key", stated.shard_key.hex(), request.shard_key.hex(), ShardKeySwapped),
        ("cluster", stated.cluster, cluster, WrongCluster),
        ("broker key", stated.broker_key.hex(), broker_public.hex(), WrongBroker),
        ("policy", stated.policy_digest, documents.policy_digest, WrongPolicy),
        (
            "GPU evidence",
            stated.gpu_evidence_digest,
            devices,
            GpuEvidenceSwapped if devices else GpuEvidenceUnexpected,
        ),
    )
    for what, found, expected, error in checks:
        if found != expected:
            raise error(
                f"evidence: expected to be bound to {what} {expected or 'none'}, found "
                f"{found[:128]!r}"
            )
    if stated.manifest_digest != documents.manifest_digest:
        notes = "; ".join(printable(note, MAX_NOTE_LENGTH) for note in request.notes)
        raise WrongManifest(
            f"model files: expected manifest {documents.manifest_digest}, found "
            f"{stated.manifest_digest[:64]!r}: {notes or 'the shard named no file'}"
        )


def check_claims(
    role: RoleTemplate, documents: OwnedDocuments, claims: Claims, others: Mapping[str, Claims]
) -> None:
    """Holds what evidence proved against the role and against the other members.

    Args:
        role: the role that is asked for.
        documents: the owner's.
        claims: what the evidence proved.
        others: claims of the instance's members in other roles.

    Raises:
        ClaimsRejected
    """
    try:
        verify_claims(role, documents.template, documents.policy, claims)
        verify_separation(documents.policy, {**others, role.name: claims})
    except PlanRejected as error:
        raise ClaimsRejected(f"{role.name} on {claims.node}: {error}") from None
