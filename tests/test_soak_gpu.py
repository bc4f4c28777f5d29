"""On a GPU, with `rule: index`, in full CUDA graphs: requests of every kind, in a KV cache that is too small for them.

MAC_SOAK_REQUESTS=3000 python -m pytest tests/test_soak_gpu.py -m gpu -s
"""

import os

import pytest
import torch

from support import engine as harness
from support.index_engine import OUTCOMES, check_pages, counts, layers
from support.soak import Soak, preemptions

pytestmark = pytest.mark.gpu
REQUESTS, SEED = int(os.environ.get("MAC_SOAK_REQUESTS", "240")), int(os.environ.get("MAC_SOAK_SEED", "0"))
CONFIG = {"rule": "index", "min_step_mib": 0, "min_context": 256, "band": 64, "tolerance": 1.0}
GRAPHS = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4, 8]}
SCALE, PARTS = 5, 8  # prompts of up to 3,150 tokens


def test_soak(byte_model, monkeypatch):
    with harness.engine(
        byte_model, "v2", "MAC", {"mac": CONFIG}, chunk=1024, prefix_caching=True, max_model_len=4096, dtype="bfloat16",
        block_size=64, blocks=120, max_num_seqs=8, compilation_config=GRAPHS, async_scheduling=False,
    ) as llm:  # fmt: skip
        thrown, soak, pages, sizes = preemptions(llm, monkeypatch), Soak(llm, SEED, SCALE), [], []
        for _ in range(PARTS):
            soak.run(REQUESTS // PARTS)
            pages.append(check_pages(llm))
            sizes.append(torch.cuda.memory_allocated())
        found, seen, group = counts(llm), soak.seen | thrown, layers(llm)[0].group
        print(f"\n{dict(seen)} {found} decoded {group.decoded} context {group.context} pages {pages} memory {sizes}")
        heads = sum(layer.num_heads for layer in layers(llm))
        assert sum(found[outcome] for outcome in OUTCOMES) == group.decoded * heads
        kv_heads = sum(layer.num_kv_heads for layer in layers(llm))
        context = group.context * kv_heads
        # Where nearly all is read, reading the index comes on top.
        assert context <= found["READ"] + found["SKIPPED"] < 1.1 * context and found["SKIPPED"] > 0.1 * context
        assert seen["preempted"] > 2 and seen["aborted"] > 2 and seen["off"] > 5
        assert sorted(pages)[PARTS // 2] > 20  # a part may end where the prefix cache was emptied
        assert sizes[-1] <= sizes[1]
