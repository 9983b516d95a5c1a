"""The layers of one stage on several rank processes of this machine.

DeepSpeed's AutoTP shards the layers and sums partial results. This module is the other side: it
starts one process a rank, hands every step to all of them and takes the result from rank 0. The
shard process itself is no rank, on purpose: DeepSpeed's shared-memory sum spins for ever when a
peer is gone, and only a process that can be killed can be bounded.

Lifetime: a rank's standard input is its job queue and its lifeline. It ends when that closes,
whatever way this process ends. When a rank ends, reports an error or is silent for too long, all
are killed and every further call raises RankFailed.

Shared memory: DeepSpeed names its segments by uid, MASTER_ADDR and MASTER_PORT and never unlinks
them. The address is a random name under a pattern of our own that also says who made it. Ranks
unlink their segment as soon as all have mapped it; whatever a kill in between leaves behind, the
next start sweeps away.
"""

from __future__ import annotations

import copy
import json
import os
import queue
import re
import secrets
import selectors
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final, NoReturn, TypeGuard, cast

import torch
from torch import nn

import runtime
from runtime.stage.errors import RankFailed, UnsupportedModel
from runtime.stage.fused import FUSED, split_fused
from runtime.stage.settings import StageSettings
from security.channel.frame import FrameLimits, StepHeader, encode_step
from security.sealing.document import layer_unit
from security.sealing.reader import keys_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from runtime.stage.checkpoint import ProgressCount, StageCheckpoint
    from security.manifest import ModelFiles

__all__ = [
    "SEGMENT_DIRECTORY",
    "Message",
    "RankJob",
    "TensorParallelGroup",
    "TensorParallelPlan",
    "decode_count",
    "encode_count",
    "read_message",
    "segment_prefix",
    "step_limits",
    "sweep_segments",
    "write_message",
]

# Longest silence of the ranks while they start; compiling DeepSpeed's op takes about a minute.
START_SILENCE_S: Final = 300.0
STEP_TIMEOUT_S: Final = 120.0
CLOSE_TIMEOUT_S: Final = 5.0

SEGMENT_DIRECTORY: Final = Path("/dev/shm")  # noqa: S108 - a fixed place, not a temporary file of ours
_SEGMENT = re.compile(
    r"deepspeed_allreduce_buffer_(?P<uid>\d+)_bulkhead-(?P<namespace>\d+)-(?P<pid>\d+)"
    r"-(?P<started>\d+)-[0-9a-f]{32}_0_\d+"
)
_INHERITED = ("HOME", "LANG", "LC_ALL", "PATH", "XDG_CACHE_HOME", "TMPDIR", "CXX")
# Isolated mode ignores the environment and the working directory, so the source is named.
_BOOT = "import sys; sys.path.insert(0, sys.argv[1]); from runtime.shard.rank import main; main()"

_STYLES = ("colwise", "rowwise", "replicated_with_grad_allreduce")

_FRAME = struct.Struct("<BQ")
_MAX_COUNT = 2**32 - 1


class Message(IntEnum):
    """Kinds of messages between this process and a rank."""

    JOB = 1  # to the rank: a RankJob as JSON
    MANIFEST = 2  # to the rank: the manifest's bytes
    STEP = 3  # to the rank: a step frame
    RESET = 4  # to the rank: empty the cache
    PROGRESS = 5  # from the rank: bytes read since the last one, u64
    READY = 6  # from the rank: loaded; bytes of one cache block on it, u64
    DONE = 7  # from the rank: a step, reset or cache is done; rank 0 adds the rows of a step
    FAILED = 8  # from the rank: why, in UTF-8
    CACHE = 9  # to the rank: make a cache of so many blocks, u64
    KEYS = 10  # to the rank, after the manifest: the keys of its layers, where they are sealed


@dataclass(frozen=True, slots=True)
class RankJob:
    """What a rank is told at its start.

    Args:
        rank: 0 to `settings.tp` - 1.
        settings: of the stage.
        model_directory: where the checkpoint is; every byte is checked against the manifest.
        rendezvous: path of the file through which the ranks find each other.
        name: stands for MASTER_ADDR and so names the shared memory.
    """

    rank: int
    settings: StageSettings
    model_directory: str
    rendezvous: str
    name: str

    def to_bytes(self) -> bytes:
        """As JSON."""
        return json.dumps(
            {
                "rank": self.rank,
                "settings": self.settings.to_document(),
                "model_directory": self.model_directory,
                "rendezvous": self.rendezvous,
                "name": self.name,
            }
        ).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> RankJob:
        """From the JSON that the shard process wrote."""
        document = json.loads(data)
        return cls(**{**document, "settings": StageSettings(**document["settings"])})


