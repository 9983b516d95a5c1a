"""The model's tokenizer, read from verified bytes."""

from __future__ import annotations

import json
import logging
import re
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path

from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer

from runtime.engine.errors import ContextLengthExceeded, InvalidRequest
from runtime.engine.template import ChatTemplate, TemplateLimits, TemplateRefused
from runtime.engine.text import REPLACEMENT
from security.manifest import ModelFiles

__all__ = [
    "TOKENIZER_FILES",
    "TokenIdsOnly",
    "Tokenizer",
    "TokenizerError",
    "load_json",
    "load_tokenizer",
    "read_tokenizer_files",
]

_log = logging.getLogger(__name__)

# All that is ever read. No Python, nothing pickled.
TOKENIZER_FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)


# How byte fallback names a byte.
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


def _letters_of_bytes() -> dict[str, int]:
    """The alphabet of byte-level BPE (Radford et al., 2019): a printable letter for each byte.

    Printable bytes of Latin-1 stand for themselves, the others for what follows U+0100 in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + place): byte for place, byte in enumerate(others)
    }


_BYTES_OF_LETTERS = _letters_of_bytes()


class TokenizerError(ValueError):
    """The model's tokenizer files make no tokenizer that can be served."""


class Tokenizer:
    """Text to ids, ids to text, messages to text. Any thread may use it.

    Args:
        files: name to verified content, of those in `TOKENIZER_FILES` that the model has.
        limits: bounds on rendering a chat template.

    Raises:
        TokenizerError: files are missing, malformed, or need code that comes with the model.
        TemplateInvalid: the chat template does not compile.
    """

    def __init__(
        self, files: Mapping[str, bytes], template_limits: TemplateLimits | None = None
    ) -> None:
        unknown = sorted(set(files) - set(TOKENIZER_FILES))
        if unknown:
            raise TokenizerError(f"tokenizer: expected files of TOKENIZER_FILES, found {unknown}")
        # mkdtemp makes the directory 0700; transformers reads files only.
        with tempfile.TemporaryDirectory(prefix="tokenizer-") as directory:
            for name, content in files.items():
                Path(directory, name).write_bytes(content)
            try:
                loaded = AutoTokenizer.from_pretrained(
                    directory, trust_remote_code=False, local_files_only=True
                )
            except Exception as error:
                raise TokenizerError(
                    f"tokenizer: expected one that transformers can load, found {sorted(files)}: "
                    f"{type(error).__name__}: {error}"
                ) from error
        backend = getattr(loaded, "backend_tokenizer", None)
        if not isinstance(backend, Backend):
            raise TokenizerError(
                "tokenizer: expected a tokenizer.json, or files that convert to one, found "
                f"{type(loaded).__name__}; convert it with transformers and sign the model again"
            )
        self._backend = backend
        # Truncation or padding in tokenizer.json are settings of training.
        self._backend.no_truncation()
        self._backend.no_padding()
        # The backend serves threads at once only as long as nobody changes its settings.
        self._encode_lock = threading.Lock()
        self.vocabulary: int = backend.get_vocab_size(with_added_tokens=True)
        eos = loaded.eos_token_id
        self.eos_token_id: int | None = eos if isinstance(eos, int) else None
        self._special = frozenset(
            token for token, added in backend.get_added_tokens_decoder().items() if added.special
        )
        self._longest = max((len(token) for token in backend.get_vocab()), default=1)
        source = _template_source(loaded.chat_template)
        special = {
            name: value
            for name, value in loaded.special_tokens_map.items()
            if isinstance(value, str | list)
        }
        self._token_bytes: dict[int, bytes] = {}
        self._template = None if source is None else ChatTemplate(source, special, template_limits)

    def close(self) -> None:
        """Ends the template's process."""
        if self._template is not None:
            self._template.close()

    def encode(self, text: str, max_tokens: int, special_tokens: bool) -> list[int]:
        """Ids of a text.

        Args:
            text: the prompt.
            max_tokens: longer prompts are refused, absurdly long ones before they are tokenized.
            special_tokens: whether the tokenizer adds its own (a BOS, usually); a rendered chat
                template already has them.

        Raises:
            ContextLengthExceeded: more than `max_tokens`.
            InvalidRequest: not Unicode text (a lone surrogate).
        """
        if len(text) > max_tokens * self._longest:
            raise ContextLengthExceeded(
                f"This model's maximum context length is {max_tokens} tokens. However, your input "
                f"of {len(text)} characters has more. Please reduce the length of the input."
            )
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InvalidRequest(
                "The prompt is not Unicode text: it has a surrogate without its other half."
            ) from None
        with self._encode_lock:
            ids = self._backend.encode(text, add_special_tokens=special_tokens).ids
        return list(ids)

    def decode(self, token_ids: list[int]) -> str:
        """Text of some tokens; special tokens have none, unknown ids neither."""
        return str(self._backend.decode(token_ids, skip_special_tokens=True))

    def has_text(self, token: int) -> bool:
        """False for special tokens and unknown ids, which `decode` leaves out."""
        return token not in self._special and self._backend.id_to_token(token) is not None

    def token_bytes(self, token: int) -> bytes:
        """What a token stands for by itself, in UTF-8: part of a character, for some.

        A special token stands for its name, an unknown id for nothing.
        """
        if token not in self._token_bytes:
            self._token_bytes[token] = self._bytes_of(token)
        return self._token_bytes[token]

    def _bytes_of(self, token: int) -> bytes:
        name = self._backend.id_to_token(token)
        if name is None:
            return b""
        # The second of two: decoders drop a space at the very start.
        once, twice = self.decode([token]), self.decode([token, token])
        if not twice:
            return name.encode()
        if REPLACEMENT not in twice:
            return twice[len(once) :].encode()
        if byte := _BYTE_TOKEN.fullmatch(name):
            return bytes.fromhex(byte[1])
        if all(letter in _BYTES_OF_LETTERS for letter in name):
            return bytes(_BYTES_OF_LETTERS[letter] for letter in name)
        return name.encode()

    def render(
        self, messages: list[dict[str, object]], arguments: Mapping[str, object] | None = None
    ) -> str:
        """The text of a conversation, ready for the assistant's answer.

        Raises:
            TemplateRefused: see `ChatTemplate.render`; also when the model has no chat template.
        """
        if self._template is None:
            raise TemplateRefused(
                "This model has no chat template; use /v1/completions.", "messages"
            )
        return self._template.render(messages, arguments)


