"""Verifies evidence of Intel TDX trust domains: a quote, collateral, and perhaps an event log.

Everything is judged by rules of our own, each with its name and error; `dcap` adds a second
opinion. Sources: "Intel TDX DCAP Quoting Library API", appendix A.3 and A.4 (quote), "Intel Trust
Domain Extensions Module Base Architecture" and its ABI specification (ATTRIBUTES, measurement
registers), "Intel SGX PCK Certificate and CRL Profile Specification", "API specification" of the
Provisioning Certification Service, version 4 (collateral).
"""

from __future__ import annotations

from collections.abc import Mapping

from security.attestation.collateral import Collateral
from security.attestation.errors import EventLogMalformed, TdxCollateralMalformed
from security.attestation.event_log import EventLog, read_event_log
from security.attestation.intel_pki import read_certificate_chain, read_pck_extension
from security.attestation.tdx_collateral import TdxCollateral, read_tdx_collateral
from security.attestation.tdx_collateral_rules import (
    COLLATERAL_RULES,
    MISSING_COLLATERAL_RULE,
    SECOND_OPINION_RULE,
)
from security.attestation.tdx_policy_rules import (
    EVENT_LOG_RULE,
    EVENT_TABLE_RULE,
    FRESHNESS_RULE,
    PIN_RULES,
    POLICY_RULES,
)
from security.attestation.tdx_quote import read_td_quote
from security.attestation.tdx_quote_rules import QUOTE_RULES
from security.attestation.tdx_subject import TdxRule, TdxSubject
from security.attestation.tdx_tcb import evaluate_tcb
from security.attestation.verdict import Expectations, Verdict, judge
from security.errors import EvidenceMalformed

__all__ = ["KIND", "TDX_RULES", "verify_tdx"]

KIND = "tdx"
PARTS = frozenset({"quote", "event_log", "event_table"})
_MAX_COLLATERAL_DOCUMENTS = 64

TDX_RULES: tuple[TdxRule, ...] = (
    *QUOTE_RULES,
    MISSING_COLLATERAL_RULE,
    *COLLATERAL_RULES,
    SECOND_OPINION_RULE,
    EVENT_LOG_RULE,
    EVENT_TABLE_RULE,
    FRESHNESS_RULE,
    *POLICY_RULES,
    *PIN_RULES,
)
"""Every rule of this kind."""


def verify_tdx(
    parts: Mapping[str, bytes],
    collateral: Collateral,
    expected: Expectations | None,
    now: int,
    bound_to: bytes | None,
) -> Verdict:
    """Judges a trust domain.

    Args:
        parts: "quote" (version 4 or 5); optionally "event_log" (the CCEL log area) and
            "event_table" (the CCEL ACPI table).
        collateral: `tdx` is used: of its documents one that fits the platform.
        expected: pins; None where only soundness is judged.
        now: Unix time in seconds.
        bound_to: 1 to 64 bytes that REPORTDATA must begin with, zeros after; None where freshness
            is not judged.

    Raises:
        EvidenceMalformed: no quote, unknown parts, or a quote that does not parse; `NotATdQuote`
            for an SGX quote.
    """
    if "quote" not in parts:
        raise EvidenceMalformed("TDX evidence: expected a part named quote, found none")
    unknown = sorted(set(parts) - PARTS)
    if unknown:
        raise EvidenceMalformed(
            f"TDX evidence: expected parts {', '.join(sorted(PARTS))}, found {unknown[0][:64]!r}"
        )
    quote = read_td_quote(parts["quote"])
    chain = read_certificate_chain(quote.signature_data.pck_chain_pem, "PCK chain")
    pck = read_pck_extension(chain[0])
    notes: list[str] = []
    chosen, fmspcs = _choose(
        collateral.tdx, pck.fmspc, chain[1].name if chain[1:] else "", now, notes
    )
    subject = TdxSubject(
        quote=quote,
        chain=chain,
        pck=pck,
        collateral=chosen,
        collateral_fmspcs=fmspcs,
        evaluation=None
        if chosen is None
        else evaluate_tcb(quote.body, quote.qe_report, pck, chosen.tcb_info, chosen.qe_identity),
        event_log=_read_log(parts.get("event_log")),
        event_table=parts.get("event_table"),
        expected=expected,
        now=now,
        bound_to=bound_to,
    )
    checks = judge(QUOTE_RULES, subject)
    checks += judge((MISSING_COLLATERAL_RULE,) if chosen is None else COLLATERAL_RULES, subject)
    sound = all(check.failure is None for check in checks)
    checks += judge(_occasional_rules(subject), subject)
    if expected is not None:
        checks += judge((*POLICY_RULES, *PIN_RULES), subject)
    if chosen is not None:
        # Asked only where the evidence is sound: it stops at the first thing that it dislikes, and
        # what we refuse ourselves has its own name already.
        if sound:
            checks += judge((SECOND_OPINION_RULE,), subject)
        else:
            notes.append("dcap-qvl was not asked for a second opinion: other checks failed")
    notes += _notes(subject)
    return Verdict(
        kind=KIND,
        product="TDX 1.5" if quote.body.tee_tcb_svn2 is not None else "TDX 1.0",
        measurement=quote.body.mrtd.hex(),
        # Not the certificate's serial number: a platform has a certificate for each TCB level.
        identity=pck.ppid.hex(),
        fields=_fields(subject),
        checks=checks,
        notes=tuple(notes),
    )


