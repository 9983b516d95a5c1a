"""Intel's certificates for SGX and TDX: chains, revocation lists, and what a PCK certificate says.

After "Intel SGX PCK Certificate and Certificate Revocation List Profile Specification" and RFC
5280. Every chain has a fixed shape (leaf, PCK CA, root; or leaf, root), so nothing searches for
paths. Signatures do not depend on time and are remembered by the certificates' bytes; dates and
revocation are looked at each time.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtensionOID, NameOID

from security.attestation.der import (
    ENUMERATED,
    INTEGER,
    OCTET_STRING,
    OID,
    SEQUENCE,
    DerReader,
    integer_of,
    oid_of,
)
from security.errors import EvidenceMalformed

__all__ = [
    "INTEL_SGX_ROOT_CA_SHA256",
    "PCK_CA_NAMES",
    "PCK_NAME",
    "ROOT_NAME",
    "TCB_SIGNING_NAME",
    "Certificate",
    "PckExtension",
    "RevocationList",
    "chain_fault",
    "p256_signature_holds",
    "read_certificate_chain",
    "read_pck_extension",
    "read_revocation_list",
]

INTEL_SGX_ROOT_CA_SHA256 = "44a0196b2b99f889b8e149e95b807a350e7424964399e885a7cbb8ccfab674d3"
"""SHA-256 of the DER certificate "Intel SGX Root CA" (2018-05-21 to 2049-12-31)."""

ROOT_NAME = "Intel SGX Root CA"
PCK_NAME = "Intel SGX PCK Certificate"
PCK_CA_NAMES = ("Intel SGX PCK Platform CA", "Intel SGX PCK Processor CA")
TCB_SIGNING_NAME = "Intel SGX TCB Signing"

MAX_CERTIFICATES = 4
MAX_CRL_BYTES = 1 << 20
_MAX_CERTIFICATE_BYTES = 8 << 10
_SGX_EXTENSION = x509.ObjectIdentifier("1.2.840.113741.1.13.1")
_KNOWN_CRITICAL = frozenset({ExtensionOID.BASIC_CONSTRAINTS, ExtensionOID.KEY_USAGE})
_PEM_BLOCK = re.compile(
    rb"-----BEGIN CERTIFICATE-----[A-Za-z0-9+/=\r\n]{1,12288}-----END CERTIFICATE-----"
)
_FAULTS = (
    ValueError,
    TypeError,
    OverflowError,
    UnsupportedAlgorithm,
    x509.DuplicateExtension,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)
"""What `cryptography` raises on certificates that it does not understand; it has no base class."""


def p256_signature_holds(key: ec.EllipticCurvePublicKey, signature: bytes, data: bytes) -> bool:
    """Whether r || s (64 bytes, big-endian) is an ECDSA signature with SHA-256 over the data."""
    if len(signature) != 64:
        return False
    r, s = int.from_bytes(signature[:32], "big"), int.from_bytes(signature[32:], "big")
    try:
        key.verify(encode_dss_signature(r, s), data, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        return False
    return True


@dataclass(frozen=True, slots=True, eq=False)
class Certificate:
    """An X.509 certificate with a P-256 key.

    Attributes:
        der: its bytes; two certificates are equal if these are.
        name: common name of its subject.
        serial: serial number, lower-case hex without leading zeros.
        not_before: Unix time in seconds.
        not_after: Unix time in seconds.
        key: its public key.
        parsed: the certificate as `cryptography` reads it.
    """

    der: bytes
    name: str
    serial: str
    not_before: int
    not_after: int
    key: ec.EllipticCurvePublicKey
    parsed: x509.Certificate

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Certificate) and self.der == other.der

    def __hash__(self) -> int:
        return hash(self.der)

    def valid_at(self, now: int) -> bool:
        """Whether a time (Unix seconds) lies within its dates."""
        return self.not_before <= now <= self.not_after

    @property
    def fingerprint(self) -> str:
        """SHA-256 of its bytes, lower-case hex."""
        return self.parsed.fingerprint(hashes.SHA256()).hex()


@dataclass(frozen=True, slots=True)
class PckExtension:
    """SGX extension of a PCK certificate (1.2.840.113741.1.13.1).

    Attributes:
        ppid: 16 bytes that name the platform.
        components: SGX TCB component SVNs 1 to 16.
        pcesvn: SVN of the provisioning certification enclave.
        cpusvn: raw CPUSVN (16 bytes).
        pceid: 2 bytes.
        fmspc: 6 bytes: family, model, stepping, platform type, custom SKU.
        sgx_type: 0 standard, 1 scalable, 2 scalable with integrity.
    """

    ppid: bytes
    components: tuple[int, ...]
    pcesvn: int
    cpusvn: bytes
    pceid: bytes
    fmspc: bytes
    sgx_type: int


@dataclass(frozen=True, slots=True, eq=False)
class RevocationList:
    """A certificate revocation list.

    Attributes:
        der: its bytes.
        this_update: Unix time in seconds.
        next_update: Unix time in seconds.
        parsed: the list as `cryptography` reads it.
    """

    der: bytes
    this_update: int
    next_update: int
    parsed: x509.CertificateRevocationList

    def revokes(self, certificate: Certificate) -> bool:
        """Whether the list has the certificate's serial number."""
        number = certificate.parsed.serial_number
        return self.parsed.get_revoked_certificate_by_serial_number(number) is not None

    def signed_by(self, issuer: Certificate) -> bool:
        """Whether a CA issued the list."""
        return _crl_signed_by(self.der, issuer.der)


