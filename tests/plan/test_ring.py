"""The ring of links: what opens an epoch, what goes around it, and who is refused."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from ring import Ring
from transformers import AutoModelForCausalLM

from runtime.engine.engine import Engine
from runtime.engine.request import Request
from runtime.engine.runner import PipelineBroken, Recovery
from runtime.engine.scheduler import EngineLimits
from runtime.shard.admissions import AdmissionQueue, AdmissionRefused
from runtime.shard.pipeline import frame_limits, steps_in_flight
from runtime.stage.stage import StageRunner
from security.channel.admission import (
    Admission,
    SamplingParameters,
    decode_admissions,
    encode_admissions,
    max_admission_bytes,
)
from security.channel.frame import (
    SequenceStep,
    StepHeader,
    StepResult,
    TokenLogprobs,
    decode_capacity,
    decode_result,
    encode_capacity,
    encode_result,
    encode_step,
)
from security.channel.link import Link
from tests.engine.fakes import Reader, run_here

GREEDY = SamplingParameters(0.0, 1.0, 0, 0)
HEADER = StepHeader(0, (SequenceStep(0, 0, 3, (0,), sampled=True, admitted=True),))
ADMISSION = Admission(0, GREEDY, 3)
TOKENS = 40


@pytest.fixture(scope="module")
def model(checkpoint: Callable[[str], Path]) -> Path:
    return checkpoint("llama")


@pytest.fixture(scope="module")
def whole(model: Path) -> Iterator[Ring]:
    ring = Ring(model, (2, 4))
    yield ring
    ring.close()


@pytest.fixture(scope="module")
def pair(model: Path) -> Iterator[Ring]:
    ring = Ring(model, (3,), step_deadline_ms=1000)
    yield ring
    ring.close()


def wait_fault(ring: Ring, text: str) -> None:
    assert ring.faulted.wait(10), "nobody noticed"
    assert any(text in fault for fault in ring.faults), ring.faults


# -- tokens ----------------------------------------------------------------------------------------

PROMPTS = [[5, 9, 33, 9], list(range(20, 60)), [1], [7, 7, 7, 80, 3, 12], [64] * 17]
BIAS = ((11, 4.0), (40, -6.0), (2, 2.5))


def sampled(index: int) -> SamplingParameters:
    """Every parameter that makes state on the last stage, together and alone."""
    kinds = [
        {"presence_penalty": 1.2, "frequency_penalty": 0.7},
        {"repetition_penalty": 1.5, "temperature": 0.9},
        {"logit_bias": BIAS, "min_p": 0.02},
        {"min_tokens": 12, "end_tokens": tuple(range(0, 95, 3)), "frequency_penalty": 0.5},
        {"repetition_penalty": 1.2, "logit_bias": BIAS, "presence_penalty": -0.8, "top_p": 0.8},
    ]
    return dataclasses.replace(SamplingParameters(1.1, 1.0, 0, 77 + index), **kinds[index])


class NoText:
    """Text is of no interest here."""

    def decode(self, token_ids: list[int]) -> str:
        return ""

    def has_text(self, token: int) -> bool:
        return False


def run(
    ring: Ring, wanted: list[SamplingParameters], *, breaks: Sequence[int] = (), **limits: int
) -> list[list[int]]:
    """The tokens of all prompts at once; the epoch breaks before these turns of the engine."""
    template = ring.template
    bounds = {
        "max_sequences": template.max_sequences,
        "max_step_tokens": template.max_step_tokens,
        "max_context": template.max_context,
        "block_size": template.block_size,
        "cache_blocks": template.cache_blocks,
        "vocabulary": template.vocabulary,
    }
    engine = Engine(
        EngineLimits(**(bounds | limits)), ring.runner, NoText(), 10.0, Recovery(poll_s=0.05)
    )
    requests = [
        Request(tuple(prompt), parameters, TOKENS, frozenset(parameters.end_tokens), show_ids=True)
        for prompt, parameters in zip(PROMPTS, wanted, strict=True)
    ]
    ring.open()
    readers = [Reader(stream) for stream in engine.submit(requests, post=run_here)]
    for turn in range(2000):
        if turn in breaks:
            ring.break_epoch()
            ring.open()
        engine.turn()
        for reader in readers:
            reader.drain()
        if all(reader.ended for reader in readers):
            break
    assert all(reader.ended for reader in readers)
    assert not [reader.error for reader in readers if reader.error]
    return [[token for chunk in reader.chunks for token in chunk.ids] for reader in readers]


def test_greedy_tokens_with_every_adjustment_equal_generate(whole: Ring, model: Path) -> None:
    """transformers' own loop and processors, against stages, links, admissions and the sampler."""
    theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    wanted = [
        dataclasses.replace(GREEDY, repetition_penalty=1.3),
        dataclasses.replace(GREEDY, logit_bias=BIAS),
        dataclasses.replace(GREEDY, min_tokens=15, end_tokens=tuple(range(0, 95, 4))),
        dataclasses.replace(GREEDY, repetition_penalty=0.8, logit_bias=BIAS),
        GREEDY,
    ]
    expected = []
    for prompt, parameters in zip(PROMPTS, wanted, strict=True):
        output = theirs.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=TOKENS,
            min_new_tokens=parameters.min_tokens or None,
            repetition_penalty=parameters.repetition_penalty,
            sequence_bias={(token,): bias for token, bias in parameters.logit_bias} or None,
            eos_token_id=list(parameters.end_tokens) or None,
            pad_token_id=0,
        )
        expected.append(output[0, len(prompt) :].tolist())
    assert run(whole, wanted) == expected
    assert len({tuple(tokens) for tokens in expected}) == len(PROMPTS)


