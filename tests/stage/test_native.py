"""The native decoder gives the model's tokens, and in bfloat16 is as near to it as torch is."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from checkpoints import Oracle
from stage_chain import Chain, generate, prompts_of, step
from stage_models import settings
from stage_variants import DESCRIBED, VARIANTS

from runtime.stage.native import library, stack
from runtime.stage.native.library import Library, Team, load_library
from runtime.stage.native.stack import PackedLinear, _RotationTables
from runtime.stage.stage import StageRunner
from security.channel.frame import SequenceStep, StepHeader
from security.manifest import ModelFiles

# A length of exactly one block, lengths around the kernels' numbers of rows, past the windows.
# Heads of 24 numbers, as these have, do not fill vectors.
NARROW = ("gemma", "gemma2", "gemma3_text")
COMPUTED = [name for name in DESCRIBED if name not in NARROW]
LENGTHS = (1, 16, 5, 13, 2, 37, 33, 70)
TOKENS = 12

pytestmark = pytest.mark.skipif(
    load_library() is None, reason="this processor has no AVX-512, or no compiler was installed"
)


@pytest.fixture(scope="module")
def expected(checkpoint: Callable[[str], Path]) -> Callable[[str], list[list[int]]]:
    found: dict[str, list[list[int]]] = {}

    def generate_with_transformers(variant: str) -> list[list[int]]:
        if variant not in found:
            oracle = Oracle(checkpoint(variant))
            found[variant] = [oracle.greedy(prompt, TOKENS) for prompt in prompts_of(LENGTHS)]
        return found[variant]

    return generate_with_transformers


@pytest.fixture
def team() -> Iterator[Callable[[int], Team]]:
    opened: list[Team] = []

    def open_(threads: int) -> Team:
        found = load_library()
        assert found is not None
        opened.append(Team(found, threads))
        return opened[-1]

    yield open_
    for team in opened:
        team.close()


def native_settings(first: int = 0, last: int = 6, **changes: object) -> object:
    return settings(first, last, **{"block_size": 16, "cache_blocks": 40, **changes})


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("cuts", [(0, 6), (0, 1, 4, 6)], ids=["one", "three"])
@pytest.mark.parametrize("variant", COMPUTED)
def test_split_batched_chunked_tokens_equal_generate(
    variant: str,
    cuts: tuple[int, ...],
    threads: int,
    checkpoint: Callable[[str], Path],
    open_files: Callable[[Path], ModelFiles],
    expected: Callable[[str], list[list[int]]],
) -> None:
    files = open_files(checkpoint(variant))
    stages = [
        StageRunner(files, native_settings(first, last, threads=threads))
        for first, last in itertools.pairwise(cuts)
    ]
    assert {stage.backend for stage in stages} == {"native"}
    found = generate(Chain(stages), prompts_of(LENGTHS), TOKENS, blocks=40, block_size=16)
    for stage in stages:
        stage.close()
    assert found == expected(variant)


@pytest.mark.parametrize("chunk", [3, 29, 200])
def test_chunks_of_any_length(
    chunk: int,
    checkpoint: Callable[[str], Path],
    open_files: Callable[[Path], ModelFiles],
    expected: Callable[[str], list[list[int]]],
) -> None:
    for variant in ("qwen3", "gemma2-wider", "mistral-window"):
        chain = Chain([StageRunner(open_files(checkpoint(variant)), native_settings())])
        found = generate(chain, prompts_of(LENGTHS), TOKENS, chunk=chunk, blocks=40, block_size=16)
        assert found == expected(variant)


@pytest.mark.parametrize("variant", sorted(VARIANTS.keys() - set(COMPUTED)))
def test_what_is_not_described_stays_with_torch(
    variant: str, checkpoint: Callable[[str], Path], open_files: Callable[[Path], ModelFiles]
) -> None:
    stage = StageRunner(open_files(checkpoint(variant)), native_settings(0, 1))
    assert stage.backend == "torch"


@pytest.mark.parametrize(
    "changes", [{"block_size": 4}, {"dtype": "float16"}], ids=["blocks of 4", "float16"]
)
def test_what_the_decoder_has_no_form_for_stays_with_torch(
    changes: dict[str, object],
    checkpoint: Callable[[str], Path],
    open_files: Callable[[Path], ModelFiles],
) -> None:
    stage = StageRunner(open_files(checkpoint("qwen3")), native_settings(0, 1, **changes))
    assert stage.backend == "torch"


@pytest.mark.parametrize("amx", [False, True], ids=["avx512", "amx"])
@pytest.mark.parametrize(
    "variant", ["qwen3", "gemma2-wider", "gemma3_text-wider", "olmo2", "phi3", "granite"]
)
def test_bfloat16_is_as_near_to_float32_as_torch_is(
    variant: str,
    amx: bool,
    checkpoint: Callable[[str], Path],
    open_files: Callable[[Path], ModelFiles],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = load_library()
    assert found is not None
    if not found.bfloat16 or (amx and not found.amx):
        pytest.skip("this processor does not multiply bfloat16 this way")
    monkeypatch.setattr(found, "amx", amx)
    files = open_files(checkpoint(variant))
    prompts = prompts_of((70, 9, 33))
    header = StepHeader(
        0,
        tuple(
            SequenceStep(slot, 0, len(prompt), tuple(range(slot * 6, slot * 6 + 6)), False)
            for slot, prompt in enumerate(prompts)
        ),
    )
    token_ids = list(itertools.chain.from_iterable(prompts))

    def computed(dtype: str) -> torch.Tensor:
        stage = StageRunner(files, native_settings(dtype=dtype))
        hidden = stage.forward(header, token_ids=token_ids)
        logits = stage._ends.logits(hidden)
        stage.close()
        return logits

    exact, native = computed("float32"), computed("bfloat16")
    monkeypatch.setattr(stack, "load_library", lambda: None)
    torch_ = computed("bfloat16")
    assert native.isfinite().all()
    error, torch_error = (float((it - exact).square().mean().sqrt()) for it in (native, torch_))
    assert 0 < error <= 1.3 * torch_error


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, 3, 14, 15, 16, 17, 33, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_torchs(
    dtype: torch.dtype, rows: int, threads: int, team: Callable[[int], Team]
) -> None:
    found = load_library()
    assert found is not None
    if dtype == torch.bfloat16 and not found.bfloat16:
        pytest.skip("this processor does not multiply bfloat16")
    generator = torch.Generator().manual_seed(rows)
    # Neither a multiple of the tiles' 32 columns nor of AMX' 32 elements in every case.
    for outputs, inputs in ((99, 64), (513, 96), (32, 1200), (7, 1040)):
        weight = torch.randn(outputs, inputs, generator=generator).to(dtype)
        x = torch.randn(rows, inputs, generator=generator).to(dtype)
        packed = PackedLinear(team(threads), weight)
        torch.testing.assert_close(packed(x), x.float() @ weight.float().T, rtol=1e-4, atol=2e-3)
        ids = torch.tensor([outputs - 1, 0, outputs // 2])
        assert torch.equal(packed.rows(ids), weight[ids])


def test_values_of_others_never_count(
    checkpoint: Callable[[str], Path],
    open_files: Callable[[Path], ModelFiles],
    expected: Callable[[str], list[list[int]]],
) -> None:
    """Blocks that other sequences have filled, and a reset, leave no trace."""
    chain = Chain([StageRunner(open_files(checkpoint("qwen3")), native_settings())])
    for seed in range(3):
        found = generate(chain, prompts_of(LENGTHS), TOKENS, blocks=40, block_size=16, seed=seed)
        assert found == expected("qwen3")
    chain.stages[0].reset()
    header = step(count=5, blocks=(3,))
    first = chain.stages[0].forward(header, token_ids=[1, 2, 3, 4, 5])
    chain.stages[0].reset()
    assert torch.equal(chain.stages[0].forward(header, token_ids=[1, 2, 3, 4, 5]), first)


class ShortOfMemory:
    """Rotations that run out of memory after the first table of a longer context."""

    def __init__(self) -> None:
        self.calls = 0

    def rows(self, max_context: int) -> int:
        return max_context

    def tables(self, rows: int, dtype: torch.dtype) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        self.calls += 1
        table = torch.ones(rows, 8)
        missing = torch.ones(1) if self.calls > 1 else table
        return {"local": (table, table), "global": (missing, missing)}


def test_tables_that_the_decoder_points_into_stay_when_longer_ones_fail() -> None:
    """Otherwise the next step would read what has been freed."""
    tables = _RotationTables(ShortOfMemory(), 4096)
    tables.grow(100)
    before = dict(tables.tables)
    with pytest.raises(IndexError):
        tables.grow(1000)
    assert tables.tables.keys() == before.keys()
    assert all(tables.tables[name] is before[name] for name in before)


def test_a_library_of_another_version_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_ABI", -1)
    assert load_library.__wrapped__() is None


def test_no_library_and_another_processor(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(library, "_PATH", tmp_path / "none.so")
    assert load_library.__wrapped__() is None
    assert "install a C++20 compiler" in caplog.text
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor : 0\nflags : fpu avx2 fma\n")
    monkeypatch.setattr(library, "_CPUINFO", cpuinfo)
    assert load_library.__wrapped__() is None
    monkeypatch.setattr(library, "_CPUINFO", tmp_path / "missing")
    assert load_library.__wrapped__() is None


def test_the_flags_decide_what_is_multiplied() -> None:
    found = load_library()
    assert found is not None
    assert not Library(found._functions, frozenset()).bfloat16
    assert not Library(found._functions, frozenset({"avx512_bf16"})).amx
