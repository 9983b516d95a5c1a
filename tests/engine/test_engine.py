import threading
import time
from dataclasses import replace

import pytest

from runtime.engine.engine import Engine
from runtime.engine.errors import (
    ContextLengthExceeded,
    InvalidRequest,
    ModelFailed,
    Overloaded,
    Unavailable,
)
from runtime.engine.request import FinishReason, Request
from runtime.engine.runner import PipelineBroken, Recovery, check_result
from runtime.engine.scheduler import EngineLimits
from runtime.stage.border import RotaryBorder
from security.channel.frame import SequenceStep, StepHeader, StepResult, TokenLogprobs
from tests.engine.fakes import (
    GREEDY,
    Characters,
    FakeRunner,
    Reader,
    alone,
    limits,
    next_token,
    run_here,
    settle,
)


def make(bounds: EngineLimits, depth: int = 3, **recovery: float) -> tuple[Engine, FakeRunner]:
    runner = FakeRunner(bounds, depth)
    rules = Recovery(**({"poll_s": 0.001} | recovery))
    engine = Engine(bounds, runner, Characters(), 5.0, rules, clock=runner.clock)
    return engine, runner


def request(prompt: str = "hello", tokens: int = 8, **fields) -> Request:
    sampling = fields.pop("sampling", GREEDY)
    return Request(tuple(map(ord, prompt)), sampling, tokens, **fields)


def answer(asked: Request) -> str:
    return Characters().decode(alone(asked))


def assert_nothing_held(engine: Engine) -> None:
    status = engine.status()
    assert (status.running, status.waiting) == (0, 0)
    assert status.free_blocks == status.total_blocks
    assert not engine._live and not engine._posts and not engine._scheduler._tenants
    assert len(engine._scheduler._slots) == engine.limits.max_running


def test_a_long_prompt_is_computed_in_chunks_while_others_decode():
    engine, runner = make(limits(max_step_tokens=8))
    short, long = request("ab", 20), request("x" * 40, 4)
    readers = [Reader(engine.submit([short], post=run_here)[0])]
    for _ in range(4):
        engine.turn()
    readers.append(Reader(engine.submit([long], post=run_here)[0]))
    settle(engine, readers)
    assert [r.text for r in readers] == [answer(short), answer(long)]
    chunks = [s.count for h in runner.steps for s in h.sequences if s.count > 1 or s.start == 0]
    assert max(chunks) <= 8 and len(chunks) >= 6


def rows_of(runner: FakeRunner, since: int = 0) -> list[tuple[int, int, bool, bool]]:
    """Start, count, long and admitted of each sequence in each step."""
    return [
        (s.start, s.count, s.long, s.admitted)
        for header in runner.steps[since:]
        for s in header.sequences
    ]


def test_an_output_that_outgrows_a_longrope_border_is_computed_anew():
    border = RotaryBorder(12, recomputes=True)
    engine, runner = make(limits(rotary_border=border, max_step_tokens=8))
    asked = request("0123456789", 5)
    readers = [Reader(engine.submit([asked], run_here)[0])]
    settle(engine, readers)
    assert readers[0].text == Characters().decode(alone(asked, border)) != answer(asked)
    assert rows_of(runner) == [
        (0, 8, False, True),
        (8, 2, False, False),
        (10, 1, False, False),
        # The token at position 11 was drawn from a row within the border, the next one is not.
        (11, 1, False, False),
        (0, 8, True, True),
        (8, 5, True, False),
        (13, 1, True, False),
    ]
    assert_nothing_held(engine)


def test_an_output_that_ends_at_the_border_is_not_computed_anew():
    border = RotaryBorder(12, recomputes=True)
    engine, runner = make(limits(rotary_border=border))
    readers = [Reader(engine.submit([request("0123456789", 3)], run_here)[0])]
    settle(engine, readers)
    assert rows_of(runner) == [(0, 10, False, True), (10, 1, False, False), (11, 1, False, False)]


def test_rows_past_a_longrope_border_are_long_where_nothing_is_computed_anew():
    border = RotaryBorder(12, recomputes=False)
    engine, runner = make(limits(rotary_border=border))
    asked = request("0123456789", 6)
    readers = [Reader(engine.submit([asked], run_here)[0])]
    while len(runner.steps) < 5:
        engine.turn()
    assert rows_of(runner) == [
        (0, 10, False, True),
        (10, 1, False, False),
        (11, 1, False, False),
        (12, 1, True, False),
        (13, 1, True, False),
    ]
    # After a break they are again: no step has rows of both kinds of one sequence.
    before = len(runner.steps)
    runner.break_next()
    settle(engine, readers)
    assert readers[0].text == Characters().decode(alone(asked, border)) != answer(asked)
    # The step that broke comes first.
    assert rows_of(runner, before) == [
        (14, 1, True, False),
        (0, 12, False, True),
        (12, 3, True, False),
    ]


