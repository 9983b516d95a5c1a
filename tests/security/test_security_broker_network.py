"""Broker and client over real gRPC on loopback."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from security_samples import OPEN, SIMULATED, audit_lines, make_template, write_model

from placement.policy import parse_policy
from security import errors
from security.attestation.enrolled import Enrolment, Enrolments
from security.attestation.simulated import SimulatedCollector
from security.broker import service
from security.broker.candidate import request_admission
from security.broker.challenge import Challenge
from security.broker.client import BrokerClient
from security.broker.documents import Installation, sign_installation
from security.broker.members import SECRET_BYTES
from security.broker.membership import Membership
from security.broker.roster_reply import open_roster_reply
from security.broker.service import start_broker
from security.manifest import build_manifest, observe_manifest
from security.roster import Roster
from security.signing import create_key_file, public_bytes
from serving.cli import run
from serving.rosters import route_of


class Relay:
    """A TCP relay that can be frozen (a cut cable: nothing passes, nothing closes)."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._flowing = threading.Event()
        self._flowing.set()
        threading.Thread(target=self._serve, daemon=True).start()

    def freeze(self) -> None:
        self._flowing.clear()

    def thaw(self) -> None:
        self._flowing.set()

    def close(self) -> None:
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
                self._flowing.wait()
                server = socket.create_connection(self._target)
            except OSError:
                return
            for one, other in ((client, server), (server, client)):
                threading.Thread(target=self._pump, args=(one, other), daemon=True).start()

    def _pump(self, one: socket.socket, other: socket.socket) -> None:
        try:
            while data := one.recv(65536):
                self._flowing.wait()
                other.sendall(data)
        except OSError:
            pass
        for end in (one, other):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@dataclass
class Site:
    """A broker on loopback, with everything closed at the end of the test."""

    path: Path
    policy_text: str = SIMULATED
    enrolments: Enrolments | None = None
    owner: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate)
    closers: list[Callable[[], object]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.owner_public = public_bytes(self.owner)
        self.model = write_model(self.path / "model")
        self.manifest = build_manifest(self.model)
        self.policy = parse_policy(self.policy_text)
        self.start("127.0.0.1:0")
        self.server.install(self.installation())

    def start(self, listen: str) -> None:
        self.server = start_broker(listen, self.path / "broker", self.owner_public)
        self.address = self.server.address
        self.closers.append(self.server.stop)

    def installation(self, **changes: object) -> Installation:
        return sign_installation(
            self.owner,
            self.server.public_key,
            policy=self.policy,
            template=make_template(self.policy, self.manifest, **changes),
            manifest=self.manifest,
            enrolments=self.enrolments,
        )

    def client(self) -> BrokerClient:
        client = BrokerClient(self.address, self.owner_public)
        self.closers.append(client.close)
        return client

    def join(
        self,
        role: str,
        *,
        address: str = "",
        instance: str = "pipeline-0",
        node_key_path: Path | None = None,
        node: str = "node-a",
    ) -> tuple[Challenge, Membership, X25519PrivateKey]:
        joined = request_admission(
            address or self.address,
            self.owner_public,
            instance=instance,
            role=role,
            node=node,
            model_dir=self.model,
            link_address="127.0.0.1:4000",
            ingress_address="127.0.0.1:5000" if role == "stage-0" else "",
            node_key_path=node_key_path,
        )
        self.closers.append(joined[1].close)
        return joined

    def audit(self) -> list[dict[str, str]]:
        return audit_lines(self.path / "broker")

    def wait_for(self, event: str, count: int = 1, timeout: float = 20.0) -> float:
        """Waits until an event is in the audit log often enough; returns how long it took."""
        start = time.monotonic()
        while sum(line["event"] == event for line in self.audit()) < count:
            assert time.monotonic() - start < timeout, f"no {event} within {timeout} s"
            time.sleep(0.02)
        return time.monotonic() - start


class Feed:
    """Takes a membership's rosters in a thread."""

    def __init__(self, membership: Membership) -> None:
        self._changed = threading.Condition()
        self.rosters: list[Roster] = []
        self.error: Exception | None = None
        self.ended = threading.Event()
        threading.Thread(target=self._run, args=(membership,), daemon=True).start()

    def _run(self, membership: Membership) -> None:
        try:
            for roster in membership.rosters():
                with self._changed:
                    self.rosters.append(roster)
                    self._changed.notify_all()
        except errors.SecurityError as error:
            self.error = error
        self.ended.set()

    def wait(self, count: int, timeout: float = 20.0) -> Roster:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.rosters) >= count, timeout)
            return self.rosters[count - 1]


