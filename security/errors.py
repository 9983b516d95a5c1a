"""One hierarchy for everything that the security package refuses.

Every error has a stable `code` that logs, gRPC replies and tests compare; messages are for people
and say what was expected, what was found and what to do next. No message carries a key, a secret
or a byte of a prompt.
"""

from __future__ import annotations

from typing import ClassVar


class SecurityError(Exception):
    """Something that had to be proved was not.

    Attributes:
        code: stable identifier of the reason, snake_case.
    """

    code: ClassVar[str] = "security_error"


class MalformedInput(SecurityError):
    """Input from outside is longer, shorter or otherwise shaped than its format allows."""

    code = "malformed_input"


class FileUnusable(SecurityError):
    """A file or directory that an operator names is missing, too long, or leads elsewhere."""

    code = "file_unusable"


# -- signing ----------------------------------------------------------------------------------


class KeyFileError(SecurityError):
    """A key file is missing, readable by others, or not a key."""

    code = "key_file"


class SignatureInvalid(SecurityError):
    """A signature does not verify under the key that was expected."""

    code = "signature_invalid"


class WrongDocumentKind(SecurityError):
    """A signed document is of another kind than the one asked for."""

    code = "wrong_document_kind"


# -- manifest ---------------------------------------------------------------------------------


class ManifestError(SecurityError):
    """The base of everything that can be wrong with a model's files."""

    code = "manifest"


class ManifestMismatch(ManifestError):
    """Bytes of a file or tensor differ from what the signed manifest says."""

    code = "manifest_mismatch"

    def __init__(self, file: str, expected: str, found: str) -> None:
        super().__init__(
            f"{file}: expected {expected}, found {found}; restore the file that the owner signed "
            "or sign a new manifest"
        )
        self.file = file
        self.expected = expected
        self.found = found


class FileNotInManifest(ManifestError):
    """A file or tensor was asked for that the signed manifest does not list."""

    code = "file_not_in_manifest"


class UnsafeFile(ManifestError):
    """A model file is a link out of its directory, a device or another thing that is not read."""

    code = "unsafe_file"


class MalformedSafetensors(ManifestError):
    """A safetensors file breaks its format: header, offsets, shapes, names or types."""

    code = "malformed_safetensors"


class PickleOnlyCheckpoint(ManifestError):
    """The checkpoint has weights as pickles only, which are never opened."""

    code = "pickle_only_checkpoint"


class NoCheckpoint(ManifestError):
    """The directory holds no weights that can be served."""

    code = "no_checkpoint"


# -- sealing ----------------------------------------------------------------------------------


class SealingError(SecurityError):
    """The base of everything that can be wrong with a sealed checkpoint and its keys."""

    code = "sealing_error"


class SelectionInvalid(SealingError):
    """What is to be sealed is not written as it should be, or the model has no such part."""

    code = "selection_invalid"


class CannotSeal(SealingError):
    """Sealing this checkpoint would protect less than it says."""

    code = "cannot_seal"


class OutputExists(SealingError):
    """Something is already where the output would go."""

    code = "output_exists"


class SealingMalformed(SealingError):
    """The list of sealed tensors is not in its format."""

    code = "sealing_malformed"


class SealedTensorMismatch(SealingError):
    """A file stores a sealed tensor in another form than the list of sealed tensors says."""

    code = "sealed_tensor_mismatch"


class SealedChunkInvalid(SealingError):
    """A chunk was changed, moved, or belongs to another tensor, shape, dtype or model."""

    code = "sealed_chunk_invalid"


class UnsealKeyMissing(SealingError):
    """A sealed tensor was asked for whose key is not among the keys."""

    code = "unseal_key_missing"


class UnsealKeyMismatch(SealingError):
    """A key is of another unit or of another model."""

    code = "unseal_key_mismatch"


class SealedKeysMalformed(SealingError):
    """The file with the wrapped keys, or a list of keys, is not in its format."""

    code = "sealed_keys_malformed"


class SealedKeysForOtherModel(SealingError):
    """Wrapped keys belong to another sealing than the checkpoint's."""

    code = "sealed_keys_for_other_model"


