"""Cached prefixes: who finds what, what stays, and what is never shared."""

import pytest

from runtime.engine.blocks import BlockAllocator, PrefixNames
from runtime.engine.request import Request
from runtime.stage.border import RotaryBorder
from tests.engine.fakes import GREEDY, Characters, Reader, alone, limits, run_here, settle
from tests.engine.test_engine import answer, assert_nothing_held, make, request

TEXT = "the same beginning, "


def serve(engine, asked, tenant=b"") -> str:
    reader = Reader(engine.submit([asked], run_here, tenant)[0])
    settle(engine, [reader])
    return reader.text


def computed(runner, since=0) -> list[int]:
    """Rows of each step."""
    return [header.tokens for header in runner.steps[since:]]


def names_of(tokens, tenant=b"", secret=b"secret", size=4, count=None, long=False):
    names: list[bytes] = []
    count = len(tokens) // size if count is None else count
    chain = PrefixNames(size, secret)
    chain.extend(names, count, tenant, lambda at, n: tokens[at : at + n], long=long)
    return names


def test_the_next_request_with_a_beginning_computes_only_the_rest():
    engine, runner = make(limits(max_step_tokens=64, cache_blocks=64))
    assert serve(engine, request(TEXT + "one", 4)) == answer(request(TEXT + "one", 4))
    before = len(runner.steps)
    assert serve(engine, request(TEXT + "two", 4)) == answer(request(TEXT + "two", 4))
    assert computed(runner, before) == [3, 1, 1, 1]
    assert runner.steps[before].sequences[0].start == len(TEXT) == 20
    assert_nothing_held(engine)


def test_the_last_token_is_always_computed():
    engine, runner = make(limits(max_step_tokens=64, cache_blocks=64))
    for length in (19, 20, 21):
        asked = request(TEXT[:19] + "." * (length - 19), 2)
        serve(engine, asked)
        before = len(runner.steps)
        assert serve(engine, asked) == answer(asked)
        # Whole blocks of 4, but for the block with the last token.
        assert runner.steps[before].sequences[0].start == (length - 1) // 4 * 4
        assert computed(runner, before)[0] == length - (length - 1) // 4 * 4


def test_answers_are_found_by_the_next_turn_of_a_conversation():
    engine, runner = make(limits(max_step_tokens=64, cache_blocks=64))
    first = request(TEXT, 12)
    text = serve(engine, first)
    before = len(runner.steps)
    second = request(TEXT + text + " and?", 4)
    assert serve(engine, second) == answer(second)
    # All of the prompt and the answer but the token that no step computed.
    assert runner.steps[before].sequences[0].start == 28


def test_tenants_find_nothing_of_each_other():
    engine, runner = make(limits(max_step_tokens=64, cache_blocks=64))
    asked = request(TEXT + "secret", 3)
    for tenant in (b"", b"a", b"b"):
        for expected in (0, 24):
            before = len(runner.steps)
            assert serve(engine, asked, tenant) == answer(asked)
            assert runner.steps[before].sequences[0].start == expected, tenant


def test_a_new_epoch_has_no_prefixes():
    engine, runner = make(limits(max_step_tokens=64, cache_blocks=64))
    serve(engine, request(TEXT, 2))
    runner.break_next()
    serve(engine, request("other", 2))
    before = len(runner.steps)
    assert serve(engine, request(TEXT, 2)) == answer(request(TEXT, 2))
    assert runner.steps[before].sequences[0].start == 0


def test_running_sequences_share_blocks_and_the_last_one_frees_them():
    engine, runner = make(limits(max_step_tokens=64, cache_blocks=24))
    prompt = TEXT * 2
    first = Reader(engine.submit([request(prompt + "1", 20)], run_here)[0])
    for _ in range(3):
        engine.turn()
    # 40 positions each and 24 blocks of 4: without sharing there is room for two.
    others = [request(f"{prompt}{number}", 10) for number in (2, 3, 4)]
    readers = [Reader(stream) for stream in engine.submit(others, run_here)]
    engine.turn()
    assert len(engine._scheduler.running) == 4
    tables = [s.blocks for s in runner.steps[-1].sequences]
    assert len(tables) >= 3 and len({table[:10] for table in tables}) == 1
    settle(engine, [first, *readers])
    assert [r.text for r in readers] == [answer(asked) for asked in others]
    assert_nothing_held(engine)


def test_a_preempted_sequence_finds_its_own_blocks_again():
    bounds = limits(cache_blocks=10, block_size=2, max_context=20, max_step_tokens=16)
    engine, runner = make(bounds)
    requests = [request("abcdefg", 8), request("hijklmn", 8)]
    readers = [Reader(s) for s in engine.submit(requests, run_here)]
    settle(engine, readers)
    assert [r.text for r in readers] == [answer(r) for r in requests]
    starts = [s.start for h in runner.steps for s in h.sequences if s.count > 1]
    assert any(start > 0 for start in starts), "it was preempted and did not begin at 0 again"
    assert_nothing_held(engine)


