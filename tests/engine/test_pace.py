"""Streams keep their pace while prompts are computed, and bursts do not suffer for it."""

import itertools
import statistics

import pytest

from runtime.engine.pace import LEAST_CHUNK, StepPace
from tests.engine.fakes import Reader, limits, run_here, settle
from tests.engine.test_engine import answer, make, request

WIDE = {
    "max_sequences": 32,
    "max_step_tokens": 512,
    "max_context": 4096,
    "block_size": 16,
    "cache_blocks": 2048,
}


class Timed:
    """Reads streams and notes when each token came, on the fake pipeline's clock."""

    def __init__(self, engine, runner) -> None:
        self.engine = engine
        self.runner = runner
        self.readers: list[Reader] = []
        self.times: list[list[float]] = []

    def submit(self, asked, tenant=b"") -> int:
        index, times = len(self.readers), []

        def post(deliver):
            deliver()
            times.append(self.runner.now)

        # With ids, every token is news.
        self.readers.append(Reader(self.engine.submit([asked], post, tenant)[0]))
        self.times.append(times)
        return index

    def turn(self, until) -> None:
        for _ in range(20_000):
            if until():
                return
            self.engine.turn()
            for reader in self.readers:
                reader.drain()
        raise AssertionError("it does not come to pass")

    def finish(self) -> None:
        self.turn(lambda: all(reader.ended for reader in self.readers))

    def intervals(self, index, after=0.0) -> list[float]:
        return [b - a for a, b in itertools.pairwise(self.times[index]) if b > after]


def ask(prompt, tokens):
    return request(prompt, tokens, show_ids=True)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_long_prompt_delays_no_running_stream_by_more_than_three_intervals(depth):
    engine, runner = make(limits(**WIDE), depth)
    timed = Timed(engine, runner)
    for number in range(8):
        timed.submit(ask(f"stream {number}", 200))
    timed.turn(lambda: min(map(len, timed.times)) >= 30)
    usual = statistics.median(timed.intervals(0)[-20:])
    arrived = runner.now
    long = timed.submit(ask("".join(chr(33 + i % 90) for i in range(2000)), 3))
    timed.finish()
    worst = max(max(timed.intervals(index, arrived)) for index in range(8))
    assert worst <= 3 * usual
    # And the prompt advances: nearly half of the machine is its own while it is computed.
    assert timed.times[long][0] - arrived <= 3 * 2000 * runner.row_s
    assert all(r.ended and r.error is None for r in timed.readers)


def test_many_prompts_at_once_are_computed_as_fast_as_without_streams():
    requests = [ask(f"{number:02}" + "x" * 126, 64) for number in range(32)]
    engine, runner = make(limits(**WIDE), 2)
    timed = Timed(engine, runner)
    for asked in requests:
        timed.submit(asked)
    timed.finish()
    firsts = sorted(times[0] for times in timed.times)
    rows = sum(len(asked.prompt) for asked in requests)
    # All prompts at the speed of the arithmetic would be rows * row_s; decodes ride along.
    assert firsts[-1] <= 1.5 * rows * runner.row_s
    assert statistics.mean(firsts) <= 0.75 * rows * runner.row_s
    # One step holds several prompts.
    assert max(sum(s.start == 0 for s in h.sequences) for h in runner.steps) >= 4


def test_a_burst_that_comes_in_while_its_first_has_a_token_is_still_a_burst():
    engine, runner = make(limits(**WIDE), 2)
    timed = Timed(engine, runner)
    timed.submit(ask("first" + "x" * 123, 64))
    timed.turn(lambda: len(timed.times[0]) == 1)
    begun = runner.now
    for number in range(31):
        timed.submit(ask(f"{number:02}" + "x" * 126, 64))
    timed.finish()
    firsts = sorted(times[0] - begun for times in timed.times)
    assert firsts[-1] <= 1.1 * 31 * 128 * runner.row_s


def test_without_streams_the_whole_budget_is_used_and_chunks_follow_without_waiting():
    engine, runner = make(limits(**WIDE), depth=3)
    timed = Timed(engine, runner)
    timed.submit(ask("y" * 2000, 2))
    engine.turn()  # the pipeline comes up
    engine.turn()
    in_flight = [step for step, _ in engine._in_flight]
    assert [step.header.tokens for step in in_flight] == [512, 512]
    assert [h.tokens for h in runner.steps] == [512, 512, 512]
    timed.finish()
    assert [h.tokens for h in runner.steps[:4]] == [512, 512, 512, 464]


