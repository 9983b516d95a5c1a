"""Event logs of confidential VMs, and their replay into RTMRs.

Layout after "TCG PC Client Platform Firmware Profile Specification", section 10.2 (crypto agile
log: TCG_PCClientPCREvent with TCG_EfiSpecIdEvent, then TCG_PCR_EVENT2) as the CCEL table of ACPI
hands it over; indices after the UEFI specification's confidential computing protocol, "Intel Trust
Domain Extension": 0 is MRTD, 1 to 4 are RTMR0 to RTMR3. The log itself is not signed: it is worth
what its replay against signed registers makes it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from security.attestation.errors import EventLogMalformed
from security.attestation.octets import OctetReader
from security.errors import EvidenceMalformed

__all__ = ["Event", "EventLog", "read_ccel_table", "read_event_log"]

MAX_LOG_BYTES = 1 << 20
MAX_EVENTS = 16384
EV_NO_ACTION = 3
SHA384 = 0x000C

_MAX_ALGORITHMS = 8
_SPEC_ID = b"Spec ID Event03\0"
_DIGEST_BYTES = {0x0004: 20, 0x000B: 32, 0x000C: 48, 0x000D: 64, 0x0012: 32}
_END_OF_LOG = 0xFFFFFFFF
_RTMRS = 4
_TDX_CC_TYPE = 2


@dataclass(frozen=True, slots=True)
class Event:
    """One measurement.

    Attributes:
        index: measurement register: 0 for MRTD, 1 to 4 for RTMR0 to RTMR3.
        type: TCG event type.
        digest: SHA-384 (48 bytes) that the register was extended with.
        data: what the event says of itself; nothing proves it but the digest, for those types whose
            digest is over it.
    """

    index: int
    type: int
    digest: bytes
    data: bytes


@dataclass(frozen=True, slots=True)
class EventLog:
    """A log as parsed; `rtmrs` replays it."""

    events: tuple[Event, ...]

    def rtmrs(self) -> tuple[bytes, bytes, bytes, bytes]:
        """RTMR0 to RTMR3 (48 bytes each) after all events, from zero.

        Raises:
            EventLogMalformed: an event extends a register that cannot be extended.
        """
        registers = [bytes(48)] * _RTMRS
        for event in self.events:
            if event.type == EV_NO_ACTION:
                continue
            if not 1 <= event.index <= _RTMRS:
                raise EventLogMalformed(
                    "event log", "measurements into register 1 to 4", f"one into {event.index}"
                )
            register = registers[event.index - 1]
            registers[event.index - 1] = hashlib.sha384(register + event.digest).digest()
        return registers[0], registers[1], registers[2], registers[3]


def read_event_log(data: bytes) -> EventLog:
    """Parses a crypto-agile log with SHA-384 digests; 0xff or zero bytes may follow the last event.

    Raises:
        EventLogMalformed: anything else, more than `MAX_LOG_BYTES` or `MAX_EVENTS`.
    """
    try:
        return _read(data)
    except EvidenceMalformed as error:
        raise EventLogMalformed("event log", "a crypto agile TCG log", str(error)) from None


def _read(data: bytes) -> EventLog:
    if len(data) > MAX_LOG_BYTES:
        raise EvidenceMalformed(f"expected at most {MAX_LOG_BYTES} bytes, found {len(data)}")
    reader = OctetReader(data, "event log")
    sizes = _read_header(reader)
    # A real event never lies within such a tail: it has at least one digest.
    end = min(len(data.rstrip(b"\xff")), len(data.rstrip(b"\0")))
    events: list[Event] = []
    while reader.position < end:
        if len(events) == MAX_EVENTS:
            raise EvidenceMalformed(f"expected at most {MAX_EVENTS} events")
        events.append(_read_event(reader, sizes))
    return EventLog(tuple(events))


def _read_header(reader: OctetReader) -> dict[int, int]:
    """TCG_PCClientPCREvent with TCG_EfiSpecIdEvent: digest sizes by algorithm."""
    index = reader.little(4, "register index")
    kind = reader.little(4, "event type")
    digest = reader.take(20, "digest")
    if index not in (0, 1) or kind != EV_NO_ACTION or any(digest):
        raise EvidenceMalformed("expected a Spec ID event first (EV_NO_ACTION, digest of zero)")
    size = reader.little(4, "event size")
    event = OctetReader(reader.take(size, "Spec ID event"), "Spec ID event")
    if event.take(16, "signature") != _SPEC_ID:
        raise EvidenceMalformed("expected signature 'Spec ID Event03', found another")
    event.take(4, "platform class")
    version = event.take(3, "version and errata")
    if version[:2] != b"\x00\x02":
        raise EvidenceMalformed(f"expected version 2.0, found {version[1]}.{version[0]}")
    event.take(1, "uintn size")
    count = event.little(4, "number of algorithms")
    if not 1 <= count <= _MAX_ALGORITHMS:
        raise EvidenceMalformed(f"expected 1 to {_MAX_ALGORITHMS} algorithms, found {count}")
    sizes: dict[int, int] = {}
    for _ in range(count):
        algorithm, digest_size = event.little(2, "algorithm"), event.little(2, "digest size")
        if _DIGEST_BYTES.get(algorithm) != digest_size or algorithm in sizes:
            raise EvidenceMalformed(
                f"expected known algorithms, each once and with its size, found 0x{algorithm:04x} "
                f"with {digest_size} bytes"
            )
        sizes[algorithm] = digest_size
    event.take(event.little(1, "vendor info size"), "vendor info")
    event.finish()
    if SHA384 not in sizes:
        raise EvidenceMalformed("expected SHA-384 among the algorithms, found others only")
    return sizes


def _read_event(reader: OctetReader, sizes: dict[int, int]) -> Event:
    index = reader.little(4, "register index")
    if index == _END_OF_LOG:
        raise EvidenceMalformed("expected nothing but 0xff after the last event")
    kind = reader.little(4, "event type")
    count = reader.little(4, "digest count")
    if count != len(sizes):
        raise EvidenceMalformed(f"expected {len(sizes)} digests, found {count}")
    digests: dict[int, bytes] = {}
    for _ in range(count):
        algorithm = reader.little(2, "algorithm")
        if algorithm not in sizes or algorithm in digests:
            raise EvidenceMalformed(
                f"expected a digest of each announced algorithm, found 0x{algorithm:04x}"
            )
        digests[algorithm] = reader.take(sizes[algorithm], "digest")
    return Event(index, kind, digests[SHA384], reader.take(reader.little(4, "event size"), "event"))


def read_ccel_table(table: bytes) -> int:
    """Checks a CCEL table (ACPI 6.5, 5.2.34) and returns the log area's minimum length in bytes.

    Raises:
        EventLogMalformed: no such table, a wrong checksum, or of another kind of confidential VM.
    """
    try:
        reader = OctetReader(table, "CCEL table")
        signature = reader.take(4, "signature")
        length = reader.little(4, "length")
        reader.take(28, "header")
        kind = reader.little(1, "CC type")
        reader.take(3, "CC subtype")
        area = reader.little(8, "log area minimum length")
        reader.take(8, "log area start address")
        reader.finish()
    except EvidenceMalformed as error:
        raise EventLogMalformed("CCEL table", "56 bytes", str(error)) from None
    if signature != b"CCEL" or length != len(table) or sum(table) % 256:
        raise EventLogMalformed(
            "CCEL table", "signature, length and checksum of a CCEL table", "others"
        )
    if kind != _TDX_CC_TYPE:
        raise EventLogMalformed("CCEL table's CC type", f"{_TDX_CC_TYPE} (TDX)", str(kind))
    return area
