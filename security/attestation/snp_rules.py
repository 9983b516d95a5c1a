"""The rules that a SEV-SNP attestation report is judged by.

Soundness holds for every report, whatever a policy says: who signed, under which chain, for which
chip and firmware, and that the host may not read the guest. What a policy asks is in `snp_pins`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

from security.attestation.errors import (
    SnpAuthorKeyInconsistent,
    SnpCertificateRevoked,
    SnpChipMismatch,
    SnpDebugAllowed,
    SnpEndorsementMalformed,
    SnpEndorsementMissing,
    SnpHostRequested,
    SnpPolicyNotEnforced,
    SnpProductMismatch,
    SnpReportSignatureInvalid,
    SnpReportUnsigned,
    SnpRevocationUnknown,
    SnpSignatureAlgorithmUnknown,
    SnpTcbMismatch,
    SnpTcbOrder,
)
from security.attestation.snp_certificates import (
    AMD_ROOTS,
    Chain,
    Revocation,
)
from security.attestation.snp_endorsement import Endorsement, signs_report
from security.attestation.snp_report import (
    ECDSA_P384_SHA384,
    HOST_VMPL,
    AttestationReport,
    Product,
    SigningKey,
    TcbVersion,
)
from security.attestation.verdict import Expectations, FunctionRule

__all__ = [
    "CHAIN_RULES",
    "ENDORSEMENT_RULES",
    "REPORT_RULES",
    "REVOCATION_RULE",
    "Appraisal",
    "ChainRule",
    "SnpRule",
    "roots_for",
]

REPORT_SOURCE = "AMD 56860, section 7.3, ATTESTATION_REPORT structure, "
POLICY_SOURCE = "AMD 56860, section 4.3, Guest Policy structure, "
KDS_SOURCE = "AMD 57230, "


@dataclass(frozen=True, slots=True)
class Appraisal:
    """A report and what was found to judge it by.

    Attributes:
        report: as read.
        product: by CPUID; before version 3 by the certificate; None where neither says it.
        chain: endorsement and the certificates above; None where no endorsement was found.
        unreadable: why the only endorsements found cannot be read.
        revocation: what revocation lists say about the chain.
        expected: what the policy says; None where only soundness is judged.
        now: Unix time in seconds.
    """

    report: AttestationReport
    product: Product | None
    chain: Chain | None
    unreadable: SnpEndorsementMalformed | None
    revocation: Revocation
    expected: Expectations | None
    now: int

    @property
    def endorsement(self) -> Endorsement | None:
        """The VCEK or VLEK."""
        return None if self.chain is None else self.chain.endorsement

    @property
    def identity(self) -> str:
        """CHIP_ID (hex) of the chip that signed; "" where nothing tells it."""
        endorsement = self.endorsement
        if endorsement is not None and endorsement.hwid:
            return endorsement.chip_id.hex()
        return "" if self.report.chip_id_masked else self.report.chip_id.hex()


SnpRule = FunctionRule[Appraisal]
"""One check of a report."""


@dataclass(frozen=True, slots=True)
class ChainRule:
    """One check of a chain of certificates; `SnpRule` for a report's chain.

    Attributes:
        name: stable; the docs list it.
        source: document, section and field that it follows.
        holds: takes chain, what revocation lists say, roots that count and Unix time; returns
            nothing, or raises one named error.
    """

    name: str
    source: str
    holds: Callable[[Chain, Revocation, frozenset[str], int], None]

    def check(self, subject: Appraisal) -> None:
        """Asks it about a report's chain; nothing where there is none, which another rule says."""
        if subject.chain is not None:
            roots = roots_for(subject.chain.endorsement.product, subject.expected)
            self.holds(subject.chain, subject.revocation, roots, subject.now)


def roots_for(product: Product, expected: Expectations | None) -> frozenset[str]:
    """Fingerprints of the roots that count for a product: the policy's, else AMD's."""
    if expected is not None and expected.requirements.roots:
        return frozenset(expected.requirements.roots)
    return frozenset({AMD_ROOTS[product]})


# -- the report alone -------------------------------------------------------------------------


def _signature_algorithm(subject: Appraisal) -> None:
    if subject.report.signature_algo != ECDSA_P384_SHA384:
        raise SnpSignatureAlgorithmUnknown(
            "SIGNATURE_ALGO", "1 (ECDSA P-384 with SHA-384)", str(subject.report.signature_algo)
        )


def _signed(subject: Appraisal) -> None:
    key = subject.report.key_info
    if key.mask_chip_key or key.signing_key is SigningKey.NONE:
        raise SnpReportUnsigned(
            "KEY_INFO",
            "SIGNING_KEY VCEK or VLEK and MASK_CHIP_KEY 0",
            f"SIGNING_KEY {key.signing_key.name} and MASK_CHIP_KEY {int(key.mask_chip_key)}",
            "the host told the firmware not to sign",
        )


