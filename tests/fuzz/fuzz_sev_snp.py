"""Fuzzes the SEV-SNP verifier: reports, certificates, revocation lists, tables, whole evidence.

    python -m tests.fuzz.fuzz_sev_snp -runs=1000000 /tmp/corpus

`--seeds DIRECTORY` writes a small corpus of evidence made from nothing and ends.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "security"))

if __name__ == "__main__":
    import atheris

    with atheris.instrument_imports(include=["security"]):
        import security.attestation.sev_snp  # noqa: F401

from snp_machine import MACHINES, NOW, SnpMachine, crl, table

from security.attestation.certificates import read_certificate, read_revocation_list
from security.attestation.evidence import decode_parts, encode_parts
from security.attestation.sev_snp import judge_report, verify_endorsement, verify_sev_snp
from security.errors import SecurityError

MACHINE = SnpMachine()
REPORT, ENDORSEMENT = MACHINE.report(), MACHINE.endorsement()
COLLATERAL, EXPECTED = MACHINE.collateral(), MACHINE.expectations()
BINDING = b"challenge"


def one_input(data: bytes) -> None:
    """The first byte says what the others are; only named errors may come out."""
    if not data:
        return
    body = data[1:]
    try:
        match data[0] % 5:
            case 0:
                judge_report(body, [ENDORSEMENT], COLLATERAL, EXPECTED, NOW)
            case 1:
                certificate = read_certificate(body)
                certificate.key_usage()
                certificate.basic_constraints()
                verify_endorsement(body, COLLATERAL, NOW)
            case 2:
                read_revocation_list(body)
            case 3:
                parts = {"report": REPORT, "certificates": body}
                verify_sev_snp(parts, COLLATERAL, EXPECTED, NOW, BINDING)
            case _:
                verify_sev_snp(decode_parts(body), COLLATERAL, EXPECTED, NOW, BINDING)
    except SecurityError:
        pass


def write_seeds(directory: Path) -> None:
    """Writes valid inputs of every shape, about 60 kB."""
    directory.mkdir(parents=True, exist_ok=True)
    for i, machine in enumerate(MACHINES):
        other = replace(machine, version=2 + i % 4)
        whole = table((machine.key, machine.endorsement()), ("ASK", machine.issuer()))
        for name, data in (
            ("report", b"\0" + other.report()),
            ("certificate", b"\1" + machine.endorsement()),
            ("list", b"\2" + crl(machine.product, (0x20001,))),
            ("table", b"\3" + whole),
            ("parts", b"\4" + encode_parts({"report": other.report(), "certificates": whole})),
        ):
            (directory / f"{name}-{machine.product}-{machine.key}").write_bytes(data)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--seeds"]:
        write_seeds(Path(sys.argv[2]))
    else:
        atheris.Setup(sys.argv, one_input)
        atheris.Fuzz()