@pytest.fixture
def make_site(tmp_path: Path) -> Iterator[Callable[..., Site]]:
    made: list[Site] = []

    def make(policy_text: str = SIMULATED, enrolments: Enrolments | None = None) -> Site:
        site = Site(tmp_path, policy_text, enrolments)
        made.append(site)
        return site

    yield make
    for site in made:
        for close in reversed(site.closers):
            close()


@pytest.fixture
def site(make_site: Callable[..., Site]) -> Site:
    return make_site()


def test_two_shards_get_the_same_roster(site: Site) -> None:
    challenge, head, head_key = site.join("stage-0")
    _, tail, tail_key = site.join("stage-1")
    assert challenge.template.cluster == "lab" and challenge.policy == site.policy
    first, second = Feed(head), Feed(tail)
    roster = first.wait(1)
    assert second.wait(1) == roster
    assert roster.entry("stage-0").shard_key == head_key.public_key().public_bytes_raw()
    assert roster.entry("stage-1").shard_key == tail_key.public_key().public_bytes_raw()
    assert len(roster.digest) == 32
    reply = site.client().get_roster("pipeline-0")
    verified = open_roster_reply(reply, site.owner_public, "pipeline-0")
    assert verified.roster == roster
    assert verified.template == challenge.template and verified.policy == site.policy
    head.report("links are up")
    assert site.audit()[-1]["text"] == "links are up"


def test_roster_reply_is_verified_from_the_owner_key(site: Site) -> None:
    feeds = [Feed(site.join(role)[1]) for role in ("stage-0", "stage-1")]
    feeds[0].wait(1)
    reply = site.client().get_roster("pipeline-0")
    stranger = public_bytes(Ed25519PrivateKey.generate())
    with pytest.raises(errors.SignatureInvalid):
        open_roster_reply(reply, stranger, "pipeline-0")
    with pytest.raises(errors.RosterForOtherInstance):
        open_roster_reply(reply, site.owner_public, "pipeline-1")
    with pytest.raises(errors.RosterExpired):
        open_roster_reply(reply, site.owner_public, "pipeline-0", int(time.time()) + 25 * 3600)
    with pytest.raises(errors.MalformedInput):
        open_roster_reply(b"\xff\xff", site.owner_public, "pipeline-0")


def test_a_client_is_not_led_back_to_an_older_roster(site: Site) -> None:
    feeds = [Feed(site.join(role)[1]) for role in ("stage-0", "stage-1")]
    feeds[0].wait(1)
    older = site.client().get_roster("pipeline-0")
    now = int(time.time())
    first = route_of(older, "pipeline-0", site.owner_public, now)
    assert route_of(older, "pipeline-0", site.owner_public, now, first) == first
    feeds.append(Feed(site.join("stage-0")[1]))  # the head is replaced
    feeds[2].wait(1)
    newer = site.client().get_roster("pipeline-0")
    second = route_of(newer, "pipeline-0", site.owner_public, now, first)
    assert second.shard_key != first.shard_key
    with pytest.raises(errors.RosterOutOfDate):
        route_of(older, "pipeline-0", site.owner_public, now, second)


def test_calls_at_one_time_are_bounded(
    make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "_MAX_CALLS", 2)
    site = make_site()
    for role in ("stage-0", "stage-1"):
        membership = site.join(role)[1]
        Feed(membership)
    deadline = time.monotonic() + 10
    with pytest.raises(errors.BrokerUnreachable, match="RESOURCE_EXHAUSTED"):
        while time.monotonic() < deadline:
            site.client().identity()


def test_renewal_reaches_all(site: Site) -> None:
    head, tail = site.join("stage-0")[1], site.join("stage-1")[1]
    first, second = Feed(head), Feed(tail)
    epoch = first.wait(1).epoch
    second.wait(1)
    head.renew_epoch(epoch)
    tail.renew_epoch(epoch)
    assert first.wait(2) == second.wait(2)
    assert first.wait(2).epoch != epoch
    time.sleep(0.2)
    assert len(first.rosters) == 2


