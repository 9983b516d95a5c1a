from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from snp_machine import MACHINES, MASKED, NOW, SnpMachine, table

from placement.requirements import Requirements
from security.attestation.collateral import Collateral
from security.attestation.errors import RevokedIdentity, SnpReportMalformed
from security.attestation.sev_snp import ReportDataRule, judge_report, verify_sev_snp
from security.attestation.snp_pins import PIN_RULES
from security.attestation.snp_rules import (
    CHAIN_RULES,
    ENDORSEMENT_RULES,
    REPORT_RULES,
    REVOCATION_RULE,
)
from security.attestation.verdict import Expectations, Verdict
from security.errors import AppraisalError, EvidenceMalformed

VCEK, VLEK = MACHINES[0], MACHINES[1]
TURIN = MACHINES[4]


def codes(verdict: Verdict) -> list[str]:
    return [failure.code for failure in verdict.failures]


def message(verdict: Verdict) -> str:
    return " | ".join(str(failure) for failure in verdict.failures)


def sound(machine: SnpMachine, **changes: object) -> Verdict:
    """Judged with everything open that can be open: what remains is soundness."""
    names = (
        *("product", "signing_key", "vmpl", "host_data", "id_key_digest", "author_key_digest"),
        *("family_id", "image_id", "chip_id", "csp_id", "minimum_tcb", "migration_agent"),
        *("freshness", "revocation"),
    )
    expected = Expectations("sev-snp", machine.requirements(open=names, minimum_tcb={}), None)
    return machine.verify(expected=expected, **changes)  # type: ignore[arg-type]


# -- what holds -------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [2, 3, 4, 5])
@pytest.mark.parametrize("machine", MACHINES, ids=lambda item: f"{item.product}-{item.key}")
def test_a_good_machine_is_taken(machine: SnpMachine, version: int) -> None:
    machine = replace(machine, version=version)
    verdict = machine.verify()
    assert verdict.holds, message(verdict)
    verdict.require()
    assert verdict.kind == "sev-snp"
    assert verdict.product == machine.product
    assert verdict.measurement == machine.measurement.hex()
    assert verdict.identity == machine.chip.ljust(64, b"\0").hex()
    assert verdict.notes == ()


def test_every_rule_is_asked_once() -> None:
    verdict = VCEK.verify()
    names = [check.name for check in verdict.checks]
    rules = (*ENDORSEMENT_RULES, *CHAIN_RULES, REVOCATION_RULE, *REPORT_RULES, *PIN_RULES)
    assert names == [*(rule.name for rule in rules), "snp.report_data"]
    assert len(set(names)) == len(names)
    assert all(check.source.startswith(("AMD 5", "RFC 5280")) for check in verdict.checks)


def test_fields_have_amds_names() -> None:
    fields = replace(TURIN, version=5).verify().fields
    assert fields["VERSION"] == "5"
    assert fields["POLICY"] == "0x30000"
    assert fields["POLICY.DEBUG"] == "0"
    assert fields["PLATFORM_INFO.ALIAS_CHECK_COMPLETE"] == "1"
    assert fields["CURRENT_TCB"].startswith("0102030400000050 (fmc 1, bootloader 2")
    assert fields["CPUID_FAM_ID"] == "1Ah"
    assert fields["LAUNCH_MIT_VECTOR"] == "0x3"
    assert fields["VCEK.hwID"] == TURIN.chip.hex()
    assert fields["ARK.serial"] == "10000"
    assert MASKED.verify(open=("chip_id",)).fields["VLEK.csp_id"] == MASKED.csp_id


def test_parts_of_other_kinds_are_noted() -> None:
    verdict = VCEK.verify(parts={**VCEK.parts(), "gpu": b"x"})
    assert verdict.holds
    assert verdict.notes == ("part 'gpu' was not looked at",)


def test_evidence_without_a_report_is_malformed() -> None:
    with pytest.raises(SnpReportMalformed, match="expected a part 'report'"):
        VCEK.verify(parts={})


# -- soundness --------------------------------------------------------------------------------


