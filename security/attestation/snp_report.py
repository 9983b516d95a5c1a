"""ATTESTATION_REPORT of SEV-SNP, read from its 1184 bytes (AMD 56860, section 7.3).

Reading proves nothing: the signature is checked elsewhere. What the specification of the firmware's
interface reserves must be zero, and values that it does not define are refused here, by name.

A TCB_VERSION's layout depends on the product. Reports from version 3 say the product themselves
(CPUID); of a version 2 report only the certificate says it. So the report keeps TCB versions as
eight bytes, and `TcbVersion.of` reads them once the product is known.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from security.attestation.errors import (
    SnpProductUnknown,
    SnpReportMalformed,
    SnpReservedNotZero,
    SnpSigningKeyUnknown,
    SnpVersionUnknown,
)
from security.attestation.octets import OctetReader

__all__ = [
    "HOST_VMPL",
    "REPORT_BYTES",
    "SIGNATURE_OFFSET",
    "AttestationReport",
    "FirmwareVersion",
    "GuestPolicy",
    "KeyInfo",
    "PlatformInfo",
    "Product",
    "SigningKey",
    "TcbVersion",
    "parse_report",
    "product_of_cpuid",
]

REPORT_BYTES = 0x4A0
SIGNATURE_OFFSET = 0x2A0
"""Bytes before it are signed; from it on stands the signature."""

VERSIONS = (2, 3, 4, 5)
ECDSA_P384_SHA384 = 1
HOST_VMPL = 0xFFFFFFFF
"""VMPL in a report that the host asked for, not the guest."""

_NUMBER_BYTES = 72
_P384_BYTES = 48


class Product(Enum):
    """A product line, by AMD's name; Bergamo and Siena count as Genoa."""

    MILAN = "Milan"
    GENOA = "Genoa"
    TURIN = "Turin"


class SigningKey(Enum):
    """The key that signed a report (KEY_INFO bits 4:2)."""

    VCEK = 0
    VLEK = 1
    NONE = 7


def product_of_cpuid(family: int, model: int) -> Product:
    """The product line of a combined CPUID family and model.

    Raises:
        SnpProductUnknown
    """
    if family == 0x19 and model <= 0x0F:
        return Product.MILAN
    if family == 0x19 and (0x10 <= model <= 0x1F or 0xA0 <= model <= 0xAF):
        return Product.GENOA
    if family == 0x1A and model <= 0x11:
        return Product.TURIN
    raise SnpProductUnknown(
        "ATTESTATION_REPORT.CPUID_FAM_ID: expected family 19h model 00h-1Fh or A0h-AFh, or family "
        f"1Ah model 00h-11h, found family {family:02X}h model {model:02X}h"
    )


@dataclass(frozen=True, slots=True)
class TcbVersion:
    """Security versions of what AMD's firmware is made of (AMD 56860, TCB_VERSION).

    Attributes:
        fmc: of the first mutable code; None before Turin.
        bootloader: of the AMD-SP boot loader.
        tee: of the AMD-SP operating system.
        snp: of the SNP firmware.
        microcode: least patch level of all cores.
    """

    fmc: int | None
    bootloader: int
    tee: int
    snp: int
    microcode: int

    @classmethod
    def of(cls, octets: bytes, product: Product) -> TcbVersion:
        """Reads eight bytes.

        Raises:
            SnpReservedNotZero
        """
        if product is Product.TURIN:
            reserved = octets[4:7]
            version = cls(octets[0], octets[1], octets[2], octets[3], octets[7])
        else:
            reserved = octets[2:6]
            version = cls(None, octets[0], octets[1], octets[6], octets[7])
        _must_be_zero(reserved, f"TCB_VERSION ({product.value}), {octets.hex()}")
        return version

    def to_bytes(self, product: Product) -> bytes:
        """The eight bytes."""
        if product is Product.TURIN:
            head = (self.fmc or 0, self.bootloader, self.tee, self.snp, 0, 0, 0)
            return bytes((*head, self.microcode))
        return bytes((self.bootloader, self.tee, 0, 0, 0, 0, self.snp, self.microcode))

    def parts(self) -> dict[str, int]:
        """The versions by name, those that the product has."""
        named = {
            "fmc": self.fmc,
            "bootloader": self.bootloader,
            "tee": self.tee,
            "snp": self.snp,
            "microcode": self.microcode,
        }
        return {name: version for name, version in named.items() if version is not None}

    def exceeds(self, other: TcbVersion) -> tuple[str, ...]:
        """Names of the parts that are newer here than there."""
        theirs = other.parts()
        return tuple(
            name for name, version in self.parts().items() if version > theirs.get(name, 0)
        )

    def __str__(self) -> str:
        return ", ".join(f"{name} {version}" for name, version in self.parts().items())


