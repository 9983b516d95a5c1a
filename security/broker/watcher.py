"""One open watch stream of a member, as the broker's state machine sees it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import NamedTuple

from security.errors import BrokerRefusal


class News(NamedTuple):
    """What a member has to hear, in this order.

    Attributes:
        ended: an epoch whose links must be closed at once; empty for none.
        roster: the newest signed roster; None for none.
    """

    ended: bytes
    roster: bytes | None


class WatchClosed(Exception):
    """A watch stream has ended without the broker having a reason to end it."""


class Watcher:
    """One open watch stream. Holds at most the newest roster that was not taken yet."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._roster: bytes | None = None
        self._ended = b""
        self._closed = False
        self._reason: BrokerRefusal | None = None
        self.on_close: Callable[[], None] | None = None

    def next(self, timeout: float) -> News:
        """Waits for news; neither of both if nothing came in `timeout` seconds.

        Both at once, so that no roster of an ended epoch can follow the word of its end.

        Raises:
            BrokerRefusal: the stream was ended by the broker, for this reason.
            WatchClosed: the other side closed the stream, or opened a newer one.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: self._roster is not None or self._closed or self._ended != b"", timeout
            )
            if self._closed:
                raise self._reason or WatchClosed
            news = News(self._ended, self._roster)
            self._ended, self._roster = b"", None
            return news

    def put(self, roster: bytes) -> None:
        """Hands over a roster, replacing one that was not taken."""
        with self._changed:
            self._roster = roster
            self._changed.notify_all()

    def end(self, epoch: bytes) -> None:
        """Says that an epoch's links must be closed before there is another roster."""
        with self._changed:
            self._roster = None
            self._ended = epoch
            self._changed.notify_all()

    def close(self, reason: BrokerRefusal | None = None) -> None:
        """Ends the stream; safe to call more than once and from any thread."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._reason = reason
            self._changed.notify_all()
        if self.on_close is not None:
            self.on_close()
