"""What a model weighs: bytes and arithmetic of every layer, from its ``config.json`` alone.

The counts follow the modules of the families as transformers builds them; a test compares every
family with the real modules. An unknown family is refused: a wrong count would become a plan that
runs out of memory on somebody's machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final, NoReturn

from placement.plan import ITEM_BYTES, MAX_CONTEXT, MAX_LAYERS, WEIGHT_FORMATS

_SCALE_BYTES = 4
"""Of an int8 weight's scale, one for each output channel."""

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
            biases that are added to a sum of all ranks, routers and experts).
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
        weight_format: that the linears of layers and head are counted in.
        layers: one profile per decoder layer, in order.
        embedding_bytes: the token embedding, on the first stage.
        head_bytes: the LM head, on the last stage; when tied it is the embedding once more.
        norm_bytes: the final norm, on the last stage.
        tied: whether the head is the embedding; a single stage then holds it once, if plain.
        hidden_size: width of a hidden state.
        intermediate_size: width of the widest MLP.
        heads: query heads.
        kv_heads: key and value heads.
        head_dim: width of a head.
        vocabulary: rows of the embedding.
        max_context: longest sequence that the model was made for, in tokens.
        parameters: parameters of the whole model, tied ones counted once.
        tensor_parallel: a stage may shard its layers over ranks.
    """

    architecture: str
    dtype: str
    weight_format: str
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
    tensor_parallel: bool

    def ends_bytes(self, first_layer: int, last_layer: int) -> int:
        """Bytes of embedding, final norm and head in a stage of layers [first, last)."""
        is_first = first_layer == 0
        is_last = last_layer == len(self.layers)
        total = self.embedding_bytes if is_first else 0
        if is_last:
            total += self.norm_bytes
            if not (self.tied and is_first and self.weight_format == "plain"):
                total += self.head_bytes
        return total


_Flag = bool | tuple[str, bool]
"""Whether something is there: always so, or the configuration's field and the class's default."""


@dataclass(frozen=True, slots=True)
class _Family:
    """How a family's layer differs from Mistral's.

    Attributes:
        qkv_bias: whether q, k and v have biases.
        o_bias: the same for the output projection.
        mlp_bias: the same for the MLP.
        norms: norms of the layer that are as wide as the hidden state.
        norm_tensors: tensors of each of them and of the final norm: 1, 2 with a bias, or none.
        query_norms: whether q and k are normalised.
        wide_query_norms: they have weights for every head, not one set for all heads.
        sinks: every query head has an attention sink.
        activation_parameters: learned numbers of the MLP's activation.
        mlp_matrices: 3 for gate, up and down, 2 for an MLP without a gate.
        experts: the config's name for the number of experts, "" for a dense MLP.
        expert_size: the config's name for the width of an expert.
        expert_bias: experts and router have biases.
        shared_expert_size: the config's name for the width of an expert that every token takes
            through a gate of its own, "" for none.
        tensor_parallel: stages shard the family; where not, `runtime.stage` refuses to.
        default_kv_heads: KV heads if the config states none; None means as many as heads and -1
            that it must be stated.
        default_head_dim: width of a head if the config states none; None means hidden / heads.
        default_tied: whether head and embedding are tied if the config does not say.
    """

    qkv_bias: _Flag = False
    o_bias: _Flag = False
    mlp_bias: _Flag = False
    norms: int = 2
    norm_tensors: int = 1
    query_norms: _Flag = False
    wide_query_norms: bool = False
    sinks: bool = False
    activation_parameters: int = 0
    mlp_matrices: int = 3
    experts: str = ""
    expert_size: str = ""
    expert_bias: bool = False
    shared_expert_size: str = ""
    tensor_parallel: bool = True
    default_kv_heads: int | None = -1
    default_head_dim: int | None = None
    default_tied: bool = False


_ATTENTION_BIAS: Final = ("attention_bias", False)
_MLP_BIAS: Final = ("mlp_bias", False)
_GEMMA: Final = _Family(
    qkv_bias=_ATTENTION_BIAS, o_bias=_ATTENTION_BIAS, default_head_dim=256, default_tied=True
)
_GLM: Final = _Family(qkv_bias=("attention_bias", True), default_head_dim=128)
_COHERE: Final = _Family(
    qkv_bias=_ATTENTION_BIAS,
    o_bias=_ATTENTION_BIAS,
    norms=1,
    default_kv_heads=None,
    default_tied=True,
)
_LLAMA: Final = _Family(
    qkv_bias=_ATTENTION_BIAS, o_bias=_ATTENTION_BIAS, mlp_bias=_MLP_BIAS, default_kv_heads=None
)
_OLMO: Final = _Family(
    qkv_bias=_ATTENTION_BIAS, o_bias=_ATTENTION_BIAS, norm_tensors=0, default_kv_heads=None
)
_OLMO2: Final = replace(
    _OLMO, norm_tensors=1, query_norms=True, wide_query_norms=True, tensor_parallel=False
)
_FAMILIES: Mapping[str, _Family] = MappingProxyType(
    {
        "apertus": _Family(
            qkv_bias=_ATTENTION_BIAS,
            o_bias=_ATTENTION_BIAS,
            query_norms=True,
            activation_parameters=2,
            mlp_matrices=2,
            default_kv_heads=None,
        ),
        "arcee": replace(_LLAMA, mlp_matrices=2),
        "cohere": replace(_COHERE, query_norms=("use_qk_norm", False), wide_query_norms=True),
        "cohere2": _COHERE,
        "cwm": _Family(mlp_bias=_MLP_BIAS, default_head_dim=128),
        "ernie4_5": _Family(
            qkv_bias=("use_bias", False),
            o_bias=("use_bias", False),
            mlp_bias=("use_bias", False),
            default_head_dim=128,
            default_tied=True,
        ),
        "exaone4": _Family(query_norms=True),
        "gemma": _GEMMA,
        "gemma2": replace(_GEMMA, norms=4),
        "gemma3_text": replace(_GEMMA, norms=4, query_norms=True),
        "glm": _GLM,
        "glm4": replace(_GLM, norms=4),
        "gpt_oss": _Family(
            qkv_bias=("attention_bias", True),
            o_bias=("attention_bias", True),
            sinks=True,
            experts="num_local_experts",
            expert_size="intermediate_size",
            expert_bias=True,
            tensor_parallel=False,
            default_head_dim=64,
        ),
        "granite": _LLAMA,
        "helium": _Family(qkv_bias=_ATTENTION_BIAS, mlp_bias=_MLP_BIAS, default_head_dim=128),
        "hunyuan_v1_dense": replace(
            _LLAMA, mlp_bias=False, query_norms=True, tensor_parallel=False
        ),
        "jais2": _Family(
            qkv_bias=("attention_bias", True),
            o_bias=("attention_bias", True),
            mlp_bias=("mlp_bias", True),
            norm_tensors=2,
            mlp_matrices=2,
            default_kv_heads=None,
        ),
        "llama": _LLAMA,
        "ministral": _Family(),
        "ministral3": _Family(default_head_dim=128),
        "mistral": _Family(),
        "mixtral": _Family(
            experts="num_local_experts", expert_size="intermediate_size", tensor_parallel=False
        ),
        "olmo": _OLMO,
        "olmo2": _OLMO2,
        "olmo3": _OLMO2,
        "olmoe": replace(_OLMO2, experts="num_experts", expert_size="intermediate_size"),
        "phi3": _Family(default_kv_heads=None),
        "qwen2": _Family(qkv_bias=True),
        "qwen2_moe": _Family(
            qkv_bias=("qkv_bias", True),
            experts="num_experts",
            expert_size="moe_intermediate_size",
            shared_expert_size="shared_expert_intermediate_size",
            tensor_parallel=False,
        ),
        "qwen3": _Family(
            qkv_bias=_ATTENTION_BIAS,
            o_bias=_ATTENTION_BIAS,
            query_norms=True,
            default_head_dim=128,
        ),
        "qwen3_moe": _Family(
            qkv_bias=_ATTENTION_BIAS,
            o_bias=_ATTENTION_BIAS,
            query_norms=True,
            experts="num_experts",
            expert_size="moe_intermediate_size",
            tensor_parallel=False,
        ),
        "seed_oss": _Family(
            qkv_bias=("attention_bias", True),
            o_bias=("attention_out_bias", False),
            mlp_bias=_MLP_BIAS,
            default_head_dim=128,
        ),
        "smollm3": replace(_LLAMA, default_kv_heads=-1, default_tied=True),
        "starcoder2": _Family(
            qkv_bias=("use_bias", True),
            o_bias=("use_bias", True),
            mlp_bias=("use_bias", True),
            norm_tensors=2,
            mlp_matrices=2,
            default_tied=True,
        ),
        "vaultgemma": _GEMMA,
    }
)


def profile_model(
    config: Mapping[str, object], dtype: str, weight_format: str = "plain"
) -> ModelProfile:
    """Profiles a model from its Hugging Face ``config.json``.

    Args:
        config: the parsed file.
        dtype: dtype to serve in, a key of `placement.plan.ITEM_BYTES`.
        weight_format: to serve in, one of `placement.plan.WEIGHT_FORMATS`.

    Raises:
        ProfileError: an unknown or quantised model, or a dimension that is missing, not a
            positive integer, or implausibly large; a family or dtype without that weight format.
    """
    if dtype not in ITEM_BYTES:
        raise ProfileError(f"dtype: expected one of {', '.join(ITEM_BYTES)}, found {dtype[:64]!r}")
    if weight_format not in WEIGHT_FORMATS:
        _refuse("weight_format", f"one of {', '.join(WEIGHT_FORMATS)}", weight_format)
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
    if weight_format != "plain":
        if family.experts:
            _refuse("weight_format", f"plain, as {architecture} has experts", weight_format)
        if dtype == "float16":
            _refuse("weight_format", "plain, as the dtype is float16", weight_format)
    item = ITEM_BYTES[dtype]

    def linears(matrices: int, outputs: int) -> int:
        """Bytes of the matrices of linears with so many output channels in all."""
        if weight_format == "int8":
            return matrices + _SCALE_BYTES * outputs
        return item * matrices

    hidden = _size(config, "hidden_size")
    heads = _size(config, "num_attention_heads", maximum=4096)
    kv_heads = _kv_heads(config, family, heads)
    head_dim = _head_dim(config, family, hidden, heads)
    vocabulary = _size(config, "vocab_size")
    layer_count = _size(config, "num_hidden_layers", maximum=MAX_LAYERS)
    tied = _flag(config, "tie_word_embeddings", family.default_tied)
    attention = _attention(config, family, (hidden, heads, kv_heads, head_dim))
    final_norm = family.norm_tensors * hidden
    layers = []
    widest = 0
    parameters = vocabulary * hidden * (1 if tied else 2) + final_norm
    for index in range(layer_count):
        mlp = _mlp(config, family, hidden, index)
        widest = max(widest, mlp.width)
        parameters += attention.parameters + attention.others + mlp.parameters
        matrices = attention.matrices + mlp.matrices
        saved = item * matrices - linears(matrices, attention.outputs + mlp.outputs)
        layers.append(
            LayerProfile(
                weight_bytes=item * (attention.parameters + attention.others + mlp.parameters)
                - saved,
                replicated_bytes=item * (attention.others + attention.bias + mlp.replicated),
                kv_bytes_per_token=item * 2 * kv_heads * head_dim,
                flops_per_token=2 * (attention.parameters + mlp.active),
                active_bytes=item * (attention.parameters + attention.others + mlp.active) - saved,
            )
        )
    embedding = item * vocabulary * hidden
    return ModelProfile(
        architecture=architecture,
        dtype=dtype,
        weight_format=weight_format,
        layers=tuple(layers),
        embedding_bytes=embedding,
        head_bytes=linears(vocabulary * hidden, vocabulary),
        norm_bytes=item * final_norm,
        tied=tied,
        hidden_size=hidden,
        intermediate_size=widest,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocabulary=vocabulary,
        max_context=_size(config, "max_position_embeddings", maximum=MAX_CONTEXT),
        parameters=parameters,
        tensor_parallel=family.tensor_parallel and attention.shardable,
    )


@dataclass(frozen=True, slots=True)
class _Mlp:
    """Parameters of one layer's MLP: all, active for a token, and whole on every rank.

    Of a dense one, how many of them are in matrices, and the output channels of these.
    """

    parameters: int
    active: int
    replicated: int
    width: int
    matrices: int = 0
    outputs: int = 0


@dataclass(frozen=True, slots=True)
class _Attention:
    """Parameters of one layer's attention and norms.

    Attributes:
        parameters: of the projections.
        matrices: of them, those in matrices.
        outputs: output channels of the matrices.
        bias: of the output projection, which every rank adds to the sum and so holds.
        others: of all norms of the layer, sinks, and its activation.
        shardable: no parameter belongs to several heads without being a projection's.
    """

    parameters: int
    matrices: int
    outputs: int
    bias: int
    others: int
    shardable: bool


def _attention(
    config: Mapping[str, object], family: _Family, shape: tuple[int, int, int, int]
) -> _Attention:
    hidden, heads, kv_heads, head_dim = shape
    qkv = (heads + 2 * kv_heads) * head_dim
    bias = hidden if _has(config, family.o_bias) else 0
    matrices = hidden * qkv + heads * head_dim * hidden
    projections = matrices + bias + (qkv if _has(config, family.qkv_bias) else 0)
    others = family.norms * family.norm_tensors * hidden + (heads if family.sinks else 0)
    others += family.activation_parameters
    normalised = _has(config, family.query_norms)
    if normalised:
        others += (heads + kv_heads if family.wide_query_norms else 2) * head_dim
    shardable = not (family.sinks or (normalised and family.wide_query_norms))
    return _Attention(projections, matrices, qkv + hidden, bias, others, shardable)


def _mlp(config: Mapping[str, object], family: _Family, hidden: int, index: int) -> _Mlp:
    if family.experts and _is_sparse(config, family, index):
        return _mixture(config, family, hidden)
    width = _size(config, "intermediate_size")
    matrices = parameters = family.mlp_matrices * hidden * width
    bias = 0
    if _has(config, family.mlp_bias):
        bias = hidden
        parameters += (family.mlp_matrices - 1) * width + bias
    outputs = (family.mlp_matrices - 1) * width + hidden
    return _Mlp(parameters, parameters, bias, width, matrices, outputs)


def _mixture(config: Mapping[str, object], family: _Family, hidden: int) -> _Mlp:
    # Checkpoints state either name, depending on the release that wrote them.
    stated = family.experts if config.get(family.experts) is not None else "num_local_experts"
    experts = _size(config, stated, maximum=4096)
    chosen = _size(config, "num_experts_per_tok", maximum=experts)
    width = _size(config, family.expert_size)
    one = 3 * hidden * width + (2 * width + hidden if family.expert_bias else 0)
    always = hidden * experts + (experts if family.expert_bias else 0)
    widest = chosen * width
    if family.shared_expert_size:
        shared = _size(config, family.shared_expert_size)
        always += 3 * hidden * shared + hidden
        widest += shared
    whole = experts * one + always
    return _Mlp(whole, chosen * one + always, whole, widest)


def _has(config: Mapping[str, object], flag: _Flag) -> bool:
    return flag if isinstance(flag, bool) else _flag(config, *flag)


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
