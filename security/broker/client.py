"""The key broker as a shard, an owner or a client sees it. Blocking; safe to use from threads.

Nothing that comes over the network is believed: every document is verified from the owner's key,
which the caller pins.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar, cast

import grpc
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from google.protobuf.message import DecodeError

from placement.plan import PlanTemplate, Trust
from placement.policy import Policy
from security.attestation.collect import choose_collector, collect_devices
from security.attestation.evidence import Binding, Evidence, evidence_digest, gpu_nonce
from security.broker import broker_pb2, broker_pb2_grpc
from security.broker.documents import Installation, open_certificate, open_installation, open_plan
from security.broker.key_broker import MAX_NOTE_LENGTH, MAX_NOTES, MAX_REPORT_LENGTH, NONCE_BYTES
from security.broker.members import member_mac, open_secret
from security.broker.revocation import Revocations
from security.broker.service import CODE_METADATA, KEEPALIVE_OPTIONS
from security.broker.store import printable
from security.errors import (
    AdmissionRefused,
    BrokerReplyInvalid,
    BrokerUnreachable,
    MalformedInput,
    MembershipLost,
    NotTheMember,
    RosterMemberMismatch,
    RosterOutOfDate,
    SecurityError,
    UnknownMember,
    UnknownRole,
)
from security.manifest import Manifest, observe_manifest
from security.roster import Roster, RosterExpectation, open_roster

log = logging.getLogger("bulkhead.broker")

CALL_TIMEOUT_S = 15.0
"""Deadline of one call."""

REACH_TIMEOUT_S = 60.0
"""How long `request_admission` waits for a broker that does not answer."""

_FIRST_BACKOFF_S = 0.2
_LONGEST_BACKOFF_S = 3.0
_OPTIONS = (
    *KEEPALIVE_OPTIONS,
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 3000),
    # A proxy from the environment would see, and could stop, everything.
    ("grpc.enable_http_proxy", 0),
)

ReplyT = TypeVar("ReplyT")


class _Stream(Protocol):
    """A stream of watch replies that is being received."""

    def __iter__(self) -> Iterator[broker_pb2.WatchReply]: ...

    def cancel(self) -> bool: ...


class _FailedCall(Protocol):
    """What every RpcError of a call also is."""

    def code(self) -> grpc.StatusCode: ...

    def details(self) -> str | None: ...

    def trailing_metadata(self) -> Sequence[tuple[str, str | bytes]] | None: ...


@dataclass(frozen=True, slots=True)
class Challenge:
    """A nonce, and the owner's documents after they were verified.

    Attributes:
        instance, role: what was asked for.
        nonce: 32 bytes, for one admission within a minute.
        policy, template, manifest: the owner's documents.
        policy_digest, template_digest, manifest_digest: SHA-256 (hex) of what was signed.
        broker_key: the broker's Ed25519 public key (32 bytes), certified by the owner.
    """

    instance: str
    role: str
    nonce: bytes
    policy: Policy
    policy_digest: str
    template: PlanTemplate
    template_digest: str
    manifest: Manifest
    manifest_digest: str
    broker_key: bytes

    def binding(
        self, shard_key: bytes, observed_manifest_digest: str, device_evidence: bytes = b""
    ) -> Binding:
        """What evidence for this challenge must be bound to.

        Args:
            shard_key: X25519 public key of the shard (32 bytes).
            observed_manifest_digest: first result of `security.manifest.observe_manifest`.
            device_evidence: of the machine's devices, over `gpu_nonce(nonce)`; b"" for none.
        """
        return Binding(
            nonce=self.nonce,
            shard_key=shard_key,
            role=self.role,
            cluster=self.template.cluster,
            instance=self.instance,
            broker_key=self.broker_key,
            policy_digest=self.policy_digest,
            manifest_digest=observed_manifest_digest,
            gpu_evidence_digest=evidence_digest(device_evidence),
        )


@dataclass(frozen=True, slots=True)
class VerifiedRoster:
    """A roster with the owner's documents that it was issued under, all verified."""

    roster: Roster
    template: PlanTemplate
    policy: Policy


