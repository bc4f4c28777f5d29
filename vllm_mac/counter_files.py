"""Small files in shared memory through which workers show their counters to the processes of their server.

Each worker has one, named `vllm-mac-PID-RANDOM`, which only its user can read (mode 0600): a line of JSON, zeros up to
a page's end, and int64 values, which the worker writes and other processes may read at any time. Each value is whole;
the values of one reading may belong to two steps.

A worker holds a lock on its file, which the kernel drops when the process ends, however it ends: vLLM kills its workers
as a rule. So a process that finds a file without a lock removes it. Process numbers identify processes within one PID
namespace: containers that share their host's memory (`--ipc=host`) see each other's files, and leave them alone.
"""

import fcntl
import json
import mmap
import os
import re
import stat
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.util import Finalize
from pathlib import Path
from typing import BinaryIO

import numpy as np
import psutil

PREFIX = "vllm-mac-"
FORMAT = "vllm-mac counters 1"  # to be changed with what is in a file


def folders() -> list[Path]:
    """Where files may lie, the better place first."""
    return [Path("/dev/shm"), Path(tempfile.gettempdir())]


class CounterFile:
    """A file of this process; removed by `close`, when the object is collected, or when the process ends.

    values: `[size]` int64, the mapped memory itself. memory: `[bytes]` uint8, all of the mapping.
    Raises OSError where no folder takes the file.
    """

    def __init__(self, header: dict, size: int):
        """header: what JSON can hold; the names "format", "pid", "ancestors" and "namespace" are added."""
        ancestors = [process.pid for process in psutil.Process().parents()]
        own = {"format": FORMAT, "pid": os.getpid(), "ancestors": ancestors, "namespace": _namespace()}
        line = json.dumps(own | header).encode() + b"\n"
        begin = _pages(len(line))
        sweep()
        self.path, fd = _create(line, begin + _pages(8 * size))
        # Forked children have the descriptor and with it the lock, but they do not own the file: Finalize knows.
        self.close = Finalize(self, _remove, (self.path, fd), exitpriority=0)
        # The array keeps the mapping, and whatever was made of the array keeps the array.
        self.memory = np.frombuffer(mmap.mmap(fd, begin + _pages(8 * size)), np.uint8)
        self.values = self.memory[begin : begin + 8 * size].view(np.int64)


def read(root: int) -> Iterator[tuple[dict, np.ndarray]]:
    """Headers and values of the files of process `root` and its descendants."""
    for file, header, begin in _held():
        if root in (header["pid"], *header["ancestors"]):
            file.seek(begin)
            yield header, np.frombuffer(file.read(), np.int64)


def sweep(patience: float = 0.0) -> None:
    """Remove what dead workers left. patience: how many seconds to wait for this process's own to die."""
    end = time.monotonic() + patience
    while [header for _, header, _ in _held() if os.getpid() in header["ancestors"]] and time.monotonic() < end:
        time.sleep(0.02)


def _held() -> Iterator[tuple[BinaryIO, dict, int]]:
    """This user's files that live workers of this PID namespace hold, with their headers and where their values begin.

    Removes those without a lock.
    """
    namespace = _namespace()
    for path in sorted(path for folder in dict.fromkeys(folders()) for path in folder.glob(f"{PREFIX}[0-9]*-*")):
        if not re.fullmatch(PREFIX + r"\d+-[a-z0-9_]{8}", path.name):  # as `_create` names them
            continue
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:  # another user's, or removed just now
            continue
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():  # not this user's file
            os.close(fd)
            continue
        with os.fdopen(fd, "rb") as file:
            try:
                fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                line = file.readline()
                header = _header(line)
                if header is not None and header["namespace"] == namespace:
                    yield file, header, _pages(len(line))
            else:
                if _header(file.readline()) is not None:
                    path.unlink(missing_ok=True)


def _header(line: bytes) -> dict | None:
    """The header of a file of this version's; None for whatever else has such a name."""
    try:
        header = json.loads(line)
        own = header["format"] == FORMAT and {"pid", "ancestors", "namespace"} <= header.keys()
    except (ValueError, KeyError, TypeError):
        return None
    return header if own else None


def _create(line: bytes, size: int) -> tuple[Path, int]:
    error: OSError | None = None
    for folder in folders():
        try:
            # A name that no reader looks for until the lock is held. mkstemp gives mode 0600.
            fd, name = tempfile.mkstemp(prefix=f".{PREFIX}{os.getpid()}-", dir=folder)
        except OSError as refused:
            error = refused
            continue
        try:
            # Reserved now: a mapping of memory that is not there would end the process when it is written.
            os.posix_fallocate(fd, 0, size)
            os.pwrite(fd, line, 0)
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path = folder / Path(name).name.removeprefix(".")
            os.rename(name, path)
            return path, fd
        except OSError as refused:
            error = refused
            os.close(fd)
            os.unlink(name)
    raise error  # pyrefly: ignore[bad-raise]  # `folders` gives at least one


def _remove(path: Path, fd: int) -> None:
    path.unlink(missing_ok=True)
    os.close(fd)


def _pages(size: int) -> int:
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE


def _namespace() -> int:
    """The kernel's number of the PID namespace; 0 where there are none."""
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0
