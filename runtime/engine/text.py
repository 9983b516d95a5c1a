"""From tokens to the text that a client may see: whole characters, stop strings withheld."""

from __future__ import annotations

from typing import Protocol

__all__ = ["Detokenizer", "OutputText", "TokenDecoder"]

REPLACEMENT = "\ufffd"
# A character has at most four bytes and a token with text at least one: where so many tokens have
# not completed a character, the first of them is in none.
MAX_PENDING_TOKENS = 4


class TokenDecoder(Protocol):
    """The part of a tokenizer that turns ids into text."""

    def decode(self, token_ids: list[int]) -> str:
        """Text of some tokens, to which those without text add nothing.

        Bytes that are no character show as U+FFFD; so does a character that is incomplete.
        """
        ...

    def has_text(self, token: int) -> bool:
        """False for a token without text, wherever it stands: a special or an unknown one."""
        ...


class Detokenizer:
    """Decodes a growing list of tokens piece by piece.

    A token's text depends on its neighbours (a leading space is dropped at the start, bytes of a
    character may be spread over tokens), so each piece is the difference between decoding a short
    window with and without the new tokens. It is given out once it does not end inside a character;
    after `MAX_PENDING_TOKENS` that do, all but its last U+FFFD is, which later bytes may still turn
    into a character.

    The window may begin inside a character. Its first bytes are then decoded as U+FFFD, the same
    with and without the new tokens: UTF-8 is in step again after three bytes.
    """

    def __init__(self, decoder: TokenDecoder) -> None:
        self._decoder = decoder
        self._window: list[int] = []
        self._pending: list[int] = []
        # Characters of the window's text that have been given out: all but an open one.
        self._given = 0

    def push(self, token: int) -> str:
        """The text that this token completes; empty while a character is incomplete."""
        if not self._decoder.has_text(token):
            return ""
        self._pending.append(token)
        text = self._decoder.decode(self._window + self._pending)
        if not text.endswith(REPLACEMENT):
            return self._give_out(text, left_open=0)
        if len(self._pending) < MAX_PENDING_TOKENS:
            return ""
        return self._give_out(text, left_open=1)

    def flush(self) -> str:
        """What is left at the end of the output; incomplete bytes show as U+FFFD."""
        return self._decoder.decode(self._window + self._pending)[self._given :]

    def _give_out(self, text: str, left_open: int) -> str:
        piece = text[self._given : len(text) - left_open]
        self._window, self._pending = self._pending, []
        self._given = len(self._decoder.decode(self._window)) - left_open
        return piece


class OutputText:
    """The visible text of one output.

    Text that may be the beginning of a stop string is held back until it is known not to be. What
    follows a stop string is never visible, nor is the string itself unless `include_stop`.

    Attributes:
        stopped: a stop string was found; nothing may be pushed any more.
        produced: characters that tokens have completed, visible or held back.
        shown: characters that have become visible.
    """

    def __init__(
        self, decoder: TokenDecoder, stop: tuple[str, ...], include_stop: bool = False
    ) -> None:
        self._detokenizer = Detokenizer(decoder)
        self._stop = stop
        self._include_stop = include_stop
        self._held = ""
        self.stopped = False
        self.produced = 0
        self.shown = 0

    def push(self, token: int) -> str:
        """The text that becomes visible with this token."""
        return self._show(self._detokenizer.push(token))

    def finish(self) -> str:
        """The text that becomes visible because nothing follows."""
        shown = self._show(self._detokenizer.flush())
        if self.stopped:
            return shown
        held, self._held = self._held, ""
        self.shown += len(held)
        return shown + held

    def _show(self, piece: str) -> str:
        self.produced += len(piece)
        text = self._held + piece
        cut, self._held = len(text), ""
        found = [(at, len(stop)) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            at, length = min(found)
            cut = at + length if self._include_stop else at
        elif self._stop:
            cut -= max(self._overlap(text, stop) for stop in self._stop)
            self._held = text[cut:]
        self.shown += cut
        return text[:cut]

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """Length of the longest end of `text` with which `stop` begins."""
        for length in range(min(len(text), len(stop) - 1), 0, -1):
            if text.endswith(stop[:length]):
                return length
        return 0
