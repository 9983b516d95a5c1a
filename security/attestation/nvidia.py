"""NVIDIA GPUs and NVSwitches: the verifier of kind "nvidia".

The parts of the evidence are "gpu.0.report", "gpu.0.chain", ... and "switch.0.report",
"switch.0.chain", ...: SPDM request and response as in `security.attestation.spdm`, and the
device's certificates, leaf first, in PEM (as NVML gives them) or DER. Each device is judged by
itself; then the set is: different devices, one challenge, as many as the policy says, and, in
protected-PCIe mode, GPUs and switches that name exactly each other.

Debug state is no field of the report: a device in debug or devtools mode measures other values
than its RIMs say, so it is the comparison with the RIMs that refuses it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from placement.requirements import Requirements
from security.attestation.collateral import Collateral
from security.attestation.errors import (
    DeviceRepeated,
    GpuSetIncomplete,
    MeasurementRefused,
    NoncesDiffer,
    TopologyMismatch,
)
from security.attestation.nvidia_certificates import DEVICE_ROOT, RIM_ROOT, unlisted
from security.attestation.nvidia_device import (
    GPU,
    POLICY_RULES,
    SOUNDNESS_RULES,
    SWITCH,
    Device,
    Question,
    Subject,
    leads_to_root,
    read_device,
)
from security.attestation.nvidia_references import (
    REFERENCE_POLICY_RULES,
    REFERENCE_RULES,
    Library,
    compare,
)
from security.attestation.spdm import OpaqueField
from security.attestation.verdict import Check, Expectations, FunctionRule, Verdict, judge
from security.errors import EvidenceMalformed

__all__ = ["KIND", "SET_POLICY_RULES", "SET_RULES", "DeviceSet", "SetRule", "verify_nvidia"]

KIND = "nvidia"

MAX_DEVICES = 16
"""Most GPUs, and most switches, of one machine."""

_PART = re.compile(r"(gpu|switch)\.(0|[1-9][0-9]?)\.(report|chain)")
_TEXT_FIELDS = (
    OpaqueField.PROJECT,
    OpaqueField.PROJECT_SKU,
    OpaqueField.CHIP_SKU,
    OpaqueField.CHIP_INFO,
)
_HEX_FIELDS = (
    OpaqueField.FWID,
    OpaqueField.PROTECTED_PCIE_STATUS,
    OpaqueField.NVDEC0_STATUS,
    OpaqueField.FEATURE_FLAG,
    OpaqueField.BOARD_ID,
)


@dataclass(frozen=True, slots=True, eq=False)
class DeviceSet:
    """All devices of one piece of evidence.

    Attributes:
        gpus: in the order of their numbers.
        switches: in the order of their numbers.
        lone: parts without their other half.
        question: what they are judged by.
    """

    gpus: tuple[Device, ...]
    switches: tuple[Device, ...]
    lone: tuple[str, ...]
    question: Question

    @property
    def devices(self) -> tuple[Device, ...]:
        """GPUs, then switches."""
        return self.gpus + self.switches


SetRule = FunctionRule[DeviceSet]
"""A rule about the devices together."""


def verify_nvidia(
    parts: Mapping[str, bytes],
    collateral: Collateral,
    expected: Expectations | None,
    now: int,
    bound_to: bytes | None,
) -> Verdict:
    """Judges the evidence of a machine's GPUs and switches.

    Args:
        parts: reports and chains by name, as this module says.
        collateral: manifests (`rims`) and revocation lists (`crls`).
        expected: pins of the policy; None to judge soundness only.
        now: Unix time in seconds.
        bound_to: the nonce (32 bytes) that the reports must answer; None if it is not known.

    Returns:
        a verdict on the set; one for each device is in its `devices`, GPUs first.

    Raises:
        EvidenceMalformed, SpdmUnsupported, CertificateUnsupported: a part does not parse.
    """
    requirements = Requirements() if expected is None else expected.requirements
    question = Question(
        collateral=collateral,
        expected=expected,
        now=now,
        bound_to=bound_to,
        device_roots=requirements.roots or (DEVICE_ROOT,),
        rim_roots=requirements.rim_roots or (RIM_ROOT,),
    )
    devices = _read_set(parts, question)
    library = Library(question)
    rules = SET_RULES if expected is None else SET_RULES + SET_POLICY_RULES
    return Verdict(
        kind=KIND,
        product=", ".join(sorted({gpu.architecture for gpu in devices.gpus} - {""})),
        measurement="",
        identity=",".join(gpu.serial for gpu in devices.gpus),
        fields={"gpus": str(len(devices.gpus)), "switches": str(len(devices.switches))},
        checks=judge(rules, devices),
        notes=_set_notes(devices) + library.notes,
        devices=tuple(_verdict(device, question, library) for device in devices.devices),
    )


def _read_set(parts: Mapping[str, bytes], question: Question) -> DeviceSet:
    halves: dict[str, dict[int, dict[str, bytes]]] = {GPU: {}, SWITCH: {}}
    for name, data in parts.items():
        match = _PART.fullmatch(name)
        if match is None or int(match[2]) >= MAX_DEVICES:
            raise EvidenceMalformed(
                f"nvidia: expected parts gpu.N.report, gpu.N.chain, switch.N.report and "
                f"switch.N.chain, N below {MAX_DEVICES}; found {name[:64]!r}"
            )
        halves[match[1]].setdefault(int(match[2]), {})[match[3]] = data
    found: dict[str, list[Device]] = {GPU: [], SWITCH: []}
    lone: list[str] = []
    for kind, numbered in halves.items():
        for number, half in sorted(numbered.items()):
            name = f"{kind}.{number}"
            if len(half) < 2:
                lone += [f"{name}.{part}" for part in half]
                continue
            found[kind].append(read_device(name, half["report"], half["chain"]))
    return DeviceSet(tuple(found[GPU]), tuple(found[SWITCH]), tuple(lone), question)


def _verdict(device: Device, question: Question, library: Library) -> Verdict:
    subject = Subject(device, question)
    compared = compare(device, question, library)
    checks: tuple[Check, ...] = judge(SOUNDNESS_RULES, subject)
    checks += judge(REFERENCE_RULES, compared)
    if question.expected is not None:
        checks += judge(POLICY_RULES, subject) + judge(REFERENCE_POLICY_RULES, compared)
    return Verdict(
        kind=f"{KIND}-{device.kind}",
        product=device.architecture,
        measurement="",
        identity=device.serial,
        fields=_fields(device),
        checks=checks,
        notes=_notes(device, question) + compared.notes,
    )


def _fields(device: Device) -> dict[str, str]:
    opaque = device.report.response.opaque
    fields = {
        "leaf": device.chain[0].common_name,
        "leaf_serial": device.serial,
        "nonce": device.report.request.nonce.hex(),
        "blocks": str(len(device.report.response.blocks)),
        "driver": device.driver,
        "vbios": device.vbios,
        "pdi": device.pdi,
    }
    for field in _TEXT_FIELDS:
        fields[field.name.lower()] = device.text(field)
    for field in _HEX_FIELDS:
        fields[field.name.lower()] = opaque.get(field, b"").hex()
    return {name: value for name, value in fields.items() if value}


def _notes(device: Device, question: Question) -> tuple[str, ...]:
    notes: list[str] = []
    if device.kind == GPU and OpaqueField.FWID not in device.report.response.opaque:
        notes.append(f"{device.name}: no FWID in the report (old firmware)")
    if not leads_to_root(Subject(device, question)):
        notes.append(
            f"{device.name}: revocation was not judged: its certificates lead to no accepted root"
        )
    elif question.expected is None or question.opens("revocation"):
        unknown = unlisted(
            device.chain, question.collateral.crls, question.now, f"{device.name} certificates"
        )
        if unknown is not None:
            notes.append(f"{device.name}: revocation was not judged: {unknown}")
    return tuple(notes)


def _set_notes(devices: DeviceSet) -> tuple[str, ...]:
    question = devices.question
    if question.opens("freshness") or (question.bound_to is None and question.expected is None):
        return ("freshness was not judged",)
    return ()


# -- rules of the set -------------------------------------------------------------------------


def _complete(subject: DeviceSet) -> None:
    if subject.lone:
        raise GpuSetIncomplete(
            "nvidia evidence", "a report and a chain of each device", f"{subject.lone[0]} alone"
        )
    if not subject.gpus:
        raise GpuSetIncomplete("nvidia evidence", "one GPU at least", "none")


def _distinct(subject: DeviceSet) -> None:
    seen: dict[str, str] = {}
    for device in subject.devices:
        # The PDI stays when a device gets a new leaf certificate.
        for identity in {device.serial, device.pdi, device.report.response.nonce.hex()} - {""}:
            if identity in seen:
                raise DeviceRepeated(
                    device.name,
                    "devices that differ",
                    f"certificate, PDI or answer of {seen[identity]}",
                )
            seen[identity] = device.name


def _one_nonce(subject: DeviceSet) -> None:
    nonces = {device.report.request.nonce for device in subject.devices}
    if len(nonces) > 1:
        raise NoncesDiffer("nvidia evidence", "one challenge for all devices", str(len(nonces)))


def _topology(subject: DeviceSet) -> None:
    if subject.question.opens("topology"):
        return
    protected = [gpu for gpu in subject.gpus if gpu.protected_pcie]
    if not protected and not subject.switches:
        return
    if len(protected) != len(subject.gpus) or not subject.switches:
        raise TopologyMismatch(
            "protected PCIe",
            "all GPUs in that mode and their switches, or neither",
            f"{len(protected)} of {len(subject.gpus)} GPUs and {len(subject.switches)} switches",
        )
    for one, others in (
        (subject.gpus, frozenset(switch.pdi for switch in subject.switches)),
        (subject.switches, frozenset(gpu.pdi for gpu in subject.gpus)),
    ):
        for device in one:
            if device.peers != others:
                missing, extra = device.peers - others, others - device.peers
                raise TopologyMismatch(
                    f"{device.name} peers",
                    "exactly the devices that are attested",
                    f"{len(missing)} that are not attested and {len(extra)} that it does not name",
                )


def _no_measurements(subject: DeviceSet) -> None:
    assert subject.question.expected is not None
    if subject.question.expected.measurements:
        # A pin that nothing is compared with would look like a check.
        raise MeasurementRefused(
            "measurements.nvidia in the policy",
            "none: RIMs and the pins of driver and vbios say what a GPU runs",
            str(len(subject.question.expected.measurements)),
        )


def _count(name: str, number: Callable[[DeviceSet], int]) -> SetRule:
    def look(subject: DeviceSet) -> None:
        assert subject.question.expected is not None
        subject.question.expected.require_pin(name, str(number(subject)))

    return SetRule(f"nvidia.pin.{name}", f"policy, requirements.nvidia.{name}", look)


SET_RULES: tuple[SetRule, ...] = (
    SetRule(
        "nvidia.set.complete",
        "NVIDIA attestation-sdk, evidence JSON: evidence, certificate",
        _complete,
    ),
    SetRule(
        "nvidia.set.distinct",
        "NVIDIA attestation-sdk, leaf serial (ueid), OPAQUE_FIELD_ID_DEVICE_PDI; DMTF DSP0274 1.1, "
        "MEASUREMENTS response message format, Nonce",
        _distinct,
    ),
    SetRule(
        "nvidia.set.nonce",
        "DMTF DSP0274 1.1, GET_MEASUREMENTS request message format, Nonce",
        _one_nonce,
    ),
    SetRule(
        "nvidia.set.topology",
        "NVIDIA nvtrust ppcie-verifier, TopologyValidation; OPAQUE_FIELD_ID_SWITCH_PDI, "
        "_DEVICE_PDI, _SWITCH_GPU_PDIS",
        _topology,
    ),
)
"""Asked of every set."""

SET_POLICY_RULES: tuple[SetRule, ...] = (
    SetRule(
        "nvidia.policy.measurements",
        "policy, measurements.nvidia; a GPU's measurements are compared with its RIMs",
        _no_measurements,
    ),
    _count("gpus", lambda devices: len(devices.gpus)),
    _count("switches", lambda devices: len(devices.switches)),
)
"""Asked where a policy is given."""
