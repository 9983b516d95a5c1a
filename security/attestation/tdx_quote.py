"""TD quotes: a bounded parse by Intel's field names.

Layout after "Intel TDX DCAP Quoting Library API", appendix A.3 (quote version 4) and A.4 (version
5). What the attestation key signs is the header and the body; the signature data follows with its
length. Buffers are often longer than the quote: the rest is kept apart, never hashed, never
compared, and a rule of the verifier looks at it.
"""

from __future__ import annotations

from dataclasses import dataclass

from security.attestation.errors import (
    NotATdQuote,
    QuoteAlgorithmRefused,
    QuoteVersionUnsupported,
)
from security.attestation.octets import OctetReader
from security.errors import EvidenceMalformed

__all__ = [
    "EnclaveReport",
    "QuoteHeader",
    "QuoteSignatureData",
    "TdQuote",
    "TdQuoteBody",
    "read_enclave_report",
    "read_td_quote",
]

MAX_QUOTE_BYTES = 64 << 10
"""Longest buffer with a quote that is read; real quotes have 5 KB, buffers 8 KB."""

TDX_TEE_TYPE = 0x81
ECDSA_P256_KEY_TYPE = 2
INTEL_QE_VENDOR_ID = bytes.fromhex("939a7233f79c4ca9940a0db3957f0607")

_HEADER_BYTES = 48
_ENCLAVE_REPORT_BYTES = 384
_QE_REPORT_CERTIFICATION_DATA = 6
_PCK_CERTIFICATE_CHAIN = 5
_MAX_AUTH_BYTES = 1024
_MAX_CHAIN_BYTES = 32 << 10
_SGX_BODY, _TD_1_0_BODY, _TD_1_5_BODY = 1, 2, 3
_BODY_BYTES = {_TD_1_0_BODY: 584, _TD_1_5_BODY: 648}


@dataclass(frozen=True, slots=True)
class QuoteHeader:
    """Quote Header (A.3.1).

    Attributes:
        version: 4 or 5.
        attestation_key_type: 2, ECDSA-256-with-P-256.
        tee_type: 0x81, TDX.
        qe_vendor_id: 16 bytes; Intel's.
        user_data: 20 bytes of the quoting enclave's choice.
    """

    version: int
    attestation_key_type: int
    tee_type: int
    qe_vendor_id: bytes
    user_data: bytes


@dataclass(frozen=True, slots=True)
class TdQuoteBody:
    """TD Quote Body (A.3.2; for TD 1.5 A.4). Registers have 48 bytes, integers are little-endian.

    Attributes:
        tee_tcb_svn: 16 security version numbers of the TDX module at the TD's launch.
        mrseam: measurement of the TDX module.
        mrsignerseam: its signer; zero for Intel.
        seamattributes: its attributes (8 bytes); zero in production.
        tdattributes: the TD's ATTRIBUTES (64 bits).
        xfam: extended features that the TD may use (64 bits).
        mrtd: measurement of the TD's first contents.
        mrconfigid: software-defined id of a configuration, set by the host.
        mrowner: software-defined id of the owner, set by the host.
        mrownerconfig: software-defined id of the owner's configuration, set by the host.
        rtmrs: RTMR0 to RTMR3, extended at run time.
        reportdata: 64 bytes of the TD's choice.
        tee_tcb_svn2: numbers of the TDX module that runs now; None in a TD 1.0 body.
        mrservicetd: measurement of the service TDs bound to this one; None in a TD 1.0 body.
    """

    tee_tcb_svn: bytes
    mrseam: bytes
    mrsignerseam: bytes
    seamattributes: bytes
    tdattributes: int
    xfam: int
    mrtd: bytes
    mrconfigid: bytes
    mrowner: bytes
    mrownerconfig: bytes
    rtmrs: tuple[bytes, bytes, bytes, bytes]
    reportdata: bytes
    tee_tcb_svn2: bytes | None
    mrservicetd: bytes | None


@dataclass(frozen=True, slots=True)
class EnclaveReport:
    """Enclave Report Body (A.3.10), of the quoting enclave.

    Attributes:
        cpusvn: 16 bytes.
        miscselect: 32 bits.
        attributes: 16 bytes; bit 1 of the first is DEBUG.
        mrenclave: 32 bytes.
        mrsigner: 32 bytes.
        isvprodid: 16 bits.
        isvsvn: 16 bits.
        reportdata: 64 bytes.
    """

    cpusvn: bytes
    miscselect: int
    attributes: bytes
    mrenclave: bytes
    mrsigner: bytes
    isvprodid: int
    isvsvn: int
    reportdata: bytes


