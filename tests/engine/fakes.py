"""A deterministic model over a paged cache that notices every mistake of the scheduler.

The fake stage stores token ids at the cache positions that the step names, and draws the next token
from a digest of what it reads back through the block table. A wrong block, a wrong position, a
block shared by two sequences, a skipped or repeated chunk: each changes the output.
"""

import dataclasses
import hashlib
import struct
from collections import deque
from collections.abc import Mapping, Sequence

from runtime.engine.engine import Engine
from runtime.engine.errors import RequestError
from runtime.engine.request import Chunk, Request
from runtime.engine.runner import PipelineBroken, check_result
from runtime.engine.scheduler import EngineLimits
from runtime.engine.stream import TokenStream
from runtime.stage.border import RotaryBorder
from security.channel.admission import Admission, SamplingParameters
from security.channel.frame import (
    FrameLimits,
    StepHeader,
    StepResult,
    TokenLogprobs,
    decode_step,
    encode_step,
)

VOCABULARY = 128
GREEDY = SamplingParameters(0.0, 1.0, 0, 0)


def next_token(
    tokens: list[int], sampling: SamplingParameters, long: list[bool] | None = None
) -> int:
    """The model: a token that depends on every row before it, long or not, and the sampling."""
    text = struct.pack(f"<{len(tokens)}I", *tokens)
    if long is not None and any(long):
        text += bytes(long)
    if sampling.temperature:
        text += repr(dataclasses.astuple(sampling)).encode()
    # Printable ASCII, so that fake text is easy to look at.
    return 32 + hashlib.sha256(text).digest()[0] % 94


def next_logprobs(token: int, wanted: int) -> TokenLogprobs:
    """The likeliest is the token itself, then come its successors, each less likely."""
    ranked = tuple(((token + i) % VOCABULARY, -1.0 - i - token / 1000) for i in range(wanted))
    return TokenLogprobs(-1.0 - token / 1000, ranked)


def long_rows(prompt: int, length: int, border: RotaryBorder | None) -> list[bool]:
    """Which rows of a sequence are long."""
    if border is None:
        return [False] * length
    if border.recomputes:
        return [length > border.positions] * length
    return [prompt > border.positions or row >= border.positions for row in range(length)]


def alone(request: Request, border: RotaryBorder | None = None) -> list[int]:
    """What the model answers to a request that has the machine to itself."""
    tokens = list(request.prompt)
    while len(tokens) < len(request.prompt) + request.max_tokens:
        long = long_rows(len(request.prompt), len(tokens), border)
        tokens.append(next_token(tokens, request.sampling, long))
        if tokens[-1] in request.end_tokens:
            break
    return tokens[len(request.prompt) :]


