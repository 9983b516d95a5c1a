"""Fuzzes the Azure vTPM verifier: HCL reports, TPM quotes and signatures, JSON evidence.

    python -m tests.fuzz.fuzz_azure_vtpm -runs=1000000 /tmp/corpus

`--seeds DIRECTORY` writes a small corpus of evidence made from nothing and ends.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path

_MAIN = __name__ == "__main__"
_INSTRUMENTED = [
    "placement.document",
    "security.attestation.azure_evidence",
    "security.attestation.azure_vtpm",
    "security.attestation.hcl_report",
    "security.attestation.octets",
    "security.attestation.tpm_quote",
]
if _MAIN:
    import atheris

    _instrument = atheris.instrument_imports(include=_INSTRUMENTED)
else:
    _instrument = contextlib.nullcontext()

with _instrument:
    from security.attestation.azure_evidence import read_azure_evidence
    from security.attestation.azure_vtpm import verify_azure_vtpm
    from security.attestation.hcl_report import read_hcl_report
    from security.attestation.tpm_quote import read_rsa_signature, read_tpm_quote
    from security.errors import SecurityError

    sys.path.append(str(Path(__file__).resolve().parents[1] / "security"))
    from azure_machine import CHALLENGE, AzureMachine, base64url

_MACHINES = (AzureMachine(), AzureMachine("sev-snp"))
_PARTS = tuple(machine.parts() for machine in _MACHINES)
_COLLATERAL = tuple(machine.collateral() for machine in _MACHINES)
_NAMES = ("hcl_report", "tpm_message", "tpm_signature", "pcrs")


def _patched(seed: bytes, data: bytes) -> bytes:
    """A seed with bytes overwritten: pairs of an offset (two bytes) and a value."""
    changed = bytearray(seed)
    for i in range(0, min(len(data), 60) - 2, 3):
        changed[int.from_bytes(data[i : i + 2], "little") % len(changed)] = data[i + 2]
    return bytes(changed)


def _verify(index: int, **changed: bytes) -> None:
    parts = _PARTS[index] | changed
    verdict = verify_azure_vtpm(parts, _COLLATERAL[index], None, _MACHINES[index].now, CHALLENGE)
    # The vendors' roots are pinned: whatever the input is, no vendor signed it.
    assert not verdict.holds


def one_input(data: bytes) -> None:
    """Reads one input; the first byte says as what."""
    kind, rest = data[:1], data[1:]
    index = rest[0] % 2 if rest else 0
    try:
        match kind[0] % 8 if kind else 0:
            case 0 | 1 | 2 as which:
                name = _NAMES[which]
                _verify(index, **{name: _patched(_PARTS[index][name], rest[1:])})
            case 3:
                read_azure_evidence(rest)
            case 4:
                read_hcl_report(rest).attestation_key()
            case 5:
                read_tpm_quote(rest)
            case 6:
                read_rsa_signature(rest, 256)
            case _:
                _patched_report = _patched(_PARTS[index]["hcl_report"], rest[1:])
                read_hcl_report(_patched_report).attestation_key()
    except SecurityError:
        pass


def write_seeds(folder: Path) -> None:
    """Puts seeds of every kind into a corpus."""
    parts = _PARTS[0]
    document = {
        "version": 1,
        "hcl_report": base64url(parts["hcl_report"]),
        "tpm_quote": {
            "message": parts["tpm_message"].hex(),
            "signature": parts["tpm_signature"].hex(),
            "pcrs": [parts["pcrs"][i : i + 32].hex() for i in range(0, 768, 32)],
        },
    }
    lists = b'{"report":[1,2],"quote":{"message":[3],"signature":[4],"pcrs":[[5],[6]]}}'
    seeds = [
        *(bytes([kind, i, 40, 0, 7]) for kind in (0, 1, 2, 7) for i in (0, 1)),
        b"\x03" + json.dumps(document).encode(),
        b"\x03" + lists,
        b"\x04" + parts["hcl_report"],
        b"\x05" + parts["tpm_message"],
        b"\x06" + parts["tpm_signature"],
        b"\x06\0\x14\0\x0b\1\0" + parts["tpm_signature"],
    ]
    folder.mkdir(parents=True, exist_ok=True)
    for i, seed in enumerate(seeds):
        (folder / f"seed-{i}").write_bytes(seed)


def main() -> None:
    """Runs libFuzzer with this process's arguments, or writes seeds."""
    if sys.argv[1:2] == ["--seeds"]:
        write_seeds(Path(sys.argv[2]))
        return
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()


if _MAIN:
    main()