def test_breaks_and_preemptions_change_no_token(whole: Ring) -> None:
    """The state of a sequence on the last stage comes back from the head's tokens."""
    wanted = [sampled(index) for index in range(len(PROMPTS))]
    undisturbed = run(whole, wanted)
    assert run(whole, wanted, breaks=(9, 10, 31)) == undisturbed
    blocks = -(-(max(map(len, PROMPTS)) + TOKENS) // whole.template.block_size)
    assert run(whole, wanted, cache_blocks=blocks + 1, max_context=80) == undisturbed
    # The parameters matter: without them the tokens are others.
    plain = [SamplingParameters(p.temperature, p.top_p, p.top_k, p.seed) for p in wanted]
    assert all(a != b for a, b in zip(run(whole, plain), undisturbed, strict=True))


def test_a_single_stage_has_a_step_ahead_in_flight(model: Path, whole: Ring) -> None:
    wanted = [sampled(index) for index in range(len(PROMPTS))]
    ring = Ring(model)
    try:
        assert ring.runner.depth == 2
        assert run(ring, wanted, breaks=(12,)) == run(whole, wanted)
    finally:
        ring.close()


# -- capacity --------------------------------------------------------------------------------------


class SmallStage(StageRunner):
    """A stage whose machine has less memory than the plan thinks."""

    @property
    def cache_blocks(self) -> int:
        return 3


def test_the_head_learns_the_smallest_cache(model: Path) -> None:
    ring = Ring(model, (2, 4))
    try:
        assert ring.runner.cache_blocks == ring.template.cache_blocks > 3
        ring.open()
        assert ring.runner.wait_ready(10)
        assert ring.runner.cache_blocks == ring.template.cache_blocks
        ring.members["stage-1"].stage.__class__ = SmallStage
        ring.open()
        assert ring.runner.wait_ready(10)
        assert ring.runner.cache_blocks == 3
        # A block that the plan has and the small stage has not.
        header = StepHeader(0, (SequenceStep(0, 0, 1, (3,), sampled=False, admitted=False),))
        ring.runner.submit(header, [1], ())
        with pytest.raises(PipelineBroken):
            ring.runner.result(10)
        # The others notice closed links, perhaps before the one that closed them has told why.
        ring.await_fault("stage-1: .*block ids below 3")
    finally:
        ring.close()


@pytest.fixture
def as_head(pair: Ring) -> tuple[Link, Link]:
    """The test is the head of two stages, and the other one is real."""
    pair.open("stage-1")
    return pair.impersonate("stage-0")


def agree(ring: Ring, up: Link, down: Link) -> None:
    """The capacity frame's way around."""
    limits = frame_limits(ring.template)
    down.send([encode_capacity(limits.cache_blocks)])
    assert decode_capacity(up.receive(64), limits) == limits.cache_blocks


def step(ring: Ring, header: StepHeader = HEADER) -> list[bytes]:
    rows = bytes(header.tokens * ring.template.hidden_size * 4)
    return [encode_step(header, "float32", ring.template.hidden_size), rows]


def test_a_head_that_plays_by_the_rules_gets_tokens(pair: Ring, as_head: tuple[Link, Link]) -> None:
    """So that what the next tests refuse is refused for the reason that they name."""
    up, down = as_head
    agree(pair, up, down)
    limits = frame_limits(pair.template)
    # The step first: the stage waits for the admission.
    down.send(step(pair))
    up.send([encode_admissions(0, [ADMISSION])])
    result = decode_result(up.receive(limits.max_result_bytes), limits)
    assert result.step == 0 and len(result.tokens) == 1
    header = StepHeader(1, (SequenceStep(0, 3, 1, (0,), sampled=True),))
    down.send(step(pair, header))
    assert decode_result(up.receive(limits.max_result_bytes), limits).step == 1
    assert not pair.faults


def test_a_capacity_above_the_plan_s_is_refused(pair: Ring, as_head: tuple[Link, Link]) -> None:
    _, down = as_head
    down.send([encode_capacity(pair.template.cache_blocks + 1)])
    wait_fault(pair, "FrameOutOfBounds: cache blocks")


def test_a_step_before_the_capacity_is_refused(pair: Ring, as_head: tuple[Link, Link]) -> None:
    _, down = as_head
    down.send(step(pair))
    wait_fault(pair, "MessageTooLong")


def test_a_second_capacity_is_refused(pair: Ring, as_head: tuple[Link, Link]) -> None:
    up, down = as_head
    agree(pair, up, down)
    down.send([encode_capacity(1)])
    wait_fault(pair, "FrameMalformed")


def test_a_silent_capacity_ends_the_attempt(
    pair: Ring, as_head: tuple[Link, Link], monkeypatch: pytest.MonkeyPatch
) -> None:
    del as_head
    monkeypatch.setattr("runtime.shard.pipeline.OPEN_DEADLINE_S", 0.3)
    pair.open("stage-1")
    links = pair.impersonate("stage-0")
    wait_fault(pair, "no capacity frame came")
    for link in links:
        link.close()


# -- admissions ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("frames", "reason"),
    [
        ([(1, [ADMISSION])], "expected its own admissions, found those of step 1"),
        ([(0, [Admission(1, GREEDY, 3)])], r"slots \(0,\), found \(1,\)"),
        ([(0, [ADMISSION, Admission(1, GREEDY, 3)])], r"slots \(0,\), found \(0, 1\)"),
        ([], "expected its admissions within 1.0 s"),
        ([(7, [ADMISSION]), (0, [ADMISSION])], "found those of step 7"),
    ],
)
def test_admissions_that_do_not_fit_their_step_are_refused(
    pair: Ring,
    as_head: tuple[Link, Link],
    frames: list[tuple[int, list[Admission]]],
    reason: str,
) -> None:
    up, down = as_head
    agree(pair, up, down)
    for number, admissions in frames:
        up.send([encode_admissions(number, admissions)])
    # Whatever arrives first waits for the other.
    time.sleep(0.1)
    down.send(step(pair))
    assert pair.faulted.wait(10), "nobody noticed"
    assert re.search("AdmissionRefused: .*" + reason, pair.faults[0]), pair.faults


