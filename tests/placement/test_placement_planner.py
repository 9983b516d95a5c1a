from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from placement_samples import CONFIG, GIB, MIXED, node, plan, policy, profile

from placement.cost import PROCESS_BYTES
from placement.explain import explain_infeasible, explain_plan, plan_table, weakness_warnings
from placement.inventory import Inventory
from placement.model_profile import profile_model
from placement.plan import Plan, Trust
from placement.planner import Infeasible, bind
from placement.policy import Policy
from placement.sealed import SealedParts
from placement.verify import verify_template


def used_nodes(made: Plan) -> list[str]:
    return [made.binding.nodes[role.name] for role in made.template.roles]


def ranges(made: Plan) -> list[tuple[int, int]]:
    return [(role.first_layer, role.last_layer) for role in made.template.roles]


def reasons(*arguments: object, **changes: object) -> str:
    with pytest.raises(Infeasible) as caught:
        plan(*arguments, **changes)  # type: ignore[arg-type]
    return explain_infeasible(caught.value)


def test_two_stages_use_two_nodes() -> None:
    made = plan([node("a"), node("b")])
    assert sorted(used_nodes(made)) == ["id-a", "id-b"]


def test_three_stages_use_three_nodes() -> None:
    made = plan([node("a"), node("b"), node("c")], stages=3)
    assert sorted(used_nodes(made)) == ["id-a", "id-b", "id-c"]


def test_one_node_holds_several_stages() -> None:
    made = plan([node("a")], stages=3)
    assert used_nodes(made) == ["id-a"] * 3
    assert "shares the node with stage-1, stage-2" in explain_plan(made)


def test_separate_nodes_are_refused_on_one_node() -> None:
    text = reasons([node("a")], policy(separate_nodes="true"))
    assert "2 stages on separate nodes need 2 nodes that qualify, and 1 do" in text


def test_neighbouring_stages_share_nodes() -> None:
    made = plan([node("a"), node("b")], stages=4)
    first, second, third, fourth = used_nodes(made)
    assert first == second != third == fourth


def test_many_stages_on_few_nodes_stay_in_runs() -> None:
    big = profile(num_hidden_layers=16)
    made = plan([node("a", 64 * GIB), node("b", 64 * GIB)], None, big, stages=14)
    assert sum(a != b for a, b in itertools.pairwise(used_nodes(made))) == 1


def test_default_stage_count_is_the_policys_minimum() -> None:
    assert len(plan([node("a"), node("b"), node("c")]).template.roles) == 2


def test_memory_asks_for_more_stages() -> None:
    big = profile(hidden_size=4096, intermediate_size=8192, vocab_size=1000)
    small = [node(name, 2 * GIB) for name in "abcd"]
    made = plan(small, None, big, context=64, max_sequences=1, max_step_tokens=16)
    assert len(made.template.roles) > 2
    assert len(set(used_nodes(made))) == len(made.template.roles)


def test_explicit_splits_are_taken_exactly() -> None:
    made = plan([node("a"), node("b")], layer_splits=(1, 6))
    assert ranges(made) == [(0, 1), (1, 6), (6, 8)]


@pytest.mark.parametrize("splits", [(0, 3), (3, 3), (5, 2), (8,), (-1,)])
def test_senseless_splits_are_refused(splits: tuple[int, ...]) -> None:
    assert "layer_splits" in reasons([node("a")], layer_splits=splits)


def test_splits_and_stages_must_agree() -> None:
    assert "2 cut points for 3 stages" in reasons([node("a")], layer_splits=(2,), stages=3)


def test_tensor_parallel_is_given_to_every_stage() -> None:
    made = plan([node("a")], tensor_parallel=2)
    assert [role.tp for role in made.template.roles] == [2, 2]
    assert made.estimates[0].working_bytes > 2 * PROCESS_BYTES


@pytest.mark.parametrize(("ranks", "reason"), [(3, "divisor of 4 KV heads"), (8, "1 to 4")])
def test_tensor_parallel_must_fit(ranks: int, reason: str) -> None:
    assert reason in reasons([node("a")], tensor_parallel=ranks)


def test_families_that_are_not_sharded_get_one_rank() -> None:
    whole = profile(model_type="olmo2")
    plan([node("a")], None, whole)
    assert "olmo2 is not sharded correctly" in reasons([node("a")], None, whole, tensor_parallel=2)


