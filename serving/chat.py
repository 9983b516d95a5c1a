"""`bulkhead chat`: a small streaming conversation on the terminal."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import httpx

from serving.errors import CommandError

EVENT_PREFIX = "data: "
CONNECT_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 600.0
MAX_ERROR_CHARACTERS = 500
CONTEXT_FULL = "context_length_exceeded"


class ContextFull(CommandError):
    """Question, what went before it and the longest answer exceed the model's context."""


def first_model(client: httpx.Client) -> str:
    """The name of the model that an endpoint serves.

    Raises:
        CommandError: the endpoint does not answer like one of OpenAI's kind.
    """
    try:
        response = client.get("/v1/models")
        response.raise_for_status()
        name = response.json()["data"][0]["id"]
    except httpx.HTTPStatusError as error:
        raise CommandError(_error_text(error.response)) from None
    except httpx.HTTPError as error:
        raise _unreachable(client, error) from None
    except (ValueError, KeyError, IndexError, TypeError):
        raise CommandError(
            f"{client.base_url}/v1/models: expected a list of models, found something else; "
            "is it an OpenAI-compatible endpoint?"
        ) from None
    return str(name)


def stream_answer(
    client: httpx.Client, model: str, messages: list[dict[str, str]], max_tokens: int
) -> Iterator[str]:
    """Asks for one answer and yields its pieces.

    Raises:
        CommandError: the endpoint refused, or the answer broke off.
        ContextFull: it refused because the conversation has become too long.
    """
    body = {"model": model, "messages": messages, "max_tokens": max_tokens, "stream": True}
    try:
        with client.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != httpx.codes.OK:
                response.read()
                full = _error_code(response) == CONTEXT_FULL
                raise (ContextFull if full else CommandError)(_error_text(response))
            for line in response.iter_lines():
                if not line.startswith(EVENT_PREFIX):
                    continue
                payload = line[len(EVENT_PREFIX) :]
                if payload == "[DONE]":
                    return
                yield _piece(payload)
    except httpx.HTTPError as error:
        raise _unreachable(client, error) from None
    raise CommandError("the answer broke off before its end; ask again")


def make_client(endpoint: str) -> httpx.Client:
    """A client for an endpoint's base URL (without "/v1")."""
    timeout = httpx.Timeout(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
    return httpx.Client(base_url=endpoint, timeout=timeout, trust_env=False)


def converse(
    client: httpx.Client,
    model: str,
    max_tokens: int,
    read: Callable[[], str | None],
    write: Callable[[str], None],
) -> bool:
    """Reads questions and writes answers until there are no more questions.

    The oldest exchanges are forgotten when the conversation outgrows the model's context. A
    question that fails is forgotten too, and the conversation goes on.

    Args:
        client: see `make_client`.
        model: served name.
        max_tokens: longest answer.
        read: returns the next question, or None at the end.
        write: shows a piece of an answer.

    Returns:
        Whether every question was answered.
    """
    answered = True
    messages: list[dict[str, str]] = []
    while (question := read()) is not None:
        if not question.strip():
            continue
        messages.append({"role": "user", "content": question})
        pieces: list[str] = []
        try:
            for piece in _stream_remembered(client, model, messages, max_tokens):
                write(piece)
                pieces.append(piece)
        except KeyboardInterrupt:
            write(" [stopped]")
        except CommandError as error:
            write(f"[{error}]\n")
            messages.pop()
            answered = False
            continue
        write("\n")
        messages.append({"role": "assistant", "content": "".join(pieces)})
    return answered


def _stream_remembered(
    client: httpx.Client, model: str, messages: list[dict[str, str]], max_tokens: int
) -> Iterator[str]:
    """Streams an answer; forgets the oldest exchanges, in `messages` too, until there is room."""
    while True:
        try:
            yield from stream_answer(client, model, messages, max_tokens)
            return
        except ContextFull:
            if len(messages) == 1:
                raise
            del messages[:2]


def _piece(payload: str) -> str:
    try:
        event = json.loads(payload)
        if "error" in event:
            raise CommandError(str(event["error"].get("message"))[:MAX_ERROR_CHARACTERS])
        choices = event.get("choices") or [{}]
        return str(choices[0].get("delta", {}).get("content") or "")
    except (ValueError, AttributeError, TypeError):
        raise CommandError("the stream: expected an event of OpenAI's, found another") from None


def _error_code(response: httpx.Response) -> object:
    try:
        return response.json()["error"]["code"]
    except (ValueError, KeyError, TypeError):
        return None


def _error_text(response: httpx.Response) -> str:
    try:
        text = str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        text = response.text
    return f"{response.status_code}: {text[:MAX_ERROR_CHARACTERS]}"


def _unreachable(client: httpx.Client, error: httpx.HTTPError) -> CommandError:
    return CommandError(
        f"{client.base_url}: expected an endpoint, found none ({type(error).__name__}); "
        "is it running? `bulkhead status` shows what is"
    )
