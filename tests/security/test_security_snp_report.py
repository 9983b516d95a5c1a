from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from snp_machine import SnpMachine

from security.attestation.errors import (
    SnpProductUnknown,
    SnpReportMalformed,
    SnpReservedNotZero,
    SnpSigningKeyUnknown,
    SnpVersionUnknown,
)
from security.attestation.snp_report import (
    REPORT_BYTES,
    FirmwareVersion,
    Product,
    SigningKey,
    TcbVersion,
    parse_report,
    product_of_cpuid,
)
from security.errors import EvidenceMalformed

MACHINE = SnpMachine()


@pytest.mark.parametrize("version", [2, 3, 4, 5])
def test_every_version_is_read_field_by_field(version: int) -> None:
    machine = replace(MACHINE, version=version, guest_svn=7, vmpl=2, mit_vectors=(5, 6))
    report = parse_report(machine.report())
    assert report.version == version
    assert report.guest_svn == 7
    assert report.vmpl == 2
    assert report.family_id == machine.family_id
    assert report.image_id == machine.image_id
    assert report.measurement == machine.measurement
    assert report.host_data == machine.host_data
    assert report.report_data == b"challenge".ljust(64, b"\0")
    assert report.report_id_ma == b"\xff" * 32
    assert report.chip_id == machine.chip
    assert report.current == FirmwareVersion(1, 55, 29)
    assert report.key_info.signing_key is SigningKey.VCEK
    assert report.cpuid == ((0x19, 1, 1) if version >= 3 else None)
    assert report.product is (Product.MILAN if version >= 3 else None)
    assert report.launch_mit_vector == (5 if version >= 5 else None)
    assert report.current_mit_vector == (6 if version >= 5 else None)
    assert report.signed == machine.report()[:0x2A0]


def test_every_bit_of_the_guest_policy_has_its_name() -> None:
    names = {
        16: "smt",
        18: "migrate_ma",
        19: "debug",
        20: "single_socket",
        21: "cxl_allow",
        22: "mem_aes_256_xts",
        23: "rapl_dis",
        24: "ciphertext_hiding_dram",
        25: "page_swap_disable",
    }
    for bit, name in names.items():
        policy = parse_report(replace(MACHINE, policy=1 << 17 | 1 << bit).report()).policy
        assert [other for other in names.values() if getattr(policy, other)] == [name]
    policy = parse_report(replace(MACHINE, policy=0x2_0137).report()).policy
    assert (policy.abi_major, policy.abi_minor) == (1, 0x37)


def test_every_bit_of_the_platform_has_its_name() -> None:
    names = {
        0: "smt_en",
        1: "tsme_en",
        2: "ecc_en",
        3: "rapl_dis",
        4: "ciphertext_hiding_dram_en",
        5: "alias_check_complete",
        7: "tio_en",
    }
    for bit, name in names.items():
        info = parse_report(replace(MACHINE, platform_info=1 << bit).report()).platform_info
        assert [other for other in names.values() if getattr(info, other)] == [name]


@pytest.mark.parametrize("size", [0, 1, REPORT_BYTES - 1, REPORT_BYTES + 1, 4096])
def test_another_length_is_refused(size: int) -> None:
    with pytest.raises(SnpReportMalformed, match="expected 1184 bytes"):
        parse_report(MACHINE.report().ljust(size, b"\0")[:size])


@pytest.mark.parametrize("version", [0, 1, 6, 0xFFFFFFFF])
def test_an_unknown_version_is_refused(version: int) -> None:
    with pytest.raises(SnpVersionUnknown, match="expected 2 to 5"):
        parse_report(replace(MACHINE, version=version).report())


@pytest.mark.parametrize(
    ("version", "offset"),
    [
        *((3, offset) for offset in (0x4C, 0x4F, 0x18B, 0x19F, 0x1EB, 0x1EF, 0x1F8, 0x29F)),
        *((2, offset) for offset in (0x188, 0x18A, 0x1F8)),
        *((5, offset) for offset in (0x208, 0x29F)),
        *((3, offset) for offset in (0x182, 0x185, 0x3A, 0x1E5, 0x1F2)),
    ],
)
def test_reserved_bytes_must_be_zero(version: int, offset: int) -> None:
    with pytest.raises(SnpReservedNotZero):
        parse_report(replace(MACHINE, version=version, patches={offset: b"\x01"}).report())


