"""Serve a model with MAC and with vLLM's own attention, ask both the same, and compare.

Run by quickstart.sh, in an environment with vLLM and this project. The servers listen on
loopback only and are stopped at the end, also on Ctrl-C and when the terminal is closed.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from openai import OpenAI
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from vllm_mac.metrics import summarise
from vllm_mac.tools.eval import tasks

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / ".quickstart"
TESTBED = ROOT / "examples" / "testbed"
TASK = "niah_multiquery"  # four of a dozen numbers that are told somewhere in the text
console = Console()


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="examples/quickstart.sh", description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default=str(TESTBED), help="chat model's folder or name (default: examples/testbed)")
    parser.add_argument("--tokens", type=int, default=400, help="most tokens to generate (default 400)")
    parser.add_argument("--context", type=int, default=8192, help="characters of the prompt (default 8192)")
    parser.add_argument("--tolerance", type=float, help="MAC's tolerance; 0 reads every key, for the same answers")
    parser.add_argument("--timeout", type=int, default=600, help="seconds to wait for a server (default 600)")
    args = parser.parse_args()
    for name in ("tokens", "context", "timeout"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}; it must be at least 1")
    return args


def on_gpu() -> bool:
    return (
        subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode == 0
        if shutil.which("nvidia-smi")
        else False
    )


# Contexts as short and steps as small as the test bed's stay exact by default: there it does not pay.
SHOWN = {"min_context": 1024, "min_step_mib": 0}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextmanager
def server(model: str, backend: str | None, config: dict, timeout: int):
    """A vLLM server on loopback; yields its address. `backend` None is the platform's own."""
    port, log = free_port(), WORK / f"server-{backend or 'default'}.log"
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--served-model-name", "model",
        "--host", "127.0.0.1", "--port", str(port), "--max-num-seqs", "4", "--no-enable-log-requests",
    ]  # fmt: skip
    environment = os.environ | {"VLLM_SERVER_DEV_MODE": "1"}  # it offers /collective_rpc
    if on_gpu():
        command += ["--dtype", "bfloat16"]
    else:
        command += ["--dtype", "float32", "--enforce-eager"]
        environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    if backend:
        command += ["--attention-backend", backend, "--worker-extension-cls", "vllm_mac.metrics.WorkerExtension"]
        command += ["--additional-config", json.dumps({"mac": config})]
    address = f"http://127.0.0.1:{port}"
    with log.open("w") as out:
        # A process group of its own, so that the server's children end with it.
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            with console.status(f"starting vLLM with {backend or 'its own attention'} (log: {log.relative_to(ROOT)})"):
                wait(address, process, log, timeout)
            yield address
        finally:
            stop(process)


def wait(address: str, process: subprocess.Popen, log: Path, timeout: int) -> None:
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if process.poll() is not None:
            sys.exit(f"The server ended with code {process.returncode}. The end of {log}:\n" + tail(log))
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    sys.exit(f"The server was not ready after {timeout} s (--timeout). The end of {log}:\n" + tail(log))


def tail(log: Path, lines: int = 25) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def stop(process: subprocess.Popen) -> None:
    """The server, and what of its children outlives it."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(20)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@dataclass(frozen=True, slots=True)
class Answer:
    """prompt, generated: tokens. each: milliseconds per token."""

    text: str
    prompt: int
    generated: int
    each: float


@contextmanager
def reading(address: str, messages: list[dict], what: str):
    """Show how much of a prompt is read; yields what to call at the first token.

    A server tells nothing of a prompt until it is read, but how much of its KV cache is in use.
    """
    with post(f"{address}/tokenize", {"model": "model", "messages": messages}) as reply:
        prompt = json.load(reply)["count"]
    if not console.is_terminal:
        console.print(f"{what}: reading a prompt of {prompt} tokens")
    done = TextColumn("{task.completed:.0f} of {task.total} tokens")
    columns = TextColumn("{task.description}"), BarColumn(), done, TimeElapsedColumn()
    over = threading.Event()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(f"{what}: reading the prompt", total=prompt)

        def follow() -> None:
            while not over.wait(1):
                with suppress(OSError):
                    bar.update(task, completed=min(used_tokens(address), prompt))

        def first() -> None:
            over.set()
            bar.stop()

        threading.Thread(target=follow, daemon=True).start()
        try:
            yield first
        finally:
            over.set()


def used_tokens(address: str) -> float:
    """Tokens that a server's KV cache holds for requests that run."""
    with urllib.request.urlopen(f"{address}/metrics", timeout=5) as reply:
        lines = reply.read().decode().splitlines()
    share = next((float(line.split()[-1]) for line in lines if line.startswith("vllm:kv_cache_usage_perc{")), 0.0)
    about = next((line for line in lines if line.startswith("vllm:cache_config_info{")), "")
    size = dict(re.findall(r'(\w+)="(\d+)"', about))
    return share * int(size.get("num_gpu_blocks", 0)) * int(size.get("block_size", 0))


