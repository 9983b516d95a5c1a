"""Bulkhead's home directory: the owner's key, the embedded broker's files, logs, what runs.

owner.pem         the owner's private key (0600); who has it decides who may see what
owner.pub         its public half, for clients to pin
node.pem          key of this machine's simulated nodes, for roles that need enrolment only
ray_token         token of the local Ray cluster (0600)
broker/           the embedded broker's key, installed documents and audit log
logs/             one file per shard
run.json          what runs now, for `status`, `logs` and `chat`
"""

from __future__ import annotations

import json
import os
import secrets
from dataclasses import asdict, dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from placement.document import DocumentError, Fields, decode
from security.signing import create_key_file, load_key_file, public_bytes, write_public_key
from serving.errors import CommandError, UsageError

HOME_VARIABLE = "BULKHEAD_HOME"
MAX_STATE_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class RunState:
    """What runs, so that other commands find it.

    Attributes:
        kind: "local" for `bulkhead serve`, "cluster" for `bulkhead deploy`.
        endpoint: base URL of the OpenAI-compatible API, without "/v1".
        instance: name of the pipeline instance.
        model: served name of the model.
        ray_address: address of the Ray cluster.
        log_directory: where shard logs are, on the nodes.
        pid: process id of the serving process; 0 for "cluster".
        started_at: Unix time in seconds.
    """

    kind: str
    endpoint: str
    instance: str
    model: str
    ray_address: str
    log_directory: str
    pid: int
    started_at: int


class Home:
    """Makes and finds what lies in the home directory.

    Args:
        path: the directory; None means $BULKHEAD_HOME, else ~/.bulkhead. Made (0700) if missing.

    Raises:
        UsageError: it cannot be made or belongs to somebody else.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = (
            path or Path(os.environ.get(HOME_VARIABLE) or Path.home() / ".bulkhead")
        ).absolute()
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = self.path.stat()
        except OSError as error:
            raise UsageError(
                f"{self.path}: expected a directory for Bulkhead's files, found: "
                f"{error.strerror}; choose another with --home or ${HOME_VARIABLE}"
            ) from None
        if status.st_uid != os.getuid() or status.st_mode & 0o022:
            raise UsageError(
                f"{self.path}: expected a directory that only you can write, found owner "
                f"{status.st_uid} and mode {status.st_mode & 0o7777:04o}; "
                f"choose another with --home or ${HOME_VARIABLE}"
            )

    @property
    def broker(self) -> Path:
        """Directory of the embedded broker."""
        return self.path / "broker"

    @property
    def logs(self) -> Path:
        """Directory of shard logs."""
        return self.path / "logs"

    @property
    def owner_public_path(self) -> Path:
        """The owner's public key as PEM, for clients to pin."""
        return self.path / "owner.pub"

    def owner_key(self) -> Ed25519PrivateKey:
        """The owner's key, made on first use."""
        key = self._key("owner.pem")
        if not self.owner_public_path.exists():
            write_public_key(self.owner_public_path, public_bytes(key))
        return key

    def node_key(self) -> tuple[Path, bytes]:
        """Path and public key (32 bytes) of this machine's node key, made on first use."""
        return self.path / "node.pem", public_bytes(self._key("node.pem"))

    def ray_token(self) -> Path:
        """A fresh token file (0600) for a local Ray cluster."""
        path = self.path / "ray_token"
        self._write_private(path, secrets.token_hex(32))
        return path

    def write_run_state(self, state: RunState) -> None:
        """Says what runs."""
        self._write_private(self.path / "run.json", json.dumps(asdict(state)))

    def clear_run_state(self) -> None:
        """Says that nothing runs."""
        (self.path / "run.json").unlink(missing_ok=True)

    def read_run_state(self) -> RunState:
        """What runs.

        Raises:
            CommandError: nothing does.
        """
        path = self.path / "run.json"
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            raise CommandError(
                f"nothing runs from {self.path}: expected {path.name} there; "
                "start with `bulkhead serve` or `bulkhead deploy`, or point --home elsewhere"
            ) from None
        try:
            reader = Fields.of(decode(content, MAX_STATE_BYTES), "run.json")
            state = RunState(
                kind=reader.text("kind", 16),
                endpoint=reader.text("endpoint", 512),
                instance=reader.text("instance", 128),
                model=reader.text("model", 256),
                ray_address=reader.text("ray_address", 256),
                log_directory=reader.text("log_directory", 4096),
                pid=reader.integer("pid", 0, 2**31),
                started_at=reader.integer("started_at", 0, 2**53),
            )
            reader.finish()
        except DocumentError as error:
            raise CommandError(f"{path}: {error}; stop what runs and remove the file") from None
        if state.kind == "local" and not Path(f"/proc/{state.pid}").exists():
            raise CommandError(
                f"nothing runs from {self.path}: process {state.pid} has ended; "
                "start again with `bulkhead serve`"
            )
        return state

    def _key(self, name: str) -> Ed25519PrivateKey:
        path = self.path / name
        return load_key_file(path) if path.exists() else create_key_file(path)

    def _write_private(self, path: Path, text: str) -> None:
        fresh = path.with_name(f".{path.name}.{os.getpid()}")
        fresh.unlink(missing_ok=True)
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
        fresh.replace(path)
