"""Reads the bodies of requests: strict, and nothing that would change the answer is ignored.

A parameter is either served, or accepted at the values that leave the answer as it is, or refused
by name. Messages say what was expected and the type found, never what the client wrote.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import cast

from runtime.engine.errors import InvalidRequest
from security.channel.admission import (
    MAX_ADDED_PENALTY,
    MAX_BIAS,
    MAX_BIASES,
    REPETITION_PENALTIES,
)
from security.channel.frame import MAX_ALTERNATIVES

__all__ = ["ChatBody", "CompletionBody", "Options", "parse_chat", "parse_completion"]

MAX_CHOICES = 128
MAX_PROMPTS = 2048
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 1024
MAX_END_TOKENS = 256
# Far above any context, and short enough to be written into a message.
MAX_TOKENS = 2**31 - 1

# Names a rendering sets itself.
_RESERVED = ("messages", "tools", "documents", "add_generation_prompt")

# Parameters that are not served, with the values at which they change nothing.
_INERT: dict[str, tuple[object, ...]] = {
    "length_penalty": (1,),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "use_beam_search": (False,),
    "early_stopping": (False,),
    "prompt_logprobs": (),
    "truncate_prompt_tokens": (),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "detokenize": (True,),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "service_tier": ("auto", "default"),
    "priority": (0,),
    "prompt_cache_retention": (),
    "prompt_cache_options": (),
    "echo": (False,),
}
_INERT_CHAT: dict[str, tuple[object, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "store": (False,),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
    "moderation": (),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "add_special_tokens": (False,),
    "chat_template": (),
    "documents": ([],),
}
_INERT_COMPLETION: dict[str, tuple[object, ...]] = {
    "suffix": ("",),
    "best_of": (1,),
    "add_special_tokens": (True,),
    "prompt_embeds": (),
}

_NAMES = {
    bool: "a boolean",
    int: "an integer",
    float: "a number",
    str: "a string",
    list: "an array",
    dict: "an object",
    type(None): "null",
}


@dataclass(frozen=True, slots=True, repr=False)
class Options:
    """What chats and completions share; None means the model's default.

    Attributes:
        stream: whether the answer comes as server-sent events.
        include_usage: whether the stream ends with a chunk of token counts.
        choices: outputs for each prompt (`n`).
        max_tokens: most tokens of each output.
        top_k: 0 for no limit.
        min_p, repetition_penalty: extensions, as in vLLM.
        logit_bias: token ids and what is added to their logits, at most `MAX_BIASES`.
        logprobs: None, or how many of the likeliest tokens are told beside each token's logprob.
        min_tokens: output tokens before which no end token is drawn (an extension, as in vLLM); it
            does not concern `stop`.
        stop: strings that end an output.
        include_stop: whether that string is shown (`include_stop_str_in_output` of vLLM).
        stop_token_ids: ids that end an output (an extension, as in vLLM).
        ignore_eos: whether the model's end tokens are ordinary ones (an extension, as in vLLM).
        return_token_ids: whether choices say their `token_ids` (an extension, as in vLLM).
    """

    model: str
    stream: bool
    include_usage: bool
    choices: int
    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float | None
    logit_bias: tuple[tuple[int, float], ...]
    logprobs: int | None
    seed: int | None
    min_tokens: int
    stop: tuple[str, ...]
    include_stop: bool
    stop_token_ids: frozenset[int]
    ignore_eos: bool
    return_token_ids: bool


@dataclass(frozen=True, slots=True, repr=False)
class ChatBody:
    """A body for /v1/chat/completions; contents are text."""

    options: Options
    messages: list[dict[str, object]]
    template_arguments: dict[str, object]


@dataclass(frozen=True, slots=True, repr=False)
class CompletionBody:
    """A body for /v1/completions; a prompt is text or token ids."""

    options: Options
    prompts: list[str | list[int]]


def parse_chat(body: bytes, vocabulary: int) -> ChatBody:
    """Reads a body for /v1/chat/completions.

    Raises:
        InvalidRequest: with the parameter at fault.
    """
    reader = _Reader(body)
    messages = _messages(reader.take("messages"))
    arguments = reader.mapping("chat_template_kwargs")
    for name in arguments:
        if name in _RESERVED:
            raise InvalidRequest(
                f"chat_template_kwargs: expected none of {', '.join(_RESERVED)}.",
                "chat_template_kwargs",
            )
    max_tokens = reader.integer("max_completion_tokens", 1, MAX_TOKENS)
    older = reader.integer("max_tokens", 1, MAX_TOKENS)
    logprobs = _chat_logprobs(reader)
    options = _options(
        reader, vocabulary, max_tokens if max_tokens is not None else older, logprobs
    )
    reader.inert(_INERT_CHAT)
    reader.finish()
    return ChatBody(options, messages, arguments)


def parse_completion(body: bytes, vocabulary: int) -> CompletionBody:
    """Reads a body for /v1/completions.

    Raises:
        InvalidRequest: with the parameter at fault.
    """
    reader = _Reader(body)
    prompts = _prompts(reader.take("prompt"), vocabulary)
    max_tokens = reader.integer("max_tokens", 1, MAX_TOKENS)
    logprobs = reader.integer("logprobs", 0, MAX_ALTERNATIVES)
    options = _options(reader, vocabulary, 16 if max_tokens is None else max_tokens, logprobs)
    # best_of draws more outputs than it returns, unless it equals n.
    if reader.peek("best_of") == options.choices and options.choices > 1:
        reader.take("best_of")
    reader.inert(_INERT_COMPLETION)
    reader.finish()
    return CompletionBody(options, prompts)


class _Reader:
    """Takes fields out of a JSON object one by one; `finish` refuses what is left."""

    def __init__(self, body: bytes) -> None:
        try:
            document = json.loads(body, parse_constant=_refuse_constant)
        except (ValueError, RecursionError):
            # The parser's own message quotes nothing, but gives away positions in the prompt.
            raise InvalidRequest(
                "The body is not valid JSON. Expected a JSON object in UTF-8.", code="invalid_json"
            ) from None
        if not isinstance(document, dict):
            raise InvalidRequest(f"The body: expected an object, found {_name(document)}.")
        self._fields = cast(dict[str, object], document)

    def peek(self, name: str) -> object:
        return self._fields.get(name)

    def take(self, name: str) -> object:
        """The field's value; None when it is missing or null."""
        return self._fields.pop(name, None)

    def boolean(self, name: str) -> bool:
        value = self.take(name)
        if value is not None and not isinstance(value, bool):
            raise _wrong(name, "a boolean", value)
        return bool(value)

    def integer(self, name: str, low: int, high: int | None) -> int | None:
        value = self.take(name)
        if value is None:
            return None
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise _wrong(name, "an integer", value)
        if value < low or (high is not None and value > high):
            bounds = f"at least {low}" if high is None else f"{low} to {high}"
            raise InvalidRequest(f"{name}: expected {bounds}.", name)
        return value

    def number(self, name: str, low: float, high: float) -> float | None:
        value = self.take(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise _wrong(name, "a number", value)
        # Compared before it is converted: an integer may be too long for a float.
        if not low <= value <= high:
            raise InvalidRequest(f"{name}: expected {low:g} to {high:g}.", name)
        return float(value)

    def text(self, name: str) -> str | None:
        value = self.take(name)
        if value is not None and not isinstance(value, str):
            raise _wrong(name, "a string", value)
        return value

    def mapping(self, name: str) -> dict[str, object]:
        value = self.take(name)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise _wrong(name, "an object", value)
        return cast(dict[str, object], value)

    def inert(self, table: dict[str, tuple[object, ...]]) -> None:
        """Accepts parameters at the values where they change nothing."""
        for name, harmless in table.items():
            value = self.take(name)
            if value is None or any(_same(value, other) for other in harmless):
                continue
            raise InvalidRequest(
                f"{name}: this value is not supported by this server; leave it out.",
                name,
                "unsupported_parameter",
            )

    def finish(self) -> None:
        if self._fields:
            # The client's own word, but a name, and bounded.
            name = next(iter(self._fields))
            known = name[:64] if name.isidentifier() else "(not a name)"
            raise InvalidRequest(
                f"Unrecognized request argument supplied: {known}", known, "unknown_parameter"
            )


def _options(
    reader: _Reader, vocabulary: int, max_tokens: int | None, logprobs: int | None
) -> Options:
    model = reader.text("model")
    if not model:
        raise InvalidRequest("model: expected the name of a model, found none.", "model")
    stream = reader.boolean("stream")
    stream_options = reader.take("stream_options")
    include_usage = False
    if stream_options is not None:
        if not isinstance(stream_options, dict):
            raise _wrong("stream_options", "an object", stream_options)
        if not stream:
            raise InvalidRequest(
                "stream_options: only allowed when stream is true.", "stream_options"
            )
        include_usage = _stream_options(stream_options)
    for name in ("user", "safety_identifier", "prompt_cache_key", "request_id"):
        reader.text(name)
    reader.mapping("metadata")
    top_k = reader.integer("top_k", -1, None)
    seed = reader.integer("seed", -(2**63), 2**64 - 1)
    options = Options(
        model=model,
        stream=stream,
        include_usage=include_usage,
        choices=reader.integer("n", 1, MAX_CHOICES) or 1,
        max_tokens=max_tokens,
        temperature=reader.number("temperature", 0.0, 2.0),
        top_p=_top_p(reader),
        top_k=None if top_k is None else max(0, top_k),
        min_p=reader.number("min_p", 0.0, 1.0),
        presence_penalty=_added_penalty(reader, "presence_penalty"),
        frequency_penalty=_added_penalty(reader, "frequency_penalty"),
        repetition_penalty=reader.number("repetition_penalty", *REPETITION_PENALTIES),
        logit_bias=_logit_bias(reader.mapping("logit_bias"), vocabulary),
        logprobs=logprobs,
        seed=None if seed is None else seed % 2**64,
        min_tokens=_min_tokens(reader, max_tokens),
        stop=_stop(reader.take("stop")),
        include_stop=reader.boolean("include_stop_str_in_output"),
        stop_token_ids=frozenset(_ids(reader.take("stop_token_ids"), vocabulary)),
        ignore_eos=reader.boolean("ignore_eos"),
        return_token_ids=reader.boolean("return_token_ids"),
    )
    reader.inert(_INERT)
    return options


def _stream_options(fields: dict[str, object]) -> bool:
    for name, value in fields.items():
        if name not in ("include_usage", "include_obfuscation", "continuous_usage_stats"):
            raise InvalidRequest("stream_options: unrecognized option.", "stream_options")
        if value is not None and not isinstance(value, bool):
            raise _wrong(f"stream_options.{name}", "a boolean", value)
        if value and name != "include_usage":
            raise InvalidRequest(
                f"stream_options.{name}: not supported by this server; leave it out.",
                f"stream_options.{name}",
                "unsupported_parameter",
            )
    return bool(fields.get("include_usage"))


def _top_p(reader: _Reader) -> float | None:
    top_p = reader.number("top_p", 0.0, 1.0)
    # OpenAI takes 0; the set of most likely tokens is never empty, so it means the likeliest one.
    return max(top_p, 1e-9) if top_p is not None else None


def _chat_logprobs(reader: _Reader) -> int | None:
    """Two fields of a chat, of which the first is the switch."""
    wanted = reader.boolean("logprobs")
    alternatives = reader.integer("top_logprobs", 0, MAX_ALTERNATIVES)
    if alternatives and not wanted:
        raise InvalidRequest("top_logprobs: only allowed when logprobs is true.", "top_logprobs")
    return alternatives or 0 if wanted else None


def _added_penalty(reader: _Reader, name: str) -> float:
    return reader.number(name, -MAX_ADDED_PENALTY, MAX_ADDED_PENALTY) or 0.0


def _logit_bias(biases: dict[str, object], vocabulary: int) -> tuple[tuple[int, float], ...]:
    if len(biases) > MAX_BIASES:
        raise InvalidRequest(f"logit_bias: expected at most {MAX_BIASES} tokens.", "logit_bias")
    found: dict[int, float] = {}
    for name, bias in biases.items():
        # Bounded before it is converted; int() would take signs, spaces and underscores.
        if not (name.isascii() and name.isdigit() and len(name) <= 10 and int(name) < vocabulary):
            raise InvalidRequest(
                f"logit_bias: expected token ids from 0 to {vocabulary - 1} as names; one is not.",
                "logit_bias",
            )
        if isinstance(bias, bool) or not isinstance(bias, int | float):
            raise _wrong("logit_bias", "numbers", bias)
        if not -MAX_BIAS <= bias <= MAX_BIAS:
            raise InvalidRequest(
                f"logit_bias: expected {-MAX_BIAS:g} to {MAX_BIAS:g}.", "logit_bias"
            )
        if int(name) in found:
            raise InvalidRequest("logit_bias: a token is named twice.", "logit_bias")
        found[int(name)] = float(bias)
    return tuple(found.items())


def _min_tokens(reader: _Reader, max_tokens: int | None) -> int:
    least = reader.integer("min_tokens", 0, MAX_TOKENS) or 0
    if max_tokens is not None and least > max_tokens:
        raise InvalidRequest("min_tokens: expected at most as many as max_tokens.", "min_tokens")
    return least


def _stop(value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    stops = value if isinstance(value, list) else [value]
    if len(stops) > MAX_STOPS:
        raise InvalidRequest(f"stop: expected at most {MAX_STOPS} strings.", "stop")
    for stop in stops:
        if not isinstance(stop, str):
            raise _wrong("stop", "a string or an array of strings", stop)
        if not 1 <= len(stop) <= MAX_STOP_CHARACTERS:
            raise InvalidRequest(
                f"stop: expected strings of 1 to {MAX_STOP_CHARACTERS} characters.", "stop"
            )
    return tuple(cast(list[str], stops))


def _ids(value: object, vocabulary: int) -> list[int]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise _wrong("stop_token_ids", "an array of token ids", value)
    if len(value) > MAX_END_TOKENS:
        raise InvalidRequest(
            f"stop_token_ids: expected at most {MAX_END_TOKENS} ids.", "stop_token_ids"
        )
    return _token_ids(value, vocabulary, "stop_token_ids")


def _token_ids(ids: list[object], vocabulary: int, name: str) -> list[int]:
    for token in ids:
        if type(token) is not int:
            raise _wrong(name, "token ids", token)
        if not 0 <= token < vocabulary:
            raise InvalidRequest(
                f"{name}: expected token ids from 0 to {vocabulary - 1}; one is not.", name
            )
    return cast(list[int], ids)


def _prompts(value: object, vocabulary: int) -> list[str | list[int]]:
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise _wrong("prompt", "a string, token ids, or an array of either", value)
    if not value:
        raise InvalidRequest("prompt: expected at least one prompt, found none.", "prompt")
    if type(value[0]) is int:
        return [_token_ids(value, vocabulary, "prompt")]
    if len(value) > MAX_PROMPTS:
        raise InvalidRequest(f"prompt: expected at most {MAX_PROMPTS} prompts.", "prompt")
    prompts: list[str | list[int]] = []
    for prompt in value:
        if isinstance(prompt, str):
            prompts.append(prompt)
        elif isinstance(prompt, list):
            prompts.append(_token_ids(prompt, vocabulary, "prompt"))
        else:
            raise _wrong("prompt", "a string, token ids, or an array of either", prompt)
    return prompts


def _messages(value: object) -> list[dict[str, object]]:
    if not isinstance(value, list):
        raise _wrong("messages", "an array of messages", value)
    if not value:
        raise InvalidRequest("messages: expected at least one message, found none.", "messages")
    return [_message(message, f"messages[{index}]") for index, message in enumerate(value)]


def _message(value: object, where: str) -> dict[str, object]:
    if not isinstance(value, dict):
        raise _wrong(where, "an object", value)
    fields = dict(value)
    role = fields.pop("role", None)
    if role not in ("system", "developer", "user", "assistant"):
        raise InvalidRequest(
            f"{where}.role: expected system, developer, user or assistant.", f"{where}.role"
        )
    message: dict[str, object] = {"role": role}
    message["content"] = _content(fields.pop("content", None), f"{where}.content")
    for name in ("name", "reasoning_content"):
        text = fields.pop(name, None)
        if text is None:
            continue
        if not isinstance(text, str):
            raise _wrong(f"{where}.{name}", "a string", text)
        message[name] = text
    for name, left in fields.items():
        if left is None or left == []:
            continue
        known = name[:64] if name.isidentifier() else "(not a name)"
        raise InvalidRequest(
            f"{where}.{known}: not supported by this server; leave it out.",
            f"{where}.{known}",
            "unsupported_parameter",
        )
    return message


def _content(value: object, where: str) -> str:
    """Text; parts are joined by line breaks, as in vLLM."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise _wrong(where, "a string or an array of text parts", value)
    texts: list[str] = []
    for index, part in enumerate(value):
        if not isinstance(part, dict):
            raise _wrong(f"{where}[{index}]", "an object", part)
        if part.get("type") != "text":
            raise InvalidRequest(
                f"{where}[{index}].type: expected text; other parts are not supported by this "
                "server.",
                f"{where}[{index}].type",
                "unsupported_parameter",
            )
        text = part.get("text")
        if not isinstance(text, str):
            raise _wrong(f"{where}[{index}].text", "a string", text)
        texts.append(text)
    return "\n".join(texts)


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _same(value: object, other: object) -> bool:
    """Equality in which true is not 1, but 1.0 is."""
    if isinstance(value, bool) or isinstance(other, bool):
        return value is other
    if isinstance(value, float) and not math.isfinite(value):
        return False
    return value == other


def _name(value: object) -> str:
    return _NAMES.get(type(value), "something else")


def _wrong(param: str, expected: str, value: object) -> InvalidRequest:
    return InvalidRequest(f"{param}: expected {expected}, found {_name(value)}.", param)
