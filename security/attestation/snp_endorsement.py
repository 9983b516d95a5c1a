"""VCEK and VLEK certificates: for which chip or provider, and for which TCB version.

A VCEK's private key is derived from a secret of the chip and a TCB version, so its certificate is
for both. A VLEK's is made by AMD for a cloud provider and is the same on many machines.

Source: AMD 57230, Versioned Chip Endorsement Key (VCEK) Certificate and KDS Interface
Specification: its extensions 1.3.6.1.4.1.3704.1.*.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.serialization import load_der_public_key

from security.attestation.certificates import Certificate
from security.attestation.der import (
    IA5_STRING,
    INTEGER,
    OCTET_STRING,
    DerReader,
    integer_of,
    text_of,
)
from security.attestation.errors import CertificateMalformed, SnpEndorsementMalformed
from security.attestation.snp_report import AttestationReport, Product, SigningKey, TcbVersion

__all__ = [
    "LEAF_NAMES",
    "Endorsement",
    "is_p384_key",
    "read_endorsement",
    "signing_key_of",
    "signs_report",
]

LEAF_NAMES: Mapping[SigningKey, str] = MappingProxyType(
    {SigningKey.VCEK: "SEV-VCEK", SigningKey.VLEK: "SEV-VLEK"}
)
"""Common names of the certificates' subjects."""

HWID_BYTES: Mapping[Product, int] = MappingProxyType(
    {Product.MILAN: 64, Product.GENOA: 64, Product.TURIN: 8}
)
CHIP_ID_BYTES = 64

_EXTENSIONS = "1.3.6.1.4.1.3704.1."
_STRUCT_VERSION = _EXTENSIONS + "1"
_PRODUCT_NAME = _EXTENSIONS + "2"
_SPL = _EXTENSIONS + "3."
_HWID = _EXTENSIONS + "4"
_CSP_ID = _EXTENSIONS + "5"
_MAX_CSP_ID = 256
_PRODUCT_NAMES = re.compile(r"(Milan|Genoa|Turin)(?:-[A-Z][0-9])?")

# SPL numbers below 1.3.6.1.4.1.3704.1.3: what they are, and which the product leaves unused.
_SPL_PARTS: Mapping[Product, Mapping[int, str]] = MappingProxyType(
    {
        Product.MILAN: {1: "bootloader", 2: "tee", 3: "snp", 8: "microcode"},
        Product.GENOA: {1: "bootloader", 2: "tee", 3: "snp", 8: "microcode"},
        Product.TURIN: {9: "fmc", 1: "bootloader", 2: "tee", 3: "snp", 8: "microcode"},
    }
)
_SPL_UNUSED: Mapping[Product, tuple[int, ...]] = MappingProxyType(
    {Product.MILAN: (4, 5, 6, 7), Product.GENOA: (4, 5, 6, 7), Product.TURIN: (5, 6, 7)}
)


# SubjectPublicKeyInfo up to the point's 97 bytes (RFC 5480): P-384, not compressed.
_P384_KEY = bytes.fromhex("3076301006072a8648ce3d020106052b8104002203620004")
_P384_KEY_BYTES = 120


@dataclass(frozen=True, slots=True)
class Endorsement:
    """A VCEK or VLEK certificate and what AMD's extensions say in it.

    Attributes:
        certificate: the certificate.
        signing_key: whether it is for a VCEK or a VLEK.
        product_name: as written, e.g. "Milan-B0".
        product: the product line in it.
        tcb: the TCB version that the key is derived from.
        hwid: which chip (VCEK: 64 bytes, on Turin 8); b"" in a VLEK.
        csp_id: which cloud provider (VLEK); "" in a VCEK.
    """

    certificate: Certificate
    signing_key: SigningKey
    product_name: str
    product: Product
    tcb: TcbVersion
    hwid: bytes
    csp_id: str

    @property
    def chip_id(self) -> bytes:
        """The CHIP_ID (64 bytes) that goes with the hwid; b"" in a VLEK."""
        return self.hwid.ljust(CHIP_ID_BYTES, bytes(1)) if self.hwid else b""


def signing_key_of(certificate: Certificate) -> SigningKey | None:
    """Whether a certificate calls itself a VCEK's or a VLEK's."""
    name = certificate.subject.common_name
    for key, expected in LEAF_NAMES.items():
        if name == expected:
            return key
    return None


