import asyncio
import contextlib
import gc
import json
import socket
import threading
import time
import tracemalloc

import openai
import pytest
import uvicorn
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.responses import StreamingResponse
from starlette.routing import Route

from runtime.engine.defaults import GenerationDefaults, generation_defaults
from runtime.engine.engine import Engine
from runtime.engine.errors import InvalidRequest, ModelFailed
from runtime.engine.openai import OpenAIService
from runtime.engine.runner import Recovery
from runtime.engine.tokenizer import TokenizerError
from security.channel.admission import SamplingParameters
from tests.engine.fakes import (
    VOCABULARY,
    Characters,
    FakeRunner,
    alone,
    limits,
    next_logprobs,
)
from tests.engine.test_engine import request

MODEL = "org/tiny"
DEFAULTS = GenerationDefaults(1.0, 1.0, 0, frozenset({2}))


class Bench:
    """A service over the fake pipeline, with an engine thread of its own."""

    def __init__(self, codec=None, down=False, defaults=DEFAULTS, **recovery):
        bounds = limits(max_context=256, cache_blocks=128, max_sequences=8, max_waiting=24)
        self.runner = FakeRunner(bounds)
        self.runner.may_come_up = not down
        self.engine = Engine(
            bounds, self.runner, Characters(), 5.0, Recovery(**({"poll_s": 0.005} | recovery))
        )
        self.service = OpenAIService(
            self.engine, codec or Characters(), defaults, MODEL, max_body_bytes=100_000
        )

    def __enter__(self):
        self.engine.start()
        return self

    def __exit__(self, *_):
        self.service.close()
        self.engine.stop()

    async def call(self, path, body, method="POST", content_type="application/json"):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        response = await self.service.handle(method, path, content_type, content)
        return response, b"".join([chunk async for chunk in response.chunks])

    async def settled(self):
        end = time.monotonic() + 5
        while time.monotonic() < end:
            status = self.engine.status()
            if status.free_blocks == status.total_blocks and not self.engine._live:
                return
            await asyncio.sleep(0.005)
        raise AssertionError(f"not settled: {self.engine.status()}")


@pytest.fixture(scope="module")
def bench():
    with Bench() as ready:
        yield ready


@pytest.fixture(scope="module")
def client(bench):
    async def endpoint(http):
        response = await bench.service.handle(
            http.method,
            http.url.path,
            http.headers.get("content-type", ""),
            await http.body(),
        )
        return StreamingResponse(
            response.chunks, status_code=response.status, media_type=response.content_type
        )

    methods = ["GET", "POST", "PUT", "DELETE"]
    app = Starlette(routes=[Route("/{path:path}", endpoint, methods=methods)])
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()  # the client may come before the server does
        server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        address = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        with openai.OpenAI(base_url=address, api_key="none", max_retries=0) as made:
            yield made
        server.should_exit = True
        thread.join(10)


def text_of(prompt, tokens, **fields):
    asked = request(prompt, tokens, end_tokens=frozenset({2}), **fields)
    return Characters().decode(alone(asked))


def chat_prompt(content):
    return Characters().render([{"role": "user", "content": content}])


# With the official client, unchanged.


def test_models(client):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "bulkhead"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_completion(client):
    answer = client.completions.create(
        model=MODEL, prompt="abc", max_tokens=10, temperature=0, user="me"
    )
    assert answer.choices[0].text == text_of("\x01abc", 10)
    assert answer.choices[0].finish_reason == "length"
    assert answer.object == "text_completion" and answer.id.startswith("cmpl-")
    assert abs(answer.created - time.time()) < 60
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (4, 10, 14)


def test_completion_defaults_to_sixteen_tokens(client):
    answer = client.completions.create(model=MODEL, prompt="abc", temperature=0)
    assert answer.usage.completion_tokens == 16


def test_batches_of_prompts_and_choices(client):
    answer = client.completions.create(
        model=MODEL, prompt=["ab", "cd"], n=2, max_tokens=5, temperature=0
    )
    assert [c.index for c in answer.choices] == [0, 1, 2, 3]
    expected = [text_of("\x01ab", 5)] * 2 + [text_of("\x01cd", 5)] * 2
    assert [c.text for c in answer.choices] == expected
    assert answer.usage.prompt_tokens == 6 and answer.usage.completion_tokens == 20
    ids = client.completions.create(model=MODEL, prompt=[[97, 98]], max_tokens=5, temperature=0)
    assert ids.choices[0].text == text_of("ab", 5)
    flat = client.completions.create(model=MODEL, prompt=[97, 98], max_tokens=5, temperature=0)
    assert flat.choices[0].text == text_of("ab", 5)


