"""Makes NVIDIA evidence from scratch: a device root, chains, reports, manifests and their root.

Every key is thrown away with the process. What a test does not vary is as real evidence has it.
"""

from __future__ import annotations

import datetime
import hashlib
import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA384, HashAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID
from lxml import etree
from signxml import XMLSigner, methods
from signxml.algorithms import CanonicalizationMethod, DigestAlgorithm, SignatureMethod

from placement.requirements import Requirements
from security.attestation.collateral import Collateral
from security.attestation.spdm import OpaqueField
from security.attestation.verdict import Expectations

NOW = 1_750_000_000
YEAR = 365 * 24 * 3600
NONCE = bytes(range(32))
NVDEC0_INDEX = 35
DRIVER = "570.00.01"
VBIOS = "96.00.AA.00.01"
SWITCH_VBIOS = "96.10.73.00.01"
DRIVER_INDICES = (7, 21, 22, NVDEC0_INDEX)
VBIOS_INDICES = (0, 1, 2, 9)

_SWID = "http://standards.iso.org/iso/19770/-2/2015/schema.xsd"
_HASH = "http://www.w3.org/2001/04/xmlenc#sha384"
_CRL_POINT = x509.CRLDistributionPoints(
    [
        x509.DistributionPoint(
            [x509.UniformResourceIdentifier("http://crl.example/l.crl")], None, None, None
        )
    ]
)

PrivateKey = ec.EllipticCurvePrivateKey


def new_key() -> PrivateKey:
    """An ECDSA P-384 key."""
    return ec.generate_private_key(ec.SECP384R1())


def time(seconds: int) -> datetime.datetime:
    """Unix time as certificates take it."""
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC)


def raw_signature(key: PrivateKey, data: bytes) -> bytes:
    """r and s, 48 bytes each, big-endian."""
    r, s = decode_dss_signature(key.sign(data, ec.ECDSA(SHA384())))
    return r.to_bytes(48, "big") + s.to_bytes(48, "big")


@dataclass(frozen=True)
class Issued:
    """A certificate with its key."""

    certificate: x509.Certificate
    key: PrivateKey

    @property
    def der(self) -> bytes:
        """The certificate."""
        return self.certificate.public_bytes(Encoding.DER)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the DER, hex."""
        return hashlib.sha256(self.der).hexdigest()


def issue(
    name: str,
    issuer: Issued | None,
    *,
    authority: bool = True,
    path_length: int | None = None,
    serial: int | None = None,
    start: int = NOW - YEAR,
    end: int = NOW + YEAR,
    listed: bool = False,
    extensions: Sequence[tuple[x509.ExtensionType, bool]] = (),
    curve: ec.EllipticCurve | None = None,
    hash_algorithm: HashAlgorithm | None = None,
    signs_data: bool | None = None,
) -> Issued:
    """A certificate; signed by itself where there is no issuer."""
    key = new_key() if curve is None else ec.generate_private_key(curve)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    usage = x509.KeyUsage(
        digital_signature=not authority if signs_data is None else signs_data,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=authority,
        crl_sign=authority,
        encipher_only=False,
        decipher_only=False,
    )
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject if issuer is None else issuer.certificate.subject)
        .public_key(key.public_key())
        .serial_number(serial or x509.random_serial_number())
        .not_valid_before(time(start))
        .not_valid_after(time(end))
        .add_extension(usage, critical=True)
    )
    if authority:
        constraints = x509.BasicConstraints(ca=True, path_length=path_length)
        builder = builder.add_extension(constraints, critical=True)
    if listed:
        builder = builder.add_extension(_CRL_POINT, critical=False)
    for extension, critical in extensions:
        builder = builder.add_extension(extension, critical=critical)
    signer = key if issuer is None else issuer.key
    return Issued(builder.sign(signer, hash_algorithm or SHA384()), key)


def revocation_list(
    issuer: Issued,
    revoked: Sequence[int] = (),
    start: int = NOW - 3600,
    end: int = NOW + 3600,
    key: PrivateKey | None = None,
    extensions: Sequence[tuple[x509.ExtensionType, bool]] = (),
) -> bytes:
    """A certificate revocation list in DER."""
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(issuer.certificate.subject)
        .last_update(time(start))
        .next_update(time(end))
    )
    for extension, critical in extensions:
        builder = builder.add_extension(extension, critical=critical)
    for serial in revoked:
        entry = x509.RevokedCertificateBuilder().serial_number(serial)
        builder = builder.add_revoked_certificate(entry.revocation_date(time(start)).build())
    return builder.sign(key or issuer.key, SHA384()).public_bytes(Encoding.DER)


def tcb_info(firmware_id: bytes) -> x509.UnrecognizedExtension:
    """DICE's CompositeDeviceID as Hopper has it, as far as it is read: it ends in the FWID."""
    tail = bytes.fromhex("303d06096086480165030402020430") + firmware_id
    value = b"\x30\x81" + bytes([len(tail) + 6]) + b"\x02\x01\x01\x30\x01\x00" + tail
    return x509.UnrecognizedExtension(x509.ObjectIdentifier("2.23.133.5.4.1"), value)