def test_gpu_nodes_need_a_gpu_per_rank() -> None:
    assert "1 GPUs for 2 ranks" in reasons([node("a", gpus=1)], tensor_parallel=2)


def test_the_head_counts_when_stages_are_balanced() -> None:
    # The vocabulary costs as much as several layers, so the last stage gets fewer of them.
    heavy = profile(vocab_size=4096)
    (_, first), (second, _) = ranges(plan([node("a"), node("b")], None, heavy))
    assert first == second > 4


def test_layers_are_even_without_a_heavy_head() -> None:
    light = profile(vocab_size=8)
    assert ranges(plan([node("a"), node("b")], None, light)) == [(0, 4), (4, 8)]


def test_uneven_memory_makes_uneven_stages() -> None:
    big = profile(hidden_size=4096, intermediate_size=8192, vocab_size=1000)
    made = plan(
        [node("large", 12 * GIB), node("small", 2.2 * GIB)],
        None,
        big,
        context=64,
        max_sequences=1,
        max_step_tokens=16,
    )
    layers = {
        estimate.node_name: role.layers
        for estimate, role in zip(made.estimates, made.template.roles, strict=True)
    }
    assert layers["large"] > layers["small"] >= 1


def test_memory_that_is_missing_is_named() -> None:
    text = reasons([node("a", 0.1 * GIB), node("b", 0.1 * GIB)])
    assert "more is missing" in text
    assert "offer 0.18 GiB" in text


def test_memory_in_the_wrong_place_is_named() -> None:
    # Enough in all, but no node holds the stage of seven layers.
    big = profile(hidden_size=4096, intermediate_size=8192, vocab_size=1000)
    nodes = [node(name, 3 * GIB) for name in "abc"]
    text = reasons(
        nodes, None, big, layer_splits=(7,), context=64, max_sequences=1, max_step_tokens=16
    )
    assert "stage-0 (layers 0 to 7) alone needs" in text


def test_cache_is_limited_by_the_smallest_stage() -> None:
    wide = profile(num_key_value_heads=8, head_dim=512)
    roomy = plan([node("a", 40 * GIB), node("b", 40 * GIB)], None, wide)
    # Every sequence at full length, and no more than that.
    assert roomy.template.cache_blocks == 16 * 2048 // 16
    tight = plan([node("a", 40 * GIB), node("b", 2.2 * GIB)], None, wide)
    assert 2048 // 16 <= tight.template.cache_blocks < roomy.template.cache_blocks
    small = tight.estimates[used_nodes(tight).index("id-b")]
    assert small.memory_bytes <= 2.2 * GIB * 0.9
    # One more block would not have fitted.
    assert small.memory_bytes + small.cache_bytes // tight.template.cache_blocks > 2.2 * GIB * 0.9


def test_shards_on_one_node_share_its_memory() -> None:
    wide = profile(num_key_value_heads=8, head_dim=512)
    made = plan([node("a", 4 * GIB)], None, wide)
    assert sum(estimate.memory_bytes for estimate in made.estimates) <= 4 * GIB * 0.9


def test_memory_of_a_role_is_the_sum_of_its_parts() -> None:
    for made in (plan([node("a")]), plan([node("a")], tensor_parallel=2)):
        for role, estimate in zip(made.template.roles, made.estimates, strict=True):
            assert role.memory_bytes == estimate.memory_bytes


def test_context_defaults_to_the_models_up_to_a_limit() -> None:
    assert plan([node("a")]).template.max_context == 2048
    long = plan([node("a", 64 * GIB)], None, profile(max_position_embeddings=100_000))
    assert long.template.max_context == 8192
    assert any("up to 100000" in note for note in long.notes)


def test_context_beyond_the_model_is_refused() -> None:
    assert "context: expected 1 to the model's 2048" in reasons([node("a")], context=2049)


def test_dtype_must_be_the_profiles() -> None:
    assert "dtype" in reasons([node("a")], dtype="bfloat16")


def test_nodes_without_a_tee_get_no_attested_role() -> None:
    text = reasons([node("a", tee=None), node("b", tee="tdx")])
    assert "node a: its TEE is not declared" in text
    assert "node b: its TEE is tdx" in text
    assert "none of 2 qualifies" in text


def test_a_node_without_processors_gets_nothing() -> None:
    made = plan([node("a"), node("head", cpus=0), node("b")])
    assert "id-head" not in used_nodes(made)
    assert "num_cpus is 0" in reasons([node("head", cpus=0)])