class NotARecipient(SealingError):
    """Nothing in the file with the wrapped keys is for this private key."""

    code = "not_a_recipient"


class WrappedKeyInvalid(SealingError):
    """A wrapped key names this recipient and does not open with their private key."""

    code = "wrapped_key_invalid"


# -- evidence ---------------------------------------------------------------------------------


class AppraisalError(SecurityError):
    """The base of everything for which evidence is refused."""

    code = "evidence_refused"


class EvidenceKindRefused(AppraisalError):
    """Neither role nor policy accept this kind of evidence."""

    code = "evidence_kind_refused"


class EvidenceKindUnsupported(AppraisalError):
    """The kind has a name but this version has no verifier for it."""

    code = "evidence_kind_unsupported"


class EvidenceMalformed(AppraisalError):
    """The evidence does not parse."""

    code = "evidence_malformed"


class EvidenceSignatureInvalid(AppraisalError):
    """The evidence is not signed by the root or the node key that it names."""

    code = "evidence_signature_invalid"


class EvidenceNotBound(AppraisalError):
    """The evidence is genuine but over other data than the request states."""

    code = "evidence_not_bound"


class NodeNotEnrolled(AppraisalError):
    """The owner has not enrolled a node of this name."""

    code = "node_not_enrolled"


class EnrolmentExpired(AppraisalError):
    """The node's enrolment has run out."""

    code = "enrolment_expired"


class NoCollector(SecurityError):
    """This machine can produce none of the kinds of evidence that the role accepts."""

    code = "no_collector"


class CollectionError(SecurityError):
    """The base of everything that keeps this machine from making evidence."""

    code = "collection"


class TsmUnavailable(CollectionError):
    """The kernel has no configfs-tsm, no provider for it, or does not let us use it."""

    code = "tsm_unavailable"


class TsmProviderUnknown(CollectionError):
    """The kernel's provider makes reports that nothing here verifies."""

    code = "tsm_provider_unknown"


class TsmConflict(CollectionError):
    """Somebody else wrote to our report instance."""

    code = "tsm_conflict"


class TsmBusy(CollectionError):
    """The platform kept saying that it is busy.

    Attributes:
        cause: the kernel's last error.
    """

    code = "tsm_busy"

    def __init__(self, cause: OSError, found: str) -> None:
        super().__init__(f"{found} {cause.strerror}; try again later")
        self.cause = cause


class TsmReportTooLarge(CollectionError):
    """The report is longer than the kernel or we admit."""

    code = "tsm_report_too_large"


class TsmPrivilegeLevelRefused(CollectionError):
    """The privilege level (VMPL) is one that the kernel does not admit."""

    code = "tsm_privilege_level_refused"


class TsmServiceProviderRefused(CollectionError):
    """A report by a service provider (SVSM) was asked for; nothing here appraises those."""

    code = "tsm_service_provider_refused"


class TsmFailed(CollectionError):
    """The kernel failed in another way."""

    code = "tsm_failed"


class TpmUnavailable(CollectionError):
    """There is no TPM, or this user may not use it."""

    code = "tpm_unavailable"


class TpmFailed(CollectionError):
    """The TPM refused a command or answered something else."""

    code = "tpm_failed"


class MetadataServiceFailed(CollectionError):
    """Azure's instance metadata service did not answer as documented."""

    code = "metadata_service_failed"


# -- rosters ----------------------------------------------------------------------------------


class RosterError(SecurityError):
    """The base of everything for which a roster is refused."""

    code = "roster"


class RosterExpired(RosterError):
    """The roster's lifetime is over."""

    code = "roster_expired"


class RosterFromFuture(RosterError):
    """The roster was issued later than now by more than clocks may differ."""

    code = "roster_from_future"


class RosterForOtherInstance(RosterError):
    """The roster is of another pipeline instance."""

    code = "roster_other_instance"


class RosterForOtherCluster(RosterError):
    """The roster is of another cluster."""

    code = "roster_other_cluster"


class RosterForOtherTemplate(RosterError):
    """The roster was issued for another plan template."""

    code = "roster_other_template"


