"""The model families that a stage can compute, and what each keeps outside its layers.

The table is closed. A family is listed only when tests hold it to `transformers.generate` token
by token: whatever a family does between its layers (embedding multipliers, a rotary embedding per
layer type, logit soft caps) would be silently wrong here, where only the layers are its own code.
Every family has an embedding, rotary embeddings whose frequencies depend on the configuration
alone, a final norm, and a head that may share the embedding's weight; what else it has outside its
layers is in its entry, and a model with any other module outside its layers is refused.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, cast

from runtime.stage.border import RotaryBorder
from runtime.stage.dense_layer import rotation_name
from runtime.stage.errors import UnsupportedModel
from runtime.stage.rotations import LONGROPE, Rotations, rotary_parameters

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PretrainedConfig

__all__ = [
    "FAMILIES",
    "DecoderParts",
    "ExpertNames",
    "Family",
    "StoredPart",
    "parse_config",
    "rotary_border",
]

_log = logging.getLogger(__name__)
_MAX_CONFIG_BYTES = 1 << 20
# Frequencies fixed by the configuration, two sets of them for longrope (see `RotaryBorder`).
# "dynamic" depends on the longest position in the batch, so a row's result would depend on its
# neighbours.
_ROTARY_TYPES = ("default", "linear", "llama3", LONGROPE, "yarn")
_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
# By what a configuration of that kind has; only to say why a model type is not in the table.
_OTHER_ARCHITECTURES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "an encoder-decoder, whose decoder attends to an encoder that no stage has": (
            "is_encoder_decoder",
        ),
        "multimodal, and stages compute text only": ("vision_config", "audio_config"),
        "a state-space model or a hybrid with one, whose state no paged cache holds": (
            "ssm_cfg",
            "state_size",
            "mamba_d_state",
            "ssm_state_size",
            "linear_num_key_heads",
        ),
        "a model whose layers reuse keys and values of earlier layers, which a cut would lose": (
            "num_kv_shared_layers",
        ),
        "a model with latent attention, whose cache is none of keys and values": ("kv_lora_rank",),
    }
)
_OUTSIDE_LAYERS = frozenset(
    {"lm_head", "model", "model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb"}
)


@dataclass(frozen=True, slots=True)
class ExpertNames:
    """How checkpoints name the experts that transformers keeps in one tensor a layer.

    Attributes:
        block: the layer's mixture, called `mlp` in transformers.
        gate, up, down: the linears of one expert, at `<block>.experts.<number>.<name>.weight`.
    """

    block: str
    gate: str
    up: str
    down: str


@dataclass(frozen=True, slots=True)
class Family:
    """One model type of transformers and where its code is.

    Attributes:
        model_type: of the configuration.
        config_class, model_class: names of transformers' classes.
        folder: of transformers' code, the model type if "".
        embedding_multiplier: field of the configuration, a factor on the embeddings; "" for none.
        logits_multiplier: the same for a factor on the logits.
        logits_divisor: the same for what the logits are divided by.
        logits_soft_cap: the same for the soft cap of the logits, which may be None.
        experts: names in checkpoints, where they are not transformers' own.
        recomputes: its `generate` computes a longrope sequence that outgrows the border anew.
    """

    model_type: str
    config_class: str
    model_class: str
    folder: str = ""
    embedding_multiplier: str = ""
    logits_multiplier: str = ""
    logits_divisor: str = ""
    logits_soft_cap: str = ""
    experts: ExpertNames | None = None
    recomputes: bool = False

    def config_from(self, document: dict[str, object]) -> PretrainedConfig:
        """The configuration object. Raises UnsupportedModel where transformers refuses it."""
        config_class = cast(
            "type[PretrainedConfig]", self._part("configuration", self.config_class)
        )
        try:
            return config_class.from_dict(document)
        except Exception as error:  # its validators raise many kinds
            raise UnsupportedModel(
                f"config.json: transformers refuses it as {self.config_class}: {error}"
            ) from error

    def decoder_on_meta(self, config: PretrainedConfig) -> DecoderParts:
        """The whole model without storage; only the modelling module of the family is imported.

        Raises:
            UnsupportedModel: the model has modules outside its layers that no stage computes, or
                layers whose attention is not causal.
        """
        import torch
        from transformers.initialization import no_init_weights

        model_class = cast("type[nn.Module]", self._part("modeling", self.model_class))
        with torch.device("meta"), no_init_weights():
            model = model_class(config).eval()
        unknown = sorted(
            name
            for name, _ in model.named_modules()
            if name and not name.startswith("model.layers.") and name not in _OUTSIDE_LAYERS
        )
        if unknown:
            raise UnsupportedModel(
                f"{self.model_class}: expected embedding, layers, norm, rotary embedding and head, "
                f"found also {unknown}, which no stage computes"
            )
        for index, layer in enumerate(cast("nn.ModuleList", model.get_submodule("model.layers"))):
            if not getattr(layer.get_submodule("self_attn"), "is_causal", True):
                raise UnsupportedModel(
                    f"{self.model_class}: expected causal attention in every layer, found layer "
                    f"{index} without it; stages serve models that generate token by token"
                )
        return DecoderParts(model, config, self)

    def _part(self, kind: str, name: str) -> object:
        folder = self.folder or self.model_type
        return getattr(import_module(f"transformers.models.{folder}.{kind}_{folder}"), name)


_MIXTRAL_EXPERTS = ExpertNames("block_sparse_moe", gate="w1", up="w3", down="w2")
_QWEN_EXPERTS = ExpertNames("mlp", gate="gate_proj", up="up_proj", down="down_proj")

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        family.model_type: family
        for family in (
            Family("apertus", "ApertusConfig", "ApertusForCausalLM"),
            Family("arcee", "ArceeConfig", "ArceeForCausalLM"),
            Family("cohere", "CohereConfig", "CohereForCausalLM", logits_multiplier="logit_scale"),
            Family(
                "cohere2", "Cohere2Config", "Cohere2ForCausalLM", logits_multiplier="logit_scale"
            ),
            Family("cwm", "CwmConfig", "CwmForCausalLM"),
            Family("ernie4_5", "Ernie4_5Config", "Ernie4_5ForCausalLM"),
            Family("exaone4", "Exaone4Config", "Exaone4ForCausalLM"),
            Family("gemma", "GemmaConfig", "GemmaForCausalLM"),
            Family(
                "gemma2",
                "Gemma2Config",
                "Gemma2ForCausalLM",
                logits_soft_cap="final_logit_softcapping",
            ),
            Family(
                "gemma3_text",
                "Gemma3TextConfig",
                "Gemma3ForCausalLM",
                folder="gemma3",
                logits_soft_cap="final_logit_softcapping",
            ),
            Family("glm", "GlmConfig", "GlmForCausalLM"),
            Family("glm4", "Glm4Config", "Glm4ForCausalLM"),
            Family("gpt_oss", "GptOssConfig", "GptOssForCausalLM"),
            Family(
                "granite",
                "GraniteConfig",
                "GraniteForCausalLM",
                embedding_multiplier="embedding_multiplier",
                logits_divisor="logits_scaling",
            ),
            Family("helium", "HeliumConfig", "HeliumForCausalLM"),
            Family("hunyuan_v1_dense", "HunYuanDenseV1Config", "HunYuanDenseV1ForCausalLM"),
            Family("jais2", "Jais2Config", "Jais2ForCausalLM"),
            Family("llama", "LlamaConfig", "LlamaForCausalLM"),
            Family("ministral", "MinistralConfig", "MinistralForCausalLM"),
            Family("ministral3", "Ministral3Config", "Ministral3ForCausalLM"),
            Family("mistral", "MistralConfig", "MistralForCausalLM"),
            Family("mixtral", "MixtralConfig", "MixtralForCausalLM", experts=_MIXTRAL_EXPERTS),
            Family("olmo", "OlmoConfig", "OlmoForCausalLM"),
            Family("olmo2", "Olmo2Config", "Olmo2ForCausalLM"),
            Family("olmo3", "Olmo3Config", "Olmo3ForCausalLM"),
            Family("olmoe", "OlmoeConfig", "OlmoeForCausalLM", experts=_QWEN_EXPERTS),
            Family("phi3", "Phi3Config", "Phi3ForCausalLM", recomputes=True),
            Family("qwen2", "Qwen2Config", "Qwen2ForCausalLM"),
            Family("qwen2_moe", "Qwen2MoeConfig", "Qwen2MoeForCausalLM", experts=_QWEN_EXPERTS),
            Family("qwen3", "Qwen3Config", "Qwen3ForCausalLM"),
            Family("qwen3_moe", "Qwen3MoeConfig", "Qwen3MoeForCausalLM", experts=_QWEN_EXPERTS),
            Family("seed_oss", "SeedOssConfig", "SeedOssForCausalLM"),
            Family("smollm3", "SmolLM3Config", "SmolLM3ForCausalLM"),
            Family("starcoder2", "Starcoder2Config", "Starcoder2ForCausalLM"),
            Family(
                "vaultgemma",
                "VaultGemmaConfig",
                "VaultGemmaForCausalLM",
                logits_soft_cap="final_logit_softcapping",
            ),
        )
    }
)


@dataclass(frozen=True, slots=True)
class DecoderParts:
    """A causal language model on the meta device, and the names of its parts."""

    model: nn.Module
    config: PretrainedConfig
    family: Family

    EMBEDDING = "model.embed_tokens"
    NORM = "model.norm"
    HEAD = "lm_head"

    @property
    def tied(self) -> bool:
        """The head uses the embedding's weight."""
        return bool(self.config.tie_word_embeddings)

    @property
    def rotary_border(self) -> RotaryBorder | None:
        """See the function of that name."""
        return rotary_border(self.family, self.config)

    @staticmethod
    def layer_name(index: int) -> str:
        """Name of a decoder layer, also the prefix of its tensors."""
        return f"model.layers.{index}"

    def part(self, name: str) -> nn.Module:
        """One part, on meta."""
        return self.model.get_submodule(name)

    def rotations(self, layers: range) -> Rotations:
        """The rotary embeddings of some layers, computed anew from the configuration.

        Their frequencies are buffers that no checkpoint holds, so those on meta have no values.
        """
        rotary_class = type(self.model.get_submodule("model.rotary_emb"))
        names = {rotation_name(self.config, index) for index in layers}
        border = self.rotary_border
        return Rotations(
            rotary_class(self.config).eval(),
            self.config,
            frozenset(names),
            None if border is None else border.positions,
        )

    def scale_embeddings(self, hidden_TD: torch.Tensor) -> torch.Tensor:
        """What the model does to its embeddings before the first layer."""
        factor = self._number(self.family.embedding_multiplier)
        return hidden_TD if factor is None else hidden_TD * factor

    def scale_logits(self, logits_SV: torch.Tensor) -> torch.Tensor:
        """What the model does to the head's output."""
        factor = self._number(self.family.logits_multiplier)
        divisor = self._number(self.family.logits_divisor)
        cap = self._number(self.family.logits_soft_cap)
        if factor is not None:
            logits_SV = logits_SV * factor
        if divisor is not None:
            logits_SV = logits_SV / divisor
        if cap is not None:
            logits_SV = (logits_SV / cap).tanh() * cap
        return logits_SV

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor that a checkpoint of this model holds.

        Without the head where it is tied.
        """
        return {
            name: tuple(tensor.shape)
            for name, tensor in self.model.state_dict().items()
            if not (self.tied and name == f"{self.HEAD}.weight")
        }

    def stored_parts(self, name: str, shape: tuple[int, ...]) -> list[StoredPart]:
        """How checkpoints that keep each expert apart store one of the tensors of `shapes`.

        Gate and up projections of all experts are one tensor [X, 2 * I, D] in the model, down
        projections one of [X, D, I]; X experts of width I.
        """
        names = self.family.experts
        if names is None:
            return [StoredPart(name, shape)]
        name = name.replace(".mlp.", f".{names.block}.")
        experts, _, projection = name.rpartition(".experts.")
        if not experts:
            return [StoredPart(name, shape)]
        prefixes = [f"{experts}.experts.{number}" for number in range(shape[0])]
        if projection == "down_proj":
            return [
                StoredPart(f"{prefix}.{names.down}.weight", shape[1:], (number,))
                for number, prefix in enumerate(prefixes)
            ]
        width = shape[1] // 2
        return [
            StoredPart(
                f"{prefix}.{linear}.weight",
                (width, shape[2]),
                (number, slice(first, first + width)),
            )
            for number, prefix in enumerate(prefixes)
            for linear, first in ((names.gate, 0), (names.up, width))
        ]

    def _number(self, field: str) -> float | None:
        return cast("float | None", getattr(self.config, field)) if field else None


@dataclass(frozen=True, slots=True)
class StoredPart:
    """A tensor of a checkpoint, and the place of its numbers in one of the model's tensors.

    Attributes:
        name: in the checkpoint.
        shape: in the checkpoint.
        place: index into the model's tensor, () for all of it.
    """

    name: str
    shape: tuple[int, ...]
    place: tuple[int | slice, ...] = ()


def parse_config(data: bytes) -> tuple[Family, PretrainedConfig]:
    """Reads a verified `config.json`; no code of the model is ever run.

    Raises:
        UnsupportedModel: the model brings its own code, is quantised, is of a family or has a
            rotary embedding that a stage does not compute, or is no causal language model.
    """
    if len(data) > _MAX_CONFIG_BYTES:
        raise UnsupportedModel(
            f"config.json: expected at most {_MAX_CONFIG_BYTES} bytes, found {len(data)}"
        )
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UnsupportedModel(
            f"config.json: expected JSON, found {type(error).__name__}"
        ) from error
    if not isinstance(document, dict):
        raise UnsupportedModel(f"config.json: expected an object, found {type(document).__name__}")
    for key in ("quantization_config", "compression_config"):
        if document.get(key):
            raise UnsupportedModel(
                f"config.json: {key} says that the weights are quantised; use a checkpoint in "
                "float32, bfloat16 or float16"
            )
    model_type = document.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise UnsupportedModel(
            f"config.json: model_type: expected one of {sorted(FAMILIES)}, found {model_type!r}"
            f"{_why_not(document)}"
        )
    architectures = document.get("architectures")
    if architectures is not None and architectures != [family.model_class]:
        raise UnsupportedModel(
            f"config.json: architectures: expected [{family.model_class!r}], "
            f"found {architectures!r}"
        )
    if document.get("auto_map"):
        # As transformers does without trust_remote_code.
        _log.warning(
            "config.json: auto_map names code inside the checkpoint (trust_remote_code), which is "
            "never run; computing %s as transformers has it built in",
            family.model_class,
        )
    config = family.config_from(document)
    _check_rotary(config)
    return family, config


def _why_not(document: dict[str, object]) -> str:
    """What a configuration says that no stage computes, for the message of a refusal."""
    if document.get("auto_map"):
        return (
            "; auto_map names code inside the checkpoint (trust_remote_code), which is never run: "
            "use a checkpoint of a family that transformers has built in"
        )
    for reason, keys in _OTHER_ARCHITECTURES.items():
        found = [key for key in keys if document.get(key)]
        if found:
            return f": it is {reason} (config.json has {found[0]})"
    layer_types = document.get("layer_types")
    others = (
        []
        if not isinstance(layer_types, list)
        else sorted(str(name)[:64] for name in {str(name) for name in layer_types} - _LAYER_TYPES)
    )
    return f": its layer_types {others} are no softmax attention" if others else ""


def _check_rotary(config: PretrainedConfig) -> None:
    """Refuses rotary embeddings whose frequencies are not the configuration's alone."""
    for rotary in rotary_parameters(config).values():
        found = rotary.get("rope_type")
        if found not in _ROTARY_TYPES:
            raise UnsupportedModel(
                f"config.json: rope_type: expected one of {list(_ROTARY_TYPES)}, found {found!r}"
            )
    borders = _borders(config)
    if len(borders) > 1:
        raise UnsupportedModel(
            "config.json: original_max_position_embeddings: expected the same in all layer types, "
            f"found {sorted(borders)}"
        )


def rotary_border(family: Family, config: PretrainedConfig) -> RotaryBorder | None:
    """Where a longrope model changes its rotations, None for other models."""
    return next((RotaryBorder(found, family.recomputes) for found in _borders(config)), None)


def _borders(config: PretrainedConfig) -> set[int]:
    return {
        cast("int", rotary["original_max_position_embeddings"])
        for rotary in rotary_parameters(config).values()
        if rotary.get("rope_type") == LONGROPE
    }
