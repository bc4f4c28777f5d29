"""With `rule: index` and a KV connector: pages from outside are indexed anew before anything reads their index.

What a connector loads may have no index, or one of other maps. Blocks still hold the index of what was in them before.
"""

from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch

from support import engine as harness
from support.connectors import STORE, Connector
from support.engine import Add, Limits
from support.index_engine import CONFIG, check_pages, counts, forget, layers, set_tolerance
from support.index_shadow import index_shadow
from support.scenarios import text
from vllm_mac import connectors, kv_group
from vllm_mac.key_index import PageLayout

pytestmark = pytest.mark.cpu
NEW, HEADS, LAYERS = 24, 8, 2
EXACT = {"mac": CONFIG | {"tolerance": 0.0}}
OPTIONS = {"prefix_caching": True, "chunk": 1024}
TEACHER = Add(0, "teacher", text("teacher", 700), 2)
SHARED = text("shared", 200)
PROMPTS = {
    "a": SHARED + text("a", 150), "b": SHARED + text("b", 61), "c": text("c", 333), "d": text("d", 190),
    "e": SHARED + text("e", 3),
}  # fmt: skip


def events(*names: str) -> list[Add]:
    return [Add(3 * i, name, PROMPTS[name], NEW) for i, name in enumerate(names or PROMPTS)]


@pytest.fixture(scope="module")
def exact(model):
    """What vLLM's own backend says, without a connector."""
    with harness.engine(model, **OPTIONS) as llm:
        return harness.run_schedule(llm, events()).tokens


@pytest.fixture(scope="module")
def stored(model):
    """Fills `STORE` with three of the prompts, by an engine that has no maps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(connectors, "CONNECTORS", (*connectors.CONNECTORS, "TestConnector"))
        with harness.engine(model, "v1", "MAC", EXACT, **OPTIONS, kv_transfer_config=Connector.config("sync")) as llm:
            harness.run_schedule(llm, events("a", "c", "d"))
        yield dict(STORE)
    STORE.clear()


@pytest.fixture
def handed(model, monkeypatch, stored):
    """An engine that is handed what is stored: `handed(mode, most, runner)`, with maps of its own."""
    monkeypatch.setattr(Connector, "failures", 0)
    STORE.clear()
    STORE.update(stored)
    contexts = []

    def start(mode, most=None, runner="v1", teach=True):
        transfer = Connector.config(mode, most)
        context = harness.engine(model, runner, "MAC", EXACT, **OPTIONS, kv_transfer_config=transfer)
        llm = context.__enter__()
        contexts.append(context)
        if teach:
            harness.run_schedule(llm, [TEACHER])
            # Blocks that are given out next hold the index of the teacher's keys.
            assert all(layer.index.maps.ready for layer in layers(llm))
        forget(llm)
        return llm

    yield start
    for context in contexts:
        context.__exit__(None, None, None)


# Whole prompts but for their last token, as in a decode engine; and a part that ends inside a page.
WAYS = [
    ("sync", None, "v1"), ("layers", 117, "v1"), ("async", None, "v1"), ("fails", None, "v1"), ("late", None, "v1"),
    ("layers", None, "v2"), ("async", 117, "v2"),
]  # fmt: skip


@pytest.mark.parametrize("mode, most, runner", WAYS)
def test_what_was_handed_over_is_indexed(handed, exact, mode, most, runner):
    llm = handed(mode, most, runner)
    run = harness.run_schedule(llm, events())
    found = [run.cached[name] for name in ("a", "c", "d")]
    assert found == [most or len(PROMPTS[name]) - 1 for name in ("a", "c", "d")] or mode == "late"
    assert Connector.failures == (mode in ("fails", "late"))
    assert run.tokens == exact and counts(llm)["SKIPPED"] == 0 < counts(llm)["HIT"]
    assert check_pages(llm) > 20

    set_tolerance(llm, 1.0)
    Connector.failures = 0
    with index_shadow(llm) as watch:
        harness.run_schedule(llm, events(), Limits(blocks=40))
    assert check_pages(llm) > 10
    assert watch.worst < 1e-4 and watch.looked > 50 and watch.pages > 200
    # A prompt that came whole decodes its first token with all that it has, in each layer.
    assert bool(watch.first) == (most is None)
    assert counts(llm)["SKIPPED"] > 0


def test_without_indexing_anew_the_index_is_that_of_other_keys(handed, monkeypatch):
    """What the other tests of this file would miss if they could."""
    monkeypatch.setattr(kv_group.Group, "index_begun", lambda *_: None)
    llm = handed("sync")
    harness.run_schedule(llm, events())
    with pytest.raises(AssertionError, match="codes of page"):
        check_pages(llm)


def test_an_engine_that_computes_no_prompt_reads_everything_and_says_so(handed, exact, monkeypatch):
    said = []
    monkeypatch.setattr("vllm_mac.learning.logger.warning_once", lambda text, *values: said.append(text % values))
    llm = handed("sync", teach=False)
    assert harness.run_schedule(llm, events("a", "c")).tokens == {name: exact[name] for name in ("a", "c")}
    found = counts(llm)
    assert found["HIT"] == 0 and found["NO_MAPS"] == 2 * (NEW - 1) * LAYERS * HEADS
    assert found["REQUEST"] == 2 * LAYERS * HEADS and "64 tokens or more are computed here" in said[0]
    # One that has 64 tokens of its own teaches the maps, by keys that came from outside too.
    longer = [Add(0, "longer", PROMPTS["c"] + text("own", 64), NEW)]
    run = harness.run_schedule(llm, longer)
    assert run.cached["longer"] == len(PROMPTS["c"]) and counts(llm)["HIT"] == (NEW - 1) * LAYERS * HEADS
    assert layers(llm)[0].group.lessons.longest == len(PROMPTS["c"]) + 64 and check_pages(llm) > 8
    said.clear()
    harness.run_schedule(llm, events("a"))
    assert not said


def test_prefixes_from_vllm_s_example_connector(model, exact, tmp_path):
    """Two engines hand prompts over by files, of which the second's maps and KV blocks know nothing."""
    transfer = {
        "kv_connector": "ExampleConnector", "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(tmp_path)},
    }  # fmt: skip
    asked = events("c", "d")
    with harness.engine(model, "v1", "MAC", EXACT, **OPTIONS, kv_transfer_config=transfer) as llm:
        first = harness.run_schedule(llm, asked)
        assert not first.cached["c"]
    with harness.engine(model, "v1", "MAC", EXACT, **OPTIONS, kv_transfer_config=transfer) as llm:
        harness.run_schedule(llm, [TEACHER])
        second = harness.run_schedule(llm, asked)
        assert second.cached["c"] == 320 and second.cached["d"] == 160
        assert first.tokens == second.tokens == {name: exact[name] for name in ("c", "d")}
        assert counts(llm)["HIT"] > 0 and check_pages(llm) > 10
        set_tolerance(llm, 1.0)
        with index_shadow(llm) as watch:
            harness.run_schedule(llm, asked)
        assert watch.worst < 1e-4 and watch.looked > 50 and check_pages(llm) > 10


