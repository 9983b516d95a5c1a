"""Rules on TD quotes that a policy, a challenge or an event log asks for."""

from __future__ import annotations

from collections.abc import Callable

from security.attestation.errors import (
    EventLogMalformed,
    EventLogMissing,
    EventLogNotReplayed,
    FreshnessUnproven,
    MeasurementNotPinned,
    MeasurementRefused,
    PinMissing,
    PinRefused,
    RevokedIdentity,
    SeptVeNotDisabled,
    ServiceTdBound,
)
from security.attestation.event_log import read_ccel_table
from security.attestation.tdx_subject import TdxRule, TdxSubject
from security.errors import EvidenceNotBound

__all__ = ["EVENT_LOG_RULE", "EVENT_TABLE_RULE", "FRESHNESS_RULE", "PIN_RULES", "POLICY_RULES"]

_DCAP = "Intel TDX DCAP Quoting Library API"
_MODULE = "Intel TDX Module ABI specification"
_PCK = "Intel SGX PCK Certificate and Certificate Revocation List Profile Specification"
_PCS = "Intel PCS API specification v4"

_SEPT_VE_DISABLE = 1 << 28
_REGISTERS = ("mrseam", "mrsignerseam", "mrconfigid", "mrowner", "mrownerconfig")

# -- event log ------------------------------------------------------------------------------------


def _event_log(subject: TdxSubject) -> None:
    log = subject.event_log
    if log is None:
        raise EventLogMissing(
            "event log", "one that replays to RTMR0..3, or event_log under open", "none"
        )
    if isinstance(log, EventLogMalformed):
        raise log
    for i, (found, signed) in enumerate(zip(log.rtmrs(), subject.quote.body.rtmrs, strict=True)):
        if found != signed:
            raise EventLogNotReplayed(
                f"RTMR{i} after {len(log.events)} events",
                f"{signed.hex()[:16]}... as signed",
                f"{found.hex()[:16]}...",
            )


EVENT_LOG_RULE = TdxRule(
    "tdx.event_log",
    "TCG PC Client Platform Firmware Profile, crypto agile log; UEFI specification, Intel TDX "
    "extension of the confidential computing protocol",
    _event_log,
    (EventLogMissing, EventLogMalformed, EventLogNotReplayed),
)
"""Asked of every log, and by a policy that does not open "event_log"."""


def _event_table(subject: TdxSubject) -> None:
    assert subject.event_table is not None
    read_ccel_table(subject.event_table)


EVENT_TABLE_RULE = TdxRule(
    "tdx.event_table", "ACPI specification, CCEL table", _event_table, (EventLogMalformed,)
)
"""Asked of every CCEL table."""


# -- freshness ------------------------------------------------------------------------------------


def _freshness(subject: TdxSubject) -> None:
    if not subject.bound_to:
        raise FreshnessUnproven(
            "REPORTDATA", "what this challenge binds", "nothing to compare with"
        )
    found = subject.quote.body.reportdata
    if found != subject.bound_to.ljust(64, b"\0"):
        raise EvidenceNotBound(
            f"TD quote: expected REPORTDATA {subject.bound_to.hex()[:16]}... and zeros, found "
            f"{found.hex()[:16]}...; it was made for another challenge, key or machine"
        )


FRESHNESS_RULE = TdxRule(
    "tdx.freshness",
    f"{_DCAP}, A.3.2, REPORTDATA",
    _freshness,
    (FreshnessUnproven, EvidenceNotBound),
)
"""Asked where something is bound, and by a policy that does not open "freshness"."""


# -- policy ---------------------------------------------------------------------------------------


def _sept_ve_disable(subject: TdxSubject) -> None:
    if subject.policy.requirements.opens("sept_ve_disable"):
        return
    if not subject.quote.body.tdattributes & _SEPT_VE_DISABLE:
        raise SeptVeNotDisabled(
            "TDATTRIBUTES.SEPT_VE_DISABLE", "1, or sept_ve_disable under open", "0"
        )


