"""A description says all that its layer computes: plain torch from it gives the layer's output."""

from __future__ import annotations

import pytest
import torch
import transformers
from checkpoints import random_model
from stage_variants import DESCRIBED, VARIANTS
from torch import nn
from torch.nn import functional

from runtime.stage.dense_layer import DenseLayer, RmsNorm, describe_layer, rotation_name

TOKENS = torch.arange(40)[None] * 7 % 95


def plain_norm(norm: RmsNorm | None, x: torch.Tensor) -> torch.Tensor:
    if norm is None:
        return x
    scaled = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + norm.epsilon)
    if norm.rounds_first:
        return (norm.offset + norm.weight) * scaled.to(x.dtype)
    return ((norm.offset + norm.weight.float()) * scaled).to(x.dtype)


def plain_head_norm(norm: RmsNorm | None, x_THE: torch.Tensor) -> torch.Tensor:
    if norm is None or norm.width == x_THE.shape[-1]:
        return plain_norm(norm, x_THE)
    return plain_norm(norm, x_THE.flatten(1)).view(x_THE.shape)


def plain_rotation(
    layer: DenseLayer, x_THE: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    if not layer.rotary_size:
        return x_THE
    half = layer.rotary_size // 2
    first, second, rest = x_THE.split([half, half, layer.head_size - layer.rotary_size], dim=-1)
    cos_T1F, sin_T1F = cos[:, None, :half], sin[:, None, :half]
    return torch.cat(
        [first * cos_T1F - second * sin_T1F, second * cos_T1F + first * sin_T1F, rest], dim=-1
    )


def plain_layer(
    layer: DenseLayer, x_TD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    count = len(x_TD)
    heads, kv_heads, size = layer.heads, layer.kv_heads, layer.head_size
    inner = plain_norm(layer.before_attention, x_TD)
    qkv = torch.cat([linear(inner) for linear in layer.qkv], dim=-1).view(count, -1, size)
    query, key, value = qkv.split([heads, kv_heads, kv_heads], dim=1)
    query = plain_rotation(layer, plain_head_norm(layer.query_norm, query), cos, sin)
    key = plain_rotation(layer, plain_head_norm(layer.key_norm, key), cos, sin)
    key, value = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (key, value))
    scores_HTT = torch.einsum("the,she->hts", query, key) * layer.scale
    if layer.soft_cap is not None:
        scores_HTT = layer.soft_cap * torch.tanh(scores_HTT / layer.soft_cap)
    distance_TT = torch.arange(count)[:, None] - torch.arange(count)[None, :]
    hidden_TT = (distance_TT < 0) | (distance_TT >= (layer.window or count))
    weights_HTT = scores_HTT.masked_fill(hidden_TT, -torch.inf).softmax(-1)
    attended = layer.output(torch.einsum("hts,she->the", weights_HTT, value).flatten(1))
    x_TD = x_TD + layer.residual_multiplier * plain_norm(layer.after_attention, attended)
    inner = plain_norm(layer.before_mlp, x_TD)
    gate, up = torch.cat([linear(inner) for linear in layer.gate_up], dim=-1).chunk(2, dim=-1)
    gate = (
        functional.silu(gate)
        if layer.activation == "silu"
        else functional.gelu(gate, approximate="tanh")
    )
    return x_TD + layer.residual_multiplier * plain_norm(layer.after_mlp, layer.down(gate * up))


@pytest.mark.parametrize("variant", DESCRIBED)
@torch.inference_mode()
def test_a_description_computes_what_the_layer_computes(variant: str) -> None:
    family, changes = VARIANTS[variant]
    model = random_model(family, seed=3, **changes)
    seen: dict[int, tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor], torch.Tensor]] = {}

    def watch(index: int, layer: nn.Module) -> None:
        def hook(_: nn.Module, given: tuple[torch.Tensor], named: dict, out: torch.Tensor) -> None:
            seen[index] = (given[0][0], named["position_embeddings"], out[0])

        layer.register_forward_hook(hook, with_kwargs=True)

    for index, layer in enumerate(model.model.layers):
        watch(index, layer)
    model(TOKENS)
    rotations = {}
    for index, layer in enumerate(model.model.layers):
        described = describe_layer(model.config, layer)
        assert described is not None and described.index == index
        hidden, (cos, sin), expected = seen[index]
        found = plain_layer(described, hidden, cos[0], sin[0])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        rotations.setdefault(described.rotary, cos)
        assert torch.equal(rotations[described.rotary], cos)
        assert described.rotary == rotation_name(model.config, index)


@pytest.mark.parametrize("variant", sorted(VARIANTS.keys() - set(DESCRIBED)))
def test_other_layers_are_not_described(variant: str) -> None:
    family, changes = VARIANTS[variant]
    model = random_model(family, **changes)
    assert [describe_layer(model.config, layer) for layer in model.model.layers] == [None] * 6


def test_a_layer_with_more_or_other_pieces_is_not_described() -> None:
    def changed(name: str, module: nn.Module | None, child: str = "") -> DenseLayer | None:
        model = random_model("qwen3")
        layer = model.model.layers[2]
        setattr(layer.get_submodule(name), child, module)
        return describe_layer(model.config, layer)

    class Sharded(nn.Linear):
        pass

    for name, child, module in (
        ("self_attn", "gate_proj", nn.Linear(64, 64)),
        ("self_attn", "sinks", nn.Parameter(torch.zeros(4))),
        ("self_attn", "q_proj", Sharded(64, 128)),
        ("self_attn", "q_norm", nn.LayerNorm(32)),
        ("self_attn", "o_proj", nn.Linear(64, 64)),
        ("mlp", "act_fn", nn.ReLU()),
        ("mlp", "up_proj", nn.Identity()),
        ("", "input_layernorm", nn.LayerNorm(64)),
    ):
        assert changed(name, module, child) is None, (name, child)
    relu = random_model("llama", hidden_act="relu")
    assert describe_layer(relu.config, relu.model.layers[0]) is None
    assert describe_layer(transformers.LlamaConfig(), nn.Identity()) is None
