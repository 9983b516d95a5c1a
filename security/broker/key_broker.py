"""The key broker without its network: who is admitted, and which roster is current.

Rules, in the order in which an admission meets them: something is installed and not expired; the
nonce is ours, fresh, unused and for this role and instance; what the evidence is bound to is what
this broker expects, field by field; the evidence is genuine; nothing of it is revoked; what it
proves is enough; there is room for the instance. Each has an error of its own in `security.errors`,
and every refusal is written to the audit log.

The parts have modules of their own: what is installed (`installed`), nonces (`nonces`), the checks
of an admission (`admission`), members (`instances`), rosters (`epochs`) and open streams
(`watcher`). This one holds the lock and the order in which things happen.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

from placement.plan import RoleTemplate
from placement.verify import Claims
from security.attestation.appraise import appraise
from security.attestation.collateral import Collateral
from security.attestation.evidence import gpu_nonce
from security.broker.admission import (
    AdmissionRequest,
    check_binding,
    check_claims,
    check_ingress,
    check_name,
    check_shape,
)
from security.broker.documents import Installation
from security.broker.epochs import Epochs
from security.broker.installed import Installed
from security.broker.instances import Instance, Instances, Member
from security.broker.journal import Journal
from security.broker.members import SECRET_BYTES, member_secret, seal_secret
from security.broker.nonces import Nonces
from security.broker.revocation import Revocations
from security.broker.store import BrokerStore
from security.broker.watcher import Watcher
from security.errors import (
    BrokerRefusal,
    GenerationRollback,
    MalformedInput,
    NoRoster,
    NothingInstalled,
    PlanReplaced,
    RevocationDropped,
    RevocationRollback,
    SecurityError,
    StateError,
    TooManyWatchers,
)
from security.roster import RosterEntry
from security.signing import public_bytes

MAX_WATCHERS = 256
MAX_REPORT_LENGTH = 500
_BOOT_BYTES = 8
_NEW_PLAN = "the owner installed a new plan"


class KeyBroker:
    """The broker's state; safe to use from several threads.

    Args:
        store: key, durable state and audit log; closed with the broker.
        owner_public: the owner's key (32 bytes).
        clock: Unix time in seconds.
        random: gives that many random bytes.
        collateral: gives the vendors' documents as they are now.
    """

    def __init__(
        self,
        store: BrokerStore,
        owner_public: bytes,
        *,
        clock: Callable[[], float] = time.time,
        random: Callable[[int], bytes] = os.urandom,
        collateral: Callable[[], Collateral] = Collateral,
    ) -> None:
        self._store = store
        self._owner_public = owner_public
        self._clock = clock
        self._random = random
        self._collateral = collateral
        self._key = store.broker_key()
        self.public_key = public_bytes(self._key)
        # Reentrant: closing a watcher calls back into the broker.
        self._lock = threading.RLock()
        self._journal = Journal(store, clock)
        self._nonces = Nonces(clock, random)
        self._instances = Instances(store, self._journal, clock, self._key)
        self._epochs = Epochs(store, self._journal, clock, random, self._key)
        self._revocations = Revocations.open(store.revocations(owner_public), owner_public)
        self._installed: Installed | None = None
        self._restore()
        self._journal.write(
            "started",
            boot=random(_BOOT_BYTES).hex(),
            generation=str(self._installed.template.generation) if self._installed else "",
            members=str(sum(len(instance.members) for instance in self._instances)),
        )

    def close(self) -> None:
        """Ends every watch stream and gives the home free for another broker."""
        with self._lock:
            self._instances.close()
        self._store.close()

    def _restore(self) -> None:
        """Takes up what was installed and who was admitted; nonces and epochs begin anew."""
        try:
            installation = self._store.load()
            if installation is not None:
                self._installed = Installed.open(installation, self._owner_public, self.public_key)
                self._instances.restore()
                # Where the broker was killed between a revocation and what follows from it.
                self._expel()
        except StateError:
            raise
        except SecurityError as error:
            # Another owner's documents, or damaged ones: as good as none.
            self._journal.write("ignored", code=error.code, reason=f"installed documents: {error}")

    # -- what the owner installs ---------------------------------------------------------------

    @property
    def certificate(self) -> bytes:
        """The signed broker certificate; empty before the first installation."""
        with self._lock:
            return self._installed.installation.certificate if self._installed else b""

    def install(self, installation: Installation, peer: str) -> int:
        """Takes over what the owner signed; returns its generation.

        The same documents again change nothing. Other documents end all instances.

        Raises:
            MalformedInput, WrongDocumentKind, SignatureInvalid, PolicyDigestMismatch,
            ManifestDigestMismatch, CertificateRefused, TemplateRejected, TemplateExpired,
            GenerationRollback
        """
        with self._journal.refusals("install", peer=peer):
            new = Installed.open(installation, self._owner_public, self.public_key)
            template = new.template
            new.require_unexpired(self._clock())
            with self._lock:
                known = self._installed
                if known is not None and installation == known.installation:
                    return template.generation
                # Also where what was installed cannot be read any more: the owner may install the
                # newest again, nobody an older one.
                newest = known.template.generation if known else 0
                least = max(self._store.generation(self._owner_public), newest + 1)
                if template.generation < least:
                    raise GenerationRollback(
                        f"template: expected a generation of at least {least}, found "
                        f"{template.generation}; sign it with a higher one"
                    )
                with self._store.transaction():
                    self._store.save_generation(self._owner_public, template.generation)
                    for instance in self._instances:
                        self._journal.write("dropped", instance=instance.name, reason=_NEW_PLAN)
                    self._store.save(installation)
                    self._journal.write(
                        "installed",
                        peer=peer,
                        generation=str(template.generation),
                        cluster=template.cluster,
                        model=template.model,
                        template=new.documents.template_digest,
                        policy=new.documents.policy_digest,
                        manifest=new.documents.manifest_digest,
                    )
                # Only now: what could not be made durable must not be forgotten here either.
                for instance in self._instances:
                    self._instances.forget(instance.name, _NEW_PLAN)
                self._installed = new
                self._nonces.clear()
            return template.generation

    @property
    def revocations(self) -> bytes:
        """The owner's newest signed list of revocations; empty for none."""
        return self._store.revocations(self._owner_public)

    def revoke(self, document: bytes, peer: str) -> int:
        """Takes over a signed list of revocations; returns its generation.

        Members that it names are members no more; the epochs that they were in end at once, and
        their instances get another when every role has a member again.

        Raises:
            MalformedInput, WrongDocumentKind, SignatureInvalid, RevocationRollback,
            RevocationDropped, StateUnwritable
        """
        with self._journal.refusals("revoke", peer=peer), self._lock:
            revocations = Revocations.open(document, self._owner_public)
            known = self._revocations
            if revocations == known:
                return known.generation
            if revocations.generation <= known.generation:
                raise RevocationRollback(
                    f"revocations: expected a generation above {known.generation}, found "
                    f"{revocations.generation}; revoke again"
                )
            if not known.values <= revocations.values:
                kind, value = min(known.values - revocations.values)
                raise RevocationDropped(
                    f"revocations: expected all of generation {known.generation}, found none of "
                    f"{kind} {value[:128]}; revoke again with the list that this broker has"
                )
            with self._store.transaction():
                self._store.save_revocations(self._owner_public, document)
                self._journal.write(
                    "revoked",
                    peer=peer,
                    generation=str(revocations.generation),
                    added=", ".join(
                        f"{kind} {value}"
                        for kind, value in sorted(revocations.values - known.values)
                    ),
                )
            self._revocations = revocations
            self._expel()
            return revocations.generation

    def _expel(self) -> None:
        """Ends the membership of whoever is revoked, and the epochs that they are in."""
        for instance in self._instances:
            for role, member in list(instance.members.items()):
                try:
                    self._revocations.require_instance(instance.name)
                    self._revocations.require(member.entry.claims)
                except BrokerRefusal as error:
                    self._instances.expel(instance, role, error)

    def _current(self) -> Installed:
        if self._installed is None:
            raise NothingInstalled(
                "broker: expected an installed policy, template and manifest, found none; "
                "install what the owner signed"
            )
        return self._installed

    def _admissible(self, role: str) -> tuple[Installed, RoleTemplate]:
        """What is installed, unexpired, and the role's template."""
        current = self._current()
        current.require_unexpired(self._clock())
        return current, current.role(role)

    # -- admission -----------------------------------------------------------------------------

    def challenge(self, instance: str, role: str, peer: str) -> tuple[bytes, Installation]:
        """A nonce for one role of one instance, and the signed documents.

        Raises:
            MalformedInput, NothingInstalled, TemplateExpired, UnknownRole, TooManyNonces
        """
        where = {"instance": instance, "role": role, "peer": peer}
        with self._journal.refusals("challenge", **where), self._lock:
            check_name("instance", instance)
            current, _ = self._admissible(role)
            self._revocations.require_instance(instance)
            return self._nonces.issue(instance, role, peer), current.installation

    def admit(self, request: AdmissionRequest, peer: str) -> bytes:
        """Admits a shard to a role, replacing the role's member if there is one.

        Returns:
            The member secret, sealed to the shard's key.

        Raises:
            MalformedInput, BrokerRefusal, AppraisalError: one of their kinds, for the first rule
            that does not hold.
        """
        where = {"instance": request.instance, "role": request.role, "peer": peer}
        with self._journal.refusals("admit", **where):
            with self._lock:
                check_shape(request)
                current, role = self._admissible(request.role)
                check_ingress(request, role)
                self._nonces.spend(request.nonce, request.instance, request.role)
                check_binding(request, current.documents, self.public_key)
            # Without the lock: reference manifests of eight GPUs take a while.
            claims = appraise(
                request.evidence,
                request.binding.report_data(),
                role,
                current.policy,
                enrolments=current.enrolments,
                now=int(self._clock()),
                collateral=self._collateral(),
                device_evidence=request.device_evidence,
                region=request.region or None,
                device_nonce=gpu_nonce(request.nonce),
            )
            return self._admitted(request, current, role, claims, where)

    def _admitted(
        self,
        request: AdmissionRequest,
        current: Installed,
        role: RoleTemplate,
        claims: Claims,
        where: dict[str, str],
    ) -> bytes:
        """Makes the owner of appraised evidence a member; returns its sealed secret."""
        with self._lock:
            if current is not self._installed:
                raise PlanReplaced(
                    f"{role.name}: expected the plan that the challenge was for, found another; "
                    "ask for a new challenge"
                )
            self._revocations.require_instance(request.instance)
            self._revocations.require(claims)
            known = self._instances.find(request.instance)
            others = known.claims_beside(role.name) if known else {}
            check_claims(role, current.documents, claims, others)
            salt = self._random(SECRET_BYTES)
            secret = member_secret(
                self._key, salt, request.instance, request.role, request.shard_key
            )
            sealed = seal_secret(
                secret, request.shard_key, request.instance, request.role, request.nonce
            )
            entry = RosterEntry(
                role.name,
                request.shard_key,
                request.link_address,
                request.ingress_address,
                claims,
            )
            with self._store.transaction():
                instance = self._instances.place_for(
                    request.instance, current.template.max_instances
                )
                self._store.save_member(request.instance, salt, entry)
                self._journal.write(
                    "admitted",
                    **where,
                    node=claims.node,
                    kind=claims.kind,
                    shard_key=request.shard_key.hex()[:16],
                    link_address=request.link_address,
                )
            # Durable from here on: what is answered is not forgotten.
            self._instances.add(instance, Member(secret, entry))
            return sealed

    # -- members -------------------------------------------------------------------------------

    def watch(self, instance: str, role: str, known_epoch: bytes, mac: bytes, peer: str) -> Watcher:
        """Opens a watch stream; the member counts as present until it is closed.

        A second stream of the same member takes the place of the first.

        Raises:
            MalformedInput, UnknownMember, NotTheMember, TooManyWatchers
        """
        where = {"instance": instance, "role": role, "peer": peer}
        with self._journal.refusals("watch", **where), self._lock:
            found = self._instances.authenticated("watch", instance, role, known_epoch, mac)
            if sum(len(item.watchers) for item in self._instances) >= MAX_WATCHERS:
                raise TooManyWatchers(f"watch: expected at most {MAX_WATCHERS} streams")
            watcher = Watcher()
            previous = found.watchers.pop(role, None)
            if previous is not None:
                previous.close()
            found.watchers[role] = watcher
            watcher.on_close = lambda: self._left(found, role, watcher)
            documents = self._current().documents
            incomplete = any(item.name not in found.members for item in documents.template.roles)
            if not found.needs_epoch and found.roster and found.roster.epoch != known_epoch:
                watcher.put(found.epoch_edition)
            elif known_epoch and (known_epoch == found.ended_epoch or incomplete):
                # It was away when the epoch ended; or a role has no member, so that no epoch from
                # before can hold.
                watcher.end(known_epoch)
            self._journal.write("present", **where)
            self._epochs.issue(found, documents)
            return watcher

    def _left(self, instance: Instance, role: str, watcher: Watcher) -> None:
        with self._lock:
            if instance.watchers.get(role) is watcher:
                del instance.watchers[role]
                instance.last_active = self._clock()
                self._journal.write("absent", instance=instance.name, role=role)

    def renew_epoch(
        self, instance: str, role: str, broken_epoch: bytes, mac: bytes, peer: str
    ) -> None:
        """Has a new epoch issued, once all watch, if the broken one is still the current one.

        Raises:
            MalformedInput, UnknownMember, NotTheMember
        """
        where = {"instance": instance, "role": role}
        with self._journal.refusals("renew_epoch", **where, peer=peer), self._lock:
            found = self._instances.authenticated("renew", instance, role, broken_epoch, mac)
            if found.roster is None or found.roster.epoch != broken_epoch or found.needs_epoch:
                return
            self._journal.write("broken", **where, epoch=broken_epoch.hex())
            found.needs_epoch = True
            self._epochs.issue(found, self._current().documents)

    def report(self, instance: str, role: str, text: str, mac: bytes, peer: str) -> None:
        """Writes a member's line into the log.

        Raises:
            MalformedInput, UnknownMember, NotTheMember
        """
        where = {"instance": instance, "role": role}
        with self._journal.refusals("report", **where, peer=peer), self._lock:
            if len(text) > MAX_REPORT_LENGTH:
                raise MalformedInput(
                    f"report: expected at most {MAX_REPORT_LENGTH} characters, found {len(text)}"
                )
            self._instances.authenticated("report", instance, role, text.encode(), mac)
            self._journal.write("report", **where, text=text)

    # -- rosters -------------------------------------------------------------------------------

    def roster(self, instance: str) -> tuple[bytes, Installation]:
        """The newest edition of the current roster, and the documents to verify it with.

        Raises:
            MalformedInput, NothingInstalled, NoRoster
        """
        with self._lock:
            check_name("instance", instance)
            current = self._current()
            found = self._instances.find(instance)
            if found is None or found.roster is None:
                raise NoRoster(
                    f"instance {instance}: expected all shards admitted and watching; wait, or "
                    "look at the shards' state"
                )
            self._epochs.prolong(found, found.roster, current.documents)
            return found.newest_edition, current.installation

    def retire(self, instance: str, peer: str) -> None:
        """Forgets an instance; its shards, if any run, have to be admitted again."""
        with self._journal.refusals("retire", instance=instance, peer=peer), self._lock:
            check_name("instance", instance)
            if self._instances.find(instance) is not None:
                self._instances.drop(instance, "retired")
