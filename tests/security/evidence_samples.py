"""Where real evidence lies, which is not part of the repository."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parents[2]

EVIDENCE = Path(os.environ.get("BULKHEAD_EVIDENCE", _ROOT.parent / "shared" / "evidence"))

needs_evidence = pytest.mark.skipif(
    not EVIDENCE.is_dir(),
    reason=f"no real evidence at {EVIDENCE}; set BULKHEAD_EVIDENCE to where it lies",
)
