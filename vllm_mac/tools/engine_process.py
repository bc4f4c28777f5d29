"""Run an engine in its own process: start it, receive its JSON lines, stop it with its children.

Its memory is free afterwards, and its crash ends nothing else. `engine_entry` is the other end.
"""

import json
import math
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

# Errors as Python and pydantic print them, after vLLM's prefix.
_ERROR = re.compile(r"(?:[\w.]+(?:Error|Exception): |Value error, ).+")
# vLLM begins every line of a log message with its level, also those of a traceback.
_HARMLESS = re.compile(r"(?:\([^)]*\) )?(?:DEBUG|INFO|WARNING) ")


def follow(
    command: list[str],
    log: Path,
    receive: Callable[[dict], None],
    timeout: float = math.inf,
    verbose: bool = False,
    env: dict[str, str] | None = None,
    stop: threading.Event | None = None,
) -> str | None:
    """Run a process to its end. Returns None where it finished its work, else the reason why it did not.

    command: the number of the file descriptor for messages is appended to it. A message is one line with a JSON object.
    The last one is {"done": true}; `receive` is called with the others. A message with the key "stage" begins a stage.
    log: file for the output of the process, unless `verbose` shows it. timeout: seconds that one stage may take.
    env: environment variables; by default those of this process. stop: an event that ends the process and raises
    KeyboardInterrupt, for threads, which Ctrl-C does not reach.
    """
    read, write = os.pipe()
    with open(log, "wb") as sink:
        # Its own process group: a stop also reaches the engine's children, and Ctrl-C reaches only this process.
        process = subprocess.Popen(
            [*command, str(write)], stdin=subprocess.DEVNULL, stdout=sys.stderr.fileno() if verbose else sink,
            stderr=subprocess.STDOUT, pass_fds=(write,), process_group=0, env=env,
        )  # fmt: skip
    os.close(write)
    done, late, stage, begin = False, False, "", time.monotonic()
    since = begin
    try:
        for message in _messages(process, read):
            if stop is not None and stop.is_set():
                raise KeyboardInterrupt
            if message is None:
                late = time.monotonic() > since + timeout
                if late:
                    break
            elif message.get("done"):
                done = True
            else:
                if "stage" in message:
                    stage, since = message["stage"], time.monotonic()
                receive(message)
    finally:
        os.close(read)
        code = _stop(process, patient=done)
    if done:
        return None
    where = f"{stage}: " if stage else ""
    text = "" if verbose else log.read_text(encoding="utf-8", errors="replace")
    if late:  # the log has no error
        total = f", {time.monotonic() - begin:.0f} s after it was started" if since > begin else ""
        reason = f"{where}the engine was stopped because this had taken {timeout:g} s{total}"
    else:
        reason = f"{where}the engine ended with code {code} and gave no result{_cause(text)}"
    return f"{_tail(text)}\n{reason}".strip()


def _messages(process: subprocess.Popen, read: int) -> Iterator[dict | None]:
    """JSON lines from the pipe until it closes or the process ends. Yields None every 0.2 s without a line."""
    waiting = b""
    while True:
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
        else:
            yield None


def _stop(process: subprocess.Popen, patient: bool) -> int:
    """End the process and the rest of its group. patient: wait first, because the process is about to end."""
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
    """The last error in a log. Skipped are vLLM's pointer to the errors above it, and errors that are only warnings."""
    lines = "\n".join(line for line in text.splitlines() if not _HARMLESS.match(line))
    named = [
        found[0].strip() for found in _ERROR.finditer(lines) if "Engine core initialization failed" not in found[0]
    ]
    return f": {named[-1]}" if named else ""
