"""vLLM servers on loopback, each in a session of its own, so that whatever is left of it can be found and ended."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from contextlib import contextmanager, suppress

from support.engine import ENVIRONMENT, with_rule

VLLM = (sys.executable, "-m", "vllm.entrypoints.cli.main")


def environment(**changes: str) -> dict[str, str]:
    """For a process of its own: what this one's engines are set to stays here."""
    for_here = {"VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_LOGGING_LEVEL", "TORCHDYNAMO_DISABLE"}
    for_here |= {"VLLM_USE_V2_MODEL_RUNNER", "TRITON_INTERPRET", "VLLM_PLUGINS"}
    every = {**os.environ, **ENVIRONMENT, "VLLM_CPU_KVCACHE_SPACE": "1"}
    return {name: value for name, value in every.items() if name not in for_here} | changes


def free_port() -> int:
    """A port of loopback that nobody listens to."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def running(log, command: Sequence[str], env: dict[str, str]):
    """The process of a command, in a session of its own, of which nothing is left in the end. log: as `served` takes it."""
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=env, start_new_session=True)
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextmanager
def served(log, model, *options: str, **variables: str):
    """`vllm serve` on `model`; `(process, port)` as soon as it was started, and nothing is left of it in the end.

    log: the file that its output goes to.
    """
    port = free_port()
    # Pages are indexed anew when maps are learned: few of them. The variable would come before the option.
    few = ["--kv-cache-memory-bytes", str(256 << 20)]
    command = [*VLLM, "serve", str(model), "--host", "127.0.0.1", "--port", str(port), *few, *options]
    own = environment(**variables)
    del own["VLLM_CPU_KVCACHE_SPACE"]
    with running(log, command, own) as process:
        yield process, port


def tiny(log, model, additional_config: dict, *options: str, **variables: str):
    """`served` as suits a tiny model, with MAC, by `rule: match` unless the configuration says another."""
    return served(
        log, model, "--served-model-name", "tiny", "--attention-backend", "MAC",
        "--additional-config", json.dumps(with_rule(additional_config, "match")), "--dtype", "float32",
        "--max-model-len", "1024", "--max-num-seqs", "4", "--enforce-eager", *options, **variables,
    )  # fmt: skip


def healthy(process: subprocess.Popen, port: int, patience: float = 300) -> bool:
    """Wait until the server answers (True) or has ended (False)."""
    end = time.monotonic() + patience
    while process.poll() is None:
        assert time.monotonic() < end, f"neither healthy nor dead after {patience} s"
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return True
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    return False