class RosterForOtherPolicy(RosterError):
    """The roster was issued under another policy."""

    code = "roster_other_policy"


class RosterForOtherManifest(RosterError):
    """The roster was issued for another model."""

    code = "roster_other_manifest"


class RosterOutOfDate(RosterError):
    """The roster is not newer than one that was seen before."""

    code = "roster_out_of_date"


class RosterMemberMismatch(RosterError):
    """The roster lacks a role, or lists another key for one's own role."""

    code = "roster_member_mismatch"


# -- broker: what it refuses -------------------------------------------------------------------


class BrokerRefusal(SecurityError):
    """The base of everything that the key broker refuses."""

    code = "refused"


class NothingInstalled(BrokerRefusal):
    """The owner has not installed a policy, template and manifest yet."""

    code = "nothing_installed"


class CertificateRefused(BrokerRefusal):
    """The broker certificate names another key than this broker's."""

    code = "certificate_refused"


class PolicyDigestMismatch(BrokerRefusal):
    """The template was made for another policy than the one installed with it."""

    code = "template_other_policy"


class ManifestDigestMismatch(BrokerRefusal):
    """The template was made for another model than the manifest installed with it."""

    code = "template_other_manifest"


class EnrolmentsForOtherTemplate(BrokerRefusal):
    """The enrolments were signed with another template, so they may be an older list."""

    code = "enrolments_other_template"


class TemplateRejected(BrokerRefusal):
    """The template breaks its policy."""

    code = "template_rejected"


class TemplateExpired(BrokerRefusal):
    """The template's lifetime is over; the owner signs a new one."""

    code = "template_expired"


class GenerationRollback(BrokerRefusal):
    """The template's generation is not above the newest one that this broker has seen."""

    code = "generation_rollback"


class RevocationRollback(BrokerRefusal):
    """The generation of the revocations is not above the newest one that this broker has seen."""

    code = "revocation_rollback"


class RevocationDropped(BrokerRefusal):
    """A newer list of revocations lacks some of the list before."""

    code = "revocation_dropped"


class NodeRevoked(BrokerRefusal):
    """The owner has revoked this node."""

    code = "node_revoked"


class ChipRevoked(BrokerRefusal):
    """The owner has revoked this machine's chip."""

    code = "chip_revoked"


class MeasurementRevoked(BrokerRefusal):
    """The owner has revoked what this machine runs."""

    code = "measurement_revoked"


class InstanceRevoked(BrokerRefusal):
    """The owner has revoked this pipeline instance."""

    code = "instance_revoked"


class TooManyNonces(BrokerRefusal):
    """Too many challenges are outstanding."""

    code = "too_many_challenges"


class NonceUnknown(BrokerRefusal):
    """The nonce was never issued by this broker, or long ago."""

    code = "nonce_unknown"


class NonceUsed(BrokerRefusal):
    """The nonce has been used before."""

    code = "nonce_used"


class NonceExpired(BrokerRefusal):
    """The nonce is older than its lifetime."""

    code = "nonce_expired"


class NonceForOtherRole(BrokerRefusal):
    """The nonce was issued for another role."""

    code = "nonce_other_role"


class NonceForOtherInstance(BrokerRefusal):
    """The nonce was issued for another instance."""

    code = "nonce_other_instance"


class UnknownRole(BrokerRefusal):
    """The template has no such role."""

    code = "unknown_role"


class RoleSwapped(BrokerRefusal):
    """The evidence is bound to another role than the one asked for."""

    code = "role_swapped"


class ShardKeySwapped(BrokerRefusal):
    """The evidence is bound to another shard key than the one to be admitted."""

    code = "shard_key_swapped"


class InstanceSwapped(BrokerRefusal):
    """The evidence is bound to another instance than the one asked for."""

    code = "instance_swapped"


class NonceSwapped(BrokerRefusal):
    """The evidence is bound to another nonce than the one presented."""

    code = "nonce_swapped"


class WrongCluster(BrokerRefusal):
    """The evidence is bound to another cluster."""

    code = "wrong_cluster"


class WrongBroker(BrokerRefusal):
    """The evidence is bound to another broker's key."""

    code = "wrong_broker"


