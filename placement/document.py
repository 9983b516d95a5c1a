"""Documents that get signed: canonical JSON out, strict JSON in, and a typed reader for fields.

The encoding has one form per value (sorted keys, no white space, ASCII only, integers but no
floats), so a digest of the bytes is a digest of the meaning. The reader refuses whatever the
writer cannot write: a duplicate key or a NaN would let two parsers read two different documents
under one signature. Nothing here allocates more than a constant factor of the input's length.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from typing import NoReturn, TypeAlias, TypeVar

JSON: TypeAlias = "bool | int | str | list[JSON] | dict[str, JSON] | None"
"""What `decode` returns."""

Encodable: TypeAlias = "bool | int | str | Sequence[Encodable] | Mapping[str, Encodable] | None"
"""What `encode` takes: JSON, with any sequence or mapping in place of list and dict."""

MAX_DEPTH = 16
"""Deepest nesting of lists and objects that is written or read."""

MIN_INTEGER = -(2**63)
MAX_INTEGER = 2**64 - 1

ChoiceT = TypeVar("ChoiceT", bound=StrEnum)

_HEX = re.compile(r"(?:[0-9a-f]{2})*")


class DocumentError(ValueError):
    """A document is malformed; the message says where, what was expected and what was found."""


def encode(value: Encodable) -> bytes:
    """Encodes a value as canonical JSON: one value, one sequence of bytes.

    Raises:
        DocumentError: the value holds a float, bytes, a key that is not text, an integer beyond
            64 bits, text that is not valid Unicode, or nests deeper than `MAX_DEPTH`.
    """
    plain = _plain(value, "document", 1)
    return json.dumps(
        plain, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    ).encode("ascii")


def decode(data: bytes, max_bytes: int) -> dict[str, JSON]:
    """Decodes a JSON object of at most `max_bytes` bytes, refusing everything ambiguous.

    White space and the order of keys are free: a signature covers the bytes as they came.

    Raises:
        DocumentError: too long, not UTF-8, not JSON, not an object, a duplicate key, a float or
            NaN, an integer beyond 64 bits, trailing bytes, or deeper than `MAX_DEPTH`.
    """
    if len(data) > max_bytes:
        raise DocumentError(
            f"document: expected at most {max_bytes} bytes, found {len(data)}; "
            "it was refused before it was parsed"
        )
    try:
        text = bytes(data).decode("utf-8")
        value: object = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_float=_no_float,
            parse_constant=_no_float,
            parse_int=_bounded_integer,
        )
    except DocumentError:
        raise
    except RecursionError:
        raise DocumentError(f"document: nested deeper than {MAX_DEPTH} levels") from None
    except ValueError as error:
        # Covers UnicodeDecodeError and JSONDecodeError; both messages hold positions, and only
        # the former a byte of the content.
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "not UTF-8 text"
        raise DocumentError(f"document: expected one JSON object, found {reason}") from None
    plain = _plain(value, "document", 1)
    if not isinstance(plain, dict):
        raise DocumentError(f"document: expected a JSON object, found {type(plain).__name__}")
    return plain


def digest(data: bytes) -> str:
    """SHA-256 of the bytes as 64 lower-case hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def _plain(value: object, where: str, depth: int) -> JSON:
    """Copies a value into plain lists and dicts, checking what JSON cannot say unambiguously."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        if not MIN_INTEGER <= value <= MAX_INTEGER:
            raise DocumentError(f"{where}: expected an integer of at most 64 bits")
        return int(value)
    if isinstance(value, str):
        return _valid_text(value, where)
    if depth > MAX_DEPTH:
        raise DocumentError(f"{where}: nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, Mapping):
        plain: dict[str, JSON] = {}
        for key, item in value.items():
            if not isinstance(key, str):
                raise DocumentError(f"{where}: expected text keys, found {type(key).__name__}")
            plain[_valid_text(key, where)] = _plain(item, f"{where}.{key:.64}", depth + 1)
        return plain
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{where}[{i}]", depth + 1) for i, item in enumerate(value)]
    raise DocumentError(
        f"{where}: expected null, a boolean, an integer, text, a list or an object, "
        f"found {type(value).__name__}"
    )


def _valid_text(text: str, where: str) -> str:
    # A lone surrogate survives JSON's escapes and fails much later, when somebody encodes it.
    # `str(...)` drops the subclass: a StrEnum is written as its value.
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise DocumentError(f"{where}: expected valid Unicode, found a lone surrogate") from None
    return str(text)


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise DocumentError(f"document: the key {key[:64]!r} occurs twice in one object")
            seen.add(key)
    return found


def _no_float(literal: str) -> NoReturn:
    raise DocumentError(f"document: expected integers only, found {literal[:24]}")


def _bounded_integer(literal: str) -> int:
    # 20 digits and a sign hold every 64-bit integer; int() of thousands of digits is slow.
    if len(literal) > 21:
        raise DocumentError("document: expected an integer of at most 64 bits")
    return int(literal)


class Fields:
    """Reads the fields of one object, each exactly once, each with its type and its limits.

    Every reader raises the error that the function given at construction makes of a message of
    the form ``where.field: expected ..., found ...`` (by default a `DocumentError`). Call `finish`
    last: it refuses the fields that nobody read, so that a misspelt field cannot be ignored.
    """

    def __init__(
        self,
        document: Mapping[str, object],
        where: str,
        error: Callable[[str], DocumentError] = DocumentError,
    ) -> None:
        self._document = document
        self._where = where
        self._error = error
        self._read: set[str] = set()
        self._known: set[str] = set()

    @classmethod
    def of(
        cls, value: object, where: str, error: Callable[[str], DocumentError] = DocumentError
    ) -> Fields:
        """A reader over a value that must be an object."""
        if not isinstance(value, Mapping):
            raise error(f"{where}: expected an object, found {_kind(value)}")
        return cls(value, where, error)

    @property
    def where(self) -> str:
        """Where this object stands in its document, for messages."""
        return self._where

    def __contains__(self, name: str) -> bool:
        """Whether the field is present (an explicit null counts as present)."""
        self._known.add(name)
        return name in self._document

    def text(self, name: str, max_length: int = 256, pattern: str | None = None) -> str:
        """Text of 1 to `max_length` characters that wholly matches `pattern` if one is given."""
        return self._text(self._take(name), name, max_length, pattern)

    def optional_text(
        self, name: str, max_length: int = 256, pattern: str | None = None
    ) -> str | None:
        """Like `text`, but the field may be null (it must still be there)."""
        value = self._take(name)
        return None if value is None else self._text(value, name, max_length, pattern)

    def free_text(self, name: str, max_length: int) -> str:
        """Text of 0 to `max_length` characters."""
        value = self._take(name)
        if not isinstance(value, str) or len(value) > max_length:
            self._refuse(name, f"text of at most {max_length} characters", value)
        return value

    def integer(self, name: str, minimum: int, maximum: int) -> int:
        """An integer in the closed range (booleans are not integers)."""
        value = self._take(name)
        if not isinstance(value, int) or isinstance(value, bool):
            self._refuse(name, f"an integer from {minimum} to {maximum}", value)
        if not minimum <= value <= maximum:
            self._refuse(name, f"an integer from {minimum} to {maximum}", value)
        return value

    def optional_integer(self, name: str, minimum: int, maximum: int) -> int | None:
        """Like `integer`, but the field may be null (it must still be there)."""
        if self._document.get(name, 0) is None:
            self._take(name)
            return None
        return self.integer(name, minimum, maximum)

    def boolean(self, name: str) -> bool:
        """True or false."""
        value = self._take(name)
        if not isinstance(value, bool):
            self._refuse(name, "true or false", value)
        return value

    def choice(self, name: str, choices: type[ChoiceT]) -> ChoiceT:
        """One value of a text enumeration."""
        value = self._take(name)
        member = _member(value, choices)
        if member is None:
            self._refuse(name, "one of " + ", ".join(choices), value)
        return member

    def texts(
        self, name: str, max_items: int, max_length: int = 256, pattern: str | None = None
    ) -> tuple[str, ...]:
        """A list of at most `max_items` texts, each as `text` would take it."""
        return tuple(
            self._text(item, f"{name}[{i}]", max_length, pattern)
            for i, item in enumerate(self._list(name, max_items))
        )

    def integers(self, name: str, max_items: int, minimum: int, maximum: int) -> tuple[int, ...]:
        """A list of at most `max_items` integers, each in the closed range."""
        found: list[int] = []
        for i, item in enumerate(self._list(name, max_items)):
            if not isinstance(item, int) or isinstance(item, bool):
                self._refuse(f"{name}[{i}]", "an integer", item)
            if not minimum <= item <= maximum:
                self._refuse(f"{name}[{i}]", f"an integer from {minimum} to {maximum}", item)
            found.append(item)
        return tuple(found)

    def choices(self, name: str, choices: type[ChoiceT]) -> tuple[ChoiceT, ...]:
        """A list of values of a text enumeration, none of them twice."""
        found: list[ChoiceT] = []
        for i, item in enumerate(self._list(name, len(choices))):
            member = _member(item, choices)
            if member is None:
                self._refuse(f"{name}[{i}]", "one of " + ", ".join(choices), item)
            if member in found:
                self._refuse(f"{name}[{i}]", "each value once", item)
            found.append(member)
        return tuple(found)

    def octets(self, name: str, size: int) -> bytes:
        """Exactly `size` bytes, written as lower-case hexadecimal digits."""
        value = self._take(name)
        if not isinstance(value, str) or len(value) != 2 * size or not _HEX.fullmatch(value):
            self._refuse(name, f"{2 * size} lower-case hexadecimal digits", value)
        return bytes.fromhex(value)

    def digest(self, name: str) -> str:
        """A SHA-256 digest: 64 lower-case hexadecimal digits."""
        return self.octets(name, 32).hex()

    def mapping(self, name: str) -> Mapping[str, object]:
        """A nested object as it is, for a class that reads it itself."""
        value = self._take(name)
        if not isinstance(value, Mapping):
            self._refuse(name, "an object", value)
        return value

    def section(self, name: str) -> Fields:
        """A reader over a nested object; the caller finishes it too."""
        return Fields.of(self._take(name), f"{self._where}.{name}", self._error)

    def sections(self, name: str, max_items: int) -> tuple[Fields, ...]:
        """Readers over a list of at most `max_items` objects; the caller finishes each."""
        return tuple(
            Fields.of(item, f"{self._where}.{name}[{i}]", self._error)
            for i, item in enumerate(self._list(name, max_items))
        )

    def text_map(
        self, name: str, max_items: int, max_length: int = 256, pattern: str | None = None
    ) -> dict[str, str]:
        """An object of at most `max_items` texts by free keys (bounded like the texts)."""
        nested = Fields.of(self._take(name), f"{self._where}.{name}", self._error)
        nested._bound(max_items, max_length)
        return {key: nested.text(key, max_length, pattern) for key in nested._document}

    def texts_map(
        self, name: str, max_items: int, max_texts: int, max_length: int = 256
    ) -> dict[str, tuple[str, ...]]:
        """An object of at most `max_items` lists of texts by free keys."""
        nested = Fields.of(self._take(name), f"{self._where}.{name}", self._error)
        nested._bound(max_items, max_length)
        return {key: nested.texts(key, max_texts, max_length) for key in nested._document}

    def finish(self) -> None:
        """Refuses fields that were not read."""
        unknown = sorted(str(key)[:64] for key in self._document if key not in self._read)
        if unknown:
            raise self._error(
                f"{self._where}.{unknown[0]}: expected one of {', '.join(sorted(self._known))}, "
                "found a field of another name"
            )

    def fail(self, name: str, expected: str, found: object) -> NoReturn:
        """Raises this reader's error for a check that the caller made."""
        self._refuse(name, expected, found)

    def _bound(self, max_items: int, max_length: int) -> None:
        if len(self._document) > max_items:
            raise self._error(
                f"{self._where}: expected at most {max_items} entries, found {len(self._document)}"
            )
        for key in self._document:
            if not isinstance(key, str) or not 1 <= len(key) <= max_length:
                raise self._error(
                    f"{self._where}: expected keys of 1 to {max_length} characters, "
                    f"found {str(key)[:64]!r}"
                )

    def _take(self, name: str) -> object:
        if name not in self._document:
            raise self._error(f"{self._where}.{name}: expected a value, found no such field")
        self._read.add(name)
        self._known.add(name)
        return self._document[name]

    def _list(self, name: str, max_items: int) -> list[object]:
        value = self._take(name)
        if not isinstance(value, (list, tuple)) or len(value) > max_items:
            self._refuse(name, f"a list of at most {max_items}", value)
        return list(value)

    def _text(self, value: object, name: str, max_length: int, pattern: str | None) -> str:
        if not isinstance(value, str) or not 1 <= len(value) <= max_length:
            self._refuse(name, f"text of 1 to {max_length} characters", value)
        if pattern is not None and re.fullmatch(pattern, value) is None:
            self._refuse(name, f"text matching {pattern}", value)
        return value

    def _refuse(self, name: str, expected: str, found: object) -> NoReturn:
        raise self._error(f"{self._where}.{name}: expected {expected}, found {_shown(found)}")


def _member(value: object, choices: type[ChoiceT]) -> ChoiceT | None:
    return next((m for m in choices if isinstance(value, str) and value == m.value), None)


def _kind(value: object) -> str:
    names: tuple[tuple[type, str], ...] = (
        (bool, "a boolean"),
        (int, "an integer"),
        (str, "text"),
        (list, "a list"),
        (tuple, "a list"),
        (Mapping, "an object"),
    )
    if value is None:
        return "null"
    return next((name for kind, name in names if isinstance(value, kind)), type(value).__name__)


def _shown(value: object) -> str:
    """A value for a message: short, on one line, without control characters."""
    if isinstance(value, str):
        return f"text of {len(value)} characters" if len(value) > 64 else repr(value)
    if isinstance(value, (bool, int)):
        return str(value).lower() if isinstance(value, bool) else str(value)
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}"
    return _kind(value)
