"""A strict reader of DER (ITU-T X.690): definite, minimal lengths, bounded, no recursion.

It exists because every VCEK and VLEK of AMD has serial number 0, which general X.509 parsers are
about to refuse. It knows just what certificates and revocation lists need.
"""

from __future__ import annotations

from datetime import UTC, datetime

from security.attestation.errors import CertificateMalformed

__all__ = [
    "BIT_STRING",
    "BOOLEAN",
    "ENUMERATED",
    "IA5_STRING",
    "INTEGER",
    "OCTET_STRING",
    "OID",
    "SEQUENCE",
    "SET",
    "DerReader",
    "bits_of",
    "boolean_of",
    "integer_of",
    "oid_of",
    "text_of",
    "time_of",
]

BOOLEAN = 0x01
INTEGER = 0x02
BIT_STRING = 0x03
OCTET_STRING = 0x04
OID = 0x06
ENUMERATED = 0x0A
UTF8_STRING = 0x0C
PRINTABLE_STRING = 0x13
T61_STRING = 0x14
IA5_STRING = 0x16
UTC_TIME = 0x17
GENERALIZED_TIME = 0x18
BMP_STRING = 0x1E
SEQUENCE = 0x30
SET = 0x31

_MAX_OID_OCTETS = 64
_MAX_INTEGER_OCTETS = 1024
_STRINGS = {
    UTF8_STRING: "utf-8",
    PRINTABLE_STRING: "ascii",
    IA5_STRING: "ascii",
    T61_STRING: "latin-1",
    BMP_STRING: "utf-16-be",
}


class DerReader:
    """A cursor over the elements of one constructed value.

    Attributes:
        what: name of the structure, for messages.
        position: offset of the next element.
    """

    def __init__(self, data: bytes, what: str) -> None:
        self._data = data
        self.what = what
        self.position = 0

    @property
    def ended(self) -> bool:
        """Whether every element was read."""
        return self.position == len(self._data)

    def peek(self) -> int | None:
        """The tag of the next element; None at the end."""
        return None if self.ended else self._data[self.position]

    def element(self, name: str) -> tuple[int, bytes, bytes]:
        """The next element, whatever it is: its tag, its content, and all of it.

        Raises:
            CertificateMalformed: a tag of several bytes, a length that is indefinite, not minimal
                or beyond the end.
        """
        data, start = self._data, self.position
        if len(data) - start < 2:
            raise self.malformed(name, "an element", f"{len(data) - start} bytes")
        tag, length = data[start], data[start + 1]
        if tag & 0x1F == 0x1F:
            raise self.malformed(name, "a tag of one byte", f"0x{tag:02x}")
        content = start + 2
        if length >= 0x80:
            size = length & 0x7F
            if not 1 <= size <= 3 or len(data) - content < size:
                raise self.malformed(name, "a length of 1 to 3 bytes", f"0x{length:02x}")
            length = int.from_bytes(data[content : content + size], "big")
            content += size
            if length < 0x80 or length >> (8 * (size - 1)) == 0:
                raise self.malformed(name, "a minimal length", f"{length} in {size} bytes")
        end = content + length
        if end > len(data):
            raise self.malformed(name, f"{length} bytes", f"{len(data) - content}")
        self.position = end
        return tag, data[content:end], data[start:end]

    def take(self, tag: int, name: str) -> bytes:
        """The content of the next element, which must have this tag."""
        found, content, _ = self.element(name)
        if found != tag:
            raise self.malformed(name, f"tag 0x{tag:02x}", f"0x{found:02x}")
        return content

    def whole(self, tag: int, name: str) -> bytes:
        """The next element with its header; it must have this tag."""
        found, _, whole = self.element(name)
        if found != tag:
            raise self.malformed(name, f"tag 0x{tag:02x}", f"0x{found:02x}")
        return whole

    def within(self, tag: int, name: str) -> DerReader:
        """A reader of the elements inside the next element."""
        return DerReader(self.take(tag, name), f"{self.what}.{name}")

    def finish(self) -> None:
        """Refuses elements that nobody read."""
        if not self.ended:
            raise self.malformed("end", "nothing more", f"{len(self._data) - self.position} bytes")

    def malformed(self, name: str, expected: str, found: str) -> CertificateMalformed:
        """The error that says what stands there instead."""
        return CertificateMalformed(
            f"{self.what}.{name} at offset {self.position}: expected {expected}, found {found}"
        )


