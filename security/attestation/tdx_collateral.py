"""TDX collateral: TCB info, TD QE identity and revocation lists that Intel signs.

After the "API specification" of Intel's Provisioning Certification Service, version 4 ("Get TCB
Info", "Get TD Quoting Enclave Identity"). The container is the JSON document QuoteCollateralV3 of
dcap-qvl, whose members `tcb_info` and `qe_identity` are the very text that Intel signed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from functools import lru_cache

from placement.document import DocumentError, Fields, decode
from security.attestation.errors import TdxCollateralMalformed
from security.attestation.intel_pki import (
    Certificate,
    RevocationList,
    p256_signature_holds,
    read_certificate_chain,
    read_revocation_list,
)
from security.errors import EvidenceMalformed

__all__ = [
    "QeIdentity",
    "QeTcbLevel",
    "TcbInfo",
    "TcbLevel",
    "TcbStatus",
    "TdxCollateral",
    "TdxModule",
    "read_tdx_collateral",
]

MAX_COLLATERAL_BYTES = 2 << 20
_MAX_TCB_INFO_BYTES = 512 << 10
_MAX_LEVELS = 256
_MAX_ADVISORIES = 256
_DATE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")
_HEX = "[0-9A-Fa-f]"


class TcbStatus(StrEnum):
    """`tcbStatus` of a TCB level; the last two are derived, never listed."""

    UP_TO_DATE = "UpToDate"
    SW_HARDENING_NEEDED = "SWHardeningNeeded"
    CONFIGURATION_NEEDED = "ConfigurationNeeded"
    CONFIGURATION_AND_SW_HARDENING_NEEDED = "ConfigurationAndSWHardeningNeeded"
    OUT_OF_DATE = "OutOfDate"
    OUT_OF_DATE_CONFIGURATION_NEEDED = "OutOfDateConfigurationNeeded"
    REVOKED = "Revoked"
    TD_RELAUNCH_ADVISED = "TDRelaunchAdvised"
    TD_RELAUNCH_ADVISED_CONFIGURATION_NEEDED = "TDRelaunchAdvisedConfigurationNeeded"


@dataclass(frozen=True, slots=True)
class TcbLevel:
    """One of `tcbLevels` of TCB info.

    Attributes:
        sgx_components: least SVNs of 16 SGX components.
        pcesvn: least PCESVN.
        tdx_components: least SVNs of 16 TDX components.
        status: what a platform that reaches it is.
        date: `tcbDate` as text.
        advisories: `advisoryIDs`.
    """

    sgx_components: tuple[int, ...]
    pcesvn: int
    tdx_components: tuple[int, ...]
    status: TcbStatus
    date: str
    advisories: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class QeTcbLevel:
    """A level of QE identity or of a TDX module identity.

    Attributes:
        isvsvn: least ISVSVN.
        status: what an enclave or module that reaches it is.
        advisories: `advisoryIDs`.
    """

    isvsvn: int
    status: TcbStatus
    advisories: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TdxModule:
    """`tdxModule`, or one of `tdxModuleIdentities`.

    Attributes:
        id: "TDX_01" and so on; "" for `tdxModule`.
        mrsigner: 48 bytes.
        attributes: 8 bytes.
        attributes_mask: 8 bytes.
        levels: by ISVSVN, highest first; empty for `tdxModule`.
    """

    id: str
    mrsigner: bytes
    attributes: bytes
    attributes_mask: bytes
    levels: tuple[QeTcbLevel, ...]


@dataclass(frozen=True, slots=True)
class TcbInfo:
    """TCB info, version 3.

    Attributes:
        id: "TDX".
        version: 3.
        issue_date: Unix time in seconds.
        next_update: Unix time in seconds.
        fmspc: 6 bytes.
        pceid: 2 bytes.
        evaluation_number: `tcbEvaluationDataNumber`.
        module: `tdxModule`; None where there is none.
        modules: `tdxModuleIdentities`.
        levels: highest first, as Intel's library sorts them.
    """

    id: str
    version: int
    issue_date: int
    next_update: int
    fmspc: bytes
    pceid: bytes
    evaluation_number: int
    module: TdxModule | None
    modules: tuple[TdxModule, ...]
    levels: tuple[TcbLevel, ...]


@dataclass(frozen=True, slots=True)
class QeIdentity:
    """Identity of the TD quoting enclave, version 2.

    Attributes:
        id: "TD_QE".
        version: 2.
        issue_date: Unix time in seconds.
        next_update: Unix time in seconds.
        evaluation_number: `tcbEvaluationDataNumber`.
        miscselect: expected bits.
        miscselect_mask: which bits are compared.
        attributes: 16 bytes, expected bits.
        attributes_mask: 16 bytes, which bits are compared.
        mrsigner: 32 bytes.
        isvprodid: 16 bits.
        levels: highest ISVSVN first.
    """

    id: str
    version: int
    issue_date: int
    next_update: int
    evaluation_number: int
    miscselect: int
    miscselect_mask: int
    attributes: bytes
    attributes_mask: bytes
    mrsigner: bytes
    isvprodid: int
    levels: tuple[QeTcbLevel, ...]


@dataclass(frozen=True, slots=True)
class TdxCollateral:
    """One document of collateral, parsed; its signatures are for rules to check.

    Attributes:
        members: the document's members, as dcap-qvl takes them.
        tcb_info: what levels a platform may have.
        tcb_info_chain: leaf and root that sign it.
        tcb_info_signed: whether the leaf's key signed it.
        qe_identity: what the quoting enclave must be.
        qe_identity_chain: leaf and root that sign it.
        qe_identity_signed: whether the leaf's key signed it.
        root_ca_crl: what the root revokes.
        pck_crl: what a PCK CA revokes.
        pck_crl_chain: the PCK CA and the root.
    """

    members: Mapping[str, str]
    tcb_info: TcbInfo
    tcb_info_chain: tuple[Certificate, ...]
    tcb_info_signed: bool
    qe_identity: QeIdentity
    qe_identity_chain: tuple[Certificate, ...]
    qe_identity_signed: bool
    root_ca_crl: RevocationList
    pck_crl: RevocationList
    pck_crl_chain: tuple[Certificate, ...]


@lru_cache(maxsize=64)
def read_tdx_collateral(document: bytes) -> TdxCollateral:
    """Parses a QuoteCollateralV3 document. Remembered by its bytes; nothing here looks at a clock.

    Raises:
        TdxCollateralMalformed: not such a document, or beyond a bound.
    """
    try:
        fields = Fields.of(decode(document, MAX_COLLATERAL_BYTES), "collateral")
        members = {
            name: fields.text(name, MAX_COLLATERAL_BYTES)
            for name in (
                "pck_crl_issuer_chain",
                "root_ca_crl",
                "pck_crl",
                "tcb_info_issuer_chain",
                "tcb_info",
                "tcb_info_signature",
                "qe_identity_issuer_chain",
                "qe_identity",
                "qe_identity_signature",
            )
        }
        tcb_info_chain = _chain(members, "tcb_info_issuer_chain")
        qe_identity_chain = _chain(members, "qe_identity_issuer_chain")
        return TdxCollateral(
            members=members,
            tcb_info=_read_tcb_info(members["tcb_info"].encode()),
            tcb_info_chain=tcb_info_chain,
            tcb_info_signed=_signed(members, "tcb_info", tcb_info_chain),
            qe_identity=_read_qe_identity(members["qe_identity"].encode()),
            qe_identity_chain=qe_identity_chain,
            qe_identity_signed=_signed(members, "qe_identity", qe_identity_chain),
            root_ca_crl=read_revocation_list(_octets(members, "root_ca_crl"), "root_ca_crl"),
            pck_crl=read_revocation_list(_octets(members, "pck_crl"), "pck_crl"),
            pck_crl_chain=_chain(members, "pck_crl_issuer_chain"),
        )
    except (DocumentError, EvidenceMalformed) as error:
        raise TdxCollateralMalformed(
            "TDX collateral", "a QuoteCollateralV3 document", str(error)[:300]
        ) from None


def _chain(members: Mapping[str, str], name: str) -> tuple[Certificate, ...]:
    return read_certificate_chain(members[name].encode(), name)


def _octets(members: Mapping[str, str], name: str) -> bytes:
    try:
        return bytes.fromhex(members[name])
    except ValueError:
        raise DocumentError(f"collateral.{name}: expected hexadecimal digits") from None


def _signed(members: Mapping[str, str], name: str, chain: tuple[Certificate, ...]) -> bool:
    signature = _octets(members, f"{name}_signature")
    return p256_signature_holds(chain[0].key, signature, members[name].encode())


def _read_tcb_info(text: bytes) -> TcbInfo:
    fields = Fields.of(decode(text, _MAX_TCB_INFO_BYTES), "tcb_info")
    module = fields.section("tdxModule") if "tdxModule" in fields else None
    modules = (
        fields.sections("tdxModuleIdentities", _MAX_LEVELS)
        if "tdxModuleIdentities" in fields
        else ()
    )
    # Another type would mean another way to compare SVNs.
    fields.integer("tcbType", 0, 0)
    levels = [_read_tcb_level(level) for level in fields.sections("tcbLevels", _MAX_LEVELS)]
    levels.sort(key=lambda level: (level.sgx_components, level.pcesvn, level.tdx_components))
    return TcbInfo(
        id=fields.text("id", 16),
        version=fields.integer("version", 1, 255),
        issue_date=_date(fields, "issueDate"),
        next_update=_date(fields, "nextUpdate"),
        fmspc=_hex(fields, "fmspc", 6),
        pceid=_hex(fields, "pceId", 2),
        evaluation_number=fields.integer("tcbEvaluationDataNumber", 0, 1 << 31),
        module=None if module is None else _read_module(module, ""),
        modules=tuple(_read_module(item, item.text("id", 16)) for item in modules),
        levels=tuple(reversed(levels)),
    )


def _read_tcb_level(fields: Fields) -> TcbLevel:
    tcb = fields.section("tcb")
    return TcbLevel(
        sgx_components=_components(tcb, "sgxtcbcomponents"),
        pcesvn=tcb.integer("pcesvn", 0, 65535),
        # TCB info of SGX has none; the rule about its target refuses it.
        tdx_components=_components(tcb, "tdxtcbcomponents") if "tdxtcbcomponents" in tcb else (),
        status=fields.choice("tcbStatus", TcbStatus),
        date=fields.text("tcbDate", 32),
        advisories=_advisories(fields),
    )


def _components(fields: Fields, name: str) -> tuple[int, ...]:
    found = tuple(item.integer("svn", 0, 255) for item in fields.sections(name, 16))
    if len(found) != 16:
        fields.fail(name, "16 components", len(found))
    return found


def _advisories(fields: Fields) -> tuple[str, ...]:
    if "advisoryIDs" not in fields:
        return ()
    return fields.texts("advisoryIDs", _MAX_ADVISORIES, 64, "[A-Za-z0-9-]+")


def _read_module(fields: Fields, name: str) -> TdxModule:
    levels = fields.sections("tcbLevels", _MAX_LEVELS) if name else ()
    return TdxModule(
        id=name.upper(),
        mrsigner=_hex(fields, "mrsigner", 48),
        attributes=_hex(fields, "attributes", 8),
        attributes_mask=_hex(fields, "attributesMask", 8),
        levels=_qe_levels(levels, 255),
    )


def _read_qe_identity(text: bytes) -> QeIdentity:
    fields = Fields.of(decode(text, _MAX_TCB_INFO_BYTES), "qe_identity")
    return QeIdentity(
        id=fields.text("id", 16),
        version=fields.integer("version", 1, 255),
        issue_date=_date(fields, "issueDate"),
        next_update=_date(fields, "nextUpdate"),
        evaluation_number=fields.integer("tcbEvaluationDataNumber", 0, 1 << 31),
        # Intel writes both in the byte order of the enclave report, which is little-endian.
        miscselect=int.from_bytes(_hex(fields, "miscselect", 4), "little"),
        miscselect_mask=int.from_bytes(_hex(fields, "miscselectMask", 4), "little"),
        attributes=_hex(fields, "attributes", 16),
        attributes_mask=_hex(fields, "attributesMask", 16),
        mrsigner=_hex(fields, "mrsigner", 32),
        isvprodid=fields.integer("isvprodid", 0, 65535),
        levels=_qe_levels(fields.sections("tcbLevels", _MAX_LEVELS), 65535),
    )


def _qe_levels(items: tuple[Fields, ...], maximum: int) -> tuple[QeTcbLevel, ...]:
    levels = [
        QeTcbLevel(
            item.section("tcb").integer("isvsvn", 0, maximum),
            item.choice("tcbStatus", TcbStatus),
            _advisories(item),
        )
        for item in items
    ]
    return tuple(sorted(levels, key=lambda level: level.isvsvn, reverse=True))


def _hex(fields: Fields, name: str, size: int) -> bytes:
    return bytes.fromhex(fields.text(name, 2 * size, f"{_HEX}{{{2 * size}}}"))


def _date(fields: Fields, name: str) -> int:
    text = fields.text(name, 20, _DATE.pattern)
    try:
        moment = datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    except ValueError:
        fields.fail(name, "a date and time", text)
    return int((moment - datetime(1970, 1, 1, tzinfo=UTC)).total_seconds())
