"""What clients write and read is in nothing that a log could show."""

import asyncio
import dataclasses

import pytest

from runtime.engine.parameters import parse_chat, parse_completion
from runtime.engine.request import Chunk, Request, Sequence, TokenScore
from runtime.engine.runner import Recovery
from runtime.engine.scheduler import Scheduler
from runtime.engine.text import OutputText
from runtime.shard.pipeline import _Step, _Submitted
from security.channel.admission import Admission, SamplingParameters
from security.channel.frame import StepHeader, StepResult, TokenLogprobs
from tests.engine.fakes import Characters, limits

WORD = "Rumpelstiltskin"
# Digits that nothing else prints.
TOKEN, SEED, NUMBER = 77_001, 77_002, 0.77003
PARAMETERS = SamplingParameters(
    NUMBER,
    NUMBER,
    TOKEN,
    SEED,
    repetition_penalty=1.77003,
    min_tokens=TOKEN,
    end_tokens=(TOKEN,),
    logit_bias=((TOKEN, NUMBER),),
)
LOGPROBS = TokenLogprobs(-NUMBER, ((TOKEN, -NUMBER),))
ADMISSION = Admission(3, PARAMETERS, 1, (TOKEN,), (TOKEN,))
REQUEST = Request((TOKEN,), PARAMETERS, 5, frozenset({TOKEN}), (WORD,))
CHUNK = Chunk(WORD, 1, None, (TOKEN,), (TokenScore(TOKEN, 0, LOGPROBS),))
BODY = (
    b'{"model": "m", "%s": %s, "stop": "Rumpelstiltskin", "seed": 77002, "temperature": 0.77003,'
    b' "logit_bias": {"77001": 0.77003}}'
)


def step():
    """As the scheduler makes it."""
    scheduler = Scheduler(limits(vocabulary=100_000), 2, Recovery())
    scheduler.add(Sequence(0, REQUEST, OutputText(Characters(), ()), print))
    made = scheduler.schedule(0)
    assert made is not None and made.token_ids == [TOKEN] and made.admissions
    return made


SECRETS = [
    PARAMETERS,
    ADMISSION,
    LOGPROBS,
    StepResult(0, (TOKEN,), (LOGPROBS,)),
    REQUEST,
    CHUNK,
    parse_completion(BODY % (b"prompt", b'"Rumpelstiltskin"'), 100_000),
    parse_chat(BODY % (b"messages", b'[{"role": "user", "content": "Rumpelstiltskin"}]'), 100_000),
    step(),
    _Step(StepHeader(0, ()), [TOKEN], None, (ADMISSION,)),
    _Submitted(StepHeader(0, ()), [TOKEN]),
]


@pytest.mark.parametrize("secret", SECRETS, ids=lambda secret: type(secret).__name__)
def test_no_repr_tells_content(secret: object) -> None:
    # In what is compared, so that there is something to tell.
    fields = [getattr(secret, field.name) for field in dataclasses.fields(secret)]
    assert any(fields)
    for text in (repr(secret), str([secret]), f"{secret}"):
        assert "7700" not in text and WORD not in text, text


def test_asyncio_shows_results_by_their_repr() -> None:
    """Why this matters: a task that ends unread is logged like this."""

    async def told() -> str:
        task = asyncio.ensure_future(asyncio.sleep(0, CHUNK))
        await task
        return repr(task)

    text = asyncio.run(told())
    assert "Chunk" in text and WORD not in text and "7700" not in text