def _requester(subject: Appraisal) -> None:
    vmpl = subject.report.vmpl
    if vmpl > 3:
        host = " (the host asked for it)" if vmpl == HOST_VMPL else ""
        raise SnpHostRequested("VMPL", "0 to 3", f"{vmpl:#x}{host}")


def _debug(subject: Appraisal) -> None:
    if subject.report.policy.debug:
        raise SnpDebugAllowed(
            "POLICY.DEBUG", "0", "1", "the host can read the guest's memory; launch it without"
        )


def _platform(subject: Appraisal) -> None:
    policy, platform = subject.report.policy, subject.report.platform_info
    unmet = [
        name
        for name, holds in (
            ("SMT off", policy.smt or not platform.smt_en),
            ("RAPL off", not policy.rapl_dis or platform.rapl_dis),
            (
                "ciphertext hiding on",
                not policy.ciphertext_hiding_dram or platform.ciphertext_hiding_dram_en,
            ),
        )
        if not holds
    ]
    if unmet:
        raise SnpPolicyNotEnforced(
            "PLATFORM_INFO", f"{', '.join(unmet)}, as POLICY demands", f"{platform.raw:#x}"
        )


def _abi(subject: Appraisal) -> None:
    policy, current = subject.report.policy, subject.report.current
    if (policy.abi_major, policy.abi_minor) > (current.major, current.minor):
        raise SnpPolicyNotEnforced(
            "CURRENT version",
            f"at least {policy.abi_major}.{policy.abi_minor}, as POLICY demands",
            str(current),
        )


def _author_key(subject: Appraisal) -> None:
    report = subject.report
    if not report.key_info.author_key_en and any(report.author_key_digest):
        raise SnpAuthorKeyInconsistent(
            "AUTHOR_KEY_DIGEST", "zero, as AUTHOR_KEY_EN is 0", "a digest"
        )


def _tcb_order(subject: Appraisal) -> None:
    report, product = subject.report, subject.product
    if product is None:
        return
    versions = [
        ("REPORTED_TCB", TcbVersion.of(report.reported_tcb, product)),
        ("COMMITTED_TCB", TcbVersion.of(report.committed_tcb, product)),
        ("CURRENT_TCB", TcbVersion.of(report.current_tcb, product)),
    ]
    TcbVersion.of(report.launch_tcb, product)
    for (name, lower), (other, higher) in itertools.pairwise(versions):
        if newer := lower.exceeds(higher):
            raise SnpTcbOrder(
                name, f"no part newer than in {other}", f"{', '.join(newer)}: {lower}"
            )


def _firmware_order(subject: Appraisal) -> None:
    report = subject.report
    if report.committed > report.current:
        raise SnpTcbOrder("COMMITTED version", f"at most {report.current}", str(report.committed))


# -- the endorsement --------------------------------------------------------------------------


def _endorsed(subject: Appraisal) -> None:
    key = subject.report.key_info.signing_key
    if subject.chain is not None or key is SigningKey.NONE:
        return
    if subject.unreadable is not None:
        raise subject.unreadable
    raise SnpEndorsementMissing(
        f"{key.name} certificate",
        "one with the evidence or in the collateral",
        "none",
        "fetch it from AMD's key distribution service and put it into the collateral",
    )


def _report_signature(subject: Appraisal) -> None:
    endorsement = subject.endorsement
    if endorsement is not None and not signs_report(endorsement, subject.report):
        raise SnpReportSignatureInvalid(
            "SIGNATURE", f"one by the {endorsement.signing_key.name}'s key", "another"
        )


def _product(subject: Appraisal) -> None:
    endorsement, product = subject.endorsement, subject.product
    if endorsement is not None and product is not endorsement.product:
        raise SnpProductMismatch(
            "product of the certificate",
            "none" if product is None else f"{product.value}, as CPUID says",
            endorsement.product_name,
        )


def _tcb_certified(subject: Appraisal) -> None:
    endorsement = subject.endorsement
    if endorsement is None:
        return
    certified = endorsement.tcb.to_bytes(endorsement.product)
    if certified != subject.report.reported_tcb:
        raise SnpTcbMismatch(
            "TCB version of the certificate",
            f"REPORTED_TCB {subject.report.reported_tcb.hex()}",
            certified.hex(),
        )


def _chip(subject: Appraisal) -> None:
    endorsement, report = subject.endorsement, subject.report
    if endorsement is None or not endorsement.hwid or report.chip_id_masked:
        return
    if endorsement.chip_id != report.chip_id:
        raise SnpChipMismatch(
            "hwID of the certificate",
            f"CHIP_ID {report.chip_id[:8].hex()}...",
            f"{endorsement.hwid[:8].hex()}...",
        )


