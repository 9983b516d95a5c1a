"""A roster as a client gets it, verified from the owner's key alone."""

from __future__ import annotations

import time
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from placement.plan import PlanTemplate
from placement.policy import Policy
from security.broker import broker_pb2
from security.broker.documents import open_plan
from security.errors import MalformedInput
from security.roster import Roster, RosterExpectation, open_roster


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
