"""Every rule of the Azure vTPM verifier refuses what it must, on evidence made here."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import tdx_machine
from azure_machine import AzureMachine, base64url, jwk, vtpm_key
from cryptography.hazmat.primitives.asymmetric import rsa

from placement.requirements import PINS
from security.attestation.azure_evidence import read_azure_evidence
from security.attestation.azure_vtpm import AZURE_VTPM_RULES, verify_azure_vtpm
from security.attestation.collateral import Collateral
from security.attestation.errors import HclReportMalformed, PinMissing, TpmQuoteMalformed
from security.attestation.verdict import Expectations, Verdict
from security.errors import EvidenceMalformed

HARDWARE = ("tdx", "sev-snp")


def codes(verdict: Verdict) -> set[str]:
    return {failure.code for failure in verdict.failures}


@pytest.mark.parametrize("hardware", HARDWARE)
def test_everything_holds(hardware: str) -> None:
    verdict = AzureMachine(hardware).verify()
    verdict.require()
    assert verdict.kind == "azure-vtpm"
    assert verdict.measurement
    assert verdict.identity
    assert verdict.fields["hardware"] == hardware
    assert verdict.fields["pcr0"] == AzureMachine().pcrs[0].hex()
    assert verdict.fields["vm-configuration.secure-boot"] == "True"
    assert any("not fresh" in note for note in verdict.notes)
    names = [check.name for check in verdict.checks]
    assert len(set(names)) == len(names)
    prefix = "tdx." if hardware == "tdx" else "snp."
    assert any(name.startswith(prefix) for name in names)


@pytest.mark.parametrize("hardware", HARDWARE)
def test_without_policy(hardware: str) -> None:
    machine = AzureMachine(hardware)
    verdict = verify_azure_vtpm(machine.parts(), machine.collateral(), None, machine.now, None)
    # The vendors' roots are pinned then; everything of the vTPM holds.
    assert codes(verdict) <= {
        "pck_root_unknown",
        "tdx_collateral_chain_invalid",
        "snp_root_not_trusted",
    }
    assert any("freshness was not judged" in note for note in verdict.notes)


def test_signature_may_be_a_structure() -> None:
    machine = AzureMachine()
    signature = machine.signature()
    structure = b"\0\x14\0\x0b" + len(signature).to_bytes(2, "big") + signature
    machine.verify(tpm_signature=structure).require()
    verdict = machine.verify(tpm_signature=b"\0\x16" + structure[2:])
    assert codes(verdict) == {"tpm_algorithm_refused"}
    verdict = machine.verify(tpm_signature=b"\0\x14\0\x04" + structure[4:])
    assert codes(verdict) == {"tpm_algorithm_refused"}
    assert codes(machine.verify(tpm_signature=signature[:-1])) == {"tpm_quote_malformed"}


def test_challenge_may_be_hashed() -> None:
    challenge = bytes(range(64))
    digest = hashlib.sha256(challenge).digest()
    AzureMachine(extra_data=digest).verify(bound_to=challenge).require()
    AzureMachine(extra_data=challenge).verify(bound_to=challenge).require()


def _cases() -> Iterator[tuple[str, AzureMachine, dict[str, bytes | None], set[str]]]:
    """Machines with one fault each, parts to replace, and the codes that name it."""
    plain = AzureMachine()
    wrong = b"\1" * 64
    for hardware in HARDWARE:
        machine = AzureMachine(hardware, reported=wrong)
        yield f"{hardware} over other data", machine, {}, {"runtime_data_mismatch"}
        digest = AzureMachine(hardware).report_data()[:32]
        more = AzureMachine(hardware, reported=digest + b"\1" * 32)
        yield f"{hardware} over more data", more, {}, {"runtime_data_mismatch"}
        stranger = AzureMachine(hardware, key=vtpm_key(3072))
        keys = [jwk(vtpm_key())]
        swapped = replace(stranger, keys=keys)
        # The signature is longer than the key: neither form of a signature.
        yield f"{hardware} quote by another key", swapped, {}, {"tpm_quote_malformed"}
        other = rsa.generate_private_key(65537, 2048)
        swapped = AzureMachine(hardware, key=other, keys=keys)
        yield f"{hardware} quote by a like key", swapped, {}, {"tpm_signature_invalid"}
    unusable = {"vtpm_key_unusable", "tpm_signature_invalid"}
    yield "no key", AzureMachine(keys=[]), {}, unusable
    yield "two keys", AzureMachine(keys=[jwk(vtpm_key())] * 2), {}, unusable
    yield "keys that are none", AzureMachine(claims=b'{"keys": 1}'), {}, unusable
    yield "claims without keys", AzureMachine(claims=b"{}"), {}, unusable
    short = rsa.generate_private_key(65537, 1024)
    yield "short key", AzureMachine(key=short), {}, unusable
    for change in ({"kty": "EC"}, {"e": "Aw"}, {"n": "!"}, {"n": 5}, {"n": "AAAA"}, {"e": None}):
        keys = [jwk(vtpm_key(), **change)]
        yield f"key with {change}", AzureMachine(keys=keys), {}, unusable
    even = base64url(b"\xfe" * 256)
    yield "even modulus", AzureMachine(keys=[jwk(vtpm_key(), n=even)]), {}, unusable
    message = bytearray(plain.message())
    message[60] ^= 1
    yield (
        "extraData changed",
        plain,
        {"tpm_message": bytes(message)},
        {"tpm_signature_invalid", "evidence_not_bound"},
    )
    signature = bytearray(plain.signature())
    signature[5] ^= 1
    flipped = {"tpm_signature": bytes(signature)}
    yield "signature changed", plain, flipped, {"tpm_signature_invalid"}
    sha1 = AzureMachine(selections=[(4, b"\xff\xff\xff")])
    yield "SHA-1 bank", sha1, {}, {"tpm_algorithm_refused"}
    both = AzureMachine(selections=[(0x0B, b"\xff\xff\xff"), (4, b"\xff\xff\xff")])
    yield "two banks", both, {}, {"tpm_algorithm_refused"}
    yield "no bank", AzureMachine(selections=[]), {}, {"tpm_algorithm_refused"}
    fewer = AzureMachine(selections=[(0x0B, b"\xff\xff\x7f")])
    yield "23 PCRs", fewer, {}, {"pcr_selection_refused"}
    more = AzureMachine(selections=[(0x0B, b"\xff\xff\xff\1")])
    yield "25 PCRs", more, {}, {"pcr_selection_refused"}
    yield "no PCRs", AzureMachine(selections=[(0x0B, b"")]), {}, {"pcr_selection_refused"}
    yield (
        "another PCR value",
        plain,
        {"pcrs": bytes(32) + b"".join(plain.pcrs[1:])},
        {"pcr_digest_mismatch", "pin_refused"},
    )
    yield "another digest", AzureMachine(pcr_digest=bytes(32)), {}, {"pcr_digest_mismatch"}
    yield "another challenge", AzureMachine(extra_data=b"old"), {}, {"evidence_not_bound"}
    yield "no challenge", AzureMachine(extra_data=b""), {}, {"evidence_not_bound"}
    yield "no TD quote", plain, {"td_quote": None}, {"td_quote_missing"}
    moved = tdx_machine.quote(report_data=plain.report_data(), mrtd=b"\1" * 48)
    yield (
        "quote of another TD",
        plain,
        {"td_quote": moved},
        {"td_report_mismatch", "measurement_refused"},
    )
    for offset in (128, 512, 520, 528):
        report = AzureMachine(td_report_changes={offset: b"\x77"})
        yield f"TDREPORT changed at {offset}", report, {}, {"td_report_mismatch"}
    replayed = tdx_machine.quote(report_data=b"other")
    yield (
        "quote over other data",
        plain,
        {"td_quote": replayed},
        {"td_report_mismatch", "runtime_data_mismatch"},
    )
    debug = AzureMachine(td_changes={"tdattributes": tdx_machine.SEPT_VE_DISABLE | 1})
    yield "TD in debug mode", debug, {}, {"td_debug"}
    yield (
        "TD with #VE",
        AzureMachine(td_changes={"tdattributes": 0}),
        {},
        {"sept_ve_not_disabled", "dcap_qvl_refused"},
    )


@pytest.mark.parametrize(("what", "machine", "parts", "expected"), list(_cases()))
def test_refused(
    what: str, machine: AzureMachine, parts: dict[str, bytes | None], expected: set[str]
) -> None:
    pinned = AzureMachine(machine.hardware).expectations()
    assert codes(machine.verify(pinned, **parts)) == expected, what


def test_every_error_is_shown_refusing() -> None:
    shown = {code for *_, codes in _cases() for code in codes}
    shown |= {"pin_missing", "freshness_unproven"}
    assert shown >= {error.code for rule in AZURE_VTPM_RULES for error in rule.errors}


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"header_signature": b"HCLB"}, HclReportMalformed),
        ({"header_version": 3}, HclReportMalformed),
        ({"request_type": 1}, HclReportMalformed),
        ({"runtime_version": 2}, HclReportMalformed),
        ({"hash_type": 2}, HclReportMalformed),
        ({"report_type": 1}, HclReportMalformed),
        ({"report_type": 3}, HclReportMalformed),
        ({"claims_size": 1 << 30}, HclReportMalformed),
        ({"claims_size": 4000}, HclReportMalformed),
        ({"claims_size": 10}, HclReportMalformed),
        ({"claims": b"[]"}, HclReportMalformed),
        ({"claims": b'{"a":1,"a":2}'}, HclReportMalformed),
        ({"claims": b"[" * 5000}, HclReportMalformed),
        ({"trailing": b"x"}, HclReportMalformed),
        ({"payload_end": b"x"}, HclReportMalformed),
        ({"magic": 0xFF544348}, TpmQuoteMalformed),
        ({"type": 0x8017}, TpmQuoteMalformed),
        ({"safe": 2}, TpmQuoteMalformed),
        ({"extra_data": bytes(67)}, TpmQuoteMalformed),
        ({"pcr_digest": bytes(65)}, TpmQuoteMalformed),
        ({"selections": [(11, b"\xff" * 5)]}, TpmQuoteMalformed),
        ({"selections": [(11, b"\xff" * 3)] * 17}, TpmQuoteMalformed),
        ({"message_end": b"x"}, TpmQuoteMalformed),
    ],
)
def test_malformed(changes: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        AzureMachine(**changes).verify(AzureMachine().expectations())


def test_every_cut_is_malformed() -> None:
    machine = AzureMachine(trailing=b"")
    expected, collateral = machine.expectations(), machine.collateral()
    parts = machine.parts()
    for name in ("hcl_report", "tpm_message"):
        for size in range(0, len(parts[name]), 13):
            with pytest.raises(EvidenceMalformed):
                verify_azure_vtpm(
                    parts | {name: parts[name][:size]}, collateral, expected, machine.now, None
                )


def test_parts_are_closed() -> None:
    machine = AzureMachine()
    for name in ("hcl_report", "tpm_message", "tpm_signature", "pcrs"):
        with pytest.raises(EvidenceMalformed, match=name):
            machine.verify(**{name: None})
    with pytest.raises(EvidenceMalformed, match="surprise"):
        machine.verify(surprise=b"")
    with pytest.raises(EvidenceMalformed, match="768"):
        machine.verify(pcrs=bytes(767))
    with pytest.raises(EvidenceMalformed, match="32768"):
        machine.verify(hcl_report=machine.hcl_report() + bytes(1 << 15))


# -- policy ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("hardware", HARDWARE)
def test_nothing_is_unpinned_by_silence(hardware: str) -> None:
    machine = AzureMachine(hardware)
    bare = machine.requirements()
    expected = Expectations(
        "azure-vtpm", replace(bare, pins={}, open=(), minimum_tcb={}), measurements=()
    )
    verdict = machine.verify(expected, bound_to=None)
    missing = {f.what for f in verdict.failures if isinstance(f, PinMissing)}
    assert {"hardware", *(f"pcr{i}" for i in range(24))} <= missing
    # Only the pins of the hardware at hand are asked for.
    foreign = set(PINS["sev-snp" if hardware == "tdx" else "tdx"]) - {"hardware"}
    assert not missing & foreign
    assert {"freshness_unproven", "measurement_not_pinned"} <= codes(verdict)
    assert "event_log_missing" not in codes(verdict)


@pytest.mark.parametrize("hardware", HARDWARE)
def test_pins_of_vtpm_and_hardware(hardware: str) -> None:
    machine = AzureMachine(hardware)
    for pin in ("pcr0", "pcr23"):
        changed = machine.expectations(pins={pin: ("00" * 32,)})
        assert codes(machine.verify(changed)) == {"pin_refused"}
    other = "sev-snp" if hardware == "tdx" else "tdx"
    changed = machine.expectations(pins={"hardware": (other,)})
    assert codes(machine.verify(changed)) == {"pin_refused"}
    opened = machine.expectations(unpin=("pcr7",), open=(*machine.requirements().open, "pcr7"))
    machine.verify(opened).require()
    unpinned = machine.expectations(unpin=("pcr7",))
    assert codes(machine.verify(unpinned)) == {"pin_missing"}


def test_freshness() -> None:
    machine = AzureMachine()
    assert codes(machine.verify(bound_to=None)) == {"freshness_unproven"}
    opened = machine.expectations(open=("freshness",))
    machine.verify(opened, bound_to=None).require()
    assert codes(machine.verify(opened, bound_to=b"another")) == {"evidence_not_bound"}
    empty = AzureMachine(extra_data=b"")
    assert codes(empty.verify(bound_to=b"")) == {"freshness_unproven"}


def test_opened_freshness_does_not_open_the_claims() -> None:
    machine = AzureMachine(reported=bytes(64))
    opened = machine.expectations(open=("freshness",))
    assert codes(machine.verify(opened)) == {"runtime_data_mismatch"}


def test_hardware_is_judged_by_its_own_verifier() -> None:
    snp = AzureMachine("sev-snp")
    debug = replace(snp, snp=replace(snp.snp, policy=snp.snp.policy | 1 << 19))
    assert "snp_debug_allowed" in codes(debug.verify(snp.expectations()))
    assert "snp_endorsement_missing" in codes(snp.verify(vcek=None))
    tdx = AzureMachine()
    assert codes(tdx.verify(collateral=Collateral())) == {"tdx_collateral_missing"}


# -- JSON documents -------------------------------------------------------------------------------


def _documents(parts: dict[str, bytes]) -> Iterator[dict[str, Any]]:
    """The shapes in which a machine's evidence may come."""
    pcrs = [parts["pcrs"][i : i + 32] for i in range(0, 768, 32)]
    document: dict[str, Any] = {
        "version": 1,
        "hcl_report": base64url(parts["hcl_report"]),
        "tpm_quote": {
            "message": parts["tpm_message"].hex(),
            "signature": parts["tpm_signature"].hex(),
            "pcrs": [value.hex() for value in pcrs],
        },
    }
    for name in ("vcek", "td_quote"):
        if name in parts:
            document[name] = base64url(parts[name])
    yield document
    if "vcek" in parts:
        text = base64.encodebytes(parts["vcek"]).decode()
        yield {
            "report": list(parts["hcl_report"]),
            "quote": {
                "message": list(parts["tpm_message"]),
                "signature": list(parts["tpm_signature"]),
                "pcrs": [list(value) for value in pcrs],
            },
            "vcek": f"-----BEGIN CERTIFICATE-----\n{text}-----END CERTIFICATE-----\n",
        }