def test_the_longest_unused_block_makes_room_and_ends_go_before_beginnings():
    blocks = BlockAllocator(6, 4)
    names = names_of(list(range(24)))
    old, new = blocks.allocate(3), blocks.allocate(3)
    for block, name in zip(old + new, names, strict=True):
        blocks.publish(block, name)
    first_old, *_ = old
    blocks.release(old)
    blocks.release(new)
    assert blocks.free == 6 and len(blocks.find(names)) == 6
    blocks.release(blocks.allocate(2))
    assert blocks.find(names) == [first_old]
    held = blocks.share(blocks.find(names))
    assert blocks.free == 5 and blocks.free_besides(held) == 5
    blocks.allocate(5)
    assert blocks.free == 0 and blocks.find(names[:1]) == held


def test_misuse_of_blocks_is_a_bug():
    blocks = BlockAllocator(4, 4)
    held = blocks.allocate(2)
    name = names_of([1, 2, 3, 4])[0]
    blocks.publish(held[0], name)
    with pytest.raises(AssertionError):
        blocks.publish(held[0], name)
    with pytest.raises(AssertionError):
        blocks.share(held[1:])
    with pytest.raises(AssertionError):
        blocks.allocate(3)
    twice = list(held)
    blocks.release(held)
    with pytest.raises(AssertionError):
        blocks.release(twice)
    with pytest.raises(ValueError, match="0 blocks"):
        BlockAllocator(0, 4)


def test_a_name_stands_for_tenant_secret_and_every_token_before():
    tokens = [1, 2, 3, 4, 5, 6, 7, 8]
    names = names_of(tokens)
    assert names == names_of(tokens) and len(set(names)) == 2
    assert names_of(tokens[:4]) == names[:1]
    others = [
        names_of([1, 2, 3, 9, 5, 6, 7, 8]),
        names_of(tokens, tenant=b"a"),
        names_of(tokens, secret=b"other"),
        names_of(tokens, long=True),
        names_of(tokens, tenant=b"a", long=True),
    ]
    for other in others:
        assert not set(other) & set(names)
    # Without a secret given, another process has other names.
    drawn: list[list[bytes]] = [[], []]
    for into in drawn:
        PrefixNames(4).extend(into, 2, b"", lambda at, n: tokens[at : at + n])
    assert not set(drawn[0]) & set(drawn[1])


@pytest.mark.parametrize("recomputes", [True, False])
def test_prompts_past_a_longrope_border_share_blocks_with_their_kind_only(recomputes):
    border = RotaryBorder(24, recomputes)
    engine, runner = make(limits(max_step_tokens=64, cache_blocks=64, rotary_border=border))
    for text, expected in (
        (TEXT + "1", 0),
        (TEXT + "2", 20),
        (TEXT + "long", 20),  # exactly the border
        (TEXT + "longer", 0),
        (TEXT + "longest", 24),
        (TEXT + "3", 20),
    ):
        before = len(runner.steps)
        asked = request(text, 1)
        assert serve(engine, asked) == Characters().decode(alone(asked, border))
        assert runner.steps[before].sequences[0].start == expected, text
        assert runner.steps[before].sequences[0].long == (len(text) > 24)


def test_a_conversation_finds_an_output_past_the_border_where_its_kind_is_kept():
    # Of a family that does not recompute, rows are long by their place; the prompt decides.
    border = RotaryBorder(24, recomputes=False)
    engine, runner = make(limits(max_step_tokens=64, cache_blocks=64, rotary_border=border))
    first = request(TEXT, 13)
    text = serve(engine, first)
    assert [s.long for h in runner.steps for s in h.sequences] == [False] * 5 + [True] * 8
    # The next prompt is past the border and long from its first row on.
    before = len(runner.steps)
    second = request(TEXT + text, 1)
    assert serve(engine, second) == Characters().decode(alone(second, border))
    assert runner.steps[before].sequences[0].start == 0
    # The same output once more is found up to the prompt's end.
    before = len(runner.steps)
    assert serve(engine, first) == text
    assert runner.steps[before].sequences[0].start == 16


def test_the_same_text_computed_twice_at_once_is_kept_once():
    engine, _ = make(limits(max_step_tokens=64, cache_blocks=64))
    asked = Request(tuple(map(ord, TEXT)), GREEDY, 3)
    readers = [Reader(s) for s in engine.submit([asked] * 3, run_here)]
    settle(engine, readers)
    assert {r.text for r in readers} == {answer(asked)} and alone(asked)
    assert len(engine._scheduler.blocks._published) == 5
    assert_nothing_held(engine)