def test_admissions_that_no_step_takes_do_not_pile_up(
    pair: Ring, as_head: tuple[Link, Link]
) -> None:
    up, down = as_head
    agree(pair, up, down)
    for _ in range(steps_in_flight(2) + 1):
        up.send([encode_admissions(0, [ADMISSION])])
    wait_fault(pair, "AdmissionRefused: admission frames waiting: expected at most 3")


@pytest.mark.parametrize("admission_first", [True, False])
def test_an_admission_that_a_header_hides_is_noticed(
    pair: Ring, as_head: tuple[Link, Link], admission_first: bool
) -> None:
    """A stage between clears the flag: the newcomer must not get its predecessor's parameters."""
    up, down = as_head
    agree(pair, up, down)
    limits = frame_limits(pair.template)
    up.send([encode_admissions(0, [ADMISSION])])
    down.send(step(pair))
    assert decode_result(up.receive(limits.max_result_bytes), limits).step == 0
    newcomer = StepHeader(1, (SequenceStep(0, 0, 3, (0,), sampled=True, admitted=False),))
    if admission_first:
        up.send([encode_admissions(1, [ADMISSION])])
        time.sleep(0.1)
        down.send(step(pair, newcomer))
    else:
        down.send(step(pair, newcomer))
        assert decode_result(up.receive(limits.max_result_bytes), limits).step == 1
        up.send([encode_admissions(1, [ADMISSION])])
    wait_fault(pair, "AdmissionRefused: step 1: expected a header that admits sequences")


