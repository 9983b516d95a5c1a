"""Azure's collector against a vTPM that checks its commands byte for byte."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from azure_machine import AzureMachine

from security.attestation.azure_collector import (
    CERTIFICATION_PATH,
    TD_QUOTE_PATH,
    AzureCollector,
)
from security.attestation.azure_vtpm import verify_azure_vtpm
from security.attestation.evidence import decode_parts
from security.attestation.tpm_commands import Tpm, device_transport
from security.errors import MetadataServiceFailed, TpmFailed, TpmUnavailable

DATA = hashlib.sha512(b"data").digest()
PASSWORD = bytes.fromhex("00000009 40000009 0000 00 0000")


def sized(octets: bytes) -> bytes:
    return len(octets).to_bytes(2, "big") + octets


def response(tag: int, body: bytes, code: int = 0) -> bytes:
    size = (10 + len(body)).to_bytes(4, "big")
    return tag.to_bytes(2, "big") + size + code.to_bytes(4, "big") + body


@dataclass
class VTpm:
    """Answers as TPM 2.0 Part 3 says, or with the response codes that it is given first."""

    machine: AzureMachine
    codes: list[int] = field(default_factory=list)
    extend: int = 0
    asked: list[str] = field(default_factory=list)

    def __call__(self, command: bytes) -> bytes:
        tag, size = int.from_bytes(command[:2], "big"), int.from_bytes(command[2:6], "big")
        assert size == len(command)
        code, body = command[6:10].hex(), command[10:]
        self.asked.append(code)
        if self.codes:
            return response(0x8001, b"", self.codes.pop(0))
        answer = {
            "00000169": self.nv_read_public,
            "0000014e": self.nv_read,
            "0000017e": self.pcr_read,
            "00000158": self.quote,
        }[code](body)
        if tag == 0x8002:
            answer = len(answer).to_bytes(4, "big") + answer + bytes.fromhex("0000 01 0000")
        else:
            assert tag == 0x8001
        return response(tag, answer)

    def nv_read_public(self, body: bytes) -> bytes:
        assert body == bytes.fromhex("01400001")
        size = len(self.machine.hcl_report()).to_bytes(2, "big")
        public = body + bytes.fromhex("000b 42062006") + sized(b"") + size
        return sized(public) + sized(b"\0\x0b" + bytes(32))

    def nv_read(self, body: bytes) -> bytes:
        assert body[:8] == bytes.fromhex("40000001 01400001")
        assert body[8:21] == PASSWORD
        size, offset = int.from_bytes(body[21:23], "big"), int.from_bytes(body[23:], "big")
        assert 0 < size <= 1024
        return sized(self.machine.hcl_report()[offset : offset + size])

    def pcr_read(self, body: bytes) -> bytes:
        assert body[:7] == bytes.fromhex("00000001 000b 03")
        bits = int.from_bytes(body[7:10], "little")
        chosen = [number for number in range(24) if bits >> number & 1]
        assert 0 < len(chosen) <= 8
        values = [sized(self.machine.pcrs[number]) for number in chosen]
        return bytes(4) + body + len(values).to_bytes(4, "big") + b"".join(values)

    def quote(self, body: bytes) -> bytes:
        assert body[:4] == bytes.fromhex("81000003")
        assert body[4:17] == PASSWORD
        size = int.from_bytes(body[17:19], "big")
        extra = body[19 : 19 + size]
        assert body[19 + size :] == bytes.fromhex("0014 000b 00000001 000b 03 ffffff")
        pcrs = list(self.machine.pcrs)
        if self.extend:
            self.extend -= 1
            pcrs[16] = b"x" * 32
        machine = replace(self.machine, extra_data=extra, pcrs=pcrs)
        signature = bytes.fromhex("0014 000b") + sized(machine.signature())
        return sized(machine.message()) + signature


@dataclass
class Metadata:
    """The instance metadata service."""

    machine: AzureMachine
    asked: list[str] = field(default_factory=list)

    def __call__(self, path: str, body: bytes | None) -> bytes:
        self.asked.append(path)
        if path == CERTIFICATION_PATH:
            assert body is None
            der = self.machine.parts()["vcek"]
            pem = base64.encodebytes(der).decode()
            text = f"-----BEGIN CERTIFICATE-----\n{pem}-----END CERTIFICATE-----\n"
            return json.dumps({"vcekCert": text, "tcbm": "00", "certificateChain": ""}).encode()
        assert path == TD_QUOTE_PATH and body is not None
        text = json.loads(body)["report"]
        assert base64.urlsafe_b64decode(text + "==") == self.machine.hardware_report()[:1024]
        quote = base64.urlsafe_b64encode(self.machine.td_quote()).decode()
        return json.dumps({"quote": quote.rstrip("=")}).encode()


@pytest.mark.parametrize("hardware", ["sev-snp", "tdx"])
def test_collected_evidence_is_taken(hardware: str) -> None:
    machine = AzureMachine(hardware)
    metadata = Metadata(machine)
    evidence = AzureCollector(Tpm(VTpm(machine)), metadata).collect(DATA)
    assert evidence.kind == "azure-vtpm"
    verdict = verify_azure_vtpm(
        decode_parts(evidence.body),
        machine.collateral(),
        machine.expectations(),
        machine.now,
        DATA,
    )
    assert verdict.failures == ()
    assert metadata.asked == [CERTIFICATION_PATH if hardware == "sev-snp" else TD_QUOTE_PATH]


def test_short_nonce_goes_in_as_it_is() -> None:
    machine = AzureMachine("tdx")
    parts = AzureCollector(Tpm(VTpm(machine)), Metadata(machine)).collect_parts(b"challenge")
    verdict = verify_azure_vtpm(
        parts, machine.collateral(), machine.expectations(), machine.now, b"challenge"
    )
    assert verdict.failures == ()


def test_busy_and_refusing() -> None:
    machine = AzureMachine("tdx")
    collector = AzureCollector(Tpm(VTpm(machine, codes=[0x922, 0x908])), Metadata(machine))
    assert collector.collect(DATA)
    for codes in ([0x922] * 8, [0x18B], [0x14A]):
        with pytest.raises(TpmFailed) as refused:
            AzureCollector(Tpm(VTpm(machine, codes=codes)), Metadata(machine)).collect(DATA)
        assert refused.value.code == "tpm_failed"


def test_pcrs_that_change() -> None:
    machine = AzureMachine("tdx")
    assert AzureCollector(Tpm(VTpm(machine, extend=2)), Metadata(machine)).collect(DATA)
    with pytest.raises(TpmFailed, match="changing"):
        AzureCollector(Tpm(VTpm(machine, extend=9)), Metadata(machine)).collect(DATA)


@pytest.mark.parametrize("cut", [0, 5, 9, 10, 12, 20, 30])
def test_short_responses(cut: int) -> None:
    machine = AzureMachine("tdx")
    vtpm = VTpm(machine)
    for operation in ("00000169", "0000014e", "0000017e", "00000158"):

        def cutting(command: bytes, operation: str = operation) -> bytes:
            answer = vtpm(command)
            return answer[:cut] if command[6:10].hex() == operation else answer

        with pytest.raises(TpmFailed):
            AzureCollector(Tpm(cutting), Metadata(machine)).collect(DATA)


@pytest.mark.parametrize(
    "answer", [b"", b"{}", b'{"quote": 1}', b'{"quote": "*"}', b"[" * 99, b'{"vcekCert": "x"}']
)
@pytest.mark.parametrize("hardware", ["sev-snp", "tdx"])
def test_bad_metadata(hardware: str, answer: bytes) -> None:
    machine = AzureMachine(hardware)
    collector = AzureCollector(Tpm(VTpm(machine)), lambda path, body: answer)
    with pytest.raises(MetadataServiceFailed) as refused:
        collector.collect(DATA)
    assert refused.value.code == "metadata_service_failed"


def test_no_tpm(tmp_path: Path) -> None:
    with pytest.raises(TpmUnavailable) as refused:
        Tpm(device_transport(tmp_path / "tpm")).read_index(1)
    assert refused.value.code == "tpm_unavailable"


def test_data_too_long() -> None:
    with pytest.raises(ValueError, match="50"):
        Tpm(lambda command: b"").quote(1, bytes(51))
