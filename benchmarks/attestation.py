"""How long a verdict takes, by kind of evidence, with the vendors' documents read before.

Machines are made up with throw-away roots, and the policy pins everything that it can. Every
verdict is on evidence that was not seen before (another challenge), as at a broker: certificates,
lists and reference values are known, the signature of the report is not.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from importlib import import_module
from pathlib import Path

from benchmarks.options import common_parser, json_path
from benchmarks.report import print_table, write_json
from security.attestation.collateral import Collateral
from security.attestation.nvidia import verify_nvidia
from security.attestation.tdx import verify_tdx
from security.attestation.verdict import Verdict

__all__ = ["main"]

# The tests' machines import each other by their bare names.
_TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path[:0] = [str(_TESTS / "security"), str(_TESTS)]
snp_machine = import_module("snp_machine")
tdx_machine = import_module("tdx_machine")
azure_machine = import_module("azure_machine")
nvidia_machine = import_module("nvidia_machine")
tdx_policy = import_module("test_security_tdx").policy

TARGET_MS = 5.0
"""For each kind of CPU."""


def main() -> None:
    """Measures and reports."""
    parser = common_parser("attestation", __doc__)
    parser.add_argument("--verdicts", type=int, default=200, help="of each kind")
    arguments = parser.parse_args()
    count: int = arguments.verdicts
    kinds = {
        "sev-snp, VCEK": [_snp(n, 0) for n in range(count + 1)],
        "sev-snp, VLEK": [_snp(n, 1) for n in range(count + 1)],
        "tdx": [_tdx(n) for n in range(count + 1)],
        "azure-vtpm on sev-snp": [_azure(n, "sev-snp") for n in range(count + 1)],
        "azure-vtpm on tdx": [_azure(n, "tdx") for n in range(count + 1)],
        "nvidia, 1 GPU": _nvidia(count + 1, gpus=1, switches=0),
        "nvidia, 8 GPUs and 4 switches": _nvidia(count + 1, gpus=8, switches=4),
    }
    found = {name: _measure(verdicts) for name, verdicts in kinds.items()}
    print_table(
        f"Milliseconds for a verdict, {count} of each; the first reads everything",
        ("evidence", "first", "p50", "p95", "max"),
        [
            (name, *(f"{value:.2f}" for value in (first, *_quantiles(times))))
            for name, (first, times) in found.items()
        ],
    )
    write_json(
        json_path(arguments),
        {
            "target_ms": TARGET_MS,
            "results": [
                {"evidence": name, "first_ms": first, "ms": times}
                for name, (first, times) in found.items()
            ],
        },
    )


def _measure(verdicts: Sequence[Callable[[], Verdict]]) -> tuple[float, list[float]]:
    """The first one's milliseconds, and those of the others."""
    times: list[float] = []
    for verdict in verdicts:
        start = time.perf_counter()
        found = verdict()
        times.append(1000 * (time.perf_counter() - start))
        found.require()
    return times[0], times[1:]


def _quantiles(times: list[float]) -> tuple[float, float, float]:
    return statistics.median(times), statistics.quantiles(times, n=20)[-1], max(times)


def _challenge(number: int) -> bytes:
    return number.to_bytes(64, "big")


def _snp(number: int, which: int) -> Callable[[], Verdict]:
    asked = replace(snp_machine.MACHINES[which], report_data=_challenge(number))
    parts, collateral, expected = asked.parts(), asked.collateral(), asked.expectations()
    return lambda: asked.verify(
        parts=parts, collateral=collateral, expected=expected, bound_to=_challenge(number)
    )


def _tdx(number: int) -> Callable[[], Verdict]:
    quote = tdx_machine.quote(report_data=_challenge(number))
    collateral = Collateral(tdx=(_tdx_collateral(),))
    expected = tdx_policy()
    return lambda: verify_tdx(
        {"quote": quote}, collateral, expected, tdx_machine.NOW, _challenge(number)
    )


@cache
def _tdx_collateral() -> bytes:
    # One document for all: a signature made anew would be another document.
    document: bytes = tdx_machine.collateral()
    return document


def _azure(number: int, hardware: str) -> Callable[[], Verdict]:
    machine = azure_machine.AzureMachine(hardware=hardware, extra_data=_challenge(number)[-32:])
    parts, expected = machine.parts(), machine.expectations()
    collateral = machine.collateral()
    if hardware == "tdx":
        collateral = Collateral(tdx=(_tdx_collateral(),))
    return lambda: azure_machine.verify_azure_vtpm(
        parts, collateral, expected, machine.now, _challenge(number)[-32:]
    )


def _nvidia(count: int, gpus: int, switches: int) -> list[Callable[[], Verdict]]:
    machine = nvidia_machine.machine(gpus, switches)
    collateral = nvidia_machine.collateral()
    expected = nvidia_machine.expectations(machine.devices)

    def verdict(number: int) -> Callable[[], Verdict]:
        nonce = _challenge(number)[-32:]
        parts = machine.parts(nonce)
        return lambda: verify_nvidia(parts, collateral, expected, nvidia_machine.NOW, nonce)

    return [verdict(number) for number in range(count)]


if __name__ == "__main__":
    main()