@dataclass(frozen=True, slots=True)
class GuestPolicy:
    """What the owner allowed the host to do with the guest (AMD 56860, section 4.3, Guest Policy).

    Attributes:
        raw: the 64 bits.
        abi_minor: least minor version of the firmware interface, bits 7:0.
        abi_major: least major version, bits 15:8.
        smt: simultaneous multithreading is allowed, bit 16.
        migrate_ma: a migration agent is allowed, bit 18.
        debug: the host may read and write the guest's memory, bit 19.
        single_socket: the guest runs on one socket only, bit 20.
        cxl_allow: CXL may be populated, bit 21.
        mem_aes_256_xts: AES-256-XTS is required, bit 22.
        rapl_dis: RAPL must be off, bit 23.
        ciphertext_hiding_dram: ciphertext hiding is required, bit 24.
        page_swap_disable: the host may not move or swap pages, bit 25.
    """

    raw: int
    abi_minor: int
    abi_major: int
    smt: bool
    migrate_ma: bool
    debug: bool
    single_socket: bool
    cxl_allow: bool
    mem_aes_256_xts: bool
    rapl_dis: bool
    ciphertext_hiding_dram: bool
    page_swap_disable: bool

    @classmethod
    def of(cls, raw: int) -> GuestPolicy:
        """Reads the 64 bits.

        Raises:
            SnpReservedNotZero: bits 63:26 are not 0, or bit 17 is not 1.
        """
        if raw >> 26 or not raw >> 17 & 1:
            raise SnpReservedNotZero(
                "ATTESTATION_REPORT.POLICY: expected bits 63:26 zero and bit 17 one, found "
                f"{raw:#x}"
            )
        return cls(
            raw=raw,
            abi_minor=raw & 0xFF,
            abi_major=raw >> 8 & 0xFF,
            smt=bool(raw >> 16 & 1),
            migrate_ma=bool(raw >> 18 & 1),
            debug=bool(raw >> 19 & 1),
            single_socket=bool(raw >> 20 & 1),
            cxl_allow=bool(raw >> 21 & 1),
            mem_aes_256_xts=bool(raw >> 22 & 1),
            rapl_dis=bool(raw >> 23 & 1),
            ciphertext_hiding_dram=bool(raw >> 24 & 1),
            page_swap_disable=bool(raw >> 25 & 1),
        )


@dataclass(frozen=True, slots=True)
class PlatformInfo:
    """How the machine is set up (AMD 56860, section 7.3, PLATFORM_INFO).

    Attributes:
        raw: the 64 bits.
        smt_en: simultaneous multithreading is on, bit 0.
        tsme_en: transparent memory encryption is on, bit 1.
        ecc_en: memory has error correction, bit 2.
        rapl_dis: RAPL is off, bit 3.
        ciphertext_hiding_dram_en: ciphertext hiding is on, bit 4.
        alias_check_complete: no memory alias was found since reset, bit 5.
        tio_en: SEV-TIO is on, bit 7.
    """

    raw: int
    smt_en: bool
    tsme_en: bool
    ecc_en: bool
    rapl_dis: bool
    ciphertext_hiding_dram_en: bool
    alias_check_complete: bool
    tio_en: bool

    @classmethod
    def of(cls, raw: int) -> PlatformInfo:
        """Reads the 64 bits.

        Raises:
            SnpReservedNotZero: bit 6 or bits 63:8 are not 0.
        """
        if raw >> 8 or raw >> 6 & 1:
            raise SnpReservedNotZero(
                "ATTESTATION_REPORT.PLATFORM_INFO: expected bits 63:8 and bit 6 zero, found "
                f"{raw:#x}"
            )
        return cls(
            raw=raw,
            smt_en=bool(raw & 1),
            tsme_en=bool(raw >> 1 & 1),
            ecc_en=bool(raw >> 2 & 1),
            rapl_dis=bool(raw >> 3 & 1),
            ciphertext_hiding_dram_en=bool(raw >> 4 & 1),
            alias_check_complete=bool(raw >> 5 & 1),
            tio_en=bool(raw >> 7 & 1),
        )


