"""Enrolled nodes: the owner signs a node's key; the node proves that it holds it.

This says which machine asks, not what it runs: trust "enrolled", never "attested".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from placement.document import MAX_INTEGER, DocumentError, Encodable, Fields, decode, encode
from placement.plan import NAME, REGION, Trust
from placement.verify import Claims, RegionSource
from security.attestation.evidence import REPORT_DATA_BYTES, Evidence
from security.errors import (
    EnrolmentExpired,
    EnrolmentsForOtherTemplate,
    EvidenceMalformed,
    EvidenceNotBound,
    EvidenceSignatureInvalid,
    MalformedInput,
    NodeNotEnrolled,
)
from security.signing import length_prefixed, load_key_file

KIND = "enrolled"
MAX_NODES = 4096
_DOMAIN = b"bulkhead/v1/enrolled-evidence"
_MAX_BODY_BYTES = 4096
_MAX_ENROLMENTS_BYTES = 2 << 20
_FORMAT = "bulkhead-enrolments-1"


@dataclass(frozen=True, slots=True)
class Enrolment:
    """One node that the owner trusts to be itself.

    Attributes:
        node: name of the node.
        key: its Ed25519 public key (32 bytes).
        region: where the owner says that it is; None if not said.
        expires_at: Unix time in seconds after which it is refused.
    """

    node: str
    key: bytes
    region: str | None
    expires_at: int


@dataclass(frozen=True, slots=True)
class Enrolments:
    """All enrolled nodes; the payload of a signed document of kind "enrolment"."""

    nodes: tuple[Enrolment, ...] = ()

    def find(self, node: str) -> Enrolment:
        """The enrolment of a node.

        Raises:
            NodeNotEnrolled: there is none.
        """
        for enrolment in self.nodes:
            if enrolment.node == node:
                return enrolment
        raise NodeNotEnrolled(
            f"node {node[:128]!r}: expected an enrolled node, found none of that name; enrol its "
            "key and install the documents again"
        )

    def to_bytes(self, template_digest: str) -> bytes:
        """The canonical encoding, which is what gets signed.

        Args:
            template_digest: SHA-256 (hex) of the template that they are signed with. An older list,
                whose nodes may have been struck off since, does not fit a newer template.
        """
        nodes: list[Mapping[str, Encodable]] = [
            {
                "node": item.node,
                "key": item.key.hex(),
                "region": item.region,
                "expires_at": item.expires_at,
            }
            for item in self.nodes
        ]
        return encode({"format": _FORMAT, "template_digest": template_digest, "nodes": nodes})

    @classmethod
    def from_bytes(cls, data: bytes, template_digest: str) -> Enrolments:
        """Parses what `to_bytes` wrote for the same template.

        Raises:
            MalformedInput, EnrolmentsForOtherTemplate
        """
        try:
            reader = Fields.of(decode(data, _MAX_ENROLMENTS_BYTES), "enrolments")
            reader.text("format", 32, _FORMAT)
            found = reader.digest("template_digest")
            nodes = tuple(_read_enrolment(item) for item in reader.sections("nodes", MAX_NODES))
            reader.finish()
        except DocumentError as error:
            raise MalformedInput(str(error)) from None
        if found != template_digest:
            raise EnrolmentsForOtherTemplate(
                f"enrolments: expected a list signed with template {template_digest}, found "
                f"one for {found}; sign and install them together"
            )
        if len({item.node for item in nodes}) != len(nodes):
            raise MalformedInput("enrolments.nodes: expected each node once")
        return cls(nodes)


def _read_enrolment(reader: Fields) -> Enrolment:
    enrolment = Enrolment(
        node=reader.text("node", 128, NAME),
        key=reader.octets("key", 32),
        region=reader.optional_text("region", 64, REGION),
        expires_at=reader.integer("expires_at", 1, MAX_INTEGER),
    )
    reader.finish()
    return enrolment


class EnrolledCollector:
    """Signs with the node's key."""

    def __init__(self, node: str, key: Ed25519PrivateKey) -> None:
        self._node = node
        self._key = key

    @classmethod
    def from_file(cls, node: str, path: Path) -> EnrolledCollector:
        """Reads the node's key; raises KeyFileError."""
        return cls(node, load_key_file(path))

    @property
    def kind(self) -> str:
        """The kind of evidence."""
        return KIND

    def collect(self, report_data: bytes) -> Evidence:
        """Evidence over the report data (64 bytes)."""
        statement = encode({"node": self._node, "report_data": report_data.hex()})
        return Evidence(KIND, self._key.sign(length_prefixed([_DOMAIN, statement])) + statement)


def appraise_enrolled(
    evidence: Evidence, report_data: bytes, enrolments: Enrolments, now: int
) -> Claims:
    """Checks that an enrolled node signed the report data.

    Args:
        evidence: what the shard sent.
        report_data: the 64 bytes that it must be over.
        enrolments: the owner's signed list.
        now: Unix time in seconds.

    Raises:
        EvidenceMalformed, NodeNotEnrolled, EnrolmentExpired, EvidenceSignatureInvalid,
        EvidenceNotBound
    """
    if not 64 < len(evidence.body) <= _MAX_BODY_BYTES:
        raise EvidenceMalformed(
            f"enrolled evidence: expected 65 to {_MAX_BODY_BYTES} bytes, found {len(evidence.body)}"
        )
    signature, statement = evidence.body[:64], evidence.body[64:]
    try:
        reader = Fields.of(decode(statement, _MAX_BODY_BYTES), "enrolled evidence")
        node = reader.text("node", 128, NAME)
        found = reader.octets("report_data", REPORT_DATA_BYTES)
        reader.finish()
    except DocumentError as error:
        raise EvidenceMalformed(str(error)) from None
    enrolment = enrolments.find(node)
    if now >= enrolment.expires_at:
        raise EnrolmentExpired(
            f"node {node!r}: expected an enrolment valid at {now}, found one that expired at "
            f"{enrolment.expires_at}; sign a new one"
        )
    try:
        Ed25519PublicKey.from_public_bytes(enrolment.key).verify(
            signature, length_prefixed([_DOMAIN, statement])
        )
    except (InvalidSignature, ValueError):
        raise EvidenceSignatureInvalid(
            f"node {node!r}: expected a signature by its enrolled key, found another"
        ) from None
    if found != report_data:
        raise EvidenceNotBound(
            f"enrolled evidence: expected report data {report_data.hex()[:16]}..., found "
            f"{found.hex()[:16]}...; it was made for another nonce, key, role, instance, cluster, "
            "broker, policy or model"
        )
    return Claims(
        kind=KIND,
        trust=Trust.ENROLLED,
        node=node,
        product="",
        measurement="",
        region=enrolment.region,
        region_source=RegionSource.DECLARED,
        hardened=False,
        simulated=False,
    )
