"""Mounts a `TsmKernel` as a file system, through /dev/fuse (include/uapi/linux/fuse.h).

Needs root and the kernel's FUSE, nothing else. Binary attributes are handed over when the file is
closed, as configfs does.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from tsm_stand_in import BINARY, TsmKernel

_LIBC = ctypes.CDLL(None, use_errno=True)
_IN = struct.Struct("<IIQQIIIHH")
_OUT = struct.Struct("<IiQ")
_ATTR = struct.Struct("<6Q10I")
ROOT = 1
MNT_DETACH = 2
FOPEN_DIRECT_IO = 1


def can_mount() -> bool:
    return os.geteuid() == 0 and os.access("/dev/fuse", os.R_OK | os.W_OK)


needs_mount = pytest.mark.skipif(not can_mount(), reason="needs root and /dev/fuse")


class _Server:
    def __init__(self, kernel: TsmKernel, descriptor: int) -> None:
        self._kernel = kernel
        self._descriptor = descriptor
        self._lock = threading.Lock()
        self._nodes: dict[int, tuple[str, ...]] = {ROOT: ()}
        self._numbers: dict[tuple[str, ...], int] = {(): ROOT}
        self._open: dict[int, tuple[tuple[str, ...], bytearray]] = {}
        self._next = ROOT

    def serve(self) -> None:
        while True:
            try:
                request = os.read(self._descriptor, 1 << 18)
            except OSError as error:
                if error.errno in (errno.EINTR, errno.ENOENT, errno.EAGAIN):
                    continue
                return
            # A report may take long; others are served meanwhile, as the kernel does.
            threading.Thread(target=self._answer, args=(request,), daemon=True).start()

    def _answer(self, request: bytes) -> None:
        length, opcode, unique, node, *_ = _IN.unpack_from(request)
        body = request[_IN.size : length]
        if opcode in (2, 36, 42):  # FORGET, INTERRUPT, BATCH_FORGET have no answer
            return
        try:
            number, reply = 0, self._handle(opcode, node, body)
        except OSError as error:
            number, reply = error.errno or errno.EIO, b""
        except Exception:
            number, reply = errno.EIO, b""
        with suppress(OSError):
            os.write(self._descriptor, _OUT.pack(_OUT.size + len(reply), -number, unique) + reply)

    def _handle(self, opcode: int, node: int, body: bytes) -> bytes:
        path = self._nodes.get(node, ("?", "?", "?"))
        match opcode:
            case 26:  # INIT
                return struct.pack(
                    "<IIIIHHIIHHI7I", 7, 31, 0, 0, 8, 8, 1 << 16, 1, 0, 0, 0, *[0] * 7
                )
            case 1:  # LOOKUP
                return self._entry((*path, body.split(b"\0")[0].decode()))
            case 3 | 4:  # GETATTR, SETATTR (a shell's > truncates)
                return struct.pack("<QII", 0, 0, 0) + self._attributes(path)
            case 9:  # MKDIR
                if path:
                    raise OSError(errno.EPERM, "")
                name = body[8:].split(b"\0")[0].decode()
                self._kernel.mkdir(name)
                return self._entry((name,))
            case 11:  # RMDIR
                if path:
                    raise OSError(errno.EPERM, "")
                self._kernel.rmdir(body.split(b"\0")[0].decode())
                return b""
            case 14:  # OPEN
                return self._opened(path, body)
            case 15:  # READ
                handle, offset, size = struct.unpack_from("<QQI", body)
                content = self._open[handle][1]
                return bytes(content[offset : offset + size])
            case 16:  # WRITE
                return self._written(path, body)
            case 25:  # FLUSH
                self._flushed(struct.unpack_from("<Q", body)[0])
                return b""
            case 18:  # RELEASE
                self._open.pop(struct.unpack_from("<Q", body)[0], None)
                return b""
            case 27:  # OPENDIR
                return struct.pack("<QII", 0, 0, 0)
            case 28:  # READDIR
                return self._listed(path, struct.unpack_from("<QQI", body)[1])
            case 29 | 34 | 38:  # RELEASEDIR, ACCESS, DESTROY
                return b""
            case 17:  # STATFS
                return struct.pack("<5Q4I6I", 0, 0, 0, 0, 0, 4096, 255, 4096, 0, *[0] * 6)
        raise OSError(errno.ENOSYS, "")

    def _mode(self, path: tuple[str, ...]) -> int:
        if not path:
            return stat.S_IFDIR | 0o755
        if path[0] not in self._kernel.instances:
            raise OSError(errno.ENOENT, "")
        if len(path) == 1:
            return stat.S_IFDIR | 0o755
        if len(path) == 2 and path[1] in self._kernel.attributes():
            return stat.S_IFREG | self._kernel.attributes()[path[1]]
        raise OSError(errno.ENOENT, "")

    def _attributes(self, path: tuple[str, ...]) -> bytes:
        mode = self._mode(path)
        size = 4096 if stat.S_ISREG(mode) else 0
        return _ATTR.pack(self._number(path), size, 0, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)

    def _number(self, path: tuple[str, ...]) -> int:
        with self._lock:
            if path not in self._numbers:
                self._next += 1
                self._numbers[path] = self._next
                self._nodes[self._next] = path
            return self._numbers[path]

    def _entry(self, path: tuple[str, ...]) -> bytes:
        attributes = self._attributes(path)
        return struct.pack("<QQQQII", self._number(path), 0, 0, 0, 0, 0) + attributes

    def _opened(self, path: tuple[str, ...], body: bytes) -> bytes:
        flags = struct.unpack_from("<I", body)[0] & os.O_ACCMODE
        mode = self._mode(path)
        wanted = {os.O_RDONLY: 0o400, os.O_WRONLY: 0o200}.get(flags, 0o600)
        if mode & wanted != wanted:
            raise OSError(errno.EACCES, "")
        content = bytearray()
        # The answer is made when the file is opened, and read in pieces; errors come as they do
        # from the first read.
        if flags == os.O_RDONLY:
            content += self._kernel.read(path[0], path[1])
        with self._lock:
            self._next += 1
            handle = self._next
            self._open[handle] = (path, content)
        return struct.pack("<QII", handle, FOPEN_DIRECT_IO, 0)

    def _written(self, path: tuple[str, ...], body: bytes) -> bytes:
        handle, offset, size = struct.unpack_from("<QQI", body)
        data = body[40 : 40 + size]
        if path[1] in BINARY:
            if offset + size > 64:
                raise OSError(errno.EFBIG, "")
            content = self._open[handle][1]
            content[offset : offset + size] = data
        else:
            self._kernel.write(path[0], path[1], data)
        return struct.pack("<II", size, 0)

    def _flushed(self, handle: int) -> None:
        path, content = self._open.get(handle, ((), bytearray()))
        if len(path) == 2 and path[1] == "inblob" and content:
            with suppress(OSError):
                self._kernel.write(path[0], path[1], bytes(content))
            content.clear()

    def _listed(self, path: tuple[str, ...], offset: int) -> bytes:
        self._mode(path)
        names = list(self._kernel.attributes() if path else self._kernel.instances)
        listing = b""
        for index, name in enumerate(names[offset:], offset + 1):
            raw = name.encode()
            kind = stat.S_IFREG >> 12 if path else stat.S_IFDIR >> 12
            entry = struct.pack("<QQII", index, index, len(raw), kind) + raw
            listing += entry.ljust(-(-len(entry) // 8) * 8, b"\0")
        return listing[:4096] if len(listing) > 4096 else listing


@contextmanager
def mounted(kernel: TsmKernel, directory: Path) -> Iterator[Path]:
    """The kernel's report directory, mounted at `directory` for as long as the block runs."""
    directory.mkdir(exist_ok=True)
    descriptor = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    options = f"fd={descriptor},rootmode=40000,user_id=0,group_id=0,allow_other"
    target = os.fsencode(directory)
    if _LIBC.mount(b"tsm", target, b"fuse", 0, options.encode()):
        os.close(descriptor)
        raise OSError(ctypes.get_errno(), f"mount: {os.strerror(ctypes.get_errno())}")
    thread = threading.Thread(target=_Server(kernel, descriptor).serve, daemon=True)
    thread.start()
    try:
        yield directory
    finally:
        _LIBC.umount2(target, MNT_DETACH)
        thread.join(5)
        os.close(descriptor)
