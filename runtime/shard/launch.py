"""Starts and watches one shard process: used by Ray's shard actor and by the tests alike.

The process gets an explicit environment, nothing secret, and a lifeline: its standard input is a
pipe that only the starter holds open, so that it ends when the starter ends, however that happens.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc

from runtime.shard import control_pb2, control_pb2_grpc

# A unix socket's path is at most 107 bytes (unix(7)).
MAX_SOCKET_PATH = 107
START_TIMEOUT_S = 120.0
SIGN_OF_LIFE_S = 30.0

# What a shard process inherits; the rest of the starter's environment stays with the starter.
INHERITED = ("HOME", "LANG", "LC_ALL", "PATH", "XDG_CACHE_HOME", "CUDA_VISIBLE_DEVICES")


class ShardProcessError(Exception):
    """The shard process ended, went silent or gave up; the text says which and why."""

    def __init__(self, message: str, code: str = "shard_process") -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class ShardSpec:
    """What a shard process is told at start. None of it is secret, none of it is trusted.

    A lie here (another broker, another owner's key, another role) yields a shard that cannot be
    admitted by the real broker, and so never gets weights' keys or peers.
    """

    instance: str
    role: str
    node: str
    model_directory: str
    broker_address: str
    owner_public: bytes
    listen_host: str
    advertise_host: str
    threads: int
    node_key_path: str = ""
    region: str = ""

    def to_message(self) -> control_pb2.StartRequest:
        """The protobuf form."""
        return control_pb2.StartRequest(
            instance=self.instance,
            role=self.role,
            node=self.node,
            model_directory=self.model_directory,
            broker_address=self.broker_address,
            owner_public=self.owner_public,
            listen_host=self.listen_host,
            advertise_host=self.advertise_host,
            threads=self.threads,
            node_key_path=self.node_key_path,
            region=self.region,
        )


class ShardProcess:
    """One shard process and its control channel.

    Args:
        directory: an existing directory under which the shard's own (0700) directory is made.
        log: file that the process's output is appended to.
        entry: interpreter arguments that start the process.
    """

    def __init__(
        self,
        directory: Path,
        log: Path,
        entry: Sequence[str] = ("-I", "-m", "runtime.shard.process"),
    ) -> None:
        self.log = log
        self._directory = directory / f"shard-{secrets.token_hex(6)}"
        self._entry = tuple(entry)
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: grpc.Channel | None = None

    @property
    def pid(self) -> int:
        """Process id, or 0 before the start."""
        return self._process.pid if self._process else 0

    def start(self, spec: ShardSpec) -> None:
        """Starts the process and hands it its spec; returns when it has taken the spec."""
        self._directory.mkdir(mode=0o700, parents=True)
        socket_path = self._directory / "control.sock"
        if len(os.fsencode(socket_path)) > MAX_SOCKET_PATH:
            raise ShardProcessError(
                f"control socket path: expected at most {MAX_SOCKET_PATH} bytes, "
                f"found {socket_path}; choose a shorter directory"
            )
        environment = {name: os.environ[name] for name in INHERITED if name in os.environ}
        environment.update(
            OMP_NUM_THREADS=str(spec.threads),
            TMPDIR=str(self._directory),
            PYTHONUNBUFFERED="1",
            TOKENIZERS_PARALLELISM="false",
            HF_HUB_OFFLINE="1",
        )
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, *self._entry, "--directory", str(self._directory)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=self._directory,
                start_new_session=True,
            )
        self._channel = grpc.insecure_channel(
            f"unix:{socket_path}",
            options=[("grpc.enable_http_proxy", 0), ("grpc.initial_reconnect_backoff_ms", 100)],
        )
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            self._raise_if_ended()
            try:
                grpc.channel_ready_future(self._channel).result(timeout=0.5)
                break
            except grpc.FutureTimeoutError:
                if time.monotonic() > deadline:
                    raise ShardProcessError(
                        f"shard process {self.pid}: no control socket within "
                        f"{START_TIMEOUT_S:.0f} s; see {self.log}"
                    ) from None
        stub = control_pb2_grpc.ShardControlStub(self._channel)
        try:
            stub.Start(spec.to_message(), timeout=30)
        except grpc.RpcError as error:
            raise ShardProcessError(f"shard {spec.role} refused its start: {error}") from error

    def watch(self) -> Iterator[control_pb2.ShardStatus]:
        """Yields the status at every change and at least once a second.

        Raises:
            ShardProcessError: the process ended or gave no sign of life for 30 s (it is then
                killed: a stopped process must not hold its role).
        """
        assert self._channel is not None, "start() first"
        stub = control_pb2_grpc.ShardControlStub(self._channel)
        last = time.monotonic()
        while True:
            try:
                # The deadline of a stream is for the whole stream: a short stream, renewed, makes
                # it a bound on silence.
                left_s = SIGN_OF_LIFE_S - (time.monotonic() - last)
                for status in stub.Watch(control_pb2.WatchRequest(), timeout=max(1.0, left_s)):
                    last = time.monotonic()
                    yield status
            except grpc.RpcError as error:
                self._raise_if_ended(grace_s=1.0)
                if time.monotonic() - last > SIGN_OF_LIFE_S - 0.5:
                    self.kill()
                    raise ShardProcessError(
                        f"shard process {self.pid}: no sign of life for {SIGN_OF_LIFE_S:.0f} s; "
                        "killed",
                        code="shard_silent",
                    ) from error
                if error.code() != grpc.StatusCode.DEADLINE_EXCEEDED:
                    time.sleep(0.2)

    def stop(self, timeout_s: float = 10.0) -> None:
        """Ends the process in order, by force after the timeout, and removes its directory."""
        process = self._process
        if process is not None and process.poll() is None:
            try:
                if self._channel is not None:
                    stub = control_pb2_grpc.ShardControlStub(self._channel)
                    stub.Stop(control_pb2.StopRequest(), timeout=2)
            except grpc.RpcError:
                process.terminate()
            try:
                process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                self.kill()
        self._release()

    def kill(self) -> None:
        """Kills the process group at once."""
        process = self._process
        if process is not None and process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _release(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
        shutil.rmtree(self._directory, ignore_errors=True)

    def _raise_if_ended(self, grace_s: float = 0.0) -> None:
        assert self._process is not None
        try:
            code = self._process.wait(grace_s) if grace_s else self._process.poll()
        except subprocess.TimeoutExpired:
            return
        if code is None:
            return
        how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        self._release()
        raise ShardProcessError(
            f"shard process {self.pid} {how}; last lines:\n{tail(self.log, 15)}"
        )


def tail(path: Path, lines: int) -> str:
    """The last lines of a log file, at most 64 KiB."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 65536))
            text = file.read().decode(errors="replace")
    except OSError as error:
        return f"(no log: {error})"
    return "\n".join(text.splitlines()[-lines:])