def integer_of(content: bytes, name: str) -> int:
    """An INTEGER's value; minimal encoding only (X.690, 8.3.2)."""
    if not content or len(content) > _MAX_INTEGER_OCTETS:
        raise CertificateMalformed(
            f"{name}: expected an INTEGER of 1 to {_MAX_INTEGER_OCTETS} bytes, found {len(content)}"
        )
    if len(content) > 1 and (
        (content[0] == 0 and content[1] < 0x80) or (content[0] == 0xFF and content[1] >= 0x80)
    ):
        raise CertificateMalformed(f"{name}: expected a minimal INTEGER, found a padded one")
    return int.from_bytes(content, "big", signed=True)


def boolean_of(content: bytes, name: str) -> bool:
    """A BOOLEAN's value: 00 or ff (X.690, 11.1)."""
    if content not in (b"\x00", b"\xff"):
        raise CertificateMalformed(f"{name}: expected BOOLEAN 00 or ff, found {content[:8].hex()}")
    return content == b"\xff"


def bits_of(content: bytes, name: str) -> tuple[bytes, int]:
    """A BIT STRING's octets and the number of unused bits, which must be zero bits."""
    if not content or content[0] > 7 or (len(content) == 1 and content[0]):
        raise CertificateMalformed(f"{name}: expected a BIT STRING, found {content[:8].hex()}")
    unused, octets = content[0], content[1:]
    if unused and octets[-1] & ((1 << unused) - 1):
        raise CertificateMalformed(f"{name}: expected unused bits 0, found others")
    return octets, unused


def oid_of(content: bytes, name: str) -> str:
    """An OBJECT IDENTIFIER in dotted form."""
    if not content or len(content) > _MAX_OID_OCTETS or content[-1] & 0x80:
        raise CertificateMalformed(
            f"{name}: expected an OBJECT IDENTIFIER of at most {_MAX_OID_OCTETS} bytes, found "
            f"{content[:8].hex()}"
        )
    arcs: list[int] = []
    arc = 0
    begins = True
    for octet in content:
        if begins and octet == 0x80:
            raise CertificateMalformed(f"{name}: expected minimal arcs, found a padded one")
        arc = arc << 7 | octet & 0x7F
        begins = not octet & 0x80
        if begins:
            arcs.append(arc)
            arc = 0
    first = min(arcs[0] // 40, 2)
    return ".".join(str(arc) for arc in (first, arcs[0] - 40 * first, *arcs[1:]))


def text_of(tag: int, content: bytes, name: str) -> str:
    """A character string's text."""
    if tag not in _STRINGS:
        raise CertificateMalformed(f"{name}: expected a character string, found tag 0x{tag:02x}")
    try:
        return content.decode(_STRINGS[tag])
    except UnicodeDecodeError:
        raise CertificateMalformed(f"{name}: expected {_STRINGS[tag]}, found other bytes") from None


def time_of(tag: int, content: bytes, name: str) -> int:
    """UTCTime or GeneralizedTime as RFC 5280 (4.1.2.5) restricts them: in Unix seconds."""
    digits = content[:-1]
    expected = {UTC_TIME: 13, GENERALIZED_TIME: 15}.get(tag)
    if len(content) != expected or content[-1:] != b"Z" or not digits.isdigit():
        raise CertificateMalformed(f"{name}: expected [YY]YYMMDDHHMMSSZ, found {content[:16]!r}")
    year = int(digits[:-10])
    if tag == UTC_TIME:
        year += 1900 if year >= 50 else 2000
    try:
        month, day, hour, minute, second = (
            int(digits[len(digits) - 10 + i : len(digits) - 8 + i]) for i in range(0, 10, 2)
        )
        return int(datetime(year, month, day, hour, minute, second, tzinfo=UTC).timestamp())
    except ValueError:
        raise CertificateMalformed(f"{name}: expected a date, found {content[:16]!r}") from None
