"""Entry of a shard process: `python -I -m runtime.shard.process --directory DIR`.

The main thread runs one asyncio loop with the control service on a unix socket, the sealed ingress
(head shard) and the OpenAI layer; the shard's life, the engine and the links have threads of their
own. Standard input is the lifeline: when it closes, the process ends at once.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import logging
import os
import resource
import signal
import sys
import threading
import traceback
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TypeAlias

import grpc
import grpc.aio
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from placement.plan import PlanTemplate
from runtime.shard import control_pb2, control_pb2_grpc
from runtime.shard.head import MAX_SEALED_BYTES, Head
from runtime.shard.launch import ShardSpec
from runtime.shard.shard import Shard, ShardState
from runtime.stage.border import RotaryBorder
from security.errors import SecurityError
from security.manifest import ModelFiles

log = logging.getLogger("bulkhead.shard")

Context: TypeAlias = "grpc.aio.ServicerContext[object, object]"

SIGN_OF_LIFE_S = 1.0
FAILED_LINGER_S = 15.0
# More are turned away by gRPC: each may hold a sealed request in memory.
MAX_CONCURRENT_REQUESTS = 2048
PR_SET_DUMPABLE = 4  # linux/prctl.h
MESSAGE_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_SEALED_BYTES + 1024),
    ("grpc.max_send_message_length", MAX_SEALED_BYTES + 1024),
]
# A relay that is cut off must not hold slots for ever, nor lose its streams by a short cut.
INGRESS_OPTIONS = [
    *MESSAGE_OPTIONS,
    ("grpc.so_reuseport", 0),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 45_000),
    # Without it the line above waits for this one's default of a minute (see security.broker).
    ("grpc.http2.ping_timeout_ms", 45_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
]


class ShardServer(control_pb2_grpc.ShardControlServicer, control_pb2_grpc.IngressServicer):
    """The control and ingress services of one process, on one asyncio loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Condition()
        self._shard: Shard | None = None
        self._thread: threading.Thread | None = None
        self._head: Head | None = None
        self._ingress: grpc.aio.Server | None = None
        self._spec: ShardSpec | None = None
        self.ended = asyncio.Event()

    # -- ShardControl -------------------------------------------------------------------------

    async def Start(
        self, request: control_pb2.StartRequest, context: Context
    ) -> control_pb2.ShardStatus:
        """Starts the shard's life in a thread of its own."""
        if self._shard is not None:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "this process has a shard")
        if len(request.owner_public) != 32 or not 1 <= request.threads <= 1024:
            await context.abort(
                grpc.StatusCode.INVALID_ARGUMENT,
                "expected a 32-byte owner key and 1 to 1024 threads",
            )
        self._spec = ShardSpec(
            instance=request.instance,
            role=request.role,
            node=request.node,
            model_directory=request.model_directory,
            broker_address=request.broker_address,
            owner_public=request.owner_public,
            listen_host=request.listen_host,
            advertise_host=request.advertise_host,
            threads=request.threads,
            node_key_path=request.node_key_path,
            region=request.region,
        )
        self._shard = Shard(
            self._spec,
            on_change=self._notify,
            ingress_address=self._open_ingress,
            make_head=self._make_head,
        )
        self._thread = threading.Thread(target=self._run_shard, name="shard", daemon=True)
        self._thread.start()
        return self._status()

    async def Watch(
        self, request: control_pb2.WatchRequest, context: Context
    ) -> AsyncIterator[control_pb2.ShardStatus]:
        """The status at every change and at least once a second."""
        while True:
            yield self._status()
            async with self._changed:
                try:
                    await asyncio.wait_for(self._changed.wait(), SIGN_OF_LIFE_S)
                except TimeoutError:
                    continue

    async def Stop(
        self, request: control_pb2.StopRequest, context: Context
    ) -> control_pb2.StopReply:
        """Ends the process in order."""
        self._loop.call_later(0.05, self.ended.set)
        return control_pb2.StopReply()

    def _status(self) -> control_pb2.ShardStatus:
        if self._shard is None:
            return control_pb2.ShardStatus(state=control_pb2.SHARD_STATE_IDLE, detail="not started")
        status = self._shard.status()
        message = control_pb2.ShardStatus(
            state=control_pb2.ShardState.Name(status.state),
            detail=status.detail,
            done_bytes=status.done_bytes,
            total_bytes=status.total_bytes,
            epoch=status.epoch,
            ingress_address=status.ingress_address,
            error_code=status.error_code,
            error=status.error,
            weaknesses=status.weaknesses,
        )
        if self._head is not None:
            load = self._head.load()
            message.engine.running = load.running
            message.engine.waiting = load.waiting
            message.engine.free_blocks = load.free_blocks
            message.engine.total_blocks = load.total_blocks
        return message

    def _notify(self) -> None:
        async def notify() -> None:
            async with self._changed:
                self._changed.notify_all()

        if not self._loop.is_closed():
            asyncio.run_coroutine_threadsafe(notify(), self._loop)

    def _run_shard(self) -> None:
        assert self._shard is not None
        self._shard.run()
        # A failed shard stays for a moment, so that its starter reads why.
        failed = self._shard.status().state == ShardState.FAILED
        delay = FAILED_LINGER_S if failed else 0.0
        self._loop.call_soon_threadsafe(lambda: self._loop.call_later(delay, self.ended.set))

    # -- Ingress ------------------------------------------------------------------------------

    def _open_ingress(self) -> str:
        """Opens the ingress port (from the shard's thread); returns the address to advertise."""
        assert self._spec is not None
        spec = self._spec

        async def start() -> int:
            server = grpc.aio.server(
                options=INGRESS_OPTIONS, maximum_concurrent_rpcs=MAX_CONCURRENT_REQUESTS
            )
            control_pb2_grpc.add_IngressServicer_to_server(self, server)
            port: int = server.add_insecure_port(f"{spec.listen_host}:0")
            await server.start()
            self._ingress = server
            return port

        port = asyncio.run_coroutine_threadsafe(start(), self._loop).result(30)
        return f"{spec.advertise_host}:{port}"

    def _make_head(
        self,
        template: PlanTemplate,
        files: ModelFiles,
        instance: str,
        private_key: X25519PrivateKey,
        rotary_border: RotaryBorder | None,
    ) -> Head:
        self._head = Head(template, files, instance, private_key, rotary_border)
        return self._head

    async def Exchange(
        self, request: control_pb2.SealedRequest, context: Context
    ) -> AsyncIterator[control_pb2.SealedRecord]:
        """One sealed request; cancelling the call closes the answer and frees its slot."""
        if self._head is None:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the head shard is still loading")
        assert self._head is not None
        records = self._head.exchange(request.sealed)
        try:
            async for record in records:
                yield control_pb2.SealedRecord(record=record)
        except SecurityError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"{error.code}: {error}")
        except Exception as error:
            # gRPC would send the text to the relay, and it may quote the request.
            where = "".join(traceback.format_tb(error.__traceback__))
            log.error("%s while answering at\n%s", type(error).__name__, where)
            await context.abort(grpc.StatusCode.INTERNAL, "the head failed while answering")
        finally:
            await records.aclose()

    async def Health(
        self, request: control_pb2.HealthRequest, context: Context
    ) -> control_pb2.HealthReply:
        """Whether an epoch is up and the engine works in it."""
        if self._shard is None or self._head is None:
            return control_pb2.HealthReply(ready=False)
        status = self._shard.status()
        ready = status.state == ShardState.SERVING and self._head.load().ready
        return control_pb2.HealthReply(ready=ready, epoch=status.epoch)

    async def close(self) -> None:
        """Ends the ingress and the shard."""
        if self._ingress is not None:
            await self._ingress.stop(grace=0.5)
        if self._shard is not None and self._thread is not None:
            self._shard.stop()
            await asyncio.to_thread(self._thread.join, 5.0)


