"""`bulkhead seal` and `bulkhead unseal`: the owner's side of sealed checkpoints."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from serving.attest_options import AddCommand, Commands
from serving.errors import UsageError

if TYPE_CHECKING:
    from security.sealing.writer import SealReport


def add_seal(commands: Commands, add: AddCommand) -> None:
    """Adds `seal`; `add` is how the command line adds each command."""
    parser = add(
        commands,
        "seal",
        _seal,
        "encrypt parts of a model, so that only admitted stages can read them",
        about="""
        Writes a copy of a model in which the chosen parts are encrypted; the rest stays as it is.
        Each part (embed, every layer, norm, head) has a key of its own, wrapped for the owner's
        recovery key and for the broker's unsealing key in OUT/sealed_keys.json. Nobody can open
        the parts without one of the two private keys: keep the recovery key offline.
        """,
        example="""
        bulkhead seal models/demo sealed/ --layers 0-3,embed,head --new-key recovery.key
        bulkhead seal models/demo sealed/ --layers all --recovery-key recovery.key.pub \\
            --broker-key broker-unseal.pub
        """,
    )
    parser.add_argument("model", help="directory or hub id")
    parser.add_argument("output", type=Path, metavar="OUT", help="directory to make")
    parser.add_argument(
        "--layers",
        required=True,
        metavar="PARTS",
        help="layers (3), ranges (0-3), embed, norm, head, separated by commas; or all",
    )
    owner = parser.add_mutually_exclusive_group(required=True)
    owner.add_argument(
        "--new-key",
        type=Path,
        metavar="FILE",
        help="make a recovery key: the private one to FILE (mode 0600), the public to FILE.pub",
    )
    owner.add_argument(
        "--recovery-key", type=Path, metavar="FILE", help="public recovery key (X25519, PEM)"
    )
    parser.add_argument(
        "--broker-key",
        type=Path,
        metavar="FILE",
        help="the broker's public unsealing key (X25519, PEM)",
    )


def _seal(arguments: argparse.Namespace) -> int:
    from security.errors import SelectionInvalid
    from security.sealing.document import parse_selection
    from security.sealing.keys import (
        create_unsealing_key,
        load_unsealing_public,
        unsealing_public_pem,
    )
    from security.sealing.writer import seal_checkpoint
    from serving.model_source import find_model
    from serving.progress import Narrator

    try:
        selection = parse_selection(arguments.layers)
    except SelectionInvalid as error:
        raise UsageError(f"--layers: {error}") from None
    recipients: list[bytes] = []
    if arguments.broker_key is not None:
        recipients.append(load_unsealing_public(arguments.broker_key))
    if arguments.recovery_key is not None:
        recipients.append(load_unsealing_public(arguments.recovery_key))
    narrator = Narrator()
    with narrator.step("model: find") as step:
        directory = find_model(arguments.model, step).directory
    made: list[Path] = []
    taken = os.path.lexists(arguments.output)
    try:
        if arguments.new_key is not None:
            public_path = Path(f"{arguments.new_key}.pub")
            if public_path.exists():
                raise UsageError(f"--new-key: expected no {public_path}, found one; name another")
            # Before the checkpoint: sealed weights must never be without a key that opens them.
            public = create_unsealing_key(arguments.new_key).public_key().public_bytes_raw()
            made += [arguments.new_key, public_path]
            public_path.write_bytes(unsealing_public_pem(public))
            recipients.append(public)
        with narrator.step("seal"):
            report = seal_checkpoint(directory, arguments.output, selection, recipients)
    except BaseException:
        if taken or not os.path.lexists(arguments.output):
            for path in made:
                path.unlink(missing_ok=True)
        raise
    _print_report(report, "sealed")
    if arguments.broker_key is None:
        print("broker  none: only the recovery key opens this copy (--broker-key)")
    return 0


def add_unseal(commands: Commands, add: AddCommand) -> None:
    """Adds `unseal`; `add` is how the command line adds each command."""
    parser = add(
        commands,
        "unseal",
        _unseal,
        "decrypt a sealed model, for its owner",
        about="""
        Writes the model in the clear again, tensor by tensor the same bytes. OUT is readable by
        you alone. Run it only where the model may be in the clear: a stage never needs it.
        """,
        example="bulkhead unseal sealed/ clear/ --key recovery.key",
    )
    parser.add_argument("sealed", type=Path, help="directory that `bulkhead seal` made")
    parser.add_argument("output", type=Path, metavar="OUT", help="directory to make")
    parser.add_argument(
        "--key", type=Path, required=True, metavar="FILE", help="the private recovery key"
    )


def _unseal(arguments: argparse.Namespace) -> int:
    from security.sealing.keys import load_unsealing_key
    from security.sealing.writer import unseal_checkpoint
    from serving.progress import Narrator

    key = load_unsealing_key(arguments.key)
    with Narrator().step("unseal"):
        report = unseal_checkpoint(arguments.sealed, arguments.output, key)
    _print_report(report, "opened")
    return 0


def _print_report(report: SealReport, what: str) -> None:
    print(f"{what}  {', '.join(report.units)}")
    print(f"tensors {report.tensors} {what}, {report.plain_tensors} as they were")
    print(f"bytes   {report.sealed_bytes} {what}")
    print(f"digest  {report.manifest_digest}")
    for name in report.left_out:
        print(f"left out: {name} (it could hold weights)")