@lru_cache(maxsize=256)
def read_certificate_chain(pem: bytes, what: str) -> tuple[Certificate, ...]:
    """Parses a chain in PEM, in its own order; only white space and a final NUL may stand between.

    Raises:
        EvidenceMalformed: anything else, more than `MAX_CERTIFICATES`, or keys not on P-256.
    """
    blocks = _PEM_BLOCK.findall(pem)
    if not 1 <= len(blocks) <= MAX_CERTIFICATES:
        raise EvidenceMalformed(
            f"{what}: expected 1 to {MAX_CERTIFICATES} PEM certificates, found {len(blocks)}"
        )
    if _PEM_BLOCK.sub(b"", pem).strip(b"\r\n \t\0"):
        raise EvidenceMalformed(f"{what}: expected certificates alone, found other text")
    return tuple(_read_certificate(block, f"{what}[{i}]") for i, block in enumerate(blocks))


def _read_certificate(pem: bytes, what: str) -> Certificate:
    try:
        parsed = x509.load_pem_x509_certificate(pem)
        der = parsed.public_bytes(Encoding.DER)
        key = parsed.public_key()
        names = parsed.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        not_before = _seconds(parsed.not_valid_before_utc)
        not_after = _seconds(parsed.not_valid_after_utc)
    except _FAULTS:
        raise EvidenceMalformed(f"{what}: expected an X.509 certificate, found no such") from None
    if len(der) > _MAX_CERTIFICATE_BYTES:
        raise EvidenceMalformed(
            f"{what}: expected at most {_MAX_CERTIFICATE_BYTES} bytes, found {len(der)}"
        )
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise EvidenceMalformed(f"{what}: expected a key on P-256, found another")
    # RFC 5280, 4.1.2.2. A negative number would also make the look-up in a revocation list fail.
    if not 0 < parsed.serial_number < 1 << 160:
        raise EvidenceMalformed(f"{what}: expected a positive serial number of at most 20 bytes")
    name = names[0].value if len(names) == 1 else ""
    return Certificate(
        der=der,
        name=name if isinstance(name, str) else "",
        serial=f"{parsed.serial_number:x}",
        not_before=not_before,
        not_after=not_after,
        key=key,
        parsed=parsed,
    )


def _seconds(moment: datetime) -> int:
    return int((moment - datetime(1970, 1, 1, tzinfo=UTC)).total_seconds())


@lru_cache(maxsize=256)
def chain_fault(chain: tuple[Certificate, ...], names: tuple[tuple[str, ...], ...]) -> str | None:
    """What is wrong with a chain apart from dates, revocation and trust in its root.

    Args:
        chain: leaf first, root last.
        names: for each certificate the common names that its purpose allows.

    Returns:
        None where all signatures hold and every certificate may do what it does.
    """
    if len(chain) != len(names):
        return f"{len(chain)} certificates"
    root = chain[-1]
    for i, (certificate, allowed) in enumerate(zip(chain, names, strict=True)):
        if certificate.name not in allowed:
            return f"certificate {i} named {certificate.name[:64]!r}"
        issuer = chain[i + 1] if i + 1 < len(chain) else root
        try:
            fault = _purpose_fault(certificate.parsed, i)
            if fault is not None:
                return f"certificate {i} ({certificate.name}) {fault}"
            if not isinstance(certificate.parsed.signature_hash_algorithm, hashes.SHA256):
                return f"certificate {i} ({certificate.name}) not signed with SHA-256"
            certificate.parsed.verify_directly_issued_by(issuer.parsed)
        except InvalidSignature:
            return f"certificate {i} ({certificate.name}) not signed by the next one"
        except _FAULTS:
            return f"certificate {i} ({certificate.name}) not issued by the next one"
    return None


def _purpose_fault(certificate: x509.Certificate, depth: int) -> str | None:
    """RFC 5280, 4.2 and 6.1: what its extensions say against its place in the chain."""
    extensions = certificate.extensions
    for extension in extensions:
        if extension.critical and extension.oid not in _KNOWN_CRITICAL:
            return f"with unknown critical extension {extension.oid.dotted_string}"
    try:
        constraints = extensions.get_extension_for_class(x509.BasicConstraints).value
        usage = extensions.get_extension_for_class(x509.KeyUsage).value
    except x509.ExtensionNotFound:
        return "without basic constraints or key usage"
    if depth == 0:
        if constraints.ca or not usage.digital_signature:
            return "that is a CA, or must not sign data"
        return None
    if not constraints.ca or not usage.key_cert_sign or not usage.crl_sign:
        return "that is no CA, or must not sign certificates and lists"
    if constraints.path_length is not None and constraints.path_length < depth - 1:
        return f"with a path length of {constraints.path_length}"
    return None


