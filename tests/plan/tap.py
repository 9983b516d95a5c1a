"""A tap on this machine's loopback and on unix sockets, and a search for secrets in what it took.

`search` is for anything that was captured, wherever: bytes of links, of an object store, of a log.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_TEXT_WINDOW = 12
_TOKEN_WINDOW = 4
# One byte per token says little: more of them, so that random bytes do not look like tokens.
_BYTE_WINDOW = 8
_JSON_WINDOW = 6
_TENSOR_WINDOW = 32
_KEY = 8


@dataclass(frozen=True)
class Secrets:
    """What must not be found.

    Attributes:
        texts: looked for in windows of 12 characters.
        tokens: sequences of token ids, looked for in runs of 4 in every plausible encoding.
        tensors: raw bytes of tensors by where they were recorded, looked for in windows of 32.
    """

    texts: tuple[str, ...] = ()
    tokens: tuple[tuple[int, ...], ...] = ()
    tensors: tuple[tuple[str, bytes], ...] = ()


def search(captured: bytes, secrets: Secrets) -> set[str]:
    """Which kinds of secrets the captured bytes hold: "text", "tokens as ...", "tensor of ...".

    Raises:
        ValueError: one of the secrets is so short or so uniform that a search would prove nothing.
    """
    needles: dict[int, list[tuple[bytes, str]]] = {}

    def add(label: str, windows: Sequence[bytes]) -> None:
        if not windows:
            raise ValueError(f"{label}: nothing distinctive to look for")
        for window in windows:
            (key,) = struct.unpack_from("<Q", window)
            needles.setdefault(key, []).append((window, label))

    for text in secrets.texts:
        add("text", _text_windows(text))
    for tokens in secrets.tokens:
        for encoding, windows in _token_windows(tokens):
            add(f"tokens as {encoding}", windows)
    for where, content in secrets.tensors:
        add(f"tensor of {where}", _tensor_windows(content))

    keys = np.array(sorted(needles), dtype=np.uint64)
    found: set[str] = set()
    for offset in range(_KEY):
        count = (len(captured) - offset) // _KEY
        if count <= 0:
            break
        view = np.frombuffer(captured, "<u8", count, offset)
        place = np.searchsorted(keys, view)
        hits = np.flatnonzero(keys[np.minimum(place, len(keys) - 1)] == view)
        for hit in hits.tolist():
            at = offset + _KEY * hit
            for window, label in needles[int(view[hit])]:
                if label not in found and captured.startswith(window, at):
                    found.add(label)
    return found


def _text_windows(text: str) -> list[bytes]:
    # What JSON escapes looks different on the wire; windows between such characters do.
    windows = (text[i : i + _TEXT_WINDOW] for i in range(len(text) - _TEXT_WINDOW + 1))
    return [window.encode() for window in windows if len(set(window)) >= 6]


def _token_windows(tokens: Sequence[int]) -> Iterator[tuple[str, list[bytes]]]:
    def runs(length: int) -> list[tuple[int, ...]]:
        windows = [tuple(tokens[i : i + length]) for i in range(len(tokens) - length + 1)]
        return [window for window in windows if len(set(window)) >= 3]

    formats = {"u16": "H", "u32": "I", "i64": "q", "float": "f"}
    for name, code in formats.items():
        for order in "<>":
            layout = f"{order}{_TOKEN_WINDOW}{code}"
            yield name, [struct.pack(layout, *run) for run in runs(_TOKEN_WINDOW)]
    if max(tokens) < 256:
        yield "bytes", [bytes(run) for run in runs(_BYTE_WINDOW)]
    for separator in (",", ", ", " "):
        texts = [separator.join(map(str, run)).encode() for run in runs(_JSON_WINDOW)]
        yield "decimal text", texts


def _tensor_windows(content: bytes) -> list[bytes]:
    # Whoever has 63 bytes in a row of the tensor has one of these in full.
    windows = {
        content[i : i + _TENSOR_WINDOW]
        for i in range(0, len(content) - _TENSOR_WINDOW + 1, _TENSOR_WINDOW)
    }
    return [window for window in windows if len(set(window)) >= 8]


# -- TCP on the loopback --------------------------------------------------------------------------

_PACKET_STATISTICS = 6  # linux/if_packet.h
_SOL_PACKET = 263
_SO_RCVBUFFORCE = 33
_ETH_P_ALL = 3
_ETH_P_IP = 0x0800
_PROTOCOL_TCP = 6
_BUFFER_BYTES = 256 << 20


class TapLost(AssertionError):
    """The kernel dropped packets before the tap had read them: it cannot vouch for anything."""


class LoopbackTap:
    """Records every TCP byte that crosses the loopback while it is entered. Needs CAP_NET_RAW.

    Raises:
        PermissionError: this user may not open packet sockets.
    """

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0)
        with contextlib.suppress(PermissionError):
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER_BYTES)
        self._packets: list[bytes] = []
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._read, name="tap", daemon=True)

    def __enter__(self) -> LoopbackTap:
        self._socket.bind(("lo", _ETH_P_ALL))
        self._socket.settimeout(0.2)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()
        self._socket.close()

    def _read(self) -> None:
        # What is sent by loopback is seen twice, going out and coming in.
        while not self._stopping.is_set():
            with contextlib.suppress(TimeoutError):
                packet, (_, protocol, kind, *_) = self._socket.recvfrom(1 << 18)
                if kind == socket.PACKET_OUTGOING and protocol == _ETH_P_IP:
                    self._packets.append(packet)

    def streams(self) -> dict[tuple[int, int], bytes]:
        """What was sent, by (source port, target port), in the order of the stream.

        Raises:
            TapLost: something was sent that the tap has not seen.
        """
        time.sleep(0.5)
        statistics = self._socket.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8)
        _, dropped = struct.unpack("II", statistics)
        if dropped:
            raise TapLost(f"{dropped} packets")
        segments: dict[tuple[int, int], list[tuple[int, bytes]]] = {}
        for packet in list(self._packets):
            header = (packet[0] & 15) * 4
            if packet[0] >> 4 != 4 or packet[9] != _PROTOCOL_TCP:
                continue
            length = struct.unpack_from(">H", packet, 2)[0] or len(packet)
            source, target, sequence = struct.unpack_from(">HHI", packet, header)
            start = header + (packet[header + 12] >> 4) * 4
            if payload := packet[start:length]:
                segments.setdefault((source, target), []).append((sequence, payload))
        return {ports: _assemble(parts) for ports, parts in segments.items()}

    def everything(self) -> bytes:
        """All streams one after another."""
        return bytes(64).join(self.streams().values())


def _assemble(parts: list[tuple[int, bytes]]) -> bytes:
    """Segments in the order of their sequence numbers; what is sent again is taken once.

    Ports can be used again by a later connection: its numbers do not continue the earlier ones,
    and its bytes are appended.
    """
    stream = bytearray()
    waiting = dict(reversed(parts))
    for first, payload in parts:
        if waiting.pop(first, None) is None:
            continue
        stream += payload
        following = (first + len(payload)) % 2**32
        while (more := waiting.pop(following, None)) is not None:
            stream += more
            following = (following + len(more)) % 2**32
    return bytes(stream)


# -- unix sockets ---------------------------------------------------------------------------------


class SocketTap:
    """Stands between the two ends of a unix socket and records what passes.

    Args:
        listen: path that the client connects to.
        target: path of the server's socket, which may appear later.
    """

    def __init__(self, listen: Path, target: Path) -> None:
        self.recorded = bytearray()
        self._listen = listen
        self._target = target
        threading.Thread(target=self._run, name="socket-tap", daemon=True).start()

    def _run(self) -> None:
        with socket.socket(socket.AF_UNIX) as server:
            while not self._target.exists():
                time.sleep(0.05)
            server.bind(str(self._listen))
            server.listen()
            while True:
                client, _ = server.accept()
                upstream = socket.socket(socket.AF_UNIX)
                upstream.connect(str(self._target))
                for source, sink in ((client, upstream), (upstream, client)):
                    threading.Thread(target=self._copy, args=(source, sink), daemon=True).start()

    def _copy(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while content := source.recv(1 << 16):
                self.recorded += content
                sink.sendall(content)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
