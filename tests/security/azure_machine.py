"""An Azure confidential VM that does not exist: HCL report, vTPM and hardware report from nothing.

The hardware is a machine of `snp_machine` or `tdx_machine`, each under its own throw-away root.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import tdx_machine
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from snp_machine import NOW as SNP_NOW
from snp_machine import SnpMachine

from placement.requirements import PINS, Requirements
from security.attestation.azure_vtpm import verify_azure_vtpm
from security.attestation.collateral import Collateral
from security.attestation.verdict import Expectations, Verdict

CHALLENGE = b"challenge of the broker" * 2


@cache
def vtpm_key(bits: int = 2048) -> rsa.RSAPrivateKey:
    """The vTPM's attestation key, one for each size."""
    return rsa.generate_private_key(65537, bits)


def base64url(octets: bytes) -> str:
    """Without padding, as in JSON Web Keys."""
    return base64.urlsafe_b64encode(octets).rstrip(b"=").decode()


def jwk(key: rsa.RSAPrivateKey, **changes: Any) -> dict[str, Any]:
    """The public key as a JSON Web Key."""
    numbers = key.public_key().public_numbers()
    return {
        "kid": "HCLAkPub",
        "key_ops": ["sign"],
        "kty": "RSA",
        "e": base64url(numbers.e.to_bytes(3, "big")),
        "n": base64url(numbers.n.to_bytes((numbers.n.bit_length() + 7) // 8, "big")),
    } | changes


def _pcrs() -> list[bytes]:
    return [hashlib.sha256(b"pcr %d" % i).digest() for i in range(24)]


@dataclass
class AzureMachine:
    """A VM; every field may be varied before `parts` is called."""

    hardware: str = "tdx"
    key: rsa.RSAPrivateKey = field(default_factory=vtpm_key)
    keys: list[dict[str, Any]] | None = None
    claims: bytes | None = None
    reported: bytes | None = None
    header_signature: bytes = b"HCLA"
    header_version: int = 2
    request_type: int = 2
    runtime_version: int = 1
    report_type: int | None = None
    hash_type: int = 1
    claims_size: int | None = None
    trailing: bytes = bytes(100)
    payload_end: bytes | None = None
    td_changes: dict[str, Any] = field(default_factory=dict)
    td_report_changes: dict[int, bytes] = field(default_factory=dict)
    magic: int = 0xFF544347
    type: int = 0x8018
    extra_data: bytes = CHALLENGE
    safe: int = 1
    selections: list[tuple[int, bytes]] = field(default_factory=lambda: [(0x0B, b"\xff\xff\xff")])
    pcrs: list[bytes] = field(default_factory=_pcrs)
    pcr_digest: bytes | None = None
    message_end: bytes = b""
    snp: SnpMachine = field(default_factory=SnpMachine)

    @property
    def now(self) -> int:
        """When everything is valid."""
        return tdx_machine.NOW if self.hardware == "tdx" else SNP_NOW

    def runtime_claims(self) -> bytes:
        """The JSON that the hardware report vouches for."""
        if self.claims is not None:
            return self.claims
        other = jwk(self.key, kid="HCLEkPub", key_ops=["encrypt"])
        document = {
            "keys": [jwk(self.key), other] if self.keys is None else self.keys,
            "vm-configuration": {"secure-boot": True, "tpm-enabled": True, "vmUniqueId": "0000"},
            "user-data": "00" * 64,
        }
        return json.dumps(document, separators=(",", ":")).encode()

    def report_data(self) -> bytes:
        """What the hardware report was made over."""
        if self.reported is not None:
            return self.reported
        return hashlib.sha256(self.runtime_claims()).digest() + bytes(32)

    def td_quote(self) -> bytes:
        """The TD quote on TDX."""
        return tdx_machine.quote(report_data=self.report_data(), **self.td_changes)

    def hardware_report(self) -> bytes:
        """ATTESTATION_REPORT, or a TDREPORT that says what the quote says."""
        if self.hardware == "sev-snp":
            return self.snp_machine().report()
        body = self.td_quote()[48:]
        report = bytearray(1024)
        report[0] = 0x81
        report[128:192] = self.report_data()
        report[512:720] = body[120:328]
        for offset, octets in self.td_report_changes.items():
            report[offset : offset + len(octets)] = octets
        return bytes(report)

    def snp_machine(self) -> SnpMachine:
        """The SEV-SNP machine with the claims' digest."""
        return replace(self.snp, report_data=self.report_data())

    def hcl_report(self) -> bytes:
        """The blob of the NV index."""
        claims = self.runtime_claims()
        kind = self.report_type
        if kind is None:
            kind = 4 if self.hardware == "tdx" else 2
        size = len(claims) if self.claims_size is None else self.claims_size
        payload = self.hardware_report().ljust(1184, b"\0")
        if self.payload_end is not None:
            payload = payload[: -len(self.payload_end)] + self.payload_end
        header = self.header_signature + b"".join(
            value.to_bytes(4, "little")
            for value in (self.header_version, 1236 + size, self.request_type, 0, 0, 0, 0)
        )
        runtime = b"".join(
            value.to_bytes(4, "little")
            for value in (20 + size, self.runtime_version, kind, self.hash_type, size)
        )
        return header + payload + runtime + claims + self.trailing

    def message(self) -> bytes:
        """TPMS_ATTEST."""
        digest = self.pcr_digest
        if digest is None:
            digest = hashlib.sha256(b"".join(self.pcrs)).digest()
        signer = b"\0\x0b" + hashlib.sha256(b"name").digest()

        def sized(octets: bytes) -> bytes:
            return len(octets).to_bytes(2, "big") + octets

        return (
            self.magic.to_bytes(4, "big")
            + self.type.to_bytes(2, "big")
            + sized(signer)
            + sized(self.extra_data)
            + (123456).to_bytes(8, "big")
            + (2).to_bytes(4, "big")
            + (0).to_bytes(4, "big")
            + bytes([self.safe])
            + (0x2020031200120003).to_bytes(8, "big")
            + len(self.selections).to_bytes(4, "big")
            + b"".join(
                bank.to_bytes(2, "big") + bytes([len(select)]) + select
                for bank, select in self.selections
            )
            + sized(digest)
            + self.message_end
        )

    def signature(self) -> bytes:
        """RSASSA-PKCS1-v1_5 with SHA-256."""
        return self.key.sign(self.message(), padding.PKCS1v15(), hashes.SHA256())

    def parts(self, **changes: bytes | None) -> dict[str, bytes]:
        """Everything that the verifier takes; None leaves a part out."""
        parts: dict[str, bytes | None] = {
            "hcl_report": self.hcl_report(),
            "tpm_message": self.message(),
            "tpm_signature": self.signature(),
            "pcrs": b"".join(self.pcrs),
        }
        if self.hardware == "tdx":
            parts["td_quote"] = self.td_quote()
        else:
            parts["vcek"] = self.snp_machine().endorsement()
        return {name: part for name, part in (parts | changes).items() if part is not None}

    def collateral(self) -> Collateral:
        """The vendor's documents."""
        if self.hardware == "tdx":
            return Collateral(tdx=(tdx_machine.collateral(),))
        return self.snp_machine().collateral()

    def requirements(self, **changes: Any) -> Requirements:
        """Pins of everything that the VM is."""
        pins: dict[str, tuple[str, ...]] = {"hardware": (self.hardware,)}
        pins |= {f"pcr{i}": (value.hex(),) for i, value in enumerate(self.pcrs)}
        minimum: Mapping[str, Mapping[str, int]] = {}
        if self.hardware == "tdx":
            registers = tdx_machine.default_registers()
            pins |= {name: (registers[name].hex(),) for name in PINS["tdx"] if name in registers}
            pins |= {
                "xfam": ("e702060000000000",),
                "fmspc": ("b0c06f000000",),
                "pck_serial": ("1234abcd",),
                "tcb_status": ("UpToDate",),
            }
            roots = tdx_machine.vendor().roots
        else:
            own = self.snp_machine().requirements()
            pins |= own.pins
            roots, minimum = own.roots, own.minimum_tcb
            changes = {"open": own.open} | changes
        pins |= changes.pop("pins", {})
        for name in changes.pop("unpin", ()):
            pins.pop(name, None)
        arguments: dict[str, Any] = {"roots": roots, "minimum_tcb": minimum}
        return Requirements(pins=pins, **(arguments | changes))

    def expectations(self, **changes: Any) -> Expectations:
        """A policy that pins the VM."""
        if self.hardware == "tdx":
            measurement = tdx_machine.default_registers()["mrtd"].hex()
        else:
            measurement = self.snp_machine().measurement.hex()
        return Expectations("azure-vtpm", self.requirements(**changes), (measurement,))

    def verify(
        self,
        expected: Expectations | None = None,
        bound_to: bytes | None = CHALLENGE,
        collateral: Collateral | None = None,
        **parts: bytes | None,
    ) -> Verdict:
        """The verdict on it."""
        return verify_azure_vtpm(
            self.parts(**parts),
            self.collateral() if collateral is None else collateral,
            self.expectations() if expected is None else expected,
            self.now,
            bound_to,
        )
