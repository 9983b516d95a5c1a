"""The key broker without its network: who is admitted, and which roster is current.

Rules, in the order in which an admission meets them: something is installed and not expired; the
nonce is ours, fresh, unused and for this role and instance; what the evidence is bound to is what
this broker expects, field by field; the evidence is genuine; nothing of it is revoked; what it
proves is enough; there is room for the instance. Each has an error of its own in `security.errors`,
and every refusal is written to the audit log.

Epochs: whenever membership changed or a member says that the current epoch is broken, the instance
needs a new epoch; it is issued once every role is admitted and watching.
"""

from __future__ import annotations

import hmac
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from placement.plan import NAME, REGION, RoleTemplate
from placement.verify import (
    Claims,
    PlanRejected,
    verify_claims,
    verify_separation,
    verify_template,
)
from security.attestation.appraise import appraise
from security.attestation.collateral import Collateral
from security.attestation.enrolled import Enrolments
from security.attestation.evidence import (
    MAX_EVIDENCE_BYTES,
    Binding,
    Evidence,
    evidence_digest,
    gpu_nonce,
)
from security.broker.documents import (
    Installation,
    OwnedDocuments,
    open_enrolments,
    open_installation,
)
from security.broker.members import SECRET_BYTES, member_mac, member_secret, seal_secret
from security.broker.revocation import Revocations
from security.broker.store import BrokerStore, printable
from security.errors import (
    BrokerRefusal,
    CertificateRefused,
    ClaimsRejected,
    GenerationRollback,
    GpuEvidenceSwapped,
    GpuEvidenceUnexpected,
    InstanceSwapped,
    MalformedInput,
    NonceExpired,
    NonceForOtherInstance,
    NonceForOtherRole,
    NonceSwapped,
    NonceUnknown,
    NonceUsed,
    NoRoster,
    NothingInstalled,
    NotTheMember,
    PlanReplaced,
    RevocationDropped,
    RevocationRollback,
    RoleSwapped,
    SecurityError,
    ShardKeySwapped,
    StateError,
    StateUnwritable,
    TemplateExpired,
    TemplateRejected,
    TooManyInstances,
    TooManyNonces,
    TooManyWatchers,
    UnknownMember,
    UnknownRole,
    WrongBroker,
    WrongCluster,
    WrongManifest,
    WrongPolicy,
)
from security.roster import ADDRESS, EPOCH_BYTES, LIFETIME_S, Roster, RosterEntry
from security.sealing.document import sealed_parts
from security.signing import public_bytes, sign

log = logging.getLogger("bulkhead.broker")

NONCE_BYTES = 32
NONCE_LIFETIME_S = 60.0
MAX_NONCES = 4096
MAX_NONCES_PER_PEER = 64
MAX_WATCHERS = 256
MAX_NOTES = 16
MAX_NOTE_LENGTH = 512
MAX_REPORT_LENGTH = 500
_BOOT_BYTES = 8
_NEW_PLAN = "the owner installed a new plan"
INSTANCE_IDLE_S = 3600.0
"""How long an instance without any watcher keeps its place when another one needs it."""


@dataclass(frozen=True, slots=True)
class AdmissionRequest:
    """What a shard sends to be admitted; `binding` is what it states its evidence to be over."""

    nonce: bytes
    instance: str
    role: str
    shard_key: bytes
    link_address: str
    ingress_address: str
    binding: Binding
    evidence: Evidence
    notes: tuple[str, ...]
    device_evidence: bytes = b""
    region: str = ""


@dataclass(slots=True)
class _Nonce:
    instance: str
    role: str
    peer: str
    expires_at: float
    used: bool = False


@dataclass(frozen=True, slots=True)
class _Member:
    secret: bytes = field(repr=False)
    entry: RosterEntry


@dataclass(slots=True)
class _Instance:
    name: str
    last_active: float
    members: dict[str, _Member] = field(default_factory=dict)
    watchers: dict[str, Watcher] = field(default_factory=dict)
    needs_epoch: bool = True
    roster: Roster | None = None
    # The edition that shards have, and the newest one for clients; see security.roster.
    epoch_edition: bytes = b""
    # The last epoch that was ended by a revocation.
    ended_epoch: bytes = b""
    newest_edition: bytes = b""


