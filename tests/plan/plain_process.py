"""The same shard process with links that do not encrypt: what the wire tap must be able to see."""

from __future__ import annotations

import sys
from pathlib import Path

# Isolated mode leaves the script's own directory out.
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import null_cipher  # noqa: E402
import tapped_process  # noqa: E402

if __name__ == "__main__":
    null_cipher.install()
    tapped_process.main()
