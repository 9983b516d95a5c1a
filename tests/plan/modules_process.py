"""A shard process that writes down what it has imported, once it has served a request."""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path

from runtime.shard.process import main


def _report(trigger: Path, report: Path) -> None:
    while not trigger.exists():
        time.sleep(0.05)
    part = report.with_suffix(".part")
    part.write_text(json.dumps(sorted(sys.modules)))
    part.rename(report)


if __name__ == "__main__":
    folder = Path(sys.argv.pop(1))
    name = f"modules-{time.monotonic_ns()}.json"
    threading.Thread(target=_report, args=(folder / "now", folder / name), daemon=True).start()
    main()
