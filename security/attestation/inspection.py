"""Shows what a file of evidence says, field by field; verifies nothing.

What the file is, is found out from its first bytes. The parsers are those of the verifiers, with
their bounds; what they refuse is refused here, too.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from placement.document import DocumentError, decode
from security.attestation.azure_evidence import read_azure_evidence
from security.attestation.certificates import (
    Certificate,
    RevocationList,
    read_certificate,
    read_revocation_list,
)
from security.attestation.der import DerReader
from security.attestation.document_files import read_document
from security.attestation.event_log import read_ccel_table, read_event_log
from security.attestation.evidence import decode_parts
from security.attestation.hcl_report import HardwareType, read_hcl_report
from security.attestation.nvidia_evidence import read_json_evidence
from security.attestation.rim import read_heading
from security.attestation.snp_certificate_table import parse_certificate_table
from security.attestation.snp_fields import report_fields
from security.attestation.snp_report import parse_report
from security.attestation.spdm import OpaqueField, read_report
from security.attestation.tdx_collateral import read_tdx_collateral
from security.attestation.tdx_quote import TdQuote, read_enclave_report, read_td_quote
from security.attestation.tpm_quote import read_tpm_quote
from security.errors import AppraisalError, EvidenceMalformed

__all__ = ["Section", "inspect_document"]

SNP_REPORT_BYTES = 1184
_MAX_SHOWN = 256
_MAX_EVENTS_SHOWN = 256
_MAX_TOKENS = 64
_MAX_JSON_BYTES = 1 << 20
_QUOTE_VERSIONS = (3, 4, 5)
_SGX_BODY = slice(48, 432)
_TEXT_FIELDS = frozenset(
    {
        OpaqueField.DRIVER_VERSION,
        OpaqueField.PROJECT,
        OpaqueField.PROJECT_SKU,
        OpaqueField.CHIP_SKU,
        OpaqueField.CHIP_INFO,
    }
)
_EXTENSIONS = {
    "1.3.6.1.4.1.3704.1.1": "AMD structVersion",
    "1.3.6.1.4.1.3704.1.2": "AMD productName",
    "1.3.6.1.4.1.3704.1.3.1": "AMD blSPL",
    "1.3.6.1.4.1.3704.1.3.2": "AMD teeSPL",
    "1.3.6.1.4.1.3704.1.3.3": "AMD snpSPL",
    "1.3.6.1.4.1.3704.1.3.8": "AMD ucodeSPL",
    "1.3.6.1.4.1.3704.1.3.9": "AMD fmcSPL",
    "1.3.6.1.4.1.3704.1.4": "AMD hwID",
    "1.3.6.1.4.1.3704.1.5": "AMD csp_id",
    "1.2.840.113741.1.13.1": "Intel SGX extension",
    "2.23.133.5.4.1": "DICE TcbInfo",
    "2.5.29.14": "subjectKeyIdentifier",
    "2.5.29.15": "keyUsage",
    "2.5.29.19": "basicConstraints",
    "2.5.29.31": "cRLDistributionPoints",
    "2.5.29.35": "authorityKeyIdentifier",
}


@dataclass(frozen=True, slots=True)
class Section:
    """A structure in a file.

    Attributes:
        title: what it is.
        fields: its fields by the vendor's names, in order.
    """

    title: str
    fields: Mapping[str, str]


def inspect_document(data: bytes) -> list[Section]:
    """The structures of a file.

    Raises:
        EvidenceMalformed: it is nothing that is known, or does not parse as what it begins as.
    """
    head = data.lstrip()[:64]
    version = int.from_bytes(data[:2], "little")
    if data[:4] == b"HCLA":
        return _hcl(data)
    if data[:5] == b"BHEV1":
        parts = decode_parts(data)
        return [Section("Bulkhead evidence", {name: _size(part) for name, part in parts.items()})]
    if data[:4] == b"CCEL":
        return [Section("ACPI table CCEL", {"log area minimum length": str(read_ccel_table(data))})]
    if data[:4] == b"\xffTCG":
        return _tpm_quote(data)
    if data[:1] == b"\x11" and len(data) > 37:
        return _spdm(data, "device")
    if data[:1] == b"\x30" or head.startswith(b"-----BEGIN"):
        return _certificates(data)
    if head[:1] == b"<":
        return _rim(data)
    if head[:1] in (b"{", b"["):
        return _json(data)
    if len(data) == SNP_REPORT_BYTES:
        return _snp(data)
    digits = b"".join(data.split())
    if re.fullmatch(rb"(?:[0-9A-Fa-f]{2})+", digits):
        return _spdm(bytes.fromhex(digits.decode("ascii")), "device")
    if b"Spec ID Event03" in data[:64]:
        return _event_log(data)
    if version in _QUOTE_VERSIONS:
        return _quote(data)
    return _table(data)


def _snp(data: bytes) -> list[Section]:
    report = parse_report(data)
    return [Section("SEV-SNP attestation report", report_fields(report, report.product))]


def _quote(data: bytes) -> list[Section]:
    tee_type = int.from_bytes(data[4:8], "little")
    if data[:2] == b"\x03\x00" or tee_type == 0:
        report = read_enclave_report(data[_SGX_BODY])
        return [Section("Intel SGX quote (not a trust domain)", _dump(report))]
    quote = read_td_quote(data)
    return _td_quote(quote)


def _td_quote(quote: TdQuote) -> list[Section]:
    sections = [
        Section(f"TDX quote, version {quote.header.version}", _dump(quote.header)),
        Section("TD report", _dump(quote.body)),
        Section("Quoting enclave's report", _dump(quote.qe_report)),
        Section(
            "Signature data",
            {
                "signature": quote.signature_data.signature.hex(),
                "attestation_key": quote.signature_data.attestation_key.hex(),
                "trailing bytes, signed by nobody": str(len(quote.trailing)),
            },
        ),
    ]
    return sections + _certificates(quote.signature_data.pck_chain_pem)


def _hcl(data: bytes) -> list[Section]:
    hcl = read_hcl_report(data)
    fields = {
        "version": str(hcl.version),
        "hardware": hcl.hardware.name,
        "SHA-256 of the runtime claims": hcl.claims_digest.hex(),
        "runtime claims": ", ".join(sorted(map(str, hcl.parsed_claims)))[:_MAX_SHOWN],
    }
    sections = [Section("Azure HCL report", fields)]
    if hcl.hardware is HardwareType.SNP:
        return sections + _snp(hcl.report)
    return [*sections, Section("TDREPORT", _dump(hcl.td_report()))]


def _tpm_quote(data: bytes) -> list[Section]:
    quote = read_tpm_quote(data)
    selections = {
        f"selection of bank {item.bank:#06x}": " ".join(map(str, item.pcrs))
        for item in quote.selections
    }
    return [Section("TPM quote (TPMS_ATTEST)", _dump(quote) | selections)]


def _spdm(data: bytes, name: str) -> list[Section]:
    report = read_report(data, name)
    opaque = {
        field.name: value.rstrip(b"\0").decode("ascii", "replace")
        if field in _TEXT_FIELDS
        else _short(value)
        for field, value in report.response.opaque.items()
    }
    blocks = {str(block.index): block.value.hex() for block in report.response.blocks}
    return [
        Section(f"SPDM GET_MEASUREMENTS ({name})", _dump(report.request)),
        Section(
            "SPDM MEASUREMENTS",
            {
                "nonce": report.response.nonce.hex(),
                "signature": report.response.signature.hex(),
                **opaque,
            },
        ),
        Section("Measurement blocks", blocks),
    ]


def _certificates(data: bytes) -> list[Section]:
    found = read_document("", data)
    sections = [_certificate(read_certificate(der)) for der in found.certificates]
    sections += [_revocation_list(read_revocation_list(der)) for der in found.crls]
    if not sections:
        raise EvidenceMalformed("certificates: expected at least one in DER or PEM, found none")
    return sections


def _certificate(certificate: Certificate) -> Section:
    fields = {
        "subject": _name(certificate.subject.parts),
        "issuer": _name(certificate.issuer.parts),
        "serial": f"{certificate.serial:x}",
        "notBefore": _time(certificate.not_before),
        "notAfter": _time(certificate.not_after),
        "SHA-256": certificate.fingerprint,
    }
    for extension in certificate.extensions:
        name = _EXTENSIONS.get(extension.oid, extension.oid)
        fields[f"{name}{' (critical)' if extension.critical else ''}"] = _value(extension.value)
    return Section("Certificate", fields)


def _value(octets: bytes) -> str:
    """A number or text inside DER as such, everything else as digits."""
    try:
        reader = DerReader(octets, "extension")
        tag = reader.peek()
        content = reader.take(tag, "value") if tag in (0x02, 0x0C, 0x16) else None
        reader.finish()
    except AppraisalError:
        return _short(octets)
    if content is None:
        return _short(octets)
    if octets[0] == 0x02:
        return str(int.from_bytes(content, "big", signed=True))
    return content.decode("utf-8", "replace")[:_MAX_SHOWN]


def _revocation_list(crl: RevocationList) -> Section:
    revoked = sorted(crl.revoked)
    return Section(
        "Certificate revocation list",
        {
            "issuer": _name(crl.issuer.parts),
            "thisUpdate": _time(crl.this_update),
            "nextUpdate": "none" if crl.next_update is None else _time(crl.next_update),
            "revoked": str(len(revoked)),
            "serials": " ".join(f"{serial:x}" for serial in revoked[:_MAX_EVENTS_SHOWN]),
        },
    )


def _rim(data: bytes) -> list[Section]:
    heading = read_heading(data)
    return [Section("NVIDIA reference integrity manifest", _dump(heading))]


def _event_log(data: bytes) -> list[Section]:
    log = read_event_log(data)
    events = {
        f"{number}": f"register {event.index} type {event.type:#x} {event.digest.hex()}"
        for number, event in enumerate(log.events[:_MAX_EVENTS_SHOWN])
    }
    replay = {f"rtmr{number}": value.hex() for number, value in enumerate(log.rtmrs())}
    return [
        Section("Event log", {"events": str(len(log.events))} | events),
        Section("Its replay", replay),
    ]


def _table(data: bytes) -> list[Section]:
    try:
        table = parse_certificate_table(data)
    except AppraisalError:
        table = ()
    if not table:
        raise EvidenceMalformed(
            "file: expected a report, quote, certificate, manifest, token, event log or evidence "
            f"in JSON, found {len(data)} bytes that begin as none of them"
        )
    sections = [Section("Certificate table", {role: _size(der) for role, der in table})]
    return sections + [_certificate(read_certificate(der)) for _, der in table]


# -- JSON ---------------------------------------------------------------------------------------


def _json(data: bytes) -> list[Section]:
    if data.lstrip()[:1] == b"[":
        return _token(data) if b'"JWT"' in data[:256] else _device_list(data)
    if b'"tcb_info"' in data:
        return _tdx_collateral(data)
    parts = read_azure_evidence(data)
    show: Mapping[str, Callable[[bytes], list[Section]]] = {
        "hcl_report": _hcl,
        "tpm_message": _tpm_quote,
        "vcek": _certificates,
        "td_quote": _quote,
    }
    sections = [Section("Azure vTPM evidence", {name: _size(part) for name, part in parts.items()})]
    pcrs = parts["pcrs"]
    values = {f"pcr{i}": pcrs[32 * i : 32 * i + 32].hex() for i in range(len(pcrs) // 32)}
    for name, part in parts.items():
        if name in show:
            sections += show[name](part)
    return [*sections, Section("PCRs (SHA-256)", values)]


def _device_list(data: bytes) -> list[Section]:
    parts = read_json_evidence(data)
    sections: list[Section] = []
    for name, part in parts.items():
        if name.endswith(".report"):
            sections += _spdm(part, name.removesuffix(".report"))
        else:
            sections += _certificates(part)
    return sections


def _tdx_collateral(data: bytes) -> list[Section]:
    collateral = read_tdx_collateral(data)
    info, identity = collateral.tcb_info, collateral.qe_identity
    return [
        Section(
            "TDX collateral",
            {
                "tcb_info.id": info.id,
                "tcb_info.fmspc": info.fmspc.hex(),
                "tcb_info.issueDate": _time(info.issue_date),
                "tcb_info.nextUpdate": _time(info.next_update),
                "tcb_info.tcbEvaluationDataNumber": str(info.evaluation_number),
                "qe_identity": _short(repr(identity).encode()),
            },
        )
    ]


def _token(data: bytes) -> list[Section]:
    """The claims of a detached EAT, read without a key."""
    tokens = re.findall(rb"[A-Za-z0-9_-]+\.([A-Za-z0-9_-]+)\.[A-Za-z0-9_-]+", data)
    if len(tokens) > _MAX_TOKENS:
        raise EvidenceMalformed(f"tokens: expected at most {_MAX_TOKENS}, found {len(tokens)}")
    sections: list[Section] = []
    for number, raw in enumerate(tokens):
        try:
            payload = base64.urlsafe_b64decode(raw + b"=" * (-len(raw) % 4))
            claims = decode(payload, _MAX_JSON_BYTES)
        except (binascii.Error, DocumentError):
            raise EvidenceMalformed(f"token {number}: expected claims in JSON") from None
        fields = {str(name): str(value)[:_MAX_SHOWN] for name, value in claims.items()}
        sections.append(Section(f"NRAS token {number}", fields))
    if not sections:
        raise EvidenceMalformed("tokens: expected at least one JWT, found none")
    return sections


# -- values -------------------------------------------------------------------------------------


def _dump(item: object) -> dict[str, str]:
    """The fields of a parsed structure that are numbers, bytes or text."""
    fields: dict[str, str] = {}
    if dataclasses.is_dataclass(item):
        for entry in dataclasses.fields(item):
            value = getattr(item, entry.name)
            if isinstance(value, bytes):
                fields[entry.name] = value.hex()
            elif isinstance(value, int | str):
                fields[entry.name] = str(value)
            elif isinstance(value, tuple) and all(isinstance(part, bytes) for part in value):
                fields |= {f"{entry.name}{i}": part.hex() for i, part in enumerate(value)}
    return fields


def _name(parts: tuple[tuple[str, str], ...]) -> str:
    short = {"2.5.4.3": "CN", "2.5.4.10": "O", "2.5.4.11": "OU", "2.5.4.6": "C"}
    return ", ".join(f"{short.get(oid, oid)}={value}" for oid, value in parts)


def _time(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()


def _size(octets: bytes) -> str:
    return f"{len(octets)} bytes"


def _short(octets: bytes) -> str:
    shown = octets[:_MAX_SHOWN].hex()
    return shown if len(octets) <= _MAX_SHOWN else f"{shown}... ({len(octets)} bytes)"
