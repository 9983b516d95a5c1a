"""Evidence in the shapes that NVIDIA's tools write."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable

import pytest
from nvidia_machine import NONCE, NOW, collateral, expectations, gpu, machine

from security.attestation.nvidia import verify_nvidia
from security.attestation.nvidia_evidence import read_json_evidence, read_text_evidence
from security.errors import EvidenceMalformed


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


@pytest.mark.parametrize("encode", [bytes.hex, _base64])
def test_lists_of_the_sdk(encode: Callable[[bytes], str]) -> None:
    devices = machine(2, 1).devices
    lists = {"gpu": [], "switch": []}
    for device in devices:
        kind = device.name.partition(".")[0]
        lists[kind].append(
            {
                "arch": "LS10" if kind == "switch" else "HOPPER",
                "nonce": NONCE.hex(),
                "evidence": encode(device.report(NONCE)),
                "certificate": _base64(device.pem()),
                "version": "1.0",
            }
        )
    parts = {}
    for items in lists.values():
        parts |= read_json_evidence(json.dumps(items).encode())
    assert len(parts) == 6
    verify_nvidia(parts, collateral(), expectations(devices), NOW, NONCE).require()


def test_text() -> None:
    device = gpu()
    text = b"\n" + device.report(NONCE).hex().encode() + b"\n"
    parts = read_text_evidence(text, device.pem())
    verify_nvidia(parts, collateral(), expectations([device]), NOW, NONCE).require()


ITEM = {"arch": "HOPPER", "evidence": "00", "certificate": "AAAA"}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"[{}]",
        b"[1]",
        b'[],"devices":[]',
        b'[],"more":[]',
        b"[" * 1000,
        b"[1.5]",
        b" " * ((1 << 20) + 1),
        json.dumps([{**ITEM, "evidence": "!"}]).encode(),
        json.dumps([{**ITEM, "evidence": "A"}]).encode(),
        json.dumps([{**ITEM, "arch": "a b"}]).encode(),
        json.dumps([{**ITEM, "evidence": "A" * 40000}]).encode(),
        json.dumps([ITEM] * 33).encode(),
    ],
)
def test_other_lists(data: bytes) -> None:
    with pytest.raises(EvidenceMalformed):
        read_json_evidence(data)


@pytest.mark.parametrize("data", [b"", b"0", b"xx", b"\xff\xff", b"11" * 8193])
def test_other_text(data: bytes) -> None:
    with pytest.raises(EvidenceMalformed):
        read_text_evidence(data, b"")
