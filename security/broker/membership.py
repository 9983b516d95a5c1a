"""A shard's place in an instance: rosters as they come, and calls that only a member may make."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Iterator

import grpc
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from security.broker import broker_pb2
from security.broker.challenge import Challenge
from security.broker.client import FIRST_BACKOFF_S, LONGEST_BACKOFF_S, BrokerClient, Stream
from security.broker.key_broker import MAX_REPORT_LENGTH
from security.broker.members import member_mac
from security.broker.store import printable
from security.errors import (
    AdmissionRefused,
    BrokerUnreachable,
    MembershipLost,
    NotTheMember,
    RosterMemberMismatch,
    RosterOutOfDate,
    SecurityError,
    UnknownMember,
)
from security.roster import Roster, RosterExpectation, open_roster

log = logging.getLogger("bulkhead.broker")


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
        self._stream: Stream | None = None
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
        self._client.renew_epoch(
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
        self._client.report(
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
        backoff = FIRST_BACKOFF_S
        while not self._closing.is_set():
            try:
                for _ in self._stream_rosters():
                    backoff = FIRST_BACKOFF_S
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
            backoff = min(2 * backoff, LONGEST_BACKOFF_S)

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
            stream = self._client.open_watch(request)
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
            raise self._client.translated(error) from None
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
