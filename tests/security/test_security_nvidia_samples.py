"""Recorded evidence of real GPUs and switches gets the verdict that it deserves."""

from __future__ import annotations

import base64
import calendar
import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from evidence_samples import EVIDENCE, needs_evidence
from nras_issuer import Issuer

from placement.requirements import Requirements
from security.attestation.collateral import Collateral
from security.attestation.nras import verify_nras
from security.attestation.nvidia import verify_nvidia
from security.attestation.nvidia_certificates import DEVICE_ROOT, RIM_ROOT, load_certificate
from security.attestation.nvidia_evidence import read_json_evidence, read_text_evidence
from security.attestation.rim import verify_rim
from security.attestation.verdict import Expectations, Verdict
from security.errors import AppraisalError, EvidenceMalformed

pytestmark = needs_evidence

ROOT = EVIDENCE / "nvidia"
NOW = calendar.timegm((2025, 1, 1, 12, 0, 0))
"""The one day on which the signer of every RIM here was valid."""

NONCE = bytes.fromhex("931d8dd0add203ac3d8b4fbde75e115278eefcdceac5b87671a748f32364dfcb")
OLD_NONCE = bytes.fromhex("27a328247bf7935c993341cf587be6f05986ccce4fe7ba2c54100bd616a58f66")
SET_NONCE = bytes.fromhex("4760e30534a0621357d458b1a7936551b5dc4cd1e69718adf7ed9fb0252a537e")


def parts_of(name: str, chain: str = "chain.pem") -> dict[str, bytes]:
    folder = ROOT / name
    return read_text_evidence((folder / "report.hex").read_bytes(), (folder / chain).read_bytes())


@cache
def parts_of_set() -> Mapping[str, bytes]:
    folder = ROOT / "ppcie-8gpu-4switch"
    return {
        **read_json_evidence((folder / "gpu_evidence.json").read_bytes()),
        **read_json_evidence((folder / "switch_evidence.json").read_bytes()),
    }


def manifests(*paths: Path) -> Collateral:
    return Collateral(rims=tuple((path.name, path.read_bytes()) for path in paths))


def judged(
    parts: Mapping[str, bytes],
    papers: Collateral | None = None,
    bound_to: bytes | None = None,
    now: int = NOW,
) -> Verdict:
    return verify_nvidia(parts, papers or Collateral(), None, now, bound_to)


def codes(verdict: Verdict) -> set[str]:
    return {failure.code for failure in verdict.failures}


@cache
def expected() -> dict[str, dict[str, object]]:
    samples = json.loads((EVIDENCE / "expected.json").read_text())
    return {name: value for name, value in samples.items() if name.startswith("nvidia/")}


def sample_verdicts() -> dict[str, Verdict]:
    """By the names of expected.json, the verdict on each device."""
    found: dict[str, Verdict] = {}
    for folder in ("550.90.07", "535.86.09", "bad-signature", "570.124.03"):
        name = f"hopper-{folder}"
        nonce = OLD_NONCE if folder == "535.86.09" else NONCE
        found_rims = sorted((ROOT / name).glob("*.xml"))
        if name == "hopper-535.86.09":
            # The others are counter-examples; test_references_of_the_old_gpu has them.
            found_rims = [ROOT / name / "vbios_rim_match.xml"]
        papers = manifests(*found_rims)
        found[f"nvidia/{name}"] = judged(parts_of(name), papers, nonce).devices[0]
    held = read_json_evidence((ROOT / "hopper-cert-hold" / "evidence.json").read_bytes())
    found["nvidia/hopper-cert-hold"] = judged(held, None, NONCE).devices[0]
    devices = judged(parts_of_set(), None, SET_NONCE).devices
    for i, one in enumerate(devices):
        name = f"gpu[{i}]" if i < 8 else f"switch[{i - 8}]"
        found[f"nvidia/ppcie-8gpu-4switch/{name}"] = one
    return found


