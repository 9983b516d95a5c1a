"""What a shard answers: the broker's nonce, with the owner's documents."""

from __future__ import annotations

from dataclasses import dataclass

from placement.plan import PlanTemplate
from placement.policy import Policy
from security.attestation.evidence import Binding, evidence_digest
from security.manifest import Manifest


@dataclass(frozen=True, slots=True)
class Challenge:
    """A nonce, and the owner's documents after they were verified.

    Attributes:
        instance, role: what was asked for.
        nonce: 32 bytes, for one admission within a minute.
        policy, template, manifest: the owner's documents.
        policy_digest, template_digest, manifest_digest: SHA-256 (hex) of what was signed.
        broker_key: the broker's Ed25519 public key (32 bytes), certified by the owner.
    """

    instance: str
    role: str
    nonce: bytes
    policy: Policy
    policy_digest: str
    template: PlanTemplate
    template_digest: str
    manifest: Manifest
    manifest_digest: str
    broker_key: bytes

    def binding(
        self, shard_key: bytes, observed_manifest_digest: str, device_evidence: bytes = b""
    ) -> Binding:
        """What evidence for this challenge must be bound to.

        Args:
            shard_key: X25519 public key of the shard (32 bytes).
            observed_manifest_digest: first result of `security.manifest.observe_manifest`.
            device_evidence: of the machine's devices, over `gpu_nonce(nonce)`; b"" for none.
        """
        return Binding(
            nonce=self.nonce,
            shard_key=shard_key,
            role=self.role,
            cluster=self.template.cluster,
            instance=self.instance,
            broker_key=self.broker_key,
            policy_digest=self.policy_digest,
            manifest_digest=observed_manifest_digest,
            gpu_evidence_digest=evidence_digest(device_evidence),
        )
