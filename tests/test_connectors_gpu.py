"""On a GPU, with `rule: index`: pages that come from another engine by NIXL, or out of an LMCache server.

* In eager engines every decode step of a layer is the oracle's (`vllm_mac.lookup.decode`).
* In full CUDA graphs requests are looked up from their second step on, and skip tokens.
* Pages have the index of their own keys in the end. Tokens are those of an engine that computes the prompts itself, but
  where rounding parts them: what is loaded to the last token decodes where the other engine prefills.

With several GPUs the engine that prefills for NIXL runs on the last one.

python -m pytest tests/test_connectors_gpu.py -m gpu -s
"""

from importlib.util import find_spec

import pytest
import torch

from support import engine as harness
from support.engine import Add, Run
from support.index_engine import Watch, check_pages, counts, forget, layers, watched
from support.lmcache_server import LONG, lmcache, settle
from support.nixl_engine import prefills, side_channel, transfer
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
SHARED = text("shared", 700)
PROMPTS = {"a": SHARED + text("a", 500), "b": SHARED + text("b", 221), "c": text("c", 1111), "d": text("d", 20 * PAGE)}


def events(transfers: dict[str, dict]) -> list[Add]:
    """The prompts, 3 steps apart. transfers: by request, what the other engine said of its pages."""
    return [
        Add(3 * i, name, prompt, NEW, {"kv_transfer_params": transfers[name]} if transfers else None)
        for i, (name, prompt) in enumerate(PROMPTS.items())
    ]


def teach(llm) -> None:
    """Have an engine learn maps of a text of its own, and count anew."""
    harness.run_schedule(llm, [Add(0, "teacher", text("teacher", 900), 2)], **LONG)
    assert all(layer.index.maps.ready for layer in layers(llm))
    settle(llm)
    forget(llm)


def load(llm, kind: str, asked: list[Add]) -> tuple[Run, Watch, dict[str, int]]:
    """Run requests whose pages come from outside."""
    watch = Watch()
    if kind == "eager":
        with watched() as watch:
            run = harness.run_schedule(llm, asked, **LONG)
    else:
        run = harness.run_schedule(llm, asked, **LONG)
    found = counts(llm)
    print(f"\n{kind}: {run.cached} {found} {watch}")
    return run, watch, found


def check(kind: str, run: Run, watch: Watch, found: dict[str, int], exact: dict[str, list[int]], heads: int) -> None:
    """heads: of all layers."""
    assert all(run.tokens[name][0] == tokens[0] for name, tokens in exact.items())
    alike = [sum(a == b for a, b in zip(run.tokens[name], tokens, strict=True)) for name, tokens in exact.items()]
    print(f"\ntokens of {NEW} that agree: {alike}")
    # All steps of a request but its first look up, and that too where some of the prompt is computed here.
    assert (NEW - 1) * len(PROMPTS) * heads <= found["HIT"] <= NEW * len(PROMPTS) * heads and found["NO_MAPS"] == 0
    assert (found["SKIPPED"] > 0) == (kind == "graphs")
    if kind == "eager":
        assert sum(alike) > 0.5 * NEW * len(PROMPTS)
        assert watch.steps > 0 and watch.worst <= 2 * torch.finfo(torch.bfloat16).eps


@pytest.fixture(scope="module")
def exact(byte_model):
    """What an engine says that computes the prompts, and reads everything."""
    with harness.engine(byte_model, "v2", "MAC", EXACT, **OPTIONS) as llm:
        return harness.run_schedule(llm, events({})).tokens


@pytest.fixture(scope="module")
def prefill(byte_model):
    """An engine that prefills, in a process of its own: `prefill(prompt)`."""
    with prefills(byte_model, EXACT, OPTIONS, runner="v2", device="cuda") as prefill:
        yield prefill


@pytest.mark.skipif(find_spec("nixl") is None, reason="needs NIXL: pip install nixl")
@pytest.mark.parametrize("kind", KINDS)
def test_pages_that_came_by_nixl_are_indexed(byte_model, exact, prefill, monkeypatch, kind):
    config, options = KINDS[kind]
    for name, value in side_channel().items():
        monkeypatch.setenv(name, value)
    options = OPTIONS | options | {"kv_transfer_config": transfer("kv_consumer", "cuda")}
    with harness.engine(byte_model, "v2", "MAC", config, **options) as llm:
        teach(llm)
        said = {name: prefill(prompt) for name, prompt in PROMPTS.items()}
        run, watch, found = load(llm, kind, events({name: params for name, (_, params) in said.items()}))
        assert run.cached == {name: len(prompt) - 1 for name, prompt in PROMPTS.items()}
        assert {name: token for name, (token, _) in said.items()} == {name: exact[name][0] for name in PROMPTS}
        check(kind, run, watch, found, exact, sum(layer.num_heads for layer in layers(llm)))
        assert check_pages(llm) > 40


@pytest.mark.skipif(find_spec("lmcache") is None, reason="needs LMCache: pip install --no-deps lmcache")
def test_what_lmcache_hands_over_is_indexed(byte_model, exact, tmp_path):
    """One engine computes the prompts, and then others load them."""
    stored = {"a": 1152, "b": 896, "c": 1088, "d": 1279}  # whole chunks, but for a prompt's last token
    with lmcache(tmp_path, "lmcache_driven", chunk=PAGE) as transfer:
        options = OPTIONS | {"kv_transfer_config": transfer}
        with harness.engine(byte_model, "v2", "MAC", EXACT, **options) as llm:
            run = harness.run_schedule(llm, events({}), **LONG)
            assert run.tokens == exact
            settle(llm)
        for kind, (config, own) in KINDS.items():
            with harness.engine(byte_model, "v2", "MAC", config, **options | own) as llm:
                teach(llm)
                run, watch, found = load(llm, kind, events({}))
                assert run.cached == stored
                check(kind, run, watch, found, exact, sum(layer.num_heads for layer in layers(llm)))
                assert check_pages(llm) > 40
                settle(llm)
