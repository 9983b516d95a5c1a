"""SEV-SNP evidence: an attestation report, judged by its certificates and by a policy.

`verify_sev_snp` judges evidence of kind "sev-snp". `judge_report` is for kinds that carry a report
inside something else (Azure's vTPM) and have a rule of their own for REPORT_DATA.
`verify_endorsement` judges a VCEK or VLEK certificate alone, which proves no machine.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from security.attestation.certificates import read_certificate
from security.attestation.collateral import Collateral
from security.attestation.errors import (
    FreshnessUnproven,
    SnpBindingTooLong,
    SnpEndorsementMalformed,
    SnpReportMalformed,
)
from security.attestation.evidence import REPORT_DATA_BYTES
from security.attestation.snp_certificate_table import parse_certificate_table
from security.attestation.snp_certificates import (
    Chain,
    Revocation,
    build_chain,
    choose_chain,
    read_candidates,
    read_revocation_lists,
)
from security.attestation.snp_endorsement import read_endorsement
from security.attestation.snp_fields import chain_fields, report_fields
from security.attestation.snp_pins import PIN_RULES
from security.attestation.snp_report import (
    AttestationReport,
    Product,
    SigningKey,
    parse_report,
)
from security.attestation.snp_rules import (
    CHAIN_RULES,
    ENDORSEMENT_RULES,
    REPORT_RULES,
    REVOCATION_RULE,
    Appraisal,
    roots_for,
)
from security.attestation.verdict import Check, Expectations, Verdict, judge
from security.errors import AppraisalError, EvidenceNotBound

__all__ = [
    "CERTIFICATES_PART",
    "KIND",
    "REPORT_PART",
    "ReportDataRule",
    "ReportJudgement",
    "judge_report",
    "verify_endorsement",
    "verify_sev_snp",
]

KIND = "sev-snp"
ENDORSEMENT_KIND = "sev-snp-certificate"
REPORT_PART = "report"
CERTIFICATES_PART = "certificates"


@dataclass(frozen=True, slots=True)
class ReportJudgement:
    """What came of a report.

    Attributes:
        report: as read.
        product: product line by AMD's name; "" where nothing says it.
        identity: CHIP_ID (hex) of the chip that signed; "" where nothing tells it.
        fields: what report and certificate say, by AMD's names.
        checks: every rule that was asked, in order; none is about REPORT_DATA.
        notes: what was not judged, or was ignored, and why.
    """

    report: AttestationReport
    product: str
    identity: str
    fields: Mapping[str, str]
    checks: tuple[Check, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ReportDataRule:
    """REPORT_DATA is what the evidence must be bound to, with zeros after it.

    Attributes:
        bound_to: 1 to 64 bytes; None where nothing is known that it could be bound to.
    """

    bound_to: bytes | None
    name: str = "snp.report_data"
    source: str = "AMD 56860, section 7.3, ATTESTATION_REPORT structure, REPORT_DATA"

    def check(self, subject: AttestationReport) -> None:
        """Returns nothing.

        Raises:
            FreshnessUnproven, SnpBindingTooLong, EvidenceNotBound
        """
        if not self.bound_to:
            raise FreshnessUnproven(
                "REPORT_DATA",
                "a challenge to compare it with, or freshness under open",
                "neither",
            )
        if len(self.bound_to) > REPORT_DATA_BYTES:
            raise SnpBindingTooLong(
                "REPORT_DATA", f"at most {REPORT_DATA_BYTES} bytes", f"{len(self.bound_to)} bytes"
            )
        expected = self.bound_to.ljust(REPORT_DATA_BYTES, bytes(1))
        if subject.report_data != expected:
            raise EvidenceNotBound(
                f"REPORT_DATA: expected {expected.hex()[:16]}..., found "
                f"{subject.report_data.hex()[:16]}...; it was made for another challenge or key"
            )


def verify_sev_snp(
    parts: Mapping[str, bytes],
    collateral: Collateral,
    expected: Expectations | None,
    now: int,
    bound_to: bytes | None,
) -> Verdict:
    """Judges evidence of a SEV-SNP guest.

    Args:
        parts: "report": ATTESTATION_REPORT (1184 bytes); "certificates", if any: the certificate
            table of the extended guest request, which is the auxblob of configfs-tsm.
        collateral: certificates and revocation lists of AMD.
        expected: what the policy says; None where only soundness is judged.
        now: Unix time in seconds.
        bound_to: what REPORT_DATA must begin with, zeros after it (1 to 64 bytes); None where
            nothing is known.

    Raises:
        EvidenceMalformed: by its subclasses, report or certificate table cannot be read.
    """
    if REPORT_PART not in parts:
        raise SnpReportMalformed(f"evidence: expected a part {REPORT_PART!r}, found none")
    notes = [
        f"part {name!r} was not looked at"
        for name in sorted(parts)
        if name not in (REPORT_PART, CERTIFICATES_PART)
    ]
    table = parse_certificate_table(parts.get(CERTIFICATES_PART, b""))
    judgement = judge_report(
        parts[REPORT_PART], [der for _, der in table], collateral, expected, now
    )
    checks = judgement.checks
    if expected is not None and expected.requirements.opens("freshness"):
        notes.append("freshness is open: REPORT_DATA was not compared with a challenge")
    elif expected is None and bound_to is None:
        notes.append("no challenge was given: REPORT_DATA was not compared")
    else:
        checks += judge([ReportDataRule(bound_to)], judgement.report)
    return Verdict(
        kind=KIND,
        product=judgement.product,
        measurement=judgement.report.measurement.hex(),
        identity=judgement.identity,
        fields=judgement.fields,
        checks=checks,
        notes=(*notes, *judgement.notes),
    )


def judge_report(
    report: bytes,
    certificates: Iterable[bytes],
    collateral: Collateral,
    expected: Expectations | None,
    now: int,
) -> ReportJudgement:
    """Judges a report by everything but REPORT_DATA, which is left to the caller.

    Args:
        report: ATTESTATION_REPORT (1184 bytes).
        certificates: certificates in DER that came with it; nothing is trusted.
        collateral: certificates and revocation lists of AMD.
        expected: what the policy says of this kind, whose pins include those of "sev-snp"; None
            where only soundness is judged.
        now: Unix time in seconds.

    Raises:
        EvidenceMalformed: by its subclasses, the report cannot be read.
    """
    parsed = parse_report(report)
    candidates, unread = read_candidates((*certificates, *collateral.certificates))
    lists, unread_lists = read_revocation_lists(collateral.crls)
    roots = {product: roots_for(product, expected) for product in Product}
    found = choose_chain(parsed, candidates, roots, lists, now)
    chain = found if isinstance(found, Chain) else None
    product = parsed.product
    if product is None and chain is not None:
        product = chain.endorsement.product
    subject = Appraisal(
        report=parsed,
        product=product,
        chain=chain,
        unreadable=found if isinstance(found, SnpEndorsementMalformed) else None,
        revocation=Revocation((), None, None)
        if chain is None
        else Revocation.of(chain, lists, now),
        expected=expected,
        now=now,
    )
    checks = judge(ENDORSEMENT_RULES, subject)
    checks += judge(CHAIN_RULES, subject)
    if _asks_revocation(expected):
        checks += judge([REVOCATION_RULE], subject)
    checks += judge(REPORT_RULES, subject)
    if expected is not None:
        checks += judge(PIN_RULES, subject)
    return ReportJudgement(
        report=parsed,
        product="" if product is None else product.value,
        identity=subject.identity,
        fields=report_fields(parsed, product) | ({} if chain is None else chain_fields(chain)),
        checks=checks,
        notes=(*_notes(subject), *_unread_notes(unread, unread_lists)),
    )


def verify_endorsement(
    certificate: bytes, collateral: Collateral, now: int, roots: Iterable[str] = ()
) -> Verdict:
    """Judges a VCEK or VLEK certificate and the chain above it, without a report.

    The verdict's kind is "sev-snp-certificate": it says that AMD issued the certificate, and
    nothing about a machine.

    Args:
        certificate: VCEK or VLEK in DER.
        collateral: certificates and revocation lists of AMD.
        now: Unix time in seconds.
        roots: SHA-256 (hex) of roots that count instead of AMD's.

    Raises:
        CertificateMalformed: it is not a certificate.
        SnpEndorsementMalformed: it is not a VCEK or VLEK.
    """
    endorsement = read_endorsement(read_certificate(certificate))
    candidates, unread = read_candidates(collateral.certificates)
    lists, unread_lists = read_revocation_lists(collateral.crls)
    trusted = frozenset(roots) or roots_for(endorsement.product, None)
    chain = build_chain(endorsement, candidates, trusted, lists, now)
    revocation = Revocation.of(chain, lists, now)
    checks: list[Check] = []
    for rule in CHAIN_RULES:
        failure = None
        try:
            rule.holds(chain, revocation, trusted, now)
        except AppraisalError as error:
            failure = error
        checks.append(Check(rule.name, rule.source, failure))
    return Verdict(
        kind=ENDORSEMENT_KIND,
        product=endorsement.product.value,
        measurement="",
        identity=endorsement.chip_id.hex(),
        fields=chain_fields(chain),
        checks=tuple(checks),
        notes=(
            "a certificate alone: no report was judged, no machine proved anything",
            *_revocation_notes(revocation),
            *_unread_notes(unread, unread_lists),
        ),
    )


def _asks_revocation(expected: Expectations | None) -> bool:
    return expected is not None and not expected.requirements.opens("revocation")


def _notes(subject: Appraisal) -> list[str]:
    notes: list[str] = []
    if subject.chain is not None and not _asks_revocation(subject.expected):
        notes += _revocation_notes(subject.revocation)
    if not subject.identity:
        notes.append(
            "the chip is masked and the key is a provider's: nothing tells this machine from the "
            "provider's others"
            if subject.report.key_info.signing_key is SigningKey.VLEK
            else "CHIP_ID is masked and no VCEK certificate names the chip"
        )
    elif subject.report.chip_id_masked:
        notes.append("CHIP_ID is masked: the chip is named by the VCEK certificate's hwID")
    if subject.report.version >= 3 and not subject.report.platform_info.alias_check_complete:
        notes.append("ALIAS_CHECK_COMPLETE is 0: memory was not searched for aliases since reset")
    if subject.expected is None:
        notes.append("no policy was given: nothing is pinned, only soundness was judged")
        if subject.report.policy.migrate_ma:
            notes.append("POLICY.MIGRATE_MA is 1: a migration agent may move the guest")
        if subject.report.vmpl:
            notes.append(f"VMPL is {subject.report.vmpl}: other software of the guest stands above")
    return notes


def _revocation_notes(revocation: Revocation) -> list[str]:
    if revocation.current is not None:
        return []
    if revocation.newest is None:
        return ["revocation was not judged: no CRL of the root was given"]
    return [
        "revocation was judged by a CRL that is not valid now: thisUpdate "
        f"{revocation.newest.this_update}, nextUpdate {revocation.newest.next_update}"
    ]


def _unread_notes(certificates: int, lists: int) -> list[str]:
    notes: list[str] = []
    if certificates:
        notes.append(f"{certificates} certificates could not be read and were ignored")
    if lists:
        notes.append(f"{lists} CRLs could not be read and were ignored")
    return notes
