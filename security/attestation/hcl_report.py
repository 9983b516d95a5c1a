"""HCL reports of Azure's confidential VMs: a hardware report and the data that it vouches for.

After Microsoft's "Confidential VM Guest Attestation Design Detail": attestation header (32 bytes),
report payload (1184 bytes), runtime data (20 bytes) and runtime claims (JSON). The blob stands in
the vTPM's NV index 0x01400001; integers are little-endian.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum

from placement.document import DocumentError, decode
from security.attestation.errors import HclReportMalformed, VtpmKeyUnusable
from security.attestation.octets import OctetReader
from security.errors import EvidenceMalformed

__all__ = ["HardwareType", "HclReport", "RsaKey", "TdReport", "read_hcl_report"]

MAX_HCL_REPORT_BYTES = 32 << 10
SNP_REPORT_BYTES = 1184
TD_REPORT_BYTES = 1024

_SIGNATURE = b"HCLA"
_VERSIONS = (1, 2)
_REQUEST_TYPE = 2
_PAYLOAD_BYTES = 1184
_RUNTIME_VERSION = 1
_SHA256 = 1
_FIXED_BYTES = 20
_MAX_CLAIMS_BYTES = 16 << 10
_KEY_NAME = "HCLAkPub"
_LEAST_BITS, _MOST_BITS = 2048, 8192
_EXPONENT = 65537


class HardwareType(IntEnum):
    """Report type of the runtime data."""

    SNP = 2
    TDX = 4


@dataclass(frozen=True, slots=True)
class RsaKey:
    """The vTPM's attestation key.

    Attributes:
        modulus: n.
        exponent: e.
    """

    modulus: int
    exponent: int


@dataclass(frozen=True, slots=True)
class TdReport:
    """What TDREPORT_STRUCT says of the TD; only its own CPU can check its MAC.

    Attributes:
        reportdata: REPORTDATA (64 bytes).
        identity: ATTRIBUTES to MROWNERCONFIG of TDINFO_STRUCT (208 bytes).
    """

    reportdata: bytes
    identity: bytes


@dataclass(frozen=True, slots=True)
class HclReport:
    """An HCL report, parsed.

    Attributes:
        version: of the header.
        hardware: which hardware report it holds.
        report: the hardware report: ATTESTATION_REPORT (1184 bytes) or TDREPORT (1024 bytes).
        claims: runtime claims as they came, which the hardware report vouches for.
        parsed_claims: the same, parsed.
    """

    version: int
    hardware: HardwareType
    report: bytes
    claims: bytes
    parsed_claims: Mapping[str, object]

    @property
    def claims_digest(self) -> bytes:
        """SHA-256 of the claims (32 bytes)."""
        return hashlib.sha256(self.claims).digest()

    def td_report(self) -> TdReport:
        """The TDREPORT's fields (Intel TDX Module ABI specification, TDREPORT_STRUCT)."""
        return TdReport(self.report[128:192], self.report[512:720])

    def attestation_key(self) -> RsaKey:
        """The key named HCLAkPub.

        Raises:
            VtpmKeyUnusable: none or several, no RSA key, a short one, another exponent than 65537.
        """
        keys = self.parsed_claims.get("keys")
        named = [
            key
            for key in (keys if isinstance(keys, list) else [])
            if isinstance(key, dict) and key.get("kid") == _KEY_NAME
        ]
        if len(named) != 1:
            raise VtpmKeyUnusable("runtime claims", f"one key named {_KEY_NAME}", f"{len(named)}")
        key = named[0]
        if key.get("kty") != "RSA":
            raise VtpmKeyUnusable(f"{_KEY_NAME} kty", "RSA", str(key.get("kty"))[:16])
        modulus, exponent = _number(key.get("n"), "n"), _number(key.get("e"), "e")
        bits = modulus.bit_length()
        if not _LEAST_BITS <= bits <= _MOST_BITS or modulus % 2 == 0:
            raise VtpmKeyUnusable(
                f"{_KEY_NAME} n", f"an odd modulus of {_LEAST_BITS} to {_MOST_BITS} bits", f"{bits}"
            )
        if exponent != _EXPONENT:
            raise VtpmKeyUnusable(f"{_KEY_NAME} e", str(_EXPONENT), f"{exponent:x}"[:16])
        return RsaKey(modulus, exponent)


