"""The audit log: a hash chain of entries, and the signed head that stands for all of them.

An entry is canonical JSON with the SHA-256 of the entry before it, so none can be changed, added
or taken away in between without changing all that follow. The head (how many entries there are, and
the digest of the last) is signed by the broker's key and kept with them; copies of it go to a
witness that whoever restores an old database cannot reach.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from placement.document import MAX_INTEGER, DocumentError, Encodable, Fields, decode, encode
from security.errors import (
    AuditEntryEdited,
    AuditEntryMissing,
    AuditHeadForged,
    AuditTruncated,
    MalformedInput,
    SignatureInvalid,
    StateDamaged,
    StateMissing,
    StateOtherVersion,
    StateRolledBack,
    WitnessContradicted,
    WitnessUnusable,
)
from security.signing import SIGNATURE_BYTES, SignedDocument, open_signed, public_bytes, sign

NO_ENTRY = "0" * 64
"""What the first entry names as the digest of the one before it."""

MAX_HEAD_BYTES = 1024
SCHEMA_VERSION = 1
APPLICATION_ID = 0x424B4844
"""Marks the file as a broker's database ("BKHD")."""
_HEAD_FORMAT = "bulkhead-audit-head-1"
_ENTRIES = "SELECT sequence, body FROM audit ORDER BY sequence"
_MAX_ENTRY_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the log.

    Attributes:
        sequence: 1 for the first.
        time_ms: Unix time in milliseconds, by the broker's clock.
        event: what happened, such as "admitted".
        fields: its details; never a secret.
        previous: SHA-256 (hex) of the entry before; `NO_ENTRY` for the first.
    """

    sequence: int
    time_ms: int
    event: str
    fields: Mapping[str, str]
    previous: str

    def to_bytes(self) -> bytes:
        """The canonical encoding, which is what is hashed."""
        return encode(
            {
                "sequence": self.sequence,
                "time_ms": self.time_ms,
                "event": self.event,
                "fields": self.fields,
                "previous": self.previous,
            }
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> Entry:
        """Parses what `to_bytes` wrote; raises MalformedInput."""
        try:
            document = decode(data, _MAX_ENTRY_BYTES)
            fields = document.pop("fields", None)
            reader = Fields.of(document, "entry")
            sequence = reader.integer("sequence", 1, MAX_INTEGER)
            time_ms = reader.integer("time_ms", 0, MAX_INTEGER)
            event = reader.text("event", 64)
            previous = reader.digest("previous")
            reader.finish()
        except DocumentError as error:
            raise MalformedInput(str(error)) from None
        if not isinstance(fields, dict):
            raise MalformedInput("entry.fields: expected an object")
        texts = {name: value for name, value in fields.items() if isinstance(value, str)}
        if len(texts) != len(fields):
            raise MalformedInput("entry.fields: expected texts only")
        return cls(sequence, time_ms, event, texts, previous)


@dataclass(frozen=True, slots=True)
class Head:
    """The state of the log: its length and the digest (hex) of its last entry."""

    sequence: int = 0
    digest: str = NO_ENTRY

    @classmethod
    def of(cls, sequence: int, body: bytes) -> Head:
        """The head whose last entry is that one."""
        return cls(sequence, hashlib.sha256(body).hexdigest())

    def then(self, time_ms: int, event: str, fields: Mapping[str, str]) -> tuple[Entry, Head]:
        """The next entry, and the head that it makes."""
        entry = Entry(self.sequence + 1, time_ms, event, fields, self.digest)
        return entry, Head.of(entry.sequence, entry.to_bytes())

    def signed(self, key: Ed25519PrivateKey) -> bytes:
        """One line of canonical JSON with the broker's signature, without a line feed."""
        payload = self._payload(public_bytes(key))
        document = sign("audit-head", encode(payload), key)
        return encode({**payload, "signature": document.signature.hex()})

    def _payload(self, broker: bytes) -> dict[str, Encodable]:
        return {
            "format": _HEAD_FORMAT,
            "broker": broker.hex(),
            "sequence": self.sequence,
            "digest": self.digest,
        }

    @classmethod
    def open(cls, line: bytes, broker_public: bytes) -> Head:
        """Checks what `signed` gave.

        Raises:
            MalformedInput: it is none.
            AuditHeadForged: this broker did not sign it.
        """
        try:
            reader = Fields.of(decode(line, MAX_HEAD_BYTES), "head")
            reader.text("format", 32, _HEAD_FORMAT)
            broker = reader.octets("broker", 32)
            head = cls(reader.integer("sequence", 0, MAX_INTEGER), reader.digest("digest"))
            signature = reader.octets("signature", SIGNATURE_BYTES)
            reader.finish()
        except DocumentError as error:
            raise MalformedInput(str(error)) from None
        document = SignedDocument("audit-head", encode(head._payload(broker)), signature, broker)
        try:
            open_signed("audit-head", document, broker_public)
        except SignatureInvalid:
            raise AuditHeadForged(
                f"audit log: expected a head signed by {broker_public.hex()[:16]}..., found one "
                f"that claims {broker.hex()[:16]}...; it was changed, or is another broker's"
            ) from None
        if broker != broker_public:
            raise AuditHeadForged("audit log: expected a head that names its own broker")
        return head


