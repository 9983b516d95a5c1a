"""One tensor-parallel rank: its share of a stage's layers, computed on command.

Started by `runtime.stage.tensor_parallel`, which see for lifetime and messages. Standard input
brings the job and then the steps; when it closes, the process ends at once. Standard output
carries the answers; whatever libraries print goes to standard error, the shard's log.

What DeepSpeed reads from the environment is set here and nowhere else. Its all-reduce is a C++
extension that it compiles at first use (g++ and ninja, about a minute); the result is kept in a
0700 directory of the user's cache, so that later starts only load it.
"""

from __future__ import annotations

import ctypes
import faulthandler
import fcntl
import hashlib
import os
import platform
import queue
import stat
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import IO, TYPE_CHECKING

from runtime.stage.errors import RankFailed, StageError
from runtime.stage.tensor_parallel import (
    SEGMENT_DIRECTORY,
    Message,
    RankJob,
    TensorParallelPlan,
    decode_count,
    encode_count,
    read_message,
    segment_prefix,
    step_limits,
    write_message,
)
from security.errors import SecurityError

if TYPE_CHECKING:
    from torch import nn

    from runtime.stage.families import DecoderParts

__all__ = ["extension_directory", "failure_text", "main"]

PR_SET_DUMPABLE = 4  # linux/prctl.h
# Mapping the shared memory takes milliseconds, unless a peer has died in this very moment.
MAPPING_TIMEOUT_S = 60
PEER_TIMEOUT = timedelta(minutes=10)


def failure_text(error: BaseException) -> str:
    """What the shard, its log and Ray may know of a failure: at most 4,000 characters.

    Texts of stage and security errors hold names and sizes only; those of others may quote what the
    rank works on, so that of them the class is told, and where it was raised.
    """
    if isinstance(error, StageError | SecurityError):
        return f"failed: {type(error).__name__}: {error}"[:4000]
    frames = traceback.extract_tb(error.__traceback__)
    where = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in reversed(frames))
    return f"failed: {type(error).__name__} at {where or 'an unknown place'}"[:4000]


def main() -> None:
    """Runs one rank until its standard input closes. Never returns."""
    os.umask(0o077)
    # A rank sees what its shard sees; core files are off by inheritance, this is lost at exec.
    ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb", buffering=0)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    inbox: queue.SimpleQueue[tuple[Message, bytearray]] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(inbox,), name="lifeline", daemon=True).start()
    try:
        _, job = inbox.get()
        _, manifest = inbox.get()
        _, keys = inbox.get()
        _serve(RankJob.from_bytes(bytes(job)), bytes(manifest), bytes(keys), inbox, answers)
    except BaseException as error:  # the shard process decides what it means
        write_message(answers, Message.FAILED, failure_text(error).encode())
        if not isinstance(error, Exception):
            raise
        os._exit(1)


def _receive(inbox: queue.SimpleQueue[tuple[Message, bytearray]]) -> None:
    stream = os.fdopen(sys.stdin.fileno(), "rb", buffering=0, closefd=False)
    segment: Path | None = None
    while (message := read_message(stream)) is not None:
        kind, payload = message
        if kind is Message.JOB:
            segment = _segment(RankJob.from_bytes(bytes(payload)))
        inbox.put(message)
    if segment is not None:
        segment.unlink(missing_ok=True)
    # Not sys.exit: the main thread may wait for a peer that is gone.
    os._exit(0)


def _segment(job: RankJob) -> Path:
    return SEGMENT_DIRECTORY / f"{segment_prefix(job.name)}{job.rank}"


def _serve(
    job: RankJob,
    manifest: bytes,
    keys: bytes,
    inbox: queue.SimpleQueue[tuple[Message, bytearray]],
    answers: IO[bytes],
) -> None:
    from runtime.stage.checkpoint import ProgressCount, open_checkpoint
    from runtime.stage.layers import LayerStack
    from security.channel.frame import decode_step
    from security.manifest import Manifest
    from security.sealing.keys import UnsealKeys
    from security.sealing.reader import open_model

    _set_environment(job)
    import torch

    files = open_model(
        Path(job.model_directory), Manifest.from_bytes(manifest), UnsealKeys.from_bytes(keys)
    )
    checkpoint = open_checkpoint(files, job.settings)
    shard = _join(job, checkpoint.parts)
    reported = 0

    def report(done_bytes: int, _total_bytes: int) -> None:
        nonlocal reported
        write_message(answers, Message.PROGRESS, encode_count(done_bytes - reported))
        reported = done_bytes

    layers = LayerStack(checkpoint, job.settings, ProgressCount(0, report), shard)
    files.close()
    limits = step_limits(job.settings)
    write_message(answers, Message.READY, encode_count(layers.block_bytes))
    while True:
        kind, payload = inbox.get()
        if kind is Message.CACHE:
            blocks = decode_count(payload)
            layers.open_cache(blocks)
            limits = replace(limits, cache_blocks=blocks)
            write_message(answers, Message.DONE)
            continue
        if kind is Message.RESET:
            layers.reset()
            write_message(answers, Message.DONE)
            continue
        header, rows = decode_step(payload, limits)
        hidden = torch.frombuffer(rows, dtype=job.settings.torch_dtype)
        output = layers.forward(header, hidden.view(header.tokens, -1)).contiguous()
        if job.rank == 0:
            write_message(answers, Message.DONE, output.view(torch.uint8).numpy().data.cast("B"))
        else:
            write_message(answers, Message.DONE)


