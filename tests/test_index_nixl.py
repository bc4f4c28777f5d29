"""With `rule: index`, prefill and decode engines that exchange pages by NIXL, through vLLM's own connector.

NIXL copies memory between processes, on CPUs too. Pages arrive with the index that the other engine made by its own maps.
"""

import pytest
import torch

from support import engine as harness
from support.engine import Add
from support.index_engine import CONFIG, check_pages, counts, forget, layers, set_tolerance
from support.index_shadow import index_shadow
from support.nixl_engine import NO_CORES, asking, needs_nixl, prefills, side_channel, transfer
from support.scenarios import text
from vllm_mac import nixl

pytestmark = pytest.mark.cpu
NEW, HEADS, LAYERS = 24, 8, 2
EXACT = {"mac": CONFIG | {"tolerance": 0.0}}
OPTIONS = {"prefix_caching": True, "chunk": 1024}
TEACHER = Add(0, "teacher", text("teacher", 700), 2)
SHARED = text("shared", 200)
PROMPTS = {"a": SHARED + text("a", 150), "b": SHARED + text("b", 61), "c": text("c", 333), "d": text("d", 30)}


@pytest.fixture(scope="module")
def prefill(model):
    """An engine that prefills, in a process of its own: `prefill(prompt)`."""
    with prefills(model, EXACT, OPTIONS) as prefill:
        yield prefill


@pytest.fixture(scope="module")
def exact(model):
    """What vLLM's own backend says, in one engine."""
    with harness.engine(model, **OPTIONS) as llm:
        return harness.run_schedule(llm, asking(PROMPTS, NEW, {})).tokens


@pytest.fixture
def decodes(model, monkeypatch):
    """An engine that decodes: `decodes(runner, backend, block_size)`."""
    from vllm.platforms import current_platform

    contexts = []
    monkeypatch.setattr(type(current_platform), "discover_numa_topology", NO_CORES)
    for name, value in side_channel().items():
        monkeypatch.setenv(name, value)

    def start(runner="v1", backend="MAC", block_size=32):
        options = OPTIONS | {"block_size": block_size, "kv_transfer_config": transfer("kv_consumer")}
        context = harness.engine(model, runner, backend, EXACT if backend else None, **options)
        llm = context.__enter__()
        contexts.append(context)
        return llm

    yield start
    for context in contexts:
        context.__exit__(None, None, None)


@needs_nixl
@pytest.mark.parametrize("runner", harness.RUNNERS)
def test_pages_that_came_by_nixl_are_indexed(prefill, exact, decodes, runner):
    llm = decodes(runner)
    harness.run_schedule(llm, [TEACHER])  # an engine that computes no prompts has no maps
    assert all(layer.index.maps.ready for layer in layers(llm))
    forget(llm)
    said = {name: prefill(prompt) for name, prompt in PROMPTS.items()}
    assert {name: token for name, (token, _) in said.items()} == {name: exact[name][0] for name in PROMPTS}

    # All of a prompt comes from outside but for its last token.
    run = harness.run_schedule(llm, asking(PROMPTS, NEW, {name: params for name, (_, params) in said.items()}))
    assert run.cached == {name: len(prompt) - 1 for name, prompt in PROMPTS.items()}
    found = counts(llm)
    assert run.tokens == exact and found["SKIPPED"] == 0
    # The first step of a request is read whole, those after it look up, but for the short one's.
    assert found["HIT"] == 3 * (NEW - 1) * LAYERS * HEADS and check_pages(llm) > 20

    set_tolerance(llm, 0.7)
    again = {name: prefill(prompt)[1] for name, prompt in PROMPTS.items()}
    with index_shadow(llm) as watch:
        harness.run_schedule(llm, asking(PROMPTS, NEW, again))
    assert watch.worst < 1e-4 and watch.looked > 50 and watch.pages > 200 and watch.first > 0
    assert counts(llm)["SKIPPED"] > 0 and check_pages(llm) > 20


# Nothing is copied before: MAC sees how the other engine cuts its pages, and vLLM the names of the backends.
OTHERS = [
    ("MAC", 64, "differ in tokens of a block (--block-size): 64 here, 32 there"),
    (None, 32, "NIXL compatibility hash mismatch"),
]


@needs_nixl
@pytest.mark.parametrize("backend, block_size, reason", OTHERS)
def test_pages_of_other_engines_are_refused(prefill, decodes, monkeypatch, backend, block_size, reason):
    """The request fails, as vLLM's `kv_load_failure_policy` has it, and the engine goes on."""
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.base_worker import NixlBaseConnectorWorker

    errors = []
    monkeypatch.setattr(
        NixlBaseConnectorWorker, "_log_failure", lambda self, *_, error=None, **__: errors.append(str(error))
    )
    llm = decodes("v1", backend, block_size)
    _, params = prefill(PROMPTS["a"])
    run = harness.run_schedule(llm, [Add(0, "a", PROMPTS["a"], NEW, {"kv_transfer_params": params})])
    assert run.tokens["a"] == [] and errors and all(reason in error for error in errors)
    assert len(harness.run_schedule(llm, [Add(0, "a", PROMPTS["a"], NEW)]).tokens["a"]) == NEW


CUTS = [
    ((2, 32, "LBHNC"), None),
    ((1, 32, "LBHNC"), "differ in KV heads of a rank (--tensor-parallel-size): 2 here, 1 there"),
    ((2, 64, "LBNHC"), "(--block-size): 32 here, 64 there; KV cache layout: LBHNC here, LBNHC there"),
]


@pytest.mark.parametrize("theirs, said", CUTS)
def test_engines_that_cut_pages_otherwise_are_told(theirs, said):
    """vLLM checks lengths alone, and half of a page with an index is as long as a page of half the heads."""
    found = nixl.cuts_differ((2, 32, "LBHNC"), theirs)
    assert found is None if said is None else found.endswith(said)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3)])
def test_a_view_of_whole_pages(order):
    """Head by head or token by token; the second of two layers in one allocation."""
    blocks, page, shape = 3, 160, (3, 2, 4, 16)
    memory = torch.arange(2 * blocks * page)
    inner = torch.empty([shape[i] for i in order]).permute(order).stride()
    cache = memory.as_strided(shape, (page, *inner[1:]), blocks * page)
    whole = nixl.whole_pages(cache)
    assert whole.shape == (blocks, 1, 1, page) and whole.is_contiguous()
    assert torch.equal(whole.flatten(), memory[blocks * page :])
    plain = torch.empty([shape[i] for i in order]).permute(order)
    assert nixl.whole_pages(plain) is plain
