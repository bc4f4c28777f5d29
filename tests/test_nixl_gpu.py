"""On a GPU, with `rule: index`: pages that come from another engine by NIXL.

* In eager engines every decode step of a layer is the oracle's (`vllm_mac.lookup.decode`).
* In full CUDA graphs requests are looked up from their second step on, and skip tokens.
* Pages have the index of their own keys in the end. Tokens are those of an engine that computes the prompts itself, but
  where rounding parts them: what is loaded to the last token decodes where the other engine prefills.

With several GPUs the engine that prefills for NIXL runs on the last one.

python -m pytest tests/test_nixl_gpu.py -m gpu -s
"""

from contextlib import nullcontext

import pytest
import torch

from support import engine as harness
from support.engine import Add
from support.index_engine import Watch, check_pages, counts, forget, layers, watched
from support.nixl_engine import asking, needs_nixl, prefills, side_channel, transfer
from support.scenarios import text

pytestmark = pytest.mark.gpu
NEW, PAGE = 24, 64
CONFIG = {"rule": "index", "min_step_mib": 0, "min_context": 256, "band": 64}
EXACT = {"mac": CONFIG | {"tolerance": 0.0}}
OPTIONS = {
    "prefix_caching": True, "chunk": 1024, "max_model_len": 4096, "dtype": "bfloat16", "block_size": PAGE,
    "memory": 256 << 20,
}  # fmt: skip
GRAPHS = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4, 8]}
# Eager at tolerance 0, and graphs that skip.
KINDS = {
    "eager": (EXACT, {}),
    "graphs": ({"mac": CONFIG | {"tolerance": 1.0}}, {"enforce_eager": False, "compilation_config": GRAPHS}),
}
TEACHER = Add(0, "teacher", text("teacher", 900), 2)
SHARED = text("shared", 700)
PROMPTS = {"a": SHARED + text("a", 500), "b": SHARED + text("b", 221), "c": text("c", 1111), "d": text("d", 20 * PAGE)}


@pytest.fixture(scope="module")
def exact(byte_model):
    """What an engine says that computes the prompts, and reads everything."""
    with harness.engine(byte_model, "v2", "MAC", EXACT, **OPTIONS) as llm:
        return harness.run_schedule(llm, asking(PROMPTS, NEW, {})).tokens


@pytest.fixture(scope="module")
def prefill(byte_model):
    """An engine that prefills, in a process of its own: `prefill(prompt)`."""
    with prefills(byte_model, EXACT, OPTIONS, runner="v2", device="cuda") as prefill:
        yield prefill


@needs_nixl
@pytest.mark.parametrize("kind", KINDS)
def test_pages_that_came_by_nixl_are_indexed(byte_model, exact, prefill, monkeypatch, kind):
    config, options = KINDS[kind]
    for name, value in side_channel().items():
        monkeypatch.setenv(name, value)
    options = OPTIONS | options | {"kv_transfer_config": transfer("kv_consumer", "cuda")}
    with harness.engine(byte_model, "v2", "MAC", config, **options) as llm:
        harness.run_schedule(llm, [TEACHER])  # an engine that computes no prompts has no maps
        assert all(layer.index.maps.ready for layer in layers(llm))
        forget(llm)
        said = {name: prefill(prompt) for name, prompt in PROMPTS.items()}
        assert {name: token for name, (token, _) in said.items()} == {name: exact[name][0] for name in PROMPTS}

        # All of a prompt comes from outside but for its last token.
        with watched() if kind == "eager" else nullcontext(Watch()) as watch:
            run = harness.run_schedule(
                llm, asking(PROMPTS, NEW, {name: params for name, (_, params) in said.items()}), max_steps=100_000
            )
        found, heads = counts(llm), sum(layer.num_heads for layer in layers(llm))
        alike = [sum(a == b for a, b in zip(run.tokens[name], exact[name], strict=True)) for name in PROMPTS]
        print(f"\n{kind}: {dict(run.cached)} {found} {watch}; tokens of {NEW} that agree: {alike}")
        assert run.cached == {name: len(prompt) - 1 for name, prompt in PROMPTS.items()}
        assert all(run.tokens[name][0] == exact[name][0] for name in PROMPTS)
        # The first step of a request is read whole, those after it look up.
        assert found["HIT"] == (NEW - 1) * len(PROMPTS) * heads and found["REQUEST"] == len(PROMPTS) * heads
        assert (found["SKIPPED"] > 0) == (kind == "graphs") and check_pages(llm) > 40
        if kind == "eager":
            assert sum(alike) > 0.5 * NEW * len(PROMPTS)
            # Weights are rounded to the cache's dtype, the output to the model's: half a step each, twice for sums of float32.
            assert watch.steps > 0 and watch.worst <= 2 * torch.finfo(torch.bfloat16).eps