def follow_lifeline() -> None:
    """Ends the process, whatever it is doing, when the starter closes our standard input."""

    def watch() -> None:
        while os.read(0, 4096):
            pass
        os.kill(0, signal.SIGKILL) if os.getpgrp() == os.getpid() else os._exit(1)

    threading.Thread(target=watch, name="lifeline", daemon=True).start()


def harden() -> None:
    """What a process can do for itself: no core files, not dumpable, files private.

    Not dumpable also closes /proc/PID/mem and ptrace to processes of the same user that lack
    CAP_SYS_PTRACE (ptrace(2), "Ptrace access mode checking").
    """
    os.umask(0o077)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)


async def serve(directory: Path) -> None:
    """Serves the control socket until the shard ends or is stopped."""
    service = ShardServer()
    server = grpc.aio.server()
    control_pb2_grpc.add_ShardControlServicer_to_server(service, server)
    server.add_insecure_port(f"unix:{directory / 'control.sock'}")
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, service.ended.set)
    await server.start()
    await service.ended.wait()
    await service.close()
    await server.stop(grace=0.2)


def main() -> None:
    """Runs one shard process."""
    parser = argparse.ArgumentParser(prog="bulkhead-shard", description=__doc__)
    parser.add_argument("--directory", type=Path, required=True, help="private directory (0700)")
    arguments = parser.parse_args()
    harden()
    follow_lifeline()
    logging.basicConfig(
        level=logging.INFO,
        stream=sys.stderr,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    asyncio.run(serve(arguments.directory))
    # Threads that still hold torch or a socket must not delay the end.
    logging.shutdown()
    os._exit(0)


if __name__ == "__main__":
    main()
