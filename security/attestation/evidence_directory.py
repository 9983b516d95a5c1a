"""Evidence as files: a directory that `bulkhead attest collect` wrote, or that others put together.

Only names that are known are read, so that a directory cannot talk anybody into believing more
than it shows. A file that says by its name that it does not belong (bad, mismatch, partial) is left
out and noted, a manifest only where there is another one; an option can still give it by hand.
Leaving a file out never makes evidence better: what is missing is refused as missing.

===========================  ======================================================================
report.bin                   SEV-SNP report
certificates.bin             certificate table that came with it (configfs-tsm's auxblob)
vcek, vlek .der .pem .crt    the certificate of the chip's or the provider's key
quote.bin                    TDX quote
ccel_data.bin                its event log; ccel_table.bin is the ACPI table of it
collateral.json              TDX collateral
evidence.json                Azure vTPM evidence (an object) or NVIDIA evidence (a list)
hcl_report.bin, tpm_*.bin,   Azure vTPM evidence, part by part
pcrs.bin, td_quote.bin
report.hex with chain.pem    one GPU
gpu_evidence.json            NVIDIA evidence of GPUs; switch_evidence.json of switches
gpu.0.report.bin, ...        the same part by part, with gpu.0.chain.pem, switch.0.report.bin, ...
*detached_eat.json           tokens of NRAS
*.xml                        NVIDIA's manifests
*.crl, crl*.der              revocation lists
===========================  ======================================================================
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from security.attestation.azure_evidence import read_azure_evidence
from security.attestation.collateral import Collateral
from security.attestation.document_files import (
    COLLATERAL_FOLDERS,
    DocumentDirectory,
    certificates_in,
    read_collateral,
    read_document,
    read_file,
)
from security.attestation.nvidia_evidence import read_json_evidence, read_text_evidence
from security.errors import AppraisalError, EvidenceMalformed, FileUnusable

__all__ = ["EvidenceFiles", "GivenFiles", "read_evidence"]

_COUNTER_EXAMPLE = re.compile(r"(?:^|[_-])(?:bad|mismatch|nonmatching|partial)(?:[._-]|$)")
_SNP = {"report.bin": "report", "certificates.bin": "certificates"}
_TDX = {
    "quote.bin": "quote",
    "ccel_data.bin": "event_log",
    "event_log.bin": "event_log",
    "ccel_table.bin": "event_table",
    "event_table.bin": "event_table",
}
_AZURE = {
    "hcl_report.bin": "hcl_report",
    "tpm_message.bin": "tpm_message",
    "tpm_signature.bin": "tpm_signature",
    "pcrs.bin": "pcrs",
    "vcek.bin": "vcek",
    "td_quote.bin": "td_quote",
}
_ENDORSEMENT = re.compile(r"v[cl]ek\.(?:der|pem|crt|cer)")
_DEVICE_PART = re.compile(r"((?:gpu|switch)\.(?:0|[1-9][0-9]?)\.(?:report|chain))\.(?:bin|pem)")
_DEVICE_LISTS = ("gpu_evidence.json", "switch_evidence.json")
_TOKENS = re.compile(r"(?:[0-9A-Za-z_-]+_)?detached_eat\.json")
_COLLATERAL = re.compile(r"collateral\.json|[0-9A-Za-z._-]+\.crl|crl[0-9A-Za-z._-]*\.der")
_SNP_REPORT_BYTES = 1184


@dataclass(frozen=True, slots=True)
class GivenFiles:
    """Files that were named one by one; each takes the place of what a directory holds.

    Attributes:
        report: SEV-SNP report, or a GPU's report (binary or hexadecimal).
        quote: TDX quote.
        endorsement: VCEK or VLEK certificate.
        chain: certificates above it, or a GPU's chain.
        event_log: TDX event log (CCEL data).
        event_table: ACPI table CCEL.
        rims: NVIDIA's manifests.
        collateral: directories of vendors' documents, added to what is found otherwise.
    """

    report: Path | None = None
    quote: Path | None = None
    endorsement: Path | None = None
    chain: Path | None = None
    event_log: Path | None = None
    event_table: Path | None = None
    rims: tuple[Path, ...] = ()
    collateral: tuple[Path, ...] = ()


@dataclass(frozen=True, slots=True)
class EvidenceFiles:
    """What was found.

    Attributes:
        kind: kind of the machine's evidence, or "" where there is none.
        parts: what its verifier takes.
        devices: parts of NVIDIA's devices; empty where there are none.
        tokens: a detached EAT of NRAS; b"" where there is none.
        endorsement: a VCEK or VLEK certificate without any evidence; b"" otherwise.
        collateral: vendors' documents.
        malformed: what could not be taken apart, by kind; it is refused, and said so.
        notes: what was left out, and why.
    """

    kind: str
    parts: Mapping[str, bytes]
    devices: Mapping[str, bytes]
    tokens: bytes
    endorsement: bytes
    collateral: Collateral
    malformed: Mapping[str, AppraisalError] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def read_evidence(path: Path | None, given: GivenFiles) -> EvidenceFiles:
    """Reads a directory, or the files that were given, or both.

    Raises:
        FileUnusable: a directory or file that is missing, too long or leads elsewhere; nothing in
            it that is known; evidence of two machines at once.
    """
    reading = _Reading(given)
    if path is not None:
        directory = DocumentDirectory.open(path)
        for name in directory.names:
            reading.take(directory, name)
    reading.take_given()
    return reading.result(path)


@dataclass(slots=True)
class _Reading:
    given: GivenFiles
    machines: dict[str, dict[str, bytes]] = field(default_factory=dict)
    devices: dict[str, bytes] = field(default_factory=dict)
    text_device: dict[str, bytes] = field(default_factory=dict)
    tokens: bytes = b""
    endorsements: tuple[bytes, ...] = ()
    collateral: Collateral = field(default_factory=Collateral)
    malformed: dict[str, AppraisalError] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    doubtful: dict[str, bytes] = field(default_factory=dict)

    def take(self, directory: DocumentDirectory, name: str) -> None:
        """One file of the directory, if its name is known."""
        if _COUNTER_EXAMPLE.search(name):
            if name.endswith(".xml"):
                self.doubtful[name] = directory.read(name)
            self.notes.append(f"{name} was left out: its name says that it does not belong here")
            return
        for kind, table in (("sev-snp", _SNP), ("tdx", _TDX), ("azure-vtpm", _AZURE)):
            if name in table:
                self._machine(kind)[table[name]] = directory.read(name)
                return
        if name == "evidence.json":
            data = directory.read(name)
            self._azure(data) if data.lstrip()[:1] == b"{" else self._list(data)
        elif name in _DEVICE_LISTS:
            self._list(directory.read(name))
        elif match := _DEVICE_PART.fullmatch(name):
            self.devices[match[1]] = directory.read(name)
        elif name in ("report.hex", "chain.pem"):
            self.text_device[name] = directory.read(name)
        elif _TOKENS.fullmatch(name):
            self.tokens = directory.read(name)
        elif _ENDORSEMENT.fullmatch(name):
            if self.given.endorsement is None:
                self.endorsements += certificates_in(directory.read(name))
        elif name.lower().endswith(".xml"):
            # Manifests are the only XML here; one that lies here is judged, whatever its name.
            if not self.given.rims:
                self._add(name, directory.read(name))
        elif _COLLATERAL.fullmatch(name):
            self._add(name, directory.read(name))
        else:
            self.notes.append(f"{name} was left out: not a name that is known")

    def take_given(self) -> None:
        """The files that were named one by one."""
        given = self.given
        if given.report is not None:
            self._report(given.report)
        if given.quote is not None:
            self._machine("tdx")["quote"] = read_file(given.quote)
        for name, path in (("event_log", given.event_log), ("event_table", given.event_table)):
            if path is not None:
                self._machine("tdx")[name] = read_file(path)
        if given.endorsement is not None:
            self.endorsements = self._certificates(given.endorsement)
            # A better one that came with the evidence must not hide it.
            self.machines.get("sev-snp", {}).pop("certificates", None)
            if "vcek" in self.machines.get("azure-vtpm", {}):
                self._machine("azure-vtpm")["vcek"] = self.endorsements[0]
        for path in given.rims:
            self._add(path.name, read_file(path))

    def _report(self, path: Path) -> None:
        data = read_file(path)
        text = data.strip()
        if len(data) != _SNP_REPORT_BYTES and data[:1] == b"\x11":
            self.text_device["report.hex"] = data.hex().encode("ascii")
        elif re.fullmatch(rb"[0-9A-Fa-f]+", text):
            self.text_device["report.hex"] = data
        else:
            self._machine("sev-snp")["report"] = data

    def _certificates(self, path: Path) -> tuple[bytes, ...]:
        found = certificates_in(read_file(path))
        if not found:
            raise FileUnusable(f"{path}: expected a certificate in DER or PEM, found none")
        return found

    def _machine(self, kind: str) -> dict[str, bytes]:
        return self.machines.setdefault(kind, {})

    def _azure(self, data: bytes) -> None:
        try:
            self._machine("azure-vtpm").update(read_azure_evidence(data))
        except AppraisalError as error:
            self.malformed["azure-vtpm"] = error

    def _list(self, data: bytes) -> None:
        try:
            self.devices |= read_json_evidence(data)
        except AppraisalError as error:
            self.malformed["nvidia"] = error

    def _add(self, name: str, data: bytes) -> None:
        self.collateral = self.collateral.with_more(read_document(name, data))

    def result(self, path: Path | None) -> EvidenceFiles:
        """Everything put together."""
        if not self.collateral.rims:
            # With nothing better beside them they are what the directory has to say.
            for name, data in self.doubtful.items():
                self._add(name, data)
                self.notes.append(f"{name} was taken after all: there is no other manifest")
        self._finish_devices()
        kind = self._finish_machine()
        around = self._around(path)
        collateral = self.collateral.with_more(around)
        endorsement = b""
        if self.endorsements:
            if kind in ("sev-snp", "azure-vtpm"):
                collateral = Collateral(certificates=self.endorsements).with_more(collateral)
            elif not (kind or self.devices or self.tokens or self.malformed):
                endorsement = self.endorsements[0]
        if not (kind or self.devices or self.tokens or endorsement or self.malformed):
            raise FileUnusable(
                f"{path or 'options'}: expected evidence under a name that is known (such as "
                "report.bin, quote.bin, evidence.json, report.hex), found none"
            )
        return EvidenceFiles(
            kind=kind,
            parts=self.machines.get(kind, {}),
            devices=self.devices,
            tokens=self.tokens,
            endorsement=endorsement,
            collateral=collateral,
            malformed=self.malformed,
            notes=tuple(self.notes),
        )

    def _finish_devices(self) -> None:
        report = self.text_device.get("report.hex")
        if report is None:
            return
        chain = self.text_device.get("chain.pem", b"")
        if self.given.chain is not None:
            chain = read_file(self.given.chain)
        try:
            if not chain.strip():
                raise EvidenceMalformed(
                    "chain.pem: expected the certificates of the GPU beside report.hex, found none"
                )
            self.devices |= read_text_evidence(report, chain)
        except AppraisalError as error:
            self.malformed["nvidia"] = error

    def _finish_machine(self) -> str:
        # A log without its quote says nothing.
        kinds = [kind for kind in self.machines if kind != "tdx" or "quote" in self.machines[kind]]
        if len(kinds) > 1:
            raise FileUnusable(
                f"evidence: expected that of one machine, found {' and '.join(sorted(kinds))}"
            )
        if kinds:
            return kinds[0]
        return "azure-vtpm" if "azure-vtpm" in self.malformed else ""

    def _around(self, path: Path | None) -> Collateral:
        """Documents beside the evidence: in roots and its neighbours, and where options say."""
        found = Collateral()
        if self.given.chain is not None and "report.hex" not in self.text_device:
            found = Collateral(certificates=self._certificates(self.given.chain))
        if path is not None:
            for roots in (path / "roots", path.resolve().parent / "roots"):
                if roots.is_symlink():
                    self.notes.append(f"{roots.name} was left out: it is a link")
                elif roots.is_dir():
                    beside = read_collateral(DocumentDirectory.open(roots))
                    if self.given.chain is not None:
                        beside = Collateral(crls=beside.crls)
                    found = found.with_more(beside)
        # Everything else is signed by a vendor, but keys of NRAS are what tokens are trusted by:
        # only the operator gives them, never whoever brought the evidence.
        if found.jwks or self.collateral.jwks:
            self.notes.append("keys of NRAS beside the evidence were left out: give --collateral")
        self.collateral = replace(self.collateral, jwks=())
        found = replace(found, jwks=())
        for directory in self.given.collateral:
            more = read_collateral(DocumentDirectory.open(directory, COLLATERAL_FOLDERS))
            found = found.with_more(more)
        return found
