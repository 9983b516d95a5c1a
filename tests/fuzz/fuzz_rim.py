"""Fuzzes reference manifests: XML, signatures, and payloads that are signed for the occasion.

    python -m tests.fuzz.fuzz_rim -runs=1000000 /tmp/corpus

`--seeds DIRECTORY` writes a small corpus of manifests made from nothing and ends.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "security"))

if __name__ == "__main__":
    import atheris

    with atheris.instrument_imports(include=["security", "signxml"]):
        import security.attestation.rim  # noqa: F401

from nvidia_machine import DRIVER, NOW, Manifest, authorities, digest

from security.attestation.rim import read_heading, verify_rim
from security.errors import SecurityError

ROOTS = authorities().rim_roots
MANIFEST = Manifest(DRIVER, {7: [digest("seven")], 9: [digest("nine"), digest("IX")]})
SIGNED = MANIFEST.signed()
MEASUREMENTS = {7: (digest("seven"),), 9: (digest("nine"), digest("IX"))}


def one_input(data: bytes) -> None:
    """Only named errors may come out, and nothing that the signer has not signed.

    Where the first byte is odd, the others replace a piece of a good manifest: at the offset of
    the next two bytes, as many octets as there are.
    """
    if not data:
        return
    xml = data[1:]
    if data[0] & 1:
        offset = int.from_bytes(data[1:3], "big") % len(SIGNED)
        xml = SIGNED[:offset] + data[3:] + SIGNED[offset + len(data[3:]) :]
    try:
        read_heading(xml)
        found = verify_rim(xml, ROOTS, (), NOW, "RIM x")
    except SecurityError:
        return
    assert dict(found.measurements) == MEASUREMENTS, "a manifest that nobody signed"


def write_seeds(directory: Path) -> None:
    """Writes valid and nearly valid inputs, about 20 kB."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "signed").write_bytes(b"\0" + SIGNED)
    (directory / "unsigned").write_bytes(b"\0" + MANIFEST.document().encode())
    for word in (b"SignedInfo", b"Reference", b"X509Certificate", b"Payload", b"index", b"Hash0"):
        offset = SIGNED.index(word).to_bytes(2, "big")
        (directory / word.decode()).write_bytes(b"\1" + offset + word)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--seeds"]:
        write_seeds(Path(sys.argv[2]))
    else:
        atheris.Setup(sys.argv, one_input)
        atheris.Fuzz()