def open_roster_reply(
    reply: bytes,
    owner_public: bytes,
    instance: str,
    now: int | None = None,
    after_serial: int = 0,
) -> VerifiedRoster:
    """Verifies a serialised GetRosterReply from the owner's key alone.

    Args:
        reply: what `BrokerClient.get_roster` returned, by whatever way it came.
        owner_public: the pinned key of the owner (32 bytes).
        instance: the instance that the caller wants to talk to.
        now: Unix time in seconds; the machine's clock if not given.
        after_serial: rosters up to this serial are refused as out of date.

    Raises:
        SecurityError: a signature, digest, instance, expiry or role does not hold.
    """
    message = broker_pb2.GetRosterReply()
    try:
        message.ParseFromString(reply)
    except DecodeError:
        raise MalformedInput("roster reply: expected a GetRosterReply, found another") from None
    policy, policy_digest, template, template_digest, broker_key = open_plan(
        message.policy, message.template, message.certificate, owner_public
    )
    expectation = RosterExpectation(
        instance=instance,
        cluster=template.cluster,
        template_digest=template_digest,
        policy_digest=policy_digest,
        manifest_digest=template.manifest_digest,
        roles=tuple(role.name for role in template.roles),
        after_serial=after_serial,
    )
    roster = open_roster(
        message.roster, broker_key, expectation, int(time.time()) if now is None else now
    )
    return VerifiedRoster(roster, template, policy)