def read_entries(home: Path) -> Iterator[Entry]:
    """The entries in a broker's home, oldest first, unchecked; also while the broker runs."""
    with closing(open_for_reading(home)) as database:
        for _, body in database.execute(_ENTRIES):
            yield Entry.from_bytes(body)


def open_for_reading(home: Path) -> sqlite3.Connection:
    """A connection that cannot write; raises sqlite3.Error."""
    uri = (home / "broker.db").absolute().as_uri() + "?mode=ro"
    return sqlite3.connect(uri, uri=True, isolation_level=None, timeout=10)


def check_chain(
    bodies: Iterable[tuple[int, bytes]], head: Head, witnessed: Mapping[int, str]
) -> int:
    """Walks the chain from its beginning to the signed head; returns how many entries there are.

    Args:
        bodies: (sequence, entry) of every entry, in order.
        head: the opened head.
        witnessed: digests by sequence, from a witness; each must be found in the chain.

    Raises:
        AuditEntryMissing, AuditEntryEdited, AuditTruncated, WitnessContradicted
    """
    at = Head()
    for sequence, body in bodies:
        if sequence != at.sequence + 1:
            raise AuditEntryMissing(
                f"audit log: expected entry {at.sequence + 1}, found entry {sequence}; entries "
                "between them were taken away"
            )
        if sequence > head.sequence:
            raise AuditEntryEdited(
                f"audit log: expected {head.sequence} entries as signed, found entry {sequence}; "
                "it was added by somebody else"
            )
        try:
            entry = Entry.from_bytes(body)
        except MalformedInput as error:
            raise AuditEntryEdited(f"audit log: entry {sequence}: {error}") from None
        if (entry.sequence, entry.previous) != (sequence, at.digest):
            raise AuditEntryEdited(
                f"audit log: expected entry {sequence} to follow {at.digest[:16]}..., found one "
                f"that follows {entry.previous[:16]}...; entry {max(sequence - 1, 1)} or "
                f"{sequence} was changed"
            )
        at = Head.of(sequence, body)
        if witnessed.get(sequence, at.digest) != at.digest:
            raise WitnessContradicted(
                f"audit log: expected entry {sequence} to be {witnessed[sequence][:16]}... as "
                f"witnessed, found {at.digest[:16]}...; this is another history than the "
                "witness saw"
            )
    if at.sequence < head.sequence:
        raise AuditTruncated(
            f"audit log: expected {head.sequence} entries as signed, found {at.sequence}; the "
            "newest were taken away"
        )
    if at != head:
        raise AuditEntryEdited(
            f"audit log: expected entry {head.sequence} to be {head.digest[:16]}... as signed, "
            f"found {at.digest[:16]}...; it was changed"
        )
    return at.sequence


@dataclass(frozen=True, slots=True)
class Witnessed:
    """What a witness file holds.

    Attributes:
        heads: digests by sequence.
        torn: lines that are no heads, as a crash leaves one.
    """

    heads: Mapping[int, str] = field(default_factory=dict)
    torn: int = 0

    @property
    def newest(self) -> int:
        """The highest sequence that was witnessed; 0 for none."""
        return max(self.heads, default=0)


def read_witness(path: Path, broker_public: bytes) -> Witnessed:
    """Reads and checks a witness file.

    Raises:
        WitnessUnusable: it cannot be read, or holds lines but not one head.
        AuditHeadForged: a head in it is not this broker's.
        WitnessContradicted: it holds two heads of one length.
    """
    heads: dict[int, str] = {}
    torn = 0
    try:
        with path.open("rb") as file:
            while line := file.readline(4 * MAX_HEAD_BYTES):
                try:
                    head = Head.open(line.rstrip(b"\n"), broker_public)
                except MalformedInput:
                    torn += 1
                    continue
                if heads.setdefault(head.sequence, head.digest) != head.digest:
                    raise WitnessContradicted(
                        f"{path}: expected one history, found two heads of {head.sequence} "
                        "entries; the broker ran from a restored database"
                    )
    except OSError as error:
        raise WitnessUnusable(f"{path}: could not read the witness: {error.strerror}") from None
    if torn and not heads:
        raise WitnessUnusable(f"{path}: expected heads of an audit log, found none")
    return Witnessed(heads, torn)