def write_message(stream: IO[bytes], kind: Message, payload: bytes | memoryview = b"") -> None:
    """Writes one message and flushes."""
    stream.write(_FRAME.pack(kind, len(payload)))
    stream.write(payload)
    stream.flush()


def read_message(stream: IO[bytes]) -> tuple[Message, bytearray] | None:
    """The next message, None at the end of the stream. Both ends are ours, so length is trusted."""
    start = _read_exactly(stream, _FRAME.size)
    if start is None:
        return None
    kind, length = _FRAME.unpack(start)
    payload = _read_exactly(stream, length)
    return None if payload is None else (Message(kind), payload)


def _read_exactly(stream: IO[bytes], length: int) -> bytearray | None:
    content = bytearray(length)
    view, done = memoryview(content), 0
    while done < length:
        count = os.readv(stream.fileno(), [view[done:]])
        if not count:
            return None
        done += count
    return content


def encode_count(count: int) -> bytes:
    """The payload of a message that holds one number."""
    return count.to_bytes(8, "little")


def decode_count(payload: bytes | bytearray) -> int:
    """Reads what `encode_count` wrote."""
    return int.from_bytes(payload, "little")


def step_limits(settings: StageSettings) -> FrameLimits:
    """Limits for step frames between this process and its ranks, which were checked before."""
    return FrameLimits(
        max_sequences=_MAX_COUNT,
        max_tokens=_MAX_COUNT,
        max_context=settings.max_context,
        block_size=settings.block_size,
        cache_blocks=settings.cache_blocks,
        hidden_size=settings.hidden_size,
        dtype=settings.dtype,
        vocabulary=_MAX_COUNT,
    )


# -- what is sharded how ------------------------------------------------------------------------


