"""What a real shard process has imported: nothing of Ray, and no DeepSpeed without need."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

from running import RunningPlan

ENTRY = Path(__file__).with_name("modules_process.py")
# torch itself imports pickle; what matters is that nothing unpickles what comes from outside, which
# the import rules and ruff's banned-api hold for our own code.
FORBIDDEN = {"ray", "cloudpickle", "deepspeed", "serving", "runtime.cluster"}


def test_shards_import_nothing_of_ray(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    with RunningPlan(checkpoint("llama"), (3,), entry=("-I", str(ENTRY), str(tmp_path))) as plan:
        assert plan.complete([1, 2, 3], 4)[1] == 4
        (tmp_path / "now").touch()
        deadline = time.monotonic() + 20
        while len(reports := list(tmp_path.glob("*.json"))) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    for report in reports:
        modules = set(json.loads(report.read_text()))
        assert {"torch", "runtime.stage.stage"} <= modules
        assert not modules & FORBIDDEN
