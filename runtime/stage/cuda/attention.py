"""Attention over the paged cache on a GPU: the back-ends, and the probe that picks among them.

`varlen_attn` of torch computes rows of any number of sequences in one call. Over blocks where they
lie it does so only with FlashAttention 3 (Hopper) or 4 (Blackwell), which are packages of their
own; torch's built-in kernel needs each sequence's keys in a row. Soft caps it has not at all. So
what a device computes is found out at start, with random numbers at the stage's own shapes, against
plain products in float32.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn import functional
from torch.nn.attention import activate_flash_attention_impl, varlen

from runtime.stage.cuda.step import Group, plan_rows
from security.channel.frame import SequenceStep, StepHeader

__all__ = [
    "Attention",
    "AttentionForm",
    "AttentionShape",
    "Backends",
    "Gathered",
    "GatheredFlash",
    "PagedFlash",
    "attend_all",
    "choose_backends",
]

_log = logging.getLogger(__name__)

# Which package pages on which generation of GPUs, by its major compute capability.
_PAGING = {9: "FA3", 10: "FA4"}
_HALVES = (torch.bfloat16, torch.float16)
# Of the outputs' size; outputs are averages of values around 1. A wrong mask is off by about 1.
_TOLERANCE = 0.05
_SEED = 0


@dataclass(frozen=True, slots=True)
class AttentionForm:
    """How a layer attends: see `DenseLayer` for the attributes."""

    scale: float
    soft_cap: float | None
    window: int | None


class Attention(Protocol):
    """Computes attention for a group of sequences."""

    def attend(
        self,
        query_RHE: torch.Tensor,
        keys_NPKE: torch.Tensor,
        values_NPKE: torch.Tensor,
        group: Group,
        form: AttentionForm,
    ) -> torch.Tensor:
        """Attended values [R, H, E] of the group's rows.

        Args:
            query_RHE: rotated, of the group's rows in order.
            keys_NPKE: all blocks; the step's own positions are written.
            values_NPKE: likewise.
            group: whose rows they are.
            form: of the layer.
        """


class Gathered:
    """Copies each sequence's blocks side by side; works for every form and on every device.

    Query heads that share a key head become rows of it, so that no key is repeated. All sequences
    of a group have the same number of rows.
    """

    def attend(
        self,
        query_RHE: torch.Tensor,
        keys_NPKE: torch.Tensor,
        values_NPKE: torch.Tensor,
        group: Group,
        form: AttentionForm,
    ) -> torch.Tensor:
        """See `Attention`."""
        sequences = len(group.tables_SB)
        key_heads, size = keys_NPKE.shape[2:]
        rows, heads = len(query_RHE) // sequences, query_RHE.shape[1]
        query_SKGTE = query_RHE.view(sequences, rows, key_heads, heads // key_heads, size).permute(
            0, 2, 3, 1, 4
        )
        query_SKRE = query_SKGTE.flatten(2, 3)
        keys_SKLE, values_SKLE = (
            _gather(pool, group.tables_SB).transpose(1, 2) for pool in (keys_NPKE, values_NPKE)
        )
        bias_S1RL = self._bias(group, form.window, query_SKRE.dtype, keys_SKLE.shape[2])
        if rows > 1:
            bias_S1RL = bias_S1RL.repeat(1, 1, heads // key_heads, 1)
        if form.soft_cap is None:
            attended = functional.scaled_dot_product_attention(
                query_SKRE, keys_SKLE, values_SKLE, attn_mask=bias_S1RL, scale=form.scale
            )
        else:
            scores = torch.matmul(query_SKRE, keys_SKLE.transpose(2, 3)).float() * form.scale
            scores = torch.tanh(scores / form.soft_cap) * form.soft_cap + bias_S1RL
            weights = torch.softmax(scores, dim=-1).to(query_SKRE.dtype)
            attended = torch.matmul(weights, values_SKLE)
        return attended.view(query_SKGTE.shape).permute(0, 3, 1, 2, 4).reshape(query_RHE.shape)

    def _bias(
        self, group: Group, window: int | None, dtype: torch.dtype, length: int
    ) -> torch.Tensor:
        """0 where a row sees a position, minus infinity elsewhere: [S, 1, T, L]."""
        if window not in group.biases:
            assert group.positions_ST is not None, "sequences of a group have equally many rows"
            rows_ST1 = group.positions_ST[:, :, None]
            keys_L = torch.arange(length, device=rows_ST1.device)
            visible_STL = keys_L <= rows_ST1
            if window is not None:
                visible_STL &= keys_L > rows_ST1 - window
            bias_STL = torch.zeros(visible_STL.shape, dtype=dtype, device=rows_ST1.device)
            group.biases[window] = bias_STL.masked_fill_(~visible_STL, -math.inf)[:, None]
        return group.biases[window]


class PagedFlash:
    """FlashAttention over blocks where they lie; sequences may differ in their number of rows."""

    def attend(
        self,
        query_RHE: torch.Tensor,
        keys_NPKE: torch.Tensor,
        values_NPKE: torch.Tensor,
        group: Group,
        form: AttentionForm,
    ) -> torch.Tensor:
        """See `Attention`."""
        length = group.tables_SB.shape[1] * keys_NPKE.shape[1]
        return _flash(
            query_RHE, keys_NPKE, values_NPKE, group, form, length=length, tables=group.tables_SB
        )


class GatheredFlash:
    """FlashAttention over copies of blocks; sequences may differ in their number of rows."""

    def attend(
        self,
        query_RHE: torch.Tensor,
        keys_NPKE: torch.Tensor,
        values_NPKE: torch.Tensor,
        group: Group,
        form: AttentionForm,
    ) -> torch.Tensor:
        """See `Attention`."""
        keys_SLKE, values_SLKE = (
            _gather(pool, group.tables_SB) for pool in (keys_NPKE, values_NPKE)
        )
        sequences, length = keys_SLKE.shape[:2]
        firsts = torch.arange(
            0, (sequences + 1) * length, length, dtype=torch.int32, device=query_RHE.device
        )
        return _flash(
            query_RHE,
            keys_SLKE.flatten(0, 1),
            values_SLKE.flatten(0, 1),
            group,
            form,
            length=length,
            key_firsts=firsts,
        )


def _gather(pool_NPKE: torch.Tensor, tables_SB: torch.Tensor) -> torch.Tensor:
    """The blocks of each sequence [S, L, K, E]; a copy."""
    blocks = pool_NPKE.index_select(0, tables_SB.flatten())
    return blocks.view(len(tables_SB), -1, *pool_NPKE.shape[2:])


def _flash(
    query_RHE: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    group: Group,
    form: AttentionForm,
    *,
    length: int,
    key_firsts: torch.Tensor | None = None,
    tables: torch.Tensor | None = None,
) -> torch.Tensor:
    assert form.soft_cap is None, "the probe gives capped layers to another back-end"
    attended = varlen.varlen_attn(
        query_RHE,
        keys,
        values,
        group.first_rows,
        key_firsts,
        group.most_rows,
        length,
        scale=form.scale,
        # Positions before the row's own, and after it.
        window_size=(-1 if form.window is None else form.window - 1, 0),
        enable_gqa=True,
        seqused_k=group.lengths_S,
        block_table=tables,
    )
    assert isinstance(attended, torch.Tensor), "nothing but the output was asked for"
    return attended


@dataclass(frozen=True, slots=True)
class Backends:
    """What computes a stage's attention.

    Attributes:
        name: for the log.
        decodes: single rows.
        rest: prompts' chunks; where `together`, all rows of a step with one.
        together: a step is one group.
    """

    name: str
    decodes: Attention
    rest: Attention
    together: bool


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """Sizes that kernels depend on: H, K, E, P, and the dtype."""

    heads: int
    key_heads: int
    head_size: int
    block_size: int
    dtype: torch.dtype


def choose_backends(
    forms: Sequence[AttentionForm], shape: AttentionShape, device: torch.device
) -> Backends:
    """The best back-ends that compute all these forms correctly on the device."""
    gathered = Backends("gathered", Gathered(), Gathered(), together=False)
    if (
        device.type != "cuda"
        or shape.dtype not in _HALVES
        or any(form.soft_cap is not None for form in forms)
    ):
        return gathered
    candidates = [
        Backends("gathered, flash for prompts", Gathered(), GatheredFlash(), together=False)
    ]
    package = _PAGING.get(torch.cuda.get_device_capability(device)[0])
    # Where the package is there, it computes for the whole process from here on.
    if package is not None and _activated(package):
        candidates.insert(
            0, Backends(f"paged {package}", PagedFlash(), PagedFlash(), together=True)
        )
    distinct = sorted(set(forms), key=repr)
    for candidate in candidates:
        if _computes(candidate.rest, distinct, shape, device):
            return candidate
    return gathered


def _activated(package: str) -> bool:
    try:
        activate_flash_attention_impl(package)
    except (ImportError, RuntimeError, ValueError) as error:
        _log.info("attention: %s is not there: %s", package, error)
        return False
    return True


def _computes(
    candidate: Attention,
    forms: Sequence[AttentionForm],
    shape: AttentionShape,
    device: torch.device,
) -> bool:
    """Whether a back-end gives what `Gathered` gives in float32, for each form."""
    try:
        wrong = [form for form in forms if not _agrees(candidate, form, shape, device)]
    except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        _log.info("attention: %s does not run here: %s", type(candidate).__name__, error)
        return False
    if wrong:
        _log.warning("attention: %s is wrong here for %s", type(candidate).__name__, wrong)
    return not wrong


def _agrees(
    candidate: Attention, form: AttentionForm, shape: AttentionShape, device: torch.device
) -> bool:
    """Compares a chunk in the middle of a prompt, whole prompts, and single rows."""
    size = shape.block_size
    # Blocks out of order; block 0 fills up tables and is nobody's.
    header = StepHeader(
        0,
        (
            SequenceStep(0, size + 1, size, (5, 2, 7), False),
            SequenceStep(1, 0, size - 1, (3,), False),
            SequenceStep(2, 2 * size - 1, 1, (4, 1), False),
            SequenceStep(3, 0, 1, (6,), False),
        ),
    )
    generator = torch.Generator().manual_seed(_SEED)
    pool = (8, size, shape.key_heads, shape.head_size)
    keys, values, query = (
        torch.randn(sizes, generator=generator).to(device, shape.dtype)
        for sizes in (pool, pool, (header.tokens, shape.heads, shape.head_size))
    )
    found = attend_all(
        candidate,
        header,
        query_THE=query,
        keys_NPKE=keys,
        values_NPKE=values,
        form=form,
        together=True,
    )
    expected = attend_all(
        Gathered(),
        header,
        query_THE=query.float(),
        keys_NPKE=keys.float(),
        values_NPKE=values.float(),
        form=form,
        together=False,
    )
    difference = torch.linalg.vector_norm(found.float() - expected)
    # Written so that a NaN disagrees.
    return bool(difference <= _TOLERANCE * torch.linalg.vector_norm(expected))


def attend_all(
    backend: Attention,
    header: StepHeader,
    *,
    query_THE: torch.Tensor,
    keys_NPKE: torch.Tensor,
    values_NPKE: torch.Tensor,
    form: AttentionForm,
    together: bool,
) -> torch.Tensor:
    """Attended values [T, H, E] of a step whose tables do not name block 0."""
    plan = plan_rows(header, None, block_size=keys_NPKE.shape[1], spare=0, together=together)
    ints = torch.tensor(plan.ints, dtype=torch.int32, device=query_THE.device)
    positions_T = plan.positions.of(ints).long()
    output_THE = torch.empty_like(query_THE)
    for group_plan in plan.groups:
        group = Group.on_device(group_plan, ints, positions_T)
        output_THE[group.rows] = backend.attend(
            query_THE[group.rows], keys_NPKE, values_NPKE, group, form
        )
    return output_THE
