"""Chains above VCEK and VLEK certificates: ASK or ASVK, then AMD's root, the ARK; and revocation.

Candidates come from the machine itself and from the operator's collateral, in any number and order,
with certificates of other products and vendors among them. None of them is trusted: a chain counts
only where its root's fingerprint is pinned and every signature below it verifies. Of several
possible chains the one with fewest faults is judged, so that a decoy cannot hide the real one.

Source: AMD 57230, Versioned Chip Endorsement Key (VCEK) Certificate and KDS Interface
Specification.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
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
from security.attestation.errors import (
    CertificateMalformed,
    SnpCertificateExpired,
    SnpCertificateNotYetValid,
    SnpCertificateProfile,
    SnpChainSignatureInvalid,
    SnpEndorsementMalformed,
    SnpIssuerMissing,
    SnpRootNotTrusted,
)
from security.attestation.snp_endorsement import (
    LEAF_NAMES,
    Endorsement,
    is_p384_key,
    read_endorsement,
    signing_key_of,
    signs_report,
)
from security.attestation.snp_report import AttestationReport, Product, SigningKey

__all__ = [
    "AMD_ROOTS",
    "Chain",
    "Revocation",
    "build_chain",
    "choose_chain",
    "read_candidates",
]

AMD_ROOTS: Mapping[Product, str] = MappingProxyType(
    {
        Product.MILAN: "69d063b45344d26a2e94e1f4210de49ef555308287d4c174445c95639a540bcd",
        Product.GENOA: "4c6598d19c18719c5dfd4a7d335f674e5bfe1d8f800cea2cf270c10d103db2f1",
        Product.TURIN: "1f084161a44bb6d93778a904877d4819cafa5d05ef4193b2ded9dd9c73dd3f6a",
    }
)
"""AMD's root certificates (ARK) by product: SHA-256 of the DER certificate."""

MAX_TRIED = 8
"""Most certificates of one role that are tried for one report."""

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
# SubjectPublicKeyInfo of an RSA key with 4096 bits and exponent 65537: around the modulus.
_RSA4096_HEAD = bytes.fromhex("30820222300d06092a864886f70d01010105000382020f003082020a0282020100")
_RSA4096_TAIL = bytes.fromhex("0203010001")
_RSA4096_BYTES = 550
_SALT_BYTES = 48

_AMD_NAME = (
    ("2.5.4.11", "Engineering"),
    ("2.5.4.6", "US"),
    ("2.5.4.7", "Santa Clara"),
    ("2.5.4.8", "CA"),
    ("2.5.4.10", "Advanced Micro Devices"),
)
_ISSUER_NAMES = {SigningKey.VCEK: "SEV-", SigningKey.VLEK: "SEV-VLEK-"}
_ISSUER_ROLES = {SigningKey.VCEK: "ASK", SigningKey.VLEK: "ASVK"}


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
        _require_name(leaf.subject, key.name, LEAF_NAMES[key])
        _require_name(leaf.issuer, f"{key.name} issuer", _ISSUER_NAMES[key] + product.value)
        _require_key(leaf, key.name, is_p384_key, "P-384")
        _require_extensions(leaf, key.name, None, frozenset())
        ark = f"ARK-{product.value}"
        if self.issuer is not None:
            role = _ISSUER_ROLES[key]
            _require_name(self.issuer.issuer, f"{role} issuer", ark)
            _require_key(self.issuer, role, _is_rsa4096_key, "RSA-4096")
            _require_extensions(
                self.issuer, role, BasicConstraints(True, 0), frozenset({KEY_CERT_SIGN})
            )
        if self.root is not None:
            _require_name(self.root.subject, "ARK", ark)
            _require_name(self.root.issuer, "ARK issuer", ark)
            _require_key(self.root, "ARK", _is_rsa4096_key, "RSA-4096")
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


def issued(certificate: Certificate, by: Certificate) -> bool:
    """Whether one certificate signed another: RSASSA-PSS, SHA-384, 48 bytes of salt."""
    return certificate.signature_algorithm in _PSS_ALGORITHMS and _verifies(
        certificate.tbs, certificate.signature, by.public_key
    )


# Says only whether a signature verifies, which never changes; dates are checked each time.
@functools.lru_cache(maxsize=512)
def _verifies(signed: bytes, signature: bytes, spki: bytes) -> bool:
    if not _is_rsa4096_key(spki):
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


def _is_rsa4096_key(spki: bytes) -> bool:
    return (
        len(spki) == _RSA4096_BYTES
        and spki.startswith(_RSA4096_HEAD)
        and spki.endswith(_RSA4096_TAIL)
    )


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


def _require_name(name: Name, role: str, common_name: str) -> None:
    expected = sorted((*_AMD_NAME, (COMMON_NAME, common_name)))
    if sorted(name.parts) != expected:
        raise SnpCertificateProfile(
            f"{role} name", f"Advanced Micro Devices, {common_name}", repr(name.common_name[:64])
        )


def _require_key(
    certificate: Certificate, role: str, fits: Callable[[bytes], bool], kind: str
) -> None:
    if not fits(certificate.public_key):
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
