"""What is loaded, and what is refused by name."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import write_checkpoint
from safetensors.torch import load_file, save_file
from stage_chain import step
from stage_models import settings
from stage_variants import VARIANTS

from runtime.stage.border import RotaryBorder
from runtime.stage.errors import CheckpointMismatch, UnsupportedModel
from runtime.stage.families import parse_config, rotary_border
from runtime.stage.stage import StageRunner
from security.errors import SecurityError
from security.manifest import ModelFiles, build_manifest

Change = Callable[[dict[str, torch.Tensor]], None]


@pytest.fixture
def changed(checkpoint: Callable[[str], Path], tmp_path: Path) -> Callable[..., ModelFiles]:
    """A copy of a checkpoint with other configuration values or tensors, honestly signed."""

    def change(variant: str, tensors: Change | None = None, **config: object) -> ModelFiles:
        directory = tmp_path / "changed"
        shutil.copytree(checkpoint(variant), directory)
        path = directory / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
        if tensors is not None:
            weights = load_file(directory / "model.safetensors")
            tensors(weights)
            save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
        return ModelFiles(directory, build_manifest(directory))

    return change


class Recorded(ModelFiles):
    """Notes which tensors are read."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, build_manifest(directory))
        self.read: list[str] = []

    def read_tensor(self, name: str) -> bytearray:
        self.read.append(name)
        return super().read_tensor(name)


@pytest.mark.parametrize(
    ("first", "last", "others"),
    [
        (0, 2, ["model.embed_tokens.weight"]),
        (2, 5, []),
        (5, 6, ["model.norm.weight", "lm_head.weight"]),
        (0, 6, ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]),
    ],
)
@pytest.mark.parametrize("variant", ["llama", "qwen3"])
def test_a_stage_reads_its_own_tensors_once(
    variant: str, first: int, last: int, others: list[str], checkpoint: Callable[[str], Path]
) -> None:
    files = Recorded(checkpoint(variant))
    steps: list[tuple[int, int]] = []
    StageRunner(files, settings(first, last), progress=lambda *step: steps.append(step))
    if variant == "qwen3":  # tied
        others = sorted({name.replace("lm_head", "model.embed_tokens") for name in others})
    expected = [
        name
        for name in files.tensor_names()
        if name in others
        or any(name.startswith(f"model.layers.{index}.") for index in range(first, last))
    ]
    assert sorted(files.read) == sorted(expected)
    total = sum(files.tensor_info(name).size for name in expected)
    assert steps[0] == (0, total) and steps[-1] == (total, total)
    assert steps == sorted(steps) and len(steps) > last - first


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_are_converted(variant: str, dtype: str, checkpoint: Callable[[str], Path]) -> None:
    files = ModelFiles(checkpoint(variant), build_manifest(checkpoint(variant)))
    stage = StageRunner(files, settings(0, 2, dtype=dtype))
    hidden = stage.forward(step(count=3), token_ids=[1, 2, 3])
    assert hidden.dtype == getattr(torch, dtype) and bool(torch.isfinite(hidden).all())
    hidden = stage.forward(step(start=3), token_ids=[4])
    assert hidden.dtype == getattr(torch, dtype) and bool(torch.isfinite(hidden).all())


def test_an_old_exporters_frequencies_are_ignored(changed: Callable[..., ModelFiles]) -> None:
    def add(weights: dict[str, torch.Tensor]) -> None:
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    StageRunner(changed("llama", add), settings(0, 1))


def test_a_tied_head_that_is_stored_twice(changed: Callable[..., ModelFiles]) -> None:
    def add(weights: dict[str, torch.Tensor]) -> None:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()

    StageRunner(changed("qwen3", add), settings(5, 6))


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (
            {"model_type": "x", "auto_map": {"AutoConfig": "configuration_x.X"}},
            "model_type.*auto_map.*trust_remote_code",
        ),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config.*quantised"),
        ({"model_type": "gpt2"}, "model_type: expected one of .*found 'gpt2'"),
        ({"model_type": ["llama"]}, "model_type"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "'t5': it is an encoder-decoder"),
        ({"model_type": "gemma3", "vision_config": {"x": 1}}, "'gemma3': it is multimodal"),
        ({"model_type": "mamba", "state_size": 16}, "'mamba': it is a state-space model"),
        ({"model_type": "falcon_h1", "mamba_d_state": 16}, "hybrid.*has mamba_d_state"),
        ({"model_type": "gemma3n_text", "num_kv_shared_layers": 5}, "reuse keys and values"),
        ({"model_type": "deepseek_v3", "kv_lora_rank": 8}, "latent attention"),
        (
            {"model_type": "lfm2", "layer_types": ["conv", "full_attention"]},
            r"layer_types \['conv'\] are no softmax attention",
        ),
        ({"architectures": ["LlamaForSequenceClassification"]}, "SequenceClassification"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type.*found 'dynamic'",
        ),
        ({"max_position_embeddings": 128}, "max_context: expected at most the model's 128"),
    ],
)
def test_models_that_are_not_computed_are_refused(
    config: dict[str, object], text: str, changed: Callable[..., ModelFiles]
) -> None:
    with pytest.raises(UnsupportedModel, match=text):
        StageRunner(changed("llama", **config), settings())


