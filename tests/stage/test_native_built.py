"""The tests of the native decoder skip where there is none; this one says whether that is right."""

from __future__ import annotations

import shutil

import pytest

from runtime.stage.native import library


def test_it_was_compiled_where_the_processor_can_run_it() -> None:
    if not library._flags() >= library._NEEDED:
        pytest.skip("this processor has no AVX-512")
    if shutil.which("g++") is None:
        pytest.skip("there is no compiler")
    assert library.load_library() is not None, "pip install -e . compiles it"
