"""The OpenAI-compatible endpoint, without HTTP: requests in, responses out.

A request's life: `handle` reads the body (`parameters`), renders and tokenizes it in a thread of
the service's own, gives one `Request` for each prompt and choice to the engine, and turns the
engine's chunks into JSON or server-sent events.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, Self, TypeVar

from runtime.engine.defaults import GenerationDefaults
from runtime.engine.engine import Engine
from runtime.engine.errors import (
    BodyTooLong,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
    PathNotFound,
    RequestError,
    UnsupportedMediaType,
    WrongMethod,
)
from runtime.engine.parameters import ChatBody, Options, parse_chat, parse_completion
from runtime.engine.request import Chunk, FinishReason, Request, TokenScore
from runtime.engine.stream import TokenStream
from security.channel.admission import SamplingParameters

__all__ = ["OpenAIService", "Response", "TextCodec"]

_log = logging.getLogger(__name__)

JSON_TYPE = "application/json"
EVENT_STREAM = "text/event-stream; charset=utf-8"
MAX_BODY_BYTES = 16 * 1024 * 1024
# Below this, dividing logits by the temperature is greedy but for rounding (vLLM draws this line).
LEAST_TEMPERATURE = 1e-5
# Comments that keep proxies from closing a stream that pauses while the pipeline recovers.
KEEPALIVE_S = 15.0
PREPARING_THREADS = 2
# So many of the longest bodies may be in memory before they are read; usual ones are far shorter.
BODIES_WAITING = 4

Document = dict[str, object]
_T = TypeVar("_T")
_Prepared = tuple[Options, list[Request]]


class TextCodec(Protocol):
    """The part of a tokenizer that prepares prompts (see `Tokenizer`)."""

    def encode(self, text: str, max_tokens: int, special_tokens: bool) -> list[int]:
        """Ids of a text."""
        ...

    def render(
        self, messages: list[dict[str, object]], arguments: Mapping[str, object] | None = None
    ) -> str:
        """The text of a conversation."""
        ...

    def token_bytes(self, token: int) -> bytes:
        """What a token stands for, by itself."""
        ...


class Body:
    """The bytes of a response, piece by piece.

    Closing it, read or not, ends the work behind it; so does reading it to its end.
    """

    def __init__(self, pieces: AsyncGenerator[bytes, None], close: Callable[[], None]) -> None:
        self._pieces = pieces
        self._close = close

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        try:
            return await anext(self._pieces)
        except BaseException:
            self._close()
            raise

    async def aclose(self) -> None:
        """Aborts what is still being computed and frees its slots. May be called twice."""
        self._close()
        await self._pieces.aclose()


@dataclass(frozen=True, slots=True)
class Response:
    """An HTTP response. `chunks` must be read to its end or closed with `aclose`.

    `retry_after_s` is for the Retry-After header, where there is to be one.
    """

    status: int
    content_type: str
    chunks: Body
    retry_after_s: int | None = None


class OpenAIService:
    """`/v1/models`, `/v1/completions` and `/v1/chat/completions` over one engine.

    Used on one asyncio loop. To abort a request, cancel the task that awaits `handle`, or close
    the response's chunks.

    Args:
        engine: started by the caller.
        codec: the model's tokenizer.
        defaults: what requests get that do not say.
        model: name under which the model is served.
        max_body_bytes: longer bodies are refused.
    """

    def __init__(
        self,
        engine: Engine,
        codec: TextCodec,
        defaults: GenerationDefaults,
        model: str,
        max_body_bytes: int = MAX_BODY_BYTES,
    ) -> None:
        self._engine = engine
        self._codec = codec
        self._defaults = defaults
        self._model = model
        self._max_body_bytes = max_body_bytes
        self._created = int(time.time())
        self._waiting_bytes = 0
        self._preparing = ThreadPoolExecutor(PREPARING_THREADS, thread_name_prefix="prepare")
        self._routes: dict[str, tuple[str, Callable[[bytes, bytes], Awaitable[Response]]]] = {
            "/v1/models": ("GET", self._models),
            f"/v1/models/{model}": ("GET", self._one_model),
            "/v1/completions": ("POST", self._completions),
            "/v1/chat/completions": ("POST", self._chat),
        }

    def close(self) -> None:
        """Ends the service's threads."""
        self._preparing.shutdown(wait=False, cancel_futures=True)

    async def handle(
        self, method: str, path: str, content_type: str, body: bytes, tenant: bytes = b""
    ) -> Response:
        """Answers one HTTP request; errors are responses, too.

        `tenant` says whose it is (see `Engine.submit`); nothing in the body can change that.
        Returns when the status is known: at once for a stream, at its end for any other answer.
        """
        try:
            return await self._route(
                method.upper(), path.partition("?")[0], content_type, body, tenant
            )
        except RequestError as error:
            return _error(error)
        except Exception as error:
            # The text may quote the request and stays out of the log.
            where = "".join(traceback.format_tb(error.__traceback__))
            _log.error("%s while answering %s at\n%s", type(error).__name__, method, where)
            return _error(RequestError("The server failed internally.", code="internal"))

    async def _route(
        self, method: str, path: str, content_type: str, body: bytes, tenant: bytes
    ) -> Response:
        route = self._routes.get(path.rstrip("/"))
        if route is None:
            if path.startswith("/v1/models/"):
                raise self._not_served()
            raise PathNotFound("Unknown request URL; see /v1/models, /v1/chat/completions.")
        expected, answer = route
        if method != expected:
            raise WrongMethod(f"Method: expected {expected} for this URL, found another.")
        if len(body) > self._max_body_bytes:
            raise BodyTooLong(
                f"The body is too long: expected at most {self._max_body_bytes} bytes, found "
                f"{len(body)}."
            )
        media = content_type.partition(";")[0].strip().lower()
        if method == "POST" and media not in ("", JSON_TYPE):
            raise UnsupportedMediaType(f"Content-Type: expected {JSON_TYPE}, found another.")
        return await answer(body, tenant)

    async def _models(self, _body: bytes, _tenant: bytes) -> Response:
        return _json(200, {"object": "list", "data": [self._card()]})

    async def _one_model(self, _body: bytes, _tenant: bytes) -> Response:
        return _json(200, self._card())

    def _card(self) -> Document:
        return {
            "id": self._model,
            "object": "model",
            "created": self._created,
            "owned_by": "bulkhead",
            "max_model_len": self._engine.max_length,
        }

    def _not_served(self) -> ModelNotFound:
        return ModelNotFound(
            f"The model asked for does not exist here. This server serves {self._model}.", "model"
        )

    async def _completions(self, body: bytes, tenant: bytes) -> Response:
        options, requests = await self._prepared(self._prepare_completion, body)
        shape = _Completions(self._model, options, self._codec)
        return await self._answer(shape, options, requests, tenant)

    async def _chat(self, body: bytes, tenant: bytes) -> Response:
        options, requests = await self._prepared(self._prepare_chat, body)
        shape = _Chats(self._model, options, self._codec)
        return await self._answer(shape, options, requests, tenant)

    async def _prepared(self, prepare: Callable[[bytes], _Prepared], body: bytes) -> _Prepared:
        """Reads a body in a thread; what waits for one is bounded, as bodies are large."""
        most = BODIES_WAITING * self._max_body_bytes
        if self._waiting_bytes + len(body) > most:
            raise Overloaded(
                f"Requests of {self._waiting_bytes} bytes are being read, at most {most} may be. "
                "Retry later."
            )
        self._waiting_bytes += len(body)
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._preparing, prepare, body)
        finally:
            self._waiting_bytes -= len(body)

    def _prepare_completion(self, body: bytes) -> _Prepared:
        parsed = parse_completion(body, self._engine.limits.vocabulary)
        self._check_model(parsed.options)
        # A short body may ask for so many that the requests alone would fill the memory.
        self._engine.check_outputs(len(parsed.prompts) * parsed.options.choices)
        limit = self._engine.max_length
        prompts = [
            self._codec.encode(prompt, limit, special_tokens=True)
            if isinstance(prompt, str)
            else prompt
            for prompt in parsed.prompts
        ]
        return parsed.options, self._requests(prompts, parsed.options)

    def _prepare_chat(self, body: bytes) -> _Prepared:
        parsed: ChatBody = parse_chat(body, self._engine.limits.vocabulary)
        options = parsed.options
        self._check_model(options)
        self._engine.check_outputs(options.choices)
        text = self._codec.render(parsed.messages, parsed.template_arguments)
        prompt = self._codec.encode(text, self._engine.max_length, special_tokens=False)
        return options, self._requests([prompt], options)

    def _check_model(self, options: Options) -> None:
        if options.model != self._model:
            raise self._not_served()

    def _requests(self, prompts: list[list[int]], options: Options) -> list[Request]:
        """One request for each prompt and choice, choices of a prompt side by side."""
        defaults = self._defaults
        vocabulary = self._engine.limits.vocabulary
        temperature = _given(options.temperature, defaults.temperature)
        top_k = _given(options.top_k, defaults.top_k)
        seed = secrets.randbits(64) if options.seed is None else options.seed
        end_tokens = options.stop_token_ids
        if not options.ignore_eos:
            end_tokens |= defaults.end_tokens
        # The model's own may be outside its vocabulary, where nothing is drawn.
        guarded = tuple(sorted(token for token in end_tokens if token < vocabulary))
        if options.min_tokens and len(guarded) == vocabulary:
            raise InvalidRequest(
                "min_tokens: every token would end the output; name fewer stop_token_ids.",
                "min_tokens",
            )
        requests: list[Request] = []
        # One tuple for all choices: they may be many, and prompts long.
        for prompt in map(tuple, prompts):
            if any(not 0 <= token < vocabulary for token in prompt):
                raise InvalidRequest("The prompt has tokens outside the model's vocabulary.")
            max_tokens = self._engine.check(len(prompt), options.max_tokens)
            if options.max_tokens is None and defaults.max_tokens is not None:
                max_tokens = min(max_tokens, max(defaults.max_tokens, options.min_tokens))
            if options.min_tokens > max_tokens:
                raise InvalidRequest(
                    f"min_tokens: expected at most the {max_tokens} that the context leaves.",
                    "min_tokens",
                )
            for _ in range(options.choices):
                sampling = SamplingParameters(
                    temperature=0.0 if temperature < LEAST_TEMPERATURE else temperature,
                    top_p=_given(options.top_p, defaults.top_p),
                    top_k=0 if top_k >= vocabulary else top_k,
                    # Choices differ, and the same request with the same seed repeats them all.
                    seed=(seed + len(requests)) % 2**64,
                    min_p=_given(options.min_p, defaults.min_p),
                    presence_penalty=options.presence_penalty,
                    frequency_penalty=options.frequency_penalty,
                    repetition_penalty=_given(
                        options.repetition_penalty, defaults.repetition_penalty
                    ),
                    min_tokens=options.min_tokens,
                    end_tokens=guarded if options.min_tokens else (),
                    logit_bias=options.logit_bias,
                    logprobs=options.logprobs,
                )
                requests.append(
                    Request(
                        prompt=prompt,
                        sampling=sampling,
                        max_tokens=max_tokens,
                        needed_tokens=(
                            max(1, options.min_tokens) if options.max_tokens is None else max_tokens
                        ),
                        end_tokens=end_tokens,
                        stop=options.stop,
                        include_stop=options.include_stop,
                        show_ids=options.return_token_ids,
                    )
                )
        return requests

    async def _answer(
        self, shape: _Shape, options: Options, requests: list[Request], tenant: bytes
    ) -> Response:
        usage = _Usage(sum(len(r.prompt) for r in requests[:: options.choices]), len(requests))
        streams = self._engine.submit(requests, tenant=tenant)

        def close() -> None:
            for stream in streams:
                stream.cancel()

        if options.stream:
            return Response(200, EVENT_STREAM, Body(_events(shape, streams, usage), close))
        try:
            # One after the other: what comes of the others meanwhile waits in their streams.
            outputs = [await _collect(stream) for stream in streams]
        finally:
            close()
        for index, output in enumerate(outputs):
            usage.count(index, output)
        return _json(200, shape.whole(outputs, usage))


