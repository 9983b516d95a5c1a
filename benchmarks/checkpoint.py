"""The checkpoint that everything is measured on: 0.47 B parameters, shaped like Qwen3, random.

Random weights compute as fast as trained ones, and a shape of our own needs no download. Written
by `save_pretrained`, without a tokenizer: prompts and answers are token ids.
"""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path

__all__ = ["SHAPE", "VOCABULARY", "cached", "main", "write"]

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / ".bench"
"""Checkpoints, peers and results; git ignores it."""

VOCABULARY = 32_000

SHAPE: dict[str, object] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
    # Wide enough that the layers outweigh the tied embedding: greedy tokens vary.
    "initializer_range": 0.06,
}


def write(directory: Path, **changes: object) -> Path:
    """Writes a random bf16 model of `SHAPE`, with `changes`, to `directory`; returns it."""
    import torch
    import transformers

    config = transformers.Qwen3Config.from_dict({**SHAPE, **changes})
    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(config).bfloat16()
    model.save_pretrained(directory)
    return directory


def cached() -> Path:
    """The checkpoint in the cache, written at first use; a few seconds and 0.95 GB."""
    directory = CACHE / "checkpoint-0.5b"
    if not directory.is_dir():
        # Renamed when complete, so that an interrupted run leaves nothing that looks like it.
        partial = directory.with_name(f"{directory.name}.{os.getpid()}")
        try:
            write(partial)
            partial.rename(directory)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return directory


def main() -> None:
    """Writes the checkpoint to the cache and says where."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    print(cached())


if __name__ == "__main__":
    main()
