"""The key broker as a gRPC service.

Start one with `start_broker`. The transport is plain TCP: see broker.proto for why it need not be
trusted. A peer that falls silent (a cut cable, a frozen host) is noticed by keepalive pings within
`KEEPALIVE_INTERVAL_S` + `KEEPALIVE_TIMEOUT_S`, and then its watch stream ends.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn, TypeVar

import grpc

from security.attestation.collateral import Collateral
from security.attestation.collateral_directory import CollateralDirectory
from security.attestation.evidence import Binding, Evidence
from security.broker import broker_pb2, broker_pb2_grpc
from security.broker.admission import AdmissionRequest
from security.broker.audit import read_witness, require_not_behind
from security.broker.documents import Installation
from security.broker.key_broker import MAX_WATCHERS, KeyBroker
from security.broker.store import BrokerStore, printable
from security.broker.watcher import WatchClosed
from security.broker.witness import Send, to_file, to_http
from security.errors import MalformedInput, NoRoster, NothingInstalled, SecurityError
from security.signing import public_bytes

log = logging.getLogger("bulkhead.broker")

KEEPALIVE_INTERVAL_S = 5
KEEPALIVE_TIMEOUT_S = 4
MAX_MESSAGE_BYTES = 40 << 20
"""A manifest of 32 MiB and the other documents."""

CODE_METADATA = "bulkhead-code"
"""Trailing metadata key that carries the code of a refusal."""

KEEPALIVE_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.keepalive_time_ms", KEEPALIVE_INTERVAL_S * 1000),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_S * 1000),
    # gRPC 1.85 never arms the timer of the option above while the next one, by default a minute,
    # is longer; measured and read in its chttp2 transport.
    ("grpc.http2.ping_timeout_ms", KEEPALIVE_TIMEOUT_S * 1000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
)
"""Used by server and client alike."""

_SERVER_OPTIONS = (
    *KEEPALIVE_OPTIONS,
    # Without these the server takes frequent pings for an attack and ends the connection.
    ("grpc.http2.min_ping_interval_without_data_ms", 1000),
    ("grpc.http2.max_ping_strikes", 0),
    # Two brokers on one port would each see half of the calls.
    ("grpc.so_reuseport", 0),
)
_UNARY_THREADS = 16
_MAX_CALLS = MAX_WATCHERS + 4 * _UNARY_THREADS
"""Calls at one time; gRPC turns others away before it reads their messages."""
_TICK_S = 1.0
_MAX_REASON = 2000

ReplyT = TypeVar("ReplyT")


class BrokerServer:
    """A running broker; `stop` it.

    Attributes:
        address: "host:port" where it listens, with the port that was chosen.
        public_key: the broker's public key (32 bytes), to be signed by the owner.
    """

    def __init__(self, server: grpc.Server, servicer: _Servicer, address: str) -> None:
        self._server = server
        self._servicer = servicer
        self.address = address

    @property
    def public_key(self) -> bytes:
        """The broker's Ed25519 public key (32 bytes)."""
        return self._servicer.broker.public_key

    def install(self, installation: Installation) -> int:
        """Installs signed documents without the network; same checks, same errors."""
        return self._servicer.broker.install(installation, "local")

    def stop(self, grace_s: float = 1.0) -> None:
        """Ends all streams and stops listening; safe to call more than once."""
        self._servicer.stopping.set()
        self._server.stop(grace_s).wait()
        self._servicer.broker.close()

    def wait(self) -> None:
        """Waits until the server has stopped."""
        self._server.wait_for_termination()


