"""VCEK and VLEK certificates and the chains above them: ASK or ASVK, then AMD's root, the ARK.

Candidates come from the machine itself and from the operator's collateral, in any number and order,
with certificates of other products and vendors among them. None of them is trusted: a chain counts
only where its root's fingerprint is pinned and every signature below it verifies. Of several
possible chains the one with fewest faults is judged, so that a decoy cannot hide the real one.

Source: AMD 57230, Versioned Chip Endorsement Key (VCEK) Certificate and KDS Interface
Specification; AMD 56421, Guest-Hypervisor Communication Block Standardization, MSG_REPORT_REQ.
"""

from __future__ import annotations

import functools
import re
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.serialization import load_der_public_key

from security.attestation.certificates import (
    BASIC_CONSTRAINTS,
    COMMON_NAME,
    CRL_SIGN,
    KEY_CERT_SIGN,
    KEY_USAGE,
    BasicConstraints,
    Certificate,
    Name,
    RevocationList,
    read_certificate,
    read_revocation_list,
)
from security.attestation.der import (
    IA5_STRING,
    INTEGER,
    OCTET_STRING,
    DerReader,
    integer_of,
    text_of,
)
from security.attestation.errors import (
    CertificateMalformed,
    SnpCertificateExpired,
    SnpCertificateNotYetValid,
    SnpCertificateProfile,
    SnpCertificateTableMalformed,
    SnpChainSignatureInvalid,
    SnpEndorsementMalformed,
    SnpIssuerMissing,
    SnpRootNotTrusted,
)
from security.attestation.octets import OctetReader
from security.attestation.snp_report import AttestationReport, Product, SigningKey, TcbVersion

__all__ = [
    "AMD_ROOTS",
    "Chain",
    "Endorsement",
    "Revocation",
    "build_chain",
    "choose_chain",
    "parse_certificate_table",
    "read_candidates",
    "read_endorsement",
    "signs_report",
]

AMD_ROOTS: Mapping[Product, str] = MappingProxyType(
    {
        Product.MILAN: "69d063b45344d26a2e94e1f4210de49ef555308287d4c174445c95639a540bcd",
        Product.GENOA: "4c6598d19c18719c5dfd4a7d335f674e5bfe1d8f800cea2cf270c10d103db2f1",
        Product.TURIN: "1f084161a44bb6d93778a904877d4819cafa5d05ef4193b2ded9dd9c73dd3f6a",
    }
)
"""AMD's root certificates (ARK) by product: SHA-256 of the DER certificate."""

MAX_TABLE_BYTES = 256 << 10
MAX_TABLE_ENTRIES = 64
MAX_TRIED = 16
"""Most certificates of one role that are tried for one report."""

HWID_BYTES: Mapping[Product, int] = MappingProxyType(
    {Product.MILAN: 64, Product.GENOA: 64, Product.TURIN: 8}
)
CHIP_ID_BYTES = 64

_TABLE_ENTRY_BYTES = 24
_TABLE_ROLES = {
    uuid.UUID("63da758d-e664-4564-adc5-f4b93be8accd").bytes: "VCEK",
    uuid.UUID("a8074bc2-a25a-483e-aae6-39c045a0b8a1").bytes: "VLEK",
    uuid.UUID("4ab7b379-bbac-4fe4-a02f-05aef327c782").bytes: "ASK",
    uuid.UUID("c0b406a4-a803-4952-9743-3fb6014cd0ae").bytes: "ARK",
}

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

# AlgorithmIdentifiers in DER (RFC 4055, 5480). AMD writes the default trailer field in some
# certificates and leaves it out in others; the meaning is the same.
_PSS_SHA384 = bytes.fromhex(
    "304106092a864886f70d01010a3034a00f300d06096086480165030402020500a11c301a06092a864886f70d01"
    "0108300d06096086480165030402020500a203020130"
)
_PSS_SHA384_TRAILER = bytes.fromhex(
    "304606092a864886f70d01010a3039a00f300d06096086480165030402020500a11c301a06092a864886f70d01"
    "0108300d06096086480165030402020500a203020130a303020101"
)
_PSS_ALGORITHMS = (_PSS_SHA384, _PSS_SHA384_TRAILER)
_P384_KEY = bytes.fromhex("3076301006072a8648ce3d020106052b81040022036200")
_RSA4096_KEY = bytes.fromhex("30820222300d06092a864886f70d01010105000382020f00")
_SALT_BYTES = 48