class TokenIdsOnly:
    """Stands in for the tokenizer of a model that has none: prompts are token ids, answers too.

    An answer's text is its token ids as decimal numbers, each followed by a space.
    """

    eos_token_id: int | None = None

    def close(self) -> None:
        """Nothing to end."""

    def encode(self, text: str, max_tokens: int, special_tokens: bool) -> list[int]:
        """Refuses every text.

        Raises:
            InvalidRequest: always.
        """
        raise InvalidRequest(
            "This model has no tokenizer: send the prompt as token ids to /v1/completions.",
            "prompt",
        )

    def decode(self, token_ids: list[int]) -> str:
        """The ids as decimal numbers."""
        return "".join(f"{token} " for token in token_ids)

    def has_text(self, token: int) -> bool:
        """Every id is shown."""
        return True

    def token_bytes(self, token: int) -> bytes:
        """As `decode` shows it."""
        return self.decode([token]).encode()

    def render(
        self, messages: list[dict[str, object]], arguments: Mapping[str, object] | None = None
    ) -> str:
        """Refuses every conversation.

        Raises:
            TemplateRefused: always.
        """
        raise TemplateRefused(
            "This model has no tokenizer and no chat template: send token ids to /v1/completions.",
            "messages",
        )


def load_tokenizer(files: ModelFiles) -> Tokenizer | TokenIdsOnly:
    """The model's tokenizer; a stand-in where the model has no file of one.

    Raises:
        ManifestMismatch: a file is not what the manifest says.
        TokenizerError, TemplateInvalid: see `Tokenizer`.
    """
    content = read_tokenizer_files(files)
    if set(content) <= {"config.json"}:
        _log.warning("the model has no tokenizer: prompts and answers are token ids")
        return TokenIdsOnly()
    return Tokenizer(content)


def read_tokenizer_files(files: ModelFiles) -> dict[str, bytes]:
    """The verified content of the tokenizer's files, of those that the model has.

    Raises:
        ManifestMismatch: a file is not what the manifest says.
    """
    return {name: files.read_file(name) for name in TOKENIZER_FILES if files.has_file(name)}


def _template_source(template: object) -> str | None:
    """The template for plain chats; a model may have several, by name."""
    if isinstance(template, dict):
        template = template.get("default")
    if template is not None and not isinstance(template, str):
        raise TokenizerError(f"chat template: expected text, found {type(template).__name__}")
    return template


def load_json(content: bytes, name: str) -> dict[str, object]:
    """A model's JSON file.

    Raises:
        TokenizerError: it is no JSON object.
    """
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise TokenizerError(
            f"{name}: expected JSON, found none ({type(error).__name__})"
        ) from None
    if not isinstance(document, dict):
        raise TokenizerError(f"{name}: expected an object, found {type(document).__name__}")
    return document