@pytest.mark.parametrize("offset", [0x2A0 + 48, 0x2A0 + 71, 0x2E8 + 48, 0x2E8 + 71, 0x330, 0x49F])
def test_bytes_around_the_signature_must_be_zero(offset: int) -> None:
    with pytest.raises(SnpReservedNotZero):
        parse_report(replace(MACHINE, late_patches={offset: b"\x01"}).report())


@pytest.mark.parametrize("bit", [26, 40, 63])
def test_reserved_bits_of_the_policy_are_refused(bit: int) -> None:
    with pytest.raises(SnpReservedNotZero, match="POLICY"):
        parse_report(replace(MACHINE, policy=0x30000 | 1 << bit).report())


def test_bit_17_of_the_policy_must_be_one() -> None:
    with pytest.raises(SnpReservedNotZero, match="bit 17 one"):
        parse_report(replace(MACHINE, policy=0x10000).report())


@pytest.mark.parametrize("bit", [6, 8, 63])
def test_reserved_bits_of_the_platform_are_refused(bit: int) -> None:
    with pytest.raises(SnpReservedNotZero, match="PLATFORM_INFO"):
        parse_report(replace(MACHINE, platform_info=1 << bit).report())


@pytest.mark.parametrize("bit", [5, 31])
def test_reserved_bits_of_the_key_are_refused(bit: int) -> None:
    with pytest.raises(SnpReservedNotZero, match="KEY_INFO"):
        parse_report(replace(MACHINE, key_info=1 << bit).report())


@pytest.mark.parametrize("number", [2, 3, 4, 5, 6])
def test_an_unknown_signing_key_is_refused(number: int) -> None:
    with pytest.raises(SnpSigningKeyUnknown, match=f"found {number}"):
        parse_report(replace(MACHINE, key_info=number << 2).report())


@pytest.mark.parametrize(
    ("family", "model", "product"),
    [
        (0x19, 0x00, Product.MILAN),
        (0x19, 0x0F, Product.MILAN),
        (0x19, 0x10, Product.GENOA),
        (0x19, 0x1F, Product.GENOA),
        (0x19, 0xA0, Product.GENOA),
        (0x19, 0xAF, Product.GENOA),
        (0x1A, 0x00, Product.TURIN),
        (0x1A, 0x11, Product.TURIN),
    ],
)
def test_products_by_cpuid(family: int, model: int, product: Product) -> None:
    assert product_of_cpuid(family, model) is product


@pytest.mark.parametrize(
    "cpuid", [(0x17, 0x31), (0x19, 0x20), (0x19, 0x9F), (0x19, 0xB0), (0x1A, 0x50), (0xFF, 0xFF)]
)
def test_an_unknown_product_is_refused(cpuid: tuple[int, int]) -> None:
    with pytest.raises(SnpProductUnknown, match="found family"):
        parse_report(replace(MACHINE, cpuid=(*cpuid, 0)).report())


@pytest.mark.parametrize(
    ("product", "octets", "text"),
    [
        (
            Product.GENOA,
            "0a00000000001754",
            "bootloader 10, tee 0, snp 23, microcode 84",
        ),
        (
            Product.TURIN,
            "0102030400000050",
            "fmc 1, bootloader 2, tee 3, snp 4, microcode 80",
        ),
    ],
)
def test_tcb_versions_are_read_by_product(product: Product, octets: str, text: str) -> None:
    version = TcbVersion.of(bytes.fromhex(octets), product)
    assert str(version) == text
    assert version.to_bytes(product).hex() == octets


def test_tcb_versions_are_compared_part_by_part() -> None:
    old = TcbVersion(None, 4, 0, 24, 200)
    assert TcbVersion(None, 3, 0, 25, 201).exceeds(old) == ("snp", "microcode")
    assert old.exceeds(old) == ()
    assert TcbVersion(1, 4, 0, 24, 200).exceeds(old) == ("fmc",)


@given(st.binary(max_size=REPORT_BYTES + 8))
@settings(max_examples=200, deadline=None)
def test_arbitrary_bytes_raise_only_named_errors(data: bytes) -> None:
    with contextlib.suppress(EvidenceMalformed):
        parse_report(data)


@given(st.integers(0, REPORT_BYTES - 1), st.integers(1, 255))
@settings(max_examples=400, deadline=None)
def test_a_changed_byte_raises_only_named_errors(offset: int, change: int) -> None:
    data = bytearray(MACHINE_REPORT)
    data[offset] ^= change
    try:
        report = parse_report(bytes(data))
    except EvidenceMalformed:
        return
    assert report.signed == bytes(data)[:0x2A0]


MACHINE_REPORT = MACHINE.report()
