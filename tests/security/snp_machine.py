"""SEV-SNP machines made from nothing: throw-away ARK, ASK, ASVK, VCEK, VLEK, CRL, and reports.

    machine = SnpMachine(product="Genoa", report_data=b"challenge")
    verdict = machine.verify(bound_to=b"challenge")

Every field of report and certificates is a field of the dataclass; `dataclasses.replace` varies
one. Keys are made once per process. Nothing here is AMD's: `machine.expectations()` names the
throw-away root in place of AMD's.
"""

from __future__ import annotations

import functools
import hashlib
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from placement.requirements import Requirements
from security.attestation.collateral import Collateral
from security.attestation.sev_snp import verify_sev_snp
from security.attestation.verdict import Expectations, Verdict

YEAR = 365 * 24 * 3600
NOW = 1_750_000_000
"""June 2025: every certificate and list made here is valid then, unless a test says otherwise."""

PSS = bytes.fromhex(
    "304106092a864886f70d01010a3034a00f300d06096086480165030402020500a11c301a06092a864886f70d01"
    "0108300d06096086480165030402020500a203020130"
)
CPUID = {"Milan": (0x19, 0x01, 1), "Genoa": (0x19, 0x11, 1), "Turin": (0x1A, 0x02, 1)}
ROLES = {
    "VCEK": "63da758d-e664-4564-adc5-f4b93be8accd",
    "VLEK": "a8074bc2-a25a-483e-aae6-39c045a0b8a1",
    "ASK": "4ab7b379-bbac-4fe4-a02f-05aef327c782",
    "ARK": "c0b406a4-a803-4952-9743-3fb6014cd0ae",
}
AMD = "1.3.6.1.4.1.3704.1."


# -- DER --------------------------------------------------------------------------------------


def der(tag: int, *contents: bytes) -> bytes:
    """One element."""
    content = b"".join(contents)
    size = len(content)
    if size < 0x80:
        return bytes((tag, size)) + content
    octets = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes((tag, 0x80 | len(octets))) + octets + content


def sequence(*contents: bytes) -> bytes:
    return der(0x30, *contents)