def digest(text: str) -> bytes:
    """A measurement (48 bytes)."""
    return hashlib.sha384(text.encode()).digest()


@dataclass(frozen=True)
class Device:
    """A GPU or switch that answers challenges."""

    name: str
    chain: tuple[Issued, ...]
    pdi: bytes
    opaque: Mapping[int, bytes]
    blocks: tuple[bytes, ...]
    param1: int = 1
    param2: int = 0xFF
    key: PrivateKey | None = None

    @property
    def leaf(self) -> Issued:
        """The certificate whose key signs reports."""
        return self.chain[0]

    def pem(self) -> bytes:
        """The chain as NVML gives it."""
        return b"".join(item.certificate.public_bytes(Encoding.PEM) for item in self.chain)

    def saying(self, **fields: bytes | None) -> Device:
        """The same with other opaque fields; None leaves one out."""
        opaque = dict(self.opaque)
        for name, value in fields.items():
            kind = int(OpaqueField[name])
            if value is None:
                opaque.pop(kind, None)
            else:
                opaque[kind] = value
        return replace(self, opaque=opaque)

    def measuring(self, index: int, value: bytes) -> Device:
        """The same with another measurement, by the manifests' index."""
        blocks = list(self.blocks)
        blocks[index] = value
        return replace(self, blocks=tuple(blocks))

    def report(self, nonce: bytes) -> bytes:
        """Request and signed response."""
        record = b"".join(
            bytes([i + 1, 1, 51, 0, 1, 48, 0]) + value for i, value in enumerate(self.blocks)
        )
        opaque = b"".join(
            kind.to_bytes(2, "little") + len(value).to_bytes(2, "little") + value
            for kind, value in self.opaque.items()
        )
        signed = (
            bytes([0x11, 0xE0, self.param1, self.param2])
            + nonce
            + b"\0"
            + bytes([0x11, 0x60, 0, 0, len(self.blocks)])
            + len(record).to_bytes(3, "little")
            + record
            + os.urandom(32)
            + len(opaque).to_bytes(2, "little")
            + opaque
        )
        return signed + raw_signature(self.key or self.leaf.key, signed)

    def parts(self, nonce: bytes = NONCE) -> dict[str, bytes]:
        """Its two parts."""
        return {f"{self.name}.report": self.report(nonce), f"{self.name}.chain": self.pem()}


@dataclass(frozen=True)
class Authorities:
    """The throw-away roots and what stands under them."""

    root: Issued
    identity: Issued
    provisioner: Issued
    rim_root: Issued
    rim_authority: Issued
    rim_signer: Issued

    @property
    def roots(self) -> tuple[str, ...]:
        """Fingerprint of the root of devices."""
        return (self.root.fingerprint,)

    @property
    def rim_roots(self) -> tuple[str, ...]:
        """Fingerprint of the root of those who sign manifests."""
        return (self.rim_root.fingerprint,)

    def lists(self) -> tuple[bytes, ...]:
        """Current revocation lists that name nobody."""
        return (revocation_list(self.root), revocation_list(self.identity))


@cache
def authorities() -> Authorities:
    """One set for all tests."""
    root = issue("Device Root", None)
    identity = issue("GH100 Identity", root, listed=True)
    provisioner = issue("GH100 Provisioner ICA 1", identity, listed=True)
    rim_root = issue("RIM Root", None)
    rim_authority = issue("Reference Value L3", rim_root, path_length=0)
    return Authorities(
        root=root,
        identity=identity,
        provisioner=provisioner,
        rim_root=rim_root,
        rim_authority=rim_authority,
        rim_signer=issue("RIM L4 Signer", rim_authority, authority=False),
    )


_NUMBERS = itertools.count(1)