def test_streamed_completion(client):
    stream = client.completions.create(
        model=MODEL,
        prompt=["ab", "cd"],
        max_tokens=12,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    events = list(stream)
    texts = ["", ""]
    finishes = []
    for event in events[:-1]:
        assert event.usage is None
        texts[event.choices[0].index] += event.choices[0].text
        finishes.append(event.choices[0].finish_reason)
    assert texts == [text_of("\x01ab", 12), text_of("\x01cd", 12)]
    assert finishes.count("length") == 2
    assert events[-1].choices == [] and events[-1].usage.completion_tokens == 24


def test_chat(client):
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
        max_completion_tokens=9,
        temperature=0,
        metadata={"a": "b"},
        logprobs=False,
        tools=openai.omit,
    )
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-")
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == text_of(chat_prompt("hi"), 9)
    assert answer.usage.prompt_tokens == len(chat_prompt("hi"))


def test_streamed_chat(client):
    events = list(
        client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "hi"}],
            max_tokens=9,
            temperature=0,
            stream=True,
        )
    )
    first, *pieces, last = (event.choices[0] for event in events)
    assert (first.delta.role, first.delta.content) == ("assistant", "")
    assert "".join(p.delta.content for p in pieces) == text_of(chat_prompt("hi"), 9)
    assert all(p.finish_reason is None for p in pieces)
    assert last.finish_reason == "length" and last.delta.content is None
    assert len({event.id for event in events}) == 1


def test_chat_defaults_to_what_the_context_leaves(client):
    answer = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "hi"}], temperature=0
    )
    assert answer.usage.total_tokens == 256


def test_stop_strings(client):
    whole = text_of("\x01abc", 30)
    stop = whole[5:8]
    for stream in (False, True):
        answer = client.completions.create(
            model=MODEL, prompt="abc", max_tokens=30, temperature=0, stop=[stop], stream=stream
        )
        choices = [e.choices[0] for e in answer] if stream else answer.choices
        assert "".join(c.text for c in choices) == whole[: whole.find(stop)]
        assert choices[-1].finish_reason == "stop"


def test_end_tokens_and_ignoring_them(client):
    ids = alone(request("\x01abc", 30))
    end = ids[6]
    common = {"model": MODEL, "prompt": "abc", "max_tokens": 30, "temperature": 0}
    answer = client.completions.create(**common, extra_body={"stop_token_ids": [end]})
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == ids.index(end) + 1
    assert answer.choices[0].text == Characters().decode(ids[: ids.index(end)])
    answer = client.completions.create(**common, extra_body={"ignore_eos": True})
    assert answer.usage.completion_tokens == 30


def test_seeds(client):
    def sample(**fields):
        answer = client.completions.create(
            model=MODEL, prompt="abc", max_tokens=20, n=2, temperature=1.0, **fields
        )
        return [choice.text for choice in answer.choices]

    assert sample(seed=7) == sample(seed=7) != sample(seed=8)
    assert sample() != sample()
    assert len(set(sample(seed=7))) == 2
    assert sample(seed=-1) == sample(seed=-1)


def test_errors_as_the_client_sees_them(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="gpt-4", prompt="x")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt="x" * 300)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "x" * 200}], max_tokens=100
        )
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "x"}],
            response_format={"type": "json_object"},
        )
    assert caught.value.param == "response_format"


def test_a_client_that_leaves_frees_its_slot(client, bench):
    stream = client.completions.create(
        model=MODEL, prompt="abc", max_tokens=250, temperature=0, stream=True
    )
    next(iter(stream))
    stream.close()
    asyncio.run(bench.settled())


# Against the service itself.


def chat_body(**fields):
    return {"model": MODEL, "messages": [{"role": "user", "content": "secret"}]} | fields