def test_every_sample_gets_its_verdict_and_fields() -> None:
    verdicts = sample_verdicts()
    missing = {name for name in expected() if name not in verdicts}
    assert not {name for name in missing if "nras" not in name and "rims" not in name}
    for name, verdict in verdicts.items():
        sample = expected()[name]
        assert verdict.holds == (sample["verdict"] != "reject"), name
        fields = sample["fields"]
        assert isinstance(fields, dict)
        assert verdict.fields["nonce"] == fields["request_nonce"]
        assert verdict.fields["blocks"] == str(fields["blocks"])
        assert verdict.fields["leaf"] == fields["leaf_cn"]
        assert verdict.identity == fields["leaf_serial"]
        for ours, theirs in (
            ("driver", "driver"),
            ("project", "project"),
            ("project_sku", "project_sku"),
            ("chip_sku", "chip_sku"),
            ("protected_pcie_status", "ppcie_status"),
            ("nvdec0_status", "nvdec0"),
            ("feature_flag", "feature_flag"),
            ("fwid", "fwid"),
            ("pdi", "switch_pdi"),
        ):
            if theirs == "switch_pdi" and verdict.kind == "nvidia-gpu":
                continue
            if theirs in fields:
                assert verdict.fields.get(ours, "") == fields[theirs], (name, ours)


def test_versions_of_the_vbios() -> None:
    found = {name: one.fields["vbios"] for name, one in sample_verdicts().items()}
    assert found["nvidia/hopper-550.90.07"] == "96.00.9F.00.01"
    assert found["nvidia/hopper-535.86.09"] == "96.00.5E.00.01"
    assert found["nvidia/hopper-570.124.03"] == "96.00.5E.00.04"
    assert found["nvidia/ppcie-8gpu-4switch/gpu[0]"] == "96.00.A5.00.01"
    assert found["nvidia/ppcie-8gpu-4switch/switch[0]"] == "96.10.73.00.01"


def test_pinned_roots_are_those_of_the_vendor() -> None:
    for file, fingerprint in (("device_root.pem", DEVICE_ROOT), ("rim_root.pem", RIM_ROOT)):
        pem = (ROOT / "roots" / file).read_text().split("-----")[2]
        assert load_certificate(base64.b64decode(pem)).fingerprint == fingerprint


# -- chains -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "more"),
    [
        ("2", {"nvidia_chain_not_authorised", "nvidia_architecture_refused"}),
        ("3", {"nvidia_chain_broken"}),
        ("4", {"nvidia_architecture_refused", "nvidia_report_signature_invalid"}),
    ],
)
def test_partial_chains(case: str, more: set[str]) -> None:
    parts = parts_of("hopper-550.90.07", f"bad_or_partial_chain_case{case}.pem")
    assert codes(judged(parts)) >= {"nvidia_chain_length"} | more


def test_a_report_under_another_chain() -> None:
    parts = {
        **parts_of("hopper-550.90.07"),
        "gpu.0.chain": parts_of("hopper-570.124.03")["gpu.0.chain"],
    }
    assert {"nvidia_report_signature_invalid", "nvidia_fwid_mismatch"} <= codes(judged(parts))


def test_the_bad_signature_is_one() -> None:
    verdict = judged(parts_of("hopper-bad-signature"))
    assert "nvidia_report_signature_invalid" in codes(verdict.devices[0])


def test_a_certificate_on_hold_is_denied_by_its_serial() -> None:
    parts = read_json_evidence((ROOT / "hopper-cert-hold" / "evidence.json").read_bytes())
    assert judged(parts).holds
    serial = judged(parts).devices[0].identity
    pins = ("architecture", "driver", "vbios", "device", "gpus", "switches")
    others = ("freshness", "revocation", "driver_rim", "vbios_rim")
    requirements = Requirements(open=(*pins, *others), revoked=(serial,))
    policy = Expectations("nvidia", requirements, None)
    assert codes(verify_nvidia(parts, Collateral(), policy, NOW, None)) == {"revoked_identity"}
    kept = replace(policy, requirements=replace(requirements, revoked=()))
    verify_nvidia(parts, Collateral(), kept, NOW, None).require()


# -- manifests --------------------------------------------------------------------------------