class TensorParallelPlan:
    """Which linears of a layer are split along their outputs and which along their inputs.

    Names come from the configuration's own `base_model_tp_plan`. Fused projections, which that
    plan gathers again after splitting, are taken apart instead (`runtime.stage.fused`). Whatever
    the plan does not cover DeepSpeed would shard by guess, so a layer with such a linear is
    refused, and after sharding every slice is compared with the one it should be.

    Args:
        config: of the model.
        tp: ranks.

    Raises:
        UnsupportedModel: the plan is missing or has a style that DeepSpeed's route does not
            compute (norms over all heads, mixtures of experts), or `tp` does not divide the heads.
    """

    def __init__(self, config: PretrainedConfig, tp: int) -> None:
        self._config = config
        self._tp = tp
        self._styles: dict[str, str] = {}
        plan = config.base_model_tp_plan
        if not plan:
            raise UnsupportedModel(
                f"{config.model_type}: expected a base_model_tp_plan in its configuration class, "
                "found none; plan its stages with tensor parallelism 1"
            )
        names = {pattern.removeprefix("layers.*."): style for pattern, style in plan.items()}
        fused_in = {owner for owner, _, name in map(_path, names) if name in FUSED}
        for path, style in names.items():
            owner, _, name = _path(path)
            if style == "colwise_gather_output" and name in FUSED:
                self._styles |= {f"{owner}.{part}": "colwise" for part in FUSED[name]}
            elif style == "rowwise_split_input" and owner in fused_in:
                self._styles[path] = "rowwise"
            elif f"layers.*.{path}" in plan and style in _STYLES:
                self._styles[path] = style
            else:
                raise UnsupportedModel(
                    f"{config.model_type}: base_model_tp_plan says {path}: {style}, which is "
                    "not sharded correctly; plan its stages with tensor parallelism 1"
                )
        for field in ("num_attention_heads", "num_key_value_heads"):
            heads = getattr(config, field)
            if heads % tp:
                raise UnsupportedModel(
                    f"tensor parallelism {tp}: expected a divisor of {field} {heads}; "
                    "plan with another degree"
                )

    @property
    def row_wise(self) -> tuple[str, ...]:
        """Names in a layer of the linears split along their inputs, whose outputs are summed."""
        return tuple(name for name, style in self._styles.items() if style == "rowwise")

    def prepare(self, layer: nn.Module) -> None:
        """Takes fused projections apart and refuses what would not be sharded correctly.

        Raises:
            UnsupportedModel: a linear is not in the plan or does not divide evenly, or a parameter
                outside the linears is wider than a head and so belongs to several.
        """
        split_fused(self._config, layer)
        attention = layer.get_submodule("self_attn")
        head_size = cast("int", attention.head_dim)
        linears = {name: module for name, module in layer.named_modules() if _is_linear(module)}
        for name, module in linears.items():
            style = self._styles.get(name)
            width = module.in_features if style == "rowwise" else module.out_features
            if style not in ("colwise", "rowwise") or width % self._tp:
                raise UnsupportedModel(
                    f"{type(layer).__name__}.{name}: expected a linear that the model's plan "
                    f"splits {self._tp} ways, found {style} of width {width}; "
                    "plan its stages with tensor parallelism 1"
                )
        for name, parameter in attention.named_parameters():
            owner = f"self_attn.{_path(name)[0]}"
            if owner not in linears and list(parameter.shape) != [head_size]:
                raise UnsupportedModel(
                    f"{type(layer).__name__}.self_attn.{name}: expected [{head_size}], "
                    f"one head's width, found {list(parameter.shape)}, which belongs to several "
                    "heads and is not sharded; plan its stages with tensor parallelism 1"
                )

    def localise(self, layer: nn.Module) -> None:
        """Tells a sharded attention how many heads are left to it, where it asks.

        Attention over separate projections takes the number from their width; over fused ones
        from its configuration and its own `num_key_value_heads`.
        """
        attention = layer.get_submodule("self_attn")
        local = copy.copy(self._config)
        local.num_attention_heads = self._config.num_attention_heads // self._tp
        local.num_key_value_heads = self._config.num_key_value_heads // self._tp
        vars(attention)["config"] = local
        if hasattr(attention, "num_key_value_heads"):
            vars(attention)["num_key_value_heads"] = local.num_key_value_heads

    def expected_slices(self, layer: nn.Module, rank: int) -> dict[str, torch.Tensor]:
        """The tensors that rank `rank` must hold after sharding: views of the whole ones."""
        slices: dict[str, torch.Tensor] = {}
        for name, parameter in layer.named_parameters():
            module, _, kind = name.rpartition(".")
            style = self._styles.get(module)
            whole = parameter.detach()
            if style == "colwise":
                slices[name] = whole.chunk(self._tp, dim=0)[rank]
            elif style == "rowwise" and kind == "weight":
                slices[name] = whole.chunk(self._tp, dim=1)[rank]
            else:
                slices[name] = whole
        return slices

    def check_sharded(self, layer: nn.Module, expected: Mapping[str, torch.Tensor]) -> None:
        """Raises UnsupportedModel unless the sharded layer holds exactly these tensors."""
        found = dict(layer.named_parameters())
        wrong = sorted(
            name
            for name in expected.keys() | found.keys()
            if name not in found
            or name not in expected
            or not torch.equal(found[name].detach(), expected[name])
        )
        not_summed = [
            name
            for name in self.row_wise
            if type(layer.get_submodule(name)).__name__ != "LinearAllreduce"
        ]
        if wrong or not_summed:
            raise UnsupportedModel(
                f"{type(layer).__name__}: DeepSpeed sharded {wrong + not_summed} differently from "
                "the model's plan; plan its stages with tensor parallelism 1"
            )


def _path(name: str) -> tuple[str, str, str]:
    """A dotted name as its owner, the dot and the last part."""
    return name.rpartition(".")


def _is_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    return isinstance(module, nn.Linear)


# -- shared memory ------------------------------------------------------------------------------


def segment_prefix(name: str) -> str:
    """How the file names of a group's segments begin."""
    return f"deepspeed_allreduce_buffer_{os.getuid()}_{name}_0_"


def sweep_segments(directory: Path = SEGMENT_DIRECTORY) -> list[str]:
    """Unlinks segments of our pattern and user whose maker is gone; returns their names.

    Segments made in another process namespace are left alone: whether their maker lives cannot be
    told from here.
    """
    swept = []
    for path in directory.glob("deepspeed_allreduce_buffer_*"):
        match = _SEGMENT.fullmatch(path.name)
        if (
            match
            and int(match["uid"]) == os.getuid()
            and int(match["namespace"]) == _pid_namespace()
            and _started(int(match["pid"])) != int(match["started"])
        ):
            path.unlink(missing_ok=True)
            swept.append(path.name)
    return swept


