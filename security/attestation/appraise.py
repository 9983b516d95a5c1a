"""Appraisal: evidence, the data that it must be over, policy and time go in; claims come out.

The table of kinds is closed, and a kind that role or policy do not name is refused before a byte
of it is parsed.
"""

from __future__ import annotations

from placement.plan import RoleTemplate
from placement.policy import Policy
from placement.verify import Claims
from security.attestation import enrolled, simulated
from security.attestation.enrolled import Enrolments, appraise_enrolled
from security.attestation.evidence import MAX_EVIDENCE_BYTES, Evidence
from security.attestation.simulated import appraise_simulated
from security.errors import EvidenceKindRefused, EvidenceKindUnsupported, EvidenceMalformed


def appraise(
    evidence: Evidence,
    report_data: bytes,
    role: RoleTemplate,
    policy: Policy,
    *,
    enrolments: Enrolments,
    now: int,
) -> Claims:
    """Verifies evidence.

    Args:
        evidence: what the shard sent.
        report_data: the 64 bytes that it must be over.
        role: the role that the shard asks for.
        policy: the owner's policy.
        enrolments: nodes that the owner enrolled.
        now: Unix time in seconds.

    Returns:
        What the evidence proves. Whether that is enough is for `placement.verify.verify_claims`.

    Raises:
        AppraisalError: one of its kinds, by the first check that fails.
    """
    allowed = set(role.evidence) & set(policy.evidence_for(role.trust))
    if evidence.kind not in allowed:
        raise EvidenceKindRefused(
            f"evidence: expected a kind of {', '.join(sorted(allowed)) or 'none'}, as role and "
            f"policy accept, found {evidence.kind[:64]!r}"
        )
    if len(evidence.body) > MAX_EVIDENCE_BYTES:
        raise EvidenceMalformed(
            f"evidence: expected at most {MAX_EVIDENCE_BYTES} bytes, found {len(evidence.body)}"
        )
    if evidence.kind == simulated.KIND:
        return appraise_simulated(evidence, report_data)
    if evidence.kind == enrolled.KIND:
        return appraise_enrolled(evidence, report_data, enrolments, now)
    raise EvidenceKindUnsupported(
        f"evidence: expected a kind that this version verifies "
        f"({enrolled.KIND}, {simulated.KIND}), found {evidence.kind[:64]!r}"
    )
