"""A TDX machine that does not exist: quotes, PCK chain and collateral under a throw-away root.

`TdxVendor` plays Intel, `QuoteDraft` the machine, `CollateralDraft` the Provisioning Certification
Service. A draft holds every field that a test may want to vary; `build` signs what it says.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID

NOW = 1_790_000_000
"""The time (Unix seconds) at which everything is valid by default."""

DAY = 24 * 3600
VENDOR_ID = bytes.fromhex("939a7233f79c4ca9940a0db3957f0607")
SGX_OID = "1.2.840.113741.1.13.1"
QE_SIGNER = bytes.fromhex("dc9e2a7c6f948f17474e34a7fc43ed030f7c1563f1babddf6340c82e0e54a8c5")
SEPT_VE_DISABLE = 1 << 28
TCB_SIGNING = "Intel SGX TCB Signing"
PLATFORM_CA = "Intel SGX PCK Platform CA"


def sign(key: ec.EllipticCurvePrivateKey, data: bytes) -> bytes:
    """An ECDSA signature with SHA-256 as r || s."""
    r, s = decode_dss_signature(key.sign(data, ec.ECDSA(hashes.SHA256())))
    return r.to_bytes(32, "big") + s.to_bytes(32, "big")


def new_key() -> ec.EllipticCurvePrivateKey:
    """A key on P-256."""
    return ec.generate_private_key(ec.SECP256R1())


def moment(seconds: int) -> datetime:
    """A time as `cryptography` takes it."""
    return datetime.fromtimestamp(seconds, UTC)


def text(seconds: int) -> str:
    """A time as Intel writes it."""
    return moment(seconds).strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclass
class Issued:
    """A certificate with its key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(Encoding.PEM)

    @property
    def der(self) -> bytes:
        return self.certificate.public_bytes(Encoding.DER)


def issue(
    name: str,
    issuer: Issued | None,
    *,
    path_length: int | None = None,
    ca: bool = True,
    serial: int | None = None,
    dates: tuple[int, int] = (NOW - 365 * DAY, NOW + 365 * DAY),
    extra: Sequence[tuple[x509.ExtensionType, bool]] = (),
    key: ec.EllipticCurvePrivateKey | None = None,
    digest: hashes.HashAlgorithm | None = None,
    signs_data: bool | None = None,
) -> Issued:
    """A certificate in Intel's profile; `signs_data` None for what no CA does."""
    key = key or new_key()
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    issuer_key = key if issuer is None else issuer.key
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject if issuer is None else issuer.certificate.subject)
        .public_key(key.public_key())
        .serial_number(serial or x509.random_serial_number())
        .not_valid_before(moment(dates[0]))
        .not_valid_after(moment(dates[1]))
        .add_extension(x509.BasicConstraints(ca, path_length if ca else None), critical=True)
        .add_extension(
            x509.KeyUsage(
                digital_signature=not ca if signs_data is None else signs_data,
                content_commitment=False,
                key_encipherment=False,
                data_encipherment=False,
                key_agreement=False,
                key_cert_sign=ca,
                crl_sign=ca,
                encipher_only=False,
                decipher_only=False,
            ),
            critical=True,
        )
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()),
            critical=False,
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    for extension, critical in extra:
        builder = builder.add_extension(extension, critical)
    return Issued(builder.sign(issuer_key, digest or hashes.SHA256()), key)


def revocation_list(
    issuer: Issued,
    revoked: Sequence[int] = (),
    dates: tuple[int, int] = (NOW - DAY, NOW + 30 * DAY),
    *,
    key: Issued | None = None,
    digest: hashes.HashAlgorithm | None = None,
    partial: bool = False,
) -> bytes:
    """A CRL in DER; with `key` signed by that one, `partial` of user certificates only."""
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(issuer.certificate.subject)
        .last_update(moment(dates[0]))
        .next_update(moment(dates[1]))
        .add_extension(x509.CRLNumber(1), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.key.public_key()),
            critical=False,
        )
    )
    for serial in revoked:
        builder = builder.add_revoked_certificate(
            x509.RevokedCertificateBuilder()
            .serial_number(serial)
            .revocation_date(moment(dates[0]) - timedelta(days=1))
            .build()
        )
    if partial:
        point = x509.IssuingDistributionPoint(
            full_name=None,
            relative_name=None,
            only_contains_user_certs=True,
            only_contains_ca_certs=False,
            only_some_reasons=None,
            indirect_crl=False,
            only_contains_attribute_certs=False,
        )
        builder = builder.add_extension(point, critical=True)
    signer = (key or issuer).key
    return builder.sign(signer, digest or hashes.SHA256()).public_bytes(Encoding.DER)


