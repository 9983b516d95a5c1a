"""Renders chat templates in a process of its own, started by file path by `template.ChatTemplate`.

Messages on standard input and output are a 4-byte little-endian length and JSON. The first one
brings the template, each further one a context to render it with. The kernel ends this process when
a rendering outlasts its deadline, and refuses it memory, files and core dumps beyond the limits: a
bound that holds inside a single C call, too, which no check in Python does. It imports nothing of
ours, so that it starts in a fraction of a second.
"""

from __future__ import annotations

import ctypes
import json
import resource
import signal
import struct
import sys
from collections.abc import Iterable
from datetime import datetime
from typing import IO, Any, cast

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

_LENGTH = struct.Struct("<I")
_PR_SET_DUMPABLE = 4


class RaisedByTemplate(jinja2.TemplateError):
    """The template called `raise_exception`."""


class _PlainDict:
    """What templates may do with `dict`, without the class itself."""

    def __call__(self, *args: Any, **kwargs: object) -> dict[object, object]:
        return dict(*args, **kwargs)

    def fromkeys(self, keys: Iterable[object], value: object = None) -> dict[object, object]:
        return dict.fromkeys(keys, value)


class _PlainNamespace(Namespace):
    """Jinja's namespace without underscored attributes."""

    # No named parameter, so that a template may call one of its names `self`.
    def __init__(*args: Any, **kwargs: object) -> None:
        self: _PlainNamespace = args[0]
        values = dict(*args[1:], **kwargs)
        for name in values:
            _refuse_underscore(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: object) -> None:
        _refuse_underscore(name)
        super().__setitem__(name, value)


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's text: rendered as it is."""

    tags = {"generation"}  # noqa: RUF012 - as the base class declares it

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _refuse_underscore(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError("namespace: underscored names are refused")


def _raise_exception(message: object) -> None:
    raise RaisedByTemplate(str(message))


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def compile_template(source: str) -> jinja2.Template:
    """The template in the sandbox, with the names that transformers gives to chat templates."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, LoopControlExtension]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["dict"] = _PlainDict()
    environment.globals["namespace"] = _PlainNamespace
    return environment.from_string(source)


def render(template: jinja2.Template, context: dict[str, object], limit: int) -> dict[str, str]:
    """The answer to one context: `text`, or `error` (a word) and `message`."""
    try:
        pieces: list[str] = []
        length = 0
        for piece in template.generate(context):
            length += len(piece)
            if length > limit:
                return {"error": "too_long", "message": ""}
            pieces.append(piece)
        return {"text": "".join(pieces)}
    except RaisedByTemplate as error:
        return {"error": "raised", "message": str(error)[:1000]}
    except (MemoryError, RecursionError):
        return {"error": "too_big", "message": ""}
    except Exception as error:
        # The text of the error may quote the messages.
        return {"error": "failed", "message": type(error).__name__}


def _read(stream: IO[bytes]) -> dict[str, object] | None:
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack(head)
    return cast(dict[str, object], json.loads(stream.read(length)))


def _write(stream: IO[bytes], answer: dict[str, str]) -> None:
    body = json.dumps(answer).encode()
    stream.write(_LENGTH.pack(len(body)) + body)
    stream.flush()


def main() -> None:
    """Serves until standard input closes."""
    source, output = sys.stdin.buffer, sys.stdout.buffer
    first = _read(source)
    if first is None:
        return
    memory = cast(int, first["memory_bytes"])
    limit = cast(int, first["max_characters"])
    deadline = cast(float, first["deadline_s"])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (8, 8))
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    # The default action of SIGALRM ends the process, whatever Python is doing.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.setitimer(signal.ITIMER_REAL, deadline)
    try:
        template = compile_template(cast(str, first["template"]))
    except Exception as error:
        _write(output, {"error": "invalid", "message": f"{type(error).__name__}: {error}"[:500]})
        return
    signal.setitimer(signal.ITIMER_REAL, 0)
    _write(output, {"text": ""})
    while True:
        # Bounded, too: a context comes at once, from a parent that has it in memory.
        context = _read(source)
        if context is None:
            return
        signal.setitimer(signal.ITIMER_REAL, deadline)
        answer = render(template, context, limit)
        signal.setitimer(signal.ITIMER_REAL, 0)
        _write(output, answer)


if __name__ == "__main__":
    main()