@dataclass(frozen=True, slots=True)
class KeyInfo:
    """Which keys stand behind a report (AMD 56860, section 7.3, offset 48h).

    Attributes:
        raw: the 32 bits.
        author_key_en: AUTHOR_KEY_DIGEST says something, bit 0.
        mask_chip_key: the firmware does not sign, bit 1.
        signing_key: what signed, bits 4:2.
    """

    raw: int
    author_key_en: bool
    mask_chip_key: bool
    signing_key: SigningKey

    @classmethod
    def of(cls, raw: int) -> KeyInfo:
        """Reads the 32 bits.

        Raises:
            SnpReservedNotZero, SnpSigningKeyUnknown
        """
        if raw >> 5:
            raise SnpReservedNotZero(
                f"ATTESTATION_REPORT.KEY_INFO: expected bits 31:5 zero, found {raw:#x}"
            )
        number = raw >> 2 & 7
        if number not in {key.value for key in SigningKey}:
            raise SnpSigningKeyUnknown(
                "ATTESTATION_REPORT.SIGNING_KEY: expected 0 (VCEK), 1 (VLEK) or 7 (none), found "
                f"{number}"
            )
        return cls(raw, bool(raw & 1), bool(raw >> 1 & 1), SigningKey(number))


@dataclass(frozen=True, slots=True, order=True)
class FirmwareVersion:
    """Version of the SNP firmware.

    Attributes:
        major: of its interface.
        minor: of its interface.
        build: of the firmware.
    """

    major: int
    minor: int
    build: int

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}.{self.build}"


@dataclass(frozen=True, slots=True)
class AttestationReport:
    """The report, field by field, named as AMD names them.

    Attributes:
        signed: bytes 0 to 29Fh, which the signature covers.
        version: of the format, 2 to 5.
        guest_svn: security version that the owner gave the guest.
        policy: what the owner allows the host.
        family_id: 16 bytes of the owner's choice.
        image_id: 16 bytes of the owner's choice.
        vmpl: privilege level that asked, 0 to 3; `HOST_VMPL` where the host did.
        signature_algo: 1 is ECDSA P-384 with SHA-384.
        current_tcb: of what runs (8 bytes, see `TcbVersion.of`), as the three below.
        platform_info: how the machine is set up.
        key_info: which keys stand behind the report.
        report_data: 64 bytes of the guest's choice.
        measurement: SHA-384 over what the guest was started with.
        host_data: 32 bytes of the host's choice at launch.
        id_key_digest: SHA-384 of the key that signed the guest's identity; zero where none did.
        author_key_digest: SHA-384 of the key that certified the former; zero where none did.
        report_id: of the guest, 32 bytes.
        report_id_ma: of the guest's migration agent; all ones where there is none.
        reported_tcb: that the signing key is derived from.
        cpuid: combined family, model, stepping; None before version 3.
        chip_id: 64 bytes; zero where the host masks it.
        committed_tcb: below which the firmware cannot fall back any more.
        current: version of the firmware that runs.
        committed: version below which it cannot fall back.
        launch_tcb: what ran when the guest was launched or imported.
        launch_mit_vector: mitigations verified at launch; None before version 5.
        current_mit_vector: mitigations verified now; None before version 5.
        signature_r: of the ECDSA signature.
        signature_s: of the ECDSA signature.
    """

    signed: bytes
    version: int
    guest_svn: int
    policy: GuestPolicy
    family_id: bytes
    image_id: bytes
    vmpl: int
    signature_algo: int
    current_tcb: bytes
    platform_info: PlatformInfo
    key_info: KeyInfo
    report_data: bytes
    measurement: bytes
    host_data: bytes
    id_key_digest: bytes
    author_key_digest: bytes
    report_id: bytes
    report_id_ma: bytes
    reported_tcb: bytes
    cpuid: tuple[int, int, int] | None
    chip_id: bytes
    committed_tcb: bytes
    current: FirmwareVersion
    committed: FirmwareVersion
    launch_tcb: bytes
    launch_mit_vector: int | None
    current_mit_vector: int | None
    signature_r: int
    signature_s: int

    @property
    def product(self) -> Product | None:
        """The product line that CPUID names; None where the report is too old to say it."""
        return None if self.cpuid is None else product_of_cpuid(self.cpuid[0], self.cpuid[1])

    @property
    def chip_id_masked(self) -> bool:
        """Whether the host hides which chip it is (MASK_CHIP_ID)."""
        return not any(self.chip_id)


