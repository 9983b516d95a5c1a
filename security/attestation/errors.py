"""What real evidence is refused for: one named error for each check, grouped by kind.

The errors that all kinds share stand in `security.errors`; these say more precisely which check it
was. Every `code` is stable. No message carries more than a public value's first digits.
"""

from __future__ import annotations

from security.errors import AppraisalError, EvidenceMalformed

__all__ = [
    "CertificateMalformed",
    "FreshnessUnproven",
    "MeasurementNotPinned",
    "MeasurementRefused",
    "PinMissing",
    "PinRefused",
    "Refusal",
    "RevokedIdentity",
    "SnpAuthorKeyInconsistent",
    "SnpBindingTooLong",
    "SnpCertificateExpired",
    "SnpCertificateNotYetValid",
    "SnpCertificateProfile",
    "SnpCertificateRevoked",
    "SnpCertificateTableMalformed",
    "SnpChainSignatureInvalid",
    "SnpChipMismatch",
    "SnpDebugAllowed",
    "SnpEndorsementMalformed",
    "SnpEndorsementMissing",
    "SnpHostRequested",
    "SnpIssuerMissing",
    "SnpMigrationAgentAllowed",
    "SnpPolicyNotEnforced",
    "SnpProductMismatch",
    "SnpProductUnknown",
    "SnpReportMalformed",
    "SnpReportSignatureInvalid",
    "SnpReportUnsigned",
    "SnpReservedNotZero",
    "SnpRevocationUnknown",
    "SnpRootNotTrusted",
    "SnpSignatureAlgorithmUnknown",
    "SnpSigningKeyUnknown",
    "SnpTcbMismatch",
    "SnpTcbOrder",
    "SnpTcbTooLow",
    "SnpVersionUnknown",
]


class Refusal(AppraisalError):
    """A check that does not hold.

    Attributes:
        what: what was looked at, by the vendor's name.
        expected: what it had to be.
        found: what it is.
    """

    code = "evidence_refused"

    def __init__(self, what: str, expected: str, found: str, advice: str = "") -> None:
        self.what = what
        self.expected = expected
        self.found = found
        message = f"{what}: expected {expected}, found {found}"
        super().__init__(f"{message}; {advice}" if advice else message)


# -- every kind -------------------------------------------------------------------------------


class PinMissing(Refusal):
    """The policy neither pins a value nor opens it by name."""

    code = "pin_missing"


class PinRefused(Refusal):
    """A value is none of those that the policy pins."""

    code = "pin_refused"


class MeasurementNotPinned(Refusal):
    """The policy pins no measurement for the kind and does not accept any software."""

    code = "measurement_not_pinned"


class MeasurementRefused(Refusal):
    """The machine runs something else than what the policy pins."""

    code = "measurement_refused"


class FreshnessUnproven(Refusal):
    """Nothing shows that the evidence was made for this challenge."""

    code = "freshness_unproven"


class RevokedIdentity(Refusal):
    """The policy revokes a chip, a device or a certificate by its number."""

    code = "revoked_identity"


class CertificateMalformed(EvidenceMalformed):
    """A certificate or revocation list is not what X.509 and DER allow."""

    code = "certificate_malformed"


# -- SEV-SNP ----------------------------------------------------------------------------------


class SnpReportMalformed(EvidenceMalformed):
    """An attestation report is longer or shorter than 1184 bytes, or there is none."""

    code = "snp_report_malformed"


class SnpVersionUnknown(EvidenceMalformed):
    """An attestation report is of a version that this program does not know."""

    code = "snp_version_unknown"


class SnpReservedNotZero(EvidenceMalformed):
    """Bits or bytes that AMD reserves are not zero."""

    code = "snp_reserved_not_zero"


class SnpSigningKeyUnknown(EvidenceMalformed):
    """SIGNING_KEY has a value that AMD reserves."""

    code = "snp_signing_key_unknown"


class SnpProductUnknown(EvidenceMalformed):
    """CPUID names a product line that this program does not know."""

    code = "snp_product_unknown"


class SnpCertificateTableMalformed(EvidenceMalformed):
    """The certificate table of the extended guest request points outside itself, or has no end."""

    code = "snp_certificate_table_malformed"


