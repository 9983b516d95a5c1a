"""X.509 certificates and revocation lists, read by our own strict reader (RFC 5280).

Reading proves nothing: whoever uses a certificate checks its signature, its dates and what its
extensions allow. Keys and signatures are `cryptography`'s work; parsing is not, because it is about
to refuse serial number 0, which all of AMD's VCEKs and VLEKs have.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass

from security.attestation.der import (
    BIT_STRING,
    BOOLEAN,
    INTEGER,
    OCTET_STRING,
    OID,
    SEQUENCE,
    SET,
    DerReader,
    bits_of,
    boolean_of,
    integer_of,
    oid_of,
    text_of,
    time_of,
)
from security.attestation.errors import CertificateMalformed

__all__ = [
    "BASIC_CONSTRAINTS",
    "COMMON_NAME",
    "CRL_SIGN",
    "KEY_CERT_SIGN",
    "KEY_USAGE",
    "BasicConstraints",
    "Certificate",
    "Extension",
    "Name",
    "RevocationList",
    "read_certificate",
    "read_revocation_list",
]

MAX_CERTIFICATE_BYTES = 16 << 10
MAX_REVOCATION_LIST_BYTES = 1 << 20
_MAX_EXTENSIONS = 64
_MAX_NAME_PARTS = 32
_MAX_REVOKED = 1 << 16

BASIC_CONSTRAINTS = "2.5.29.19"
KEY_USAGE = "2.5.29.15"
COMMON_NAME = "2.5.4.3"

KEY_CERT_SIGN = 5
CRL_SIGN = 6
"""Bits of KeyUsage (RFC 5280, 4.2.1.3)."""

_VERSION_TAG = 0xA0
_CRL_EXTENSIONS_TAG = 0xA0
_EXTENSIONS_TAG = 0xA3
_TIME_TAGS = (0x17, 0x18)


@dataclass(frozen=True, slots=True)
class Name:
    """A distinguished name.

    Attributes:
        der: all of it; names are equal where these bytes are.
        parts: (attribute's OID, value) in order.
    """

    der: bytes
    parts: tuple[tuple[str, str], ...]

    @property
    def common_name(self) -> str:
        """The only common name; "" where there is none or several."""
        names = [value for oid, value in self.parts if oid == COMMON_NAME]
        return names[0] if len(names) == 1 else ""


@dataclass(frozen=True, slots=True)
class Extension:
    """An extension, its value not looked into.

    Attributes:
        oid: dotted.
        critical: whether who does not know it must refuse the certificate.
        value: content of the OCTET STRING.
    """

    oid: str
    critical: bool
    value: bytes


@dataclass(frozen=True, slots=True)
class BasicConstraints:
    """Whether a certificate may issue others (RFC 5280, 4.2.1.9).

    Attributes:
        authority: cA.
        path_length: pathLenConstraint; None where there is none.
    """

    authority: bool
    path_length: int | None


@dataclass(frozen=True, slots=True, eq=False)
class Certificate:
    """A certificate as read; nothing of it is checked. Equal ones have equal fingerprints.

    Attributes:
        der: all of it.
        tbs: the bytes that are signed.
        serial: serial number, which may be 0.
        signature_algorithm: AlgorithmIdentifier in DER, the same inside and outside `tbs`.
        issuer: name of who signed.
        not_before: Unix seconds.
        not_after: Unix seconds; the last second of validity.
        subject: name of the key's owner.
        public_key: SubjectPublicKeyInfo in DER.
        extensions: by OID, each once.
        signature: bytes of the signature.
        fingerprint: SHA-256 of `der`, hex.
    """

    der: bytes
    tbs: bytes
    serial: int
    signature_algorithm: bytes
    issuer: Name
    not_before: int
    not_after: int
    subject: Name
    public_key: bytes
    extensions: tuple[Extension, ...]
    signature: bytes
    fingerprint: str

    def extension(self, oid: str) -> Extension | None:
        """The extension with an OID, if there is one."""
        for extension in self.extensions:
            if extension.oid == oid:
                return extension
        return None

    def basic_constraints(self) -> BasicConstraints | None:
        """The extension's content; None where there is none.

        Raises:
            CertificateMalformed
        """
        extension = self.extension(BASIC_CONSTRAINTS)
        if extension is None:
            return None
        outer = DerReader(extension.value, "basicConstraints")
        inner = outer.within(SEQUENCE, "value")
        outer.finish()
        authority = False
        if inner.peek() == BOOLEAN:
            authority = boolean_of(inner.take(BOOLEAN, "cA"), "cA")
        length = None
        if inner.peek() == INTEGER:
            length = integer_of(inner.take(INTEGER, "pathLen"), "basicConstraints.pathLen")
        inner.finish()
        return BasicConstraints(authority, length)

    def key_usage(self) -> frozenset[int] | None:
        """The bits of KeyUsage that are set; None where there is no such extension.

        Raises:
            CertificateMalformed
        """
        extension = self.extension(KEY_USAGE)
        if extension is None:
            return None
        outer = DerReader(extension.value, "keyUsage")
        octets, _ = bits_of(outer.take(BIT_STRING, "value"), "keyUsage")
        outer.finish()
        if len(octets) > 2:
            raise CertificateMalformed(f"keyUsage: expected at most 9 bits, found {len(octets)} B")
        return frozenset(i for i in range(8 * len(octets)) if octets[i // 8] >> (7 - i % 8) & 1)


@dataclass(frozen=True, slots=True, eq=False)
class RevocationList:
    """A certificate revocation list as read; nothing of it is checked.

    Attributes:
        tbs: the bytes that are signed.
        signature_algorithm: AlgorithmIdentifier in DER.
        issuer: name of who signed.
        this_update: Unix seconds.
        next_update: Unix seconds; None where it says none.
        revoked: serial numbers.
        critical: OIDs of critical extensions, those of the entries included.
        signature: bytes of the signature.
        fingerprint: SHA-256 of the whole list, hex.
    """

    tbs: bytes
    signature_algorithm: bytes
    issuer: Name
    this_update: int
    next_update: int | None
    revoked: frozenset[int]
    critical: tuple[str, ...]
    signature: bytes
    fingerprint: str


@functools.lru_cache(maxsize=2048)
def read_certificate(der: bytes) -> Certificate:
    """Reads one certificate in DER.

    Raises:
        CertificateMalformed: anything else than a version 3 certificate in strict DER.
    """
    tbs, algorithm, signature = _read_signed(der, "certificate", MAX_CERTIFICATE_BYTES)
    reader = DerReader(tbs, "tbsCertificate").within(SEQUENCE, "value")
    version = reader.within(_VERSION_TAG, "version")
    number = integer_of(version.take(INTEGER, "value"), "version")
    version.finish()
    if number != 2:
        raise CertificateMalformed(f"certificate.version: expected v3 (2), found {number}")
    serial = integer_of(reader.take(INTEGER, "serialNumber"), "serialNumber")
    if reader.whole(SEQUENCE, "signature") != algorithm:
        raise CertificateMalformed(
            "certificate.signature: expected the same algorithm inside and outside, found two"
        )
    issuer = _read_name(reader, "issuer")
    validity = reader.within(SEQUENCE, "validity")
    not_before = _read_time(validity, "notBefore")
    not_after = _read_time(validity, "notAfter")
    validity.finish()
    subject = _read_name(reader, "subject")
    public_key = reader.whole(SEQUENCE, "subjectPublicKeyInfo")
    extensions: tuple[Extension, ...] = ()
    if reader.peek() == _EXTENSIONS_TAG:
        extensions = _read_extensions(reader.within(_EXTENSIONS_TAG, "extensions"))
    reader.finish()
    return Certificate(
        der=der,
        tbs=tbs,
        serial=serial,
        signature_algorithm=algorithm,
        issuer=issuer,
        not_before=not_before,
        not_after=not_after,
        subject=subject,
        public_key=public_key,
        extensions=extensions,
        signature=signature,
        fingerprint=hashlib.sha256(der).hexdigest(),
    )


@functools.lru_cache(maxsize=8)
def read_revocation_list(der: bytes) -> RevocationList:
    """Reads one certificate revocation list in DER.

    Raises:
        CertificateMalformed: anything else than a version 2 list in strict DER.
    """
    tbs, algorithm, signature = _read_signed(der, "CRL", MAX_REVOCATION_LIST_BYTES)
    reader = DerReader(tbs, "tbsCertList").within(SEQUENCE, "value")
    number = integer_of(reader.take(INTEGER, "version"), "CRL.version")
    if number != 1:
        raise CertificateMalformed(f"CRL.version: expected v2 (1), found {number}")
    if reader.whole(SEQUENCE, "signature") != algorithm:
        raise CertificateMalformed(
            "CRL.signature: expected the same algorithm inside and outside, found two"
        )
    issuer = _read_name(reader, "issuer")
    this_update = _read_time(reader, "thisUpdate")
    next_update = _read_time(reader, "nextUpdate") if reader.peek() in _TIME_TAGS else None
    revoked: set[int] = set()
    critical: list[str] = []
    if reader.peek() == SEQUENCE:
        entries = reader.within(SEQUENCE, "revokedCertificates")
        count = 0
        while not entries.ended:
            count += 1
            if count > _MAX_REVOKED:
                raise CertificateMalformed(f"CRL: expected at most {_MAX_REVOKED} entries")
            entry = entries.within(SEQUENCE, "entry")
            revoked.add(integer_of(entry.take(INTEGER, "userCertificate"), "CRL.entry"))
            _read_time(entry, "revocationDate")
            if not entry.ended:
                critical += [item.oid for item in _read_extensions(entry) if item.critical]
            entry.finish()
    if reader.peek() == _CRL_EXTENSIONS_TAG:
        extensions = _read_extensions(reader.within(_CRL_EXTENSIONS_TAG, "crlExtensions"))
        critical += [item.oid for item in extensions if item.critical]
    reader.finish()
    return RevocationList(
        tbs=tbs,
        signature_algorithm=algorithm,
        issuer=issuer,
        this_update=this_update,
        next_update=next_update,
        revoked=frozenset(revoked),
        critical=tuple(critical),
        signature=signature,
        fingerprint=hashlib.sha256(der).hexdigest(),
    )


def _read_signed(der: bytes, what: str, most: int) -> tuple[bytes, bytes, bytes]:
    if len(der) > most:
        raise CertificateMalformed(f"{what}: expected at most {most} bytes, found {len(der)}")
    outer = DerReader(der, what)
    inner = outer.within(SEQUENCE, "value")
    outer.finish()
    tbs = inner.whole(SEQUENCE, "tbs")
    algorithm = inner.whole(SEQUENCE, "signatureAlgorithm")
    signature, unused = bits_of(inner.take(BIT_STRING, "signatureValue"), f"{what}.signatureValue")
    inner.finish()
    if unused:
        raise CertificateMalformed(f"{what}.signatureValue: expected whole bytes, found bits")
    return tbs, algorithm, signature


def _read_name(reader: DerReader, what: str) -> Name:
    der = reader.whole(SEQUENCE, what)
    names = DerReader(der, what).within(SEQUENCE, "value")
    parts: list[tuple[str, str]] = []
    while not names.ended:
        attributes = names.within(SET, "relativeDistinguishedName")
        while True:
            attribute = attributes.within(SEQUENCE, "attribute")
            oid = oid_of(attribute.take(OID, "type"), what)
            tag, content, _ = attribute.element("value")
            attribute.finish()
            parts.append((oid, text_of(tag, content, what)))
            if len(parts) > _MAX_NAME_PARTS:
                raise CertificateMalformed(f"{what}: expected at most {_MAX_NAME_PARTS} attributes")
            if attributes.ended:
                break
    return Name(der, tuple(parts))


def _read_time(reader: DerReader, what: str) -> int:
    tag, content, _ = reader.element(what)
    return time_of(tag, content, what)


def _read_extensions(reader: DerReader) -> tuple[Extension, ...]:
    items = reader.within(SEQUENCE, "value")
    reader.finish()
    extensions: list[Extension] = []
    seen: set[str] = set()
    while not items.ended:
        item = items.within(SEQUENCE, "extension")
        oid = oid_of(item.take(OID, "extnID"), "extension")
        critical = False
        if item.peek() == BOOLEAN:
            critical = boolean_of(item.take(BOOLEAN, "critical"), "extension.critical")
        value = item.take(OCTET_STRING, "extnValue")
        item.finish()
        if oid in seen or len(extensions) == _MAX_EXTENSIONS:
            raise CertificateMalformed(
                f"extensions: expected at most {_MAX_EXTENSIONS}, each once, found {oid} again or "
                "more"
            )
        seen.add(oid)
        extensions.append(Extension(oid, critical, value))
    return tuple(extensions)
