"""The broker admits on real kinds of evidence, bound to its own challenge, and on nothing less."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import nvidia_machine
import pytest
from hardware_lab import HardwareLab, collector, policy_text, write_collateral
from nvml_stand_in import NvmlStandIn
from security_samples import Lab
from snp_machine import NOW, SnpMachine, crl

from security.attestation.collateral import Collateral
from security.attestation.evidence import Binding, encode_parts, evidence_digest, gpu_nonce
from security.attestation.nvml import collect_gpus
from security.broker import key_broker
from security.broker.admission import AdmissionRequest
from security.errors import CollateralUnusable, SecurityError

MACHINE = SnpMachine(product="Genoa")
GPUS = nvidia_machine.machine(2, 0).devices


def make_lab(path: Path, text: str, collateral: Collateral | None = None) -> HardwareLab:
    known = MACHINE.collateral() if collateral is None else collateral
    return HardwareLab(path, text, collateral=known)


@pytest.fixture
def lab(tmp_path: Path) -> HardwareLab:
    return make_lab(tmp_path, policy_text(MACHINE))


@pytest.fixture
def gpu_lab(tmp_path: Path) -> HardwareLab:
    known = MACHINE.collateral().with_more(nvidia_machine.collateral())
    return make_lab(tmp_path, policy_text(MACHINE, GPUS), known)


def refused(lab: Lab, request: AdmissionRequest) -> str:
    """The code of the refusal, which is in the log."""
    with pytest.raises(SecurityError) as caught:
        lab.broker.admit(request, "test")
    assert lab.audit()[-1]["code"] == caught.value.code
    return caught.value.code


def test_admitted(lab: HardwareLab) -> None:
    assert lab.broker.admit(lab.request(collect=collector(MACHINE).collect), "test")
    # The node is the chip that proved itself, whatever name the shard goes by.
    assert lab.audit()[-1]["node"] == MACHINE.chip.ljust(64, b"\0").hex()
    assert lab.audit()[-1]["kind"] == "sev-snp"


def test_vendor_roots(tmp_path: Path) -> None:
    """Without the test's root in the policy AMD's own counts, and did not issue this."""
    text = policy_text(MACHINE, requirements=MACHINE.requirements(roots=()))
    lab = make_lab(tmp_path, text)
    assert refused(lab, lab.request(collect=collector(MACHINE).collect)) == "snp_root_not_trusted"


def test_other_software(tmp_path: Path) -> None:
    lab = make_lab(tmp_path, policy_text(MACHINE, measurement="ab" * 48))
    assert refused(lab, lab.request(collect=collector(MACHINE).collect)) == "measurement_refused"


def test_debug(lab: HardwareLab) -> None:
    debugged = replace(MACHINE, policy=MACHINE.policy | 1 << 19)
    assert refused(lab, lab.request(collect=collector(debugged).collect)) == "snp_debug_allowed"


def test_replay(lab: HardwareLab) -> None:
    old = collector(MACHINE).collect(bytes(range(64)))
    assert refused(lab, lab.request(collect=lambda _: old)) == "evidence_not_bound"


def test_freshness_is_never_open(tmp_path: Path) -> None:
    """A policy may leave it open for recorded evidence; the broker compares all the same."""
    requirements = MACHINE.requirements(open=("freshness",))
    lab = make_lab(tmp_path, policy_text(MACHINE, requirements=requirements))
    old = collector(MACHINE).collect(bytes(range(64)))
    assert refused(lab, lab.request(collect=lambda _: old)) == "evidence_not_bound"
    assert lab.broker.admit(lab.request(collect=collector(MACHINE).collect), "test")


def test_one_chip_for_two_stages(tmp_path: Path) -> None:
    lab = make_lab(tmp_path, policy_text(MACHINE, separate_nodes=True))
    collect = collector(MACHINE).collect
    assert lab.broker.admit(lab.request("stage-0", collect=collect, node="node-a"), "test")
    assert refused(lab, lab.request("stage-1", collect=collect, node="node-b")) == "claims_rejected"


def test_masked_chips_are_one_node(tmp_path: Path) -> None:
    """Two machines that do not say which they are may be one and the same."""
    masked = SnpMachine(product="Milan", key="VLEK", chip_id=bytes(64))
    requirements = masked.requirements(open=("chip_id",))
    text = policy_text(masked, requirements=requirements, separate_nodes=True)
    lab = make_lab(tmp_path, text, masked.collateral())
    collect = collector(masked).collect
    assert lab.broker.admit(lab.request("stage-0", collect=collect, node="node-a"), "test")
    assert refused(lab, lab.request("stage-1", collect=collect, node="node-b")) == "claims_rejected"


@pytest.mark.parametrize("first", [True, False])
def test_a_masked_chip_may_be_the_one_that_is_known(tmp_path: Path, first: bool) -> None:
    """A provider's host may tell the chip to one stage and mask it for the other."""
    masked = SnpMachine(product="Milan", key="VLEK", chip_id=bytes(64))
    told = replace(masked, chip_id=bytes(range(1, 65)))
    requirements = masked.requirements(open=("chip_id",))
    text = policy_text(masked, requirements=requirements, separate_nodes=True)
    lab = make_lab(tmp_path, text, masked.collateral())
    order = [told, masked] if first else [masked, told]
    one, other = (collector(machine).collect for machine in order)
    assert lab.broker.admit(lab.request("stage-0", collect=one, node="node-a"), "test")
    assert refused(lab, lab.request("stage-1", collect=other, node="node-b")) == "claims_rejected"