_AMD_NAME = (
    ("2.5.4.11", "Engineering"),
    ("2.5.4.6", "US"),
    ("2.5.4.7", "Santa Clara"),
    ("2.5.4.8", "CA"),
    ("2.5.4.10", "Advanced Micro Devices"),
)
_LEAF_NAMES = {SigningKey.VCEK: "SEV-VCEK", SigningKey.VLEK: "SEV-VLEK"}
_ISSUER_NAMES = {SigningKey.VCEK: "SEV-", SigningKey.VLEK: "SEV-VLEK-"}
_ISSUER_ROLES = {SigningKey.VCEK: "ASK", SigningKey.VLEK: "ASVK"}


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


@dataclass(frozen=True, slots=True)
class Chain:
    """An endorsement and the certificates found above it; nothing of it is checked yet.

    Attributes:
        endorsement: VCEK or VLEK.
        issuer: ASK or ASVK; None where none was found.
        root: ARK; None where none was found.
    """

    endorsement: Endorsement
    issuer: Certificate | None
    root: Certificate | None

    @property
    def certificates(self) -> tuple[tuple[str, Certificate], ...]:
        """Those that were found, from the bottom, each with its role."""
        key = self.endorsement.signing_key
        found = (
            (key.name, self.endorsement.certificate),
            (_ISSUER_ROLES[key], self.issuer),
            ("ARK", self.root),
        )
        return tuple((role, item) for role, item in found if item is not None)

    def require_root(self, roots: frozenset[str]) -> None:
        """Checks that every link was found and that the last is pinned.

        Args:
            roots: SHA-256 (hex) of the DER certificates that count as roots.

        Raises:
            SnpIssuerMissing, SnpRootNotTrusted
        """
        role = _ISSUER_ROLES[self.endorsement.signing_key]
        wanted = self.endorsement.certificate.issuer.common_name
        if self.issuer is None:
            raise SnpIssuerMissing(
                f"{role} certificate", f"{wanted or 'an issuer'} among the certificates", "none"
            )
        if self.root is None:
            name = self.issuer.issuer.common_name
            raise SnpIssuerMissing(
                "ARK certificate", f"{name or 'an issuer'} among the certificates", "none"
            )
        if self.root.fingerprint not in roots:
            shown = " or ".join(sorted(root[:16] for root in roots)) or "none"
            raise SnpRootNotTrusted(
                "ARK certificate, SHA-256", f"{shown}...", f"{self.root.fingerprint[:16]}..."
            )

    def require_signatures(self) -> None:
        """Checks every signature of those that were found.

        Raises:
            SnpChainSignatureInvalid
        """
        links = self.certificates
        for i, (role, certificate) in enumerate(links):
            by_role, by = links[min(i + 1, len(links) - 1)]
            if by is certificate and role != "ARK":
                continue
            if not issued(certificate, by):
                raise SnpChainSignatureInvalid(
                    f"{role} certificate", f"a signature by {by_role}", "another"
                )

    def require_profile(self) -> None:
        """Checks names, keys, algorithms and what the extensions allow.

        Raises:
            SnpCertificateProfile
        """
        endorsement = self.endorsement
        key, product = endorsement.signing_key, endorsement.product
        leaf = endorsement.certificate
        _require_name(leaf.subject, key.name, _LEAF_NAMES[key])
        _require_name(leaf.issuer, f"{key.name} issuer", _ISSUER_NAMES[key] + product.value)
        _require_key(leaf, key.name, _P384_KEY, "P-384")
        _require_extensions(leaf, key.name, None, frozenset())
        ark = f"ARK-{product.value}"
        if self.issuer is not None:
            role = _ISSUER_ROLES[key]
            _require_name(self.issuer.issuer, f"{role} issuer", ark)
            _require_key(self.issuer, role, _RSA4096_KEY, "RSA-4096")
            _require_extensions(
                self.issuer, role, BasicConstraints(True, 0), frozenset({KEY_CERT_SIGN})
            )
        if self.root is not None:
            _require_name(self.root.subject, "ARK", ark)
            _require_name(self.root.issuer, "ARK issuer", ark)
            _require_key(self.root, "ARK", _RSA4096_KEY, "RSA-4096")
            _require_extensions(
                self.root, "ARK", BasicConstraints(True, None), frozenset({KEY_CERT_SIGN, CRL_SIGN})
            )

    def require_dates(self, now: int) -> None:
        """Checks that all are valid at a time.

        Args:
            now: Unix time in seconds.

        Raises:
            SnpCertificateExpired, SnpCertificateNotYetValid
        """
        for role, certificate in self.certificates:
            if now > certificate.not_after:
                raise SnpCertificateExpired(
                    f"{role} certificate",
                    f"one valid at {now}",
                    f"notAfter {certificate.not_after}",
                )
            if now < certificate.not_before:
                raise SnpCertificateNotYetValid(
                    f"{role} certificate",
                    f"one valid at {now}",
                    f"notBefore {certificate.not_before}",
                )