def test_prompts_advance_where_steps_are_never_measured():
    engine, runner = make(limits(**WIDE), 1)
    runner.step_s = runner.row_s = 0.0
    readers = [Reader(engine.submit([request("a", 100)], run_here)[0])]
    for _ in range(5):
        engine.turn()
    readers.append(Reader(engine.submit([request("z" * 1000, 3)], run_here)[0]))
    settle(engine, readers)
    assert [r.text for r in readers] == [answer(request("a", 100)), answer(request("z" * 1000, 3))]


def test_a_single_stage_keeps_decodes_together_and_a_pipeline_takes_turns():
    for depth, together in ((2, 8), (3, 4), (5, 2)):
        engine, runner = make(limits(**WIDE), depth)
        readers = [
            Reader(s) for s in engine.submit([request(f"p{i}", 40) for i in range(8)], run_here)
        ]
        settle(engine, readers)
        decodes = [len(h.sequences) for h in runner.steps if all(s.count == 1 for s in h.sequences)]
        assert statistics.median(decodes) == together


def test_the_pace_is_that_of_the_last_steps_without_outliers():
    pace = StepPace()
    assert pace.prompt_tokens(8) is None
    for seconds in (0.05, 0.05, 9.0, 0.05, 0.05):
        pace.record(8, 0, seconds)
    assert pace.decode_s(8) == 0.05
    # Steps of 8 say nothing of steps of 32.
    assert pace.decode_s(32) is None and pace.prompt_tokens(32) is None
    pace.record(0, 100, 0.1)
    assert pace.prompt_tokens(8) == 40
    for _ in range(9):
        pace.record(8, 0, 0.025)
    assert pace.prompt_tokens(8) == 20
    pace.record(0, 100, 100.0)
    assert pace.prompt_tokens(8) == LEAST_CHUNK
    # One slow step is forgotten soon.
    for _ in range(3):
        pace.record(0, 100, 0.1)
    assert pace.prompt_tokens(8) == 20


@pytest.mark.parametrize("hidden", [0, 40, 100])
def test_rows_that_hide_behind_the_weights_are_not_taken_for_free(hidden):
    """A roofline: so many rows cost nothing. Chunks find the knee and never overshoot it much."""
    pace = StepPace()

    def step_s(rows: int) -> float:
        return 0.05 + 0.0005 * max(0, rows - hidden)

    pace.record(8, 0, 0.05)
    pace.record(8, 8, step_s(8))
    chunks = []
    for _ in range(40):
        chunk = pace.prompt_tokens(8)
        chunks.append(chunk)
        pace.record(8, chunk, step_s(chunk))
    assert max(step_s(chunk) for chunk in chunks) <= 3 * 0.05
    # In the end a step takes about twice as long as one without prompts, little less.
    assert statistics.mean(map(step_s, chunks[-12:])) >= 1.6 * 0.05


def test_decodes_are_measured_alone_now_and_then():
    pace = StepPace()
    wanted = [pace.wants_decodes_alone(8) for _ in range(130)]
    assert [index for index, alone in enumerate(wanted) if alone] == [0, 64, 128]
    assert pace.wants_decodes_alone(16)
    assert not pace.wants_decodes_alone(9)


def first_tokens(timed) -> list[int]:
    return sorted(range(len(timed.times)), key=lambda index: timed.times[index][0])


def test_a_tenant_with_many_requests_delays_another_by_a_turn():
    engine, runner = make(limits(max_sequences=1, cache_blocks=64), 1)
    timed = Timed(engine, runner)
    for number in range(20):
        timed.submit(ask(f"a{number}", 2), b"a")
    timed.turn(lambda: len(timed.times[2]) > 0)
    other = timed.submit(ask("b", 2), b"b")
    more = timed.submit(ask("b again", 2), b"b")
    timed.finish()
    order = first_tokens(timed)
    # The request that runs, the one of the same turn that came before, then the other tenant's.
    assert order.index(other) == 4
    assert order.index(more) == 6
    assert [index for index in order if index < 20] == list(range(20))


def test_new_tenants_without_end_starve_nobody():
    engine, runner = make(limits(max_sequences=1, cache_blocks=64), 1)
    timed = Timed(engine, runner)
    mine = [timed.submit(ask(f"m{number}", 2), b"mine") for number in range(4)]
    came = 0

    def another() -> bool:
        nonlocal came
        if engine.status().waiting < 10:
            timed.submit(ask(f"n{came}", 2), str(came).encode())
            came += 1
        return all(timed.readers[index].ended for index in mine)

    timed.turn(another)
    assert came < 60
