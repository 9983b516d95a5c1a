"""Rules, and the verdict that they add up to.

A verifier is a pure function `(evidence, collateral, policy, now) -> Verdict`. It parses, then lets
rules look at what it parsed. A rule is an object that returns nothing or raises one named error
that says what was expected and what was found; all of them are asked, and the verdict lists every
failure. Whoever admits on a verdict calls `Verdict.require`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Generic, Protocol, TypeVar

from placement.policy import Policy, Weakness
from placement.requirements import Requirements
from security.attestation.errors import (
    MeasurementNotPinned,
    MeasurementRefused,
    PinMissing,
    PinRefused,
    RevokedIdentity,
)
from security.errors import AppraisalError

__all__ = ["Check", "Expectations", "FunctionRule", "NotJudged", "Rule", "Verdict", "judge"]

SubjectT = TypeVar("SubjectT")
SubjectT_contra = TypeVar("SubjectT_contra", contravariant=True)


class NotJudged(Exception):
    """There is nothing to compare, and nothing demands that there be.

    For what a rule leaves undone without refusing: shown as neither right nor wrong.
    """


class Rule(Protocol[SubjectT_contra]):
    """One check of evidence.

    Attributes:
        name: stable, such as "snp.policy.debug"; the docs list it.
        source: document, section and field that it follows.
    """

    @property
    def name(self) -> str:
        """Stable name."""

    @property
    def source(self) -> str:
        """Vendor document, section, field."""

    def check(self, subject: SubjectT_contra) -> None:
        """Returns nothing.

        Raises:
            AppraisalError: the rule does not hold.
            NotJudged: there is nothing to compare.
        """


# Without slots: a generic alias that is called notes itself at the instance, or tries to.
@dataclass(frozen=True)
class FunctionRule(Generic[SubjectT]):
    """A rule whose check is a function.

    Attributes:
        name: stable, such as "snp.policy.debug".
        source: document, section and field that it follows.
        look: returns nothing, or raises one named error, or `NotJudged`.
        errors: what it raises; () where the table of checks reads that from `look`.
    """

    name: str
    source: str
    look: Callable[[SubjectT], None]
    errors: tuple[type[AppraisalError], ...] = ()

    def check(self, subject: SubjectT) -> None:
        """Raises what `look` raises."""
        self.look(subject)


@dataclass(frozen=True, slots=True)
class Check:
    """What came of one rule.

    Attributes:
        name: the rule's.
        source: the rule's.
        failure: why it does not hold; None where it does.
        skipped: why there was nothing to compare; "" where there was.
    """

    name: str
    source: str
    failure: AppraisalError | None = None
    skipped: str = ""


def judge(rules: Iterable[Rule[SubjectT_contra]], subject: SubjectT_contra) -> tuple[Check, ...]:
    """Asks every rule, in order."""
    checks: list[Check] = []
    for rule in rules:
        failure: AppraisalError | None = None
        skipped = ""
        try:
            rule.check(subject)
        except NotJudged as reason:
            skipped = str(reason)
        except AppraisalError as error:
            failure = error
        checks.append(Check(rule.name, rule.source, failure, skipped))
    return tuple(checks)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What evidence says and whether it holds.

    Attributes:
        kind: "sev-snp", "tdx", "azure-vtpm", "nvidia", ...
        product: product family by the vendor's name, "" if unknown.
        measurement: what the machine runs, lower-case hex (MEASUREMENT, MRTD); "" where the kind
            has none.
        identity: what names the very machine: chip id, PPID, device serials; "" if masked.
        fields: what the evidence says, by the vendor's field names, for people.
        checks: every rule that was asked, in order.
        notes: what was not judged, or was ignored, and why.
        devices: verdicts on the devices that came with it.
    """

    kind: str
    product: str
    measurement: str
    identity: str
    fields: Mapping[str, str] = field(default_factory=dict)
    checks: tuple[Check, ...] = ()
    notes: tuple[str, ...] = ()
    devices: tuple[Verdict, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "fields", MappingProxyType(dict(self.fields)))

    @property
    def failures(self) -> tuple[AppraisalError, ...]:
        """Every reason to refuse, those of the devices included."""
        own = tuple(check.failure for check in self.checks if check.failure is not None)
        return own + tuple(failure for device in self.devices for failure in device.failures)

    @property
    def holds(self) -> bool:
        """Whether every check held. Says nothing about pins unless a policy was given."""
        return not self.failures

    def require(self) -> None:
        """Returns nothing where everything holds.

        Raises:
            AppraisalError: the first failure, with the others named in a note.
        """
        failures = self.failures
        if not failures:
            return
        first = failures[0]
        for other in failures[1:]:
            first.add_note(f"{other.code}: {other}")
        raise first


@dataclass(frozen=True, slots=True)
class Expectations:
    """What a policy says about one kind; verifiers take None where nothing is pinned at all.

    Attributes:
        kind: the kind of evidence.
        requirements: pins, relaxations, revoked identities, roots.
        measurements: accepted measurements (hex); None where the policy accepts any software.
    """

    kind: str
    requirements: Requirements
    measurements: tuple[str, ...] | None

    @classmethod
    def of(cls, policy: Policy, kind: str) -> Expectations:
        """What a policy says about a kind."""
        pinned = policy.measurements.get(kind)
        if pinned is None and not policy.accepts(Weakness.UNPINNED_MEASUREMENT):
            pinned = ()
        return cls(kind, policy.requirements_for(kind), pinned)

    def require_measurement(self, what: str, found: str) -> None:
        """Compares what the machine runs with what is pinned.

        Raises:
            MeasurementNotPinned, MeasurementRefused
        """
        if self.measurements is None or found in self.measurements:
            return
        if not self.measurements:
            raise MeasurementNotPinned(
                what, f"measurements.{self.kind} in the policy", "none", "pin what you built"
            )
        raise MeasurementRefused(what, _some(self.measurements), _short(found))

    def require_pin(self, name: str, found: str) -> None:
        """Compares a value with its pin.

        Args:
            name: of the pin, as in `placement.requirements.PINS`.
            found: what the evidence says, in the pin's shape.

        Raises:
            PinMissing, PinRefused
        """
        if self.requirements.opens(name):
            return
        pinned = self.requirements.pins.get(name)
        if pinned is None:
            raise PinMissing(
                name,
                f"requirements.{self.kind}.{name} in the policy, or {name} under open",
                f"neither; the evidence says {_short(found)}",
            )
        if found not in pinned:
            raise PinRefused(name, _some(pinned), _short(found))

    def refuse_revoked(self, what: str, found: str) -> None:
        """Refuses an identity that the policy revokes.

        Args:
            what: the vendor's name of the identity.
            found: hexadecimal digits; "" where there is none.

        Raises:
            RevokedIdentity
        """
        # As numbers: tools write the same serial with and without leading zeros.
        if found and int(found, 16) in {int(text, 16) for text in self.requirements.revoked}:
            raise RevokedIdentity(what, "one that the policy does not revoke", _short(found))


def _some(values: tuple[str, ...]) -> str:
    shown = " or ".join(_short(value) for value in values[:4])
    return f"{shown} or {len(values) - 4} others" if len(values) > 4 else shown


def _short(value: str) -> str:
    return f"{value[:128]}..." if len(value) > 128 else value or "nothing"
