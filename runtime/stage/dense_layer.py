"""A plain description of a dense decoder layer, for a back-end that computes whole layers.

Most families build their layers from the same few pieces: root-mean-square norms in other places,
grouped-query attention with a rotary embedding of half-split pairs, a gated MLP. `describe_layer`
reads from a layer's own modules which pieces it has and returns None for every layer that has
anything else, so that whoever computes from the description needs no knowledge of families.

The order of computation, with x the hidden states and each norm left out where it is None:

    a  = before_attention(x)
    q, k, v = the three parts of a @ qkv, heads of `head_size`
    q, k = query_norm(q), key_norm(k)        per head, or over all heads (see `RmsNorm.width`)
    q, k = the first `rotary_size` numbers of each head rotated by the rotation named `rotary`
    s  = `scale` * q @ k^T; with a soft cap, soft_cap * tanh(s / soft_cap)
    a  = softmax(s over the last `window` positions, the row's own included) @ v
    x  = x + residual_multiplier * after_attention(a @ output)
    g, u = the two parts of before_mlp(x) @ gate_up
    x  = x + residual_multiplier * after_mlp((activation(g) * u) @ down)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, cast

from torch import nn

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

__all__ = ["DenseLayer", "RmsNorm", "describe_layer", "rotation_name"]

Activation = Literal["silu", "gelu_tanh"]


@dataclass(frozen=True, slots=True, eq=False)
class RmsNorm:
    """x / sqrt(mean(x^2) + epsilon) * (offset + weight), computed in float32.

    Attributes:
        weight: [width], as the checkpoint stores it.
        epsilon: added to the mean square.
        offset: 1 where a family stores its weights minus 1 (Gemma), else 0.
        rounds_first: x is rounded to the stage's dtype before the product with the weight, which is
            then one in that dtype; otherwise the product is in float32 and rounded once.
    """

    weight: torch.Tensor
    epsilon: float
    offset: float
    rounds_first: bool

    @property
    def width(self) -> int:
        """Numbers that are normalised together."""
        return self.weight.shape[0]


@dataclass(frozen=True, slots=True, eq=False)
class DenseLayer:
    """One decoder layer; see the module's documentation for how its pieces come together.

    Attributes:
        index: of the layer in the whole model.
        qkv: query, key and value projection, or one that yields all three side by side.
        output: projection of the attended values.
        gate_up: gate and up projection, or one that yields both side by side.
        down: second projection of the MLP.
        before_attention, after_attention, before_mlp, after_mlp: norms of width D.
        query_norm, key_norm: norms of width E for each head, or of all heads' width for all.
        heads, kv_heads, head_size: H, K and E.
        activation: of the gate.
        scale: factor on the scores.
        soft_cap: of the scores.
        window: positions that a row sees, its own included; None for all.
        residual_multiplier: factor on what is added to the residual stream.
        rotary_size: numbers of each head that are rotated, the first ones; 0 for none. Number i is
            paired with number i + rotary_size / 2.
        rotary: name of the rotation, see `rotation_name`.
    """

    index: int
    qkv: tuple[nn.Linear, ...]
    output: nn.Linear
    gate_up: tuple[nn.Linear, ...]
    down: nn.Linear
    before_attention: RmsNorm | None
    after_attention: RmsNorm | None
    before_mlp: RmsNorm | None
    after_mlp: RmsNorm | None
    query_norm: RmsNorm | None
    key_norm: RmsNorm | None
    heads: int
    kv_heads: int
    head_size: int
    activation: Activation
    scale: float
    soft_cap: float | None
    window: int | None
    residual_multiplier: float
    rotary_size: int
    rotary: str


@dataclass(frozen=True, slots=True)
class _Layout:
    """What a class of layers does with modules whose names alone do not say it.

    Attributes:
        norms: the layer's norms by name, and the field of `DenseLayer` that each one is.
        window: "none", the attention's own "attribute", or the "config"'s for every layer.
        soft_cap: the attention hands its cap to the attention function.
        partial_rotary: the configuration's `partial_rotary_factor` counts.
        unrotated: which layers are not rotated: "none", those whose attention says `use_rope` is
            false ("flag"), or those without a window in a model that has one ("global").
    """

    norms: Mapping[str, str]
    window: Literal["none", "attribute", "config"] = "none"
    soft_cap: bool = False
    partial_rotary: bool = False
    unrotated: Literal["none", "flag", "global"] = "none"


_BEFORE = MappingProxyType(
    {"input_layernorm": "before_attention", "post_attention_layernorm": "before_mlp"}
)
_BEFORE_FEEDFORWARD = MappingProxyType(
    {"input_layernorm": "before_attention", "pre_feedforward_layernorm": "before_mlp"}
)
_AFTER = MappingProxyType(
    {"post_attention_layernorm": "after_attention", "post_feedforward_layernorm": "after_mlp"}
)
_AROUND = MappingProxyType(
    {
        "input_layernorm": "before_attention",
        "post_attention_layernorm": "after_attention",
        "pre_feedforward_layernorm": "before_mlp",
        "post_feedforward_layernorm": "after_mlp",
    }
)
_LAYOUTS: Mapping[str, _Layout] = MappingProxyType(
    {
        "CwmDecoderLayer": _Layout(_BEFORE, window="attribute"),
        "Exaone4DecoderLayer": _Layout(_AFTER, window="attribute", unrotated="global"),
        "Gemma2DecoderLayer": _Layout(_AROUND, window="attribute", soft_cap=True),
        "Gemma3DecoderLayer": _Layout(_AROUND, window="attribute"),
        "GemmaDecoderLayer": _Layout(_BEFORE),
        "GraniteDecoderLayer": _Layout(_BEFORE),
        "LlamaDecoderLayer": _Layout(_BEFORE),
        "MinistralDecoderLayer": _Layout(_BEFORE, window="attribute"),
        "MistralDecoderLayer": _Layout(_BEFORE, window="config"),
        "Olmo2DecoderLayer": _Layout(_AFTER),
        "Olmo3DecoderLayer": _Layout(_AFTER, window="attribute"),
        "Phi3DecoderLayer": _Layout(_BEFORE, window="config", partial_rotary=True),
        "Qwen2DecoderLayer": _Layout(_BEFORE, window="attribute"),
        "Qwen3DecoderLayer": _Layout(_BEFORE, window="attribute"),
        "SeedOssDecoderLayer": _Layout(_BEFORE),
        "SmolLM3DecoderLayer": _Layout(_BEFORE, window="attribute", unrotated="flag"),
        "VaultGemmaDecoderLayer": _Layout(_BEFORE_FEEDFORWARD, window="attribute", soft_cap=True),
    }
)

_WEIGHT_IN_FLOAT32 = ("Olmo2RMSNorm", "Olmo3RMSNorm")
_OFFSET_NORMS = ("GemmaRMSNorm", "Gemma2RMSNorm", "Gemma3RMSNorm", "VaultGemmaRMSNorm")
_PLAIN_NORMS = (
    "CwmRMSNorm",
    "Exaone4RMSNorm",
    "GraniteRMSNorm",
    "LlamaRMSNorm",
    "MinistralRMSNorm",
    "MistralRMSNorm",
    "Phi3RMSNorm",
    "Qwen2RMSNorm",
    "Qwen3RMSNorm",
    "SeedOssRMSNorm",
    "SmolLM3RMSNorm",
)
_ACTIVATIONS: Mapping[str, Activation] = MappingProxyType(
    {"SiLU": "silu", "SiLUActivation": "silu", "GELUTanh": "gelu_tanh"}
)


def rotation_name(config: PretrainedConfig, index: int) -> str:
    """Name of the rotation of one layer: its layer type in a model with one per type, else ""."""
    layer_types: list[str] = getattr(config, "layer_types", None) or []
    rotary: Mapping[str, object] = config.rope_parameters or {}
    return layer_types[index] if layer_types and set(layer_types) <= rotary.keys() else ""


def describe_layer(config: PretrainedConfig, layer: nn.Module) -> DenseLayer | None:
    """Describes a decoder layer of transformers, None where the description does not fit.

    It does not fit mixtures of experts, LayerNorm, parallel residuals, interleaved rotary pairs,
    attention sinks, activations other than `Activation`, layers that were sharded, and every class
    of layers that no test has compared with its description.

    Args:
        config: of the whole model.
        layer: one of its decoder layers, with or without storage.
    """
    layout = _LAYOUTS.get(type(layer).__name__)
    attention, mlp = _child(layer, "self_attn"), _child(layer, "mlp")
    if layout is None or attention is None or mlp is None:
        return None
    try:
        return _describe(config, layer, attention, mlp, layout)
    except _OtherLayerError:
        return None


def _describe(
    config: PretrainedConfig,
    layer: nn.Module,
    attention: nn.Module,
    mlp: nn.Module,
    layout: _Layout,
) -> DenseLayer:
    pieces = _Pieces()
    norms = {place: pieces.norm(layer, name) for name, place in layout.norms.items()}
    described = DenseLayer(
        index=cast("int", attention.layer_idx),
        qkv=pieces.split_or_fused(attention, ("q_proj", "k_proj", "v_proj"), "qkv_proj"),
        output=pieces.linear(attention, "o_proj"),
        gate_up=pieces.split_or_fused(mlp, ("gate_proj", "up_proj"), "gate_up_proj"),
        down=pieces.linear(mlp, "down_proj"),
        before_attention=norms.get("before_attention"),
        after_attention=norms.get("after_attention"),
        before_mlp=norms.get("before_mlp"),
        after_mlp=norms.get("after_mlp"),
        query_norm=pieces.norm(attention, "q_norm") if hasattr(attention, "q_norm") else None,
        key_norm=pieces.norm(attention, "k_norm") if hasattr(attention, "k_norm") else None,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_size=cast("int", attention.head_dim),
        activation=pieces.activation(mlp),
        scale=cast("float", attention.scaling),
        soft_cap=cast("float | None", attention.attn_logit_softcapping)
        if layout.soft_cap
        else None,
        window=_window(config, attention, layout),
        residual_multiplier=cast("float", getattr(layer, "residual_multiplier", 1.0)),
        rotary_size=_rotary_size(config, attention, layout),
        rotary=rotation_name(config, cast("int", attention.layer_idx)),
    )
    if not (attention.is_causal and pieces.cover(layer) and _fits(described)):
        raise _OtherLayerError
    return described


class _OtherLayerError(Exception):
    """The layer has a piece that the description has no word for."""


@dataclass(slots=True)
class _Pieces:
    """Takes modules out of a layer and remembers which. Raises _OtherLayerError."""

    taken: set[nn.Module] = field(default_factory=set)

    def linear(self, parent: nn.Module, name: str) -> nn.Linear:
        """A linear of exactly that type: sharded ones are something else."""
        found = _child(parent, name)
        if type(found) is not nn.Linear:
            raise _OtherLayerError
        self.taken.add(found)
        return found

    def split_or_fused(
        self, parent: nn.Module, parts: tuple[str, ...], fused: str
    ) -> tuple[nn.Linear, ...]:
        """The linear that yields all, where there is one, else those that yield the parts."""
        names = (fused,) if _child(parent, fused) is not None else parts
        return tuple(self.linear(parent, name) for name in names)

    def norm(self, parent: nn.Module, name: str) -> RmsNorm:
        """A norm whose class is known."""
        found = _child(parent, name)
        kind = type(found).__name__
        if found is None or kind not in (*_PLAIN_NORMS, *_OFFSET_NORMS, *_WEIGHT_IN_FLOAT32):
            raise _OtherLayerError
        self.taken.add(found)
        epsilon = found.eps if kind in _OFFSET_NORMS else found.variance_epsilon
        return RmsNorm(
            weight=cast("torch.Tensor", found.weight),
            epsilon=cast("float", epsilon),
            offset=1.0 if kind in _OFFSET_NORMS else 0.0,
            rounds_first=kind in _PLAIN_NORMS,
        )

    def activation(self, mlp: nn.Module) -> Activation:
        """The activation of a gate."""
        found = _child(mlp, "act_fn") or _child(mlp, "activation_fn")
        name = _ACTIVATIONS.get(type(found).__name__)
        if found is None or name is None:
            raise _OtherLayerError
        self.taken.add(found)
        return name

    def cover(self, layer: nn.Module) -> bool:
        """Nothing that computes is left: every leaf was taken or is a dropout, every tensor too."""
        leaves = {module for module in layer.modules() if not any(module.children())}
        left = {module for module in leaves - self.taken if not isinstance(module, nn.Dropout)}
        known = {id(tensor) for module in self.taken for tensor in module.parameters()}
        return not left and known == {id(tensor) for tensor in layer.parameters()}


def _child(parent: nn.Module, name: str) -> nn.Module | None:
    return dict(parent.named_children()).get(name)


def _window(config: PretrainedConfig, attention: nn.Module, layout: _Layout) -> int | None:
    if layout.window == "none":
        return None
    if layout.window == "config":
        return cast("int | None", config.sliding_window)
    if layout.unrotated == "global" and not attention.is_sliding:
        return None
    return cast("int | None", attention.sliding_window)


def _rotary_size(config: PretrainedConfig, attention: nn.Module, layout: _Layout) -> int:
    size = cast("int", attention.head_dim)
    if layout.unrotated == "flag" and not attention.use_rope:
        return 0
    if layout.unrotated == "global" and not (
        attention.sliding_window is None or attention.is_sliding
    ):
        return 0
    if layout.partial_rotary:
        return int(size * config.rope_parameters.get("partial_rotary_factor", 1.0))
    return size


def _fits(layer: DenseLayer) -> bool:
    """The widths of the linears and norms are those that the numbers of heads ask for."""
    query, key = layer.heads * layer.head_size, layer.kv_heads * layer.head_size
    widths = [linear.out_features for linear in layer.qkv]
    if widths not in ([query, key, key], [query + 2 * key]) or layer.output.in_features != query:
        return False
    return all(
        norm is None or norm.width in (layer.head_size, whole)
        for norm, whole in ((layer.query_norm, query), (layer.key_norm, key))
    )