def start_broker(
    listen: str,
    home: Path,
    owner_public: bytes,
    collateral: Path | None = None,
    *,
    witness: Path | None = None,
    witness_url: str = "",
) -> BrokerServer:
    """Starts a key broker in threads of this process.

    Args:
        listen: "host:port"; port 0 lets the kernel choose one.
        home: directory of its key, installed documents and audit log (made with mode 0700).
        owner_public: the owner's public key (32 bytes).
        collateral: directory of the vendors' documents, read anew when it changes.
        witness: file that heads of the audit log are appended to. A database that is older than
            what it holds is refused.
        witness_url: http or https URL that heads are posted to; "" for none.

    Raises:
        KeyFileError: the broker's key file cannot be used.
        CollateralUnusable: the directory cannot be read.
        StateError, AuditError: the home's database cannot be used; see `BrokerStore`.
        OSError: the address cannot be listened on.
    """
    documents: Callable[[], Collateral] = Collateral
    if collateral is not None:
        documents = CollateralDirectory(collateral)
        # What is wrong with it is said now, not at the first admission.
        documents()
    store = BrokerStore(home)
    try:
        # Before anything is written: a new entry would hide that the log is an old one.
        _attach_witnesses(store, witness, witness_url)
        broker = KeyBroker(store, owner_public, collateral=documents)
    except BaseException:
        store.close()
        raise
    pool = ThreadPoolExecutor(MAX_WATCHERS + _UNARY_THREADS, thread_name_prefix="broker")
    server = grpc.server(pool, options=_SERVER_OPTIONS, maximum_concurrent_rpcs=_MAX_CALLS)
    servicer = _Servicer(broker)
    broker_pb2_grpc.add_KeyBrokerServicer_to_server(servicer, server)
    try:
        port = server.add_insecure_port(listen)
    except RuntimeError:
        port = 0
    if port == 0:
        broker.close()
        raise OSError(f"broker: could not listen on {listen}; is another one running there?")
    server.start()
    address = f"{listen.rpartition(':')[0]}:{port}"
    log.info("key broker listens on %s", address)
    running = BrokerServer(server, servicer, address)
    _stop_at_exit(running)
    return running


def _attach_witnesses(store: BrokerStore, path: Path | None, url: str) -> None:
    """Holds the database against the witness file and keeps witnesses up to date from now on."""
    targets: list[tuple[str, Send]] = []
    if path is not None:
        if path.exists():
            witnessed = read_witness(path, public_bytes(store.broker_key()))
            require_not_behind(store.head, witnessed)
            store.require_entry(witnessed)
        targets.append((str(path), to_file(path)))
    if url:
        targets.append((url, to_http(url)))
    for name, send in targets:
        store.add_witness(name, send)


def _stop_at_exit(server: BrokerServer) -> None:
    """Lets a process that forgot `stop` end, although members still watch.

    The interpreter joins the pool's threads before it runs `atexit` and before it counts the main
    thread as ended; this registry, the one that the pool uses itself, is the only earlier moment.
    """
    reference = weakref.ref(server)

    def stop() -> None:
        found = reference()
        if found is not None:
            found.stop(0)

    threading._register_atexit(stop)  # type: ignore[attr-defined]


