"""The simulated TEE: the whole protocol, with no protection at all.

Its root key is derived from a seed printed below, so anybody can make such evidence on any
machine. It exists to run and test everything around attestation. A policy accepts it only by
naming both the kind "simulated" and the weakness "simulated_tee".
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from placement.document import DocumentError, Fields, decode, encode
from placement.plan import NAME, REGION, Trust
from placement.verify import Claims, RegionSource
from security.attestation.evidence import REPORT_DATA_BYTES, Evidence
from security.errors import EvidenceMalformed, EvidenceNotBound, EvidenceSignatureInvalid
from security.signing import length_prefixed, public_bytes

KIND = "simulated"
PRODUCT = "simulated"
_SEED = hashlib.sha256(b"bulkhead simulated TEE root: public, protects nothing").digest()
_ROOT = Ed25519PrivateKey.from_private_bytes(_SEED)
_ROOT_PUBLIC = Ed25519PublicKey.from_public_bytes(public_bytes(_ROOT))
_DOMAIN = b"bulkhead/v1/simulated-evidence"
_MAX_BODY_BYTES = 4096

MEASUREMENT = hashlib.sha384(b"bulkhead simulated image").hexdigest()
"""What simulated evidence says is running, unless told otherwise."""


@dataclass(frozen=True, slots=True)
class SimulatedCollector:
    """Makes simulated evidence.

    Attributes:
        node: name of this node, as declared.
        region: region of this node, as declared; None if nobody said.
        measurement: what the evidence says is running (hex).
    """

    node: str
    region: str | None = None
    measurement: str = MEASUREMENT

    @property
    def kind(self) -> str:
        """The kind of evidence."""
        return KIND

    def collect(self, report_data: bytes) -> Evidence:
        """Evidence over the report data (64 bytes)."""
        statement = encode(
            {
                "report_data": report_data.hex(),
                "node": self.node,
                "product": PRODUCT,
                "measurement": self.measurement,
                "region": self.region,
            }
        )
        signature = _ROOT.sign(length_prefixed([_DOMAIN, statement]))
        return Evidence(KIND, signature + statement)


def appraise_simulated(evidence: Evidence, report_data: bytes) -> Claims:
    """Checks simulated evidence as if it meant something.

    Raises:
        EvidenceMalformed, EvidenceSignatureInvalid, EvidenceNotBound
    """
    if not 64 < len(evidence.body) <= _MAX_BODY_BYTES:
        raise EvidenceMalformed(
            f"simulated evidence: expected 65 to {_MAX_BODY_BYTES} bytes, found "
            f"{len(evidence.body)}"
        )
    signature, statement = evidence.body[:64], evidence.body[64:]
    try:
        _ROOT_PUBLIC.verify(signature, length_prefixed([_DOMAIN, statement]))
    except InvalidSignature:
        raise EvidenceSignatureInvalid(
            "simulated evidence: expected a signature by the simulated root, found another"
        ) from None
    try:
        reader = Fields.of(decode(statement, _MAX_BODY_BYTES), "simulated evidence")
        found = reader.octets("report_data", REPORT_DATA_BYTES)
        claims = Claims(
            kind=KIND,
            trust=Trust.ATTESTED,
            node=reader.text("node", 128, NAME),
            product=reader.text("product", 64),
            measurement=reader.text("measurement", 128, "[0-9a-f]*"),
            region=reader.optional_text("region", 64, REGION),
            region_source=RegionSource.DECLARED,
            hardened=False,
            simulated=True,
        )
        reader.finish()
    except DocumentError as error:
        raise EvidenceMalformed(str(error)) from None
    if found != report_data:
        raise EvidenceNotBound(
            f"simulated evidence: expected report data {report_data.hex()[:16]}..., found "
            f"{found.hex()[:16]}...; it was made for another nonce, key, role, instance, cluster, "
            "broker, policy or model"
        )
    return claims
