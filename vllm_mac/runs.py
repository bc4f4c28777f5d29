"""Engines in processes of their own: started, followed by the JSON lines they send, stopped whole.

Memory is free again after each, and a crash is a result with an error.
"""

import json
import math
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

# As Python and pydantic write them; vLLM puts its own prefix before.
_ERROR = re.compile(r"(?:[\w.]+(?:Error|Exception): |Value error, ).+")


def follow(
    command: list[str], log: Path, tell: Callable[[dict], None], timeout: float = math.inf, verbose: bool = False
) -> dict:
    """The last message of a process, or {"error": why there is none}.

    command: gets the number of the file descriptor for its messages as a last argument. A message is
    one JSON object on a line; `tell` gets those with a key "stage", the others are results. log: where
    the process's output goes, unless `verbose` shows it. timeout: seconds.
    """
    read, write = os.pipe()
    with open(log, "wb") as sink:
        # A process group of its own: a stop reaches the engine's processes too, and Ctrl-C only this one.
        process = subprocess.Popen(
            [*command, str(write)], stdin=subprocess.DEVNULL, stdout=sys.stderr.fileno() if verbose else sink,
            stderr=subprocess.STDOUT, pass_fds=(write,), process_group=0,
        )  # fmt: skip
    os.close(write)
    result, begin = {}, time.monotonic()
    try:
        for message in _messages(process, read, begin + timeout):
            if "stage" in message:
                tell(message)
            else:
                result = message
        late = process.poll() is None and time.monotonic() > begin + timeout
    finally:
        os.close(read)
        code = _stop(process, patient=bool(result))
    if result:
        return result
    text = "" if verbose else log.read_text(encoding="utf-8", errors="replace")
    reason = f"took longer than {timeout:g} s" if late else f"ended with code {code}"
    return {"error": f"{_tail(text)}\nthe engine {reason} and gave no result{_cause(text)}".strip()}


def _messages(process: subprocess.Popen, read: int, deadline: float) -> Iterator[dict]:
    """JSON lines from the pipe until it closes, the process ends or the time is up."""
    waiting = b""
    while time.monotonic() < deadline:
        ready, _, _ = select.select([read], [], [], 0.2)
        if ready:
            data = os.read(read, 1 << 16)
            if not data:
                return
            *lines, waiting = (waiting + data).split(b"\n")
            for line in lines:
                yield json.loads(line)
        elif process.poll() is not None:
            return


def _stop(process: subprocess.Popen, patient: bool) -> int:
    """Wait for the process, if it has told its result, and end what is left of its group."""
    if patient:
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            pass
    for number, seconds in ((signal.SIGTERM, 10), (signal.SIGKILL, 10)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            continue
    return process.wait()


def _tail(text: str, lines: int = 30) -> str:
    return "\n".join(text.splitlines()[-lines:])


def _cause(text: str) -> str:
    """The last error that a log names, other than the one by which vLLM points at those above it."""
    named = [found[0].strip() for found in _ERROR.finditer(text) if "Engine core initialization failed" not in found[0]]
    return f": {named[-1]}" if named else ""
