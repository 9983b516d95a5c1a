"""The certificates that a host hands to its SEV-SNP guest with an extended guest request."""

from __future__ import annotations

import uuid

from security.attestation.errors import SnpCertificateTableMalformed
from security.attestation.octets import OctetReader

__all__ = ["parse_certificate_table"]

MAX_TABLE_BYTES = 256 << 10
MAX_TABLE_ENTRIES = 16
_TABLE_ENTRY_BYTES = 24
_TABLE_ROLES = {
    uuid.UUID("63da758d-e664-4564-adc5-f4b93be8accd").bytes: "VCEK",
    uuid.UUID("a8074bc2-a25a-483e-aae6-39c045a0b8a1").bytes: "VLEK",
    uuid.UUID("4ab7b379-bbac-4fe4-a02f-05aef327c782").bytes: "ASK",
    uuid.UUID("c0b406a4-a803-4952-9743-3fb6014cd0ae").bytes: "ARK",
}


def parse_certificate_table(data: bytes) -> tuple[tuple[str, bytes], ...]:
    """Reads the certificate table of the extended guest request: `auxblob` of configfs-tsm.

    Layout: entries of 24 bytes, each a GUID (in the order of its text, RFC 4122), offset and length
    (u32 little-endian, from the table's start), ended by an entry of zeros; then the certificates.

    Returns:
        ("VCEK" | "VLEK" | "ASK" | "ARK" | the GUID where it is none of them, DER); an ASVK has the
        ASK's GUID. Empty for an empty table.

    Raises:
        SnpCertificateTableMalformed
    """
    if not data:
        return ()
    if len(data) > MAX_TABLE_BYTES:
        raise SnpCertificateTableMalformed(
            f"cert_table: expected at most {MAX_TABLE_BYTES} bytes, found {len(data)}"
        )
    reader = OctetReader(data, "cert_table")
    entries: list[tuple[bytes, int, int]] = []
    while True:
        if reader.left < _TABLE_ENTRY_BYTES or len(entries) > MAX_TABLE_ENTRIES:
            raise SnpCertificateTableMalformed(
                f"cert_table: expected an entry of zeros after at most {MAX_TABLE_ENTRIES}, found "
                "none"
            )
        guid = reader.take(16, "guid")
        offset, length = reader.little(4, "offset"), reader.little(4, "length")
        if not any(guid) and not offset and not length:
            break
        entries.append((guid, offset, length))
    found: list[tuple[str, bytes]] = []
    for guid, offset, length in entries:
        if offset < reader.position or offset + length > len(data) or not length:
            raise SnpCertificateTableMalformed(
                f"cert_table: expected a certificate between {reader.position} and {len(data)}, "
                f"found {length} bytes at {offset}"
            )
        role = _TABLE_ROLES.get(guid) or str(uuid.UUID(bytes=guid))
        found.append((role, data[offset : offset + length]))
    return tuple(found)
