"""Which TCB level a TDX platform has.

After the "API specification" of Intel's Provisioning Certification Service, version 4, "Get TCB
Info" (how to determine the TCB level of a TDX platform) and "Get TD Quoting Enclave Identity", with
the way in which Intel's quote verification library lets one status outweigh another.
"""

from __future__ import annotations

from dataclasses import dataclass

from security.attestation.errors import (
    QeIdentityMismatch,
    Refusal,
    TcbLevelUnmatched,
    TdxModuleMismatch,
)
from security.attestation.intel_pki import PckExtension
from security.attestation.tdx_collateral import (
    QeIdentity,
    QeTcbLevel,
    TcbInfo,
    TcbLevel,
    TcbStatus,
    TdxModule,
)
from security.attestation.tdx_quote import EnclaveReport, TdQuoteBody

__all__ = ["TcbEvaluation", "evaluate_tcb", "match_module", "match_qe_identity", "match_tcb_level"]

_SGX_DEBUG = 0x02

_WORSE_BY_AGE = {
    TcbStatus.UP_TO_DATE: TcbStatus.OUT_OF_DATE,
    TcbStatus.SW_HARDENING_NEEDED: TcbStatus.OUT_OF_DATE,
    TcbStatus.CONFIGURATION_NEEDED: TcbStatus.OUT_OF_DATE_CONFIGURATION_NEEDED,
    TcbStatus.CONFIGURATION_AND_SW_HARDENING_NEEDED: TcbStatus.OUT_OF_DATE_CONFIGURATION_NEEDED,
    # A new start of the TD does not renew the quoting enclave.
    TcbStatus.TD_RELAUNCH_ADVISED: TcbStatus.OUT_OF_DATE,
    TcbStatus.TD_RELAUNCH_ADVISED_CONFIGURATION_NEEDED: TcbStatus.OUT_OF_DATE_CONFIGURATION_NEEDED,
}
_AGED = (TcbStatus.OUT_OF_DATE, TcbStatus.OUT_OF_DATE_CONFIGURATION_NEEDED)
_CONFIGURATION = (
    TcbStatus.CONFIGURATION_NEEDED,
    TcbStatus.CONFIGURATION_AND_SW_HARDENING_NEEDED,
    TcbStatus.OUT_OF_DATE_CONFIGURATION_NEEDED,
)


@dataclass(frozen=True, slots=True)
class TcbEvaluation:
    """What the collateral makes of a platform.

    Attributes:
        status: of platform, TDX module and quoting enclave together.
        date: `tcbDate` of the platform's level.
        advisories: of all three, sorted.
    """

    status: TcbStatus
    date: str
    advisories: tuple[str, ...]


def evaluate_tcb(
    body: TdQuoteBody,
    qe_report: EnclaveReport,
    pck: PckExtension,
    tcb_info: TcbInfo,
    qe_identity: QeIdentity,
) -> TcbEvaluation | None:
    """The status of a platform.

    None where platform, module or quoting enclave is unknown to the collateral: the three functions
    below say why, and each has a rule of its own that asks it.
    """
    try:
        level = match_tcb_level(body.tee_tcb_svn, pck, tcb_info)
        module = match_module(body, tcb_info)
        qe = match_qe_identity(qe_report, qe_identity)
    except Refusal:
        return None
    status = level.status if module is None else _converge(level.status, module.status)
    if module is not None and body.tee_tcb_svn2 is not None:
        status = _relaunch(body.tee_tcb_svn2, tcb_info, _sgx_status(pck, tcb_info), status, module)
    status = _converge(status, qe.status)
    advisories = {*level.advisories, *qe.advisories, *(module.advisories if module else ())}
    return TcbEvaluation(status, level.date, tuple(sorted(advisories)))


def match_tcb_level(tee_tcb_svn: bytes, pck: PckExtension, tcb_info: TcbInfo) -> TcbLevel:
    """The highest level that a platform reaches in every component.

    The first two TDX components are the module's ISVSVN and major version; from version 1 on the
    module has levels of its own, and these two are left out.

    Raises:
        TcbLevelUnmatched
    """
    first = 2 if tee_tcb_svn[1] > 0 else 0
    for level in tcb_info.levels:
        if (
            _reaches(pck.components, level.sgx_components)
            and pck.pcesvn >= level.pcesvn
            and len(level.tdx_components) == len(tee_tcb_svn)
            and _reaches(tee_tcb_svn[first:], level.tdx_components[first:])
        ):
            return level
    raise TcbLevelUnmatched(
        "TCB level",
        f"SVNs that reach one of the {len(tcb_info.levels)} levels of the TCB info",
        f"SGX {bytes(pck.components).hex()}, PCE {pck.pcesvn}, TDX {tee_tcb_svn.hex()}",
        "update the machine's firmware and register it anew",
    )


def _reaches(found: tuple[int, ...] | bytes, least: tuple[int, ...]) -> bool:
    return all(a >= b for a, b in zip(found, least, strict=True))


