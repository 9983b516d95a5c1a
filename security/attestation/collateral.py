"""Collateral: what verifiers need besides the evidence, all of it signed by the vendors.

It is public and proves nothing by itself: each verifier checks the signatures and the dates of what
it uses. An operator keeps it in a directory, which the broker reads anew when it changes.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Collateral"]


@dataclass(frozen=True, slots=True)
class Collateral:
    """Vendor documents, parsed by nobody yet.

    Attributes:
        certificates: X.509 certificates in DER: ASK, ASVK, ARK, VCEK, VLEK, device and RIM roots.
        crls: certificate revocation lists in DER.
        tdx: TDX quote collateral, each a JSON document of dcap-qvl's QuoteCollateralV3.
        rims: NVIDIA reference integrity manifests: (name for messages, XML).
        jwks: JSON Web Key Sets that verify NRAS tokens.
    """

    certificates: tuple[bytes, ...] = ()
    crls: tuple[bytes, ...] = ()
    tdx: tuple[bytes, ...] = ()
    rims: tuple[tuple[str, bytes], ...] = ()
    jwks: tuple[bytes, ...] = ()

    def with_more(self, other: Collateral) -> Collateral:
        """Both, this one's documents first."""
        return Collateral(
            self.certificates + other.certificates,
            self.crls + other.crls,
            self.tdx + other.tdx,
            self.rims + other.rims,
            self.jwks + other.jwks,
        )
