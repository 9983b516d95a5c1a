"""Options of `bulkhead attest`; what the commands do is in `serving.attest`."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, TypeVar

if TYPE_CHECKING:
    from security.attestation.evidence_directory import GivenFiles

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
AddCommand: TypeAlias = Callable[..., argparse.ArgumentParser]
ValueT = TypeVar("ValueT")


def add_attest(commands: Commands, add: AddCommand) -> None:
    """Adds `attest` with its three commands; `add` is how the command line adds each command."""
    parser = commands.add_parser(
        "attest",
        help="judge, show and make evidence of machines and GPUs",
        description=textwrap.dedent(
            """\
            Judges, shows and makes evidence of confidential machines: AMD SEV-SNP, Intel TDX,
            Azure's vTPM, NVIDIA GPUs and switches. Nothing is fetched from anywhere."""
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    inner = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_check(inner, add)
    _add_inspect(inner, add)
    _add_collect(inner, add)


def _add_check(commands: Commands, add: AddCommand) -> None:
    parser = add(
        commands,
        "check",
        _check,
        "judge evidence by a policy",
        about="""
        Judges the evidence in a directory: signatures, chains, dates, revocation, what the vendors
        publish, and everything that the policy pins. Prints every check and every reason.

        exit codes: 0 accepted under the policy, 1 refused, 2 nothing to judge or bad usage,
        3 sound but nothing pinned (no --policy)
        """,
        example="""
        bulkhead attest check evidence/ --policy policy.yaml --nonce 5f3c...
        bulkhead attest check evidence/ --at 2025-06-20 --json
        bulkhead attest check --report report.bin --vcek vcek.der --collateral amd/
        """,
    )
    parser.add_argument("directory", nargs="?", type=Path, help="directory with evidence")
    parser.add_argument("--policy", help="policy file, or the name of one in clusters/policies")
    parser.add_argument(
        "--at", type=_time, help="judge as of: ISO date or time (UTC), Unix seconds"
    )
    parser.add_argument("--nonce", type=_nonce, help="the challenge, in hexadecimal digits")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument(
        "--collateral",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="vendors' certificates, lists, TCB info, manifests (may be repeated)",
    )
    files = parser.add_argument_group("files, each instead of what the directory holds")
    files.add_argument("--report", type=Path, help="SEV-SNP report, or a GPU's (binary, hex)")
    files.add_argument("--quote", type=Path, help="TDX quote")
    files.add_argument("--vcek", type=Path, help="VCEK or VLEK certificate")
    files.add_argument("--chain", type=Path, help="certificates above it, or a GPU's chain")
    files.add_argument("--event-log", type=Path, help="TDX event log (CCEL data)")
    files.add_argument("--event-table", type=Path, help="ACPI table CCEL")
    files.add_argument(
        "--rim",
        type=Path,
        action="append",
        default=[],
        help="NVIDIA manifest (may be repeated)",
    )


def _check(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from serving.attest import CheckSettings, check
    from serving.errors import UsageError

    given = _given(arguments)
    if arguments.directory is None and not (given.report or given.quote or given.endorsement):
        raise UsageError("attest check: expected a directory, --report, --quote or --vcek")
    settings = CheckSettings(
        directory=arguments.directory,
        given=given,
        policy=arguments.policy,
        at=arguments.at,
        nonce=arguments.nonce,
        as_json=arguments.json,
    )
    return check(settings, Console())


def _given(arguments: argparse.Namespace) -> GivenFiles:
    from security.attestation.evidence_directory import GivenFiles

    return GivenFiles(
        report=arguments.report,
        quote=arguments.quote,
        endorsement=arguments.vcek,
        chain=arguments.chain,
        event_log=arguments.event_log,
        event_table=arguments.event_table,
        rims=tuple(arguments.rim),
        collateral=tuple(arguments.collateral),
    )


def _add_inspect(commands: Commands, add: AddCommand) -> None:
    parser = add(
        commands,
        "inspect",
        _inspect,
        "show a file of evidence field by field; verifies nothing",
        about="""
        Shows what a file says: SEV-SNP report, TDX quote, Azure HCL report or JSON evidence, GPU
        report, certificate with the vendors' extensions, revocation list, NVIDIA manifest, NRAS
        token, event log. What it is is found out from the content.
        """,
        example="bulkhead attest inspect report.bin",
    )
    parser.add_argument("file", type=Path, help="the file")
    parser.add_argument("--json", action="store_true", help="a JSON list of sections")


def _inspect(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from serving.attest import inspect

    return inspect(arguments.file, arguments.json, Console())


def _add_collect(commands: Commands, add: AddCommand) -> None:
    parser = add(
        commands,
        "collect",
        _collect,
        "make evidence of this machine",
        about="""
        Has this machine prove itself over a nonce and writes the evidence into a new directory for
        `attest check`. SEV-SNP and TDX through the kernel's configfs-tsm; with --gpus NVIDIA's GPUs
        answer too and the machine's evidence is bound to their answers. Needs root.
        """,
        example="bulkhead attest collect evidence/ --nonce $(openssl rand -hex 32) --gpus",
    )
    parser.add_argument("output", type=Path, help="directory to make")
    parser.add_argument(
        "--nonce", type=_nonce, required=True, help="the verifier's challenge, in hex digits"
    )
    parser.add_argument("--gpus", action="store_true", help="with the evidence of every GPU")
    parser.add_argument("--privilege-level", type=int, help="VMPL (default: the least there is)")
    parser.add_argument("--service-provider", default="", help=argparse.SUPPRESS)
    parser.add_argument("--configfs", type=Path, help="directory of report instances")
    parser.add_argument("--acpi-tables", type=Path, help="directory of ACPI tables")


def _collect(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from security.attestation.tsm import ACPI_TABLES, REPORTS
    from serving.attest import CollectSettings, collect

    settings = CollectSettings(
        output=arguments.output,
        nonce=arguments.nonce,
        configfs=arguments.configfs or REPORTS,
        acpi_tables=arguments.acpi_tables or ACPI_TABLES,
        privilege_level=arguments.privilege_level,
        service_provider=arguments.service_provider,
        gpus=arguments.gpus,
    )
    return collect(settings, Console(stderr=True))


def _time(text: str) -> int:
    from serving.attest import parse_time

    return _parsed(parse_time, text)


def _nonce(text: str) -> bytes:
    from serving.attest import parse_nonce

    return _parsed(parse_nonce, text)


def _parsed(parse: Callable[[str], ValueT], text: str) -> ValueT:
    try:
        return parse(text)
    except (ValueError, OverflowError) as error:
        raise argparse.ArgumentTypeError(str(error)[:200]) from None
