"""One hop over loopback: an encrypted link beside a plain socket, in the same run.

A hop is a message of a size one way and a byte back, between two processes; half of what the
acknowledgement adds is counted against the link as well. The plain socket carries a length and the
bytes, received into a buffer of its own like a link's. Rounds of the two alternate.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from benchmarks.checkpoint import ROOT
from benchmarks.report import RESULTS, print_table, write_json
from security.channel.link import (
    EPOCH_BYTES,
    Edge,
    Link,
    LinkClosed,
    LinkKeys,
    LinkListener,
    connect,
)

__all__ = ["main"]

Hop = Callable[[bytes], None]

_EDGE = Edge("stage-0", "stage-1")
_ROSTER = bytes(32)
_EPOCH = bytes(EPOCH_BYTES)
_LENGTH = struct.Struct(">Q")
_DEADLINE_S = 60.0
_MOST = 1 << 28


def main() -> None:
    """Measures and reports, or is the far end of the measurement."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.links", description=__doc__)
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[256, 8 << 10, 64 << 10, 1 << 20, 4 << 20, 16 << 20]
    )
    parser.add_argument("--seconds", type=float, default=1.0, help="a side, a size and a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, default=RESULTS / "links.json")
    parser.add_argument("--far-end", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.far_end is not None:
        _far_end(arguments.far_end)
        return
    own, peer = X25519PrivateKey.generate(), X25519PrivateKey.generate()
    with LinkListener("127.0.0.1") as listener, socket.create_server(("127.0.0.1", 0)) as server:
        told = ",".join(
            (
                str(server.getsockname()[1]),
                str(listener.port),
                peer.private_bytes_raw().hex(),
                own.public_key().public_bytes_raw().hex(),
            )
        )
        far = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.links", "--far-end", told], cwd=ROOT
        )
        try:
            plain, _ = server.accept()
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            keys = LinkKeys(own, peer.public_key().public_bytes_raw())
            deadline = time.monotonic() + _DEADLINE_S
            with plain, listener.accept(_EDGE, _ROSTER, _EPOCH, keys, deadline=deadline) as link:
                rows, results = [], []
                for size in arguments.sizes:
                    row, result = _measure(plain, link, size, arguments.rounds, arguments.seconds)
                    rows.append(row)
                    results.append(result)
        finally:
            far.terminate()
            far.wait()
    print_table(
        f"One hop over loopback and a byte back, median of {arguments.rounds} rounds",
        ("bytes", "plain us", "link us", "link - plain us", "plain GB/s", "link GB/s"),
        rows,
    )
    write_json(arguments.json, {"results": results})


def _measure(
    plain: socket.socket, link: Link, size: int, rounds: int, seconds: float
) -> tuple[tuple[str, ...], dict[str, float]]:
    message = os.urandom(size)
    acknowledgement = bytearray(1)

    def over_plain(content: bytes) -> None:
        plain.sendall(_LENGTH.pack(len(content)))
        plain.sendall(content)
        plain.recv_into(acknowledgement)

    def over_link(content: bytes) -> None:
        link.send([content])
        link.receive(1)

    plain_s: list[float] = []
    link_s: list[float] = []
    for _ in range(rounds):
        plain_s.append(_median_hop(over_plain, message, seconds))
        link_s.append(_median_hop(over_link, message, seconds))
    plain_hop, link_hop = statistics.median(plain_s), statistics.median(link_s)
    # Neighbouring rounds share the machine's mood, so their differences are what counts.
    added = statistics.median(b - a for a, b in zip(plain_s, link_s, strict=True))
    result = {
        "bytes": size,
        "plain_s": plain_hop,
        "link_s": link_hop,
        "added_s": added,
        "plain_bytes_per_second": size / plain_hop,
        "link_bytes_per_second": size / link_hop,
    }
    row = (
        f"{size:,}",
        f"{plain_hop * 1e6:.1f}",
        f"{link_hop * 1e6:.1f}",
        f"{added * 1e6:.1f}",
        f"{size / plain_hop / 1e9:.2f}",
        f"{size / link_hop / 1e9:.2f}",
    )
    return row, result


def _median_hop(hop: Hop, message: bytes, seconds: float) -> float:
    """Median time of a hop, over as many as fit into `seconds`."""
    hop(message)
    times: list[float] = []
    end = time.perf_counter() + seconds
    while (begin := time.perf_counter()) < end or not times:
        hop(message)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def _far_end(told: str) -> None:
    plain_port, link_port, own, peer = told.split(",")
    keys = LinkKeys(X25519PrivateKey.from_private_bytes(bytes.fromhex(own)), bytes.fromhex(peer))
    threading.Thread(target=_answer_plain, args=(int(plain_port),), daemon=True).start()
    deadline = time.monotonic() + _DEADLINE_S
    address = f"127.0.0.1:{link_port}"
    with connect(address, _EDGE, _ROSTER, _EPOCH, keys, deadline=deadline) as link:
        try:
            while True:
                link.receive(_MOST)
                link.send([b"\1"])
        except LinkClosed:
            return


def _answer_plain(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while prefix := connection.recv(_LENGTH.size, socket.MSG_WAITALL):
            (length,) = _LENGTH.unpack(prefix)
            content = memoryview(bytearray(length))
            filled = 0
            while filled < length:
                filled += connection.recv_into(content[filled:])
            connection.sendall(b"\1")


if __name__ == "__main__":
    main()
