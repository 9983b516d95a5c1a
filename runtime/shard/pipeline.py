"""The data plane of one shard: its two links and its worker threads, one set per epoch.

The stages form a ring: stage i sends its output to stage i + 1, the last stage sends the sampled
token ids to the head. Before the first step one frame goes around it, in which each stage lowers
the number of cache blocks to what it has. On the link from last stage to head, how tokens are to be
drawn goes the other way (`runtime.shard.admissions`).

An `Epoch` lives from a roster to the first fault. Whatever goes wrong (a link breaks, a frame does
not decode, a value is not finite, a peer is silent beyond the step deadline) ends the epoch as a
whole: both links close, which the neighbours notice, and the shard asks the broker for a new epoch.
Nothing is repaired inside an epoch, so no state can be half right.

Reading, computing and writing each have a thread: AES-GCM and torch release the GIL.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from placement.plan import PlanTemplate, RoleTemplate
from runtime.engine.runner import PipelineBroken, check_result
from runtime.shard.admissions import AdmissionQueue
from runtime.stage.errors import StageError
from runtime.stage.stage import StageRunner
from security.channel.admission import (
    Admission,
    decode_admissions,
    encode_admissions,
    max_admission_bytes,
)
from security.channel.frame import (
    CAPACITY_BYTES,
    FrameLimits,
    StepHeader,
    StepResult,
    decode_capacity,
    decode_result,
    decode_step,
    encode_capacity,
    encode_result,
    encode_step,
)
from security.channel.link import Edge, Link, LinkKeys, LinkListener, connect
from security.errors import SecurityError
from security.roster import Roster

log = logging.getLogger("bulkhead.shard")

# How long one attempt to bring up both links of an epoch may take, and then the frame that goes
# around the ring. A peer that has just been
# restarted has loaded its weights before it watches for rosters, so this covers networks only.
OPEN_DEADLINE_S = 20.0


@dataclass(frozen=True, slots=True, repr=False)
class _Step:
    """One step on its way through a shard: the head's carries token ids, the others' a tensor.

    The head's carries admissions, too, where the head is the last stage.
    """

    header: StepHeader
    token_ids: list[int] | None
    hidden_TD: torch.Tensor | None
    admissions: tuple[Admission, ...] = ()


@dataclass(frozen=True, slots=True, repr=False)
class _Submitted:
    """What the head expects an answer to: a step, and the logprobs asked for of its tokens."""

    header: StepHeader
    asked: list[int | None]


class TooManySteps(SecurityError):
    """A peer sent more steps or results than the head may have in flight."""

    code: ClassVar[str] = "too_many_steps"


class _End:
    """Put on a queue to end the thread that reads it."""


_END = _End()


def frame_limits(template: PlanTemplate) -> FrameLimits:
    """The bounds that every received frame is held to, all from the signed template."""
    return FrameLimits(
        max_sequences=template.max_sequences,
        max_tokens=template.max_step_tokens,
        max_context=template.max_context,
        block_size=template.block_size,
        cache_blocks=template.cache_blocks,
        hidden_size=template.hidden_size,
        dtype=template.dtype,
        vocabulary=template.vocabulary,
    )


class Epoch:
    """One shard's links and threads under one roster.

    Args:
        on_open: called once, from a thread of the epoch, when both links are up.
        on_fault: called once, from a thread of the epoch, with the first fault; not called when
            the epoch is ended with `close`.
    """

    def __init__(
        self,
        *,
        roster: Roster,
        template: PlanTemplate,
        role: RoleTemplate,
        stage: StageRunner,
        listener: LinkListener,
        private_key: X25519PrivateKey,
        on_open: Callable[[Epoch], None],
        on_fault: Callable[[Epoch, str, Exception | None], None],
    ) -> None:
        self.roster = roster
        self._template = template
        self._role = role
        self._stage = stage
        self._listener = listener
        self._private_key = private_key
        self._on_open = on_open
        self._on_fault = on_fault
        self._plan_limits = frame_limits(template)
        self._limits = replace(self._plan_limits, cache_blocks=stage.cache_blocks)
        self._count = len(template.roles)
        self._is_head = role.stage == 0
        self._is_last = role.stage == self._count - 1
        self._lock = threading.Lock()
        self._closed = False
        self._opened = threading.Event()
        self._abandon = threading.Event()
        self._upstream: Link | None = None
        self._downstream: Link | None = None
        self._inbox: queue.SimpleQueue[_Step | _End] = queue.SimpleQueue()
        self._outbox: queue.SimpleQueue[list[bytes | memoryview] | _End] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[StepResult | _End] = queue.SimpleQueue()
        self._admissions_out: queue.SimpleQueue[bytes | _End] = queue.SimpleQueue()
        self._admissions_in = AdmissionQueue(
            steps_in_flight(self._count), template.step_deadline_ms / 1000
        )
        self._agreed = threading.Event()
        self._cache_blocks = stage.cache_blocks
        # The engine's thread only.
        self._submitted: deque[_Submitted] = deque()
        self._asked: dict[int, int | None] = {}  # by slot
        self._threads: list[threading.Thread] = []

    # -- life ---------------------------------------------------------------------------------

    @property
    def healthy(self) -> bool:
        """Both links are up and nothing has gone wrong."""
        return self._opened.is_set() and not self._closed

    @property
    def broken(self) -> bool:
        """A fault or `close` has ended it."""
        return self._closed

    @property
    def cache_blocks(self) -> int:
        """Cache blocks that every stage has, once the epoch is open; at the head only."""
        return self._cache_blocks

    def open(self) -> None:
        """Starts to bring up the links; returns at once."""
        threading.Thread(target=self._guard(self._open), name="epoch-open", daemon=True).start()

    def close(self) -> None:
        """Ends the epoch and waits for its worker threads; safe to call twice and from callbacks.

        When it returns, nothing of this epoch touches the stage any more. An attempt to bring up
        links is not waited for: it finds the epoch closed, and closes what it made.
        """
        self._shut()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()

    def _shut(self) -> bool:
        """Closes everything once; True for the caller that did it."""
        with self._lock:
            if self._closed:
                return False
            self._closed = True
            links = [link for link in (self._upstream, self._downstream) if link is not None]
        self._abandon.set()
        for link in links:
            link.close()
        self._agreed.set()
        self._inbox.put(_END)
        self._outbox.put(_END)
        self._results.put(_END)
        self._admissions_out.put(_END)
        self._admissions_in.close()
        return True

    def fail(self, reason: str, error: Exception | None = None) -> None:
        """Ends the epoch because of a fault."""
        if self._shut():
            log.warning("epoch %s broke: %s", self.roster.epoch.hex()[:8], reason)
            self._on_fault(self, reason, error)

    def _spawn(self, name: str, target: Callable[[], None]) -> None:
        thread = threading.Thread(target=self._guard(target), name=f"epoch-{name}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _guard(self, target: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            try:
                target()
            except Exception as error:  # every fault ends the epoch, none ends the shard
                name = threading.current_thread().name
                what = type(error).__name__
                if isinstance(error, SecurityError | StageError):
                    # Texts of these hold names, shapes and sizes, no content.
                    what += f": {error}"
                else:
                    where = "".join(traceback.format_tb(error.__traceback__))
                    log.error("%s: %s at\n%s", name, what, where)
                self.fail(f"{name}: {what}", error)

        return run

    # -- links --------------------------------------------------------------------------------

    def _open(self) -> None:
        if self._count > 1:
            deadline = time.monotonic() + OPEN_DEADLINE_S
            names = [role.name for role in self._template.roles]
            before = names[(self._role.stage - 1) % self._count]
            after = names[(self._role.stage + 1) % self._count]
            accepting = threading.Thread(
                target=self._guard(lambda: self._accept(before, deadline)),
                name="epoch-accept",
                daemon=True,
            )
            accepting.start()
            self._connect(after, deadline)
            accepting.join()
        self._start()
        if self._count > 1 and not self._agreed.wait(OPEN_DEADLINE_S):
            self.fail(f"no capacity frame came within {OPEN_DEADLINE_S:.0f} s: a peer hangs")
        with self._lock:
            if self._closed:
                return
            self._opened.set()
        self._on_open(self)

    def _start(self) -> None:
        # Under the lock, so that `close` either prevents these threads or waits for them.
        with self._lock:
            if self._closed:
                return
            self._spawn("compute", self._compute)
            if self._count == 1:
                return
            self._spawn("send", self._send)
            if self._is_head:
                self._outbox.put([encode_capacity(self._cache_blocks)])
                self._spawn("receive", self._receive_results)
                self._spawn("admit", self._send_admissions)
            else:
                self._spawn("receive", self._receive_steps)
            if self._is_last:
                self._spawn("admit", self._receive_admissions)

    def _keys(self, peer: str) -> LinkKeys:
        return LinkKeys(self._private_key, self.roster.entry(peer).shard_key)

    def _accept(self, peer: str, deadline: float) -> None:
        link = self._listener.accept(
            Edge(peer, self._role.name),
            self.roster.digest,
            self.roster.epoch,
            self._keys(peer),
            deadline=deadline,
            abandon=self._abandon,
        )
        self._adopt(upstream=link)

    def _connect(self, peer: str, deadline: float) -> None:
        link = connect(
            self.roster.entry(peer).link_address,
            Edge(self._role.name, peer),
            self.roster.digest,
            self.roster.epoch,
            self._keys(peer),
            deadline=deadline,
            abandon=self._abandon,
        )
        self._adopt(downstream=link)

    def _adopt(self, upstream: Link | None = None, downstream: Link | None = None) -> None:
        with self._lock:
            self._upstream = upstream or self._upstream
            self._downstream = downstream or self._downstream
            closed = self._closed
        if closed:
            for link in (upstream, downstream):
                if link is not None:
                    link.close()

    # -- threads ------------------------------------------------------------------------------

    def _receive_capacity(self) -> int:
        """Blocks that all stages before this one have; for the head, all stages."""
        assert self._upstream is not None
        return decode_capacity(self._upstream.receive(CAPACITY_BYTES), self._plan_limits)

    def _receive_steps(self) -> None:
        assert self._upstream is not None
        blocks = min(self._receive_capacity(), self._stage.cache_blocks)
        self._outbox.put([encode_capacity(blocks)])
        self._agreed.set()
        limit = self._limits.max_step_bytes
        dtype = getattr(torch, self._template.dtype)
        while True:
            message = self._upstream.receive(limit)
            header, payload = decode_step(message, self._limits)
            hidden = torch.frombuffer(payload, dtype=dtype)
            hidden_TD = hidden.view(header.tokens, self._template.hidden_size)
            self._check_room(self._inbox.qsize() + self._outbox.qsize())
            self._inbox.put(_Step(header, None, hidden_TD))

    def _receive_results(self) -> None:
        assert self._upstream is not None
        self._cache_blocks = min(self._receive_capacity(), self._stage.cache_blocks)
        self._agreed.set()
        while True:
            message = self._upstream.receive(self._limits.max_result_bytes)
            self._check_room(self._results.qsize())
            self._results.put(decode_result(message, self._limits))

    def _check_room(self, queued: int) -> None:
        """What waits here is in flight for the head: a peer that sends more fills our memory."""
        depth = steps_in_flight(self._count)
        if queued >= depth:
            raise TooManySteps(f"steps waiting: expected fewer than {depth}, found {queued}")

    def _send(self) -> None:
        assert self._downstream is not None
        while not isinstance(parts := self._outbox.get(), _End):
            self._downstream.send(parts)

    def _send_admissions(self) -> None:
        # The link that results come on; nobody else sends there.
        assert self._upstream is not None
        while not isinstance(frame := self._admissions_out.get(), _End):
            self._upstream.send([frame])

    def _receive_admissions(self) -> None:
        # The link that results go out on; nobody else receives there.
        assert self._downstream is not None
        limit = max_admission_bytes(self._limits)
        while True:
            self._admissions_in.put(
                *decode_admissions(self._downstream.receive(limit), self._limits)
            )

    def _compute(self) -> None:
        self._stage.reset()
        expected = 0
        while not isinstance(step := self._inbox.get(), _End):
            if self._closed:
                return
            header = step.header
            if header.step != expected:
                self.fail(f"steps out of order: expected {expected}, found {header.step}")
                return
            expected += 1
            hidden_TD = self._stage.forward(
                header, hidden_TD=step.hidden_TD, token_ids=step.token_ids
            )
            if not self._is_last:
                head = encode_step(header, self._template.dtype, self._template.hidden_size)
                self._outbox.put([head, tensor_bytes(hidden_TD)])
                continue
            admissions = step.admissions if self._is_head else self._admissions_in.take(header)
            self._stage.admit(admissions)
            result = self._stage.sample(header, hidden_TD)
            if self._is_head:
                self._results.put(result)
            else:
                self._outbox.put([encode_result(result)])

    # -- the head's side ----------------------------------------------------------------------

    def submit(
        self, header: StepHeader, token_ids: list[int], admissions: Sequence[Admission]
    ) -> None:
        """Hands a step to stage 0, and to the last stage what it needs to sample it."""
        for admission in admissions:
            self._asked[admission.slot] = admission.parameters.logprobs
        asked = [self._asked[s.slot] for s in header.sequences if s.sampled]
        self._submitted.append(_Submitted(header, asked))
        if admissions and not self._is_last:
            self._admissions_out.put(encode_admissions(header.step, admissions))
        own = tuple(admissions) if self._is_last else ()
        self._inbox.put(_Step(header, token_ids, None, own))

    def result(self, timeout_s: float) -> StepResult:
        """The next result; raises PipelineBroken when the epoch ended or the deadline passed."""
        try:
            result = self._results.get(timeout=timeout_s)
        except queue.Empty:
            self.fail(f"no result within the step deadline of {timeout_s:.1f} s: a peer hangs")
            raise PipelineBroken("step deadline passed") from None
        if isinstance(result, _End):
            raise PipelineBroken("the epoch ended")
        try:
            submitted = self._submitted.popleft()
            check_result(submitted.header, result, self._template.vocabulary, submitted.asked)
        except PipelineBroken as error:
            self.fail(f"the last stage's answer does not fit: {error}", error)
            raise
        return result


def steps_in_flight(stages: int) -> int:
    """One step at each stage, and one more: on the way back, or scheduled ahead."""
    return stages + 1


def tensor_bytes(hidden_TD: torch.Tensor) -> memoryview:
    """The raw bytes of a contiguous tensor, without a copy where it is contiguous already."""
    flat = hidden_TD.detach().contiguous().view(-1).view(torch.uint8)
    return flat.numpy().data


class HeadRunner:
    """The engine's view of the pipeline: a `runtime.engine.runner.StepRunner` over epochs.

    The engine works in the epoch that it adopted with `wait_ready` and is told by PipelineBroken
    when that one ended, however many newer ones have come up since.
    """

    def __init__(self, template: PlanTemplate) -> None:
        self.depth = steps_in_flight(len(template.roles))
        self._plan_blocks = template.cache_blocks
        self._deadline_s = template.step_deadline_ms / 1000
        self._changed = threading.Condition()
        self._newest: Epoch | None = None
        self._adopted: Epoch | None = None

    def offer(self, epoch: Epoch) -> None:
        """A new epoch is up; one that has ended meanwhile must not hide a newer one."""
        with self._changed:
            if epoch.healthy:
                self._newest = epoch
                self._changed.notify_all()

    @property
    def cache_blocks(self) -> int:
        """Blocks that every stage has in the adopted epoch; the plan's before the first."""
        return self._plan_blocks if self._adopted is None else self._adopted.cache_blocks

    def submit(
        self, header: StepHeader, token_ids: list[int], admissions: Sequence[Admission]
    ) -> None:
        """Starts a step. Raises PipelineBroken when the adopted epoch ended."""
        epoch = self._adopted
        if epoch is None or not epoch.healthy:
            raise PipelineBroken("no healthy epoch")
        epoch.submit(header, token_ids, admissions)

    def result(self, timeout: float) -> StepResult:
        """The result of the oldest step in flight, within the step deadline at most."""
        if self._adopted is None:
            raise PipelineBroken("no epoch adopted")
        return self._adopted.result(min(timeout, self._deadline_s))

    def wait_ready(self, timeout: float) -> bool:
        """Adopts the newest healthy epoch; False when none came up in time."""
        with self._changed:
            ready = self._changed.wait_for(
                lambda: (
                    self._newest is not None
                    and self._newest is not self._adopted
                    and self._newest.healthy
                ),
                timeout,
            )
            if ready:
                self._adopted = self._newest
            return ready