class _Usage:
    """Token counts of a response."""

    def __init__(self, prompt: int, outputs: int) -> None:
        self._prompt = prompt
        self._outputs = [0] * outputs

    def count(self, index: int, chunk: Chunk) -> None:
        self._outputs[index] = chunk.tokens

    def to_document(self) -> Document:
        completion = sum(self._outputs)
        return {
            "prompt_tokens": self._prompt,
            "completion_tokens": completion,
            "total_tokens": self._prompt + completion,
        }


class _Shape(ABC):
    """The JSON of one kind of response."""

    prefix: str
    whole_object: str
    chunk_object: str

    def __init__(self, model: str, options: Options, codec: TextCodec) -> None:
        self._model = model
        self._codec = codec
        self._logprobs = options.logprobs
        self._include_usage = options.include_usage
        self._show_ids = options.return_token_ids
        self._id = f"{self.prefix}-{secrets.token_hex(16)}"
        self._created = int(time.time())

    @abstractmethod
    def first(self, index: int) -> Document | None:
        """The choice that opens the stream of an output, if there is one."""

    @abstractmethod
    def piece(self, index: int, chunk: Chunk) -> list[Document]:
        """The choices of a chunk, each for an event of its own."""

    @abstractmethod
    def choice(self, index: int, output: Chunk) -> Document:
        """A whole output."""

    def ids(self, chunk: Chunk) -> Document:
        """The field with the tokens of a choice; none where the client did not ask."""
        return {"token_ids": list(chunk.ids)} if self._show_ids else {}

    def whole(self, outputs: list[Chunk], usage: _Usage) -> Document:
        """The answer to a request that does not stream."""
        choices = [self.choice(index, output) for index, output in enumerate(outputs)]
        return self._frame(self.whole_object, choices) | {"usage": usage.to_document()}

    def event(self, choice: Document) -> bytes:
        """The event of one choice."""
        document = self._frame(self.chunk_object, [choice])
        if self._include_usage:
            document["usage"] = None
        return _event(document)

    def usage_event(self, usage: _Usage) -> bytes:
        """The event of the token counts; none where the client did not ask."""
        if not self._include_usage:
            return b""
        return _event(self._frame(self.chunk_object, []) | {"usage": usage.to_document()})

    def _frame(self, kind: str, choices: list[Document]) -> Document:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._model,
            "system_fingerprint": None,
            "choices": choices,
        }


