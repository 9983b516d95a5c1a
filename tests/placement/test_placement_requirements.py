from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement.document import DocumentError, Fields, decode, encode
from placement.policy import PolicyError, parse_policy
from placement.requirements import (
    MAX_VALUES,
    MINIMUM_TCB,
    PINS,
    RELAXATIONS,
    Requirements,
    read_requirements,
)

CHIP = "0506" * 32
LEGACY = {"bootloader": 10, "tee": 0, "snp": 23, "microcode": 84}
FULL = {
    "product": ["Genoa", "Milan"],
    "signing_key": ["VCEK"],
    "vmpl": ["0"],
    "host_data": ["00" * 32],
    "id_key_digest": ["00" * 48],
    "author_key_digest": ["00" * 48],
    "family_id": ["00" * 16],
    "image_id": ["00" * 16],
    "chip_id": [CHIP],
    "csp_id": ["CN=cc-us-east-2.amazonaws.com"],
    "minimum_tcb": {"Genoa": LEGACY, "Turin": {"fmc": 1, **LEGACY}},
    "open": ["migration_agent"],
    "revoked": ["3ac3"],
    "roots": ["9f" * 32],
    "maximum_age_s": 300,
}


def read(kind: str, section: object) -> Requirements:
    return read_requirements(kind, Fields.of(section, f"requirements.{kind}"))


def refused(kind: str, section: object) -> str:
    with pytest.raises(DocumentError) as caught:
        read(kind, section)
    return str(caught.value)


def test_everything_that_can_be_said_is_read() -> None:
    found = read("sev-snp", FULL)
    assert found.pins["product"] == ("Genoa", "Milan")
    assert set(found.pins) == set(PINS["sev-snp"])
    assert found.minimum_tcb["Turin"]["fmc"] == 1
    assert found.opens("migration_agent")
    assert not found.opens("freshness")
    assert found.revoked == ("3ac3",)
    assert found.roots == ("9f" * 32,)
    assert found.maximum_age_s == 300


def test_what_was_read_is_written_and_read_again() -> None:
    found = read("sev-snp", FULL)
    again = read("sev-snp", decode(encode(found.to_document()), 1 << 16))
    assert again == found


def test_an_empty_section_opens_nothing() -> None:
    for kind in PINS:
        found = read(kind, {})
        assert found == Requirements()
        assert not any(found.opens(name) for name in (*PINS[kind], *RELAXATIONS[kind]))


def test_requirements_do_not_change_once_made() -> None:
    pins = {"vmpl": ("0",)}
    found = Requirements(pins=pins)
    pins["vmpl"] = ("3",)
    assert found.pins["vmpl"] == ("0",)
    with pytest.raises(TypeError):
        found.pins["vmpl"] = ("3",)  # type: ignore[index]


@pytest.mark.parametrize("kind", PINS)
def test_every_pin_and_relaxation_can_be_open_once(kind: str) -> None:
    names = [*PINS[kind], *RELAXATIONS[kind]]
    assert len(set(names)) == len(names)
    found = read(kind, {"open": names})
    assert found.open == tuple(names)
    assert "each once" in refused(kind, {"open": [names[0], names[0]]})
    assert "one of" in refused(kind, {"open": ["debug"]})


def test_a_kind_that_has_no_pins_is_refused() -> None:
    assert "one of sev-snp" in refused("simulated", {})


@pytest.mark.parametrize("name", [*PINS["sev-snp"], "minimum_tcb"])
def test_a_pin_is_either_given_or_open(name: str) -> None:
    section = {name: FULL[name], "open": [name]}
    assert "either given or open" in refused("sev-snp", section)


@pytest.mark.parametrize("name", PINS["sev-snp"])
def test_a_pin_without_values_is_refused(name: str) -> None:
    assert "at least one value" in refused("sev-snp", {name: []})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("product", "genoa"),
        ("product", "Venice"),
        ("signing_key", "ASK"),
        ("vmpl", "4"),
        ("vmpl", "00"),
        ("host_data", "00" * 31),
        ("id_key_digest", "0G" * 48),
        ("chip_id", CHIP.upper().replace("0", "A")),
        ("chip_id", CHIP[:-1]),
        ("csp_id", ""),
        ("csp_id", "a" * 257),
        ("family_id", "00" * 17),
    ],
)
def test_a_value_of_another_shape_is_refused(name: str, value: str) -> None:
    assert name in refused("sev-snp", {name: [value]})


@pytest.mark.parametrize("value", ["text", 1, {"a": 1}, None, [1], [None]])
def test_a_pin_of_another_type_is_refused(value: object) -> None:
    refused("sev-snp", {"vmpl": value})


@pytest.mark.parametrize(
    "section",
    [
        {"Rome": LEGACY},
        {"Genoa": {**LEGACY, "fmc": 1}},
        {"Turin": LEGACY},
        {"Genoa": {**LEGACY, "snp": 256}},
        {"Genoa": {**LEGACY, "snp": -1}},
        {"Genoa": {**LEGACY, "snp": True}},
        {"Genoa": {name: LEGACY[name] for name in list(LEGACY)[1:]}},
        [],
    ],
)
def test_a_minimum_tcb_names_every_part_of_a_known_product(section: object) -> None:
    refused("sev-snp", {"minimum_tcb": section})


