"""Engine and real stages: tokens are those of `transformers.generate`, one request at a time."""

from __future__ import annotations

import itertools
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import END, VOCABULARY, Oracle, write_checkpoint

from runtime.engine.engine import Engine
from runtime.engine.request import Request
from runtime.engine.runner import PipelineBroken, Recovery, check_result
from runtime.engine.scheduler import EngineLimits
from runtime.stage.settings import StageSettings
from runtime.stage.stage import StageRunner
from security.channel.admission import Admission
from security.channel.frame import StepHeader, StepResult
from security.manifest import ModelFiles, build_manifest
from tests.engine.fakes import GREEDY, Characters, Reader, run_here
from tests.engine.test_scheduling import Watch

torch.set_num_threads(1)

LAYERS = 6
LIMITS = EngineLimits(
    max_sequences=6,
    max_step_tokens=40,
    max_context=120,
    block_size=4,
    cache_blocks=48,
    vocabulary=VOCABULARY,
    max_waiting=64,
)
ROTARY = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "factor": 2.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.5, 1.7, 1.8, 2.0],
    "long_factor": [4.0, 4.5, 5.0, 5.5, 6.0, 7.0, 8.0, 9.0],
    "original_max_position_embeddings": 24,
}
LONGROPE = {
    "phi3": {
        "sliding_window": None,
        "partial_rotary_factor": 1.0,
        "original_max_position_embeddings": 24,
        "rope_parameters": ROTARY,
    },
    "llama": {"rope_parameters": ROTARY},
}


class StageRing:
    """A `StepRunner` of stages in this process; a step is computed when its result is asked for."""

    def __init__(self, stages: list[StageRunner]) -> None:
        self.stages = stages
        self.limits = replace(LIMITS, rotary_border=stages[0].rotary_border)
        self.depth = len(stages) + 1
        self.cache_blocks = LIMITS.cache_blocks
        self.steps: list[StepHeader] = []
        self._flying: deque[tuple[StepHeader, list[int], Sequence[Admission]]] = deque()
        self._up = False
        self._seconds = itertools.count()

    def clock(self) -> float:
        """Every look takes a second, so that chunks do not depend on the machine."""
        return float(next(self._seconds))

    def submit(
        self, header: StepHeader, token_ids: list[int], admissions: Sequence[Admission]
    ) -> None:
        if not self._up:
            raise PipelineBroken("down")
        self.steps.append(header)
        self._flying.append((header, token_ids, admissions))

    def result(self, timeout: float) -> StepResult:
        if not self._up:
            raise PipelineBroken("down")
        header, token_ids, admissions = self._flying.popleft()
        hidden = self.stages[0].forward(header, token_ids=token_ids)
        for stage in self.stages[1:]:
            hidden = stage.forward(header, hidden_TD=hidden.clone())
        self.stages[-1].admit(admissions)
        result = self.stages[-1].sample(header, hidden)
        check_result(header, result, VOCABULARY, [None] * len(result.tokens))
        return result

    def wait_ready(self, timeout: float) -> bool:
        self._up = True
        self._flying.clear()
        for stage in self.stages:
            stage.reset()
        return True

    def fall(self) -> None:
        self._up = False


@pytest.fixture(scope="module", params=["qwen3", *LONGROPE])
def model(
    request: pytest.FixtureRequest,
    checkpoint: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """One without a border, and one of each rule."""
    if request.param in LONGROPE:
        directory = tmp_path_factory.mktemp(request.param)
        return write_checkpoint(request.param, directory, seed=3, **LONGROPE[request.param])
    return checkpoint(request.param)


@pytest.fixture(scope="module")
def oracle(model: Path) -> Oracle:
    return Oracle(model)


@pytest.fixture(scope="module", params=[1, 2], ids=["one stage", "two stages"])
def ring(request: pytest.FixtureRequest, model: Path) -> Iterator[StageRing]:
    cuts = {1: (0, LAYERS), 2: (0, 2, LAYERS)}[request.param]
    with_files = ModelFiles(model, build_manifest(model))
    stages = [
        StageRunner(
            with_files,
            StageSettings(
                first_layer=first,
                last_layer=last,
                layers=LAYERS,
                dtype="float32",
                tp=1,
                block_size=LIMITS.block_size,
                cache_blocks=LIMITS.cache_blocks,
                max_context=LIMITS.max_context,
                hidden_size=64,
                threads=1,
            ),
        )
        for first, last in itertools.pairwise(cuts)
    ]
    yield StageRing(stages)
    with_files.close()


def load(random_: random.Random, requests: int) -> list[tuple[Request, bytes]]:
    """Prompts with common beginnings, some of them among tenants, and one that is long."""
    beginnings = [[random_.randrange(END) for _ in range(length)] for length in (9, 24, 50)]
    asked = []
    for _ in range(requests):
        rest = [random_.randrange(END) for _ in range(random_.randint(1, 20))]
        prompt = random_.choice([[], *beginnings]) + rest
        made = Request(tuple(prompt), GREEDY, random_.randint(1, 16), frozenset({END}))
        asked.append((made, random_.choice([b"", b"", b"", b"a"])))
    return asked


def serve(ring: StageRing, oracle: Oracle, seed: int, requests: int) -> list[StepHeader]:
    """Serves a random load with cancels and breaks; returns the steps."""
    random_ = random.Random(seed)
    waiting = load(random_, requests)
    ring.fall()
    ring.steps.clear()
    engine = Engine(
        ring.limits, ring, Characters(), 5.0, Recovery(give_up_after=100), clock=ring.clock
    )
    submit = ring.submit
    try:
        watch = Watch(engine, ring)
        served: list[tuple[Request, Reader]] = []
        while waiting or engine._posts:
            if waiting and (not engine._posts or random_.random() < 0.4):
                asked, tenant = waiting.pop()
                asked = Request(
                    asked.prompt, GREEDY, asked.max_tokens, asked.end_tokens, show_ids=True
                )
                reader = Reader(engine.submit([asked], run_here, tenant)[0])
                if random_.random() < 0.1:
                    reader.stream.cancel()
                else:
                    served.append((asked, reader))
            if random_.random() < 0.03:
                ring.fall()
            engine.turn()
            watch.check()
            for _, reader in served:
                reader.drain()
    finally:
        ring.submit = submit  # type: ignore[method-assign]
    for asked, reader in served:
        ids = [token for chunk in reader.chunks for token in chunk.ids]
        assert ids == oracle.greedy(list(asked.prompt), asked.max_tokens)
    return list(ring.steps)


@pytest.mark.parametrize("seed", range(3))
def test_tokens_are_those_of_generate_whatever_the_load(
    ring: StageRing, oracle: Oracle, seed: int
) -> None:
    steps = serve(ring, oracle, seed, requests=32)
    parts = [part for header in steps for part in header.sequences]
    assert any(part.start > 0 and part.count > 1 for part in parts), "chunks or found prefixes"
    tables = [[block for part in header.sequences for block in part.blocks] for header in steps]
    assert any(len(set(table)) < len(table) for table in tables), "blocks were shared in a step"
    mixed = [{part.long for part in header.sequences} == {True, False} for header in steps]
    assert any(mixed) == (ring.limits.rotary_border is not None)


@pytest.mark.slow
def test_tokens_are_those_of_generate_for_many_loads(ring: StageRing, oracle: Oracle) -> None:
    for seed in range(100, 160):
        serve(ring, oracle, seed, requests=40)
