"""Compares a device's measurements with NVIDIA's reference manifests (RIM).

A GPU has two references, one for its driver and one for its VBIOS; a switch has the second only.
A candidate is a manifest of the collateral for the device's product and version. One that is not
validly signed at the time is no reference. A component is proven where it has a valid candidate and
the device matches all active measurements of every valid one: references that differ are no
alternatives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from security.attestation.errors import (
    ReferenceMismatch,
    ReferenceMissing,
    ReferencesConflict,
    ReferencesUnusable,
    RimMalformed,
)
from security.attestation.nvidia_certificates import unlisted
from security.attestation.nvidia_device import GPU, STATUS_OFF, Device, Question
from security.attestation.rim import Heading, ReferenceManifest, read_heading, verify_rim
from security.attestation.spdm import OpaqueField
from security.attestation.verdict import FunctionRule, NotJudged
from security.errors import AppraisalError

__all__ = [
    "REFERENCE_POLICY_RULES",
    "REFERENCE_RULES",
    "Candidate",
    "Compared",
    "Component",
    "Library",
    "ReferenceRule",
    "compare",
]

NVDEC0_INDEX = 35
"""Measurement that NVIDIA's verifier leaves out where NVDEC0 is disabled."""

_MAX_MANIFESTS = 256
_SDK = "NVIDIA attestation-sdk"


class Library:
    """The manifests of the collateral, each looked at once for one question.

    Attributes:
        question: what they are looked at for.
        notes: what was ignored.
    """

    def __init__(self, question: Question) -> None:
        self.question = question
        self._shelf: list[tuple[str, Heading, bytes]] = []
        self._opened: dict[bytes, ReferenceManifest | AppraisalError] = {}
        notes: list[str] = []
        malformed: list[str] = []
        for name, xml in question.collateral.rims[:_MAX_MANIFESTS]:
            try:
                self._shelf.append((name, read_heading(xml), xml))
            except RimMalformed as error:
                malformed.append(f"{name:.128} ({error.code}: {error})")
        if len(question.collateral.rims) > _MAX_MANIFESTS:
            notes.append(f"RIMs after the first {_MAX_MANIFESTS} were ignored")
        self.notes = tuple(notes)
        self.malformed = tuple(malformed)

    def find(self, products: frozenset[str], version: str) -> list[tuple[str, bytes]]:
        """Names and contents of the manifests for one of the products in a version."""
        wanted = version.upper()
        return [
            (name, xml)
            for name, heading, xml in self._shelf
            if heading.product in products and heading.version == wanted
        ]

    def open(self, name: str, xml: bytes) -> ReferenceManifest | AppraisalError:
        """A manifest, or why it is no reference."""
        if xml not in self._opened:
            question = self.question
            try:
                self._opened[xml] = verify_rim(
                    xml,
                    question.rim_roots,
                    question.collateral.crls,
                    question.now,
                    f"RIM {name}",
                    demand_lists=question.expected is not None and not question.opens("revocation"),
                )
            except AppraisalError as error:
                self._opened[xml] = error
        return self._opened[xml]


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """A manifest for the device's product and version.

    Attributes:
        name: as in the collateral.
        manifest: None where it is not valid.
        refusal: why it is not valid, "" where it is.
        differing: indices of the active measurements that the device does not match.
        unjudged: why revocation of its signer was not judged, "" where it was.
    """

    name: str
    manifest: ReferenceManifest | None
    refusal: str
    differing: tuple[int, ...] = ()
    unjudged: str = ""

    @property
    def proves(self) -> bool:
        """Valid, and the device matches it."""
        return self.manifest is not None and not self.differing


@dataclass(frozen=True, slots=True, eq=False)
class Component:
    """Driver or VBIOS.

    Attributes:
        name: "driver" or "vbios".
        version: as the report says it.
        candidates: in the order of the collateral.
    """

    name: str
    version: str
    candidates: tuple[Candidate, ...]

    @property
    def proofs(self) -> tuple[Candidate, ...]:
        """Candidates that the device matches."""
        return tuple(candidate for candidate in self.candidates if candidate.proves)

    @property
    def valid(self) -> tuple[Candidate, ...]:
        """Candidates that are validly signed."""
        return tuple(item for item in self.candidates if item.manifest is not None)


@dataclass(frozen=True, slots=True, eq=False)
class Compared:
    """A device beside its references.

    Attributes:
        device: the device.
        question: what it is judged by.
        components: driver and VBIOS of a GPU, VBIOS of a switch.
        malformed: manifests of the collateral that do not parse, and why; any may be the device's.
    """

    device: Device
    question: Question
    components: tuple[Component, ...]
    malformed: tuple[str, ...] = ()

    def component(self, name: str) -> Component | None:
        """A component by name; None where the device has none."""
        return next((item for item in self.components if item.name == name), None)

    @property
    def notes(self) -> tuple[str, ...]:
        """What was ignored, or not judged."""
        found: list[str] = []
        for component in self.components:
            what = f"{self.device.name} {component.name} {component.version}"
            found += [
                f"{what}: RIM {item.name:.128} was ignored: {item.refusal}"
                for item in component.candidates
                if item.manifest is None
            ]
            found += [
                f"{what}: revocation was not judged: {item.unjudged}"
                for item in component.valid
                if item.unjudged
            ]
            if not component.candidates:
                found.append(f"{what}: no RIM among the collateral")
        return tuple(found)


