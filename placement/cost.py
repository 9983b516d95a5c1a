"""What a stage costs: its memory, and its share of a decode step. Used by the planner only."""

from __future__ import annotations

from dataclasses import dataclass

from placement.model_profile import ModelProfile
from placement.plan import ITEM_BYTES

PROCESS_BYTES = 512 << 20
"""A process with torch and the model's code, per tensor-parallel rank."""

FLOPS_PER_BYTE = 16
"""Arithmetic that a machine does while it reads one byte of weights.

Two cores measured 400 GFLOP/s against 29 GB/s. The ratio only weighs a large batch against a small
one when stages are balanced, so its order of magnitude is enough.
"""


@dataclass(frozen=True, slots=True)
class Load:
    """What a pipeline has to carry.

    Attributes:
        context: longest sequence, in tokens.
        sequences: most sequences at once.
        step_tokens: most tokens in one step.
        block_size: tokens in a block of the cache.
        batch: sequences in the decode step that stages are balanced for.
        tensor_parallel: ranks in every stage.
    """

    context: int
    sequences: int
    step_tokens: int
    block_size: int
    batch: int
    tensor_parallel: int

    @property
    def blocks_per_sequence(self) -> int:
        """Cache blocks of one sequence of full length."""
        return -(-self.context // self.block_size)


@dataclass(frozen=True, slots=True)
class StageCost:
    """One stage of layers [first, last), all its ranks together.

    Attributes:
        weight_bytes: parameters, replicated ones counted once per rank.
        working_bytes: processes, activations and buffers.
        block_bytes: one block of KV cache.
        step_cost: cost of a decode step, in bytes read or their equivalent in arithmetic.
    """

    weight_bytes: int
    working_bytes: int
    block_bytes: int
    step_cost: int

    def memory_bytes(self, cache_blocks: int) -> int:
        """Memory with so many blocks of cache."""
        return self.weight_bytes + self.working_bytes + cache_blocks * self.block_bytes


def stage_cost(profile: ModelProfile, load: Load, first: int, last: int) -> StageCost:
    """The cost of a stage of layers [first, last)."""
    layers = profile.layers[first:last]
    ranks = load.tensor_parallel
    ends = profile.ends_bytes(first, last)
    # Rank 0 alone holds embedding, final norm and head: they work on what the ranks agree on.
    weights = ends + sum(
        layer.weight_bytes + (ranks - 1) * layer.replicated_bytes for layer in layers
    )
    step = sum(
        (layer.active_bytes + load.batch * layer.flops_per_token // FLOPS_PER_BYTE) // ranks
        for layer in layers
    )
    if last == len(profile.layers):
        # The head is a linear over the vocabulary; the embedding of stage 0 only reads a few rows.
        head_flops = 2 * profile.hidden_size * profile.vocabulary
        step += profile.head_bytes + load.batch * head_flops // FLOPS_PER_BYTE
    return StageCost(
        weight_bytes=weights,
        working_bytes=_working_bytes(profile, load, last == len(profile.layers)),
        block_bytes=load.block_size * sum(layer.kv_bytes_per_token for layer in layers),
        step_cost=step,
    )


def _working_bytes(profile: ModelProfile, load: Load, is_last: bool) -> int:
    """Memory besides weights and cache, estimated on the high side.

    A step holds the hidden states in and out, queries, keys, values, and both halves of the MLP;
    attention gathers one layer's keys and values of a sequence and masks its scores; the last
    stage has the logits, their sorted copy and their probabilities in fp32.
    """
    item = ITEM_BYTES[profile.dtype]
    width = 6 * profile.hidden_size + 3 * profile.intermediate_size
    width += 3 * (profile.heads + 2 * profile.kv_heads) * profile.head_dim
    activations = load.step_tokens * width * item
    gathered = 2 * load.context * max(layer.kv_bytes_per_token for layer in profile.layers)
    mask = load.step_tokens * load.context * 4
    logits = 3 * load.sequences * profile.vocabulary * 4 if is_last else 0
    return load.tensor_parallel * (PROCESS_BYTES + activations + gathered + mask) + logits