def test_what_native_offload_copies_is_all_of_a_page_s_keys_and_values(model, monkeypatch):
    """Both workers copy pages by their bytes. They run on GPUs only; here they register an engine's own cache."""
    from vllm.distributed.kv_transfer.kv_connector.v1.offloading.worker import OffloadingConnectorWorker
    from vllm.v1.simple_kv_offload import worker as simple

    with harness.engine(model, "v1", "MAC", EXACT, **OPTIONS) as llm:
        harness.run_schedule(llm, [TEACHER])
        one, runner = harness.worker(llm), harness.worker(llm).model_runner
        caches = {layer.name: layer.cache for layer in layers(llm)}
        layout, config = PageLayout.of(layers(llm)[0].cache, layers(llm)[0].index.maps), runner.kv_cache_config
        raw = {name: whole_pages(cache, layout) for name, cache in caches.items()}
        before = {name: rows.clone() for name, rows in raw.items()}
        seen = []
        spec = SimpleNamespace(
            replicated_layout=True, config=SimpleNamespace(canonical_layout=True), get_worker=seen.append
        )
        OffloadingConnectorWorker(spec, one.vllm_config, config).register_kv_caches(caches)
        (canonical,) = seen
        (refs,) = canonical.group_data_refs
        assert len(refs) == LAYERS and {ref.page_size_bytes for ref in refs} == {layout.kv_bytes}
        for ref, rows in zip(refs, raw.values(), strict=True):
            pages = canonical.tensors[ref.tensor_idx].tensor
            kept = pages[:, : ref.page_size_bytes].clone()
            rows.fill_(7)
            pages[:, : ref.page_size_bytes] = kept
        for name, rows in raw.items():
            kv = layout.kv_bytes
            assert torch.equal(rows[:, :kv], before[name][:, :kv]) and (rows[:, kv:] == 7).all(), "an index is lost"

        monkeypatch.setattr(torch.cuda, "Stream", MagicMock(priority_range=lambda: (0, 0)))
        monkeypatch.setattr(simple.SimpleCPUOffloadWorker, "_init_cpu_mode", lambda self, *_: None)
        copies = simple.SimpleCPUOffloadWorker(one.vllm_config, config, 1 << 30)
        copies.register_kv_caches(caches)
        regions = copies.gpu_kv_caches
        assert {name: region.data_ptr() for name, region in regions.items()} == {
            name: cache.data_ptr() for name, cache in caches.items()
        }
        assert {(tuple(region.shape), region.stride(0)) for region in regions.values()} == {
            ((config.num_blocks, layout.padded_bytes), layout.padded_bytes)
        }


def whole_pages(cache: torch.Tensor, layout: PageLayout) -> torch.Tensor:
    """The bytes of each page of a layer, its index among them, `[blocks, padded bytes]`."""
    size = cache.itemsize
    page = torch.as_strided(cache, (len(cache), layout.padded_bytes // size), (cache.stride(0), 1))
    return page.view(torch.uint8)


def test_models_of_which_only_some_layers_have_an_index(models, stored):
    """vLLM gives all layers one group of pages beside a connector that knows of one group only.

    On CPUs it packs the pages of layers that MAC leaves exact, so that only whole ones can be handed over.
    """
    STORE.clear()
    prompt = [Add(0, "a", text("a", 300), NEW)]
    with harness.engine(models("gemma3"), **OPTIONS) as llm:
        exact = harness.run_schedule(llm, prompt).tokens
    with harness.engine(
        models("gemma3"), "v1", "MAC", EXACT, **OPTIONS, kv_transfer_config=Connector.config("sync", 288)
    ) as llm:
        harness.run_schedule(llm, [TEACHER])
        assert harness.run_schedule(llm, prompt).tokens == exact
        again = harness.run_schedule(llm, prompt)
        assert again.tokens == exact and again.cached["a"] == 288 and check_pages(llm) > 8
