"""Witnesses of the audit log's head: an append-only file, an HTTP service.

A witness lies where whoever restores the broker's database cannot reach it. Each has a thread of
its own and takes the newest head only, so a slow one loses intermediate heads and blocks nobody.
"""

from __future__ import annotations

import http.client
import logging
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

log = logging.getLogger("bulkhead.broker")

HTTP_TIMEOUT_S = 5.0
FIRST_RETRY_S = 0.5
LONGEST_RETRY_S = 30.0
CLOSE_TIMEOUT_S = 2.0

Send = Callable[[bytes], None]
"""Hands one signed head to a witness; raises one of `_FAILURES`."""
# URLError and HTTPError are OSErrors; what is no HTTP is none.
_FAILURES = (OSError, ValueError, http.client.HTTPException)


def to_file(path: Path) -> Send:
    """Appends a line to a file and makes it durable."""

    def send(head: bytes) -> None:
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        descriptor = os.open(path, flags, 0o600)
        try:
            size = os.fstat(descriptor).st_size
            # A crash may have left half a line.
            torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
            line = (b"\n" if torn else b"") + head + b"\n"
            if os.write(descriptor, line) != len(line):
                raise OSError(f"{path}: the line was written in part")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    return send


def to_http(url: str) -> Send:
    """Posts the line as JSON; any 2xx is agreement. No proxy, no redirect."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.HTTPDefaultErrorHandler(),
    ):
        opener.add_handler(handler)

    def send(head: bytes) -> None:
        request = urllib.request.Request(  # noqa: S310 - an operator's option, http or https only
            url, data=head, headers={"Content-Type": "application/json"}, method="POST"
        )
        with opener.open(request, timeout=HTTP_TIMEOUT_S):
            pass

    return send


class Witness:
    """Keeps one witness up to date.

    Args:
        name: where it is, for messages.
        send: `to_file(...)` or `to_http(...)`.
        on_change: called with "" when the witness answers again and with the reason when it no
            longer does; not for every failure, as each may make a new head.
    """

    def __init__(self, name: str, send: Send, on_change: Callable[[str], None]) -> None:
        self.name = name
        self._send = send
        self._on_change = on_change
        self._changed = threading.Condition()
        self._newest: bytes | None = None
        self._closing = False
        self._failing = False
        self._thread = threading.Thread(target=self._run, name="witness", daemon=True)
        self._thread.start()

    def publish(self, head: bytes) -> None:
        """Hands over the newest head; returns at once."""
        with self._changed:
            self._newest = head
            self._changed.notify_all()

    def close(self) -> None:
        """Sends what is left, for at most `CLOSE_TIMEOUT_S`."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(CLOSE_TIMEOUT_S)

    def _run(self) -> None:
        retry = FIRST_RETRY_S
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._newest is not None or self._closing)
                head, self._newest = self._newest, None
            if head is None:
                return
            try:
                self._send(head)
            except _FAILURES as error:
                log.error("witness %s: %s", self.name, error)
                self._turn(str(error) or type(error).__name__)
                with self._changed:
                    if self._closing:
                        return
                    self._newest = self._newest or head
                    self._changed.wait_for(lambda: self._closing, retry)
                retry = min(2 * retry, LONGEST_RETRY_S)
                continue
            retry = FIRST_RETRY_S
            self._turn("")

    def _turn(self, reason: str) -> None:
        if self._failing != bool(reason):
            self._failing = bool(reason)
            self._on_change(reason)
