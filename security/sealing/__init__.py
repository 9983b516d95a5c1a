"""Sealed checkpoints: chosen tensors encrypted, each opened only by whoever has its unit's key."""

from security.sealing.document import (
    SEALING_FILE,
    Sealing,
    layer_unit,
    parse_selection,
    stage_units,
)
from security.sealing.keys import (
    SEALED_KEYS_FILE,
    UnsealKeys,
    WrappedKeys,
    create_unsealing_key,
    load_unsealing_key,
    load_unsealing_public,
    unsealing_public_pem,
    wrap_keys,
)
from security.sealing.reader import SealedModelFiles, keys_of, open_model
from security.sealing.writer import (
    SealReport,
    read_wrapped_keys,
    seal_checkpoint,
    unseal_checkpoint,
)

__all__ = [
    "SEALED_KEYS_FILE",
    "SEALING_FILE",
    "SealReport",
    "SealedModelFiles",
    "Sealing",
    "UnsealKeys",
    "WrappedKeys",
    "create_unsealing_key",
    "keys_of",
    "layer_unit",
    "load_unsealing_key",
    "load_unsealing_public",
    "open_model",
    "parse_selection",
    "read_wrapped_keys",
    "seal_checkpoint",
    "stage_units",
    "unseal_checkpoint",
    "unsealing_public_pem",
    "wrap_keys",
]
