"""The model families that a stage can compute, and what each keeps outside its layers.

The table is closed. A family is listed only when tests hold it to `transformers.generate` token
by token: whatever a family does between its layers (embedding multipliers, a rotary embedding per
layer type, logit soft caps) would be silently wrong here, where only the layers are its own code.
The families below keep exactly this outside: an embedding, one rotary embedding whose frequencies
depend on the configuration alone, a final norm, and a head that may share the embedding's weight.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, cast

from runtime.stage.errors import UnsupportedModel

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig

__all__ = ["FAMILIES", "DecoderParts", "Family", "parse_config"]

_MAX_CONFIG_BYTES = 1 << 20
# Frequencies fixed by the configuration. "dynamic" and "longrope" depend on the longest position
# in the batch, so a row's result would depend on its neighbours.
_ROTARY_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, slots=True)
class Family:
    """One model type of transformers and where its code is."""

    model_type: str
    config_class: str
    model_class: str

    def config_from(self, document: dict[str, object]) -> PretrainedConfig:
        """The configuration object. Raises UnsupportedModel where transformers refuses it."""
        module = import_module(
            f"transformers.models.{self.model_type}.configuration_{self.model_type}"
        )
        config_class = cast("type[PretrainedConfig]", getattr(module, self.config_class))
        try:
            return config_class.from_dict(document)
        except Exception as error:  # its validators raise many kinds
            raise UnsupportedModel(
                f"config.json: transformers refuses it as {self.config_class}: {error}"
            ) from error

    def decoder_on_meta(self, config: PretrainedConfig) -> DecoderParts:
        """The whole model without storage; only the modelling module of the family is imported."""
        import torch
        from transformers.initialization import no_init_weights

        module = import_module(f"transformers.models.{self.model_type}.modeling_{self.model_type}")
        model_class = cast("type[nn.Module]", getattr(module, self.model_class))
        with torch.device("meta"), no_init_weights():
            return DecoderParts(model_class(config).eval(), config)


FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", "LlamaConfig", "LlamaForCausalLM"),
        Family("mistral", "MistralConfig", "MistralForCausalLM"),
        Family("qwen2", "Qwen2Config", "Qwen2ForCausalLM"),
        Family("qwen3", "Qwen3Config", "Qwen3ForCausalLM"),
    )
}


@dataclass(frozen=True, slots=True)
class DecoderParts:
    """A causal language model on the meta device, and the names of its parts."""

    model: nn.Module
    config: PretrainedConfig

    EMBEDDING = "model.embed_tokens"
    NORM = "model.norm"
    HEAD = "lm_head"

    @property
    def tied(self) -> bool:
        """The head uses the embedding's weight."""
        return bool(self.config.tie_word_embeddings)

    @staticmethod
    def layer_name(index: int) -> str:
        """Name of a decoder layer, also the prefix of its tensors."""
        return f"model.layers.{index}"

    def part(self, name: str) -> nn.Module:
        """One part, on meta."""
        return self.model.get_submodule(name)

    def rotary(self) -> nn.Module:
        """The rotary embedding, computed anew from the configuration.

        Its frequencies are a buffer that no checkpoint holds, so the one on meta has no values.
        """
        rotary_class = type(self.model.get_submodule("model.rotary_emb"))
        return rotary_class(self.config).eval()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor that a checkpoint of this model holds.

        Without the head where it is tied.
        """
        return {
            name: tuple(tensor.shape)
            for name, tensor in self.model.state_dict().items()
            if not (self.tied and name == f"{self.HEAD}.weight")
        }


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
    if document.get("auto_map"):
        raise UnsupportedModel(
            "config.json: auto_map names code inside the checkpoint (trust_remote_code), which is "
            "never run; use a checkpoint of a family that transformers has built in"
        )
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
        )
    architectures = document.get("architectures")
    if architectures is not None and architectures != [family.model_class]:
        raise UnsupportedModel(
            f"config.json: architectures: expected [{family.model_class!r}], "
            f"found {architectures!r}"
        )
    config = family.config_from(document)
    rotary = getattr(config, "rope_parameters", None)
    rotary_type = rotary.get("rope_type") if isinstance(rotary, dict) else None
    if rotary_type not in _ROTARY_TYPES:
        raise UnsupportedModel(
            f"config.json: rope_type: expected one of {list(_ROTARY_TYPES)}, found {rotary_type!r}"
        )
    return family, config
