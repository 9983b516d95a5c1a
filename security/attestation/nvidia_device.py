"""One NVIDIA device's report and chain, and the rules that it must keep by itself."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from security.attestation.collateral import Collateral
from security.attestation.errors import (
    DeviceArchitectureRefused,
    DeviceRequestRefused,
    FirmwareIdMismatch,
    FirmwareIdMissing,
    FreshnessUnproven,
    NonceMismatch,
    OpaqueDataMissing,
    OpaqueDataRefused,
    ReportSignatureInvalid,
)
from security.attestation.nvidia_certificates import (
    Certificate,
    check_authority,
    check_dates,
    check_issuers,
    check_length,
    check_revocation,
    check_root,
    read_chain,
    unlisted,
    verify_raw_signature,
)
from security.attestation.spdm import OpaqueField, Report, read_report
from security.attestation.verdict import Expectations, FunctionRule, NotJudged
from security.errors import AppraisalError

__all__ = [
    "POLICY_RULES",
    "SOUNDNESS_RULES",
    "Device",
    "DeviceRule",
    "Question",
    "Subject",
    "leads_to_root",
    "read_device",
]

GPU = "gpu"
SWITCH = "switch"

CHAIN_LENGTH = 5
"""Leaf (firmware), boot ROM, provisioner, identity, root."""

PDI_BYTES = 8
STATUS_ON = 0xAA
STATUS_OFF = 0x55
MODE_PROTECTED_PCIE = 2
_MAX_OPAQUE_VERSION = 1
_MAX_LINKS = 64
_SWITCH_GPUS = 8
_HOPPER = re.compile("GH100")
_BLACKWELL = re.compile("GB[12][0-9]{2}")
_TEXT = re.compile(rb"[0-9A-Za-z.]{1,64}")
_SWITCH_VBIOS = re.compile(rb"[0-9A-Fa-f]{2}(?:\.[0-9A-Fa-f]{2}){4}")

_SDK = "NVIDIA attestation-sdk"


@dataclass(frozen=True, slots=True, eq=False)
class Device:
    """What one device said, and the certificates that came with it.

    Attributes:
        name: "gpu.0", "switch.3": as its parts are named.
        kind: "gpu" or "switch".
        report: request and response.
        chain: leaf first.
        chip: by the leaf's common name: "GH100", "GB100", "LS10"; "" if it names none.
        architecture: "Hopper", "Blackwell", "LS10"; "" if unknown.
        driver: version of the driver, "" for switches.
        vbios: version of the VBIOS, such as "96.00.5E.00.01".
        pdi: the device's PDI (8 bytes, hex): the boot ROM certificate's serial number ends in it,
            which holds for every device whose evidence was seen, and switches state theirs.
        peers: PDIs that the device is connected to, as their devices spell them; without zeros.
    """

    name: str
    kind: str
    report: Report
    chain: tuple[Certificate, ...]
    chip: str
    architecture: str
    driver: str
    vbios: str
    pdi: str
    peers: frozenset[str]

    @property
    def serial(self) -> str:
        """Serial number of the leaf certificate, hex: names the device to policies."""
        return self.chain[0].serial

    @property
    def protected_pcie(self) -> bool:
        """Whether the GPU says that it is in protected-PCIe mode."""
        return self.byte(OpaqueField.PROTECTED_PCIE_STATUS) == STATUS_ON

    def byte(self, field: OpaqueField) -> int | None:
        """A field of the opaque data that is one byte; None where it is absent or longer."""
        value = self.report.response.opaque.get(field, b"")
        return value[0] if len(value) == 1 else None

    def text(self, field: OpaqueField) -> str:
        """A field that is text ended by zeros, "" where it is absent or anything else."""
        value = self.report.response.opaque.get(field, b"").rstrip(b"\0")
        return value.decode("ascii") if _TEXT.fullmatch(value) else ""


def read_device(name: str, report: bytes, chain: bytes) -> Device:
    """Parses the two parts of a device.

    Raises:
        EvidenceMalformed, SpdmUnsupported, CertificateUnsupported
    """
    kind = name.partition(".")[0]
    parsed = read_report(report, name)
    certificates = read_chain(chain, f"{name}.chain")
    opaque = parsed.response.opaque
    chip = certificates[0].common_name.partition(" ")[0].replace("_", "")
    if kind == SWITCH:
        pdi = opaque.get(OpaqueField.SWITCH_PDI, b"").hex()
        links = opaque.get(OpaqueField.SWITCH_GPU_PDIS, b"")[: _SWITCH_GPUS * PDI_BYTES]
        peers = {item.hex() for item in _pdis(links)}
    else:
        pdi = certificates[1].serial[-2 * PDI_BYTES :] if len(certificates) > 1 else ""
        links = opaque.get(OpaqueField.SWITCH_PDI, b"")[: _MAX_LINKS * PDI_BYTES]
        peers = {item[::-1].hex() for item in _pdis(links)}
    device = Device(
        name=name,
        kind=kind,
        report=parsed,
        chain=certificates,
        chip=chip,
        architecture=_architecture(chip),
        driver="",
        vbios=_vbios(kind, opaque.get(OpaqueField.VBIOS_VERSION, b"")),
        pdi=pdi,
        peers=frozenset(peers - {"00" * PDI_BYTES}),
    )
    return replace(device, driver=device.text(OpaqueField.DRIVER_VERSION))


def _pdis(data: bytes) -> list[bytes]:
    return [data[start : start + PDI_BYTES] for start in range(0, len(data), PDI_BYTES)]


def _architecture(chip: str) -> str:
    if _HOPPER.fullmatch(chip):
        return "Hopper"
    if _BLACKWELL.fullmatch(chip):
        return "Blackwell"
    return chip if chip == "LS10" else ""


def _vbios(kind: str, value: bytes) -> str:
    """The version as NVML and RIMs spell it; "" for another shape."""
    if kind == SWITCH:
        return value.decode("ascii").upper() if _SWITCH_VBIOS.fullmatch(value) else ""
    if len(value) != 8 or any(value[5:]):
        return ""
    octets = value[3::-1] + value[4:5]
    return ".".join(f"{octet:02X}" for octet in octets)


@dataclass(frozen=True, slots=True, eq=False)
class Question:
    """What a report is judged by.

    Attributes:
        collateral: revocation lists and manifests.
        expected: the policy's pins; None where only soundness is judged.
        now: Unix time in seconds.
        bound_to: the nonce (32 bytes) that the reports must answer; None if not judged.
        device_roots: SHA-256 (hex) of the accepted roots of devices.
        rim_roots: SHA-256 (hex) of the accepted roots of manifests.
    """

    collateral: Collateral
    expected: Expectations | None
    now: int
    bound_to: bytes | None
    device_roots: tuple[str, ...]
    rim_roots: tuple[str, ...]

    def opens(self, name: str) -> bool:
        """Whether a policy is given and leaves something open."""
        return self.expected is not None and self.expected.requirements.opens(name)


@dataclass(frozen=True, slots=True, eq=False)
class Subject:
    """A device and the question."""

    device: Device
    question: Question


DeviceRule = FunctionRule[Subject]
"""A rule about one device."""


def _request(subject: Subject) -> None:
    request = subject.device.report.request
    if not request.attributes & 1 or request.operation != 0xFF:
        raise DeviceRequestRefused(
            f"{subject.device.name} request",
            "Param1 with bit 0 (signature) and Param2 0xff (all measurements)",
            f"{request.attributes:#04x} and {request.operation:#04x}",
        )


def _chain_name(subject: Subject) -> str:
    return f"{subject.device.name} certificates"


def _length(subject: Subject) -> None:
    check_length(subject.device.chain, CHAIN_LENGTH, CHAIN_LENGTH, _chain_name(subject))


def _issuers(subject: Subject) -> None:
    check_issuers(subject.device.chain, _chain_name(subject))


def _authority(subject: Subject) -> None:
    check_authority(subject.device.chain, _chain_name(subject))


def _dates(subject: Subject) -> None:
    check_dates(subject.device.chain, subject.question.now, _chain_name(subject))


def _root(subject: Subject) -> None:
    check_root(subject.device.chain, subject.question.device_roots, _chain_name(subject))


def leads_to_root(subject: Subject) -> bool:
    """Whether genuine authorities issued the device's chain, by the rules above but the dates.

    Revocation is looked at only then: for issuers that somebody made up it means nothing, and each
    would cost a signature for every list under its name.
    """
    try:
        for look in (_length, _root, _issuers, _authority):
            look(subject)
    except AppraisalError:
        return False
    return True


def _revocation(subject: Subject) -> None:
    if not leads_to_root(subject):
        return
    check_revocation(subject.device.chain, subject.question.collateral.crls, _chain_name(subject))


def _kind(subject: Subject) -> None:
    device = subject.device
    known = device.architecture == "LS10" if device.kind == SWITCH else device.architecture != ""
    if not known or (device.kind == GPU and device.architecture == "LS10"):
        wanted = "an LS10 switch" if device.kind == SWITCH else "a Hopper or Blackwell GPU"
        raise DeviceArchitectureRefused(
            f"{device.name} leaf certificate", wanted, repr(device.chain[0].common_name[:64])
        )
    boot = device.chain[1].common_name if len(device.chain) > 1 else ""
    if boot.split(" ")[:2] != device.chain[0].common_name.split(" ")[:2]:
        raise DeviceArchitectureRefused(
            f"{device.name} boot ROM certificate",
            f"the chip of the leaf, {device.chain[0].common_name[:64]!r}",
            repr(boot[:64]),
        )


def _signature(subject: Subject) -> None:
    report = subject.device.report
    leaf = subject.device.chain[0]
    if not verify_raw_signature(leaf, report.response.signature, report.signed):
        raise ReportSignatureInvalid(
            f"{subject.device.name} report", "a signature by its leaf certificate", "another"
        )


def _nonce(subject: Subject) -> None:
    question, found = subject.question, subject.device.report.request.nonce
    if question.opens("freshness"):
        raise NotJudged("the policy opens freshness")
    if question.bound_to is None:
        if question.expected is not None:
            raise FreshnessUnproven(
                f"{subject.device.name} nonce", "a challenge to compare it with", "none"
            )
        raise NotJudged("no challenge was given")
    if found != question.bound_to:
        raise NonceMismatch(
            f"{subject.device.name} nonce",
            f"{question.bound_to.hex()}",
            f"{found.hex()}",
        )


def _firmware_id(subject: Subject) -> None:
    device = subject.device
    found = device.report.response.opaque.get(OpaqueField.FWID)
    certified = device.chain[0].firmware_id
    if found is None:
        raise NotJudged("the report has none")
    if found != certified:
        raise FirmwareIdMismatch(
            f"{device.name} FWID",
            f"{certified.hex()} of the leaf" if certified else "none: the leaf has none",
            f"{found.hex()}",
        )


def _firmware_id_present(subject: Subject) -> None:
    device = subject.device
    # LS10 reports none; its leaf certificate names the firmware nevertheless.
    if (
        device.kind == GPU
        and OpaqueField.FWID not in device.report.response.opaque
        and not subject.question.opens("fwid")
    ):
        raise FirmwareIdMissing(
            f"{device.name} FWID", "one", "none", "update the VBIOS, or open fwid in the policy"
        )


_REQUIRED = {
    GPU: (OpaqueField.DRIVER_VERSION, OpaqueField.VBIOS_VERSION, OpaqueField.NVDEC0_STATUS),
    SWITCH: (
        OpaqueField.VBIOS_VERSION,
        OpaqueField.SWITCH_PDI,
        OpaqueField.SWITCH_GPU_PDIS,
        OpaqueField.LOCK_SWITCH_STATUS,
    ),
}


def _opaque_present(subject: Subject) -> None:
    for field in _REQUIRED[subject.device.kind]:
        if field not in subject.device.report.response.opaque:
            raise OpaqueDataMissing(f"{subject.device.name} opaque data", field.name, "none")


def _opaque_known(subject: Subject) -> None:
    device, opaque = subject.device, subject.device.report.response.opaque

    def refuse(field: OpaqueField, expected: str) -> None:
        value = opaque[field].hex()
        shown = f"{value[:32]}..." if len(value) > 32 else value or "nothing"
        raise OpaqueDataRefused(f"{device.name} {field.name}", expected, shown)

    version = int.from_bytes(opaque.get(OpaqueField.OPAQUE_DATA_VERSION, b""), "little")
    if version > _MAX_OPAQUE_VERSION:
        refuse(OpaqueField.OPAQUE_DATA_VERSION, f"at most {_MAX_OPAQUE_VERSION}")
    for field in (OpaqueField.PROTECTED_PCIE_STATUS, OpaqueField.NVDEC0_STATUS):
        if field in opaque and device.byte(field) not in (STATUS_ON, STATUS_OFF):
            refuse(field, "0xaa (on) or 0x55 (off)")
    if OpaqueField.VBIOS_VERSION in opaque and not device.vbios:
        refuse(OpaqueField.VBIOS_VERSION, "a version of five bytes")
    if OpaqueField.DRIVER_VERSION in opaque and not device.driver:
        refuse(OpaqueField.DRIVER_VERSION, "digits, letters and '.'")
    for field, most in (
        (OpaqueField.SWITCH_PDI, 1 if device.kind == SWITCH else _MAX_LINKS),
        (OpaqueField.SWITCH_GPU_PDIS, 2 * _SWITCH_GPUS),
    ):
        size = len(opaque.get(field, b""))
        if size % PDI_BYTES or size > most * PDI_BYTES:
            refuse(field, f"at most {most} times {PDI_BYTES} bytes")
    lock = opaque.get(OpaqueField.LOCK_SWITCH_STATUS) if device.kind == SWITCH else None
    if lock is not None and int.from_bytes(lock, "little") != 1:
        # A switch that is not locked can still be reconfigured from outside.
        refuse(OpaqueField.LOCK_SWITCH_STATUS, "1 (locked)")
    if OpaqueField.FEATURE_FLAG in opaque:
        mode = int.from_bytes(opaque[OpaqueField.FEATURE_FLAG], "little")
        if mode > MODE_PROTECTED_PCIE or (mode == MODE_PROTECTED_PCIE) != device.protected_pcie:
            refuse(
                OpaqueField.FEATURE_FLAG,
                "2 where PROTECTED_PCIE_STATUS is on, 0 (single) or 1 (multiple GPUs) elsewhere",
            )


def _revocation_known(subject: Subject) -> None:
    question = subject.question
    if question.opens("revocation") or not leads_to_root(subject):
        return
    failure = unlisted(
        subject.device.chain, question.collateral.crls, question.now, _chain_name(subject)
    )
    if failure is not None:
        raise failure


def _not_revoked(subject: Subject) -> None:
    assert subject.question.expected is not None
    for certificate in subject.device.chain:
        subject.question.expected.refuse_revoked(
            f"{subject.device.name} certificate serial", certificate.serial
        )


def _pin(name: str, value: Callable[[Device], str], kinds: tuple[str, ...]) -> DeviceRule:
    def look(subject: Subject) -> None:
        assert subject.question.expected is not None
        if subject.device.kind in kinds:
            subject.question.expected.require_pin(name, value(subject.device))

    return DeviceRule(f"nvidia.pin.{name}", f"policy, requirements.nvidia.{name}", look)


SOUNDNESS_RULES: tuple[DeviceRule, ...] = (
    DeviceRule(
        "nvidia.request",
        "DMTF DSP0274 1.1, GET_MEASUREMENTS request message format, Param1 and Param2",
        _request,
    ),
    DeviceRule(
        "nvidia.chain.length",
        f"{_SDK}, X509CertChain; nvtrust, HopperSettings.MAX_CERT_CHAIN_LENGTH",
        _length,
    ),
    DeviceRule(
        "nvidia.chain.issuers", "RFC 5280, 6.1.3 Basic Certificate Processing (a)(1), (4)", _issuers
    ),
    DeviceRule(
        "nvidia.chain.authority",
        "RFC 5280, 4.2.1.3 Key Usage and 4.2.1.9 Basic Constraints",
        _authority,
    ),
    DeviceRule("nvidia.chain.dates", "RFC 5280, 6.1.3 Basic Certificate Processing (a)(2)", _dates),
    DeviceRule("nvidia.chain.root", f"{_SDK}, DEVICE_ROOT_CERT: NVIDIA Device Identity CA", _root),
    DeviceRule(
        "nvidia.chain.revoked",
        "RFC 5280, 6.3 CRL Validation; crl.ndis.nvidia.com l1-root, l2-gh100, l2-gb100",
        _revocation,
    ),
    DeviceRule(
        "nvidia.device.kind", f"{_SDK}, GpuArchitecture and SwitchArchitecture; leaf CN", _kind
    ),
    DeviceRule(
        "nvidia.report.signature",
        "DMTF DSP0274 1.1, MEASUREMENTS response message format, Signature; "
        f"{_SDK}, m_ar_signature_hash_algorithm",
        _signature,
    ),
    DeviceRule(
        "nvidia.report.nonce",
        "DMTF DSP0274 1.1, GET_MEASUREMENTS request message format, Nonce",
        _nonce,
    ),
    DeviceRule(
        "nvidia.report.fwid",
        "TCG DICE Attestation Architecture, TcbInfo and CompositeDeviceID FWID; "
        f"{_SDK}, OPAQUE_FIELD_ID_FWID",
        _firmware_id,
    ),
    DeviceRule(
        "nvidia.report.opaque_present",
        f"{_SDK}, OPAQUE_FIELD_ID_DRIVER_VERSION, _VBIOS_VERSION, _NVDEC0_STATUS, _DEVICE_PDI, "
        "_SWITCH_GPU_PDIS, _SWITCH_LOCK_STATUS",
        _opaque_present,
    ),
    DeviceRule(
        "nvidia.report.opaque_known",
        f"{_SDK}, OPAQUE_FIELD_ID_OPAQUE_DATA_VERSION, _PROTECTED_PCIE_STATUS, _NVDEC0_STATUS, "
        "_FEATURE_FLAG, _SWITCH_LOCK_STATUS; nvtrust ppcie-verifier, is_switch_lock_mode",
        _opaque_known,
    ),
)
"""Asked of every device, whatever the policy."""

POLICY_RULES: tuple[DeviceRule, ...] = (
    DeviceRule("nvidia.report.fwid_present", f"{_SDK}, OPAQUE_FIELD_ID_FWID", _firmware_id_present),
    DeviceRule(
        "nvidia.chain.revocation",
        "RFC 5280, 6.3 CRL Validation; crl.ndis.nvidia.com l1-root, l2-gh100, l2-gb100",
        _revocation_known,
    ),
    DeviceRule("nvidia.policy.revoked", "policy, requirements.nvidia.revoked", _not_revoked),
    _pin("architecture", lambda device: device.architecture, (GPU,)),
    _pin("driver", lambda device: device.driver, (GPU,)),
    _pin("vbios", lambda device: device.vbios, (GPU, SWITCH)),
    _pin("device", lambda device: device.serial, (GPU, SWITCH)),
)
"""Asked where a policy is given."""
