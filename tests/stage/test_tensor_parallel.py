"""Tensor parallelism: the same tokens, and nothing left behind however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from checkpoints import Oracle
from stage_chain import Chain, generate, prompts_of
from stage_models import settings
from stage_variants import VARIANTS
from torch import nn
from transformers import LlamaConfig

from runtime.shard.rank import extension_directory, failure_text
from runtime.stage import memory, tensor_parallel
from runtime.stage.checkpoint import ProgressCount, open_checkpoint
from runtime.stage.errors import RankFailed, StepRefused, UnsupportedModel
from runtime.stage.fused import split_fused
from runtime.stage.layers import LayerStack
from runtime.stage.memory import RESERVE_BYTES
from runtime.stage.probe import ShardingProbe
from runtime.stage.stage import StageRunner
from runtime.stage.tensor_parallel import TensorParallelGroup, TensorParallelPlan, sweep_segments
from security.channel.frame import SequenceStep, StepHeader
from security.manifest import ModelFiles

HERE = Path(__file__).resolve().parent
PATHS = (str(HERE), str(HERE.parent), str(HERE.parent.parent))
LENGTHS = (1, 4, 5, 13, 2, 37, 24, 50)
STEP = StepHeader(0, (SequenceStep(0, 0, 3, (5,), True),))

STALE = tensor_parallel.SEGMENT_DIRECTORY / (
    f"deepspeed_allreduce_buffer_{os.getuid()}_bulkhead-{tensor_parallel._pid_namespace()}"
    f"-{2**22 + 1}-5-{'ab' * 16}_0_1"
)


def ranks_of(stage: StageRunner) -> TensorParallelGroup:
    assert isinstance(stage._layers, TensorParallelGroup)
    return stage._layers


def segments() -> set[str]:
    return {
        path.name
        for path in tensor_parallel.SEGMENT_DIRECTORY.glob("*deepspeed*")
        if f"-{os.getpid()}-" in path.name
    }


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def wait_until_gone(pids: list[int], timeout_s: float = 20.0) -> list[int]:
    deadline = time.monotonic() + timeout_s
    while (left := [pid for pid in pids if alive(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def listening_addresses(pid: int) -> set[str]:
    """Local addresses, in /proc's hexadecimal, on which a process listens."""
    inodes = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        try:
            inodes.add(os.readlink(descriptor))
        except OSError:
            continue
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                found.add(fields[1].rpartition(":")[0])
    return found


@pytest.fixture(scope="module")
def stage(checkpoint: Callable[[str], Path]) -> Iterator[StageRunner]:
    from security.manifest import build_manifest

    directory = checkpoint("qwen3")
    # What a group leaves that was killed between mapping and unlinking.
    STALE.touch()
    runner = StageRunner(ModelFiles(directory, build_manifest(directory)), settings(tp=2))
    yield runner
    runner.close()


def test_tokens_equal_generate(stage: StageRunner, checkpoint: Callable[[str], Path]) -> None:
    oracle = Oracle(checkpoint("qwen3"))
    prompts = prompts_of(LENGTHS)
    expected = [oracle.greedy(prompt, 12) for prompt in prompts]
    assert generate(Chain([stage]), prompts, 12) == expected
    stage.reset()
    assert generate(Chain([stage]), prompts, 12, chunk=60, seed=4) == expected


