"""Reads files and directories from an operator: bounded, regular files only, no links out.

What is in the files is not trusted; what is guarded here is this process: a device, a pipe, a huge
file, a directory of a million names, a link to somebody's private key.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from security.attestation.collateral import Collateral
from security.errors import FileUnusable

__all__ = ["DocumentDirectory", "certificates_in", "read_collateral", "read_file"]

MAX_FILES = 512
MAX_FILE_BYTES = 4 << 20
MAX_TOTAL_BYTES = 64 << 20
MAX_PEM_BLOCKS = 256
COLLATERAL_SUFFIXES = frozenset({".der", ".crt", ".cer", ".pem", ".crl", ".xml", ".json", ".jwks"})
"""What a collateral directory is read for; other names are left alone."""

COLLATERAL_FOLDERS = ("roots", "crls", "rims", "tdx")
"""Directories inside a collateral directory that are read too."""

_PEM = re.compile(
    rb"-----BEGIN (CERTIFICATE|X509 CRL)-----([A-Za-z0-9+/=\s]{1,262144})-----END \1-----"
)
_SEQUENCE = 0x30
_EXPLICIT_VERSION = 0xA0


def read_file(path: Path, limit: int = MAX_FILE_BYTES) -> bytes:
    """A regular file's bytes.

    Raises:
        FileUnusable: missing, no regular file, longer than `limit`, unreadable.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        raise FileUnusable(f"{path}: expected a readable file, found {error.strerror}") from None
    # Before Python wraps it, which fails for a directory.
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise FileUnusable(f"{path}: expected a regular file, found another thing")
    with os.fdopen(descriptor, "rb") as file:
        try:
            content = file.read(limit + 1)
        except OSError as error:
            raise FileUnusable(f"{path}: expected a readable file, found {error}") from None
    if len(content) > limit:
        raise FileUnusable(f"{path}: expected at most {limit} bytes, found more")
    return content


@dataclass(frozen=True, slots=True)
class DocumentDirectory:
    """A directory whose files are read only if they lie inside it.

    Attributes:
        path: the directory, without links.
        names: of its files, in order, relative to it.
    """

    path: Path
    names: tuple[str, ...]

    @classmethod
    def open(cls, path: Path, folders: tuple[str, ...] = ()) -> DocumentDirectory:
        """Lists a directory, and those of `folders` that are in it.

        Raises:
            FileUnusable: no directory, or too many files in it.
        """
        try:
            real = path.resolve(strict=True)
            names = [entry.name for entry in _entries(real) if entry.is_file()]
            for folder in folders:
                inner = real / folder
                # A folder that is a link could lead anywhere.
                if inner.is_dir() and not inner.is_symlink():
                    names += [f"{folder}/{entry.name}" for entry in _entries(inner)]
        except OSError as error:
            raise FileUnusable(
                f"{path}: expected a readable directory, found {error.strerror}"
            ) from None
        return cls(real, tuple(sorted(names)))

    def read(self, name: str, limit: int = MAX_FILE_BYTES) -> bytes:
        """A file of the directory.

        Raises:
            FileUnusable: as `read_file`; or a link to a file outside.
        """
        try:
            real = (self.path / name).resolve(strict=True)
        except OSError as error:
            raise FileUnusable(
                f"{self.path / name}: expected a readable file, found {error.strerror}"
            ) from None
        if not real.is_relative_to(self.path):
            raise FileUnusable(
                f"{self.path / name}: expected a file inside {self.path}, found a link out of it"
            )
        return read_file(real, limit)

    def signature(self) -> tuple[tuple[str, int, int], ...]:
        """Name, time of change (ns) and size of each file: another one where something changed."""
        found = []
        for name in self.names:
            try:
                status = (self.path / name).stat()
            except OSError:
                found.append((name, -1, -1))
            else:
                found.append((name, status.st_mtime_ns, status.st_size))
        return tuple(found)


def _entries(path: Path) -> list[os.DirEntry[str]]:
    found: list[os.DirEntry[str]] = []
    with os.scandir(path) as entries:
        for entry in entries:
            found.append(entry)
            if len(found) > MAX_FILES:
                raise FileUnusable(f"{path}: expected at most {MAX_FILES} files, found more")
    return found


def read_collateral(directory: DocumentDirectory) -> Collateral:
    """Every vendor document of a directory, told apart by what it is, not by its name.

    Raises:
        FileUnusable: a file that cannot be read, or more bytes than 64 MiB altogether.
    """
    found = Collateral()
    total = 0
    for name in directory.names:
        if Path(name).suffix.lower() not in COLLATERAL_SUFFIXES:
            continue
        data = directory.read(name)
        total += len(data)
        if total > MAX_TOTAL_BYTES:
            raise FileUnusable(
                f"{directory.path}: expected at most {MAX_TOTAL_BYTES} bytes of documents, "
                "found more"
            )
        found = found.with_more(read_document(name, data))
    return found


def read_document(name: str, data: bytes) -> Collateral:
    """One vendor document as collateral; empty where it is none."""
    head = data[:4096].lstrip()
    suffix = Path(name).suffix.lower()
    if suffix == ".xml":
        return Collateral(rims=((name, data),))
    if head[:1] == b"{":
        if b'"keys"' in data:
            return Collateral(jwks=(data,))
        return Collateral(tdx=(data,)) if b'"tcb_info"' in data else Collateral()
    certificates: list[bytes] = []
    crls: list[bytes] = []
    for der in _blocks(data):
        (certificates if _is_certificate(der) else crls).append(der)
    return Collateral(certificates=tuple(certificates), crls=tuple(crls))


def certificates_in(data: bytes) -> tuple[bytes, ...]:
    """The certificates (DER) of a DER or PEM file, in order."""
    return tuple(der for der in _blocks(data) if _is_certificate(der))


def _blocks(data: bytes) -> list[bytes]:
    if data[:1] == bytes([_SEQUENCE]):
        return [data]
    found: list[bytes] = []
    for match in _PEM.finditer(data):
        if len(found) == MAX_PEM_BLOCKS:
            break
        try:
            found.append(base64.b64decode(b"".join(match[2].split()), validate=True))
        except binascii.Error:
            continue
    return found


def _is_certificate(der: bytes) -> bool:
    """Whether it is an X.509 certificate of version 3, and no revocation list.

    The first field of a TBSCertificate is its version, [0] EXPLICIT; a TBSCertList has a plain
    INTEGER there (RFC 5280, 4.1 and 5.1).
    """
    position = 0
    for _ in range(2):
        if len(der) < position + 2 or der[position] != _SEQUENCE:
            return False
        length = der[position + 1]
        position += 2 + (length & 0x7F if length & 0x80 else 0)
    return len(der) > position and der[position] == _EXPLICIT_VERSION
