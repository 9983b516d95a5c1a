"""Who is a member of which instance, in memory and on disk."""

from __future__ import annotations

import hmac
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from placement.verify import Claims
from security.broker.admission import check_name
from security.broker.journal import Journal
from security.broker.members import member_mac, member_secret
from security.broker.store import BrokerStore
from security.broker.watcher import Watcher
from security.errors import (
    BrokerRefusal,
    NotTheMember,
    StateUnwritable,
    TooManyInstances,
    UnknownMember,
)
from security.roster import Roster, RosterEntry

log = logging.getLogger("bulkhead.broker")

INSTANCE_IDLE_S = 3600.0
"""How long an instance without any watcher keeps its place when another one needs it."""


@dataclass(frozen=True, slots=True)
class Member:
    """Who was admitted to a role, with the secret of that admission."""

    secret: bytes = field(repr=False)
    entry: RosterEntry


@dataclass(slots=True)
class Instance:
    """One pipeline instance.

    Attributes:
        members, watchers: by role.
        needs_epoch: whether its members or epoch have changed since the last roster.
        roster: the current one; None where there is none.
        epoch_edition: the signed edition that shards have; see `security.roster`.
        newest_edition: the newest signed edition, for clients.
        ended_epoch: the last epoch that was ended because a member was expelled.
    """

    name: str
    last_active: float
    members: dict[str, Member] = field(default_factory=dict)
    watchers: dict[str, Watcher] = field(default_factory=dict)
    needs_epoch: bool = True
    roster: Roster | None = None
    epoch_edition: bytes = b""
    newest_edition: bytes = b""
    ended_epoch: bytes = b""

    def claims_beside(self, role: str) -> dict[str, Claims]:
        """What members in other roles proved, by role."""
        return {name: member.entry.claims for name, member in self.members.items() if name != role}


class Instances:
    """All instances of one broker; used under its lock.

    Args:
        store: keeps members.
        journal: the audit log.
        clock: Unix time in seconds.
        broker_key: what members' secrets are derived from.
    """

    def __init__(
        self,
        store: BrokerStore,
        journal: Journal,
        clock: Callable[[], float],
        broker_key: Ed25519PrivateKey,
    ) -> None:
        self._store = store
        self._journal = journal
        self._clock = clock
        self._key = broker_key
        self._by_name: dict[str, Instance] = {}

    def __iter__(self) -> Iterator[Instance]:
        """The instances there are now; the loop's body may drop some."""
        return iter(list(self._by_name.values()))

    def restore(self) -> None:
        """Takes up who was admitted before a restart; epochs begin anew."""
        for name, salt, entry in self._store.members():
            instance = self._by_name.setdefault(name, Instance(name, self._clock()))
            secret = member_secret(self._key, salt, name, entry.role, entry.shard_key)
            instance.members[entry.role] = Member(secret, entry)

    def find(self, name: str) -> Instance | None:
        """The instance of that name, if there is one."""
        return self._by_name.get(name)

    def place_for(self, name: str, limit: int) -> Instance:
        """The instance, or a new one if there is room; forgotten ones make room.

        A new one counts from `add` on.

        Raises:
            TooManyInstances
        """
        if name in self._by_name:
            return self._by_name[name]
        now = self._clock()
        if len(self._by_name) >= limit:
            for instance in self:
                if not instance.watchers and now - instance.last_active > INSTANCE_IDLE_S:
                    self.drop(instance.name, "nobody watches it any more")
        if len(self._by_name) >= limit:
            raise TooManyInstances(
                f"instance {name}: expected at most {limit} instances, found "
                f"{', '.join(sorted(self._by_name))}; retire one, or sign a template with more"
            )
        return Instance(name, now)

    def add(self, instance: Instance, member: Member) -> None:
        """Makes somebody a member of an instance, instead of who had the role before."""
        role = member.entry.role
        self._by_name[instance.name] = instance
        instance.members[role] = member
        instance.needs_epoch = True
        instance.last_active = self._clock()
        replaced = instance.watchers.pop(role, None)
        if replaced is not None:
            replaced.close(NotTheMember(f"{role}: another shard was admitted to the role"))

    def authenticated(
        self, method: str, instance: str, role: str, payload: bytes, mac: bytes
    ) -> Instance:
        """The instance, if the call is by its member in that role.

        Raises:
            MalformedInput, UnknownMember, NotTheMember
        """
        check_name("instance", instance)
        found = self._by_name.get(instance)
        member = found.members.get(role) if found else None
        if found is None or member is None:
            raise UnknownMember(
                f"{instance} {role[:64]!r}: expected an admitted member, found none; be admitted"
            )
        if not hmac.compare_digest(mac, member_mac(member.secret, method, instance, role, payload)):
            raise NotTheMember(
                f"{instance} {role}: expected a call by its member, found another caller; another "
                "shard has been admitted to the role"
            )
        return found

    def expel(self, instance: Instance, role: str, error: BrokerRefusal) -> None:
        """Ends a membership, and the epoch that the member is in."""
        # In memory first: what is on disk is expelled again at the next start.
        del instance.members[role]
        watcher = instance.watchers.pop(role, None)
        if watcher is not None:
            watcher.close(error)
        if instance.roster is not None:
            instance.ended_epoch = instance.roster.epoch
            for other in instance.watchers.values():
                other.end(instance.ended_epoch)
        instance.roster = None
        instance.needs_epoch = True
        if not instance.members:
            del self._by_name[instance.name]
        try:
            with self._store.transaction():
                self._store.delete_member(instance.name, role)
                self._journal.write(
                    "expelled",
                    instance=instance.name,
                    role=role,
                    code=error.code,
                    epoch=instance.ended_epoch.hex(),
                )
        except StateUnwritable as failure:
            log.error("expelling %s %s: %s", instance.name, role, failure)

    def drop(self, name: str, reason: str) -> None:
        """Ends an instance for good; raises StateUnwritable."""
        with self._store.transaction():
            self._store.delete_instance(name)
            self._journal.write("dropped", instance=name, reason=reason)
        self.forget(name, reason)

    def forget(self, name: str, reason: str) -> None:
        """Ends an instance in memory; what is on disk is the caller's."""
        instance = self._by_name.pop(name)
        for role, watcher in list(instance.watchers.items()):
            watcher.close(UnknownMember(f"{name} {role}: {reason}; be admitted again"))

    def close(self) -> None:
        """Ends every watch stream."""
        for instance in self:
            for watcher in list(instance.watchers.values()):
                watcher.close()
