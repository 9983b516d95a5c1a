"""Rules on TD quotes that need collateral, and on the collateral itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from security.attestation.dcap import ask_dcap_qvl
from security.attestation.errors import (
    FmspcMismatch,
    IntelCrlExpired,
    IntelCrlSignatureInvalid,
    PckCaRevoked,
    PckRevoked,
    QeIdentityExpired,
    QeIdentityFromFuture,
    QeIdentityMismatch,
    QeIdentitySignatureInvalid,
    Refusal,
    SecondOpinionRefused,
    TcbInfoExpired,
    TcbInfoFromFuture,
    TcbInfoMismatch,
    TcbInfoSignatureInvalid,
    TcbLevelUnmatched,
    TcbRevoked,
    TdxCollateralChainInvalid,
    TdxCollateralMissing,
    TdxCollateralSignerRevoked,
    TdxModuleMismatch,
)
from security.attestation.intel_pki import (
    ROOT_NAME,
    TCB_SIGNING_NAME,
    Certificate,
    RevocationList,
    chain_fault,
)
from security.attestation.tdx_collateral import TcbStatus, TdxCollateral
from security.attestation.tdx_subject import TdxRule, TdxSubject, shown_roots
from security.attestation.tdx_tcb import match_module, match_qe_identity, match_tcb_level

__all__ = ["COLLATERAL_RULES", "MISSING_COLLATERAL_RULE", "SECOND_OPINION_RULE"]

_PCK = "Intel SGX PCK Certificate and Certificate Revocation List Profile Specification"
_PCS = "Intel PCS API specification v4"

_SIGNING_CHAIN = ((TCB_SIGNING_NAME,), (ROOT_NAME,))
_STALE = "fetch the collateral anew"


def _missing_collateral(subject: TdxSubject) -> None:
    fmspc = subject.pck.fmspc.hex()
    if subject.collateral_fmspcs:
        raise FmspcMismatch(
            "FMSPC of the collateral",
            fmspc,
            ", ".join(sorted(set(subject.collateral_fmspcs))[:8]),
            "fetch collateral for this platform",
        )
    raise TdxCollateralMissing(
        "TDX collateral", f"a document for FMSPC {fmspc}", "none", "fetch it from Intel or a PCCS"
    )


MISSING_COLLATERAL_RULE = TdxRule(
    "tdx.collateral",
    f"{_PCS}, Get TCB Info",
    _missing_collateral,
    (TdxCollateralMissing, FmspcMismatch),
)
"""Asked where no document fits the platform; it always fails."""


@dataclass(frozen=True, slots=True)
class _SignedDocument:
    """What TCB info and QE identity have in common.

    Attributes:
        what: its name in messages.
        part: its name in rules.
        section: of the PCS API specification.
        chain: leaf and root that sign it.
        signed: whether the leaf's key signed it.
        dates: issueDate and nextUpdate, Unix seconds.
        invalid, expired, from_future: the errors for it.
    """

    what: str
    part: str
    section: str
    chain: Callable[[TdxCollateral], tuple[Certificate, ...]]
    signed: Callable[[TdxCollateral], bool]
    dates: Callable[[TdxCollateral], tuple[int, int]]
    invalid: type[Refusal]
    expired: type[Refusal]
    from_future: type[Refusal]

    def check_chain(self, subject: TdxSubject) -> None:
        """The chain is Intel's for this purpose, and valid now."""
        chain = self.chain(subject.needed_collateral)
        fault = chain_fault(chain, _SIGNING_CHAIN)
        if fault is None and chain[-1].fingerprint not in subject.roots:
            fault = f"root {chain[-1].fingerprint[:16]}..."
        for certificate in chain if fault is None else ():
            if not certificate.valid_at(subject.now):
                fault = (
                    f"{certificate.name} valid from {certificate.not_before} to "
                    f"{certificate.not_after}"
                )
        if fault is not None:
            raise TdxCollateralChainInvalid(
                f"issuer chain of {self.what}",
                f"{TCB_SIGNING_NAME}, {ROOT_NAME} ({shown_roots(subject.roots)}), valid at "
                f"{subject.now}",
                fault,
            )

    def check_signer(self, subject: TdxSubject) -> None:
        """The root revokes nobody in the chain."""
        for certificate in self.chain(subject.needed_collateral):
            if subject.needed_collateral.root_ca_crl.revokes(certificate):
                raise TdxCollateralSignerRevoked(
                    f"signer of {self.what}", "one that is not revoked", certificate.serial
                )

    def check_signature(self, subject: TdxSubject) -> None:
        """The chain signed it."""
        if not self.signed(subject.needed_collateral):
            raise self.invalid(self.what, "a signature by its issuer chain", "another")

    def check_dates(self, subject: TdxSubject) -> None:
        """It counts now."""
        issued, next_update = self.dates(subject.needed_collateral)
        if subject.now < issued:
            raise self.from_future(f"{self.what} issueDate", f"at most {subject.now}", str(issued))
        if subject.now > next_update:
            raise self.expired(
                f"{self.what} nextUpdate", f"at least {subject.now}", str(next_update), _STALE
            )

    def rules(self) -> tuple[TdxRule, ...]:
        """The four rules, named after the document."""
        return (
            TdxRule(
                f"tdx.{self.part}.chain",
                f"{_PCS}, {self.section}, Issuer-Chain header; RFC 5280, 6.1",
                self.check_chain,
                (TdxCollateralChainInvalid,),
            ),
            TdxRule(
                f"tdx.{self.part}.signer",
                f"{_PCK}, Root CA CRL",
                self.check_signer,
                (TdxCollateralSignerRevoked,),
            ),
            TdxRule(
                f"tdx.{self.part}.signature",
                f"{_PCS}, {self.section}, signature",
                self.check_signature,
                (self.invalid,),
            ),
            TdxRule(
                f"tdx.{self.part}.dates",
                f"{_PCS}, {self.section}, issueDate and nextUpdate",
                self.check_dates,
                (self.expired, self.from_future),
            ),
        )


