"""What the owner has installed at a broker, opened and checked."""

from __future__ import annotations

from dataclasses import dataclass

from placement.plan import PlanTemplate, RoleTemplate
from placement.policy import Policy
from placement.verify import PlanRejected, verify_template
from security.attestation.enrolled import Enrolments
from security.broker.documents import (
    Installation,
    OwnedDocuments,
    open_enrolments,
    open_installation,
)
from security.errors import CertificateRefused, TemplateExpired, TemplateRejected, UnknownRole


@dataclass(frozen=True, slots=True)
class Installed:
    """The signed documents with what they say."""

    installation: Installation
    documents: OwnedDocuments
    enrolments: Enrolments

    @classmethod
    def open(
        cls, installation: Installation, owner_public: bytes, broker_public: bytes
    ) -> Installed:
        """Checks every signature, that the documents belong together, and the template itself.

        Raises:
            MalformedInput, WrongDocumentKind, SignatureInvalid, PolicyDigestMismatch,
            ManifestDigestMismatch, EnrolmentsForOtherTemplate, CertificateRefused,
            TemplateRejected
        """
        documents = open_installation(installation, owner_public)
        enrolments = open_enrolments(
            installation.enrolments, owner_public, documents.template_digest
        )
        if documents.broker_key != broker_public:
            raise CertificateRefused(
                f"certificate: expected this broker's key {broker_public.hex()[:16]}..., found "
                f"{documents.broker_key.hex()[:16]}...; sign the key in broker.pub"
            )
        try:
            verify_template(documents.template, documents.policy, documents.policy_digest)
        except PlanRejected as error:
            raise TemplateRejected(f"template: {error}") from None
        return cls(installation, documents, enrolments)

    @property
    def policy(self) -> Policy:
        """The owner's policy."""
        return self.documents.policy

    @property
    def template(self) -> PlanTemplate:
        """The owner's plan template."""
        return self.documents.template

    def require_unexpired(self, now: float) -> None:
        """Refuses a template whose time is over; raises TemplateExpired."""
        if now >= self.template.expires_at:
            raise TemplateExpired(
                f"template: expected one valid now, found one that expired at "
                f"{self.template.expires_at}; the owner must sign and install a new one"
            )

    def role(self, name: str) -> RoleTemplate:
        """A role of the template; raises UnknownRole."""
        found = next((role for role in self.template.roles if role.name == name), None)
        if found is None:
            raise UnknownRole(
                f"role: expected one of {', '.join(role.name for role in self.template.roles)}, "
                f"found {name[:64]!r}"
            )
        return found
