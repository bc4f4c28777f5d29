"""A hundred requests and more of every kind against one engine with `rule: index`, in a KV cache that is too small for them.

MAC_SOAK_REQUESTS=6000 pytest tests/test_index_soak.py     # longer; MAC_SOAK_SEED=1 for others
"""

import gc
import os
import random
from collections import Counter
from dataclasses import dataclass

import psutil
import pytest
import torch
from torch import Tensor
from vllm import SamplingParams

from support import engine as harness
from support.index_engine import CONFIG, OUTCOMES, check_pages, counts, layers, set_tolerance
from support.scenarios import text
from vllm_mac import requests

pytestmark = pytest.mark.cpu
REQUESTS, SEED = int(os.environ.get("MAC_SOAK_REQUESTS", "192")), int(os.environ.get("MAC_SOAK_SEED", "0"))
HEADS, KV_HEADS, LAYERS = 8, 2, 2
SHARED = [text(f"shared {i}", 40 + 70 * i) for i in range(4)]
OPTIONS = {"prefix_caching": True, "chunk": 192, "blocks": 40, "max_num_seqs": 8, "max_model_len": 768}
SPECULATION = {"method": "custom_class", "model": "support.drafts.Drafts", "num_speculative_tokens": 3}


@dataclass
class Request:
    """aborts: after so many of its tokens its client leaves; None where it stays."""

    prompt: list[int]
    new: int
    off: bool
    aborts: int | None

    @property
    def params(self) -> SamplingParams:
        asked = {"mac": "off"} if self.off else None
        return SamplingParams(
            temperature=0.0, max_tokens=self.new, ignore_eos=True, detokenize=False, extra_args=asked
        )  # fmt: skip


class Soak:
    """Random requests against an engine: they come and go.

    said: of each finished request its tokens. seen: what happened, by kind.
    """

    def __init__(self, llm, seed: int):
        self.llm, self.draw, self.seen = llm, random.Random(seed), Counter()
        self.requests: dict[str, Request] = {}
        self.said: dict[str, list[int]] = {}
        self.running: set[str] = set()
        self.name = seed  # of the next request

    def ask(self) -> Request:
        draw = self.draw
        prompt = draw.choice(SHARED)[: draw.randrange(20, 300)] if draw.random() < 0.6 else []
        if self.said and draw.random() < 0.2:  # a conversation goes on
            name = draw.choice(list(self.said)[-20:])
            prompt = (self.requests[name].prompt + self.said[name])[:400]
        prompt = prompt + [draw.randrange(256) for _ in range(draw.choice((1, 5, 40, 150, 330)))]
        new = draw.choice((1, 3, 10, 25, 60))
        return Request(prompt, new, draw.random() < 0.2, draw.randrange(new) if draw.random() < 0.15 else None)

    def run(self, most: int) -> None:
        """Until so many have come and all are gone."""
        core, came = self.llm.llm_engine, 0
        scheduler = core.engine_core.engine_core.scheduler
        while self.running or came < most:
            while came < most and len(self.running) < 12 and self.draw.random() < 0.4:
                name, came = f"{self.name:07}", came + 1
                self.name += 1
                self.requests[name] = request = self.ask()
                core.add_request(name, {"prompt_token_ids": request.prompt}, request.params)
                self.running.add(name)
                self.seen["off"] += request.off
            if self.draw.random() < 0.003:
                self.seen["resets"] += 1
                self.llm.reset_prefix_cache(reset_running_requests=True)
            for output in core.step():
                self.note(core, output)
            self.seen["steps"] += 1
            self.seen["most at once"] = max(self.seen["most at once"], len(scheduler.running))
        self.seen["requests"] += came

    def note(self, core, output) -> None:
        name, tokens = output.request_id, list(output.outputs[0].token_ids)
        request = self.requests[name]
        if output.finished:
            self.running.discard(name)
            self.said[name] = tokens
            self.seen["tokens"] += len(tokens)
            self.seen["cached tokens"] += output.num_cached_tokens or 0
        elif request.aborts is not None and len(tokens) > request.aborts:
            core.abort_request([name])
            self.running.discard(name)
            self.seen["aborted"] += 1