BAD = [
    ({"messages": None}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "secret"}, "messages"),
    ({"messages": ["secret"]}, "messages[0]"),
    ({"messages": [{"role": "secret", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages[0].content[0].type",
    ),
    (
        {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]},
        "messages[0].tool_calls",
    ),
    ({"model": None}, "model"),
    ({"model": 3}, "model"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"temperature": 10**400}, "temperature"),
    ({"top_p": 1.5}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"n": 0}, "n"),
    ({"n": 1.5}, "n"),
    ({"n": 1000}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 10**4299 * 9}, "max_tokens"),
    ({"min_tokens": 10**4299 * 9}, "min_tokens"),
    ({"max_completion_tokens": "1"}, "max_completion_tokens"),
    ({"seed": "x"}, "seed"),
    ({"seed": 2**64}, "seed"),
    ({"stop": [""]}, "stop"),
    ({"stop": [1]}, "stop"),
    ({"stop": ["x"] * 17}, "stop"),
    ({"stop_token_ids": [VOCABULARY]}, "stop_token_ids"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"x": 1}}, "stream_options"),
    ({"logprobs": 1}, "logprobs"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": False, "top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"frequency_penalty": 2.5}, "frequency_penalty"),
    ({"presence_penalty": True}, "presence_penalty"),
    ({"presence_penalty": -2.1}, "presence_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"min_p": 1.1}, "min_p"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"min_tokens": 3, "max_tokens": 2}, "min_tokens"),
    ({"min_tokens": 250}, "min_tokens"),
    ({"min_tokens": 1, "stop_token_ids": list(range(VOCABULARY))}, "min_tokens"),
    ({"logit_bias": [1]}, "logit_bias"),
    ({"logit_bias": {str(VOCABULARY): 2}}, "logit_bias"),
    ({"logit_bias": {"-1": 2}}, "logit_bias"),
    ({"logit_bias": {"secret": 2}}, "logit_bias"),
    ({"logit_bias": {"1_0": 2}}, "logit_bias"),
    ({"logit_bias": {"\u0661": 2}}, "logit_bias"),
    ({"logit_bias": {"1" * 5000: 2}}, "logit_bias"),
    ({"logit_bias": {"1": 100.5}}, "logit_bias"),
    ({"logit_bias": {"1": 10**400}}, "logit_bias"),
    ({"logit_bias": {"1": True}}, "logit_bias"),
    ({"logit_bias": {"1": 2, "01": 2}}, "logit_bias"),
    ({"logit_bias": {str(token): 1 for token in range(2000)}}, "logit_bias"),
    ({"include_stop_str_in_output": "x"}, "include_stop_str_in_output"),
    ({"skip_special_tokens": False}, "skip_special_tokens"),
    ({"user": 3}, "user"),
    ({"metadata": "x"}, "metadata"),
    ({"chat_template": "{{ x }}"}, "chat_template"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    ({"echo": True}, "echo"),
    ({"frobnicate": 1}, "frobnicate"),
    ({"hello secret": 1}, "(not a name)"),
]


async def _bad(bench, change, param):
    response, content = await bench.call("/v1/chat/completions", chat_body(**change))
    error = json.loads(content)["error"]
    assert (response.status, error["param"]) == (400, param)
    assert error["type"] == "invalid_request_error"
    assert "secret" not in content.decode()


@pytest.mark.parametrize(("change", "param"), BAD)
def test_bad_chat_bodies_name_the_parameter(bench, change, param):
    asyncio.run(_bad(bench, change, param))


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": {}}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [VOCABULARY]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [[1], 2]}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", [1, "secret"]]}, "prompt"),
        ({"echo": True}, "echo"),
        ({"logprobs": True}, "logprobs"),
        ({"logprobs": 21}, "logprobs"),
        ({"min_tokens": 17}, "min_tokens"),
        ({"best_of": 2}, "best_of"),
        ({"suffix": "secret"}, "suffix"),
        ({"messages": []}, "messages"),
    ],
)
def test_bad_completion_bodies_name_the_parameter(bench, change, param):
    body = {"model": MODEL, "prompt": "secret"} | change
    response, content = asyncio.run(bench.call("/v1/completions", body))
    error = json.loads(content)["error"]
    assert (response.status, error["param"]) == (400, param)
    assert "secret" not in content.decode()


@pytest.mark.parametrize(
    "change",
    [
        {"logprobs": None, "tools": None, "response_format": None, "frequency_penalty": None},
        {"response_format": {"type": "text"}, "tools": [], "tool_choice": "none", "logit_bias": {}},
        {"frequency_penalty": 0.0, "presence_penalty": 0, "parallel_tool_calls": True},
        {"frequency_penalty": -2, "presence_penalty": 2.0, "repetition_penalty": 1.1, "min_p": 0.5},
        {"logprobs": False, "top_logprobs": 0, "min_tokens": None, "logit_bias": {"0": -100}},
        {"top_p": 0, "top_k": -1, "n": 1.0, "store": False, "service_tier": "auto"},
        {"temperature": 1e-300, "top_k": 10**30, "stop": None, "seed": None, "user": None},
        {"stop": "x", "safety_identifier": "x", "prompt_cache_key": "x"},
    ],
)
def test_harmless_values_are_accepted(bench, change):
    body = chat_body(max_tokens=2, **change)
    response, content = asyncio.run(bench.call("/v1/chat/completions", body))
    assert response.status == 200, content


