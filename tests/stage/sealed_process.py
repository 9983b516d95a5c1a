"""A process that loads a sealed stage and keeps a copy of every file that it removes.

    sealed_process.py MODEL KEEP TP LEAK    keys of the stage on standard input

Prints the paths of the files that it opened for writing. LEAK "leak" writes a tensor and removes
it again, which the test must notice.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

model, keep, tp, leak = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
written: set[str] = set()


def watch(event: str, arguments: tuple[object, ...]) -> None:
    if event == "open":
        path, _, flags = arguments
        if isinstance(path, str | bytes) and int(flags) & (os.O_WRONLY | os.O_RDWR):  # type: ignore[call-overload]
            written.add(os.path.abspath(os.fsdecode(path)))
    elif event == "os.remove":
        path, directory = arguments
        base = f"/proc/self/fd/{directory}" if directory != -1 else os.getcwd()
        found = Path(base, os.fsdecode(path))  # type: ignore[arg-type]
        if found.is_file() and not found.is_relative_to(keep):
            shutil.copyfile(found, keep / f"removed-{len(os.listdir(keep))}")


sys.addaudithook(watch)

from stage_chain import step  # noqa: E402
from stage_models import settings  # noqa: E402

from runtime.stage.stage import StageRunner  # noqa: E402
from security.manifest import build_manifest  # noqa: E402
from security.sealing.keys import UnsealKeys  # noqa: E402
from security.sealing.reader import open_model  # noqa: E402

files = open_model(model, build_manifest(model), UnsealKeys.from_bytes(sys.stdin.buffer.read()))
stage = StageRunner(files, settings(tp=tp))
stage.forward(step(count=3, blocks=(1,)), token_ids=[1, 2, 3])
if leak == "leak":
    path = Path.cwd() / "scratch"
    path.write_bytes(b"xyz" + files.read_tensor("model.layers.3.mlp.up_proj.weight")[8:200])
    path.unlink()
stage.close()
print("\n".join(sorted(written)))
