"""What evidence must say before a policy takes it: pins, least versions, and what is left open.

Each kind of evidence has a closed table of pins, named after the fields of the vendor's document.
A pin that the policy neither gives values for nor names under ``open`` refuses everything: nothing
is left unpinned by silence. Appraisal reads these rules; it adds none and drops none.

In YAML, under ``requirements``::

    sev-snp:
      product: [Genoa]
      chip_id: ["0506..."]
      minimum_tcb:
        Genoa: {bootloader: 10, tee: 0, snp: 23, microcode: 84}
      open: [host_data, id_key_digest]
      revoked: ["3ac3..."]
      roots: ["9f05..."]
      maximum_age_s: 300
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from placement.document import Encodable, Fields

__all__ = ["MINIMUM_TCB", "PINS", "RELAXATIONS", "Requirements", "read_requirements"]

MAX_VALUES = 1024
"""Most values of one pin, and most revoked identities: a fleet's chips fit."""

_MAX_TEXT = 256
_MAX_AGE_S = 366 * 24 * 3600
_SHA256 = "[0-9a-f]{64}"


def _octets(size: int) -> str:
    return f"[0-9a-f]{{{2 * size}}}"


_SNP: Mapping[str, str] = MappingProxyType(
    {
        "product": "Milan|Genoa|Turin",
        "signing_key": "VCEK|VLEK",
        "vmpl": "[0-3]",
        "host_data": _octets(32),
        "id_key_digest": _octets(48),
        "author_key_digest": _octets(48),
        "family_id": _octets(16),
        "image_id": _octets(16),
        "chip_id": _octets(64),
        "csp_id": ".{1,256}",
    }
)

_TDX: Mapping[str, str] = MappingProxyType(
    {
        "mrseam": _octets(48),
        "mrsignerseam": _octets(48),
        "mrconfigid": _octets(48),
        "mrowner": _octets(48),
        "mrownerconfig": _octets(48),
        "rtmr0": _octets(48),
        "rtmr1": _octets(48),
        "rtmr2": _octets(48),
        "rtmr3": _octets(48),
        "mrservicetd": _octets(48),
        "xfam": _octets(8),
        "fmspc": _octets(6),
        "pck_serial": "[0-9a-f]{1,40}",
        "tcb_status": "[A-Za-z]{1,64}",
    }
)

_PCRS: Mapping[str, str] = MappingProxyType({f"pcr{i}": _SHA256 for i in range(24)})

_NVIDIA: Mapping[str, str] = MappingProxyType(
    {
        "architecture": "Hopper|Blackwell",
        "driver": "[0-9A-Za-z.]{1,64}",
        "vbios": "[0-9A-Z.]{1,64}",
        "device": "[0-9a-f]{1,40}",
        "gpus": "[1-9][0-9]?",
        "switches": "[0-9]{1,2}",
    }
)

PINS: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "sev-snp": _SNP,
        "tdx": _TDX,
        "azure-vtpm": MappingProxyType({"hardware": "sev-snp|tdx", **_PCRS, **_SNP, **_TDX}),
        "nvidia": _NVIDIA,
    }
)
"""By kind of evidence: the pins, and the regular expression that each of its values matches."""

RELAXATIONS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "sev-snp": ("freshness", "revocation", "minimum_tcb", "migration_agent"),
        "tdx": ("freshness", "sept_ve_disable", "event_log"),
        "azure-vtpm": (
            "freshness",
            "revocation",
            "minimum_tcb",
            "migration_agent",
            "sept_ve_disable",
        ),
        "nvidia": ("freshness", "revocation", "fwid", "driver_rim", "vbios_rim", "topology"),
    }
)
"""By kind: checks besides the pins that ``open`` may name. What is in neither table cannot be."""

MINIMUM_TCB: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "Milan": ("bootloader", "tee", "snp", "microcode"),
        "Genoa": ("bootloader", "tee", "snp", "microcode"),
        "Turin": ("fmc", "bootloader", "tee", "snp", "microcode"),
    }
)
"""Parts of a TCB version by product (AMD 56860, TCB_VERSION); each is a byte."""

_RIM_KINDS = ("nvidia",)
_TCB_KINDS = ("sev-snp", "azure-vtpm")


