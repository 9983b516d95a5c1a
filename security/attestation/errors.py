"""What real evidence is refused for: one named error for each check, grouped by kind.

The errors that all kinds share stand in `security.errors`; these say more precisely which check it
was. Every `code` is stable. No message carries more than a public value's first digits.
"""

from __future__ import annotations

from security.errors import AppraisalError, EvidenceMalformed, NoCollector

__all__ = [
    "CertificateMalformed",
    "CertificateNotCurrent",
    "CertificateRevoked",
    "CertificateUnsupported",
    "ChainBroken",
    "ChainNotAuthorised",
    "ChainWrongLength",
    "DeviceArchitectureRefused",
    "DeviceEvidenceMissing",
    "DeviceRepeated",
    "DeviceRequestRefused",
    "EventLogMalformed",
    "EventLogMissing",
    "EventLogNotReplayed",
    "FirmwareIdMismatch",
    "FirmwareIdMissing",
    "FmspcMismatch",
    "FreshnessUnproven",
    "GpuArchitectureUnsupported",
    "GpuConfidentialComputingOff",
    "GpuDevtoolsMode",
    "GpuReportInvalid",
    "GpuSetIncomplete",
    "HclReportMalformed",
    "IntelCrlExpired",
    "IntelCrlSignatureInvalid",
    "MeasurementNotPinned",
    "MeasurementRefused",
    "NonceMismatch",
    "NoncesDiffer",
    "NotATdQuote",
    "NrasAlgorithmRefused",
    "NrasClaimRefused",
    "NrasDigestMismatch",
    "NrasIssuerRefused",
    "NrasKeyAmbiguous",
    "NrasKeyMissing",
    "NrasNonceMismatch",
    "NrasNotCurrent",
    "NrasSignatureInvalid",
    "NrasTooOld",
    "NvmlUnavailable",
    "OpaqueDataMissing",
    "OpaqueDataRefused",
    "PckCaRevoked",
    "PckChainExpired",
    "PckChainInvalid",
    "PckRevoked",
    "PckRootUnknown",
    "PcrDigestMismatch",
    "PcrSelectionRefused",
    "PinMissing",
    "PinRefused",
    "QeBindingInvalid",
    "QeIdentityExpired",
    "QeIdentityFromFuture",
    "QeIdentityMismatch",
    "QeIdentitySignatureInvalid",
    "QeSignatureInvalid",
    "QuoteAlgorithmRefused",
    "QuoteSignatureInvalid",
    "QuoteVersionUnsupported",
    "ReferenceMismatch",
    "ReferenceMissing",
    "ReferencesConflict",
    "ReferencesUnusable",
    "Refusal",
    "ReportSignatureInvalid",
    "RevocationUnknown",
    "RevokedIdentity",
    "RimMalformed",
    "RimSignatureInvalid",
    "RimSignatureRefused",
    "RootNotPinned",
    "RuntimeDataMismatch",
    "SeamAttributesNotZero",
    "SecondOpinionRefused",
    "SeptVeNotDisabled",
    "ServiceTdBound",
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
    "SpdmUnsupported",
    "TcbInfoExpired",
    "TcbInfoFromFuture",
    "TcbInfoMismatch",
    "TcbInfoSignatureInvalid",
    "TcbLevelUnmatched",
    "TcbRevoked",
    "TdAttributesReserved",
    "TdDebug",
    "TdMigratable",
    "TdQuoteMissing",
    "TdReportMismatch",
    "TdxCollateralChainInvalid",
    "TdxCollateralMalformed",
    "TdxCollateralMissing",
    "TdxCollateralSignerRevoked",
    "TdxModuleMismatch",
    "TeeTcbSvnLowered",
    "TopologyMismatch",
    "TpmAlgorithmRefused",
    "TpmQuoteMalformed",
    "TpmSignatureInvalid",
    "TrailingBytesRefused",
    "VtpmKeyUnusable",
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


class NotATdQuote(EvidenceMalformed):
    """The quote is of another kind of TEE than a trust domain: an SGX enclave."""

    code = "not_a_td_quote"


class QuoteVersionUnsupported(EvidenceMalformed):
    """The quote has a version or a body type that this version does not know."""

    code = "quote_version_unsupported"


class QuoteAlgorithmRefused(EvidenceMalformed):
    """The quote has another attestation key type, vendor or kind of certification data."""

    code = "quote_algorithm_refused"


class TrailingBytesRefused(Refusal):
    """Something other than zero padding follows the signed part of a quote."""

    code = "quote_trailing_bytes"


class QuoteSignatureInvalid(Refusal):
    """The quote is not signed by its attestation key."""

    code = "quote_signature_invalid"


class QeBindingInvalid(Refusal):
    """The quoting enclave's report does not vouch for the attestation key."""

    code = "qe_binding_invalid"


class QeSignatureInvalid(Refusal):
    """The quoting enclave's report is not signed by the PCK certificate's key."""

    code = "qe_signature_invalid"


class PckChainInvalid(Refusal):
    """The PCK certificate chain does not hold together."""

    code = "pck_chain_invalid"


class PckChainExpired(Refusal):
    """A certificate of the PCK chain is not valid at this time."""

    code = "pck_chain_expired"


class PckRootUnknown(Refusal):
    """The PCK chain ends in another root than Intel's, or than the policy's."""

    code = "pck_root_unknown"


class PckRevoked(Refusal):
    """Intel revoked the PCK certificate."""

    code = "pck_revoked"


class PckCaRevoked(Refusal):
    """Intel revoked the certificate of the CA that issued the PCK certificate."""

    code = "pck_ca_revoked"


class TdxCollateralMissing(Refusal):
    """There is no TDX collateral at all: nothing says what the platform's TCB is worth."""

    code = "tdx_collateral_missing"


class TdxCollateralMalformed(Refusal):
    """A document of TDX collateral does not parse."""

    code = "tdx_collateral_malformed"


class FmspcMismatch(Refusal):
    """The TDX collateral at hand is of other platforms than the quote's."""

    code = "fmspc_mismatch"


class TdxCollateralChainInvalid(Refusal):
    """The chain under TCB info or QE identity does not hold, or is of another purpose."""

    code = "tdx_collateral_chain_invalid"


class TdxCollateralSignerRevoked(Refusal):
    """Intel revoked the certificate that signs TCB info or QE identity."""

    code = "tdx_collateral_signer_revoked"


class TcbInfoSignatureInvalid(Refusal):
    """TCB info is not signed by its issuer chain."""

    code = "tcb_info_signature_invalid"


class TcbInfoExpired(Refusal):
    """TCB info is past its nextUpdate."""

    code = "tcb_info_expired"


class TcbInfoFromFuture(Refusal):
    """TCB info was issued later than now."""

    code = "tcb_info_from_future"


class TcbInfoMismatch(Refusal):
    """TCB info is for another kind of TEE, another version or another PCE."""

    code = "tcb_info_mismatch"


class QeIdentitySignatureInvalid(Refusal):
    """QE identity is not signed by its issuer chain."""

    code = "qe_identity_signature_invalid"


class QeIdentityExpired(Refusal):
    """QE identity is past its nextUpdate."""

    code = "qe_identity_expired"


class QeIdentityFromFuture(Refusal):
    """QE identity was issued later than now."""

    code = "qe_identity_from_future"


class QeIdentityMismatch(Refusal):
    """The quote was made by another enclave than Intel's TD quoting enclave."""

    code = "qe_identity_mismatch"


class IntelCrlSignatureInvalid(Refusal):
    """A certificate revocation list is not signed by the CA that it speaks for."""

    code = "intel_crl_signature_invalid"


class IntelCrlExpired(Refusal):
    """A certificate revocation list is past its nextUpdate."""

    code = "intel_crl_expired"


class TcbLevelUnmatched(Refusal):
    """The platform's security version numbers reach no TCB level of the TCB info."""

    code = "tcb_level_unmatched"


class TdxModuleMismatch(Refusal):
    """The TDX module is none that the TCB info names."""

    code = "tdx_module_mismatch"


class TcbRevoked(Refusal):
    """The platform's TCB, its TDX module or its quoting enclave is revoked."""

    code = "tcb_revoked"


class SecondOpinionRefused(Refusal):
    """The independent verifier (dcap-qvl) refuses what this one accepts."""

    code = "dcap_qvl_refused"


class TdDebug(Refusal):
    """The trust domain can be debugged from outside."""

    code = "td_debug"


class TdAttributesReserved(Refusal):
    """TDATTRIBUTES has bits set that are reserved, or that let the host profile the domain."""

    code = "td_attributes_reserved"


class TdMigratable(Refusal):
    """The trust domain can be migrated to other machines."""

    code = "td_migratable"


class SeptVeNotDisabled(Refusal):
    """The host may cause #VE exceptions by taking pages away (SEPT_VE_DISABLE is off)."""

    code = "sept_ve_not_disabled"


class SeamAttributesNotZero(Refusal):
    """The TDX module is not a production module."""

    code = "seam_attributes_not_zero"


class ServiceTdBound(Refusal):
    """A service TD that the policy does not pin is bound to the trust domain."""

    code = "service_td_bound"


class TeeTcbSvnLowered(Refusal):
    """The TDX module that runs now is older than the one that the domain was started with."""

    code = "tee_tcb_svn_lowered"


class EventLogMissing(Refusal):
    """No event log came with the quote, and the policy does not open that."""

    code = "event_log_missing"


class EventLogMalformed(Refusal):
    """The event log does not parse."""

    code = "event_log_malformed"


class EventLogNotReplayed(Refusal):
    """Replaying the event log does not give the registers of the quote."""

    code = "event_log_not_replayed"


# -- Azure vTPM -------------------------------------------------------------------------------


class HclReportMalformed(EvidenceMalformed):
    """The HCL report's envelope or runtime data are not as Azure documents them."""

    code = "hcl_report_malformed"


class RuntimeDataMismatch(Refusal):
    """The hardware report does not vouch for the runtime data with the vTPM's key."""

    code = "runtime_data_mismatch"


class VtpmKeyUnusable(Refusal):
    """The runtime data names no single RSA attestation key of enough strength."""

    code = "vtpm_key_unusable"


class TpmQuoteMalformed(EvidenceMalformed):
    """The TPM's attestation structure does not parse, or is no quote."""

    code = "tpm_quote_malformed"


class TpmSignatureInvalid(Refusal):
    """The TPM quote is not signed by the vTPM's attestation key."""

    code = "tpm_signature_invalid"


class TpmAlgorithmRefused(Refusal):
    """The TPM quote covers another PCR bank than SHA-256, or names an unknown algorithm."""

    code = "tpm_algorithm_refused"


class PcrSelectionRefused(Refusal):
    """The TPM quote does not cover all 24 PCRs."""

    code = "pcr_selection_refused"


class PcrDigestMismatch(Refusal):
    """The PCR values are not those that the TPM signed."""

    code = "pcr_digest_mismatch"


class TdQuoteMissing(Refusal):
    """The hardware report is a TDREPORT, and no TD quote of it came along."""

    code = "td_quote_missing"


class TdReportMismatch(Refusal):
    """The TD quote is of another trust domain than the TDREPORT in the HCL report."""

    code = "td_report_mismatch"


# -- NVIDIA -----------------------------------------------------------------------------------


class SpdmUnsupported(EvidenceMalformed):
    """A report of another SPDM version, message, kind of measurement or opaque field."""

    code = "spdm_unsupported"


class CertificateUnsupported(EvidenceMalformed):
    """A certificate with another key, signature algorithm or critical extension than NVIDIA's."""

    code = "nvidia_certificate_unsupported"


class RimMalformed(EvidenceMalformed):
    """A reference integrity manifest that does not parse, or is not safe to parse."""

    code = "rim_malformed"


class DeviceRequestRefused(Refusal):
    """The report does not answer a request for all measurements, signed."""

    code = "nvidia_request_refused"


class ChainWrongLength(Refusal):
    """A certificate chain has missing or extra certificates."""

    code = "nvidia_chain_length"


class ChainBroken(Refusal):
    """A certificate is not issued by the next one of its chain."""

    code = "nvidia_chain_broken"


class ChainNotAuthorised(Refusal):
    """A certificate is used for what its basic constraints or key usage do not allow."""

    code = "nvidia_chain_not_authorised"


class RootNotPinned(Refusal):
    """A chain ends in another root than the pinned one, whatever it calls itself."""

    code = "nvidia_root_not_pinned"


class CertificateNotCurrent(Refusal):
    """A certificate is used before or after its dates."""

    code = "nvidia_certificate_not_current"


class CertificateRevoked(Refusal):
    """The issuer's revocation list names a certificate of the chain."""

    code = "nvidia_certificate_revoked"


class RevocationUnknown(Refusal):
    """No current revocation list of the issuer is among the collateral."""

    code = "nvidia_revocation_unknown"


class DeviceArchitectureRefused(Refusal):
    """The certificates name an unknown chip, two chips, or another kind of device."""

    code = "nvidia_architecture_refused"


class ReportSignatureInvalid(Refusal):
    """The report is not signed by the key of its chain's leaf."""

    code = "nvidia_report_signature_invalid"


class NonceMismatch(Refusal):
    """The report answers another challenge."""

    code = "nvidia_nonce_mismatch"


class OpaqueDataMissing(Refusal):
    """The opaque data lacks a field that every device of the kind reports."""

    code = "nvidia_opaque_data_missing"


class OpaqueDataRefused(Refusal):
    """A field of the opaque data has an unknown value or contradicts another."""

    code = "nvidia_opaque_data_refused"


class FirmwareIdMismatch(Refusal):
    """The report's firmware id is not the one that the leaf certificate was issued for."""

    code = "nvidia_fwid_mismatch"


class FirmwareIdMissing(Refusal):
    """The report names no firmware id (old firmware) and the policy does not leave that open."""

    code = "nvidia_fwid_missing"


class DeviceRepeated(Refusal):
    """One device stands for two."""

    code = "nvidia_device_repeated"


class GpuSetIncomplete(Refusal):
    """The evidence has no GPU, or a report without a chain."""

    code = "nvidia_set_incomplete"


class NoncesDiffer(Refusal):
    """The devices of one set answer different challenges."""

    code = "nvidia_nonces_differ"


class TopologyMismatch(Refusal):
    """GPUs and switches do not name exactly each other (protected PCIe)."""

    code = "nvidia_topology_mismatch"


class RimSignatureRefused(Refusal):
    """A RIM's signature is of another shape than the one that covers the whole document."""

    code = "rim_signature_refused"


class RimSignatureInvalid(Refusal):
    """A RIM's digest or signature value does not verify."""

    code = "rim_signature_invalid"


class ReferenceMissing(Refusal):
    """No usable RIM for a component, and the policy does not leave it open."""

    code = "rim_missing"


class ReferenceMismatch(Refusal):
    """Measurements differ from every valid RIM of the component."""

    code = "rim_mismatch"


class ReferencesUnusable(Refusal):
    """There are RIMs for the device, but none proves anything."""

    code = "rim_unusable"


class ReferencesConflict(Refusal):
    """The RIMs of driver and VBIOS claim the same measurement."""

    code = "rim_conflict"


class NrasAlgorithmRefused(Refusal):
    """A token's header names another algorithm, or brings its own key."""

    code = "nras_algorithm_refused"


class NrasKeyMissing(Refusal):
    """No key set of the operator has the token's key."""

    code = "nras_key_missing"


class NrasKeyAmbiguous(Refusal):
    """Two key sets give different keys one name."""

    code = "nras_key_ambiguous"


class NrasSignatureInvalid(Refusal):
    """A token's signature does not verify under the operator's key."""

    code = "nras_signature_invalid"


class NrasIssuerRefused(Refusal):
    """A token was issued by somebody else, or says another thing than an attestation result."""

    code = "nras_issuer_refused"


class NrasNotCurrent(Refusal):
    """A token is used before or after its own dates."""

    code = "nras_not_current"


class NrasTooOld(Refusal):
    """A token is older than the policy allows."""

    code = "nras_too_old"


class NrasNonceMismatch(Refusal):
    """A token answers another challenge."""

    code = "nras_nonce_mismatch"


class NrasDigestMismatch(Refusal):
    """The overall token does not vouch for exactly the tokens that came with it."""

    code = "nras_digest_mismatch"


class NrasClaimRefused(Refusal):
    """A result in a token is not the one that a sound device gets."""

    code = "nras_claim_refused"


class NrasDeviceRepeated(Refusal):
    """Two tokens are about one device, or one does not say which it is about."""

    code = "nras_device_repeated"


class NvmlUnavailable(NoCollector):
    """NVML is not there or refuses a call: no driver, no permission, no such function."""

    code = "nvml_unavailable"


class GpuConfidentialComputingOff(NoCollector):
    """The GPUs do not run in confidential-computing or protected-PCIe mode."""

    code = "gpu_confidential_computing_off"


class GpuDevtoolsMode(NoCollector):
    """The GPUs run in devtools mode, in which they protect nothing."""

    code = "gpu_devtools_mode"


class GpuArchitectureUnsupported(NoCollector):
    """A GPU is of an architecture that cannot attest."""

    code = "gpu_architecture_unsupported"


class GpuReportInvalid(NoCollector):
    """NVML answered with a report or certificates of an impossible length."""

    code = "gpu_report_invalid"


# -- several kinds together -------------------------------------------------------------------


class MachineEvidenceMissing(Refusal):
    """The policy demands evidence of a machine and there is none."""

    code = "machine_evidence_missing"


class DeviceEvidenceMissing(Refusal):
    """The policy demands evidence of devices and there is none."""

    code = "device_evidence_missing"