class BrokerClient:
    """A connection to a broker, made when it is first needed and again when it is lost.

    Every method raises `BrokerUnreachable` if there is no answer within `CALL_TIMEOUT_S`, and
    `AdmissionRefused` with the broker's code and reason if the broker refuses.

    Args:
        address: "host:port".
        owner_public: the pinned key of the owner (32 bytes).
    """

    def __init__(self, address: str, owner_public: bytes) -> None:
        self.address = address
        self._owner_public = owner_public
        self._channel = grpc.insecure_channel(address, options=_OPTIONS)
        self._stub = broker_pb2_grpc.KeyBrokerStub(self._channel)

    def __enter__(self) -> BrokerClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection; calls in progress end with BrokerUnreachable."""
        self._channel.close()

    def identity(self) -> bytes | None:
        """The broker's public key as certified by the owner; None before the first installation.

        Raises:
            SignatureInvalid: the certificate is not this owner's.
        """
        reply: broker_pb2.IdentityReply = self._call(
            lambda: self._stub.Identity(broker_pb2.IdentityRequest(), timeout=CALL_TIMEOUT_S)
        )
        if not reply.certificate:
            return None
        return open_certificate(reply.certificate, self._owner_public)

    def install(self, installation: Installation) -> int:
        """Installs signed documents; returns the generation that is installed now."""
        request = broker_pb2.InstallRequest(
            policy=installation.policy,
            template=installation.template,
            manifest=installation.manifest,
            enrolments=installation.enrolments,
            certificate=installation.certificate,
        )
        reply: broker_pb2.InstallReply = self._call(
            lambda: self._stub.Install(request, timeout=CALL_TIMEOUT_S)
        )
        return reply.generation

    def revoke(self, document: bytes) -> int:
        """Installs a signed list of revocations; returns the generation that holds now."""
        request = broker_pb2.RevokeRequest(document=document)
        reply: broker_pb2.RevokeReply = self._call(
            lambda: self._stub.Revoke(request, timeout=CALL_TIMEOUT_S)
        )
        return reply.generation

    def revocations(self) -> Revocations:
        """What the broker says is revoked; signed by the owner, but perhaps an older list.

        Raises:
            SecurityError: the list is not this owner's.
        """
        request = broker_pb2.GetRevocationsRequest()
        reply: broker_pb2.GetRevocationsReply = self._call(
            lambda: self._stub.GetRevocations(request, timeout=CALL_TIMEOUT_S)
        )
        return Revocations.open(reply.document, self._owner_public)

    def challenge(self, instance: str, role: str) -> Challenge:
        """Asks for a nonce and verifies the documents that come with it.

        Raises:
            SecurityError: the documents are not this owner's or do not belong together.
        """
        request = broker_pb2.ChallengeRequest(instance=instance, role=role)
        reply: broker_pb2.ChallengeReply = self._call(
            lambda: self._stub.Challenge(request, timeout=CALL_TIMEOUT_S)
        )
        if len(reply.nonce) != NONCE_BYTES:
            raise BrokerReplyInvalid(
                f"challenge: expected a nonce of {NONCE_BYTES} bytes, found {len(reply.nonce)}"
            )
        documents = open_installation(
            Installation(reply.policy, reply.template, reply.manifest, b"", reply.certificate),
            self._owner_public,
        )
        return Challenge(
            instance=instance,
            role=role,
            nonce=reply.nonce,
            policy=documents.policy,
            policy_digest=documents.policy_digest,
            template=documents.template,
            template_digest=documents.template_digest,
            manifest=documents.manifest,
            manifest_digest=documents.manifest_digest,
            broker_key=documents.broker_key,
        )

    def admit(
        self,
        challenge: Challenge,
        shard_private_key: X25519PrivateKey,
        *,
        link_address: str,
        ingress_address: str,
        evidence: Evidence,
        observed_manifest_digest: str,
        notes: Sequence[str] = (),
        device_evidence: bytes = b"",
        region: str | None = None,
    ) -> Membership:
        """Presents evidence; the membership uses this client but does not close it.

        Args:
            challenge: a fresh challenge.
            shard_private_key: made for this admission.
            link_address: "host:port" where peers connect.
            ingress_address: "host:port" where requests come in; "" except for the first stage.
            evidence: over ``challenge.binding(...).report_data()``.
            observed_manifest_digest: what the shard found on its disk.
            notes: what differs from the manifest, for the broker's log.
            device_evidence: what went into the binding; b"" for none.
            region: declared region of this node, if known.

        Raises:
            AdmissionRefused: with the code of the rule that does not hold.
            BrokerReplyInvalid: the secret is not sealed to this shard's key.
        """
        secret = self._admit(
            challenge,
            shard_private_key,
            link_address=link_address,
            ingress_address=ingress_address,
            evidence=evidence,
            observed_manifest_digest=observed_manifest_digest,
            notes=notes,
            device_evidence=device_evidence,
            region=region,
        )
        return Membership(self, challenge, shard_private_key, secret)

    def _admit(
        self,
        challenge: Challenge,
        shard_private_key: X25519PrivateKey,
        *,
        link_address: str,
        ingress_address: str,
        evidence: Evidence,
        observed_manifest_digest: str,
        notes: Sequence[str],
        device_evidence: bytes,
        region: str | None,
    ) -> bytes:
        shard_key = shard_private_key.public_key().public_bytes_raw()
        binding = challenge.binding(shard_key, observed_manifest_digest, device_evidence)
        request = broker_pb2.AdmitRequest(
            nonce=challenge.nonce,
            instance=challenge.instance,
            role=challenge.role,
            shard_key=shard_key,
            link_address=link_address,
            ingress_address=ingress_address,
            binding=broker_pb2.StatedBinding(
                nonce=binding.nonce,
                shard_key=binding.shard_key,
                role=binding.role,
                cluster=binding.cluster,
                instance=binding.instance,
                broker_key=binding.broker_key,
                policy_digest=binding.policy_digest,
                manifest_digest=binding.manifest_digest,
                gpu_evidence_digest=binding.gpu_evidence_digest,
            ),
            evidence_kind=evidence.kind,
            evidence=evidence.body,
            notes=[printable(note, MAX_NOTE_LENGTH) for note in notes[:MAX_NOTES]],
            device_evidence=device_evidence,
            region=region or "",
        )
        reply: broker_pb2.AdmitReply = self._call(
            lambda: self._stub.Admit(request, timeout=CALL_TIMEOUT_S)
        )
        return open_secret(
            reply.sealed_secret,
            shard_private_key,
            challenge.instance,
            challenge.role,
            challenge.nonce,
        )

    def get_roster(self, instance: str) -> bytes:
        """The serialised GetRosterReply of an instance, for `open_roster_reply`. Not verified."""
        request = broker_pb2.GetRosterRequest(instance=instance)
        reply: broker_pb2.GetRosterReply = self._call(
            lambda: self._stub.GetRoster(request, timeout=CALL_TIMEOUT_S)
        )
        return reply.SerializeToString()

    def retire(self, instance: str) -> None:
        """Has the broker forget an instance; stop its shards first, else they come back."""
        request = broker_pb2.RetireRequest(instance=instance)
        self._call(lambda: self._stub.Retire(request, timeout=CALL_TIMEOUT_S))

    def _watch(self, request: broker_pb2.WatchRequest) -> _Stream:
        stream: _Stream = self._stub.Watch(request)
        return stream

    def _renew_epoch(self, request: broker_pb2.RenewEpochRequest) -> None:
        self._call(lambda: self._stub.RenewEpoch(request, timeout=CALL_TIMEOUT_S))

    def _report(self, request: broker_pb2.ReportRequest) -> None:
        self._call(lambda: self._stub.Report(request, timeout=CALL_TIMEOUT_S))

    def _call(self, call: Callable[[], ReplyT]) -> ReplyT:
        try:
            return call()
        except grpc.RpcError as error:
            raise self._translated(error) from None
        except ValueError:  # what a closed channel raises
            raise BrokerUnreachable(f"broker at {self.address}: the client was closed") from None

    def _translated(self, error: grpc.RpcError) -> SecurityError:
        """A refusal if the broker gave a code, otherwise BrokerUnreachable."""
        failed = cast(_FailedCall, error)  # grpc does not say so in its types
        details = printable(failed.details() or "")
        for name, value in failed.trailing_metadata() or ():
            if name == CODE_METADATA:
                return AdmissionRefused(
                    printable(str(value), 64), printable(failed.details() or "")
                )
        return BrokerUnreachable(
            f"broker at {self.address}: expected an answer within {CALL_TIMEOUT_S:.0f} s, found "
            f"{failed.code().name} ({details[:200]}); check that the broker "
            "runs and that this machine reaches it"
        )


class Membership:
    """A shard's place in an instance.

    Args:
        client: used for all calls.
        challenge: the challenge that was answered.
        shard_private_key: the admitted key.
        secret: the member secret.
        readmit: asks for admission again with the same key and returns the new secret; used when
            the broker has forgotten its members.

    Attributes:
        on_ended: called, from a thread of the membership, with an epoch that the broker has ended
            because a member was revoked. Set it before `rosters` is called.
    """

    def __init__(
        self,
        client: BrokerClient,
        challenge: Challenge,
        shard_private_key: X25519PrivateKey,
        secret: bytes,
        readmit: Callable[[], bytes] | None = None,
    ) -> None:
        self.on_ended: Callable[[bytes], None] | None = None
        self._client = client
        self._challenge = challenge
        self._shard_key = shard_private_key.public_key().public_bytes_raw()
        self._secret = secret
        self._readmit = readmit
        self._changed = threading.Condition()
        self._newest: Roster | None = None
        self._taken_serial = 0
        self._lost: SecurityError | None = None
        self._closing = threading.Event()
        self._stream: _Stream | None = None
        self._watching: threading.Thread | None = None

    def rosters(self) -> Iterator[Roster]:
        """Verified rosters as they are issued, each newer than the last; blocks in between.

        The shard counts as present from the first call on, whether or not somebody waits for the
        next roster. Rosters that were overtaken by newer ones are left out. A broker that cannot
        be reached is tried again for ever; ends after `close`.

        Raises:
            MembershipLost: another shard has this role now, or the owner installed another plan.
            AdmissionRefused: the broker forgot this member and does not admit it again.
        """
        with self._changed:
            if self._watching is None:
                self._watching = threading.Thread(
                    target=self._watch, name="broker-watch", daemon=True
                )
                self._watching.start()
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: (
                        self._closing.is_set()
                        or self._lost is not None
                        or (self._newest is not None and self._newest.serial > self._taken_serial)
                    )
                )
                if self._closing.is_set():
                    return
                if self._lost is not None:
                    raise self._lost
                assert self._newest is not None
                roster = self._newest
                self._taken_serial = roster.serial
            yield roster

    def renew_epoch(self, epoch: bytes) -> None:
        """Says that an epoch is broken; without effect if it is not the current one any more.

        Raises:
            BrokerUnreachable, AdmissionRefused
        """
        challenge = self._challenge
        self._client._renew_epoch(
            broker_pb2.RenewEpochRequest(
                instance=challenge.instance,
                role=challenge.role,
                broken_epoch=epoch,
                mac=self._mac("renew", epoch),
            )
        )

    def report(self, text: str) -> None:
        """Writes one line into the broker's log; longer text is cut.

        Raises:
            BrokerUnreachable, AdmissionRefused
        """
        text = printable(text, MAX_REPORT_LENGTH)
        challenge = self._challenge
        self._client._report(
            broker_pb2.ReportRequest(
                instance=challenge.instance,
                role=challenge.role,
                text=text,
                mac=self._mac("report", text.encode()),
            )
        )

    def close(self) -> None:
        """Ends `rosters` and the connection; safe to call more than once, from any thread."""
        self._closing.set()
        with self._changed:
            stream = self._stream
            self._changed.notify_all()
        if stream is not None:
            stream.cancel()
        self._client.close()

    def _mac(self, method: str, payload: bytes) -> bytes:
        challenge = self._challenge
        return member_mac(self._secret, method, challenge.instance, challenge.role, payload)

    def _watch(self) -> None:
        """Keeps a watch stream open until the membership is closed or lost."""
        backoff = _FIRST_BACKOFF_S
        while not self._closing.is_set():
            try:
                for _ in self._stream_rosters():
                    backoff = _FIRST_BACKOFF_S
            except BrokerUnreachable as error:
                if self._closing.is_set():
                    return
                log.warning("watching for rosters: %s", error)
            except SecurityError as error:
                if self._closing.is_set():
                    return
                if not self._recover(error):
                    return
            # Jitter, so that the shards of a pipeline do not all come back in the same instant.
            self._closing.wait(backoff * random.uniform(0.5, 1.0))  # noqa: S311 - jitter, not a secret
            backoff = min(2 * backoff, _LONGEST_BACKOFF_S)

    def _stream_rosters(self) -> Iterator[None]:
        """One watch stream; yields once for each message and ends with the stream."""
        challenge = self._challenge
        with self._changed:
            known = self._newest.epoch if self._newest is not None else b""
        request = broker_pb2.WatchRequest(
            instance=challenge.instance,
            role=challenge.role,
            known_epoch=known,
            mac=self._mac("watch", known),
        )
        try:
            stream = self._client._watch(request)
            with self._changed:
                self._stream = stream
            if self._closing.is_set():
                stream.cancel()
            for reply in stream:
                if reply.roster:
                    self._receive(reply.roster)
                if reply.ended_epoch and self.on_ended is not None:
                    self.on_ended(reply.ended_epoch)
                yield
        except grpc.RpcError as error:
            raise self._client._translated(error) from None
        except ValueError:  # what a closed channel raises
            raise BrokerUnreachable("the client was closed") from None

    def _receive(self, document: bytes) -> None:
        challenge = self._challenge
        with self._changed:
            newest_serial = self._newest.serial if self._newest is not None else 0
        expectation = RosterExpectation(
            instance=challenge.instance,
            cluster=challenge.template.cluster,
            template_digest=challenge.template_digest,
            policy_digest=challenge.policy_digest,
            manifest_digest=challenge.manifest_digest,
            roles=tuple(role.name for role in challenge.template.roles),
            role=challenge.role,
            shard_key=self._shard_key,
            after_serial=newest_serial,
        )
        try:
            roster = open_roster(document, challenge.broker_key, expectation, int(time.time()))
        except RosterOutOfDate:
            return
        with self._changed:
            self._newest = roster
            self._changed.notify_all()

    def _recover(self, error: SecurityError) -> bool:
        """Decides what a failed stream means; False if the membership is lost."""
        lost: SecurityError | None = None
        if isinstance(error, AdmissionRefused):
            if error.code == UnknownMember.code and self._readmit is not None:
                lost = self._try_readmission(self._readmit)
            elif error.code in {UnknownMember.code, NotTheMember.code}:
                lost = MembershipLost(f"{self._challenge.role}: {error.reason}")
        elif isinstance(error, RosterMemberMismatch):
            lost = MembershipLost(f"{self._challenge.role}: {error}")
        if lost is None:
            log.warning("watching for rosters: %s", error)
            return True
        with self._changed:
            self._lost = lost
            self._changed.notify_all()
        return False

    def _try_readmission(self, readmit: Callable[[], bytes]) -> SecurityError | None:
        """Proves the shard again to a broker that has forgotten it; the error if that is final."""
        try:
            self._secret = readmit()
        except BrokerUnreachable as error:
            log.warning("asking for admission again: %s", error)
            return None
        except SecurityError as error:
            return error
        log.info("%s: admitted again with the same key", self._challenge.role)
        return None


@dataclass(frozen=True, slots=True)
class _Candidate:
    """Everything that a shard needs to prove itself, more than once if necessary."""

    client: BrokerClient
    instance: str
    role: str
    node: str
    region: str | None
    model_dir: Path
    link_address: str
    ingress_address: str
    node_key_path: Path | None
    key: X25519PrivateKey

    def prove(self, challenge: Challenge) -> bytes:
        """Checks the model's files, gathers evidence, is admitted; returns the member secret."""
        role = next((item for item in challenge.template.roles if item.name == self.role), None)
        if role is None:
            raise UnknownRole(f"role {self.role!r}: expected one of the signed template's roles")
        observed, notes = observe_manifest(self.model_dir, challenge.manifest)
        for note in notes:
            log.error("model file differs from the signed manifest: %s", note)
        shard_key = self.key.public_key().public_bytes_raw()
        collector = choose_collector(role.evidence, self.node, self.region, self.node_key_path)
        devices = b""
        if role.trust is Trust.ATTESTED and challenge.policy.demanded_devices():
            # The devices answer first: the machine's evidence is bound to what they say.
            devices = collect_devices(
                challenge.policy.demanded_devices(), gpu_nonce(challenge.nonce)
            )
        binding = challenge.binding(shard_key, observed, devices)
        evidence = collector.collect(binding.report_data())
        return self.client._admit(
            challenge,
            self.key,
            link_address=self.link_address,
            ingress_address=self.ingress_address,
            evidence=evidence,
            observed_manifest_digest=observed,
            notes=notes,
            device_evidence=devices,
            region=self.region,
        )

    def prove_again(self, template_digest: str) -> bytes:
        """Like `prove`, with a new challenge, for the same plan only."""
        challenge = self.client.challenge(self.instance, self.role)
        if challenge.template_digest != template_digest:
            raise MembershipLost(
                f"{self.role}: expected template {template_digest}, found "
                f"{challenge.template_digest}; the owner installed another plan, start again"
            )
        return self.prove(challenge)


