"""Where the recorded evidence of real machines lies; it is not part of the repository."""

import os
from pathlib import Path

import pytest

EVIDENCE = Path(
    os.environ.get("BULKHEAD_EVIDENCE")
    or Path(__file__).resolve().parents[2].parent / "shared" / "evidence"
)

needs_evidence = pytest.mark.skipif(
    not (EVIDENCE / "expected.json").is_file(),
    reason=f"no recorded evidence at {EVIDENCE}; set BULKHEAD_EVIDENCE",
)
