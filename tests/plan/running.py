"""A whole plan without Ray: a real broker, real shard processes, real links, and a client.

Used as a context manager; whatever happens inside, every process that it started has ended
afterwards.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from placement.inventory import Inventory, Node
from placement.model_profile import profile_model
from placement.plan import PlanTemplate
from placement.planner import PlanSettings, make_plan
from placement.policy import parse_policy
from runtime.shard import control_pb2, control_pb2_grpc
from runtime.shard.launch import ShardProcess, ShardProcessError, ShardSpec
from security.broker.client import BrokerClient
from security.broker.documents import sign_installation
from security.broker.roster_reply import open_roster_reply
from security.broker.service import BrokerServer, start_broker
from security.envelope import EnvelopeClient, Request, ResponseHead
from security.manifest import build_manifest
from security.roster import Roster
from security.signing import create_key_file, public_bytes

POLICY = """\
version: 1
name: test
protect: {prompt: attested, activations: attested, weights: attested}
evidence: [simulated]
ingress: plain
tensor_parallel: {max: 2}
accept: [simulated_tee, unhardened, plain_ingress, unpinned_measurement]
"""
INSTANCE = "pipeline-0"
ENTRY = ("-I", "-m", "runtime.shard.process")


def equal_nodes(count: int, tee: str | None = "simulated") -> Inventory:
    """An inventory of equal machines, all of which are this one."""
    return Inventory(
        tuple(
            Node(
                id=f"node-{index}",
                name=f"node-{index}",
                address="127.0.0.1",
                region=None,
                tee=tee,
                memory_bytes=4 << 30,
                cpus=1.0,
                gpus=0.0,
                hardened=False,
                labels={},
            )
            for index in range(count)
        )
    )


class Answer:
    """One HTTP answer of the head, opened."""

    def __init__(self, status: int, body: bytes) -> None:
        self.status = status
        self.body = body

    @property
    def document(self) -> dict[str, Any]:
        return json.loads(self.body)


class RunningPlan:
    """A served model.

    Args:
        model: checkpoint directory.
        splits: layers at which a new stage begins.
        tp: tensor-parallel ranks of every stage.
        entry: interpreter arguments that start a shard process.
        collateral: directory of vendors' documents for the broker.
    """

    def __init__(
        self,
        model: Path,
        splits: Sequence[int] = (),
        tp: int = 1,
        *,
        context: int = 256,
        sequences: int = 8,
        step_tokens: int = 64,
        step_deadline_ms: int = 30_000,
        entry: Sequence[str] = ENTRY,
        start: bool = True,
        collateral: Path | None = None,
    ) -> None:
        self.model = model
        self.stages = len(splits) + 1
        self.entry = entry
        self.directory = Path(tempfile.mkdtemp(prefix="bh-"))
        self.owner: Ed25519PrivateKey = create_key_file(self.directory / "owner.key")
        self.owner_public = public_bytes(self.owner)
        self.broker: BrokerServer | None = None
        self.shards: dict[str, ShardProcess] = {}
        self.states: dict[str, control_pb2.ShardStatus] = {}
        self.errors: dict[str, str] = {}
        self._changed = threading.Condition()
        self._start = start
        self._collateral = collateral

        config = json.loads((model / "config.json").read_text())
        self.manifest = build_manifest(model)
        self.policy = parse_policy(POLICY)
        plan = make_plan(
            profile_model(config, "float32"),
            self.policy,
            equal_nodes(self.stages),
            PlanSettings(
                model="test-model",
                cluster="test",
                expires_at=int(time.time()) + 86_400,
                dtype="float32",
                context=context,
                max_sequences=sequences,
                max_step_tokens=step_tokens,
                tensor_parallel=tp,
                layer_splits=tuple(splits),
                step_deadline_ms=step_deadline_ms,
            ),
            manifest_digest=self.manifest.digest,
            policy_digest=self.policy.digest,
            instance=INSTANCE,
        )
        self.template: PlanTemplate = plan.template

    # -- life ---------------------------------------------------------------------------------

    def __enter__(self) -> RunningPlan:
        try:
            home = self.directory / "broker"
            self.broker = start_broker("127.0.0.1:0", home, self.owner_public, self._collateral)
            self._install()
            if self._start:
                for role in self.template.roles:
                    self.start_shard(role.name)
                self.wait_serving()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        for shard in self.shards.values():
            shard.kill()
            shard.stop(1.0)
        if self.broker is not None:
            self.broker.stop()
        shutil.rmtree(self.directory, ignore_errors=True)

    def _install(self) -> None:
        assert self.broker is not None
        self.broker.install(
            sign_installation(
                self.owner,
                self.broker.public_key,
                policy=self.policy,
                template=self.template,
                manifest=self.manifest,
            )
        )

    def spec(self, role: str, **changes: object) -> ShardSpec:
        assert self.broker is not None
        values: dict[str, object] = {
            "instance": INSTANCE,
            "role": role,
            "node": f"node-{role.removeprefix('stage-')}",
            "model_directory": str(self.model),
            "broker_address": self.broker.address,
            "owner_public": self.owner_public,
            "listen_host": "127.0.0.1",
            "advertise_host": "127.0.0.1",
            "threads": 1,
        }
        return ShardSpec(**{**values, **changes})  # type: ignore[arg-type]

    def make_process(self, role: str) -> ShardProcess:
        return ShardProcess(self.directory, self.directory / f"{role}.log", self.entry)

    def start_shard(self, role: str, **changes: object) -> ShardProcess:
        shard = self.make_process(role)
        self.shards[role] = shard
        self.errors.pop(role, None)
        self.states.pop(role, None)
        shard.start(self.spec(role, **changes))
        threading.Thread(target=self._follow, args=(role, shard), daemon=True).start()
        return shard

    def _follow(self, role: str, shard: ShardProcess) -> None:
        try:
            for status in shard.watch():
                with self._changed:
                    if self.shards.get(role) is not shard:
                        return
                    self.states[role] = status
                    self._changed.notify_all()
        except (ShardProcessError, ValueError) as error:
            with self._changed:
                if self.shards.get(role) is shard:
                    self.states.pop(role, None)
                    self.errors[role] = str(error)
                    self._changed.notify_all()

    def kill_shard(self, role: str) -> None:
        """SIGKILL, as an operator or the kernel would."""
        self.shards[role].kill()

    def wait_serving(self, timeout_s: float = 280.0) -> None:
        """Waits until all shards serve the same epoch."""

        def serving() -> bool:
            states = [self.states.get(role.name) for role in self.template.roles]
            return (
                all(
                    state is not None and state.state == control_pb2.SHARD_STATE_SERVING
                    for state in states
                )
                and len({state.epoch for state in states if state is not None}) == 1
            )

        def failed() -> str:
            for role, state in self.states.items():
                if state.state == control_pb2.SHARD_STATE_FAILED:
                    return f"{role}: {state.error_code}: {state.error}"
            return next((f"{role}: {error}" for role, error in self.errors.items()), "")

        deadline = time.monotonic() + timeout_s
        with self._changed:
            while not serving():
                if reason := failed():
                    raise AssertionError(f"{reason}\n{self.logs()}")
                if not self._changed.wait(max(0.0, deadline - time.monotonic())):
                    raise AssertionError(f"not serving after {timeout_s} s\n{self.logs()}")

    def wait_failed(self, role: str, timeout_s: float = 60.0) -> control_pb2.ShardStatus:
        """Waits until a shard gave up; returns why."""
        with self._changed:
            done = self._changed.wait_for(
                lambda: (
                    role in self.states
                    and self.states[role].state == control_pb2.SHARD_STATE_FAILED
                ),
                timeout_s,
            )
        assert done, f"{role} did not fail\n{self.logs()}"
        return self.states[role]

    def logs(self) -> str:
        parts = [
            f"--- {path.name}\n{path.read_text(errors='replace')[-4000:]}"
            for path in sorted(self.directory.glob("*.log"))
        ]
        return "\n".join(parts)

    # -- requests -----------------------------------------------------------------------------

    def roster(self) -> Roster:
        """The current roster, as a client would verify it."""
        assert self.broker is not None
        with BrokerClient(self.broker.address, self.owner_public) as client:
            reply = client.get_roster(INSTANCE)
        return open_roster_reply(reply, self.owner_public, INSTANCE).roster

    def exchange(
        self, path: str, body: bytes, method: str = "POST"
    ) -> Iterator[ResponseHead | bytes]:
        """One sealed exchange with the head, event by event."""
        head = self.roster().head
        sealed, opener = EnvelopeClient(head.shard_key, INSTANCE).seal(
            Request(method, path, "application/json", body)
        )
        with grpc.insecure_channel(head.ingress_address) as channel:
            stub = control_pb2_grpc.IngressStub(channel)
            for record in stub.Exchange(control_pb2.SealedRequest(sealed=sealed)):
                yield from opener.feed(record.record)
            opener.finish()

    def post(self, path: str, document: dict[str, object]) -> Answer:
        status = 0
        body = b""
        for event in self.exchange(path, json.dumps(document).encode()):
            if isinstance(event, ResponseHead):
                status = event.status
            else:
                body += event
        return Answer(status, body)

    def stream(self, path: str, document: dict[str, object]) -> Iterator[dict[str, Any]]:
        """Server-sent events as documents."""
        buffer = b""
        for event in self.exchange(path, json.dumps({**document, "stream": True}).encode()):
            if isinstance(event, ResponseHead):
                assert event.status == 200, event
                continue
            buffer += event
            while b"\n\n" in buffer:
                line, buffer = buffer.split(b"\n\n", 1)
                data = line.removeprefix(b"data: ")
                if data != b"[DONE]":
                    yield json.loads(data)

    def complete(self, prompt: list[int], tokens: int) -> tuple[str, int]:
        """Greedy text of a prompt, and of how many tokens."""
        answer = self.post(
            "/v1/completions",
            {"model": "test-model", "prompt": prompt, "max_tokens": tokens, "temperature": 0},
        )
        assert answer.status == 200, answer.body
        document = answer.document
        return document["choices"][0]["text"], document["usage"]["completion_tokens"]

    def complete_all(
        self, prompts: Sequence[list[int]], tokens: Sequence[int]
    ) -> list[tuple[str, int]]:
        """The same, all at once."""
        with ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(self.complete, prompts, tokens))
