"""A kernel with configfs-tsm, for machines without one.

`TsmKernel` behaves as drivers/virt/coco/guest/report.c does, error numbers included: reports are
made when they are read, `generation` counts writes, a report instance that was written to too
often answers EBUSY. It is reached in memory (`MemoryFiles`) or, as on a real machine, through a
mounted file system (`mounted`), which any process can use.
"""

from __future__ import annotations

import errno
import os
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ULONG = 1 << 64
INBLOB_MAX = 64
OUTBLOB_MAX = 32 << 10
Sign = Callable[[bytes, int], tuple[bytes, bytes]]
"""Report data and privilege level to outblob and auxblob."""

BINARY = frozenset({"inblob", "outblob", "auxblob", "manifestblob"})


def failed(number: int) -> OSError:
    return OSError(number, os.strerror(number))


@dataclass
class Instance:
    inblob: bytes = b""
    privilege_level: int = 0
    write_generation: int = 0
    read_generation: int = 0
    report: tuple[bytes, bytes] | None = None


@dataclass
class TsmKernel:
    """The state behind the file system; safe to use from threads.

    Attributes:
        sign: makes reports.
        provider: what the provider calls itself; "" for none.
        floor: least privilege level; None for a provider without levels.
        instances: report instances that exist.
        log: every call, as (operation, attribute or instance, bytes).
        failures: error numbers that come instead of an answer, by (operation, attribute); each
            is used up.
        interfere: called with instance and attribute before each read of an attribute, as another
            process would come in between.
    """

    sign: Sign
    provider: str = "sev_guest"
    floor: int | None = 0
    instances: dict[str, Instance] = field(default_factory=dict)
    log: list[tuple[str, str, bytes]] = field(default_factory=list)
    failures: dict[tuple[str, str], list[int]] = field(default_factory=dict)
    interfere: Callable[[Instance, str], None] = lambda instance, attribute: None
    lock: threading.RLock = field(default_factory=threading.RLock)

    def attributes(self) -> dict[str, int]:
        """Attribute to file mode, as this provider shows them."""
        found = {"inblob": 0o200, "outblob": 0o400, "generation": 0o400, "provider": 0o400}
        if self.provider == "sev_guest":
            found |= {"auxblob": 0o400, "manifestblob": 0o400, "service_provider": 0o200}
        if self.floor is not None:
            found |= {"privlevel": 0o200, "privlevel_floor": 0o400}
        return found

    def _fail(self, operation: str, name: str) -> None:
        waiting = self.failures.get((operation, name))
        if waiting:
            raise failed(waiting.pop(0))

    def _instance(self, name: str, attribute: str) -> Instance:
        if name not in self.instances or attribute not in self.attributes():
            raise failed(errno.ENOENT)
        return self.instances[name]

    def mkdir(self, name: str) -> None:
        with self.lock:
            self.log.append(("mkdir", name, b""))
            self._fail("mkdir", "")
            if not self.provider:
                raise failed(errno.ENXIO)
            if name in self.instances:
                raise failed(errno.EEXIST)
            self.instances[name] = Instance()

    def rmdir(self, name: str) -> None:
        with self.lock:
            self.log.append(("rmdir", name, b""))
            self._fail("rmdir", "")
            if self.instances.pop(name, None) is None:
                raise failed(errno.ENOENT)

    def read(self, name: str, attribute: str) -> bytes:
        with self.lock:
            self.log.append(("read", attribute, b""))
            instance = self._instance(name, attribute)
            self._fail("read", attribute)
            self.interfere(instance, attribute)
            if not self.provider:
                raise failed(errno.ENXIO)
            if attribute == "provider":
                return f"{self.provider}\n".encode()
            if attribute == "generation":
                return f"{instance.write_generation}\n".encode()
            if attribute == "privlevel_floor":
                return f"{self.floor}\n".encode()
            if attribute not in BINARY or attribute == "inblob":
                raise failed(errno.EACCES)
            if not instance.inblob:
                raise failed(errno.EINVAL)
            if instance.report is None or instance.read_generation != instance.write_generation:
                instance.report = self.sign(
                    instance.inblob.ljust(INBLOB_MAX, b"\0"), instance.privilege_level
                )
                instance.read_generation = instance.write_generation
            blob = {"outblob": instance.report[0], "auxblob": instance.report[1]}.get(
                attribute, b""
            )
            if len(blob) > OUTBLOB_MAX:
                raise failed(errno.EFBIG)
            return blob

    def write(self, name: str, attribute: str, data: bytes) -> None:
        with self.lock:
            self.log.append(("write", attribute, data))
            instance = self._instance(name, attribute)
            self._fail("write", attribute)
            if attribute == "inblob":
                if len(data) > INBLOB_MAX:
                    raise failed(errno.EFBIG)
                # configfs drops what the provider answers when the file is closed.
                if self._advance(instance):
                    instance.inblob = data
                return
            if attribute == "privlevel":
                text = data.decode().strip()
                if not text.isdecimal() or not (self.floor or 0) <= int(text) <= 3:
                    raise failed(errno.EINVAL)
            elif attribute != "service_provider":
                raise failed(errno.EACCES)
            if not self._advance(instance):
                raise failed(errno.EBUSY)
            if attribute == "privlevel":
                instance.privilege_level = int(data)

    @staticmethod
    def _advance(instance: Instance) -> bool:
        if instance.write_generation == (instance.read_generation - 1) % ULONG:
            return False
        instance.write_generation = (instance.write_generation + 1) % ULONG
        return True


@dataclass
class MemoryFiles:
    """`security.attestation.tsm.ReportFiles` without a file system under it."""

    kernel: TsmKernel
    reports: Path

    def _split(self, path: Path) -> tuple[str, str]:
        parts = path.relative_to(self.reports).parts if path.is_relative_to(self.reports) else ()
        if not 1 <= len(parts) <= 2:
            raise failed(errno.ENOENT)
        return parts[0], parts[1] if len(parts) == 2 else ""

    def mkdir(self, path: Path) -> None:
        self.kernel.mkdir(self._split(path)[0])

    def rmdir(self, path: Path) -> None:
        self.kernel.rmdir(self._split(path)[0])

    def read(self, path: Path, limit: int) -> bytes:
        content = self.kernel.read(*self._split(path))
        if len(content) > limit:
            raise failed(errno.EFBIG)
        return content

    def write(self, path: Path, data: bytes) -> None:
        self.kernel.write(*self._split(path), data)


def our_instances(kernel: TsmKernel) -> list[str]:
    """Names of instances that the collector made, which nobody could have guessed."""
    made = [name for operation, name, _ in kernel.log if operation == "mkdir"]
    assert all(re.fullmatch(r"bulkhead-[0-9a-f]{32}", name) for name in made)
    assert len(set(made)) == len(made)
    return made