@pytest.mark.parametrize(
    ("method", "path", "content_type", "body", "status"),
    [
        ("POST", "/v1/completions", "application/json", b"{secret", 400),
        ("POST", "/v1/completions", "application/json", b"[]", 400),
        ("POST", "/v1/completions", "application/json", b"", 400),
        ("POST", "/v1/completions", "application/json", b"\xff\xfe", 400),
        ("POST", "/v1/completions", "application/json", b'{"a":' * 5000, 400),
        ("POST", "/v1/completions", "application/json", b"[" * 90_000, 400),
        ("POST", "/v1/completions", "application/json", b'{"n": NaN}', 400),
        ("POST", "/v1/completions", "application/json", b'{"n": ' + b"1" * 5000 + b"}", 400),
        ("POST", "/v1/completions", "application/json", b" " * 100_001, 413),
        ("POST", "/v1/completions", "text/plain", b"{}", 415),
        ("GET", "/v1/completions", "", b"", 405),
        ("POST", "/v1/models", "", b"", 405),
        ("GET", "/v1/nothing", "", b"", 404),
        ("GET", "/", "", b"", 404),
        ("GET", "/v1/models/secret", "", b"", 404),
    ],
)
def test_statuses(bench, method, path, content_type, body, status):
    response, content = asyncio.run(bench.call(path, body, method, content_type))
    assert response.status == status
    assert set(json.loads(content)["error"]) == {"message", "type", "param", "code"}
    assert b"secret" not in content


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(["/v1/completions", "/v1/chat/completions"]),
    st.sampled_from(
        [
            "model",
            "prompt",
            "messages",
            "n",
            "stop",
            "seed",
            "stream",
            "stream_options",
            "max_tokens",
            "temperature",
            "top_p",
            "top_k",
            "tools",
            "logprobs",
            "metadata",
            "chat_template_kwargs",
            "stop_token_ids",
            "best_of",
            "logprobs",
            "top_logprobs",
            "logit_bias",
            "min_p",
            "min_tokens",
            "presence_penalty",
            "repetition_penalty",
            "include_stop_str_in_output",
        ]
    ),
    json_values,
)
def test_no_value_of_any_field_is_an_internal_error(bench, path, name, value):
    body = {"model": MODEL, "max_tokens": 2}
    body |= {"prompt": "x"} if path.endswith("v1/completions") else chat_body()
    response, content = asyncio.run(bench.call(path, body | {name: value}))
    assert response.status in (200, 400, 404), content


def test_a_full_queue_is_refused_with_429():
    body = {"model": MODEL, "prompt": "x", "n": 8, "max_tokens": 250, "stream": True}
    # What a client writes into the body does not make it another tenant.
    disguised = body | {"user": "b", "prompt_cache_key": "b", "safety_identifier": "b"}
    asked = [(b"a", body)] * 3 + [(b"a", disguised), (b"b", body), (b"c", body)]
    # While the pipeline is down, nothing that is taken ends before the next comes.
    with Bench(down=True) as bench:

        async def scenario():
            held, errors = [], []
            for tenant, document in asked:
                response = await bench.service.handle(
                    "POST",
                    "/v1/completions",
                    "application/json",
                    json.dumps(document).encode(),
                    tenant,
                )
                if response.status == 429:
                    assert response.retry_after_s == 1
                    content = b"".join([chunk async for chunk in response.chunks])
                    errors.append(json.loads(content)["error"])
                held.append(response)
            for response in held:
                await response.chunks.aclose()
            await bench.settled()
            return [response.status for response in held], errors

        statuses, errors = asyncio.run(scenario())
        assert statuses == [200, 200, 200, 429, 200, 429]
        assert {error["code"] for error in errors} == {"rate_limit_exceeded"}
        assert {error["type"] for error in errors} == {"rate_limit_error"}
        assert "24 outputs of yours are being served or waiting, at most 29" in errors[0]["message"]
        assert "32 outputs are being served or waiting, at most 32" in errors[1]["message"]


@pytest.mark.parametrize("read", [0, 1, 3])
def test_closing_the_chunks_aborts_the_request(bench, read):
    async def scenario():
        response = await bench.service.handle(
            "POST",
            "/v1/chat/completions",
            "application/json",
            json.dumps(chat_body(stream=True, n=3)).encode(),
        )
        for _ in range(read):
            await anext(response.chunks)
        await response.chunks.aclose()
        await response.chunks.aclose()
        await bench.settled()

    asyncio.run(scenario())


