# mypy: ignore-errors
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class IdentityRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class IdentityReply(_message.Message):
    __slots__ = ("public_key", "certificate")
    PUBLIC_KEY_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    public_key: bytes
    certificate: bytes
    def __init__(self, public_key: _Optional[bytes] = ..., certificate: _Optional[bytes] = ...) -> None: ...

class InstallRequest(_message.Message):
    __slots__ = ("policy", "template", "manifest", "enrolments", "certificate")
    POLICY_FIELD_NUMBER: _ClassVar[int]
    TEMPLATE_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    ENROLMENTS_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    policy: bytes
    template: bytes
    manifest: bytes
    enrolments: bytes
    certificate: bytes
    def __init__(self, policy: _Optional[bytes] = ..., template: _Optional[bytes] = ..., manifest: _Optional[bytes] = ..., enrolments: _Optional[bytes] = ..., certificate: _Optional[bytes] = ...) -> None: ...

class InstallReply(_message.Message):
    __slots__ = ("generation",)
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    generation: int
    def __init__(self, generation: _Optional[int] = ...) -> None: ...

class RevokeRequest(_message.Message):
    __slots__ = ("document",)
    DOCUMENT_FIELD_NUMBER: _ClassVar[int]
    document: bytes
    def __init__(self, document: _Optional[bytes] = ...) -> None: ...

class RevokeReply(_message.Message):
    __slots__ = ("generation",)
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    generation: int
    def __init__(self, generation: _Optional[int] = ...) -> None: ...

class GetRevocationsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetRevocationsReply(_message.Message):
    __slots__ = ("document",)
    DOCUMENT_FIELD_NUMBER: _ClassVar[int]
    document: bytes
    def __init__(self, document: _Optional[bytes] = ...) -> None: ...

class ChallengeRequest(_message.Message):
    __slots__ = ("instance", "role")
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    instance: str
    role: str
    def __init__(self, instance: _Optional[str] = ..., role: _Optional[str] = ...) -> None: ...

class ChallengeReply(_message.Message):
    __slots__ = ("nonce", "policy", "template", "manifest", "certificate")
    NONCE_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    TEMPLATE_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    nonce: bytes
    policy: bytes
    template: bytes
    manifest: bytes
    certificate: bytes
    def __init__(self, nonce: _Optional[bytes] = ..., policy: _Optional[bytes] = ..., template: _Optional[bytes] = ..., manifest: _Optional[bytes] = ..., certificate: _Optional[bytes] = ...) -> None: ...

class StatedBinding(_message.Message):
    __slots__ = ("nonce", "shard_key", "role", "cluster", "instance", "broker_key", "policy_digest", "manifest_digest", "gpu_evidence_digest")
    NONCE_FIELD_NUMBER: _ClassVar[int]
    SHARD_KEY_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    CLUSTER_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    BROKER_KEY_FIELD_NUMBER: _ClassVar[int]
    POLICY_DIGEST_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_DIGEST_FIELD_NUMBER: _ClassVar[int]
    GPU_EVIDENCE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    nonce: bytes
    shard_key: bytes
    role: str
    cluster: str
    instance: str
    broker_key: bytes
    policy_digest: str
    manifest_digest: str
    gpu_evidence_digest: str
    def __init__(self, nonce: _Optional[bytes] = ..., shard_key: _Optional[bytes] = ..., role: _Optional[str] = ..., cluster: _Optional[str] = ..., instance: _Optional[str] = ..., broker_key: _Optional[bytes] = ..., policy_digest: _Optional[str] = ..., manifest_digest: _Optional[str] = ..., gpu_evidence_digest: _Optional[str] = ...) -> None: ...