def require_not_behind(head: Head, witnessed: Witnessed) -> None:
    """Refuses a database that is older than what was witnessed; raises StateRolledBack."""
    if witnessed.newest > head.sequence:
        raise StateRolledBack(
            f"audit log: expected at least {witnessed.newest} entries as witnessed, found "
            f"{head.sequence}; this is an older database than the one that ran, and it may have "
            "forgotten revocations: restore the newest"
        )


def check_format(database: sqlite3.Connection, path: Path, *, allow_empty: bool) -> None:
    """Checks that a database is a broker's, of this version and whole.

    Raises:
        StateDamaged, StateOtherVersion
        sqlite3.DatabaseError: the file is no database.
    """
    application = database.execute("PRAGMA application_id").fetchone()[0]
    version = database.execute("PRAGMA user_version").fetchone()[0]
    tables = database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    if allow_empty and (application, version, tables) == (0, 0, 0):
        return
    if application != APPLICATION_ID:
        raise StateDamaged(
            f"{path}: expected a broker's database, found another; restore the newest copy"
        )
    if version != SCHEMA_VERSION:
        raise StateOtherVersion(
            f"{path}: expected version {SCHEMA_VERSION}, found {version}; run the broker that "
            "wrote it, or start with an empty home and install the documents again"
        )
    found = database.execute("PRAGMA quick_check(1)").fetchone()[0]
    if found != "ok":
        raise StateDamaged(f"{path}: expected a whole database, found: {found[:200]}")


def open_stored_head(signed: bytes, broker_public: bytes) -> Head:
    """Opens the head that lies in the database; raises AuditHeadForged."""
    try:
        return Head.open(signed, broker_public)
    except MalformedInput as error:
        raise AuditHeadForged(f"audit log: expected a signed head: {error}") from None


def damaged(path: Path, error: sqlite3.Error) -> StateDamaged:
    """The error for what SQLite cannot read."""
    return StateDamaged(
        f"{path}: expected a broker's database, found: {error}; restore the newest copy, or start "
        "with an empty home and install the documents again"
    )


@dataclass(frozen=True, slots=True)
class Audited:
    """What `verify_home` found in order.

    Attributes:
        entries: how many entries.
        digest: of the last (hex).
        last_time_ms: its time; 0 for none.
        events: how often each event occurs.
        witnessed: highest sequence that the witness has; 0 without a witness.
        torn: lines of the witness that are no heads.
    """

    entries: int
    digest: str
    last_time_ms: int
    events: Mapping[str, int]
    witnessed: int
    torn: int


def verify_home(home: Path, broker_public: bytes, witness: Path | None = None) -> Audited:
    """Checks the whole log in a broker's home, running or not, and holds it against a witness.

    Raises:
        StateMissing, StateDamaged, StateOtherVersion, StateRolledBack
        AuditError: one of its kinds, for the first thing that is wrong.
    """
    # The witness first: a running broker's log only grows.
    witnessed = read_witness(witness, broker_public) if witness is not None else Witnessed()
    if not (home / "broker.db").is_file():
        raise StateMissing(f"{home}: expected a broker's home with broker.db in it, found none")
    events: Counter[str] = Counter()
    last_time_ms = 0

    def walk(database: sqlite3.Connection) -> Iterator[tuple[int, bytes]]:
        nonlocal last_time_ms
        for sequence, body in database.execute(_ENTRIES):
            yield sequence, body
            entry = Entry.from_bytes(body)
            events[entry.event] += 1
            last_time_ms = entry.time_ms

    try:
        with closing(open_for_reading(home)) as database:
            database.execute("BEGIN")
            check_format(database, home / "broker.db", allow_empty=False)
            signed = database.execute("SELECT signed FROM head").fetchone()
            head = open_stored_head(signed[0], broker_public) if signed else Head()
            check_chain(walk(database), head, witnessed.heads)
    except sqlite3.DatabaseError as error:
        raise damaged(home / "broker.db", error) from None
    require_not_behind(head, witnessed)
    return Audited(
        head.sequence, head.digest, last_time_ms, events, witnessed.newest, witnessed.torn
    )
