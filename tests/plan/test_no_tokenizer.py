"""A checkpoint that `model.save_pretrained` alone has written: no tokenizer, token ids only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from shutil import copytree

from checkpoints import Oracle
from running import RunningPlan


def test_token_ids_in_and_out(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    whole = checkpoint("qwen3")
    model = copytree(whole, tmp_path / "bare")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (model / name).unlink()
    prompt = [5, 17, 40, 2, 61]
    expected = Oracle(whole).greedy(prompt, 20, ignore_end=True)
    request = {
        "model": "test-model",
        "max_tokens": 20,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    with RunningPlan(model, (3,)) as plan:
        choice = plan.post("/v1/completions", {**request, "prompt": prompt}).document["choices"][0]
        assert choice["token_ids"] == expected
        assert [int(word) for word in choice["text"].split()] == expected
        refused = plan.post("/v1/completions", {**request, "prompt": "text"})
        assert refused.status == 400
        assert "no tokenizer" in refused.document["error"]["message"]
        chat = {"model": "test-model", "messages": [{"role": "user", "content": "text"}]}
        refused = plan.post("/v1/chat/completions", chat)
        assert refused.status == 400
        assert "no tokenizer" in refused.document["error"]["message"]
