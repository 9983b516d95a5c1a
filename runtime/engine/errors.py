"""Errors that a client of the endpoint sees, in OpenAI's shape.

No message repeats what the client sent: errors are logged, prompts are not.
"""

from __future__ import annotations

from typing import ClassVar

__all__ = [
    "BodyTooLong",
    "ContextLengthExceeded",
    "InvalidRequest",
    "ModelFailed",
    "ModelNotFound",
    "Overloaded",
    "PathNotFound",
    "RequestError",
    "Unavailable",
    "UnsupportedMediaType",
    "WrongMethod",
]


class RequestError(Exception):
    """A request that gets an error instead of (the rest of) an answer.

    Attributes:
        status: HTTP status; 429 and 5xx may be retried.
        kind: OpenAI's `error.type`.
        code: OpenAI's `error.code`, stable.
        param: the request field at fault, where there is one.
        retry_after_s: HTTP's Retry-After in seconds; None where a retry would not help.
    """

    status: ClassVar[int] = 500
    kind: ClassVar[str] = "server_error"
    retry_after_s: ClassVar[int | None] = None
    code: str | None = None

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code

    def to_document(self) -> dict[str, object]:
        """The body of the HTTP answer."""
        return {
            "error": {
                "message": self.message,
                "type": self.kind,
                "param": self.param,
                "code": self.code,
            }
        }


class InvalidRequest(RequestError):
    """A field is missing, of the wrong type, out of range or not supported."""

    status = 400
    kind = "invalid_request_error"


class ContextLengthExceeded(InvalidRequest):
    """Prompt and answer do not fit the context that this deployment serves."""

    code = "context_length_exceeded"


class ModelNotFound(RequestError):
    """The request names a model that is not served here."""

    status = 404
    kind = "invalid_request_error"
    code = "model_not_found"


class PathNotFound(RequestError):
    """No such endpoint."""

    status = 404
    kind = "invalid_request_error"
    code = "unknown_url"


class WrongMethod(RequestError):
    """The endpoint exists, but not for this HTTP method."""

    status = 405
    kind = "invalid_request_error"
    code = "method_not_supported"


class BodyTooLong(RequestError):
    """The body is longer than the endpoint takes."""

    status = 413
    kind = "invalid_request_error"
    code = "request_too_large"


class UnsupportedMediaType(RequestError):
    """The body is not declared as JSON."""

    status = 415
    kind = "invalid_request_error"
    code = "unsupported_media_type"


class Overloaded(RequestError):
    """The waiting queue is full, or the tenant's share of it; nothing was started. Retry later."""

    status = 429
    # Places come free one by one, as outputs end.
    retry_after_s = 1
    kind = "rate_limit_error"
    code = "rate_limit_exceeded"


class Unavailable(RequestError):
    """The pipeline is down for longer than the recovery deadline, or stopping. Retry later."""

    status = 503
    # A new epoch takes seconds: shards prove themselves and connect again.
    retry_after_s = 5
    kind = "server_error"
    code = "pipeline_unavailable"


class ModelFailed(RequestError):
    """Computing this request broke the pipeline again and again."""

    status = 500
    kind = "server_error"
    code = "model_failed"
