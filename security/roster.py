"""Rosters: who is in a pipeline instance right now, signed by the key broker.

A roster names for every role the key of the shard that was admitted to it and where to reach it.
Its epoch is random; links of different epochs never talk to each other. Its serial only grows,
so an old roster cannot be shown as news.

A roster lives `LIFETIME_S`. When half of it is over the broker signs a new edition of the same
epoch with a later expiry and a higher serial, for clients that ask from then on; shards keep the
edition that their epoch began with, because their links are bound to its digest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from placement.document import MAX_INTEGER, DocumentError, Encodable, Fields, decode, encode
from placement.plan import MAX_ROLES, MAX_WEAKNESSES, NAME, REGION, WEAKNESS, Trust
from placement.verify import Claims, RegionSource
from security.errors import (
    MalformedInput,
    RosterExpired,
    RosterForOtherCluster,
    RosterForOtherInstance,
    RosterForOtherManifest,
    RosterForOtherPolicy,
    RosterForOtherTemplate,
    RosterFromFuture,
    RosterMemberMismatch,
    RosterOutOfDate,
)
from security.signing import SignedDocument, open_signed

LIFETIME_S = 24 * 3600
CLOCK_SKEW_S = 300
"""How far the broker's clock may be ahead of a verifier's."""

EPOCH_BYTES = 16
MAX_ROSTER_BYTES = 1 << 20
ADDRESS = r"(?:[A-Za-z0-9.-]{1,253}|\[[0-9A-Fa-f:.%a-z]{2,64}\]):[1-9][0-9]{0,4}"
"""Pattern of "host:port", with IPv6 addresses in brackets."""

_FORMAT = "bulkhead-roster-1"


@dataclass(frozen=True, slots=True)
class RosterEntry:
    """One member.

    Attributes:
        role: role in the plan template.
        shard_key: X25519 public key of the shard (32 bytes).
        link_address: "host:port" where the shard accepts links.
        ingress_address: "host:port" where the head accepts requests; "" for other roles.
        claims: what the member's evidence proved.
    """

    role: str
    shard_key: bytes
    link_address: str
    ingress_address: str
    claims: Claims

    def to_bytes(self) -> bytes:
        """The canonical encoding of one entry by itself."""
        return encode(_entry_document(self))

    @classmethod
    def from_bytes(cls, data: bytes) -> RosterEntry:
        """Parses what `to_bytes` wrote; raises MalformedInput."""
        try:
            return _read_entry(Fields.of(decode(data, MAX_ROSTER_BYTES), "member"))
        except DocumentError as error:
            raise MalformedInput(str(error)) from None


@dataclass(frozen=True, slots=True)
class Roster:
    """All members of one instance in one epoch.

    Attributes:
        instance: pipeline instance.
        cluster: cluster of the plan template.
        epoch: 16 random bytes.
        serial: grows with every roster that a broker issues for an instance.
        template_digest: SHA-256 (hex) of the signed template.
        policy_digest: SHA-256 (hex) of the signed policy.
        manifest_digest: SHA-256 (hex) of the signed manifest.
        entries: one for each role, in the template's order.
        weaknesses: names of the accepted weaknesses that apply.
        issued_at: Unix time in seconds.
        expires_at: Unix time in seconds.
    """

    instance: str
    cluster: str
    epoch: bytes
    serial: int
    template_digest: str
    policy_digest: str
    manifest_digest: str
    entries: tuple[RosterEntry, ...]
    weaknesses: tuple[str, ...]
    issued_at: int
    expires_at: int

    @property
    def digest(self) -> bytes:
        """SHA-256 (32 bytes) of the signed payload."""
        return hashlib.sha256(self.to_bytes()).digest()

    def entry(self, role: str) -> RosterEntry:
        """The member in a role.

        Raises:
            RosterMemberMismatch: there is none.
        """
        for entry in self.entries:
            if entry.role == role:
                return entry
        raise RosterMemberMismatch(f"roster: expected a member in role {role[:64]!r}, found none")

    @property
    def head(self) -> RosterEntry:
        """The member that takes requests: the first."""
        return self.entries[0]

    def to_bytes(self) -> bytes:
        """The canonical encoding, which is what gets signed."""
        return encode(
            {
                "format": _FORMAT,
                "instance": self.instance,
                "cluster": self.cluster,
                "epoch": self.epoch.hex(),
                "serial": self.serial,
                "template_digest": self.template_digest,
                "policy_digest": self.policy_digest,
                "manifest_digest": self.manifest_digest,
                "entries": [_entry_document(entry) for entry in self.entries],
                "weaknesses": list(self.weaknesses),
                "issued_at": self.issued_at,
                "expires_at": self.expires_at,
            }
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> Roster:
        """Parses what `to_bytes` wrote, and nothing else; raises MalformedInput."""
        try:
            reader = Fields.of(decode(data, MAX_ROSTER_BYTES), "roster")
            reader.text("format", 32, _FORMAT)
            roster = cls(
                instance=reader.text("instance", 128, NAME),
                cluster=reader.text("cluster", 128, NAME),
                epoch=reader.octets("epoch", EPOCH_BYTES),
                serial=reader.integer("serial", 1, MAX_INTEGER),
                template_digest=reader.digest("template_digest"),
                policy_digest=reader.digest("policy_digest"),
                manifest_digest=reader.digest("manifest_digest"),
                entries=tuple(_read_entry(item) for item in reader.sections("entries", MAX_ROLES)),
                weaknesses=reader.texts("weaknesses", MAX_WEAKNESSES, 64, WEAKNESS),
                issued_at=reader.integer("issued_at", 0, MAX_INTEGER),
                expires_at=reader.integer("expires_at", 0, MAX_INTEGER),
            )
            reader.finish()
        except DocumentError as error:
            raise MalformedInput(str(error)) from None
        roles = [entry.role for entry in roster.entries]
        if not roles or len(set(roles)) != len(roles):
            raise MalformedInput("roster.entries: expected at least one member, no role twice")
        if roster.to_bytes() != data:
            raise MalformedInput("roster: expected the canonical encoding, found another one")
        return roster


def _entry_document(entry: RosterEntry) -> Mapping[str, Encodable]:
    claims = entry.claims
    return {
        "role": entry.role,
        "shard_key": entry.shard_key.hex(),
        "link_address": entry.link_address,
        "ingress_address": entry.ingress_address,
        "claims": {
            "kind": claims.kind,
            "trust": claims.trust,
            "node": claims.node,
            "product": claims.product,
            "measurement": claims.measurement,
            "region": claims.region,
            "region_source": claims.region_source,
            "hardened": claims.hardened,
            "simulated": claims.simulated,
            "devices": list(claims.devices),
        },
    }


def _read_entry(reader: Fields) -> RosterEntry:
    claims = reader.section("claims")
    ingress = reader.free_text("ingress_address", 320)
    entry = RosterEntry(
        role=reader.text("role", 32, NAME),
        shard_key=reader.octets("shard_key", 32),
        link_address=reader.text("link_address", 320, ADDRESS),
        ingress_address=reader.text("ingress_address", 320, ADDRESS) if ingress else "",
        claims=Claims(
            kind=claims.text("kind", 128, NAME),
            trust=claims.choice("trust", Trust),
            node=claims.text("node", 128, NAME),
            product=claims.free_text("product", 64),
            measurement=claims.free_text("measurement", 128),
            region=claims.optional_text("region", 64, REGION),
            region_source=claims.choice("region_source", RegionSource),
            hardened=claims.boolean("hardened"),
            simulated=claims.boolean("simulated"),
            devices=claims.texts("devices", 16, 64),
        ),
    )
    claims.finish()
    reader.finish()
    return entry


@dataclass(frozen=True, slots=True)
class RosterExpectation:
    """What a roster must say to be of use to the reader.

    Attributes:
        instance: pipeline instance.
        cluster: cluster of the plan template.
        template_digest: SHA-256 (hex) of the template that the reader works under.
        policy_digest: SHA-256 (hex) of the policy that the reader works under.
        manifest_digest: SHA-256 (hex) of the manifest that the reader works under.
        roles: names of all roles, in the template's order.
        role: the reader's own role; "" for a client.
        shard_key: the reader's own public key; empty for a client.
        after_serial: highest serial that the reader has seen.
    """

    instance: str
    cluster: str
    template_digest: str
    policy_digest: str
    manifest_digest: str
    roles: tuple[str, ...]
    role: str = ""
    shard_key: bytes = b""
    after_serial: int = 0


def open_roster(
    document: SignedDocument | bytes,
    broker_public: bytes,
    expectation: RosterExpectation,
    now: int,
) -> Roster:
    """Checks a signed roster in every respect and returns it.

    Args:
        document: the signed roster.
        broker_public: key of the broker that the owner certified (32 bytes).
        expectation: what the reader knows.
        now: Unix time in seconds.

    Raises:
        MalformedInput, WrongDocumentKind, SignatureInvalid: it is not a roster of this broker.
        RosterError: one of its kinds, by the first check that fails.
    """
    roster = Roster.from_bytes(open_signed("roster", document, broker_public))
    for found, expected, error, what in (
        (roster.instance, expectation.instance, RosterForOtherInstance, "instance"),
        (roster.cluster, expectation.cluster, RosterForOtherCluster, "cluster"),
        (roster.policy_digest, expectation.policy_digest, RosterForOtherPolicy, "policy"),
        (roster.manifest_digest, expectation.manifest_digest, RosterForOtherManifest, "manifest"),
        (roster.template_digest, expectation.template_digest, RosterForOtherTemplate, "template"),
    ):
        if found != expected:
            raise error(f"roster: expected {what} {expected}, found {found}")
    if roster.issued_at > now + CLOCK_SKEW_S:
        raise RosterFromFuture(
            f"roster: expected one issued until {now + CLOCK_SKEW_S}, found {roster.issued_at}; "
            "set this machine's clock"
        )
    if now >= roster.expires_at:
        raise RosterExpired(
            f"roster: expected one valid at {now}, found one that expired at {roster.expires_at}; "
            "ask the broker for the current one, or set this machine's clock"
        )
    if roster.serial <= expectation.after_serial:
        raise RosterOutOfDate(
            f"roster: expected a serial above {expectation.after_serial}, found {roster.serial}"
        )
    roles = tuple(entry.role for entry in roster.entries)
    if roles != expectation.roles:
        raise RosterMemberMismatch(
            f"roster: expected roles {', '.join(expectation.roles)}, found {', '.join(roles)}"
        )
    if expectation.role and roster.entry(expectation.role).shard_key != expectation.shard_key:
        raise RosterMemberMismatch(
            f"roster: expected this shard's own key in role {expectation.role}, found another; "
            "another shard has taken the role"
        )
    return roster