@pytest.mark.parametrize("recomputes", [True, False])
def test_a_prompt_past_a_longrope_border_is_long_from_its_first_chunk_on(recomputes):
    border = RotaryBorder(12, recomputes)
    engine, runner = make(limits(rotary_border=border, max_step_tokens=8))
    asked = request("0123456789abc", 2)
    readers = [Reader(engine.submit([asked], run_here)[0])]
    settle(engine, readers)
    assert readers[0].text == Characters().decode(alone(asked, border))
    assert rows_of(runner) == [(0, 8, True, True), (8, 5, True, False), (13, 1, True, False)]


def test_what_outgrows_the_border_waits_for_room_and_gets_it():
    border = RotaryBorder(8, recomputes=True)
    # Both fit until the first has outgrown the border.
    bounds = limits(rotary_border=border, cache_blocks=8, block_size=2, max_context=16)
    engine, _ = make(bounds)
    requests = [request("0123456", 8), request("abcde", 3), request("fghij", 9)]
    readers = [Reader(s) for s in engine.submit(requests, run_here)]
    settle(engine, readers)
    for asked, reader in zip(requests, readers, strict=True):
        assert reader.text == Characters().decode(alone(asked, border))
    assert_nothing_held(engine)


def test_groups_of_decoding_sequences_take_turns():
    engine, runner = make(limits(max_sequences=8, cache_blocks=64), depth=3)
    requests = [request(f"p{i}", 20) for i in range(8)]
    readers = [Reader(s) for s in engine.submit(requests, post=run_here)]
    settle(engine, readers)
    decodes = [len(h.sequences) for h in runner.steps if all(s.count == 1 for s in h.sequences)]
    # Two stages (depth 3): halves take turns instead of one step with everybody.
    assert sorted(decodes)[len(decodes) // 2] == 4


def test_first_come_first_served():
    engine, runner = make(limits(max_sequences=1))
    requests = [request(f"{i}", 3) for i in range(5)]
    readers = [Reader(s) for s in engine.submit(requests, post=run_here)]
    settle(engine, readers)
    firsts = [s.start for h in runner.steps for s in h.sequences]
    assert firsts == [0, 1, 2] * 5
    assert [r.text for r in readers] == [answer(r) for r in requests]


def test_preempted_sequences_are_computed_again():
    bounds = limits(cache_blocks=6, block_size=2, max_context=12)
    engine, runner = make(bounds)
    requests = [request("abcd", 8), request("efgh", 8), request("ij", 6)]
    readers = [Reader(s) for s in engine.submit(requests, post=run_here)]
    settle(engine, readers)
    assert [r.text for r in readers] == [answer(r) for r in requests]
    again = [s for h in runner.steps for s in h.sequences if s.start == 0]
    assert len(again) > len(requests)
    assert_nothing_held(engine)


def test_what_can_never_fit_is_refused_at_once():
    engine, _ = make(limits(max_context=64, cache_blocks=4, block_size=4))
    with pytest.raises(ContextLengthExceeded, match=r"16 tokens.*20 tokens \(10 in"):
        engine.submit([request("x" * 10, 10)], post=run_here)
    with pytest.raises(ContextLengthExceeded, match="16 tokens"):
        engine.check(16, None)
    assert engine.check(10, None) == 6
    with pytest.raises(InvalidRequest):
        engine.check(0, None)
    with pytest.raises(InvalidRequest):
        engine.check(1, 0)
    assert_nothing_held(engine)


def test_a_full_queue_takes_all_or_nothing():
    engine, _ = make(limits(max_sequences=2, max_waiting=3))
    first = engine.submit([request()] * 4, post=run_here)
    with pytest.raises(Overloaded):
        engine.submit([request()] * 2, post=run_here)
    last = engine.submit([request()], post=run_here)
    with pytest.raises(InvalidRequest, match="at most 5"):
        engine.submit([request()] * 6, post=run_here)
    settle(engine, [Reader(s) for s in first + last])
    assert_nothing_held(engine)


def test_a_break_pauses_streams_and_repeats_nothing():
    engine, runner = make(limits())
    requests = [request("abc", 12), request("defg", 12)]
    readers = [Reader(s) for s in engine.submit(requests, post=run_here)]
    for _ in range(12):
        engine.turn()
    for reader in readers:
        reader.drain()
    before = [r.text for r in readers]
    assert all(before) and not any(r.ended for r in readers)
    runner.break_next()
    runner.may_come_up = False
    for _ in range(10):
        engine.turn()
    assert not engine.status().ready and engine.status().waiting == 2
    runner.may_come_up = True
    settle(engine, readers)
    assert [r.text for r in readers] == [answer(r) for r in requests]
    assert_nothing_held(engine)


def test_after_the_recovery_deadline_clients_get_a_retryable_error():
    engine, runner = make(limits(), deadline_s=0.05)
    readers = [Reader(engine.submit([request()], post=run_here)[0])]
    engine.turn()
    engine.turn()
    runner.break_next()
    runner.may_come_up = False
    settle_until = time.monotonic() + 5
    while not readers[0].ended and time.monotonic() < settle_until:
        engine.turn()
        readers[0].drain()
        time.sleep(0.005)
    assert isinstance(readers[0].error, Unavailable)
    assert_nothing_held(engine)
    with pytest.raises(Unavailable):
        engine.submit([request()], post=run_here)
    runner.may_come_up = True
    engine.turn()
    readers = [Reader(engine.submit([request()], post=run_here)[0])]
    settle(engine, readers)
    assert readers[0].text == answer(request())


def test_a_pipeline_that_keeps_breaking_counts_as_down():
    engine, runner = make(limits(), deadline_s=0.2, give_up_after=10**6)
    reader = Reader(engine.submit([request()], post=run_here)[0])
    end = time.monotonic() + 10
    while not reader.ended and time.monotonic() < end:
        runner.break_next()
        runner.may_come_up = not runner.may_come_up
        engine.turn()
        reader.drain()
        time.sleep(0.002)
    assert isinstance(reader.error, Unavailable)


def test_a_request_that_breaks_the_model_does_not_take_others_along():
    engine, runner = make(limits())
    runner.poison = ord("!")
    requests = [request("good", 10, end_tokens=frozenset({33})), request("bad!", 4)]
    good = [request(f"fine {i}", 10) for i in range(3)]
    # A fake output may hold the poison, too; choose requests that do not.
    good = [r for r in good if ord("!") not in alone(r)]
    readers = [Reader(s) for s in engine.submit([*good, requests[1]], post=run_here)]
    settle(engine, readers)
    assert isinstance(readers[-1].error, ModelFailed)
    assert [r.text for r in readers[:-1]] == [answer(r) for r in good]
    assert good
    assert_nothing_held(engine)


def test_cancelling_frees_blocks_and_place():
    engine, _ = make(limits(max_sequences=2, max_waiting=1))
    readers = [Reader(s) for s in engine.submit([request("a" * 9, 30)] * 3, post=run_here)]
    for _ in range(5):
        engine.turn()
    for reader in readers:
        reader.stream.cancel()
        reader.stream.cancel()
    engine.turn()
    assert_nothing_held(engine)
    settle(engine, [Reader(engine.submit([request()], post=run_here)[0])])


def test_cancelling_in_flight_frees_blocks_at_once_and_the_steps_count_for_nothing():
    engine, _ = make(limits(max_sequences=1, max_step_tokens=8), depth=3)
    gone = Reader(engine.submit([request("x" * 50, 10)], post=run_here)[0])
    for _ in range(3):
        engine.turn()
    blocks, (old, _) = engine._scheduler.running[0].blocks[:], engine._in_flight[0]
    assert len(engine._in_flight) == 2
    gone.stream.cancel()
    # The newcomer takes over slot and blocks while steps of the old owner are in flight.
    kept = request("y" * 40, 10)
    reader = Reader(engine.submit([kept], post=run_here)[0])
    engine.turn()
    newest = engine._in_flight[-1][0].header.sequences[0]
    assert newest.slot == old.header.sequences[0].slot
    assert set(newest.blocks) <= set(blocks)
    settle(engine, [reader])
    assert reader.text == answer(kept)
    assert_nothing_held(engine)


def test_an_epoch_with_less_cache_ends_what_no_longer_fits_and_refuses_it_from_then_on():
    engine, runner = make(limits(cache_blocks=16, block_size=4, max_context=64))
    long, short = request("l" * 20, 20), request("short", 10)
    readers = [Reader(s) for s in engine.submit([long, short], post=run_here)]
    for _ in range(6):
        engine.turn()
    runner.next_cache_blocks = 8
    runner.break_next()
    settle(engine, readers)
    assert isinstance(readers[0].error, ContextLengthExceeded)
    assert "is now 32 tokens, and this request needs 40" in str(readers[0].error)
    assert readers[1].text == answer(short)
    assert engine.max_length == 32 and engine.status().total_blocks == 8
    with pytest.raises(ContextLengthExceeded, match="32 tokens"):
        engine.submit([long], post=run_here)
    # More than planned is never used; what was planned is when it comes back.
    runner.next_cache_blocks = 1000
    runner.break_next()
    settle(engine, [Reader(engine.submit([short], post=run_here)[0])])
    assert engine.max_length == 64 and engine.status().total_blocks == 16
    assert_nothing_held(engine)


def test_an_epoch_with_less_cache_shortens_what_nobody_asked_to_be_so_long():
    engine, runner = make(limits(cache_blocks=16, block_size=4, max_context=64))
    ends_here, goes_on = request("e" * 20, 44), request("goes on", 57)
    asked = [
        replace(ends_here, needed_tokens=1),
        replace(goes_on, needed_tokens=1),
        replace(request("l" * 20, 44), needed_tokens=13),
    ]
    readers = [Reader(s) for s in engine.submit(asked, post=run_here)]
    running = engine._scheduler.running
    while not running or len(running[0].output) < 14:
        engine.turn()
    runner.next_cache_blocks = 8
    runner.break_next()
    settle(engine, readers)
    # What is there already is longer than what fits now, or ends where the smaller cache does.
    assert readers[0].text == Characters().decode(alone(ends_here)[: len(readers[0].text)])
    assert 14 <= len(readers[0].text) < 44
    assert readers[1].text == Characters().decode(alone(goes_on)[:25])
    assert all(r.chunks[-1].finish is FinishReason.LENGTH for r in readers[:2])
    assert readers[1].chunks[-1].tokens == 25
    assert isinstance(readers[2].error, ContextLengthExceeded)
    # One that was prepared before the cache shrank gets what there is, too.
    late = Reader(engine.submit([asked[1]], post=run_here)[0])
    settle(engine, [late])
    assert late.text == readers[1].text
    assert_nothing_held(engine)


def test_stop_strings_end_an_output_across_tokens():
    whole = answer(request("stop here", 30))
    stop = whole[7:10]
    at = whole.find(stop)
    asked = request("stop here", 30, stop=("never" * 3, stop))
    engine, _ = make(limits())
    reader = Reader(engine.submit([asked], post=run_here)[0])
    settle(engine, [reader])
    assert reader.text == whole[:at]
    assert reader.chunks[-1].finish is FinishReason.STOP
    # Counted up to and with the token that completes the stop string.
    assert reader.chunks[-1].tokens == at + len(stop)
    assert_nothing_held(engine)


def test_end_tokens_are_counted_and_not_shown():
    whole = alone(request("ending", 30))
    end = whole[5]
    asked = request("ending", 30, end_tokens=frozenset({end}))
    engine, _ = make(limits())
    reader = Reader(engine.submit([asked], post=run_here)[0])
    settle(engine, [reader])
    first = whole.index(end)
    assert reader.text == Characters().decode(whole[:first])
    assert reader.chunks[-1] == reader.chunks[-1].__class__(
        reader.chunks[-1].text, first + 1, FinishReason.STOP
    )


def test_one_delivery_for_each_step():
    engine, _ = make(limits(max_sequences=8, cache_blocks=64, max_step_tokens=64), depth=1)
    deliveries = []

    def post(deliver):
        deliveries.append(deliver)
        deliver()

    requests = [request(f"p{i}", 10) for i in range(8)]
    readers = [Reader(s) for s in engine.submit(requests, post=post)]
    settle(engine, readers)
    assert len(deliveries) == 10


def test_text_is_made_while_the_next_step_is_computed():
    bounds = limits()
    runner = FakeRunner(bounds, depth=2)
    in_flight = []

    class Watching(Characters):
        def decode(self, token_ids):
            in_flight.append(len(runner._flying))
            return super().decode(token_ids)

    engine = Engine(bounds, runner, Watching(), 5.0, clock=runner.clock)
    asked = [request("one", 9), request("two", 9, stop=("~never",))]
    readers = [Reader(s) for s in engine.submit(asked, post=run_here)]
    settle(engine, readers)
    assert [r.text for r in readers] == [answer(r) for r in asked]
    # Only behind the last tokens comes no step.
    busy = [count > 0 for count in in_flight]
    assert busy == sorted(busy, reverse=True) and busy.count(True) > 5 * busy.count(False)
    assert_nothing_held(engine)


def test_cancelling_between_a_token_and_its_text():
    """Whether the output goes on, or has ended and nobody has been told."""
    for tokens in (1, 9):
        engine, _ = make(limits(max_sequences=1))
        reader = Reader(engine.submit([request("gone", tokens)], post=run_here)[0])
        while not engine._untold:
            engine.turn()
        reader.stream.cancel()
        other = Reader(engine.submit([request("kept", 5)], post=run_here)[0])
        settle(engine, [other])
        reader.drain()
        assert not reader.chunks and other.text == answer(request("kept", 5))
        assert_nothing_held(engine)


def test_a_token_that_came_before_a_break_is_told():
    engine, runner = make(limits(), depth=2)
    readers = [Reader(s) for s in engine.submit([request("a", 1), request("b", 6)], post=run_here)]
    while not engine._untold:
        engine.turn()
    # The next step cannot even be submitted.
    runner.up = runner.may_come_up = False
    engine.turn()
    for reader in readers:
        reader.drain()
    assert [len(r.text) for r in readers] == [1, 1]
    assert readers[0].ended and not readers[1].ended
    runner.may_come_up = True
    settle(engine, readers)
    assert readers[1].text == answer(request("b", 6))
    assert_nothing_held(engine)


def test_a_receiver_that_is_gone_harms_nobody():
    engine, _ = make(limits())

    def gone(deliver):
        raise RuntimeError("Event loop is closed")

    engine.submit([request("lost", 5)], post=gone)
    reader = Reader(engine.submit([request("kept", 9)], post=run_here)[0])
    settle(engine, [reader])
    assert reader.text == answer(request("kept", 9))
    assert_nothing_held(engine)


def test_a_fault_of_the_engine_fails_requests_and_is_reported(caplog):
    engine, runner = make(limits())

    def broken(header, token_ids, admissions):
        raise ZeroDivisionError("".join(map(chr, token_ids)))

    runner.submit = broken
    reader = Reader(engine.submit([request("secret")], post=run_here)[0])
    engine.start()
    engine._thread.join(5)
    reader.drain()
    assert isinstance(reader.error, Unavailable)
    assert "ZeroDivisionError" in engine.status().failure
    assert "secret" not in caplog.text
    with pytest.raises(Unavailable):
        engine.submit([request()], post=run_here)


def test_stopping_fails_open_requests_and_ends_the_thread():
    engine, runner = make(limits())
    runner.may_come_up = False
    engine.start()
    arrived = threading.Event()

    def post(deliver):
        deliver()
        arrived.set()

    reader = Reader(engine.submit([request()], post=post)[0])
    engine.stop()
    assert arrived.wait(5)
    reader.drain()
    assert isinstance(reader.error, Unavailable)
    assert not engine._thread.is_alive()
    assert engine.status().failure == ""


@pytest.mark.parametrize(
    "result",
    [StepResult(8, (1,)), StepResult(7, ()), StepResult(7, (1, 2)), StepResult(7, (128,))],
)
def test_results_that_do_not_fit_their_step_break_the_pipeline(result):
    check_result(HEADER, StepResult(7, (127,)), 128, [None])
    with pytest.raises(PipelineBroken):
        check_result(HEADER, result, 128, [None])


HEADER = StepHeader(7, (SequenceStep(0, 0, 3, (0,), True), SequenceStep(1, 0, 1, (1,), False)))


@pytest.mark.parametrize(
    ("asked", "entry"),
    [
        (None, TokenLogprobs(-1.0, ())),
        (0, None),
        (0, TokenLogprobs(-1.0, ((3, -1.0),))),
        (2, TokenLogprobs(-1.0, ((3, -1.0),))),
    ],
)
def test_results_with_other_logprobs_than_asked_break_the_pipeline(asked, entry):
    with pytest.raises(PipelineBroken, match="logprobs") as broken:
        check_result(HEADER, StepResult(7, (1,), (entry,) if entry else ()), 128, [asked])
    # The text is logged where Ray reads, and sampling parameters are no business of Ray's.
    assert not set(str(broken.value).removeprefix("step 7")) & set("0123456789")
    fitting = TokenLogprobs(-1.0, tuple((token, -1.0) for token in range(asked or 0)))
    told = () if asked is None else (fitting,)
    check_result(HEADER, StepResult(7, (1,), told), 128, [asked])
    # A vocabulary may be smaller than what is asked for.
    whole = TokenLogprobs(-1.0, ((0, -0.1), (1, -3.0)))
    check_result(HEADER, StepResult(7, (1,), (whole,)), 2, [5])


def test_the_fake_notices_a_wrong_block():
    # The oracle of this file is worth something only if the fake model is sensitive.
    assert next_token([1, 2, 3], GREEDY) != next_token([1, 3, 2], GREEDY)