# -- the chain --------------------------------------------------------------------------------


def _root(chain: Chain, revocation: Revocation, roots: frozenset[str], now: int) -> None:
    del revocation, now
    chain.require_root(roots)


def _signatures(chain: Chain, revocation: Revocation, roots: frozenset[str], now: int) -> None:
    del revocation, roots, now
    chain.require_signatures()


def _profile(chain: Chain, revocation: Revocation, roots: frozenset[str], now: int) -> None:
    del revocation, roots, now
    chain.require_profile()


def _dates(chain: Chain, revocation: Revocation, roots: frozenset[str], now: int) -> None:
    del revocation, roots
    chain.require_dates(now)


def _revoked(chain: Chain, revocation: Revocation, roots: frozenset[str], now: int) -> None:
    del chain, roots, now
    if revocation.revoked:
        raise SnpCertificateRevoked(
            "certificate chain", "none that the ARK's CRL names", ", ".join(revocation.revoked)
        )


def _revocation_current(
    chain: Chain, revocation: Revocation, roots: frozenset[str], now: int
) -> None:
    del roots
    if revocation.current is None:
        newest = revocation.newest
        raise SnpRevocationUnknown(
            f"CRL of ARK-{chain.endorsement.product.value}",
            f"one valid at {now}",
            "none"
            if newest is None
            else f"thisUpdate {newest.this_update}, nextUpdate {newest.next_update}",
            "fetch AMD's CRL, or name revocation under open",
        )


REPORT_RULES: tuple[SnpRule, ...] = (
    SnpRule("snp.report.signature_algo", REPORT_SOURCE + "SIGNATURE_ALGO", _signature_algorithm),
    SnpRule("snp.report.signed", REPORT_SOURCE + "SIGNING_KEY and MASK_CHIP_KEY", _signed),
    SnpRule("snp.report.requester", REPORT_SOURCE + "VMPL", _requester),
    SnpRule("snp.policy.debug", POLICY_SOURCE + "DEBUG (bit 19)", _debug),
    SnpRule(
        "snp.policy.platform",
        POLICY_SOURCE
        + "SMT, RAPL_DIS, CIPHERTEXT_HIDING_DRAM (bits 16, 23, 24), and PLATFORM_INFO",
        _platform,
    ),
    SnpRule("snp.policy.abi", POLICY_SOURCE + "ABI_MAJOR and ABI_MINOR (bits 15:0)", _abi),
    SnpRule(
        "snp.report.author_key", REPORT_SOURCE + "AUTHOR_KEY_EN and AUTHOR_KEY_DIGEST", _author_key
    ),
    SnpRule(
        "snp.tcb.order", REPORT_SOURCE + "REPORTED_TCB, COMMITTED_TCB and CURRENT_TCB", _tcb_order
    ),
    SnpRule(
        "snp.firmware.order", REPORT_SOURCE + "CURRENT_MAJOR to COMMITTED_BUILD", _firmware_order
    ),
)
"""Asked of every report."""

ENDORSEMENT_RULES: tuple[SnpRule, ...] = (
    SnpRule(
        "snp.endorsement.certificate",
        KDS_SOURCE + "VCEK and VLEK certificate extensions",
        _endorsed,
    ),
    SnpRule("snp.report.signature", REPORT_SOURCE + "SIGNATURE", _report_signature),
    SnpRule(
        "snp.endorsement.product", KDS_SOURCE + "productName, and 56860, CPUID_FAM_ID", _product
    ),
    SnpRule(
        "snp.endorsement.tcb",
        KDS_SOURCE + "blSPL to ucodeSPL, and 56860, REPORTED_TCB",
        _tcb_certified,
    ),
    SnpRule("snp.endorsement.chip", KDS_SOURCE + "hwID, and 56860, CHIP_ID", _chip),
)
"""Asked of every report and the VCEK or VLEK that was found for it."""

CHAIN_RULES: tuple[ChainRule, ...] = (
    ChainRule("snp.chain.root", KDS_SOURCE + "certificate chain, ARK", _root),
    ChainRule("snp.chain.signatures", KDS_SOURCE + "certificate chain, signatures", _signatures),
    ChainRule("snp.chain.profile", KDS_SOURCE + "certificate formats; RFC 5280, 4.2.1", _profile),
    ChainRule("snp.chain.dates", "RFC 5280, 4.1.2.5, Validity", _dates),
    ChainRule("snp.chain.revoked", KDS_SOURCE + "CRL; RFC 5280, 5.1.2.6", _revoked),
)
"""Asked of every chain."""

REVOCATION_RULE = ChainRule(
    "snp.chain.revocation_list",
    KDS_SOURCE + "CRL; RFC 5280, 5.1.2.4 and 5.1.2.5",
    _revocation_current,
)
"""Asked where a policy does not leave revocation open."""