def test_references_of_the_old_gpu() -> None:
    folder = ROOT / "hopper-535.86.09"
    parts = parts_of("hopper-535.86.09")
    whole = judged(parts, manifests(*sorted(folder.glob("*.xml"))), OLD_NONCE)
    assert codes(whole) == {"rim_unusable", "rim_mismatch"}
    pair = manifests(folder / "vbios_rim_match.xml", folder / "vbios_rim_mismatch.xml")
    assert codes(judged(parts, pair, OLD_NONCE)) == {"rim_mismatch"}
    pair = manifests(folder / "vbios_rim_match.xml", folder / "driver_rim_bad_digest.xml")
    assert codes(judged(parts, pair, OLD_NONCE)) == {"rim_unusable"}
    assert judged(parts, manifests(folder / "vbios_rim_match.xml")).holds
    differing = judged(parts, manifests(folder / "vbios_rim_mismatch.xml"))
    assert codes(differing) == {"rim_mismatch"}
    assert "index 9" in str(differing.failures[0])
    bad = judged(parts, manifests(folder / "driver_rim_bad_digest.xml"))
    assert codes(bad) == {"rim_unusable"}
    assert "rim_signature_invalid" in str(bad.failures[0])


def test_references_outside_the_dates_of_their_signer() -> None:
    parts = parts_of("hopper-535.86.09")
    papers = manifests(ROOT / "hopper-535.86.09" / "vbios_rim_match.xml")
    for now in (
        calendar.timegm((2023, 6, 23, 9, 0, 0)),
        calendar.timegm((2025, 6, 22, 10, 0, 0)),
    ):
        verdict = judged(parts, papers, now=now)
        assert codes(verdict) == {"rim_unusable"}
        assert "nvidia_certificate_not_current" in str(verdict.failures[0])
    assert judged(parts, papers, now=calendar.timegm((2025, 6, 22, 9, 0, 0))).holds


def test_the_only_reference_of_the_newer_gpu_is_worth_nothing() -> None:
    papers = manifests(ROOT / "hopper-570.124.03" / "driver_rim_expired.xml")
    assert codes(judged(parts_of("hopper-570.124.03"), papers, NONCE)) == {"rim_unusable"}


@pytest.mark.parametrize(
    ("file", "code"),
    [
        ("driver_550.144.03_good.xml", ""),
        ("driver_550.144.03_bad_signature.xml", "rim_signature_invalid"),
        ("gb100_bad_chain.xml", "nvidia_root_not_pinned"),
    ],
)
def test_manifests(file: str, code: str) -> None:
    xml = (ROOT / "rims" / file).read_bytes()
    found = ""
    try:
        verify_rim(xml, (RIM_ROOT,), (), NOW, file, demand_lists=False)
    except AppraisalError as error:
        found = error.code
    assert found == code
    # "NVIDIA Reference Value GH100 CA" names a distribution point; there is no list among these.
    with pytest.raises(AppraisalError) as refused:
        verify_rim(xml, (RIM_ROOT,), (), NOW, file)
    assert refused.value.code == (code or "nvidia_revocation_unknown")


def test_a_manifest_is_bound_to_every_byte_of_its_content() -> None:
    xml = (ROOT / "hopper-535.86.09" / "vbios_rim_match.xml").read_bytes()
    flipped = xml.replace(b'index="9" active="True"', b'index="9" active="False"')
    assert flipped != xml
    papers = Collateral(rims=(("flipped.xml", flipped),))
    assert codes(judged(parts_of("hopper-535.86.09"), papers)) == {"rim_unusable"}


# -- freshness and tampering ------------------------------------------------------------------


def test_replayed_evidence_is_refused_without_its_nonce() -> None:
    for parts, nonce in (
        (parts_of("hopper-550.90.07"), NONCE),
        (parts_of("hopper-535.86.09"), OLD_NONCE),
        (parts_of_set(), SET_NONCE),
    ):
        assert judged(parts, None, nonce).holds
        assert codes(judged(parts, None, b"n" * 32)) == {"nvidia_nonce_mismatch"}
    with pytest.raises(AppraisalError):
        policy = Expectations("nvidia", Requirements(), None)
        verify_nvidia(parts_of("hopper-550.90.07"), Collateral(), policy, NOW, None).require()