def parse_report(data: bytes) -> AttestationReport:
    """Reads a report.

    Raises:
        SnpReportMalformed, SnpVersionUnknown, SnpReservedNotZero, SnpSigningKeyUnknown,
        SnpProductUnknown: all of them EvidenceMalformed.
    """
    if len(data) != REPORT_BYTES:
        raise SnpReportMalformed(
            f"ATTESTATION_REPORT: expected {REPORT_BYTES} bytes, found {len(data)}"
        )
    reader = OctetReader(data, "ATTESTATION_REPORT")
    version = reader.little(4, "VERSION")
    if version not in VERSIONS:
        raise SnpVersionUnknown(f"ATTESTATION_REPORT.VERSION: expected 2 to 5, found {version}")
    guest_svn = reader.little(4, "GUEST_SVN")
    policy = GuestPolicy.of(reader.little(8, "POLICY"))
    family_id = reader.take(16, "FAMILY_ID")
    image_id = reader.take(16, "IMAGE_ID")
    vmpl = reader.little(4, "VMPL")
    signature_algo = reader.little(4, "SIGNATURE_ALGO")
    current_tcb = reader.take(8, "CURRENT_TCB")
    platform_info = PlatformInfo.of(reader.little(8, "PLATFORM_INFO"))
    key_info = KeyInfo.of(reader.little(4, "KEY_INFO"))
    _reserved(reader, 4)
    report_data = reader.take(64, "REPORT_DATA")
    measurement = reader.take(48, "MEASUREMENT")
    host_data = reader.take(32, "HOST_DATA")
    id_key_digest = reader.take(48, "ID_KEY_DIGEST")
    author_key_digest = reader.take(48, "AUTHOR_KEY_DIGEST")
    report_id = reader.take(32, "REPORT_ID")
    report_id_ma = reader.take(32, "REPORT_ID_MA")
    reported_tcb = reader.take(8, "REPORTED_TCB")
    cpuid = None
    if version >= 3:
        family, model, stepping = reader.take(3, "CPUID_FAM_ID")
        cpuid = (family, model, stepping)
        _reserved(reader, 21)
    else:
        _reserved(reader, 24)
    chip_id = reader.take(64, "CHIP_ID")
    committed_tcb = reader.take(8, "COMMITTED_TCB")
    current = _firmware_version(reader, "CURRENT")
    committed = _firmware_version(reader, "COMMITTED")
    launch_tcb = reader.take(8, "LAUNCH_TCB")
    launch_mit_vector = current_mit_vector = None
    if version >= 5:
        launch_mit_vector = reader.little(8, "LAUNCH_MIT_VECTOR")
        current_mit_vector = reader.little(8, "CURRENT_MIT_VECTOR")
    _reserved(reader, SIGNATURE_OFFSET - reader.position)
    signature_r = _signature_number(reader, "R")
    signature_s = _signature_number(reader, "S")
    _reserved(reader, reader.left)
    if cpuid is not None:
        for octets in (current_tcb, reported_tcb, committed_tcb, launch_tcb):
            TcbVersion.of(octets, product_of_cpuid(cpuid[0], cpuid[1]))
    return AttestationReport(
        signed=data[:SIGNATURE_OFFSET],
        version=version,
        guest_svn=guest_svn,
        policy=policy,
        family_id=family_id,
        image_id=image_id,
        vmpl=vmpl,
        signature_algo=signature_algo,
        current_tcb=current_tcb,
        platform_info=platform_info,
        key_info=key_info,
        report_data=report_data,
        measurement=measurement,
        host_data=host_data,
        id_key_digest=id_key_digest,
        author_key_digest=author_key_digest,
        report_id=report_id,
        report_id_ma=report_id_ma,
        reported_tcb=reported_tcb,
        cpuid=cpuid,
        chip_id=chip_id,
        committed_tcb=committed_tcb,
        current=current,
        committed=committed,
        launch_tcb=launch_tcb,
        launch_mit_vector=launch_mit_vector,
        current_mit_vector=current_mit_vector,
        signature_r=signature_r,
        signature_s=signature_s,
    )


def _firmware_version(reader: OctetReader, name: str) -> FirmwareVersion:
    build, minor, major = reader.take(3, f"{name}_BUILD")
    _reserved(reader, 1)
    return FirmwareVersion(major, minor, build)


def _signature_number(reader: OctetReader, name: str) -> int:
    octets = reader.take(_NUMBER_BYTES, name)
    _must_be_zero(octets[_P384_BYTES:], f"ATTESTATION_REPORT.SIGNATURE.{name}, bytes 48 to 71")
    return int.from_bytes(octets[:_P384_BYTES], "little")


def _reserved(reader: OctetReader, size: int) -> None:
    start = reader.position
    octets = reader.take(size, "reserved")
    _must_be_zero(octets, f"ATTESTATION_REPORT, bytes {start:#x} to {start + size - 1:#x}")


def _must_be_zero(octets: bytes, what: str) -> None:
    if any(octets):
        raise SnpReservedNotZero(
            f"{what}: expected zero, found {octets.lstrip(bytes(1))[:8].hex()}"
        )
