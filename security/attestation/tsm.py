"""Collects SEV-SNP reports and TDX quotes from Linux's configfs-tsm.

The interface is Documentation/ABI/testing/configfs-tsm-report of the kernel: a directory made
under ``/sys/kernel/config/tsm/report`` is a report instance; 64 bytes written to its ``inblob``
come back signed in ``outblob``.

Whoever may write to the instance could change what is signed between our write and our read. Two
things keep that out: the name of the instance cannot be guessed, and ``generation``, which grows
by one with every write, must have grown by exactly our own writes when the report has been read.
What is not ours is thrown away and asked for again in a new instance. The check is needed even
where nobody else writes: configfs hands ``inblob`` over when the file is closed and drops the
error, so a write that was refused (EBUSY) shows only there.
"""

from __future__ import annotations

import errno
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from security.attestation.evidence import (
    REPORT_DATA_BYTES,
    Evidence,
    encode_parts,
)
from security.errors import (
    TsmBusy,
    TsmConflict,
    TsmFailed,
    TsmPrivilegeLevelRefused,
    TsmProviderUnknown,
    TsmReportTooLarge,
    TsmServiceProviderRefused,
    TsmUnavailable,
)

__all__ = ["ACPI_TABLES", "KINDS", "REPORTS", "ReportFiles", "TsmCollector"]

REPORTS = Path("/sys/kernel/config/tsm/report")
"""Where the kernel has its report instances."""

ACPI_TABLES = Path("/sys/firmware/acpi/tables")
"""Where the kernel shows ACPI tables: CCEL, and the event log that it points at in data/CCEL."""

KINDS = {"sev_guest": "sev-snp", "tdx_guest": "tdx"}
"""Kind of evidence by the kernel's `provider`."""

MAX_PRIVILEGE_LEVEL = 3
"""TSM_REPORT_PRIVLEVEL_MAX."""

MAX_REPORT_BYTES = 64 << 10
"""Longest outblob or auxblob; the kernel's own TSM_REPORT_OUTBLOB_MAX was 32 KiB."""

MAX_EVENT_LOG_BYTES = 512 << 10
ATTEMPTS = 4
_PAUSE_S = 0.02
_MAX_TEXT_BYTES = 4096
_GENERATIONS = 1 << (8 * 8)
_BUSY = frozenset({errno.EBUSY, errno.EAGAIN, errno.EINTR, errno.ETIMEDOUT, errno.EEXIST})
_ABSENT = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ENXIO, errno.ENODEV})
_FORBIDDEN = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})


class ReportFiles(Protocol):
    """The four things that are done to configfs; each raises OSError as the kernel does."""

    def mkdir(self, path: Path) -> None:
        """Makes a report instance."""

    def rmdir(self, path: Path) -> None:
        """Ends a report instance."""

    def read(self, path: Path, limit: int) -> bytes:
        """An attribute's bytes; more than `limit` of them raise EFBIG."""

    def write(self, path: Path, data: bytes) -> None:
        """Writes an attribute in one piece."""


class KernelFiles:
    """The four things on a mounted file system."""

    def mkdir(self, path: Path) -> None:
        """Makes a report instance that only this user reaches."""
        path.mkdir(mode=0o700)

    def rmdir(self, path: Path) -> None:
        """Ends a report instance."""
        path.rmdir()

    def read(self, path: Path, limit: int) -> bytes:
        """Reads to the end, at most `limit` bytes."""
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            content = bytearray()
            while piece := os.read(descriptor, limit + 1 - len(content)):
                content += piece
                if len(content) > limit:
                    raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), str(path))
            return bytes(content)
        finally:
            os.close(descriptor)

    def write(self, path: Path, data: bytes) -> None:
        """Writes with one call, so that the kernel sees one write."""
        descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            written = os.write(descriptor, data)
        finally:
            os.close(descriptor)
        if written != len(data):
            raise OSError(errno.EIO, f"expected {len(data)} bytes written, found {written}")


