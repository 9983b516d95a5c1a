"""Attention over the paged cache, registered with transformers under the name "bulkhead".

Layers call it with their own queries, keys and values of the step's new rows, all sequences in one
row dimension. It writes keys and values to the cache and lets each sequence see its own positions
only. Single rows (decodes) are computed together; longer runs (prompt chunks) one by one.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from runtime.stage.errors import UnsupportedAttention
from runtime.stage.kv_cache import PagedCache
from security.channel.frame import SequenceStep, StepHeader

__all__ = ["NAME", "PagedStep", "paged_attention", "register"]

NAME = "bulkhead"


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Rows [first, last) of one sequence and the keys that they see."""

    first: int
    last: int
    fresh: bool  # the rows are all that there is to see
    blocks_1B: torch.Tensor
    visible_TL: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Decodes:
    """One row each of several sequences of similar length."""

    rows_S: torch.Tensor
    blocks_SB: torch.Tensor
    bias_S11L: torch.Tensor  # 0 where visible, minus infinity elsewhere


@dataclass(frozen=True, slots=True)
class _View:
    """Who sees what, for layers with the same sliding window."""

    chunks: list[_Chunk]
    decodes: list[_Decodes]


class PagedStep:
    """One step as layers need it; shared by all layers of the stage.

    Attributes:
        positions_1T: of the rows.
        places_T: in the cache.
        long_1T: which rows are long (see `RotaryBorder`), as booleans; None where none is.

    Args:
        cache: of this stage.
        header: checked against the plan's limits by whoever decoded it.
    """

    def __init__(self, cache: PagedCache, header: StepHeader) -> None:
        self.cache = cache
        self._sequences = header.sequences
        size = cache.block_size
        positions: list[int] = []
        places: list[int] = []
        for sequence in header.sequences:
            for position in range(sequence.start, sequence.start + sequence.count):
                positions.append(position)
                places.append(sequence.blocks[position // size] * size + position % size)
        self._device = cache.device
        self.positions_1T = torch.tensor([positions], device=self._device)
        self.places_T = torch.tensor(places, device=self._device)
        self.long_1T: torch.Tensor | None = None
        if any(sequence.long for sequence in header.sequences):
            long = [s.long for s in header.sequences for _ in range(s.count)]
            self.long_1T = torch.tensor([long], device=self._device)
        self._views: dict[int | None, _View] = {}

    def view(self, window: int | None) -> _View:
        """The view of layers that see `window` positions back, their own included."""
        if window not in self._views:
            self._views[window] = self._make_view(window)
        return self._views[window]

    def _make_view(self, window: int | None) -> _View:
        chunks: list[_Chunk] = []
        similar: defaultdict[int, list[tuple[int, SequenceStep]]] = defaultdict(list)
        row = 0
        for sequence in self._sequences:
            if sequence.count == 1:
                # Padding at most doubles the work where lengths in a group differ.
                length = len(self._seen_blocks(sequence, window))
                similar[(length - 1).bit_length()].append((row, sequence))
            else:
                chunks.append(self._chunk(row, sequence, window))
            row += sequence.count
        return _View(chunks, [self._decodes(group, window) for group in similar.values()])

    def _first_seen(self, position: int, window: int | None) -> int:
        return 0 if window is None else max(0, position - window + 1)

    def _seen_blocks(self, sequence: SequenceStep, window: int | None) -> tuple[int, ...]:
        size = self.cache.block_size
        first = self._first_seen(sequence.start, window) // size
        return sequence.blocks[first : (sequence.start + sequence.count - 1) // size + 1]

    def _chunk(self, row: int, sequence: SequenceStep, window: int | None) -> _Chunk:
        size = self.cache.block_size
        blocks = self._seen_blocks(sequence, window)
        origin = self._first_seen(sequence.start, window) // size * size
        rows_T1 = torch.arange(sequence.start, sequence.start + sequence.count)[:, None]
        keys_1L = torch.arange(origin, origin + len(blocks) * size)[None, :]
        visible_TL = keys_1L <= rows_T1
        if window is not None:
            visible_TL &= keys_1L > rows_T1 - window
        fresh = sequence.start == 0 and (window is None or sequence.count <= window)
        return _Chunk(
            row,
            row + sequence.count,
            fresh,
            torch.tensor([blocks], device=self._device),
            visible_TL.to(self._device),
        )

    def _decodes(self, group: list[tuple[int, SequenceStep]], window: int | None) -> _Decodes:
        size = self.cache.block_size
        tables = [self._seen_blocks(sequence, window) for _, sequence in group]
        width = max(len(table) for table in tables)
        keys_1L = torch.arange(width * size)[None, :]
        starts = [sequence.start for _, sequence in group]
        firsts = [self._first_seen(start, window) for start in starts]
        origins_S1 = torch.tensor([first // size * size for first in firsts])[:, None]
        positions_SL = keys_1L + origins_S1
        visible_SL = (positions_SL <= torch.tensor(starts)[:, None]) & (
            positions_SL >= torch.tensor(firsts)[:, None]
        )
        bias_SL = torch.zeros(visible_SL.shape).masked_fill_(~visible_SL, -math.inf)
        return _Decodes(
            rows_S=torch.tensor([row for row, _ in group], device=self._device),
            # Padding names block 0; the bias hides it.
            blocks_SB=torch.tensor(
                [[*table, *[0] * (width - len(table))] for table in tables], device=self._device
            ),
            bias_S11L=bias_SL[:, None, None, :].to(self._device),
        )


def paged_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    paged_step: PagedStep | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    use_cache: bool | None = False,
    **unknown: object,
) -> tuple[torch.Tensor, None]:
    """The function that a layer's attention module calls; the signature is transformers'.

    Args:
        module: the attention module; its `layer_idx` names the layer in the cache.
        query: [1, H, T, E], rotated.
        key: [1, K, T, E], rotated; the step's rows only.
        value: [1, K, T, E].
        attention_mask: None; visibility follows from the step.
        paged_step: the step, handed through the layer as a keyword argument.
        scaling: factor on the scores; 1/sqrt(E) if None.
        dropout: 0.
        sliding_window: positions that a row sees, its own included; None for all.
        softcap: scores become softcap * tanh(scores / softcap); None for no cap.
        s_aux: [H], a score of each head that takes its share of the weights and adds nothing
            (an attention sink, arXiv 2309.17453); None for none.
        position_ids: already in the rotation.
        use_cache: the cache is ours, whatever it says.
        unknown: refused unless None, since ignoring one is silently wrong.

    Returns:
        The attended values [1, T, H, E], and None for the weights.

    Raises:
        UnsupportedAttention: one of the above does not hold.
    """
    refused = sorted(name for name, given in unknown.items() if given is not None)
    if refused:
        raise UnsupportedAttention(
            f"{type(module).__name__} passes {refused} to its attention, which paged attention "
            "does not compute"
        )
    if paged_step is None or attention_mask is not None or dropout:
        raise UnsupportedAttention(
            f"{type(module).__name__}: expected a step, no mask and no dropout; "
            "paged attention runs inside a stage only"
        )
    layer = module.layer_idx
    if not isinstance(layer, int) or not getattr(module, "is_causal", True):
        raise UnsupportedAttention(f"{type(module).__name__}: expected causal self-attention")

    query_THE, key_TKE, value_TKE = (states[0].transpose(0, 1) for states in (query, key, value))
    cache = paged_step.cache
    cache.write(layer, paged_step.places_T, key_TKE, value_TKE)
    scores = _Scores(query.shape[-1] ** -0.5 if scaling is None else scaling, softcap, s_aux)
    view = paged_step.view(sliding_window)
    output_THE = torch.empty_like(query_THE, memory_format=torch.contiguous_format)
    for chunk in view.chunks:
        rows = slice(chunk.first, chunk.last)
        if scores.plain and chunk.fresh:
            attended = functional.scaled_dot_product_attention(
                query[:, :, rows],
                key[:, :, rows],
                value[:, :, rows],
                is_causal=True,
                scale=scores.scale,
                enable_gqa=True,
            )
        else:
            keys_1KLE, values_1KLE = cache.read(layer, chunk.blocks_1B)
            attend = _attend_plain if scores.plain else _attend_scores
            attended = attend(scores, query[:, :, rows], keys_1KLE, values_1KLE, chunk.visible_TL)
        output_THE[rows] = attended[0].transpose(0, 1)
    for decodes in view.decodes:
        _attend_decodes(
            cache, layer, decodes, query_THE=query_THE, output_THE=output_THE, scores=scores
        )
    return output_THE[None], None


@dataclass(frozen=True, slots=True)
class _Scores:
    """How scores become weights."""

    scale: float
    soft_cap: float | None
    sinks_H: torch.Tensor | None

    @property
    def plain(self) -> bool:
        """Scaled and nothing else: what torch's own attention computes."""
        return self.soft_cap is None and self.sinks_H is None

    def weights(self, scores_SKRL: torch.Tensor, bias: torch.Tensor, rows: int) -> torch.Tensor:
        """Weights in float32.

        Args:
            scores_SKRL: products of queries and keys. R counts the query heads of one key head,
                and for each of them its rows.
            bias: 0 where visible, minus infinity elsewhere; broadcast.
            rows: of each query head.
        """
        scores_SKRL = scores_SKRL.float() * self.scale
        if self.soft_cap is not None:
            scores_SKRL = torch.tanh(scores_SKRL / self.soft_cap) * self.soft_cap
        scores_SKRL = scores_SKRL + bias
        if self.sinks_H is None:
            return torch.softmax(scores_SKRL, dim=-1)
        sequences, heads = scores_SKRL.shape[:2]
        sinks_KR = self.sinks_H.float().view(heads, -1).repeat_interleave(rows, dim=1)
        sinks_SKR1 = sinks_KR[None, :, :, None].expand(sequences, -1, -1, 1)
        return torch.softmax(torch.cat([scores_SKRL, sinks_SKR1], dim=-1), dim=-1)[..., :-1]


def _attend_plain(
    scores: _Scores,
    query_1HTE: torch.Tensor,
    keys_1KLE: torch.Tensor,
    values_1KLE: torch.Tensor,
    visible_TL: torch.Tensor,
) -> torch.Tensor:
    return functional.scaled_dot_product_attention(
        query_1HTE,
        keys_1KLE,
        values_1KLE,
        attn_mask=visible_TL,
        scale=scores.scale,
        enable_gqa=True,
    )


def _attend_scores(
    scores: _Scores,
    query_1HTE: torch.Tensor,
    keys_1KLE: torch.Tensor,
    values_1KLE: torch.Tensor,
    visible_TL: torch.Tensor,
) -> torch.Tensor:
    """The same with a soft cap or sinks, which torch's own attention does not have."""
    heads, length = keys_1KLE.shape[1:3]
    rows = query_1HTE.shape[2]
    query_1KRE = query_1HTE.reshape(1, heads, -1, query_1HTE.shape[3])
    bias_TL = torch.zeros(rows, length, device=visible_TL.device)
    bias_TL.masked_fill_(~visible_TL, -math.inf)
    bias_RL = bias_TL.repeat(query_1KRE.shape[2] // rows, 1)
    products_1KRL = torch.matmul(query_1KRE, keys_1KLE.transpose(2, 3))
    weights_1KRL = scores.weights(products_1KRL, bias_RL, rows).to(query_1HTE.dtype)
    return torch.matmul(weights_1KRL, values_1KLE).view(query_1HTE.shape)


def _attend_decodes(
    cache: PagedCache,
    layer: int,
    decodes: _Decodes,
    *,
    query_THE: torch.Tensor,
    output_THE: torch.Tensor,
    scores: _Scores,
) -> None:
    """Single rows: query heads that share a key head become rows, so no key is ever repeated."""
    keys_SKLE, values_SKLE = cache.read(layer, decodes.blocks_SB)
    sequences, heads, _, size = keys_SKLE.shape
    query_SKGE = query_THE[decodes.rows_S].view(sequences, heads, -1, size)
    products_SKGL = torch.matmul(query_SKGE, keys_SKLE.transpose(2, 3))
    weights_SKGL = scores.weights(products_SKGL, decodes.bias_S11L, 1).to(query_THE.dtype)
    attended_SKGE = torch.matmul(weights_SKGL, values_SKLE)
    output_THE[decodes.rows_S] = attended_SKGE.flatten(1, 2)


def _no_mask(*_arguments: object, **_options: object) -> None:
    """Stages call layers, not models. Without an entry of its own transformers would drop masks."""
    raise UnsupportedAttention("paged attention has no mask: call a stage, not the model")


def register() -> None:
    """Makes `config._attn_implementation = NAME` mean this attention. May be called again."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, paged_attention)
    AttentionMaskInterface.register(NAME, _no_mask)
