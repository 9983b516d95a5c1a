"""What real evidence is refused for: one named error for each check, grouped by kind.

The errors that all kinds share stand in `security.errors`; these say more precisely which check it
was. Every `code` is stable. No message carries more than a public value's first digits.
"""

from __future__ import annotations

from security.errors import AppraisalError

__all__ = [
    "FreshnessUnproven",
    "MeasurementNotPinned",
    "MeasurementRefused",
    "PinMissing",
    "PinRefused",
    "Refusal",
    "RevokedIdentity",
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


# -- several kinds together -------------------------------------------------------------------


class DeviceEvidenceMissing(Refusal):
    """The policy demands evidence of devices and there is none."""

    code = "device_evidence_missing"
