"""Evidence, and what it must be bound to.

Whatever the platform, its signed statement carries 64 bytes of the caller's choice (REPORTDATA of
SEV-SNP and TDX). They are the SHA-512 of everything the evidence must speak for, each field
preceded by its length: evidence for another key, role, cluster, broker, policy, model or nonce has
other bytes there. The epoch is left out on purpose: a restarted neighbour must not force everyone
to attest again.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass

from security.attestation.octets import OctetReader
from security.errors import EvidenceMalformed
from security.signing import length_prefixed

MAX_EVIDENCE_BYTES = 1 << 20
REPORT_DATA_BYTES = 64
_DOMAIN = b"bulkhead/v1/report-data"
_GPU_NONCE_DOMAIN = b"bulkhead/v1/gpu-nonce"
_COMPOSITE_DOMAIN = b"bulkhead/v1/composite-report-data"
_MAGIC = b"BHEV1"
_MAX_PARTS = 64
_PART_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")


def gpu_nonce(challenge: bytes) -> bytes:
    """The nonce (32 bytes) of device evidence that goes with CPU evidence for a challenge.

    The devices answer it first; the digest of their answers is then bound by the CPU's report data,
    so that neither side can be taken from another machine or another time.
    """
    return hashlib.sha256(length_prefixed([_GPU_NONCE_DOMAIN, challenge])).digest()


def evidence_digest(device_evidence: bytes) -> str:
    """SHA-256 (hex) of device evidence, as `Binding.gpu_evidence_digest` holds it.

    "" where there is none.
    """
    return hashlib.sha256(device_evidence).hexdigest() if device_evidence else ""


def composite_report_data(nonce: bytes, device_evidence: bytes) -> bytes:
    """The 64 bytes that bind a machine's evidence to its devices' where no shard is involved.

    `bulkhead attest collect` and `attest check` use them; between shard and broker it is `Binding`.
    The devices themselves answer `gpu_nonce(nonce)`.

    Args:
        nonce: the verifier's, of any length.
        device_evidence: the devices' parts, as `encode_parts` joins them.
    """
    return hashlib.sha512(
        length_prefixed(
            [_COMPOSITE_DOMAIN, nonce, evidence_digest(device_evidence).encode("ascii")]
        )
    ).digest()


def encode_parts(parts: Mapping[str, bytes]) -> bytes:
    """Joins the files of one piece of evidence into a body, in the order of their names.

    Layout: "BHEV1", u8 count, then for each part u8 name length, name (ASCII), u32 big-endian
    length, bytes.
    """
    if len(parts) > _MAX_PARTS:
        raise ValueError(f"parts: expected at most {_MAX_PARTS}, found {len(parts)}")
    body = bytearray(_MAGIC)
    body.append(len(parts))
    for name in sorted(parts):
        if _PART_NAME.fullmatch(name) is None:
            raise ValueError(f"part name: expected lower-case letters and digits, found {name!r}")
        body.append(len(name))
        body += name.encode("ascii")
        body += len(parts[name]).to_bytes(4, "big")
        body += parts[name]
    return bytes(body)


def decode_parts(body: bytes) -> dict[str, bytes]:
    """Takes apart what `encode_parts` joined.

    Raises:
        EvidenceMalformed: anything else, or names out of order or twice.
    """
    if len(body) > MAX_EVIDENCE_BYTES:
        raise EvidenceMalformed(
            f"evidence: expected at most {MAX_EVIDENCE_BYTES} bytes, found {len(body)}"
        )
    reader = OctetReader(body, "evidence")
    if reader.take(min(len(_MAGIC), reader.left), "magic") != _MAGIC:
        raise EvidenceMalformed(f"evidence: expected a body that begins with {_MAGIC.decode()}")
    parts: dict[str, bytes] = {}
    last = ""
    for _ in range(reader.big(1, "count")):
        raw = reader.take(reader.big(1, "name length"), "name")
        name = raw.decode("ascii", "replace")
        if _PART_NAME.fullmatch(name) is None or name <= last or len(parts) == _MAX_PARTS:
            raise EvidenceMalformed("evidence: expected at most 64 parts, named, in order")
        last = name
        parts[name] = reader.take(reader.big(4, "length"), name)
    reader.finish()
    return parts


@dataclass(frozen=True, slots=True)
class Evidence:
    """One platform's statement.

    Attributes:
        kind: names the format and so the verifier, e.g. "simulated" or "enrolled".
        body: the statement, at most `MAX_EVIDENCE_BYTES`.
    """

    kind: str
    body: bytes


@dataclass(frozen=True, slots=True)
class Binding:
    """What evidence is bound to.

    Attributes:
        nonce: the broker's challenge (32 bytes).
        shard_key: X25519 public key that the shard made for this admission (32 bytes).
        role: role in the plan template.
        cluster: cluster in the plan template.
        instance: pipeline instance.
        broker_key: Ed25519 public key of the broker (32 bytes).
        policy_digest: SHA-256 (hex) of the policy that the shard was given.
        manifest_digest: SHA-256 (hex) of the manifest that the shard *observed*.
        gpu_evidence_digest: SHA-256 (hex) of the GPU's evidence, empty where there is none.
    """

    nonce: bytes
    shard_key: bytes
    role: str
    cluster: str
    instance: str
    broker_key: bytes
    policy_digest: str
    manifest_digest: str
    gpu_evidence_digest: str = ""

    def report_data(self) -> bytes:
        """The 64 bytes that the platform signs."""
        return hashlib.sha512(
            length_prefixed(
                [
                    _DOMAIN,
                    self.nonce,
                    self.shard_key,
                    self.role.encode(),
                    self.cluster.encode(),
                    self.instance.encode(),
                    self.broker_key,
                    self.policy_digest.encode(),
                    self.manifest_digest.encode(),
                    self.gpu_evidence_digest.encode(),
                ]
            )
        ).digest()
