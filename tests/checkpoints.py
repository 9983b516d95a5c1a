"""Tiny random checkpoints, written the way anybody would write one: with `save_pretrained`."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
ALPHABET = [chr(code) for code in range(0x20, 0x7F)]
VOCABULARY = len(ALPHABET) + len(SPECIAL)
END = len(ALPHABET)

_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": END,
    "pad_token_id": END,
    # Large enough that greedy tokens vary from step to step.
    "initializer_range": 0.2,
}

_WINDOWED = ["sliding_attention", "full_attention"] * 3
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}

FAMILIES: dict[str, tuple[type[transformers.PretrainedConfig], dict[str, object]]] = {
    "apertus": (transformers.ApertusConfig, {}),
    "arcee": (transformers.ArceeConfig, {"mlp_bias": True}),
    "cohere": (transformers.CohereConfig, {"use_qk_norm": True}),
    "cohere2": (transformers.Cohere2Config, {"sliding_window": 11, "layer_types": _WINDOWED}),
    "cwm": (
        transformers.CwmConfig,
        {"head_dim": 16, "sliding_window": 11, "layer_types": _WINDOWED, "bos_token_id": END},
    ),
    "ernie4_5": (transformers.Ernie4_5Config, {"head_dim": 16, "use_bias": True}),
    "exaone4": (transformers.Exaone4Config, {"sliding_window": 11, "layer_types": _WINDOWED}),
    "gemma": (transformers.GemmaConfig, {"head_dim": 24}),
    "gemma2": (
        transformers.Gemma2Config,
        {
            "head_dim": 24,
            "query_pre_attn_scalar": 20,
            "sliding_window": 11,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 5.0,
            # Tied and this small, it would repeat the last token for ever.
            "tie_word_embeddings": False,
        },
    ),
    "gemma3_text": (
        transformers.Gemma3TextConfig,
        {
            "head_dim": 24,
            "query_pre_attn_scalar": 20,
            "sliding_window": 11,
            "layer_types": _WINDOWED,
            "final_logit_softcapping": 5.0,
            # Tied and this small, it would repeat the last token for ever.
            "tie_word_embeddings": False,
        },
    ),
    "glm": (transformers.GlmConfig, {"head_dim": 16}),
    "glm4": (transformers.Glm4Config, {"head_dim": 16}),
    "gpt_oss": (
        transformers.GptOssConfig,
        {
            "head_dim": 16,
            "sliding_window": 11,
            "layer_types": _WINDOWED,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
    "granite": (
        transformers.GraniteConfig,
        {
            "embedding_multiplier": 1.7,
            "attention_multiplier": 0.4,
            "residual_multiplier": 0.6,
            "logits_scaling": 1.9,
        },
    ),
    "helium": (transformers.HeliumConfig, {"head_dim": 16}),
    "hunyuan_v1_dense": (transformers.HunYuanDenseV1Config, {"head_dim": 16}),
    "jais2": (transformers.Jais2Config, {}),
    "llama": (transformers.LlamaConfig, {}),
    "ministral": (
        transformers.MinistralConfig,
        {"head_dim": 16, "sliding_window": 11, "layer_types": _WINDOWED},
    ),
    "ministral3": (
        transformers.Ministral3Config,
        {
            "head_dim": 16,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 32.0,
                "original_max_position_embeddings": 16,
                # Queries grow with their position, in steps of the original context.
                "llama_4_scaling_beta": 0.3,
            },
        },
    ),
    "mistral": (transformers.MistralConfig, {"head_dim": 16, "sliding_window": 48}),
    "mixtral": (
        transformers.MixtralConfig,
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 11},
    ),
    "olmo": (transformers.OlmoConfig, {"clip_qkv": 1.5}),
    "olmo2": (transformers.Olmo2Config, {}),
    "olmo3": (transformers.Olmo3Config, {"sliding_window": 11, "layer_types": _WINDOWED}),
    "olmoe": (transformers.OlmoeConfig, {"num_experts": 4, "num_experts_per_tok": 2}),
    "phi3": (transformers.Phi3Config, {"partial_rotary_factor": 0.5, "sliding_window": 11}),
    "qwen2": (transformers.Qwen2Config, {"tie_word_embeddings": True}),
    "qwen2_moe": (
        transformers.Qwen2MoeConfig,
        {**_EXPERTS, "shared_expert_intermediate_size": 80, "mlp_only_layers": [1]},
    ),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3_moe": (
        transformers.Qwen3MoeConfig,
        {**_EXPERTS, "head_dim": 16, "norm_topk_prob": True, "mlp_only_layers": [1]},
    ),
    "seed_oss": (
        transformers.SeedOssConfig,
        {"head_dim": 16, "attention_bias": True, "attention_out_bias": False},
    ),
    "smollm3": (
        transformers.SmolLM3Config,
        {
            "no_rope_layers": [1, 0, 1, 1, 0, 1],
            "use_sliding_window": True,
            "sliding_window": 11,
            "layer_types": _WINDOWED,
        },
    ),
    "starcoder2": (transformers.Starcoder2Config, {"sliding_window": 11, "use_bias": True}),
    "vaultgemma": (
        transformers.VaultGemmaConfig,
        {
            "head_dim": 32,
            "query_pre_attn_scalar": 20,
            "sliding_window": 11,
            "layer_types": _WINDOWED,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 5.0,
            "tie_word_embeddings": False,
        },
    ),
}


def write_checkpoint(family: str, directory: Path, seed: int = 0, **changes: object) -> Path:
    """Writes a random model of that family, with tokenizer and chat template; returns the path."""
    model = random_model(family, seed, **changes)
    model.generation_config.do_sample = False
    model.save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory


def random_model(family: str, seed: int = 0, **changes: object) -> transformers.PreTrainedModel:
    """A random model of that family in float32."""
    config_class, own = FAMILIES[family]
    config = config_class(**{**_SHAPE, **own, **changes})
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.eval()
    _randomise(model)
    return model


def _randomise(model: torch.nn.Module) -> None:
    """Moves what starts as zeros or ones (norms, biases, sinks), or its absence would not show."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token per printable ASCII character: text says exactly which tokens it was."""
    # Byte-level, because transformers rebuilds the tokenizers of some families that way.
    letters = ["\u0120" if letter == " " else letter for letter in ALPHABET]
    core = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(SPECIAL)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|end|>", chat_template=TEMPLATE
    )


class Oracle:
    """`transformers.generate` on the unsplit model."""

    def __init__(self, directory: Path) -> None:
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32
        )
        self._model.eval()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(directory)

    @property
    def layers(self) -> int:
        return int(self._model.config.num_hidden_layers)

    def greedy(self, prompt: list[int], tokens: int, *, ignore_end: bool = False) -> list[int]:
        """What greedy `generate` appends to the prompt, end-of-sequence token included."""
        ending = {"eos_token_id": None} if ignore_end else {}
        with torch.inference_mode():
            output = self._model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                do_sample=False,
                max_new_tokens=tokens,
                **ending,
            )
        return [int(token) for token in output[0, len(prompt) :]]

    def hidden_states(self, tokens: list[int]) -> list[torch.Tensor]:
        """Hidden states [T, H] before each layer and after the last, for a tap to look for."""
        with torch.inference_mode():
            output = self._model(torch.tensor([tokens]), output_hidden_states=True)
        return [state[0] for state in output.hidden_states]