@dataclass(frozen=True, slots=True)
class Revocation:
    """What the root's revocation lists say.

    Attributes:
        revoked: roles of the chain's certificates that a list names.
        current: the newest list that is valid now; None where there is none.
        newest: the newest list that the root signed, valid or not.
    """

    revoked: tuple[str, ...]
    current: RevocationList | None
    newest: RevocationList | None

    @classmethod
    def of(cls, chain: Chain, lists: Iterable[RevocationList], now: int) -> Revocation:
        """Looks through lists.

        Only lists count that the chain's root signed and that have no critical extension, which
        could change their meaning. An entry counts whatever its date and its list's date: AMD
        revokes for good. It names certificates that the ARK issued; every VCEK and VLEK has serial
        number 0 and another issuer, so no entry can name one: those are revoked by the policy.

        Args:
            chain: the certificates.
            lists: revocation lists of anybody.
            now: Unix time in seconds.
        """
        root = chain.root
        if root is None:
            return cls((), None, None)
        own = sorted(
            (
                item
                for item in lists
                if item.issuer.der == root.subject.der
                and not item.critical
                and item.signature_algorithm in _PSS_ALGORITHMS
                and _verifies(item.tbs, item.signature, root.public_key)
            ),
            key=lambda item: item.this_update,
        )
        serials = frozenset[int]().union(*(item.revoked for item in own))
        revoked = tuple(role for role, item in chain.certificates[1:] if item.serial in serials)
        valid = [
            item
            for item in own
            if item.next_update is not None and item.this_update <= now <= item.next_update
        ]
        return cls(revoked, valid[-1] if valid else None, own[-1] if own else None)


def parse_certificate_table(data: bytes) -> tuple[tuple[str, bytes], ...]:
    """Reads the certificate table of the extended guest request: `auxblob` of configfs-tsm.

    Layout: entries of 24 bytes, each a GUID (in the order of its text, RFC 4122), offset and length
    (u32 little-endian, from the table's start), ended by an entry of zeros; then the certificates.

    Returns:
        ("VCEK" | "VLEK" | "ASK" | "ARK" | the GUID where it is none of them, DER); an ASVK has the
        ASK's GUID. Empty for an empty table.

    Raises:
        SnpCertificateTableMalformed
    """
    if not data:
        return ()
    if len(data) > MAX_TABLE_BYTES:
        raise SnpCertificateTableMalformed(
            f"cert_table: expected at most {MAX_TABLE_BYTES} bytes, found {len(data)}"
        )
    reader = OctetReader(data, "cert_table")
    entries: list[tuple[bytes, int, int]] = []
    while True:
        if reader.left < _TABLE_ENTRY_BYTES or len(entries) > MAX_TABLE_ENTRIES:
            raise SnpCertificateTableMalformed(
                f"cert_table: expected an entry of zeros after at most {MAX_TABLE_ENTRIES}, found "
                "none"
            )
        guid = reader.take(16, "guid")
        offset, length = reader.little(4, "offset"), reader.little(4, "length")
        if not any(guid) and not offset and not length:
            break
        entries.append((guid, offset, length))
    found: list[tuple[str, bytes]] = []
    for guid, offset, length in entries:
        if offset < reader.position or offset + length > len(data) or not length:
            raise SnpCertificateTableMalformed(
                f"cert_table: expected a certificate between {reader.position} and {len(data)}, "
                f"found {length} bytes at {offset}"
            )
        role = _TABLE_ROLES.get(guid) or str(uuid.UUID(bytes=guid))
        found.append((role, data[offset : offset + length]))
    return tuple(found)