@lru_cache(maxsize=64)
def read_revocation_list(der: bytes, what: str) -> RevocationList:
    """Parses a certificate revocation list in DER.

    Raises:
        EvidenceMalformed: it is none, is longer than `MAX_CRL_BYTES`, or has no next update.
    """
    if len(der) > MAX_CRL_BYTES:
        raise EvidenceMalformed(f"{what}: expected at most {MAX_CRL_BYTES} bytes, found {len(der)}")
    try:
        parsed = x509.load_der_x509_crl(der)
        this_update, next_update = parsed.last_update_utc, parsed.next_update_utc
        # A delta or partitioned list says so in a critical extension; ours are complete.
        partial = any(extension.critical for extension in parsed.extensions)
    except _FAULTS:
        raise EvidenceMalformed(f"{what}: expected an X.509 revocation list, found none") from None
    if next_update is None or partial:
        raise EvidenceMalformed(f"{what}: expected a complete list with a next update")
    return RevocationList(der, _seconds(this_update), _seconds(next_update), parsed)


@lru_cache(maxsize=128)
def _crl_signed_by(crl_der: bytes, issuer_der: bytes) -> bool:
    try:
        crl = x509.load_der_x509_crl(crl_der)
        issuer = x509.load_der_x509_certificate(issuer_der)
        key = issuer.public_key()
        return (
            crl.issuer == issuer.subject
            and isinstance(key, ec.EllipticCurvePublicKey)
            and isinstance(crl.signature_hash_algorithm, hashes.SHA256)
            and crl.is_signature_valid(key)
        )
    except _FAULTS:
        return False


# -- SGX extension --------------------------------------------------------------------------------

_SGX = "1.2.840.113741.1.13.1"
_MAX_ENTRIES = 64
_COMPONENTS = tuple(f"{_SGX}.2.{i}" for i in range(1, 17))


@lru_cache(maxsize=256)
def read_pck_extension(certificate: Certificate) -> PckExtension:
    """Reads what a PCK certificate says about its platform.

    Raises:
        EvidenceMalformed: no such extension, or a field missing, twice or of another shape.
    """
    try:
        extension = certificate.parsed.extensions.get_extension_for_oid(_SGX_EXTENSION)
    except (x509.ExtensionNotFound, *_FAULTS):
        raise EvidenceMalformed(
            f"PCK certificate: expected an SGX extension ({_SGX}), found none"
        ) from None
    value = extension.value
    if not isinstance(value, x509.UnrecognizedExtension):
        raise EvidenceMalformed("PCK certificate: expected an opaque SGX extension")
    outer = DerReader(value.value, "SGX extension")
    fields = _pairs(outer.within(SEQUENCE, "entries"))
    outer.finish()
    tcb = _pairs(_field(fields, f"{_SGX}.2").within(SEQUENCE, "TCB"))
    return PckExtension(
        ppid=_octets(fields, f"{_SGX}.1", 16),
        components=tuple(_number(tcb, oid, INTEGER, 255) for oid in _COMPONENTS),
        pcesvn=_number(tcb, f"{_SGX}.2.17", INTEGER, 65535),
        cpusvn=_octets(tcb, f"{_SGX}.2.18", 16),
        pceid=_octets(fields, f"{_SGX}.3", 2),
        fmspc=_octets(fields, f"{_SGX}.4", 6),
        sgx_type=_number(fields, f"{_SGX}.5", ENUMERATED, 2),
    )


def _pairs(reader: DerReader) -> dict[str, DerReader]:
    """Entries of a sequence of (object identifier, value): readers before the values."""
    found: dict[str, DerReader] = {}
    while not reader.ended:
        if len(found) == _MAX_ENTRIES:
            raise EvidenceMalformed(f"SGX extension: expected at most {_MAX_ENTRIES} entries")
        entry = reader.within(SEQUENCE, "entry")
        oid = oid_of(entry.take(OID, "identifier"), "SGX extension")
        if oid in found:
            raise EvidenceMalformed(f"SGX extension: expected {oid} once")
        found[oid] = entry
    return found


def _field(fields: dict[str, DerReader], oid: str) -> DerReader:
    if oid not in fields:
        raise EvidenceMalformed(f"SGX extension: expected {oid}, found none")
    return fields[oid]


def _octets(fields: dict[str, DerReader], oid: str, size: int) -> bytes:
    entry = _field(fields, oid)
    value = entry.take(OCTET_STRING, oid)
    entry.finish()
    if len(value) != size:
        raise EvidenceMalformed(
            f"SGX extension: expected {size} bytes in {oid}, found {len(value)}"
        )
    return value


def _number(fields: dict[str, DerReader], oid: str, tag: int, maximum: int) -> int:
    entry = _field(fields, oid)
    value = integer_of(entry.take(tag, oid), oid)
    entry.finish()
    if not 0 <= value <= maximum:
        raise EvidenceMalformed(f"SGX extension: expected 0 to {maximum} in {oid}, found {value}")
    return value