def _sgx_status(pck: PckExtension, tcb_info: TcbInfo) -> TcbStatus:
    """Status of the level that the SGX components alone reach; there is one if any matched."""
    for level in tcb_info.levels:
        if _reaches(pck.components, level.sgx_components) and pck.pcesvn >= level.pcesvn:
            return level.status
    return TcbStatus.REVOKED


def match_module(body: TdQuoteBody, tcb_info: TcbInfo) -> QeTcbLevel | None:
    """The level of the TDX module; None for modules of version 0, which have none of their own.

    Raises:
        TdxModuleMismatch: the module is not the one that the TCB info names, by signer, attributes,
            version or ISVSVN.
    """
    version, isvsvn = body.tee_tcb_svn[1], body.tee_tcb_svn[0]
    module = tcb_info.module if version == 0 else _module(version, tcb_info)
    if module is None:
        raise TdxModuleMismatch(
            "TDX module", "tdxModule in the TCB info, or an identity TDX_01", "neither"
        )
    if body.mrsignerseam != module.mrsigner:
        raise TdxModuleMismatch(
            "MRSIGNERSEAM", f"{module.mrsigner.hex()[:16]}...", f"{body.mrsignerseam.hex()[:16]}..."
        )
    masked = _masked(body.seamattributes, module.attributes_mask)
    if masked != _masked(module.attributes, module.attributes_mask):
        raise TdxModuleMismatch(
            "SEAMATTRIBUTES", module.attributes.hex(), body.seamattributes.hex()
        )
    if version == 0:
        return None
    for level in module.levels:
        if isvsvn >= level.isvsvn:
            return level
    raise TdxModuleMismatch(
        f"ISVSVN of TDX module {module.id}", "one that reaches a level of its identity", str(isvsvn)
    )


def _module(version: int, tcb_info: TcbInfo) -> TdxModule:
    wanted = f"TDX_{version:02X}"
    for module in tcb_info.modules:
        if module.id == wanted:
            return module
    known = ", ".join(module.id for module in tcb_info.modules[:8]) or "none"
    raise TdxModuleMismatch("TDX module identity", f"one of {known}", wanted)


def match_qe_identity(report: EnclaveReport, identity: QeIdentity) -> QeTcbLevel:
    """The level of the quoting enclave.

    Raises:
        QeIdentityMismatch: another enclave, a debug enclave, or one older than every level.
    """
    for what, expected, found in (
        ("MRSIGNER", identity.mrsigner.hex(), report.mrsigner.hex()),
        ("ISVPRODID", str(identity.isvprodid), str(report.isvprodid)),
        (
            "MISCSELECT under its mask",
            f"{identity.miscselect & identity.miscselect_mask:08x}",
            f"{report.miscselect & identity.miscselect_mask:08x}",
        ),
        (
            "ATTRIBUTES under their mask",
            _masked(identity.attributes, identity.attributes_mask).hex(),
            _masked(report.attributes, identity.attributes_mask).hex(),
        ),
        ("DEBUG", "0", str((report.attributes[0] & _SGX_DEBUG) >> 1)),
    ):
        if expected != found:
            raise QeIdentityMismatch(f"quoting enclave's {what}", expected[:32], found[:32])
    for level in identity.levels:
        if report.isvsvn >= level.isvsvn:
            return level
    raise QeIdentityMismatch(
        "quoting enclave's ISVSVN", "one that reaches a level of its identity", str(report.isvsvn)
    )


def _masked(value: bytes, mask: bytes) -> bytes:
    return bytes(a & b for a, b in zip(value, mask, strict=True))


def _converge(platform: TcbStatus, part: TcbStatus) -> TcbStatus:
    """What the age of a module or a quoting enclave makes of the platform's status."""
    if part is TcbStatus.UP_TO_DATE:
        return platform
    if TcbStatus.REVOKED in (part, platform):
        return TcbStatus.REVOKED
    if part is TcbStatus.OUT_OF_DATE:
        return _WORSE_BY_AGE.get(platform, platform)
    # Intel lists no other status for modules and quoting enclaves: the part's own, if anything.
    return part if platform is TcbStatus.UP_TO_DATE else platform


def _relaunch(
    now: bytes, tcb_info: TcbInfo, sgx: TcbStatus, status: TcbStatus, module: QeTcbLevel
) -> TcbStatus:
    """Whether the module was updated under the running TD, so that a new start would be enough.

    "TD relaunch advised" after Intel's quote verification library: only the module that the TD was
    started under is out of date, and the one that runs now (TEE_TCB_SVN_2) is the latest.
    """
    if status not in _AGED or module.status is not TcbStatus.OUT_OF_DATE or sgx in _AGED:
        return status
    latest = tcb_info.levels[0].tdx_components
    if not latest:
        # A rule about the TCB info refuses it.
        return status
    if now[1] == 0:
        least = latest[0]
    else:
        try:
            levels = _module(now[1], tcb_info).levels
        except TdxModuleMismatch:
            return status
        least = levels[0].isvsvn if levels else 256
    if now[0] < least or now[2] < latest[2]:
        return status
    if sgx in _CONFIGURATION or status in _CONFIGURATION:
        return TcbStatus.TD_RELAUNCH_ADVISED_CONFIGURATION_NEEDED
    return TcbStatus.TD_RELAUNCH_ADVISED