def _choose(
    documents: tuple[bytes, ...], fmspc: bytes, ca: str, now: int, notes: list[str]
) -> tuple[TdxCollateral | None, tuple[str, ...]]:
    """The best document for a platform, and the FMSPCs of all.

    Of several that fit, one whose dates hold now and whose list is of the PCK certificate's own CA
    comes first, then the one with the highest tcbEvaluationDataNumber, then the latest.
    """
    fitting: list[tuple[tuple[bool, bool, bool, int, int], TdxCollateral]] = []
    fmspcs: list[str] = []
    for i, document in enumerate(documents[:_MAX_COLLATERAL_DOCUMENTS]):
        try:
            parsed = read_tdx_collateral(document)
        except TdxCollateralMalformed as error:
            notes.append(f"collateral document {i} was ignored: {error}")
            continue
        info = parsed.tcb_info
        fmspcs.append(info.fmspc.hex())
        if info.fmspc == fmspc:
            timely = info.issue_date <= now <= info.next_update
            own_ca = parsed.pck_crl_chain[0].name == ca
            rank = (info.id == "TDX", own_ca, timely, info.evaluation_number, info.issue_date)
            fitting.append((rank, parsed))
    if len(documents) > _MAX_COLLATERAL_DOCUMENTS:
        notes.append(f"only the first {_MAX_COLLATERAL_DOCUMENTS} collateral documents were read")
    if not fitting:
        return None, tuple(fmspcs)
    return max(fitting, key=lambda item: item[0])[1], tuple(fmspcs)


def _read_log(data: bytes | None) -> EventLog | EventLogMalformed | None:
    if data is None:
        return None
    try:
        return read_event_log(data)
    except EventLogMalformed as error:
        return error


def _occasional_rules(subject: TdxSubject) -> list[TdxRule]:
    """The rules that depend on what there is to judge and on what the policy opens."""
    requirements = None if subject.expected is None else subject.expected.requirements
    rules: list[TdxRule] = []
    asked = requirements is not None and not requirements.opens("event_log")
    if subject.event_log is not None or asked:
        rules.append(EVENT_LOG_RULE)
    if subject.event_table is not None:
        rules.append(EVENT_TABLE_RULE)
    asked = requirements is not None and not requirements.opens("freshness")
    if subject.bound_to is not None or asked:
        rules.append(FRESHNESS_RULE)
    return rules


def _notes(subject: TdxSubject) -> list[str]:
    notes: list[str] = []
    trailing = subject.quote.trailing
    if trailing and not any(trailing):
        notes.append(
            f"{len(trailing)} bytes of zero after the quote were ignored: nobody signs them"
        )
    if subject.bound_to is None:
        notes.append("freshness was not judged: nothing was given that REPORTDATA must hold")
    if subject.expected is None:
        notes.append("no register, status or identity was compared with a pin: no policy was given")
    collateral, evaluation = subject.collateral, subject.evaluation
    if collateral is not None:
        for name, crl in (("root CA", collateral.root_ca_crl), ("PCK", collateral.pck_crl)):
            if crl.this_update > subject.now:
                notes.append(
                    f"the {name} revocation list was issued later than now: it is used all the "
                    "same, as it can only revoke more (RFC 5280, 6.3.3)"
                )
        platform = collateral.tcb_info.evaluation_number
        enclave = collateral.qe_identity.evaluation_number
        if platform != enclave:
            notes.append(
                f"tcbEvaluationDataNumber of the TCB info is {platform}, that of the QE identity "
                f"{enclave}: Intel issued them for two TCB recoveries"
            )
    if evaluation is not None and evaluation.advisories:
        notes.append(f"advisories: {', '.join(evaluation.advisories)}")
    return notes


def _fields(subject: TdxSubject) -> dict[str, str]:
    quote, body = subject.quote, subject.quote.body
    fields = {
        "version": str(quote.header.version),
        "tee_type": f"0x{quote.header.tee_type:x}",
        "user_data": quote.header.user_data.hex(),
        "tee_tcb_svn": body.tee_tcb_svn.hex(),
        "mrseam": body.mrseam.hex(),
        "mrsignerseam": body.mrsignerseam.hex(),
        "seamattributes": body.seamattributes.hex(),
        "tdattributes": body.tdattributes.to_bytes(8, "little").hex(),
        "xfam": body.xfam.to_bytes(8, "little").hex(),
        "mrtd": body.mrtd.hex(),
        "mrconfigid": body.mrconfigid.hex(),
        "mrowner": body.mrowner.hex(),
        "mrownerconfig": body.mrownerconfig.hex(),
        **{f"rtmr{i}": register.hex() for i, register in enumerate(body.rtmrs)},
        "report_data": body.reportdata.hex(),
    }
    if body.tee_tcb_svn2 is not None and body.mrservicetd is not None:
        fields["tee_tcb_svn2"] = body.tee_tcb_svn2.hex()
        fields["mrservicetd"] = body.mrservicetd.hex()
    fields |= {
        "fmspc": subject.pck.fmspc.hex(),
        "pck_serial": subject.chain[0].serial,
        "pck_ca": subject.chain[1].name if len(subject.chain) > 1 else "",
        "ppid": subject.pck.ppid.hex(),
        "pcesvn": str(subject.pck.pcesvn),
        "cpusvn": subject.pck.cpusvn.hex(),
        "qe_isvsvn": str(quote.qe_report.isvsvn),
    }
    if subject.evaluation is not None:
        fields["tcb_status"] = subject.evaluation.status.value
        fields["tcb_date"] = subject.evaluation.date
        fields["advisory_ids"] = " ".join(subject.evaluation.advisories)
    if subject.collateral is not None:
        number = subject.collateral.tcb_info.evaluation_number
        fields["tcb_evaluation_data_number"] = str(number)
    if subject.event_log is not None:
        log = subject.event_log
        fields["event_log_events"] = str(len(log.events)) if isinstance(log, EventLog) else ""
    return fields