@dataclass(frozen=True, slots=True)
class Requirements:
    """What a policy asks of one kind of evidence.

    Attributes:
        pins: accepted values by pin; at least one each.
        open: pins and relaxations that the operator leaves open, by name.
        minimum_tcb: least version of each part, by product (SEV-SNP only).
        revoked: identities that are refused whatever else is true: chip ids, PPIDs, PCK and
            device serials, FMSPCs, SHA-256 of certificates of AMD's chain, lower-case hex.
        roots: SHA-256 (hex, of the DER certificate) of roots that count *instead of* the vendor's;
            empty for the vendor's. For NVIDIA those of devices only.
        rim_roots: the same for those who sign reference manifests (NVIDIA only).
        maximum_age_s: seconds that dated evidence (NRAS tokens) may be old; None where only its
            own dates count.
    """

    pins: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    open: tuple[str, ...] = ()
    minimum_tcb: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    revoked: tuple[str, ...] = ()
    roots: tuple[str, ...] = ()
    rim_roots: tuple[str, ...] = ()
    maximum_age_s: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "pins", MappingProxyType(dict(self.pins)))
        object.__setattr__(self, "minimum_tcb", MappingProxyType(dict(self.minimum_tcb)))

    def opens(self, name: str) -> bool:
        """Whether the operator left a pin or a check open."""
        return name in self.open

    def to_document(self) -> dict[str, Encodable]:
        """The fields as a JSON object, in the shape of the YAML."""
        document: dict[str, Encodable] = {name: list(values) for name, values in self.pins.items()}
        if self.minimum_tcb:
            document["minimum_tcb"] = {
                product: dict(parts) for product, parts in self.minimum_tcb.items()
            }
        document["open"] = list(self.open)
        document["revoked"] = list(self.revoked)
        document["roots"] = list(self.roots)
        if self.rim_roots:
            document["rim_roots"] = list(self.rim_roots)
        if self.maximum_age_s is not None:
            document["maximum_age_s"] = self.maximum_age_s
        return document


def read_requirements(kind: str, reader: Fields) -> Requirements:
    """Reads one kind's section.

    Raises:
        DocumentError: as the reader makes it: a field that the kind does not have, a value of
            another shape, a pin that is both given and open.
    """
    if kind not in PINS:
        reader.fail("kind", f"one of {', '.join(PINS)}", kind)
    pins: dict[str, tuple[str, ...]] = {}
    for name, pattern in PINS[kind].items():
        if name in reader:
            values = reader.texts(name, MAX_VALUES, _MAX_TEXT, pattern)
            if not values:
                reader.fail(name, "at least one value, or the pin's name under open", values)
            pins[name] = values
    minimum_tcb: dict[str, Mapping[str, int]] = {}
    if kind in _TCB_KINDS and "minimum_tcb" in reader:
        section = reader.section("minimum_tcb")
        for product, parts in MINIMUM_TCB.items():
            if product in section:
                versions = section.section(product)
                minimum_tcb[product] = MappingProxyType(
                    {part: versions.integer(part, 0, 255) for part in parts}
                )
                versions.finish()
        section.finish()
    names = (*PINS[kind], *RELAXATIONS[kind])
    opened = reader.texts("open", len(names), 64) if "open" in reader else ()
    for i, name in enumerate(opened):
        if name not in names or name in opened[:i]:
            reader.fail(f"open[{i}]", f"one of {', '.join(names)}, each once", name)
        if name in pins or (name == "minimum_tcb" and minimum_tcb):
            reader.fail(f"open[{i}]", f"{name} to be either given or open", name)
    revoked = reader.texts("revoked", MAX_VALUES, 128, "[0-9a-f]+") if "revoked" in reader else ()
    roots = reader.texts("roots", 16, 64, _SHA256) if "roots" in reader else ()
    rim_roots: tuple[str, ...] = ()
    if kind in _RIM_KINDS and "rim_roots" in reader:
        rim_roots = reader.texts("rim_roots", 16, 64, _SHA256)
        for i, root in enumerate(rim_roots):
            if root in roots:
                # Else a device's own key could sign what the device should measure.
                reader.fail(f"rim_roots[{i}]", "a root that does not stand under roots", root)
    age = reader.integer("maximum_age_s", 1, _MAX_AGE_S) if "maximum_age_s" in reader else None
    reader.finish()
    return Requirements(pins, opened, minimum_tcb, revoked, roots, rim_roots, age)
