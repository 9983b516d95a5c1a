"""How the engine's thread tells a client's asyncio loop what happened: once a step, not a token."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from runtime.engine.errors import RequestError
from runtime.engine.request import Chunk, Event

__all__ = ["Outbox", "Post", "TokenStream"]


class Post(Protocol):
    """Runs a function on the receiver's thread, as `loop.call_soon_threadsafe` does."""

    def __call__(self, deliver: Callable[[], None], /) -> object:
        """Raises RuntimeError when the receiver is gone."""
        ...


class TokenStream:
    """The news of one output, read on the client's loop.

    News that nobody has read yet is merged: a slow reader costs no more than the text itself.
    `cancel` must be called when nobody reads to the end; it may be called at any time.
    """

    def __init__(self, cancel: Callable[[], None]) -> None:
        self._cancel = cancel
        self._arrived = asyncio.Event()
        self._chunk: Chunk | None = None
        self._error: RequestError | None = None
        self._ended = False

    def put(self, event: Event) -> None:
        """Takes news; called on the loop's thread."""
        if isinstance(event, RequestError):
            self._error = event
        elif self._chunk is None:
            self._chunk = event
        else:
            self._chunk = self._chunk.followed_by(event)
        self._arrived.set()

    def announce(self, arrived: asyncio.Event) -> None:
        """Sets this event, instead of one of its own, for news that has come or will come."""
        if self._arrived.is_set():
            arrived.set()
        self._arrived = arrived

    def take(self) -> Chunk | None:
        """The news that is there, without waiting. After a chunk with a finish reason comes none.

        Raises:
            RequestError: the output ends without having been completed. Text that arrived before
                it is taken before it.
        """
        chunk, self._chunk = self._chunk, None
        if chunk is not None:
            self._ended = chunk.finish is not None
            if self._error is not None:
                self._arrived.set()
        elif self._error is not None:
            self._ended = True
            raise self._error
        return chunk

    async def next(self) -> Chunk:
        """Waits for news; otherwise as `take`."""
        while (chunk := self.take()) is None:
            await self._arrived.wait()
            self._arrived.clear()
        return chunk

    def cancel(self) -> None:
        """Nobody wants the rest: the engine stops computing it and frees what it holds."""
        if not self._ended:
            self._ended = True
            self._cancel()


class Outbox:
    """Collects what happened in a step and hands it over in one call per receiver."""

    def __init__(self) -> None:
        self._letters: dict[Post, list[tuple[Callable[[Event], None], Event]]] = {}

    def put(self, post: Post, sink: Callable[[Event], None], event: Event) -> None:
        """Keeps news until `flush`."""
        self._letters.setdefault(post, []).append((sink, event))

    def flush(self) -> None:
        """Delivers. A receiver that is gone gets nothing: it can no longer cancel either, so its
        sequences run to their end.
        """
        letters, self._letters = self._letters, {}
        for post, batch in letters.items():
            try:
                post(_Delivery(batch))
            except RuntimeError:
                continue


class _Delivery:
    def __init__(self, batch: list[tuple[Callable[[Event], None], Event]]) -> None:
        self._batch = batch

    def __call__(self) -> None:
        for sink, event in self._batch:
            sink(event)
