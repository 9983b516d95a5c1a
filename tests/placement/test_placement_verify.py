from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from placement_samples import MIXED, node, plan, policy

from placement.plan import DataClass, PlanError, PlanTemplate, RoleTemplate, Trust
from placement.policy import Policy, Weakness
from placement.sealed import SealedParts
from placement.verify import (
    Claims,
    PlanRejected,
    verify_claims,
    verify_separation,
    verify_template,
)

POLICY = policy()
TEMPLATE = plan([node("a"), node("b")]).template
MIXED_POLICY = policy(MIXED)
MIXED_TEMPLATE = plan(
    [node("a"), node("b", tee=None), node("c", tee="sev-snp")], MIXED_POLICY
).template
PIN = "cd" * 48

CLAIMS = Claims(
    kind="simulated",
    trust=Trust.ATTESTED,
    node="a",
    product="",
    measurement="",
    region="eu-west-1",
    region_source="declared",
    hardened=False,
    simulated=True,
)
ENROLLED = replace(CLAIMS, kind="enrolled", trust=Trust.ENROLLED, simulated=False)
SNP = replace(CLAIMS, kind="sev-snp", product="Genoa", measurement=PIN, simulated=False)


def codes(template: PlanTemplate, asked: Policy = POLICY, digest: str = "") -> list[str]:
    with pytest.raises(PlanRejected) as caught:
        verify_template(template, asked, digest or asked.digest, SealedParts())
    return [violation.code for violation in caught.value.violations]


def claim_codes(
    claims: Claims,
    role: RoleTemplate = MIXED_TEMPLATE.roles[0],
    template: PlanTemplate = MIXED_TEMPLATE,
    asked: Policy = MIXED_POLICY,
) -> list[str]:
    with pytest.raises(PlanRejected) as caught:
        verify_claims(role, template, asked, claims)
    return [violation.code for violation in caught.value.violations]


def with_role(template: PlanTemplate, stage: int, /, **changes: object) -> PlanTemplate:
    roles = list(template.roles)
    roles[stage] = replace(roles[stage], **changes)  # type: ignore[arg-type]
    return replace(template, roles=tuple(roles))


def test_what_the_planner_makes_is_accepted() -> None:
    verify_template(TEMPLATE, POLICY, POLICY.digest, SealedParts())
    verify_template(MIXED_TEMPLATE, MIXED_POLICY, MIXED_POLICY.digest, SealedParts())


def test_the_template_must_be_for_this_policy() -> None:
    assert codes(replace(TEMPLATE, policy_digest="00" * 32)) == ["template.policy_digest"]
    other = policy(name="another")
    assert codes(TEMPLATE, other) == ["template.policy_digest"]
    assert codes(TEMPLATE, other, POLICY.digest) == ["policy.digest"]


def test_a_template_cannot_ask_for_less_trust() -> None:
    assert codes(with_role(TEMPLATE, 0, trust=Trust.ENROLLED)) == [
        "stage-0.trust",
        "stage-0.trust",
        "stage-0.trust",
        "stage-0.evidence",
        "weakness.activation_leakage",
        "weakness.unverified_output",
        "weakness.weight_oracle",
    ]


def test_all_violations_are_collected_with_expected_and_found() -> None:
    bad = with_role(with_role(TEMPLATE, 0, tp=8), 1, evidence=("tdx", "enrolled"))
    with pytest.raises(PlanRejected) as caught:
        verify_template(bad, POLICY, POLICY.digest, SealedParts())
    assert [str(violation) for violation in caught.value.violations[:2]] == [
        "stage-0.tp: expected at most 4 ranks, found 8",
        "stage-1.evidence: expected any of simulated, found tdx",
    ]
    assert len(caught.value.violations) == 3
    assert "stage-1.evidence" in str(caught.value)
    again = pickle.loads(pickle.dumps(caught.value))
    assert again.violations == caught.value.violations


def test_stage_limits_hold() -> None:
    one = plan([node("a")], policy(stages="{min: 1}")).template
    assert "template.stages" in codes(replace(one, policy_digest=POLICY.digest))


def test_a_strengthened_role_is_accepted() -> None:
    stronger = with_role(MIXED_TEMPLATE, 1, trust=Trust.ATTESTED, evidence=("simulated", "sev-snp"))
    verify_template(stronger, MIXED_POLICY, MIXED_POLICY.digest, SealedParts())