@dataclass(frozen=True, slots=True)
class QuoteSignatureData:
    """ECDSA 256-bit Quote Signature Data (A.3.8) with its QE Report Certification Data (A.3.11).

    Attributes:
        signature: r || s (64 bytes) over header and body.
        attestation_key: x || y of a point on P-256 (64 bytes).
        qe_report: the quoting enclave's report as signed (384 bytes).
        qe_report_signature: r || s by the PCK key (64 bytes).
        qe_authentication_data: bytes that the QE's report data cover besides the key.
        pck_chain_pem: certification data of type 5: leaf, CA and root in PEM.
    """

    signature: bytes
    attestation_key: bytes
    qe_report: bytes
    qe_report_signature: bytes
    qe_authentication_data: bytes
    pck_chain_pem: bytes


@dataclass(frozen=True, slots=True)
class TdQuote:
    """A TD quote.

    Attributes:
        header: the header.
        body: what the TD is.
        signature_data: who says so.
        qe_report: the quoting enclave's report, parsed.
        signed: header and body as they came.
        octets: the whole quote without what follows its signature data.
        trailing: what follows it.
    """

    header: QuoteHeader
    body: TdQuoteBody
    signature_data: QuoteSignatureData
    qe_report: EnclaveReport
    signed: bytes
    octets: bytes
    trailing: bytes


def read_td_quote(data: bytes) -> TdQuote:
    """Parses a quote of a trust domain.

    Raises:
        NotATdQuote: an SGX quote; looked at before anything else.
        QuoteVersionUnsupported: another version, or an unknown type of body.
        QuoteAlgorithmRefused: another key type, vendor or certification data.
        EvidenceMalformed: too long, cut short, lengths that do not fit together.
    """
    if len(data) > MAX_QUOTE_BYTES:
        raise EvidenceMalformed(
            f"TD quote: expected at most {MAX_QUOTE_BYTES} bytes, found {len(data)}"
        )
    reader = OctetReader(data, "TD quote")
    header = _read_header(reader)
    if header.version == 5:
        body = _read_typed_body(reader)
    else:
        body = _read_body(OctetReader(reader.take(584, "body"), "TD quote body"))
    signed = data[: reader.position]
    size = reader.little(4, "signature data length")
    signature_data = _read_signature_data(OctetReader(reader.take(size, "signature data"), "quote"))
    end = reader.position
    return TdQuote(
        header=header,
        body=body,
        signature_data=signature_data,
        qe_report=read_enclave_report(signature_data.qe_report),
        signed=signed,
        octets=data[:end],
        trailing=data[end:],
    )


def _read_header(outer: OctetReader) -> QuoteHeader:
    reader = OctetReader(outer.take(_HEADER_BYTES, "header"), "TD quote header")
    version = reader.little(2, "version")
    key_type = reader.little(2, "attestation key type")
    tee_type = reader.little(4, "tee type")
    # Version 3 is SGX's alone and has reserved bytes where later versions have the TEE type.
    if version < 4 or tee_type != TDX_TEE_TYPE:
        raise NotATdQuote(
            f"quote: expected TEE type 0x{TDX_TEE_TYPE:x} (TDX) in a quote of version 4 or 5, "
            f"found TEE type 0x{tee_type:x} in version {version}; send a quote of a trust domain"
        )
    if version > 5:
        raise QuoteVersionUnsupported(f"TD quote: expected version 4 or 5, found {version}")
    if key_type != ECDSA_P256_KEY_TYPE:
        raise QuoteAlgorithmRefused(
            f"TD quote attestation key type: expected {ECDSA_P256_KEY_TYPE} "
            f"(ECDSA-256-with-P-256), found {key_type}"
        )
    if version == 4:
        reader.take(4, "QE SVN and PCE SVN")
    elif reader.little(4, "reserved"):
        raise EvidenceMalformed("TD quote header: expected reserved bytes of zero, found others")
    vendor = reader.take(16, "QE vendor id")
    if vendor != INTEL_QE_VENDOR_ID:
        raise QuoteAlgorithmRefused(
            f"TD quote QE vendor id: expected Intel's {INTEL_QE_VENDOR_ID.hex()}, "
            f"found {vendor.hex()}"
        )
    return QuoteHeader(version, key_type, tee_type, vendor, reader.take(20, "user data"))


def _read_typed_body(reader: OctetReader) -> TdQuoteBody:
    kind = reader.little(2, "body type")
    size = reader.little(4, "body size")
    if kind == _SGX_BODY:
        raise NotATdQuote("quote body: expected a TD, found an SGX enclave's report (type 1)")
    expected = _BODY_BYTES.get(kind)
    if expected is None:
        raise QuoteVersionUnsupported(
            f"TD quote body type: expected {_TD_1_0_BODY} (TD 1.0) or {_TD_1_5_BODY} (TD 1.5), "
            f"found {kind}"
        )
    if size != expected:
        raise EvidenceMalformed(
            f"TD quote body of type {kind}: expected {expected} bytes, found a size of {size}"
        )
    return _read_body(OctetReader(reader.take(size, "body"), "TD quote body"))


