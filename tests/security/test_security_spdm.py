from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nvidia_machine import NONCE, gpu, machine

from security.attestation.errors import SpdmUnsupported
from security.attestation.nvidia_certificates import MAX_CERTIFICATES, read_chain
from security.attestation.spdm import MAX_REPORT_BYTES, REQUEST_BYTES, OpaqueField, read_report
from security.errors import AppraisalError, EvidenceMalformed

RESPONSE = REQUEST_BYTES
COUNT = RESPONSE + 4
BLOCK = RESPONSE + 8


@pytest.fixture(scope="module")
def report() -> bytes:
    return gpu().report(NONCE)


def with_byte(data: bytes, offset: int, value: int) -> bytes:
    return data[:offset] + bytes([value]) + data[offset + 1 :]


def test_a_report_is_read() -> None:
    device = gpu()
    report = device.report(NONCE)
    parsed = read_report(report, "gpu.0")
    assert parsed.request.nonce == NONCE
    assert [block.index for block in parsed.response.blocks] == list(range(1, 41))
    assert tuple(block.value for block in parsed.response.blocks) == device.blocks
    assert parsed.response.opaque[OpaqueField.CHIP_SKU] == b"882\0\0"
    assert parsed.signed + parsed.response.signature == report


@pytest.mark.parametrize(
    ("offset", "value", "code"),
    [
        (0, 0x12, "spdm_unsupported"),
        (1, 0xE1, "spdm_unsupported"),
        (RESPONSE, 0x10, "spdm_unsupported"),
        (RESPONSE + 1, 0x61, "spdm_unsupported"),
        (COUNT, 0, "evidence_malformed"),
        (COUNT, 39, "evidence_malformed"),
        (COUNT, 41, "evidence_malformed"),
        (COUNT + 3, 1, "evidence_malformed"),
        (BLOCK, 0, "evidence_malformed"),
        (BLOCK, 2, "evidence_malformed"),
        (BLOCK + 55, 1, "evidence_malformed"),
        (BLOCK + 1, 2, "spdm_unsupported"),
        (BLOCK + 2, 50, "evidence_malformed"),
        (BLOCK + 2, 52, "evidence_malformed"),
        (BLOCK + 3, 1, "evidence_malformed"),
        (BLOCK + 4, 0x81, "spdm_unsupported"),
        (BLOCK + 4, 4, "spdm_unsupported"),
        (BLOCK + 5, 32, "spdm_unsupported"),
    ],
)
def test_other_shapes_are_refused_by_name(
    report: bytes, offset: int, value: int, code: str
) -> None:
    with pytest.raises(EvidenceMalformed) as refusal:
        read_report(with_byte(report, offset, value), "gpu.0")
    assert refusal.value.code == code


@pytest.mark.parametrize("extra", [-1, 1])
def test_length_must_fit(report: bytes, extra: int) -> None:
    with pytest.raises(EvidenceMalformed):
        read_report(report[:extra] if extra < 0 else report + b"\0", "gpu.0")


def test_opaque_fields_are_known_and_come_once() -> None:
    for kind in (0, 28, 37, 255):
        device = gpu()
        object.__setattr__(device, "opaque", {**device.opaque, kind: b""})
        with pytest.raises(SpdmUnsupported, match=f"type {kind}"):
            read_report(device.report(NONCE), "gpu.0")
    field = bytes([15, 0, 1, 0, 65])
    device = gpu()
    object.__setattr__(device, "opaque", {15: b"A" + field})
    with pytest.raises(EvidenceMalformed, match="again"):
        # The first field's length is cut so that the second stands beside it.
        data = device.report(NONCE)
        start = len(data) - 96 - 10
        read_report(data[: start + 2] + b"\1" + data[start + 3 :], "gpu.0")


def test_longest() -> None:
    with pytest.raises(EvidenceMalformed, match="at most"):
        read_report(bytes(MAX_REPORT_BYTES + 1), "gpu.0")


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=600))
def test_any_bytes_are_read_or_refused_by_name(data: bytes) -> None:
    for read in (read_report, read_chain):
        with suppress(AppraisalError):
            read(data, "gpu.0")


_REPORT = machine(1, 1).parts()["gpu.0.report"]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(_REPORT) - 1), st.integers(0, 255)), max_size=4))
def test_any_changed_report_is_read_or_refused_by_name(changes: list[tuple[int, int]]) -> None:
    data = bytearray(_REPORT)
    for offset, value in changes:
        data[offset] = value
    try:
        parsed = read_report(bytes(data), "gpu.0")
    except AppraisalError:
        return
    assert parsed.signed == bytes(data[:-96])


def test_chains_in_pem_and_in_der() -> None:
    device = gpu()
    der = b"".join(item.der for item in device.chain)
    assert [item.der for item in read_chain(device.pem(), "chain")] == [
        item.der for item in device.chain
    ]
    assert [item.fingerprint for item in read_chain(der, "chain")] == [
        item.fingerprint for item in device.chain
    ]
    assert read_chain(b"\n" + device.pem() + b"\n\n", "chain")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no certificate",
        b"-----BEGIN CERTIFICATE-----\n!!!!\n-----END CERTIFICATE-----\n",
        b"-----BEGIN CERTIFICATE-----\nAAAAA\n-----END CERTIFICATE-----\n",
        b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
        b"\x30\x82\xff\xff",
        b"\x30\x82\x00\x01\x00",
        b"\x30\x03\x02\x01\x01",
        bytes(20000),
    ],
)
def test_other_chains_are_malformed(data: bytes) -> None:
    with pytest.raises(EvidenceMalformed):
        read_chain(data, "chain")


def test_chains_are_bounded_and_hold_nothing_else() -> None:
    leaf = gpu().leaf
    pem = gpu().pem()
    with pytest.raises(EvidenceMalformed):
        read_chain(leaf.der * (MAX_CERTIFICATES + 1), "chain")
    with pytest.raises(EvidenceMalformed):
        read_chain(pem * 2, "chain")
    with pytest.raises(EvidenceMalformed):
        read_chain(pem + b"trailing text", "chain")
