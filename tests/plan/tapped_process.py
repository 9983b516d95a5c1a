"""A shard process with a spy inside, for tests of what leaves it.

    tapped_process.py --tap DIR --directory SHARD_DIR

Writes the hidden states that the stage computes, the token ids that it is given and every message
of its links into DIR, in clear, and moves the control socket to SHARD_DIR/real, so that a tap can
stand in its place.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from runtime.shard import process
from runtime.shard.pipeline import Epoch
from runtime.stage.stage import StageRunner
from security.channel.link import Link

_real_forward = StageRunner.forward
_real_epoch = Epoch.__init__
_real_send, _real_receive = Link.send, Link.receive


def spy(directory: Path) -> None:
    """From now on every stage of this process writes down what it computes."""

    def forward(self, header, hidden_TD=None, token_ids=None):
        output = _real_forward(self, header, hidden_TD, token_ids)
        first = self._settings.first_layer
        with (directory / f"layer-{first}.bin").open("ab") as file:
            file.write(output.detach().contiguous().numpy().tobytes())
        if token_ids is not None:
            with (directory / "tokens.jsonl").open("a") as file:
                file.write(json.dumps(list(token_ids)) + "\n")
        return output

    StageRunner.forward = forward
    spy_on_links(directory)


def spy_on_links(directory: Path) -> None:
    """What this shard tells its neighbours and hears from them, as it reads it: decrypted."""
    path = directory / "nobody.bin"

    def epoch(self, **arguments):
        nonlocal path
        path = directory / f"messages-{arguments['role'].name}.bin"
        _real_epoch(self, **arguments)

    def record(content):
        with path.open("ab") as file:
            file.write(bytes(64) + content)

    def send(self, parts):
        record(b"".join(parts))
        _real_send(self, parts)

    def receive(self, max_bytes):
        message = _real_receive(self, max_bytes)
        record(bytes(message))
        return message

    Epoch.__init__ = epoch
    Link.send, Link.receive = send, receive


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tap", type=Path, required=True)
    parser.add_argument("--directory", type=Path, required=True)
    arguments = parser.parse_args()
    spy(arguments.tap)
    real = arguments.directory / "real"
    real.mkdir(mode=0o700)
    sys.argv = [sys.argv[0], "--directory", str(real)]
    process.main()


if __name__ == "__main__":
    main()
