"""The cache is as large as the memory that is left allows, and takes it at once."""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from stage_chain import step
from stage_models import settings

import runtime
from runtime.stage import stage as stage_module
from runtime.stage.errors import InsufficientMemory, StageError, StepRefused
from runtime.stage.kv_cache import committed_zeros
from runtime.stage.memory import RESERVE_BYTES, affordable_blocks, available_bytes
from runtime.stage.native import stack
from runtime.stage.native.library import load_library
from runtime.stage.stage import StageRunner
from security.manifest import ModelFiles

MIB = 1 << 20
MEMINFO = "MemTotal:       16777216 kB\nMemFree:         1048576 kB\nMemAvailable:    4194304 kB\n"


class Machine:
    """A procfs and control groups, as files."""

    def __init__(self, directory: Path) -> None:
        self.proc = directory / "proc"
        self.groups = directory / "cgroup"
        self.write(self.proc / "meminfo", MEMINFO)
        self.enter("", "")

    def enter(self, cgroup: str, mountinfo: str) -> None:
        """Says in which groups this process is, and where they are mounted."""
        self.write(self.proc / "self" / "cgroup", cgroup)
        noise = "22 1 0:20 / /proc rw,relatime shared:1 - proc proc rw\n"
        self.write(self.proc / "self" / "mountinfo", noise + mountinfo.format(at=self.groups))

    def version_2(self, group: str, limit: str, usage: int, **more: str) -> None:
        directory = self.groups / group
        self.write(directory / "memory.max", f"{limit}\n")
        self.write(directory / "memory.current", f"{usage}\n")
        for name, content in more.items():
            self.write(directory / f"memory.{name}", f"{content}\n")

    def version_1(self, group: str, limit: int, usage: int, inactive: int) -> None:
        directory = self.groups / group
        self.write(directory / "memory.limit_in_bytes", f"{limit}\n")
        self.write(directory / "memory.usage_in_bytes", f"{usage}\n")
        self.write(
            directory / "memory.stat", f"inactive_file 1\ntotal_inactive_file {inactive}\nrss 7\n"
        )

    @staticmethod
    def write(path: Path, content: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)

    @property
    def available(self) -> int:
        return available_bytes(self.proc)


CGROUP_2 = "35 31 0:32 / {at} rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
CGROUP_1 = (
    "34 31 0:31 / {at}/cpu rw - cgroup cgroup rw,cpu,cpuacct\n"
    "35 31 0:32 / {at} rw,nosuid - cgroup cgroup rw,memory\n"
)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_without_groups_the_machine_decides(machine: Machine) -> None:
    assert machine.available == 4 << 30


def test_a_machine_that_does_not_say(machine: Machine) -> None:
    machine.write(machine.proc / "meminfo", "MemFree: 1 kB\n")
    with pytest.raises(StageError, match="expected a line MemAvailable"):
        machine.available  # noqa: B018 - it raises


def test_every_level_of_version_2_counts(machine: Machine) -> None:
    machine.enter("0::/kubepods/pod/container\n", CGROUP_2)
    machine.version_2("kubepods/pod/container", "max", 100 * MIB)
    assert machine.available == 4 << 30
    machine.version_2("kubepods/pod", f"{1024 * MIB}", 300 * MIB)
    assert machine.available == 724 * MIB
    machine.version_2("kubepods", f"{700 * MIB}", 600 * MIB)
    assert machine.available == 100 * MIB
    machine.version_2("kubepods/pod/container", f"{300 * MIB}", 250 * MIB)
    assert machine.available == 50 * MIB
    # A sibling's limit is nobody else's business.
    machine.version_2("kubepods/pod/other", f"{10 * MIB}", 10 * MIB)
    assert machine.available == 50 * MIB


