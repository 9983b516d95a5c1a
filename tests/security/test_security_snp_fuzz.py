"""The fuzz target of SEV-SNP runs a little in every test run; `tests/fuzz` says how to run more."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None, reason="atheris is not installed (extra dev)"
)
def test_a_few_thousand_inputs_raise_only_named_errors(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.fuzz.fuzz_sev_snp"]
    corpus = tmp_path / "corpus"
    subprocess.run([*command, "--seeds", str(corpus)], cwd=ROOT, check=True, timeout=120)
    assert sum(path.stat().st_size for path in corpus.iterdir()) < 200_000
    run = subprocess.run(
        [*command, "-runs=3000", "-seed=1", "-max_len=8192", str(corpus)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    assert "Done 3000 runs" in run.stderr
