"""What breaks while a model is served, and what clients notice of it.

One plan of three stages serves all tests of the first part, one after another, so each of them also
shows that the one before left the plan in order. The link from stage 0 to stage 1 goes through a
proxy of the test, which cuts, changes or swallows what passes.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import grpc
import pytest
from checkpoints import ALPHABET, Oracle
from running import INSTANCE, RunningPlan

from runtime.shard import control_pb2, control_pb2_grpc
from runtime.shard.launch import ShardSpec
from security.broker.audit import read_entries
from security.broker.client import BrokerClient
from security.broker.revocation import Revocations, Revoked
from security.broker.service import start_broker
from security.envelope import EnvelopeClient, Request
from security.errors import SecurityError
from security.roster import Roster

ROOT = Path(__file__).parents[2]
STEP_DEADLINE_MS = 3000
PROXY_HOST = "127.0.0.2"
TOKENS = 160


class LinkProxy:
    """Passes TCP connections on, until it is told to do otherwise.

    Attributes:
        delay_s: how long whatever passes is held up.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self._connections: list[socket.socket] = []
        self._lock = threading.Lock()
        self.delay_s = 0.0
        self._tamper = False
        self._swallow: set[socket.socket] = set()
        self._server = socket.create_server((PROXY_HOST, port))
        threading.Thread(target=self._run, daemon=True).start()

    def cut(self) -> None:
        """Ends all connections; new ones are passed on."""
        with self._lock:
            for connection in self._connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            self._connections.clear()

    def tamper(self) -> None:
        """Changes one bit of the next bytes that come by."""
        self._tamper = True

    def swallow(self) -> None:
        """The present connections stay open and nothing passes any more; new ones work."""
        with self._lock:
            self._swallow.update(self._connections)

    def close(self) -> None:
        self._server.close()
        self.cut()

    def _run(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
                target = socket.create_connection(("127.0.0.1", self._port), 5)
                target.settimeout(None)
            except OSError:
                if self._server.fileno() < 0:
                    return
                client.close()
                continue
            with self._lock:
                self._connections += [client, target]
            for source, sink in ((client, target), (target, client)):
                threading.Thread(target=self._copy, args=(source, sink), daemon=True).start()

    def _copy(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while content := bytearray(source.recv(1 << 16)):
                if source in self._swallow:
                    continue
                time.sleep(self.delay_s)
                if self._tamper:
                    self._tamper = False
                    content[-1] ^= 1
                sink.sendall(content)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


class ProxiedPlan(RunningPlan):
    """A plan whose stage 1 is reached through a proxy."""

    proxy: LinkProxy | None = None
    pinned: Roster | None = None

    def spec(self, role: str, **changes: object) -> ShardSpec:
        host = PROXY_HOST if role == "stage-1" else "127.0.0.1"
        return super().spec(role, **{"advertise_host": host, **changes})

    def wait_serving(self, timeout_s: float = 280.0) -> None:
        deadline = time.monotonic() + timeout_s
        while self.proxy is None and time.monotonic() < deadline:
            for line in self.audit():
                if line["event"] == "admitted" and line["role"] == "stage-1":
                    self.proxy = LinkProxy(int(line["link_address"].rpartition(":")[2]))
            time.sleep(0.1)
        super().wait_serving(timeout_s)

    def close(self) -> None:
        if self.proxy is not None:
            self.proxy.close()
        super().close()

    def audit(self) -> list[dict[str, str]]:
        entries = read_entries(self.directory / "broker")
        return [{"event": entry.event, **entry.fields} for entry in entries]

    def log(self, role: str) -> str:
        return (self.directory / f"{role}.log").read_text()

    def roster(self) -> Roster:
        """The current roster, or one that a client has kept."""
        return self.pinned or super().roster()

    @property
    def epoch(self) -> str:
        return self.states["stage-0"].epoch

    def wait_epoch_after(self, epoch: str, timeout_s: float = 60.0) -> None:
        """Waits until all shards serve an epoch other than that one."""
        with self._changed:
            assert self._changed.wait_for(
                lambda: (
                    {(s.epoch != epoch, s.state) for s in self.states.values()}
                    == {(True, control_pb2.SHARD_STATE_SERVING)}
                    and len({s.epoch for s in self.states.values()}) == 1
                    and len(self.states) == len(self.template.roles)
                ),
                timeout_s,
            ), self.logs()

    def wait_load(self, running: int, timeout_s: float = 15.0) -> None:
        """Waits until the engine runs so many sequences."""
        with self._changed:
            assert self._changed.wait_for(
                lambda: self.states["stage-0"].engine.running == running, timeout_s
            ), self.states["stage-0"]


@pytest.fixture(scope="module")
def model(checkpoint: Callable[[str], Path]) -> Path:
    return checkpoint("llama")


@pytest.fixture(scope="module")
def oracle(model: Path) -> Oracle:
    return Oracle(model)


@pytest.fixture(scope="module")
def shared_plan(model: Path) -> Iterator[ProxiedPlan]:
    with ProxiedPlan(model, (2, 4), step_deadline_ms=STEP_DEADLINE_MS) as running_plan:
        yield running_plan


@pytest.fixture
def plan(shared_plan: ProxiedPlan) -> ProxiedPlan:
    shared_plan.wait_serving()
    return shared_plan


class Stream:
    """A greedy stream of 160 tokens, begun: its first token is here."""

    def __init__(self, plan: RunningPlan, oracle: Oracle, seed: int) -> None:
        chance = random.Random(seed)
        prompt = [chance.randrange(len(ALPHABET)) for _ in range(20 + seed % 20)]
        output = oracle.greedy(prompt, TOKENS, ignore_end=True)
        self._expected = oracle.tokenizer.decode(output, skip_special_tokens=True)
        self._events = plan.stream(
            "/v1/completions",
            {
                "model": "test-model",
                "prompt": prompt,
                "max_tokens": TOKENS,
                "temperature": 0,
                "ignore_eos": True,
            },
        )
        self._text = next(self._events)["choices"][0]["text"]
        assert len(self._text) < TOKENS // 2, "the fault would come after the stream's end"

    def finish(self) -> None:
        """Reads the rest: no token is missing, repeated or changed."""
        for document in self._events:
            assert "error" not in document, document
            self._text += document["choices"][0]["text"]
        assert self._text == self._expected

    def leave(self) -> None:
        self._events.close()  # type: ignore[attr-defined]


def test_stopped_shard(plan: ProxiedPlan, oracle: Oracle) -> None:
    """A process that hangs without dying is noticed by the step deadline."""
    epoch = plan.epoch
    streams = [Stream(plan, oracle, seed) for seed in range(3)]
    pid = plan.shards["stage-1"].pid
    os.kill(pid, signal.SIGSTOP)
    try:
        time.sleep(STEP_DEADLINE_MS / 1000 + 2)
    finally:
        os.kill(pid, signal.SIGCONT)
    for stream in streams:
        stream.finish()
    plan.wait_epoch_after(epoch)
    assert "step deadline" in plan.log("stage-0")


def test_cut_link(plan: ProxiedPlan, oracle: Oracle) -> None:
    assert plan.proxy is not None
    epoch = plan.epoch
    streams = [Stream(plan, oracle, seed) for seed in range(3, 6)]
    plan.proxy.cut()
    for stream in streams:
        stream.finish()
    plan.wait_epoch_after(epoch)


def test_changed_bit_on_a_link(plan: ProxiedPlan, oracle: Oracle) -> None:
    """It is noticed, nothing of it is computed with, and new links take over."""
    assert plan.proxy is not None
    epoch = plan.epoch
    stream = Stream(plan, oracle, 6)
    plan.proxy.tamper()
    stream.finish()
    plan.wait_epoch_after(epoch)
    assert "LinkTampered" in plan.log("stage-1")


def test_silent_link(plan: ProxiedPlan, oracle: Oracle) -> None:
    """The connection stands and nothing arrives."""
    assert plan.proxy is not None
    epoch = plan.epoch
    before = plan.log("stage-0").count("step deadline")
    stream = Stream(plan, oracle, 7)
    plan.proxy.swallow()
    stream.finish()
    plan.wait_epoch_after(epoch)
    assert plan.log("stage-0").count("step deadline") > before


def test_client_that_leaves(plan: ProxiedPlan, oracle: Oracle) -> None:
    """Its slots and cache blocks are free again, long before its tokens would have been made."""
    assert plan.proxy is not None
    epoch = plan.epoch
    plan.wait_load(0)
    free = plan.states["stage-0"].engine.free_blocks
    plan.proxy.delay_s = 0.1
    try:
        streams = [Stream(plan, oracle, seed) for seed in range(8, 10)]
        plan.wait_load(2)
        for stream in streams:
            stream.leave()
        # By themselves they would need more than ten seconds.
        plan.wait_load(0, timeout_s=5.0)
    finally:
        plan.proxy.delay_s = 0.0
    assert plan.states["stage-0"].engine.waiting == 0
    assert plan.states["stage-0"].engine.free_blocks == free
    assert plan.epoch == epoch, "a client that leaves must not disturb the others"
    Stream(plan, oracle, 10).finish()


def test_broker_restart(plan: ProxiedPlan, oracle: Oracle) -> None:
    """Serving does not need the broker; who was admitted before comes back as a member."""
    assert plan.broker is not None
    stream = Stream(plan, oracle, 11)
    plan.pinned = plan.roster()
    epoch = plan.epoch
    address = plan.broker.address
    plan.broker.stop()
    try:
        stream.finish()
        Stream(plan, oracle, 12).finish()
        assert plan.epoch == epoch, "without a broker there can be no new epoch"
    finally:
        plan.broker = start_broker(address, plan.directory / "broker", plan.owner_public)
        plan.pinned = None
    plan.wait_epoch_after(epoch)
    stream = Stream(plan, oracle, 13)
    epoch = plan.epoch
    plan.kill_shard("stage-2")
    plan.states.pop("stage-2", None)
    plan.start_shard("stage-2")
    stream.finish()
    plan.wait_epoch_after(epoch)


def test_killed_head(plan: ProxiedPlan, oracle: Oracle) -> None:
    """Streams end with one clear error; the next head has another key, and serves."""
    before = plan.roster()
    epoch = plan.epoch
    sealed, _ = EnvelopeClient(before.head.shard_key, INSTANCE).seal(
        Request("GET", "/v1/models", "", b"")
    )
    stream = Stream(plan, oracle, 14)
    plan.kill_shard("stage-0")
    with pytest.raises(grpc.RpcError) as ended:
        stream.finish()
    assert ended.value.code() == grpc.StatusCode.UNAVAILABLE
    plan.states.pop("stage-0", None)
    plan.start_shard("stage-0")
    plan.wait_epoch_after(epoch)
    after = plan.roster()
    assert after.head.shard_key != before.head.shard_key
    assert [e.shard_key for e in after.entries[1:]] == [e.shard_key for e in before.entries[1:]]
    Stream(plan, oracle, 15).finish()
    with grpc.insecure_channel(after.head.ingress_address) as channel:
        stub = control_pb2_grpc.IngressStub(channel)
        with pytest.raises(grpc.RpcError) as refused:
            list(stub.Exchange(control_pb2.SealedRequest(sealed=sealed)))
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "request_not_for_this_head" in refused.value.details()


# -- the starter dies ------------------------------------------------------------------------------

STARTER = """
import json, sys, time
from pathlib import Path
from runtime.shard.launch import ShardProcess, ShardSpec

job = json.load(sys.stdin)
held = []
for spec in job["specs"]:
    spec["owner_public"] = bytes.fromhex(spec["owner_public"])
    shard = ShardProcess(Path(job["directory"]), Path(job["directory"]) / f"{spec['role']}.log")
    shard.start(ShardSpec(**spec))
    held.append(shard)
time.sleep(3600)
"""


def processes() -> dict[int, tuple[int, str]]:
    """Parent and state of every process, zombies as "Z"."""
    found = {}
    for directory in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            fields = (directory / "stat").read_text().rpartition(")")[2].split()
            found[int(directory.name)] = (int(fields[1]), fields[0])
    return found


def descendants(pid: int) -> set[int]:
    table = processes()
    found = {pid}
    while new := {p for p, (parent, _) in table.items() if parent in found} - found:
        found |= new
    return found - {pid}


def living(pids: set[int]) -> set[int]:
    table = processes()
    return {pid for pid in pids if pid in table and table[pid][1] != "Z"}


def segments(pids: set[int]) -> list[str]:
    """Shared memory that ranks of these shards have left."""
    return [
        path.name
        for path in Path("/dev/shm").glob("deepspeed_*bulkhead-*")
        if int(path.name.split("-")[2]) in pids
    ]


@pytest.mark.parametrize(("splits", "tp", "expected"), [((3,), 1, 2), ((), 2, 3)])
def test_killed_starter(model: Path, splits: tuple[int, ...], tp: int, expected: int) -> None:
    """Killed by SIGKILL, it leaves no shard and no tensor-parallel rank behind."""
    with RunningPlan(model, splits, tp, start=False) as plan:
        specs = [asdict(plan.spec(role.name)) for role in plan.template.roles]
        for spec in specs:
            spec["owner_public"] = spec["owner_public"].hex()
        starter = subprocess.Popen([sys.executable, "-c", STARTER], stdin=subprocess.PIPE, cwd=ROOT)
        shards: set[int] = set()
        try:
            assert starter.stdin is not None
            starter.stdin.write(
                json.dumps({"directory": str(plan.directory), "specs": specs}).encode()
            )
            starter.stdin.close()
            deadline = time.monotonic() + 280  # the first start builds an operator
            while True:
                with contextlib.suppress(SecurityError):
                    plan.roster()
                    break
                assert starter.poll() is None and time.monotonic() < deadline, plan.logs()
                time.sleep(0.2)
            shards = descendants(starter.pid)
            assert len(shards) >= expected, plan.logs()
            starter.kill()
            starter.wait()
            end = time.monotonic() + 5
            while living(shards) and time.monotonic() < end:
                time.sleep(0.05)
            assert living(shards) == set()
            assert segments(shards) == []
        finally:
            starter.kill()
            starter.wait()
            for pid in living(shards):
                os.kill(pid, signal.SIGKILL)


def test_revoked_node(plan: ProxiedPlan, oracle: Oracle) -> None:
    """Its peers close their links within 5 s although it does not; the stream goes on."""
    assert plan.broker is not None
    stream = Stream(plan, oracle, 21)
    epoch = plan.epoch
    pid = plan.shards["stage-2"].pid
    os.kill(pid, signal.SIGSTOP)
    try:
        start = time.monotonic()
        document = Revocations().with_one(Revoked.NODE, "node-2").signed(plan.owner)
        with BrokerClient(plan.broker.address, plan.owner_public) as client:
            assert client.revoke(document) == 1
        serving = control_pb2.SHARD_STATE_SERVING
        while any(plan.states[role].state == serving for role in ("stage-0", "stage-1")):
            assert time.monotonic() - start < 5, plan.logs()
            time.sleep(0.05)
        # Whoever was told second had its link closed by the first.
        assert "a member was revoked" in plan.log("stage-0") + plan.log("stage-1")
    finally:
        os.kill(pid, signal.SIGCONT)
    assert plan.wait_failed("stage-2").error_code == "node_revoked"
    plan.kill_shard("stage-2")
    plan.start_shard("stage-2", node="node-9")
    stream.finish()
    plan.wait_epoch_after(epoch)