def test_no_nodes_at_all() -> None:
    assert "none of 0 qualifies" in reasons([])


def test_regions_keep_nodes_out() -> None:
    european = policy(regions="[eu-west-1]")
    made = plan([node("a", region="us-east-1"), node("b"), node("c", region=None)], european)
    assert set(used_nodes(made)) == {"id-b"}
    assert all(role.regions == ("eu-west-1",) for role in made.template.roles)
    assert "its region is us-east-1" in reasons([node("a", region="us-east-1")], european)


def test_hardened_nodes_are_asked_for() -> None:
    strict = policy(accept="[simulated_tee, plain_ingress, unpinned_measurement, plain_weights]")
    assert "it is not hardened" in reasons([node("a")], strict)
    assert plan([node("a", hardened=True)], strict).template.weaknesses == (
        "simulated_tee",
        "plain_ingress",
        "unpinned_measurement",
        "plain_weights",
    )


def test_prompts_stay_on_attested_nodes() -> None:
    nodes = [node("plain", 64 * GIB, tee=None), node("first"), node("last", tee="sev-snp")]
    made = plan(nodes, policy(MIXED))
    trusts = [role.trust for role in made.template.roles]
    assert trusts == [Trust.ATTESTED, Trust.ENROLLED, Trust.ATTESTED]
    assert used_nodes(made)[1] == "id-plain"
    # An enrolled role takes an enrolled key or real hardware, never simulated evidence.
    assert made.template.roles[1].evidence == ("enrolled", "sev-snp")
    assert "activation_leakage" in made.template.weaknesses
    assert "unverified_output" in made.template.weaknesses


def test_enrolled_stages_between_attested_ones_need_consent() -> None:
    asked = policy(
        MIXED, accept="[simulated_tee, unhardened, unpinned_measurement, activation_leakage]"
    )
    made = plan([node("a"), node("b"), node("c")], asked)
    assert {role.trust for role in made.template.roles} == {Trust.ATTESTED}
    verify_template(made.template, asked, asked.digest, SealedParts())


def test_stage_limits_of_the_policy_hold() -> None:
    assert "the policy allows 3 to 4, found 2" in reasons([node("a")], policy(MIXED), stages=2)
    short = profile(num_hidden_layers=1)
    assert "the model has 1 layers" in reasons([node("a")], None, short)


def test_many_nodes_are_planned_quickly_and_distinctly() -> None:
    nodes = [node(f"n{i:02}", (8 + i) * GIB) for i in range(24)]
    made = plan(nodes, None, profile(num_hidden_layers=32), stages=16)
    assert len(set(used_nodes(made))) == 16


def test_the_cheap_objective_takes_the_smallest_nodes() -> None:
    nodes = [node("large", 64 * GIB), node("small", 8 * GIB), node("medium", 16 * GIB)]
    assert set(used_nodes(plan(nodes, policy(objective="cost")))) == {"id-small", "id-medium"}
    assert set(used_nodes(plan(nodes))) == {"id-large", "id-medium"}


@given(
    memories=st.lists(st.integers(1, 8), min_size=1, max_size=4),
    layers=st.integers(2, 10),
    stages=st.none() | st.integers(2, 5),
    ranks=st.sampled_from([1, 2, 4]),
)
def test_every_plan_passes_the_verifier_and_fits(
    memories: list[int], layers: int, stages: int | None, ranks: int
) -> None:
    asked = policy()
    nodes = [node(f"n{i}", memory * GIB) for i, memory in enumerate(memories)]
    try:
        made = plan(
            nodes,
            asked,
            profile(num_hidden_layers=layers),
            stages=stages,
            tensor_parallel=ranks,
        )
    except Infeasible as error:
        assert error.reasons
        return
    verify_template(made.template, asked, asked.digest, SealedParts())
    assert Plan.from_bytes(made.to_bytes()) == made
    rooms = {item.id: item.memory_bytes * 0.9 for item in nodes}
    for estimate in made.estimates:
        rooms[estimate.node] -= estimate.memory_bytes
    assert all(room >= 0 for room in rooms.values())


def test_plans_are_deterministic() -> None:
    nodes = [node("a"), node("b"), node("c")]
    assert plan(nodes).to_bytes() == plan(list(reversed(nodes))).to_bytes()


