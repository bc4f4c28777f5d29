"""An LMCache server in a process of its own: `with lmcache(folder, mode) as transfer`, vLLM's `kv_transfer_config` for it."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from support.servers import environment

# LMCache answers when it does, and an engine without other work steps meanwhile.
LONG = {"max_steps": 1_000_000}


@contextmanager
def lmcache(folder: Path, mode: str, chunk: int = 32) -> Iterator[dict]:
    """The server has 256 MB, of which nothing is left in the end. mode: how it copies. chunk: tokens that it keeps together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "lmcache.v1.multiprocess.server", "--host", "127.0.0.1", "--port", str(port),
        "--chunk-size", str(chunk), "--l1-size-gb", "0.25", "--no-l1-use-lazy", "--eviction-policy", "LRU",
        "--supported-transfer-mode", mode, "--disable-observability",
    ]  # fmt: skip
    log = folder / "log"
    with pytest.MonkeyPatch.context() as patch:
        # LMCache, here and there, says where it is used unless it is told not to.
        for name in ("LMCACHE_DISABLE_BANNER", "DO_NOT_TRACK"):
            patch.setenv(name, "1")
        patch.setenv("LMCACHE_TRACK_USAGE", "false")
        for name in ("LMCACHE_MP_TRANSFER_MODE", "LMCACHE_USE_UPSTREAM_MP"):
            patch.delenv(name, raising=False)
        with log.open("w") as out:
            process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, env=environment(), start_new_session=True
            )
        try:
            until = time.monotonic() + 120
            while not listening(port):
                assert process.poll() is None and time.monotonic() < until, log.read_text()[-2000:]
                time.sleep(0.2)
            extra = {"lmcache.mp.host": "tcp://127.0.0.1", "lmcache.mp.port": port, "lmcache.mp.mq_timeout": 60.0}
            yield {
                "kv_connector": "LMCacheMPConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra
            }  # fmt: skip
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def listening(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def settle(llm) -> None:
    """Step until LMCache has let go of the last blocks that it stores."""
    until = time.monotonic() + 60
    while not llm.reset_prefix_cache():
        assert time.monotonic() < until
        llm.llm_engine.step()
