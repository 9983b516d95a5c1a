"""What the broker keeps on disk: its key, and one SQLite database with its state and audit log.

Every change is one transaction together with the log's entry about it, durable before the broker
answers, so a broker that is killed at any moment finds all that it has answered. Nonces live in
memory only: none from before a restart is honoured. The database holds no secret: member secrets
are derived from the broker's key (see `security.broker.members`).
"""

from __future__ import annotations

import fcntl
import logging
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from google.protobuf.message import DecodeError

from placement.document import MAX_INTEGER, DocumentError, Fields, decode
from security.broker import broker_pb2
from security.broker.audit import (
    APPLICATION_ID,
    SCHEMA_VERSION,
    Head,
    Witnessed,
    check_format,
    damaged,
    open_stored_head,
)
from security.broker.documents import Installation
from security.broker.witness import Send, Witness
from security.errors import (
    AuditEntryEdited,
    AuditHeadForged,
    AuditTruncated,
    MalformedInput,
    StateDamaged,
    StateInUse,
    StateUnwritable,
    WitnessContradicted,
)
from security.roster import RosterEntry
from security.signing import create_key_file, load_key_file, public_bytes, write_public_key

log = logging.getLogger("bulkhead.broker")

_SCHEMA = """
CREATE TABLE audit (sequence INTEGER PRIMARY KEY, body BLOB NOT NULL) STRICT;
CREATE TABLE head (id INTEGER PRIMARY KEY CHECK (id = 1), signed BLOB NOT NULL) STRICT;
CREATE TABLE generations (
    owner BLOB NOT NULL, kind TEXT NOT NULL, generation BLOB NOT NULL, PRIMARY KEY (owner, kind)
) STRICT;
CREATE TABLE installed (
    id INTEGER PRIMARY KEY CHECK (id = 1), policy BLOB NOT NULL, template BLOB NOT NULL,
    manifest BLOB NOT NULL, enrolments BLOB NOT NULL, certificate BLOB NOT NULL
) STRICT;
CREATE TABLE members (
    instance TEXT NOT NULL, role TEXT NOT NULL, salt BLOB NOT NULL, entry BLOB NOT NULL,
    PRIMARY KEY (instance, role)
) STRICT;
CREATE TABLE revocations (owner BLOB PRIMARY KEY, document BLOB NOT NULL) STRICT;
CREATE TABLE serial (id INTEGER PRIMARY KEY CHECK (id = 1), value INTEGER NOT NULL) STRICT;
"""
_MAX_TEXT = 1000
_MAX_GENERATION_BYTES = 1024
_INTEGER_BYTES = 8


def printable(text: str, limit: int = _MAX_TEXT) -> str:
    """Text from outside made fit for one line of a log."""
    return "".join(c if c.isprintable() else "?" for c in text[:limit])