def test_cancelling_handle_aborts_the_request():
    with Bench(down=True) as bench:

        async def scenario():
            task = asyncio.ensure_future(bench.call("/v1/chat/completions", chat_body()))
            for _ in range(1000):
                if bench.engine.status().waiting:
                    break
                await asyncio.sleep(0.005)
            assert bench.engine.status().waiting == 1
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            await bench.settled()

        asyncio.run(scenario())


def test_an_outage_beyond_the_deadline_is_503_or_an_error_event():
    with Bench(down=True, deadline_s=0.3) as bench:

        async def scenario():
            whole, streamed = await asyncio.gather(
                bench.call("/v1/chat/completions", chat_body()),
                bench.call("/v1/chat/completions", chat_body(stream=True)),
            )
            later = await bench.call("/v1/chat/completions", chat_body(stream=True))
            return whole, streamed, later

        whole, streamed, later = asyncio.run(scenario())
    assert whole[0].status == 503
    assert json.loads(whole[1])["error"]["code"] == "pipeline_unavailable"
    assert streamed[0].status == 200
    *_, last, empty = streamed[1].split(b"\n\n")
    assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "pipeline_unavailable"
    assert empty == b"" and b"[DONE]" not in streamed[1]
    assert later[0].status == 503
    assert (whole[0].retry_after_s, streamed[0].retry_after_s) == (5, None)
    assert later[0].retry_after_s == 5


@pytest.mark.parametrize("stream", [False, True])
def test_a_choice_that_fails_leaves_nothing_behind(stream):
    """The other choices are cancelled; no task waits for ever, no error is left to a log."""
    for lost in (1, 2):  # of the two choices
        with Bench() as bench:
            complaints = []

            async def scenario(bench=bench, lost=lost, complaints=complaints):
                asyncio.get_running_loop().set_exception_handler(
                    lambda _, context: complaints.append(context)
                )
                submit = bench.engine.submit

                def failing(requests, **fields):
                    # The engine waits, lest it finishes an output before it is told to fail.
                    gate = threading.Event()
                    bench.engine._commands.put(gate.wait)
                    streams = submit(requests, **fields)
                    for lost_stream in streams[-lost:]:
                        lost_stream.put(ModelFailed("given up"))
                        lost_stream._cancel()
                    gate.set()
                    return streams

                bench.engine.submit = failing
                body = chat_body(n=2, stream=stream, max_tokens=200)
                answer = await bench.call("/v1/chat/completions", body)
                await bench.settled()
                return answer, asyncio.all_tasks() - {asyncio.current_task()}

            (response, content), tasks = asyncio.run(scenario())
            gc.collect()
            assert not tasks and not complaints
            assert response.status == (200 if stream else 500)
            assert b"model_failed" in content and b"[DONE]" not in content


def test_an_outage_ends_all_choices_without_a_complaint():
    with Bench(down=True, deadline_s=0.2) as bench:
        complaints = []

        async def scenario():
            asyncio.get_running_loop().set_exception_handler(
                lambda _, context: complaints.append(context)
            )
            answers = [
                bench.call("/v1/chat/completions", chat_body(n=4, stream=stream))
                for stream in (False, True)
            ]
            found = await asyncio.gather(*answers)
            gc.collect()
            return found

        found = asyncio.run(scenario())
        gc.collect()
    assert [response.status for response, _ in found] == [503, 200]
    assert not complaints


def test_absurd_numbers_of_outputs_are_refused_before_they_are_made():
    """A body of 6 kB must not become 262,144 requests of a prompt each."""
    body = {"model": MODEL, "prompt": ["x"] * 2048, "n": 128, "max_tokens": 1}
    with Bench() as bench:
        tracemalloc.start()
        try:
            response, content = asyncio.run(bench.call("/v1/completions", body))
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert response.status == 400 and b"at most" in content
    assert peak < 10_000_000


