"""What a model weighs: bytes and arithmetic of every layer, from its ``config.json`` alone.

The counts follow the modules of the families as transformers builds them; a test compares every
family with the real modules. An unknown family is refused: a wrong count would become a plan that
runs out of memory on somebody's machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NoReturn

from placement.plan import ITEM_BYTES, MAX_CONTEXT, MAX_LAYERS

_MAX_SIZE = 1 << 24
"""Largest dimension that a configuration may state; bounds every product below 2**80."""


class ProfileError(ValueError):
    """A model's configuration cannot be profiled; says the field, expected and found."""


@dataclass(frozen=True, slots=True)
class LayerProfile:
    """One decoder layer.

    Attributes:
        weight_bytes: all parameters of the layer.
        replicated_bytes: the part of them that every tensor-parallel rank holds in full (norms,
            routers, and experts, which tensor parallelism leaves whole).
        kv_bytes_per_token: keys and values of one token.
        flops_per_token: floating-point operations of the layer's linears for one token.
        active_bytes: parameters that one token's step reads (all but the idle experts).
    """

    weight_bytes: int
    replicated_bytes: int
    kv_bytes_per_token: int
    flops_per_token: int
    active_bytes: int


@dataclass(frozen=True, slots=True)
class ModelProfile:
    """A decoder-only language model, as the planner sees it.

    Attributes:
        architecture: the ``model_type`` of the configuration.
        dtype: dtype that the bytes are counted in.
        layers: one profile per decoder layer, in order.
        embedding_bytes: the token embedding, on the first stage.
        head_bytes: the LM head, on the last stage; when tied it is the embedding once more.
        norm_bytes: the final norm, on the last stage.
        tied: whether the head is the embedding; a single stage then holds it once.
        hidden_size: width of a hidden state.
        intermediate_size: width of the widest MLP.
        heads: query heads.
        kv_heads: key and value heads.
        head_dim: width of a head.
        vocabulary: rows of the embedding.
        max_context: longest sequence that the model was made for, in tokens.
        parameters: parameters of the whole model, tied ones counted once.
    """

    architecture: str
    dtype: str
    layers: tuple[LayerProfile, ...]
    embedding_bytes: int
    head_bytes: int
    norm_bytes: int
    tied: bool
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    max_context: int
    parameters: int

    def ends_bytes(self, first_layer: int, last_layer: int) -> int:
        """Bytes of embedding, final norm and head in a stage of layers [first, last)."""
        is_first = first_layer == 0
        is_last = last_layer == len(self.layers)
        total = self.embedding_bytes if is_first else 0
        if is_last:
            total += self.norm_bytes
            if not (self.tied and is_first):
                total += self.head_bytes
        return total


@dataclass(frozen=True, slots=True)
class _Family:
    """How a family's layer differs from Llama's.

    Attributes:
        qkv_bias: whether q, k and v have biases; None means the config's ``attention_bias``.
        o_bias: the same for the output projection.
        head_norms: whether q and k are normalised per head.
        mlp_bias: whether the MLP may have biases, by the config's ``mlp_bias``.
        experts: the config's name for the number of experts, "" for a dense MLP.
        expert_size: the config's name for the width of an expert.
        default_kv_heads: KV heads if the config states none; None means as many as heads and -1
            that it must be stated.
        default_head_dim: width of a head if the config states none; None means hidden / heads.
        default_tied: whether head and embedding are tied if the config does not say.
    """

    qkv_bias: bool | None = False
    o_bias: bool | None = False
    head_norms: bool = False
    mlp_bias: bool = False
    experts: str = ""
    expert_size: str = ""
    default_kv_heads: int | None = -1
    default_head_dim: int | None = None
    default_tied: bool = False


_FAMILIES: Mapping[str, _Family] = MappingProxyType(
    {
        "llama": _Family(qkv_bias=None, o_bias=None, mlp_bias=True, default_kv_heads=None),
        "mistral": _Family(),
        "qwen2": _Family(qkv_bias=True),
        "qwen3": _Family(qkv_bias=None, o_bias=None, head_norms=True, default_head_dim=128),
        "mixtral": _Family(experts="num_local_experts", expert_size="intermediate_size"),
        "qwen3_moe": _Family(
            qkv_bias=None,
            o_bias=None,
            head_norms=True,
            experts="num_experts",
            expert_size="moe_intermediate_size",
        ),
    }
)


