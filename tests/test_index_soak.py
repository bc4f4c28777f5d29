"""A hundred requests and more of every kind against one engine with `rule: index`, in a KV cache that is too small for them.

MAC_SOAK_REQUESTS=6000 pytest tests/test_index_soak.py     # longer; MAC_SOAK_SEED=1 for others
"""

import gc
import os

import psutil
import pytest
import torch
from torch import Tensor

from support import engine as harness
from support.index_engine import CONFIG, OUTCOMES, check_pages, counts, layers, set_tolerance
from support.soak import Soak, preemptions
from vllm_mac import requests

pytestmark = pytest.mark.cpu
REQUESTS, SEED = int(os.environ.get("MAC_SOAK_REQUESTS", "192")), int(os.environ.get("MAC_SOAK_SEED", "0"))
HEADS, KV_HEADS, LAYERS = 8, 2, 2
OPTIONS = {"prefix_caching": True, "chunk": 192, "blocks": 40, "max_num_seqs": 8, "max_model_len": 768}
SPECULATION = {"method": "custom_class", "model": "support.drafts.Drafts", "num_speculative_tokens": 3}


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