def test_long_bodies_that_wait_to_be_read_are_bounded():
    """The service's bodies may have 100,000 bytes; four such may wait."""

    class Slow(Characters):
        def render(self, messages, arguments=None):
            assert go_on.wait(20)
            return super().render(messages[:1])

    go_on = threading.Event()
    long = chat_body(max_tokens=1)
    long["messages"] = [*long["messages"], {"role": "user", "content": "x" * 90_000}]
    with Bench(Slow()) as bench:

        async def scenario():
            waiting = [
                asyncio.ensure_future(bench.call("/v1/chat/completions", long)) for _ in range(4)
            ]
            await asyncio.sleep(0)
            refused, content = await bench.call("/v1/chat/completions", long)
            other, _ = await bench.call("/v1/completions", long)
            waiting.pop().cancel()
            short = asyncio.ensure_future(
                bench.call("/v1/chat/completions", chat_body(max_tokens=1))
            )
            await asyncio.sleep(0)
            go_on.set()
            answers = [await task for task in [*waiting, short]]
            again, _ = await bench.call("/v1/chat/completions", long)
            return refused, content, other, answers, again

        refused, content, other, answers, again = asyncio.run(scenario())
    assert (refused.status, refused.retry_after_s, other.status) == (429, 1, 429)
    assert json.loads(content)["error"]["code"] == "rate_limit_exceeded"
    assert [response.status for response, _ in answers] == [200] * 4
    assert again.status == 200


def test_streams_pause_over_a_break_and_go_on(monkeypatch):
    monkeypatch.setattr("runtime.engine.openai.KEEPALIVE_S", 0.02)
    with Bench() as bench:

        async def scenario():
            body = {
                "model": MODEL,
                "prompt": "abc",
                "max_tokens": 240,
                "temperature": 0,
                "stream": True,
            }
            content = json.dumps(body).encode()
            bench.runner.stop_at = 120
            response = await bench.service.handle("POST", "/v1/completions", "", content)
            pieces = [await anext(response.chunks)]
            while b": waiting\n\n" not in pieces:
                pieces.append(await anext(response.chunks))
            bench.runner.may_come_up = True
            pieces += [piece async for piece in response.chunks]
            return b"".join(pieces)

        content = asyncio.run(scenario())
    events = [e for e in content.split(b"\n\n") if e.startswith(b"data: {")]
    text = "".join(json.loads(e[6:])["choices"][0]["text"] for e in events)
    assert text == text_of("\x01abc", 240)
    assert content.endswith(b"data: [DONE]\n\n")


def test_an_internal_error_says_nothing(caplog):
    class Broken(Characters):
        def render(self, messages, arguments=None):
            raise ValueError(str(messages))

    with Bench(Broken()) as bench:
        response, content = asyncio.run(bench.call("/v1/chat/completions", chat_body()))
    assert response.status == 500
    assert b"secret" not in content and "secret" not in caplog.text
    assert "ValueError" in caplog.text


# Defaults of the model.


def test_generation_defaults(caplog):
    content = json.dumps(
        {
            "temperature": 0.6,
            "top_p": 0.95,
            "top_k": 20,
            "do_sample": True,
            "eos_token_id": [5, 6],
            "repetition_penalty": 1.1,
            "min_p": 0.05,
            "no_repeat_ngram_size": 3,
            "max_new_tokens": 99,
        }
    ).encode()
    found = generation_defaults(content, b'{"eos_token_id": 9}', 7)
    assert found == GenerationDefaults(0.6, 0.95, 20, frozenset({5, 6}), 99, 0.05, 1.1)
    assert "no_repeat_ngram_size is not supported" in caplog.text
    assert "repetition_penalty" not in caplog.text


def test_silence_means_openai_defaults(caplog):
    assert generation_defaults(b"{}", None, None) == GenerationDefaults(1.0, 1.0, 0, frozenset())
    assert generation_defaults(None, b'{"eos_token_id": 9}', None).end_tokens == {9}
    assert generation_defaults(None, None, 3).end_tokens == {3}
    assert not caplog.text


def test_do_sample_false_means_greedy():
    assert (
        generation_defaults(b'{"do_sample": false, "temperature": 0.6}', None, 1).temperature == 0
    )


@pytest.mark.parametrize(
    "content",
    [
        b"[]",
        b"{",
        b'{"temperature": "x"}',
        b'{"top_p": 2}',
        b'{"eos_token_id": "x"}',
        b'{"top_k": 1.5}',
        b'{"min_p": 2}',
        b'{"repetition_penalty": 0}',
        json.dumps({"eos_token_id": list(range(600))}).encode(),
    ],
)
def test_generation_configs_that_make_no_sense(content):
    with pytest.raises(TokenizerError):
        generation_defaults(content, None, None)


