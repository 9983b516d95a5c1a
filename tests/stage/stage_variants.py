"""The tiny models of these tests: every family, and what differs within one."""

from __future__ import annotations

from checkpoints import FAMILIES

# What differs between families and matters outside or inside their layers.
VARIANTS: dict[str, tuple[str, dict[str, object]]] = {
    **{family: (family, {}) for family in FAMILIES},
    "llama": ("llama", {"attention_bias": True, "num_key_value_heads": 4}),
    "llama3-rope": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "longrope": (
        "phi3",
        {
            # The border is past all that is compared; the long factors would change every token.
            "original_max_position_embeddings": 256,
            "sliding_window": None,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
                "short_factor": [1.0, 1.3, 1.7, 2.0],
                "long_factor": [4.0, 6.0, 8.0, 9.0],
                "original_max_position_embeddings": 256,
            },
        },
    ),
    "longrope-llama": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "factor": 2.0,
                "short_factor": [1.0, 1.1, 1.2, 1.3, 1.5, 1.7, 1.8, 2.0],
                "long_factor": [4.0, 4.5, 5.0, 5.5, 6.0, 7.0, 8.0, 9.0],
                "original_max_position_embeddings": 256,
            },
        },
    ),
    "yarn": (
        "qwen3",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "linear-rope": (
        "mistral",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
    ),
    "qwen2-window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 3},
    ),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-window": ("mistral", {"sliding_window": 11}),
    **{
        f"{family}-wider": (family, {"head_dim": 32})
        for family in ("gemma", "gemma2", "gemma3_text")
    },
}

# Those whose layers `describe_layer` describes, so that the native decoder computes them.
DESCRIBED = (
    "cwm", "exaone4", "gemma", "gemma-wider", "gemma2", "gemma2-wider", "gemma3_text",
    "gemma3_text-wider", "granite", "linear-rope", "llama", "llama3-rope", "longrope",
    "longrope-llama", "ministral", "mistral", "mistral-window", "olmo2", "olmo3", "phi3", "qwen2",
    "qwen2-window", "qwen3", "seed_oss", "smollm3", "vaultgemma", "yarn",
)  # fmt: skip