def test_crashed_shard_comes_back_with_a_new_key(site: Site) -> None:
    head, tail = site.join("stage-0")[1], site.join("stage-1")[1]
    first, second = Feed(head), Feed(tail)
    before = first.wait(1)
    second.wait(1)
    tail.close()
    site.wait_for("absent")
    assert second.ended.wait(5) and second.error is None
    third = Feed(site.join("stage-1")[1])
    after = first.wait(2)
    assert third.wait(1) == after and after.epoch != before.epoch
    assert after.entry("stage-0") == before.entry("stage-0")
    assert after.entry("stage-1").shard_key != before.entry("stage-1").shard_key


def test_member_that_was_replaced_is_told(site: Site) -> None:
    old = Feed(site.join("stage-1")[1])
    site.wait_for("present")
    site.join("stage-1")
    assert old.ended.wait(10)
    assert isinstance(old.error, errors.MembershipLost)


def test_broker_restart(site: Site) -> None:
    head, head_key = site.join("stage-0")[1:]
    first, second = Feed(head), Feed(site.join("stage-1")[1])
    before = first.wait(1)
    second.wait(1)
    address = site.address
    site.server.stop(0)
    time.sleep(0.5)
    with pytest.raises(errors.BrokerUnreachable):
        head.renew_epoch(before.epoch)
    site.start(address)
    after = first.wait(2)
    assert second.wait(2) == after
    assert after.epoch != before.epoch and after.serial > before.serial
    assert after.entry("stage-0").shard_key == head_key.public_key().public_bytes_raw()


def test_new_plan_ends_memberships(site: Site) -> None:
    feeds = [Feed(site.join(role)[1]) for role in ("stage-0", "stage-1")]
    feeds[0].wait(1)
    assert site.client().install(site.installation(generation=2)) == 2
    for feed in feeds:
        assert feed.ended.wait(10)
        assert isinstance(feed.error, errors.MembershipLost)


def test_revocation_reaches_the_revoked_and_their_peers(site: Site) -> None:
    head, tail = site.join("stage-0")[1], site.join("stage-1", node="node-b")[1]
    ended: list[bytes] = []
    told = threading.Event()

    def on_ended(epoch: bytes) -> None:
        ended.append(epoch)
        told.set()

    head.on_ended = on_ended
    first, second = Feed(head), Feed(tail)
    epoch = first.wait(1).epoch
    second.wait(1)
    home = site.path / "owner"
    home.mkdir(mode=0o700)
    (home / "owner.pem").write_bytes(
        site.owner.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    )
    (home / "owner.pem").chmod(0o600)
    line = ["broker", "revoke", "node", "node-b", "--broker", site.address, "--home", str(home)]
    start = time.monotonic()
    assert run(line) == 0
    assert told.wait(5) and ended == [epoch]
    assert second.ended.wait(5) and time.monotonic() - start < 5
    assert isinstance(second.error, errors.AdmissionRefused)
    assert second.error.code == "node_revoked"
    with pytest.raises(errors.AdmissionRefused) as caught:
        site.client().get_roster("pipeline-0")
    assert caught.value.code == "no_roster"
    third = Feed(site.join("stage-1", node="node-c")[1])
    roster = first.wait(2)
    assert third.wait(1) == roster and roster.epoch != epoch
    assert roster.entry("stage-1").claims.node == "node-c"
    assert site.client().revocations().generation == 1
    line[3] = "node-d"
    assert run(line) == 0
    assert site.client().revocations().generation == 2
    line[3] = "not a name"
    assert run(line) == 2


def test_silent_peer_is_noticed_and_may_come_back(site: Site) -> None:
    relay = Relay(site.address)
    head = site.join("stage-0", address=relay.address)[1]
    first, second = Feed(head), Feed(site.join("stage-1")[1])
    epoch = first.wait(1).epoch
    second.wait(1)
    relay.freeze()
    assert site.wait_for("absent", timeout=15) > 0.5
    admitted = sum(line["event"] == "admitted" for line in site.audit())
    relay.thaw()
    site.wait_for("present", 3)
    time.sleep(0.3)
    assert len(first.rosters) == 1 and first.rosters[0].epoch == epoch
    head.renew_epoch(epoch)
    assert first.wait(2) == second.wait(2)
    assert sum(line["event"] == "admitted" for line in site.audit()) == admitted
    relay.close()


def test_close_ends_a_blocked_iteration(site: Site) -> None:
    membership = site.join("stage-0")[1]
    feed = Feed(membership)
    site.wait_for("present")
    membership.close()
    assert feed.ended.wait(5) and feed.error is None
    membership.close()