ROLE_CORRUPTIONS: list[st.SearchStrategy[dict[str, object]]] = [
    st.sampled_from(
        [
            {"exposes": tuple(exposes)}
            for exposes in (
                (DataClass.PROMPT,),
                (DataClass.WEIGHTS,),
                (DataClass.ACTIVATIONS, DataClass.WEIGHTS),
                (DataClass.PROMPT, DataClass.WEIGHTS),
                (),
            )
        ]
    ),
    st.just({"trust": Trust.ENROLLED}),
    st.sampled_from(
        [
            {"evidence": kinds}
            for kinds in (
                ("enrolled",),
                ("simulated", "enrolled"),
                ("tdx",),
                ("simulated", "nvidia"),
                (),
                ("simulated", "simulated"),
            )
        ]
    ),
    st.sampled_from([{"regions": ()}, {"regions": ("us-east-1",)}, {"regions": ("", "")}]),
    st.integers(-2, 100).filter(lambda tp: not 1 <= tp <= 2).map(lambda tp: {"tp": tp}),
    st.integers(-5, 0).map(lambda size: {"memory_bytes": size}),
    st.integers(-3, 12).map(lambda layer: {"first_layer": layer}),
    st.integers(-3, 12).map(lambda layer: {"last_layer": layer}),
    st.integers(-1, 5).map(lambda stage: {"stage": stage}),
    st.text(max_size=10).map(lambda name: {"name": name}),
]

TEMPLATE_CORRUPTIONS: list[st.SearchStrategy[dict[str, object]]] = [
    st.sampled_from(["ff" * 32, "", "FF" * 32]).map(lambda value: {"policy_digest": value}),
    st.sampled_from(["", "a" * 63, "g" * 64]).map(lambda value: {"manifest_digest": value}),
    st.sampled_from(["int8", "", "Float32"]).map(lambda value: {"dtype": value}),
    st.sampled_from(["int4", "", "INT8", "bfloat16"]).map(lambda value: {"weight_format": value}),
    st.integers(-2, 0).map(lambda value: {"max_sequences": value}),
    st.integers(-2, 0).map(lambda value: {"max_instances": value}),
    st.integers(-2, 0).map(lambda value: {"expires_at": value}),
    st.integers(-2, 4).map(lambda value: {"cache_blocks": value}),
    st.integers(-2, 12).filter(lambda layers: layers != 8).map(lambda value: {"layers": value}),
    st.sampled_from(["", "a b", "x" * 300, "-x"]).map(lambda value: {"cluster": value}),
    st.lists(
        st.sampled_from([*(weakness.value for weakness in Weakness), "made_up", ""]), max_size=7
    )
    .filter(lambda names: set(names) != set(MIXED_TEMPLATE.weaknesses))
    .map(lambda names: {"weaknesses": tuple(names)}),
    st.permutations([0, 1, 2])
    .filter(lambda order: order != [0, 1, 2])
    .map(lambda order: {"roles": tuple(MIXED_TEMPLATE.roles[i] for i in order)}),
    st.integers(0, 2).map(lambda n: {"roles": MIXED_TEMPLATE.roles[:n]}),
]


@given(stage=st.integers(0, 2), changes=st.one_of(ROLE_CORRUPTIONS))
def test_every_corrupted_role_is_refused(stage: int, changes: dict[str, object]) -> None:
    before = MIXED_TEMPLATE.roles[stage]
    changed = {name: value for name, value in changes.items() if value != getattr(before, name)}
    if not changed or ("evidence" in changed and set(changed["evidence"]) < set(before.evidence)):  # type: ignore[call-overload]
        return  # unchanged, or asks for more than the policy does
    with pytest.raises((PlanRejected, PlanError)):
        verify_template(
            with_role(MIXED_TEMPLATE, stage, **changed),
            MIXED_POLICY,
            MIXED_POLICY.digest,
            SealedParts(),
        )


@given(changes=st.one_of(TEMPLATE_CORRUPTIONS))
def test_every_corrupted_template_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises((PlanRejected, PlanError)):
        verify_template(
            replace(MIXED_TEMPLATE, **changes),  # type: ignore[arg-type]
            MIXED_POLICY,
            MIXED_POLICY.digest,
            SealedParts(),
        )


