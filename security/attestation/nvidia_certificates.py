"""NVIDIA's certificate chains: of devices (DICE) and of those who sign reference manifests.

Both are ECDSA P-384 with SHA-384 throughout, leaf first, the root included. What does not depend
on the time is computed once for each certificate: parsing, and whether one issued another. Dates,
pins and revocation are looked at every time.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from itertools import pairwise

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import (
    ECDSA,
    SECP384R1,
    EllipticCurvePublicKey,
)
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.x509.oid import ExtensionOID, NameOID, SignatureAlgorithmOID

from security.attestation.errors import (
    CertificateNotCurrent,
    CertificateRevoked,
    CertificateUnsupported,
    ChainBroken,
    ChainNotAuthorised,
    ChainWrongLength,
    RevocationUnknown,
    RootNotPinned,
)
from security.attestation.octets import OctetReader
from security.errors import EvidenceMalformed

__all__ = [
    "DEVICE_ROOT",
    "RIM_ROOT",
    "Certificate",
    "check_authority",
    "check_dates",
    "check_issuers",
    "check_length",
    "check_revocation",
    "check_root",
    "load_certificate",
    "read_chain",
    "unlisted",
    "verify_raw_signature",
]

DEVICE_ROOT = "102bf659d5419614c9d8e6aecebc80454eb26b1df6a769ac720b9a690b167b48"
"""SHA-256 of the DER of "NVIDIA Device Identity CA" (until 9999-12-31)."""

RIM_ROOT = "12977b5115acb0381179279fffeb5a8c4d264971ebb32298023a465fa41df5d1"
"""SHA-256 of the DER of "NVIDIA CoRIM signing Root CA" (until 2053-03-08)."""

MAX_CHAIN_BYTES = 16384
MAX_CERTIFICATES = 8
MAX_CERTIFICATE_BYTES = 4096
_MAX_LIST_BYTES = 1 << 22

_TCB_INFO = ("2.23.133.5.4.1", "2.23.133.5.4.1.1")
"""DICE extensions that end in, or hold, the firmware id: Hopper and LS10; Blackwell."""

_SHA384_DIGEST = bytes.fromhex("06096086480165030402020430")
"""OBJECT IDENTIFIER id-sha384, and the head of an OCTET STRING of 48 bytes."""

_NOT_X509 = (
    ValueError,
    TypeError,
    OverflowError,
    UnsupportedAlgorithm,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
    x509.InvalidVersion,
)
"""What `cryptography` raises for bytes that are not what they should be."""

_PEM = re.compile(
    rb"\s*(?:-----BEGIN CERTIFICATE-----\s[A-Za-z0-9+/=\s]{1,8192}"
    rb"-----END CERTIFICATE-----\s*)+"
)
_PEM_BODY = re.compile(rb"-----BEGIN CERTIFICATE-----\s([A-Za-z0-9+/=\s]+)-----END")


@dataclass(frozen=True, slots=True, eq=False)
class Certificate:
    """What a certificate says; the same bytes are parsed once.

    Attributes:
        der: the certificate.
        fingerprint: SHA-256 of the DER, hex.
        common_name: CN of the subject, "" if it has none.
        subject: DER of the subject.
        issuer: DER of the issuer.
        serial: serial number, hex, in whole octets without zeros before them.
        not_before: Unix time in seconds from which it is valid.
        not_after: Unix time in seconds until which it is valid, inclusive.
        authority: basic constraints say CA.
        path_length: most authorities below it; None for any number.
        signs_certificates: key usage has keyCertSign.
        signs_data: key usage has digitalSignature.
        has_list: names a CRL distribution point.
        firmware_id: SHA-384 digest (48 bytes) of DICE's TcbInfo or CompositeDeviceID; None if
            it has neither.
        key: ECDSA P-384.
        parsed: for signatures.
    """

    der: bytes
    fingerprint: str
    common_name: str
    subject: bytes
    issuer: bytes
    serial: str
    not_before: int
    not_after: int
    authority: bool
    path_length: int | None
    signs_certificates: bool
    signs_data: bool
    has_list: bool
    firmware_id: bytes | None
    key: EllipticCurvePublicKey
    parsed: x509.Certificate


def read_chain(data: bytes, what: str) -> tuple[Certificate, ...]:
    """Reads certificates that follow each other in PEM (as NVML gives them) or in DER.

    Raises:
        EvidenceMalformed: neither, or too many or too long.
        CertificateUnsupported: as `load_certificate`.
    """
    if not 0 < len(data) <= MAX_CHAIN_BYTES:
        raise EvidenceMalformed(
            f"{what}: expected 1 to {MAX_CHAIN_BYTES} bytes of certificates, found {len(data)}"
        )
    items = _split_der(data, what) if data[:1] == b"\x30" else _split_pem(data, what)
    return tuple(load_certificate(item) for item in items)


def _split_pem(data: bytes, what: str) -> list[bytes]:
    if data.count(b"-----BEGIN") > MAX_CERTIFICATES or _PEM.fullmatch(data) is None:
        raise EvidenceMalformed(
            f"{what}: expected at most {MAX_CERTIFICATES} certificates in PEM or DER, found "
            "something else"
        )
    try:
        bodies = [b"".join(match[1].split()) for match in _PEM_BODY.finditer(data)]
        return [base64.b64decode(body, validate=True) for body in bodies]
    except binascii.Error:
        raise EvidenceMalformed(f"{what}: expected PEM, found text that is not base64") from None


def _split_der(data: bytes, what: str) -> list[bytes]:
    reader = OctetReader(data, what)
    items: list[bytes] = []
    while reader.left:
        # Every certificate here has 256 to 4096 bytes: SEQUENCE, two bytes of length.
        head = reader.take(4, "certificate")
        if head[:2] != b"\x30\x82" or len(items) == MAX_CERTIFICATES:
            raise EvidenceMalformed(
                f"{what}: expected at most {MAX_CERTIFICATES} certificates in DER, found "
                "something else"
            )
        items.append(head + reader.take(int.from_bytes(head[2:], "big"), "certificate"))
    return items


@lru_cache(maxsize=1024)
def load_certificate(der: bytes) -> Certificate:
    """Parses one certificate.

    Raises:
        EvidenceMalformed: not an X.509 certificate.
        CertificateUnsupported: another key or signature algorithm, a serial number that is not
            positive, or a critical extension that is not known here.
    """
    if len(der) > MAX_CERTIFICATE_BYTES:
        raise EvidenceMalformed(
            f"certificate: expected at most {MAX_CERTIFICATE_BYTES} bytes, found {len(der)}"
        )
    try:
        return _describe(der, x509.load_der_x509_certificate(der))
    except _NOT_X509:
        raise EvidenceMalformed(
            f"certificate: expected X.509 in DER, found {len(der)} bytes that are not"
        ) from None


def _describe(der: bytes, parsed: x509.Certificate) -> Certificate:
    names = parsed.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    common_name = str(names[0].value) if len(names) == 1 else ""
    # RFC 5280, 4.1.2.2. Revocation lists cannot name another.
    if not 0 < parsed.serial_number < 1 << 160:
        raise CertificateUnsupported(
            f"certificate {common_name:.64}: expected a positive serial number of at most 20 bytes"
        )
    key = parsed.public_key()
    if not isinstance(key, EllipticCurvePublicKey) or not isinstance(key.curve, SECP384R1):
        raise CertificateUnsupported(
            f"certificate {common_name:.64}: expected an ECDSA P-384 key, found another"
        )
    if parsed.signature_algorithm_oid != SignatureAlgorithmOID.ECDSA_WITH_SHA384:
        raise CertificateUnsupported(
            f"certificate {common_name:.64}: expected ecdsa-with-SHA384, found "
            f"{parsed.signature_algorithm_oid.dotted_string:.64}"
        )
    authority, path_length, usage, firmware_id, has_list = False, None, None, None, False
    for extension in parsed.extensions:
        value = extension.value
        if isinstance(value, x509.BasicConstraints):
            authority, path_length = value.ca, value.path_length
        elif isinstance(value, x509.KeyUsage):
            usage = value
        elif extension.critical:
            raise CertificateUnsupported(
                f"certificate {common_name:.64}: expected no critical extension but basic "
                f"constraints and key usage, found {extension.oid.dotted_string:.64}"
            )
        elif extension.oid == ExtensionOID.CRL_DISTRIBUTION_POINTS:
            has_list = True
        elif extension.oid.dotted_string in _TCB_INFO:
            assert isinstance(value, x509.UnrecognizedExtension)
            firmware_id = _firmware_id(value.value)
    return Certificate(
        der=der,
        fingerprint=sha256(der).hexdigest(),
        common_name=common_name,
        subject=parsed.subject.public_bytes(),
        issuer=parsed.issuer.public_bytes(),
        serial=parsed.serial_number.to_bytes(20, "big").lstrip(b"\0").hex(),
        not_before=int(parsed.not_valid_before_utc.timestamp()),
        not_after=int(parsed.not_valid_after_utc.timestamp()),
        authority=authority,
        path_length=path_length,
        signs_certificates=usage is not None and usage.key_cert_sign,
        signs_data=usage is not None and usage.digital_signature,
        has_list=has_list,
        firmware_id=firmware_id,
        key=key,
        parsed=parsed,
    )


def _firmware_id(extension: bytes) -> bytes:
    """The first SHA-384 FWID: the only one (CompositeDeviceID) or the first of fwids (TcbInfo)."""
    start = extension.find(_SHA384_DIGEST)
    digest = extension[start + len(_SHA384_DIGEST) :][:48] if start >= 0 else b""
    if len(digest) != 48:
        raise CertificateUnsupported(
            "certificate: expected a SHA-384 firmware id in DICE's extension, found none"
        )
    return digest


def check_length(chain: Sequence[Certificate], least: int, most: int, what: str) -> None:
    """Raises ChainWrongLength: fewer or more certificates than the vendor issues."""
    if not least <= len(chain) <= most:
        expected = str(least) if least == most else f"{least} to {most}"
        raise ChainWrongLength(what, f"{expected} certificates", str(len(chain)))


def check_issuers(chain: Sequence[Certificate], what: str) -> None:
    """Raises ChainBroken: a certificate is not issued by the next, or the last not by itself."""
    for subject, issuer in zip(chain, [*chain[1:], chain[-1]], strict=True):
        if not _issued(issuer.der, subject.der):
            raise ChainBroken(
                what,
                f"{subject.common_name[:64]!r} to be issued by {issuer.common_name[:64]!r}",
                "another issuer or signature",
            )


@lru_cache(maxsize=1024)
def _issued(issuer_der: bytes, subject_der: bytes) -> bool:
    issuer, subject = load_certificate(issuer_der), load_certificate(subject_der)
    if subject.issuer != issuer.subject:
        return False
    try:
        subject.parsed.verify_directly_issued_by(issuer.parsed)
    except (InvalidSignature, ValueError, TypeError):
        return False
    return True


def check_authority(chain: Sequence[Certificate], what: str) -> None:
    """Raises ChainNotAuthorised: the leaf may issue or not sign, or an issuer may not issue."""
    leaf = chain[0]
    if leaf.authority or leaf.signs_certificates or not leaf.signs_data:
        raise ChainNotAuthorised(what, "a leaf that signs data and nothing else", "another usage")
    for below, issuer in enumerate(chain[1:]):
        if not (issuer.authority and issuer.signs_certificates):
            raise ChainNotAuthorised(
                what, f"{issuer.common_name[:64]!r} to be an authority", "that it is none"
            )
        if issuer.path_length is not None and issuer.path_length < below:
            raise ChainNotAuthorised(
                what,
                f"at most {issuer.path_length} authorities below {issuer.common_name[:64]!r}",
                str(below),
            )


def check_dates(chain: Sequence[Certificate], now: int, what: str) -> None:
    """Raises CertificateNotCurrent: one is not valid yet or no more."""
    for certificate in chain:
        if not certificate.not_before <= now <= certificate.not_after:
            raise CertificateNotCurrent(
                what,
                f"{certificate.common_name[:64]!r} to be valid at {now}",
                f"one for {certificate.not_before} to {certificate.not_after}",
            )


def check_root(chain: Sequence[Certificate], roots: Sequence[str], what: str) -> None:
    """Raises RootNotPinned: the last certificate is none of the roots (SHA-256, hex)."""
    if chain[-1].fingerprint not in roots:
        raise RootNotPinned(
            what, f"the root {roots[0][:16]}...", f"{chain[-1].fingerprint[:16]}..."
        )


def check_revocation(chain: Sequence[Certificate], lists: Sequence[bytes], what: str) -> None:
    """Raises CertificateRevoked: an issuer's list, current or old, names a certificate."""
    for subject, issuer in pairwise(chain):
        for listing in _lists_of(issuer, lists):
            number = subject.parsed.serial_number
            if listing.get_revoked_certificate_by_serial_number(number) is not None:
                raise CertificateRevoked(
                    what, f"{subject.common_name[:64]!r} not to be revoked", "its serial number"
                )


