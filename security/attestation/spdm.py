"""SPDM measurements (DMTF DSP0274 version 1.1) as NVIDIA's devices report them.

A report is the verifier's GET_MEASUREMENTS request (37 bytes) and the device's MEASUREMENTS
response, one after the other: that is what the signature at the end is over. Integers are
little-endian. The response ends in NVIDIA's opaque data, a list of u16 type, u16 size, value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from types import MappingProxyType

from security.attestation.errors import SpdmUnsupported
from security.attestation.octets import OctetReader
from security.errors import EvidenceMalformed

__all__ = [
    "MAX_REPORT_BYTES",
    "NONCE_BYTES",
    "REQUEST_BYTES",
    "SIGNATURE_BYTES",
    "GetMeasurements",
    "MeasurementBlock",
    "Measurements",
    "OpaqueField",
    "Report",
    "read_report",
]

REQUEST_BYTES = 37
NONCE_BYTES = 32
SIGNATURE_BYTES = 96
"""ECDSA P-384: r and s, 48 bytes each, big-endian."""

DIGEST_BYTES = 48
"""SHA-384."""

MAX_REPORT_BYTES = 8192
"""NVML_CC_GPU_ATTESTATION_REPORT_SIZE."""

_VERSION = 0x11
_GET_MEASUREMENTS = 0xE0
_MEASUREMENTS = 0x60
_DMTF = 1
_DIGEST_TYPES = (0, 1, 2, 3)
"""Immutable ROM, mutable firmware, hardware configuration, firmware configuration; all digests."""


class OpaqueField(IntEnum):
    """Types of NVIDIA's opaque data (NVIDIA attestation-sdk, GpuOpaqueDataType and
    SwitchOpaqueDataType; 22 to 25 mean the device's own there)."""

    CERT_ISSUER_NAME = 1
    CERT_AUTHORITY_KEY_IDENTIFIER = 2
    DRIVER_VERSION = 3
    GPU_INFO = 4
    SKU = 5
    VBIOS_VERSION = 6
    MANUFACTURER_ID = 7
    TAMPER_DETECTION = 8
    SMC = 9
    VPR = 10
    NVDEC0_STATUS = 11
    MSRSCNT = 12
    CPRINFO = 13
    BOARD_ID = 14
    CHIP_SKU = 15
    CHIP_SKU_MOD = 16
    PROJECT = 17
    PROJECT_SKU = 18
    PROJECT_SKU_MOD = 19
    FWID = 20
    PROTECTED_PCIE_STATUS = 21
    SWITCH_PDI = 22
    FLOORSWEPT_PORTS = 23
    POSITION_ID = 24
    LOCK_SWITCH_STATUS = 25
    SWITCH_GPU_PDIS = 26
    SWITCH_PORTS = 27
    GPU_LINK_CONN = 32
    SYS_ENABLE_STATUS = 33
    OPAQUE_DATA_VERSION = 34
    CHIP_INFO = 35
    FEATURE_FLAG = 36


_KNOWN = frozenset(int(field) for field in OpaqueField)


@dataclass(frozen=True, slots=True)
class GetMeasurements:
    """The request (DSP0274 1.1, GET_MEASUREMENTS request message format).

    Attributes:
        attributes: Param1; bit 0 asks for a signature.
        operation: Param2; 0xff asks for every measurement.
        nonce: the verifier's 32 bytes.
        slot: SlotIDParam.
    """

    attributes: int
    operation: int
    nonce: bytes
    slot: int


@dataclass(frozen=True, slots=True)
class MeasurementBlock:
    """One measurement (DSP0274 1.1, DMTF measurement specification format).

    Attributes:
        index: 1 for the first.
        value_type: DMTFSpecMeasurementValueType.
        value: SHA-384 digest (48 bytes).
    """

    index: int
    value_type: int
    value: bytes


@dataclass(frozen=True, slots=True)
class Measurements:
    """The response (DSP0274 1.1, Successful MEASUREMENTS response message format).

    Attributes:
        blocks: in the order of their indices, which are 1 to their number.
        nonce: the device's own 32 bytes.
        opaque: NVIDIA's fields by type.
        signature: 96 bytes.
    """

    blocks: tuple[MeasurementBlock, ...]
    nonce: bytes
    opaque: Mapping[OpaqueField, bytes]
    signature: bytes


@dataclass(frozen=True, slots=True)
class Report:
    """Request and response.

    Attributes:
        request: what was asked.
        response: what the device answered.
        signed: the bytes that the signature is over.
    """

    request: GetMeasurements
    response: Measurements
    signed: bytes


