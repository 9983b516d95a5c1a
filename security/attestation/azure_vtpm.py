"""Verifies Azure's confidential VMs: a vTPM quote whose key a hardware report vouches for.

The paravisor in the VM makes the hardware report once, at boot, over the runtime claims that name
the vTPM's attestation key; later challenges are answered by the vTPM. So the hardware report is not
fresh and is not meant to be: freshness is the TPM quote's extraData, and it holds as far as the
paravisor, which the hardware report measures, keeps the key. What runs in the VM is in the PCRs.
Sources: Microsoft's "Confidential VM Guest Attestation Design Detail"; TPM 2.0 Library, Part 2.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicNumbers

from security.attestation.collateral import Collateral
from security.attestation.errors import (
    FreshnessUnproven,
    PcrDigestMismatch,
    PcrSelectionRefused,
    PinMissing,
    PinRefused,
    RuntimeDataMismatch,
    TdQuoteMissing,
    TdReportMismatch,
    TpmAlgorithmRefused,
    TpmQuoteMalformed,
    TpmSignatureInvalid,
    VtpmKeyUnusable,
)
from security.attestation.hcl_report import HardwareType, HclReport, read_hcl_report
from security.attestation.sev_snp import judge_report
from security.attestation.tdx import verify_tdx
from security.attestation.tdx_quote import TdQuote, read_td_quote
from security.attestation.tpm_quote import (
    PCRS,
    TPM_ALG_RSASSA,
    TPM_ALG_SHA256,
    TpmQuote,
    read_rsa_signature,
    read_tpm_quote,
)
from security.attestation.verdict import Expectations, FunctionRule, Verdict, judge
from security.errors import EvidenceMalformed, EvidenceNotBound

__all__ = ["AZURE_VTPM_RULES", "KIND", "AzureRule", "AzureSubject", "verify_azure_vtpm"]

KIND = "azure-vtpm"
PARTS = frozenset({"hcl_report", "tpm_message", "tpm_signature", "pcrs", "vcek", "td_quote"})
_NEEDED = ("hcl_report", "tpm_message", "tpm_signature", "pcrs")
_PCR_BYTES = 32
_HARDWARE = {HardwareType.SNP: "sev-snp", HardwareType.TDX: "tdx"}
_DESIGN = "Microsoft, Confidential VM Guest Attestation Design Detail"
_TPM = "TCG TPM 2.0 Library, Part 2"
_NOT_FRESH = (
    "the hardware report was made when the VM booted and is not fresh: freshness is the TPM "
    "quote's extraData, as far as the measured paravisor keeps the vTPM's key"
)


@dataclass(frozen=True, slots=True)
class AzureSubject:
    """What the rules look at.

    Attributes:
        hcl: the HCL report.
        reported: REPORT_DATA or REPORTDATA of the hardware report (64 bytes); None where there is
            no TD quote.
        td_quote: the TD quote; None on SEV-SNP, or where it is missing.
        message: what the TPM signed.
        quote: the same, parsed.
        signature: the TPM's signature.
        pcrs: values of PCR 0 to 23 of the SHA-256 bank.
        expected: what the policy says; None without one.
        bound_to: what extraData must be, or None.
    """

    hcl: HclReport
    reported: bytes | None
    td_quote: TdQuote | None
    message: bytes
    quote: TpmQuote
    signature: bytes
    pcrs: tuple[bytes, ...]
    expected: Expectations | None
    bound_to: bytes | None


AzureRule = FunctionRule[AzureSubject]
"""One check of vTPM evidence."""


def verify_azure_vtpm(
    parts: Mapping[str, bytes],
    collateral: Collateral,
    expected: Expectations | None,
    now: int,
    bound_to: bytes | None,
) -> Verdict:
    """Judges an Azure confidential VM.

    Args:
        parts: "hcl_report", "tpm_message" (TPMS_ATTEST), "tpm_signature" (RSA, or TPMT_SIGNATURE),
            "pcrs" (24 values of 32 bytes, SHA-256); optionally "vcek" (DER), and on TDX "td_quote".
        collateral: AMD's certificates and lists, or Intel's collateral, by the hardware.
        expected: pins, those of the hardware under the same names; None where only soundness is
            judged.
        now: Unix time in seconds.
        bound_to: what extraData must be: these bytes, or their SHA-256, as a TPM may be unable to
            take more than 50 bytes; None where freshness is not judged.

    Raises:
        EvidenceMalformed: by its subclasses, a part is missing, unknown or does not parse.
    """
    for name in _NEEDED:
        if name not in parts:
            raise EvidenceMalformed(f"Azure vTPM evidence: expected a part {name!r}, found none")
    unknown = sorted(set(parts) - PARTS)
    if unknown:
        raise EvidenceMalformed(
            f"Azure vTPM evidence: expected parts {', '.join(sorted(PARTS))}, found "
            f"{unknown[0][:64]!r}"
        )
    pcrs = parts["pcrs"]
    if len(pcrs) != PCRS * _PCR_BYTES:
        raise EvidenceMalformed(
            f"Azure vTPM evidence pcrs: expected {PCRS * _PCR_BYTES} bytes, found {len(pcrs)}"
        )
    hcl = read_hcl_report(parts["hcl_report"])
    hardware, reported, td_quote = _judge_hardware(hcl, parts, collateral, expected, now)
    subject = AzureSubject(
        hcl=hcl,
        reported=reported,
        td_quote=td_quote,
        message=parts["tpm_message"],
        quote=read_tpm_quote(parts["tpm_message"]),
        signature=parts["tpm_signature"],
        pcrs=tuple(pcrs[i : i + _PCR_BYTES] for i in range(0, len(pcrs), _PCR_BYTES)),
        expected=expected,
        bound_to=bound_to,
    )
    checks = hardware.checks + judge(_rules(subject), subject)
    notes = [*hardware.notes, _NOT_FRESH]
    if bound_to is None:
        notes.append("freshness was not judged: nothing was given that extraData must be")
    return Verdict(
        kind=KIND,
        product=hardware.product,
        measurement=hardware.measurement,
        identity=hardware.identity,
        fields={**hardware.fields, **_fields(subject)},
        checks=checks,
        notes=tuple(notes),
    )


def _judge_hardware(
    hcl: HclReport,
    parts: Mapping[str, bytes],
    collateral: Collateral,
    expected: Expectations | None,
    now: int,
) -> tuple[Verdict, bytes | None, TdQuote | None]:
    """What the hardware's own verifier says, REPORT_DATA, and the TD quote if there is one."""
    if hcl.hardware is HardwareType.SNP:
        certificates = (parts["vcek"],) if "vcek" in parts else ()
        found = judge_report(hcl.report, certificates, collateral, expected, now)
        verdict = Verdict(
            kind="sev-snp",
            product=found.product,
            measurement=found.report.measurement.hex(),
            identity=found.identity,
            fields=found.fields,
            checks=found.checks,
            notes=found.notes,
        )
        return verdict, found.report.report_data, None
    if "td_quote" not in parts:
        # A TDREPORT alone proves nothing to another machine, so nothing is read out of it.
        return Verdict("tdx", product="", measurement="", identity=""), None, None
    quote = read_td_quote(parts["td_quote"])
    # The quote's REPORTDATA is the claims' digest, which a rule of ours looks at; the VM's own
    # event log is the TPM's.
    opened = (
        None
        if expected is None
        else replace(
            expected,
            requirements=replace(
                expected.requirements,
                open=(*expected.requirements.open, "event_log", "freshness"),
            ),
        )
    )
    verdict = verify_tdx({"quote": parts["td_quote"]}, collateral, opened, now, None)
    notes = tuple(note for note in verdict.notes if not note.startswith("freshness"))
    return replace(verdict, notes=notes), quote.body.reportdata, quote


