"""Checks a plan template, and what a machine has proved, against the owner's policy.

This is the trusted half of placement: the key broker runs it, and it shares no code with the
planner. It works on the template that the owner signed and on claims that evidence proved, never
on labels. Every rule is stated positively; what no rule allows is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum

from placement.plan import DataClass, PlanTemplate, RoleTemplate, Trust
from placement.policy import (
    ENROLLED_EVIDENCE,
    MACHINE_EVIDENCE,
    Ingress,
    Policy,
    Weakness,
)
from placement.sealed import SealedParts

UNIDENTIFIED = "unidentified"
"""Node of a machine whose evidence masks which one it is."""


class RegionSource(StrEnum):
    """How the broker knows a machine's region."""

    DECLARED = "declared"
    """Somebody says so; shown as declared."""
    VERIFIED = "verified"
    """Evidence says so."""


@dataclass(frozen=True, slots=True)
class Claims:
    """What the broker knows about a machine after it has appraised its evidence.

    Attributes:
        kind: kind of the evidence: "enrolled" or a kind of machine evidence.
        trust: how far the evidence goes.
        node: name of the node: verified identity where the kind has one.
        product: hardware product or family, "" if the kind names none.
        measurement: what the machine runs, lower-case hex; "" if the kind measures nothing.
        region: region, or None if unknown.
        region_source: "declared" or "verified".
        hardened: whether the evidence shows an image that keeps Ray's user away from shards.
        simulated: whether the evidence comes from the simulated TEE.
        devices: kinds of device evidence (such as "nvidia") verified together with it.
    """

    kind: str
    trust: Trust
    node: str
    product: str
    measurement: str
    region: str | None
    region_source: str
    hardened: bool
    simulated: bool
    devices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Violation:
    """One rule that does not hold.

    Attributes:
        code: stable name of the rule, such as "role.trust".
        expected: what the policy asks for.
        found: what the template or the claims say.
    """

    code: str
    expected: str
    found: str

    def __str__(self) -> str:
        return f"{self.code}: expected {self.expected}, found {self.found}"


class PlanRejected(ValueError):
    """A template or a machine does not meet the policy.

    Attributes:
        violations: every rule that does not hold, in the order of checking.
    """

    def __init__(self, violations: tuple[Violation, ...]) -> None:
        self.violations = violations
        super().__init__("; ".join(str(violation) for violation in violations))

    def __reduce__(self) -> tuple[type[PlanRejected], tuple[tuple[Violation, ...]]]:
        return (PlanRejected, (self.violations,))


def verify_template(
    template: PlanTemplate, policy: Policy, policy_digest: str, sealed: SealedParts
) -> None:
    """Checks that a template asks of every role what the policy wants.

    Args:
        template: the template.
        policy: the owner's policy.
        policy_digest: an argument because the broker knows the digest of the signed bytes; it
            must be the digest of this very policy too.
        sealed: what of the model is sealed, by the signed manifest.

    Raises:
        PlanRejected: with all violations.
    """
    _raise_if_any(_template_violations(template, policy, policy_digest, sealed))


def verify_claims(
    role: RoleTemplate, template: PlanTemplate, policy: Policy, claims: Claims
) -> None:
    """Checks that a machine with these claims may take this role of this template.

    Raises:
        PlanRejected: with all violations.
    """
    _raise_if_any(_claim_violations(role, template, policy, claims))


def verify_separation(policy: Policy, claims: Mapping[str, Claims]) -> None:
    """Checks rules that concern the machines of one instance together.

    Args:
        policy: the owner's policy.
        claims: claims by role name, of every role that is admitted.

    Raises:
        PlanRejected: two roles are on one node although the policy wants separate nodes.
    """
    _raise_if_any(_separation_violations(policy, claims))


def _raise_if_any(violations: Iterator[Violation]) -> None:
    found = tuple(violations)
    if found:
        raise PlanRejected(found)


