"""The collector against a kernel that behaves as documented, and misbehaves as documented."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from pathlib import Path

import pytest
from tsm_mount import mounted, needs_mount
from tsm_stand_in import OUTBLOB_MAX, Instance, MemoryFiles, TsmKernel, our_instances

from security.attestation.evidence import decode_parts
from security.attestation.tsm import ATTEMPTS, TsmCollector
from security.errors import (
    CollectionError,
    TsmBusy,
    TsmConflict,
    TsmFailed,
    TsmPrivilegeLevelRefused,
    TsmProviderUnknown,
    TsmReportTooLarge,
    TsmServiceProviderRefused,
    TsmUnavailable,
)

REPORTS = Path("/sys/kernel/config/tsm/report")
DATA = hashlib.sha512(b"data").digest()


def sign(report_data: bytes, level: int) -> tuple[bytes, bytes]:
    return b"report %d " % level + report_data, b"certificates"


def in_memory(kernel: TsmKernel, **changes: object) -> TsmCollector:
    return TsmCollector.detect(REPORTS, files=MemoryFiles(kernel, REPORTS), **changes)  # type: ignore[arg-type]


def no_log(tmp_path: Path) -> Path:
    return tmp_path / "no-acpi"


def test_snp(tmp_path: Path) -> None:
    kernel = TsmKernel(sign)
    collector = in_memory(kernel)
    assert collector.kind == "sev-snp"
    evidence = collector.collect(DATA)
    assert evidence.kind == "sev-snp"
    assert decode_parts(evidence.body) == {
        "report": b"report 0 " + DATA,
        "certificates": b"certificates",
    }
    assert kernel.instances == {}
    assert len(our_instances(kernel)) == 2
    assert ("write", "inblob", DATA) in kernel.log
    assert not any(name == "service_provider" for _, name, _ in kernel.log)


def test_no_certificates() -> None:
    kernel = TsmKernel(lambda data, level: (b"report", b""))
    assert set(in_memory(kernel).collect_parts(DATA)) == {"report"}


def test_tdx_with_event_log(tmp_path: Path) -> None:
    kernel = TsmKernel(lambda data, level: (b"quote", b""), provider="tdx_guest", floor=None)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "CCEL").write_bytes(b"events")
    (tmp_path / "CCEL").write_bytes(b"table")
    collector = in_memory(kernel, acpi_tables=tmp_path)
    assert collector.kind == "tdx"
    assert collector.collect_parts(DATA) == {
        "quote": b"quote",
        "event_log": b"events",
        "event_table": b"table",
    }
    without = in_memory(kernel, acpi_tables=no_log(tmp_path))
    assert set(without.collect_parts(DATA)) == {"quote"}


@pytest.mark.parametrize("size", [0, 63, 65])
def test_report_data_of_64_bytes_only(size: int) -> None:
    kernel = TsmKernel(sign)
    with pytest.raises(ValueError, match="64 bytes"):
        in_memory(kernel).collect(bytes(size))
    assert not any(operation == "write" for operation, _, _ in kernel.log)


def test_another_writer_once() -> None:
    """A report over somebody else's data is thrown away and made again."""
    evil = [True]

    def interfere(instance: Instance, attribute: str) -> None:
        if attribute == "outblob" and evil:
            evil.pop()
            instance.inblob = b"e" * 64
            instance.write_generation += 1

    kernel = TsmKernel(sign, interfere=interfere)
    assert in_memory(kernel).collect_parts(DATA)["report"].endswith(DATA)
    assert kernel.instances == {}


def test_another_writer_for_ever() -> None:
    def interfere(instance: Instance, attribute: str) -> None:
        if attribute == "outblob":
            instance.write_generation += 1

    kernel = TsmKernel(sign, interfere=interfere)
    collector = in_memory(kernel)
    with pytest.raises(TsmConflict) as refused:
        collector.collect(DATA)
    assert refused.value.code == "tsm_conflict"
    assert len(our_instances(kernel)) == 1 + ATTEMPTS
    assert kernel.instances == {}


