"""`bulkhead attest`: judges evidence, shows it, makes it.

Exit codes of `check`: 0 accepted under a policy, 1 refused, 2 nothing to judge (a missing
directory, nothing that is known in it, an unreadable policy or option), 3 sound but nothing pinned,
because no policy was given.
"""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from placement.policy import Policy
from security.attestation.azure_collector import AzureCollector
from security.attestation.composite import judge_evidence
from security.attestation.document_files import read_file
from security.attestation.evidence import composite_report_data, encode_parts, gpu_nonce
from security.attestation.evidence_directory import GivenFiles, read_evidence
from security.attestation.inspection import inspect_document
from security.attestation.nvml import collect_gpus
from security.attestation.tsm import TsmCollector
from security.attestation.verdict import Check, Verdict
from security.errors import (
    AppraisalError,
    FileUnusable,
    TpmFailed,
    TpmUnavailable,
    TsmUnavailable,
)
from serving.errors import UsageError
from serving.planning import load_policy

ACCEPTED = 0
REFUSED = 1
SOUND = 3
WORDS = {ACCEPTED: "accepted", REFUSED: "refused", SOUND: "sound"}
_LATEST = 1 << 40
_REPORT_DATA_BYTES = 64
_DEVICE_NONCE_BYTES = 32
_FILES = {
    "event_log": "ccel_data.bin",
    "event_table": "ccel_table.bin",
}


@dataclass(frozen=True, slots=True)
class CheckSettings:
    """What `attest check` was asked.

    Attributes:
        directory: directory with evidence; None where files were given one by one.
        given: files that were given.
        policy: policy file, or the name of one; None to judge soundness only.
        at: Unix time in seconds; None for now.
        nonce: the challenge; None where it is not known.
        as_json: whether a program reads the answer.
    """

    directory: Path | None
    given: GivenFiles
    policy: str | None
    at: int | None
    nonce: bytes | None
    as_json: bool


def check(settings: CheckSettings, console: Console) -> int:
    """Judges evidence and prints the verdict; returns the exit code.

    Raises:
        UsageError: there is nothing to judge, or nothing to judge it by.
        PolicyError: the policy is malformed.
    """
    policy = load_policy(settings.policy) if settings.policy is not None else None
    now = int(time.time()) if settings.at is None else settings.at
    try:
        files = read_evidence(settings.directory, settings.given)
    except FileUnusable as error:
        raise UsageError(str(error)) from None
    devices_alone = bool(files.devices or files.tokens) and not files.kind
    if settings.nonce is not None:
        _require_nonce(settings.nonce, devices_alone)
    verdict = judge_evidence(files, policy, now, settings.nonce)
    code = exit_code(verdict, policy)
    if settings.as_json:
        print(json.dumps(to_document(verdict, code, now), indent=1))
    else:
        _print_verdict(verdict, code, now, console)
    return code


def exit_code(verdict: Verdict, policy: Policy | None) -> int:
    """0, 1 or 3."""
    if not verdict.holds:
        return REFUSED
    return SOUND if policy is None else ACCEPTED


def _require_nonce(nonce: bytes, devices_alone: bool) -> None:
    if devices_alone and len(nonce) != _DEVICE_NONCE_BYTES:
        raise UsageError(
            f"--nonce: expected {_DEVICE_NONCE_BYTES} bytes, as SPDM has, found {len(nonce)}"
        )


# -- one stable object --------------------------------------------------------------------------


def to_document(verdict: Verdict, code: int, at: int) -> dict[str, object]:
    """The answer of `attest check --json`; docs/attestation.md lists its fields."""
    return {"verdict": WORDS[code], "exit": code, "at": at, **_verdict_document(verdict)}


def _verdict_document(verdict: Verdict) -> dict[str, object]:
    return {
        "kind": verdict.kind,
        "product": verdict.product,
        "measurement": verdict.measurement,
        "identity": verdict.identity,
        "fields": dict(verdict.fields),
        "checks": [_check_document(item) for item in verdict.checks],
        "notes": list(verdict.notes),
        "devices": [_verdict_document(device) for device in verdict.devices],
    }


def _check_document(item: Check) -> dict[str, object]:
    failure = item.failure
    return {
        "name": item.name,
        "source": item.source,
        "ok": failure is None,
        "judged": not item.skipped,
        "code": "" if failure is None else failure.code,
        "reason": item.skipped if failure is None else str(failure),
    }


# -- for people ---------------------------------------------------------------------------------


def _print_verdict(verdict: Verdict, code: int, now: int, console: Console) -> None:
    _print_part(verdict, verdict.kind, console)
    when = datetime.fromtimestamp(now, UTC).isoformat()
    colour = {ACCEPTED: "bold green", REFUSED: "bold red", SOUND: "bold yellow"}[code]
    said = {
        ACCEPTED: "accepted under the policy",
        REFUSED: "refused",
        SOUND: "sound, but nothing is pinned: give --policy to have it accepted or refused",
    }[code]
    console.print(Text(f"verdict at {when}: {said}", style=colour), soft_wrap=True)
    for failure in verdict.failures:
        console.print(Text(_clean(f"  {failure.code}: {failure}")), soft_wrap=True)