def test_a_fault_of_ours_is_in_the_log(lab: HardwareLab, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ValueError("something of the evidence")

    monkeypatch.setattr(key_broker, "appraise", fail)
    with pytest.raises(ValueError, match="something"):
        lab.broker.admit(lab.request(collect=collector(MACHINE).collect), "test")
    entry = lab.audit()[-1]
    assert (entry["code"], entry["reason"]) == ("internal_error", "failed by ValueError")


# -- collateral ------------------------------------------------------------------------------------


def test_collateral_is_read_anew(lab: HardwareLab) -> None:
    collect = collector(MACHINE).collect
    assert lab.broker.admit(lab.request(collect=collect), "test")
    revoking = crl(MACHINE.product, (MACHINE.issuer_serial,))
    write_collateral(lab.path / "collateral", Collateral(crls=(revoking, b"")))
    (lab.path / "collateral" / "list-1.crl").unlink()
    assert refused(lab, lab.request(collect=collect)) == "snp_certificate_revoked"


def test_no_collateral(tmp_path: Path) -> None:
    lab = make_lab(tmp_path, policy_text(MACHINE), Collateral())
    assert refused(lab, lab.request(collect=collector(MACHINE).collect)).startswith("snp_")


def test_unusable_collateral(lab: HardwareLab, tmp_path: Path) -> None:
    secret = tmp_path / "secret.der"
    secret.write_bytes(b"secret")
    (lab.path / "collateral" / "link.der").symlink_to(secret)
    request = lab.request(collect=collector(MACHINE).collect)
    assert refused(lab, request) == CollateralUnusable.code


# -- devices ---------------------------------------------------------------------------------------


def with_gpus(
    lab: HardwareLab,
    *,
    nonce: bytes | None = None,
    stated: bytes | None = None,
    sent: bytes | None = None,
) -> AdmissionRequest:
    """An admission with the GPUs' evidence.

    Args:
        nonce: what the GPUs answer; what they should if None.
        stated: evidence whose digest the machine's evidence is bound to; the GPUs' if None.
        sent: evidence that is sent; the GPUs' if None.
    """
    found: list[bytes] = []

    def bind(binding: Binding) -> Binding:
        asked = gpu_nonce(binding.nonce) if nonce is None else nonce
        found.append(encode_parts(collect_gpus(asked, NvmlStandIn(GPUS))))
        bound = found[0] if stated is None else stated
        return replace(binding, gpu_evidence_digest=evidence_digest(bound))

    request = lab.request(collect=collector(MACHINE).collect, bind=bind)
    return replace(request, device_evidence=found[0] if sent is None else sent)


def test_admitted_with_gpus(gpu_lab: HardwareLab) -> None:
    assert gpu_lab.broker.admit(with_gpus(gpu_lab), "test")


def test_gpus_missing(gpu_lab: HardwareLab) -> None:
    request = with_gpus(gpu_lab, stated=b"", sent=b"")
    assert refused(gpu_lab, request) == "device_evidence_missing"


def test_gpus_of_another_challenge(gpu_lab: HardwareLab) -> None:
    assert refused(gpu_lab, with_gpus(gpu_lab, nonce=b"n" * 32)) == "nvidia_nonce_mismatch"


def test_freshness_of_gpus_is_never_open(tmp_path: Path) -> None:
    """As for machines: a policy may leave it open for recorded evidence only."""
    document = json.loads(policy_text(MACHINE, GPUS))
    document["requirements"]["nvidia"]["open"] = ["freshness"]
    known = MACHINE.collateral().with_more(nvidia_machine.collateral())
    lab = make_lab(tmp_path, json.dumps(document), known)
    assert refused(lab, with_gpus(lab, nonce=b"n" * 32)) == "nvidia_nonce_mismatch"
    assert lab.broker.admit(with_gpus(lab), "test")


def test_gpu_evidence_swapped(gpu_lab: HardwareLab) -> None:
    other = encode_parts(collect_gpus(b"n" * 32, NvmlStandIn(GPUS)))
    assert refused(gpu_lab, with_gpus(gpu_lab, sent=other)) == "gpu_evidence_swapped"
    assert refused(gpu_lab, with_gpus(gpu_lab, stated=other)) == "gpu_evidence_swapped"


def test_gpu_evidence_swapped_with_its_digest(gpu_lab: HardwareLab) -> None:
    """Sent and stated agree, but the machine's own evidence is over another digest."""
    request = with_gpus(gpu_lab)
    other = encode_parts(
        collect_gpus(gpu_nonce(request.nonce), NvmlStandIn(nvidia_machine.machine(2, 0).devices))
    )
    binding = replace(request.binding, gpu_evidence_digest=evidence_digest(other))
    request = replace(request, binding=binding, device_evidence=other)
    assert refused(gpu_lab, request) == "evidence_not_bound"


def test_one_gpu_of_two(gpu_lab: HardwareLab) -> None:
    found: list[bytes] = []

    def bind(binding: Binding) -> Binding:
        parts = collect_gpus(gpu_nonce(binding.nonce), NvmlStandIn(GPUS[:1]))
        found.append(encode_parts(parts))
        return replace(binding, gpu_evidence_digest=evidence_digest(found[0]))

    request = gpu_lab.request(collect=collector(MACHINE).collect, bind=bind)
    assert refused(gpu_lab, replace(request, device_evidence=found[0])) == "pin_refused"


def test_gpus_that_nobody_asked_for(lab: HardwareLab) -> None:
    assert refused(lab, with_gpus(lab)) == "gpu_evidence_unexpected"
    assert refused(lab, with_gpus(lab, sent=b"")) == "gpu_evidence_unexpected"


def test_device_evidence_too_long(gpu_lab: HardwareLab) -> None:
    request = replace(with_gpus(gpu_lab), device_evidence=bytes((1 << 20) + 1))
    assert refused(gpu_lab, request) == "malformed_input"


def test_device_evidence_malformed(gpu_lab: HardwareLab) -> None:
    assert refused(gpu_lab, with_gpus(gpu_lab, stated=b"x", sent=b"x")) == "evidence_malformed"


def test_plan_replaced_meanwhile(lab: HardwareLab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evidence is appraised without the lock; what was installed meanwhile counts."""
    real = key_broker.appraise

    def slow(*arguments: object, **options: object) -> object:
        lab.install(generation=2)
        return real(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(key_broker, "appraise", slow)
    assert refused(lab, lab.request(collect=collector(MACHINE).collect)) == "plan_replaced"


def test_regions_are_as_declared(tmp_path: Path) -> None:
    """Evidence says no region: what the shard declares counts, and nothing counts as any."""
    document = {**json.loads(policy_text(MACHINE)), "regions": ["eu-west"]}
    lab = make_lab(tmp_path, json.dumps(document))
    asked = lab.request(collect=collector(MACHINE).collect)
    assert refused(lab, asked) == "claims_rejected"
    asked = lab.request(collect=collector(MACHINE).collect)
    assert refused(lab, replace(asked, region="us-east")) == "claims_rejected"
    asked = lab.request(collect=collector(MACHINE).collect)
    assert refused(lab, replace(asked, region="eu west")) == "malformed_input"
    asked = lab.request(collect=collector(MACHINE).collect)
    assert lab.broker.admit(replace(asked, region="eu-west"), "test")


def test_times(lab: HardwareLab) -> None:
    """Expired the next year, not before."""
    lab.clock.now = NOW + 370.0 * 24 * 3600
    assert refused(lab, lab.request(collect=collector(MACHINE).collect)).startswith("snp_")
