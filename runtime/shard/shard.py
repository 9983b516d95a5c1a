"""The life of a shard: prove, load, then serve one epoch after another.

1. prove: check the model's files against the signed manifest, gather evidence over a fresh key, be
   admitted to the role by the key broker;
2. load: read this stage's tensors, each checked before it is used;
3. serve: for each roster that the broker sends, bring up the links and compute until a fault ends
   the epoch; ask for a new epoch; repeat. Weights stay loaded, the cache starts empty.

The head shard also runs the engine and the OpenAI layer, which live across epochs.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Protocol

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from placement.plan import PlanTemplate, RoleTemplate
from runtime.shard.launch import ShardSpec
from runtime.shard.pipeline import Epoch, HeadRunner
from runtime.stage.border import RotaryBorder
from runtime.stage.errors import RankFailed
from runtime.stage.settings import StageSettings
from runtime.stage.stage import StageRunner
from security.broker.candidate import request_admission
from security.broker.membership import Membership
from security.channel.link import LinkListener
from security.errors import SecurityError
from security.manifest import ModelFiles
from security.sealing.keys import UnsealKeys
from security.sealing.reader import open_model

log = logging.getLogger("bulkhead.shard")

_REVOKED = "the broker ended it: a member was revoked"

# How often a shard without a healthy epoch asks the broker for a new one.
RENEW_INTERVAL_S = 3.0
ENGINE_CHECK_S = 1.0


class EngineEnded(Exception):
    """The engine's thread ended by itself: this process answers no request any more."""

    code = "engine_ended"


class ModelDirectoryMissing(Exception):
    """This node has no model where the starter said that it is."""

    code: ClassVar[str] = "model_directory_missing"


class ShardState:
    """States of a shard, as in control.proto."""

    IDLE = 1
    PROVING = 2
    LOADING = 3
    WAITING = 4
    SERVING = 5
    FAILED = 6


@dataclass(slots=True)
class Status:
    """What the starter may know. Changed under the shard's lock; `version` counts changes."""

    state: int = ShardState.IDLE
    detail: str = "not started"
    done_bytes: int = 0
    total_bytes: int = 0
    epoch: str = ""
    ingress_address: str = ""
    error_code: str = ""
    error: str = ""
    weaknesses: tuple[str, ...] = ()
    version: int = field(default=0)


class HeadService(Protocol):
    """What a head shard adds: the engine and the OpenAI layer behind the sealed ingress."""

    runner: HeadRunner

    @property
    def failure(self) -> str:
        """Why the engine ended by itself; empty while it has not."""

    def close(self) -> None:
        """Ends the engine; waiting clients get a retryable error."""


