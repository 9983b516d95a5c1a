"""Chat templates: from messages to the prompt's text, whatever the template tries.

A template is a program that comes with the model. Jinja's immutable sandbox keeps it from Python's
internals, but not from running for ever or filling the memory, so it runs in a child process with
limits that the kernel enforces (see `template_worker`): a deadline per rendering, an address space,
a length of output. A rendering that exceeds one is refused; if the child dies of it, the next
rendering starts another (about 0.2 s). The child is part of the shard: same user, same machine; it
inherits no environment and no descriptors but its two pipes.
"""

from __future__ import annotations

import json
import os
import select
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from runtime.engine.errors import InvalidRequest

__all__ = ["ChatTemplate", "TemplateInvalid", "TemplateLimits", "TemplateRefused"]

_LENGTH = struct.Struct("<I")
_WORKER = Path(__file__).with_name("template_worker.py")
_START_S = 30.0
# The kernel ends the child at the deadline; the parent's own clock is for what the kernel's misses.
_GRACE_S = 1.0
# A character takes at most 12 bytes as JSON ("\ud83d\ude00" for one outside the basic plane).
_BYTES_PER_CHARACTER = 12


class TemplateInvalid(ValueError):
    """The model's chat template is no template; the model cannot be served for chat."""


class TemplateRefused(InvalidRequest):
    """These messages cannot be rendered with the model's template, or not within its limits."""

    code = "chat_template_failed"


@dataclass(frozen=True, slots=True)
class TemplateLimits:
    """Bounds on one rendering.

    Attributes:
        deadline_s: wall-clock seconds.
        max_characters: length of the rendered text.
        memory_bytes: address space of the child.
    """

    deadline_s: float = 5.0
    max_characters: int = 16 * 1024 * 1024
    memory_bytes: int = 1024 * 1024 * 1024


class ChatTemplate:
    """A compiled template in a child process. Any thread may render; renderings take turns.

    Args:
        source: the Jinja template.
        variables: what every rendering sees beside the messages: `bos_token` and its like.
        limits: bounds on one rendering.

    Raises:
        TemplateInvalid: syntax error, or compiling it exceeds the limits.
    """

    def __init__(
        self, source: str, variables: Mapping[str, object], limits: TemplateLimits | None = None
    ) -> None:
        self._source = source
        self._variables = dict(variables)
        self._limits = limits or TemplateLimits()
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        with self._lock:
            self._start()

    def render(
        self, messages: list[dict[str, object]], arguments: Mapping[str, object] | None = None
    ) -> str:
        """The prompt's text, with the header of the assistant's turn at its end.

        Args:
            messages: `role`, `content` and so on, plain JSON values.
            arguments: further names that the template may look at.

        Raises:
            TemplateRefused: the template refuses the messages, fails, or exceeds a limit.
        """
        context: dict[str, object] = {
            **self._variables,
            **(arguments or {}),
            "messages": messages,
            "tools": None,
            "documents": None,
            "add_generation_prompt": True,
        }
        with self._lock:
            if self._child is None or self._child.poll() is not None:
                self._stop()
                self._start()
            try:
                answer = self._exchange(context, self._limits.deadline_s + _GRACE_S)
            except (EOFError, OSError, TimeoutError):
                self._stop()
                raise TemplateRefused(
                    "The model's chat template did not finish within "
                    f"{self._limits.deadline_s:g} s and its memory for these messages.",
                    "messages",
                ) from None
            except BaseException:
                self._stop()
                raise
        if "text" in answer:
            return answer["text"]
        raise TemplateRefused(self._explain(answer), "messages")

    def close(self) -> None:
        """Ends the child."""
        with self._lock:
            self._stop()

    def _explain(self, answer: dict[str, str]) -> str:
        match answer["error"]:
            case "raised" if answer["message"] and answer["message"] in self._source:
                # A constant of the template, and so not a quotation of the messages.
                return f"The model's chat template refuses these messages: {answer['message']}"
            case "raised":
                return "The model's chat template refuses these messages."
            case "too_long":
                return (
                    "The rendered messages are too long: expected at most "
                    f"{self._limits.max_characters} characters."
                )
            case "too_big":
                return "The model's chat template needs too much memory for these messages."
            case _:
                return f"The model's chat template failed on these messages: {answer['message']}."

    def _start(self) -> None:
        self._child = subprocess.Popen(
            [sys.executable, "-I", str(_WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={"OMP_NUM_THREADS": "1"} | _time_zone(),
            bufsize=0,
        )
        job: dict[str, object] = {
            "template": self._source,
            "deadline_s": self._limits.deadline_s,
            "max_characters": self._limits.max_characters,
            "memory_bytes": self._limits.memory_bytes,
        }
        try:
            answer = self._exchange(job, _START_S + self._limits.deadline_s)
        except (EOFError, OSError, TimeoutError):
            self._stop()
            raise TemplateInvalid(
                "chat template: expected one that compiles within its limits, found none; check "
                "the model's chat_template"
            ) from None
        if "text" not in answer:
            self._stop()
            raise TemplateInvalid(f"chat template: expected valid Jinja, found {answer['message']}")

    def _stop(self) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                pipe.close()

    def _exchange(self, message: dict[str, object], timeout_s: float) -> dict[str, str]:
        """One message out, one back, within the timeout."""
        assert self._child is not None and self._child.stdin and self._child.stdout
        deadline = time.monotonic() + timeout_s
        body = json.dumps(message).encode()
        _write_all(self._child.stdin.fileno(), _LENGTH.pack(len(body)) + body, deadline)
        output = self._child.stdout.fileno()
        (length,) = _LENGTH.unpack(_read_exactly(output, _LENGTH.size, deadline))
        most = _BYTES_PER_CHARACTER * (self._limits.max_characters + 1000)
        if length > most:
            raise OSError(f"answer: expected at most {most} bytes, found {length}")
        answer = json.loads(_read_exactly(output, length, deadline))
        if not isinstance(answer, dict) or not (
            "text" in answer or {"error", "message"} <= answer.keys()
        ):
            raise OSError("answer: expected text or an error")
        return {str(name): str(value) for name, value in answer.items()}


def _time_zone() -> dict[str, str]:
    return {"TZ": os.environ["TZ"]} if "TZ" in os.environ else {}


def _wait(descriptor: int, events: int, deadline: float) -> None:
    poller = select.poll()
    poller.register(descriptor, events)
    left = deadline - time.monotonic()
    if left <= 0 or not poller.poll(left * 1000):
        raise TimeoutError("chat template")


def _write_all(descriptor: int, content: bytes, deadline: float) -> None:
    os.set_blocking(descriptor, False)
    view = memoryview(content)
    while view:
        _wait(descriptor, select.POLLOUT, deadline)
        view = view[os.write(descriptor, view) :]


def _read_exactly(descriptor: int, length: int, deadline: float) -> bytes:
    parts: list[bytes] = []
    while length:
        _wait(descriptor, select.POLLIN, deadline)
        part = os.read(descriptor, min(length, 1 << 20))
        if not part:
            raise EOFError("chat template")
        parts.append(part)
        length -= len(part)
    return b"".join(parts)
