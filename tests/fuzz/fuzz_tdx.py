"""Fuzzes what the TDX verifier reads: quotes, chains, collateral, event logs.

    python -m tests.fuzz.fuzz_tdx -runs=1000000 /tmp/corpus

`--seeds DIRECTORY` writes a small corpus of evidence made from nothing and ends.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

_MAIN = __name__ == "__main__"
_INSTRUMENTED = [
    "placement.document",
    "security.attestation.der",
    "security.attestation.event_log",
    "security.attestation.intel_pki",
    "security.attestation.octets",
    "security.attestation.tdx",
    "security.attestation.tdx_collateral",
    "security.attestation.tdx_quote",
    "security.attestation.tdx_tcb",
]
if _MAIN:
    import atheris

    _instrument = atheris.instrument_imports(include=_INSTRUMENTED)
else:
    _instrument = contextlib.nullcontext()

with _instrument:
    from security.attestation.collateral import Collateral
    from security.attestation.event_log import read_ccel_table, read_event_log
    from security.attestation.intel_pki import read_certificate_chain, read_pck_extension
    from security.attestation.tdx import verify_tdx
    from security.attestation.tdx_collateral import read_tdx_collateral
    from security.errors import SecurityError

    sys.path.append(str(Path(__file__).resolve().parents[1] / "security"))
    import tdx_machine as machine

_COLLATERAL = Collateral(tdx=(machine.collateral(),))
_QUOTES = (machine.quote(), machine.quote(version=5, body_type=3))
_EVENTS = [(1, 1, b"a"), (2, 4, b"\0\0\0\0"), (0, 3, b"none"), (4, 13, b"b" * 30)]
_LOG = machine.event_log(_EVENTS)


def _verify(quote: bytes, **parts: bytes) -> None:
    verdict = verify_tdx({"quote": quote, **parts}, _COLLATERAL, None, machine.NOW, b"challenge")
    # Intel's root is pinned: whatever the input is, it is not signed by Intel.
    assert not verdict.holds


def _patched(seed: bytes, data: bytes) -> bytes:
    """A seed with bytes overwritten: pairs of an offset (two bytes) and a value."""
    changed = bytearray(seed)
    for i in range(0, min(len(data), 60) - 2, 3):
        changed[int.from_bytes(data[i : i + 2], "little") % len(changed)] = data[i + 2]
    return bytes(changed)


def one_input(data: bytes) -> None:
    """Reads one input; the first byte says as what."""
    kind, rest = data[:1], data[1:]
    try:
        match kind[0] % 8 if kind else 0:
            case 0:
                _verify(rest)
            case 1:
                _verify(_patched(_QUOTES[rest[0] % 2 if rest else 0], rest[1:]))
            case 2:
                read_tdx_collateral(rest)
            case 3:
                read_event_log(rest).rtmrs()
            case 4:
                read_ccel_table(rest)
            case 5:
                read_pck_extension(read_certificate_chain(rest, "chain")[0])
            case 6:
                read_event_log(_patched(_LOG, rest)).rtmrs()
            case _:
                read_tdx_collateral(_patched(_COLLATERAL.tdx[0], rest))
    except SecurityError:
        pass


def write_seeds(folder: Path) -> None:
    """Puts seeds of every kind into a corpus."""
    chain = machine.default_pck().pem
    seeds = [
        bytes([0]) + _QUOTES[0],
        bytes([0]) + _QUOTES[1],
        bytes([0]) + machine.quote(tee_type=0),
        bytes([1, 0, 1, 0, 2, 40, 0, 3]),
        bytes([1, 1, 48, 0, 2]),
        bytes([2]) + _COLLATERAL.tdx[0],
        bytes([3]) + _LOG,
        bytes([4]) + machine.ccel_table(),
        bytes([5]) + chain,
        bytes([6, 80, 0, 1]),
        bytes([7, 80, 0, 1]),
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