def read_candidates(items: Iterable[bytes]) -> tuple[tuple[Certificate, ...], int]:
    """Reads the certificates that can be read, each once.

    Returns:
        The certificates, and how many others there were.
    """
    found: dict[str, Certificate] = {}
    others = 0
    for der in items:
        try:
            certificate = read_certificate(der)
        except CertificateMalformed:
            others += 1
        else:
            found.setdefault(certificate.fingerprint, certificate)
    return tuple(found.values()), others


def read_revocation_lists(items: Iterable[bytes]) -> tuple[tuple[RevocationList, ...], int]:
    """Reads the revocation lists that can be read; and how many others there were."""
    found: dict[str, RevocationList] = {}
    others = 0
    for der in items:
        try:
            item = read_revocation_list(der)
        except CertificateMalformed:
            others += 1
        else:
            found.setdefault(item.fingerprint, item)
    return tuple(found.values()), others


def signing_key_of(certificate: Certificate) -> SigningKey | None:
    """Whether a certificate calls itself a VCEK's or a VLEK's."""
    name = certificate.subject.common_name
    for key, expected in _LEAF_NAMES.items():
        if name == expected:
            return key
    return None


@functools.lru_cache(maxsize=64)
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


def build_chain(
    endorsement: Endorsement,
    candidates: Iterable[Certificate],
    roots: frozenset[str],
    lists: Iterable[RevocationList],
    now: int,
) -> Chain:
    """Finds the certificates above an endorsement: of all chains, one with fewest faults.

    Args:
        endorsement: the VCEK or VLEK.
        candidates: certificates of anybody.
        roots: SHA-256 (hex) of the DER certificates that count as roots.
        lists: revocation lists of anybody.
        now: Unix time in seconds.
    """
    pool, lists = tuple(candidates), tuple(lists)
    leaf = endorsement.certificate
    best = Chain(endorsement, None, None)
    least = _faults(best, roots, lists, now)
    for issuer in _named(leaf.issuer, pool, leaf):
        above: list[Certificate | None] = [*_named(issuer.issuer, pool, issuer)]
        for root in above or [None]:
            chain = Chain(endorsement, issuer, root)
            faults = _faults(chain, roots, lists, now)
            if faults < least or best.issuer is None:
                best, least = chain, faults
            if not faults:
                return best
    return best


def choose_chain(
    report: AttestationReport,
    candidates: tuple[Certificate, ...],
    roots_of: Mapping[Product, frozenset[str]],
    lists: tuple[RevocationList, ...],
    now: int,
) -> Chain | SnpEndorsementMalformed | None:
    """Finds the endorsement that signed a report, and the chain above it.

    Certificates that name the report's chip and TCB version are tried first, at most `MAX_TRIED`.

    Returns:
        A chain, with faults perhaps; why the only candidates cannot be read; or None where there is
        no candidate.
    """
    unreadable: SnpEndorsementMalformed | None = None
    endorsements: list[Endorsement] = []
    for certificate in candidates:
        if signing_key_of(certificate) is not report.key_info.signing_key:
            continue
        try:
            endorsements.append(read_endorsement(certificate))
        except SnpEndorsementMalformed as error:
            unreadable = error
    endorsements.sort(key=lambda item: _unlike(item, report))
    best: Chain | None = None
    least = (True, 0)
    for endorsement in endorsements[:MAX_TRIED]:
        roots = roots_of[endorsement.product]
        chain = build_chain(endorsement, candidates, roots, lists, now)
        faults = (not signs_report(endorsement, report), _faults(chain, roots, lists, now))
        if best is None or faults < least:
            best, least = chain, faults
        if least == (False, 0):
            break
    return best or unreadable


def signs_report(endorsement: Endorsement, report: AttestationReport) -> bool:
    """Whether a report's signature verifies under an endorsement's key (ECDSA P-384, SHA-384)."""
    spki = endorsement.certificate.public_key
    if not spki.startswith(_P384_KEY) or not (report.signature_r and report.signature_s):
        return False
    try:
        key = load_der_public_key(spki)
        if not isinstance(key, ec.EllipticCurvePublicKey):
            return False
        signature = encode_dss_signature(report.signature_r, report.signature_s)
        key.verify(signature, report.signed, ec.ECDSA(hashes.SHA384()))
    except (InvalidSignature, UnsupportedAlgorithm, ValueError):
        return False
    return True