def test_a_minimum_tcb_belongs_to_amds_kinds() -> None:
    assert read("azure-vtpm", {"minimum_tcb": {"Milan": LEGACY}}).minimum_tcb["Milan"] == LEGACY
    assert "minimum_tcb" in refused("tdx", {"minimum_tcb": {"Milan": LEGACY}})
    assert set(MINIMUM_TCB) == {"Milan", "Genoa", "Turin"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("revoked", ["XY"]),
        ("revoked", ["a" * 129]),
        ("revoked", ["a"] * (MAX_VALUES + 1)),
        ("roots", ["9f" * 31]),
        ("roots", ["9f" * 32] * 17),
        ("maximum_age_s", 0),
        ("maximum_age_s", 10**9),
        ("maximum_age_s", "300"),
        ("chip", [CHIP]),
        ("debug", ["0"]),
    ],
)
def test_other_fields_are_bounded_and_known(name: str, value: object) -> None:
    assert name in refused("sev-snp", {name: value})


def test_roots_of_manifests_belong_to_nvidia_and_are_no_roots_of_devices() -> None:
    section = {"roots": ["9f" * 32], "rim_roots": ["8e" * 32]}
    found = read("nvidia", section)
    assert (found.roots, found.rim_roots) == (("9f" * 32,), ("8e" * 32,))
    assert read("nvidia", decode(encode(found.to_document()), 1 << 16)) == found
    assert "rim_roots" not in read("nvidia", {}).to_document()
    for kind in set(PINS) - {"nvidia"}:
        assert "rim_roots" in refused(kind, section)
    assert "rim_roots[0]" in refused("nvidia", {"roots": ["9f" * 32], "rim_roots": ["9f" * 32]})
    for bad in (["9f" * 31], ["9f" * 32] * 17, "9f" * 32):
        assert "rim_roots" in refused("nvidia", {"rim_roots": bad})


def test_as_many_chips_as_a_fleet_has_can_be_pinned() -> None:
    chips = [f"{i:0128x}" for i in range(MAX_VALUES)]
    assert len(read("sev-snp", {"chip_id": chips}).pins["chip_id"]) == MAX_VALUES
    assert "chip_id" in refused("sev-snp", {"chip_id": [*chips, CHIP]})


@pytest.mark.parametrize("kind", PINS)
def test_every_pin_has_a_pattern_that_compiles_and_takes_nothing_empty(kind: str) -> None:
    for pattern in PINS[kind].values():
        assert re.compile(pattern).fullmatch("") is None


POLICY = """\
version: 1
name: attested
protect: {prompt: attested, activations: attested, weights: attested}
evidence: [sev-snp]
measurements: {sev-snp: ["%s"]}
requirements:
  sev-snp:
    product: [Genoa]
    minimum_tcb:
      Genoa: {bootloader: 10, tee: 0, snp: 23, microcode: 84}
    open: [host_data, chip_id, csp_id]
stages: {min: 1, max: 4}
accept: [unhardened]
""" % ("cd" * 48)


def test_a_policy_carries_its_requirements_into_its_digest() -> None:
    policy = parse_policy(POLICY, "p.yaml")
    found = policy.requirements_for("sev-snp")
    assert found.pins["product"] == ("Genoa",)
    assert found.opens("csp_id")
    assert policy.requirements_for("tdx") == Requirements()
    other = parse_policy(POLICY.replace("Genoa", "Milan"), "p.yaml")
    assert encode(policy.to_document()) != encode(other.to_document())


@pytest.mark.parametrize(
    ("old", "new", "where"),
    [
        ("product: [Genoa]", "product: [Rome]", "requirements.sev-snp.product"),
        ("open: [host_data", "open: [debug", "requirements.sev-snp.open"),
        ("  sev-snp:\n    product", "  nvidia:\n    product", "requirements.nvidia"),
        ("  sev-snp:\n    product", "  sgx:\n    product", "requirements.sgx"),
    ],
)
def test_a_policy_with_other_requirements_is_refused(old: str, new: str, where: str) -> None:
    assert old in POLICY
    with pytest.raises(PolicyError) as caught:
        parse_policy(POLICY.replace(old, new), "p.yaml")
    assert where in str(caught.value)


def test_requirements_of_a_kind_that_the_policy_does_not_take_are_refused() -> None:
    text = POLICY.replace("requirements:\n", "requirements:\n  tdx: {open: [xfam]}\n")
    with pytest.raises(PolicyError, match=r"requirements\.tdx: expected a kind that stands under"):
        parse_policy(text, "p.yaml")


WORDS = st.sampled_from(["0", "3ac3", "Genoa", "VCEK", "vmpl", "freshness", CHIP, "", "a\nb", "Z"])


@given(
    st.dictionaries(
        st.sampled_from([*FULL, "other"]),
        st.one_of(st.none(), st.integers(), WORDS, st.lists(WORDS, max_size=3)),
    )
)
def test_arbitrary_sections_raise_only_the_readers_error(section: dict[str, object]) -> None:
    try:
        found = read("sev-snp", section)
    except DocumentError:
        return
    assert read("sev-snp", decode(encode(found.to_document()), 1 << 16)) == found