def test_file_pages_are_given_back_and_a_soft_limit_is_one(machine: Machine) -> None:
    machine.enter("0::/unit\n", CGROUP_2)
    # Such as after reading a checkpoint: the group is full of its pages.
    statistics = f"anon {10 * MIB}\ninactive_file {800 * MIB}\nactive_file {5 * MIB}"
    machine.version_2("unit", f"{1000 * MIB}", 1000 * MIB, stat=statistics)
    assert machine.available == 800 * MIB
    machine.version_2("unit", f"{1000 * MIB}", 1000 * MIB, stat=statistics, high=f"{900 * MIB}")
    assert machine.available == 700 * MIB
    machine.version_2("unit", f"{1000 * MIB}", 1100 * MIB, stat="inactive_file 0")
    assert machine.available == 0


def test_version_1_and_its_hybrid_with_version_2(machine: Machine) -> None:
    unified = "36 31 0:38 / {at}/unified rw - cgroup2 cgroup2 rw\n"
    machine.enter("9:name=systemd:/\n4:memory:/jobs/one\n1:cpu:/\n0::/\n", CGROUP_1 + unified)
    machine.version_1("", 9223372036854771712, 8 << 30, 0)
    machine.version_1("jobs/one", 9223372036854771712, 1 << 30, 0)
    assert machine.available == 4 << 30
    machine.version_1("jobs", 1000 * MIB, 700 * MIB, 200 * MIB)
    assert machine.available == 500 * MIB


@pytest.mark.parametrize(
    ("group", "root"),
    [
        ("/docker/abc", "/docker/abc"),
        ("/docker/abc", "/docker/def"),
        ("/", "/"),
        ("/../other", "/"),
    ],
    ids=["mounted at its own group", "moved", "in a namespace", "outside the namespace"],
)
def test_a_container_sees_its_own_group_at_the_top(group: str, root: str, machine: Machine) -> None:
    machine.enter(f"0::{group}\n", CGROUP_2.replace(" / {at}", f" {root} {{at}}"))
    machine.version_2("", f"{512 * MIB}", 112 * MIB)
    assert machine.available == 400 * MIB


def test_this_machine_answers() -> None:
    assert 0 < available_bytes() < 1 << 50


@contextlib.contextmanager
def _group(limit: int) -> Iterator[Path]:
    """A control group of this machine with a limit; skips where none can be made."""
    tops = {
        "memory.max": Path("/sys/fs/cgroup"),
        "memory.limit_in_bytes": Path("/sys/fs/cgroup/memory"),
    }
    for name, top in tops.items():
        group = top / f"bulkhead-test-{os.getpid()}"
        with contextlib.suppress(OSError):
            group.mkdir()
        if not group.is_dir():
            continue
        try:
            # Where the controller is at work, the kernel has put its files there.
            if not (group / name).exists():
                continue
            (group / name).write_text(str(limit))
            yield group
            return
        finally:
            group.rmdir()
    pytest.skip("no control group can be made here")