def _chain(
    chip: str, engine: str, prefix: int, pdi: bytes, firmware_id: bytes
) -> tuple[Issued, ...]:
    made = authorities()
    boot = issue(
        f"{chip} A01 {engine} BROM",
        made.provisioner,
        serial=int.from_bytes(bytes([prefix]) + pdi, "big"),
    )
    leaf = issue(
        f"{chip} A01 {engine} FMC LF",
        boot,
        authority=False,
        extensions=[(tcb_info(firmware_id), False)],
    )
    return (leaf, boot, made.provisioner, made.identity, made.root)


def gpu(name: str = "gpu.0", chip: str = "GH100") -> Device:
    """A GPU by itself, protected PCIe off."""
    pdi = next(_NUMBERS).to_bytes(2, "big") + os.urandom(6)
    firmware_id = digest("firmware")
    major, build, minor = (int(item, 16) for item in VBIOS.split(".")[::2])
    opaque = {
        OpaqueField.VBIOS_VERSION: bytes([0, build, 0, major, minor, 0, 0, 0]),
        OpaqueField.CHIP_SKU: b"882\0\0",
        OpaqueField.PROJECT: b"1010\0",
        OpaqueField.PROJECT_SKU: b"0200\0",
        OpaqueField.DRIVER_VERSION: DRIVER.encode() + b"\0",
        OpaqueField.NVDEC0_STATUS: b"\x55",
        OpaqueField.FWID: firmware_id,
        OpaqueField.PROTECTED_PCIE_STATUS: b"\x55",
        OpaqueField.OPAQUE_DATA_VERSION: b"\x01\0",
        OpaqueField.FEATURE_FLAG: b"\0\0",
    }
    blocks = tuple(digest(f"block {index}") for index in range(40))
    return Device(name, _chain(chip, "GSP", 0x41, pdi, firmware_id), pdi, opaque, blocks)


def switch(name: str = "switch.0") -> Device:
    """An LS10 switch that is connected to nothing."""
    pdi = next(_NUMBERS).to_bytes(2, "big") + os.urandom(6)
    opaque = {
        OpaqueField.VBIOS_VERSION: SWITCH_VBIOS.encode(),
        OpaqueField.SWITCH_PDI: pdi,
        OpaqueField.SWITCH_GPU_PDIS: bytes(128),
        OpaqueField.LOCK_SWITCH_STATUS: b"\x01\0",
    }
    blocks = tuple(digest(f"switch block {index}") for index in range(12))
    return Device(name, _chain("LS_10", "FSP", 0x50, pdi, digest("fsp")), pdi, opaque, blocks)


@dataclass(frozen=True)
class Machine:
    """GPUs and switches that are connected to each other."""

    devices: tuple[Device, ...]

    def parts(self, nonce: bytes = NONCE) -> dict[str, bytes]:
        """Evidence of all of them."""
        return {name: data for device in self.devices for name, data in device.parts(nonce).items()}


def machine(gpus: int, switches: int) -> Machine:
    """A machine; in protected-PCIe mode where it has switches."""
    made = [gpu(f"gpu.{number}") for number in range(gpus)]
    switched = [switch(f"switch.{number}") for number in range(switches)]
    if switches:
        links = b"".join(item.pdi[::-1] for item in switched) + bytes(16)
        peers = b"".join(item.pdi for item in made).ljust(64, b"\0") + b"\xff" * 64
        made = [
            item.saying(PROTECTED_PCIE_STATUS=b"\xaa", FEATURE_FLAG=b"\2\0", SWITCH_PDI=links)
            for item in made
        ]
        switched = [item.saying(SWITCH_GPU_PDIS=peers) for item in switched]
    return Machine((*made, *switched))


# -- manifests --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Manifest:
    """A RIM before it is signed."""

    version: str
    measurements: Mapping[int, Sequence[bytes]]
    product: str = "GH100"
    inactive: Sequence[int] = (30,)
    chain: Sequence[Issued] = field(default_factory=tuple)

    def document(self) -> str:
        """The XML without a signature."""
        rows = [
            f'<ns0:Resource type="Measurement" index="{index}" active="True" '
            f'alternatives="{len(values)}" '
            + " ".join(f'ns2:Hash{i}="{value.hex()}"' for i, value in enumerate(values))
            + f' name="Measurement_{index}" size="48"/>'
            for index, values in self.measurements.items()
        ] + [
            f'<ns0:Resource type="Measurement" index="{index}" active="False" alternatives="1" '
            f'ns2:Hash0="{"00" * 48}" name="Measurement_{index}" size="48"/>'
            for index in self.inactive
        ]
        return (
            f'<SoftwareIdentity xmlns="{_SWID}" xmlns:ns0="{_SWID}" xmlns:ns2="{_HASH}" '
            f'corpus="false" name="{self.product}" tagId="00" version="1.0" tagVersion="0">\n'
            f'<ns0:Entity name="NVIDIA Corporation" role="softwareCreator tagCreator"/>\n'
            f'<ns0:Meta colloquialVersion="{self.version}" edition="GPU" '
            f'product="{self.product}" revision="r1" PayloadType="direct"/>\n'
            f"<ns0:Payload>\n{''.join(rows)}\n</ns0:Payload>\n</SoftwareIdentity>"
        )

    def signed(self) -> bytes:
        """Signed by the throw-away RIM signer, or the chain that was given."""
        made = authorities()
        chain = self.chain or (made.rim_signer, made.rim_authority, made.rim_root)
        return sign_document(self.document(), chain)