class _Completions(_Shape):
    prefix = "cmpl"
    whole_object = "text_completion"
    chunk_object = "text_completion"

    def first(self, index: int) -> Document | None:
        return None

    def piece(self, index: int, chunk: Chunk) -> list[Document]:
        return [self.choice(index, chunk)]

    def choice(self, index: int, output: Chunk) -> Document:
        return {
            "index": index,
            "text": output.text,
            "logprobs": self._scored(output.scores),
            "finish_reason": output.finish,
            **self.ids(output),
        }

    def _scored(self, scores: tuple[TokenScore, ...]) -> Document | None:
        """Four lists side by side; the token drawn is among the likeliest, or added to them."""
        if self._logprobs is None:
            return None
        return {
            "tokens": [self._name(score.token) for score in scores],
            "token_logprobs": [score.logprobs.chosen for score in scores],
            "top_logprobs": [
                {self._name(token): logprob for token, logprob in score.logprobs.alternatives}
                | {self._name(score.token): score.logprobs.chosen}
                for score in scores
            ],
            "text_offset": [score.offset for score in scores],
        }

    def _name(self, token: int) -> str:
        """The token's text; bytes that are none are spelt out, so that names stay apart."""
        content = self._codec.token_bytes(token)
        try:
            return content.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


class _Chats(_Shape):
    prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def first(self, index: int) -> Document | None:
        return self._delta(index, {"role": "assistant", "content": ""}, None)

    def piece(self, index: int, chunk: Chunk) -> list[Document]:
        choices: list[Document] = []
        if chunk.text or chunk.ids or chunk.scores:
            choices.append(
                self._delta(index, {"content": chunk.text}, None)
                | {"logprobs": self._scored(chunk.scores)}
                | self.ids(chunk)
            )
        if chunk.finish is not None:
            choices.append(self._delta(index, {}, chunk.finish))
        return choices

    def choice(self, index: int, output: Chunk) -> Document:
        return {
            "index": index,
            "message": {"role": "assistant", "content": output.text, "refusal": None},
            "logprobs": self._scored(output.scores),
            "finish_reason": output.finish,
            **self.ids(output),
        }

    def _scored(self, scores: tuple[TokenScore, ...]) -> Document | None:
        if self._logprobs is None:
            return None
        return {
            "content": [
                self._entry(score.token, score.logprobs.chosen)
                | {
                    "top_logprobs": [
                        self._entry(*alternative) for alternative in score.logprobs.alternatives
                    ]
                }
                for score in scores
            ],
            "refusal": None,
        }

    def _entry(self, token: int, logprob: float) -> Document:
        content = self._codec.token_bytes(token)
        return {
            "token": content.decode(errors="backslashreplace"),
            "logprob": logprob,
            "bytes": list(content),
        }

    @staticmethod
    def _delta(index: int, delta: Document, finish: FinishReason | None) -> Document:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}