def _new_name() -> str:
    pid = os.getpid()
    return f"bulkhead-{_pid_namespace()}-{pid}-{_started(pid)}-{secrets.token_hex(16)}"


def _pid_namespace() -> int:
    return Path("/proc/self/ns/pid").stat().st_ino


def _started(pid: int) -> int | None:
    """Start time of a process in clock ticks since boot (proc_pid_stat(5), field 22)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    # A zombie has ended; only its parent does not know yet.
    return None if fields[0] == "Z" else int(fields[19])


# -- the group ----------------------------------------------------------------------------------


class TensorParallelGroup:
    """`runtime.stage.layers.Layers` on rank processes.

    Args:
        files: handed to the ranks as directory and manifest; each verifies what it reads.
        checkpoint: of the same model, for checks before anything is started.
        settings: of the stage, `tp` above 1.
        progress: told what rank 0 reads; the others read the same.

    Raises:
        UnsupportedModel: the family or the degree is not sharded correctly.
        RankFailed: a rank did not come up.
    """

    def __init__(
        self,
        files: ModelFiles,
        checkpoint: StageCheckpoint,
        settings: StageSettings,
        progress: ProgressCount,
    ) -> None:
        plan = TensorParallelPlan(checkpoint.parts.config, settings.tp)
        plan.prepare(checkpoint.parts.part(checkpoint.parts.layer_name(settings.first_layer)))
        sweep_segments()
        self._settings = settings
        self._block_bytes = 0
        self._failure: str | None = None
        self._messages: queue.SimpleQueue[tuple[int, Message, bytearray]] = queue.SimpleQueue()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._readers: list[threading.Thread] = []
        self._name = _new_name()
        # 0700 by mkdtemp: who can write the rendezvous file can join the group.
        directory = Path(tempfile.mkdtemp(prefix="bulkhead-ranks-"))
        try:
            self._start(files, directory)
            self._await_ready(progress)
        except BaseException:
            self._kill()
            raise
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids of the ranks, in order."""
        return tuple(process.pid for process in self._processes)

    @property
    def block_bytes(self) -> int:
        """See `Layers`."""
        return self._block_bytes

    def open_cache(self, blocks: int) -> None:
        """See `Layers`. Raises RankFailed.

        One number for all ranks, found after all have loaded: each would find another one while
        the others take their memory.
        """
        self._send(Message.CACHE, [memoryview(encode_count(blocks))])
        self._await_done("the making of the cache")

    def forward(self, header: StepHeader, hidden_TD: torch.Tensor) -> torch.Tensor:
        """See `Layers`. Raises RankFailed."""
        head = encode_step(header, self._settings.dtype, self._settings.hidden_size)
        rows = hidden_TD.detach().contiguous().view(torch.uint8).numpy().data.cast("B")
        self._send(Message.STEP, [memoryview(head), rows])
        rows_done = self._await_done("a step")
        output = torch.frombuffer(rows_done, dtype=self._settings.torch_dtype)
        return output.view(hidden_TD.shape)

    def reset(self) -> None:
        """See `Layers`. Raises RankFailed."""
        self._send(Message.RESET, [])
        self._await_done("a reset")

    def close(self) -> None:
        """See `Layers`."""
        self._failure = self._failure or "the group was closed"
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()
        deadline = time.monotonic() + CLOSE_TIMEOUT_S
        for process in self._processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                break
        self._kill()

    # -- start --------------------------------------------------------------------------------

    def _start(self, files: ModelFiles, directory: Path) -> None:
        settings = self._settings
        environment = {name: os.environ[name] for name in _INHERITED if name in os.environ}
        # Ninja, which compiles DeepSpeed's op, is installed next to the interpreter.
        binaries = [str(Path(sys.executable).parent), environment.get("PATH", os.defpath)]
        environment.update(
            PATH=os.pathsep.join(binaries),
            OMP_NUM_THREADS=str(max(1, settings.threads // settings.tp)),
            HF_HUB_OFFLINE="1",
            PYTHONUNBUFFERED="1",
        )
        source = str(Path(runtime.__file__ or "").resolve().parent.parent)
        for rank in range(settings.tp):
            process = subprocess.Popen(
                [sys.executable, "-I", "-c", _BOOT, source],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
                cwd=directory,
                bufsize=0,
            )
            assert process.stdin is not None
            # A stopped rank must not block a writer for ever.
            os.set_blocking(process.stdin.fileno(), False)
            self._processes.append(process)
            reader = threading.Thread(
                target=self._read, args=(rank, process), name=f"rank-{rank}", daemon=True
            )
            self._readers.append(reader)
            reader.start()
        manifest = files.manifest.to_bytes()
        layers = range(settings.first_layer, settings.last_layer)
        # Over the rank's standard input: a pipe, never a file or an environment.
        keys = keys_of(files).only([layer_unit(index) for index in layers]).to_bytes()
        for rank, process in enumerate(self._processes):
            job = RankJob(
                rank=rank,
                settings=settings,
                model_directory=str(files.directory),
                rendezvous=str(directory / "rendezvous"),
                name=self._name,
            ).to_bytes()
            deadline = time.monotonic() + STEP_TIMEOUT_S
            self._write(rank, process, Message.JOB, [memoryview(job)], deadline)
            self._write(rank, process, Message.MANIFEST, [memoryview(manifest)], deadline)
            self._write(rank, process, Message.KEYS, [memoryview(keys)], deadline)

    def _await_ready(self, progress: ProgressCount) -> None:
        waiting = set(range(self._settings.tp))
        while waiting:
            rank, kind, payload = self._next(START_SILENCE_S, "their start")
            if kind is Message.PROGRESS and rank == 0:
                progress.add(decode_count(payload))
            elif kind is Message.READY:
                self._block_bytes += decode_count(payload)
                waiting.discard(rank)

    # -- messages -----------------------------------------------------------------------------

    def _read(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        while (message := read_message(process.stdout)) is not None:
            self._messages.put((rank, *message))
        code = process.wait()
        how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        self._messages.put((rank, Message.FAILED, bytearray(how.encode())))

    def _send(self, kind: Message, parts: list[memoryview]) -> None:
        if self._failure is not None:
            raise RankFailed(self._failure)
        deadline = time.monotonic() + STEP_TIMEOUT_S
        for rank, process in enumerate(self._processes):
            self._write(rank, process, kind, parts, deadline)

    def _write(
        self,
        rank: int,
        process: subprocess.Popen[bytes],
        kind: Message,
        parts: list[memoryview],
        deadline: float,
    ) -> None:
        assert process.stdin is not None
        length = sum(len(part) for part in parts)
        descriptor = process.stdin.fileno()
        with selectors.DefaultSelector() as selector:
            selector.register(descriptor, selectors.EVENT_WRITE)
            for part in (memoryview(_FRAME.pack(kind, length)), *parts):
                left = part
                while left:
                    if not selector.select(max(0.0, deadline - time.monotonic())):
                        self._fail(f"rank {rank} does not take its input")
                    try:
                        left = left[os.write(descriptor, left) :]
                    except BlockingIOError:
                        continue
                    except BrokenPipeError:
                        # Its reader knows how it ended.
                        self._next(CLOSE_TIMEOUT_S, f"rank {rank}")
                        self._fail(f"rank {rank} closed its input")

    def _await_done(self, what: str) -> bytearray:
        waiting = set(range(self._settings.tp))
        rows = bytearray()
        deadline = time.monotonic() + STEP_TIMEOUT_S
        while waiting:
            rank, kind, payload = self._next(max(0.0, deadline - time.monotonic()), what)
            if kind is Message.DONE:
                waiting.discard(rank)
                rows = payload if rank == 0 else rows
        return rows

    def _next(self, timeout_s: float, what: str) -> tuple[int, Message, bytearray]:
        try:
            rank, kind, payload = self._messages.get(timeout=timeout_s)
        except queue.Empty:
            self._fail(f"ranks are silent during {what}, waited {timeout_s:.0f} s")
        if kind is Message.FAILED:
            self._fail(f"rank {rank} {payload.decode(errors='replace')}")
        return rank, kind, payload

    def _fail(self, reason: str) -> NoReturn:
        self._failure = (
            f"tensor-parallel group of {self._settings.tp}: {reason}; load the stage anew"
        )
        self._kill()
        raise RankFailed(self._failure)

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()
        for process, reader in zip(self._processes, self._readers, strict=False):
            process.wait()
            reader.join()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    stream.close()
        for path in SEGMENT_DIRECTORY.glob(segment_prefix(self._name) + "*"):
            path.unlink(missing_ok=True)
