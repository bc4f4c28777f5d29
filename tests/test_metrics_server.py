"""The counters of one request on the `/metrics` of real servers: one API server over two tensor-parallel workers, two
API servers over two data-parallel engines, and one with graphs on a GPU that sleeps between two requests."""

import json
import signal
import time
import urllib.request
from collections import Counter
from contextlib import contextmanager

import pytest
from byte_model import write_model, write_tokenizer
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

from support.servers import healthy, tiny
from vllm_mac import metrics
from vllm_mac.counter_files import PREFIX, folders, read

CONFIG = {"mac": {"window": 32, "band": 16, "min_context": 64, "threshold": 0.45, "audit": 0.5}}
LAYERS, HEADS, KV_HEADS = 2, 8, 2  # of `tiny_models`


@contextmanager
def server(model, log, *options: str, **variables: str):
    """A server that is healthy, and stopped as by a user's Ctrl-C; `(process, port)`."""
    # Workers share whatever cores there are: vLLM would have a NUMA node for each.
    variables = {"VLLM_LOG_STATS_INTERVAL": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"} | variables
    with tiny(log, model, CONFIG, *options, **variables) as (process, port):
        assert healthy(process, port, patience=900), log.read_text()  # five processes, and perhaps two cores
        yield process, port
        process.send_signal(signal.SIGINT)
        process.wait(60)


def scrape(port: int) -> dict[str, Counter]:
    """By engine, samples by their name and their labels' values but those of vLLM."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    found: dict[str, Counter] = {}
    for family in text_string_to_metric_families(text):
        for name, labels, value, *_ in family.samples if family.name.startswith("vllm_mac") else ():
            labels = dict(labels)
            assert labels.pop("model_name") == "tiny"
            of_engine = found.setdefault(labels.pop("engine"), Counter())
            key = name, *sorted(labels.values())
            assert key not in of_engine, "a sample twice"
            of_engine[key] = value
    assert "vllm:generation_tokens_total" in text  # vLLM's own are there as ever
    return found


def stream(port: int, prompt: str, tokens: int) -> int:
    """Stream one completion; the number of tokens of its prompt."""
    with OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none") as client:
        *_, last = client.completions.create(
            model="tiny", prompt=prompt, max_tokens=tokens, temperature=0, stream=True,
            stream_options={"include_usage": True}, extra_body={"ignore_eos": True},
        )  # fmt: skip
    assert last.usage.completion_tokens == tokens
    return last.usage.prompt_tokens


def check(added: Counter, prompt: int, tokens: int, count: int = LAYERS) -> None:
    """Exactly one request's: its first token comes of the prompt, and each of the others of one decode step."""
    lengths = range(prompt + 1, prompt + tokens)
    layers = {label for name, *labels in added if name == metrics.HEADS for label in labels if "layers" in label}
    assert len(layers) == count
    for layer in layers:
        at = lambda name, *labels: added[name, *sorted((layer, *labels))]
        hit, miss, exact = (at(metrics.HEADS, outcome) for outcome in ("hit", "miss", "exact"))
        assert hit + miss == len(lengths) * HEADS and hit > 0 and exact == 0
        read, skipped = (at(metrics.KV_TOKENS, kind) for kind in ("read", "skipped"))
        assert read + skipped == sum(lengths) * KV_HEADS and skipped > 0
        audited = at(f"{metrics.ERROR}_count")
        assert 0 < audited <= hit and audited == at(f"{metrics.CHAIN}_count") == at(f"{metrics.ERROR}_bucket", "+Inf")


def eventually(condition, patience: float = 20) -> bool:
    end = time.monotonic() + patience
    while not (found := condition()) and time.monotonic() < end:
        time.sleep(0.2)
    return found


@pytest.mark.cpu
def test_a_request_s_counters_over_two_tensor_parallel_workers(model, tmp_path):
    log = tmp_path / "log"
    with server(model, log, "--tensor-parallel-size", "2") as (process, port):
        before = scrape(port)
        assert before.keys() == {"0"} and before["0"][metrics.RINGS, "free"] == 4
        prompt = stream(port, "tell me " * 30, 20)
        after = scrape(port)
        check(after["0"] - before["0"], prompt, 20)
        bytes_of_one = HEADS * 32 * (32 * (4 + 4) + 4 + 4)  # window, head size, float32
        assert after["0"][metrics.RING_BYTES,] == 4 * LAYERS * bytes_of_one
        # The ring stays with what it holds, in case that the conversation goes on.
        rings = lambda: [scrape(port)["0"][metrics.RINGS, state] for state in ("active", "idle", "free")]
        assert eventually(lambda: rings() == [0, 1, 3]), rings()
        workers = [header["pid"] for header, _ in read(process.pid)]
        assert len(workers) == 2
        line = "MAC: hit rate "
        assert eventually(lambda: line in log.read_text())
        said = [text for text in log.read_text().splitlines() if line in text]
        assert all("Worker_TP0" in text and ", KV read " in text and " of 4 active" in text for text in said)
    # vLLM kills its workers when it stops, and what they leave the server removes.
    assert not [path for pid in workers for folder in folders() for path in folder.glob(f"{PREFIX}{pid}-*")]


@pytest.mark.cpu
def test_a_request_s_counters_with_two_api_servers_and_two_engines(model, tmp_path):
    log = tmp_path / "log"
    with server(model, log, "--data-parallel-size", "2", "--api-server-count", "2") as (_, port):
        before = scrape(port)
        assert before.keys() == {"0", "1"}
        prompt = stream(port, "tell me " * 30, 20)
        # Whichever API server answers, it says the same.
        answers = [scrape(port) for _ in range(4)]
        counted = lambda found: {key: n for key, n in found.items() if key[0] != metrics.RINGS}
        for engine in ("0", "1"):
            assert all(counted(answer[engine]) == counted(answers[0][engine]) for answer in answers)
        added = {engine: answers[0][engine] - before[engine] for engine in before}
        (ran,) = (engine for engine in added if any(key[0] == metrics.HEADS for key in added[engine]))
        check(added[ran], prompt, 20)
        prompt = stream(port, "and then " * 25, 10)
        total = Counter()
        for engine, counters in scrape(port).items():
            total += counters - before[engine] - added[engine]
        check(total, prompt, 10)


@pytest.mark.gpu
def test_a_request_s_counters_from_a_gpu_before_and_after_sleep(tmp_path):
    """The copy after each batch lands in the file by itself, and the file's memory stays page-locked through a sleep."""
    write_model(tmp_path)  # 8 query and 2 KV heads, as LAYERS etc. say, in 4 layers
    write_tokenizer(tmp_path)
    log = tmp_path / "log"
    graphs = {"cudagraph_capture_sizes": [1, 2, 4]}
    with server(
        tmp_path, log, "--dtype", "float16", "--no-enforce-eager", "--enable-sleep-mode",
        "--gpu-memory-utilization", "0.1", "--kv-cache-memory-bytes", str(256 << 20), "--compilation-config", json.dumps(graphs), VLLM_SERVER_DEV_MODE="1",
    ) as (process, port):  # fmt: skip
        before = scrape(port)["0"]
        prompt = stream(port, "tell me " * 30, 20)
        after = scrape(port)["0"]
        check(after - before, prompt, 20, 4)
        for path in ("sleep?level=1", "wake_up"):
            with urllib.request.urlopen(
                urllib.request.Request(f"http://127.0.0.1:{port}/{path}", method="POST"), timeout=60
            ) as answer:
                assert answer.status == 200
            heads = lambda found: {key: n for key, n in found.items() if key[0] == metrics.HEADS}
            assert heads(scrape(port)["0"]) == heads(after)
        prompt = stream(port, "and then " * 25, 10)
        check(scrape(port)["0"] - after, prompt, 10, 4)
        assert len(list(read(process.pid))) == 1
        assert "detour" not in log.read_text(), "CUDA did not page-lock the file"