class WrongPolicy(BrokerRefusal):
    """The shard works under another policy."""

    code = "wrong_policy"


class WrongManifest(BrokerRefusal):
    """The model files that the shard found are not those that the owner signed."""

    code = "wrong_manifest"


class GpuEvidenceUnexpected(BrokerRefusal):
    """GPU evidence is stated or sent although the policy demands none, or none was sent."""

    code = "gpu_evidence_unexpected"


class GpuEvidenceSwapped(BrokerRefusal):
    """The machine's evidence is bound to other GPU evidence than what was sent with it."""

    code = "gpu_evidence_swapped"


class PlanReplaced(BrokerRefusal):
    """The owner installed another plan while the evidence was being appraised."""

    code = "plan_replaced"


class CollateralUnusable(BrokerRefusal):
    """The collateral directory cannot be read as a whole, so nothing is judged by half of it."""

    code = "collateral_unusable"


class ClaimsRejected(BrokerRefusal):
    """The evidence is genuine, but what it proves is not what role and policy demand."""

    code = "claims_rejected"


class TooManyInstances(BrokerRefusal):
    """The template's number of pipeline instances is used up."""

    code = "too_many_instances"


class UnknownMember(BrokerRefusal):
    """The broker has no member in this role (revoked, or the instance retired or replaced)."""

    code = "unknown_member"


class NotTheMember(BrokerRefusal):
    """The caller is not, or no longer, the member in this role."""

    code = "not_the_member"


class TooManyWatchers(BrokerRefusal):
    """The broker has no more room for watch streams."""

    code = "too_many_watchers"


class NoRoster(BrokerRefusal):
    """The instance has no roster: not all of its shards are admitted and watching yet."""

    code = "no_roster"


# -- the broker's state and its audit log ------------------------------------------------------


class StateError(SecurityError):
    """The base of everything that keeps the broker's database from being used."""

    code = "state"


class StateMissing(StateError):
    """There is no database in the broker's home."""

    code = "state_missing"


class StateDamaged(StateError):
    """The database is not one, or parts of it cannot be read."""

    code = "state_damaged"


class StateOtherVersion(StateError):
    """The database was written by another version of the broker."""

    code = "state_other_version"


class StateInUse(StateError):
    """Another broker runs on this home."""

    code = "state_in_use"


class StateUnwritable(StateError):
    """A change could not be made durable, so it was not made."""

    code = "state_unwritable"


class StateRolledBack(StateError):
    """The database is older than what a witness has seen."""

    code = "state_rolled_back"


class AuditError(SecurityError):
    """The base of everything that can be wrong with an audit log."""

    code = "audit"


class AuditHeadForged(AuditError):
    """The head of the log is not signed by this broker's key."""

    code = "audit_head_forged"


class AuditEntryEdited(AuditError):
    """An entry differs from what the next one, or the head, says."""

    code = "audit_entry_edited"


class AuditEntryMissing(AuditError):
    """An entry between others is missing."""

    code = "audit_entry_missing"


class AuditTruncated(AuditError):
    """The newest entries are missing."""

    code = "audit_truncated"


class WitnessContradicted(AuditError):
    """The log and its witness tell two histories."""

    code = "witness_contradicted"


class WitnessUnusable(AuditError):
    """The witness cannot be read or holds no heads."""

    code = "witness_unusable"


# -- broker: what its client raises ------------------------------------------------------------


class AdmissionRefused(SecurityError):
    """The broker refused a request.

    Attributes:
        code: the code of the broker's own error, as in this module.
        reason: the broker's message.
    """

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(f"the key broker refused ({code}): {reason}")
        self.code = code  # type: ignore[misc]
        self.reason = reason


class BrokerUnreachable(SecurityError):
    """The broker did not answer in time."""

    code = "broker_unreachable"


class BrokerReplyInvalid(SecurityError):
    """The broker's answer does not hold together, or was not made by the owner's broker."""

    code = "broker_reply_invalid"


class MembershipLost(SecurityError):
    """This shard is no longer a member: its role was taken or a new plan installed."""

    code = "membership_lost"
