"""How the broker's state machine writes its audit log."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from security.broker.store import BrokerStore
from security.errors import SecurityError


class Journal:
    """Writes entries with the broker's time.

    Args:
        store: holds the log.
        clock: Unix time in seconds.
    """

    def __init__(self, store: BrokerStore, clock: Callable[[], float]) -> None:
        self._store = store
        self._clock = clock

    def write(self, event: str, **fields: str) -> None:
        """Adds an entry, to the store's transaction in progress if there is one."""
        self._store.audit(self._clock(), event, **fields)

    @contextmanager
    def refusals(self, method: str, **fields: str) -> Iterator[None]:
        """Writes the reason of a refusal into the log."""
        try:
            yield
        except SecurityError as error:
            self.write("refused", method=method, code=error.code, **fields, reason=str(error))
            raise
        except Exception as error:
            # A fault of ours. Its text may hold anything; its kind does not.
            reason = f"failed by {type(error).__name__}"
            self.write("refused", method=method, code="internal_error", **fields, reason=reason)
            raise