class AdmitRequest(_message.Message):
    __slots__ = ("nonce", "instance", "role", "shard_key", "link_address", "ingress_address", "binding", "evidence_kind", "evidence", "notes", "device_evidence", "region")
    NONCE_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    SHARD_KEY_FIELD_NUMBER: _ClassVar[int]
    LINK_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    INGRESS_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    BINDING_FIELD_NUMBER: _ClassVar[int]
    EVIDENCE_KIND_FIELD_NUMBER: _ClassVar[int]
    EVIDENCE_FIELD_NUMBER: _ClassVar[int]
    NOTES_FIELD_NUMBER: _ClassVar[int]
    DEVICE_EVIDENCE_FIELD_NUMBER: _ClassVar[int]
    REGION_FIELD_NUMBER: _ClassVar[int]
    nonce: bytes
    instance: str
    role: str
    shard_key: bytes
    link_address: str
    ingress_address: str
    binding: StatedBinding
    evidence_kind: str
    evidence: bytes
    notes: _containers.RepeatedScalarFieldContainer[str]
    device_evidence: bytes
    region: str
    def __init__(self, nonce: _Optional[bytes] = ..., instance: _Optional[str] = ..., role: _Optional[str] = ..., shard_key: _Optional[bytes] = ..., link_address: _Optional[str] = ..., ingress_address: _Optional[str] = ..., binding: _Optional[_Union[StatedBinding, _Mapping]] = ..., evidence_kind: _Optional[str] = ..., evidence: _Optional[bytes] = ..., notes: _Optional[_Iterable[str]] = ..., device_evidence: _Optional[bytes] = ..., region: _Optional[str] = ...) -> None: ...

class AdmitReply(_message.Message):
    __slots__ = ("sealed_secret",)
    SEALED_SECRET_FIELD_NUMBER: _ClassVar[int]
    sealed_secret: bytes
    def __init__(self, sealed_secret: _Optional[bytes] = ...) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ("instance", "role", "known_epoch", "mac")
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    KNOWN_EPOCH_FIELD_NUMBER: _ClassVar[int]
    MAC_FIELD_NUMBER: _ClassVar[int]
    instance: str
    role: str
    known_epoch: bytes
    mac: bytes
    def __init__(self, instance: _Optional[str] = ..., role: _Optional[str] = ..., known_epoch: _Optional[bytes] = ..., mac: _Optional[bytes] = ...) -> None: ...

class WatchReply(_message.Message):
    __slots__ = ("roster", "ended_epoch")
    ROSTER_FIELD_NUMBER: _ClassVar[int]
    ENDED_EPOCH_FIELD_NUMBER: _ClassVar[int]
    roster: bytes
    ended_epoch: bytes
    def __init__(self, roster: _Optional[bytes] = ..., ended_epoch: _Optional[bytes] = ...) -> None: ...

class RenewEpochRequest(_message.Message):
    __slots__ = ("instance", "role", "broken_epoch", "mac")
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    BROKEN_EPOCH_FIELD_NUMBER: _ClassVar[int]
    MAC_FIELD_NUMBER: _ClassVar[int]
    instance: str
    role: str
    broken_epoch: bytes
    mac: bytes
    def __init__(self, instance: _Optional[str] = ..., role: _Optional[str] = ..., broken_epoch: _Optional[bytes] = ..., mac: _Optional[bytes] = ...) -> None: ...

class RenewEpochReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ReportRequest(_message.Message):
    __slots__ = ("instance", "role", "text", "mac")
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    MAC_FIELD_NUMBER: _ClassVar[int]
    instance: str
    role: str
    text: str
    mac: bytes
    def __init__(self, instance: _Optional[str] = ..., role: _Optional[str] = ..., text: _Optional[str] = ..., mac: _Optional[bytes] = ...) -> None: ...

class ReportReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetRosterRequest(_message.Message):
    __slots__ = ("instance",)
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    instance: str
    def __init__(self, instance: _Optional[str] = ...) -> None: ...

class GetRosterReply(_message.Message):
    __slots__ = ("roster", "template", "policy", "certificate")
    ROSTER_FIELD_NUMBER: _ClassVar[int]
    TEMPLATE_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    roster: bytes
    template: bytes
    policy: bytes
    certificate: bytes
    def __init__(self, roster: _Optional[bytes] = ..., template: _Optional[bytes] = ..., policy: _Optional[bytes] = ..., certificate: _Optional[bytes] = ...) -> None: ...

class RetireRequest(_message.Message):
    __slots__ = ("instance",)
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    instance: str
    def __init__(self, instance: _Optional[str] = ...) -> None: ...

class RetireReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