def test_token_ids_where_asked_for(client):
    common = {"model": MODEL, "prompt": "abc", "max_tokens": 12, "seed": 3}
    asked = {**common, "extra_body": {"return_token_ids": True, "ignore_eos": True}}
    whole = client.completions.create(**asked).choices[0]
    assert len(whole.token_ids) == 12
    assert Characters().decode(whole.token_ids) == whole.text
    streamed = client.completions.create(**asked, stream=True)
    found = [token for event in streamed for token in event.choices[0].token_ids]
    assert found == whole.token_ids
    assert not hasattr(client.completions.create(**common).choices[0], "token_ids")
    message = [{"role": "user", "content": "hello"}]
    chat = {"model": MODEL, "messages": message, "max_tokens": 9, "seed": 3}
    answer = client.chat.completions.create(**chat, extra_body={"return_token_ids": True})
    events = client.chat.completions.create(
        **chat, stream=True, extra_body={"return_token_ids": True}
    )
    found = [token for event in events for token in getattr(event.choices[0], "token_ids", [])]
    assert found == answer.choices[0].token_ids
    assert len(found) == answer.usage.completion_tokens


# Logprobs, with the official client. The fake's likeliest token is always the one drawn.


def scored(token, wanted):
    """What the answer says of a token of the fake: name, logprob, and its alternatives."""
    told = next_logprobs(token, wanted)
    return chr(token), told.chosen, [(chr(t % 128), value) for t, value in told.alternatives]


def test_logprobs_of_a_chat(client):
    common = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 9,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 3,
    }
    answer = client.chat.completions.create(**common).choices[0]
    entries = answer.logprobs.content
    assert "".join(entry.token for entry in entries) == answer.message.content
    for entry in entries:
        assert entry.bytes == list(entry.token.encode())
        name, chosen, alternatives = scored(ord(entry.token), 3)
        assert (entry.token, entry.logprob) == (name, chosen)
        found = [(other.token, other.logprob) for other in entry.top_logprobs]
        # The names of the fake's special tokens are not single letters.
        assert [value for _, value in found] == [value for _, value in alternatives]
        assert found[0] == (name, chosen)
    events = client.chat.completions.create(**common, stream=True)
    streamed = []
    for event in events:
        choice = event.choices[0]
        if choice.logprobs is not None:
            assert "".join(e.token for e in choice.logprobs.content) == choice.delta.content
            streamed += choice.logprobs.content
    assert streamed == entries
    plain = client.chat.completions.create(**(common | {"top_logprobs": openai.omit}))
    assert [entry.top_logprobs for entry in plain.choices[0].logprobs.content] == [[]] * 9
    without = client.chat.completions.create(
        **(common | {"top_logprobs": openai.omit, "logprobs": openai.omit})
    )
    assert without.choices[0].logprobs is None


def test_logprobs_of_a_completion(client):
    common = {"model": MODEL, "prompt": "abc", "max_tokens": 12, "temperature": 0}
    for wanted in (0, 2, 5):
        choice = client.completions.create(**common, logprobs=wanted).choices[0]
        told = choice.logprobs
        assert "".join(told.tokens) == choice.text
        assert told.text_offset == list(range(12))
        for name, value, likeliest in zip(
            told.tokens, told.token_logprobs, told.top_logprobs, strict=True
        ):
            assert value == next_logprobs(ord(name), wanted).chosen
            assert likeliest[name] == value
            assert len(likeliest) == max(1, wanted)
    stream = client.completions.create(**common, logprobs=5, stream=True)
    parts = [event.choices[0] for event in stream]
    assert [name for part in parts for name in part.logprobs.tokens] == told.tokens
    assert [at for part in parts for at in part.logprobs.text_offset] == told.text_offset
    assert [v for part in parts for v in part.logprobs.top_logprobs] == told.top_logprobs
    assert client.completions.create(**common).choices[0].logprobs is None


@pytest.mark.parametrize("include", [False, True])
def test_logprobs_end_where_the_text_ends_at_a_stop_string(client, include):
    whole = text_of("\x01abc", 30)
    stop = whole[5:8]
    at = whole.find(stop)
    shown = whole[: at + len(stop)] if include else whole[:at]
    common = {"model": MODEL, "prompt": "abc", "max_tokens": 30, "temperature": 0, "stop": stop}
    common |= {"logprobs": 0, "extra_body": {"include_stop_str_in_output": include}}
    choice = client.completions.create(**common).choices[0]
    assert (choice.text, "".join(choice.logprobs.tokens)) == (shown, shown)
    text = names = ""
    for event in client.completions.create(**common, stream=True):
        text += event.choices[0].text
        names += "".join(event.choices[0].logprobs.tokens)
        # No name is told before its text: it would give a stop string away.
        assert len(names) <= len(text)
    assert (text, names) == (shown, shown)