class News(NamedTuple):
    """What a member has to hear, in this order.

    Attributes:
        ended: an epoch whose links must be closed at once; empty for none.
        roster: the newest signed roster; None for none.
    """

    ended: bytes
    roster: bytes | None


class WatchClosed(Exception):
    """A watch stream has ended without the broker having a reason to end it."""


class Watcher:
    """One open watch stream. Holds at most the newest roster that was not taken yet."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._roster: bytes | None = None
        self._ended = b""
        self._closed = False
        self._reason: BrokerRefusal | None = None
        self.on_close: Callable[[], None] | None = None

    def next(self, timeout: float) -> News:
        """Waits for news; neither of both if nothing came in `timeout` seconds.

        Both at once, so that no roster of an ended epoch can follow the word of its end.

        Raises:
            BrokerRefusal: the stream was ended by the broker, for this reason.
            WatchClosed: the other side closed the stream, or opened a newer one.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: self._roster is not None or self._closed or self._ended != b"", timeout
            )
            if self._closed:
                raise self._reason or WatchClosed
            news = News(self._ended, self._roster)
            self._ended, self._roster = b"", None
            return news

    def put(self, roster: bytes) -> None:
        """Hands over a roster, replacing one that was not taken."""
        with self._changed:
            self._roster = roster
            self._changed.notify_all()

    def end(self, epoch: bytes) -> None:
        """Says that an epoch's links must be closed before there is another roster."""
        with self._changed:
            self._roster = None
            self._ended = epoch
            self._changed.notify_all()

    def close(self, reason: BrokerRefusal | None = None) -> None:
        """Ends the stream; safe to call more than once and from any thread."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._reason = reason
            self._changed.notify_all()
        if self.on_close is not None:
            self.on_close()


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
        self._boot = random(_BOOT_BYTES).hex()
        self.public_key = public_bytes(self._key)
        # Reentrant: closing a watcher calls back into the broker.
        self._lock = threading.RLock()
        self._installation: Installation | None = None
        self._documents: OwnedDocuments | None = None
        self._enrolments = Enrolments()
        self._nonces: dict[bytes, _Nonce] = {}
        self._instances: dict[str, _Instance] = {}
        self._serial = store.serial()
        self._revocations = Revocations.open(store.revocations(owner_public), owner_public)
        self._restore()
        self._audit(
            "started",
            boot=self._boot,
            generation=str(self._documents.template.generation) if self._documents else "",
            members=str(sum(len(item.members) for item in self._instances.values())),
        )

    def close(self) -> None:
        """Ends every watch stream and gives the home free for another broker."""
        with self._lock:
            for instance in self._instances.values():
                for watcher in list(instance.watchers.values()):
                    watcher.close()
        self._store.close()

    def _restore(self) -> None:
        """Takes up what was installed and who was admitted; nonces and epochs begin anew."""
        try:
            installation = self._store.load()
            if installation is not None:
                self._documents, self._enrolments = self._open(installation)
                self._installation = installation
                self._restore_members()
        except StateError:
            raise
        except SecurityError as error:
            # Another owner's documents, or damaged ones: as good as none.
            self._audit("ignored", code=error.code, reason=f"installed documents: {error}")

    def _restore_members(self) -> None:
        for name, salt, entry in self._store.members():
            instance = self._instances.setdefault(name, _Instance(name, self._clock()))
            secret = member_secret(self._key, salt, name, entry.role, entry.shard_key)
            instance.members[entry.role] = _Member(secret, entry)
        # Where the broker was killed between a revocation and what follows from it.
        self._expel()

    # -- what the owner installs ---------------------------------------------------------------

    @property
    def certificate(self) -> bytes:
        """The signed broker certificate; empty before the first installation."""
        with self._lock:
            return self._installation.certificate if self._installation else b""

    def install(self, installation: Installation, peer: str) -> int:
        """Takes over what the owner signed; returns its generation.

        The same documents again change nothing. Other documents end all instances.

        Raises:
            MalformedInput, WrongDocumentKind, SignatureInvalid, PolicyDigestMismatch,
            ManifestDigestMismatch, CertificateRefused, TemplateRejected, TemplateExpired,
            GenerationRollback
        """
        with self._audited("install", peer=peer):
            documents, enrolments = self._open(installation)
            template = documents.template
            if self._clock() >= template.expires_at:
                raise TemplateExpired(
                    f"template: expected one valid now, found one that expired at "
                    f"{template.expires_at}; sign a new one"
                )
            with self._lock:
                if installation == self._installation:
                    return template.generation
                # Also where what was installed cannot be read any more: the owner may install the
                # newest again, nobody an older one.
                installed = self._documents.template.generation if self._documents else 0
                least = max(self._store.generation(self._owner_public), installed + 1)
                if template.generation < least:
                    raise GenerationRollback(
                        f"template: expected a generation of at least {least}, found "
                        f"{template.generation}; sign it with a higher one"
                    )
                with self._store.transaction():
                    self._store.save_generation(self._owner_public, template.generation)
                    for name in self._instances:
                        self._audit("dropped", instance=name, reason=_NEW_PLAN)
                    self._store.save(installation)
                    self._audit(
                        "installed",
                        peer=peer,
                        generation=str(template.generation),
                        cluster=template.cluster,
                        model=template.model,
                        template=documents.template_digest,
                        policy=documents.policy_digest,
                        manifest=documents.manifest_digest,
                    )
                # Only now: what could not be made durable must not be forgotten here either.
                for name in list(self._instances):
                    self._forget(name, _NEW_PLAN)
                self._installation = installation
                self._documents = documents
                self._enrolments = enrolments
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
        with self._audited("revoke", peer=peer), self._lock:
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
                self._audit(
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
        for instance in list(self._instances.values()):
            for role, member in list(instance.members.items()):
                try:
                    self._revocations.require_instance(instance.name)
                    self._revocations.require(member.entry.claims)
                except BrokerRefusal as error:
                    self._expel_member(instance, role, error)
            if not instance.members:
                del self._instances[instance.name]

    def _expel_member(self, instance: _Instance, role: str, error: BrokerRefusal) -> None:
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
        try:
            with self._store.transaction():
                self._store.delete_member(instance.name, role)
                self._audit(
                    "expelled",
                    instance=instance.name,
                    role=role,
                    code=error.code,
                    epoch=instance.ended_epoch.hex(),
                )
        except StateUnwritable as failure:
            log.error("expelling %s %s: %s", instance.name, role, failure)

    def _open(self, installation: Installation) -> tuple[OwnedDocuments, Enrolments]:
        documents = open_installation(installation, self._owner_public)
        enrolments = open_enrolments(
            installation.enrolments, self._owner_public, documents.template_digest
        )
        if documents.broker_key != self.public_key:
            raise CertificateRefused(
                f"certificate: expected this broker's key {self.public_key.hex()[:16]}..., found "
                f"{documents.broker_key.hex()[:16]}...; sign the key in broker.pub"
            )
        try:
            verify_template(
                documents.template,
                documents.policy,
                documents.policy_digest,
                sealed_parts(documents.manifest),
            )
        except PlanRejected as error:
            raise TemplateRejected(f"template: {error}") from None
        return documents, enrolments

    def _current(self) -> tuple[Installation, OwnedDocuments]:
        if self._installation is None or self._documents is None:
            raise NothingInstalled(
                "broker: expected an installed policy, template and manifest, found none; "
                "install what the owner signed"
            )
        return self._installation, self._documents

    def _admissible(self, role: str) -> tuple[Installation, OwnedDocuments, RoleTemplate]:
        """The installed documents, unexpired, and the role's template."""
        installation, documents = self._current()
        template = documents.template
        if self._clock() >= template.expires_at:
            raise TemplateExpired(
                f"template: expected one valid now, found one that expired at "
                f"{template.expires_at}; the owner must sign and install a new one"
            )
        found = next((item for item in template.roles if item.name == role), None)
        if found is None:
            raise UnknownRole(
                f"role: expected one of {', '.join(item.name for item in template.roles)}, found "
                f"{role[:64]!r}"
            )
        return installation, documents, found

    # -- admission -----------------------------------------------------------------------------

    def challenge(self, instance: str, role: str, peer: str) -> tuple[bytes, Installation]:
        """A nonce for one role of one instance, and the signed documents.

        Raises:
            MalformedInput, NothingInstalled, TemplateExpired, UnknownRole, TooManyNonces
        """
        with self._audited("challenge", instance=instance, role=role, peer=peer), self._lock:
            _check_name("instance", instance)
            installation, _, _ = self._admissible(role)
            self._revocations.require_instance(instance)
            self._make_room_for_nonce(peer)
            nonce = self._random(NONCE_BYTES)
            self._nonces[nonce] = _Nonce(instance, role, peer, self._clock() + NONCE_LIFETIME_S)
            return nonce, installation

    def _make_room_for_nonce(self, peer: str) -> None:
        # Spent nonces are remembered for one more lifetime, to tell "used" and "expired" from
        # "unknown"; dictionaries keep the order of insertion, so the first is the oldest.
        now = self._clock()
        for nonce in [n for n, s in self._nonces.items() if now > s.expires_at + NONCE_LIFETIME_S]:
            del self._nonces[nonce]
        of_peer = [n for n, s in self._nonces.items() if s.peer == peer]
        if len(of_peer) >= MAX_NONCES_PER_PEER:
            del self._nonces[of_peer[0]]
        if len(self._nonces) >= MAX_NONCES:
            raise TooManyNonces(
                f"challenges: expected at most {MAX_NONCES} outstanding; try again in a minute"
            )

    def admit(self, request: AdmissionRequest, peer: str) -> bytes:
        """Admits a shard to a role, replacing the role's member if there is one.

        Returns:
            The member secret, sealed to the shard's key.

        Raises:
            MalformedInput, BrokerRefusal, AppraisalError: one of their kinds, for the first rule
            that does not hold.
        """
        where = {"instance": request.instance, "role": request.role, "peer": peer}
        with self._audited("admit", **where):
            with self._lock:
                _check_shape(request)
                _, documents, role = self._admissible(request.role)
                if (request.ingress_address != "") != (role.stage == 0):
                    raise MalformedInput(
                        f"ingress_address: expected one for the first stage and none for others, "
                        f"found {request.ingress_address!r} for {role.name}"
                    )
                self._spend_nonce(request)
                self._check_binding(request, documents)
                enrolments = self._enrolments
            # Without the lock: reference manifests of eight GPUs take a while.
            claims = appraise(
                request.evidence,
                request.binding.report_data(),
                role,
                documents.policy,
                enrolments=enrolments,
                now=int(self._clock()),
                collateral=self._collateral(),
                device_evidence=request.device_evidence,
                region=request.region or None,
                device_nonce=gpu_nonce(request.nonce),
            )
            return self._admitted(request, documents, role, claims, where)

    def _admitted(
        self,
        request: AdmissionRequest,
        documents: OwnedDocuments,
        role: RoleTemplate,
        claims: Claims,
        where: dict[str, str],
    ) -> bytes:
        """Makes the owner of appraised evidence a member; returns its sealed secret."""
        with self._lock:
            if documents is not self._documents:
                raise PlanReplaced(
                    f"{role.name}: expected the plan that the challenge was for, found another; "
                    "ask for a new challenge"
                )
            self._revocations.require_instance(request.instance)
            self._revocations.require(claims)
            self._check_claims(request, documents, role, claims)
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
                instance = self._place_for(request.instance, documents)
                self._store.save_member(request.instance, salt, entry)
                self._audit(
                    "admitted",
                    **where,
                    node=claims.node,
                    kind=claims.kind,
                    shard_key=request.shard_key.hex()[:16],
                    link_address=request.link_address,
                )
            # Durable from here on: what is answered is not forgotten.
            self._instances[request.instance] = instance
            instance.members[role.name] = _Member(secret, entry)
            instance.needs_epoch = True
            instance.last_active = self._clock()
            replaced = instance.watchers.pop(role.name, None)
            if replaced is not None:
                replaced.close(NotTheMember(f"{role.name}: another shard was admitted to the role"))
            return sealed

    def _spend_nonce(self, request: AdmissionRequest) -> None:
        nonce = self._nonces.get(request.nonce)
        if nonce is None:
            raise NonceUnknown("nonce: expected one that this broker issued; ask for a challenge")
        used, nonce.used = nonce.used, True
        if used:
            raise NonceUsed("nonce: expected an unused one; ask for a new challenge")
        if self._clock() > nonce.expires_at:
            raise NonceExpired(
                f"nonce: expected one of the last {NONCE_LIFETIME_S:.0f} s; ask for a new challenge"
            )
        if nonce.instance != request.instance:
            raise NonceForOtherInstance(
                f"nonce: expected one for instance {request.instance}, found one for "
                f"{nonce.instance}"
            )
        if nonce.role != request.role:
            raise NonceForOtherRole(
                f"nonce: expected one for role {request.role}, found one for {nonce.role}"
            )

    def _check_binding(self, request: AdmissionRequest, documents: OwnedDocuments) -> None:
        """Compares what the evidence is said to be over, field by field, with what it must be.

        Afterwards evidence over the stated binding is evidence over the expected one.
        """
        stated = request.binding
        cluster = documents.template.cluster
        devices = evidence_digest(request.device_evidence)
        if devices and not documents.policy.demanded_devices():
            raise GpuEvidenceUnexpected(
                "evidence: expected none of devices, as the policy lists none, found some"
            )
        checks: tuple[tuple[str, str, str, type[BrokerRefusal]], ...] = (
            ("nonce", stated.nonce.hex(), request.nonce.hex(), NonceSwapped),
            ("instance", stated.instance, request.instance, InstanceSwapped),
            ("role", stated.role, request.role, RoleSwapped),
            ("shard key", stated.shard_key.hex(), request.shard_key.hex(), ShardKeySwapped),
            ("cluster", stated.cluster, cluster, WrongCluster),
            ("broker key", stated.broker_key.hex(), self.public_key.hex(), WrongBroker),
            ("policy", stated.policy_digest, documents.policy_digest, WrongPolicy),
            (
                "GPU evidence",
                stated.gpu_evidence_digest,
                devices,
                GpuEvidenceSwapped if devices else GpuEvidenceUnexpected,
            ),
        )
        for what, found, expected, error in checks:
            if found != expected:
                raise error(
                    f"evidence: expected to be bound to {what} {expected or 'none'}, found "
                    f"{found[:128]!r}"
                )
        if stated.manifest_digest != documents.manifest_digest:
            notes = "; ".join(printable(note, MAX_NOTE_LENGTH) for note in request.notes)
            raise WrongManifest(
                f"model files: expected manifest {documents.manifest_digest}, found "
                f"{stated.manifest_digest[:64]!r}: {notes or 'the shard named no file'}"
            )

    def _check_claims(
        self,
        request: AdmissionRequest,
        documents: OwnedDocuments,
        role: RoleTemplate,
        claims: Claims,
    ) -> None:
        instance = self._instances.get(request.instance)
        together = {
            name: member.entry.claims
            for name, member in (instance.members if instance else {}).items()
            if name != role.name
        }
        together[role.name] = claims
        try:
            verify_claims(role, documents.template, documents.policy, claims)
            verify_separation(documents.policy, together)
        except PlanRejected as error:
            raise ClaimsRejected(f"{role.name} on {claims.node}: {error}") from None

    def _place_for(self, name: str, documents: OwnedDocuments) -> _Instance:
        """The instance, or a new one if there is room; forgotten ones make room."""
        if name in self._instances:
            return self._instances[name]
        now = self._clock()
        limit = documents.template.max_instances
        if len(self._instances) >= limit:
            for instance in list(self._instances.values()):
                if not instance.watchers and now - instance.last_active > INSTANCE_IDLE_S:
                    self._drop(instance.name, "nobody watches it any more")
        if len(self._instances) >= limit:
            raise TooManyInstances(
                f"instance {name}: expected at most {limit} instances, found "
                f"{', '.join(sorted(self._instances))}; retire one, or sign a template with more"
            )
        return _Instance(name, now)

    # -- members -------------------------------------------------------------------------------

    def watch(self, instance: str, role: str, known_epoch: bytes, mac: bytes, peer: str) -> Watcher:
        """Opens a watch stream; the member counts as present until it is closed.

        A second stream of the same member takes the place of the first.

        Raises:
            MalformedInput, UnknownMember, NotTheMember, TooManyWatchers
        """
        with self._audited("watch", instance=instance, role=role, peer=peer), self._lock:
            found = self._authenticated("watch", instance, role, known_epoch, mac)
            if sum(len(item.watchers) for item in self._instances.values()) >= MAX_WATCHERS:
                raise TooManyWatchers(f"watch: expected at most {MAX_WATCHERS} streams")
            watcher = Watcher()
            previous = found.watchers.pop(role, None)
            if previous is not None:
                previous.close()
            found.watchers[role] = watcher
            watcher.on_close = lambda: self._left(found, role, watcher)
            if not found.needs_epoch and found.roster and found.roster.epoch != known_epoch:
                watcher.put(found.epoch_edition)
            elif known_epoch and (known_epoch == found.ended_epoch or self._incomplete(found)):
                # It was away when the epoch ended.
                watcher.end(known_epoch)
            self._audit("present", instance=instance, role=role, peer=peer)
            self._issue(found)
            return watcher

    def _incomplete(self, instance: _Instance) -> bool:
        """Whether a role has no member, so that no epoch from before can hold."""
        _, documents = self._current()
        return any(role.name not in instance.members for role in documents.template.roles)

    def _left(self, instance: _Instance, role: str, watcher: Watcher) -> None:
        with self._lock:
            if instance.watchers.get(role) is watcher:
                del instance.watchers[role]
                instance.last_active = self._clock()
                self._audit("absent", instance=instance.name, role=role)

    def renew_epoch(
        self, instance: str, role: str, broken_epoch: bytes, mac: bytes, peer: str
    ) -> None:
        """Has a new epoch issued, once all watch, if the broken one is still the current one.

        Raises:
            MalformedInput, UnknownMember, NotTheMember
        """
        with self._audited("renew_epoch", instance=instance, role=role, peer=peer), self._lock:
            found = self._authenticated("renew", instance, role, broken_epoch, mac)
            if found.roster is None or found.roster.epoch != broken_epoch or found.needs_epoch:
                return
            self._audit("broken", instance=instance, role=role, epoch=broken_epoch.hex())
            found.needs_epoch = True
            self._issue(found)

    def report(self, instance: str, role: str, text: str, mac: bytes, peer: str) -> None:
        """Writes a member's line into the log.

        Raises:
            MalformedInput, UnknownMember, NotTheMember
        """
        with self._audited("report", instance=instance, role=role, peer=peer), self._lock:
            if len(text) > MAX_REPORT_LENGTH:
                raise MalformedInput(
                    f"report: expected at most {MAX_REPORT_LENGTH} characters, found {len(text)}"
                )
            self._authenticated("report", instance, role, text.encode(), mac)
            self._audit("report", instance=instance, role=role, text=text)

    def _authenticated(
        self, method: str, instance: str, role: str, payload: bytes, mac: bytes
    ) -> _Instance:
        _check_name("instance", instance)
        found = self._instances.get(instance)
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

    # -- rosters -------------------------------------------------------------------------------

    def _issue(self, instance: _Instance) -> None:
        """Issues a new epoch if one is needed and everybody is there to get it."""
        _, documents = self._current()
        template = documents.template
        roles = [role.name for role in template.roles]
        if not instance.needs_epoch:
            return
        if not all(name in instance.members and name in instance.watchers for name in roles):
            return
        now = int(self._clock())
        if now >= template.expires_at:
            self._audit("refused", instance=instance.name, code=TemplateExpired.code)
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

    def _next_serial(self) -> int:
        # Milliseconds keep it growing also where the database was lost.
        return max(self._serial + 1, int(self._clock() * 1000))

    def _record(self, event: str, roster: Roster) -> None:
        """Makes a roster's serial durable before anybody sees it; raises StateUnwritable."""
        with self._store.transaction():
            self._store.save_serial(roster.serial)
            self._audit(event, instance=roster.instance, epoch=roster.epoch.hex())
        self._serial = roster.serial

    def _signed(self, roster: Roster) -> bytes:
        return sign("roster", roster.to_bytes(), self._key).to_bytes()

    def roster(self, instance: str) -> tuple[bytes, Installation]:
        """The newest edition of the current roster, and the documents to verify it with.

        Raises:
            MalformedInput, NothingInstalled, NoRoster
        """
        with self._lock:
            _check_name("instance", instance)
            installation, documents = self._current()
            found = self._instances.get(instance)
            if found is None or found.roster is None:
                raise NoRoster(
                    f"instance {instance}: expected all shards admitted and watching; wait, or "
                    "look at the shards' state"
                )
            now = int(self._clock())
            latest = min(now + LIFETIME_S, documents.template.expires_at)
            half_life = found.roster.issued_at + LIFETIME_S // 2
            if now >= half_life and latest > found.roster.expires_at:
                renewed = replace(
                    found.roster, serial=self._next_serial(), issued_at=now, expires_at=latest
                )
                try:
                    self._record("renewed", renewed)
                except StateUnwritable as error:
                    # The one before it is still good; the next call tries again.
                    log.error("roster: %s", error)
                else:
                    found.roster = renewed
                    found.newest_edition = self._signed(renewed)
            return found.newest_edition, installation

    def retire(self, instance: str, peer: str) -> None:
        """Forgets an instance; its shards, if any run, have to be admitted again."""
        with self._audited("retire", instance=instance, peer=peer), self._lock:
            _check_name("instance", instance)
            if instance in self._instances:
                self._drop(instance, "retired")

    def _drop(self, name: str, reason: str) -> None:
        with self._store.transaction():
            self._store.delete_instance(name)
            self._audit("dropped", instance=name, reason=reason)
        self._forget(name, reason)

    def _forget(self, name: str, reason: str) -> None:
        instance = self._instances.pop(name)
        for role, watcher in list(instance.watchers.items()):
            watcher.close(UnknownMember(f"{name} {role}: {reason}; be admitted again"))

    # -- log -----------------------------------------------------------------------------------

    def _audit(self, event: str, **fields: str) -> None:
        self._store.audit(self._clock(), event, **fields)

    @contextmanager
    def _audited(self, method: str, **fields: str) -> Iterator[None]:
        """Writes the reason of a refusal into the log."""
        try:
            yield
        except SecurityError as error:
            self._audit("refused", method=method, code=error.code, **fields, reason=str(error))
            raise
        except Exception as error:
            # A fault of ours. Its text may hold anything; its kind does not.
            reason = f"failed by {type(error).__name__}"
            self._audit("refused", method=method, code="internal_error", **fields, reason=reason)
            raise