def other(machine: SnpMachine, **changes: object) -> SnpMachine:
    return replace(machine, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("machine", "code"),
    [
        (other(VCEK, signature_algo=0), "snp_signature_algorithm_unknown"),
        (other(VCEK, signature_algo=2), "snp_signature_algorithm_unknown"),
        (other(VCEK, key_info=7 << 2), "snp_report_unsigned"),
        (other(VCEK, key_info=2), "snp_report_unsigned"),
        (other(VCEK, vmpl=4), "snp_host_requested"),
        (other(VCEK, vmpl=0xFFFFFFFF), "snp_host_requested"),
        (other(VCEK, signer="another"), "snp_report_signature_invalid"),
        (other(VCEK, late_patches={0x2A0: bytes(144)}), "snp_report_signature_invalid"),
        (other(VCEK, late_patches={0x2A0: b"\xff" * 48}), "snp_report_signature_invalid"),
        (other(VCEK, policy=0xB0000), "snp_debug_allowed"),
        (other(VCEK, policy=0x20000, platform_info=1), "snp_policy_not_enforced"),
        (other(VCEK, policy=0x830000, platform_info=1), "snp_policy_not_enforced"),
        (other(VCEK, policy=0x1030000, platform_info=1), "snp_policy_not_enforced"),
        (other(VCEK, policy=0x30138), "snp_policy_not_enforced"),
        (other(VCEK, policy=0x30200), "snp_policy_not_enforced"),
        (other(VCEK, author_key_digest=b"\1" * 48), "snp_author_key_inconsistent"),
        (other(VCEK, committed=(1, 55, 30)), "snp_tcb_order"),
        (
            other(VCEK, reported_tcb=bytes((5, 1, 0, 0, 0, 0, 24, 219))),
            "snp_tcb_order",
        ),
        (other(VCEK, committed_tcb=bytes((4, 1, 0, 0, 0, 0, 24, 220))), "snp_tcb_order"),
        (other(VCEK, certified_tcb=bytes((4, 1, 0, 0, 0, 0, 24, 218))), "snp_tcb_mismatch"),
        (other(VCEK, chip_id=b"\7" * 64), "snp_chip_mismatch"),
        (other(TURIN, chip_id=bytes(range(1, 10)).ljust(64, b"\0")), "snp_chip_mismatch"),
        (other(VCEK, cpuid=(0x19, 0x11, 1)), "snp_product_mismatch"),
    ],
)
def test_what_is_not_sound_is_refused_whatever_is_open(machine: SnpMachine, code: str) -> None:
    verdict = sound(machine)
    assert codes(verdict) == [code], message(verdict)
    failure = verdict.failures[0]
    assert "expected" in str(failure)
    assert "found" in str(failure)
    with pytest.raises(AppraisalError):
        verdict.require()
    unpinned = verify_sev_snp(machine.parts(), machine.collateral(), None, NOW, None)
    assert code in codes(unpinned)


def test_tcb_parts_may_be_newer_the_further_they_are_in_force() -> None:
    machine = replace(
        VCEK,
        reported_tcb=bytes((4, 1, 0, 0, 0, 0, 24, 217)),
        committed_tcb=bytes((4, 1, 0, 0, 0, 0, 24, 219)),
        current_tcb=bytes((4, 1, 0, 0, 0, 0, 25, 220)),
    )
    assert sound(machine).holds


def test_the_reserved_bytes_of_a_version_2_tcb_are_judged_once_the_product_is_known() -> None:
    machine = replace(VCEK, version=2, launch_tcb=bytes((4, 1, 1, 0, 0, 0, 24, 219)))
    assert codes(sound(machine)) == ["snp_reserved_not_zero"]


def test_a_version_2_report_without_a_certificate_has_no_product() -> None:
    machine = replace(VCEK, version=2)
    verdict = machine.verify(parts={"report": machine.report()}, collateral=Collateral())
    assert "snp_endorsement_missing" in codes(verdict)
    assert verdict.product == ""
    assert verdict.fields["REPORTED_TCB"] == machine.tcb.hex()


def test_a_policy_that_demands_what_the_platform_has_is_taken() -> None:
    assert sound(replace(VCEK, policy=0x1820137, platform_info=0x38)).holds