class Rows:
    """Tokens `decoded` so far; of them `off` by requests that opted out; the `context` in tokens of their rows."""

    def __init__(self, monkeypatch, llm):
        self.decoded = self.off = self.context = 0
        group = layers(llm)[0].group
        step = group.step

        def watched(common, block_table):
            made = step(common, block_table)
            rows, self.decoded = made.rows, self.decoded + len(made.token)
            tokens = torch.ones_like(rows.position) if rows.begin is None else rows.begin.diff()
            self.off += int(tokens[rows.ring == requests.OPTED_OUT].sum())
            self.context += int((rows.position + tokens).sum())
            return made

        monkeypatch.setattr(group, "step", watched)


def preemptions(llm, monkeypatch) -> Counter:
    """How many requests were thrown out of the KV cache, from now on."""
    scheduler, found = llm.llm_engine.engine_core.engine_core.scheduler, Counter()
    schedule = scheduler.schedule

    def watched(*args, **kwargs):
        output = schedule(*args, **kwargs)
        found["preempted"] += len(output.preempted_req_ids or ())
        found["drafted"] += sum(map(len, output.scheduled_spec_decode_tokens.values()))
        return output

    monkeypatch.setattr(scheduler, "schedule", watched)
    return found


def memory() -> tuple[int, int]:
    """Bytes of the process, and of the tensors that live."""
    gc.collect()
    tensors = {
        x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in gc.get_objects() if type(x) is Tensor
    }
    return psutil.Process().memory_info().rss, sum(tensors.values())


@pytest.mark.parametrize("speculating", [False, True], ids=["plain", "speculating"])
def test_soak(model, monkeypatch, speculating):
    own = {"speculative_config": SPECULATION} if speculating else {}
    with harness.engine(model, backend="MAC", additional_config={"mac": CONFIG}, **OPTIONS, **own) as llm:
        thrown, rows, soak, sizes, pages, parts = (
            preemptions(llm, monkeypatch),
            Rows(monkeypatch, llm),
            Soak(llm, SEED),
            [],
            0,
            8,
        )
        for _ in range(parts):
            soak.run(REQUESTS // parts // (1 + speculating))
            pages += check_pages(llm)
            sizes.append(memory())
        found, seen = counts(llm), soak.seen | thrown
        print(
            f"\n{dict(seen)} {found} rows {rows.decoded} pages {pages} sizes {[(size >> 20, own) for size, own in sizes]}"
        )
        assert sum(found[outcome] for outcome in OUTCOMES) == rows.decoded * LAYERS * HEADS
        assert found["REQUEST"] == rows.off * LAYERS * HEADS and found["MISS"] == found["NO_RING"] == 0
        # Where nearly all is read, reading the index comes on top.
        context = rows.context * LAYERS * KV_HEADS
        assert context <= found["READ"] + found["SKIPPED"] < 1.1 * context
        assert found["SKIPPED"] > 0.1 * context and seen["preempted"] > 2 and seen["aborted"] > 2 and seen["off"] > 5
        assert pages > 10 * parts and (not speculating or seen["drafted"] > 100)
        # What begins to run with the first requests is there after the first part.
        assert sizes[-1][1] <= sizes[1][1]

        # A sample at tolerance 0, as crowded.
        set_tolerance(llm, 0.0)
        sample = Soak(llm, 1000 + SEED)
        before = counts(llm)["SKIPPED"]
        sample.run(40)
        check_pages(llm)
        assert counts(llm)["SKIPPED"] == before
    with harness.engine(model, **OPTIONS | {"blocks": None}) as llm:
        names = list(sample.said)
        ask = [sample.requests[name] for name in names]
        outputs = llm.generate([{"prompt_token_ids": x.prompt} for x in ask], [x.params for x in ask], use_tqdm=False)
        assert len(names) > 20
        for name, output in zip(names, outputs, strict=True):
            assert sample.said[name] == list(output.outputs[0].token_ids), name