def _print_part(verdict: Verdict, title: str, console: Console) -> None:
    named = [title, verdict.product, verdict.identity and f"of {verdict.identity}"]
    console.print(Text(_clean(" ".join(text for text in named if text)), "bold"), soft_wrap=True)
    _print_fields(dict(verdict.fields), console)
    table = Table(box=None, pad_edge=True)
    table.add_column("check", no_wrap=True)
    table.add_column("")
    table.add_column("reason", overflow="fold")
    for item in verdict.checks:
        if item.failure is not None:
            state, why = Text("refused", "red"), item.failure.code
        elif item.skipped:
            state, why = Text("not judged", "yellow"), item.skipped
        else:
            state, why = Text("ok", "green"), ""
        table.add_row(Text(_clean(item.name)), state, Text(_clean(why)))
    if verdict.checks:
        console.print(table)
    for note in verdict.notes:
        console.print(Text(_clean(f"  note: {note}")), soft_wrap=True)
    console.print()
    for number, device in enumerate(verdict.devices):
        _print_part(device, f"{device.kind} {number}", console)


def _print_fields(fields: dict[str, str], console: Console) -> None:
    width = max((len(name) for name in fields), default=0)
    for name, value in fields.items():
        line = Text(f"  {_clean(name).ljust(width)}  ")
        line.append(_clean(value) or "-")
        console.print(line, soft_wrap=True)


def _clean(text: str) -> str:
    """What came from outside must not steer the terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)


# -- inspect ------------------------------------------------------------------------------------


def inspect(path: Path, as_json: bool, console: Console) -> int:
    """Prints what a file says, field by field, believing nothing of it.

    Raises:
        UsageError: the file cannot be read.
    """
    try:
        data = read_file(path)
    except FileUnusable as error:
        raise UsageError(str(error)) from None
    try:
        sections = inspect_document(data)
    except AppraisalError as error:
        console.print(Text(_clean(f"{path.name}: {error.code}: {error}"), "red"), soft_wrap=True)
        return REFUSED
    if as_json:
        document = [{"title": item.title, "fields": dict(item.fields)} for item in sections]
        print(json.dumps(document, indent=1))
        return ACCEPTED
    for section in sections:
        console.print(Text(_clean(section.title), "bold"), soft_wrap=True)
        _print_fields(dict(section.fields), console)
        console.print()
    console.print("nothing of this was verified: `bulkhead attest check` does")
    return ACCEPTED


# -- collect ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CollectSettings:
    """What `attest collect` was asked.

    Attributes:
        output: directory to make.
        nonce: the verifier's challenge (1 to 64 bytes).
        configfs: directory of report instances.
        acpi_tables: directory of ACPI tables.
        privilege_level: VMPL to report for; None for the least that is admitted.
        service_provider: refused unless "".
        gpus: whether GPUs answer too.
    """

    output: Path
    nonce: bytes
    configfs: Path
    acpi_tables: Path
    privilege_level: int | None
    service_provider: str
    gpus: bool


def collect(settings: CollectSettings, console: Console) -> int:
    """Has this machine, and its GPUs, prove themselves; writes what `attest check` reads.

    Raises:
        UsageError: the directory exists.
        CollectionError, NoCollector: there is no way to make evidence here, or it failed.
    """
    if settings.output.exists():
        raise UsageError(f"{settings.output}: expected a directory that is still to be made")
    collector = _machine_collector(settings)
    # The devices answer first: the machine's evidence is bound to what they say.
    devices = collect_gpus(gpu_nonce(settings.nonce)) if settings.gpus else {}
    data = settings.nonce
    if devices:
        data = composite_report_data(settings.nonce, encode_parts(devices))
    if isinstance(collector, TsmCollector):
        data = data.ljust(_REPORT_DATA_BYTES, b"\0")
    parts = collector.collect_parts(data)
    settings.output.mkdir(mode=0o700, parents=True)
    for name, content in (parts | devices).items():
        suffix = "pem" if name.endswith(".chain") else "bin"
        (settings.output / _FILES.get(name, f"{name}.{suffix}")).write_bytes(content)
    console.print(
        Text(f"{settings.output}: {collector.kind}, {len(devices) // 2} GPUs; look at it with "),
        Text(f"bulkhead attest check {settings.output} --nonce {settings.nonce.hex()}"),
        soft_wrap=True,
    )
    return ACCEPTED


def _machine_collector(settings: CollectSettings) -> TsmCollector | AzureCollector:
    """The kernel's report device, else Azure's vTPM."""
    try:
        return TsmCollector.detect(
            settings.configfs,
            settings.acpi_tables,
            privilege_level=settings.privilege_level,
            service_provider=settings.service_provider,
        )
    except TsmUnavailable:
        try:
            return AzureCollector.detect()
        except (TpmUnavailable, TpmFailed):
            # Neither is there; what was asked for first is what is said.
            pass
        raise


# -- values of options --------------------------------------------------------------------------


def parse_time(text: str) -> int:
    """Unix seconds, or an ISO 8601 date or time, in UTC where it does not say otherwise.

    Raises:
        ValueError
    """
    if re.fullmatch(r"[0-9]{1,13}", text) and not re.fullmatch(r"[0-9]{8}", text):
        seconds = int(text)
    else:
        parsed = datetime.fromisoformat(text)
        if parsed.tzinfo is None:
            parsed = parsed.replace(tzinfo=UTC)
        seconds = int(parsed.timestamp())
    if not 0 <= seconds < _LATEST:
        raise ValueError(f"expected a time from 1970 on, found {text!r}")
    return seconds


def parse_nonce(text: str) -> bytes:
    """1 to 64 bytes in hexadecimal digits.

    Raises:
        ValueError
    """
    if not re.fullmatch(r"(?:[0-9A-Fa-f]{2}){1,64}", text):
        raise ValueError(f"expected 2 to 128 hexadecimal digits, found {text[:40]!r}")
    nonce = bytes.fromhex(text)
    if not any(nonce):
        # Report data that nobody filled in would answer it.
        raise ValueError("expected a nonce, found zeros only")
    return nonce
