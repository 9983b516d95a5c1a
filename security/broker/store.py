"""What the broker keeps on disk: its key, what the owner installed, and its audit log.

Nonces, members and their secrets live in memory only: after a restart of the broker every shard
proves itself again.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from google.protobuf.message import DecodeError

from placement.document import MAX_INTEGER, DocumentError, Fields, decode
from security.broker import broker_pb2
from security.broker.documents import Installation
from security.errors import MalformedInput
from security.signing import create_key_file, load_key_file, public_bytes, write_public_key

log = logging.getLogger("bulkhead.broker")

MAX_AUDIT_BYTES = 64 << 20
"""Size at which the audit log is turned over; one older part is kept."""

_MAX_TEXT = 1000
_MAX_GENERATION_BYTES = 1024


def printable(text: str, limit: int = _MAX_TEXT) -> str:
    """Text from outside made fit for one line of a log."""
    return "".join(c if c.isprintable() else "?" for c in text[:limit])


class BrokerStore:
    """The broker's home directory (0700)."""

    def __init__(self, home: Path) -> None:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        home.chmod(0o700)
        self._home = home
        self._lock = threading.Lock()

    def broker_key(self) -> Ed25519PrivateKey:
        """The broker's signing key, made on first use; its public half is in broker.pub."""
        path = self._home / "broker.key"
        key = load_key_file(path) if path.exists() else create_key_file(path)
        write_public_key(self._home / "broker.pub", public_bytes(key))
        return key

    def save(self, installation: Installation) -> None:
        """Replaces what is installed, in one step."""
        message = broker_pb2.InstallRequest(
            policy=installation.policy,
            template=installation.template,
            manifest=installation.manifest,
            enrolments=installation.enrolments,
            certificate=installation.certificate,
        )
        self._replace("installed", message.SerializeToString())

    def save_generation(self, owner_public: bytes, generation: int) -> None:
        """Remembers the newest generation of an owner apart from what is installed."""
        content = {"owner": owner_public.hex(), "generation": generation}
        self._replace("generation", json.dumps(content).encode())

    def generation(self, owner_public: bytes) -> int:
        """The newest generation that this owner ever installed here; 0 for none.

        Raises:
            MalformedInput: the file is not what `save_generation` wrote. To go on without it is to
                forget which plans were replaced: that is for a person to decide.
        """
        path = self._home / "generation"
        if not path.exists():
            return 0
        try:
            document = decode(path.read_bytes(), _MAX_GENERATION_BYTES)
            reader = Fields.of(document, "generation")
            owner = reader.octets("owner", len(owner_public))
            generation = reader.integer("generation", 0, MAX_INTEGER)
            reader.finish()
        except DocumentError as error:
            raise MalformedInput(
                f"{path}: expected what the broker wrote, found another ({error}); remove it if "
                "older plans may be installed again"
            ) from None
        return generation if owner == owner_public else 0

    def _replace(self, name: str, content: bytes) -> None:
        """Writes a file in one step: a crash leaves the old one or the new one."""
        temporary = self._home / f"{name}.new"
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self._home / name)

    def load(self) -> Installation | None:
        """What was installed before; its signatures are for the caller to check.

        Raises:
            MalformedInput: the file is not what `save` wrote.
        """
        path = self._home / "installed"
        if not path.exists():
            return None
        message = broker_pb2.InstallRequest()
        try:
            message.ParseFromString(path.read_bytes())
        except DecodeError:
            raise MalformedInput(f"{path}: expected what the broker wrote, found another") from None
        return Installation(
            message.policy,
            message.template,
            message.manifest,
            message.enrolments,
            message.certificate,
        )

    def audit(self, time: float, event: str, **fields: str) -> None:
        """Adds one line to the log and to audit.jsonl. A full disk must not stop the broker."""
        clean = {name: printable(value) for name, value in fields.items() if value}
        level = logging.WARNING if event == "refused" else logging.INFO
        log.log(level, "%s %s", event, " ".join(f"{k}={v!r}" for k, v in clean.items()))
        line = json.dumps({"time": round(time, 3), "event": event, **clean}) + "\n"
        path = self._home / "audit.jsonl"
        try:
            with self._lock:
                if path.exists() and path.stat().st_size > MAX_AUDIT_BYTES:
                    path.replace(self._home / "audit.1.jsonl")
                with path.open("a", encoding="ascii") as file:
                    file.write(line)
        except OSError as error:
            log.error("audit log: could not be written: %s", error.strerror)