@dataclass(frozen=True, slots=True)
class TsmCollector:
    """Makes evidence of the machine that this process runs on.

    Attributes:
        kind: "sev-snp" or "tdx", as the kernel's provider says.
        reports: configfs directory of the report instances.
        acpi_tables: directory of the ACPI tables.
        privilege_level: VMPL to report for (0 to 3); None for the least that the kernel admits.
        files: how files are reached.
    """

    kind: str
    reports: Path = REPORTS
    acpi_tables: Path = ACPI_TABLES
    privilege_level: int | None = None
    files: ReportFiles = field(default_factory=KernelFiles)

    @classmethod
    def detect(
        cls,
        reports: Path = REPORTS,
        acpi_tables: Path = ACPI_TABLES,
        *,
        privilege_level: int | None = None,
        service_provider: str = "",
        files: ReportFiles | None = None,
    ) -> TsmCollector:
        """Asks the kernel which kind of report it makes.

        Args:
            reports: configfs directory of the report instances.
            acpi_tables: directory of the ACPI tables.
            privilege_level: VMPL to report for (0 to 3); None for the least that is admitted.
            service_provider: anything but "" is refused.
            files: how files are reached; the file system if not given.

        Raises:
            TsmUnavailable: no configfs-tsm here, or no right to it.
            TsmProviderUnknown: reports of a kind that nothing here verifies.
            TsmPrivilegeLevelRefused: a level outside 0 to 3.
            TsmServiceProviderRefused: a service provider was asked for.
            TsmBusy, TsmFailed
        """
        if privilege_level is not None and not 0 <= privilege_level <= MAX_PRIVILEGE_LEVEL:
            raise TsmPrivilegeLevelRefused(
                f"privilege level: expected 0 to {MAX_PRIVILEGE_LEVEL}, found {privilege_level}"
            )
        if service_provider:
            # An SVSM's report signs a digest of nonce and manifest (AMD 58019, section 7), not the
            # report data; nothing here appraises that.
            raise TsmServiceProviderRefused(
                f"service provider: expected none, found {service_provider[:64]!r}; its reports "
                "sign other data than the caller's"
            )
        found = cls("", reports, acpi_tables, privilege_level, files or KernelFiles())
        with found._explained(), found._instance() as instance:
            kind = found._kind_of(instance)
        return cls(kind, reports, acpi_tables, privilege_level, found.files)

    def collect(self, report_data: bytes) -> Evidence:
        """Evidence over the report data (64 bytes), in the parts that the kind's verifier takes.

        Raises:
            TsmConflict: others kept writing to our instances.
            TsmBusy: the platform kept saying that it is busy.
            TsmReportTooLarge: longer than the kernel or we admit.
            TsmUnavailable, TsmProviderUnknown, TsmPrivilegeLevelRefused, TsmFailed
        """
        return Evidence(self.kind, encode_parts(self.collect_parts(report_data)))

    def collect_parts(self, report_data: bytes) -> dict[str, bytes]:
        """The same, not joined: "report" and "certificates", or "quote" and the event log."""
        if len(report_data) != REPORT_DATA_BYTES:
            raise ValueError(
                f"report data: expected {REPORT_DATA_BYTES} bytes, found {len(report_data)}"
            )
        last: OSError | TsmConflict | None = None
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(_PAUSE_S * 2**attempt)
            try:
                with self._explained():
                    report, auxiliary = self._ask(report_data)
            except TsmConflict as conflict:
                last = conflict
                continue
            except TsmBusy as busy:
                last = busy.cause
                continue
            return self._parts(report, auxiliary)
        if isinstance(last, TsmConflict):
            raise last
        assert last is not None
        raise TsmBusy(last, f"{self.reports}: expected a report within {ATTEMPTS} attempts, found")

    def _ask(self, report_data: bytes) -> tuple[bytes, bytes]:
        with self._instance() as instance:
            if self._kind_of(instance) != self.kind:
                raise TsmProviderUnknown(
                    f"{self.reports}: expected the provider of {self.kind}, as before, found "
                    "another; start again"
                )
            before = self._generation(instance)
            writes = self._set_privilege_level(instance)
            self.files.write(instance / "inblob", report_data)
            writes += 1
            report = self.files.read(instance / "outblob", MAX_REPORT_BYTES)
            auxiliary = self._optional(instance / "auxblob", MAX_REPORT_BYTES)
            after = self._generation(instance)
        if (after - before) % _GENERATIONS != writes:
            raise TsmConflict(
                f"{self.reports}: expected generation {before + writes} after our own writes, "
                f"found {after}; somebody else writes to report instances"
            )
        if not report:
            raise TsmFailed(f"{self.reports}: expected a report, found an empty outblob")
        return report, auxiliary

    def _parts(self, report: bytes, auxiliary: bytes) -> dict[str, bytes]:
        if self.kind == "sev-snp":
            return {"report": report, **({"certificates": auxiliary} if auxiliary else {})}
        parts = {"quote": report}
        for name, path in (("event_log", "data/CCEL"), ("event_table", "CCEL")):
            content = self._table(self.acpi_tables / path)
            if content:
                parts[name] = content
        return parts

    def _table(self, path: Path) -> bytes:
        """An ACPI table, or the log of firmware and kernel; b"" where there is none."""
        try:
            return KernelFiles().read(path, MAX_EVENT_LOG_BYTES)
        except FileNotFoundError:
            return b""
        except OSError as error:
            raise TsmFailed(f"{path}: expected a readable table, found {error}") from None

    def _set_privilege_level(self, instance: Path) -> int:
        """Asks for the privilege level; returns how many writes that took."""
        text = self._optional(instance / "privlevel_floor", _MAX_TEXT_BYTES)
        if not text:
            if self.privilege_level is None:
                return 0
            raise TsmPrivilegeLevelRefused(
                f"{self.reports}: expected a provider with privilege levels, found none; leave "
                "the level out"
            )
        floor = self._number(text, "privlevel_floor")
        wanted = floor if self.privilege_level is None else self.privilege_level
        if not floor <= wanted <= MAX_PRIVILEGE_LEVEL:
            raise TsmPrivilegeLevelRefused(
                f"privilege level: expected {floor} to {MAX_PRIVILEGE_LEVEL}, as the kernel "
                f"admits, found {wanted}"
            )
        if self.privilege_level is None and floor == 0:
            return 0
        self.files.write(instance / "privlevel", str(wanted).encode("ascii"))
        return 1

    def _kind_of(self, instance: Path) -> str:
        raw = self.files.read(instance / "provider", _MAX_TEXT_BYTES)
        provider = raw.decode("ascii", "replace").strip()
        if provider not in KINDS:
            raise TsmProviderUnknown(
                f"{self.reports}: expected provider {' or '.join(KINDS)}, found {provider[:64]!r}"
            )
        return KINDS[provider]

    def _generation(self, instance: Path) -> int:
        return self._number(self.files.read(instance / "generation", _MAX_TEXT_BYTES), "generation")

    def _number(self, text: bytes, name: str) -> int:
        digits = text.strip()
        if not digits.isdigit() or len(digits) > 20:
            raise TsmFailed(f"{self.reports}: expected a number in {name}, found {text[:32]!r}")
        return int(digits)

    def _optional(self, path: Path, limit: int) -> bytes:
        """An attribute that a provider may not show."""
        try:
            return self.files.read(path, limit)
        except FileNotFoundError:
            return b""

    @contextmanager
    def _instance(self) -> Iterator[Path]:
        """A report instance of our own, ended whatever happens."""
        path = self.reports / f"bulkhead-{secrets.token_hex(16)}"
        self.files.mkdir(path)
        try:
            yield path
        except BaseException:
            # What went wrong first is what the caller must hear.
            with suppress(OSError):
                self.files.rmdir(path)
            raise
        self.files.rmdir(path)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turns the kernel's error numbers into errors with names."""
        try:
            yield
        except OSError as error:
            raise self._named(error) from None

    def _named(self, error: OSError) -> Exception:
        where = f"{error.filename or self.reports}"
        if error.errno in _BUSY:
            return TsmBusy(error, f"{where}: expected a report, found")
        if error.errno == errno.EFBIG:
            return TsmReportTooLarge(
                f"{where}: expected at most {MAX_REPORT_BYTES} bytes and what the kernel admits, "
                "found more (EFBIG); kernel and security module do not fit together"
            )
        if error.errno in _ABSENT:
            return TsmUnavailable(
                f"{where}: expected configfs-tsm (Linux 6.7 or later, in a confidential VM, with "
                f"configfs mounted), found {error.strerror}"
            )
        if error.errno in _FORBIDDEN:
            return TsmUnavailable(
                f"{where}: expected the right to make report instances, found {error.strerror}; "
                "only root has it"
            )
        return TsmFailed(f"{where}: expected a report, found {error.strerror}")
