"""Clients of others, unchanged, against a real server with MAC: OpenAI's, vLLM's own benchmark, lm_eval."""

import json
import random
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections import Counter
from pathlib import Path

import pytest
import yaml

from support.servers import VLLM, environment, healthy, served
from vllm_mac.metrics import HEADS, KV_TOKENS, summarise
from vllm_mac.tools.eval import tasks

pytestmark = pytest.mark.cpu

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
TESTBED = EXAMPLES / "testbed"
HEADS_A_TOKEN = 8 * 6  # query heads and layers of the testbed
# Short prompts that are yet longer than what MAC leaves alone.
MAC = {"band": 16, "min_context": 128}
PROMPT = "The colours of the rainbow are red, orange, yellow, green, blue, indigo and violet. " * 3


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """Of a server that was started as examples/serve has it, with the testbed and what a CPU needs."""
    log = tmp_path_factory.mktemp("server") / "log"
    with served(
        log, TESTBED, "--config", str(EXAMPLES / "serve" / "llama-3.1.yaml"), "--served-model-name", "testbed",
        "--max-model-len", "4096", "--max-num-seqs", "4", "--dtype", "float32", "--enforce-eager",
        "--additional-config", json.dumps({"mac": MAC}), "--worker-extension-cls", "vllm_mac.metrics.WorkerExtension",
        VLLM_SERVER_DEV_MODE="1",  # it offers /collective_rpc
    ) as (process, port):  # fmt: skip
        assert healthy(process, port), log.read_text()
        yield f"http://127.0.0.1:{port}"
        process.send_signal(signal.SIGINT)
        process.wait(60)


@pytest.fixture
def decoded(address):
    """A function that tells what was counted since the test began: (heads decoded, heads hit, KV tokens skipped)."""

    def read() -> Counter:
        body = json.dumps({"method": "mac_counters"}).encode()
        request = urllib.request.Request(f"{address}/collective_rpc", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as reply:
            (samples,) = json.load(reply)["results"]
        found = Counter()
        for name, labels, value in samples:
            if name == HEADS:
                found += Counter({"heads": value, labels["outcome"]: value})
            elif name == KV_TOKENS:
                found += Counter({labels["kind"]: value})
        assert summarise(samples).hit_rate == (found["hit"] / found["heads"] if found["heads"] else None)
        return found

    before = read()

    def since() -> tuple[float, ...]:
        now = read()
        return tuple(now[key] - before[key] for key in ("heads", "hit", "skipped"))

    return since


def run(*command: str, **changes: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False, env=environment(**changes))
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_example_client_asks_in_every_way(address, decoded):
    client = str(EXAMPLES / "serve" / "client.py")
    assert "--base-url" in run(sys.executable, client, "--help")
    said = run(sys.executable, client, "--base-url", f"{address}/v1", "--tokens", "24", PROMPT)
    told = re.findall(r"^(\S.*?) +[0-9.]+ s  (['\"].+)$", said, re.MULTILINE)
    assert [name for name, _ in told] == ["completion", "chat", "streamed", "MAC off"]
    assert all(len(text) > 2 for _, text in told)
    heads, hit, skipped = decoded()
    assert heads % HEADS_A_TOKEN == 0 and hit > 0 and skipped > 0


def test_the_example_client_names_a_server_that_is_not_there():
    client, nowhere = str(EXAMPLES / "serve" / "client.py"), "http://127.0.0.1:9/v1"
    done = subprocess.run([sys.executable, client, "--base-url", nowhere], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and nowhere in done.stderr and "Traceback" not in done.stderr


def test_vllm_bench_serve(address, decoded, tmp_path):
    run(
        *VLLM, "bench", "serve", "--base-url", address, "--model", "testbed", "--tokenizer", str(TESTBED),
        "--dataset-name", "random", "--random-input-len", "640", "--random-output-len", "24", "--num-prompts", "3",
        "--ignore-eos", "--save-result", "--result-dir", str(tmp_path), "--result-filename", "result.json",
    )  # fmt: skip
    found = json.loads((tmp_path / "result.json").read_text())
    assert (found["completed"], found["failed"], found["total_output_tokens"]) == (3, 0, 3 * 24)
    heads, hit, skipped = decoded()
    # The first token is the prompt's, the others are decoded; a trial request comes before those that count.
    assert heads >= 3 * 23 * HEADS_A_TOKEN and heads % (23 * HEADS_A_TOKEN) == 0
    assert hit > 0 and skipped > 0


@pytest.mark.skipif(not shutil.which("lm_eval"), reason="needs lm_eval's command (pip install 'lm_eval[api]', 760 MB)")
def test_lm_eval(address, decoded, tmp_path):
    """Its `local-completions` on a task of our own: no data set is fetched."""
    samples = [tasks.make("niah_single", random.Random(seed), 600, len) for seed in range(4)]
    lines = [{"asked": f"<|user|>{s.prompt}<|end|><|assistant|>{s.prefix}", "answer": s.answers[0]} for s in samples]
    (tmp_path / "numbers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    first = {"function": "take_first"}
    task = {
        "task": "numbers",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "numbers.jsonl")}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{asked}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 24, "do_sample": False},
        "filter_list": [{"name": "first", "filter": [{"function": "regex", "regex_pattern": r"(\d+)"}, first]}],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "numbers.yaml").write_text(yaml.safe_dump(task))
    server = f"model=testbed,base_url={address}/v1/completions,tokenizer_backend=None,max_retries=1"
    run(
        shutil.which("lm_eval"), "--model", "local-completions", "--model_args", server,
        "--include_path", str(tmp_path), "--tasks", "numbers", "--output_path", str(tmp_path / "out"),
        HF_HOME=str(tmp_path / "hf"), HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", PYTHONPATH="",
    )  # fmt: skip
    (path,) = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(path.read_text())
    assert found["n-samples"]["numbers"]["effective"] == 4
    assert found["results"]["numbers"]["exact_match,first"] >= 0.75
    heads, hit, skipped = decoded()
    assert heads > 0 and hit > 0 and skipped > 0