@given(st.integers(0, 0x2A0 - 1), st.integers(1, 255))
@settings(max_examples=150, deadline=None)
def test_no_signed_byte_can_be_changed(offset: int, change: int) -> None:
    report = bytearray(REPORT)
    report[offset] ^= change
    try:
        verdict = sound(VCEK, parts={**VCEK.parts(), "report": bytes(report)})
    except EvidenceMalformed:
        return
    assert not verdict.holds


REPORT = VCEK.report()


# -- freshness --------------------------------------------------------------------------------


@pytest.mark.parametrize("bound_to", [b"c", b"x" * 64, b"\0\1"])
def test_report_data_is_what_it_is_bound_to_and_zeros(bound_to: bytes) -> None:
    machine = replace(VCEK, report_data=bound_to)
    assert machine.verify(bound_to=bound_to).holds
    assert codes(machine.verify(bound_to=b"another")) == ["evidence_not_bound"]


def test_what_follows_the_binding_must_be_zero() -> None:
    machine = replace(VCEK, report_data=b"challenge and more")
    assert codes(machine.verify(bound_to=b"challenge")) == ["evidence_not_bound"]


def test_a_binding_that_is_too_long_or_empty_is_refused() -> None:
    machine = replace(VCEK, report_data=b"x" * 64)
    assert codes(machine.verify(bound_to=b"x" * 65)) == ["snp_binding_too_long"]
    machine = replace(VCEK, report_data=b"")
    assert codes(machine.verify(bound_to=b"")) == ["freshness_unproven"]


def test_freshness_must_be_judged_or_open() -> None:
    assert codes(VCEK.verify(bound_to=None)) == ["freshness_unproven"]
    verdict = VCEK.verify(bound_to=None, open=("freshness",))
    assert verdict.holds
    assert "freshness is open" in verdict.notes[0]


def test_where_only_soundness_is_judged_freshness_is_a_note_or_a_check() -> None:
    verdict = verify_sev_snp(VCEK.parts(), VCEK.collateral(), None, NOW, None)
    assert codes(verdict) == ["snp_root_not_trusted"]
    assert "no challenge was given" in verdict.notes[0]
    verdict = verify_sev_snp(VCEK.parts(), VCEK.collateral(), None, NOW, b"other")
    assert codes(verdict) == ["snp_root_not_trusted", "evidence_not_bound"]


# -- pins -------------------------------------------------------------------------------------

PINNED = (
    ("product", "Genoa"),
    ("signing_key", "VLEK"),
    ("vmpl", "1"),
    ("host_data", "00" * 32),
    ("id_key_digest", "11" * 48),
    ("author_key_digest", "11" * 48),
    ("family_id", "11" * 16),
    ("image_id", "11" * 16),
    ("chip_id", "11" * 64),
)


@pytest.mark.parametrize(("name", "value"), PINNED)
def test_every_pin_is_compared_missed_or_open(name: str, value: str) -> None:
    verdict = VCEK.verify(**{name: (value,)})  # type: ignore[arg-type]
    assert codes(verdict) == ["pin_refused"]
    assert message(verdict).startswith(name)
    verdict = VCEK.verify(**{name: None})  # type: ignore[arg-type]
    assert codes(verdict) == ["pin_missing"]
    assert message(verdict).startswith(name)
    assert VCEK.verify(**{name: None, "open": (name,)}).holds  # type: ignore[arg-type]


def test_an_empty_policy_leaves_nothing_unpinned() -> None:
    expected = Expectations("sev-snp", Requirements(roots=VCEK.requirements().roots), ())
    verdict = VCEK.verify(expected=expected)
    assert codes(verdict) == ["measurement_not_pinned", *["pin_missing"] * 11]
    assert "minimum_tcb" in message(verdict)


def test_the_measurement_is_compared() -> None:
    expected = replace(VCEK.expectations(), measurements=("00" * 48,))
    assert codes(VCEK.verify(expected=expected)) == ["measurement_refused"]
    expected = replace(VCEK.expectations(), measurements=())
    assert codes(VCEK.verify(expected=expected)) == ["measurement_not_pinned"]
    expected = replace(VCEK.expectations(), measurements=None)
    assert VCEK.verify(expected=expected).holds


