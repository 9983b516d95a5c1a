from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from placement_samples import MIXED, SIMULATED, policy

from placement.plan import DataClass, Trust
from placement.policy import (
    Ingress,
    Objective,
    Policy,
    PolicyError,
    Weakness,
    parse_policy,
)

POLICIES = Path(__file__).resolve().parents[2] / "clusters" / "policies"


def refused(text: str) -> PolicyError:
    with pytest.raises(PolicyError) as caught:
        parse_policy(text, "p.yaml")
    return caught.value


@pytest.mark.parametrize(
    ("name", "weaknesses"),
    [
        ("open", {"plain_ingress", "unhardened"}),
        ("weights-private", {"plain_ingress"}),
        ("prompt-private", set()),
        (
            "simulated-sealed",
            {"simulated_tee", "unhardened", "unpinned_measurement", "plain_weights"},
        ),
        (
            "simulated",
            {
                "simulated_tee",
                "unhardened",
                "plain_ingress",
                "unpinned_measurement",
                "plain_weights",
            },
        ),
    ],
)
def test_the_policies_that_come_along_are_valid(name: str, weaknesses: set[str]) -> None:
    read = parse_policy((POLICIES / f"{name}.yaml").read_text(), f"{name}.yaml")
    assert read.name == name
    assert set(read.accept) == weaknesses


def test_there_is_no_other_policy_file() -> None:
    assert len(list(POLICIES.glob("*.yaml"))) == 5


def test_what_is_left_out_is_strict() -> None:
    read = parse_policy(
        "version: 1\nname: p\nprotect: {}\nevidence: [tdx]\n"
        f'measurements: {{tdx: ["{"ab" * 48}"]}}\n'
    )
    assert {read.protect.least(item) for item in DataClass} == {Trust.ATTESTED}
    assert read.ingress is Ingress.SEALED
    assert read.objective is Objective.LATENCY
    assert (read.stages_min, read.tensor_parallel_max, read.accept) == (1, 1, ())
    assert read.separate_nodes is False


@pytest.mark.parametrize("text", [SIMULATED, MIXED])
def test_documents_round_trip(text: str) -> None:
    read = parse_policy(text)
    assert Policy.from_bytes(read.to_bytes()) == read
    assert Policy.from_document(read.to_document()) == read
    assert pickle.loads(pickle.dumps(read)) == read
    assert len(read.digest) == 64
    assert hash(read) == hash(Policy.from_bytes(read.to_bytes()))


def test_the_digest_is_of_the_meaning() -> None:
    plain = policy()
    reordered = parse_policy("# a comment\n" + "\n".join(reversed(SIMULATED.splitlines())))
    assert reordered.digest == plain.digest
    assert policy(objective="cost").digest != plain.digest


