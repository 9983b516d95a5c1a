"""Hosts for cluster tests: namespaces of this machine that behave like machines of their own.

Each host has network, process, mount, host-name and IPC namespaces, its own `/tmp`, `/run`,
`/dev/shm` and home directory, its own sshd, and one cable to a bridge. The rest of the file system
is this machine's, so the interpreter and its packages are there under the same path. This machine
has the bridge's address and stands for everything outside the cluster.

Needs root, `sshd` and `ssh-keygen` (openssh-server), `ssh` (openssh-client), `rsync` and `ip`
(iproute2).
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

_NEEDED = ("ip", "unshare", "sshd", "ssh", "ssh-keygen", "rsync")
_INTERFACES = "bh"
_PATH = f"{Path(sys.prefix) / 'bin'}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

_REPOSITORY = Path(__file__).resolve().parents[2]
_INIT = Path(__file__).with_name("host.sh")


class HostsUnavailable(RuntimeError):
    """This machine cannot make hosts; the message says what is missing."""


@dataclass(frozen=True, slots=True)
class Host:
    """One host: its name, its address, and the interface on this machine that leads to it."""

    name: str
    address: str
    interface: str


class Hosts:
    """Context manager that makes `count` hosts and takes them away again, whatever happens.

    `addresses[i]` belongs to `hosts[i]`; `gateway` is this machine's address on their bridge.
    `ssh_key` is the private key (a file) that logs in to each of them as root.
    """

    def __init__(self, count: int = 3) -> None:
        missing = [tool for tool in _NEEDED if not shutil.which(tool, path=_PATH)]
        if os.geteuid() != 0:
            missing.insert(0, "root")
        if missing:
            raise HostsUnavailable(
                f"hosts need network namespaces and sshd; missing: {', '.join(missing)}. Run as "
                "root, with openssh-server, openssh-client, iproute2 and rsync installed"
            )
        self._bridge = f"{_INTERFACES}{os.getpid()}"
        self._count = count
        self._network = ipaddress.ip_network("10.0.0.0/24")
        self._stack = contextlib.ExitStack()
        self._processes: dict[str, subprocess.Popen[str]] = {}
        self._namespaces: dict[str, str] = {}
        self.hosts: list[Host] = []
        self.folder = Path()
        self.ssh_key = Path()

    @property
    def addresses(self) -> list[str]:
        """The hosts' addresses, in their order."""
        return [host.address for host in self.hosts]

    @property
    def gateway(self) -> str:
        """This machine's address as the hosts see it: for what runs outside the cluster."""
        return str(self._network[1])

    def __enter__(self) -> Hosts:
        with self._stack:
            _remove_stale_interfaces()
            self.folder = Path(
                self._stack.enter_context(tempfile.TemporaryDirectory(prefix="bulkhead-hosts-"))
            )
            self.ssh_key = self.folder / "key"
            _do("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.ssh_key))
            self._network = _free_network()
            _do("ip", "link", "add", self._bridge, "type", "bridge")
            self._stack.callback(_do, "ip", "link", "delete", self._bridge)
            _do("ip", "address", "add", f"{self.gateway}/24", "dev", self._bridge)
            _do("ip", "link", "set", self._bridge, "up")
            for number in range(1, self._count + 1):
                self._start(number)
            for host in self.hosts:
                self._await_login(host)
            self._stack = self._stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def _start(self, number: int) -> None:
        host = Host(f"host-{number}", str(self._network[10 + number]), f"{self._bridge}-{number}")
        with (self.folder / f"{host.name}.log").open("w") as log:
            process = subprocess.Popen(
                ["unshare", "--net", "--pid", "--mount", "--uts", "--ipc", "--fork",
                 "--mount-proc", "--kill-child=SIGKILL", "bash", str(_INIT)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
                env={
                    "PATH": _PATH,
                    "HOST_PATH": _PATH,
                    "REPOSITORY": str(_REPOSITORY),
                    "LANG": "C.UTF-8",
                    "NAME": host.name,
                    "ADDRESS": host.address,
                    "PREFIX": str(self._network.prefixlen),
                    "GATEWAY": self.gateway,
                    "KEPT": "".join(f"{folder}\n" for folder in _kept_folders()),
                    "AUTHORIZED": self.ssh_key.with_suffix(".pub").read_text().strip(),
                },
            )  # fmt: skip
        self._processes[host.name] = process
        self._stack.callback(self._stop, host)
        assert process.stdin and process.stdout
        if process.stdout.readline().strip() != "ready":
            raise RuntimeError(f"{host.name} did not start: {self.log(host)}")
        self._namespaces[os.readlink(f"/proc/{process.pid}/ns/net")] = host.name
        _do("ip", "link", "add", host.interface, "type", "veth",
            "peer", "name", "eth0", "netns", str(process.pid))  # fmt: skip
        _do("ip", "link", "set", host.interface, "master", self._bridge, "up")
        process.stdin.write("go\n")
        process.stdin.flush()
        self.hosts.append(host)

    def _await_login(self, host: Host) -> None:
        deadline = time.monotonic() + 20
        while True:
            done = self.run(host, "true", check=False)
            if done.returncode == 0:
                return
            if time.monotonic() > deadline:
                raise RuntimeError(f"no login to {host.name}: {done.stderr} {self.log(host)}")
            time.sleep(0.2)

    def _stop(self, host: Host) -> None:
        process = self._processes[host.name]
        # Ending the first process of a PID namespace ends all that is in it.
        process.kill()
        process.wait()
        assert process.stdin and process.stdout
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        deadline = time.monotonic() + 10
        while self._processes_on(host.name) and time.monotonic() < deadline:
            time.sleep(0.05)
        # The kernel takes the cable away with the namespace, but in its own time.
        with contextlib.suppress(RuntimeError):
            _do("ip", "link", "delete", host.interface)

    def host(self, which: Host | int | str) -> Host:
        """The host with that index, name or address."""
        if isinstance(which, Host):
            return which
        if isinstance(which, int):
            return self.hosts[which]
        return next(host for host in self.hosts if which in (host.name, host.address))

    def log(self, which: Host | int | str) -> str:
        """What the host's start and its sshd said."""
        return (self.folder / f"{self.host(which).name}.log").read_text()

    def ssh(self, which: Host | int | str, command: str) -> list[str]:
        """The argument list that runs a command in a login shell on the host."""
        return [
            "ssh", "-T", "-i", str(self.ssh_key), "-o", "IdentitiesOnly=yes", "-o", "BatchMode=yes",
            "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null",
            "-o", "LogLevel=ERROR", "-o", "ConnectTimeout=5", "-o", "ServerAliveInterval=15",
            f"root@{self.host(which).address}", f"bash --login -c {shlex.quote(command)}",
        ]  # fmt: skip

    def run(
        self,
        which: Host | int | str,
        command: str,
        *,
        timeout: float = 120,
        check: bool = True,
        stdin: str = "",
    ) -> subprocess.CompletedProcess[str]:
        """Runs a shell command on the host, over ssh; AssertionError if it fails and `check`."""
        done = subprocess.run(
            self.ssh(which, command),
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert not check or done.returncode == 0, (
            f"{command!r} on {self.host(which).name} ended with {done.returncode}:\n"
            f"{done.stdout[-8000:]}\n{done.stderr[-8000:]}"
        )
        return done

    def cut(self, which: Host | int | str) -> None:
        """Pulls the host's cable: nothing reaches it or comes from it, and nobody is told."""
        _do("ip", "link", "set", self.host(which).interface, "down")

    def join(self, which: Host | int | str) -> None:
        """Plugs the cable in again."""
        _do("ip", "link", "set", self.host(which).interface, "up")

    @contextlib.contextmanager
    def is_cut(self, which: Host | int | str) -> Iterator[None]:
        """The host is cut off inside the block, and joined again after it."""
        self.cut(which)
        try:
            yield
        finally:
            self.join(which)

    def leftovers(self) -> list[str]:
        """What has been left, one line each; empty is good.

        While the hosts are up: their processes other than sshd, and files in their shared memory.
        After they are gone: processes that outlived them, interfaces, the folder of keys and logs.
        """
        found: list[str] = []
        for host in self.hosts:
            running = self._processes[host.name].poll() is None
            for pid, command in self._processes_on(host.name).items():
                if running and _belongs_to_host(command):
                    continue
                found.append(f"{host.name}: process {pid}: {command[:200]}")
            if running:
                shared = Path(f"/proc/{self._init_of(host)}/root/dev/shm")
                found += [f"{host.name}: shared memory: {path.name}" for path in shared.iterdir()]
        if not any(process.poll() is None for process in self._processes.values()):
            found += [
                f"interface: {name}" for name in _interfaces() if name.startswith(self._bridge)
            ]
            if self.folder.name and self.folder.exists():
                found.append(f"folder: {self.folder}")
        return found

    def wait_until_clean(self, seconds: float) -> list[str]:
        """`leftovers()`, once there are none or the time is over: ending takes a moment."""
        deadline = time.monotonic() + seconds
        while (found := self.leftovers()) and time.monotonic() < deadline:
            time.sleep(0.2)
        return found

    def _init_of(self, host: Host) -> int:
        children = Path(f"/proc/{self._processes[host.name].pid}/task").glob("*/children")
        return int(next(children).read_text().split()[0])

    def _processes_on(self, name: str) -> dict[int, str]:
        found: dict[int, str] = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            # Processes come and go while we look.
            with contextlib.suppress(OSError):
                if self._namespaces.get(os.readlink(entry / "ns/net")) != name:
                    continue
                words = (entry / "cmdline").read_bytes().split(b"\0")
                command = " ".join(word.decode(errors="replace") for word in words).strip()
                if command and "Z" not in (entry / "stat").read_text().rsplit(")")[-1].split()[0]:
                    found[int(entry.name)] = command
        return found


def _kept_folders() -> list[str]:
    """Interpreter, packages and repository, as far as a host's own /tmp or /run would hide them."""
    folders = {sys.prefix, sys.base_prefix, str(_REPOSITORY)}
    return sorted(folder for folder in folders if folder.startswith(("/tmp/", "/run/")))


def _belongs_to_host(command: str) -> bool:
    """Whether it is what makes the host a host: `unshare`, sshd, the watcher of the lifeline."""
    return command.startswith(("unshare --net", f"bash {_INIT}", "sshd:"))


def _do(*arguments: str) -> None:
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(arguments)} failed: {done.stderr.strip()}")


def _interfaces() -> list[str]:
    return os.listdir("/sys/class/net")


def _remove_stale_interfaces() -> None:
    """Bridges of tests that were killed: their names carry the process id that made them."""
    for name in _interfaces():
        owner = name.removeprefix(_INTERFACES)
        if name != owner and owner.isdigit() and not Path(f"/proc/{owner}").exists():
            _do("ip", "link", "delete", name)


def _free_network() -> ipaddress.IPv4Network:
    """A private /24 that no interface of this machine is in."""
    listed = subprocess.run(
        ["ip", "-json", "route", "show"], capture_output=True, text=True, check=True
    )
    taken = [
        ipaddress.ip_network(route["dst"], strict=False)
        for route in json.loads(listed.stdout)
        if route["dst"] != "default"
    ]
    for number in range(64, 255):
        network = ipaddress.IPv4Network(f"10.213.{number}.0/24")
        if not any(network.overlaps(other) for other in taken):
            return network
    raise RuntimeError("no free 10.213.x.0/24 for the hosts' bridge")