class _Servicer(broker_pb2_grpc.KeyBrokerServicer):
    """Translates between messages and `KeyBroker`."""

    def __init__(self, broker: KeyBroker) -> None:
        self.broker = broker
        self.stopping = threading.Event()

    def Identity(
        self, request: broker_pb2.IdentityRequest, context: grpc.ServicerContext
    ) -> broker_pb2.IdentityReply:
        """The broker's key and certificate."""
        return broker_pb2.IdentityReply(
            public_key=self.broker.public_key, certificate=self.broker.certificate
        )

    def Install(
        self, request: broker_pb2.InstallRequest, context: grpc.ServicerContext
    ) -> broker_pb2.InstallReply:
        """Installs what the owner signed."""
        installation = Installation(
            request.policy,
            request.template,
            request.manifest,
            request.enrolments,
            request.certificate,
        )
        return _answer(
            context,
            lambda: broker_pb2.InstallReply(
                generation=self.broker.install(installation, _peer(context))
            ),
        )

    def Revoke(
        self, request: broker_pb2.RevokeRequest, context: grpc.ServicerContext
    ) -> broker_pb2.RevokeReply:
        """Installs a signed list of revocations."""
        return _answer(
            context,
            lambda: broker_pb2.RevokeReply(
                generation=self.broker.revoke(request.document, _peer(context))
            ),
        )

    def GetRevocations(
        self, request: broker_pb2.GetRevocationsRequest, context: grpc.ServicerContext
    ) -> broker_pb2.GetRevocationsReply:
        """The newest signed list of revocations."""
        return broker_pb2.GetRevocationsReply(document=self.broker.revocations)

    def Challenge(
        self, request: broker_pb2.ChallengeRequest, context: grpc.ServicerContext
    ) -> broker_pb2.ChallengeReply:
        """A nonce and the signed documents."""

        def reply() -> broker_pb2.ChallengeReply:
            nonce, installation = self.broker.challenge(
                request.instance, request.role, _peer(context)
            )
            return broker_pb2.ChallengeReply(
                nonce=nonce,
                policy=installation.policy,
                template=installation.template,
                manifest=installation.manifest,
                certificate=installation.certificate,
            )

        return _answer(context, reply)

    def Admit(
        self, request: broker_pb2.AdmitRequest, context: grpc.ServicerContext
    ) -> broker_pb2.AdmitReply:
        """A member secret for evidence."""
        stated = request.binding
        admission = AdmissionRequest(
            nonce=request.nonce,
            instance=request.instance,
            role=request.role,
            shard_key=request.shard_key,
            link_address=request.link_address,
            ingress_address=request.ingress_address,
            binding=Binding(
                nonce=stated.nonce,
                shard_key=stated.shard_key,
                role=stated.role,
                cluster=stated.cluster,
                instance=stated.instance,
                broker_key=stated.broker_key,
                policy_digest=stated.policy_digest,
                manifest_digest=stated.manifest_digest,
                gpu_evidence_digest=stated.gpu_evidence_digest,
            ),
            evidence=Evidence(request.evidence_kind, request.evidence),
            notes=tuple(request.notes),
            device_evidence=request.device_evidence,
            region=request.region,
        )
        return _answer(
            context,
            lambda: broker_pb2.AdmitReply(
                sealed_secret=self.broker.admit(admission, _peer(context))
            ),
        )

    def Watch(
        self, request: broker_pb2.WatchRequest, context: grpc.ServicerContext
    ) -> Iterator[broker_pb2.WatchReply]:
        """Rosters until one side ends the stream."""
        watcher = _answer(
            context,
            lambda: self.broker.watch(
                request.instance, request.role, request.known_epoch, request.mac, _peer(context)
            ),
        )
        # Called as soon as the peer is gone, also when keepalive finds out.
        if not context.add_callback(watcher.close):
            watcher.close()
            return
        try:
            yield broker_pb2.WatchReply()
            while not self.stopping.is_set():
                ended, roster = watcher.next(_TICK_S)
                if ended:
                    yield broker_pb2.WatchReply(ended_epoch=ended)
                if roster is not None:
                    yield broker_pb2.WatchReply(roster=roster)
        except WatchClosed:
            return
        except SecurityError as error:
            _refuse(context, error)
        finally:
            watcher.close()

    def RenewEpoch(
        self, request: broker_pb2.RenewEpochRequest, context: grpc.ServicerContext
    ) -> broker_pb2.RenewEpochReply:
        """A new epoch if the named one is current."""

        def reply() -> broker_pb2.RenewEpochReply:
            self.broker.renew_epoch(
                request.instance, request.role, request.broken_epoch, request.mac, _peer(context)
            )
            return broker_pb2.RenewEpochReply()

        return _answer(context, reply)

    def Report(
        self, request: broker_pb2.ReportRequest, context: grpc.ServicerContext
    ) -> broker_pb2.ReportReply:
        """A line for the log."""

        def reply() -> broker_pb2.ReportReply:
            self.broker.report(
                request.instance, request.role, request.text, request.mac, _peer(context)
            )
            return broker_pb2.ReportReply()

        return _answer(context, reply)

    def GetRoster(
        self, request: broker_pb2.GetRosterRequest, context: grpc.ServicerContext
    ) -> broker_pb2.GetRosterReply:
        """The current roster and what it is verified with."""

        def reply() -> broker_pb2.GetRosterReply:
            roster, installation = self.broker.roster(request.instance)
            return broker_pb2.GetRosterReply(
                roster=roster,
                template=installation.template,
                policy=installation.policy,
                certificate=installation.certificate,
            )

        return _answer(context, reply)

    def Retire(
        self, request: broker_pb2.RetireRequest, context: grpc.ServicerContext
    ) -> broker_pb2.RetireReply:
        """Forgets an instance."""

        def reply() -> broker_pb2.RetireReply:
            self.broker.retire(request.instance, _peer(context))
            return broker_pb2.RetireReply()

        return _answer(context, reply)


def _answer(context: grpc.ServicerContext, reply: Callable[[], ReplyT]) -> ReplyT:
    """Runs a call; a refusal becomes a gRPC status with its code in the trailing metadata."""
    try:
        return reply()
    except SecurityError as error:
        _refuse(context, error)


def _refuse(context: grpc.ServicerContext, error: SecurityError) -> NoReturn:
    if isinstance(error, MalformedInput):
        status = grpc.StatusCode.INVALID_ARGUMENT
    elif isinstance(error, (NothingInstalled, NoRoster)):
        status = grpc.StatusCode.FAILED_PRECONDITION
    else:
        status = grpc.StatusCode.PERMISSION_DENIED
    context.set_trailing_metadata(((CODE_METADATA, error.code),))
    context.abort(status, printable(str(error), _MAX_REASON))
    raise AssertionError("abort raises")


def _peer(context: grpc.ServicerContext) -> str:
    """The peer's address without its port, as "ipv4:10.0.0.1"."""
    return str(context.peer()).rpartition(":")[0]