def integer(value: int) -> bytes:
    return der(0x02, value.to_bytes(value.bit_length() // 8 + 1, "big", signed=True))


def ia5(text: str) -> bytes:
    return der(0x16, text.encode("ascii"))


def oid(dotted: str) -> bytes:
    first, second, *rest = (int(arc) for arc in dotted.split("."))
    octets = bytearray()
    for arc in (40 * first + second, *rest):
        groups = [arc & 0x7F]
        while arc := arc >> 7:
            groups.append(arc & 0x7F | 0x80)
        octets += bytes(reversed(groups))
    return der(0x06, bytes(octets))


def generalized_time(at: int) -> bytes:
    return der(0x18, datetime.fromtimestamp(at, UTC).strftime("%Y%m%d%H%M%SZ").encode())


def bits(octets: bytes, unused: int = 0) -> bytes:
    return der(0x03, bytes((unused,)), octets)


def amd_name(common_name: str) -> bytes:
    parts = (
        ("2.5.4.11", "Engineering"),
        ("2.5.4.6", "US"),
        ("2.5.4.7", "Santa Clara"),
        ("2.5.4.8", "CA"),
        ("2.5.4.10", "Advanced Micro Devices"),
        ("2.5.4.3", common_name),
    )
    return sequence(
        *(der(0x31, sequence(oid(what), der(0x0C, text.encode()))) for what, text in parts)
    )


def extension(name: str, value: bytes, critical: bool = False) -> bytes:
    return sequence(oid(name), der(0x01, b"\xff") if critical else b"", der(0x04, value))


# -- keys -------------------------------------------------------------------------------------


@functools.cache
def rsa_key(name: str, size: int = 4096) -> rsa.RSAPrivateKey:
    """A key that is the same for the same name, while the process lives."""
    return rsa.generate_private_key(65537, size)


@functools.cache
def ec_key(name: str) -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP384R1())


def spki(key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


@functools.cache
def _sign(tbs: bytes, key: rsa.RSAPrivateKey) -> bytes:
    return key.sign(tbs, padding.PSS(padding.MGF1(hashes.SHA384()), 48), hashes.SHA384())


# -- certificates -----------------------------------------------------------------------------


def certificate(
    subject: bytes,
    issuer: bytes,
    public_key: bytes,
    signer: rsa.RSAPrivateKey,
    extensions: tuple[bytes, ...],
    *,
    serial: int = 0,
    not_before: int = NOW - YEAR,
    not_after: int = NOW + YEAR,
    algorithm: bytes = PSS,
) -> bytes:
    """A certificate in DER."""
    tbs = sequence(
        der(0xA0, integer(2)),
        integer(serial),
        algorithm,
        issuer,
        sequence(generalized_time(not_before), generalized_time(not_after)),
        subject,
        public_key,
        der(0xA3, sequence(*extensions)),
    )
    return sequence(tbs, algorithm, bits(_sign(tbs, signer)))


def constraints(path_length: int | None = None) -> bytes:
    length = b"" if path_length is None else integer(path_length)
    return extension("2.5.29.19", sequence(der(0x01, b"\xff"), length), True)


def usage(*numbers: int) -> bytes:
    octet = sum(0x80 >> number for number in numbers)
    return extension("2.5.29.15", bits(bytes((octet,)), (octet & -octet).bit_length() - 1), True)


def crl(
    product: str = "Milan",
    revoked: tuple[int, ...] = (),
    *,
    this_update: int = NOW - 1000,
    next_update: int | None = NOW + 1000,
    signer: str = "ark",
    issuer: bytes | None = None,
    extensions: tuple[bytes, ...] = (),
) -> bytes:
    """A revocation list of a product's root, in DER."""
    entries = sequence(
        *(sequence(integer(serial), generalized_time(NOW - YEAR)) for serial in revoked)
    )
    tbs = sequence(
        integer(1),
        PSS,
        issuer or amd_name(f"ARK-{product}"),
        generalized_time(this_update),
        b"" if next_update is None else generalized_time(next_update),
        entries if revoked else b"",
        der(0xA0, sequence(*extensions)) if extensions else b"",
    )
    return sequence(tbs, PSS, bits(_sign(tbs, rsa_key(signer))))


def table(*entries: tuple[str, bytes]) -> bytes:
    """The certificate table of the extended guest request: role or GUID, and DER."""
    position = 24 * (len(entries) + 1)
    head, body = bytearray(), bytearray()
    for role, octets in entries:
        head += uuid.UUID(ROLES.get(role, role)).bytes
        head += (position + len(body)).to_bytes(4, "little") + len(octets).to_bytes(4, "little")
        body += octets
    return bytes(head + bytes(24) + body)


# -- the machine ------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SnpMachine:
    """One machine, its provider, and AMD as far as it goes.

    None means: what fits the rest. TCB versions are the eight bytes as in the report.
    """

    product: str = "Milan"
    key: str = "VCEK"

    version: int = 3
    guest_svn: int = 1
    policy: int = 0x30000
    family_id: bytes = b"family".ljust(16, b"\0")
    image_id: bytes = b"image".ljust(16, b"\0")
    vmpl: int = 0
    signature_algo: int = 1
    platform_info: int = 0x25
    key_info: int | None = None
    report_data: bytes = b"challenge"
    measurement: bytes = b"\x11" * 48
    host_data: bytes = b"\x22" * 32
    id_key_digest: bytes = bytes(48)
    author_key_digest: bytes = bytes(48)
    report_id: bytes = b"\x33" * 32
    report_id_ma: bytes = b"\xff" * 32
    cpuid: tuple[int, int, int] | None = None
    chip_id: bytes | None = None
    reported_tcb: bytes | None = None
    committed_tcb: bytes | None = None
    current_tcb: bytes | None = None
    launch_tcb: bytes | None = None
    current: tuple[int, int, int] = (1, 55, 29)
    committed: tuple[int, int, int] = (1, 55, 29)
    mit_vectors: tuple[int, int] = (3, 3)
    patches: Mapping[int, bytes] = field(default_factory=dict)
    """Bytes to overwrite before signing, by offset."""
    late_patches: Mapping[int, bytes] = field(default_factory=dict)
    """Bytes to overwrite after signing, by offset."""
    signer: str = "leaf"

    product_name: str | None = None
    struct_version: int | None = None
    certified_tcb: bytes | None = None
    hwid: bytes | None = None
    csp_id: str = "CN=cc-test.example.com"
    leaf_extensions: tuple[bytes, ...] = ()
    leaf_without: tuple[str, ...] = ()
    leaf_subject: str | None = None
    leaf_issuer: str | None = None
    leaf_signer: str | None = None
    leaf_key: bytes | None = None
    leaf_dates: tuple[int, int] = (NOW - YEAR, NOW + YEAR)
    leaf_serial: int = 0

    issuer_subject: str | None = None
    issuer_signer: str = "ark"
    issuer_key: bytes | None = None
    issuer_dates: tuple[int, int] = (NOW - 2 * YEAR, NOW + 2 * YEAR)
    issuer_serial: int = 0x10001
    issuer_extensions: tuple[bytes, ...] = (constraints(0), usage(5))

    root_dates: tuple[int, int] = (NOW - 3 * YEAR, NOW + 3 * YEAR)
    root_serial: int = 0x10000
    root_extensions: tuple[bytes, ...] = (constraints(), usage(5, 6))
    root_signer: str = "ark"

    @property
    def tcb(self) -> bytes:
        """What runs, where nothing else is said."""
        if self.product == "Turin":
            return bytes((1, 2, 3, 4, 0, 0, 0, 80))
        return bytes((4, 1, 0, 0, 0, 0, 24, 219))

    @property
    def chip(self) -> bytes:
        """The chip's hwID."""
        if self.hwid is not None:
            return self.hwid
        return bytes(range(1, 9)) if self.product == "Turin" else bytes(range(1, 65))

    def _tcb(self, other: bytes | None) -> bytes:
        return self.tcb if other is None else other

    def report(self) -> bytes:
        """ATTESTATION_REPORT, signed."""
        info = (4 if self.key == "VLEK" else 0) if self.key_info is None else self.key_info
        cpuid = self.cpuid or CPUID[self.product]
        chip_id = self.chip.ljust(64, b"\0") if self.chip_id is None else self.chip_id
        octets = bytearray(0x4A0)
        for offset, value in (
            (0x00, self.version.to_bytes(4, "little")),
            (0x04, self.guest_svn.to_bytes(4, "little")),
            (0x08, self.policy.to_bytes(8, "little")),
            (0x10, self.family_id),
            (0x20, self.image_id),
            (0x30, self.vmpl.to_bytes(4, "little")),
            (0x34, self.signature_algo.to_bytes(4, "little")),
            (0x38, self._tcb(self.current_tcb)),
            (0x40, self.platform_info.to_bytes(8, "little")),
            (0x48, info.to_bytes(4, "little")),
            (0x50, self.report_data.ljust(64, b"\0")),
            (0x90, self.measurement),
            (0xC0, self.host_data),
            (0xE0, self.id_key_digest),
            (0x110, self.author_key_digest),
            (0x140, self.report_id),
            (0x160, self.report_id_ma),
            (0x180, self._tcb(self.reported_tcb)),
            (0x188, bytes(cpuid) if self.version >= 3 else b""),
            (0x1A0, chip_id),
            (0x1E0, self._tcb(self.committed_tcb)),
            (0x1E8, bytes(reversed(self.current))),
            (0x1EC, bytes(reversed(self.committed))),
            (0x1F0, self._tcb(self.launch_tcb)),
            (
                0x1F8,
                b"".join(vector.to_bytes(8, "little") for vector in self.mit_vectors)
                if self.version >= 5
                else b"",
            ),
            *self.patches.items(),
        ):
            octets[offset : offset + len(value)] = value
        signature = ec_key(self.signer).sign(bytes(octets[:0x2A0]), ec.ECDSA(hashes.SHA384()))
        r, s = decode_dss_signature(signature)
        octets[0x2A0 : 0x2A0 + 72] = r.to_bytes(72, "little")
        octets[0x2E8 : 0x2E8 + 72] = s.to_bytes(72, "little")
        for offset, value in self.late_patches.items():
            octets[offset : offset + len(value)] = value
        return bytes(octets)

    @property
    def issuer_name(self) -> str:
        return f"SEV-{'VLEK-' if self.key == 'VLEK' else ''}{self.product}"

    def endorsement(self) -> bytes:
        """VCEK or VLEK in DER."""
        tcb = self.certified_tcb or self._tcb(self.reported_tcb)
        turin = self.product == "Turin"
        numbers = (9, 1, 2, 3) if turin else (1, 2, None, None, None, None, 3)
        parts = {number: tcb[i] for i, number in enumerate(numbers) if number is not None}
        parts |= {8: tcb[7], 5: 0, 6: 0, 7: 0} | ({} if turin else {4: 0})
        version = int(turin) if self.struct_version is None else self.struct_version
        name = {"Milan": "Milan-B0"}.get(self.product, self.product)
        values = {
            "1": integer(version),
            "2": ia5(self.product_name or name),
            **{f"3.{number}": integer(part) for number, part in parts.items()},
        }
        if self.key == "VLEK":
            values["5"] = ia5(self.csp_id)
        else:
            values["4"] = self.chip
        return certificate(
            amd_name(self.leaf_subject or f"SEV-{self.key}"),
            amd_name(self.leaf_issuer or self.issuer_name),
            self.leaf_key or spki(ec_key("leaf")),
            rsa_key(self.leaf_signer or self.key),
            (
                *(
                    extension(AMD + number, value)
                    for number, value in values.items()
                    if number not in self.leaf_without
                ),
                *self.leaf_extensions,
            ),
            serial=self.leaf_serial,
            not_before=self.leaf_dates[0],
            not_after=self.leaf_dates[1],
        )

    def issuer(self) -> bytes:
        """ASK or ASVK in DER."""
        return certificate(
            amd_name(self.issuer_subject or self.issuer_name),
            amd_name(f"ARK-{self.product}"),
            self.issuer_key or spki(rsa_key(self.key)),
            rsa_key(self.issuer_signer),
            self.issuer_extensions,
            serial=self.issuer_serial,
            not_before=self.issuer_dates[0],
            not_after=self.issuer_dates[1],
        )

    def root(self) -> bytes:
        """ARK in DER."""
        return certificate(
            amd_name(f"ARK-{self.product}"),
            amd_name(f"ARK-{self.product}"),
            spki(rsa_key("ark")),
            rsa_key(self.root_signer),
            self.root_extensions,
            serial=self.root_serial,
            not_before=self.root_dates[0],
            not_after=self.root_dates[1],
        )

    def parts(self) -> dict[str, bytes]:
        """The evidence: the report, and the host's certificate table."""
        return {"report": self.report(), "certificates": table((self.key, self.endorsement()))}

    def collateral(self) -> Collateral:
        """What an operator has: ASK or ASVK, ARK, and the root's revocation list."""
        return Collateral(certificates=(self.issuer(), self.root()), crls=(crl(self.product),))

    def requirements(self, **changes: object) -> Requirements:
        """A policy that pins everything and takes this machine.

        Args:
            changes: fields of `Requirements`; or pins by name, None to leave one out.
        """
        report = self.report()
        pins: dict[str, tuple[str, ...]] = {
            "product": (self.product,),
            "signing_key": (self.key,),
            "vmpl": (str(self.vmpl),),
            "host_data": (self.host_data.hex(),),
            "id_key_digest": (self.id_key_digest.hex(),),
            "author_key_digest": (self.author_key_digest.hex(),),
            "family_id": (self.family_id.hex(),),
            "image_id": (self.image_id.hex(),),
            "chip_id": (self.chip.ljust(64, b"\0").hex(),),
        }
        if self.key == "VLEK":
            pins["csp_id"] = (self.csp_id,)
            if not any(report[0x1A0:0x1E0]):
                del pins["chip_id"]
        names = ("fmc", "bootloader", "tee", "snp") if self.product == "Turin" else None
        least = (
            {name: self.tcb[i] for i, name in enumerate(names)}
            if names
            else {"bootloader": self.tcb[0], "tee": self.tcb[1], "snp": self.tcb[6]}
        ) | {"microcode": self.tcb[7]}
        fields: dict[str, object] = {
            "open": (),
            "minimum_tcb": {self.product: least},
            "roots": (hashlib.sha256(self.root()).hexdigest(),),
        }
        for name, value in changes.items():
            if name in Requirements.__dataclass_fields__:
                fields[name] = value
            elif value is None:
                pins.pop(name, None)
            else:
                pins[name] = value  # type: ignore[assignment]
        opened = fields["open"]
        assert isinstance(opened, tuple)
        pins = {name: values for name, values in pins.items() if name not in opened}
        return Requirements(pins=pins, **fields)  # type: ignore[arg-type]

    def expectations(self, **changes: object) -> Expectations:
        """The same, with the measurement pinned."""
        return Expectations("sev-snp", self.requirements(**changes), (self.measurement.hex(),))

    def verify(
        self,
        *,
        parts: Mapping[str, bytes] | None = None,
        collateral: Collateral | None = None,
        expected: Expectations | None = None,
        now: int = NOW,
        bound_to: bytes | None = b"challenge",
        **changes: object,
    ) -> Verdict:
        """Judges its evidence; by its own expectations unless others are given."""
        return verify_sev_snp(
            self.parts() if parts is None else parts,
            self.collateral() if collateral is None else collateral,
            expected or self.expectations(**changes),
            now,
            bound_to,
        )


MACHINES: tuple[SnpMachine, ...] = tuple(
    SnpMachine(product=product, key=key)
    for product in ("Milan", "Genoa", "Turin")
    for key in ("VCEK", "VLEK")
)

MASKED = replace(MACHINES[1], chip_id=bytes(64))
"""A provider's machine that does not say which it is."""
