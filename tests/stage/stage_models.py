"""The settings of the stages of these tests; their models are in `stage_variants`."""

from __future__ import annotations

from runtime.stage.settings import StageSettings


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
