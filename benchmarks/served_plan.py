"""A whole plan without Ray: a real broker, real shard processes, real links, a sealed client."""

from __future__ import annotations

import json
import shutil
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import grpc

from benchmarks.drivers.protocol import replay
from benchmarks.memory import MemoryWatch
from benchmarks.planned import INSTANCE, MODEL, Size, plan_deployment
from benchmarks.times import RequestTimes, TimedRequest
from runtime.shard import control_pb2, control_pb2_grpc
from runtime.shard.launch import ShardProcess, ShardSpec
from security.broker.client import BrokerClient
from security.broker.documents import sign_installation
from security.broker.roster_reply import open_roster_reply
from security.broker.service import start_broker
from security.envelope import EnvelopeClient, Request, ResponseHead
from security.roster import RosterEntry
from security.signing import create_key_file, public_bytes

__all__ = ["PlanFailed", "ServedPlan", "Variant"]

_ENTRY = Path(__file__).with_name("shard_process.py")
_START_TIMEOUT_S = 300.0
_EVENT_END = b"\n\n"
_EVENT_DATA = b"data: "


class PlanFailed(Exception):
    """A shard did not come up, or a request was not answered."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to run the model.

    Attributes:
        name: for tables.
        splits: layers at which a new stage begins.
        cores: of each stage, as numbers; its threads are as many.
        encrypted: whether links encrypt.
    """

    name: str
    splits: tuple[int, ...]
    cores: tuple[tuple[int, ...], ...]
    encrypted: bool = True


class ServedPlan:
    """A served model; use as a context manager.

    Attributes:
        ready_s: seconds from the broker's start until a request was answered.
        memory: resident memory of the shards over time.
    """

    def __init__(self, model: Path, size: Size, variant: Variant) -> None:
        started = time.perf_counter()
        self._model = model
        self._directory = Path(tempfile.mkdtemp(prefix="bhb-"))
        owner = create_key_file(self._directory / "owner.key")
        self._owner_public = public_bytes(owner)
        self._shards: list[ShardProcess] = []
        self.memory = MemoryWatch([])
        self._broker = start_broker("127.0.0.1:0", self._directory / "broker", self._owner_public)
        try:
            deployment = plan_deployment(model, size, variant.splits)
            self._broker.install(
                sign_installation(
                    owner,
                    self._broker.public_key,
                    policy=deployment.policy,
                    template=deployment.template,
                    manifest=deployment.manifest,
                )
            )
            for role, cores in zip(deployment.template.roles, variant.cores, strict=True):
                self._start(role.name, cores, variant.encrypted)
            self._wait_serving()
            self._head = self._find_head()
        except BaseException:
            self.close()
            raise
        self.memory.stop()
        self.memory = MemoryWatch([shard.pid for shard in self._shards])
        self.ready_s = time.perf_counter() - started

    async def run(self, requests: Sequence[TimedRequest]) -> list[RequestTimes]:
        """Serves the requests as they arrive, each sealed and streamed; the times of each.

        Raises:
            PlanFailed: an answer was an error, or cut off.
        """
        async with grpc.aio.insecure_channel(self._head.ingress_address) as channel:
            stub = control_pb2_grpc.IngressStub(channel)

            def generate(prompt: Sequence[int], tokens: int) -> AsyncIterator[int]:
                return self._generate(stub, prompt, tokens)

            return await replay(generate, requests)

    def close(self) -> None:
        """Ends every process; may be called twice."""
        self.memory.stop()
        for shard in self._shards:
            shard.kill()
            shard.stop(1.0)
        self._shards.clear()
        self._broker.stop()
        shutil.rmtree(self._directory, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _start(self, role: str, cores: Sequence[int], encrypted: bool) -> None:
        shard = ShardProcess(
            self._directory,
            self._directory / f"{role}.log",
            (
                *("-I", str(_ENTRY)),
                *("--cores", ",".join(map(str, cores))),
                *("--links", "encrypted" if encrypted else "plain"),
            ),
        )
        self._shards.append(shard)
        shard.start(
            ShardSpec(
                instance=INSTANCE,
                role=role,
                node=f"node-{role.removeprefix('stage-')}",
                model_directory=str(self._model),
                broker_address=self._broker.address,
                owner_public=self._owner_public,
                listen_host="127.0.0.1",
                advertise_host="127.0.0.1",
                threads=len(cores),
            )
        )

    def _wait_serving(self) -> None:
        """Waits until every shard serves; a shard's own watch says when one ends or fails."""
        failures: list[str] = []

        def follow(shard: ShardProcess) -> None:
            try:
                for status in shard.watch():
                    if status.state == control_pb2.SHARD_STATE_SERVING:
                        return
                    if status.state == control_pb2.SHARD_STATE_FAILED:
                        failures.append(f"{status.error_code}: {status.error}")
                        return
            except Exception as error:
                failures.append(str(error))

        watchers = [
            threading.Thread(target=follow, args=(shard,), daemon=True) for shard in self._shards
        ]
        for watcher in watchers:
            watcher.start()
        deadline = time.monotonic() + _START_TIMEOUT_S
        for watcher in watchers:
            watcher.join(max(0.0, deadline - time.monotonic()))
        if failures:
            raise PlanFailed("; ".join(failures))
        if any(watcher.is_alive() for watcher in watchers):
            raise PlanFailed(f"the plan does not serve after {_START_TIMEOUT_S:.0f} s")

    def _find_head(self) -> RosterEntry:
        with BrokerClient(self._broker.address, self._owner_public) as client:
            reply = client.get_roster(INSTANCE)
        return open_roster_reply(reply, self._owner_public, INSTANCE).roster.head

    async def _generate(
        self, stub: control_pb2_grpc.IngressStub, prompt: Sequence[int], tokens: int
    ) -> AsyncIterator[int]:
        body = json.dumps(
            {
                "model": MODEL,
                "prompt": list(prompt),
                "max_tokens": tokens,
                "temperature": 0,
                "ignore_eos": True,
                "return_token_ids": True,
                "stream": True,
            }
        ).encode()
        sealed, opener = EnvelopeClient(self._head.shard_key, INSTANCE).seal(
            Request("POST", "/v1/completions", "application/json", body)
        )
        left = b""
        async for record in stub.Exchange(control_pb2.SealedRequest(sealed=sealed)):
            for event in opener.feed(record.record):
                if isinstance(event, ResponseHead):
                    if event.status != 200:
                        raise PlanFailed(f"answer: expected status 200, found {event.status}")
                    continue
                *events, left = (left + event).split(_EVENT_END)
                if count := sum(map(_tokens_in, events)):
                    yield count
        opener.finish()


def _tokens_in(event: bytes) -> int:
    data = event.removeprefix(_EVENT_DATA)
    if data == b"[DONE]" or not event.startswith(_EVENT_DATA):
        return 0
    document = json.loads(data)
    if "error" in document:
        raise PlanFailed(f"answer: {document['error'].get('message')}")
    return sum(len(choice.get("token_ids", ())) for choice in document["choices"])