def _template_violations(
    template: PlanTemplate, policy: Policy, policy_digest: str, sealed: SealedParts
) -> Iterator[Violation]:
    if template.policy_digest != policy_digest:
        yield Violation("template.policy_digest", policy_digest, template.policy_digest)
    if policy.digest != policy_digest:
        yield Violation("policy.digest", policy_digest, policy.digest)
    if not policy.stages_min <= len(template.roles) <= policy.stages_max:
        yield Violation(
            "template.stages",
            f"{policy.stages_min} to {policy.stages_max} stages",
            f"{len(template.roles)}",
        )
    for role in template.roles:
        yield from _role_violations(role, template, policy, sealed)
    accepted = {weakness.value for weakness in policy.accept} | set(
        policy.left_open(policy.evidence)
    )
    for name in template.weaknesses:
        if name not in accepted:
            yield Violation("weakness.unaccepted", "a weakness that the policy accepts", name)
    found = {weakness.value for weakness in _template_weaknesses(template, policy, sealed)}
    for weakness in sorted(found | set(policy.left_open(_evidence_kinds(template, policy)))):
        if weakness not in template.weaknesses:
            yield Violation(
                f"weakness.{weakness}",
                f"{weakness} accepted by the policy and named by the template",
                "accepted but not named" if weakness in accepted else "not accepted",
            )


def _role_violations(
    role: RoleTemplate, template: PlanTemplate, policy: Policy, sealed: SealedParts
) -> Iterator[Violation]:
    where = f"{role.name}."
    exposed = {DataClass.ACTIVATIONS}
    if not sealed.any or sealed.read_by(role.first_layer, role.last_layer, template.layers):
        # Parts that the owner left in the clear beside sealed ones are not what is protected.
        exposed.add(DataClass.WEIGHTS)
    if role.first_layer == 0 or role.last_layer == template.layers:
        # The first stage holds the token ids, the last one the logits.
        exposed.add(DataClass.PROMPT)
    if set(role.exposes) != exposed:
        yield Violation(
            f"{where}exposes", ", ".join(sorted(exposed)), ", ".join(sorted(role.exposes))
        )
    for item in sorted(exposed | set(role.exposes)):
        least = policy.protect.least(item)
        if not role.trust.covers(least):
            yield Violation(f"{where}trust", f"{least}, because it exposes {item}", role.trust)
    allowed = policy.evidence_for(role.trust)
    for kind in role.evidence:
        if kind not in allowed:
            yield Violation(f"{where}evidence", f"any of {', '.join(allowed) or 'none'}", kind)
    if policy.regions:
        if not role.regions:
            yield Violation(f"{where}regions", f"any of {', '.join(policy.regions)}", "any region")
        for region in role.regions:
            if region not in policy.regions:
                yield Violation(f"{where}regions", f"any of {', '.join(policy.regions)}", region)
    if role.tp > policy.tensor_parallel_max:
        yield Violation(f"{where}tp", f"at most {policy.tensor_parallel_max} ranks", f"{role.tp}")


def _evidence_kinds(template: PlanTemplate, policy: Policy) -> set[str]:
    """The kinds of evidence that admit or must be shown besides."""
    kinds = {kind for role in template.roles for kind in role.evidence}
    if any(role.trust is Trust.ATTESTED for role in template.roles):
        kinds.update(policy.demanded_devices())
    return kinds


