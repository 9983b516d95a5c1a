"""A request for one output, and the sequence of tokens that serves it.

What a client wrote or reads is in no `repr`: asyncio logs the results of tasks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

from runtime.engine.errors import RequestError
from runtime.engine.text import OutputText
from security.channel.admission import Admission, SamplingParameters
from security.channel.frame import TokenLogprobs

__all__ = ["Chunk", "Event", "FinishReason", "Request", "Sequence", "Status", "TokenScore"]


class FinishReason(StrEnum):
    """Why an output ended, in OpenAI's words."""

    STOP = "stop"
    LENGTH = "length"


class Status(StrEnum):
    """Where a sequence is in its life."""

    WAITING = "waiting"
    RUNNING = "running"
    ENDED = "ended"


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked for: one output for one prompt.

    Attributes:
        prompt: token ids, at least one.
        sampling: how tokens are drawn; the seed is already chosen.
        max_tokens: most tokens of output, at least 1.
        end_tokens: ids that end the output; counted, not shown.
        stop: strings that end the output; not shown, unless `include_stop`.
        include_stop: whether the stop string that ends the output is its last text.
        show_ids: whether the news of the output holds token ids, too.
        needed_tokens: tokens of output that there must be room for; None for all of `max_tokens`.
            Fewer where the client left the length to the server: then the output may end earlier
            than planned, where the cache becomes smaller.
    """

    prompt: tuple[int, ...] = field(repr=False)
    sampling: SamplingParameters = field(repr=False)
    max_tokens: int
    end_tokens: frozenset[int] = field(default=frozenset(), repr=False)
    stop: tuple[str, ...] = field(default=(), repr=False)
    include_stop: bool = False
    show_ids: bool = False
    needed_tokens: int | None = None

    @property
    def least_length(self) -> int:
        """Positions that a cache must have for it."""
        needed = self.max_tokens if self.needed_tokens is None else self.needed_tokens
        return len(self.prompt) + needed


@dataclass(frozen=True, slots=True, repr=False)
class TokenScore:
    """A token of visible text, where that begins in the output's text, and its logprobs."""

    token: int
    offset: int
    logprobs: TokenLogprobs


@dataclass(frozen=True, slots=True)
class Chunk:
    """News of an output: text that became visible, output tokens so far, and whether it ended.

    `ids` are the tokens since the last chunk, end tokens included, where they were asked for.
    `scores` are, where they were asked for, of the tokens whose text has become visible since: an
    end token has none, nor have tokens behind the beginning of a stop string that is not shown.
    """

    text: str = field(repr=False)
    tokens: int
    finish: FinishReason | None = None
    ids: tuple[int, ...] = field(default=(), repr=False)
    scores: tuple[TokenScore, ...] = field(default=(), repr=False)

    def followed_by(self, later: Chunk) -> Chunk:
        """Both in one."""
        return Chunk(
            self.text + later.text,
            later.tokens,
            later.finish,
            self.ids + later.ids,
            self.scores + later.scores,
        )


Event = Chunk | RequestError