@functools.lru_cache(maxsize=2048)
def read_endorsement(certificate: Certificate) -> Endorsement:
    """Reads AMD's extensions of a VCEK or VLEK certificate.

    Raises:
        SnpEndorsementMalformed
    """
    key = signing_key_of(certificate)
    if key is None:
        raise SnpEndorsementMalformed(
            "certificate", "subject SEV-VCEK or SEV-VLEK", repr(certificate.subject.common_name)
        )
    try:
        return _read_endorsement(certificate, key)
    except CertificateMalformed as error:
        raise SnpEndorsementMalformed(
            f"{key.name} certificate", "AMD's extensions", str(error)
        ) from None


def is_p384_key(spki: bytes) -> bool:
    """Whether a SubjectPublicKeyInfo is of a P-384 key."""
    return len(spki) == _P384_KEY_BYTES and spki.startswith(_P384_KEY)


def signs_report(endorsement: Endorsement, report: AttestationReport) -> bool:
    """Whether a report's signature verifies under an endorsement's key (ECDSA P-384, SHA-384)."""
    return _verifies(
        endorsement.certificate.public_key,
        report.signature_r,
        report.signature_s,
        report.signed,
    )


# Asked once to choose the certificate and once by the rule; the answer never changes.
@functools.lru_cache(maxsize=64)
def _verifies(spki: bytes, r: int, s: int, signed: bytes) -> bool:
    if not is_p384_key(spki) or not (r and s):
        return False
    try:
        key = load_der_public_key(spki)
        if not isinstance(key, ec.EllipticCurvePublicKey):
            return False
        key.verify(encode_dss_signature(r, s), signed, ec.ECDSA(hashes.SHA384()))
    except (InvalidSignature, UnsupportedAlgorithm, ValueError):
        return False
    return True


def _read_endorsement(certificate: Certificate, key: SigningKey) -> Endorsement:
    amd = {
        item.oid: item.value for item in certificate.extensions if item.oid.startswith(_EXTENSIONS)
    }
    struct_version = _integer(amd, _STRUCT_VERSION, "structVersion")
    if struct_version > 1:
        raise CertificateMalformed(f"structVersion: expected 0 or 1, found {struct_version}")
    product_name = _text(amd, _PRODUCT_NAME, "productName", 32)
    match = _PRODUCT_NAMES.fullmatch(product_name)
    if match is None:
        raise CertificateMalformed(
            f"productName: expected Milan, Genoa or Turin, found {product_name!r}"
        )
    product = Product(match[1])
    parts = {
        part: _integer(amd, f"{_SPL}{number}", part) for number, part in _SPL_PARTS[product].items()
    }
    for number in _SPL_UNUSED[product]:
        if _integer(amd, f"{_SPL}{number}", f"spl_{number}"):
            raise CertificateMalformed(f"spl_{number}: expected 0, found another")
    hwid, csp_id = b"", ""
    if key is SigningKey.VCEK:
        hwid = _hwid(amd, HWID_BYTES[product])
        if not any(hwid):
            raise CertificateMalformed("hwID: expected a chip, found zero")
    else:
        csp_id = _text(amd, _CSP_ID, "csp_id", _MAX_CSP_ID)
    if amd:
        raise CertificateMalformed(f"extensions: expected those of a {key.name}, found {min(amd)}")
    tcb = TcbVersion(
        parts.get("fmc"), parts["bootloader"], parts["tee"], parts["snp"], parts["microcode"]
    )
    return Endorsement(certificate, key, product_name, product, tcb, hwid, csp_id)


def _hwid(extensions: dict[str, bytes], size: int) -> bytes:
    # The extension holds the bytes themselves; newer certificates wrap them in an OCTET STRING.
    octets = extensions.get(_HWID, b"")
    if len(octets) == size:
        return extensions.pop(_HWID)
    hwid = _take(extensions, _HWID, "hwID", OCTET_STRING)
    if len(hwid) != size:
        raise CertificateMalformed(f"hwID: expected {size} bytes, found {len(hwid)}")
    return hwid


def _take(extensions: dict[str, bytes], oid: str, name: str, tag: int) -> bytes:
    if oid not in extensions:
        raise CertificateMalformed(f"{name}: expected extension {oid}, found none")
    reader = DerReader(extensions.pop(oid), name)
    content = reader.take(tag, "value")
    reader.finish()
    return content


def _integer(extensions: dict[str, bytes], oid: str, name: str) -> int:
    value = integer_of(_take(extensions, oid, name, INTEGER), name)
    if not 0 <= value <= 255:
        raise CertificateMalformed(f"{name}: expected 0 to 255, found another")
    return value


def _text(extensions: dict[str, bytes], oid: str, name: str, most: int) -> str:
    text = text_of(IA5_STRING, _take(extensions, oid, name, IA5_STRING), name)
    if not 1 <= len(text) <= most or not text.isprintable():
        raise CertificateMalformed(f"{name}: expected 1 to {most} printable characters")
    return text
