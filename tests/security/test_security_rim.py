"""Reference manifests: only what the one signature covers is read, and only from its signer."""

from __future__ import annotations

import base64
import copy
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.hashes import SHA256
from hypothesis import given, settings
from hypothesis import strategies as st
from lxml import etree
from nvidia_machine import (
    DRIVER,
    NOW,
    YEAR,
    Manifest,
    authorities,
    digest,
    issue,
    public_point,
    revocation_list,
    sign_document,
)
from signxml import XMLVerifier
from signxml.algorithms import CanonicalizationMethod, DigestAlgorithm, SignatureMethod

from security.attestation.rim import MAX_RIM_BYTES, Heading, read_heading, verify_rim
from security.errors import AppraisalError

DSIG = "{http://www.w3.org/2000/09/xmldsig#}"
MANIFEST = Manifest(DRIVER, {7: [digest("seven")], 9: [digest("nine"), digest("IX")]})
CHAIN = (authorities().rim_signer, authorities().rim_authority, authorities().rim_root)


@pytest.fixture(scope="module")
def signed() -> bytes:
    return MANIFEST.signed()


def code(xml: bytes, now: int = NOW, lists: tuple[bytes, ...] = ()) -> str:
    """Code of the refusal, "" where there is none."""
    try:
        verify_rim(xml, authorities().rim_roots, lists, now, "RIM x")
    except AppraisalError as error:
        return error.code
    return ""


def test_a_manifest_is_verified(signed: bytes) -> None:
    assert read_heading(signed) == Heading("GH100", DRIVER)
    found = verify_rim(signed, authorities().rim_roots, (), NOW, "RIM x")
    assert found.heading == Heading("GH100", DRIVER)
    assert dict(found.measurements) == {
        7: (digest("seven"),),
        9: (digest("nine"), digest("IX")),
    }
    assert [item.der for item in found.signer] == [item.der for item in CHAIN]


def edited(xml: bytes, edit: Callable[[etree._Element], None]) -> bytes:
    root = etree.fromstring(xml)
    edit(root)
    return etree.tostring(root)


def replaced(xml: bytes, old: str, new: str) -> bytes:
    assert old.encode() in xml
    return xml.replace(old.encode(), new.encode(), 1)


