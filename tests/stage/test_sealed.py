"""Stages on sealed checkpoints: the same tokens, each stage with the keys of its own parts."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from checkpoints import FAMILIES
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from stage_chain import Chain, generate, step
from stage_models import settings

from runtime.stage.families import parse_config
from runtime.stage.stage import StageRunner
from security.errors import SealedChunkInvalid, UnsealKeyMissing
from security.manifest import ModelFiles, build_manifest
from security.sealing.document import parse_selection, stage_units, unit_of
from security.sealing.keys import UnsealKeys
from security.sealing.reader import open_model
from security.sealing.writer import read_wrapped_keys, seal_checkpoint

HERE = Path(__file__).resolve().parent
BROKER = X25519PrivateKey.generate()
PROMPTS = ([5, 6, 7, 8, 9], [20, 21, 22])
# Long enough to hold half of any 64 bytes, wherever they begin.
BLOCK = 32


@pytest.fixture
def sealed(checkpoint: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    def seal(variant: str, parts: str = "all") -> Path:
        output = tmp_path / variant
        recipient = BROKER.public_key().public_bytes_raw()
        seal_checkpoint(checkpoint(variant), output, parse_selection(parts), [recipient])
        return output

    return seal


def stage_of(directory: Path, first: int, last: int, **changes: object) -> StageRunner:
    """A stage with the keys of its own parts, as a broker would release them."""
    manifest = build_manifest(directory)
    wrapped = read_wrapped_keys(directory)
    units = [
        unit
        for unit in stage_units(manifest, first, last, 6)
        if unit in wrapped.recipients[BROKER.public_key().public_bytes_raw()]
    ]
    with open_model(directory, manifest, wrapped.unwrap(BROKER, units)) as files:
        return StageRunner(files, settings(first, last, **changes))


# Tied, of its own head, of experts that the checkpoint keeps apart.
@pytest.mark.parametrize("variant", ["qwen3", "llama", "qwen3_moe"])
@pytest.mark.parametrize("parts", ["all", "1-3,embed"])
def test_sealed_stages_give_the_same_tokens(
    variant: str,
    parts: str,
    checkpoint: Callable[[str], Path],
    sealed: Callable[..., Path],
    open_files: Callable[[Path], ModelFiles],
) -> None:
    plain = Chain(
        [StageRunner(open_files(checkpoint(variant)), settings(*span)) for span in ((0, 2), (2, 6))]
    )
    directory = sealed(variant, parts)
    chain = Chain([stage_of(directory, 0, 2), stage_of(directory, 2, 6)])
    assert generate(chain, PROMPTS, 8) == generate(plain, PROMPTS, 8)


def test_a_stage_needs_the_keys_of_its_own_parts(sealed: Callable[..., Path]) -> None:
    directory = sealed("qwen3")
    manifest, wrapped = build_manifest(directory), read_wrapped_keys(directory)
    keys = wrapped.unwrap(BROKER, stage_units(manifest, 0, 2, 6))
    with (
        open_model(directory, manifest, keys) as files,
        pytest.raises(UnsealKeyMissing, match="key of layer-2"),
    ):
        StageRunner(files, settings(1, 3))


def test_a_tampered_layer_loads_nothing(sealed: Callable[..., Path]) -> None:
    directory = sealed("qwen3")
    tensor = next(
        t for t in build_manifest(directory).tensors if t.name.startswith("model.layers.4.mlp")
    )
    path = directory / tensor.file
    content = bytearray(path.read_bytes())
    content[8 + int.from_bytes(content[:8], "little") + tensor.begin] ^= 1
    path.write_bytes(content)
    with pytest.raises(SealedChunkInvalid, match=r"model\.layers\.4"):
        stage_of(directory, 3, 6)


def test_ranks_get_the_keys_of_their_layers(
    checkpoint: Callable[[str], Path],
    sealed: Callable[..., Path],
    open_files: Callable[[Path], ModelFiles],
) -> None:
    header = step(count=3, blocks=(1,))
    stage = stage_of(sealed("qwen3"), 0, 6, tp=2)
    try:
        found = stage.forward(header, token_ids=[1, 2, 3])
    finally:
        stage.close()
    whole = StageRunner(open_files(checkpoint("qwen3")), settings())
    expected = whole.forward(header, token_ids=[1, 2, 3])
    assert torch.allclose(found, expected, atol=1e-4)


# -- what is on disk afterwards -------------------------------------------------------------------


def blocks_of(directory: Path) -> set[bytes]:
    """Pieces of the tensors, some of which are in any 64 bytes of one."""
    with ModelFiles(directory, build_manifest(directory)) as files:
        contents = [bytes(files.read_tensor(name)) for name in files.tensor_names()]
    return {
        content[at : at + BLOCK]
        for content in contents
        for at in range(0, len(content) - BLOCK + 1, BLOCK)
        # Zeros, ones and the like are in any file.
        if len(set(content[at : at + BLOCK])) > 16
    }


def holds_any(path: Path, blocks: set[bytes]) -> bool:
    content = path.read_bytes()
    return any(content[at : at + BLOCK] in blocks for at in range(len(content) - BLOCK + 1))


def files_below(*roots: Path) -> Iterator[Path]:
    for root in roots:
        yield from (p for p in root.rglob("*") if p.is_file() and not p.is_symlink())


def files_written(
    directory: Path, keys: UnsealKeys, home: Path, tp: int, leak: str
) -> tuple[list[Path], set[Path]]:
    """Files that a process and its ranks left or removed, and what it opened to write."""
    keep = home / "keep"
    keep.mkdir(parents=True)
    before = set(files_below(Path("/dev/shm")))
    result = subprocess.run(
        [sys.executable, HERE / "sealed_process.py", directory, keep, str(tp), leak],
        input=keys.to_bytes(),
        capture_output=True,
        cwd=home,
        env={
            "PATH": os.environ["PATH"],
            "HOME": str(home),
            "TMPDIR": str(home),
            "XDG_CACHE_HOME": str(home / "cache"),
            "PYTHONPATH": f"{HERE}:{HERE.parent}:{HERE.parents[1]}",
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
        },
        check=False,
    )
    assert result.returncode == 0, result.stderr.decode()[-2000:]
    opened = {Path(line) for line in result.stdout.decode().splitlines()}
    left = {path for path in opened if path.is_file()}
    left |= set(files_below(home)) | (set(files_below(Path("/dev/shm"))) - before)
    return sorted(left), opened


def test_no_file_holds_a_sealed_tensor_after_a_stage_has_loaded(
    checkpoint: Callable[[str], Path], sealed: Callable[..., Path], tmp_path: Path
) -> None:
    directory = sealed("qwen3")
    blocks = blocks_of(checkpoint("qwen3"))
    keys = read_wrapped_keys(directory).unwrap(BROKER)
    # The scan finds what is in the clear, at any offset.
    assert holds_any(checkpoint("qwen3") / "model.safetensors", blocks)
    assert not any(holds_any(path, blocks) for path in files_below(directory))
    left, _ = files_written(directory, keys, tmp_path / "home", 1, "")
    assert [path for path in left if holds_any(path, blocks)] == []
    left, opened = files_written(directory, keys, tmp_path / "leaking", 1, "leak")
    assert tmp_path / "leaking" / "scratch" in opened
    found = [path for path in left if holds_any(path, blocks)]
    assert [path.parent.name for path in found] == ["keep"]


# Compiles DeepSpeed's op in a home of its own.
@pytest.mark.slow
def test_no_file_holds_a_sealed_tensor_after_ranks_have_loaded(
    checkpoint: Callable[[str], Path], sealed: Callable[..., Path], tmp_path: Path
) -> None:
    directory = sealed("qwen3")
    blocks = blocks_of(checkpoint("qwen3"))
    keys = read_wrapped_keys(directory).unwrap(BROKER)
    left, _ = files_written(directory, keys, tmp_path / "home", 2, "")
    assert [path for path in left if holds_any(path, blocks)] == []


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_tensor_that_a_stage_reads_has_a_unit(family: str) -> None:
    config_class, changes = FAMILIES[family]
    config = config_class(num_hidden_layers=6, **changes).to_json_string(use_diff=False)
    parsed, config = parse_config(config.encode())
    parts = parsed.decoder_on_meta(config)
    stored = [part.name for item in parts.shapes().items() for part in parts.stored_parts(*item)]
    assert all(unit_of(name) is not None for name in [*parts.shapes(), *stored])