class BrokerStore:
    """The broker's home directory (0700); one broker at a time may have it open.

    Args:
        home: the directory; made if missing.

    Raises:
        KeyFileError: the key file cannot be used.
        StateInUse, StateDamaged, StateOtherVersion, StateUnwritable
        AuditHeadForged, AuditTruncated, AuditEntryEdited: the log's end is not what was signed.
        MalformedInput: files of an earlier version in the home cannot be read.
    """

    def __init__(self, home: Path) -> None:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        home.chmod(0o700)
        self._home = home
        self._witnesses: list[Witness] = []
        # Reentrant: parts of a transaction open it again.
        self._lock = threading.RLock()
        self._depth = 0
        self._held = (home / "broker.lock").open("ab")
        try:
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._held.close()
            raise StateInUse(
                f"{home}: expected no other broker on this home, found one; stop it first"
            ) from None
        self._database: sqlite3.Connection | None = None
        try:
            self._key = self._load_key()
            self._database = self._open()
            self.head = self._read_head()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Gives the home free; later changes are refused. Safe to call more than once."""
        for witness in self._witnesses:
            witness.close()
        with self._lock:
            if self._database is not None:
                self._database.close()
                self._database = None
            self._held.close()

    def add_witness(self, name: str, send: Send) -> None:
        """Has every head from now on sent to a witness, beginning with the current one."""

        def on_change(reason: str) -> None:
            event = "witness_failed" if reason else "witness_answers"
            self.audit(time.time(), event, witness=name, reason=reason)

        witness = Witness(name, send, on_change)
        with self._lock:
            self._witnesses.append(witness)
            witness.publish(self.head.signed(self._key))

    def require_entry(self, witnessed: Witnessed) -> None:
        """Checks that the newest witnessed entry is in the log; raises WitnessContradicted."""
        query = "SELECT body FROM audit WHERE sequence = ?"
        for (body,) in self._rows(query, (witnessed.newest,)):
            if Head.of(witnessed.newest, body).digest != witnessed.heads[witnessed.newest]:
                raise WitnessContradicted(
                    f"audit log: expected entry {witnessed.newest} as witnessed, found another; "
                    "this is another history than the witness saw"
                )

    # -- opening -------------------------------------------------------------------------------

    def _load_key(self) -> Ed25519PrivateKey:
        path = self._home / "broker.key"
        key = load_key_file(path) if path.exists() else create_key_file(path)
        write_public_key(self._home / "broker.pub", public_bytes(key))
        return key

    def broker_key(self) -> Ed25519PrivateKey:
        """The broker's signing key; its public half is in broker.pub."""
        return self._key

    def _open(self) -> sqlite3.Connection:
        path = self._home / "broker.db"
        database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        try:
            path.chmod(0o600)
            check_format(database, path, allow_empty=True)
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("PRAGMA synchronous = FULL")
            if database.execute("PRAGMA user_version").fetchone()[0] == 0:
                self._create(database)
        except sqlite3.DatabaseError as error:
            database.close()
            raise damaged(path, error) from None
        except BaseException:
            database.close()
            raise
        return database

    def _create(self, database: sqlite3.Connection) -> None:
        """Makes the tables, and takes over what a version without a database has left."""
        old = self._old_installation()
        generation = self._old_generation()
        database.execute("BEGIN IMMEDIATE")
        for statement in _SCHEMA.split(";"):
            database.execute(statement)
        if old is not None:
            database.execute("INSERT INTO installed VALUES (1, ?, ?, ?, ?, ?)", _columns(old))
        if generation is not None:
            owner, number = generation
            database.execute(
                "INSERT INTO generations VALUES (?, 'template', ?)",
                (owner, number.to_bytes(_INTEGER_BYTES, "big")),
            )
        database.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        database.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        database.execute("COMMIT")
        for name in ("installed", "generation"):
            path = self._home / name
            if path.exists():
                path.replace(self._home / f"{name}.migrated")

    def _old_installation(self) -> Installation | None:
        path = self._home / "installed"
        if not path.exists():
            return None
        message = broker_pb2.InstallRequest()
        try:
            message.ParseFromString(path.read_bytes())
        except DecodeError:
            raise MalformedInput(
                f"{path}: expected what an earlier broker wrote, found another; remove it and "
                "install the documents again"
            ) from None
        return Installation(
            message.policy,
            message.template,
            message.manifest,
            message.enrolments,
            message.certificate,
        )

    def _old_generation(self) -> tuple[bytes, int] | None:
        path = self._home / "generation"
        if not path.exists():
            return None
        try:
            reader = Fields.of(decode(path.read_bytes(), _MAX_GENERATION_BYTES), "generation")
            found = reader.octets("owner", 32), reader.integer("generation", 0, MAX_INTEGER)
            reader.finish()
        except DocumentError as error:
            # To go on without it is to forget which plans were replaced: for a person to decide.
            raise MalformedInput(
                f"{path}: expected what an earlier broker wrote, found another ({error}); remove "
                "it if older plans may be installed again"
            ) from None
        return found

    def _read_head(self) -> Head:
        """The head, held against the newest entry; `check_chain` checks the rest."""
        signed = self._rows("SELECT signed FROM head WHERE id = 1")
        last = self._rows("SELECT body FROM audit ORDER BY sequence DESC LIMIT 1")
        if not signed:
            if last:
                raise AuditHeadForged("audit log: expected a signed head, found entries only")
            return Head()
        head = open_stored_head(signed[0][0], public_bytes(self._key))
        body = last[0][0] if last else b""
        sequence = self._number("SELECT coalesce(max(sequence), 0) FROM audit")
        if sequence < head.sequence:
            raise AuditTruncated(
                f"audit log: expected {head.sequence} entries as signed, found {sequence}; the "
                "newest were taken away"
            )
        if Head.of(sequence, body) != head:
            raise AuditEntryEdited(
                f"audit log: expected entry {head.sequence} as signed, found another"
            )
        return head

    def _rows(self, query: str, values: tuple[object, ...] = ()) -> list[tuple[Any, ...]]:
        with self._lock:
            if self._database is None:
                return []
            try:
                return self._database.execute(query, values).fetchall()
            except sqlite3.DatabaseError as error:
                raise damaged(self._home / "broker.db", error) from None

    def _number(self, query: str) -> int:
        ((value,),) = self._rows(query)
        return int(value)

    # -- changes -------------------------------------------------------------------------------

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Everything done within is durable at its end, or was not done; may be nested.

        Raises:
            StateUnwritable: it could not be made durable.
        """
        with self._lock:
            if self._depth:
                yield
                return
            database, before = self._database, self.head
            if database is None:
                raise StateUnwritable("broker: expected an open database, found it closed")
            try:
                database.execute("BEGIN IMMEDIATE")
                self._depth = 1
                try:
                    yield
                    signed = b""
                    if self.head != before:
                        signed = self.head.signed(self._key)
                        database.execute("INSERT OR REPLACE INTO head VALUES (1, ?)", (signed,))
                    database.execute("COMMIT")
                except BaseException:
                    self.head = before
                    if database.in_transaction:
                        database.execute("ROLLBACK")
                    raise
                finally:
                    self._depth = 0
            except sqlite3.Error as error:
                raise StateUnwritable(
                    f"{self._home / 'broker.db'}: could not be written: {error}; is the disk full?"
                ) from None
            if self.head != before:
                for witness in self._witnesses:
                    witness.publish(signed)

    def _write(self, statement: str, values: tuple[object, ...]) -> None:
        with self.transaction():
            assert self._database is not None
            self._database.execute(statement, values)

    def audit(self, now: float, event: str, **fields: str) -> None:
        """Adds an entry, to the transaction in progress if there is one.

        By itself an entry that cannot be written must not stop the broker: a full disk would let
        nobody in or out. Within a transaction it stops that.
        """
        clean = {name: printable(value) for name, value in fields.items() if value}
        level = logging.WARNING if event == "refused" else logging.INFO
        log.log(level, "%s %s", event, " ".join(f"{k}={v!r}" for k, v in clean.items()))
        with self._lock:
            if self._depth:
                self._append(now, event, clean)
                return
            try:
                with self.transaction():
                    self._append(now, event, clean)
            except StateUnwritable as error:
                log.error("audit log: %s", error)

    def _append(self, now: float, event: str, fields: dict[str, str]) -> None:
        entry, head = self.head.then(int(now * 1000), event, fields)
        self._write("INSERT INTO audit VALUES (?, ?)", (entry.sequence, entry.to_bytes()))
        self.head = head

    # -- what the owner installs ---------------------------------------------------------------

    def save(self, installation: Installation) -> None:
        """Replaces what is installed; members of another plan are members no more."""
        with self.transaction():
            self._write(
                "INSERT OR REPLACE INTO installed VALUES (1, ?, ?, ?, ?, ?)",
                _columns(installation),
            )
            self._write("DELETE FROM members", ())

    def load(self) -> Installation | None:
        """What was installed before; its signatures are for the caller to check."""
        rows = self._rows(
            "SELECT policy, template, manifest, enrolments, certificate FROM installed"
        )
        return Installation(*rows[0]) if rows else None

    def save_generation(self, owner_public: bytes, generation: int, kind: str = "template") -> None:
        """Remembers the newest generation of an owner apart from what is installed."""
        self._write(
            "INSERT OR REPLACE INTO generations VALUES (?, ?, ?)",
            (owner_public, kind, generation.to_bytes(_INTEGER_BYTES, "big")),
        )

    def generation(self, owner_public: bytes, kind: str = "template") -> int:
        """The newest generation that this owner ever installed here; 0 for none."""
        rows = self._rows(
            "SELECT generation FROM generations WHERE owner = ? AND kind = ?", (owner_public, kind)
        )
        return int.from_bytes(rows[0][0], "big") if rows else 0

    def save_revocations(self, owner_public: bytes, document: bytes) -> None:
        """Replaces an owner's signed revocations."""
        self._write("INSERT OR REPLACE INTO revocations VALUES (?, ?)", (owner_public, document))

    def revocations(self, owner_public: bytes) -> bytes:
        """An owner's signed revocations; empty for none. Their signature is for the caller."""
        rows = self._rows("SELECT document FROM revocations WHERE owner = ?", (owner_public,))
        return rows[0][0] if rows else b""

    # -- members -------------------------------------------------------------------------------

    def save_member(self, instance: str, salt: bytes, entry: RosterEntry) -> None:
        """Remembers who was admitted to a role, instead of who was before."""
        self._write(
            "INSERT OR REPLACE INTO members VALUES (?, ?, ?, ?)",
            (instance, entry.role, salt, entry.to_bytes()),
        )

    def delete_member(self, instance: str, role: str) -> None:
        """Forgets a member."""
        self._write("DELETE FROM members WHERE instance = ? AND role = ?", (instance, role))

    def delete_instance(self, instance: str) -> None:
        """Forgets all members of an instance."""
        self._write("DELETE FROM members WHERE instance = ?", (instance,))

    def members(self) -> list[tuple[str, bytes, RosterEntry]]:
        """Instance, salt of the secret, and entry of everybody who was admitted.

        Raises:
            StateDamaged: a row is not what `save_member` wrote.
        """
        rows = self._rows("SELECT instance, salt, entry FROM members")
        try:
            return [(name, salt, RosterEntry.from_bytes(entry)) for name, salt, entry in rows]
        except MalformedInput as error:
            raise StateDamaged(f"{self._home / 'broker.db'}: members: {error}") from None

    def save_serial(self, serial: int) -> None:
        """Remembers the highest serial of a roster."""
        self._write("INSERT OR REPLACE INTO serial VALUES (1, ?)", (serial,))

    def serial(self) -> int:
        """The highest serial of a roster that was ever issued; 0 for none."""
        return self._number("SELECT coalesce(max(value), 0) FROM serial")


def _columns(installation: Installation) -> tuple[bytes, ...]:
    return (
        installation.policy,
        installation.template,
        installation.manifest,
        installation.enrolments,
        installation.certificate,
    )