# -- rules ----------------------------------------------------------------------------------------


def _td_quote(subject: AzureSubject) -> None:
    if subject.td_quote is None:
        raise TdQuoteMissing(
            "TD quote", "one of the TDREPORT in the HCL report", "none", "ask IMDS for it"
        )


def _td_report(subject: AzureSubject) -> None:
    assert subject.td_quote is not None
    report, body = subject.hcl.td_report(), subject.td_quote.body
    identity = (
        body.tdattributes.to_bytes(8, "little")
        + body.xfam.to_bytes(8, "little")
        + body.mrtd
        + body.mrconfigid
        + body.mrowner
        + body.mrownerconfig
    )
    if report.identity != identity or report.reportdata != body.reportdata:
        raise TdReportMismatch(
            "TDREPORT in the HCL report",
            f"the TD of the quote, MRTD {body.mrtd.hex()}",
            f"MRTD {report.identity[16:24].hex()}... or other attributes or REPORTDATA",
        )


def _runtime_data(subject: AzureSubject) -> None:
    wanted = subject.hcl.claims_digest + bytes(32)
    if subject.reported is not None and subject.reported != wanted:
        raise RuntimeDataMismatch(
            "hardware report's REPORT_DATA",
            f"SHA-256 of the runtime claims, {wanted.hex()}, then zeros",
            f"{subject.reported.hex()}",
        )


