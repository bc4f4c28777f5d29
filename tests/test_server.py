"""One server, whose engine is in a process of its own: what an OpenAI client is told of what it asks of MAC, and how the
server ends. And one that does not start."""

import http.client
import json
import os
import re
import shutil
import signal
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from support.servers import healthy, tiny
from support.tiny_models import write

pytestmark = pytest.mark.cpu
CONFIG = {"mac": {"window": 32, "band": 16, "min_context": 64, "threshold": 0.0}}  # without audits
TEMPLATE = Path(__file__).resolve().parent.parent / "examples" / "testbed" / "chat_template.jinja"
BY_INDEX = {"mac": {"rule": "index", "band": 16, "min_context": 64}}
PROMPT = "tell me more " * 12
# What a worker imports as an extension of its own: prompts for which there is no memory, and decoding that takes long.
FULL = """
import time
import torch
from vllm_mac import cpu_lookup

prefill, decode = cpu_lookup.prefill, cpu_lookup.decode

def full(chunk, query, *rest):
    if len(query) > 600:
        raise torch.OutOfMemoryError("out of memory, as a test has it")
    return prefill(chunk, query, *rest)

def slow(*given):
    time.sleep(0.02)
    return decode(*given)

cpu_lookup.prefill, cpu_lookup.decode = full, slow

class Extension:
    pass
"""
REFUSED = [
    ({"mac": "maybe"}, "mac: received 'maybe' (str); must be one of 'on', 'off', 'audit'"),
    ({"mac": 1}, "mac: received 1 (int); must be one of 'on', 'off', 'audit'"),
    ({"mac_threshold": 1.5}, "mac_threshold: received 1.5 (float); must be a number from 0 to 1"),
    ({"mac_threshold": "0.9"}, "mac_threshold: received '0.9' (str); must be a number from 0 to 1"),
    ({"mac_treshold": 0.9}, "mac_treshold: unknown key, received 0.9 (float); did you mean 'mac_threshold'?"),
    (
        {"mac": "audit"},
        "mac: received 'audit', for which there are no buffers, as the engine was started with audit at 0;",
    ),
]
TAKEN = [None, {"mac": "on"}, {"mac": "off"}, {"mac_threshold": 1}, {"mac_threshold": 0.5, "mac": "on"}, {"other": "x"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """`(process, port, log)`"""
    folder = tmp_path_factory.mktemp("server")
    model, log = write("llama", folder), folder / "log"
    shutil.copy(TEMPLATE, model)
    with tiny(log, model, CONFIG) as (process, port):
        assert healthy(process, port), log.read_text()
        yield process, port, log


@pytest.fixture(scope="module")
def client(server):
    from openai import OpenAI

    with OpenAI(base_url=f"http://127.0.0.1:{server[1]}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(client, kind: str, stream: bool, sent: dict | None, **more) -> str:
    """The reply to a greedy request."""
    options = {"model": "tiny", "max_tokens": 12, "temperature": 0, "stream": stream, **more}
    options["extra_body"] = {"ignore_eos": True} | ({} if sent is None else {"vllm_xargs": sent})
    if kind == "chat":
        done = client.chat.completions.create(messages=[{"role": "user", "content": PROMPT}], **options)
        text = (lambda choice: choice.delta.content or "") if stream else (lambda choice: choice.message.content)
    else:
        done = client.completions.create(prompt=PROMPT, **options)
        text = lambda choice: choice.text
    return "".join(text(choice) for chunk in (done if stream else [done]) for choice in chunk.choices)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", ["completion", "chat"])
def test_requests_are_refused_before_anything_is_sent(client, kind, stream):
    from openai import BadRequestError

    for sent, text in REFUSED:
        with pytest.raises(BadRequestError) as refused:
            ask(client, kind, stream, sent)
        assert refused.value.status_code == 400 and refused.value.param == "vllm_xargs"
        assert text in refused.value.body["message"], refused.value.body
    for sent in TAKEN:
        assert ask(client, kind, stream, sent)
    # Several replies are one request, and "off" and a threshold of 1 are both exact.
    assert ask(client, kind, stream, {"mac": "off"}, n=2, temperature=1)
    assert ask(client, kind, stream, {"mac": "off"}) == ask(client, kind, stream, {"mac_threshold": 1})


def test_what_is_no_number_is_refused(client):
    """Python's JSON has NaN, OpenAI's client does not send it."""
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 1, "vllm_xargs": {"mac_threshold": float("nan")}}
    request = urllib.request.Request(
        f"{client.base_url}completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=60)
    assert refused.value.code == 400 and "mac_threshold: received nan (float)" in refused.value.read().decode()


def left_of(session: int) -> list[str]:
    """The names of what is left of a session's processes, once they had some time to end."""
    end = time.monotonic() + 20
    while (left := processes(session)) and time.monotonic() < end:
        time.sleep(0.1)
    return list(left.values())


def processes(session: int) -> dict[int, str]:
    """A session's processes by id, without those that have ended and were not yet waited for. A name has 15 characters
    at most."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = stat.read_text().rpartition(")")
        except OSError:
            continue  # ended just now
        state, _, _, its_session = rest.split()[:4]
        if int(its_session) == session and state != "Z":
            pid, _, called = name.partition(" (")
            found[int(pid)] = called
    return found


def test_server_serves_and_stops(client, server):
    """The last of this server's tests."""
    process, _, log = server
    done = client.completions.create(
        model="tiny", prompt="tell me " * 30, max_tokens=20, temperature=0, extra_body={"ignore_eos": True}
    )
    assert (done.usage.completion_tokens, done.choices[0].finish_reason) == (20, "length")
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0, log.read_text()
    assert left_of(process.pid) == []  # the engine ended with its server
    text = log.read_text()
    assert "MAC serves 2 of 2 attention layers" in text
    # vLLM's server logs it as an error if its engine, told to stop, is gone before the server has closed its queue.
    # The engine, where MAC is, ends without one.
    errors = [line for line in text.splitlines() if re.search(r"\bERROR\b|\bTraceback\b", line)]
    assert not [line for line in errors if "EngineCore pid=" in line], text
    assert not errors or ("EngineDeadError" in text and "/vllm_mac/" not in "\n".join(errors)), text


def decoding(port: int) -> float:
    """How many requests the server has under way."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as found:
        return float(re.search(r"^vllm:num_requests_running\{.*\} (\S+)$", found.read().decode(), re.M)[1])


def long_answer(port: int, **more) -> urllib.request.Request:
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 800, "ignore_eos": True, **more}
    return urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )


def test_a_server_whose_worker_is_killed_ends(model, tmp_path):
    """With an error, and so does the request that was under way; nothing hangs, and nothing is left. vLLM's status is 0."""
    log, executor = tmp_path / "log", ["--distributed-executor-backend", "mp"]
    with tiny(log, model, BY_INDEX, *executor) as (process, port), ThreadPoolExecutor(1) as pool:
        assert healthy(process, port), log.read_text()
        (killed,) = [pid for pid, name in processes(process.pid).items() if name.startswith("VLLM::Worker")]
        ask = partial(pool.submit, urllib.request.urlopen, long_answer(port), timeout=120)
        asked, end = ask(), time.monotonic() + 60
        while not decoding(port):
            assert time.monotonic() < end, log.read_text()
            if asked.done():  # between two looks, as on a busy machine
                assert asked.result().status == 200
                asked = ask()
        os.kill(killed, signal.SIGSTOP)  # on a slow machine the request would end meanwhile
        assert not asked.done()
        os.kill(killed, signal.SIGKILL)
        with pytest.raises((urllib.error.HTTPError, urllib.error.URLError, ConnectionError, http.client.HTTPException)):
            asked.result(timeout=90)
        process.wait(60)
        assert left_of(process.pid) == [] and "EngineDeadError" in log.read_text()


def reply(request: urllib.request.Request) -> tuple[int, str]:
    """Its status, and all of its text."""
    try:
        with urllib.request.urlopen(request, timeout=60) as done:
            return done.status, done.read().decode()
    except urllib.error.HTTPError as refused:
        return refused.code, refused.read().decode()


def test_a_server_without_memory_for_a_prompt_ends(model, tmp_path):
    """So do the requests that were under way, each with an error. The log names it. vLLM's status is 0 here, too."""
    (tmp_path / "full.py").write_text(FULL)
    log, path = tmp_path / "log", os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    extension = ["--worker-extension-cls", "full.Extension"]
    with tiny(log, model, BY_INDEX, *extension, PYTHONPATH=path) as (process, port), ThreadPoolExecutor(3) as pool:
        assert healthy(process, port), log.read_text()
        assert reply(long_answer(port, max_tokens=2))[0] == 200
        whole, streamed = (pool.submit(reply, long_answer(port, stream=stream)) for stream in (False, True))
        end = time.monotonic() + 60
        while decoding(port) < 2:
            assert time.monotonic() < end, log.read_text()
        assert not whole.done() and not streamed.done()
        status, text = reply(long_answer(port, prompt="x" * 640))
        assert status == 500 and "error" in json.loads(text)
        status, text = whole.result(timeout=30)
        assert status == 500 and "error" in json.loads(text)
        status, text = streamed.result(timeout=30)
        assert status == 200 and '"finish_reason":null' in text and '"finish_reason":"length"' not in text
        assert "error" in json.loads(text.removesuffix("data: [DONE]\n\n").rpartition("data: ")[2])
        process.wait(60)
        assert left_of(process.pid) == []
    text = log.read_text()
    assert "OutOfMemoryError: out of memory, as a test has it" in text and "EngineDeadError" in text


def test_server_refuses_an_unknown_key_before_it_starts_an_engine(model, tmp_path):
    log = tmp_path / "log"
    with tiny(log, model, {"mac": {"treshold": 0.5}}) as (process, port):
        assert not healthy(process, port)
        assert process.returncode != 0
    text = log.read_text()
    last = text.rstrip().splitlines()[-1]
    assert "treshold: unknown key, received 0.5 (float)" in last and "did you mean 'threshold'?" in last
    assert text.count("Traceback") == 1 and "EngineCore" not in text