class Sequence:
    """The tokens of one request and what of them the stages hold. Belongs to the engine's thread.

    Attributes:
        arrival: number that orders sequences first come, first served.
        tenant: who shares cached prefixes and turns with it.
        rank: its place among all sequences, given once by the scheduler; the lowest comes first.
        output: tokens produced; only ever grows.
        max_tokens: of output, as asked for or as the cache leaves room for.
        computed: positions whose keys and values are in the cache, the steps in flight excepted.
        planned: positions that will be there when the steps in flight have come back.
        blocks: cache blocks held, in order of position.
        names: names of its first full blocks (see `PrefixNames`), as far as they were needed.
        long: whether all its rows are long (see `RotaryBorder`), as of when it entered the queue.
        published: first blocks that are read only: found, or filled and offered to others.
        slot: name in every stage while running.
        admitted: whether the last stage knows of it under that slot.
        run: counts the times it was put on the stages or taken off; a step of an older run is void.
        in_flight: steps of this run in flight; several for a prompt, never more than one decode.
        settled: newest arrival in the engine when it had some tokens; None before.
        breaks: breaks of the pipeline with this sequence in flight since its last token.
    """

    def __init__(
        self,
        arrival: int,
        request: Request,
        text: OutputText,
        sink: Callable[[Event], None],
        tenant: bytes = b"",
    ) -> None:
        self.arrival = arrival
        self.request = request
        self.sink = sink
        self.tenant = tenant
        self.rank: tuple[int, int] | None = None
        self.output: list[int] = []
        self.max_tokens = request.max_tokens
        self.computed = 0
        self.planned = 0
        self.blocks: list[int] = []
        self.names: list[bytes] = []
        self.long = False
        self.published = 0
        self.slot: int | None = None
        self.admitted = False
        self.status = Status.WAITING
        self.run = 0
        self.in_flight = 0
        self.settled: int | None = None
        self.breaks = 0
        self._text = text
        self._scores: list[TokenScore] = []

    @property
    def length(self) -> int:
        """Tokens known: prompt and output."""
        return len(self.request.prompt) + len(self.output)

    @property
    def remaining(self) -> int:
        """Positions that no step computes yet and that the next token needs."""
        return self.length - self.planned

    @property
    def decoding(self) -> bool:
        """Whether one position is left, the token drawn last, perhaps in a step already."""
        return self.computed > 0 and self.length - self.computed == 1

    def tokens(self, start: int, count: int) -> list[int]:
        """Token ids at positions `[start, start + count)`."""
        prompt = self.request.prompt
        from_prompt = list(prompt[start : start + count])
        begin = max(0, start - len(prompt))
        return from_prompt + self.output[begin : begin + count - len(from_prompt)]

    def admission(self) -> Admission:
        """What the last stage must know, as of now, to draw the tokens to come."""
        assert self.slot is not None, "a running sequence has a slot"
        wanted = self.request.sampling
        return Admission(
            slot=self.slot,
            parameters=wanted,
            first=len(self.request.prompt),
            prompt=self.request.prompt if wanted.counts_prompt else (),
            output=tuple(self.output) if wanted.counts_output else (),
        )

    def append(self, token: int) -> bool:
        """Takes the next token; returns whether it is the last, as far as tokens say."""
        self.output.append(token)
        self.breaks = 0
        return token in self.request.end_tokens or len(self.output) >= self.max_tokens

    def tell(self, token: int, logprobs: TokenLogprobs | None = None) -> Chunk | None:
        """The news for the client, if there is any, of the token appended last.

        Where its text completes a stop string, the output ends with it.
        """
        ids = (token,) if self.request.show_ids else ()
        ended = token in self.request.end_tokens
        text = ""
        if not ended:
            if logprobs is not None:
                self._scores.append(TokenScore(token, self._text.produced, logprobs))
            text = self._text.push(token)
        return self._news(text, ids, ended)

    def shorten(self, max_tokens: int) -> Chunk | None:
        """Ends the output after so many tokens; at once, with the news, where it has them."""
        self.max_tokens = min(self.max_tokens, max_tokens)
        return self._news("", (), False)

    def _news(self, text: str, ids: tuple[int, ...], ended: bool) -> Chunk | None:
        finish: FinishReason | None = None
        if ended or self._text.stopped or len(self.output) >= self.max_tokens:
            if not self._text.stopped:
                text += self._text.finish()
            stopped = ended or self._text.stopped
            finish = FinishReason.STOP if stopped else FinishReason.LENGTH
        scores = self._visible_scores(complete=finish is not None and not self._text.stopped)
        if finish is None and not (text or ids or scores):
            return None
        return Chunk(text, len(self.output), finish, ids, scores)

    def _visible_scores(self, *, complete: bool) -> tuple[TokenScore, ...]:
        """Those not told yet whose text has begun to show; all where nothing follows."""
        shown = self._text.shown
        count = sum(complete or score.offset < shown for score in self._scores)
        visible, self._scores = self._scores[:count], self._scores[count:]
        return tuple(visible)