def unlisted(
    chain: Sequence[Certificate], lists: Sequence[bytes], now: int, what: str
) -> RevocationUnknown | None:
    """The first certificate that has a revocation list of which no current one is at hand."""
    for subject, issuer in pairwise(chain):
        if subject.has_list and not any(
            _current(listing, now) for listing in _lists_of(issuer, lists)
        ):
            return RevocationUnknown(
                what,
                f"a revocation list of {issuer.common_name[:64]!r} that is current at {now}",
                "none",
                "add it to the collateral, or open revocation",
            )
    return None


def _current(listing: x509.CertificateRevocationList, now: int) -> bool:
    end = listing.next_update_utc
    return end is not None and listing.last_update_utc.timestamp() <= now <= end.timestamp()


def _lists_of(issuer: Certificate, lists: Sequence[bytes]) -> list[x509.CertificateRevocationList]:
    named = (data for data in lists if _list_issuer(data) == issuer.subject)
    return [parsed for data in named if (parsed := _list_of(issuer.der, data)) is not None]


@lru_cache(maxsize=512)
def _list_issuer(data: bytes) -> bytes | None:
    """Whose revocation list it says that it is (DER of the name); None where it does not count.

    A list with a critical extension is partial, or of others' certificates, or a difference.
    """
    if len(data) > _MAX_LIST_BYTES:
        return None
    try:
        parsed = x509.load_der_x509_crl(data)
        if any(extension.critical for extension in parsed.extensions):
            return None
        return parsed.issuer.public_bytes()
    except _NOT_X509:
        return None


@lru_cache(maxsize=256)
def _list_of(issuer_der: bytes, data: bytes) -> x509.CertificateRevocationList | None:
    """A revocation list, None where the issuer has not signed it."""
    issuer = load_certificate(issuer_der)
    try:
        parsed = x509.load_der_x509_crl(data)
        return parsed if parsed.is_signature_valid(issuer.key) else None
    except _NOT_X509:
        return None


def verify_raw_signature(certificate: Certificate, signature: bytes, data: bytes) -> bool:
    """Whether r and s (48 bytes each, big-endian) sign the data under a certificate's key."""
    r, s = int.from_bytes(signature[:48], "big"), int.from_bytes(signature[48:], "big")
    try:
        certificate.key.verify(encode_dss_signature(r, s), data, ECDSA(SHA384()))
    except InvalidSignature:
        return False
    return True
