"""What `weights: attested` means for checkpoints that are sealed, in part, or not at all."""

from __future__ import annotations

from dataclasses import replace

import pytest
from placement_samples import node, plan, policy

from placement.plan import DataClass, PlanTemplate, Trust
from placement.planner import Infeasible
from placement.policy import Policy
from placement.sealed import SealedParts
from placement.verify import PlanRejected, verify_template

WEIGHTS = """\
version: 1
name: weights
protect: {prompt: enrolled, activations: enrolled, weights: attested}
evidence: [simulated]
ingress: sealed
accept: [simulated_tee, unhardened, unpinned_measurement]
"""
MIXABLE = "[simulated_tee, unhardened, unpinned_measurement, plain_weights, weight_oracle, "
ALL = SealedParts(frozenset(range(8)), embedding=True, norm=True, head=True, complete=True)
SOME = SealedParts(frozenset({0, 1}), embedding=True)
NODES = [node("a"), node("b", tee=None)]


def codes(template: PlanTemplate, asked: Policy, sealed: SealedParts) -> list[str]:
    with pytest.raises(PlanRejected) as caught:
        verify_template(template, asked, asked.digest, sealed)
    return [violation.code for violation in caught.value.violations]


def test_protected_weights_have_to_be_sealed_or_plain_ones_accepted() -> None:
    strict, lenient = policy(WEIGHTS), policy(WEIGHTS, accept=MIXABLE.rstrip(", ") + "]")
    made = plan(NODES, strict, sealed=ALL)
    verify_template(made.template, strict, strict.digest, ALL)
    assert "plain_weights" not in made.template.weaknesses
    for sealed, found in ((SealedParts(), "the whole model"), (SOME, "parts of the model")):
        with pytest.raises(Infeasible, match=f"{found} would lie in the clear.*plain_weights"):
            plan(NODES, strict, sealed=sealed)
        # A planner that says otherwise is found out by the manifest.
        assert "weakness.plain_weights" in codes(made.template, strict, sealed)
        named = plan(NODES, lenient, sealed=sealed)
        assert "plain_weights" in named.template.weaknesses
        verify_template(named.template, lenient, lenient.digest, sealed)


def test_weights_that_the_policy_does_not_protect_may_lie_in_the_clear() -> None:
    asked = policy(WEIGHTS, protect="{prompt: attested, activations: attested, weights: enrolled}")
    made = plan(NODES, asked)
    assert "plain_weights" not in made.template.weaknesses
    verify_template(made.template, asked, asked.digest, SealedParts())


def test_stages_without_sealed_parts_may_be_enrolled_where_both_dangers_are_accepted() -> None:
    asked = policy(WEIGHTS, accept=MIXABLE + "unverified_output]")
    made = plan(NODES, asked, sealed=SOME, layer_splits=(4,))
    first, last = made.template.roles
    assert (first.trust, last.trust) == (Trust.ATTESTED, Trust.ENROLLED)
    assert DataClass.WEIGHTS in first.exposes
    assert DataClass.WEIGHTS not in last.exposes
    assert {"weight_oracle", "unverified_output"} <= set(made.template.weaknesses)
    verify_template(made.template, asked, asked.digest, SOME)

    # The same roles over a checkpoint whose last layer is sealed, too, or in which nothing is.
    for sealed in (replace(SOME, layers=frozenset({0, 7})), SealedParts()):
        assert codes(made.template, asked, sealed)[:2] == ["stage-1.exposes", "stage-1.trust"]
    # Less than that, and all stages are attested.
    for missing in ("weight_oracle, ", "unverified_output"):
        cautious = policy(WEIGHTS, accept=(MIXABLE + "unverified_output]").replace(missing, ""))
        roles = plan(
            [node("a"), node("b")], cautious, sealed=SOME, layer_splits=(4,)
        ).template.roles
        assert {role.trust for role in roles} == {Trust.ATTESTED}
    # Before there are cut points, sealed parts may be anywhere.
    free = plan([node("a"), node("b")], asked, sealed=SOME, stages=2)
    assert {role.trust for role in free.template.roles} == {Trust.ATTESTED}
    assert any("parts of the model are sealed" in note for note in free.notes)


@pytest.mark.parametrize(
    ("sealed", "reads"),
    [
        (SealedParts(layers=frozenset({3})), (False, True, False)),
        (SealedParts(embedding=True), (True, False, False)),
        (SealedParts(norm=True), (False, False, True)),
        (SealedParts(head=True), (False, False, True)),
        (SealedParts(), (False, False, False)),
    ],
)
def test_a_stage_reads_its_layers_and_its_ends(
    sealed: SealedParts, reads: tuple[bool, ...]
) -> None:
    spans = ((0, 3), (3, 5), (5, 8))
    assert tuple(sealed.read_by(first, last, 8) for first, last in spans) == reads
    assert sealed.any is any(reads)
