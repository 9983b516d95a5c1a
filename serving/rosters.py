"""Reading what a broker publishes about an instance, as a client that pins the owner's key."""

from __future__ import annotations

from security.broker.roster_reply import open_roster_reply
from serving.relay import HeadRoute

MAX_PUBLIC_BYTES = 4 << 20
"""Longest encoded set of signed documents that is read."""


def route_of(
    public: bytes,
    instance: str,
    owner_public: bytes,
    now: int,
    newest: HeadRoute | None = None,
) -> HeadRoute:
    """Verifies the signed documents of an instance and says where its head is.

    Args:
        public: a serialised GetRosterReply, by whatever way it came.
        instance: name of the instance that is expected.
        owner_public: the owner's public key (32 bytes), pinned.
        now: Unix time in seconds.
        newest: the newest route that the caller has seen. A roster that is older than its roster is
            refused: whoever delivers rosters must not lead back to a head that was replaced.

    Raises:
        SecurityError: the first check that fails.
    """
    after_serial = newest.serial - 1 if newest is not None else 0
    verified = open_roster_reply(public, owner_public, instance, now, after_serial)
    head = verified.roster.head
    return HeadRoute(
        instance=verified.roster.instance,
        address=head.ingress_address,
        shard_key=head.shard_key,
        epoch=verified.roster.epoch.hex(),
        ingress=verified.policy.ingress,
        weaknesses=verified.roster.weaknesses,
        serial=verified.roster.serial,
    )
