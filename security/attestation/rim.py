"""NVIDIA's reference integrity manifests (RIM): SWID tags (ISO/IEC 19770-2), signed XML.

What may be taken from a RIM is what its one signature covers. So the signature must have exactly
the shape that NVIDIA's have: a child of the root, one reference to the whole document (URI ""),
the enveloped transform and C14N 1.1, ECDSA P-384 with SHA-384, and the signer's chain and nothing
else as key. The measurements are then read from the octets that `signxml` has digested, never from
the file. Parsing and the signature do not depend on the time and are done once for each document;
dates, roots and revocation are looked at every time.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from types import MappingProxyType

from cryptography.exceptions import InvalidSignature
from lxml import etree
from signxml.algorithms import DigestAlgorithm, SignatureMethod
from signxml.exceptions import SignXMLException
from signxml.verifier import SignatureConfiguration, XMLVerifier

from security.attestation.errors import (
    RimMalformed,
    RimSignatureInvalid,
    RimSignatureRefused,
)
from security.attestation.nvidia_certificates import (
    Certificate,
    check_authority,
    check_dates,
    check_issuers,
    check_length,
    check_revocation,
    check_root,
    load_certificate,
    unlisted,
)
from security.errors import EvidenceMalformed

__all__ = ["MAX_RIM_BYTES", "Heading", "ReferenceManifest", "read_heading", "verify_rim"]

MAX_RIM_BYTES = 256 * 1024
"""NVIDIA's have 18 to 26 KiB."""

_MAX_ELEMENTS = 1024
_MAX_INDEX = 254
_MAX_ALTERNATIVES = 16
_DIGEST_BYTES = 48
_CHAIN = (2, 6)

_SWID = "{http://standards.iso.org/iso/19770/-2/2015/schema.xsd}"
_SHA384_ATTRIBUTE = "{http://www.w3.org/2001/04/xmlenc#sha384}"
_DSIG = "{http://www.w3.org/2000/09/xmldsig#}"
_C14N11 = "http://www.w3.org/2006/12/xml-c14n11"
_ENVELOPED = "http://www.w3.org/2000/09/xmldsig#enveloped-signature"
_ECDSA_SHA384 = "http://www.w3.org/2001/04/xmldsig-more#ecdsa-sha384"
_SHA384 = "http://www.w3.org/2001/04/xmldsig-more#sha384"

_BASE64 = re.compile(r"[A-Za-z0-9+/\s]+={0,2}\s*")
_NUMBER = re.compile(r"0|[1-9][0-9]{0,2}")
_TEXT = re.compile(r"[0-9A-Za-z._-]{1,64}")


@dataclass(frozen=True, slots=True)
class Heading:
    """Which device a RIM is for.

    Attributes:
        product: chip, such as "GH100" or "LS10".
        version: colloquialVersion: of the driver or of the VBIOS, as the report spells it.
    """

    product: str
    version: str


@dataclass(frozen=True, slots=True)
class ReferenceManifest:
    """What a verified RIM says.

    Attributes:
        heading: product and version.
        measurements: by index, the alternative digests of each active measurement. Index i is
            measurement block i + 1 of a report.
        signer: the signer's chain, leaf first.
    """

    heading: Heading
    measurements: Mapping[int, tuple[bytes, ...]]
    signer: tuple[Certificate, ...]


@lru_cache(maxsize=256)
def read_heading(xml: bytes) -> Heading:
    """Product and version, proved by nothing yet: says only where a RIM might belong.

    Raises:
        RimMalformed: not XML that is safe to parse, or not a RIM.
    """
    return _read_heading(_parse(xml))


def verify_rim(
    xml: bytes,
    roots: Sequence[str],
    lists: Sequence[bytes],
    now: int,
    what: str,
    *,
    demand_lists: bool = True,
) -> ReferenceManifest:
    """Verifies a RIM and its signer.

    Args:
        xml: the document.
        roots: SHA-256 (hex) of the accepted roots.
        lists: revocation lists in DER.
        now: Unix time in seconds.
        what: name of the RIM, for messages.
        demand_lists: whether there must be a current list of each certificate that names one.

    Raises:
        RimMalformed, RimSignatureRefused, RimSignatureInvalid: the document.
        ChainWrongLength, ChainBroken, ChainNotAuthorised, CertificateNotCurrent, RootNotPinned,
        CertificateRevoked, RevocationUnknown, CertificateUnsupported, EvidenceMalformed: the
        signer's chain.
    """
    found = _verify(xml)
    check_length(found.signer, *_CHAIN, f"signer of {what}")
    check_root(found.signer, roots, f"signer of {what}")
    check_issuers(found.signer, f"signer of {what}")
    check_authority(found.signer, f"signer of {what}")
    check_dates(found.signer, now, f"signer of {what}")
    check_revocation(found.signer, lists, f"signer of {what}")
    failure = unlisted(found.signer, lists, now, f"signer of {what}") if demand_lists else None
    if failure is not None:
        raise failure
    return found