def sign_document(document: str, chain: Sequence[Issued], **options: object) -> bytes:
    """An enveloped signature as NVIDIA's RIMs have it; options go to `XMLSigner`."""
    settings = {
        "method": methods.enveloped,
        "signature_algorithm": SignatureMethod.ECDSA_SHA384,
        "digest_algorithm": DigestAlgorithm.SHA384,
        "c14n_algorithm": CanonicalizationMethod.CANONICAL_XML_1_1,
    }
    root = etree.fromstring(document.encode())
    signer = XMLSigner(**{**settings, **options})
    signed = signer.sign(root, key=chain[0].key, cert=[item.certificate for item in chain])
    return etree.tostring(signed)


def driver_manifest(device: Device, **changes: object) -> Manifest:
    """What the driver of a GPU should measure."""
    values = {index: [device.blocks[index]] for index in DRIVER_INDICES}
    values[NVDEC0_INDEX] = [digest("not measured while NVDEC0 is off")]
    return replace(Manifest(DRIVER, values), **changes)


def vbios_manifest(device: Device, **changes: object) -> Manifest:
    """What the VBIOS of a device should measure, with an alternative in front."""
    switched = device.name.startswith("switch")
    values = {index: [digest("older"), device.blocks[index]] for index in VBIOS_INDICES}
    made = Manifest(SWITCH_VBIOS if switched else VBIOS, values, "LS10" if switched else "GH100")
    return replace(made, **changes)


def references(*manifests: Manifest) -> tuple[tuple[str, bytes], ...]:
    """The manifests as an operator keeps them."""
    return tuple((f"rim-{i}.xml", item.signed()) for i, item in enumerate(manifests))


@cache
def _good_references() -> tuple[tuple[str, bytes], ...]:
    one, other = gpu(), switch()
    return references(driver_manifest(one), vbios_manifest(one), vbios_manifest(other))


def collateral(**changes: object) -> Collateral:
    """References for every device that is made here, and current revocation lists."""
    made = Collateral(rims=_good_references(), crls=authorities().lists())
    return replace(made, **changes)


def expectations(devices: Sequence[Device], **changes: object) -> Expectations:
    """A policy that pins exactly these devices and leaves nothing open."""
    gpus = [item for item in devices if item.name.startswith("gpu")]
    pins = {
        "architecture": ("Hopper",),
        "driver": (DRIVER,),
        "vbios": (VBIOS, SWITCH_VBIOS),
        "device": tuple(serial_of(item) for item in devices),
        "gpus": (str(len(gpus)),),
        "switches": (str(len(devices) - len(gpus)),),
    }
    made = authorities()
    requirements = Requirements(pins=pins, roots=made.roots, rim_roots=made.rim_roots)
    return Expectations("nvidia", replace(requirements, **changes), None)


def serial_of(device: Device) -> str:
    """Serial number of a device's leaf as policies write it."""
    number = device.leaf.certificate.serial_number
    return number.to_bytes(20, "big").lstrip(b"\0").hex()


def soundness() -> Expectations:
    """Throw-away roots with every pin and check open that can be."""
    names = ("architecture", "driver", "vbios", "device", "gpus", "switches")
    more = ("freshness", "revocation", "fwid", "driver_rim", "vbios_rim")
    made = authorities()
    requirements = Requirements(open=names + more, roots=made.roots, rim_roots=made.rim_roots)
    return Expectations("nvidia", requirements, None)


def public_point(key: PrivateKey) -> tuple[bytes, bytes]:
    """x and y (48 bytes each)."""
    point = key.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
    return point[1:49], point[49:]