def _set_environment(job: RankJob) -> None:
    os.environ.update(
        RANK=str(job.rank),
        LOCAL_RANK=str(job.rank),
        WORLD_SIZE=str(job.settings.tp),
        # DeepSpeed's shared memory crashes unless this equals the world size.
        LOCAL_SIZE=str(job.settings.tp),
        # Names of the shared memory; nothing listens there.
        MASTER_ADDR=job.name,
        MASTER_PORT="0",
        GLOO_SOCKET_IFNAME="lo",
        DS_ACCELERATOR="cpu",
        TORCH_EXTENSIONS_DIR=str(extension_directory()),
    )


def _join(job: RankJob, parts: DecoderParts) -> Callable[[nn.Module], None]:
    """Joins the group and returns what shards a layer."""
    import torch
    from torch import nn

    from runtime.stage.probe import ShardingProbe

    plan = TensorParallelPlan(parts.config, job.settings.tp)
    probe = ShardingProbe(parts, job.settings)

    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{job.rendezvous}",
        rank=job.rank,
        world_size=job.settings.tp,
        timeout=PEER_TIMEOUT,
    )
    import deepspeed

    _load_operator()
    # From here to the unlink a peer's death would leave us spinning with the interpreter locked,
    # beyond the reach of the lifeline: all are alive now, and this timer needs no interpreter.
    torch.distributed.barrier()
    faulthandler.dump_traceback_later(MAPPING_TIMEOUT_S, exit=True)
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    torch.distributed.barrier()
    _segment(job).unlink(missing_ok=True)
    faulthandler.cancel_dump_traceback_later()

    def shard(layer: nn.Module) -> None:
        whole_output = probe.output(layer, 1)
        plan.prepare(layer)
        expected = plan.expected_slices(layer, job.rank)
        shell = nn.ModuleList([layer])
        vars(shell)["config"] = (
            parts.config
        )  # DeepSpeed splits attention by the heads it finds here
        deepspeed.init_inference(
            shell,
            # Its default grain of 64 rows would split narrow linears unevenly, or not at all.
            tensor_parallel={"tp_size": job.settings.tp, "tp_grain_size": 1},
            dtype=job.settings.torch_dtype,
            replace_with_kernel_inject=False,
            injection_policy={type(layer): plan.row_wise},
        )
        plan.check_sharded(layer, expected)
        plan.localise(layer)
        probe.check(layer, probe.output(layer, job.settings.tp), whole_output)

    return shard


def _load_operator() -> None:
    """Compiles or loads DeepSpeed's all-reduce, one process of the user at a time.

    torch's own lock is a file that a killed compiler leaves behind and that everybody waits for
    ever after; under our lock, which the kernel releases, such a file is known to be stale.
    """
    from deepspeed.accelerator import get_accelerator

    directory = Path(os.environ["TORCH_EXTENSIONS_DIR"])
    with (directory / "bulkhead.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for stale in directory.glob("*/lock"):
            stale.unlink(missing_ok=True)
        builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
        if builder is None:
            raise RankFailed("DeepSpeed: expected its shared-memory operator, found none")
        builder.load()


def extension_directory() -> Path:
    """The private directory of compiled extensions, made where it is missing.

    One for each version and processor: the code is compiled for the machine that it runs on, and
    a home directory may be shared.

    Raises:
        RankFailed: it belongs to somebody else or others may write to it. What is in it is run.
    """
    from importlib.metadata import version

    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    flags = next(
        (
            line
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith(("flags", "Features"))
        ),
        platform.processor(),
    )
    key = "-".join(
        (
            f"py{sys.version_info.major}.{sys.version_info.minor}",
            f"torch{version('torch')}",
            f"deepspeed{version('deepspeed')}",
            hashlib.sha256(flags.encode()).hexdigest()[:12],
        )
    )
    directory = Path(cache)
    directory.mkdir(parents=True, exist_ok=True)
    for part in ("bulkhead", "extensions", key):
        directory /= part
        directory.mkdir(mode=0o700, exist_ok=True)
        found = directory.lstat()
        if (
            not stat.S_ISDIR(found.st_mode)
            or found.st_uid != os.getuid()
            or stat.S_IMODE(found.st_mode) != 0o700
        ):
            raise RankFailed(
                f"{directory}: expected a directory of user {os.getuid()} with mode 0700, found "
                f"user {found.st_uid} with mode {stat.S_IMODE(found.st_mode):o}; remove it"
            )
    return directory