def test_admissions_outside_the_plan_are_refused(pair: Ring, as_head: tuple[Link, Link]) -> None:
    up, down = as_head
    agree(pair, up, down)
    wrong = dataclasses.replace(GREEDY, logit_bias=((pair.template.vocabulary, 1.0),))
    up.send([encode_admissions(0, [Admission(0, wrong, 3)])])
    wait_fault(pair, "FrameOutOfBounds: logit_bias")


def test_a_sampled_sequence_that_was_never_admitted_is_refused(
    pair: Ring, as_head: tuple[Link, Link]
) -> None:
    up, down = as_head
    agree(pair, up, down)
    down.send(step(pair, StepHeader(0, (SequenceStep(0, 0, 3, (0,), sampled=True),))))
    wait_fault(pair, "StepRefused: slot 0: expected an admitted sequence")


def test_the_queue_wakes_when_it_is_closed() -> None:
    waiting = AdmissionQueue(2, 60.0)
    waiting.close()
    with pytest.raises(AdmissionRefused, match="the epoch ended"):
        waiting.take(HEADER)
    assert waiting.take(StepHeader(0, (SequenceStep(0, 0, 1, (0,), True),))) == ()


# -- results ---------------------------------------------------------------------------------------


@pytest.fixture
def as_last(pair: Ring) -> tuple[Link, Link]:
    """The test is the last of two stages, and the head is real."""
    pair.open("stage-0")
    return pair.impersonate("stage-1")


@pytest.mark.parametrize("blocks", [0, 1])
def test_a_head_refuses_a_capacity_above_the_plan_s(
    pair: Ring, as_last: tuple[Link, Link], blocks: int
) -> None:
    up, down = as_last
    assert decode_capacity(up.receive(64), frame_limits(pair.template))
    down.send([encode_capacity(pair.template.cache_blocks + blocks)])
    if blocks:
        wait_fault(pair, "FrameOutOfBounds: cache blocks")
        assert not pair.runner.wait_ready(0.1)
    else:
        assert pair.runner.wait_ready(10)


def test_a_head_refuses_a_result_before_the_capacity(
    pair: Ring, as_last: tuple[Link, Link]
) -> None:
    _, down = as_last
    down.send([encode_result(StepResult(0, ()))])
    assert pair.faulted.wait(10), "nobody noticed"
    assert "MessageTooLong" in pair.faults[0]


@pytest.mark.parametrize(
    "result",
    [
        StepResult(0, (1,), (TokenLogprobs(-1.0, ()),)),
        StepResult(0, (1, 2)),
        StepResult(1, (1,)),
    ],
)
def test_a_head_refuses_what_it_did_not_ask_for(
    pair: Ring, as_last: tuple[Link, Link], result: StepResult
) -> None:
    up, down = as_last
    limits = frame_limits(pair.template)
    decode_capacity(up.receive(64), limits)
    down.send([encode_capacity(limits.cache_blocks)])
    assert pair.runner.wait_ready(10)
    pair.runner.submit(HEADER, [1, 2, 3], [ADMISSION])
    number, admissions = decode_admissions(down.receive(max_admission_bytes(limits)), limits)
    assert (number, admissions) == (0, (ADMISSION,))
    down.send([encode_result(result)])
    with pytest.raises(PipelineBroken):
        pair.runner.result(10)
    assert "the last stage's answer does not fit" in pair.faults[0]


def test_the_stages_between_see_no_sampling_parameters(
    pair: Ring, as_last: tuple[Link, Link]
) -> None:
    """Two admissions that differ in everything make the same step frame."""
    up, down = as_last
    limits = frame_limits(pair.template)
    decode_capacity(up.receive(64), limits)
    down.send([encode_capacity(limits.cache_blocks)])
    assert pair.runner.wait_ready(10)
    other = dataclasses.replace(sampled(4), seed=2**64 - 1)
    frames = []
    for number, parameters in enumerate((GREEDY, other)):
        prompt = (1, 2, 3) if parameters.counts_prompt else ()
        header = dataclasses.replace(HEADER, step=number)
        pair.runner.submit(header, [1, 2, 3], [Admission(0, parameters, 3, prompt)])
        frames.append(bytes(up.receive(limits.max_step_bytes)))
        down.send([encode_result(StepResult(number, (1,)))])
        pair.runner.result(10)
    # All but the step's number.
    assert frames[0][:8] + frames[0][16:] == frames[1][:8] + frames[1][16:]
