"""Evidence, and what it must be bound to.

Whatever the platform, its signed statement carries 64 bytes of the caller's choice (REPORTDATA of
SEV-SNP and TDX). They are the SHA-512 of everything the evidence must speak for, each field
preceded by its length: evidence for another key, role, cluster, broker, policy, model or nonce has
other bytes there. The epoch is left out on purpose: a restarted neighbour must not force everyone
to attest again.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from security.signing import length_prefixed

MAX_EVIDENCE_BYTES = 1 << 20
REPORT_DATA_BYTES = 64
_DOMAIN = b"bulkhead/v1/report-data"


@dataclass(frozen=True, slots=True)
class Evidence:
    """One platform's statement.

    Attributes:
        kind: names the format and so the verifier, e.g. "simulated" or "enrolled".
        body: the statement, at most `MAX_EVIDENCE_BYTES`.
    """

    kind: str
    body: bytes


@dataclass(frozen=True, slots=True)
class Binding:
    """What evidence is bound to.

    Attributes:
        nonce: the broker's challenge (32 bytes).
        shard_key: X25519 public key that the shard made for this admission (32 bytes).
        role: role in the plan template.
        cluster: cluster in the plan template.
        instance: pipeline instance.
        broker_key: Ed25519 public key of the broker (32 bytes).
        policy_digest: SHA-256 (hex) of the policy that the shard was given.
        manifest_digest: SHA-256 (hex) of the manifest that the shard *observed*.
        gpu_evidence_digest: SHA-256 (hex) of the GPU's evidence, empty where there is none.
    """

    nonce: bytes
    shard_key: bytes
    role: str
    cluster: str
    instance: str
    broker_key: bytes
    policy_digest: str
    manifest_digest: str
    gpu_evidence_digest: str = ""

    def report_data(self) -> bytes:
        """The 64 bytes that the platform signs."""
        return hashlib.sha512(
            length_prefixed(
                [
                    _DOMAIN,
                    self.nonce,
                    self.shard_key,
                    self.role.encode(),
                    self.cluster.encode(),
                    self.instance.encode(),
                    self.broker_key,
                    self.policy_digest.encode(),
                    self.manifest_digest.encode(),
                    self.gpu_evidence_digest.encode(),
                ]
            )
        ).digest()