def request_admission(
    broker_address: str,
    owner_public: bytes,
    *,
    instance: str,
    role: str,
    node: str,
    model_dir: Path,
    link_address: str,
    ingress_address: str = "",
    node_key_path: Path | None = None,
    region: str | None = None,
) -> tuple[Challenge, Membership, X25519PrivateKey]:
    """All that a shard does to be admitted: challenge, files, fresh key, evidence, admission.

    Args:
        broker_address: "host:port" of the broker.
        owner_public: the owner's key (32 bytes).
        instance: pipeline instance.
        role: role in the plan template.
        node: name of this node, as evidence will state it.
        model_dir: the model's directory on this machine.
        link_address: "host:port" where peers connect.
        ingress_address: "host:port" where requests come in; "" except for the first stage.
        node_key_path: key file of an enrolled node, if this is one.
        region: declared region of this node, if known.

    Returns:
        The verified challenge, the membership (close it) and the shard's private key.

    Raises:
        AdmissionRefused: the broker refused; not tried again.
        BrokerUnreachable: no answer within `REACH_TIMEOUT_S`.
        SecurityError: the broker's documents are not this owner's; no evidence can be made.
    """
    client = BrokerClient(broker_address, owner_public)
    candidate = _Candidate(
        client=client,
        instance=instance,
        role=role,
        node=node,
        region=region,
        model_dir=model_dir,
        link_address=link_address,
        ingress_address=ingress_address,
        node_key_path=node_key_path,
        key=X25519PrivateKey.generate(),
    )
    deadline = time.monotonic() + REACH_TIMEOUT_S
    backoff = _FIRST_BACKOFF_S
    try:
        while True:
            try:
                # A nonce is spent by an attempt, so each attempt starts with a new challenge.
                challenge = client.challenge(instance, role)
                secret = candidate.prove(challenge)
                break
            except BrokerUnreachable as error:
                if time.monotonic() + backoff > deadline:
                    raise
                log.warning("asking for admission: %s", error)
                time.sleep(backoff)
                backoff = min(2 * backoff, _LONGEST_BACKOFF_S)
    except BaseException:
        client.close()
        raise
    membership = Membership(
        client,
        challenge,
        candidate.key,
        secret,
        readmit=lambda: candidate.prove_again(challenge.template_digest),
    )
    return challenge, membership, candidate.key


__all__ = [
    "BrokerClient",
    "Challenge",
    "Membership",
    "VerifiedRoster",
    "open_roster_reply",
    "request_admission",
]
