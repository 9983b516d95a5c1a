from __future__ import annotations

import warnings

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from evidence_samples import EVIDENCE, needs_evidence
from hypothesis import given, settings
from hypothesis import strategies as st
from snp_machine import (
    NOW,
    SnpMachine,
    amd_name,
    constraints,
    crl,
    der,
    extension,
    ia5,
    integer,
    oid,
    sequence,
    usage,
)

from security.attestation.certificates import (
    CRL_SIGN,
    KEY_CERT_SIGN,
    BasicConstraints,
    read_certificate,
    read_revocation_list,
)
from security.attestation.der import (
    DerReader,
    bits_of,
    boolean_of,
    integer_of,
    oid_of,
    text_of,
    time_of,
)
from security.attestation.errors import CertificateMalformed

MACHINE = SnpMachine()
ROOT, ISSUER, LEAF, CRL = MACHINE.root(), MACHINE.issuer(), MACHINE.endorsement(), crl()


def test_a_certificate_with_serial_number_0_is_read_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        certificate = read_certificate(LEAF)
    assert certificate.serial == 0
    assert certificate.subject.common_name == "SEV-VCEK"
    assert certificate.issuer.common_name == "SEV-Milan"


def test_it_reads_what_cryptography_reads() -> None:
    ours, theirs = read_certificate(ISSUER), x509.load_der_x509_certificate(ISSUER)
    assert ours.serial == theirs.serial_number
    assert ours.tbs == theirs.tbs_certificate_bytes
    assert ours.signature == theirs.signature
    assert ours.not_before == int(theirs.not_valid_before_utc.timestamp())
    assert ours.not_after == int(theirs.not_valid_after_utc.timestamp())
    assert ours.issuer.der == theirs.issuer.public_bytes()
    assert [item.oid for item in ours.extensions] == [
        item.oid.dotted_string for item in theirs.extensions
    ]
    assert ours.basic_constraints() == BasicConstraints(True, 0)
    assert ours.key_usage() == {KEY_CERT_SIGN}
    assert read_certificate(ROOT).key_usage() == {KEY_CERT_SIGN, CRL_SIGN}


def test_a_revocation_list_is_read() -> None:
    found = read_revocation_list(crl("Genoa", (0x20001, 0)))
    assert found.revoked == {0x20001, 0}
    assert found.issuer.common_name == "ARK-Genoa"
    assert (found.this_update, found.next_update) == (NOW - 1000, NOW + 1000)
    assert found.critical == ()


@needs_evidence
def test_real_certificates_are_read_as_openssl_reads_them() -> None:
    for path in sorted(EVIDENCE.glob("snp/roots/*.pem")):
        for theirs in x509.load_pem_x509_certificates(path.read_bytes()):
            ours = read_certificate(theirs.public_bytes(Encoding.DER))
            assert ours.serial == theirs.serial_number
            assert ours.not_after == int(theirs.not_valid_after_utc.timestamp())
            assert ours.tbs == theirs.tbs_certificate_bytes


@needs_evidence
def test_certificates_of_other_vendors_are_read_too() -> None:
    intel = read_certificate((EVIDENCE / "tdx/intel_sgx_root_ca.der").read_bytes())
    assert intel.subject.common_name == "Intel SGX Root CA"


@pytest.mark.parametrize("whole", [ROOT, LEAF, CRL], ids=["root", "leaf", "crl"])
def test_every_truncation_is_refused(whole: bytes) -> None:
    read = read_revocation_list if whole is CRL else read_certificate
    for size in range(0, len(whole), 7):
        with pytest.raises(CertificateMalformed):
            read(whole[:size])
    with pytest.raises(CertificateMalformed, match="nothing more"):
        read(whole + b"\0")


def test_what_is_too_long_is_refused() -> None:
    with pytest.raises(CertificateMalformed, match="at most 16384 bytes"):
        read_certificate(bytes(1 << 15))
    with pytest.raises(CertificateMalformed, match="at most 1048576 bytes"):
        read_revocation_list(bytes(2 << 20))


def test_a_certificate_that_says_two_algorithms_is_refused() -> None:
    other = LEAF.replace(bytes.fromhex("a203020130"), bytes.fromhex("a203020120"), 1)
    assert other != LEAF
    with pytest.raises(CertificateMalformed, match="the same algorithm inside and outside"):
        read_certificate(other)
    other = CRL.replace(bytes.fromhex("a203020130"), bytes.fromhex("a203020120"), 1)
    with pytest.raises(CertificateMalformed, match="the same algorithm inside and outside"):
        read_revocation_list(other)


def test_a_certificate_of_another_version_is_refused() -> None:
    with pytest.raises(CertificateMalformed, match="expected v3"):
        read_certificate(LEAF.replace(bytes.fromhex("a003020102"), bytes.fromhex("a003020101"), 1))
    with pytest.raises(CertificateMalformed, match="expected v2"):
        read_revocation_list(CRL.replace(b"\x02\x01\x01", b"\x02\x01\x00", 1))


def test_an_extension_that_is_there_twice_is_refused() -> None:
    twice = SnpMachine(leaf_extensions=(usage(0), usage(0))).endorsement()
    with pytest.raises(CertificateMalformed, match="each once"):
        read_certificate(twice)


def test_too_many_extensions_are_refused() -> None:
    many = tuple(extension(f"1.2.3.{i}", b"") for i in range(65))
    with pytest.raises(CertificateMalformed, match="at most 64"):
        read_certificate(SnpMachine(leaf_extensions=many).endorsement())


