"""What the rules on TD quotes look at, and what a rule is."""

from __future__ import annotations

from dataclasses import dataclass

from security.attestation.errors import EventLogMalformed
from security.attestation.event_log import EventLog
from security.attestation.intel_pki import INTEL_SGX_ROOT_CA_SHA256, Certificate, PckExtension
from security.attestation.tdx_collateral import TdxCollateral
from security.attestation.tdx_quote import TdQuote
from security.attestation.tdx_tcb import TcbEvaluation
from security.attestation.verdict import Expectations, FunctionRule

__all__ = ["TdxRule", "TdxSubject", "shown_roots"]


@dataclass(frozen=True, slots=True)
class TdxSubject:
    """What the rules look at.

    Attributes:
        quote: the quote.
        chain: its PCK chain, leaf first.
        pck: what the PCK certificate says.
        collateral: the document that fits the platform; None where none does.
        collateral_fmspcs: FMSPC (hex) of every document at hand.
        evaluation: the platform's TCB; None where it has none, or no collateral.
        event_log: the log, why it does not parse, or None where there is none.
        event_table: the CCEL table, or None.
        expected: what the policy says; None without one.
        now: Unix time in seconds.
        bound_to: what REPORTDATA must hold, or None.
    """

    quote: TdQuote
    chain: tuple[Certificate, ...]
    pck: PckExtension
    collateral: TdxCollateral | None
    collateral_fmspcs: tuple[str, ...]
    evaluation: TcbEvaluation | None
    event_log: EventLog | EventLogMalformed | None
    event_table: bytes | None
    expected: Expectations | None
    now: int
    bound_to: bytes | None

    @property
    def roots(self) -> tuple[str, ...]:
        """SHA-256 of the root certificates that count."""
        own = () if self.expected is None else self.expected.requirements.roots
        return own or (INTEL_SGX_ROOT_CA_SHA256,)

    @property
    def needed_collateral(self) -> TdxCollateral:
        """The collateral, for rules that are asked only where there is some."""
        assert self.collateral is not None
        return self.collateral

    @property
    def policy(self) -> Expectations:
        """What the policy says, for rules that are asked only where there is one."""
        assert self.expected is not None
        return self.expected


TdxRule = FunctionRule[TdxSubject]
"""One check of a TD quote."""


def shown_roots(fingerprints: tuple[str, ...]) -> str:
    """Fingerprints as messages show them."""
    return " or ".join(f"{fingerprint[:16]}..." for fingerprint in fingerprints[:4])