def issued(certificate: Certificate, by: Certificate) -> bool:
    """Whether one certificate signed another: RSASSA-PSS, SHA-384, 48 bytes of salt."""
    return certificate.signature_algorithm in _PSS_ALGORITHMS and _verifies(
        certificate.tbs, certificate.signature, by.public_key
    )


# Says only whether a signature verifies, which never changes; dates are checked each time.
@functools.lru_cache(maxsize=512)
def _verifies(signed: bytes, signature: bytes, spki: bytes) -> bool:
    if not spki.startswith(_RSA4096_KEY):
        return False
    try:
        key = load_der_public_key(spki)
        if not isinstance(key, rsa.RSAPublicKey):
            return False
        scheme = padding.PSS(padding.MGF1(hashes.SHA384()), _SALT_BYTES)
        key.verify(signature, signed, scheme, hashes.SHA384())
    except (InvalidSignature, UnsupportedAlgorithm, ValueError):
        return False
    return True


def _named(name: Name, pool: Iterable[Certificate], below: Certificate) -> list[Certificate]:
    named = [item for item in pool if item.subject.der == name.der]
    named.sort(key=lambda item: not issued(below, item))
    return named[:MAX_TRIED]


def _faults(
    chain: Chain, roots: frozenset[str], lists: tuple[RevocationList, ...], now: int
) -> int:
    faults = 0
    requirements: tuple[Callable[[], None], ...] = (
        lambda: chain.require_root(roots),
        chain.require_signatures,
        chain.require_profile,
        lambda: chain.require_dates(now),
    )
    for holds in requirements:
        try:
            holds()
        except (
            SnpIssuerMissing,
            SnpRootNotTrusted,
            SnpChainSignatureInvalid,
            SnpCertificateProfile,
            SnpCertificateExpired,
            SnpCertificateNotYetValid,
        ):
            faults += 1
    return faults + bool(Revocation.of(chain, lists, now).revoked)


def _unlike(endorsement: Endorsement, report: AttestationReport) -> int:
    chip = bool(endorsement.hwid) and not report.chip_id_masked
    return (endorsement.tcb.to_bytes(endorsement.product) != report.reported_tcb) + (
        chip and endorsement.chip_id != report.chip_id
    )


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


def _require_name(name: Name, role: str, common_name: str) -> None:
    expected = sorted((*_AMD_NAME, (COMMON_NAME, common_name)))
    if sorted(name.parts) != expected:
        raise SnpCertificateProfile(
            f"{role} name", f"Advanced Micro Devices, {common_name}", repr(name.common_name[:64])
        )


def _require_key(certificate: Certificate, role: str, prefix: bytes, kind: str) -> None:
    if not certificate.public_key.startswith(prefix):
        raise SnpCertificateProfile(
            f"{role} key", kind, f"SubjectPublicKeyInfo {certificate.public_key[:24].hex()}"
        )
    if certificate.signature_algorithm not in _PSS_ALGORITHMS:
        raise SnpCertificateProfile(
            f"{role} signature algorithm",
            "RSASSA-PSS with SHA-384",
            certificate.signature_algorithm[:16].hex(),
        )


def _require_extensions(
    certificate: Certificate,
    role: str,
    constraints: BasicConstraints | None,
    usage: frozenset[int],
) -> None:
    known = (BASIC_CONSTRAINTS, KEY_USAGE)
    for extension in certificate.extensions:
        if extension.critical and extension.oid not in known:
            raise SnpCertificateProfile(
                f"{role} extensions", "no other critical one", extension.oid
            )
    try:
        found = certificate.basic_constraints()
        bits = certificate.key_usage()
    except CertificateMalformed as error:
        raise SnpCertificateProfile(f"{role} extensions", "readable ones", str(error)) from None
    if constraints is None:
        if found is not None and found.authority:
            raise SnpCertificateProfile(f"{role} basicConstraints", "no authority", "CA")
        return
    if found is None or found.authority != constraints.authority:
        raise SnpCertificateProfile(f"{role} basicConstraints", "CA", "none")
    if constraints.path_length is not None and found.path_length != constraints.path_length:
        raise SnpCertificateProfile(
            f"{role} pathLenConstraint", str(constraints.path_length), str(found.path_length)
        )
    if bits is None or not usage <= bits:
        raise SnpCertificateProfile(
            f"{role} keyUsage", f"bits {sorted(usage)}", f"{sorted(bits or ())}"
        )