def test_what_was_digested_is_read_and_not_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were the file parsed again, what the signature leaves out could be read as signed."""
    signed = MANIFEST.signed()
    real = XMLVerifier.verify

    def another(*arguments: object, **options: object) -> object:
        result = real(*arguments, **options)  # type: ignore[arg-type]
        assert not isinstance(result, list)
        digested = result.signed_data.replace(DRIVER.encode(), b"9.99.99")
        return replace(result, signed_data=digested)

    monkeypatch.setattr(XMLVerifier, "verify", another)
    found = verify_rim(signed, authorities().rim_roots, (), NOW, "RIM x")
    assert found.heading == Heading("GH100", "9.99.99")


# -- what is signed ---------------------------------------------------------------------------


def test_any_change_of_the_content(signed: bytes) -> None:
    seven = digest("seven").hex()
    assert code(replaced(signed, seven, digest("eight").hex())) == "rim_signature_invalid"
    assert code(replaced(signed, 'active="True"', 'active="False"')) == "rim_signature_invalid"
    assert code(replaced(signed, DRIVER, "570.00.02")) == "rim_signature_invalid"
    start = signed.index(b"SignatureValue>") + 15
    flipped = b"B" if signed[start : start + 1] == b"A" else b"A"
    assert code(signed[:start] + flipped + signed[start + 1 :]) == "rim_signature_invalid"


def wrapped_whole(root: etree._Element) -> None:
    """The signed document inside, another payload outside."""
    inner = copy.deepcopy(root)
    for child in list(root):
        if child.tag.endswith("Payload"):
            child[0].set("index", "8")
        if child.tag == f"{DSIG}Signature":
            root.remove(child)
    root.append(inner)


def wrapped_object(root: etree._Element) -> None:
    """The signed content in an Object of the signature, another outside."""
    signature = root.find(f"{DSIG}Signature")
    inner = copy.deepcopy(root)
    inner.remove(inner.find(f"{DSIG}Signature"))
    inner.set("Id", "original")
    etree.SubElement(signature, f"{DSIG}Object").append(inner)
    signature.find(f".//{DSIG}Reference").set("URI", "#original")
    for child in root:
        if child.tag.endswith("Payload"):
            child[0].set("index", "8")


def wrapped_sibling(root: etree._Element) -> None:
    """The signed content as a sibling that the reference points to by its Id."""
    inner = copy.deepcopy(root)
    inner.remove(inner.find(f"{DSIG}Signature"))
    inner.set("ID", "original")
    root.find(f".//{DSIG}Reference").set("URI", "#original")
    root.append(inner)


def moved_into_payload(root: etree._Element) -> None:
    payload = next(child for child in root if child.tag.endswith("Payload"))
    payload.append(root.find(f"{DSIG}Signature"))


def doubled(root: etree._Element) -> None:
    root.append(copy.deepcopy(root.find(f"{DSIG}Signature")))


def unsigned(root: etree._Element) -> None:
    root.remove(root.find(f"{DSIG}Signature"))


def hidden_in_key_info(root: etree._Element) -> None:
    root.find(f".//{DSIG}X509Data").append(copy.deepcopy(root[0]))


def two_references(root: etree._Element) -> None:
    info = root.find(f".//{DSIG}SignedInfo")
    info.append(copy.deepcopy(info.find(f"{DSIG}Reference")))


def another_transform(root: etree._Element) -> None:
    transforms = root.find(f".//{DSIG}Transforms")
    etree.SubElement(
        transforms, f"{DSIG}Transform", Algorithm="http://www.w3.org/TR/1999/REC-xpath-19991116"
    )


def xpath_in_transform(root: etree._Element) -> None:
    etree.SubElement(root.find(f".//{DSIG}Transform"), f"{DSIG}XPath").text = "false()"


def with_key_value(root: etree._Element) -> None:
    key_info = root.find(f".//{DSIG}KeyInfo")
    x, y = public_point(CHAIN[0].key)
    value = etree.SubElement(key_info, f"{DSIG}KeyValue")
    name = "{http://www.w3.org/2009/xmldsig11#}"
    key = etree.SubElement(value, f"{name}ECKeyValue")
    etree.SubElement(key, f"{name}NamedCurve", URI="urn:oid:1.3.132.0.34")
    etree.SubElement(key, f"{name}PublicKey").text = base64.b64encode(b"\4" + x + y).decode()


def only_key_value(root: etree._Element) -> None:
    with_key_value(root)
    key_info = root.find(f".//{DSIG}KeyInfo")
    key_info.remove(key_info.find(f"{DSIG}X509Data"))


def no_key(root: etree._Element) -> None:
    key_info = root.find(f".//{DSIG}KeyInfo")
    key_info.getparent().remove(key_info)


def no_certificates(root: etree._Element) -> None:
    data = root.find(f".//{DSIG}X509Data")
    for item in list(data):
        data.remove(item)


@pytest.mark.parametrize(
    "edit",
    [
        wrapped_whole,
        wrapped_object,
        wrapped_sibling,
        moved_into_payload,
        doubled,
        unsigned,
        hidden_in_key_info,
        two_references,
        another_transform,
        xpath_in_transform,
        with_key_value,
        only_key_value,
        no_key,
        no_certificates,
    ],
)
def test_signatures_of_another_shape(signed: bytes, edit: Callable[[etree._Element], None]) -> None:
    assert code(edited(signed, edit)) == "rim_signature_refused"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('URI=""', 'URI="#x"'),
        ('URI=""', 'URI="http://example.com/rim.xml"'),
        ('URI=""', 'URI="file:///etc/passwd"'),
        ('URI=""', ""),
        ('URI=""', 'URI="" Type="x"'),
        ("2006/12/xml-c14n11", "2001/10/xml-exc-c14n#"),
        ("xmldsig-more#ecdsa-sha384", "xmldsig-more#ecdsa-sha512"),
        ("xmldsig-more#ecdsa-sha384", "xmldsig-more#hmac-sha384"),
        ("xmldsig-more#sha384", "xmldsig-more#sha224"),
        ("#enveloped-signature", "#base64"),
        ("<ds:DigestValue>", "<ds:DigestValue>!"),
        ("<ds:SignatureValue>", "<ds:SignatureValue>AAAA"),
        ("<ds:X509Certificate>", "<ds:X509Certificate>AAAA"),
        ("<ds:X509Certificate>", '<ds:X509Certificate x="">!'),
    ],
)
def test_other_references_and_algorithms(signed: bytes, old: str, new: str) -> None:
    assert code(replaced(signed, old, new)) == "rim_signature_refused"


@pytest.mark.parametrize(
    "options",
    [
        {"signature_algorithm": SignatureMethod.ECDSA_SHA256},
        {"signature_algorithm": SignatureMethod.ECDSA_SHA512},
        {"digest_algorithm": DigestAlgorithm.SHA256},
        {"digest_algorithm": DigestAlgorithm.SHA3_384},
        {"c14n_algorithm": CanonicalizationMethod.EXCLUSIVE_XML_CANONICALIZATION_1_0},
        {"c14n_algorithm": CanonicalizationMethod.CANONICAL_XML_1_1_WITH_COMMENTS},
    ],
)
def test_well_signed_with_other_algorithms(options: dict[str, object]) -> None:
    assert code(sign_document(MANIFEST.document(), CHAIN, **options)) == "rim_signature_refused"


# -- the document -----------------------------------------------------------------------------


BOMB = (
    b'<!DOCTYPE a [<!ENTITY a "aaaaaaaaaa">'
    + b"".join(b'<!ENTITY %c "&%c;&%c;&%c;">' % (98 + i, 97 + i, 97 + i, 97 + i) for i in range(9))
    + b"]><a>&j;</a>"
)


@pytest.mark.parametrize(
    "xml",
    [
        b"",
        b"no XML",
        b"<a>",
        b"<a/>",
        b"<a/><b/>",
        BOMB,
        b'<!DOCTYPE a SYSTEM "http://example.com/a.dtd"><a/>',
        b'<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><a>&x;</a>',
        b'<?xml version="1.0" encoding="UTF-7"?><a/>',
        b'<?xml version="1.0" encoding="ISO-8859-1"?><a/>',
        '<?xml version="1.0" encoding="UTF-16"?><a/>'.encode("utf-16"),
        b"<a>\xff</a>",
        b"<a>" * 1000,
        b"<a>" + b"<b/>" * 2000 + b"</a>",
        b"<a><!-- comment --></a>",
        b"<a><?target text?></a>",
        b"<a>" + b" " * MAX_RIM_BYTES + b"</a>",
    ],
)
def test_what_is_no_manifest(xml: bytes) -> None:
    assert code(xml) == "rim_malformed"
    with pytest.raises(AppraisalError) as refusal:
        read_heading(xml)
    assert refusal.value.code == "rim_malformed"


def test_comments_and_instructions_are_not_signed_and_so_refused(signed: bytes) -> None:
    for text in ("<!-- -->", "<?x y?>"):
        assert code(replaced(signed, "<ns0:Payload>", f"<ns0:Payload>{text}")) == "rim_malformed"


ROW = (
    '<ns0:Resource type="Measurement" index="30" active="False" alternatives="1" '
    f'ns2:Hash0="{"00" * 48}" name="Measurement_30" size="48"/>'
)
SEVEN = digest("seven").hex()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('index="7"', 'index="9"'),
        ('index="7"', 'index="255"'),
        ('index="7"', 'index="-1"'),
        ('index="7"', 'index="07"'),
        ('index="7"', ""),
        ('active="True"', 'active="true"'),
        ('active="True"', ""),
        ('alternatives="1"', 'alternatives="2"'),
        ('alternatives="1"', 'alternatives="0"'),
        ('alternatives="2"', 'alternatives="1"'),
        ('alternatives="2"', 'alternatives="17"'),
        ("Hash1", "Hash2"),
        (SEVEN, SEVEN[:-2]),
        (SEVEN, SEVEN[:-1] + "g"),
        ('size="48"', 'size="32"'),
        ('type="Measurement"', 'type="File"'),
        ("ns0:Resource", "ns0:File"),
        ("<ns0:Payload>", "<ns0:Payload/><ns0:Payload>"),
        ('product="GH100"', 'product=""'),
        ('product="GH100"', 'product="GH 100"'),
        ('colloquialVersion="570.00.01"', ""),
        ("<ns0:Meta ", '<ns0:Meta product="GB100" colloquialVersion="1"/><ns0:Meta '),
        ('xmlns="http://standards.iso.org', 'xmlns="http://example.org'),
    ],
)
def test_well_signed_and_malformed(old: str, new: str) -> None:
    document = MANIFEST.document()
    assert old in document
    assert code(sign_document(document.replace(old, new, 1), CHAIN)) == "rim_malformed"


def test_nothing_active() -> None:
    document = Manifest(DRIVER, {}).document()
    assert ROW in document
    assert code(sign_document(document, CHAIN)) == "rim_malformed"


# -- the signer -------------------------------------------------------------------------------


def test_the_chain_of_the_signer() -> None:
    made = authorities()
    document = MANIFEST.document()
    stranger = issue("RIM Root", None)
    below = issue("Reference Value L3", stranger)
    signer = issue("RIM L4 Signer", below, authority=False)
    assert code(sign_document(document, (signer, below, stranger))) == "nvidia_root_not_pinned"
    assert code(sign_document(document, (signer, below, made.rim_root))) == "nvidia_chain_broken"
    assert code(sign_document(document, CHAIN[:2])) == "nvidia_root_not_pinned"
    assert code(sign_document(document, CHAIN[:1])) == "nvidia_chain_length"
    assert code(sign_document(document, (CHAIN[0], CHAIN[2], CHAIN[1]))) == "nvidia_root_not_pinned"
    longer = (*CHAIN, *CHAIN[2:] * 4)
    assert code(sign_document(document, longer)) == "rim_signature_refused"
    authority = issue("RIM L4 Signer", made.rim_authority)
    assert code(sign_document(document, (authority, *CHAIN[1:]))) == "nvidia_chain_not_authorised"
    deep = issue("Reference Value L4", made.rim_authority)
    leaf = issue("RIM L5 Signer", deep, authority=False)
    assert code(sign_document(document, (leaf, deep, *CHAIN[1:]))) == "nvidia_chain_not_authorised"
    other = issue("RIM L4 Signer", made.rim_authority, authority=False, hash_algorithm=SHA256())
    assert code(sign_document(document, (other, *CHAIN[1:]))) == "rim_signature_refused"


def test_dates_and_revocation_of_the_signer(signed: bytes) -> None:
    assert code(signed, NOW - 2 * YEAR) == "nvidia_certificate_not_current"
    assert code(signed, NOW + 2 * YEAR) == "nvidia_certificate_not_current"
    assert code(signed) == ""
    authority = authorities().rim_authority
    serial = CHAIN[0].certificate.serial_number
    assert code(signed, lists=(revocation_list(authority),)) == ""
    assert code(signed, lists=(revocation_list(authority, [serial]),)) == (
        "nvidia_certificate_revoked"
    )


_SIGNED = MANIFEST.signed()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(_SIGNED) - 1), st.integers(0, 255)), max_size=3))
def test_any_changed_manifest_is_refused_by_name_or_says_the_same(
    changes: list[tuple[int, int]],
) -> None:
    data = bytearray(_SIGNED)
    for offset, value in changes:
        data[offset] = value
    with suppress(AppraisalError):
        found = verify_rim(bytes(data), authorities().rim_roots, (), NOW, "RIM x")
        assert found.measurements == {7: (digest("seven"),), 9: (digest("nine"), digest("IX"))}


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_refused_by_name(data: bytes) -> None:
    assert code(data) in ("rim_malformed", "rim_signature_refused")