def ask(address: str, prompt: str, tokens: int, show: bool, what: str) -> Answer:
    """One streamed chat completion. what: whom is asked, in a few words."""
    client = OpenAI(base_url=f"{address}/v1", api_key="none")
    text, times, usage, messages = "", [], None, [{"role": "user", "content": prompt}]
    with reading(address, messages, what) as first:
        stream = client.chat.completions.create(
            model="model", messages=messages, max_tokens=tokens, temperature=0, stream=True,
            stream_options={"include_usage": True},
        )  # fmt: skip
        for chunk in stream:
            usage = chunk.usage or usage
            if not chunk.choices or not chunk.choices[0].delta.content:
                continue
            if not times:
                first()
            times.append(time.perf_counter())
            piece = chunk.choices[0].delta.content
            text += piece
            if show:
                console.print(printable(piece), end="", markup=False, highlight=False, soft_wrap=True)
    if show:
        console.print()
    generated = usage.completion_tokens
    return Answer(text, usage.prompt_tokens, generated, 1000 * (times[-1] - times[0]) / max(generated - 1, 1))


def printable(text: str) -> str:
    """A byte model may write any byte: show those that a terminal takes for itself as dots."""
    return "".join(c if c.isprintable() or c == "\n" else "." for c in text)


def post(address: str, body: dict):
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(address, data=json.dumps(body).encode(), headers=headers)
    return urllib.request.urlopen(request, timeout=60)


def counters(address: str) -> list:
    with post(f"{address}/collective_rpc", {"method": "mac_counters"}) as reply:
        return [sample for worker in json.load(reply)["results"] for sample in worker]


def main() -> None:
    args = options()
    WORK.mkdir(exist_ok=True)
    sample = tasks.make(TASK, random.Random(0), args.context, len)
    config = SHOWN | ({} if args.tolerance is None else {"tolerance": args.tolerance})

    answers = {}
    for backend in (None, "MAC"):
        with server(args.model, backend, config, args.timeout) as address:
            name = backend or "vLLM's own"
            ask(address, sample.prompt[::-1], 2, False, f"{name}, warming up")  # the first request pays for it
            if backend:
                console.rule(f"streamed with {backend}")
            answers[backend] = ask(address, sample.prompt, args.tokens, bool(backend), name)
            if backend:
                after = summarise(counters(address))
    exact, mac = answers[None], answers["MAC"]
    console.rule("MAC against vLLM's own attention")
    table = Table("", "vLLM's own", "MAC")
    table.add_row("numbers asked that are right", *(right(sample, answer.text) for answer in (exact, mac)))
    table.add_row("time per token", f"{exact.each:.2f} ms", f"{mac.each:.2f} ms")
    table.add_row("KV tokens read in decode", "100 %", percent(after.read_share))
    table.add_row("query heads that used the index", "", percent(after.hit_rate))
    console.print(table)
    same = len(os.path.commonprefix([exact.text, mac.text]))
    console.print(
        f"Prompt of {mac.prompt} tokens, {mac.generated} generated, greedy, on {'GPU' if on_gpu() else 'CPU'}; "
        f"the two answers agree on the first {same} of {len(exact.text)} characters.",
        highlight=False,
    )
    for reason, heads in after.exact.items():
        console.print(f"Exact for {reason}: {heads} heads")
    if not on_gpu():
        console.print("On CPU MAC runs in PyTorch, to show the method; it is on GPUs that it is built to be fast.")


def right(sample: tasks.Sample, text: str) -> str:
    # The prefix is what `vllm-mac eval` gives a model to begin with; this one began by itself.
    return f"{round(len(sample.answers) * tasks.score(replace(sample, prefix=''), text))} of {len(sample.answers)}"


def percent(share: float | None) -> str:
    return "none decoded" if share is None else f"{100 * share:.1f} %"


if __name__ == "__main__":
    # Whoever stops this, or closes its terminal, must not leave its server behind.
    for sign in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(sign, lambda number, _: sys.exit(128 + number))
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