def _parser() -> etree.XMLParser:
    return etree.XMLParser(
        resolve_entities=False,
        no_network=True,
        load_dtd=False,
        dtd_validation=False,
        attribute_defaults=False,
        huge_tree=False,
        recover=False,
    )


def _parse(xml: bytes) -> etree._Element:
    if not 0 < len(xml) <= MAX_RIM_BYTES:
        raise RimMalformed(f"RIM: expected 1 to {MAX_RIM_BYTES} bytes, found {len(xml)}")
    # Declarations are what can expand or fetch. UTF-16 and others would hide them from this test,
    # so only UTF-8 is read; the parser is told to do none of it in any case.
    if b"<!DOCTYPE" in xml or b"<!ENTITY" in xml or b"\0" in xml:
        raise RimMalformed("RIM: expected XML without declarations, found one")
    try:
        xml.decode("utf-8")
        root = etree.fromstring(xml, _parser())
    except (etree.LxmlError, ValueError):
        raise RimMalformed(f"RIM: expected XML in UTF-8, found {len(xml)} other bytes") from None
    information = root.getroottree().docinfo
    if information.internalDTD is not None or information.encoding not in (None, "UTF-8", "utf-8"):
        raise RimMalformed("RIM: expected UTF-8 without declarations, found others")
    for count, element in enumerate(root.iter()):
        if count == _MAX_ELEMENTS or not isinstance(element.tag, str):
            raise RimMalformed(
                f"RIM: expected at most {_MAX_ELEMENTS} elements and no comments, entities or "
                "processing instructions"
            )
    return root


def _children(parent: etree._Element, name: str) -> list[etree._Element]:
    return [child for child in parent if child.tag == name]


def _read_heading(root: etree._Element) -> Heading:
    metas = _children(root, f"{_SWID}Meta")
    if root.tag != f"{_SWID}SoftwareIdentity" or len(metas) != 1:
        raise RimMalformed("RIM: expected a SoftwareIdentity with one Meta, found another document")
    product = metas[0].get("product") or ""
    version = metas[0].get("colloquialVersion") or ""
    for name, value in (("product", product), ("colloquialVersion", version)):
        if _TEXT.fullmatch(value) is None:
            raise RimMalformed(f"RIM: expected a {name} of letters, digits, '.', '_' and '-'")
    return Heading(product, version.upper())


@lru_cache(maxsize=256)
def _verify(xml: bytes) -> ReferenceManifest:
    root = _parse(xml)
    heading = _read_heading(root)
    what = f"RIM {heading.product} {heading.version}"
    chain = _signer(_only_signature(root, what), what)
    check_length(chain, *_CHAIN, what)
    try:
        result = XMLVerifier().verify(
            xml,
            x509_cert=chain[0].parsed,
            parser=_parser(),
            expect_config=SignatureConfiguration(
                require_x509=True,
                location="./",
                expect_references=1,
                signature_methods=frozenset({SignatureMethod.ECDSA_SHA384}),
                digest_algorithms=frozenset({DigestAlgorithm.SHA384}),
                # The caller looks at the dates; the clock is never asked.
                verification_time=datetime.fromtimestamp(chain[0].not_before, UTC),
            ),
        )
    except (SignXMLException, InvalidSignature, etree.LxmlError, ValueError) as error:
        raise RimSignatureInvalid(
            what, "digest and signature of its signer", f"other bytes ({type(error).__name__})"
        ) from None
    assert not isinstance(result, list)  # one reference, see above
    signed = _parse(result.signed_data)
    return ReferenceManifest(_read_heading(signed), _read_payload(signed, what), chain)


