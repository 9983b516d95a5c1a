"""The Ray actor beside one shard process: starts it, watches it, reads its log. Nothing more.

Ray's worker processes never import torch; what an actor knows of its shard is what the control
channel says, and none of that is secret.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import threading
from pathlib import Path
from typing import TypedDict

import ray

from placement.inventory import from_ray_nodes
from runtime.shard import control_pb2
from runtime.shard.launch import ShardProcess, ShardProcessError, ShardSpec, tail

log = logging.getLogger("bulkhead.cluster")


class ShardView(TypedDict):
    """What status shows of one shard."""

    role: str
    node: str
    state: str
    detail: str
    pid: int
    log: str
    epoch: str
    ingress_address: str
    done_bytes: int
    total_bytes: int
    running: int
    waiting: int
    free_blocks: int
    total_blocks: int


class ShardEnd(TypedDict):
    """Why a shard's `run` returned."""

    code: str
    reason: str


def state_name(state: int) -> str:
    """`SHARD_STATE_SERVING` as `serving`."""
    name: str = control_pb2.ShardState.Name(control_pb2.ShardState.ValueType(state))
    return name.removeprefix("SHARD_STATE_").lower()


def node_name() -> str:
    """Name of the node that this process is on, as the planner knows it."""
    own = ray.get_runtime_context().get_node_id()
    listed = [node for node in ray.nodes() if node["NodeID"] == own]
    return from_ray_nodes(listed).nodes[0].name


class ShardActor:
    """Starts one shard process on its node and follows it to its end.

    Args:
        log_directory: where this node keeps shard logs; made if missing, `~` is this node's.
    """

    def __init__(self, instance: str, role: str, node: str, log_directory: str) -> None:
        self._role = role
        self._node = node
        self._log = Path(log_directory).expanduser() / instance / f"{role}.log"
        self._runtime = Path(tempfile.mkdtemp(prefix="bulkhead-"))
        self._process = ShardProcess(self._runtime, self._log)
        self._status = control_pb2.ShardStatus(state=control_pb2.SHARD_STATE_IDLE)
        self._stopping = threading.Event()

    def run(
        self,
        *,
        instance: str,
        model_directory: str,
        broker_address: str,
        owner_public: bytes,
        threads: int,
        node_key_path: str,
        region: str,
    ) -> ShardEnd:
        """Runs the shard until it ends; this call is Ray's sign that the shard lives."""
        host = ray.util.get_node_ip_address()
        if (here := node_name()) != self._node:
            return ShardEnd(
                code="wrong_node", reason=f"expected to be on {self._node}, found {here}"
            )
        spec = ShardSpec(
            instance=instance,
            role=self._role,
            node=self._node,
            model_directory=str(Path(model_directory).expanduser()),
            broker_address=broker_address,
            owner_public=owner_public,
            listen_host=host,
            advertise_host=host,
            threads=threads,
            node_key_path=node_key_path,
            region=region,
        )
        try:
            self._process.start(spec)
            for status in self._process.watch():
                self._status = status
                if self._stopping.is_set():
                    return ShardEnd(code="stopped", reason="stopped")
                if status.state == control_pb2.SHARD_STATE_FAILED:
                    return ShardEnd(code=status.error_code, reason=status.error)
        except ShardProcessError as error:
            return ShardEnd(code=error.code, reason=str(error))
        finally:
            self._process.stop(timeout_s=3.0)
            # An error here would hide why the shard ended.
            shutil.rmtree(self._runtime, ignore_errors=True)
        return ShardEnd(code="ended", reason="the shard ended")

    def view(self) -> ShardView:
        """The shard as status shows it."""
        status = self._status
        return ShardView(
            role=self._role,
            node=self._node,
            state=state_name(status.state),
            detail=status.detail,
            pid=self._process.pid,
            log=str(self._log),
            epoch=status.epoch,
            ingress_address=status.ingress_address,
            done_bytes=status.done_bytes,
            total_bytes=status.total_bytes,
            running=status.engine.running,
            waiting=status.engine.waiting,
            free_blocks=status.engine.free_blocks,
            total_blocks=status.engine.total_blocks,
        )

    def read_log(self, lines: int) -> str:
        """The last lines of the shard's log."""
        return tail(self._log, min(lines, 10_000))

    def stop(self) -> None:
        """Ends the shard; `run` returns."""
        self._stopping.set()
        self._process.stop(timeout_s=3.0)

    def exit(self) -> None:
        """Ends the actor's process."""
        os._exit(0)