def _template_weaknesses(
    template: PlanTemplate, policy: Policy, sealed: SealedParts
) -> set[Weakness]:
    """The weaknesses that apply to any pipeline admitted under this template."""
    found: set[Weakness] = set()
    kinds = {kind for role in template.roles for kind in role.evidence}
    if "simulated" in kinds:
        found.add(Weakness.SIMULATED_TEE)
    if any(kind in MACHINE_EVIDENCE and kind not in policy.measurements for kind in kinds):
        found.add(Weakness.UNPINNED_MEASUREMENT)
    if policy.ingress is Ingress.PLAIN:
        found.add(Weakness.PLAIN_INGRESS)
    if policy.accepts(Weakness.UNHARDENED):
        # Nothing in the template keeps an unhardened node out then.
        found.add(Weakness.UNHARDENED)
    trusts = {role.trust for role in template.roles}
    if Trust.ENROLLED in trusts and policy.protect.prompt is Trust.ATTESTED:
        found.add(Weakness.ACTIVATION_LEAKAGE)
    if len(trusts) > 1:
        # In a chain of both kinds some protected stage has an enrolled neighbour.
        found.add(Weakness.UNVERIFIED_OUTPUT)
        if policy.protect.weights is Trust.ATTESTED:
            found.add(Weakness.WEIGHT_ORACLE)
    if policy.protect.weights is Trust.ATTESTED and not sealed.complete:
        # Attestation guards a shard's memory; what lies on disks in the clear it does not.
        found.add(Weakness.PLAIN_WEIGHTS)
    return found


def _claim_violations(
    role: RoleTemplate, template: PlanTemplate, policy: Policy, claims: Claims
) -> Iterator[Violation]:
    if role not in template.roles:
        yield Violation("claims.role", "a role of this template", role.name)
    if claims.kind not in role.evidence or claims.kind not in policy.evidence_for(role.trust):
        yield Violation("claims.kind", f"any of {', '.join(role.evidence)}", claims.kind)
    proves = Trust.ATTESTED if claims.kind in MACHINE_EVIDENCE else Trust.ENROLLED
    if not proves.covers(claims.trust):
        yield Violation("claims.kind", f"a kind that proves {claims.trust}", claims.kind)
    if not claims.trust.covers(role.trust):
        yield Violation("claims.trust", role.trust, claims.trust)
    if claims.simulated != (claims.kind == "simulated"):
        yield Violation("claims.simulated", f"what {claims.kind} means", str(claims.simulated))
    if claims.simulated or claims.kind == "simulated":
        yield from _weakness_violations(Weakness.SIMULATED_TEE, template, policy)
    if not claims.hardened:
        yield from _weakness_violations(Weakness.UNHARDENED, template, policy)
    pins = policy.measurements.get(claims.kind)
    if pins is not None:
        if claims.measurement not in pins:
            yield Violation(
                "claims.measurement", f"any of {', '.join(pins)}", claims.measurement or "none"
            )
    elif claims.kind != ENROLLED_EVIDENCE:
        yield from _weakness_violations(Weakness.UNPINNED_MEASUREMENT, template, policy)
    if claims.region_source not in tuple(RegionSource):
        yield Violation(
            "claims.region_source", " or ".join(RegionSource), claims.region_source[:64]
        )
    for regions in dict.fromkeys((role.regions, policy.regions)):
        if regions and claims.region not in regions:
            yield Violation(
                "claims.region", f"any of {', '.join(regions)}", claims.region or "unknown"
            )
    if role.trust is Trust.ATTESTED:
        for device in policy.demanded_devices():
            if device not in claims.devices:
                yield Violation(
                    "claims.devices", device, ", ".join(claims.devices) or "no device evidence"
                )


def _weakness_violations(
    weakness: Weakness, template: PlanTemplate, policy: Policy
) -> Iterator[Violation]:
    if not policy.accepts(weakness):
        yield Violation(f"weakness.{weakness}", "accepted by the policy", "not accepted")
    elif weakness not in template.weaknesses:
        yield Violation(f"weakness.{weakness}", "named by the template", "accepted but not named")


def _separation_violations(policy: Policy, claims: Mapping[str, Claims]) -> Iterator[Violation]:
    if not policy.separate_nodes:
        return
    first_role: dict[str, str] = {}
    for role, claim in claims.items():
        # A machine that masks its identity may be any of the others.
        masked = UNIDENTIFIED in (claim.node, *first_role)
        other = first_role.setdefault(claim.node, role)
        if masked and len(first_role) > 1:
            other = next(iter(first_role.values()))
        if other != role:
            yield Violation("claims.node", f"{role} on a node of its own", f"{other} on it too")
