"""Options of `bulkhead broker audit` and `bulkhead broker revoke`."""

from __future__ import annotations

import argparse
import re
import sys
from datetime import UTC, datetime
from pathlib import Path

from serving.attest_options import AddCommand, Commands


def add_broker_commands(parser: argparse.ArgumentParser, add: AddCommand) -> None:
    """Adds what can follow `bulkhead broker`; `add` is how the command line adds each command."""
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    _add_revoke(commands, add)
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


def _add_revoke(commands: Commands, add: AddCommand) -> None:
    revoke = add(
        commands,
        "revoke",
        _revoke,
        "have a running broker refuse a machine or instance from now on",
        about="""
        Signs a revocation with the owner's key of this home and installs it at a running broker.
        It is durable there and for good. Shards that it names lose their membership and their
        links at once; their instance goes on when other shards have taken their roles.
        chip: the CPU that evidence names, such as an SEV-SNP CHIP_ID, in hex. GPUs, and CPUs that
        mask their identity, are revoked in the policy (requirements, revoked).
        """,
        example="""
        bulkhead broker revoke node node-7 --broker 10.0.0.5:7000
        """,
    )
    revoke.add_argument("kind", choices=("node", "chip", "measurement", "instance"))
    revoke.add_argument("value", help="name, or lower-case hex of a chip or measurement")
    revoke.add_argument("--broker", required=True, help="HOST:PORT of the key broker")
    revoke.add_argument(
        "--home", type=Path, default=argparse.SUPPRESS, help="where the owner's key is"
    )


def _revoke(arguments: argparse.Namespace) -> int:
    from security.broker.client import BrokerClient
    from security.broker.revocation import VALUE, Revocations, Revoked
    from security.signing import public_bytes
    from serving.errors import UsageError
    from serving.home import Home

    if re.fullmatch(VALUE, arguments.value) is None:
        raise UsageError(f"revoke: expected a value matching {VALUE}, found another")
    home = Home(arguments.home)
    key = home.owner_key()
    # The owner's own copy: a broker could show an older list.
    path = home.path / "revocations"
    kept = path.read_bytes() if path.exists() else b""
    known = Revocations.open(kept, public_bytes(key))
    with BrokerClient(arguments.broker, public_bytes(key)) as client:
        following = known.merged(client.revocations()).with_one(
            Revoked(arguments.kind), arguments.value
        )
        document = following.signed(key)
        fresh = path.with_suffix(".new")
        fresh.write_bytes(document)
        fresh.replace(path)
        generation = client.revoke(document)
    print(f"revoked {arguments.kind} {arguments.value}: generation {generation}")
    return 0


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