_TCB_INFO = _SignedDocument(
    what="TCB info",
    part="tcb_info",
    section="Get TCB Info",
    chain=lambda collateral: collateral.tcb_info_chain,
    signed=lambda collateral: collateral.tcb_info_signed,
    dates=lambda collateral: (collateral.tcb_info.issue_date, collateral.tcb_info.next_update),
    invalid=TcbInfoSignatureInvalid,
    expired=TcbInfoExpired,
    from_future=TcbInfoFromFuture,
)
_QE_IDENTITY = _SignedDocument(
    what="QE identity",
    part="qe_identity",
    section="Get TD Quoting Enclave Identity",
    chain=lambda collateral: collateral.qe_identity_chain,
    signed=lambda collateral: collateral.qe_identity_signed,
    dates=lambda collateral: (
        collateral.qe_identity.issue_date,
        collateral.qe_identity.next_update,
    ),
    invalid=QeIdentitySignatureInvalid,
    expired=QeIdentityExpired,
    from_future=QeIdentityFromFuture,
)


def _tcb_info_target(subject: TdxSubject) -> None:
    info = subject.needed_collateral.tcb_info
    for what, wanted, found in (
        ("TCB info id", "TDX", info.id),
        ("TCB info version", "3", str(info.version)),
        ("TCB info pceId", subject.pck.pceid.hex(), info.pceid.hex()),
        ("TCB info fmspc", subject.pck.fmspc.hex(), info.fmspc.hex()),
    ):
        if wanted != found:
            raise TcbInfoMismatch(what, wanted, found)
    bare = sum(not level.tdx_components for level in info.levels)
    if bare:
        raise TcbInfoMismatch("tdxtcbcomponents", "some in each TCB level", f"{bare} without")


def _qe_identity(subject: TdxSubject) -> None:
    identity = subject.needed_collateral.qe_identity
    if (identity.id, identity.version) != ("TD_QE", 2):
        raise QeIdentityMismatch(
            "QE identity", "id TD_QE, version 2", f"id {identity.id}, version {identity.version}"
        )
    match_qe_identity(subject.quote.qe_report, identity)


def _crl_signature(crl: RevocationList, issuers: tuple[Certificate, ...], what: str) -> None:
    for issuer in issuers:
        if not crl.signed_by(issuer):
            raise IntelCrlSignatureInvalid(
                f"{what} revocation list", f"one signed by {issuer.name[:64]!r}", "another"
            )


def _crl_dates(crl: RevocationList, now: int, what: str) -> None:
    if now > crl.next_update:
        raise IntelCrlExpired(
            f"nextUpdate of the {what} revocation list",
            f"at least {now}",
            str(crl.next_update),
            _STALE,
        )


def _root_crl_signature(subject: TdxSubject) -> None:
    collateral = subject.needed_collateral
    issuers = (subject.chain[-1], collateral.tcb_info_chain[-1], collateral.qe_identity_chain[-1])
    _crl_signature(collateral.root_ca_crl, issuers, "root CA")


def _root_crl_dates(subject: TdxSubject) -> None:
    _crl_dates(subject.needed_collateral.root_ca_crl, subject.now, "root CA")


def _pck_crl_signature(subject: TdxSubject) -> None:
    # The issuer is the CA in the quote's own chain, not the one that came with the list: a list of
    # the other PCK CA says nothing about this certificate.
    _crl_signature(subject.needed_collateral.pck_crl, subject.chain[1:2], "PCK")


def _pck_crl_dates(subject: TdxSubject) -> None:
    _crl_dates(subject.needed_collateral.pck_crl, subject.now, "PCK")


def _pck_revoked(subject: TdxSubject) -> None:
    leaf = subject.chain[0]
    if subject.needed_collateral.pck_crl.revokes(leaf):
        raise PckRevoked("PCK certificate", "one that is not revoked", leaf.serial)


