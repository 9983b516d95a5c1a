"""Appraisal: evidence, the data that it must be over, policy and time go in; claims come out.

The table of kinds is closed, and a kind that role or policy do not name is refused before a byte
of it is parsed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Protocol

from placement.plan import RoleTemplate, Trust
from placement.policy import Policy
from placement.verify import UNIDENTIFIED, Claims, RegionSource
from security.attestation import enrolled, simulated
from security.attestation.azure_vtpm import verify_azure_vtpm
from security.attestation.collateral import Collateral
from security.attestation.enrolled import Enrolments, appraise_enrolled
from security.attestation.errors import DeviceEvidenceMissing
from security.attestation.evidence import (
    MAX_EVIDENCE_BYTES,
    Evidence,
    decode_parts,
)
from security.attestation.nvidia import verify_nvidia
from security.attestation.sev_snp import verify_sev_snp
from security.attestation.simulated import appraise_simulated
from security.attestation.tdx import verify_tdx
from security.attestation.verdict import Expectations, Verdict
from security.errors import EvidenceKindRefused, EvidenceKindUnsupported, EvidenceMalformed

__all__ = ["DEVICE_VERIFIERS", "MACHINE_VERIFIERS", "Verifier", "appraise"]


class Verifier(Protocol):
    """A pure function that judges one kind of evidence."""

    def __call__(
        self,
        parts: Mapping[str, bytes],
        collateral: Collateral,
        expected: Expectations | None,
        now: int,
        bound_to: bytes | None,
    ) -> Verdict:
        """The verdict; raises EvidenceMalformed for what does not parse."""


MACHINE_VERIFIERS: Mapping[str, Verifier] = MappingProxyType(
    {"sev-snp": verify_sev_snp, "tdx": verify_tdx, "azure-vtpm": verify_azure_vtpm}
)
"""By kind of machine evidence."""

DEVICE_VERIFIERS: Mapping[str, Verifier] = MappingProxyType({"nvidia": verify_nvidia})
"""By kind of device evidence."""


def appraise(
    evidence: Evidence,
    report_data: bytes,
    role: RoleTemplate,
    policy: Policy,
    *,
    enrolments: Enrolments,
    now: int,
    collateral: Collateral | None = None,
    device_evidence: bytes = b"",
    device_nonce: bytes = b"",
    region: str | None = None,
) -> Claims:
    """Verifies evidence.

    Args:
        evidence: what the shard sent.
        report_data: the 64 bytes that it must be over.
        role: the role that the shard asks for.
        policy: the owner's policy.
        enrolments: nodes that the owner enrolled.
        now: Unix time in seconds.
        collateral: the vendors' documents; none if not given.
        device_evidence: parts of the devices' evidence, joined; b"" where there is none. That the
            machine's evidence is bound to them is for the caller, who knows the digest in
            `report_data`.
        device_nonce: the 32 bytes that the devices must have answered.
        region: where the machine says that it is, for kinds of evidence that say nothing of it.

    Returns:
        What the evidence proves. Whether that is enough is for `placement.verify.verify_claims`.

    Raises:
        AppraisalError: one of its kinds, by the first check that fails; notes name the others.
    """
    allowed = set(role.evidence) & set(policy.evidence_for(role.trust))
    if evidence.kind not in allowed:
        raise EvidenceKindRefused(
            f"evidence: expected a kind of {', '.join(sorted(allowed)) or 'none'}, as role and "
            f"policy accept, found {evidence.kind[:64]!r}"
        )
    for body in (evidence.body, device_evidence):
        if len(body) > MAX_EVIDENCE_BYTES:
            raise EvidenceMalformed(
                f"evidence: expected at most {MAX_EVIDENCE_BYTES} bytes, found {len(body)}"
            )
    known = collateral or Collateral()
    claims = _machine_claims(
        evidence=evidence,
        report_data=report_data,
        policy=policy,
        enrolments=enrolments,
        now=now,
        collateral=known,
        region=region,
    )
    devices = _appraise_devices(
        role=role,
        policy=policy,
        now=now,
        collateral=known,
        device_evidence=device_evidence,
        device_nonce=device_nonce,
    )
    return replace(claims, devices=devices)


def _machine_claims(
    *,
    evidence: Evidence,
    report_data: bytes,
    policy: Policy,
    enrolments: Enrolments,
    now: int,
    collateral: Collateral,
    region: str | None,
) -> Claims:
    if evidence.kind == simulated.KIND:
        return appraise_simulated(evidence, report_data)
    if evidence.kind == enrolled.KIND:
        return appraise_enrolled(evidence, report_data, enrolments, now)
    if evidence.kind not in MACHINE_VERIFIERS:
        known = sorted([enrolled.KIND, simulated.KIND, *MACHINE_VERIFIERS])
        raise EvidenceKindUnsupported(
            f"evidence: expected a kind that this version verifies ({', '.join(known)}), found "
            f"{evidence.kind[:64]!r}"
        )
    verdict = MACHINE_VERIFIERS[evidence.kind](
        decode_parts(evidence.body),
        collateral,
        _always_fresh(Expectations.of(policy, evidence.kind)),
        now,
        report_data,
    )
    verdict.require()
    return Claims(
        kind=evidence.kind,
        trust=Trust.ATTESTED,
        node=verdict.identity or UNIDENTIFIED,
        product=verdict.product,
        measurement=verdict.measurement,
        region=region,
        region_source=RegionSource.DECLARED,
        # Nothing in the evidence says yet that the image keeps Ray's user away from shards.
        hardened=False,
        simulated=False,
    )


def _always_fresh(expected: Expectations) -> Expectations:
    """The same with freshness closed: nobody is admitted on evidence for another challenge.

    `bulkhead attest check` can leave it open, to look at recorded evidence; here the challenge
    carries the shard's key, and a policy that opened it would admit anybody with a recording.
    """
    requirements = expected.requirements
    kept = tuple(name for name in requirements.open if name != "freshness")
    return replace(expected, requirements=replace(requirements, open=kept))


def _appraise_devices(
    *,
    role: RoleTemplate,
    policy: Policy,
    now: int,
    collateral: Collateral,
    device_evidence: bytes,
    device_nonce: bytes,
) -> tuple[str, ...]:
    """Kinds of device evidence that hold; raises for what is demanded and missing."""
    demanded = policy.demanded_devices()
    if not device_evidence:
        if demanded and role.trust is Trust.ATTESTED:
            raise DeviceEvidenceMissing(
                "device evidence", f"evidence of kind {', '.join(demanded)} too", "none"
            )
        return ()
    if not demanded:
        raise EvidenceKindRefused(
            "device evidence: expected none, as the policy lists no kind of it, found some"
        )
    parts = decode_parts(device_evidence)
    for kind in demanded:
        DEVICE_VERIFIERS[kind](
            parts, collateral, _always_fresh(Expectations.of(policy, kind)), now, device_nonce
        ).require()
    return demanded