def _only_signature(root: etree._Element, what: str) -> etree._Element:
    """The document's one signature, of exactly the known shape.

    Raises:
        RimSignatureRefused
    """
    found = [element for element in root.iter() if element.tag == f"{_DSIG}Signature"]
    if len(found) != 1 or found[0].getparent() is not root:
        raise RimSignatureRefused(what, "one signature, a child of the root", f"{len(found)}")
    signature = found[0]
    info, value, key_info = _exactly(signature, what, "SignedInfo", "SignatureValue", "KeyInfo")
    canonical, method, reference = _exactly(
        info, what, "CanonicalizationMethod", "SignatureMethod", "Reference"
    )
    transforms, digest_method, digest = _exactly(
        reference, what, "Transforms", "DigestMethod", "DigestValue"
    )
    enveloped, c14n = _exactly(transforms, what, "Transform", "Transform")
    (x509_data,) = _exactly(key_info, what, "X509Data")
    if reference.attrib != {"URI": ""}:
        raise RimSignatureRefused(what, 'a reference to the whole document (URI "")', "another")
    for element, algorithm in (
        (canonical, _C14N11),
        (method, _ECDSA_SHA384),
        (enveloped, _ENVELOPED),
        (c14n, _C14N11),
        (digest_method, _SHA384),
    ):
        if element.attrib != {"Algorithm": algorithm} or len(element):
            found_algorithm = str(element.get("Algorithm"))[:64]
            raise RimSignatureRefused(what, f"{algorithm} alone", found_algorithm)
    for element, size in ((value, 2 * _DIGEST_BYTES), (digest, _DIGEST_BYTES)):
        if element.attrib or len(element) or len(_octets(element, what)) != size:
            raise RimSignatureRefused(what, f"{size} bytes of base64", "something else")
    if any(item.tag != f"{_DSIG}X509Certificate" or len(item) for item in x509_data):
        raise RimSignatureRefused(what, "certificates alone in X509Data", "something else")
    return signature


def _exactly(parent: etree._Element, what: str, *names: str) -> list[etree._Element]:
    children = list(parent)
    if [child.tag for child in children] != [f"{_DSIG}{name}" for name in names]:
        parent_name = etree.QName(parent).localname
        found = ", ".join(etree.QName(child).localname for child in children[:8])
        raise RimSignatureRefused(
            what, f"{parent_name} of {', '.join(names)}", found[:128] or "nothing"
        )
    return children


def _octets(element: etree._Element, what: str) -> bytes:
    text = element.text or ""
    if _BASE64.fullmatch(text) is None:
        raise RimSignatureRefused(what, "base64", "other text")
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except binascii.Error:
        raise RimSignatureRefused(what, "base64", "other text") from None


def _signer(signature: etree._Element, what: str) -> tuple[Certificate, ...]:
    certificates = list(signature.iter(f"{_DSIG}X509Certificate"))
    if not certificates:
        raise RimSignatureRefused(what, "the signer's certificates", "none")
    if len(certificates) > _CHAIN[1]:
        raise RimSignatureRefused(what, f"at most {_CHAIN[1]} certificates", str(len(certificates)))
    try:
        return tuple(load_certificate(_octets(item, what)) for item in certificates)
    except EvidenceMalformed as error:
        raise RimSignatureRefused(what, "the signer's certificates", str(error)) from None


def _read_payload(root: etree._Element, what: str) -> Mapping[int, tuple[bytes, ...]]:
    payloads = _children(root, f"{_SWID}Payload")
    if len(payloads) != 1:
        raise RimMalformed(f"{what}: expected one Payload, found {len(payloads)}")
    seen: set[int] = set()
    active: dict[int, tuple[bytes, ...]] = {}
    for resource in payloads[0]:
        if resource.tag != f"{_SWID}Resource" or resource.get("type") != "Measurement":
            raise RimMalformed(f"{what}: expected measurements in its Payload, found others")
        index = _number(resource, "index", _MAX_INDEX, what)
        if index in seen:
            raise RimMalformed(f"{what}: expected measurement {index} once, found it again")
        seen.add(index)
        state = resource.get("active")
        if state not in ("True", "False"):
            raise RimMalformed(f"{what}: expected measurement {index} active or not")
        if state == "True":
            active[index] = _alternatives(resource, index, what)
    if not active:
        raise RimMalformed(f"{what}: expected an active measurement, found none")
    return MappingProxyType(active)


def _number(resource: etree._Element, name: str, most: int, what: str) -> int:
    text = resource.get(name) or ""
    if _NUMBER.fullmatch(text) is None or int(text) > most:
        raise RimMalformed(f"{what}: expected {name} from 0 to {most}, found {text[:16]!r}")
    return int(text)


def _alternatives(resource: etree._Element, index: int, what: str) -> tuple[bytes, ...]:
    count = _number(resource, "alternatives", _MAX_ALTERNATIVES, what)
    size = _number(resource, "size", _DIGEST_BYTES, what)
    names = [name for name in resource.keys() if str(name).startswith(_SHA384_ATTRIBUTE)]  # noqa: SIM118
    if size != _DIGEST_BYTES or not count or len(names) != count:
        raise RimMalformed(
            f"{what}: expected measurement {index} to have {count} digests of 48 bytes, found "
            f"{len(names)} of {size}"
        )
    digests: list[bytes] = []
    for number in range(count):
        text = resource.get(f"{_SHA384_ATTRIBUTE}Hash{number}") or ""
        if re.fullmatch("[0-9a-fA-F]{96}", text) is None:
            raise RimMalformed(f"{what}: expected Hash{number} of measurement {index} in hex")
        digests.append(bytes.fromhex(text))
    return tuple(digests)