@pytest.mark.parametrize("hardware", HARDWARE)
def test_documents_are_read(hardware: str) -> None:
    parts = AzureMachine(hardware).parts()
    for document in _documents(parts):
        assert read_azure_evidence(json.dumps(document).encode()) == parts


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"hcl_report": "*"},
        {"hcl_report": "A"},
        {"hcl_report": 5},
        {"tpm_quote": {}},
        {"tpm_quote": []},
        {"vcek": [1]},
        {"surprise": 1},
        {"version": 1.0},
    ],
)
def test_other_documents_are_malformed(change: dict[str, Any]) -> None:
    document = next(_documents(AzureMachine().parts())) | change
    with pytest.raises(EvidenceMalformed):
        read_azure_evidence(json.dumps(document).encode())


@pytest.mark.parametrize(
    "change",
    [
        {"report": [256]},
        {"report": [True]},
        {"report": "x"},
        {"quote": []},
        {"quote": {"pcrs": []}},
        {"vcek": "none"},
        {"vcek": "-----BEGIN CERTIFICATE-----\nA\n-----END CERTIFICATE-----"},
        {"surprise": 1},
    ],
)
def test_other_lists_are_malformed(change: dict[str, Any]) -> None:
    document = list(_documents(AzureMachine("sev-snp").parts()))[1] | change
    with pytest.raises(EvidenceMalformed):
        read_azure_evidence(json.dumps(document).encode())


def test_documents_are_bounded() -> None:
    for document in (b"", b"[" * 100_000, b"{}", b"\xff", b" " * (2 << 20)):
        with pytest.raises(EvidenceMalformed):
            read_azure_evidence(document)


def test_rules_are_named_once_and_say_their_source() -> None:
    names = [rule.name for rule in AZURE_VTPM_RULES]
    assert len(set(names)) == len(names)
    for rule in AZURE_VTPM_RULES:
        assert rule.name.startswith("azure_vtpm.")
        assert rule.source
        assert rule.errors
