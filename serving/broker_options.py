"""Options of `bulkhead broker audit`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

AddCommand = Callable[..., argparse.ArgumentParser]


def add_broker_commands(parser: argparse.ArgumentParser, add: AddCommand) -> None:
    """Adds what can follow `bulkhead broker`; `add` is how the command line adds each command."""
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    audit = add(
        commands,
        "audit",
        _audit,
        "print or verify the audit log",
        about="""
        Prints the audit log of a broker, running or not. With --verify checks instead: every
        entry's place in the hash chain, the broker's signature over the head, and that the log is
        the one that the witness saw, and not an older copy.

        exit codes: 0 in order, 1 something is wrong (named), 2 nothing to verify
        """,
        example="""
        bulkhead broker audit --verify --home /var/lib/bulkhead --witness /mnt/witness/heads
        """,
    )
    audit.add_argument("--verify", action="store_true", help="check, and print a summary")
    # Without defaults: what stands before "audit" holds too.
    audit.add_argument(
        "--witness",
        type=Path,
        metavar="FILE",
        default=argparse.SUPPRESS,
        help="heads that a witness has",
    )
    audit.add_argument(
        "--broker-key", type=Path, help="the broker's public key (default: broker.pub in its home)"
    )
    audit.add_argument(
        "--home",
        type=Path,
        default=argparse.SUPPRESS,
        help="Bulkhead's files, as for `bulkhead broker`",
    )


def _audit(arguments: argparse.Namespace) -> int:
    from security.broker.audit import read_entries, verify_home
    from security.errors import (
        FileUnusable,
        KeyFileError,
        SecurityError,
        StateMissing,
        WitnessUnusable,
    )
    from security.signing import load_public_key
    from serving.home import Home
    from serving.reporting import BAD_INPUT

    home = Home(arguments.home).broker
    try:
        if not (home / "broker.db").is_file():
            raise StateMissing(f"{home}: expected a broker's home with broker.db in it, found none")
        if not arguments.verify:
            for entry in read_entries(home):
                print(entry.to_bytes().decode())
            return 0
        public = load_public_key(arguments.broker_key or home / "broker.pub")
        found = verify_home(home, public, arguments.witness)
    except (FileUnusable, KeyFileError, StateMissing, WitnessUnusable) as error:
        print(f"bulkhead: {error.code}: {error}", file=sys.stderr)
        return BAD_INPUT
    except SecurityError as error:
        print(f"bulkhead: {error.code}: {error}", file=sys.stderr)
        return 1
    last = datetime.fromtimestamp(found.last_time_ms / 1000, UTC).isoformat(timespec="seconds")
    print(f"entries   {found.entries}, the last at {last}")
    print(f"head      {found.digest}, signed by {public.hex()[:16]}...")
    if arguments.witness is not None:
        print(f"witnessed {found.witnessed} entries ({found.torn} unreadable lines)")
    else:
        print("witnessed not checked: without --witness an older copy looks in order")
    for event, count in sorted(found.events.items()):
        print(f"  {event:16} {count}")
    return 0