class Shard:
    """One stage of one pipeline instance.

    Args:
        spec: what the starter said.
        on_change: called from any thread whenever the status changed.
        ingress_address: reserves the head's ingress, called before admission (the address is in
            the roster) and returns "host:port".
        make_head: builds the head's services from the loaded, verified model.
    """

    def __init__(
        self,
        spec: ShardSpec,
        *,
        on_change: Callable[[], None],
        ingress_address: Callable[[], str],
        make_head: Callable[
            [PlanTemplate, ModelFiles, str, X25519PrivateKey, RotaryBorder | None], HeadService
        ],
    ) -> None:
        self._spec = spec
        self._on_change = on_change
        self._ingress_address = ingress_address
        self._make_head = make_head
        self._lock = threading.Lock()
        self._status = Status()
        self._stopping = threading.Event()
        self._membership: Membership | None = None
        self._stage: StageRunner | None = None
        self._head: HeadService | None = None
        # Held while the current epoch and what the status says of it change together.
        self._epoch_lock = threading.Lock()
        self._epoch: Epoch | None = None
        self._ended_epoch = b""
        self._wake = threading.Event()
        self._fatal: Exception | None = None

    # -- status -------------------------------------------------------------------------------

    def status(self) -> Status:
        """A copy of the status."""
        with self._lock:
            current = self._status
            return Status(*(getattr(current, name) for name in Status.__slots__))

    def _set(self, state: int | None = None, detail: str | None = None, **changes: object) -> None:
        with self._lock:
            if state is not None:
                self._status.state = state
            if detail is not None:
                self._status.detail = detail
            for name, value in changes.items():
                setattr(self._status, name, value)
            self._status.version += 1
        if detail is not None:
            log.info("%s", detail)
        self._on_change()

    # -- life ---------------------------------------------------------------------------------

    def run(self) -> None:
        """Runs the shard until `stop`; a refusal or a broken model ends in the failed state."""
        try:
            self._run()
        except Exception as error:
            named = getattr(error, "code", None)
            code = named if isinstance(named, str) else type(error).__name__
            # Errors that have a code say what to do; where others come from has to be looked for.
            log.error("failed: %s: %s", code, error, exc_info=code != named)
            if self._membership is not None:
                with contextlib.suppress(SecurityError):
                    self._membership.report(f"{self._spec.role} failed: {code}: {error}")
            self._set(
                ShardState.FAILED,
                f"failed: {code}",
                error_code=code,
                error=f"{self._spec.role} on {self._spec.node}: {error}",
            )
        finally:
            self._close()

    def stop(self) -> None:
        """Makes `run` return soon."""
        self._stopping.set()
        self._wake.set()
        if self._membership is not None:
            self._membership.close()

    def _run(self) -> None:
        spec = self._spec
        model_directory = Path(spec.model_directory)
        if not model_directory.is_dir():
            raise ModelDirectoryMissing(
                f"model directory: expected {model_directory} on node {spec.node}, found nothing; "
                "copy it there (file_mounts in the cluster file) or name a hub id"
            )
        listener = LinkListener(spec.listen_host)
        try:
            self._set(ShardState.PROVING, f"proving to the broker at {spec.broker_address}")
            # Only the head has an ingress, and which role is the head is fixed: the first stage.
            ingress = self._ingress_address() if spec.role == "stage-0" else ""
            challenge, membership, key = request_admission(
                spec.broker_address,
                spec.owner_public,
                instance=spec.instance,
                role=spec.role,
                node=spec.node,
                model_dir=model_directory,
                link_address=f"{spec.advertise_host}:{listener.port}",
                ingress_address=ingress,
                node_key_path=Path(spec.node_key_path) if spec.node_key_path else None,
                region=spec.region or None,
            )
            self._membership = membership
            template = challenge.template
            role = next(role for role in template.roles if role.name == spec.role)
            weaknesses = tuple(template.weaknesses)
            for weakness in weaknesses:
                log.warning("weakness accepted by the policy: %s", weakness)
            self._set(
                ShardState.LOADING,
                f"admitted as {spec.role}; "
                f"loading layers {role.first_layer} to {role.last_layer - 1}",
                ingress_address=ingress,
                weaknesses=weaknesses,
            )
            # The broker releases no keys of sealed parts yet: a stage that needs one says so.
            files = open_model(model_directory, challenge.manifest, UnsealKeys({}))
            self._stage = StageRunner(
                files, stage_settings(template, role, spec.threads), progress=self._progress
            )
            if role.stage == 0:
                self._head = self._make_head(
                    template, files, spec.instance, key, self._stage.rotary_border
                )
            self._set(
                ShardState.WAITING,
                f"loaded; cache of {self._stage.cache_blocks} of {template.cache_blocks} planned "
                "blocks; waiting for the roster",
            )
            self._serve(membership, template, role, listener, key)
        finally:
            listener.close()

    def _progress(self, done: int, total: int) -> None:
        self._set(done_bytes=done, total_bytes=total)

    def _serve(
        self,
        membership: Membership,
        template: PlanTemplate,
        role: RoleTemplate,
        listener: LinkListener,
        private_key: X25519PrivateKey,
    ) -> None:
        assert self._stage is not None
        renewing = threading.Thread(target=self._renew, name="renew", daemon=True)
        renewing.start()
        membership.on_ended = self._ended
        for roster in membership.rosters():
            if self._stopping.is_set():
                break
            if self._epoch is not None:
                self._epoch.close()
            epoch = Epoch(
                roster=roster,
                template=template,
                role=role,
                stage=self._stage,
                listener=listener,
                private_key=private_key,
                on_open=self._opened,
                on_fault=self._broken,
            )
            with self._epoch_lock:
                self._epoch = epoch
                self._set(
                    ShardState.WAITING,
                    f"epoch {roster.epoch.hex()[:8]}: connecting to the neighbours",
                    epoch=roster.epoch.hex(),
                )
                ended = roster.epoch == self._ended_epoch
            if ended:
                # The broker ended it while the epoch before it was being closed.
                epoch.fail(_REVOKED)
            else:
                epoch.open()
        if self._fatal is not None:
            raise self._fatal

    def _ended(self, ended: bytes) -> None:
        """Closes the links of an epoch at once: one of its members was revoked."""
        with self._epoch_lock:
            epoch, self._ended_epoch = self._epoch, ended
        if epoch is not None and epoch.roster.epoch == ended:
            epoch.fail(_REVOKED)

    def _opened(self, epoch: Epoch) -> None:
        with self._epoch_lock:
            # A thread of an epoch that has ended may come here late.
            if epoch is not self._epoch or not epoch.healthy:
                return
            self._set(ShardState.SERVING, f"epoch {epoch.roster.epoch.hex()[:8]}: serving")
        if self._head is not None:
            self._head.runner.offer(epoch)

    def _broken(self, epoch: Epoch, reason: str, error: Exception | None) -> None:
        if isinstance(error, RankFailed):
            # The stage itself is of no further use; a fresh process loads it anew.
            self._fatal = error
            self.stop()
            return
        with self._epoch_lock:
            if epoch is not self._epoch:
                return
            self._set(
                ShardState.WAITING,
                f"epoch {epoch.roster.epoch.hex()[:8]} broke ({reason}); recovering",
            )
        self._wake.set()

    def _renew(self) -> None:
        """Asks for a new epoch as long as the newest one is broken; watches over the engine."""
        while not self._stopping.is_set():
            self._wake.wait(ENGINE_CHECK_S)
            self._wake.clear()
            if self._head is not None and self._head.failure:
                self._fatal = EngineEnded(f"{self._head.failure}; a fresh process must take over")
                self.stop()
                return
            while not self._stopping.is_set():
                epoch = self._epoch
                if epoch is None or not epoch.broken:
                    break
                try:
                    assert self._membership is not None
                    self._membership.renew_epoch(epoch.roster.epoch)
                except SecurityError as error:
                    log.warning("asking for a new epoch: %s", error)
                self._stopping.wait(RENEW_INTERVAL_S)

    def _close(self) -> None:
        self._stopping.set()
        self._wake.set()
        # The epoch first: the engine may be waiting for one of its steps.
        if self._epoch is not None:
            self._epoch.close()
        if self._head is not None:
            self._head.close()
        if self._membership is not None:
            self._membership.close()
        if self._stage is not None:
            self._stage.close()


def stage_settings(template: PlanTemplate, role: RoleTemplate, threads: int) -> StageSettings:
    """What a stage needs to know of the signed template."""
    return StageSettings(
        first_layer=role.first_layer,
        last_layer=role.last_layer,
        layers=template.layers,
        dtype=template.dtype,
        tp=role.tp,
        block_size=template.block_size,
        cache_blocks=template.cache_blocks,
        max_context=template.max_context,
        hidden_size=template.hidden_size,
        threads=threads,
        weight_format=template.weight_format,
    )
