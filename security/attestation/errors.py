"""What real evidence is refused for: one named error for each check, grouped by kind.

The errors that all kinds share stand in `security.errors`; these say more precisely which check it
was. Every `code` is stable. No message carries more than a public value's first digits.
"""

from __future__ import annotations

from security.errors import AppraisalError, EvidenceMalformed, NoCollector

__all__ = [
    "CertificateNotCurrent",
    "CertificateRevoked",
    "CertificateUnsupported",
    "ChainBroken",
    "ChainNotAuthorised",
    "ChainWrongLength",
    "DeviceArchitectureRefused",
    "DeviceRepeated",
    "DeviceRequestRefused",
    "FirmwareIdMismatch",
    "FirmwareIdMissing",
    "FreshnessUnproven",
    "GpuArchitectureUnsupported",
    "GpuConfidentialComputingOff",
    "GpuDevtoolsMode",
    "GpuReportInvalid",
    "GpuSetIncomplete",
    "MeasurementNotPinned",
    "MeasurementRefused",
    "NonceMismatch",
    "NoncesDiffer",
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
    "PinMissing",
    "PinRefused",
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
    "SpdmUnsupported",
    "TopologyMismatch",
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


# -- SEV-SNP ----------------------------------------------------------------------------------


# -- TDX --------------------------------------------------------------------------------------


# -- Azure vTPM -------------------------------------------------------------------------------


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
