"""Rules on TD quotes that need nothing but the quote."""

from __future__ import annotations

import hashlib

from cryptography.hazmat.primitives.asymmetric import ec

from security.attestation.errors import (
    PckChainExpired,
    PckChainInvalid,
    PckRootUnknown,
    QeBindingInvalid,
    QeSignatureInvalid,
    QuoteSignatureInvalid,
    SeamAttributesNotZero,
    TdAttributesReserved,
    TdDebug,
    TdMigratable,
    TeeTcbSvnLowered,
    TrailingBytesRefused,
)
from security.attestation.intel_pki import (
    PCK_CA_NAMES,
    PCK_NAME,
    ROOT_NAME,
    chain_fault,
    p256_signature_holds,
)
from security.attestation.tdx_subject import TdxRule, TdxSubject, shown_roots

__all__ = ["QUOTE_RULES"]

_DCAP = "Intel TDX DCAP Quoting Library API"
_MODULE = "Intel TDX Module ABI specification"
_PCK = "Intel SGX PCK Certificate and Certificate Revocation List Profile Specification"

# ATTRIBUTES of a TD. Everything that is not named here must be zero: reserved bits, and bits 4 to
# 6, which let the host profile the TD.
_DEBUG = 1 << 0
_ICSSD = 1 << 16
_LASS = 1 << 27
_SEPT_VE_DISABLE = 1 << 28
_MIGRATABLE = 1 << 29
_PKS = 1 << 30
_KL = 1 << 31
_PERFMON = 1 << 63
_KNOWN_ATTRIBUTES = _DEBUG | _ICSSD | _LASS | _SEPT_VE_DISABLE | _MIGRATABLE | _PKS | _KL | _PERFMON

_PCK_CHAIN = ((PCK_NAME,), PCK_CA_NAMES, (ROOT_NAME,))


def _signature(subject: TdxSubject) -> None:
    data = subject.quote.signature_data
    try:
        key = ec.EllipticCurvePublicKey.from_encoded_point(
            ec.SECP256R1(), b"\x04" + data.attestation_key
        )
    except ValueError:
        raise QuoteSignatureInvalid("attestation key", "a point on P-256", "none") from None
    if not p256_signature_holds(key, data.signature, subject.quote.signed):
        raise QuoteSignatureInvalid(
            "quote signature", "one by the attestation key over header and body", "another"
        )


def _qe_binding(subject: TdxSubject) -> None:
    data = subject.quote.signature_data
    digest = hashlib.sha256(data.attestation_key + data.qe_authentication_data).digest()
    found = subject.quote.qe_report.reportdata
    if found != digest + bytes(32):
        raise QeBindingInvalid(
            "quoting enclave's REPORTDATA",
            f"{digest.hex()[:16]}..., then 32 zeros",
            f"{found.hex()[:16]}...",
        )


def _qe_signature(subject: TdxSubject) -> None:
    data = subject.quote.signature_data
    if not p256_signature_holds(subject.chain[0].key, data.qe_report_signature, data.qe_report):
        raise QeSignatureInvalid(
            "QE report signature", f"one by PCK certificate {subject.chain[0].serial}", "another"
        )


def _pck_chain(subject: TdxSubject) -> None:
    fault = chain_fault(subject.chain, _PCK_CHAIN)
    if fault is not None:
        raise PckChainInvalid(
            "PCK chain", f"{PCK_NAME}, {' or '.join(PCK_CA_NAMES)}, {ROOT_NAME}", fault
        )


def _pck_root(subject: TdxSubject) -> None:
    found = subject.chain[-1].fingerprint
    if found not in subject.roots:
        raise PckRootUnknown(
            "root of the PCK chain",
            shown_roots(subject.roots),
            f"{found[:16]}...",
            "only a policy's roots take the place of Intel's",
        )


def _pck_dates(subject: TdxSubject) -> None:
    for certificate in subject.chain:
        if not certificate.valid_at(subject.now):
            raise PckChainExpired(
                f"dates of {certificate.name[:64]!r}",
                f"{subject.now} within them",
                f"{certificate.not_before} to {certificate.not_after}",
            )


