"""Generates the Python code of every .proto file in security/ and runtime/.

Usage: ``python scripts/generate_protos.py [--check]``. With ``--check`` nothing is written and the
exit status is 1 if the committed code is not what the .proto files give.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("security", "runtime")
SUFFIXES = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py")


def generate(target: Path) -> list[Path]:
    """Writes the generated code under a directory; returns its paths relative to there."""
    sources = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.proto"))
    names = [str(path.relative_to(ROOT)) for path in sources]
    arguments = [
        "protoc",
        f"-I{ROOT}",
        f"-I{files('grpc_tools').joinpath('_proto')}",
        f"--python_out={target}",
        f"--pyi_out={target}",
        f"--grpc_python_out={target}",
        *names,
    ]
    if protoc.main(arguments) != 0:
        raise SystemExit("protoc failed; its message is above")
    generated = [
        path.relative_to(ROOT).with_name(path.stem + suffix)
        for path in sources
        for suffix in SUFFIXES
    ]
    for path in generated:
        # protoc's stubs are typed, but not strictly; their users are checked against them all the
        # same.
        code = target / path
        code.write_text("# mypy: ignore-errors\n" + code.read_text())
    return generated


def main() -> int:
    """Generates, or compares with what is there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare only")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        target = Path(directory)
        stale = [
            path
            for path in generate(target)
            if not (ROOT / path).is_file()
            or (ROOT / path).read_bytes() != (target / path).read_bytes()
        ]
        if not options.check:
            for path in stale:
                (ROOT / path).write_bytes((target / path).read_bytes())
    for path in stale:
        print(f"{'stale' if options.check else 'wrote'}: {path}")
    if options.check and stale:
        print("run scripts/generate_protos.py and commit the result")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
