from __future__ import annotations

import pytest
import torch
from placement_samples import CONFIG
from transformers import AutoConfig, AutoModelForCausalLM

from placement.model_profile import _FAMILIES, ProfileError, profile_model
from placement.plan import ITEM_BYTES
from runtime.stage.errors import UnsupportedModel
from runtime.stage.families import FAMILIES as STAGE_FAMILIES
from runtime.stage.fused import split_fused
from runtime.stage.tensor_parallel import TensorParallelPlan

BASE = {
    "hidden_size": 96,
    "intermediate_size": 208,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "vocab_size": 311,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}

_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
FAMILIES = [
    ("apertus", {"attention_bias": True}),
    ("arcee", {"mlp_bias": True}),
    ("cohere", {}),
    ("cohere", {"use_qk_norm": True, "attention_bias": True}),
    ("cohere2", {}),
    ("cwm", {"mlp_bias": True, "bos_token_id": 1}),
    ("ernie4_5", {"use_bias": True}),
    ("exaone4", {}),
    ("gemma", {}),
    ("gemma2", {"head_dim": 24}),
    ("gemma3_text", {"head_dim": 24, "attention_bias": True}),
    ("glm", {}),
    ("glm4", {"attention_bias": False}),
    ("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    ("granite", {"attention_bias": True, "mlp_bias": True}),
    ("helium", {"head_dim": 12, "attention_bias": True, "mlp_bias": True}),
    ("hunyuan_v1_dense", {"head_dim": 12}),
    ("jais2", {}),
    ("jais2", {"attention_bias": False, "mlp_bias": False}),
    ("llama", {}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"head_dim": 32}),
    ("ministral", {"head_dim": 40}),
    ("ministral3", {}),
    ("mistral", {}),
    ("mistral", {"head_dim": 40, "sliding_window": 64}),
    ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    ("olmo", {"attention_bias": True}),
    ("olmo2", {}),
    ("olmo3", {"attention_bias": True}),
    ("olmoe", _EXPERTS),
    ("phi3", {}),
    ("qwen2", {}),
    (
        "qwen2_moe",
        {
            **_EXPERTS,
            "moe_intermediate_size": 48,
            "shared_expert_intermediate_size": 80,
            "mlp_only_layers": [1],
        },
    ),
    ("qwen2_moe", {**_EXPERTS, "moe_intermediate_size": 48, "qkv_bias": False}),
    ("qwen3", {}),
    ("qwen3", {"head_dim": 24, "attention_bias": True}),
    (
        "qwen3_moe",
        {**_EXPERTS, "moe_intermediate_size": 48, "mlp_only_layers": [1], "head_dim": 16},
    ),
    ("seed_oss", {}),
    ("seed_oss", {"attention_out_bias": True, "mlp_bias": True, "attention_bias": False}),
    ("smollm3", {"attention_bias": True}),
    ("starcoder2", {}),
    ("starcoder2", {"use_bias": False}),
    ("vaultgemma", {}),
]
DENSE = [(family, extra) for family, extra in FAMILIES if "num_experts_per_tok" not in extra]


def test_every_family_that_stages_compute_is_profiled() -> None:
    assert {family for family, _ in FAMILIES} == STAGE_FAMILIES.keys()
    assert _FAMILIES.keys() == STAGE_FAMILIES.keys()


def size(module: torch.nn.Module) -> int:
    return sum(item.numel() * item.element_size() for item in module.parameters())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("family", "extra"), FAMILIES)
def test_bytes_are_those_of_the_real_modules(
    family: str, extra: dict[str, object], dtype: str, tied: bool
) -> None:
    config = AutoConfig.for_model(family, **{**BASE, **extra}, tie_word_embeddings=tied)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    profile = profile_model(config.to_dict(), dtype)
    assert [layer.weight_bytes for layer in profile.layers] == [
        size(layer) for layer in model.model.layers
    ]
    assert profile.embedding_bytes == size(model.model.embed_tokens)
    assert profile.head_bytes == size(model.lm_head)
    assert profile.norm_bytes == size(model.model.norm)
    assert profile.tied is tied
    assert profile.parameters == sum(item.numel() for item in model.parameters())
    attention = model.model.layers[0].self_attn
    assert profile.head_dim == attention.head_dim
    split_fused(config, model.model.layers[0])
    assert profile.layers[0].kv_bytes_per_token == ITEM_BYTES[dtype] * (
        attention.k_proj.out_features + attention.v_proj.out_features
    )
    # One stage holds a tied matrix once, two stages hold it on both ends.
    whole = sum(layer.weight_bytes for layer in profile.layers) + profile.ends_bytes(0, 3)
    assert whole == size(model)
    split = profile.ends_bytes(0, 1) + profile.ends_bytes(1, 2) + profile.ends_bytes(2, 3)
    assert split == profile.embedding_bytes + profile.norm_bytes + profile.head_bytes


