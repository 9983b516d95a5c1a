"""The tiny models of these tests and the settings of their stages."""

from __future__ import annotations

from checkpoints import FAMILIES

from runtime.stage.settings import StageSettings

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
    "qwen2-window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 3},
    ),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-window": ("mistral", {"sliding_window": 11}),
}


def settings(first: int = 0, last: int = 6, **changes: object) -> StageSettings:
    """Settings of a stage of the tiny models."""
    values: dict[str, object] = {
        "first_layer": first,
        "last_layer": last,
        "layers": 6,
        "dtype": "float32",
        "tp": 1,
        "block_size": 4,
        "cache_blocks": 128,
        "max_context": 256,
        "hidden_size": 64,
        "threads": 1,
    }
    return StageSettings(**{**values, **changes})  # type: ignore[arg-type]