ERRORS = [
    # text to replace, replacement, line, field, part of the reason
    ("version: 1", "version: 2", 1, "version", "from 1 to 1, found 2"),
    ("version: 1\n", "", 1, "version", "no such field"),
    ("name: simulated", "name: ''", 2, "name", "1 to 128"),
    ("name: simulated", "name: 3", 2, "name", "text"),
    ("name: simulated", "name: no", 2, "name", "put quotes"),
    ("name: simulated", "name: 1.5", 2, "name", "YAML reads as float"),
    ("prompt: attested", "prompt: trusted", 3, "protect.prompt", "enrolled, attested"),
    ("prompt: attested", "promt: attested", 3, "protect.promt", "another name"),
    ("weights: attested", "prompt: attested", 3, "protect.prompt", "once"),
    ("evidence: [simulated]", "evidence: []", 4, "evidence", "attested machines"),
    ("evidence: [simulated]", "evidence: simulated", 4, "evidence", "a list"),
    ("evidence: [simulated]", "evidence: [nvidia]", 4, "evidence", "attested machines"),
    ("evidence: [simulated]", "evidence: [sgx]", 4, "evidence[0]", "found 'sgx'"),
    ("evidence: [simulated]", "evidence: [tdx, tdx]", 4, "evidence[1]", "once"),
    ("ingress: plain", "ingress: open", 5, "ingress", "plain, sealed"),
    ("stages: {min: 2}", "stages: {min: 0}", 6, "stages.min", "1 to 128"),
    ("stages: {min: 2}", "stages: {min: 3, max: 2}", 6, "stages", "min at most max"),
    ("stages: {min: 2}", "stages: {min: true}", 6, "stages.min", "an integer"),
    ("stages: {min: 2}", "stages: {min: 0x10}", 6, "stages.min", "decimal"),
    ("{max: 4}", "{max: 4, min: 1}", 7, "tensor_parallel.min", "another name"),
    ("accept: [", "accept: [all, ", 8, "accept[0]", "found 'all'"),
    ("accept: [", "accept: [unhardened, ", 8, "accept[2]", "each value once"),
    ("simulated_tee, ", "", 4, "evidence[0]", "accept simulated_tee"),
    (", unpinned_measurement", "", 4, "evidence[0]", "accept unpinned_measurement"),
    ("plain_ingress, ", "", 5, "ingress", "accept plain_ingress"),
    (
        "activations: attested",
        "activations: enrolled",
        3,
        "protect.activations",
        "accept activation_leakage",
    ),
    ("accept:", "separate_nodes: maybe\naccept:", 8, "separate_nodes", "true or false"),
    ("accept:", "slo: {ttft_ms: -1}\naccept:", 8, "slo.ttft_ms", "text, a decimal integer"),
    ("accept:", "regions: [eu, eu]\naccept:", 8, "regions[1]", "each once"),
    ("accept:", "regions: ['e u']\naccept:", 8, "regions[0]", "matching"),
    ("accept:", "measurements: {tdx: [ab]}\naccept:", 8, "measurements.tdx", "under evidence"),
    ("accept:", "measurements:\n  simulated: []\naccept:", 9, "measurements.simulated", "none"),
    (
        "accept:",
        "measurements:\n  simulated:\n  - AB\naccept:",
        10,
        "measurements.simulated[0]",
        "hexadecimal",
    ),
    ("accept:", "surprise: 1\naccept:", 8, "surprise", "another name"),
    ("name: simulated", "name: &a simulated", 2, "", "anchor"),
    ("name: simulated", "name: *a", 2, "", "anchor or alias"),
    ("name: simulated", "name: !!str x", 2, "", "a tag"),
    ("name: simulated", "name: !!python/name:os.system x", 2, "", "a tag"),
    ("name: simulated", "name: [[[[[[[[[[[]]]]]]]]]]]", 2, "", "nesting"),
    ("name: simulated", "? [a]\n: b", 2, "", "text as a key"),
    ("ingress: plain", "ingress: ]", 5, "", "YAML"),
    ("accept:", "---\naccept:", 8, "", "a second document"),
]


@pytest.mark.parametrize(("old", "new", "line", "field", "reason"), ERRORS)
def test_errors_name_line_and_field(old: str, new: str, line: int, field: str, reason: str) -> None:
    assert SIMULATED.count(old) >= 1
    error = refused(SIMULATED.replace(old, new, 1))
    assert reason in error.reason
    assert (error.line, error.field) == (line, field)
    place = f"{field}: " if field else ""
    assert str(error) == f"p.yaml:{line}: {place}{error.reason}"
    assert "expected" in error.reason
    assert pickle.loads(pickle.dumps(error)).line == line


@pytest.mark.parametrize("text", ["", "# nothing", "[]", "5", "\x00", "a: b: c", "\t- x"])
def test_what_is_not_a_mapping_is_refused(text: str) -> None:
    assert refused(text).line == 1


def test_long_files_are_refused_before_they_are_parsed() -> None:
    assert "at most 262144 bytes" in refused("#" * 270_000).reason


def test_a_bomb_is_refused() -> None:
    assert "anchor" in refused("a: &a [x, x]\nb: &b [*a, *a]\n").reason


@given(st.text(max_size=200))
def test_any_text_is_a_policy_or_a_policy_error(text: str) -> None:
    for candidate in (text, SIMULATED + text, SIMULATED.replace("simulated", text, 1)):
        try:
            parse_policy(candidate)
        except PolicyError as error:
            assert error.line >= 1


@given(st.binary(max_size=200))
def test_any_bytes_are_a_policy_or_a_policy_error(data: bytes) -> None:
    with pytest.raises(PolicyError):
        Policy.from_bytes(data)


def test_evidence_by_trust() -> None:
    mixed = policy(MIXED)
    assert mixed.evidence_for(Trust.ATTESTED) == ("simulated", "sev-snp")
    assert mixed.evidence_for(Trust.ENROLLED) == ("enrolled", "sev-snp")
    assert mixed.trust_for((DataClass.ACTIVATIONS, DataClass.WEIGHTS)) is Trust.ENROLLED
    assert mixed.trust_for((DataClass.PROMPT, DataClass.WEIGHTS)) is Trust.ATTESTED
    with_devices = policy(evidence="[simulated, nvidia]")
    assert with_devices.evidence_for(Trust.ATTESTED) == ("simulated",)
    assert with_devices.demanded_devices() == ("nvidia",)


def test_every_weakness_has_a_warning() -> None:
    for weakness in Weakness:
        assert weakness.warning.lower().startswith(weakness.value.replace("_", " "))
        assert "\n" not in weakness.warning