def test_one_flipped_byte() -> None:
    parts = parts_of("hopper-550.90.07")
    report = parts["gpu.0.report"]
    measurement, response_nonce, driver = 60, 37 + 8 + 3520 + 3, report.index(b"550.90.07")
    for offset in (5, measurement, response_nonce, driver, len(report) - 1):
        changed = bytearray(report)
        changed[offset] ^= 1
        verdict = judged({**parts, "gpu.0.report": bytes(changed)})
        assert "nvidia_report_signature_invalid" in codes(verdict), offset


@pytest.mark.parametrize("cut", [1, 36, 37, 100, 4000, 4116])
def test_truncated_reports(cut: int) -> None:
    parts = parts_of("hopper-550.90.07")
    with pytest.raises(EvidenceMalformed):
        judged({**parts, "gpu.0.report": parts["gpu.0.report"][:cut]})


@pytest.mark.parametrize("offset", [42, 43, 44, 41])
def test_lengths_that_are_too_long(offset: int) -> None:
    parts = parts_of("hopper-550.90.07")
    report = bytearray(parts["gpu.0.report"])
    report[offset] = 0xFF
    with pytest.raises(EvidenceMalformed):
        judged({**parts, "gpu.0.report": bytes(report)})


# -- the set ----------------------------------------------------------------------------------


def test_the_set_holds() -> None:
    verdict = judged(parts_of_set(), None, SET_NONCE)
    verdict.require()
    assert verdict.product == "Hopper" and len(verdict.devices) == 12


@pytest.mark.parametrize("gone", [0, 4, 7])
def test_one_gpu_of_eight_is_dropped(gone: int) -> None:
    parts = {name: data for name, data in parts_of_set().items() if f"gpu.{gone}." not in name}
    assert codes(judged(parts)) == {"nvidia_topology_mismatch"}


def test_one_switch_is_presented_four_times() -> None:
    parts = dict(parts_of_set())
    for number in (1, 2, 3):
        for part in ("report", "chain"):
            parts[f"switch.{number}.{part}"] = parts[f"switch.0.{part}"]
    assert codes(judged(parts)) == {"nvidia_device_repeated", "nvidia_topology_mismatch"}


def test_a_switch_is_dropped() -> None:
    parts = {name: data for name, data in parts_of_set().items() if "switch.3" not in name}
    assert codes(judged(parts)) == {"nvidia_topology_mismatch"}


def test_a_gpu_alone_of_a_protected_set() -> None:
    parts = {name: data for name, data in parts_of_set().items() if name.startswith("gpu.0.")}
    verdict = judged(parts)
    assert codes(verdict) == {"nvidia_topology_mismatch"} and verdict.devices[0].holds


def test_gpus_of_two_challenges_are_paired() -> None:
    parts = dict(parts_of_set())
    for part, data in parts_of("hopper-550.90.07").items():
        parts[part.replace("gpu.0", "gpu.7")] = data
    assert {"nvidia_nonces_differ", "nvidia_topology_mismatch"} <= codes(judged(parts))


def test_a_gpu_is_no_switch() -> None:
    parts = dict(parts_of_set())
    for part in ("report", "chain"):
        parts[f"switch.0.{part}"] = parts[f"gpu.0.{part}"]
    assert "nvidia_architecture_refused" in codes(judged(parts))


# -- NRAS -------------------------------------------------------------------------------------


def test_the_token_of_nras() -> None:
    token = (ROOT / "nras-eat" / "hopper_detached_eat.json").read_bytes()
    now = 1749601900
    verdict = verify_nras(token, Collateral(), None, now, NONCE)
    assert codes(verdict) == {"nras_key_missing"}
    assert verdict.devices[0].identity == "53c22ba15e5d68088282da074ed9fb37aa585771"
    header = json.loads(base64.urlsafe_b64decode(json.loads(token)[0][1].split(".")[0] + "=="))
    stranger = Collateral(jwks=(Issuer(kid=header["kid"]).jwks(),))
    assert codes(verify_nras(token, stranger, None, now, NONCE)) == {"nras_signature_invalid"}
    late = codes(verify_nras(token, stranger, None, 1749605458, NONCE))
    assert late == {"nras_signature_invalid", "nras_not_current"}
    other = codes(verify_nras(token, stranger, None, now, b"n" * 32))
    assert other == {"nras_signature_invalid", "nras_nonce_mismatch"}
