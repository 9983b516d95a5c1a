"""What the owner signs and installs: policy, plan template, manifest, enrolments, certificate.

Broker and shards open the same bundle with the same checks; they differ only in what they do next.
"""

from __future__ import annotations

from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from placement.document import DocumentError, Fields, decode, digest, encode
from placement.plan import PlanTemplate
from placement.policy import Policy
from security.attestation.enrolled import Enrolments
from security.errors import MalformedInput, ManifestDigestMismatch, PolicyDigestMismatch
from security.manifest import Manifest
from security.signing import SignedDocument, open_signed, sign

_CERTIFICATE_FORMAT = "bulkhead-broker-1"
_MAX_CERTIFICATE_BYTES = 1024


@dataclass(frozen=True, slots=True)
class Installation:
    """The signed documents, as bytes of `SignedDocument`; not checked yet.

    Attributes:
        policy, template, manifest: documents of these kinds.
        enrolments: document of kind "enrolment"; empty if no node is enrolled.
        certificate: document of kind "broker".
    """

    policy: bytes
    template: bytes
    manifest: bytes
    enrolments: bytes
    certificate: bytes


@dataclass(frozen=True, slots=True)
class OwnedDocuments:
    """The documents after their signatures and their digests of each other have been checked."""

    policy: Policy
    policy_digest: str
    template: PlanTemplate
    template_digest: str
    manifest: Manifest
    manifest_digest: str
    broker_key: bytes


def sign_certificate(owner_key: Ed25519PrivateKey, broker_public: bytes) -> SignedDocument:
    """The owner's word that a key (32 bytes) is their broker's."""
    payload = encode({"format": _CERTIFICATE_FORMAT, "broker_key": broker_public.hex()})
    return sign("broker", payload, owner_key)


def open_certificate(document: bytes, owner_public: bytes) -> bytes:
    """Checks a broker certificate and returns the broker's public key (32 bytes).

    Raises:
        MalformedInput, WrongDocumentKind, SignatureInvalid
    """
    payload = open_signed("broker", document, owner_public)
    try:
        reader = Fields.of(decode(payload, _MAX_CERTIFICATE_BYTES), "certificate")
        reader.text("format", 32, _CERTIFICATE_FORMAT)
        key = reader.octets("broker_key", 32)
        reader.finish()
    except DocumentError as error:
        raise MalformedInput(str(error)) from None
    return key


def sign_installation(
    owner_key: Ed25519PrivateKey,
    broker_public: bytes,
    *,
    policy: Policy,
    template: PlanTemplate,
    manifest: Manifest,
    enrolments: Enrolments | None = None,
) -> Installation:
    """Signs everything that a broker needs; run where the owner's key is.

    Args:
        owner_key: the owner's key.
        broker_public: the broker's public key (32 bytes), read where the broker runs, not over a
            network that could lie about it.
        policy: the policy; `template.policy_digest` must be its digest.
        template: the plan template.
        manifest: the model's manifest; `template.manifest_digest` must be its digest.
        enrolments: enrolled nodes, if any.
    """
    return Installation(
        policy=sign("policy", policy.to_bytes(), owner_key).to_bytes(),
        template=sign("template", template.to_bytes(), owner_key).to_bytes(),
        manifest=sign("manifest", manifest.to_bytes(), owner_key).to_bytes(),
        enrolments=(
            sign("enrolment", enrolments.to_bytes(template.digest), owner_key).to_bytes()
            if enrolments
            else b""
        ),
        certificate=sign_certificate(owner_key, broker_public).to_bytes(),
    )


def open_plan(
    policy: bytes, template: bytes, certificate: bytes, owner_public: bytes
) -> tuple[Policy, str, PlanTemplate, str, bytes]:
    """Checks policy, template and certificate.

    Returns:
        policy, its digest (hex), template, its digest (hex), and the broker's public key.

    Raises:
        MalformedInput, WrongDocumentKind, SignatureInvalid: not the owner's documents.
        PolicyDigestMismatch: the template was made for another policy.
    """
    policy_payload = open_signed("policy", policy, owner_public)
    template_payload = open_signed("template", template, owner_public)
    broker_key = open_certificate(certificate, owner_public)
    try:
        opened_policy = Policy.from_bytes(policy_payload)
        opened_template = PlanTemplate.from_bytes(template_payload)
    except DocumentError as error:
        raise MalformedInput(str(error)) from None
    policy_digest = digest(policy_payload)
    if opened_template.policy_digest != policy_digest:
        raise PolicyDigestMismatch(
            f"template: expected policy {policy_digest}, found {opened_template.policy_digest}; "
            "plan again with this policy"
        )
    return opened_policy, policy_digest, opened_template, digest(template_payload), broker_key


def open_installation(installation: Installation, owner_public: bytes) -> OwnedDocuments:
    """Checks all signatures and that the documents belong together; enrolments apart.

    Raises:
        MalformedInput, WrongDocumentKind, SignatureInvalid: not the owner's documents.
        PolicyDigestMismatch, ManifestDigestMismatch: made for each other they are not.
    """
    policy, policy_digest, template, template_digest, broker_key = open_plan(
        installation.policy, installation.template, installation.certificate, owner_public
    )
    manifest_payload = open_signed("manifest", installation.manifest, owner_public)
    manifest_digest = digest(manifest_payload)
    if template.manifest_digest != manifest_digest:
        raise ManifestDigestMismatch(
            f"template: expected manifest {manifest_digest}, found {template.manifest_digest}; "
            "plan again with this manifest"
        )
    return OwnedDocuments(
        policy=policy,
        policy_digest=policy_digest,
        template=template,
        template_digest=template_digest,
        manifest=Manifest.from_bytes(manifest_payload),
        manifest_digest=manifest_digest,
        broker_key=broker_key,
    )


def open_enrolments(document: bytes, owner_public: bytes, template_digest: str) -> Enrolments:
    """Checks the enrolments that were signed with a template; none signed means none enrolled.

    Raises:
        MalformedInput, WrongDocumentKind, SignatureInvalid, EnrolmentsForOtherTemplate
    """
    if not document:
        return Enrolments()
    payload = open_signed("enrolment", document, owner_public)
    return Enrolments.from_bytes(payload, template_digest)
