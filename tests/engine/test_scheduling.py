"""Random loads on engine and scheduler: what must hold whatever arrives, leaves or breaks."""

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from runtime.engine.engine import Engine
from runtime.engine.errors import ContextLengthExceeded
from runtime.engine.request import FinishReason, Request
from runtime.engine.scheduler import EngineLimits
from runtime.stage.border import RotaryBorder
from security.channel.admission import SamplingParameters
from tests.engine.fakes import GREEDY, Characters, FakeRunner, Reader, alone, run_here, settle
from tests.engine.test_engine import assert_nothing_held, make

TENANTS = (b"", b"a", b"b")
EVENTS = ["turn", "turn", "turn", "arrive", "cancel", "break", "outage", "shrink"]


@st.composite
def scenarios(draw, most_requests=10, most_events=60):
    block_size = draw(st.sampled_from([1, 2, 4, 8]))
    bounds = EngineLimits(
        max_sequences=draw(st.integers(1, 6)),
        max_step_tokens=draw(st.integers(1, 20)),
        max_context=draw(st.integers(8, 48)),
        block_size=block_size,
        cache_blocks=draw(st.integers(-(-8 // block_size), 20)),
        vocabulary=128,
        max_waiting=64,
        rotary_border=draw(
            st.none() | st.builds(RotaryBorder, st.integers(1, 40), recomputes=st.booleans())
        ),
    )
    # Few beginnings and few letters, so that prefixes meet.
    beginnings = draw(st.lists(st.lists(st.integers(32, 34), max_size=40), min_size=1, max_size=3))
    requests = []
    for _ in range(draw(st.integers(1, most_requests))):
        letters = draw(st.sampled_from(beginnings)) + draw(
            st.lists(st.integers(32, 126), min_size=1, max_size=8)
        )
        letters = letters[-(bounds.max_length - 1) :] if draw(st.booleans()) else letters
        prompt = letters[: bounds.max_length - 1]
        seed = draw(st.integers(0, 2**64 - 1))
        plain = SamplingParameters(0.7, 0.9, 5, seed)
        penalised = replace(plain, presence_penalty=0.5, logit_bias=((3, 1.0),))
        repeating = replace(plain, repetition_penalty=1.1, logprobs=2)
        sampling = draw(st.sampled_from([GREEDY, plain, penalised, repeating]))
        end = draw(st.sampled_from([frozenset(), frozenset(range(32, 44))]))
        most = draw(st.integers(1, bounds.max_length - len(prompt)))
        needed = draw(st.sampled_from([None, 1, most]))
        asked = Request(tuple(prompt), sampling, most, end, needed_tokens=needed)
        requests.append((asked, draw(st.sampled_from(TENANTS))))
    events = draw(
        st.lists(st.tuples(st.sampled_from(EVENTS), st.integers(0, 19)), max_size=most_events)
    )
    return bounds, draw(st.integers(1, 5)), requests, events


class Watch:
    """Sees every step that goes to the stages, and knows for whom and how blocks were computed."""

    def __init__(self, engine: Engine, runner: FakeRunner) -> None:
        self.engine = engine
        self.runner = runner
        self.admitted: dict[bytes, list[int]] = {}
        self._computed_for: dict[int, tuple[bytes, bool]] = {}
        self._submit, runner.submit = runner.submit, self.submit

    def submit(self, header, token_ids, admissions) -> None:
        step = self.engine._in_flight[-1][0]
        for part, entry in zip(step.parts, header.sequences, strict=True):
            tenant, arrival = part.sequence.tenant, part.sequence.arrival
            kind = tenant, part.sequence.long
            full = entry.start // self.engine.limits.block_size
            assert all(self._computed_for[b] == kind for b in entry.blocks[:full])
            for block in entry.blocks[full:]:
                self._computed_for[block] = kind
            first = self.admitted.setdefault(tenant, [])
            if arrival not in first:
                first.append(arrival)
        assert step.prompt_tokens + step.decodes == header.tokens
        decoding = [p.sequence for p in list(step.parts)[: step.decodes]]
        for earlier, _ in list(self.engine._in_flight)[:-1]:
            for part in earlier.parts:
                assert not (part.current and part.sampled and part.sequence in decoding)
        self._submit(header, token_ids, admissions)

    def check(self) -> None:
        """Holders are exactly the tables of what runs; everything else is free."""
        scheduler = self.engine._scheduler
        blocks = scheduler.blocks
        holders = [0] * blocks.blocks
        for sequence in scheduler.running:
            assert len(set(sequence.blocks)) == len(sequence.blocks)
            for block in sequence.blocks:
                holders[block] += 1
        assert holders == blocks._holders
        assert blocks.free == holders.count(0)
        assert set(blocks._published.values()) == {
            block for block, name in enumerate(blocks._names) if name is not None
        }
        assert sorted([*blocks._empty, *blocks._unused]) == [
            block for block, count in enumerate(holders) if count == 0
        ]
        assert scheduler.running == sorted(scheduler.running, key=lambda s: s.rank)
        assert scheduler.waiting == sorted(scheduler.waiting, key=lambda s: s.rank)
        slots = [s.slot for s in scheduler.running]
        assert sorted(slots + scheduler._slots) == list(range(self.engine.limits.max_running))


def drive(scenario) -> None:
    bounds, depth, requests, events = scenario
    engine, runner = make(bounds, depth, give_up_after=1000)
    watch = Watch(engine, runner)
    waiting = list(requests)
    readers: list[tuple[Request, Reader]] = []
    cancelled: set[int] = set()
    smallest = bounds.cache_blocks

    def arrive() -> None:
        asked, tenant = waiting.pop(0)
        if asked.least_length > engine.max_length:
            with pytest.raises(ContextLengthExceeded):
                engine.submit([asked], run_here, tenant)
        else:
            readers.append((asked, Reader(engine.submit([asked], run_here, tenant)[0])))

    arrive()
    for kind, number in events:
        if kind == "turn":
            # With nothing to do a turn would wait for arrivals.
            if engine._posts or not engine._commands.empty():
                engine.turn()
        elif kind == "arrive" and waiting:
            arrive()
        elif kind == "cancel" and number < len(readers):
            readers[number][1].stream.cancel()
            cancelled.add(number)
        elif kind == "break":
            runner.break_next()
        elif kind == "outage":
            runner.may_come_up = not runner.may_come_up
        elif kind == "shrink":
            runner.next_cache_blocks = min(bounds.cache_blocks, 1 + number)
            smallest = min(smallest, runner.next_cache_blocks)
            runner.break_next()
        for _, reader in readers:
            reader.drain()
        watch.check()
    runner.may_come_up = True
    while waiting:
        arrive()
    settle(engine, [r for i, (_, r) in enumerate(readers) if i not in cancelled])
    while engine._scheduler.running or engine._scheduler.waiting or not engine._commands.empty():
        engine.turn()
    watch.check()
    for arrivals in watch.admitted.values():
        assert arrivals == sorted(arrivals), "first come, first served within a tenant"
    for index, (asked, reader) in enumerate(readers):
        reader.drain()
        expected = alone(asked, bounds.rotary_border)
        shown = expected[:-1] if expected[-1] in asked.end_tokens else expected
        text = Characters().decode(shown)
        if index in cancelled:
            assert text.startswith(reader.text)
        elif isinstance(reader.error, ContextLengthExceeded):
            assert text.startswith(reader.text)
            assert asked.least_length > smallest * bounds.block_size
            assert f"needs {asked.least_length}." in str(reader.error)
        elif asked.needed_tokens == 1 and reader.chunks[-1].tokens < len(expected):
            # Shortened where a cache ended, not before.
            assert reader.chunks[-1].finish is FinishReason.LENGTH
            assert text.startswith(reader.text)
            length = len(asked.prompt) + reader.chunks[-1].tokens
            assert length >= smallest * bounds.block_size
        else:
            assert reader.text == text
            assert reader.chunks[-1].tokens == len(expected)
    assert_nothing_held(engine)


@settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
)
@given(scenarios())
def test_outputs_are_those_of_running_alone_and_nothing_leaks(scenario):
    drive(scenario)


@pytest.mark.slow
@settings(max_examples=5000, deadline=None, suppress_health_check=list(HealthCheck))
@given(scenarios(most_requests=20, most_events=200))
def test_the_same_for_longer(scenario):
    drive(scenario)