def _check_name(what: str, value: str) -> None:
    if re.fullmatch(NAME, value) is None:
        raise MalformedInput(f"{what}: expected a name matching {NAME}, found {value[:64]!r}")


def _check_shape(request: AdmissionRequest) -> None:
    """Checks lengths and patterns before anything is looked up or hashed."""
    _check_name("instance", request.instance)
    if len(request.nonce) != NONCE_BYTES:
        raise MalformedInput(f"nonce: expected {NONCE_BYTES} bytes, found {len(request.nonce)}")
    if len(request.shard_key) != 32:
        raise MalformedInput(f"shard_key: expected 32 bytes, found {len(request.shard_key)}")
    if len(request.evidence.body) > MAX_EVIDENCE_BYTES:
        raise MalformedInput(
            f"evidence: expected at most {MAX_EVIDENCE_BYTES} bytes, found "
            f"{len(request.evidence.body)}"
        )
    if len(request.device_evidence) > MAX_EVIDENCE_BYTES:
        raise MalformedInput(
            f"device_evidence: expected at most {MAX_EVIDENCE_BYTES} bytes, found "
            f"{len(request.device_evidence)}"
        )
    for name, address in (
        ("link_address", request.link_address),
        ("ingress_address", request.ingress_address),
    ):
        if (address or name == "link_address") and re.fullmatch(ADDRESS, address) is None:
            raise MalformedInput(f"{name}: expected host:port, found {address[:64]!r}")
    if request.region and re.fullmatch(REGION, request.region) is None:
        raise MalformedInput(f"region: expected a name like eu-west, found {request.region[:64]!r}")
    if len(request.notes) > MAX_NOTES or any(len(n) > MAX_NOTE_LENGTH for n in request.notes):
        raise MalformedInput(f"notes: expected at most {MAX_NOTES} of {MAX_NOTE_LENGTH} characters")