def _vtpm_key(subject: AzureSubject) -> None:
    subject.hcl.attestation_key()


def _tpm_signature(subject: AzureSubject) -> None:
    try:
        numbers = subject.hcl.attestation_key()
        key = RSAPublicNumbers(numbers.exponent, numbers.modulus).public_key()
    except (VtpmKeyUnusable, ValueError):
        raise TpmSignatureInvalid("TPM signature", "one by HCLAkPub", "no usable key") from None
    scheme, digest, signature = read_rsa_signature(subject.signature, (key.key_size + 7) // 8)
    if (scheme, digest) != (TPM_ALG_RSASSA, TPM_ALG_SHA256):
        raise TpmAlgorithmRefused(
            "TPM signature scheme",
            f"0x{TPM_ALG_RSASSA:04x} (RSASSA) with 0x{TPM_ALG_SHA256:04x} (SHA-256)",
            f"0x{scheme:04x} with 0x{digest:04x}",
        )
    try:
        key.verify(signature, subject.message, padding.PKCS1v15(), hashes.SHA256())
    except InvalidSignature:
        raise TpmSignatureInvalid(
            "TPM signature", "one by HCLAkPub over the quote", "another"
        ) from None


def _pcr_selection(subject: AzureSubject) -> None:
    selections = subject.quote.selections
    banks = [selection.bank for selection in selections]
    if banks != [TPM_ALG_SHA256]:
        shown = ", ".join(f"0x{bank:04x}" for bank in banks[:4]) or "none"
        raise TpmAlgorithmRefused("PCR banks", f"0x{TPM_ALG_SHA256:04x} (SHA-256) alone", shown)
    found = selections[0].pcrs
    if found != tuple(range(PCRS)):
        raise PcrSelectionRefused("selected PCRs", "0 to 23", " ".join(map(str, found)) or "none")


def _pcr_digest(subject: AzureSubject) -> None:
    found = hashlib.sha256(b"".join(subject.pcrs)).digest()
    if found != subject.quote.pcr_digest:
        raise PcrDigestMismatch(
            "digest of the PCR values",
            f"{subject.quote.pcr_digest.hex()} as signed",
            f"{found.hex()}",
        )


def _freshness(subject: AzureSubject) -> None:
    if not subject.bound_to:
        raise FreshnessUnproven("extraData", "what this challenge binds", "nothing to compare with")
    found = subject.quote.extra_data
    if found not in (subject.bound_to, hashlib.sha256(subject.bound_to).digest()):
        raise EvidenceNotBound(
            f"TPM quote: expected extraData {subject.bound_to.hex()} or its SHA-256, found "
            f"{found.hex()[:16] or 'nothing'}...; it was made for another challenge or machine"
        )


def _hardware(subject: AzureSubject) -> None:
    assert subject.expected is not None
    subject.expected.require_pin("hardware", _HARDWARE[subject.hcl.hardware])


def _pcr_rule(index: int) -> AzureRule:
    def test(subject: AzureSubject) -> None:
        assert subject.expected is not None
        subject.expected.require_pin(f"pcr{index}", subject.pcrs[index].hex())

    return AzureRule(
        f"azure_vtpm.pcr{index}",
        f"TCG PC Client Platform Firmware Profile, PCR {index}; {_TPM}, TPM2B_DIGEST",
        test,
        (PinMissing, PinRefused),
    )


_TD_QUOTE_RULE = AzureRule(
    "azure_vtpm.td_quote", f"{_DESIGN}, TDX report", _td_quote, (TdQuoteMissing,)
)
_TD_REPORT_RULE = AzureRule(
    "azure_vtpm.td_report",
    f"{_DESIGN}, TDX report; Intel TDX Module ABI specification, TDREPORT_STRUCT",
    _td_report,
    (TdReportMismatch,),
)
_ALWAYS = (
    AzureRule(
        "azure_vtpm.runtime_data",
        f"{_DESIGN}, Runtime Data, hash type and claims",
        _runtime_data,
        (RuntimeDataMismatch,),
    ),
    AzureRule(
        "azure_vtpm.key",
        f"{_DESIGN}, Runtime Claims, HCLAkPub; RFC 7518, 6.3",
        _vtpm_key,
        (VtpmKeyUnusable,),
    ),
    AzureRule(
        "azure_vtpm.signature",
        f"{_TPM}, TPMT_SIGNATURE, TPM_ALG_RSASSA; RFC 8017, 8.2",
        _tpm_signature,
        (TpmSignatureInvalid, TpmAlgorithmRefused, TpmQuoteMalformed),
    ),
    AzureRule(
        "azure_vtpm.pcr_selection",
        f"{_TPM}, TPMS_QUOTE_INFO, pcrSelect",
        _pcr_selection,
        (TpmAlgorithmRefused, PcrSelectionRefused),
    ),
    AzureRule(
        "azure_vtpm.pcr_digest",
        f"{_TPM}, TPMS_QUOTE_INFO, pcrDigest",
        _pcr_digest,
        (PcrDigestMismatch,),
    ),
)
_FRESHNESS_RULE = AzureRule(
    "azure_vtpm.freshness",
    f"{_TPM}, TPMS_ATTEST, extraData",
    _freshness,
    (FreshnessUnproven, EvidenceNotBound),
)
_PIN_RULES = (
    AzureRule(
        "azure_vtpm.hardware", f"{_DESIGN}, report type", _hardware, (PinMissing, PinRefused)
    ),
    *(_pcr_rule(i) for i in range(PCRS)),
)

AZURE_VTPM_RULES: tuple[AzureRule, ...] = (
    _TD_QUOTE_RULE,
    _TD_REPORT_RULE,
    *_ALWAYS,
    _FRESHNESS_RULE,
    *_PIN_RULES,
)
"""Every rule of this kind besides those of the hardware's own verifier."""


def _rules(subject: AzureSubject) -> list[AzureRule]:
    rules: list[AzureRule] = []
    if subject.hcl.hardware is HardwareType.TDX:
        rules.append(_TD_QUOTE_RULE)
    if subject.td_quote is not None:
        rules.append(_TD_REPORT_RULE)
    rules += _ALWAYS
    expected = subject.expected
    if subject.bound_to is not None or (
        expected is not None and not expected.requirements.opens("freshness")
    ):
        rules.append(_FRESHNESS_RULE)
    if expected is not None:
        rules += _PIN_RULES
    return rules


def _fields(subject: AzureSubject) -> dict[str, str]:
    quote = subject.quote
    fields = {
        "hcl_version": str(subject.hcl.version),
        "hardware": _HARDWARE[subject.hcl.hardware],
        "runtime_claims_sha256": subject.hcl.claims_digest.hex(),
        "tpm_extra_data": quote.extra_data.hex(),
        "tpm_qualified_signer": quote.qualified_signer.hex(),
        "tpm_clock_ms": str(quote.clock),
        "tpm_clock_safe": "yes" if quote.safe else "no",
        "tpm_reset_count": str(quote.reset_count),
        "tpm_restart_count": str(quote.restart_count),
        "tpm_firmware_version": f"{quote.firmware_version:016x}",
        "tpm_pcr_digest": quote.pcr_digest.hex(),
        **{f"pcr{i}": value.hex() for i, value in enumerate(subject.pcrs)},
    }
    configuration = subject.hcl.parsed_claims.get("vm-configuration")
    if isinstance(configuration, dict):
        for name, value in sorted(configuration.items())[:32]:
            if isinstance(value, (bool, int, str)):
                fields[f"vm-configuration.{name[:64]}"] = str(value)[:256]
    return fields