def test_an_author_key_is_pinned_by_its_digest() -> None:
    machine = replace(VCEK, key_info=1, author_key_digest=b"\4" * 48, id_key_digest=b"\5" * 48)
    assert machine.verify().holds
    assert codes(machine.verify(author_key_digest=("00" * 48,))) == ["pin_refused"]


def test_a_migration_agent_is_refused_unless_open() -> None:
    for machine in (
        replace(VCEK, policy=0x70000),
        replace(VCEK, report_id_ma=b"\1" * 32),
    ):
        assert codes(machine.verify()) == ["snp_migration_agent_allowed"]
        assert machine.verify(open=("migration_agent",)).holds
    assert replace(VCEK, report_id_ma=bytes(32)).verify().holds
    verdict = verify_sev_snp(
        replace(VCEK, policy=0x70000, vmpl=2).parts(), Collateral(), None, 0, None
    )
    assert any("MIGRATE_MA" in note for note in verdict.notes)
    assert any("VMPL is 2" in note for note in verdict.notes)


@pytest.mark.parametrize("machine", [VCEK, MACHINES[2], TURIN], ids=lambda item: item.product)
def test_every_part_of_the_tcb_has_a_least_version(machine: SnpMachine) -> None:
    least = dict(machine.requirements().minimum_tcb[machine.product])
    for part, number in least.items():
        verdict = machine.verify(minimum_tcb={machine.product: least | {part: number + 1}})
        assert codes(verdict) == ["snp_tcb_too_low", "snp_tcb_too_low"]
        assert f"{part} {number + 1}" in message(verdict)
    verdict = machine.verify(minimum_tcb={})
    assert codes(verdict) == ["pin_missing", "pin_missing"]
    assert machine.verify(minimum_tcb={}, open=("minimum_tcb",)).holds


def test_a_guest_launched_on_old_firmware_is_refused() -> None:
    machine = replace(VCEK, launch_tcb=bytes((4, 1, 0, 0, 0, 0, 23, 219)))
    verdict = machine.verify()
    assert codes(verdict) == ["snp_tcb_too_low"]
    assert message(verdict).startswith("LAUNCH_TCB")


def test_a_revoked_chip_or_certificate_is_refused() -> None:
    chip = VCEK.chip.hex()
    assert codes(VCEK.verify(revoked=(chip,))) == ["revoked_identity"]
    assert codes(TURIN.verify(revoked=(TURIN.chip.hex(),))) == ["revoked_identity"]
    assert codes(TURIN.verify(revoked=(TURIN.chip.ljust(64, b"\0").hex(),))) == ["revoked_identity"]
    fields = MASKED.verify(open=("chip_id",)).fields
    for role in ("VLEK", "ASVK", "ARK"):
        verdict = MASKED.verify(open=("chip_id",), revoked=(fields[f"{role}.SHA-256"],))
        assert codes(verdict) == ["revoked_identity"]
    assert VCEK.verify(revoked=("00",)).holds


# -- which machine it is ----------------------------------------------------------------------


def test_a_vcek_names_the_chip_even_where_the_host_masks_it() -> None:
    machine = replace(VCEK, chip_id=bytes(64))
    verdict = machine.verify()
    assert verdict.holds
    assert verdict.identity == VCEK.chip.hex()
    assert "hwID" in verdict.notes[0]
    assert codes(machine.verify(chip_id=("11" * 64,))) == ["pin_refused"]
    assert codes(machine.verify(revoked=(VCEK.chip.hex(),))) == ["revoked_identity"]


def test_a_provider_is_pinned_under_a_vlek() -> None:
    assert VLEK.verify().holds
    assert codes(VLEK.verify(csp_id=None)) == ["pin_missing"]
    assert codes(VLEK.verify(csp_id=("CN=other",))) == ["pin_refused"]
    assert codes(VLEK.verify(chip_id=("11" * 64,))) == ["pin_refused"]