def test_all_ranks_make_the_cache_that_fits(
    stage: StageRunner,
    checkpoint: Callable[[str], Path],
    open_files: Callable[[Path], ModelFiles],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = 2 * 6 * 4 * 2 * 32 * 4  # keys and values of 6 layers, 2 heads of 32 numbers
    assert ranks_of(stage).block_bytes == whole
    assert stage.cache_blocks == 128
    available = 2 * RESERVE_BYTES + 70 * whole
    monkeypatch.setattr(memory, "available_bytes", lambda: available)
    scarce = StageRunner(open_files(checkpoint("qwen3")), settings(tp=2))
    assert scarce.cache_blocks == 70
    expected = stage.forward(STEP, token_ids=[1, 2, 3])
    highest = StepHeader(0, (SequenceStep(0, 0, 3, (69,), True),))
    assert torch.equal(scarce.forward(highest, token_ids=[1, 2, 3]), expected)
    beyond = StepHeader(0, (SequenceStep(0, 0, 3, (70,), True),))
    with pytest.raises(StepRefused, match="expected blocks below 70"):
        scarce.forward(beyond, token_ids=[1, 2, 3])
    # A rank holds its steps to the same bound.
    with pytest.raises(RankFailed, match="below 70"):
        ranks_of(scarce).forward(beyond, torch.zeros(3, 64))
    scarce.close()


def test_ranks_leave_nothing_and_listen_nowhere_else(stage: StageRunner) -> None:
    assert segments() == set()
    assert not STALE.exists()
    for pid in ranks_of(stage).pids:
        assert alive(pid)
        # 127.0.0.1, in the byte order of the machine.
        assert listening_addresses(pid) <= {"0100007F"}
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes()
        assert b"bulkhead-ranks" not in arguments
    assert "deepspeed" not in sys.modules
    assert not {"MASTER_ADDR", "LOCAL_SIZE", "RANK", "TORCH_EXTENSIONS_DIR"} & os.environ.keys()


def test_compiled_code_is_private(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    directory = extension_directory()
    assert directory.is_relative_to(tmp_path)
    assert directory.stat().st_mode & 0o777 == 0o700
    directory.chmod(0o770)
    with pytest.raises(RankFailed, match="mode 0700, found user"):
        extension_directory()
    directory.rmdir()
    directory.symlink_to(tmp_path)
    with pytest.raises(RankFailed):
        extension_directory()


def test_a_killed_rank_is_an_error_and_ends_the_others(
    checkpoint: Callable[[str], Path], open_files: Callable[[Path], ModelFiles]
) -> None:
    stage = StageRunner(open_files(checkpoint("qwen3")), settings(2, 6, tp=2))
    pids = list(ranks_of(stage).pids)
    hidden = torch.zeros(3, 64)
    stage.forward(STEP, hidden_TD=hidden)
    os.kill(pids[1], signal.SIGKILL)
    started = time.monotonic()
    # Rank 0 spins in the all-reduce by now, or has its input closed: both must end.
    with pytest.raises(RankFailed, match="rank 1 was killed by signal 9"):
        stage.forward(STEP, hidden_TD=hidden)
    assert time.monotonic() - started < 10
    assert wait_until_gone(pids) == []
    for call in (lambda: stage.forward(STEP, hidden_TD=hidden), stage.reset):
        with pytest.raises(RankFailed, match="load the stage anew"):
            call()
    stage.close()
    stage.close()
    assert segments() == set()


def test_a_hanging_rank_is_an_error(
    checkpoint: Callable[[str], Path],
    open_files: Callable[[Path], ModelFiles],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stage = StageRunner(open_files(checkpoint("llama")), settings(5, 6, tp=2))
    pids = list(ranks_of(stage).pids)
    monkeypatch.setattr(tensor_parallel, "STEP_TIMEOUT_S", 2.0)
    os.kill(pids[1], signal.SIGSTOP)
    with pytest.raises(RankFailed, match="silent during a step, waited 2 s"):
        stage.forward(STEP, hidden_TD=torch.zeros(3, 64))
    assert wait_until_gone(pids) == []
    stage.close()


OWNER = """
import os, sys, threading, time
from pathlib import Path
import torch
from runtime.stage.stage import StageRunner
from security.manifest import ModelFiles, build_manifest
from stage_models import settings
from stage_variants import VARIANTS
from test_tensor_parallel import STEP
directory = Path(sys.argv[1])
stage = StageRunner(ModelFiles(directory, build_manifest(directory)), settings(4, 6, tp=2))
stage.forward(STEP, hidden_TD=torch.zeros(3, 64))
print(*stage._layers.pids, flush=True)
if sys.argv[2] == "spinning":
    os.kill(stage._layers.pids[1], 19)
    threading.Thread(
        target=lambda: stage.forward(STEP, hidden_TD=torch.zeros(3, 64)), daemon=True
    ).start()
    time.sleep(1)
    print("spinning", flush=True)
if sys.argv[2] == "leaves":
    sys.exit(0)
time.sleep(60)
"""


def start_owner(directory: Path, how: str) -> tuple[subprocess.Popen[str], list[int]]:
    """A process with a group of its own; its output must be exactly what it prints itself."""
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(directory), how],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(PATHS)},
    )
    assert owner.stdout is not None
    return owner, [int(pid) for pid in owner.stdout.readline().split()]


@pytest.mark.parametrize("how", ["idle", pytest.param("leaves", marks=pytest.mark.slow)])
def test_ranks_end_with_their_owner(how: str, checkpoint: Callable[[str], Path]) -> None:
    owner, pids = start_owner(checkpoint("qwen3"), how)
    assert len(pids) == 2
    if how == "idle":
        owner.kill()
    owner.wait(30)
    assert wait_until_gone(pids) == []
    assert not [name for name in os.listdir("/dev/shm") if f"-{owner.pid}-" in name]


