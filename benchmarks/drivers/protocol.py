"""The driver's side of the conversation with `benchmarks.driver`. Standard library only.

One JSON document a line: commands on standard input, answers on a descriptor of their own, because
engines print what they like.

    <- {"ready": true}                                     once, after the first answer
    -> {"requests": [[at_s, [id, ...], tokens], ...]}
    <- {"times": [[submitted_s, [token_s, ...]], ...]}

The end of standard input ends the driver: in order if it can, by force if it is busy for longer, so
that nothing goes on computing when whoever started it has gone.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from benchmarks.times import RequestTimes, TimedRequest

__all__ = ["Arguments", "Engine", "Generate", "drive", "replay"]

Generate = Callable[[Sequence[int], int], AsyncIterator[int]]
"""Given prompt and output tokens, yields the number of tokens that have just come."""

# Ready means: has answered. The prompt is short, the answer long enough to have used the cache.
_FIRST = TimedRequest(0.0, tuple(range(3, 19)), 2)


# How long a driver may take to end in order.
_END_S = 5.0


@dataclass(frozen=True, slots=True)
class Arguments:
    """What every driver is told on its command line.

    Attributes:
        model: checkpoint directory.
        threads: processor cores to use.
        context: longest sequence, in tokens.
        sequences: most sequences at once.
        answers: descriptor for answers.
        weights: format of linears and head; peers have the plain one only.
    """

    model: Path
    threads: int
    context: int
    sequences: int
    answers: int
    weights: str


class Engine(Protocol):
    """An engine under load."""

    async def run(self, requests: Sequence[TimedRequest]) -> list[RequestTimes]:
        """Serves the requests as they arrive; the times of each, in order."""
        ...

    async def close(self) -> None:
        """Ends it."""
        ...


def drive(description: str | None, start: Callable[[Arguments], Awaitable[Engine]]) -> None:
    """The main function of a driver: starts the engine and does what comes on standard input."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", type=Path, required=True)
    for name in ("threads", "context", "sequences", "answers"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--weights", default="plain")
    arguments = Arguments(**vars(parser.parse_args()))
    # The engine's own processes must not hold our end of it.
    os.set_inheritable(arguments.answers, False)
    asyncio.run(_drive(arguments, start))


async def _drive(arguments: Arguments, start: Callable[[Arguments], Awaitable[Engine]]) -> None:
    commands: asyncio.Queue[str] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def listen() -> None:
        for line in sys.stdin:
            loop.call_soon_threadsafe(commands.put_nowait, line)
        loop.call_soon_threadsafe(commands.put_nowait, "")
        time.sleep(_END_S)
        if os.getpgrp() == os.getpid():
            os.killpg(0, signal.SIGKILL)

    threading.Thread(target=listen, name="commands", daemon=True).start()
    engine = await start(arguments)
    try:
        await engine.run([_FIRST])
        with os.fdopen(arguments.answers, "w", buffering=1) as answers:
            print(json.dumps({"ready": True}), file=answers)
            while line := await commands.get():
                requests = [
                    TimedRequest(at_s, tuple(prompt), tokens)
                    for at_s, prompt, tokens in json.loads(line)["requests"]
                ]
                times = await engine.run(requests)
                rows = [[request.submitted_s, list(request.tokens_s)] for request in times]
                print(json.dumps({"times": rows}), file=answers)
    finally:
        await engine.close()


async def replay(generate: Generate, requests: Sequence[TimedRequest]) -> list[RequestTimes]:
    """Sends each request when its time has come, and notes when its tokens arrive.

    Raises:
        ValueError: an answer has another number of tokens than was asked for.
    """
    begin = time.perf_counter()

    async def serve(request: TimedRequest) -> RequestTimes:
        await asyncio.sleep(request.at_s - (time.perf_counter() - begin))
        submitted = time.perf_counter() - begin
        tokens: list[float] = []
        async for count in generate(request.prompt, request.tokens):
            tokens += [time.perf_counter() - begin] * count
        if len(tokens) != request.tokens:
            raise ValueError(f"answer: expected {request.tokens} tokens, found {len(tokens)}")
        return RequestTimes(submitted, tuple(tokens))

    return await asyncio.gather(*(serve(request) for request in requests))
