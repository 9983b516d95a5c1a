"""Every fuzz target runs a little in every test run; `scripts/fuzz.py` runs more."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TARGETS = sorted(
    path.stem.removeprefix("fuzz_") for path in (ROOT / "tests/fuzz").glob("fuzz_*.py")
)


def test_there_is_a_target_for_every_kind() -> None:
    assert TARGETS == ["azure_vtpm", "nras", "nvidia", "rim", "sev_snp", "tdx"]


@pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None, reason="atheris is not installed (extra dev)"
)
@pytest.mark.parametrize("target", TARGETS)
def test_a_few_thousand_inputs_raise_only_named_errors(target: str, tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "scripts/fuzz.py", target, "--runs=4000", f"--work={tmp_path}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    assert run.stdout.startswith(f"{target}: ") and " inputs, " in run.stdout
