"""The word that an epoch has ended is not lost, whenever it comes between two rosters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from runtime.shard import shard as module
from runtime.shard.launch import ShardSpec
from runtime.shard.shard import Shard

FIRST, SECOND = (SimpleNamespace(epoch=name) for name in (b"first", b"second"))


def run(monkeypatch: pytest.MonkeyPatch, when_closing: Callable[[Shard], None]) -> list[str]:
    """Serves two rosters; says what became of their epochs."""
    events: list[str] = []

    class StandIn:
        broken = False

        def __init__(self, *, roster: Any, **_: object) -> None:
            self.roster = roster
            self.name = roster.epoch.decode()

        def open(self) -> None:
            events.append(f"open {self.name}")

        def fail(self, reason: str, error: Exception | None = None) -> None:
            events.append(f"fail {self.name}: {reason}")

        def close(self) -> None:
            when_closing(shard)

    class Member:
        on_ended: Callable[[bytes], None]

        def rosters(self) -> Iterator[Any]:
            yield from (FIRST, SECOND)

    monkeypatch.setattr(module, "Epoch", StandIn)
    spec: ShardSpec = SimpleNamespace()  # type: ignore[assignment]
    nothing: Any = None
    shard = Shard(spec, on_change=lambda: None, ingress_address=str, make_head=nothing)
    shard._stage = SimpleNamespace()  # type: ignore[assignment]
    member: Any = Member()
    shard._serve(member, nothing, nothing, nothing, nothing)
    shard.stop()
    return events


def test_an_epoch_that_ended_while_the_one_before_was_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    events = run(monkeypatch, lambda shard: shard._ended(SECOND.epoch))
    assert events == ["open first", "fail second: the broker ended it: a member was revoked"]


def test_the_end_of_another_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    def first_ended(shard: Shard) -> None:
        shard._ended(FIRST.epoch)

    events = run(monkeypatch, first_ended)
    assert events[-1] == "open second"