class FakeRunner:
    """A pipeline in this process, with a clock of its own.

    A step takes `step_s`, or as long as its rows where they need longer, `row_s` each. The clock
    moves when a result is waited for.
    """

    def __init__(self, limits: EngineLimits, depth: int = 3) -> None:
        self.limits = limits
        self.depth = depth
        self.cache_blocks = limits.cache_blocks
        self.frames = FrameLimits(
            max_sequences=limits.max_sequences,
            max_tokens=limits.max_step_tokens,
            max_context=limits.max_context,
            block_size=limits.block_size,
            cache_blocks=limits.cache_blocks,
            hidden_size=1,
            dtype="float32",
            vocabulary=limits.vocabulary,
        )
        self.step_s = 0.05
        self.row_s = 0.0025
        self.now = 0.0
        self._free_at = 0.0
        self.up = False
        self.may_come_up = True
        self.next_cache_blocks = limits.cache_blocks
        self.poison: int | None = None
        self.steps: list[StepHeader] = []
        self.submitted = 0
        self._flying: deque[tuple[StepHeader, StepResult, list[int | None], bool, float]] = deque()
        self._cache: dict[tuple[int, int], tuple[int, bool]] = {}
        self._break_next = False
        self.stop_at: int | None = None
        self.cache_blocks = limits.cache_blocks
        self._admitted: dict[int, tuple[Admission, list[int]]] = {}

    def clock(self) -> float:
        return self.now

    def break_next(self) -> None:
        self._break_next = True

    def submit(
        self, header: StepHeader, token_ids: list[int], admissions: Sequence[Admission]
    ) -> None:
        self._fail_if_broken()
        assert [a.slot for a in admissions] == list(header.admitted)
        for admission in admissions:
            self._admitted[admission.slot] = admission, list(admission.output)
        assert header.step == self.submitted
        self.submitted += 1
        self.steps.append(header)
        assert len(self._flying) < self.depth
        assert len(token_ids) == header.tokens <= self.limits.max_step_tokens
        # What a real stage would refuse, this one refuses, too.
        frame = encode_step(header, "float32", 1) + bytes(4 * header.tokens)
        assert decode_step(frame, self.frames)[0] == header
        assert all(b < self.cache_blocks for s in header.sequences for b in s.blocks)
        drawn: list[int] = []
        asked: list[int | None] = []
        at = 0
        size = self.limits.block_size
        for s in header.sequences:
            assert s.count > 0 and s.start + s.count <= self.limits.max_context
            assert len(s.blocks) * size >= s.start + s.count
            border = self.limits.rotary_border
            assert border or not s.long
            assert border is None or s.long or s.start + s.count <= border.positions
            for position in range(s.start, s.start + s.count):
                self._cache[s.blocks[position // size], position % size] = token_ids[at], s.long
                at += 1
            assert s.admitted == (s.slot in header.admitted)
            admission, output = self._admitted[s.slot]
            if s.sampled:
                cached = [
                    self._cache[s.blocks[p // size], p % size] for p in range(s.start + s.count)
                ]
                seen, long = [token for token, _ in cached], [long for _, long in cached]
                sampling = admission.parameters
                # The last stage's own count of what penalties depend on is the sequence's.
                if sampling.counts_output:
                    assert output == seen[admission.first :]
                if sampling.counts_prompt:
                    assert list(admission.prompt) == seen[: admission.first]
                drawn.append(next_token(seen, sampling, long))
                output.append(drawn[-1])
                asked.append(sampling.logprobs)
        poisoned = self.poison is not None and self.poison in token_ids
        logprobs = [
            None if wanted is None else next_logprobs(token, wanted)
            for token, wanted in zip(drawn, asked, strict=True)
        ]
        told = tuple(logprobs) if any(logprobs) else ()
        result = StepResult(header.step, tuple(drawn), told)
        self._free_at = max(self.now, self._free_at) + max(self.step_s, self.row_s * header.tokens)
        self._flying.append((header, result, asked, poisoned, self._free_at))

    def result(self, timeout: float) -> StepResult:
        self._fail_if_broken()
        header, result, asked, poisoned, ready_at = self._flying.popleft()
        self.now = max(self.now, ready_at)
        if header.step == self.stop_at:
            # Breaks, and stays down until it is told to come up.
            self.stop_at, self.may_come_up, self._break_next = None, False, True
        if self._break_next or poisoned:
            self._break_next = False
            self.up = False
            self._fail_if_broken()
        check_result(header, result, self.limits.vocabulary, asked)
        return result

    def wait_ready(self, timeout: float) -> bool:
        if not self.up and self.may_come_up:
            self.up = True
            self.cache_blocks = self.next_cache_blocks
            self.submitted = 0
            self._flying.clear()
            self._cache.clear()
            self._admitted.clear()
        return self.up

    def _fail_if_broken(self) -> None:
        if not self.up:
            self._flying.clear()
            self._cache.clear()
            self._admitted.clear()
            raise PipelineBroken("fake")


class Characters:
    """A tokenizer whose tokens are characters; 0 to 31 are special."""

    vocabulary = VOCABULARY

    def encode(self, text: str, max_tokens: int, special_tokens: bool) -> list[int]:
        return ([1] if special_tokens else []) + [ord(c) % VOCABULARY for c in text]

    def decode(self, token_ids: list[int]) -> str:
        return "".join(chr(token) for token in token_ids if token >= 32)

    def has_text(self, token: int) -> bool:
        return token >= 32

    def token_bytes(self, token: int) -> bytes:
        return b"<%d>" % token if token < 32 else bytes([token])

    def render(
        self, messages: list[dict[str, object]], arguments: Mapping[str, object] | None = None
    ) -> str:
        return "".join(f"<{m['role']}>{m['content']}" for m in messages) + "<assistant>"


def limits(**changes: object) -> EngineLimits:
    values = {
        "max_sequences": 8,
        "max_step_tokens": 16,
        "max_context": 64,
        "block_size": 4,
        "cache_blocks": 16,
        "vocabulary": VOCABULARY,
        "max_waiting": 100,
    }
    return EngineLimits(**(values | changes))


class Reader:
    """Reads a stream without a loop."""

    def __init__(self, stream: TokenStream) -> None:
        self.stream = stream
        self.chunks: list[Chunk] = []
        self.error: Exception | None = None

    def drain(self) -> None:
        try:
            while (chunk := self.stream.take()) is not None:
                self.chunks.append(chunk)
        except RequestError as error:
            self.error = error

    @property
    def text(self) -> str:
        return "".join(chunk.text for chunk in self.chunks)

    @property
    def ended(self) -> bool:
        return self.error is not None or bool(self.chunks and self.chunks[-1].finish)


def run_here(deliver):
    deliver()


def settle(engine: Engine, readers: list[Reader], turns: int = 5000) -> None:
    """Runs the engine in this thread until all readers have their ends."""
    for _ in range(turns):
        if all(reader.ended for reader in readers):
            return
        engine.turn()
        for reader in readers:
            reader.drain()
    raise AssertionError("the engine makes no progress")
