"""A second opinion on TD quotes by another implementation: dcap-qvl, written in Rust.

Our own verifier judges everything by itself and names what fails. Where it finds nothing wrong,
dcap-qvl is asked, too, and both have to agree: a mistake in either refuses instead of admitting.
It is handed only the quote's bounded bytes, and collateral without a PCK chain of its own, because
it would prefer that one to the quote's.
"""

from __future__ import annotations

from dataclasses import dataclass

import dcap_qvl

from security.attestation.tdx_collateral import TdxCollateral

__all__ = ["SecondOpinion", "ask_dcap_qvl"]

_PREFIX = "Verification failed: "


@dataclass(frozen=True, slots=True)
class SecondOpinion:
    """What dcap-qvl says.

    Attributes:
        status: its TCB status; "" where it refuses.
        refusal: why it refuses; "" where it does not.
    """

    status: str
    refusal: str


def ask_dcap_qvl(quote: bytes, collateral: TdxCollateral, root: bytes, now: int) -> SecondOpinion:
    """Lets dcap-qvl verify a quote.

    Args:
        quote: the quote without trailing bytes.
        collateral: the collateral that our own verifier used.
        root: the root certificate in DER that our own verifier trusts.
        now: Unix time in seconds.
    """
    members = collateral.members
    try:
        report = dcap_qvl.verify_with_root_ca(
            quote,
            dcap_qvl.QuoteCollateralV3(
                pck_crl_issuer_chain=members["pck_crl_issuer_chain"],
                root_ca_crl=bytes.fromhex(members["root_ca_crl"]),
                pck_crl=bytes.fromhex(members["pck_crl"]),
                tcb_info_issuer_chain=members["tcb_info_issuer_chain"],
                tcb_info=members["tcb_info"],
                tcb_info_signature=bytes.fromhex(members["tcb_info_signature"]),
                qe_identity_issuer_chain=members["qe_identity_issuer_chain"],
                qe_identity=members["qe_identity"],
                qe_identity_signature=bytes.fromhex(members["qe_identity_signature"]),
            ),
            root,
            now,
        )
        return SecondOpinion(str(report.status), "")
    except (ValueError, TypeError, OverflowError) as error:
        return SecondOpinion("", str(error).removeprefix(_PREFIX)[:200] or "no reason given")
    except BaseException as error:
        # A panic in Rust arrives as an exception outside of `Exception`, in a module that cannot be
        # imported; everything else goes on.
        if type(error).__name__ != "PanicException":
            raise
        return SecondOpinion("", "dcap-qvl panicked")
