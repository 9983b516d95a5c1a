"""What can go wrong in a stage. Messages hold names, shapes and sizes, never values."""

from typing import ClassVar

__all__ = [
    "CheckpointMismatch",
    "DeviceUnavailable",
    "InsufficientMemory",
    "NonFinite",
    "RankFailed",
    "StageError",
    "StepRefused",
    "UnsupportedAttention",
    "UnsupportedModel",
]


class StageError(Exception):
    """A stage cannot load or cannot compute; `code` is stable and safe to show."""

    code: ClassVar[str] = "stage_error"


class UnsupportedModel(StageError):
    """The model needs something that a stage does not compute (family, quantisation, own code)."""

    code: ClassVar[str] = "unsupported_model"


class CheckpointMismatch(StageError):
    """The checkpoint's tensors are not the ones that its configuration calls for."""

    code: ClassVar[str] = "checkpoint_mismatch"


class InsufficientMemory(StageError):
    """What is left of the memory after loading holds no cache that the plan could work with."""

    code: ClassVar[str] = "insufficient_memory"


class DeviceUnavailable(StageError):
    """The stage was told to compute on a device that it does not have or cannot use."""

    code: ClassVar[str] = "device_unavailable"


class UnsupportedAttention(StageError):
    """A layer asked its attention for something that would be silently wrong if ignored."""

    code: ClassVar[str] = "unsupported_attention"


class StepRefused(StageError):
    """A step's rows do not fit its header or this stage."""

    code: ClassVar[str] = "step_refused"


class NonFinite(StageError):
    """Hidden states or logits hold an infinity or a NaN."""

    code: ClassVar[str] = "non_finite"


class RankFailed(StageError):
    """A tensor-parallel rank ended, reported an error or hung; its stage must be loaded anew."""

    code: ClassVar[str] = "rank_failed"