def test_a_spinning_rank_ends_with_its_owner(checkpoint: Callable[[str], Path]) -> None:
    owner, (spinning, stopped) = start_owner(checkpoint("qwen3"), "spinning")
    assert owner.stdout is not None and owner.stdout.readline() == "spinning\n"
    owner.kill()
    owner.wait()
    try:
        assert wait_until_gone([spinning]) == []
    finally:
        os.kill(stopped, signal.SIGCONT)
    assert wait_until_gone([stopped]) == []


def test_stale_segments_are_swept(tmp_path: Path) -> None:
    namespace, pid = tensor_parallel._pid_namespace(), os.getpid()
    started, token = tensor_parallel._started(pid), "ab" * 16
    uid = os.getuid()

    def segment(uid: int, namespace: int, pid: int, started: int) -> str:
        name = f"bulkhead-{namespace}-{pid}-{started}-{token}"
        path = tmp_path / f"deepspeed_allreduce_buffer_{uid}_{name}_0_1"
        path.touch()
        return path.name

    assert started is not None
    live = segment(uid, namespace, pid, started)
    reused_pid = segment(uid, namespace, pid, started - 1)
    gone = segment(uid, namespace, 2**22 + 1, 5)
    elsewhere = segment(uid, namespace + 1, 2**22 + 1, 5)
    somebody = segment(uid + 1, namespace, 2**22 + 1, 5)
    foreign = tmp_path / f"deepspeed_allreduce_buffer_{uid}_127.0.0.1_29500_0"
    foreign.touch()
    assert set(sweep_segments(tmp_path)) == {reused_pid, gone}
    assert set(os.listdir(tmp_path)) == {live, elsewhere, somebody, foreign.name}


def test_degrees_that_do_not_divide_the_heads_are_refused(
    checkpoint: Callable[[str], Path], open_files: Callable[[Path], ModelFiles]
) -> None:
    for tp in (3, 4):
        with pytest.raises(UnsupportedModel, match=f"tensor parallelism {tp}: expected a divisor"):
            StageRunner(open_files(checkpoint("qwen3")), settings(tp=tp))