class SnpEndorsementMissing(Refusal):
    """No VCEK or VLEK certificate of the kind that the report names was found."""

    code = "snp_endorsement_missing"


class SnpEndorsementMalformed(Refusal):
    """A VCEK or VLEK certificate lacks AMD's extensions or has others than AMD defines."""

    code = "snp_endorsement_malformed"


class SnpIssuerMissing(Refusal):
    """No ASK, ASVK or ARK certificate was found that issued the one below it."""

    code = "snp_issuer_missing"


class SnpRootNotTrusted(Refusal):
    """The chain ends at a root that is not AMD's, nor one that the policy names."""

    code = "snp_root_not_trusted"


class SnpChainSignatureInvalid(Refusal):
    """A certificate of the chain is not signed by the one above it."""

    code = "snp_chain_signature_invalid"


class SnpCertificateProfile(Refusal):
    """A certificate's names, key, algorithm or extensions are not what AMD specifies."""

    code = "snp_certificate_profile"


class SnpCertificateExpired(Refusal):
    """A certificate of the chain is no longer valid."""

    code = "snp_certificate_expired"


class SnpCertificateNotYetValid(Refusal):
    """A certificate of the chain is not valid yet."""

    code = "snp_certificate_not_yet_valid"


class SnpCertificateRevoked(Refusal):
    """AMD's revocation list names a certificate of the chain."""

    code = "snp_certificate_revoked"


class SnpRevocationUnknown(Refusal):
    """There is no revocation list of the root that is valid now."""

    code = "snp_revocation_unknown"


class SnpSignatureAlgorithmUnknown(Refusal):
    """SIGNATURE_ALGO is not ECDSA P-384 with SHA-384."""

    code = "snp_signature_algorithm_unknown"


class SnpReportUnsigned(Refusal):
    """The firmware was told not to sign (MASK_CHIP_KEY)."""

    code = "snp_report_unsigned"


class SnpReportSignatureInvalid(Refusal):
    """The report's signature does not verify under the VCEK or VLEK."""

    code = "snp_report_signature_invalid"


class SnpHostRequested(Refusal):
    """The host asked for the report, not the guest; or VMPL is none that there is."""

    code = "snp_host_requested"


class SnpProductMismatch(Refusal):
    """Report and certificates name different product lines."""

    code = "snp_product_mismatch"


class SnpTcbMismatch(Refusal):
    """The certificate is for another TCB version than the report's."""

    code = "snp_tcb_mismatch"


class SnpTcbOrder(Refusal):
    """TCB or firmware versions stand in an order that firmware does not allow."""

    code = "snp_tcb_order"


class SnpTcbTooLow(Refusal):
    """A part of the TCB is older than the policy's least version."""

    code = "snp_tcb_too_low"


class SnpChipMismatch(Refusal):
    """The certificate is for another chip than the report's."""

    code = "snp_chip_mismatch"


class SnpDebugAllowed(Refusal):
    """The guest's policy lets the host read and write its memory."""

    code = "snp_debug_allowed"


class SnpMigrationAgentAllowed(Refusal):
    """The guest's policy allows a migration agent, or one is bound."""

    code = "snp_migration_agent_allowed"


class SnpPolicyNotEnforced(Refusal):
    """The platform is not set up as the guest's policy demands."""

    code = "snp_policy_not_enforced"


class SnpAuthorKeyInconsistent(Refusal):
    """AUTHOR_KEY_DIGEST and AUTHOR_KEY_EN contradict each other."""

    code = "snp_author_key_inconsistent"


class SnpBindingTooLong(Refusal):
    """What the report must be over does not fit REPORT_DATA."""

    code = "snp_binding_too_long"


# -- TDX --------------------------------------------------------------------------------------


# -- Azure vTPM -------------------------------------------------------------------------------


# -- NVIDIA -----------------------------------------------------------------------------------


# -- several kinds together -------------------------------------------------------------------


class DeviceEvidenceMissing(Refusal):
    """The policy demands evidence of devices and there is none."""

    code = "device_evidence_missing"
