"""Tiny random models of every family, and stages cut out of them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from checkpoints import write_checkpoint

from security.manifest import ModelFiles, build_manifest

# Lets these tests import their helpers, whatever pytest's import mode.
sys.path.append(str(Path(__file__).parent))
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Writes each variant once."""
    from stage_variants import VARIANTS

    written: dict[str, Path] = {}

    def write(variant: str) -> Path:
        if variant not in written:
            family, changes = VARIANTS[variant]
            directory = tmp_path_factory.mktemp(variant)
            written[variant] = write_checkpoint(family, directory, seed=3, **changes)
        return written[variant]

    return write


@pytest.fixture
def open_files() -> Iterator[Callable[[Path], ModelFiles]]:
    """Opens a directory under a manifest of its present content."""
    opened: list[ModelFiles] = []

    def open_(directory: Path) -> ModelFiles:
        opened.append(ModelFiles(directory, build_manifest(directory)))
        return opened[-1]

    yield open_
    for files in opened:
        files.close()