class Layer(nn.Module):
    """A layer with a linear that no plan names."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn = nn.Module()
        self.self_attn.head_dim = 4
        self.self_attn.o_proj = nn.Linear(8, 8)
        self.mlp = nn.Module()
        self.extra = nn.Linear(8, 8)


class Plan(LlamaConfig):
    """A configuration whose plan a test sets."""


def test_plans_that_are_not_computed_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Plan(num_attention_heads=4, num_key_value_heads=2)
    for plan, found in (
        ({"layers.*.mlp.experts": "grouped_gemm"}, "grouped_gemm"),
        ({"layers.*.self_attn.q_norm": "colwise_gather_output"}, "colwise_gather_output"),
        ({"embed_tokens": "embedding_rowwise"}, "embed_tokens"),
        (None, "expected a base_model_tp_plan"),
    ):
        monkeypatch.setattr(Plan, "base_model_tp_plan", plan)
        with pytest.raises(UnsupportedModel, match=found):
            TensorParallelPlan(config, 2)


def test_a_layer_sharded_differently_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Plan(num_attention_heads=4, num_key_value_heads=2)
    monkeypatch.setattr(Plan, "base_model_tp_plan", {"layers.*.self_attn.o_proj": "rowwise"})
    plan = TensorParallelPlan(config, 2)
    layer = Layer()
    with pytest.raises(UnsupportedModel, match=r"Layer\.extra"):
        plan.prepare(layer)
    expected = plan.expected_slices(layer, 1)
    assert expected["self_attn.o_proj.weight"].shape == (8, 4)
    assert expected["self_attn.o_proj.bias"].shape == (8,)
    with pytest.raises(UnsupportedModel, match="differently"):
        plan.check_sharded(layer, expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("variant", ["gemma3_text", "phi3", "qwen3"])
def test_a_layer_that_computes_something_else_is_refused(
    variant: str,
    dtype: str,
    checkpoint: Callable[[str], Path],
    open_files: Callable[[Path], ModelFiles],
) -> None:
    wanted = settings(1, 3, dtype=dtype)
    opened = open_checkpoint(open_files(checkpoint(variant)), wanted)
    probe = ShardingProbe(opened.parts, wanted)
    layers: list[nn.Module] = []
    LayerStack(opened, wanted, ProgressCount(0, None), layers.append)
    for layer in layers:
        whole = probe.output(layer, 1)
        split_fused(opened.parts.config, layer)
        probe.check(layer, probe.output(layer, 1), whole)
        for name in ("self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj"):
            weight = layer.get_submodule(name).weight
            # Two heads, or two halves of a sum, in each other's place.
            right = weight.clone()
            weight.copy_(right.flip(0))
            with pytest.raises(UnsupportedModel, match="found another output"):
                probe.check(layer, probe.output(layer, 1), whole)
            weight.copy_(right)
        with pytest.raises(UnsupportedModel, match="found another output"):
            probe.check(layer, torch.full_like(whole, torch.nan), whole)


REFUSED = {
    "cohere": r"self_attn\.q_norm\.weight: expected \[16\], one head's width, found \[4, 16\]",
    "gpt_oss": "gpt_oss: expected a base_model_tp_plan .* found none",
    "hunyuan_v1_dense": "hunyuan_v1_dense: expected a base_model_tp_plan .* found none",
    "mixtral": "mixtral: base_model_tp_plan says mlp.experts.*: packed_colwise",
    "olmo2": r"olmo2: base_model_tp_plan says self_attn.q_proj: colwise_gather_output",
    "olmo3": r"olmo3: base_model_tp_plan says self_attn.q_proj: colwise_gather_output",
    "olmoe": r"olmoe: base_model_tp_plan says self_attn.q_proj: colwise_gather_output",
    "qwen2_moe": "qwen2_moe: base_model_tp_plan says mlp.experts.*: packed_colwise",
    "qwen3_moe": "qwen3_moe: base_model_tp_plan says mlp.experts.*: packed_colwise",
}
QUICK = ("phi3",)


@pytest.mark.parametrize("variant", REFUSED)
def test_families_that_would_be_wrong_are_refused_before_anything_starts(
    variant: str,
    checkpoint: Callable[[str], Path],
    open_files: Callable[[Path], ModelFiles],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def popen(*_: object, **__: object) -> None:
        raise AssertionError("a rank was started")

    files = open_files(checkpoint(variant))
    monkeypatch.setattr(subprocess, "Popen", popen)
    with pytest.raises(UnsupportedModel, match=REFUSED[variant]):
        StageRunner(files, settings(1, 5, tp=2))


@pytest.mark.parametrize(
    "variant",
    [
        pytest.param(variant, marks=() if variant in QUICK else pytest.mark.slow)
        for variant in sorted(VARIANTS.keys() - REFUSED.keys())
    ],
)
def test_every_other_family_gives_the_tokens_of_generate(
    variant: str, checkpoint: Callable[[str], Path], open_files: Callable[[Path], ModelFiles]
) -> None:
    oracle = Oracle(checkpoint(variant))
    prompts = prompts_of(LENGTHS)
    files = open_files(checkpoint(variant))
    # One sharded stage between two whole ones: starting ranks takes most of the time.
    stages = [
        StageRunner(files, settings(first, last, tp=tp))
        for first, last, tp in ((0, 1, 1), (1, 5, 2), (5, 6, 1))
    ]
    try:
        expected = [oracle.greedy(prompt, 12) for prompt in prompts]
        assert generate(Chain(stages), prompts, 12) == expected
    finally:
        for stage in stages:
            stage.close()


@pytest.mark.slow
def test_bfloat16(
    checkpoint: Callable[[str], Path], open_files: Callable[[Path], ModelFiles]
) -> None:
    files = open_files(checkpoint("qwen3"))
    whole = StageRunner(files, settings(0, 2, dtype="bfloat16"))
    split = StageRunner(files, settings(0, 2, dtype="bfloat16", tp=2))
    try:
        expected, found = (
            stage.forward(STEP, token_ids=[1, 2, 3]).float() for stage in (whole, split)
        )
        # 8 bits of mantissa, rounded at other places.
        assert 0 < torch.norm(expected - found) < 0.05 * torch.norm(expected)
    finally:
        split.close()


def test_a_failure_quotes_nothing_that_it_may_hold() -> None:
    try:
        raise ValueError("the prompt's hidden states")
    except ValueError as error:
        text = failure_text(error)
    assert "ValueError at test_tensor_parallel.py:" in text
    assert "prompt" not in text
    assert "tensor q: expected" in failure_text(UnsupportedModel("tensor q: expected two axes"))