def test_a_masked_chip_under_a_vlek_must_be_left_open_by_name() -> None:
    assert codes(MASKED.verify()) == ["pin_missing"]
    assert codes(MASKED.verify(chip_id=("11" * 64,))) == ["pin_refused"]
    verdict = MASKED.verify(open=("chip_id",))
    assert verdict.holds
    assert verdict.identity == ""
    assert "nothing tells this machine" in verdict.notes[0]


def test_a_pinned_provider_is_not_passed_by_by_any_vcek() -> None:
    changes = {"csp_id": (VLEK.csp_id,), "signing_key": ("VCEK", "VLEK")}
    assert VCEK.verify(**changes).holds  # type: ignore[arg-type]
    verdict = VCEK.verify(**changes, open=("chip_id",))  # type: ignore[arg-type]
    assert codes(verdict) == ["pin_refused"]
    assert "a VCEK, which names no provider" in message(verdict)


def test_masking_does_not_hide_from_a_list_of_revoked_chips() -> None:
    verdict = MASKED.verify(open=("chip_id",), revoked=("11" * 64,))
    assert codes(verdict) == ["revoked_identity"]


@pytest.mark.parametrize("written", ["0a1234", "a1234", "000a1234"])
def test_revoked_numbers_are_compared_as_numbers(written: str) -> None:
    expected = Expectations("tdx", Requirements(revoked=(written,)), None)
    for found in ("a1234", "0a1234"):
        with pytest.raises(RevokedIdentity):
            expected.refuse_revoked("serial", found)
    expected.refuse_revoked("serial", "a12340")
    expected.refuse_revoked("serial", "")


def test_a_masked_report_without_certificate_names_nobody() -> None:
    machine = replace(VCEK, chip_id=bytes(64))
    verdict = machine.verify(parts={"report": machine.report()})
    assert verdict.identity == ""
    assert "no VCEK certificate names the chip" in verdict.notes[0]


def test_an_alias_check_that_is_not_complete_is_told() -> None:
    verdict = replace(VCEK, platform_info=1).verify()
    assert verdict.holds
    assert "ALIAS_CHECK_COMPLETE" in verdict.notes[0]


# -- for kinds that carry a report -------------------------------------------------------------


def test_a_report_is_judged_without_its_report_data() -> None:
    judgement = judge_report(
        VCEK.report(), [VCEK.endorsement()], VCEK.collateral(), VCEK.expectations(), NOW
    )
    assert all(check.failure is None for check in judgement.checks)
    assert all(check.name != "snp.report_data" for check in judgement.checks)
    assert judgement.report.report_data.startswith(b"challenge")
    assert judgement.product == "Milan"
    assert judgement.identity == VCEK.chip.hex()
    assert ReportDataRule(b"challenge").check(judgement.report) is None


def test_other_kinds_name_their_own_section_of_the_policy() -> None:
    expected = Expectations("azure-vtpm", VCEK.requirements(minimum_tcb={}), ())
    judgement = judge_report(VCEK.report(), [VCEK.endorsement()], VCEK.collateral(), expected, NOW)
    failures = [str(check.failure) for check in judgement.checks if check.failure]
    assert all("azure-vtpm" in failure for failure in failures)
    assert len(failures) == 3


@given(st.binary(max_size=1200), st.binary(max_size=300))
@settings(max_examples=100, deadline=None)
def test_arbitrary_evidence_raises_only_named_errors(report: bytes, certificates: bytes) -> None:
    parts = {"report": report, "certificates": certificates}
    with pytest.raises(EvidenceMalformed):
        VCEK.verify(parts=parts)


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_changed_evidence_raises_only_named_errors_and_is_refused(data: st.DataObject) -> None:
    report = bytearray(REPORT)
    certificate = bytearray(VCEK.endorsement())
    changed = data.draw(st.sampled_from([report, certificate]))
    changed[data.draw(st.integers(0, len(changed) - 1))] ^= data.draw(st.integers(1, 255))
    parts = {"report": bytes(report), "certificates": table(("VCEK", bytes(certificate)))}
    try:
        verdict = VCEK.verify(parts=parts)
    except EvidenceMalformed:
        return
    assert not verdict.holds