def _pck_ca_revoked(subject: TdxSubject) -> None:
    for certificate in subject.chain[1:]:
        if subject.needed_collateral.root_ca_crl.revokes(certificate):
            raise PckCaRevoked(
                certificate.name, "a certificate that is not revoked", certificate.serial
            )


def _tcb_level(subject: TdxSubject) -> None:
    info = subject.needed_collateral.tcb_info
    match_tcb_level(subject.quote.body.tee_tcb_svn, subject.pck, info)


def _module(subject: TdxSubject) -> None:
    match_module(subject.quote.body, subject.needed_collateral.tcb_info)


def _tcb_revoked(subject: TdxSubject) -> None:
    if subject.evaluation is not None and subject.evaluation.status is TcbStatus.REVOKED:
        raise TcbRevoked("TCB status", "one that is not revoked", "Revoked")


COLLATERAL_RULES: tuple[TdxRule, ...] = (
    *_TCB_INFO.rules(),
    TdxRule(
        "tdx.tcb_info.target",
        f"{_PCS}, Get TCB Info, id, version, fmspc, pceId, tdxtcbcomponents",
        _tcb_info_target,
        (TcbInfoMismatch,),
    ),
    *_QE_IDENTITY.rules(),
    TdxRule(
        "tdx.qe_identity",
        f"{_PCS}, Get TD Quoting Enclave Identity, enclaveIdentity",
        _qe_identity,
        (QeIdentityMismatch,),
    ),
    TdxRule(
        "tdx.root_ca_crl.signature",
        f"{_PCK}, Root CA CRL; RFC 5280, 6.3.3",
        _root_crl_signature,
        (IntelCrlSignatureInvalid,),
    ),
    TdxRule(
        "tdx.root_ca_crl.dates",
        "RFC 5280, 5.1.2.5, Next Update",
        _root_crl_dates,
        (IntelCrlExpired,),
    ),
    TdxRule(
        "tdx.pck_crl.signature",
        f"{_PCK}, PCK CRL; RFC 5280, 6.3.3",
        _pck_crl_signature,
        (IntelCrlSignatureInvalid,),
    ),
    TdxRule(
        "tdx.pck_crl.dates", "RFC 5280, 5.1.2.5, Next Update", _pck_crl_dates, (IntelCrlExpired,)
    ),
    TdxRule("tdx.pck_revoked", f"{_PCK}, PCK CRL", _pck_revoked, (PckRevoked,)),
    TdxRule("tdx.pck_ca_revoked", f"{_PCK}, Root CA CRL", _pck_ca_revoked, (PckCaRevoked,)),
    TdxRule("tdx.tcb_level", f"{_PCS}, Get TCB Info, tcbLevels", _tcb_level, (TcbLevelUnmatched,)),
    TdxRule(
        "tdx.tdx_module",
        f"{_PCS}, Get TCB Info, tdxModule and tdxModuleIdentities",
        _module,
        (TdxModuleMismatch,),
    ),
    TdxRule("tdx.tcb_revoked", f"{_PCS}, Get TCB Info, tcbStatus", _tcb_revoked, (TcbRevoked,)),
)
"""Asked where a document fits the platform."""


_ACCEPTED_REFUSALS = {
    "SEPT_VE_DISABLE is not enabled": "sept_ve_disable",
    "Invalid MR service TD": "mrservicetd",
}
"""What dcap-qvl refuses by itself although a policy may allow it, and what the policy calls it."""


def _tolerated(subject: TdxSubject, refusal: str) -> bool:
    """Whether the policy allows the very thing that dcap-qvl refuses."""
    name = _ACCEPTED_REFUSALS.get(refusal)
    if name is None or subject.expected is None:
        return False
    requirements = subject.expected.requirements
    return requirements.opens(name) or name in requirements.pins


def _second_opinion(subject: TdxSubject) -> None:
    opinion = ask_dcap_qvl(
        subject.quote.octets, subject.needed_collateral, subject.chain[-1].der, subject.now
    )
    ours = "" if subject.evaluation is None else subject.evaluation.status.value
    if opinion.refusal:
        # What a policy may allow stands last in dcap-qvl, after every signature, date and level.
        # The status goes unsaid then, so only the one that needs no second opinion passes.
        if not _tolerated(subject, opinion.refusal):
            raise SecondOpinionRefused("dcap-qvl", f"acceptance with {ours}", opinion.refusal)
        if ours != TcbStatus.UP_TO_DATE:
            raise SecondOpinionRefused(
                "TCB status by dcap-qvl", ours, f"none, as it refuses: {opinion.refusal}"
            )
        return
    if opinion.status != ours:
        raise SecondOpinionRefused("TCB status by dcap-qvl", ours, opinion.status)


SECOND_OPINION_RULE = TdxRule(
    "tdx.dcap_qvl", "dcap-qvl, verify_with_root_ca", _second_opinion, (SecondOpinionRefused,)
)
"""Asked where no rule on the quote or the collateral failed."""
