"""Puts Bulkhead's engine under load by itself: engine and one stage in this process.

Everything is the product's own, from the planner's template to the epoch's threads, except for what
stands around the engine: no broker, no links (one stage has none), no envelope, no OpenAI layer.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Sequence

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from benchmarks.drivers.protocol import Arguments, drive, replay
from benchmarks.planned import INSTANCE, Size, plan_deployment
from benchmarks.times import RequestTimes, TimedRequest
from placement.plan import PlanTemplate
from runtime.engine.engine import Engine
from runtime.engine.request import Request
from runtime.engine.scheduler import EngineLimits
from runtime.shard.pipeline import Epoch, HeadRunner
from runtime.shard.shard import stage_settings
from runtime.stage.stage import StageRunner
from security.channel.admission import SamplingParameters
from security.channel.link import LinkListener
from security.manifest import ModelFiles
from security.roster import EPOCH_BYTES, Roster

_START_DEADLINE_S = 60.0
_GREEDY = SamplingParameters(temperature=0.0, top_p=1.0, top_k=0, seed=0)


class _NoText:
    """The part of a tokenizer that the engine calls; the checkpoint has none."""

    def decode(self, token_ids: list[int]) -> str:
        """Nothing: answers are token ids."""
        return ""

    def has_text(self, token: int) -> bool:
        """None has."""
        return False


class LocalEngine:
    """An engine over one stage that has all layers.

    Args:
        template: a plan of one role.
        stage: loaded as planned; closed with the engine.
    """

    def __init__(self, template: PlanTemplate, stage: StageRunner) -> None:
        self._stage = stage
        self._listener = LinkListener("127.0.0.1")
        runner = HeadRunner(template)
        self._epoch = Epoch(
            roster=_roster(),
            template=template,
            role=template.roles[0],
            stage=self._stage,
            listener=self._listener,
            private_key=X25519PrivateKey.generate(),
            on_open=runner.offer,
            on_fault=_fault,
        )
        self._engine = Engine(
            EngineLimits(
                max_sequences=template.max_sequences,
                max_step_tokens=template.max_step_tokens,
                max_context=template.max_context,
                block_size=template.block_size,
                cache_blocks=template.cache_blocks,
                vocabulary=template.vocabulary,
                rotary_border=stage.rotary_border,
            ),
            runner,
            _NoText(),
            template.step_deadline_ms / 1000,
        )
        self._engine.start()
        self._epoch.open()
        deadline = time.monotonic() + _START_DEADLINE_S
        while not self._engine.status().ready:
            if time.monotonic() > deadline:
                self._end()
                raise TimeoutError(f"the engine is not ready after {_START_DEADLINE_S:.0f} s")
            time.sleep(0.005)

    async def run(self, requests: Sequence[TimedRequest]) -> list[RequestTimes]:
        """See `protocol.Engine`."""
        return await replay(self._generate, requests)

    async def close(self) -> None:
        """See `protocol.Engine`."""
        await asyncio.to_thread(self._end)

    def _end(self) -> None:
        self._epoch.close()
        self._engine.stop()
        self._stage.close()
        self._listener.close()

    async def _generate(self, prompt: Sequence[int], tokens: int) -> AsyncIterator[int]:
        request = Request(tuple(prompt), _GREEDY, tokens, show_ids=True)
        (stream,) = self._engine.submit([request])
        finish = None
        while finish is None:
            chunk = await stream.next()
            yield len(chunk.ids)
            finish = chunk.finish


def _roster() -> Roster:
    """An epoch of one stage reads nothing of its roster but the epoch's name."""
    now = int(time.time())
    return Roster(
        instance=INSTANCE,
        cluster="benchmark",
        epoch=os.urandom(EPOCH_BYTES),
        serial=1,
        template_digest="",
        policy_digest="",
        manifest_digest="",
        entries=(),
        weaknesses=(),
        issued_at=now,
        expires_at=now + 86_400,
    )


def _fault(epoch: Epoch, reason: str, error: Exception | None) -> None:
    """Open requests fail with the engine's own error; this says what it was."""
    print(f"fault: {reason}", flush=True)


async def start(arguments: Arguments) -> LocalEngine:
    """Loads the model."""
    size = Size(arguments.context, arguments.sequences, weight_format=arguments.weights)
    deployment = plan_deployment(arguments.model, size)
    template = deployment.template
    settings = stage_settings(template, template.roles[0], arguments.threads)
    return LocalEngine(
        template, StageRunner(ModelFiles(arguments.model, deployment.manifest), settings)
    )


if __name__ == "__main__":
    drive(__doc__, start)
