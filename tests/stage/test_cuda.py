"""The GPU's way of computing, on a CPU: the model's tokens, from packed steps and fixed memory."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from checkpoints import Oracle, write_checkpoint
from stage_chain import GREEDY, Chain, generate, prompts_of, step
from stage_models import settings
from stage_variants import DESCRIBED
from torch import nn

from runtime.stage.checkpoint import open_checkpoint
from runtime.stage.cuda import attention
from runtime.stage.cuda.attention import (
    Attention,
    AttentionForm,
    AttentionShape,
    Backends,
    Gathered,
    GatheredFlash,
    PagedFlash,
    attend_all,
    choose_backends,
)
from runtime.stage.cuda.graphs import EagerCapturer
from runtime.stage.cuda.layers import CudaLayers
from runtime.stage.cuda.step import StepBuffer, StepPlan, plan_decodes, plan_rows
from runtime.stage.device import blocks_that_fit, compute_device
from runtime.stage.ends import Ends
from runtime.stage.errors import DeviceUnavailable
from runtime.stage.families import FAMILIES, parse_config
from runtime.stage.settings import StageSettings
from runtime.stage.stage import StageRunner
from security.channel.admission import Admission
from security.channel.frame import SequenceStep, StepHeader
from security.manifest import ModelFiles

CPU, GPU, META = torch.device("cpu"), torch.device("cuda", 0), torch.device("meta")
LENGTHS = (1, 4, 5, 13, 2, 37, 24, 50)
TOKENS = 12


@pytest.fixture(scope="module")
def expected(checkpoint: Callable[[str], Path]) -> Callable[[str], list[list[int]]]:
    found: dict[str, list[list[int]]] = {}

    def generate_with_transformers(variant: str) -> list[list[int]]:
        if variant not in found:
            oracle = Oracle(checkpoint(variant))
            found[variant] = [oracle.greedy(prompt, TOKENS) for prompt in prompts_of(LENGTHS)]
        return found[variant]

    return generate_with_transformers


def open_stage(files: ModelFiles, first: int = 0, last: int = 6, **changes: object) -> StageRunner:
    wanted = settings(first, last, **changes)
    return StageRunner.on_device(open_checkpoint(files, wanted), wanted, CPU)


def layers_of(stage: StageRunner) -> CudaLayers:
    assert isinstance(stage._layers, CudaLayers)
    return stage._layers


@pytest.mark.parametrize("cuts", [(0, 6), (0, 1, 4, 6)], ids=["one", "three"])
@pytest.mark.parametrize("variant", DESCRIBED)
def test_split_batched_chunked_tokens_equal_generate(
    variant: str,
    cuts: tuple[int, ...],
    checkpoint: Callable[[str], Path],
    open_files: Callable[[Path], ModelFiles],
    expected: Callable[[str], list[list[int]]],
) -> None:
    files = open_files(checkpoint(variant))
    stages = [open_stage(files, first, last) for first, last in itertools.pairwise(cuts)]
    assert {stage.backend for stage in stages} == {"cpu graphs, attention gathered"}
    assert generate(Chain(stages), prompts_of(LENGTHS), TOKENS) == expected(variant)
    assert len(layers_of(stages[0]).graphs) > 1


@pytest.mark.parametrize("variant", ["mixtral", "gpt_oss", "cohere2"])
def test_layers_that_are_not_dense_are_transformers_own(
    variant: str,
    checkpoint: Callable[[str], Path],
    open_files: Callable[[Path], ModelFiles],
    expected: Callable[[str], list[list[int]]],
) -> None:
    stage = open_stage(open_files(checkpoint(variant)))
    assert stage.backend == "torch on cpu"
    assert generate(Chain([stage]), prompts_of(LENGTHS), TOKENS) == expected(variant)


def test_reset_and_reused_blocks_leave_no_trace(
    checkpoint: Callable[[str], Path],
    open_files: Callable[[Path], ModelFiles],
    expected: Callable[[str], list[list[int]]],
) -> None:
    chain = Chain([open_stage(open_files(checkpoint("qwen3")))])
    prompts, wanted = prompts_of(LENGTHS), expected("qwen3")
    for seed in range(2):
        assert generate(chain, prompts, TOKENS, seed=seed) == wanted
    recorded = layers_of(chain.stages[0]).graphs
    chain.stages[0].reset()
    assert generate(chain, prompts, TOKENS) == wanted
    assert layers_of(chain.stages[0]).graphs == recorded


@pytest.mark.parametrize("variant", ["llama", "gemma2", "olmo2", "granite"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_halves_are_as_near_to_float32_as_transformers_layers_are(
    variant: str,
    dtype: str,
    checkpoint: Callable[[str], Path],
    open_files: Callable[[Path], ModelFiles],
) -> None:
    files = open_files(checkpoint(variant))
    [prompt] = prompts_of((40,))
    header = step(count=40, blocks=tuple(range(10)))

    def logits(stage: StageRunner) -> torch.Tensor:
        return stage._ends.logits(stage.forward(header, token_ids=prompt))

    exact = logits(open_stage(files))
    ours = logits(open_stage(files, dtype=dtype))
    theirs = logits(StageRunner(files, settings(dtype=dtype, device="cpu")))
    error, reference = (float((it - exact).square().mean().sqrt()) for it in (ours, theirs))
    assert 0 < error <= 1.3 * reference


def test_a_batch_is_padded_and_padding_touches_nobody(
    checkpoint: Callable[[str], Path], open_files: Callable[[Path], ModelFiles]
) -> None:
    """Three rows are computed as four; what is in all blocks but their own stays as it was."""
    files = open_files(checkpoint("llama"))
    stage = open_stage(files, 0, 4)
    layers = layers_of(stage)
    header = StepHeader(
        0, tuple(SequenceStep(slot, 0, 1, (10 + slot,), False) for slot in range(3))
    )
    stage.forward(header, token_ids=[5, 6, 7])
    assert (4, 64) in layers.graphs
    for layer in range(4):
        for pool in layers._cache.blocks(layer):
            written = pool.flatten(1).abs().sum(1).nonzero().flatten().tolist()
            assert written == [10, 11, 12, 128]
            assert len(pool) == 129


def test_a_stage_in_the_middle_gives_each_step_its_own_memory(
    checkpoint: Callable[[str], Path], open_files: Callable[[Path], ModelFiles]
) -> None:
    stage = open_stage(open_files(checkpoint("llama")), 2, 4)
    rows = torch.randn(2, 1, 64, generator=torch.Generator().manual_seed(0))
    first = stage.forward(step(count=1, sampled=False), hidden_TD=rows[0])
    kept = first.clone()
    stage.forward(step(start=1, count=1, sampled=False), hidden_TD=rows[1])
    assert torch.equal(first, kept)


def test_rows_that_are_sampled_come_with_the_step(
    checkpoint: Callable[[str], Path], open_files: Callable[[Path], ModelFiles]
) -> None:
    files = open_files(checkpoint("llama"))
    header = StepHeader(
        0,
        (
            SequenceStep(0, 0, 1, (1,), False),
            SequenceStep(1, 0, 1, (2,), True, True),
            SequenceStep(2, 0, 1, (3,), True, True),
        ),
    )
    answers = []
    for stage in (open_stage(files), StageRunner(files, settings(device="cpu"))):
        stage.admit([Admission(slot, GREEDY, 1) for slot in (1, 2)])
        answers.append(stage.sample(header, stage.forward(header, token_ids=[3, 9, 27])).tokens)
        if isinstance(stage._layers, CudaLayers):
            rows = stage._layers.sampled_rows
            assert rows is not None
            assert rows.tolist() == [1, 2]
    assert answers[0] == answers[1]
    assert len(answers[0]) == 2


class _Filled:
    """Parts that are read before anything moves."""

    def __init__(self, files: ModelFiles, wanted: StageSettings) -> None:
        checkpoint = open_checkpoint(files, wanted)
        self.parts = checkpoint.parts
        names = [*Ends.parts_of(checkpoint, wanted), *map(self.parts.layer_name, range(6))]
        self._filled = {name: checkpoint.fill(name) for name in names}

    def bytes_of(self, parts: Iterable[str]) -> int:
        return len(list(parts))

    def fill(self, part: str) -> nn.Module:
        return self._filled[part]


@pytest.mark.parametrize(
    ("variant", "dense"),
    [
        *((name, True) for name in ("llama", "gemma2", "gemma3_text", "phi3", "olmo3", "smollm3")),
        *((name, False) for name in ("cohere2", "olmo", "helium")),
    ],
)
def test_nothing_is_computed_on_another_device(
    variant: str,
    dense: bool,
    checkpoint: Callable[[str], Path],
    open_files: Callable[[Path], ModelFiles],
) -> None:
    """Tensors on meta mix with the host's as little as a GPU's do."""
    wanted = settings()
    weights = _Filled(open_files(checkpoint(variant)), wanted)
    mixed = StepHeader(
        0, (SequenceStep(0, 3, 5, (1, 2), True), SequenceStep(1, 4, 1, (4, 3), False))
    )
    decodes = StepHeader(1, tuple(SequenceStep(slot, 9, 1, (5, 6, 7), True) for slot in range(3)))
    stage = StageRunner.on_device(weights, wanted, META)
    assert isinstance(stage._layers, CudaLayers) == dense
    for header in (mixed, decodes):
        hidden = stage.forward(header, token_ids=[1] * header.tokens)
        logits = stage._ends.logits(hidden)
        assert (hidden.device, logits.device) == (META, META)
        assert tuple(logits.shape) == (header.tokens, 99)
    # A product with a weight that stayed behind is the one thing that meta would not notice.
    assert stage._ends._head is not None
    assert {weight.device for weight in stage._ends._head.parameters()} == {META}
    if isinstance(stage._layers, CudaLayers):
        for layer in stage._layers._layers:
            linears = (layer._qkv, layer._output, layer._gate_up, layer._down)
            assert {linear._weight.device for linear in linears} == {META}


# -- attention ----------------------------------------------------------------------------------


def varlen_as_documented(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
    seqused_k: torch.Tensor,
    block_table: torch.Tensor | None,
) -> torch.Tensor:
    """`torch.nn.attention.varlen.varlen_attn` by its documentation, a row and a head at a time."""
    assert all(it.dtype == torch.int32 for it in (cu_seq_q, seqused_k))
    assert enable_gqa
    assert (block_table is None) != (cu_seq_k is None)
    output = torch.empty_like(query)
    shared = query.shape[1] // key.shape[-2]
    for sequence, used in enumerate(seqused_k.tolist()):
        if block_table is None:
            first = int(cu_seq_k[sequence])
            keys, values = key[first : first + used], value[first : first + used]
            assert int(cu_seq_k[sequence + 1]) - first >= used
        else:
            keys, values = (it[block_table[sequence]].flatten(0, 1)[:used] for it in (key, value))
        rows = range(int(cu_seq_q[sequence]), int(cu_seq_q[sequence + 1]))
        assert len(rows) <= max_q
        assert used <= max_k
        for row in rows:
            # The last row sees the last position.
            last = used - (rows.stop - row)
            first = 0 if window_size[0] < 0 else max(0, last - window_size[0])
            assert window_size[1] == 0
            for head in range(query.shape[1]):
                seen = slice(first, last + 1)
                scores = keys[seen, head // shared].float() @ query[row, head].float() * scale
                weights = torch.softmax(scores, 0)
                output[row, head] = (weights @ values[seen, head // shared].float()).to(query.dtype)
    return output


FORMS = [AttentionForm(0.3, None, None), AttentionForm(0.2, None, 5), AttentionForm(0.2, None, 1)]
SHAPE = AttentionShape(heads=6, key_heads=2, head_size=16, block_size=4, dtype=torch.bfloat16)


@pytest.mark.parametrize("backend", [PagedFlash(), GatheredFlash()])
@pytest.mark.parametrize("form", FORMS)
def test_flash_is_called_as_documented(
    backend: Attention, form: AttentionForm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention.varlen, "varlen_attn", varlen_as_documented)
    assert attention._computes(backend, [form], SHAPE, CPU)


def test_what_is_wrong_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The built-in kernel ignores a window, and the package is wrong in another way."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    activated: list[str] = []
    monkeypatch.setattr(attention, "activate_flash_attention_impl", activated.append)
    found = attention._agrees
    monkeypatch.setattr(attention, "_agrees", lambda *arguments: found(*arguments[:3], CPU))

    def chosen(forms: list[AttentionForm], **wrong: object) -> str:
        def varlen_attn(*arguments: object, **options: object) -> torch.Tensor:
            return varlen_as_documented(*arguments, **{**options, **wrong})

        monkeypatch.setattr(attention.varlen, "varlen_attn", varlen_attn)
        return choose_backends(forms, SHAPE, GPU).name

    assert chosen(FORMS) == "paged FA3"
    assert chosen(FORMS, window_size=(-1, 0)) == "gathered"
    assert chosen(FORMS[:1], window_size=(-1, 0)) == "paged FA3"
    assert chosen(FORMS, scale=0.7) == "gathered"
    assert chosen([*FORMS, AttentionForm(0.3, 20.0, None)]) == "gathered"
    assert set(activated) == {"FA3"}

    def refuses(*arguments: object, block_table: object, **options: object) -> torch.Tensor:
        if block_table is not None:
            raise RuntimeError("block_table needs another kernel")
        return varlen_as_documented(*arguments, block_table=None, **options)

    monkeypatch.setattr(attention.varlen, "varlen_attn", refuses)
    assert choose_backends(FORMS, SHAPE, GPU).name == "gathered, flash for prompts"

    def missing(package: str) -> None:
        raise ModuleNotFoundError("no flash_attn_interface")

    monkeypatch.setattr(attention, "activate_flash_attention_impl", missing)
    monkeypatch.setattr(attention.varlen, "varlen_attn", varlen_as_documented)
    assert choose_backends(FORMS, SHAPE, GPU).name == "gathered, flash for prompts"


@pytest.mark.parametrize("together", [False, True])
def test_stages_with_flash_give_the_models_tokens(
    together: bool,
    checkpoint: Callable[[str], Path],
    open_files: Callable[[Path], ModelFiles],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A whole stage over either flash back-end, which here is its documentation in float32."""
    monkeypatch.setattr(attention.varlen, "varlen_attn", varlen_as_documented)
    paged = Backends("paged", PagedFlash(), PagedFlash(), together=True)
    flash = Backends("flash", Gathered(), GatheredFlash(), together=False)
    monkeypatch.setattr(
        "runtime.stage.cuda.layers.choose_backends", lambda *_: paged if together else flash
    )
    directory = checkpoint("mistral-window")
    prompts = prompts_of((1, 13, 20))
    oracle = Oracle(directory)
    wanted = [oracle.greedy(prompt, 6) for prompt in prompts]
    assert generate(Chain([open_stage(open_files(directory))]), prompts, 6) == wanted


