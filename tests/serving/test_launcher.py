"""The supervisor with real processes: daemons out of group and session, every way to end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from serving.processes import Process, descendants, read_process, send_signal

ROOT = Path(__file__).resolve().parents[2]

# Double-forks a daemon with a session of its own, and starts a plain child; then behaves as told.
CHILD = textwrap.dedent(
    """
    import os, signal, subprocess, sys, time
    from pathlib import Path
    from serving.launcher import follow_lifeline
    behaviour, pids = sys.argv[1], Path(sys.argv[2])
    follow_lifeline()
    SLEEP = [sys.executable, "-c",
             "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"]
    plain = subprocess.Popen(SLEEP)
    if os.fork() == 0:
        os.setsid()
        daemon = subprocess.Popen(SLEEP, start_new_session=True)
        (pids / "daemon").write_text(str(daemon.pid))
        os._exit(0)
    os.wait()
    def orderly(number, frame):
        (pids / "orderly").write_text("yes")
        os._exit(0)
    ignoring = behaviour == "stubborn"
    signal.signal(signal.SIGTERM, signal.SIG_IGN if ignoring else orderly)
    while not (pids / "daemon").exists():
        time.sleep(0.01)
    (pids / "plain").write_text(str(plain.pid))
    (pids / "child").write_text(str(os.getpid()))
    if behaviour == "fails":
        sys.exit(7)
    time.sleep(600)
    """
)

LAUNCHER = textwrap.dedent(
    """
    import os, sys
    from pathlib import Path
    from serving.launcher import Supervisor
    child, behaviour, pids, orderly_s = sys.argv[1:]
    scratch = Path(pids) / "scratch"
    scratch.mkdir()
    command = [sys.executable, "-c", child, behaviour, pids]
    sys.exit(Supervisor(command, dict(os.environ), scratch, float(orderly_s)).run())
    """
)


class Family:
    """A launcher with everything below it."""

    def __init__(self, directory: Path, behaviour: str, orderly_s: float = 5.0) -> None:
        self.directory = directory
        self.launcher = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, CHILD, behaviour, str(directory), str(orderly_s)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            start_new_session=True,
        )
        wait_for(lambda: (directory / "child").exists() or self.launcher.poll() is not None)
        self.members = [
            process
            for name in ("child", "plain", "daemon")
            if (process := read_process(int((directory / name).read_text()))) is not None
        ]

    def pid(self, name: str) -> int:
        return int((self.directory / name).read_text())

    def living(self) -> list[Process]:
        return [member for member in self.members if lives(member)]

    def end(self) -> None:
        for process in self.living():
            send_signal(process, signal.SIGKILL)
        if self.launcher.poll() is None:
            self.launcher.kill()
            self.launcher.wait()


def lives(process: Process) -> bool:
    now = read_process(process.pid)
    return now is not None and now.started == process.started and now.state != "Z"


def wait_for(condition, seconds: float = 20.0) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


@pytest.fixture
def family(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Family]:
    members = Family(tmp_path, *getattr(request, "param", ("obedient",)))
    yield members
    members.end()


def test_the_daemon_left_group_and_session(family: Family) -> None:
    assert len(family.living()) == 3
    launcher = family.launcher.pid
    assert os.getsid(family.pid("daemon")) not in {
        os.getsid(launcher),
        os.getsid(family.pid("child")),
    }
    found = {process.pid for process in descendants(launcher)}
    assert {family.pid(name) for name in ("child", "plain", "daemon")} <= found


def test_interrupt_ends_everything_in_order(family: Family) -> None:
    family.launcher.send_signal(signal.SIGINT)
    assert family.launcher.wait(15) == 130
    assert (family.directory / "orderly").exists()
    assert family.living() == []
    assert not (family.directory / "scratch").exists()


def test_termination_ends_everything_with_code_0(family: Family) -> None:
    family.launcher.send_signal(signal.SIGTERM)
    assert family.launcher.wait(15) == 0
    assert family.living() == []


@pytest.mark.parametrize("family", [("stubborn", 1.0)], indirect=True)
def test_a_child_that_does_not_listen_is_ended_after_the_bound(family: Family) -> None:
    family.launcher.send_signal(signal.SIGINT)
    assert family.launcher.wait(15) == 130
    assert family.living() == []


@pytest.mark.parametrize("family", [("stubborn", 60.0)], indirect=True)
def test_a_second_interrupt_does_not_wait(family: Family) -> None:
    family.launcher.send_signal(signal.SIGINT)
    time.sleep(0.3)
    started = time.monotonic()
    family.launcher.send_signal(signal.SIGINT)
    assert family.launcher.wait(15) == 130
    assert time.monotonic() - started < 10
    assert family.living() == []


def test_killing_the_child_leaves_nothing(family: Family) -> None:
    os.kill(family.pid("child"), signal.SIGKILL)
    assert family.launcher.wait(15) == 1
    assert family.living() == []


def test_killing_the_child_and_then_interrupting_leaves_nothing(family: Family) -> None:
    os.kill(family.pid("child"), signal.SIGKILL)
    family.launcher.send_signal(signal.SIGINT)
    assert family.launcher.wait(15) in (1, 130)
    assert family.living() == []


def test_killing_the_launcher_ends_child_and_daemons(family: Family) -> None:
    family.launcher.kill()
    family.launcher.wait(5)
    wait_for(lambda: family.living() == [])


@pytest.mark.parametrize("family", [("fails",)], indirect=True)
def test_the_childs_code_is_passed_on_and_its_daemons_are_ended(family: Family) -> None:
    assert family.launcher.wait(15) == 7
    assert family.living() == []


def test_a_process_id_that_was_used_again_is_not_signalled() -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as sleeper:
        now = read_process(sleeper.pid)
        assert now is not None
        send_signal(Process(now.pid, now.parent, now.started + 1, now.state), signal.SIGKILL)
        time.sleep(0.1)
        assert sleeper.poll() is None
        send_signal(now, signal.SIGKILL)
        assert sleeper.wait(5) == -signal.SIGKILL


def test_a_name_with_parentheses_is_read_right(tmp_path: Path) -> None:
    program = tmp_path / "a) R 1 (b"
    program.symlink_to("/bin/sleep")
    with subprocess.Popen([str(program), "60"]) as sleeper:
        found = read_process(sleeper.pid)
        sleeper.kill()
    assert found is not None
    assert found.parent == os.getpid()