def test_a_critical_extension_of_a_list_or_its_entries_is_told() -> None:
    critical = extension("2.5.29.28", sequence(), True)
    assert read_revocation_list(crl(extensions=(critical,))).critical == ("2.5.29.28",)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("", "an element"),
        ("30", "an element"),
        ("3f8101", "a tag of one byte"),
        ("3080", "a length of 1 to 3 bytes"),
        ("308400000001", "a length of 1 to 3 bytes"),
        ("308101ff", "a minimal length"),
        ("30820001ff", "a minimal length"),
        ("30820081" + "00" * 129, "a minimal length"),
        ("300500", "5 bytes"),
        ("3082", "a length of 1 to 3 bytes"),
    ],
)
def test_der_that_is_not_strict_is_refused(data: str, expected: str) -> None:
    with pytest.raises(CertificateMalformed, match=expected):
        DerReader(bytes.fromhex(data), "test").element("value")


def test_another_tag_and_what_is_left_over_are_refused() -> None:
    with pytest.raises(CertificateMalformed, match="tag 0x02"):
        DerReader(sequence(), "test").take(0x02, "value")
    with pytest.raises(CertificateMalformed, match="tag 0x02"):
        DerReader(sequence(), "test").whole(0x02, "value")
    with pytest.raises(CertificateMalformed, match="nothing more"):
        DerReader(sequence(), "test").finish()


@pytest.mark.parametrize("content", ["", "0001", "ff80", "00" * 2000])
def test_an_integer_that_is_not_minimal_is_refused(content: str) -> None:
    with pytest.raises(CertificateMalformed, match="INTEGER"):
        integer_of(bytes.fromhex(content), "test")


@pytest.mark.parametrize("content", ["", "01", "0000", "fe"])
def test_a_boolean_that_is_not_strict_is_refused(content: str) -> None:
    with pytest.raises(CertificateMalformed, match="BOOLEAN"):
        boolean_of(bytes.fromhex(content), "test")


@pytest.mark.parametrize("content", ["", "08ff", "01", "01ff", "07c0"])
def test_a_bit_string_that_is_not_strict_is_refused(content: str) -> None:
    with pytest.raises(CertificateMalformed, match=r"BIT STRING|unused bits"):
        bits_of(bytes.fromhex(content), "test")


@pytest.mark.parametrize("content", ["", "2a80", "2a8001", "2a" * 65])
def test_an_object_identifier_that_is_not_strict_is_refused(content: str) -> None:
    with pytest.raises(CertificateMalformed, match=r"OBJECT IDENTIFIER|minimal arcs"):
        oid_of(bytes.fromhex(content), "test")


@given(st.integers(0, 2), st.integers(0, 39), st.lists(st.integers(0, 2**40), max_size=6))
@settings(max_examples=100, deadline=None)
def test_object_identifiers_are_read_as_written(first: int, second: int, rest: list[int]) -> None:
    dotted = ".".join(str(arc) for arc in (first, second, *rest))
    assert oid_of(oid(dotted)[2:], "test") == dotted


@pytest.mark.parametrize(
    ("tag", "content", "expected"),
    [(0x0C, b"\xff", "utf-8"), (0x16, b"\x80", "ascii"), (0x04, b"a", "a character string")],
)
def test_text_of_another_kind_is_refused(tag: int, content: bytes, expected: str) -> None:
    with pytest.raises(CertificateMalformed, match=expected):
        text_of(tag, content, "test")


@pytest.mark.parametrize(
    ("tag", "content"),
    [
        (0x17, b"2501010000Z"),
        (0x17, b"250101000000+"),
        (0x17, b"251301000000Z"),
        (0x17, b"250230000000Z"),
        (0x18, b"20250101000000.5Z"),
        (0x18, b"20250101006000Z"),
        (0x18, b"00000101000000Z"),
        (0x17, b"25010100000\xb2Z"),
        (0x16, b"250101000000Z"),
    ],
)
def test_a_time_that_is_not_strict_is_refused(tag: int, content: bytes) -> None:
    with pytest.raises(CertificateMalformed, match=r"SSZ|a date"):
        time_of(tag, content, "test")


def test_times_of_both_kinds_are_read() -> None:
    assert time_of(0x17, b"700101000000Z", "test") == 0
    assert time_of(0x17, b"491231235959Z", "test") == time_of(0x18, b"20491231235959Z", "test")


@pytest.mark.parametrize(
    "value",
    [
        extension("2.5.29.19", ia5("no"), True),
        extension("2.5.29.19", sequence(der(0x01, b"\x01")), True),
        extension("2.5.29.15", integer(5), True),
        extension("2.5.29.15", der(0x03, b"\x00\x00\x00\x00"), True),
    ],
)
def test_extensions_that_cannot_be_read_are_refused(value: bytes) -> None:
    certificate = read_certificate(SnpMachine(leaf_extensions=(value,)).endorsement())
    with pytest.raises(CertificateMalformed):
        certificate.basic_constraints()
        certificate.key_usage()


def test_a_name_with_several_common_names_has_none() -> None:
    certificate = read_certificate(LEAF)
    assert certificate.subject.der == amd_name("SEV-VCEK")
    assert len(certificate.subject.parts) == 6
    assert constraints() != constraints(0)


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_a_changed_byte_raises_only_named_errors(data: st.DataObject) -> None:
    whole = data.draw(st.sampled_from([ROOT, ISSUER, LEAF, CRL]))
    octets = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        octets[data.draw(st.integers(0, len(octets) - 1))] = data.draw(st.integers(0, 255))
    try:
        if whole is CRL:
            read_revocation_list(bytes(octets))
        else:
            certificate = read_certificate(bytes(octets))
            certificate.key_usage()
            certificate.basic_constraints()
    except CertificateMalformed:
        pass