def test_a_real_group_limits_and_sees_what_is_taken() -> None:
    """What a process has committed is gone for its neighbour in the same group."""
    limit = 300 * MIB
    script = textwrap.dedent(
        """
        import sys
        sys.path.insert(0, sys.argv[1])
        from pathlib import Path
        (Path(sys.argv[2]) / "cgroup.procs").write_text("0")
        from runtime.stage.memory import available_bytes
        print(available_bytes(), flush=True)
        taken = bytearray(b"x") * (100 << 20)
        print(available_bytes(), flush=True)
        """
    )
    source = str(Path(runtime.__file__ or "").parents[1])
    with _group(limit) as group:
        done = subprocess.run(
            [sys.executable, "-I", "-c", script, source, str(group)],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
    assert done.returncode == 0, done.stderr
    before, after = map(int, done.stdout.split())
    assert 0 < before <= limit
    assert 90 * MIB < before - after < 150 * MIB


def test_the_cache_is_there_at_once() -> None:
    before = _resident()
    kept = committed_zeros((64, MIB), torch.uint8)
    assert _resident() - before > 60 * MIB
    assert not kept.any()


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def test_as_many_blocks_as_planned_and_fit(caplog: pytest.LogCaptureFixture) -> None:
    wanted = settings(cache_blocks=100, block_size=16, max_context=256)
    caplog.set_level(logging.INFO)
    assert affordable_blocks(wanted, MIB, RESERVE_BYTES + 1000 * MIB) == 100
    assert "cache: 100 of 100 planned blocks" in caplog.text
    assert affordable_blocks(wanted, MIB, RESERVE_BYTES + 100 * MIB - 1) == 99
    assert "cache: 99 of 100 planned blocks, 99 MiB of the 356 MiB that are left" in caplog.text
    assert caplog.records[-1].levelname == "WARNING"
    # One sequence of 256 positions takes 16 blocks.
    assert affordable_blocks(wanted, MIB, RESERVE_BYTES + 16 * MIB) == 16


def test_less_than_one_sequence_is_refused() -> None:
    wanted = settings(cache_blocks=100, block_size=16, max_context=250)
    with pytest.raises(InsufficientMemory) as caught:
        affordable_blocks(wanted, MIB, RESERVE_BYTES + 16 * MIB - 1)
    assert str(caught.value) == (
        "cache: expected memory for 16 blocks (16 MiB), for one sequence of 256 positions, found "
        "room for 15: 272 MiB are left after loading, of which 256 MiB stay free; free memory on "
        "this machine, or plan with a shorter context or more stages"
    )
    with pytest.raises(InsufficientMemory, match="found room for 0: 0 MiB are left"):
        affordable_blocks(wanted, MIB, 0)


def test_every_rank_keeps_a_reserve() -> None:
    wanted = settings(cache_blocks=100, block_size=16, max_context=256, tp=2)
    assert affordable_blocks(wanted, MIB, 2 * RESERVE_BYTES + 50 * MIB) == 50


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_a_stage_has_what_fits_and_refuses_blocks_beyond(
    backend: str,
    checkpoint: Callable[[str], Path],
    open_files: Callable[[Path], ModelFiles],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if backend == "torch":
        monkeypatch.setattr(stack, "load_library", lambda: None)
    elif load_library() is None:
        pytest.skip("this processor has no AVX-512, or no compiler was installed")
    asked: list[int] = []

    def scarce(wanted: object, block_bytes: int) -> int:
        asked.append(block_bytes)
        return affordable_blocks(wanted, block_bytes, RESERVE_BYTES + 20 * block_bytes)

    monkeypatch.setattr(stage_module, "affordable_blocks", scarce)
    planned = settings(0, 3, block_size=16, cache_blocks=40)
    stage = StageRunner(open_files(checkpoint("qwen3")), planned)
    assert stage.backend == backend
    # Keys and values of 3 layers: 2 heads of 32 numbers.
    assert asked == [2 * 3 * 16 * 2 * 32 * 4]
    assert stage.cache_blocks == 20
    before = stage.forward(step(blocks=(19,)), token_ids=[5])
    with pytest.raises(StepRefused, match="expected blocks below 20"):
        stage.forward(step(blocks=(20,)), token_ids=[5])
    stage.reset()
    assert stage.forward(step(blocks=(0,)), token_ids=[5]).equal(before)
    stage.close()


def test_a_stage_without_room_for_a_cache_ends_what_it_started(
    checkpoint: Callable[[str], Path],
    open_files: Callable[[Path], ModelFiles],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    closed: list[StageRunner] = []
    close = StageRunner.close

    def noted(stage: StageRunner) -> None:
        closed.append(stage)
        close(stage)

    monkeypatch.setattr(StageRunner, "close", noted)
    monkeypatch.setattr(
        stage_module, "affordable_blocks", lambda wanted, size: affordable_blocks(wanted, size, 0)
    )
    with pytest.raises(InsufficientMemory):
        StageRunner(open_files(checkpoint("qwen3")), settings(0, 1))
    assert len(closed) == 1
