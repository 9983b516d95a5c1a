"""Judges everything that was found together: a machine, its devices, and the policy over both."""

from __future__ import annotations

from dataclasses import dataclass, replace

from placement.policy import MACHINE_EVIDENCE, Policy
from security.attestation.appraise import DEVICE_VERIFIERS, MACHINE_VERIFIERS
from security.attestation.errors import DeviceEvidenceMissing, MachineEvidenceMissing
from security.attestation.evidence import composite_report_data, encode_parts, gpu_nonce
from security.attestation.evidence_directory import EvidenceFiles
from security.attestation.nras import verify_nras
from security.attestation.sev_snp import verify_endorsement
from security.attestation.verdict import Check, Expectations, FunctionRule, Verdict, judge
from security.errors import AppraisalError, EvidenceKindRefused

__all__ = ["POLICY_RULES", "Found", "judge_evidence"]

_NVIDIA = "nvidia"
_PARSE = "evidence.parse"
_PARSE_SOURCE = "the kind's own format; see the parser named in the reason"


@dataclass(frozen=True, slots=True)
class Found:
    """What there is, and what the policy asks for.

    Attributes:
        kind: kind of the machine's evidence, or "".
        devices: kinds of device evidence.
        policy: the owner's policy.
    """

    kind: str
    devices: tuple[str, ...]
    policy: Policy


def _kinds(subject: Found) -> None:
    for kind in (subject.kind, *subject.devices):
        if kind and kind not in subject.policy.evidence:
            raise EvidenceKindRefused(
                f"evidence: expected a kind of {', '.join(subject.policy.evidence) or 'none'}, "
                f"as the policy lists, found {kind}"
            )


def _machine(subject: Found) -> None:
    kinds = [kind for kind in subject.policy.evidence if kind in MACHINE_EVIDENCE]
    if kinds and subject.kind not in MACHINE_EVIDENCE:
        raise MachineEvidenceMissing("evidence", f"a machine's ({' or '.join(kinds)})", "none")


def _devices(subject: Found) -> None:
    for kind in subject.policy.demanded_devices():
        if kind not in subject.devices:
            raise DeviceEvidenceMissing("evidence", f"that of devices ({kind}) too", "none")


_POLICY = "Bulkhead policy, evidence"

POLICY_RULES: tuple[FunctionRule[Found], ...] = (
    FunctionRule("policy.kind", _POLICY, _kinds),
    FunctionRule("policy.machine", f"{_POLICY} (kinds that speak for a machine)", _machine),
    FunctionRule("policy.devices", f"{_POLICY} (kinds that speak for a device)", _devices),
)
"""Rules about what there is at all."""


def judge_evidence(
    files: EvidenceFiles, policy: Policy | None, now: int, nonce: bytes | None
) -> Verdict:
    """One verdict on all that was found.

    With a nonce, a machine alone must carry it, a device alone must answer it; of a machine with
    devices the devices answer `gpu_nonce(nonce)` and the machine carries
    `composite_report_data(nonce, devices)`, so that neither can be taken from elsewhere.

    Args:
        files: what was read.
        policy: the owner's policy; None to judge soundness only.
        now: Unix time in seconds.
        nonce: the challenge; None where it is not known, and freshness with it.

    Returns:
        the machine's verdict with the devices' in it, or the devices' where there is no machine.
    """
    machine_bound, device_bound = _challenges(files, nonce)
    devices: list[Verdict] = []
    if files.devices or _NVIDIA in files.malformed:
        devices.append(_judge_devices(files, policy, now, device_bound))
    if files.tokens:
        devices.append(_judge_tokens(files, policy, now, device_bound))
    if files.kind:
        verdict = _judge_machine(files, policy, now, machine_bound)
        verdict = replace(verdict, devices=verdict.devices + tuple(devices))
    elif files.endorsement:
        verdict = _judge_endorsement(files, now)
    elif len(devices) == 1:
        verdict = devices[0]
    else:
        verdict = Verdict("devices", "", "", "", devices=tuple(devices))
    notes = verdict.notes + files.notes
    if files.kind and files.tokens:
        notes += ("a token of NRAS is bound to no machine: it does not count as this one's",)
    checks = verdict.checks
    if policy is not None:
        # Tokens speak for devices that the policy names by the kind of their own evidence; but not
        # beside a machine, since nothing binds a token to the machine that shows it.
        alone = not files.kind or files.devices or _NVIDIA in files.malformed
        kinds = (_NVIDIA,) if devices and alone else ()
        kind = verdict.kind if files.endorsement else files.kind
        checks = judge(POLICY_RULES, Found(kind, kinds, policy)) + checks
    return replace(verdict, checks=checks, notes=notes)


def _challenges(files: EvidenceFiles, nonce: bytes | None) -> tuple[bytes | None, bytes | None]:
    if nonce is None:
        return None, None
    if not (files.kind and files.devices):
        return nonce, nonce
    return composite_report_data(nonce, encode_parts(files.devices)), gpu_nonce(nonce)


def _judge_machine(
    files: EvidenceFiles, policy: Policy | None, now: int, bound_to: bytes | None
) -> Verdict:
    if files.kind in files.malformed:
        return _refused(files.kind, files.malformed[files.kind])
    expected = None if policy is None else Expectations.of(policy, files.kind)
    try:
        return MACHINE_VERIFIERS[files.kind](files.parts, files.collateral, expected, now, bound_to)
    except AppraisalError as error:
        return _refused(files.kind, error)


def _judge_devices(
    files: EvidenceFiles, policy: Policy | None, now: int, bound_to: bytes | None
) -> Verdict:
    if _NVIDIA in files.malformed:
        return _refused(_NVIDIA, files.malformed[_NVIDIA])
    expected = None if policy is None else Expectations.of(policy, _NVIDIA)
    try:
        return DEVICE_VERIFIERS[_NVIDIA](files.devices, files.collateral, expected, now, bound_to)
    except AppraisalError as error:
        return _refused(_NVIDIA, error)


def _judge_tokens(
    files: EvidenceFiles, policy: Policy | None, now: int, bound_to: bytes | None
) -> Verdict:
    expected = None if policy is None else Expectations.of(policy, _NVIDIA)
    try:
        return verify_nras(files.tokens, files.collateral, expected, now, bound_to)
    except AppraisalError as error:
        return _refused("nras", error)


def _judge_endorsement(files: EvidenceFiles, now: int) -> Verdict:
    try:
        return verify_endorsement(files.endorsement, files.collateral, now)
    except AppraisalError as error:
        return _refused("sev-snp-certificate", error)


def _refused(kind: str, error: AppraisalError) -> Verdict:
    """A verdict on what does not even parse."""
    return Verdict(kind, "", "", "", checks=(Check(_PARSE, _PARSE_SOURCE, error),))
