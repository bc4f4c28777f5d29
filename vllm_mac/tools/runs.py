"""Engines in processes of their own: started, followed by the JSON lines they send, stopped whole.

Memory is free again after each, and a crash ends nothing else. Also whether a stopped run may go on.
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

# As Python and pydantic write them; vLLM puts its own prefix before.
_ERROR = re.compile(r"(?:[\w.]+(?:Error|Exception): |Value error, ).+")
# vLLM begins every line of a message with its level, those of a traceback too.
_HARMLESS = re.compile(r"(?:\([^)]*\) )?(?:DEBUG|INFO|WARNING) ")

# A run that goes on elsewhere, or with other code, would not be one run.
SAME = ("gpu", "vllm", "torch", "triton", "flashinfer", "vllm_mac", "commit")


def same_place(environment: dict) -> dict:
    """What of a machine and its software must be equal for a run to go on there."""
    # A checkout is `-dirty` too when it holds this run's files.
    return {key: environment[key] for key in SAME} | {"commit": environment["commit"].removesuffix("-dirty")}


def differences(there: dict, now: dict) -> list[str]:
    """A line for each key in which what a run was begun with is not what it is to go on with."""
    return [
        f"{name}: there {there.get(name)!r}, now {now.get(name)!r}"
        for name in dict.fromkeys([*there, *now])
        if there.get(name) != now.get(name)
    ]


def follow(
    command: list[str],
    log: Path,
    tell: Callable[[dict], None],
    timeout: float = math.inf,
    verbose: bool = False,
    env: dict[str, str] | None = None,
    stop: threading.Event | None = None,
) -> str | None:
    """Run a process to its end. Why it did not finish its work, or None where it said that it did.

    command: gets the number of the file descriptor for its messages as a last argument. A message is
    one JSON object on a line: {"done": true} is the last, and `tell` gets those before it. What has a
    key "stage" says what the process does from now on. log: where its output goes, unless `verbose`
    shows it. timeout: seconds that one stage may take. env: the process's environment, this one's unless
    given. stop: what ends the process in a thread, where no Ctrl-C arrives: KeyboardInterrupt is raised once
    it is set.
    """
    read, write = os.pipe()
    with open(log, "wb") as sink:
        # A process group of its own: a stop reaches the engine's processes too, and Ctrl-C only this one.
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
                tell(message)
    finally:
        os.close(read)
        code = _stop(process, patient=done)
    if done:
        return None
    where = f"{stage}: " if stage else ""
    text = "" if verbose else log.read_text(encoding="utf-8", errors="replace")
    if late:  # nothing in the log is to blame
        total = f", {time.monotonic() - begin:.0f} s after it was started" if since > begin else ""
        reason = f"{where}the engine was stopped because this had taken {timeout:g} s{total}"
    else:
        reason = f"{where}the engine ended with code {code} and gave no result{_cause(text)}"
    return f"{_tail(text)}\n{reason}".strip()


def _messages(process: subprocess.Popen, read: int) -> Iterator[dict | None]:
    """JSON lines from the pipe until it closes or the process ends; None again and again while there are none."""
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
    """The last error that a log names, other than the one by which vLLM points at those above it, and those that
    it only warns of: it goes on after them."""
    lines = "\n".join(line for line in text.splitlines() if not _HARMLESS.match(line))
    named = [
        found[0].strip() for found in _ERROR.finditer(lines) if "Engine core initialization failed" not in found[0]
    ]
    return f": {named[-1]}" if named else ""