def _trailing_bytes(subject: TdxSubject) -> None:
    trailing = subject.quote.trailing
    if any(trailing):
        raise TrailingBytesRefused(
            "after the quote",
            "nothing, or zeros",
            f"{len(trailing)} bytes that nobody signs",
            "cut the buffer to the quote's length",
        )


def _debug(subject: TdxSubject) -> None:
    if subject.quote.body.tdattributes & _DEBUG:
        raise TdDebug("TDATTRIBUTES.DEBUG", "0", "1", "start the domain without debugging")


def _attributes(subject: TdxSubject) -> None:
    unknown = subject.quote.body.tdattributes & ~_KNOWN_ATTRIBUTES
    if unknown:
        raise TdAttributesReserved(
            "reserved and profiling bits of TDATTRIBUTES", "0", f"0x{unknown:016x}"
        )


def _migratable(subject: TdxSubject) -> None:
    if subject.quote.body.tdattributes & _MIGRATABLE:
        raise TdMigratable("TDATTRIBUTES.MIGRATABLE", "0", "1")


def _seam_attributes(subject: TdxSubject) -> None:
    found = subject.quote.body.seamattributes
    if any(found):
        raise SeamAttributesNotZero("SEAMATTRIBUTES", "0", found.hex())


def _tee_tcb_svn2(subject: TdxSubject) -> None:
    then, now = subject.quote.body.tee_tcb_svn, subject.quote.body.tee_tcb_svn2
    if now is None:
        return
    # The major version comes first: a newer one may count its ISVSVN from the start again.
    lowered = now[1] < then[1] or (now[1] == then[1] and now[0] < then[0])
    if lowered or any(a < b for a, b in zip(now[2:], then[2:], strict=True)):
        raise TeeTcbSvnLowered("TEE_TCB_SVN_2", f"at least {then.hex()}", now.hex())


QUOTE_RULES: tuple[TdxRule, ...] = (
    TdxRule(
        "tdx.signature",
        f"{_DCAP}, A.3.8, Quote Signature",
        _signature,
        (QuoteSignatureInvalid,),
    ),
    TdxRule(
        "tdx.qe_binding",
        f"{_DCAP}, A.3.8 and A.3.11, QE Report: Report Data",
        _qe_binding,
        (QeBindingInvalid,),
    ),
    TdxRule(
        "tdx.qe_signature",
        f"{_DCAP}, A.3.11, QE Report Signature",
        _qe_signature,
        (QeSignatureInvalid,),
    ),
    TdxRule("tdx.pck_chain", f"{_PCK}; RFC 5280, 6.1", _pck_chain, (PckChainInvalid,)),
    TdxRule("tdx.pck_root", f"{_PCK}, Intel SGX Root CA", _pck_root, (PckRootUnknown,)),
    TdxRule("tdx.pck_dates", "RFC 5280, 4.1.2.5, Validity", _pck_dates, (PckChainExpired,)),
    TdxRule(
        "tdx.trailing_bytes",
        f"{_DCAP}, A.3, Quote Signature Data Len",
        _trailing_bytes,
        (TrailingBytesRefused,),
    ),
    TdxRule("tdx.debug", f"{_MODULE}, ATTRIBUTES.DEBUG (bit 0)", _debug, (TdDebug,)),
    TdxRule(
        "tdx.td_attributes",
        f"{_MODULE}, ATTRIBUTES, reserved bits and profiling bits of the TUD group",
        _attributes,
        (TdAttributesReserved,),
    ),
    TdxRule(
        "tdx.migratable",
        f"{_MODULE}, ATTRIBUTES.MIGRATABLE (bit 29)",
        _migratable,
        (TdMigratable,),
    ),
    TdxRule(
        "tdx.seam_attributes",
        f"{_DCAP}, A.3.2, SEAMATTRIBUTES",
        _seam_attributes,
        (SeamAttributesNotZero,),
    ),
    TdxRule("tdx.tee_tcb_svn2", f"{_DCAP}, A.4, TEE_TCB_SVN_2", _tee_tcb_svn2, (TeeTcbSvnLowered,)),
)
"""Asked of every quote."""
