"""The Ray side for real: pipeline actor, shard actors, placement group, what Ray gets to see."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import ray
from checkpoints import ALPHABET, Oracle
from running import INSTANCE, RunningPlan

from runtime.cluster.deploy import (
    NAMESPACE,
    connect_inventory,
    describe_pipeline,
    find_pipeline,
    start_pipeline,
    stop_pipeline,
)
from runtime.cluster.pipeline_actor import PipelineSpec, PipelineView
from security.broker.audit import read_entries

PROMPT = "Tell nobody that the vault opens at 03:17"
STATE_S = 90.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[Path]:
    """One local Ray node; its directory must have a short path (unix sockets)."""
    directory = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        del os.environ[name]
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=80 << 20,
        labels={"bulkhead.tee": "simulated", "bulkhead.name": "node-0"},
        namespace=NAMESPACE,
        _temp_dir=str(directory),
        log_to_driver=False,
    )
    yield directory
    ray.shutdown()
    shutil.rmtree(directory, ignore_errors=True)


def spec(plan: RunningPlan, cluster: Path, model: Path | None = None) -> PipelineSpec:
    assert plan.broker is not None
    node = connect_inventory().nodes[0]
    return PipelineSpec(
        instance=INSTANCE,
        template=plan.template.to_bytes(),
        policy=plan.policy.to_bytes(),
        binding={role.name: node.id for role in plan.template.roles},
        model_directory=str(model or plan.model),
        broker_address=plan.broker.address,
        owner_public=plan.owner_public,
        log_directory=str(cluster / "shard-logs"),
        node_key_path="",
        plan_table="",
    )


def wait_for(condition: Callable[[PipelineView], bool], timeout_s: float = STATE_S) -> PipelineView:
    """Waits until what the pipeline actor says meets the condition."""
    deadline = time.monotonic() + timeout_s
    view: PipelineView | None = None
    while time.monotonic() < deadline:
        actor = find_pipeline(INSTANCE)
        # While Ray restarts the actor, it cannot answer.
        with contextlib.suppress(ray.exceptions.RayError):
            if actor is not None:
                view = describe_pipeline(actor)
                if condition(view):
                    return view
        time.sleep(0.2)
    raise AssertionError(f"not within {timeout_s} s: {view}")


def serving(view: PipelineView) -> bool:
    return view["state"] == "serving" and bool(view["roster"])


def gone(pids: set[int], timeout_s: float = 10.0) -> bool:
    """Whether all these processes end in time."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if not any(alive(pid) for pid in pids):
            return True
        time.sleep(0.1)
    return False


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def mapped(pid: int) -> str:
    """The files that a process has mapped: shared libraries among them."""
    return Path(f"/proc/{pid}/maps").read_text()


def object_store() -> bytes:
    """Everything that Ray's object store on this machine holds, freed objects included."""
    content = bytearray()
    for process in psutil.process_iter(["name"]):
        if process.info["name"] != "raylet":
            continue
        folder = Path(f"/proc/{process.pid}/fd")
        for entry in folder.iterdir():
            try:
                target = os.readlink(entry)
                if "plasma" not in target:
                    continue
                with open(entry, "rb", buffering=0) as file:
                    content += _allocated(file.fileno())
            except OSError:
                continue
    return bytes(content)


def _allocated(descriptor: int) -> bytes:
    """The parts of a sparse file that were ever written."""
    content = bytearray()
    position = 0
    size = os.fstat(descriptor).st_size
    while position < size:
        try:
            start = os.lseek(descriptor, position, os.SEEK_DATA)
        except OSError:
            break
        end = os.lseek(descriptor, start, os.SEEK_HOLE)
        content += os.pread(descriptor, end - start, start)
        position = end
    return bytes(content)


def test_object_store_is_read(cluster: Path) -> None:
    """The tap of the next test finds what is there."""
    marker = b"a marker for the object store tap" * 8192
    reference = ray.put(marker)
    assert marker[:64] in object_store()
    del reference


