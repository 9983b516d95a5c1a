"""The audit log: its chain, its signed head, its witnesses, and what is said of a wrong one."""

from __future__ import annotations

import shutil
import socket
import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import closing
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from security_samples import Lab

from security import errors
from security.broker.audit import Head, read_entries, read_witness, verify_home
from security.broker.service import start_broker
from security.broker.store import BrokerStore
from security.broker.witness import Witness, to_file, to_http
from security.signing import public_bytes
from serving.cli import run


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    """A log with a few entries; its broker has ended."""
    lab = Lab(tmp_path)
    lab.install()
    lab.admit("stage-0")
    lab.admit("stage-1")
    lab.close()
    return lab


@pytest.fixture
def public(lab: Lab) -> bytes:
    return lab.broker.public_key


def change(lab: Lab, statements: str) -> None:
    with closing(sqlite3.connect(lab.home / "broker.db")) as database:
        database.executescript(statements)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_in_order(lab: Lab, public: bytes) -> None:
    found = verify_home(lab.home, public)
    assert found.entries == 4
    assert found.events == {"started": 1, "installed": 1, "admitted": 2}


def test_refusals_are_chained_too(lab: Lab, public: bytes) -> None:
    lab.broker = lab.start()
    with pytest.raises(errors.UnknownRole):
        lab.broker.challenge("pipeline-0", "stage-9", "test")
    assert verify_home(lab.home, public).events["refused"] == 1, "also while it runs"


@pytest.mark.parametrize(
    ("statements", "error"),
    [
        ("DELETE FROM audit WHERE sequence = 4", errors.AuditTruncated),
        ("DELETE FROM audit WHERE sequence = 2", errors.AuditEntryMissing),
        ("DELETE FROM audit WHERE sequence = 1", errors.AuditEntryMissing),
        ("UPDATE audit SET body = x'7b7d' WHERE sequence = 3", errors.AuditEntryEdited),
        (
            "UPDATE audit SET body = CAST(replace(CAST(body AS TEXT), 'node-a', 'node-b') AS BLOB)"
            " WHERE sequence = 3",
            errors.AuditEntryEdited,
        ),
        (
            "UPDATE audit SET body = CAST(replace(CAST(body AS TEXT), 'node-a', 'node-b') AS BLOB)"
            " WHERE sequence = 4",
            errors.AuditEntryEdited,
        ),
        ("INSERT INTO audit VALUES (5, x'7b7d')", errors.AuditEntryEdited),
        ("DELETE FROM head", errors.AuditEntryEdited),
        ("UPDATE head SET signed = x'7b7d'", errors.AuditHeadForged),
        ("PRAGMA user_version = 99", errors.StateOtherVersion),
        ("PRAGMA application_id = 7", errors.StateDamaged),
    ],
)
def test_changed_log(
    lab: Lab,
    public: bytes,
    statements: str,
    error: type[errors.SecurityError],
    capsys: pytest.CaptureFixture[str],
) -> None:
    change(lab, statements)
    with pytest.raises(error) as caught:
        verify_home(lab.home, public)
    assert type(caught.value) is error
    lab.path.chmod(0o700)
    assert run(["broker", "audit", "--verify", "--home", str(lab.path)]) == 1
    assert error.code in capsys.readouterr().err


def test_a_broker_does_not_start_on_a_log_with_another_end(lab: Lab) -> None:
    last = "(SELECT max(sequence) FROM audit)"
    lab.broker.close()
    change(lab, f"UPDATE audit SET body = x'7b7d' WHERE sequence = {last}")
    with pytest.raises(errors.AuditEntryEdited):
        BrokerStore(lab.home)


def test_whole_chain_made_anew_needs_the_key(lab: Lab, public: bytes) -> None:
    other = Lab(lab.path / "other")
    other.close()
    with pytest.raises(errors.AuditHeadForged):
        verify_home(other.home, public)