# -- SGX extension --------------------------------------------------------------------------------


def der(tag: int, content: bytes) -> bytes:
    """A DER element."""
    size = len(content)
    length = bytes([size]) if size < 0x80 else b"\x82" + size.to_bytes(2, "big")
    if 0x80 <= size < 0x100:
        length = b"\x81" + bytes([size])
    return bytes([tag]) + length + content


def x509_oid_bytes(dotted: str) -> bytes:
    """Encodes an object identifier."""
    arcs = [int(arc) for arc in dotted.split(".")]
    content = b""
    for arc in (arcs[0] * 40 + arcs[1], *arcs[2:]):
        octets = [arc & 0x7F]
        while arc > 0x7F:
            arc >>= 7
            octets.append(0x80 | arc & 0x7F)
        content += bytes(reversed(octets))
    return der(0x06, content)


def _pair(oid: str, value: bytes) -> bytes:
    return der(0x30, x509_oid_bytes(oid) + value)


def _integer(value: int) -> bytes:
    return der(0x02, value.to_bytes(value.bit_length() // 8 + 1, "big"))


@dataclass
class Platform:
    """What a PCK certificate says."""

    ppid: bytes = bytes(range(16))
    components: tuple[int, ...] = (3, 3, 2, 2, 4, 1, 0, 5, 0, 0, 0, 0, 0, 0, 0, 0)
    pcesvn: int = 13
    pceid: bytes = b"\0\0"
    fmspc: bytes = bytes.fromhex("b0c06f000000")
    sgx_type: int = 1

    def extension(self) -> bytes:
        """The SGX extension."""
        tcb = b"".join(
            _pair(f"{SGX_OID}.2.{i}", _integer(svn)) for i, svn in enumerate(self.components, 1)
        )
        tcb += _pair(f"{SGX_OID}.2.17", _integer(self.pcesvn))
        tcb += _pair(f"{SGX_OID}.2.18", der(0x04, bytes(self.components)))
        return der(
            0x30,
            _pair(f"{SGX_OID}.1", der(0x04, self.ppid))
            + _pair(f"{SGX_OID}.2", der(0x30, tcb))
            + _pair(f"{SGX_OID}.3", der(0x04, self.pceid))
            + _pair(f"{SGX_OID}.4", der(0x04, self.fmspc))
            + _pair(f"{SGX_OID}.5", der(0x0A, bytes([self.sgx_type]))),
        )


class TdxVendor:
    """A root with a PCK CA and a TCB signer under it."""

    def __init__(self) -> None:
        self.root = issue("Intel SGX Root CA", None, path_length=1)
        self.pck_ca = issue(PLATFORM_CA, self.root, path_length=0)
        self.signer = issue(TCB_SIGNING, self.root, ca=False)

    @property
    def roots(self) -> tuple[str, ...]:
        """What a policy names to trust this vendor."""
        return (self.root.certificate.fingerprint(hashes.SHA256()).hex(),)

    def pck(self, platform: Platform | None = None, **changes: Any) -> Issued:
        """A PCK certificate."""
        extension = changes.pop("extension", (platform or Platform()).extension())
        arguments: dict[str, Any] = {
            "ca": False,
            "extra": [
                (x509.UnrecognizedExtension(x509.ObjectIdentifier(SGX_OID), extension), False)
            ],
        }
        issuer = changes.pop("issuer", self.pck_ca)
        name = changes.pop("name", "Intel SGX PCK Certificate")
        return issue(name, issuer, **(arguments | changes))


@cache
def vendor() -> TdxVendor:
    """One vendor for all tests that do not need their own."""
    return TdxVendor()


@cache
def default_pck() -> Issued:
    """The PCK certificate of the default machine."""
    return vendor().pck(serial=0x1234ABCD)


@cache
def attestation_key() -> ec.EllipticCurvePrivateKey:
    """The attestation key of the default machine."""
    return new_key()


# -- quotes ---------------------------------------------------------------------------------------


def default_registers() -> dict[str, bytes]:
    return {
        "mrseam": hashlib.sha384(b"tdx module").digest(),
        "mrsignerseam": bytes(48),
        "seamattributes": bytes(8),
        "mrtd": hashlib.sha384(b"firmware").digest(),
        "mrconfigid": bytes(48),
        "mrowner": bytes(48),
        "mrownerconfig": bytes(48),
        "rtmr0": hashlib.sha384(b"rtmr0").digest(),
        "rtmr1": hashlib.sha384(b"rtmr1").digest(),
        "rtmr2": hashlib.sha384(b"rtmr2").digest(),
        "rtmr3": bytes(48),
    }


@dataclass
class QuoteDraft:
    """A quote before it is signed. `body_type` None for version 4's untyped body."""

    report_data: bytes = bytes(64)
    version: int = 4
    body_type: int | None = None
    attestation_key_type: int = 2
    tee_type: int = 0x81
    reserved: int = 0
    vendor_id: bytes = VENDOR_ID
    user_data: bytes = bytes(20)
    tee_tcb_svn: bytes = bytes([6, 1, 3]) + bytes(13)
    tdattributes: int = SEPT_VE_DISABLE
    xfam: int = 0x602E7
    registers: dict[str, bytes] = field(default_factory=default_registers)
    tee_tcb_svn2: bytes = bytes([6, 1, 3]) + bytes(13)
    mrservicetd: bytes = bytes(48)
    qe_miscselect: int = 0
    qe_attributes: bytes = bytes([0x11]) + bytes(7) + bytes([0xE7]) + bytes(7)
    qe_signer: bytes = QE_SIGNER
    qe_isvprodid: int = 2
    qe_isvsvn: int = 6
    qe_report_data: bytes | None = None
    qe_auth: bytes = bytes(range(32))
    pck: Issued = field(default_factory=default_pck)
    chain: bytes | None = None
    certification_type: int = 6
    pck_certification_type: int = 5
    trailing: bytes = b""

    def body(self) -> bytes:
        """The signed body."""
        r = self.registers
        body = (
            self.tee_tcb_svn
            + r["mrseam"]
            + r["mrsignerseam"]
            + r["seamattributes"]
            + self.tdattributes.to_bytes(8, "little")
            + self.xfam.to_bytes(8, "little")
            + b"".join(r[n] for n in ("mrtd", "mrconfigid", "mrowner", "mrownerconfig"))
            + b"".join(r[f"rtmr{i}"] for i in range(4))
            + self.report_data.ljust(64, b"\0")
        )
        if self.body_type == 3:
            body += self.tee_tcb_svn2 + self.mrservicetd
        return body

    def qe_report(self, key: bytes) -> bytes:
        """The quoting enclave's report."""
        data = self.qe_report_data
        if data is None:
            data = hashlib.sha256(key + self.qe_auth).digest() + bytes(32)
        return (
            bytes(16)
            + self.qe_miscselect.to_bytes(4, "little")
            + bytes(28)
            + self.qe_attributes
            + hashlib.sha256(b"qe").digest()
            + bytes(32)
            + self.qe_signer
            + bytes(96)
            + self.qe_isvprodid.to_bytes(2, "little")
            + self.qe_isvsvn.to_bytes(2, "little")
            + bytes(60)
            + data
        )

    def build(self) -> bytes:
        """The quote, signed."""
        header = (
            self.version.to_bytes(2, "little")
            + self.attestation_key_type.to_bytes(2, "little")
            + self.tee_type.to_bytes(4, "little")
            + self.reserved.to_bytes(4, "little")
            + self.vendor_id
            + self.user_data
        )
        body = self.body()
        kind = b""
        if self.body_type is not None:
            kind = self.body_type.to_bytes(2, "little") + len(body).to_bytes(4, "little")
        signed = header + kind + body
        ak = attestation_key()
        point = ak.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)[1:]
        report = self.qe_report(point)
        chain = self.chain
        if chain is None:
            chain = self.pck.pem + vendor().pck_ca.pem + vendor().root.pem
        certification = (
            report
            + sign(self.pck.key, report)
            + len(self.qe_auth).to_bytes(2, "little")
            + self.qe_auth
            + self.pck_certification_type.to_bytes(2, "little")
            + len(chain).to_bytes(4, "little")
            + chain
        )
        data = (
            sign(ak, signed)
            + point
            + self.certification_type.to_bytes(2, "little")
            + len(certification).to_bytes(4, "little")
            + certification
        )
        return signed + len(data).to_bytes(4, "little") + data + self.trailing


def quote(**changes: Any) -> bytes:
    """A quote with some fields changed; registers by their names, too."""
    registers = {name: changes.pop(name) for name in tuple(changes) if name in default_registers()}
    return QuoteDraft(registers=default_registers() | registers, **changes).build()


# -- collateral -----------------------------------------------------------------------------------


def level(
    sgx: Sequence[int],
    tdx: Sequence[int],
    pcesvn: int,
    status: str,
    advisories: Sequence[str] = (),
) -> dict[str, Any]:
    """A TCB level; components are padded with zeros."""
    return {
        "tcb": {
            "sgxtcbcomponents": [{"svn": svn} for svn in [*sgx, *[0] * (16 - len(sgx))]],
            "pcesvn": pcesvn,
            "tdxtcbcomponents": [{"svn": svn} for svn in [*tdx, *[0] * (16 - len(tdx))]],
        },
        "tcbDate": "2024-03-13T00:00:00Z",
        "tcbStatus": status,
        "advisoryIDs": list(advisories),
    }


def module_level(isvsvn: int, status: str) -> dict[str, Any]:
    """A level of a module or a quoting enclave."""
    return {
        "tcb": {"isvsvn": isvsvn},
        "tcbDate": "2024-03-13T00:00:00Z",
        "tcbStatus": status,
    }


def tcb_info(**changes: Any) -> dict[str, Any]:
    """TCB info that fits the default machine."""
    identity = {"mrsigner": "00" * 48, "attributes": "00" * 8, "attributesMask": "FF" * 8}
    return {
        "id": "TDX",
        "version": 3,
        "issueDate": text(NOW - DAY),
        "nextUpdate": text(NOW + 29 * DAY),
        "fmspc": "B0C06F000000",
        "pceId": "0000",
        "tcbType": 0,
        "tcbEvaluationDataNumber": 18,
        "tdxModule": identity,
        "tdxModuleIdentities": [
            {
                "id": "TDX_01",
                **identity,
                "tcbLevels": [
                    module_level(6, "UpToDate"),
                    module_level(4, "OutOfDate"),
                    module_level(2, "Revoked"),
                ],
            }
        ],
        "tcbLevels": [
            level((2, 2, 2, 2, 3, 1, 0, 5), (5, 0, 2), 11, "UpToDate"),
            level((2, 2, 2, 2, 3, 1, 0, 5), (5, 0, 2), 5, "OutOfDate", ("INTEL-SA-00106",)),
            level((1, 1, 1, 1), (1, 0, 1), 5, "Revoked"),
        ],
    } | changes


def qe_identity(**changes: Any) -> dict[str, Any]:
    """QE identity that fits the default machine."""
    return {
        "id": "TD_QE",
        "version": 2,
        "issueDate": text(NOW - DAY),
        "nextUpdate": text(NOW + 29 * DAY),
        "tcbEvaluationDataNumber": 18,
        "miscselect": "00000000",
        "miscselectMask": "FFFFFFFF",
        "attributes": "11000000000000000000000000000000",
        "attributesMask": "FBFFFFFFFFFFFFFF0000000000000000",
        "mrsigner": QE_SIGNER.hex().upper(),
        "isvprodid": 2,
        "tcbLevels": [module_level(4, "UpToDate"), module_level(2, "OutOfDate")],
    } | changes


@dataclass
class CollateralDraft:
    """Collateral before it is signed."""

    tcb_info: dict[str, Any] = field(default_factory=tcb_info)
    qe_identity: dict[str, Any] = field(default_factory=qe_identity)
    signer: Issued = field(default_factory=lambda: vendor().signer)
    signer_root: Issued = field(default_factory=lambda: vendor().root)
    tcb_info_key: ec.EllipticCurvePrivateKey | None = None
    qe_identity_key: ec.EllipticCurvePrivateKey | None = None
    root_ca_crl: bytes = field(default_factory=lambda: revocation_list(vendor().root))
    pck_crl: bytes = field(default_factory=lambda: revocation_list(vendor().pck_ca))
    members: dict[str, str] = field(default_factory=dict)

    def build(self) -> bytes:
        """A QuoteCollateralV3 document."""
        info = json.dumps(self.tcb_info, separators=(",", ":"))
        identity = json.dumps(self.qe_identity, separators=(",", ":"))
        chain = (self.signer.pem + self.signer_root.pem).decode()
        document = {
            "pck_crl_issuer_chain": (vendor().pck_ca.pem + vendor().root.pem).decode(),
            "root_ca_crl": self.root_ca_crl.hex(),
            "pck_crl": self.pck_crl.hex(),
            "tcb_info_issuer_chain": chain,
            "tcb_info": info,
            "tcb_info_signature": sign(self.tcb_info_key or self.signer.key, info.encode()).hex(),
            "qe_identity_issuer_chain": chain,
            "qe_identity": identity,
            "qe_identity_signature": sign(
                self.qe_identity_key or self.signer.key, identity.encode()
            ).hex(),
        }
        return json.dumps(document | self.members).encode()


def collateral(**changes: Any) -> bytes:
    """A document with some parts changed."""
    return CollateralDraft(**changes).build()


# -- event logs -----------------------------------------------------------------------------------


def event_log(events: Sequence[tuple[int, int, bytes]], padding: bytes = b"\xff" * 64) -> bytes:
    """A log with SHA-384 digests of (register index, event type, data)."""
    spec = (
        b"Spec ID Event03\0"
        + bytes(4)
        + bytes([0, 2, 0, 2])
        + (1).to_bytes(4, "little")
        + (0x0C).to_bytes(2, "little")
        + (48).to_bytes(2, "little")
        + b"\0"
    )
    log = (1).to_bytes(4, "little") + (3).to_bytes(4, "little") + bytes(20)
    log += len(spec).to_bytes(4, "little") + spec
    for index, kind, data in events:
        log += index.to_bytes(4, "little") + kind.to_bytes(4, "little")
        log += (1).to_bytes(4, "little") + (0x0C).to_bytes(2, "little")
        log += hashlib.sha384(data).digest() + len(data).to_bytes(4, "little") + data
    return log + padding


def replay(events: Sequence[tuple[int, int, bytes]]) -> dict[str, bytes]:
    """RTMR0 to RTMR3 after events."""
    registers = {f"rtmr{i}": bytes(48) for i in range(4)}
    for index, kind, data in events:
        if kind != 3:
            old = registers[f"rtmr{index - 1}"]
            registers[f"rtmr{index - 1}"] = hashlib.sha384(
                old + hashlib.sha384(data).digest()
            ).digest()
    return registers


def ccel_table(kind: int = 2, length: int = 1 << 16) -> bytes:
    """A CCEL table with its checksum."""
    table = bytearray(b"CCEL" + (56).to_bytes(4, "little") + bytes([1, 0]) + b"TESTED" + bytes(20))
    table += bytes([kind, 0, 0, 0]) + length.to_bytes(8, "little") + bytes(8)
    table[9] = -sum(table) % 256
    return bytes(table)