def test_serves_recovers_and_leaves_nothing(
    checkpoint: Callable[[str], Path], cluster: Path
) -> None:
    model = checkpoint("llama")
    oracle = Oracle(model)
    prompt = [ALPHABET.index(letter) for letter in PROMPT]
    expected = oracle.greedy(prompt, 150, ignore_end=True)
    text = oracle.tokenizer.decode(expected, skip_special_tokens=True)
    request = {
        "model": "test-model",
        "prompt": PROMPT,
        "max_tokens": 150,
        "temperature": 0,
        "ignore_eos": True,
    }
    with RunningPlan(model, (2, 4), start=False) as plan:
        start_pipeline(spec(plan, cluster))
        try:
            view = wait_for(serving)
            pids = {shard["pid"] for shard in view["shards"]}
            assert len(pids) == 3
            assert all(alive(pid) for pid in pids)
            for pid in pids:
                shard, worker = mapped(pid), mapped(psutil.Process(pid).ppid())
                assert "libtorch" in shard
                assert "_raylet" not in shard
                assert "_raylet" in worker
                assert "libtorch" not in worker
            log = ray.get(find_pipeline(INSTANCE).logs.remote("stage-1", 50))
            assert "serving" in log
            assert PROMPT not in log

            # A shard process killed mid-stream.
            stream = plan.stream("/v1/completions", request)
            found = next(stream)["choices"][0]["text"]
            victim = next(s["pid"] for s in view["shards"] if s["role"] == "stage-1")
            os.kill(victim, signal.SIGKILL)
            for document in stream:
                assert "error" not in document, document
                found += document["choices"][0]["text"]
            assert found == text
            recovered = wait_for(lambda v: serving(v) and v["restarts"] == 1)

            # The Ray worker beside a shard killed: the shard ends with it, another takes its place.
            victim = next(s["pid"] for s in recovered["shards"] if s["role"] == "stage-2")
            os.kill(psutil.Process(victim).ppid(), signal.SIGKILL)
            assert gone({victim})
            again = wait_for(lambda v: serving(v) and v["restarts"] == 2)
            answer = plan.post("/v1/completions", request)
            assert answer.document["choices"][0]["text"] == text

            # Ray has seen none of it.
            seen = object_store()
            assert PROMPT.encode() not in seen
            assert text[:40].encode() not in seen
            pids = {shard["pid"] for shard in again["shards"]}
        finally:
            stop_pipeline(INSTANCE)
        assert gone(pids)
        table = ray.util.placement_group_table()
        assert all(group["state"] == "REMOVED" for group in table.values())
        assert not list(Path("/dev/shm").glob("*bulkhead*"))


def test_pipeline_actor_killed(checkpoint: Callable[[str], Path], cluster: Path) -> None:
    """Its shards end with it; Ray restarts it, and it brings the instance up anew."""
    with RunningPlan(checkpoint("llama"), (3,), start=False) as plan:
        actor = start_pipeline(spec(plan, cluster))
        try:
            view = wait_for(serving)
            pids = {shard["pid"] for shard in view["shards"]}
            ray.kill(actor, no_restart=False)
            assert gone(pids, 20.0)
            wait_for(lambda v: serving(v) and not pids & {s["pid"] for s in v["shards"]})
            assert plan.complete([1, 2, 3], 4)[1] == 4
        finally:
            stop_pipeline(INSTANCE)


def test_changed_template_is_named_in_the_actors_error(
    checkpoint: Callable[[str], Path], cluster: Path, tmp_path: Path
) -> None:
    model = checkpoint("llama")
    changed = shutil.copytree(model, tmp_path / "changed")
    template = changed / "chat_template.jinja"
    content = bytearray(template.read_bytes())
    content[5] ^= 1
    template.write_bytes(content)
    with RunningPlan(model, (3,), start=False) as plan:
        start_pipeline(spec(plan, cluster, changed))
        try:
            view = wait_for(lambda v: "stage-0" in v["error"] and "stage-1" in v["error"])
            assert "chat_template.jinja" in view["error"]
            assert not view["roster"]
            assert plan.broker is not None
            entries = read_entries(plan.directory / "broker")
            assert any("chat_template.jinja" in entry.fields.get("reason", "") for entry in entries)
        finally:
            stop_pipeline(INSTANCE)