def _number(value: object, name: str) -> int:
    """Base64urlUInt of RFC 7518, 2."""
    if not isinstance(value, str) or len(value) > 2048:
        raise VtpmKeyUnusable(f"{_KEY_NAME} {name}", "base64url text", type(value).__name__)
    try:
        octets = base64.b64decode(value + "=" * (-len(value) % 4), b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise VtpmKeyUnusable(f"{_KEY_NAME} {name}", "base64url", "other text") from None
    return int.from_bytes(octets, "big")


def read_hcl_report(data: bytes) -> HclReport:
    """Parses an HCL report; zeros may follow it, as its NV index is longer.

    Raises:
        HclReportMalformed: another structure, type, hash algorithm or size, or claims that are not
            one JSON object.
    """
    try:
        return _read(data)
    except HclReportMalformed:
        raise
    except (EvidenceMalformed, DocumentError) as error:
        raise HclReportMalformed(str(error)) from None


def _read(data: bytes) -> HclReport:
    if len(data) > MAX_HCL_REPORT_BYTES:
        raise HclReportMalformed(
            f"HCL report: expected at most {MAX_HCL_REPORT_BYTES} bytes, found {len(data)}"
        )
    reader = OctetReader(data, "HCL report")
    signature = reader.take(4, "signature")
    if signature != _SIGNATURE:
        raise HclReportMalformed(f"HCL report signature: expected HCLA, found {signature.hex()}")
    version = reader.little(4, "version")
    size = reader.little(4, "report size")
    request = reader.little(4, "request type")
    reader.take(4, "status")
    reader.take(12, "reserved")
    if version not in _VERSIONS or request != _REQUEST_TYPE:
        raise HclReportMalformed(
            f"HCL report: expected version 1 or 2 and request type {_REQUEST_TYPE}, found version "
            f"{version} and type {request}"
        )
    payload = reader.take(_PAYLOAD_BYTES, "report payload")
    start = reader.position
    data_size = reader.little(4, "data size")
    runtime_version = reader.little(4, "runtime data version")
    kind = reader.little(4, "report type")
    digest = reader.little(4, "hash type")
    claims_size = reader.little(4, "claims size")
    if runtime_version != _RUNTIME_VERSION or digest != _SHA256:
        raise HclReportMalformed(
            f"HCL runtime data: expected version {_RUNTIME_VERSION} and hash type {_SHA256} "
            f"(SHA-256), found version {runtime_version} and hash type {digest}"
        )
    if kind not in tuple(HardwareType):
        raise HclReportMalformed(
            f"HCL report type: expected 2 (SEV-SNP) or 4 (TDX), found {kind}; other VMs are not "
            "confidential"
        )
    if claims_size > _MAX_CLAIMS_BYTES:
        raise HclReportMalformed(
            f"HCL runtime claims: expected at most {_MAX_CLAIMS_BYTES} bytes, found {claims_size}"
        )
    if data_size != _FIXED_BYTES + claims_size or size != start + data_size:
        raise HclReportMalformed(
            f"HCL report sizes: expected {_FIXED_BYTES + claims_size} of runtime data and "
            f"{start + _FIXED_BYTES + claims_size} in all, found {data_size} and {size}"
        )
    claims = reader.take(claims_size, "runtime claims")
    if any(data[reader.position :]):
        raise HclReportMalformed("HCL report: expected nothing but zeros after the runtime claims")
    hardware = HardwareType(kind)
    report = payload if hardware is HardwareType.SNP else payload[:TD_REPORT_BYTES]
    if any(payload[len(report) :]):
        raise HclReportMalformed("HCL report payload: expected zeros after the TDREPORT")
    return HclReport(version, hardware, report, claims, decode(claims, _MAX_CLAIMS_BYTES))
