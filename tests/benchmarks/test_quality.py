"""Quality is measured on answers alone, and the reference's perplexity is transformers' own."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import transformers
from checkpoints import write_checkpoint

from benchmarks.quality import COMPARED, DEMO, REFERENCE, Text, compare, demo_texts, drawn_texts
from runtime.stage.native.library import load_library

found = load_library()
needs_decoder = pytest.mark.skipif(
    found is None or not found.bfloat16, reason="this processor does not multiply bfloat16"
)


@needs_decoder
def test_the_demo_models_quality() -> None:
    torch.set_num_threads(1)
    texts = demo_texts(2)
    qualities = compare(DEMO, texts, threads=1)
    assert set(qualities) == {REFERENCE, *COMPARED}
    model = transformers.AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    loss = 0.0
    for text in texts:
        ids = torch.tensor([text.ids])
        labels = ids.clone()
        labels[:, : text.first] = labels[:, text.end :] = -100
        with torch.inference_mode():
            mean = float(model(input_ids=ids, labels=labels).loss)
        loss += mean * (text.end - text.first)
    tokens = sum(text.end - text.first for text in texts)
    exact = qualities[REFERENCE]
    assert exact.tokens == tokens
    assert exact.perplexity == pytest.approx(math.exp(loss / tokens), rel=1e-4)
    assert (exact.agreement, exact.divergence) == (1.0, 0.0)
    for kind in COMPARED:
        assert qualities[kind].agreement > 0.95
        assert 0 < qualities[kind].divergence < 1e-2
        assert qualities[kind].perplexity == pytest.approx(exact.perplexity, rel=0.05)


@needs_decoder
def test_texts_are_drawn_by_the_model(tmp_path: Path) -> None:
    """What it has drawn is likelier to it than tokens at random."""
    model = write_checkpoint("qwen3", tmp_path, seed=3)
    drawn = drawn_texts(model, 6, 60, vocabulary=90, threads=1)
    assert [len(text.ids) for text in drawn] == [60] * 6
    generator = torch.Generator().manual_seed(1)
    random = [Text(tuple(torch.randint(90, (60,), generator=generator).tolist()), 16, 60)] * 6
    perplexities = [
        compare(model, texts, threads=1)[REFERENCE].perplexity for texts in (drawn, random)
    ]
    assert perplexities[0] < perplexities[1] / 1.5