def _service_td(subject: TdxSubject) -> None:
    found = subject.quote.body.mrservicetd
    if found is None or not any(found):
        # Nothing is bound, so there is nothing to pin; a pin of another value still counts.
        if "mrservicetd" in subject.policy.requirements.pins:
            subject.policy.require_pin("mrservicetd", bytes(48).hex())
        return
    requirements = subject.policy.requirements
    if "mrservicetd" not in requirements.pins and not requirements.opens("mrservicetd"):
        raise ServiceTdBound(
            "MRSERVICETD", "zeros, or a pin of mrservicetd", f"{found.hex()[:24]}..."
        )
    subject.policy.require_pin("mrservicetd", found.hex())


def _revoked(subject: TdxSubject) -> None:
    subject.policy.refuse_revoked("PCK certificate", subject.chain[0].serial)
    subject.policy.refuse_revoked("FMSPC", subject.pck.fmspc.hex())
    subject.policy.refuse_revoked("PPID", subject.pck.ppid.hex())


def _measurement(subject: TdxSubject) -> None:
    subject.policy.require_measurement("MRTD", subject.quote.body.mrtd.hex())


def _tcb_status(subject: TdxSubject) -> None:
    # Without a status a rule of the collateral has failed already.
    if subject.evaluation is not None:
        subject.policy.require_pin("tcb_status", subject.evaluation.status.value)


POLICY_RULES: tuple[TdxRule, ...] = (
    TdxRule(
        "tdx.sept_ve_disable",
        f"{_MODULE}, ATTRIBUTES.SEPT_VE_DISABLE (bit 28)",
        _sept_ve_disable,
        (SeptVeNotDisabled,),
    ),
    TdxRule(
        "tdx.service_td",
        f"{_DCAP}, A.4, MRSERVICETD",
        _service_td,
        (ServiceTdBound, PinRefused),
    ),
    TdxRule("tdx.revoked", "Policy, revoked", _revoked, (RevokedIdentity,)),
    TdxRule(
        "tdx.mrtd",
        f"{_DCAP}, A.3.2, MRTD",
        _measurement,
        (MeasurementNotPinned, MeasurementRefused),
    ),
    TdxRule(
        "tdx.tcb_status",
        f"{_PCS}, Get TCB Info, tcbStatus",
        _tcb_status,
        (PinMissing, PinRefused),
    ),
)
"""Asked where there is a policy, before its pins."""


def _pin_rule(pin: str, field: str, read: Callable[[TdxSubject], str]) -> TdxRule:
    def test(subject: TdxSubject) -> None:
        subject.policy.require_pin(pin, read(subject))

    return TdxRule(f"tdx.{pin}", field, test, (PinMissing, PinRefused))


def _register(name: str) -> Callable[[TdxSubject], str]:
    def read(subject: TdxSubject) -> str:
        value: bytes = getattr(subject.quote.body, name)
        return value.hex()

    return read


def _rtmr(index: int) -> Callable[[TdxSubject], str]:
    return lambda subject: subject.quote.body.rtmrs[index].hex()


PIN_RULES: tuple[TdxRule, ...] = (
    *(_pin_rule(n, f"{_DCAP}, A.3.2, {n.upper()}", _register(n)) for n in _REGISTERS),
    *(_pin_rule(f"rtmr{i}", f"{_DCAP}, A.3.2, RTMR{i}", _rtmr(i)) for i in range(4)),
    _pin_rule(
        "xfam",
        f"{_DCAP}, A.3.2, XFAM (as it stands in the quote, little-endian)",
        lambda subject: subject.quote.body.xfam.to_bytes(8, "little").hex(),
    ),
    _pin_rule(
        "fmspc",
        f"{_PCK}, SGX extension, FMSPC (1.2.840.113741.1.13.1.4)",
        lambda subject: subject.pck.fmspc.hex(),
    ),
    _pin_rule(
        "pck_serial",
        f"{_PCK}, PCK certificate, serial number",
        lambda subject: subject.chain[0].serial,
    ),
)
"""One for each pin that no rule above compares."""
