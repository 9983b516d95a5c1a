"""Reads binary structures from outside: every read is bounded, and what is left over is known."""

from __future__ import annotations

from security.errors import EvidenceMalformed

__all__ = ["OctetReader"]


class OctetReader:
    """A cursor over bytes that never reads past their end.

    Attributes:
        what: name of the structure, for messages.
        position: offset of the next byte.
    """

    def __init__(self, data: bytes, what: str) -> None:
        self._data = data
        self.what = what
        self.position = 0

    @property
    def left(self) -> int:
        """Bytes not read yet."""
        return len(self._data) - self.position

    def take(self, size: int, name: str) -> bytes:
        """The next `size` bytes.

        Raises:
            EvidenceMalformed: there are fewer.
        """
        if size < 0 or size > self.left:
            raise EvidenceMalformed(
                f"{self.what}.{name}: expected {size} bytes at offset {self.position}, found "
                f"{self.left}"
            )
        start = self.position
        self.position += size
        return self._data[start : self.position]

    def little(self, size: int, name: str) -> int:
        """The next `size` bytes as an unsigned little-endian integer."""
        return int.from_bytes(self.take(size, name), "little")

    def big(self, size: int, name: str) -> int:
        """The next `size` bytes as an unsigned big-endian integer."""
        return int.from_bytes(self.take(size, name), "big")

    def finish(self) -> None:
        """Refuses bytes that nobody read.

        Raises:
            EvidenceMalformed
        """
        if self.left:
            raise EvidenceMalformed(
                f"{self.what}: expected its end at offset {self.position}, found {self.left} more "
                "bytes"
            )