def test_write_that_the_kernel_dropped() -> None:
    """EBUSY on inblob is lost in configfs; the generation shows it."""

    def interfere(instance: Instance, attribute: str) -> None:
        if attribute == "generation" and not instance.inblob:
            instance.read_generation = (instance.write_generation + 1) % 2**64
            instance.inblob = b"old" * 20

    with pytest.raises(TsmConflict):
        in_memory(TsmKernel(sign, interfere=interfere)).collect(DATA)


def test_generation_wraps() -> None:
    def interfere(instance: Instance, attribute: str) -> None:
        if attribute == "generation" and not instance.inblob:
            instance.write_generation = instance.read_generation = 2**64 - 1

    kernel = TsmKernel(sign, interfere=interfere)
    assert in_memory(kernel).collect_parts(DATA)["report"].endswith(DATA)


@pytest.mark.parametrize("number", [errno.EBUSY, errno.EAGAIN, errno.ETIMEDOUT])
@pytest.mark.parametrize(
    "where", [("read", "outblob"), ("read", "auxblob"), ("write", "inblob"), ("mkdir", "")]
)
def test_busy(number: int, where: tuple[str, str]) -> None:
    kernel = TsmKernel(sign)
    collector = in_memory(kernel)
    kernel.failures = {where: [number]}
    assert collector.collect_parts(DATA)["report"].endswith(DATA)
    kernel.failures = {where: [number] * ATTEMPTS}
    with pytest.raises(TsmBusy) as refused:
        collector.collect(DATA)
    assert refused.value.code == "tsm_busy"
    assert kernel.instances == {}


def test_guessed_name() -> None:
    kernel = TsmKernel(sign)
    collector = in_memory(kernel)
    kernel.failures = {("mkdir", ""): [errno.EEXIST]}
    assert collector.collect_parts(DATA)["report"].endswith(DATA)


@pytest.mark.parametrize("attribute", ["outblob", "auxblob"])
def test_too_large(attribute: str) -> None:
    long = bytes(OUTBLOB_MAX + 1)
    kernel = TsmKernel(
        lambda data, level: (long, b"") if attribute == "outblob" else (b"report", long)
    )
    with pytest.raises(TsmReportTooLarge) as refused:
        in_memory(kernel).collect(DATA)
    assert refused.value.code == "tsm_report_too_large"
    assert kernel.instances == {}


def test_empty_report() -> None:
    kernel = TsmKernel(lambda data, level: (b"", b""))
    with pytest.raises(TsmFailed, match="empty"):
        in_memory(kernel).collect(DATA)


@pytest.mark.parametrize("number", [errno.EIO, errno.EINVAL, errno.ENOMEM])
def test_other_failures(number: int) -> None:
    kernel = TsmKernel(sign)
    collector = in_memory(kernel)
    kernel.failures = {("read", "outblob"): [number]}
    with pytest.raises(TsmFailed) as refused:
        collector.collect(DATA)
    assert refused.value.code == "tsm_failed"
    assert kernel.instances == {}


def test_provider() -> None:
    with pytest.raises(TsmProviderUnknown, match="arm_cca_guest") as refused:
        in_memory(TsmKernel(sign, provider="arm_cca_guest"))
    assert refused.value.code == "tsm_provider_unknown"
    kernel = TsmKernel(sign)
    collector = in_memory(kernel)
    kernel.provider = "tdx_guest"
    with pytest.raises(TsmProviderUnknown, match="as before"):
        collector.collect(DATA)
    assert kernel.instances == {}


@pytest.mark.parametrize(
    ("number", "word"), [(errno.ENOENT, "6.7"), (errno.ENXIO, "6.7"), (errno.EACCES, "right")]
)
def test_unavailable(number: int, word: str) -> None:
    kernel = TsmKernel(sign, failures={("mkdir", ""): [number]})
    with pytest.raises(TsmUnavailable, match=word) as refused:
        in_memory(kernel)
    assert refused.value.code == "tsm_unavailable"


def test_no_provider_and_no_configfs(tmp_path: Path) -> None:
    with pytest.raises(TsmUnavailable):
        in_memory(TsmKernel(sign, provider=""))
    with pytest.raises(TsmUnavailable):
        TsmCollector.detect(tmp_path / "absent")


