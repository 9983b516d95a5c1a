"""The native decoder under the compiler's sanitizers: C++ that nothing else bounds.

Its callers check every block, position and length; here the same tests run with a decoder that
watches each access (AddressSanitizer, UndefinedBehaviorSanitizer) or each pair of accesses from two
threads (ThreadSanitizer). A step that no caller would let through shows that it does watch.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest

from runtime.stage.native.library import load_library

ROOT = Path(__file__).parents[2]
NATIVE = ROOT / "runtime" / "stage" / "native"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(load_library() is None, reason="this processor has no AVX-512"),
]

# One sequence of 20 positions in two blocks, of which the cache has the first only.
BEYOND = """
import sys, tempfile, torch
from pathlib import Path
sys.path[:0] = ["tests", "tests/stage"]
import sanitized_decoder
from checkpoints import write_checkpoint
from stage_models import settings
from stage_variants import VARIANTS
from runtime.stage.stage import StageRunner
from security.channel.frame import SequenceStep, StepHeader
from security.manifest import ModelFiles, build_manifest

torch.set_num_threads(1)
directory = Path(tempfile.mkdtemp())
family, changes = VARIANTS["qwen3"]
write_checkpoint(family, directory, seed=3, **changes)
files = ModelFiles(directory, build_manifest(directory))
stage = StageRunner(files, settings(0, 6, block_size=16, cache_blocks=1, threads=2))
assert stage.backend == "native"
header = StepHeader(0, (SequenceStep(0, 0, 20, (0, 1), True),))
stage._layers.forward(header, torch.zeros(20, 64))
"""


@dataclass(frozen=True)
class Sanitizer:
    """How to compile for it, which library must be loaded first, and its settings."""

    flags: str
    runtime: str
    options: dict[str, str]


ADDRESS = Sanitizer(
    "-fsanitize=address,undefined -fno-sanitize-recover=undefined",
    "libasan.so",
    # The interpreter itself keeps what it has till the end.
    {"ASAN_OPTIONS": "detect_leaks=0:exitcode=99"},
)
THREAD = Sanitizer(
    "-fsanitize=thread",
    "libtsan.so",
    # Of torch and Python it knows nothing, since they are compiled without it.
    {"TSAN_OPTIONS": "ignore_noninstrumented_modules=1:exitcode=99"},
)


def build(sanitizer: Sanitizer, directory: Path, source: Path = NATIVE) -> dict[str, str]:
    """The environment for a process whose decoder is compiled for this sanitizer."""
    found = [
        subprocess.run(
            ["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in (sanitizer.runtime, "libstdc++.so")
    ]
    if not all(Path(name).is_absolute() for name in found):
        pytest.skip(f"this compiler comes without {sanitizer.runtime}")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    flags = project["tool"]["setuptools"]["ext-modules"][0]["extra-compile-args"]
    decoder = directory / "decoder.so"
    flags = [*flags, "-O1", "-g", *sanitizer.flags.split(), "-shared", "-fPIC"]
    subprocess.run(["g++", *flags, str(source / "decoder.cpp"), "-o", str(decoder)], check=True)
    return {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'stage'}",
        "OMP_NUM_THREADS": "1",
        "LD_PRELOAD": " ".join(found),
        "DECODER": str(decoder),
        **sanitizer.options,
    }


def run(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Addresses are not randomised: ThreadSanitizer needs its own places free."""
    return subprocess.run(
        ["setarch", "-R", sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def run_tests(environment: dict[str, str], wanted: str) -> subprocess.CompletedProcess[str]:
    options = ["-p", "sanitized_decoder", "-p", "no:cacheprovider", "-q", "-k", wanted]
    names = ("test_native.py", "test_int8.py", "test_longrope.py")
    files = [str(ROOT / "tests" / "stage" / name) for name in names]
    return run(environment, "-m", "pytest", *options, *files)


def test_no_access_is_out_of_bounds_and_no_operation_undefined(tmp_path: Path) -> None:
    environment = build(ADDRESS, tmp_path)
    beyond = run(environment, "-c", BEYOND)
    assert "AddressSanitizer: heap-buffer-overflow" in beyond.stderr, beyond.stderr
    assert "decoder.cpp" in beyond.stderr and beyond.returncode == 99
    done = run_tests(environment, "(native or int8) and not version and not processor")
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout and "runtime error" not in done.stderr


def test_no_two_threads_meet_in_memory(tmp_path: Path) -> None:
    environment = build(THREAD, tmp_path)
    wanted = "products or chunks or (tokens_equal and qwen3 and one)"
    done = run_tests(environment, wanted)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout

    # And a decoder whose threads do not wait for each other's products is found out.
    hasty = tmp_path / "hasty"
    hasty.mkdir()
    for path in NATIVE.glob("*.h"):
        (hasty / path.name).write_text(path.read_text())
    barrier = "work.scratch);\n        work.team.barrier();"
    source = (NATIVE / "decoder.cpp").read_text()
    assert source.count(barrier) == 1
    (hasty / "decoder.cpp").write_text(source.replace(barrier, "work.scratch);"))
    raced = run_tests(build(THREAD, tmp_path, hasty), "tokens_equal and qwen3-one-2")
    assert "ThreadSanitizer: data race" in raced.stdout + raced.stderr, raced.stdout
