"""What a policy's requirements leave open is named by the template, and shown to whoever looks."""

from __future__ import annotations

from dataclasses import replace

import pytest
from placement_samples import node, plan

from placement.explain import weakness_warnings
from placement.plan import PlanTemplate
from placement.policy import Policy, parse_policy
from placement.sealed import SealedParts
from placement.verify import PlanRejected, verify_template

POLICY_TEXT = f"""
version: 1
name: opened
protect: {{prompt: attested, activations: attested, weights: attested}}
evidence: [sev-snp, nvidia]
measurements: {{sev-snp: ["{"ab" * 48}"]}}
requirements:
  sev-snp: {{open: [chip_id, host_data], roots: ["{"cd" * 32}"]}}
  nvidia: {{open: [driver]}}
ingress: sealed
accept: [unhardened, plain_weights]
"""
POLICY = parse_policy(POLICY_TEXT)
OPEN = ("open.sev-snp.chip_id", "open.sev-snp.host_data", "roots.sev-snp", "open.nvidia.driver")


def template() -> PlanTemplate:
    return plan([node("a", tee="sev-snp", gpus=1)], POLICY).template


def test_the_planner_names_it_and_the_verifier_agrees() -> None:
    assert template().weaknesses == ("unhardened", "plain_weights", *OPEN)
    verify_template(template(), POLICY, POLICY.digest, SealedParts())
    assert PlanTemplate.from_bytes(template().to_bytes()) == template()


def test_regions_are_named_as_declared() -> None:
    document = {**POLICY.to_document(), "regions": ["eu-west-1"]}
    regional = Policy.from_document(document)
    assert regional.left_open(())[0] == "declared.regions"
    made = plan([node("a", tee="sev-snp", gpus=1)], regional).template
    assert "declared.regions" in made.weaknesses
    quiet = tuple(name for name in made.weaknesses if name != "declared.regions")
    with pytest.raises(PlanRejected, match=r"declared\.regions accepted by the policy and named"):
        verify_template(replace(made, weaknesses=quiet), regional, regional.digest, SealedParts())


@pytest.mark.parametrize("name", OPEN)
def test_a_template_that_keeps_it_quiet_is_refused(name: str) -> None:
    quiet = tuple(shown for shown in template().weaknesses if shown != name)
    with pytest.raises(PlanRejected, match=f"{name} accepted by the policy and named"):
        verify_template(replace(template(), weaknesses=quiet), POLICY, POLICY.digest, SealedParts())


def test_a_template_that_opens_more_than_the_policy_is_refused() -> None:
    more = (*template().weaknesses, "open.sev-snp.csp_id")
    with pytest.raises(PlanRejected, match=r"weakness\.unaccepted.*open\.sev-snp\.csp_id"):
        verify_template(replace(template(), weaknesses=more), POLICY, POLICY.digest, SealedParts())


@pytest.mark.parametrize("field", ["roots", "rim_roots"])
def test_other_roots_of_devices_or_of_manifests_are_named(field: str) -> None:
    text = POLICY_TEXT.replace("open: [driver]", f'open: [driver], {field}: ["{"ef" * 32}"]')
    assert "roots.nvidia" in parse_policy(text).left_open(("nvidia",))
    assert "roots.nvidia" not in POLICY.left_open(("nvidia",))


def test_people_read_a_line_for_each_kind() -> None:
    assert weakness_warnings(OPEN) == (
        "sev-snp evidence: roots that the policy names count, not the vendor's",
        "sev-snp evidence: the policy leaves open chip_id, host_data",
        "nvidia evidence: the policy leaves open driver",
    )
    assert weakness_warnings(["declared.regions"]) == (
        "regions are as nodes declare them: nothing proves where a machine stands",
    )
    assert weakness_warnings(["open", "open.", "roots", "new_one"]) == (
        "open",
        "open.",
        "roots",
        "new_one",
    )
