"""Revocations: what the owner no longer trusts, signed with a generation.

Each list holds all of the one before, so that whoever shows the owner an old list cannot have them
sign a revocation away: the broker refuses a list that lacks one. A revocation is for good.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from placement.document import MAX_INTEGER, DocumentError, Fields, decode, encode
from placement.verify import Claims
from security.attestation import enrolled, simulated
from security.errors import (
    BrokerRefusal,
    ChipRevoked,
    InstanceRevoked,
    MalformedInput,
    MeasurementRevoked,
    NodeRevoked,
)
from security.signing import open_signed, sign

MAX_VALUES = 4096
MAX_DOCUMENT_BYTES = 2 << 20
VALUE = r"[A-Za-z0-9][A-Za-z0-9._-]{0,255}"
_FORMAT = "bulkhead-revocations-1"


class Revoked(StrEnum):
    """What can be revoked."""

    NODE = "node"
    CHIP = "chip"
    MEASUREMENT = "measurement"
    INSTANCE = "instance"


_ERRORS: dict[Revoked, type[BrokerRefusal]] = {
    Revoked.NODE: NodeRevoked,
    Revoked.CHIP: ChipRevoked,
    Revoked.MEASUREMENT: MeasurementRevoked,
    Revoked.INSTANCE: InstanceRevoked,
}


@dataclass(frozen=True, slots=True)
class Revocations:
    """Everything that an owner has revoked; the payload of a document of kind "revocation".

    Attributes:
        generation: grows with every list; 0 where nothing was ever revoked.
        values: pairs of what kind of thing, and its name or lower-case hex.
    """

    generation: int = 0
    values: frozenset[tuple[Revoked, str]] = frozenset()

    def with_one(self, kind: Revoked, value: str) -> Revocations:
        """The next list, with one more in it."""
        if kind in {Revoked.CHIP, Revoked.MEASUREMENT}:
            value = value.lower()
        return replace(self, generation=self.generation + 1, values=self.values | {(kind, value)})

    def merged(self, other: Revocations) -> Revocations:
        """All of both, of the higher generation."""
        return Revocations(max(self.generation, other.generation), self.values | other.values)

    def require_instance(self, instance: str) -> None:
        """Refuses a revoked instance; raises InstanceRevoked."""
        self._require(Revoked.INSTANCE, instance)

    def require(self, claims: Claims) -> None:
        """Refuses a machine by what its evidence proved.

        Raises:
            NodeRevoked, ChipRevoked, MeasurementRevoked
        """
        self._require(Revoked.NODE, claims.node)
        if claims.kind not in {enrolled.KIND, simulated.KIND}:
            # For these kinds the node's name is the identity of its chip.
            self._require(Revoked.CHIP, claims.node.lower())
        self._require(Revoked.MEASUREMENT, claims.measurement)

    def _require(self, kind: Revoked, value: str) -> None:
        if (kind, value) in self.values:
            raise _ERRORS[kind](
                f"{kind} {value[:128]}: expected one that the owner trusts, found one revoked by "
                f"generation {self.generation} or before"
            )

    def signed(self, owner_key: Ed25519PrivateKey) -> bytes:
        """The signed document."""
        content: dict[str, list[str]] = {
            f"{kind}s": sorted(value for found, value in self.values if found is kind)
            for kind in Revoked
        }
        payload = encode({"format": _FORMAT, "generation": self.generation, **content})
        return sign("revocation", payload, owner_key).to_bytes()

    @classmethod
    def open(cls, document: bytes, owner_public: bytes) -> Revocations:
        """Checks a signed document; none at all means that nothing is revoked.

        Raises:
            MalformedInput, WrongDocumentKind, SignatureInvalid
        """
        if not document:
            return cls()
        payload = open_signed("revocation", document, owner_public)
        try:
            reader = Fields.of(decode(payload, MAX_DOCUMENT_BYTES), "revocations")
            reader.text("format", 32, _FORMAT)
            generation = reader.integer("generation", 1, MAX_INTEGER)
            values = frozenset(
                (kind, value)
                for kind in Revoked
                for value in reader.texts(f"{kind}s", MAX_VALUES, 256, VALUE)
            )
            reader.finish()
        except DocumentError as error:
            raise MalformedInput(str(error)) from None
        return cls(generation, values)