@given(data=st.data())
def test_every_flipped_byte_is_refused_or_changes_the_digest(data: st.DataObject) -> None:
    encoded = bytearray(MIXED_TEMPLATE.to_bytes())
    at = data.draw(st.integers(0, len(encoded) - 1))
    encoded[at] ^= data.draw(st.integers(1, 255))
    try:
        other = PlanTemplate.from_bytes(bytes(encoded))
    except PlanError:
        return
    assert other.digest != MIXED_TEMPLATE.digest


def test_claims_that_fit_are_accepted() -> None:
    first, middle, last = MIXED_TEMPLATE.roles
    verify_claims(first, MIXED_TEMPLATE, MIXED_POLICY, CLAIMS)
    verify_claims(last, MIXED_TEMPLATE, MIXED_POLICY, SNP)
    verify_claims(middle, MIXED_TEMPLATE, MIXED_POLICY, ENROLLED)
    # Real evidence covers an enrolled role too.
    verify_claims(middle, MIXED_TEMPLATE, MIXED_POLICY, SNP)


@pytest.mark.parametrize(
    ("claims", "code"),
    [
        (replace(CLAIMS, kind="tdx", simulated=False), "claims.kind"),
        (replace(CLAIMS, trust=Trust.ENROLLED), "claims.trust"),
        (replace(CLAIMS, simulated=False), "claims.simulated"),
        (replace(SNP, simulated=True), "claims.simulated"),
        (replace(SNP, measurement="00" * 48), "claims.measurement"),
        (replace(SNP, measurement=""), "claims.measurement"),
        (replace(CLAIMS, region="us-east-1"), "claims.region"),
        (replace(CLAIMS, region=None), "claims.region"),
        (replace(CLAIMS, region_source="guessed"), "claims.region_source"),
        (ENROLLED, "claims.kind"),
        (replace(ENROLLED, trust=Trust.ATTESTED), "claims.kind"),
    ],
)
def test_claims_that_do_not_fit_are_refused(claims: Claims, code: str) -> None:
    assert code in claim_codes(claims)


def test_simulated_evidence_does_not_stand_for_an_enrolled_key() -> None:
    assert claim_codes(CLAIMS, MIXED_TEMPLATE.roles[1]) == ["claims.kind"]


def test_a_role_of_another_template_is_refused() -> None:
    loosened = replace(MIXED_TEMPLATE.roles[0], regions=())
    assert "claims.role" in claim_codes(CLAIMS, loosened)


def test_a_weakness_must_be_accepted_and_shown() -> None:
    strict = policy(MIXED, accept="[simulated_tee, unpinned_measurement, activation_leakage]")
    assert claim_codes(CLAIMS, asked=strict) == ["weakness.unhardened"]
    verify_claims(MIXED_TEMPLATE.roles[0], MIXED_TEMPLATE, strict, replace(CLAIMS, hardened=True))
    silent = replace(MIXED_TEMPLATE, weaknesses=())
    assert set(claim_codes(CLAIMS, template=silent)) == {
        "weakness.simulated_tee",
        "weakness.unhardened",
        "weakness.unpinned_measurement",
    }


def test_device_evidence_that_is_asked_for_is_demanded() -> None:
    asked = policy(evidence="[simulated, nvidia]")
    made = plan([node("a")], asked).template
    assert claim_codes(CLAIMS, made.roles[0], made, asked) == ["claims.devices"]
    verify_claims(made.roles[0], made, asked, replace(CLAIMS, devices=("nvidia",)))


def test_separate_nodes_are_checked_on_claims() -> None:
    apart = policy(separate_nodes="true")
    together = {"stage-0": CLAIMS, "stage-1": CLAIMS}
    with pytest.raises(PlanRejected, match="stage-1 on a node of its own"):
        verify_separation(apart, together)
    verify_separation(POLICY, together)
    verify_separation(apart, {**together, "stage-1": replace(CLAIMS, node="b")})


def test_verifying_changes_nothing() -> None:
    before = copy.deepcopy(MIXED_TEMPLATE.to_document())
    verify_template(MIXED_TEMPLATE, MIXED_POLICY, MIXED_POLICY.digest, SealedParts())
    assert MIXED_TEMPLATE.to_document() == before