def test_restored_database(lab: Lab, public: bytes) -> None:
    witness = lab.path / "witness"
    yesterday = shutil.copytree(lab.home, lab.path / "yesterday")
    server = start_broker("127.0.0.1:0", lab.home, lab.owner_public, witness=witness)
    server.stop(0)
    assert verify_home(lab.home, public, witness).witnessed == 5
    shutil.rmtree(lab.home)
    shutil.copytree(yesterday, lab.home)
    assert verify_home(lab.home, public).entries == 4, "by itself it looks in order"
    with pytest.raises(errors.StateRolledBack):
        verify_home(lab.home, public, witness)
    with pytest.raises(errors.StateRolledBack):
        start_broker("127.0.0.1:0", lab.home, lab.owner_public, witness=witness)
    # Run without its witness, it goes on to another history, which the witness contradicts.
    for _ in range(2):
        lab.broker = lab.start()
    lab.close()
    with pytest.raises(errors.WitnessContradicted):
        verify_home(lab.home, public, witness)
    assert run(["broker", "audit", "--verify", "--home", str(lab.path)]) == 0
    line = ["broker", "audit", "--verify", "--home", str(lab.path), "--witness", str(witness)]
    assert run(line) == 1


def test_broker_of_another_history(lab: Lab) -> None:
    witness = lab.path / "witness"
    yesterday = shutil.copytree(lab.home, lab.path / "yesterday")
    start_broker("127.0.0.1:0", lab.home, lab.owner_public, witness=witness).stop(0)
    shutil.rmtree(lab.home)
    shutil.copytree(yesterday, lab.home)
    lab.clock.now += 1
    for _ in range(2):
        lab.broker = lab.start()
    lab.close()
    with pytest.raises(errors.WitnessContradicted):
        start_broker("127.0.0.1:0", lab.home, lab.owner_public, witness=witness)


def test_witness_files(lab: Lab, public: bytes) -> None:
    key, other = lab.owner, lab.path / "witness"
    with pytest.raises(errors.WitnessUnusable):
        read_witness(other, public)
    other.write_bytes(b"nothing\n")
    with pytest.raises(errors.WitnessUnusable):
        read_witness(other, public)
    signer = public_bytes(key)
    other.write_bytes(Head(3, "a" * 64).signed(key)[:40])  # a crash in the middle of a line
    to_file(other)(Head(4, "b" * 64).signed(key))
    found = read_witness(other, signer)
    assert (found.newest, found.torn) == (4, 1)
    with pytest.raises(errors.AuditHeadForged):
        read_witness(other, public)
    to_file(other)(Head(4, "c" * 64).signed(key))
    with pytest.raises(errors.WitnessContradicted):
        read_witness(other, signer)


def test_http_witness(lab: Lab, public: bytes) -> None:
    """One that fails at first is tried again; both turns are in the log, and nothing waits."""
    heads: list[bytes] = []
    answers = [500, 500]

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            status = answers.pop(0) if answers else 200
            if status == 200:
                heads.append(body)
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{http.server_port}/"
        server = start_broker("127.0.0.1:0", lab.home, lab.owner_public, witness_url=url)
        try:
            wait_until(lambda: any(e.event == "witness_answers" for e in read_entries(lab.home)))
        finally:
            server.stop(0)
            http.shutdown()
    failures = [e for e in read_entries(lab.home) if e.event == "witness_failed"]
    assert len(failures) == 1 and "500" in failures[0].fields["reason"]
    assert Head.open(heads[-1], public).sequence >= 5


def test_a_witness_that_speaks_no_http_is_a_witness_that_fails() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        reasons: list[str] = []
        url = f"http://127.0.0.1:{server.getsockname()[1]}/"
        witness = Witness("test", to_http(url), reasons.append)
        witness.publish(b"a head")
        for _ in range(2):
            # Tried again: its thread lives.
            connection, _ = server.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(b"garbage\r\n\r\n")
        wait_until(lambda: bool(reasons))
        witness.close()
    assert len(reasons) == 1


@pytest.mark.parametrize("url", ["http://user:secret@host/", "https://host/?token=secret"])
def test_no_credential_in_the_name_of_a_witness(
    url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(["broker", "--witness-url", url])
    assert "secret" not in capsys.readouterr().err


def test_commands(tmp_path: Path, lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    lab.path.chmod(0o700)
    assert run(["broker", "audit", "--home", str(lab.path)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4
    assert run(["broker", "--home", str(lab.path), "audit", "--verify"]) == 0
    assert "entries   4" in capsys.readouterr().out
    missing = ["--witness", str(tmp_path / "none")]
    assert run(["broker", "audit", "--verify", "--home", str(lab.path), *missing]) == 2
    assert run(["broker", "audit", "--verify", "--home", str(tmp_path / "empty")]) == 2
    assert "state_missing" in capsys.readouterr().err
    assert run(["broker", "--home", str(lab.path)]) == 2