def read_report(data: bytes, what: str) -> Report:
    """Parses a report.

    Args:
        data: request and response.
        what: name of the device, for messages.

    Raises:
        EvidenceMalformed: lengths, counts or indices do not fit.
        SpdmUnsupported: another version, message, measurement or opaque field than is known.
    """
    if len(data) > MAX_REPORT_BYTES:
        raise EvidenceMalformed(
            f"{what}: expected at most {MAX_REPORT_BYTES} bytes, found {len(data)}"
        )
    reader = OctetReader(data, what)
    request = _read_request(reader)
    response = _read_response(reader)
    reader.finish()
    return Report(request, response, data[: len(data) - SIGNATURE_BYTES])


def _expect(reader: OctetReader, name: str, expected: int, found: int) -> None:
    if found != expected:
        raise SpdmUnsupported(f"{reader.what}.{name}: expected {expected:#04x}, found {found:#04x}")


def _read_request(reader: OctetReader) -> GetMeasurements:
    _expect(reader, "request version", _VERSION, reader.little(1, "request version"))
    _expect(reader, "request code", _GET_MEASUREMENTS, reader.little(1, "request code"))
    return GetMeasurements(
        attributes=reader.little(1, "request Param1"),
        operation=reader.little(1, "request Param2"),
        nonce=reader.take(NONCE_BYTES, "request nonce"),
        slot=reader.little(1, "SlotIDParam"),
    )


def _read_response(reader: OctetReader) -> Measurements:
    _expect(reader, "response version", _VERSION, reader.little(1, "response version"))
    _expect(reader, "response code", _MEASUREMENTS, reader.little(1, "response code"))
    reader.take(2, "response parameters")
    count = reader.little(1, "NumberOfBlocks")
    record = reader.take(reader.little(3, "MeasurementRecordLength"), "MeasurementRecord")
    blocks = _read_blocks(record, count, f"{reader.what}.MeasurementRecord")
    nonce = reader.take(NONCE_BYTES, "response nonce")
    opaque = reader.take(reader.little(2, "OpaqueLength"), "OpaqueData")
    fields = _read_opaque(opaque, f"{reader.what}.OpaqueData")
    return Measurements(blocks, nonce, fields, reader.take(SIGNATURE_BYTES, "signature"))


def _read_blocks(record: bytes, count: int, what: str) -> tuple[MeasurementBlock, ...]:
    if not count:
        raise EvidenceMalformed(f"{what}: expected at least one measurement block, found none")
    reader = OctetReader(record, what)
    blocks: list[MeasurementBlock] = []
    for index in range(1, count + 1):
        found = reader.little(1, "Index")
        if found != index:
            # DSP0274 lets a responder skip indices; NVIDIA's never do, and a reference value is
            # found by index alone.
            raise EvidenceMalformed(
                f"{what}: expected measurement block {index}, found block {found}"
            )
        _expect(reader, "MeasurementSpecification", _DMTF, reader.little(1, "specification"))
        block = OctetReader(reader.take(reader.little(2, "MeasurementSize"), "Measurement"), what)
        value_type = block.little(1, "DMTFSpecMeasurementValueType")
        if value_type not in _DIGEST_TYPES:
            raise SpdmUnsupported(
                f"{what}: expected block {index} to be a digest of type 0 to 3, found type "
                f"{value_type:#04x}"
            )
        size = block.little(2, "DMTFSpecMeasurementValueSize")
        if size != DIGEST_BYTES:
            raise SpdmUnsupported(
                f"{what}: expected block {index} to be a SHA-384 digest (48 bytes), found "
                f"{size} bytes"
            )
        value = block.take(size, "DMTFSpecMeasurementValue")
        block.finish()
        blocks.append(MeasurementBlock(index, value_type, value))
    reader.finish()
    return tuple(blocks)


def _read_opaque(data: bytes, what: str) -> Mapping[OpaqueField, bytes]:
    reader = OctetReader(data, what)
    fields: dict[OpaqueField, bytes] = {}
    while reader.left:
        kind = reader.little(2, "type")
        if kind not in _KNOWN:
            raise SpdmUnsupported(f"{what}: expected a known field, found type {kind}")
        if OpaqueField(kind) in fields:
            raise EvidenceMalformed(f"{what}: expected each field once, found type {kind} again")
        fields[OpaqueField(kind)] = reader.take(reader.little(2, "size"), "value")
    return MappingProxyType(fields)
