"""All that a shard does to be admitted: challenge, files, fresh key, evidence, admission."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from placement.plan import Trust
from security.attestation.collect import choose_collector, collect_devices
from security.attestation.evidence import gpu_nonce
from security.broker.challenge import Challenge
from security.broker.client import FIRST_BACKOFF_S, LONGEST_BACKOFF_S, BrokerClient
from security.broker.membership import Membership
from security.errors import BrokerUnreachable, MembershipLost, UnknownRole
from security.manifest import observe_manifest

log = logging.getLogger("bulkhead.broker")

REACH_TIMEOUT_S = 60.0
"""How long `request_admission` waits for a broker that does not answer."""


@dataclass(frozen=True, slots=True)
class _Candidate:
    """Everything that a shard needs to prove itself, more than once if necessary."""

    client: BrokerClient
    instance: str
    role: str
    node: str
    region: str | None
    model_dir: Path
    link_address: str
    ingress_address: str
    node_key_path: Path | None
    key: X25519PrivateKey

    def prove(self, challenge: Challenge) -> bytes:
        """Checks the model's files, gathers evidence, is admitted; returns the member secret."""
        role = next((item for item in challenge.template.roles if item.name == self.role), None)
        if role is None:
            raise UnknownRole(f"role {self.role!r}: expected one of the signed template's roles")
        observed, notes = observe_manifest(self.model_dir, challenge.manifest)
        for note in notes:
            log.error("model file differs from the signed manifest: %s", note)
        shard_key = self.key.public_key().public_bytes_raw()
        collector = choose_collector(role.evidence, self.node, self.region, self.node_key_path)
        devices = b""
        if role.trust is Trust.ATTESTED and challenge.policy.demanded_devices():
            # The devices answer first: the machine's evidence is bound to what they say.
            devices = collect_devices(
                challenge.policy.demanded_devices(), gpu_nonce(challenge.nonce)
            )
        binding = challenge.binding(shard_key, observed, devices)
        evidence = collector.collect(binding.report_data())
        return self.client.admit(
            challenge,
            self.key,
            link_address=self.link_address,
            ingress_address=self.ingress_address,
            evidence=evidence,
            observed_manifest_digest=observed,
            notes=notes,
            device_evidence=devices,
            region=self.region,
        )

    def prove_again(self, template_digest: str) -> bytes:
        """Like `prove`, with a new challenge, for the same plan only."""
        challenge = self.client.challenge(self.instance, self.role)
        if challenge.template_digest != template_digest:
            raise MembershipLost(
                f"{self.role}: expected template {template_digest}, found "
                f"{challenge.template_digest}; the owner installed another plan, start again"
            )
        return self.prove(challenge)


def request_admission(
    broker_address: str,
    owner_public: bytes,
    *,
    instance: str,
    role: str,
    node: str,
    model_dir: Path,
    link_address: str,
    ingress_address: str = "",
    node_key_path: Path | None = None,
    region: str | None = None,
) -> tuple[Challenge, Membership, X25519PrivateKey]:
    """All that a shard does to be admitted: challenge, files, fresh key, evidence, admission.

    Args:
        broker_address: "host:port" of the broker.
        owner_public: the owner's key (32 bytes).
        instance: pipeline instance.
        role: role in the plan template.
        node: name of this node, as evidence will state it.
        model_dir: the model's directory on this machine.
        link_address: "host:port" where peers connect.
        ingress_address: "host:port" where requests come in; "" except for the first stage.
        node_key_path: key file of an enrolled node, if this is one.
        region: declared region of this node, if known.

    Returns:
        The verified challenge, the membership (close it) and the shard's private key.

    Raises:
        AdmissionRefused: the broker refused; not tried again.
        BrokerUnreachable: no answer within `REACH_TIMEOUT_S`.
        SecurityError: the broker's documents are not this owner's; no evidence can be made.
    """
    client = BrokerClient(broker_address, owner_public)
    candidate = _Candidate(
        client=client,
        instance=instance,
        role=role,
        node=node,
        region=region,
        model_dir=model_dir,
        link_address=link_address,
        ingress_address=ingress_address,
        node_key_path=node_key_path,
        key=X25519PrivateKey.generate(),
    )
    deadline = time.monotonic() + REACH_TIMEOUT_S
    backoff = FIRST_BACKOFF_S
    try:
        while True:
            try:
                # A nonce is spent by an attempt, so each attempt starts with a new challenge.
                challenge = client.challenge(instance, role)
                secret = candidate.prove(challenge)
                break
            except BrokerUnreachable as error:
                if time.monotonic() + backoff > deadline:
                    raise
                log.warning("asking for admission: %s", error)
                time.sleep(backoff)
                backoff = min(2 * backoff, LONGEST_BACKOFF_S)
    except BaseException:
        client.close()
        raise
    membership = Membership(
        client,
        challenge,
        candidate.key,
        secret,
        readmit=lambda: candidate.prove_again(challenge.template_digest),
    )
    return challenge, membership, candidate.key