def test_the_table_names_every_stage() -> None:
    made = plan([node("alpha"), node("beta")], layer_splits=(3,))
    table = plan_table(made).splitlines()
    assert table[0].split()[:4] == ["stage", "layers", "tp", "node"]
    assert table[1].split()[:2] == ["stage-0", "0-2"]
    assert table[2].split()[:2] == ["stage-1", "3-7"]
    assert "8 layers in float32 on 2 nodes" in table[3]
    assert max(map(len, table)) <= 110


def test_int8_weights_are_planned_signed_and_shown() -> None:
    nodes = [node("a")]
    plain = plan(nodes)
    int8 = plan(nodes, None, profile_model(CONFIG, "float32", "int8"), weight_format="int8")
    before, after = plain.estimates[-1], int8.estimates[-1]
    assert after.weight_bytes < before.weight_bytes / 2
    assert after.step_cost < before.step_cost
    assert int8.template.weight_format == "int8"
    assert int8.template.digest != plain.template.digest
    assert replace(int8.template, weight_format="plain").digest != int8.template.digest
    assert Plan.from_bytes(int8.to_bytes()) == int8
    verify_template(int8.template, policy(), policy().digest, SealedParts())
    assert "8 layers in float32 with int8 weights on 1 node" in plan_table(int8)
    assert "weights on" not in plan_table(plain)


def test_int8_weights_that_cannot_be_planned() -> None:
    nodes = [node("a")]
    assert "weight_format: the profile is counted in plain" in reasons(nodes, weight_format="int8")
    int8 = profile_model(CONFIG, "float32", "int8")
    with pytest.raises(Infeasible, match="int8 is not sharded, expected 1 rank, found 2"):
        plan(nodes, None, int8, weight_format="int8", tensor_parallel=2)


def test_warnings_are_shown() -> None:
    text = explain_plan(plan([node("a")], policy(slo="{ttft_ms: 500}")))
    assert "warning: simulated TEE: protects nothing" in text
    assert "wanted: ttft 500 ms" in text
    assert weakness_warnings(("unheard_of",)) == ("unheard_of",)


def test_the_policys_digest_is_in_the_template() -> None:
    asked: Policy = policy()
    made = plan([node("a")], asked)
    assert made.template.policy_digest == asked.digest
    assert replace(made.template, generation=2).digest != made.template.digest


def test_a_lost_nodes_role_moves_to_a_node_that_qualifies() -> None:
    made = plan([node("a"), node("b"), node("c", tee=None)])
    alive = Inventory((node("a"), node("c", tee=None, memory=99 * GIB), node("d")))
    moved = bind(made.template, policy(), alive, "pipeline-0", {"stage-0": "a"})
    assert moved.nodes == {"stage-0": "id-a", "stage-1": "id-d"}
    # With nothing else left it shares the node of its neighbour.
    alone = bind(made.template, policy(), Inventory((node("a"),)), "x", {"stage-0": "a"})
    assert alone.nodes == {"stage-0": "id-a", "stage-1": "id-a"}


def test_a_role_that_stays_on_a_lost_node_is_left_out() -> None:
    made = plan([node("a"), node("b")])
    moved = bind(made.template, policy(), Inventory((node("d"),)), "x", {"stage-0": "gone"})
    assert moved.nodes == {"stage-1": "id-d"}


def test_a_role_without_a_node_says_what_is_missing() -> None:
    made = plan([node("a"), node("b")])
    apart = policy(separate_nodes="true")
    small = Inventory((node("a"), node("c", tee=None), node("d", 0.2 * GIB)))
    with pytest.raises(Infeasible) as caught:
        bind(made.template, apart, small, "x", {"stage-0": "a"})
    text = explain_infeasible(caught.value)
    assert "stage-1 needs 0." in text and "none of 3 does" in text
    assert "node a: it has a stage, and the policy separates nodes" in text
    assert "node c: its TEE is not declared" in text
    assert "node d: it has 0.18 GiB left" in text


def test_moving_counts_the_memory_of_what_stays() -> None:
    made = plan([node("a"), node("b")])
    room = made.template.roles[0].memory_bytes * 1.5 / 0.9
    with pytest.raises(Infeasible, match="left"):
        bind(made.template, policy(), Inventory((node("a", room),)), "x", {"stage-0": "a"})
    both = bind(made.template, policy(), Inventory((node("a", room * 2),)), "x", {})
    assert set(both.nodes) == {"stage-0", "stage-1"}