@pytest.mark.parametrize("soft_cap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 3])
def test_gathered_is_plain_softmax_attention(soft_cap: float | None, window: int | None) -> None:
    generator = torch.Generator().manual_seed(1)
    query, keys, values = (
        torch.randn(sizes, generator=generator)
        for sizes in ((4, 6, 16), (9, 4, 2, 16), (9, 4, 2, 16))
    )
    header = StepHeader(
        0, (SequenceStep(0, 6, 3, (8, 2, 5), True), SequenceStep(1, 2, 1, (1,), True))
    )
    found = attend_all(
        Gathered(),
        header,
        query_THE=query,
        keys_NPKE=keys,
        values_NPKE=values,
        form=AttentionForm(0.5, soft_cap, window),
        together=False,
    )
    for row, (blocks, position) in enumerate([*(((8, 2, 5), p) for p in (6, 7, 8)), ((1,), 2)]):
        first = 0 if window is None else max(0, position - window + 1)
        for head in range(6):
            seen = [keys[blocks[p // 4], p % 4, head // 3] for p in range(first, position + 1)]
            scores = torch.stack(seen) @ query[row, head] * 0.5
            scores = scores if soft_cap is None else torch.tanh(scores / soft_cap) * soft_cap
            kept = [values[blocks[p // 4], p % 4, head // 3] for p in range(first, position + 1)]
            wanted = torch.softmax(scores, 0) @ torch.stack(kept)
            torch.testing.assert_close(found[row, head], wanted, rtol=1e-4, atol=1e-5)


# -- packed steps -------------------------------------------------------------------------------


def test_packed_decodes_are_always_in_the_same_place() -> None:
    def plan(*starts: int, sampled: bool = True) -> object:
        sequences = tuple(
            SequenceStep(slot, start, 1, tuple(range(start // 4 + 1)), sampled)
            for slot, start in enumerate(starts)
        )
        packed = plan_decodes(
            StepHeader(0, sequences), [9] * len(starts), batch=4, width=8, block_size=4, spare=50
        )
        assert packed.rows == 4
        ints = torch.tensor(packed.ints, dtype=torch.int32)
        padding = 4 - len(starts)
        assert packed.positions.of(ints).tolist() == [*starts, *[0] * padding]
        assert packed.places.of(ints).tolist() == [*starts, *[200] * padding]
        (group,) = packed.groups
        assert group.lengths.of(ints).tolist() == [*(s + 1 for s in starts), *[1] * padding]
        assert group.tables.of(ints)[len(starts) :].unique().tolist() == [50] * bool(padding)
        return (packed.token_ids, packed.positions, packed.places, packed.groups)

    assert plan(1, 17, 30) == plan(3) == plan(0, 1, 2, 3) == plan(5, 6, sampled=False)


def test_rows_of_rotation_tables_are_packed_for_models_with_long_rows() -> None:
    def turns(plan: StepPlan) -> list[int]:
        return plan.turns.of(torch.tensor(plan.ints, dtype=torch.int32)).tolist()

    decodes = StepHeader(
        0,
        tuple(
            SequenceStep(slot, 9, 1, (0, 1, 2), True, long=long)
            for slot, long in enumerate((True, False, True))
        ),
    )
    mixed = StepHeader(
        0,
        (
            SequenceStep(0, 3, 3, (0, 1), True),
            SequenceStep(1, 4, 2, (2, 3), True, long=True),
            SequenceStep(2, 7, 1, (4, 5), True, long=True),
        ),
    )
    packed = plan_decodes(
        decodes, [9] * 3, batch=4, width=8, block_size=4, spare=50, long_offset=100
    )
    assert turns(packed) == [109, 9, 109, 0]
    assert packed.positions.of(torch.tensor(packed.ints)).tolist() == [9, 9, 9, 0]
    # Where they are depends on the batch alone, since a graph is recorded once.
    short = StepHeader(0, tuple(replace(it, long=False) for it in decodes.sequences[:2]))
    again = plan_decodes(short, [9] * 2, batch=4, width=8, block_size=4, spare=50, long_offset=100)
    assert (again.turns, again.positions, again.groups) == (
        packed.turns,
        packed.positions,
        packed.groups,
    )
    for together in (True, False):
        rows = plan_rows(mixed, None, block_size=4, spare=50, together=together, long_offset=100)
        assert turns(rows) == [3, 4, 5, 104, 105, 107]
        plain = plan_rows(mixed, None, block_size=4, spare=50, together=together)
        assert plain.turns == plain.positions


def test_a_step_goes_to_the_device_with_its_rows() -> None:
    buffer = StepBuffer(4096, 6, torch.bfloat16, CPU)
    header = StepHeader(0, (SequenceStep(0, 3, 1, (7,), False),))
    plan = plan_decodes(header, None, batch=2, width=3, block_size=4, spare=9)
    rows = torch.randn(1, 6).to(torch.bfloat16)
    # What was there before must not come back as padding: it may not be finite.
    buffer._host.fill_(255)
    ints, hidden = buffer.load(plan, rows)
    assert ints.tolist() == list(plan.ints)
    assert hidden is not None
    assert torch.equal(hidden, torch.cat([rows, torch.zeros(1, 6, dtype=torch.bfloat16)]))
    again, hidden_again = buffer.load(plan, rows)
    assert hidden_again is not None
    assert (again.data_ptr(), hidden_again.data_ptr()) == (ints.data_ptr(), hidden.data_ptr())
    assert StepBuffer.bytes_for(len(plan.ints), 2, 6, torch.bfloat16) <= 4096


def test_a_recording_computes_from_what_is_there_when_it_runs() -> None:
    given = torch.ones(3)
    replay = EagerCapturer().capture(lambda: given * 2)
    first = replay()
    given.fill_(math.pi)
    second = replay()
    assert second is first
    assert torch.equal(second, torch.full((3,), 2 * math.pi))


# -- which device -------------------------------------------------------------------------------


def test_device_is_what_the_process_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert compute_device(settings()) == torch.device("cuda", 0)
    assert compute_device(settings(device="cuda")) == torch.device("cuda", 0)
    assert compute_device(settings(device="cpu")) == CPU
    assert compute_device(settings(tp=2)) == CPU
    with pytest.raises(DeviceUnavailable, match="plan the stage with tensor parallelism 1"):
        compute_device(settings(device="cuda", tp=2))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert compute_device(settings()) == CPU
    with pytest.raises(DeviceUnavailable, match="found none that torch can use"):
        compute_device(settings(device="cuda"))
    with pytest.raises(ValueError, match="device: expected one of"):
        settings(device="tpu")


@pytest.mark.parametrize("tied", [False, True])
def test_cache_is_what_the_gpu_has_left(
    tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = write_checkpoint("llama", tmp_path, tie_word_embeddings=tied)
    _, config = parse_config((directory / "config.json").read_bytes())
    parts = FAMILIES["llama"].decoder_on_meta(config)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    weights = sum(parameter.numel() for parameter in model.parameters()) * 2
    block = 2 * 6 * 4 * 2 * 16 * 2
    total = 1 << 24

    def fitting(free: int) -> int:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, total))
        return blocks_that_fit(settings(dtype="bfloat16"), parts, GPU)

    needed = weights + total // 10
    assert fitting(needed + 31 * block) in (29, 30)
    assert fitting(total) == 128
    with pytest.raises(DeviceUnavailable, match="plan fewer layers for this stage"):
        fitting(needed + block)
    assert blocks_that_fit(settings(), parts, CPU) == 128