def int8_size(module: torch.nn.Module) -> int:
    """Bytes when matrices of linears are int8 with a float32 scale for each output channel."""
    linears = [part.weight for part in module.modules() if isinstance(part, torch.nn.Linear)]
    saved = sum((w.element_size() - 1) * w.numel() - 4 * len(w) for w in linears)
    return size(module) - saved


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("family", "extra"), DENSE)
def test_int8_counts_the_real_modules_linears(
    family: str, extra: dict[str, object], dtype: str, tied: bool
) -> None:
    config = AutoConfig.for_model(family, **{**BASE, **extra}, tie_word_embeddings=tied)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    plain, int8 = (profile_model(config.to_dict(), dtype, name) for name in ("plain", "int8"))
    assert [layer.weight_bytes for layer in int8.layers] == [
        int8_size(layer) for layer in model.model.layers
    ]
    assert int8.layers[0].active_bytes == int8.layers[0].weight_bytes
    assert int8.head_bytes == int8_size(model.lm_head)
    # A tied embedding stays exact, so that one stage holds both.
    assert int8.ends_bytes(0, 3) == plain.embedding_bytes + plain.norm_bytes + int8.head_bytes
    for name in ("embedding_bytes", "norm_bytes", "parameters"):
        assert getattr(int8, name) == getattr(plain, name)
    for name in ("kv_bytes_per_token", "flops_per_token", "replicated_bytes"):
        assert getattr(int8.layers[0], name) == getattr(plain.layers[0], name)


@pytest.mark.parametrize(
    ("family", "dtype", "weight_format", "reason"),
    [
        ("mixtral", "float32", "int8", "plain, as mixtral has experts, found 'int8'"),
        ("llama", "float16", "int8", "plain, as the dtype is float16, found 'int8'"),
        ("llama", "float32", "int4", "one of plain, int8, found 'int4'"),
    ],
)
def test_weight_formats_that_no_stage_computes(
    family: str, dtype: str, weight_format: str, reason: str
) -> None:
    with pytest.raises(ProfileError, match=f"weight_format: expected {reason}"):
        profile_model({**BASE, "model_type": family}, dtype, weight_format)


@pytest.mark.parametrize(("family", "extra"), DENSE)
def test_arithmetic_follows_the_linears(family: str, extra: dict[str, object]) -> None:
    config = AutoConfig.for_model(family, **{**BASE, **extra})
    with torch.device("meta"):
        layer = AutoModelForCausalLM.from_config(config).model.layers[0]
    profile = profile_model(config.to_dict(), "float32").layers[0]
    linears = sum(size(module) for module in layer.modules() if isinstance(module, torch.nn.Linear))
    assert profile.flops_per_token == 2 * linears // 4
    assert profile.active_bytes == profile.weight_bytes


@pytest.mark.parametrize(("family", "extra"), FAMILIES)
def test_replication_is_what_stages_leave_whole(family: str, extra: dict[str, object]) -> None:
    config = AutoConfig.for_model(family, **{**BASE, **extra})
    with torch.device("meta"):
        layer = AutoModelForCausalLM.from_config(config, dtype=torch.float32).model.layers[0]
    profile = profile_model(config.to_dict(), "float32")
    try:
        plan = TensorParallelPlan(config, 2)
        plan.prepare(layer)
    except UnsupportedModel:
        assert not profile.tensor_parallel
        return
    assert profile.tensor_parallel
    whole = dict(layer.named_parameters())
    replicated = [
        part
        for name, part in plan.expected_slices(layer, 1).items()
        if part.shape == whole[name].shape
    ]
    assert profile.layers[0].replicated_bytes == sum(part.numel() * 4 for part in replicated)


def test_defaults_of_a_short_config_are_the_familys() -> None:
    for family in {family for family, extra in DENSE}:
        stated = {**BASE, "model_type": family}
        config = AutoConfig.for_model(**{**stated, "bos_token_id": 1})
        profile = profile_model(stated, "float32")
        assert profile == profile_model(config.to_dict(), "float32"), family
    llama = {k: v for k, v in BASE.items() if k != "num_key_value_heads"}
    profile = profile_model({**llama, "model_type": "llama"}, "float32")
    assert profile.kv_heads == 8
    assert profile.tied is False
    with pytest.raises(ProfileError, match="num_key_value_heads"):
        profile_model({**llama, "model_type": "mistral"}, "float32")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "gpt2"}, "model_type: expected one of .*llama, .* found 'gpt2'"),
        ({"model_type": None}, "found 'None'"),
        ({"model_type": ["llama"]}, "model_type"),
        ({"quantization_config": {"bits": 4}}, "unquantised"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"hidden_size": 2**40}, "hidden_size"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"num_key_value_heads": 3}, "a divisor of 8 heads"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"max_position_embeddings": 0}, "max_position_embeddings"),
        ({"model_type": "llama", "head_dim": None, "hidden_size": 65}, "a multiple of 8 heads"),
        ({"vocab_size": 1.5}, "vocab_size"),
    ],
)
def test_senseless_configs_are_refused(changes: dict[str, object], reason: str) -> None:
    with pytest.raises(ProfileError, match=reason):
        profile_model({**CONFIG, **changes}, "float32")


def test_unknown_dtypes_are_refused() -> None:
    with pytest.raises(ProfileError, match="dtype: expected one of float32"):
        profile_model(CONFIG, "int4")
