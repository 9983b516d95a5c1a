"""Fuzzes SPDM reports, certificate chains, evidence lists, and the verifier of kind "nvidia".

    python -m tests.fuzz.fuzz_nvidia -runs=1000000 /tmp/corpus

`--seeds DIRECTORY` writes a small corpus of evidence made from nothing and ends.
"""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "security"))

if __name__ == "__main__":
    import atheris

    with atheris.instrument_imports(include=["security"]):
        import security.attestation.nvidia_evidence  # noqa: F401

from nvidia_machine import NONCE, NOW, authorities, collateral, expectations, machine

from security.attestation.evidence import decode_parts, encode_parts
from security.attestation.nvidia import verify_nvidia
from security.attestation.nvidia_certificates import check_revocation, read_chain
from security.attestation.nvidia_evidence import read_json_evidence
from security.attestation.spdm import read_report
from security.errors import SecurityError

MACHINE = machine(1, 1)
GPU, SWITCH = MACHINE.devices
PARTS = MACHINE.parts()
COLLATERAL, EXPECTED = collateral(), expectations(MACHINE.devices)


def one_input(data: bytes) -> None:
    """The first byte says what the others are; only named errors may come out."""
    if not data:
        return
    body = data[1:]
    try:
        match data[0] % 6:
            case 0:
                read_report(body, "gpu.0")
            case 1:
                read_chain(body, "gpu.0")
            case 2:
                read_json_evidence(body)
            case 3:
                check_revocation(read_chain(GPU.pem(), "gpu.0"), (body,), "gpu.0")
            case 4:
                parts = {**PARTS, "gpu.0.report": body}
                verify_nvidia(parts, COLLATERAL, EXPECTED, NOW, NONCE)
            case _:
                verify_nvidia(decode_parts(body), COLLATERAL, EXPECTED, NOW, NONCE)
    except SecurityError:
        pass


def write_seeds(directory: Path) -> None:
    """Writes valid inputs of every shape, about 40 kB."""
    directory.mkdir(parents=True, exist_ok=True)
    item = {
        "arch": "HOPPER",
        "evidence": base64.b64encode(PARTS["gpu.0.report"]).decode(),
        "certificate": base64.b64encode(PARTS["gpu.0.chain"]).decode(),
    }
    for name, data in (
        ("gpu-report", b"\0" + PARTS["gpu.0.report"]),
        ("switch-report", b"\0" + PARTS["switch.0.report"]),
        ("chain-pem", b"\1" + PARTS["gpu.0.chain"]),
        ("chain-der", b"\1" + b"".join(issued.der for issued in GPU.chain)),
        ("list", b"\2" + json.dumps([item]).encode()),
        ("revocation", b"\3" + authorities().lists()[0]),
        ("judged", b"\4" + PARTS["gpu.0.report"]),
        ("parts", b"\5" + encode_parts(PARTS)),
    ):
        (directory / name).write_bytes(data)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--seeds"]:
        write_seeds(Path(sys.argv[2]))
    else:
        atheris.Setup(sys.argv, one_input)
        atheris.Fuzz()