def profile_model(config: Mapping[str, object], dtype: str) -> ModelProfile:
    """Profiles a model from its Hugging Face ``config.json``.

    Args:
        config: the parsed file.
        dtype: dtype to serve in, a key of `placement.plan.ITEM_BYTES`.

    Raises:
        ProfileError: an unknown or quantised model, or a dimension that is missing, not a
            positive integer, or implausibly large.
    """
    if dtype not in ITEM_BYTES:
        raise ProfileError(f"dtype: expected one of {', '.join(ITEM_BYTES)}, found {dtype[:64]!r}")
    architecture = config.get("model_type")
    if not isinstance(architecture, str) or architecture not in _FAMILIES:
        raise ProfileError(
            f"model_type: expected one of {', '.join(_FAMILIES)}, "
            f"found {str(architecture)[:64]!r}; other families are not supported"
        )
    if config.get("quantization_config") is not None:
        raise ProfileError(
            "quantization_config: expected an unquantised model, found a quantised one; "
            "use the checkpoint that it was made from"
        )
    family = _FAMILIES[architecture]
    item = ITEM_BYTES[dtype]
    hidden = _size(config, "hidden_size")
    heads = _size(config, "num_attention_heads", maximum=4096)
    kv_heads = _kv_heads(config, family, heads)
    head_dim = _head_dim(config, family, hidden, heads)
    vocabulary = _size(config, "vocab_size")
    layer_count = _size(config, "num_hidden_layers", maximum=MAX_LAYERS)
    tied = _flag(config, "tie_word_embeddings", family.default_tied)
    attention, norms = _attention_parameters(config, family, (hidden, heads, kv_heads, head_dim))
    layers = []
    widest = 0
    for index in range(layer_count):
        mlp = _mlp(config, family, hidden, index)
        widest = max(widest, mlp.width)
        layers.append(
            LayerProfile(
                weight_bytes=item * (attention + norms + mlp.parameters),
                replicated_bytes=item * (norms + mlp.replicated),
                kv_bytes_per_token=item * 2 * kv_heads * head_dim,
                flops_per_token=2 * (attention + mlp.active),
                active_bytes=item * (attention + norms + mlp.active),
            )
        )
    embedding = item * vocabulary * hidden
    total = sum(layer.weight_bytes for layer in layers) + embedding + item * hidden
    return ModelProfile(
        architecture=architecture,
        dtype=dtype,
        layers=tuple(layers),
        embedding_bytes=embedding,
        head_bytes=embedding,
        norm_bytes=item * hidden,
        tied=tied,
        hidden_size=hidden,
        intermediate_size=widest,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocabulary=vocabulary,
        max_context=_size(config, "max_position_embeddings", maximum=MAX_CONTEXT),
        parameters=(total if tied else total + embedding) // item,
    )


@dataclass(frozen=True, slots=True)
class _Mlp:
    """Parameters of one layer's MLP: all, active for a token, and whole on every rank."""

    parameters: int
    active: int
    replicated: int
    width: int


def _attention_parameters(
    config: Mapping[str, object], family: _Family, shape: tuple[int, int, int, int]
) -> tuple[int, int]:
    """Parameters of the attention's projections, and of all norms of a layer."""
    hidden, heads, kv_heads, head_dim = shape
    stated = _flag(config, "attention_bias", False)
    qkv_bias = stated if family.qkv_bias is None else family.qkv_bias
    o_bias = stated if family.o_bias is None else family.o_bias
    qkv = (heads + 2 * kv_heads) * head_dim
    projections = hidden * qkv + heads * head_dim * hidden
    projections += (qkv if qkv_bias else 0) + (hidden if o_bias else 0)
    norms = 2 * hidden + (2 * head_dim if family.head_norms else 0)
    return projections, norms


def _mlp(config: Mapping[str, object], family: _Family, hidden: int, index: int) -> _Mlp:
    if family.experts and _is_sparse(config, family, index):
        # Checkpoints state either name, depending on the release that wrote them.
        stated = family.experts if config.get(family.experts) is not None else "num_local_experts"
        experts = _size(config, stated, maximum=4096)
        chosen = _size(config, "num_experts_per_tok", maximum=experts)
        width = _size(config, family.expert_size)
        one = 3 * hidden * width
        router = hidden * experts
        whole = experts * one + router
        return _Mlp(whole, chosen * one + router, whole, chosen * width)
    width = _size(config, "intermediate_size")
    parameters = 3 * hidden * width
    if family.mlp_bias and _flag(config, "mlp_bias", False):
        parameters += 2 * width + hidden
    return _Mlp(parameters, parameters, 0, width)


def _is_sparse(config: Mapping[str, object], family: _Family, index: int) -> bool:
    """Whether a layer of a mixture-of-experts family has experts."""
    if family.expert_size != "moe_intermediate_size":
        return True
    dense = config.get("mlp_only_layers") or []
    if not isinstance(dense, (list, tuple)):
        _refuse("mlp_only_layers", "a list of layers", dense)
    step = _size(config, "decoder_sparse_step", default=1)
    return index not in dense and (index + 1) % step == 0


def _kv_heads(config: Mapping[str, object], family: _Family, heads: int) -> int:
    default = heads if family.default_kv_heads is None else family.default_kv_heads
    kv_heads = _size(
        config, "num_key_value_heads", maximum=heads, default=None if default == -1 else default
    )
    if heads % kv_heads:
        _refuse("num_key_value_heads", f"a divisor of {heads} heads", kv_heads)
    return kv_heads


def _head_dim(config: Mapping[str, object], family: _Family, hidden: int, heads: int) -> int:
    if config.get("head_dim") is None and family.default_head_dim is None:
        if hidden % heads:
            _refuse("hidden_size", f"a multiple of {heads} heads, or head_dim", hidden)
        return hidden // heads
    return _size(config, "head_dim", maximum=65536, default=family.default_head_dim)


def _size(
    config: Mapping[str, object], name: str, maximum: int = _MAX_SIZE, default: int | None = None
) -> int:
    value = config.get(name)
    if value is None and default is not None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= maximum:
        _refuse(name, f"an integer from 1 to {maximum}", value)
    return value


def _flag(config: Mapping[str, object], name: str, default: bool) -> bool:
    value = config.get(name, default)
    if value is None:
        return default
    if not isinstance(value, bool):
        _refuse(name, "true or false", value)
    return value


def _refuse(name: str, expected: str, found: object) -> NoReturn:
    raise ProfileError(f"{name}: expected {expected}, found {str(found)[:64]!r}")