def test_changed_model_file_is_named_in_refusal_and_log(site: Site) -> None:
    (site.model / "chat_template.jinja").write_text("{{ evil }}")
    with pytest.raises(errors.AdmissionRefused, match=r"chat_template\.jinja: expected") as caught:
        site.join("stage-0")
    assert caught.value.code == "wrong_manifest"
    assert "chat_template.jinja" in site.audit()[-1]["reason"]
    assert site.audit()[-1]["code"] == "wrong_manifest"


def test_code_and_reason_travel(site: Site) -> None:
    with pytest.raises(errors.AdmissionRefused) as caught:
        site.join("stage-9")
    assert caught.value.code == "unknown_role"
    assert "stage-0, stage-1" in caught.value.reason
    with pytest.raises(errors.AdmissionRefused) as caught:
        site.client().get_roster("pipeline-0")
    assert caught.value.code == "no_roster"


def test_a_nonce_is_for_one_admission(site: Site) -> None:
    client = site.client()
    challenge = client.challenge("pipeline-0", "stage-1")
    key = X25519PrivateKey.generate()
    observed, _ = observe_manifest(site.model, challenge.manifest)
    binding = challenge.binding(key.public_key().public_bytes_raw(), observed)
    evidence = SimulatedCollector("node-a").collect(binding.report_data())

    def admit() -> bytes:
        return client.admit(
            challenge,
            key,
            link_address="127.0.0.1:4000",
            ingress_address="",
            evidence=evidence,
            observed_manifest_digest=observed,
        )

    assert len(admit()) == SECRET_BYTES
    with pytest.raises(errors.AdmissionRefused) as caught:
        admit()
    assert caught.value.code == "nonce_used"


def test_shard_refuses_a_broker_of_another_owner(site: Site) -> None:
    stranger = public_bytes(Ed25519PrivateKey.generate())
    with pytest.raises(errors.SignatureInvalid):
        request_admission(
            site.address,
            stranger,
            instance="pipeline-0",
            role="stage-0",
            node="node-a",
            model_dir=site.model,
            link_address="127.0.0.1:1",
        )


def test_enrolled_node(make_site: Callable[..., Site], tmp_path: Path) -> None:
    path = tmp_path / "node.key"
    key = create_key_file(path)
    enrolment = Enrolment("node-a", public_bytes(key), None, int(time.time()) + 600)
    site = make_site(OPEN, Enrolments((enrolment,)))
    with pytest.raises(errors.NoCollector):
        site.join("stage-0")
    feeds = [Feed(site.join(role, node_key_path=path)[1]) for role in ("stage-0", "stage-1")]
    assert feeds[0].wait(1).entry("stage-1").claims.kind == "enrolled"


def test_identity(site: Site) -> None:
    assert site.client().identity() == site.server.public_key


def test_retire(site: Site) -> None:
    membership = site.join("stage-0")[1]
    client = site.client()
    client.retire("pipeline-0")
    with pytest.raises(errors.AdmissionRefused) as caught:
        membership.report("hello")
    assert caught.value.code == "unknown_member"


def test_nobody_listens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("security.broker.candidate.REACH_TIMEOUT_S", 0.5)
    with pytest.raises(errors.BrokerUnreachable, match="check that the broker runs"):
        request_admission(
            "127.0.0.1:1",
            b"o" * 32,
            instance="pipeline-0",
            role="stage-0",
            node="node-a",
            model_dir=tmp_path,
            link_address="127.0.0.1:1",
        )


def test_taken_port(site: Site, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="could not listen"):
        start_broker(site.address, tmp_path / "other", site.owner_public)


def test_garbage_on_the_wire(site: Site) -> None:
    with grpc.insecure_channel(site.address) as channel:
        call = channel.unary_unary("/bulkhead.broker.KeyBroker/Admit")
        for garbage in (b"", b"\xff" * 100, bytes(1000)):
            with pytest.raises(grpc.RpcError):
                call(garbage, timeout=5)
    site.join("stage-0")


def test_process_ends_without_stop(tmp_path: Path) -> None:
    """A process that leaves without `stop` must not hang on streams that are still open."""
    code = (
        "import sys; from pathlib import Path; from test_security_broker_network import *\n"
        "site = Site(Path(sys.argv[1]))\n"
        "feeds = [Feed(site.join(role)[1]) for role in ('stage-0', 'stage-1')]\n"
        "feeds[0].wait(1)\n"
        "print('leaving')"
    )
    here = Path(__file__).parent
    root = here.parents[1]
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": f"{root}:{here}"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (result.returncode, result.stdout) == (0, "leaving\n"), result.stderr