async def _collect(stream: TokenStream) -> Chunk:
    """The whole output of a stream."""
    output = Chunk("", 0)
    while output.finish is None:
        output = output.followed_by(await stream.next())
    return output


async def _events(
    shape: _Shape, streams: list[TokenStream], usage: _Usage
) -> AsyncGenerator[bytes, None]:
    """Server-sent events of all outputs, in the order in which their text comes.

    An error ends the stream with an event of its own and without `[DONE]`: the answer is not
    complete.
    """
    for index in range(len(streams)):
        if (opening := shape.first(index)) is not None:
            yield shape.event(opening)
    try:
        async for index, chunk in _merge(streams):
            if chunk is None:
                yield b": waiting\n\n"
                continue
            usage.count(index, chunk)
            pieces = b"".join(shape.event(choice) for choice in shape.piece(index, chunk))
            if pieces:
                yield pieces
    except RequestError as error:
        yield _event(error.to_document())
        return
    yield shape.usage_event(usage) + b"data: [DONE]\n\n"


async def _merge(streams: list[TokenStream]) -> AsyncIterator[tuple[int, Chunk | None]]:
    """Chunks of all streams with their stream's number; None after a silence."""
    arrived = asyncio.Event()
    for stream in streams:
        stream.announce(arrived)
    left = dict(enumerate(streams))
    while left:
        try:
            async with asyncio.timeout(KEEPALIVE_S):
                await arrived.wait()
        except TimeoutError:
            yield 0, None
            continue
        arrived.clear()
        for index, stream in list(left.items()):
            chunk = stream.take()
            if chunk is None:
                continue
            if chunk.finish is not None:
                del left[index]
            yield index, chunk


def _given(value: _T | None, default: _T) -> _T:
    return default if value is None else value


def _event(document: Document) -> bytes:
    return b"data: " + _encode(document) + b"\n\n"


def _encode(document: Document) -> bytes:
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()


def _json(status: int, document: Document, retry_after_s: int | None = None) -> Response:
    return Response(status, JSON_TYPE, Body(_once(_encode(document)), _nothing), retry_after_s)


def _error(error: RequestError) -> Response:
    return _json(error.status, error.to_document(), error.retry_after_s)


async def _once(content: bytes) -> AsyncGenerator[bytes, None]:
    yield content


def _nothing() -> None:
    """There is no work behind a body that is complete."""
