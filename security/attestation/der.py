"""Just enough DER (ITU-T X.690) to read Intel's SGX extension: definite lengths, no recursion."""

from __future__ import annotations

from security.attestation.octets import OctetReader
from security.errors import EvidenceMalformed

__all__ = ["DerReader"]

_INTEGER, _OCTET_STRING, _OBJECT_IDENTIFIER, _ENUMERATED, _SEQUENCE = 0x02, 0x04, 0x06, 0x0A, 0x30
_MAX_IDENTIFIER_BYTES = 32


class DerReader:
    """Reads elements one after the other; each call says which type it must be.

    Every method raises `EvidenceMalformed` where another type, or not enough bytes, stand.
    """

    def __init__(self, data: bytes, what: str) -> None:
        self._reader = OctetReader(data, what)
        self._what = what

    @property
    def left(self) -> int:
        """Bytes not read yet."""
        return self._reader.left

    def _element(self, tag: int, name: str) -> bytes:
        found = self._reader.little(1, "tag")
        if found != tag:
            raise EvidenceMalformed(
                f"{self._what}: expected {name} (tag 0x{tag:02x}), found tag 0x{found:02x}"
            )
        size = self._reader.little(1, "length")
        if size >= 0x80:
            count = size & 0x7F
            if not 1 <= count <= 2:
                raise EvidenceMalformed(f"{self._what}: expected a length of at most 65535")
            size = self._reader.big(count, "length")
            if size < (0x80 if count == 1 else 0x100):
                raise EvidenceMalformed(f"{self._what}: expected the shortest form of a length")
        return self._reader.take(size, name)

    def sequence(self) -> DerReader:
        """A reader over a SEQUENCE's contents."""
        return DerReader(self._element(_SEQUENCE, "a sequence"), self._what)

    def only_sequence(self) -> DerReader:
        """Like `sequence`, and nothing may follow."""
        inner = self.sequence()
        self._reader.finish()
        return inner

    def identifier(self) -> str:
        """An OBJECT IDENTIFIER in dotted form."""
        octets = self._element(_OBJECT_IDENTIFIER, "an object identifier")
        if not 1 <= len(octets) <= _MAX_IDENTIFIER_BYTES or octets[-1] & 0x80:
            raise EvidenceMalformed(f"{self._what}: expected an object identifier of 1 to 32 bytes")
        arcs: list[int] = []
        arc = 0
        for octet in octets:
            arc = arc << 7 | octet & 0x7F
            if not octet & 0x80:
                arcs.append(arc)
                arc = 0
        first = min(arcs[0] // 40, 2)
        return ".".join(str(arc) for arc in (first, arcs[0] - 40 * first, *arcs[1:]))

    def octets(self, size: int) -> bytes:
        """An OCTET STRING of exactly `size` bytes, the last element."""
        value = self._element(_OCTET_STRING, "an octet string")
        self._reader.finish()
        if len(value) != size:
            raise EvidenceMalformed(f"{self._what}: expected {size} bytes, found {len(value)}")
        return value

    def unsigned(self, maximum: int) -> int:
        """An INTEGER from 0 to `maximum`, the last element."""
        return self._number(_INTEGER, "an integer", maximum)

    def enumerated(self, maximum: int) -> int:
        """An ENUMERATED from 0 to `maximum`, the last element."""
        return self._number(_ENUMERATED, "an enumerated", maximum)

    def _number(self, tag: int, name: str, maximum: int) -> int:
        octets = self._element(tag, name)
        self._reader.finish()
        value = int.from_bytes(octets, "big", signed=True) if 0 < len(octets) <= 8 else -1
        if not 0 <= value <= maximum:
            raise EvidenceMalformed(f"{self._what}: expected {name} from 0 to {maximum}")
        return value