def test_code_in_a_checkpoint_of_a_known_family_is_left_alone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As published: Phi-3 with 128k positions, its old spelling of longrope and its own code."""
    published = {
        "architectures": ["Phi3ForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_phi3.Phi3Config",
            "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
        },
        "model_type": "phi3",
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "max_position_embeddings": 131072,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "original_max_position_embeddings": 4096,
        "rope_scaling": {
            "long_factor": [1.5] * 48,
            "short_factor": [1.0] * 48,
            "type": "longrope",
        },
        "rope_theta": 10000.0,
        "sliding_window": 262144,
        "vocab_size": 32064,
    }
    family, config = parse_config(json.dumps(published).encode())
    assert rotary_border(family, config) == RotaryBorder(4096, recomputes=True)
    assert "auto_map" in caplog.text


@pytest.mark.parametrize("variant", ["gemma2", "gemma3_text"])
def test_an_embedding_model_is_refused(variant: str, changed: Callable[..., ModelFiles]) -> None:
    files = changed(variant, use_bidirectional_attention=True)
    with pytest.raises(UnsupportedModel, match=r"expected causal attention .*found layer 0"):
        StageRunner(files, settings(2, 3))


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b"\xff", b"[" * 100_000, b" " * (2 << 20)])
def test_a_config_that_is_none_is_refused(data: bytes) -> None:
    with pytest.raises(UnsupportedModel, match=r"config\.json: expected"):
        parse_config(data)


def test_a_config_that_transformers_refuses(changed: Callable[..., ModelFiles]) -> None:
    with pytest.raises(UnsupportedModel, match="transformers refuses it as LlamaConfig"):
        StageRunner(changed("llama", hidden_size="wide"), settings())


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"num_hidden_layers": 5}, "num_hidden_layers: expected 6 by the plan, found 5"),
        ({"hidden_size": 32}, "hidden_size: expected 64 by the plan, found 32"),
        ({"intermediate_size": 80}, r"mlp\.\w+_proj\.weight: expected shape .*80.* found .*96"),
        ({"attention_bias": False}, r"does not call for|config\.json does not"),
    ],
)
def test_plan_config_and_tensors_must_agree(
    config: dict[str, object], text: str, changed: Callable[..., ModelFiles]
) -> None:
    with pytest.raises(CheckpointMismatch, match=text):
        StageRunner(changed("llama", **config), settings())


def test_missing_unexpected_and_contradicting_tensors(
    changed: Callable[..., ModelFiles], tmp_path: Path
) -> None:
    def lose(weights: dict[str, torch.Tensor]) -> None:
        del weights["model.layers.5.mlp.up_proj.weight"]

    def invent(weights: dict[str, torch.Tensor]) -> None:
        weights["model.layers.0.adapter.weight"] = torch.ones(2)

    def untie(weights: dict[str, torch.Tensor]) -> None:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 1

    for variant, change, text in (
        ("llama", lose, r"missing.*: model\.layers\.5\.mlp\.up_proj\.weight"),
        ("llama", invent, r"does not call for|adapter\.weight"),
        ("qwen3", untie, "ties them"),
    ):
        # Any stage refuses, also one that would not read the tensor.
        with pytest.raises(CheckpointMismatch, match=text):
            StageRunner(changed(variant, change), settings(1, 2))
        shutil.rmtree(tmp_path / "changed")


def test_quantised_tensors_are_refused(changed: Callable[..., ModelFiles]) -> None:
    name = "model.layers.1.mlp.up_proj.weight"

    def quantise(weights: dict[str, torch.Tensor]) -> None:
        weights[name] = weights[name].to(torch.int8)

    files = changed("llama", quantise)
    with pytest.raises(UnsupportedModel, match=f"{name}: .* found I8; quantised"):
        StageRunner(files, settings(1, 2))
    StageRunner(files, settings(2, 3))


def test_a_tensor_changed_after_signing_is_refused(tmp_path: Path) -> None:
    write_checkpoint("llama", tmp_path / "model")
    files = ModelFiles(tmp_path / "model", build_manifest(tmp_path / "model"))
    weights = tmp_path / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(SecurityError):
        StageRunner(files, settings())


def test_only_the_familys_own_code_is_imported(checkpoint: Callable[[str], Path]) -> None:
    script = """
import sys
from pathlib import Path
from runtime.stage.stage import StageRunner
from security.manifest import ModelFiles, build_manifest
from stage_models import settings
assert "transformers" not in sys.modules
directory = Path(sys.argv[1])
StageRunner(ModelFiles(directory, build_manifest(directory)), settings())
print(*sorted(n for n in sys.modules if n.startswith("transformers.models.") and ".modeling_" in n))
print([n for n in ("deepspeed", "ray", "pickle5", "accelerate") if n in sys.modules])
"""
    here = Path(__file__).resolve().parent
    result = subprocess.run(
        [sys.executable, "-c", script, str(checkpoint("qwen3"))],
        env={"PYTHONPATH": f"{here}:{here.parents[1]}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    modules, others = result.stdout.splitlines()
    assert set(modules.split()) <= {
        "transformers.models.auto.modeling_auto",
        "transformers.models.qwen3.modeling_qwen3",
    }
    assert others == "[]"
