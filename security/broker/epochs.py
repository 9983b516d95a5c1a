"""Epochs: issues the signed roster of an instance whose members are all there.

Whenever membership changed or a member says that the current epoch is broken, the instance needs a
new epoch; it is issued once every role is admitted and watching.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from security.broker.documents import OwnedDocuments
from security.broker.instances import Instance
from security.broker.journal import Journal
from security.broker.store import BrokerStore
from security.errors import StateUnwritable, TemplateExpired
from security.roster import EPOCH_BYTES, LIFETIME_S, Roster
from security.signing import sign

log = logging.getLogger("bulkhead.broker")


class Epochs:
    """Issues rosters with serials that only grow; used under the broker's lock.

    Args:
        store: keeps the serial.
        journal: the audit log.
        clock: Unix time in seconds.
        random: gives that many random bytes.
        broker_key: signs rosters.
    """

    def __init__(
        self,
        store: BrokerStore,
        journal: Journal,
        clock: Callable[[], float],
        random: Callable[[int], bytes],
        broker_key: Ed25519PrivateKey,
    ) -> None:
        self._store = store
        self._journal = journal
        self._clock = clock
        self._random = random
        self._key = broker_key
        self._serial = store.serial()

    def issue(self, instance: Instance, documents: OwnedDocuments) -> None:
        """Issues a new epoch if one is needed and everybody is there to get it."""
        template = documents.template
        roles = [role.name for role in template.roles]
        if not instance.needs_epoch:
            return
        if not all(name in instance.members and name in instance.watchers for name in roles):
            return
        now = int(self._clock())
        if now >= template.expires_at:
            self._journal.write("refused", instance=instance.name, code=TemplateExpired.code)
            return
        roster = Roster(
            instance=instance.name,
            cluster=template.cluster,
            epoch=self._random(EPOCH_BYTES),
            serial=self._next_serial(),
            template_digest=documents.template_digest,
            policy_digest=documents.policy_digest,
            manifest_digest=documents.manifest_digest,
            entries=tuple(instance.members[name].entry for name in roles),
            weaknesses=template.weaknesses,
            issued_at=now,
            # What the owner signed bounds what the broker signs.
            expires_at=min(now + LIFETIME_S, template.expires_at),
        )
        try:
            self._record("epoch", roster)
        except StateUnwritable as error:
            # Still needed: the next call of a member tries again.
            log.error("epoch of %s: %s", instance.name, error)
            return
        instance.roster = roster
        instance.needs_epoch = False
        instance.epoch_edition = instance.newest_edition = self._signed(roster)
        for watcher in instance.watchers.values():
            watcher.put(instance.epoch_edition)

    def prolong(self, instance: Instance, roster: Roster, documents: OwnedDocuments) -> None:
        """Signs a new edition of the current epoch when half of the roster's life is over.

        Args:
            instance: the instance.
            roster: its current roster.
            documents: the owner's.
        """
        now = int(self._clock())
        latest = min(now + LIFETIME_S, documents.template.expires_at)
        half_life = roster.issued_at + LIFETIME_S // 2
        if now < half_life or latest <= roster.expires_at:
            return
        renewed = replace(roster, serial=self._next_serial(), issued_at=now, expires_at=latest)
        try:
            self._record("renewed", renewed)
        except StateUnwritable as error:
            # The one before it is still good; the next call tries again.
            log.error("roster: %s", error)
            return
        instance.roster = renewed
        instance.newest_edition = self._signed(renewed)

    def _next_serial(self) -> int:
        # Milliseconds keep it growing also where the database was lost.
        return max(self._serial + 1, int(self._clock() * 1000))

    def _record(self, event: str, roster: Roster) -> None:
        """Makes a roster's serial durable before anybody sees it; raises StateUnwritable."""
        with self._store.transaction():
            self._store.save_serial(roster.serial)
            self._journal.write(event, instance=roster.instance, epoch=roster.epoch.hex())
        self._serial = roster.serial

    def _signed(self, roster: Roster) -> bytes:
        return sign("roster", roster.to_bytes(), self._key).to_bytes()
