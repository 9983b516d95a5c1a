"""A plan's data plane in one process: real stages, links and threads, without broker or Ray."""

from __future__ import annotations

import re
import secrets
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from running import RunningPlan

from placement.plan import Trust
from placement.verify import Claims
from runtime.shard.pipeline import Epoch, HeadRunner
from runtime.shard.shard import stage_settings
from runtime.stage.stage import StageRunner
from security.channel.link import Edge, Link, LinkKeys, LinkListener, connect
from security.manifest import ModelFiles
from security.roster import Roster, RosterEntry

CLAIMS = Claims("simulated", Trust.ATTESTED, "node", "x", "", None, "declared", False, True)


class Member:
    """One shard: its stage, its key and where it listens."""

    def __init__(self, stage: StageRunner) -> None:
        self.stage = stage
        self.key = X25519PrivateKey.generate()
        self.listener = LinkListener("127.0.0.1")
        self.epoch: Epoch | None = None


class Ring:
    """A plan whose epochs are opened by hand.

    Attributes:
        faults: what ended the epochs last opened, "role: reason", in order.
    """

    def __init__(
        self, model: Path, splits: Sequence[int] = (), *, step_deadline_ms: int = 30_000
    ) -> None:
        self._plan = RunningPlan(
            model, splits, step_deadline_ms=step_deadline_ms, start=False, step_tokens=32
        )
        self.template = self._plan.template
        self.runner = HeadRunner(self.template)
        self.faults: list[str] = []
        self.faulted = threading.Event()
        self._files = ModelFiles(model, self._plan.manifest)
        self.members = {
            role.name: Member(StageRunner(self._files, stage_settings(self.template, role, 1)))
            for role in self.template.roles
        }
        self.roster = self.new_roster()

    def new_roster(self) -> Roster:
        now = int(time.time())
        return Roster(
            instance="pipeline-0",
            cluster="test",
            epoch=secrets.token_bytes(16),
            serial=1,
            template_digest="0" * 64,
            policy_digest="0" * 64,
            manifest_digest="0" * 64,
            entries=tuple(
                RosterEntry(
                    role,
                    member.key.public_key().public_bytes_raw(),
                    f"127.0.0.1:{member.listener.port}",
                    "",
                    CLAIMS,
                )
                for role, member in self.members.items()
            ),
            weaknesses=(),
            issued_at=now,
            expires_at=now + 3600,
        )

    def open(self, *roles: str) -> None:
        """A new epoch of these shards, by default all; the head's runner is offered it."""
        for member in self.members.values():
            if member.epoch is not None:
                member.epoch.close()
        # Only now: until then the last epoch may notice that its peers have left.
        self.faults.clear()
        self.faulted.clear()
        self.roster = self.new_roster()
        for role in self.template.roles:
            member = self.members[role.name]
            if roles and role.name not in roles:
                continue
            member.epoch = Epoch(
                roster=self.roster,
                template=self.template,
                role=role,
                stage=member.stage,
                listener=member.listener,
                private_key=member.key,
                on_open=self.runner.offer if role.stage == 0 else _nothing,
                on_fault=self._fault,
            )
        for role in self.template.roles:
            if not roles or role.name in roles:
                epoch = self.members[role.name].epoch
                assert epoch is not None
                epoch.open()

    def _fault(self, epoch: Epoch, reason: str, error: Exception | None) -> None:
        name = next(name for name, member in self.members.items() if member.epoch is epoch)
        self.faults.append(f"{name}: {reason}")
        self.faulted.set()

    def await_fault(self, pattern: str, timeout_s: float = 10.0) -> None:
        """Waits until one of the faults matches."""
        deadline = time.monotonic() + timeout_s
        while not any(re.match(pattern, fault) for fault in list(self.faults)):
            assert time.monotonic() < deadline, self.faults
            time.sleep(0.01)

    def break_epoch(self) -> None:
        """As when a process dies: all links of a shard close."""
        epoch = self.members[self.template.roles[-1].name].epoch
        assert epoch is not None
        epoch.fail("broken by the test")

    def impersonate(self, role: str) -> tuple[Link, Link]:
        """Links of one role to the epochs of its neighbours, held by the test: up and down."""
        names = [entry.name for entry in self.template.roles]
        before = names[names.index(role) - 1]
        after = names[(names.index(role) + 1) % len(names)]
        member = self.members[role]
        accepted: list[Link] = []

        def accept() -> None:
            accepted.append(
                member.listener.accept(
                    Edge(before, role),
                    self.roster.digest,
                    self.roster.epoch,
                    self._keys(role, before),
                    deadline=time.monotonic() + 10,
                )
            )

        thread = threading.Thread(target=accept)
        thread.start()
        down = connect(
            self.roster.entry(after).link_address,
            Edge(role, after),
            self.roster.digest,
            self.roster.epoch,
            self._keys(role, after),
            deadline=time.monotonic() + 10,
        )
        thread.join()
        return accepted[0], down

    def _keys(self, role: str, peer: str) -> LinkKeys:
        return LinkKeys(self.members[role].key, self.roster.entry(peer).shard_key)

    def close(self) -> None:
        for member in self.members.values():
            if member.epoch is not None:
                member.epoch.close()
            member.listener.close()
            member.stage.close()
        self._files.close()
        self._plan.close()


def _nothing(epoch: Epoch) -> None:
    """Only the head's epoch is offered to the engine."""
