"""With `rule: index`, a server over two data-parallel engines: each has maps and counters of its own."""

import signal
import urllib.request
from collections import Counter

import pytest
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

from support import engine as harness
from support.engine import Add
from support.index_engine import CONFIG
from support.scenarios import text
from support.servers import healthy, tiny
from vllm_mac import metrics

pytestmark = pytest.mark.cpu
NEW, LAYERS, HEADS = 12, 2, 8
EVENTS = [Add(0, str(i), text(str(i), 170 + 20 * i), NEW) for i in range(8)]


def complete(port: int, prompts: list[list[int]]) -> list[list[int]]:
    """The tokens that a server generates for each of the prompts, all at once."""
    with OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none") as client:
        answer = client.completions.create(
            model="tiny", prompt=prompts, max_tokens=NEW, temperature=0,
            extra_body={"ignore_eos": True, "return_token_ids": True},
        )  # fmt: skip
    return [choice.token_ids for choice in answer.choices]


def counted(port: int) -> dict[str, Counter]:
    """By engine, query heads by outcome and KV tokens by kind, over all layers."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        families = text_string_to_metric_families(answer.read().decode())
    found: dict[str, Counter] = {}
    for sample in (sample for family in families for sample in family.samples):
        if sample.name in (metrics.HEADS, metrics.KV_TOKENS):
            kind = sample.labels.get("outcome") or sample.labels["kind"]
            found.setdefault(sample.labels["engine"], Counter())[kind] += int(sample.value)
    return found


def test_two_engines_say_what_one_says(model, tmp_path):
    """At tolerance 0, eight requests at once, of which each engine has some. All of their decoding is looked up."""
    log = tmp_path / "log"
    with tiny(
        log, model, {"mac": CONFIG | {"tolerance": 0.0}}, "--data-parallel-size", "2", "--api-server-count", "1",
        "--max-num-seqs", "8", VLLM_CPU_OMP_THREADS_BIND="nobind",
    ) as (process, port):  # fmt: skip
        with harness.engine(model) as llm:  # while the server starts
            exact = harness.run_schedule(llm, EVENTS).tokens
        assert healthy(process, port, patience=900), log.read_text()
        said = complete(port, [event.prompt for event in EVENTS])
        found = counted(port)
        process.send_signal(signal.SIGINT)
        process.wait(60)
    assert said == [exact[event.id] for event in EVENTS]
    assert found.keys() == {"0", "1"} and all(engine["hit"] > 0 for engine in found.values()), found
    total = sum(found.values(), Counter())
    assert total["hit"] == len(EVENTS) * (NEW - 1) * LAYERS * HEADS
    assert total["miss"] == total["exact"] == total["skipped"] == 0 < total["read"]