def test_an_end_token_has_no_logprobs_and_counts(client):
    ids = alone(request("\x01abc", 30))
    end = ids[6]
    answer = client.completions.create(
        model=MODEL,
        prompt="abc",
        max_tokens=30,
        temperature=0,
        logprobs=1,
        extra_body={"stop_token_ids": [end]},
    )
    first = ids.index(end)
    assert answer.usage.completion_tokens == first + 1
    assert [ord(name) for name in answer.choices[0].logprobs.tokens] == ids[:first]


def test_choices_have_logprobs_of_their_own(client):
    answer = client.completions.create(
        model=MODEL, prompt="abc", max_tokens=5, seed=3, n=3, logprobs=0
    )
    assert len({choice.text for choice in answer.choices}) == 3
    for choice in answer.choices:
        assert "".join(choice.logprobs.tokens) == choice.text


def test_all_parameters_reach_the_stage(bench):
    body = {
        "model": MODEL,
        "prompt": "abc",
        "max_tokens": 6,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 11,
        "min_p": 0.1,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "repetition_penalty": 1.5,
        "min_tokens": 4,
        "stop_token_ids": [7, 3],
        "logit_bias": {"5": 1.5, "127": -100},
        "logprobs": 2,
        "seed": 2**64 - 2,
        "n": 3,
        "return_token_ids": True,
    }
    _, content = asyncio.run(bench.call("/v1/completions", body))
    for index, choice in enumerate(json.loads(content)["choices"]):
        wanted = SamplingParameters(
            0.5,
            0.9,
            11,
            (2**64 - 2 + index) % 2**64,
            0.1,
            0.5,
            -0.5,
            1.5,
            4,
            (2, 3, 7),
            ((5, 1.5), (127, -100.0)),
            2,
        )
        asked = request("\x01abc", 6, sampling=wanted, end_tokens=frozenset({2, 3, 7}))
        assert choice["token_ids"] == alone(asked)


def test_the_model_s_defaults_count_where_the_request_is_silent():
    defaults = GenerationDefaults(0.0, 1.0, 0, frozenset({2}), 8, 0.3, 1.2)
    with Bench(defaults=defaults) as bench:
        body = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "seed": 1}
        for change, wanted in (
            ({}, SamplingParameters(0.0, 1.0, 0, 1, min_p=0.3, repetition_penalty=1.2)),
            ({"min_p": 0, "repetition_penalty": 1}, SamplingParameters(0.0, 1.0, 0, 1)),
            # More than the default length is asked for.
            (
                {"min_tokens": 11},
                SamplingParameters(
                    0.0, 1.0, 0, 1, 0.3, repetition_penalty=1.2, min_tokens=11, end_tokens=(2,)
                ),
            ),
        ):
            _, content = asyncio.run(bench.call("/v1/chat/completions", body | change))
            count = change.get("min_tokens", 8)
            asked = request(chat_prompt("x"), count, sampling=wanted, end_tokens=frozenset({2}))
            text = Characters().decode(alone(asked))
            assert json.loads(content)["choices"][0]["message"]["content"] == text


def test_a_short_body_cannot_ask_for_more_than_fits_the_memory(bench):
    """100 kB that would be 256,000 requests with a prompt each."""
    body = {"model": MODEL, "prompt": [[1] * 16] * 2000, "n": 128, "max_tokens": 4}
    content = json.dumps(body, separators=(",", ":")).encode()
    tracemalloc.start()
    try:
        with pytest.raises(InvalidRequest, match="asks for 256000 outputs; expected at most"):
            bench.service._prepare_completion(content)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 50 * len(content)
    with pytest.raises(InvalidRequest, match="asks for 128 outputs"):
        bench.service._prepare_chat(json.dumps(chat_body() | {"n": 128}).encode())


def test_choices_share_their_prompt(bench):
    """128 choices of a long prompt are not 128 copies of it."""
    body = {"model": MODEL, "prompt": [list(range(40)), [7] * 9], "n": 3, "max_tokens": 4}
    _, requests = bench.service._prepare_completion(json.dumps(body).encode())
    assert [len(request.prompt) for request in requests] == [40] * 3 + [9] * 3
    assert len({id(request.prompt) for request in requests}) == 2


@pytest.mark.parametrize("field", ["max_tokens", "min_tokens", "seed", "n"])
def test_an_integer_of_any_length_is_the_clients_fault(bench, field):
    """Python refuses to print one of more than 4,300 digits, and reads one of so many."""
    body = b'{"model": "org/tiny", "prompt": "x", "%s": %s}' % (field.encode(), b"9" * 4300)
    response, content = asyncio.run(bench.call("/v1/completions", body))
    assert response.status == 400
    assert json.loads(content)["error"]["type"] == "invalid_request_error"
    assert b"999" not in content