def compare(device: Device, question: Question, library: Library) -> Compared:
    """Looks up a device's references and compares its measurements with them."""
    products = {device.chip} | {device.text(OpaqueField.CHIP_INFO)} - {""}
    components: list[Component] = []
    versions = [("driver", device.driver)] if device.kind == GPU else []
    for name, version in [*versions, ("vbios", device.vbios)]:
        found = library.find(frozenset(products), version) if version else []
        candidates = [_candidate(device, library, rim, xml) for rim, xml in found]
        components.append(Component(name, version, tuple(candidates)))
    return Compared(device, question, tuple(components), library.malformed)


def _candidate(device: Device, library: Library, name: str, xml: bytes) -> Candidate:
    opened = library.open(name, xml)
    if isinstance(opened, AppraisalError):
        return Candidate(name, None, f"{opened.code}: {opened}")
    blocks = device.report.response.blocks
    skipped = (
        {NVDEC0_INDEX} if device.byte(OpaqueField.NVDEC0_STATUS) == STATUS_OFF else frozenset()
    )
    differing = [
        index
        for index, alternatives in sorted(opened.measurements.items())
        if index not in skipped
        and (index >= len(blocks) or blocks[index].value not in alternatives)
    ]
    question = library.question
    unknown = unlisted(
        opened.signer, question.collateral.crls, question.now, f"signer of RIM {name:.128}"
    )
    return Candidate(name, opened, "", tuple(differing), "" if unknown is None else str(unknown))


ReferenceRule = FunctionRule[Compared]
"""A rule about a device and its references."""


def _reasons(candidates: Sequence[Candidate]) -> str:
    shown = "; ".join(f"{item.name:.128} ({item.refusal})" for item in candidates[:4])
    return f"{shown}; and {len(candidates) - 4} more" if len(candidates) > 4 else shown


def _matches(name: str) -> Callable[[Compared], None]:
    def look(subject: Compared) -> None:
        component = subject.component(name)
        if component is None:
            raise NotJudged(f"the device has no {name} of its own")
        if not component.valid:
            raise NotJudged("no valid RIM among the collateral")
        for rim in component.valid:
            if rim.differing:
                indices = ", ".join(str(index) for index in rim.differing[:16])
                raise ReferenceMismatch(
                    f"{subject.device.name} {name} {component.version}",
                    f"the measurements of RIM {rim.name:.128}",
                    f"others at index {indices}",
                )

    return look


def _usable(subject: Compared) -> None:
    if subject.malformed:
        raise ReferencesUnusable(
            f"{subject.device.name} references",
            "manifests that parse",
            "; ".join(subject.malformed[:4]),
            "leave out what is no manifest",
        )
    for component in subject.components:
        if component.candidates and not component.valid:
            raise ReferencesUnusable(
                f"{subject.device.name} {component.name} {component.version}",
                "a valid RIM among those for it",
                _reasons(component.candidates),
            )
    if not any(component.candidates for component in subject.components):
        raise NotJudged("no RIM among the collateral")


def _conflict(subject: Compared) -> None:
    driver, vbios = subject.component("driver"), subject.component("vbios")
    if driver is None or vbios is None or not driver.proofs or not vbios.proofs:
        raise NotJudged("not both a driver and a VBIOS RIM that match")
    shared: set[int] = set()
    for one in driver.proofs:
        for other in vbios.proofs:
            assert one.manifest is not None and other.manifest is not None
            both = one.manifest.measurements.keys() & other.manifest.measurements.keys()
            if not both:
                return
            shared |= both
    raise ReferencesConflict(
        f"{subject.device.name} references",
        "driver and VBIOS RIM to be active at different indices",
        f"both at {', '.join(str(index) for index in sorted(shared)[:16])}",
    )


def _present(name: str) -> Callable[[Compared], None]:
    def look(subject: Compared) -> None:
        component = subject.component(name)
        if component is None or subject.question.opens(f"{name}_rim") or component.valid:
            return
        raise ReferenceMissing(
            f"{subject.device.name} {name} {component.version}",
            "a valid RIM",
            _reasons(component.candidates) or "none",
            f"add it to the collateral, or open {name}_rim in the policy",
        )

    return look


_COMPARISON = f"{_SDK}, gpu/verify.cpp, generate_set_measurement_claims; TCG RIM Payload"

REFERENCE_RULES: tuple[ReferenceRule, ...] = (
    ReferenceRule(
        "nvidia.rim.usable", "W3C XML Signature 1.1; NVIDIA RIM signer chain and dates", _usable
    ),
    ReferenceRule("nvidia.rim.driver", _COMPARISON, _matches("driver")),
    ReferenceRule("nvidia.rim.vbios", _COMPARISON, _matches("vbios")),
    ReferenceRule(
        "nvidia.rim.conflict",
        f"{_SDK}, gpu/verify.cpp, RimMeasurementConflict (x-nvidia-gpu-vbios-index-no-conflict)",
        _conflict,
    ),
)
"""Asked of every device."""

REFERENCE_POLICY_RULES: tuple[ReferenceRule, ...] = (
    ReferenceRule(
        "nvidia.rim.driver_present",
        f"{_SDK}, RIM id NV_GPU_DRIVER_GH100_*, NV_GPU_CC_DRIVER_*",
        _present("driver"),
    ),
    ReferenceRule(
        "nvidia.rim.vbios_present",
        f"{_SDK}, RIM id NV_GPU_VBIOS_*, NV_SWITCH_BIOS_*",
        _present("vbios"),
    ),
)
"""Asked where a policy is given."""
