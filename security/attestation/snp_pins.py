"""What a policy asks of a SEV-SNP attestation report: pins, least versions, revoked identities.

What names the machine: under a VCEK the chip, by the certificate's hwID even where the host masks
CHIP_ID, because a VCEK is derived from the chip's own secret. Under a VLEK the key belongs to a
cloud provider and is the same on many machines; CHIP_ID names the chip where the host does not mask
it. Where it does, nothing tells one machine of the provider from another: `csp_id` pins the
provider, and a policy must leave `chip_id` open by name to take that.
"""

from __future__ import annotations

from collections.abc import Callable

from security.attestation.errors import (
    PinMissing,
    PinRefused,
    RevokedIdentity,
    SnpMigrationAgentAllowed,
    SnpTcbTooLow,
)
from security.attestation.snp_report import SigningKey, TcbVersion
from security.attestation.snp_rules import (
    KDS_SOURCE,
    POLICY_SOURCE,
    REPORT_SOURCE,
    Appraisal,
    SnpRule,
)

__all__ = ["PIN_RULES"]


def _migration_agent(subject: Appraisal) -> None:
    expected, report = subject.expected, subject.report
    if expected is None or expected.requirements.opens("migration_agent"):
        return
    if report.policy.migrate_ma:
        raise SnpMigrationAgentAllowed("POLICY.MIGRATE_MA", "0", "1")
    if report.report_id_ma not in (b"\xff" * 32, bytes(32)):
        raise SnpMigrationAgentAllowed(
            "REPORT_ID_MA", "none", f"agent {report.report_id_ma[:8].hex()}..."
        )


def _least(subject: Appraisal, name: str, octets: bytes) -> None:
    expected, product = subject.expected, subject.product
    if expected is None or expected.requirements.opens("minimum_tcb"):
        return
    if product is None:
        raise SnpTcbTooLow(name, "a version of a known product", octets.hex())
    version = TcbVersion.of(octets, product)
    least = expected.requirements.minimum_tcb.get(product.value)
    if least is None:
        raise PinMissing(
            "minimum_tcb",
            f"requirements.{expected.kind}.minimum_tcb.{product.value}, or minimum_tcb under open",
            f"neither; {name} is {version}",
        )
    found = version.parts()
    low = [part for part, number in least.items() if found.get(part, -1) < number]
    if low:
        wanted = ", ".join(f"{part} {least[part]}" for part in low)
        raise SnpTcbTooLow(name, f"at least {wanted}", str(version))


def _least_reported(subject: Appraisal) -> None:
    _least(subject, "REPORTED_TCB", subject.report.reported_tcb)


def _least_launch(subject: Appraisal) -> None:
    _least(subject, "LAUNCH_TCB", subject.report.launch_tcb)


def _not_revoked(subject: Appraisal) -> None:
    expected, endorsement = subject.expected, subject.endorsement
    if expected is None:
        return
    if subject.identity:
        expected.refuse_revoked("CHIP_ID", subject.identity)
    if not subject.identity and any(len(text) == 128 for text in expected.requirements.revoked):
        # A revoked machine would only have to mask its chip.
        raise RevokedIdentity("CHIP_ID", "one that is told, since the policy revokes some", "none")
    if not subject.report.chip_id_masked:
        expected.refuse_revoked("CHIP_ID", subject.report.chip_id.hex())
    if subject.chain is None or endorsement is None:
        return
    if endorsement.hwid:
        expected.refuse_revoked("hwID", endorsement.hwid.hex())
    for role, certificate in subject.chain.certificates:
        expected.refuse_revoked(f"{role} certificate, SHA-256", certificate.fingerprint)


def _measurement(subject: Appraisal) -> None:
    if subject.expected is not None:
        subject.expected.require_measurement("MEASUREMENT", subject.report.measurement.hex())


def _pin(name: str, found: Callable[[Appraisal], str]) -> Callable[[Appraisal], None]:
    def holds(subject: Appraisal) -> None:
        if subject.expected is not None:
            subject.expected.require_pin(name, found(subject))

    return holds


def _csp_id(subject: Appraisal) -> None:
    expected, endorsement = subject.expected, subject.endorsement
    if expected is None or endorsement is None:
        return
    if endorsement.signing_key is SigningKey.VLEK:
        expected.require_pin("csp_id", endorsement.csp_id)
    elif "csp_id" in expected.requirements.pins and expected.requirements.opens("chip_id"):
        raise PinRefused(
            "csp_id",
            "a VLEK's provider, or a pinned chip_id",
            "a VCEK, which names no provider, and chip_id left open",
        )


PIN_RULES: tuple[SnpRule, ...] = (
    SnpRule("snp.measurement", REPORT_SOURCE + "MEASUREMENT", _measurement),
    SnpRule("snp.policy.migration_agent", POLICY_SOURCE + "MIGRATE_MA (bit 18)", _migration_agent),
    SnpRule("snp.tcb.minimum", REPORT_SOURCE + "REPORTED_TCB", _least_reported),
    SnpRule("snp.tcb.minimum_launch", REPORT_SOURCE + "LAUNCH_TCB", _least_launch),
    SnpRule("snp.revoked_identity", REPORT_SOURCE + "CHIP_ID; 57230, hwID", _not_revoked),
    SnpRule(
        "snp.pin.product",
        REPORT_SOURCE + "CPUID_FAM_ID; 57230, productName",
        _pin("product", lambda subject: subject.product.value if subject.product else ""),
    ),
    SnpRule(
        "snp.pin.signing_key",
        REPORT_SOURCE + "SIGNING_KEY",
        _pin("signing_key", lambda subject: subject.report.key_info.signing_key.name),
    ),
    SnpRule(
        "snp.pin.vmpl",
        REPORT_SOURCE + "VMPL",
        _pin("vmpl", lambda subject: str(subject.report.vmpl)),
    ),
    SnpRule(
        "snp.pin.host_data",
        REPORT_SOURCE + "HOST_DATA",
        _pin("host_data", lambda subject: subject.report.host_data.hex()),
    ),
    SnpRule(
        "snp.pin.id_key_digest",
        REPORT_SOURCE + "ID_KEY_DIGEST",
        _pin("id_key_digest", lambda subject: subject.report.id_key_digest.hex()),
    ),
    SnpRule(
        "snp.pin.author_key_digest",
        REPORT_SOURCE + "AUTHOR_KEY_DIGEST",
        _pin("author_key_digest", lambda subject: subject.report.author_key_digest.hex()),
    ),
    SnpRule(
        "snp.pin.family_id",
        REPORT_SOURCE + "FAMILY_ID",
        _pin("family_id", lambda subject: subject.report.family_id.hex()),
    ),
    SnpRule(
        "snp.pin.image_id",
        REPORT_SOURCE + "IMAGE_ID",
        _pin("image_id", lambda subject: subject.report.image_id.hex()),
    ),
    SnpRule(
        "snp.pin.chip_id",
        REPORT_SOURCE + "CHIP_ID; 57230, hwID",
        _pin("chip_id", lambda subject: subject.identity),
    ),
    SnpRule("snp.pin.csp_id", KDS_SOURCE + "csp_id", _csp_id),
)
"""Asked where there is a policy."""
