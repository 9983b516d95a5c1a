"""A shard process whose kernel is a stand-in.

    tsm_process.py --configfs DIR --directory SHARD_DIR

Production knows one place for report instances, a constant that neither arguments nor environment
reach; here it is another one.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

# Isolated mode leaves the repository out.
sys.path[:0] = [str(Path(__file__).parents[2])]

from runtime.shard import process  # noqa: E402
from security.attestation import tsm  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--configfs", type=Path, required=True)
    parser.add_argument("--directory", type=Path, required=True)
    arguments = parser.parse_args()
    tsm.REPORTS = arguments.configfs
    sys.argv = [sys.argv[0], "--directory", str(arguments.directory)]
    process.main()


if __name__ == "__main__":
    main()