def _read_body(reader: OctetReader) -> TdQuoteBody:
    body = TdQuoteBody(
        tee_tcb_svn=reader.take(16, "TEE_TCB_SVN"),
        mrseam=reader.take(48, "MRSEAM"),
        mrsignerseam=reader.take(48, "MRSIGNERSEAM"),
        seamattributes=reader.take(8, "SEAMATTRIBUTES"),
        tdattributes=reader.little(8, "TDATTRIBUTES"),
        xfam=reader.little(8, "XFAM"),
        mrtd=reader.take(48, "MRTD"),
        mrconfigid=reader.take(48, "MRCONFIGID"),
        mrowner=reader.take(48, "MROWNER"),
        mrownerconfig=reader.take(48, "MROWNERCONFIG"),
        rtmrs=(
            reader.take(48, "RTMR0"),
            reader.take(48, "RTMR1"),
            reader.take(48, "RTMR2"),
            reader.take(48, "RTMR3"),
        ),
        reportdata=reader.take(64, "REPORTDATA"),
        tee_tcb_svn2=reader.take(16, "TEE_TCB_SVN_2") if reader.left else None,
        mrservicetd=reader.take(48, "MRSERVICETD") if reader.left else None,
    )
    reader.finish()
    return body


def _read_signature_data(reader: OctetReader) -> QuoteSignatureData:
    signature = reader.take(64, "signature")
    key = reader.take(64, "attestation key")
    kind = reader.little(2, "certification data type")
    if kind != _QE_REPORT_CERTIFICATION_DATA:
        raise QuoteAlgorithmRefused(
            f"TD quote certification data: expected type {_QE_REPORT_CERTIFICATION_DATA} (QE "
            f"report), found {kind}"
        )
    size = reader.little(4, "certification data size")
    nested = OctetReader(reader.take(size, "certification data"), "QE certification data")
    reader.finish()
    report = nested.take(_ENCLAVE_REPORT_BYTES, "QE report")
    report_signature = nested.take(64, "QE report signature")
    auth_size = nested.little(2, "QE authentication data size")
    if auth_size > _MAX_AUTH_BYTES:
        raise EvidenceMalformed(
            f"QE authentication data: expected at most {_MAX_AUTH_BYTES} bytes, found {auth_size}"
        )
    auth = nested.take(auth_size, "QE authentication data")
    kind = nested.little(2, "PCK certification data type")
    if kind != _PCK_CERTIFICATE_CHAIN:
        raise QuoteAlgorithmRefused(
            f"TD quote PCK certification data: expected type {_PCK_CERTIFICATE_CHAIN} (PEM chain), "
            f"found {kind}; ask the quoting service to put the chain into its quotes"
        )
    chain_size = nested.little(4, "PCK chain size")
    if chain_size > _MAX_CHAIN_BYTES:
        raise EvidenceMalformed(
            f"PCK chain: expected at most {_MAX_CHAIN_BYTES} bytes, found {chain_size}"
        )
    chain = nested.take(chain_size, "PCK chain")
    nested.finish()
    return QuoteSignatureData(signature, key, report, report_signature, auth, chain)


def read_enclave_report(data: bytes) -> EnclaveReport:
    """Parses an Enclave Report Body of 384 bytes.

    Raises:
        EvidenceMalformed: another size.
    """
    reader = OctetReader(data, "QE report")
    cpusvn = reader.take(16, "CPUSVN")
    miscselect = reader.little(4, "MISCSELECT")
    # Reserved ranges are signed by the PCK key like the rest, and newer reports use some of them
    # (CET attributes, extended product id), so nothing is asked of them.
    reader.take(28, "reserved")
    attributes = reader.take(16, "ATTRIBUTES")
    mrenclave = reader.take(32, "MRENCLAVE")
    reader.take(32, "reserved")
    mrsigner = reader.take(32, "MRSIGNER")
    reader.take(96, "reserved")
    isvprodid = reader.little(2, "ISVPRODID")
    isvsvn = reader.little(2, "ISVSVN")
    reader.take(60, "reserved")
    reportdata = reader.take(64, "REPORTDATA")
    reader.finish()
    return EnclaveReport(
        cpusvn, miscselect, attributes, mrenclave, mrsigner, isvprodid, isvsvn, reportdata
    )
