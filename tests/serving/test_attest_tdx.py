"""A trust domain that collects through a mounted configfs and is checked, event log included."""

from __future__ import annotations

from pathlib import Path

import pytest
import tdx_machine
from attest_runs import attest
from evidence_samples import EVIDENCE, needs_evidence
from pinning import policy_for
from tdx_machine import NOW
from test_attest import NONCE, run_bulkhead
from tsm_mount import mounted, needs_mount
from tsm_stand_in import TsmKernel

EVENTS = [(1, 8, b"firmware"), (2, 8, b"kernel"), (3, 8, b"command line")]


def kernel() -> TsmKernel:
    registers = tdx_machine.replay(EVENTS)

    def sign(report_data: bytes, level: int) -> tuple[bytes, bytes]:
        return tdx_machine.quote(report_data=report_data, **registers), b""

    return TsmKernel(sign, provider="tdx_guest", floor=None)


@needs_mount
def test_collect_and_check(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    tables = tmp_path / "acpi"
    (tables / "data").mkdir(parents=True)
    (tables / "data" / "CCEL").write_bytes(tdx_machine.event_log(EVENTS))
    (tables / "CCEL").write_bytes(tdx_machine.ccel_table())
    out = tmp_path / "out"
    with mounted(kernel(), tmp_path / "tsm") as reports:
        options = ("--nonce", NONCE.hex(), "--configfs", reports, "--acpi-tables", tables)
        collected = run_bulkhead("collect", out, *options)
        assert collected.returncode == 0, collected.stderr
    files = ["ccel_data.bin", "ccel_table.bin", "quote.bin"]
    assert sorted(path.name for path in out.iterdir()) == files
    known = tmp_path / "known"
    known.mkdir()
    (known / "tcb.json").write_bytes(tdx_machine.collateral())
    shown = attest(capsys, out, "--at", NOW, "--collateral", known)
    assert shown.code == 1  # Intel issued none of this
    policy = tmp_path / "policy.yaml"
    policy.write_text(policy_for(shown.document, {"roots": list(tdx_machine.vendor().roots)}))
    options = ("--at", NOW, "--collateral", known, "--policy", policy, "--nonce", NONCE.hex())
    good = attest(capsys, out, *options)
    assert (good.code, good.failures) == (0, set())
    (out / "ccel_data.bin").write_bytes(tdx_machine.event_log(EVENTS[:2]))
    assert attest(capsys, out, *options).failures == {"event_log_not_replayed"}


@needs_evidence
@pytest.mark.parametrize(
    ("sample", "code", "word"),
    [
        ("snp/milan-azure-2023", 3, "sound, but nothing is pinned"),
        ("snp/genoa-tinfoil", 1, "snp_endorsement_missing"),
        ("snp/absent", 2, "bulkhead: "),
    ],
)
def test_samples_in_a_process(sample: str, code: int, word: str) -> None:
    finished = run_bulkhead("check", EVIDENCE / sample, "--at", "2025-06-10")
    assert finished.returncode == code
    assert word in finished.stdout + finished.stderr
