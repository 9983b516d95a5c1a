"""A shard process for benchmarks: the product's, with two things that only a measurement wants.

`--cores` keeps the process on some cores, as if its machine had no others. `--links plain` runs it
over links that do not encrypt, to measure what encryption costs; that cipher lives under tests/.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

# Isolated mode leaves the working directory out.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def main() -> None:
    """Runs one shard process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cores", required=True, help="comma-separated")
    parser.add_argument("--links", choices=("encrypted", "plain"), required=True)
    parser.add_argument("--directory", required=True)
    arguments = parser.parse_args()
    # Before torch is imported, which counts the cores that it may use.
    os.sched_setaffinity(0, {int(core) for core in arguments.cores.split(",")})
    if arguments.links == "plain":
        from tests import null_cipher

        null_cipher.install()
    from runtime.shard import process

    sys.argv[1:] = ["--directory", arguments.directory]
    process.main()


if __name__ == "__main__":
    main()
