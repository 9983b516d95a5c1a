"""The engine: turns requests into steps and results into text, in a thread of its own."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import dataclass

from runtime.engine.errors import (
    ContextLengthExceeded,
    InvalidRequest,
    ModelFailed,
    Overloaded,
    RequestError,
    Unavailable,
)
from runtime.engine.request import Chunk, Request, Sequence, Status
from runtime.engine.runner import PipelineBroken, Recovery, StepRunner
from runtime.engine.scheduler import EngineLimits, Scheduler, Step
from runtime.engine.stream import Outbox, Post, TokenStream
from runtime.engine.text import OutputText, TokenDecoder
from security.channel.frame import StepResult, TokenLogprobs

__all__ = ["Engine", "EngineStatus"]

_log = logging.getLogger(__name__)

_IDLE_S = 1.0


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """A look at the engine from another thread: numbers of a moment.

    Attributes:
        ready: the pipeline is up and requests are taken.
        failure: why the engine's thread ended by itself; empty while it has not. The process must
            then be replaced.
    """

    ready: bool
    running: int
    waiting: int
    free_blocks: int
    total_blocks: int
    failure: str = ""


class Engine:
    """Serves sequences over a `StepRunner`.

    `submit` and the streams that it returns are used from one or more asyncio loops; everything
    else happens in the engine's thread.

    Args:
        limits: from the plan template.
        runner: the pipeline; only the engine's thread calls it.
        decoder: turns token ids into text; called in the engine's thread.
        step_deadline_s: longest wait for the oldest step in flight.
        recovery: what happens when the pipeline breaks.
        clock: seconds on a clock that never goes back; steps are timed by it.
    """

    def __init__(
        self,
        limits: EngineLimits,
        runner: StepRunner,
        decoder: TokenDecoder,
        step_deadline_s: float,
        recovery: Recovery | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limits = limits
        self._runner = runner
        self._decoder = decoder
        self._step_deadline_s = step_deadline_s
        self._recovery = recovery or Recovery()
        self._scheduler = Scheduler(limits, runner.depth, self._recovery)
        self._clock = clock
        # With the time at which each was handed to the runner.
        self._in_flight: deque[tuple[Step, float]] = deque()
        self._last_result = clock()
        # Tokens of the newest result, whose text nobody knows yet.
        self._untold: list[tuple[Sequence, int, TokenLogprobs | None]] = []
        # What the cache of the newest epoch holds; read by submitters.
        self._cache_blocks = limits.cache_blocks
        self._posts: dict[Sequence, Post] = {}
        self._outbox = Outbox()
        self._up = False
        self._outage_since: float | None = None
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._stopping = False
        # Guards what submitters read and write: the number of sequences and whether any are taken.
        self._lock = threading.Lock()
        self._live: Counter[bytes] = Counter()
        self._arrivals = 0
        self._closed: Unavailable | None = None
        self._failure = ""

    def start(self) -> None:
        """Starts the thread; the recovery deadline counts for the first epoch, too."""
        self._outage_since = time.monotonic()
        self._thread.start()

    def stop(self, timeout_s: float = 10.0) -> None:
        """Ends the thread; every open request gets a retryable error.

        Close the runner first: the thread may be waiting for a step.
        """
        self._stopping = True
        self._commands.put(_nothing)
        if self._thread.ident is not None:
            self._thread.join(timeout_s)

    def status(self) -> EngineStatus:
        """The numbers of this moment; any thread may ask."""
        scheduler = self._scheduler
        return EngineStatus(
            ready=self._up and self._closed is None,
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            free_blocks=scheduler.blocks.free,
            total_blocks=scheduler.blocks.blocks,
            failure=self._failure,
        )

    @property
    def max_length(self) -> int:
        """Prompt and output tokens of one sequence: what context and cache both hold now."""
        return min(self.limits.max_context, self._cache_blocks * self.limits.block_size)

    def check(self, prompt_tokens: int, max_tokens: int | None) -> int:
        """The output tokens that a request gets: what it asks for, or all that is left.

        Raises:
            ContextLengthExceeded: the prompt alone, or with what was asked for, is too long.
            InvalidRequest: no prompt, or no output.
        """
        limit = self.max_length
        if prompt_tokens < 1:
            raise InvalidRequest("The prompt has no tokens; expected at least one.", "prompt")
        if prompt_tokens >= limit:
            raise ContextLengthExceeded(
                f"This model's maximum context length is {limit} tokens. However, your request has "
                f"{prompt_tokens} input tokens. Please reduce the length of the input."
            )
        left = limit - prompt_tokens
        if max_tokens is None:
            return left
        if max_tokens < 1:
            raise InvalidRequest(
                f"max_tokens: expected at least 1, found {max_tokens}.", "max_tokens"
            )
        if max_tokens > left:
            raise ContextLengthExceeded(
                f"This model's maximum context length is {limit} tokens. However, you requested "
                f"{prompt_tokens + max_tokens} tokens ({prompt_tokens} in the input, {max_tokens} "
                "in the completion). Please reduce the length of the input or the completion."
            )
        return max_tokens

    def check_outputs(self, outputs: int) -> None:
        """Refuses a request for more outputs than one tenant may ever have at once.

        Raises:
            InvalidRequest: with the number that is possible.
        """
        share = self.limits.max_live_of_tenant
        if outputs > share:
            raise InvalidRequest(
                f"The request asks for {outputs} outputs; expected at most {share} at once."
            )

    def submit(
        self, requests: Many[Request], post: Post | None = None, tenant: bytes = b""
    ) -> list[TokenStream]:
        """Takes all of the requests or none; one stream each.

        Args:
            requests: what is asked for.
            post: runs a function where the streams are read; by default the running loop.
            tenant: who asks. Tenants take turns, and share no cached prefixes.

        Raises:
            Overloaded: no room in the queue, or no more for this tenant.
            Unavailable: the pipeline is down for too long, or the engine is stopping.
            InvalidRequest: a request that this engine can never serve.
        """
        self.check_outputs(len(requests))
        for request in requests:
            prompt = len(request.prompt)
            self.check(prompt, request.least_length - prompt)
        room, share = self.limits.max_live, self.limits.max_live_of_tenant
        receiver = post or asyncio.get_running_loop().call_soon_threadsafe
        with self._lock:
            if self._closed is not None:
                raise Unavailable(self._closed.message, code=self._closed.code)
            live = self._live.total()
            if live + len(requests) > room:
                raise Overloaded(
                    f"The queue is full: {live} outputs are being served or waiting, at most "
                    f"{room} may. Retry later."
                )
            if self._live[tenant] + len(requests) > share:
                raise Overloaded(
                    f"Your share of the queue is full: {self._live[tenant]} outputs of yours are "
                    f"being served or waiting, at most {share} may. Retry later."
                )
            self._live[tenant] += len(requests)
            return [self._enqueue(request, receiver, tenant) for request in requests]

    def _enqueue(self, request: Request, post: Post, tenant: bytes) -> TokenStream:
        stream = TokenStream(lambda: self._commands.put(lambda: self._cancel(sequence)))
        text = OutputText(self._decoder, request.stop, request.include_stop)
        sequence = Sequence(self._arrivals, request, text, stream.put, tenant)
        self._arrivals += 1
        self._commands.put(lambda: self._add(sequence, post))
        return stream

    # Everything below runs in the engine's thread.

    def _run(self) -> None:
        try:
            while not self._stopping:
                self.turn()
            self._close(Unavailable("The server is stopping. Retry later."))
        except Exception as error:
            # A fault of ours. Its text may hold a client's data and stays out of the log.
            where = "".join(traceback.format_tb(error.__traceback__))
            self._failure = f"engine thread ended by {type(error).__name__}"
            _log.critical("%s at\n%s", self._failure, where)
            self._close(Unavailable("The server failed internally. Retry later.", code="internal"))

    def turn(self) -> None:
        """One turn of the main loop. For the engine's thread, and for tests that have none."""
        self._take_commands()
        if self._up:
            self._step()
        else:
            self._recover()
        self._outbox.flush()

    def _step(self) -> None:
        """Fills the pipeline and takes one result.

        What became text in the result before is told meanwhile: no stage waits for that.
        """
        try:
            while len(self._in_flight) < self._runner.depth and (step := self._schedule()):
                self._runner.submit(step.header, step.token_ids, step.admissions)
            self._tell()
            self._outbox.flush()
            if self._in_flight:
                result = self._runner.result(self._step_deadline_s)
                step, submitted = self._in_flight.popleft()
                self._time(step, submitted)
                self._postprocess(step, result)
        except PipelineBroken as broken:
            self._lose(broken)

    def _take_commands(self) -> None:
        """Arrivals and cancellations; waits for some when there is nothing else to do."""
        scheduler = self._scheduler
        work = (self._in_flight, self._untold, scheduler.waiting, scheduler.running)
        busy = not self._up or any(work)
        try:
            if not busy:
                self._outage_since = None
                self._commands.get(timeout=_IDLE_S)()
            while True:
                self._commands.get_nowait()()
        except queue.Empty:
            pass

    def _schedule(self) -> Step | None:
        step = self._scheduler.schedule(len(self._in_flight))
        if step is not None:
            self._in_flight.append((step, self._clock()))
        return step

    def _time(self, step: Step, submitted: float) -> None:
        """Tells the scheduler for how long the step kept the stages: since the one before it."""
        now = self._clock()
        seconds = now - max(submitted, self._last_result)
        self._last_result = now
        self._scheduler.pace.record(step.decodes, step.prompt_tokens, seconds)

    def _postprocess(self, step: Step, result: StepResult) -> None:
        assert result.step == step.header.step, "the runner answers in order (check_result)"
        self._outage_since = None
        self._scheduler.complete(step)
        sampled = [part for part in step.parts if part.sampled]
        logprobs = result.logprobs or (None,) * len(result.tokens)
        for part, token, entry in zip(sampled, result.tokens, logprobs, strict=True):
            # Of a sequence that was cancelled meanwhile nobody wants the token.
            if part.current:
                self._untold.append((part.sequence, token, entry))
                if part.sequence.append(token):
                    self._scheduler.end(part.sequence)

    def _tell(self) -> None:
        """Turns the tokens of the newest result into text; a stop string in it ends an output.

        Such an output may be in a step already, which then computes that part for nothing.
        """
        untold, self._untold = self._untold, []
        for sequence, token, entry in untold:
            # One that was cancelled meanwhile has no reader.
            if sequence in self._posts:
                self._deliver(sequence, sequence.tell(token, entry))

    def _deliver(self, sequence: Sequence, chunk: Chunk | None) -> None:
        if chunk is not None:
            self._outbox.put(self._posts[sequence], sequence.sink, chunk)
            if chunk.finish is not None:
                self._end(sequence)

    def _add(self, sequence: Sequence, post: Post) -> None:
        self._posts[sequence] = post
        self._scheduler.add(sequence)
        self._fit(sequence)

    def _cancel(self, sequence: Sequence) -> None:
        if sequence in self._posts:
            self._end(sequence)

    def _end(self, sequence: Sequence) -> None:
        if sequence.status is not Status.ENDED:
            self._scheduler.end(sequence)
        del self._posts[sequence]
        with self._lock:
            self._live[sequence.tenant] -= 1
            if not self._live[sequence.tenant]:
                del self._live[sequence.tenant]

    def _fit(self, sequence: Sequence) -> None:
        """Shortens or ends what fitted the cache when it was asked for, and never will again."""
        request = sequence.request
        if request.least_length > self.max_length:
            self._fail(
                sequence,
                ContextLengthExceeded(
                    f"The server recovered with less memory: its maximum context length is now "
                    f"{self.max_length} tokens, and this request needs {request.least_length}. "
                    "Please reduce the length of the input or the completion."
                ),
            )
            return
        self._deliver(sequence, sequence.shorten(self.max_length - len(request.prompt)))

    def _fail(self, sequence: Sequence, error: RequestError) -> None:
        self._outbox.put(self._posts[sequence], sequence.sink, error)
        self._end(sequence)

    def _lose(self, broken: PipelineBroken) -> None:
        """The pipeline broke: back to the queue with everything, outputs kept."""
        _log.warning("pipeline broken: %s", broken)
        self._up = False
        self._tell()
        # In order and each once: a prompt may be in several steps.
        suspects = dict.fromkeys(
            part.sequence for step, _ in self._in_flight for part in step.parts if part.current
        )
        self._in_flight.clear()
        self._scheduler.reset()
        for sequence in suspects:
            sequence.breaks += 1
            if sequence.breaks >= self._recovery.give_up_after:
                self._fail(
                    sequence,
                    ModelFailed(
                        f"The pipeline broke {sequence.breaks} times in a row while computing this "
                        "request; it was given up."
                    ),
                )
        self._give_up_if_late()

    def _recover(self) -> None:
        """Waits a little for an epoch; gives requests up after the recovery deadline."""
        self._up = self._runner.wait_ready(self._recovery.poll_s)
        if self._up:
            self._cache_blocks = min(self.limits.cache_blocks, self._runner.cache_blocks)
            self._scheduler.resize(self._cache_blocks)
            for sequence in list(self._posts):
                self._fit(sequence)
            with self._lock:
                self._closed = None
            _log.info("pipeline up with %d cache blocks", self._cache_blocks)
            return
        self._give_up_if_late()

    def _give_up_if_late(self) -> None:
        if self._outage_since is None:
            self._outage_since = time.monotonic()
        if time.monotonic() - self._outage_since > self._recovery.deadline_s:
            self._close(
                Unavailable(
                    "The pipeline has been down for more than "
                    f"{self._recovery.deadline_s:g} s. Retry later."
                )
            )

    def _close(self, reason: Unavailable) -> None:
        """Refuses new requests and fails the open ones."""
        with self._lock:
            self._closed = reason
        # Nothing enters the queue of commands any more; what is in it is still served.
        while not self._commands.empty():
            self._commands.get_nowait()()
        self._tell()
        self._in_flight.clear()
        self._scheduler.reset()
        for sequence in list(self._posts):
            self._fail(sequence, reason)
        self._outbox.flush()


def _nothing() -> None:
    """Wakes the thread."""