def test_privilege_level() -> None:
    kernel = TsmKernel(sign)
    assert in_memory(kernel, privilege_level=2).collect_parts(DATA)["report"] == (
        b"report 2 " + DATA
    )
    assert ("write", "privlevel", b"2") in kernel.log
    # Under an SVSM the kernel admits no report for VMPL 0; the least admitted one is asked for.
    assert in_memory(TsmKernel(sign, floor=2)).collect_parts(DATA)["report"] == (
        b"report 2 " + DATA
    )


@pytest.mark.parametrize("level", [-1, 0, 4])
def test_privilege_level_refused(level: int) -> None:
    kernel = TsmKernel(sign, floor=1)
    with pytest.raises(TsmPrivilegeLevelRefused) as refused:
        in_memory(kernel, privilege_level=level).collect(DATA)
    assert refused.value.code == "tsm_privilege_level_refused"


def test_privilege_level_of_a_provider_without() -> None:
    kernel = TsmKernel(sign, provider="tdx_guest", floor=None)
    with pytest.raises(TsmPrivilegeLevelRefused, match="with privilege levels"):
        in_memory(kernel, privilege_level=0).collect(DATA)


def test_service_provider() -> None:
    kernel = TsmKernel(sign)
    with pytest.raises(TsmServiceProviderRefused) as refused:
        in_memory(kernel, service_provider="svsm")
    assert refused.value.code == "tsm_service_provider_refused"
    assert kernel.log == []


def test_rmdir_that_fails() -> None:
    kernel = TsmKernel(sign)
    collector = in_memory(kernel)
    kernel.failures = {("rmdir", ""): [errno.EIO], ("read", "outblob"): [errno.EFBIG]}
    with pytest.raises(TsmReportTooLarge):
        collector.collect(DATA)
    kernel.failures = {("rmdir", ""): [errno.EIO]}
    with pytest.raises(TsmFailed):
        collector.collect(DATA)


# -- as a file system ------------------------------------------------------------------------------


@needs_mount
def test_mounted(tmp_path: Path) -> None:
    kernel = TsmKernel(sign)
    with mounted(kernel, tmp_path / "tsm") as reports:
        collector = TsmCollector.detect(reports, no_log(tmp_path), privilege_level=1)
        assert collector.collect_parts(DATA)["report"] == b"report 1 " + DATA
        assert os.listdir(reports) == []


@needs_mount
def test_mounted_errors(tmp_path: Path) -> None:
    long = bytes(OUTBLOB_MAX + 1)
    kernel = TsmKernel(lambda data, level: (long, b""))
    with mounted(kernel, tmp_path / "tsm") as reports:
        collector = TsmCollector.detect(reports)
        with pytest.raises(TsmReportTooLarge):
            collector.collect(DATA)
        kernel.sign = sign
        kernel.failures = {("read", "outblob"): [errno.EBUSY, errno.EAGAIN]}
        assert collector.collect_parts(DATA)["report"].endswith(DATA)
        kernel.provider = ""
        with pytest.raises(TsmUnavailable):
            collector.collect(DATA)
        assert kernel.instances == {}


@needs_mount
def test_mounted_writers(tmp_path: Path) -> None:
    """Collectors and a process that writes into every instance it sees, all at once.

    Whatever is returned is over the caller's data; the rest is refused by name.
    """
    kernel = TsmKernel(sign)
    stop = threading.Event()

    def disturb(reports: Path) -> None:
        while not stop.is_set():
            for name in os.listdir(reports):
                try:
                    (reports / name / "inblob").write_bytes(b"e" * 64)
                except OSError:
                    continue

    outcomes: list[str] = []

    def collect(reports: Path, number: int) -> None:
        data = hashlib.sha512(b"%d" % number).digest()
        for _ in range(8):
            try:
                report = TsmCollector.detect(reports).collect_parts(data)["report"]
            except CollectionError as error:
                outcomes.append(error.code)
            else:
                outcomes.append("ours" if report == b"report 0 " + data else "other")

    with mounted(kernel, tmp_path / "tsm") as reports:
        disturber = threading.Thread(target=disturb, args=(reports,))
        collectors = [threading.Thread(target=collect, args=(reports, i)) for i in range(4)]
        disturber.start()
        for thread in collectors:
            thread.start()
        for thread in collectors:
            thread.join(60)
        stop.set()
        disturber.join(5)
        assert kernel.instances == {}
    assert len(outcomes) == 32
    assert set(outcomes) <= {"ours", "tsm_conflict"}
