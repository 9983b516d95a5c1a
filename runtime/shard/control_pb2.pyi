# mypy: ignore-errors
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ShardState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SHARD_STATE_UNSPECIFIED: _ClassVar[ShardState]
    SHARD_STATE_IDLE: _ClassVar[ShardState]
    SHARD_STATE_PROVING: _ClassVar[ShardState]
    SHARD_STATE_LOADING: _ClassVar[ShardState]
    SHARD_STATE_WAITING: _ClassVar[ShardState]
    SHARD_STATE_SERVING: _ClassVar[ShardState]
    SHARD_STATE_FAILED: _ClassVar[ShardState]
SHARD_STATE_UNSPECIFIED: ShardState
SHARD_STATE_IDLE: ShardState
SHARD_STATE_PROVING: ShardState
SHARD_STATE_LOADING: ShardState
SHARD_STATE_WAITING: ShardState
SHARD_STATE_SERVING: ShardState
SHARD_STATE_FAILED: ShardState

class StartRequest(_message.Message):
    __slots__ = ("instance", "role", "node", "model_directory", "broker_address", "owner_public", "listen_host", "advertise_host", "threads", "node_key_path", "region")
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    MODEL_DIRECTORY_FIELD_NUMBER: _ClassVar[int]
    BROKER_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    OWNER_PUBLIC_FIELD_NUMBER: _ClassVar[int]
    LISTEN_HOST_FIELD_NUMBER: _ClassVar[int]
    ADVERTISE_HOST_FIELD_NUMBER: _ClassVar[int]
    THREADS_FIELD_NUMBER: _ClassVar[int]
    NODE_KEY_PATH_FIELD_NUMBER: _ClassVar[int]
    REGION_FIELD_NUMBER: _ClassVar[int]
    instance: str
    role: str
    node: str
    model_directory: str
    broker_address: str
    owner_public: bytes
    listen_host: str
    advertise_host: str
    threads: int
    node_key_path: str
    region: str
    def __init__(self, instance: _Optional[str] = ..., role: _Optional[str] = ..., node: _Optional[str] = ..., model_directory: _Optional[str] = ..., broker_address: _Optional[str] = ..., owner_public: _Optional[bytes] = ..., listen_host: _Optional[str] = ..., advertise_host: _Optional[str] = ..., threads: _Optional[int] = ..., node_key_path: _Optional[str] = ..., region: _Optional[str] = ...) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StopRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StopReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ShardStatus(_message.Message):
    __slots__ = ("state", "detail", "done_bytes", "total_bytes", "epoch", "ingress_address", "error_code", "error", "weaknesses", "engine")
    STATE_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    DONE_BYTES_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    INGRESS_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    ERROR_CODE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    WEAKNESSES_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    state: ShardState
    detail: str
    done_bytes: int
    total_bytes: int
    epoch: str
    ingress_address: str
    error_code: str
    error: str
    weaknesses: _containers.RepeatedScalarFieldContainer[str]
    engine: EngineStatus
    def __init__(self, state: _Optional[_Union[ShardState, str]] = ..., detail: _Optional[str] = ..., done_bytes: _Optional[int] = ..., total_bytes: _Optional[int] = ..., epoch: _Optional[str] = ..., ingress_address: _Optional[str] = ..., error_code: _Optional[str] = ..., error: _Optional[str] = ..., weaknesses: _Optional[_Iterable[str]] = ..., engine: _Optional[_Union[EngineStatus, _Mapping]] = ...) -> None: ...

class EngineStatus(_message.Message):
    __slots__ = ("running", "waiting", "free_blocks", "total_blocks")
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    FREE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    running: int
    waiting: int
    free_blocks: int
    total_blocks: int
    def __init__(self, running: _Optional[int] = ..., waiting: _Optional[int] = ..., free_blocks: _Optional[int] = ..., total_blocks: _Optional[int] = ...) -> None: ...

class SealedRequest(_message.Message):
    __slots__ = ("sealed",)
    SEALED_FIELD_NUMBER: _ClassVar[int]
    sealed: bytes
    def __init__(self, sealed: _Optional[bytes] = ...) -> None: ...

class SealedRecord(_message.Message):
    __slots__ = ("record",)
    RECORD_FIELD_NUMBER: _ClassVar[int]
    record: bytes
    def __init__(self, record: _Optional[bytes] = ...) -> None: ...

class HealthRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class HealthReply(_message.Message):
    __slots__ = ("ready", "epoch")
    READY_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    ready: bool
    epoch: str
    def __init__(self, ready: _Optional[bool] = ..., epoch: _Optional[str] = ...) -> None: ...
