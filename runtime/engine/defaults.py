"""What a request gets that does not say: sampling defaults and end-of-sequence tokens.

As in vLLM, `temperature`, `top_p`, `top_k`, `min_p`, `repetition_penalty` and `max_new_tokens` come
from generation_config.json where it names them, and OpenAI's defaults (temperature 1, no limits)
apply where it does not.
transformers' `generate` differs: it is greedy unless the file says `do_sample: true`. Clients of
an OpenAI endpoint expect sampling, so silence means temperature 1; an explicit `do_sample: false`
is the publisher's word and means greedy. Asking for temperature 0 is greedy always.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection
from dataclasses import dataclass

from runtime.engine.tokenizer import TokenizerError, load_json
from security.channel.admission import MAX_END_TOKENS, MAX_TEMPERATURE, REPETITION_PENALTIES

__all__ = ["MAX_MODEL_END_TOKENS", "GenerationDefaults", "generation_defaults"]

# The rest of what a stage takes is for the ids that a request adds.
MAX_MODEL_END_TOKENS = MAX_END_TOKENS // 2

_log = logging.getLogger(__name__)

# Settings that change the output, and the values at which they do not.
_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "encoder_repetition_penalty": (None, 1, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "typical_p": (None, 1, 1.0),
    "epsilon_cutoff": (None, 0, 0.0),
    "eta_cutoff": (None, 0, 0.0),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "bad_words_ids": (None, []),
    "suppress_tokens": (None, []),
    "begin_suppress_tokens": (None, []),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "num_beams": (None, 1),
    "penalty_alpha": (None, 0, 0.0),
}


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """Defaults of the served model.

    Attributes:
        end_tokens: ids that end an output.
        max_tokens: default length of a chat answer; None means what the context leaves.
    """

    temperature: float
    top_p: float
    top_k: int
    end_tokens: frozenset[int]
    max_tokens: int | None = None
    min_p: float = 0.0
    repetition_penalty: float = 1.0


def generation_defaults(
    generation_config: bytes | None, config: bytes | None, eos_token_id: int | None
) -> GenerationDefaults:
    """Reads the model's own words; warns of those that are not followed.

    Args:
        generation_config: verified content of generation_config.json, if the model has it.
        config: verified content of config.json; its `eos_token_id` counts where the former is
            missing.
        eos_token_id: the tokenizer's; counts where neither file names one.

    Raises:
        TokenizerError: a value of the wrong type or out of range.
    """
    if generation_config is not None:
        where, document = (
            "generation_config.json",
            load_json(generation_config, "generation_config"),
        )
    elif config is not None:
        where, document = "config.json", {}
        document["eos_token_id"] = load_json(config, "config.json").get("eos_token_id")
    else:
        where, document = "the defaults", {}
    for name, harmless in _UNSUPPORTED.items():
        if not _among(document.get(name), harmless):
            _log.warning("%s: %s is not supported and ignored", where, name)
    greedy = document.get("do_sample") is False
    temperature = _number(
        document, where, "temperature", default=1.0, low=0.0, high=MAX_TEMPERATURE
    )
    top_k = _integer(document, where, "top_k", 0, -1)
    max_tokens = _integer(document, where, "max_new_tokens", 0, 0)
    # As `transformers.generate` has it: the list in the file counts, and the tokenizer's own token
    # only where the model's author named none.
    end_tokens = _token_ids(document.get("eos_token_id"), where)
    if not end_tokens and eos_token_id is not None:
        end_tokens = {eos_token_id}
    return GenerationDefaults(
        temperature=0.0 if greedy else temperature,
        top_p=_number(document, where, "top_p", default=1.0, low=1e-6, high=1.0),
        top_k=max(0, top_k),
        end_tokens=frozenset(end_tokens),
        max_tokens=max_tokens or None,
        min_p=_number(document, where, "min_p", default=0.0, low=0.0, high=1.0),
        repetition_penalty=_number(
            document,
            where,
            "repetition_penalty",
            default=1.0,
            low=REPETITION_PENALTIES[0],
            high=REPETITION_PENALTIES[1],
        ),
    )


def _among(value: object, accepted: Collection[object]) -> bool:
    return any(value == other and isinstance(value, bool) is False for other in accepted)


def _number(
    document: dict[str, object],
    where: str,
    name: str,
    *,
    default: float,
    low: float,
    high: float,
) -> float:
    value = document.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise TokenizerError(f"{where}: {name}: expected a number, found {type(value).__name__}")
    if not low <= value <= high:
        raise TokenizerError(f"{where}: {name}: expected {low:g} to {high:g}, found {value:g}")
    return float(value)


def _integer(document: dict[str, object], where: str, name: str, default: int, low: int) -> int:
    value = document.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise TokenizerError(f"{where}: {name}: expected an integer of at least {low}")
    return value


def _token_ids(value: object, where: str) -> set[int]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int) or token < 0:
            raise TokenizerError(f"{where}: eos_token_id: expected token ids")
    if len(ids) > MAX_MODEL_END_TOKENS:
        raise TokenizerError(
            f"{where}: eos_token_id: expected at most {MAX_MODEL_END_TOKENS} ids, found {len(ids)}"
        )
    return set(ids)
