"""Reads NVIDIA evidence as other tools write it, into the parts that `verify_nvidia` takes.

Two shapes are known: a report in hexadecimal text with a chain in PEM beside it, and the JSON list
of NVIDIA's attestation SDK, an object for each device with "arch", "nonce", "evidence" (base64 or
hexadecimal) and "certificate" (base64 of PEM).
"""

from __future__ import annotations

import base64
import binascii
import re

from placement.document import DocumentError, Fields, decode
from security.attestation.nvidia import MAX_DEVICES
from security.attestation.nvidia_certificates import MAX_CHAIN_BYTES
from security.attestation.spdm import MAX_REPORT_BYTES
from security.errors import EvidenceMalformed

__all__ = ["read_json_evidence", "read_text_evidence"]

MAX_JSON_BYTES = 1 << 20
_MAX_TEXT = 2 * max(MAX_REPORT_BYTES, MAX_CHAIN_BYTES)
_HEX = re.compile(r"(?:[0-9a-fA-F]{2})+")
_SWITCH = "LS10"


def read_text_evidence(report: bytes, chain: bytes, device: str = "gpu.0") -> dict[str, bytes]:
    """Parts of a device from its report in hexadecimal text and its chain.

    Args:
        report: hexadecimal digits, white space around them.
        chain: PEM or DER.
        device: name of the device among the parts.

    Raises:
        EvidenceMalformed
    """
    text = report.strip().decode("ascii", "replace")
    if len(text) > 2 * MAX_REPORT_BYTES or _HEX.fullmatch(text) is None:
        raise EvidenceMalformed(
            f"{device}.report: expected at most {MAX_REPORT_BYTES} bytes in hexadecimal digits"
        )
    return {f"{device}.report": bytes.fromhex(text), f"{device}.chain": chain}


def read_json_evidence(data: bytes) -> dict[str, bytes]:
    """Parts of all devices of a list as NVIDIA's attestation SDK writes it.

    Join the parts of the GPUs' list with those of the switches' list for a whole machine.

    Raises:
        EvidenceMalformed: not such a list, or more devices than a machine has.
    """
    if len(data) > MAX_JSON_BYTES:
        raise EvidenceMalformed(
            f"nvidia evidence: expected at most {MAX_JSON_BYTES} bytes, found {len(data)}"
        )
    parts: dict[str, bytes] = {}
    counts = {"gpu": 0, "switch": 0}
    try:
        # The strict reader takes objects; the one key that may come back is the wrapper's.
        reader = Fields.of(decode(b'{"devices":' + data + b"}", MAX_JSON_BYTES + 12), "evidence")
        for item in reader.sections("devices", 2 * MAX_DEVICES):
            kind = "switch" if item.text("arch", 32, "[0-9A-Za-z_]+") == _SWITCH else "gpu"
            device = f"{kind}.{counts[kind]}"
            counts[kind] += 1
            parts[f"{device}.report"] = _octets(item.text("evidence", _MAX_TEXT), device)
            parts[f"{device}.chain"] = _octets(item.text("certificate", _MAX_TEXT), device)
        reader.finish()
    except DocumentError as error:
        raise EvidenceMalformed(f"nvidia evidence: {error}") from None
    return parts


def _octets(text: str, device: str) -> bytes:
    if _HEX.fullmatch(text) is not None:
        return bytes.fromhex(text)
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise EvidenceMalformed(f"{device}: expected base64 or hexadecimal digits") from None
