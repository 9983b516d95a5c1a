"""Fuzzes what reads evidence, guided by coverage (atheris, libFuzzer).

Usage: ``python scripts/fuzz.py [TARGET ...] [--runs N] [--work DIR] [--keep]``

A target is a module of `tests/fuzz`; all of them if none is named. The corpus is what the
repository holds of it (`tests/fuzz/corpus/TARGET.zip`) and seeds that are made anew; it grows under
`.fuzz/` or DIR. `--keep` puts it, the smallest inputs first and as far as they fit, into the
repository's archive: each of them reached code that those before it had not.

The exit status is 1 where an input raised anything but a named error, or took more memory or time
than it may.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TARGETS = {
    path.stem.removeprefix("fuzz_"): path
    for path in sorted((ROOT / "tests/fuzz").glob("fuzz_*.py"))
}
CORPUS = ROOT / "tests/fuzz/corpus"
MAX_ARCHIVE_BYTES = 32_000
MAX_INPUT_BYTES = 20_000
MAX_RSS_MB = 512
MAX_INPUT_S = 20


def main() -> int:
    """Runs the targets one after another; see the module's text."""
    parser = argparse.ArgumentParser(description="Fuzzes what reads evidence.")
    parser.add_argument("targets", nargs="*", choices=[[], *TARGETS], help="all if none is named")
    parser.add_argument("--runs", type=int, default=1_000_000, help="inputs for each target")
    parser.add_argument("--work", type=Path, default=ROOT / ".fuzz", help="where it grows")
    parser.add_argument("--keep", action="store_true", help="renew the repository's corpus")
    arguments = parser.parse_args()
    failed = False
    for name in arguments.targets or TARGETS:
        corpus = arguments.work.resolve() / name
        fill(name, corpus)
        done = fuzz(name, corpus, arguments.runs)
        print(f"{name}: {summary(done.stderr)}", flush=True)
        if done.returncode != 0:
            print(done.stderr[-4000:], file=sys.stderr)
            failed = True
        elif arguments.keep:
            keep(name, corpus)
    return int(failed)


def command(name: str, *arguments: str) -> list[str]:
    """To run a target."""
    return [sys.executable, "-m", f"tests.fuzz.fuzz_{name}", *arguments]


def fill(name: str, corpus: Path) -> None:
    """Puts the archive and new seeds into a directory."""
    corpus.mkdir(parents=True, exist_ok=True)
    archive = CORPUS / f"{name}.zip"
    if archive.exists():
        with zipfile.ZipFile(archive) as stored:
            stored.extractall(corpus)
    subprocess.run(command(name, "--seeds", str(corpus)), cwd=ROOT, check=True)


def fuzz(name: str, corpus: Path, runs: int) -> subprocess.CompletedProcess[str]:
    """Runs libFuzzer over a corpus."""
    return subprocess.run(
        command(
            name,
            f"-runs={runs}",
            f"-max_len={MAX_INPUT_BYTES}",
            f"-rss_limit_mb={MAX_RSS_MB}",
            f"-timeout={MAX_INPUT_S}",
            f"-artifact_prefix={corpus.parent}/{name}-",
            "-print_final_stats=1",
            str(corpus),
        ),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def summary(log: str) -> str:
    """Inputs, their rate and the peak of memory, out of libFuzzer's last lines."""
    found = dict(re.findall(r"stat::(\w+):\s+(\d+)", log))
    return (
        f"{found.get('number_of_executed_units', '?')} inputs, "
        f"{found.get('average_exec_per_sec', '?')}/s, "
        f"peak {found.get('peak_rss_mb', '?')} MiB"
    )


def keep(name: str, corpus: Path) -> None:
    """Puts the smallest inputs of a corpus into the repository's archive."""
    CORPUS.mkdir(exist_ok=True)
    left = MAX_ARCHIVE_BYTES
    with zipfile.ZipFile(CORPUS / f"{name}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(corpus.iterdir(), key=lambda path: (path.stat().st_size, path.name)):
            left -= path.stat().st_size
            if left < 0:
                break
            # Equal contents give an equal archive: no time of day in it.
            archive.writestr(zipfile.ZipInfo(path.name), path.read_bytes())


if __name__ == "__main__":
    sys.exit(main())
