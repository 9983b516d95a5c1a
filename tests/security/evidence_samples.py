"""Where the shared evidence lies. It is not part of the repository: tests skip without it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

EVIDENCE = Path(
    os.environ.get("BULKHEAD_EVIDENCE")
    or Path(__file__).resolve().parents[2].parent / "shared" / "evidence"
)

needs_evidence = pytest.mark.skipif(
    not EVIDENCE.is_dir(),
    reason=f"no evidence samples in {EVIDENCE}; set BULKHEAD_EVIDENCE to where they lie",
)
