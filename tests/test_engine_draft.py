"""A whole engine that speculates with a draft model, which on V2 inherits the attention backend."""

import pytest

from support import engine as harness
from support.scenarios import text
from support.tiny_models import write
from vllm_mac import layers, metrics
from vllm_mac.layers import mac_layers

pytestmark = pytest.mark.cpu
CONFIG = {"mac": {"threshold": 1.0, "window": 32, "band": 16, "min_context": 64, "max_sequences": 3}}


@pytest.fixture
def said(monkeypatch):
    found = []
    for level in ("info", "warning"):
        monkeypatch.setattr(layers.logger, level, lambda line, *args: found.append(line % args))
    return found


@pytest.mark.parametrize("runner, name", [("v1", "qwen3"), ("v2", "llama")])
def test_a_draft_model_is_exact_and_leaves_the_other_served(tmp_path, said, runner, name):
    """A draft of the same shape shares the KV-cache group, and so the metadata builder, of what it drafts for."""
    target, draft = str(write("llama", tmp_path)), str(write(name, tmp_path, seed=1))
    events = [harness.Add(0, "a", text("a", 100), 8)]
    speculation = dict(method="draft_model", model=draft, num_speculative_tokens=2)
    with harness.engine(target, runner, "MAC", CONFIG, speculative_config=speculation) as llm:
        found = mac_layers(harness.worker(llm).vllm_config)
        served, drafting = found[:2], found[2:]
        # V1 chooses the draft's backend anew, and does not choose MAC.
        assert [layer.name.startswith("draft_model.") for layer in drafting] == [True] * (2 if runner == "v2" else 0)
        assert [(layer.exact, layer.state is not None) for layer in served] == [(None, True)] * 2
        assert [(layer.exact, layer.state is not None) for layer in drafting] == [("draft", False)] * len(drafting)
        assert all(layer.state.store.rings == 3 for layer in served)
        assert len([line for line in said if line.startswith("MAC serves 2 of 2 attention layers; 3 rings, ")]) == 1
        of_drafts = ["MAC leaves 2 attention layers of a draft model exact"] if drafting else []
        assert [line for line in said if "draft model" in line] == of_drafts
        assert len([line for line in said if line.startswith("MAC configuration: ")]) == 1
        assert not any("rotary" in line for line in said)

        first = harness.run_schedule(llm, events)
        samples = llm.collective_rpc(metrics.counters)[0]
        exact = metrics.summarise(samples).exact
        assert set(exact) <= {"short_context", "no_ring", "draft"} and bool(exact.get("draft")) == (runner == "v2")

        before, lines = [(layer.state, layer.rotary, layer.counts) for layer in served], len(said)
        llm.collective_rpc("reload_weights")
        after = [(layer.state, layer.rotary, layer.counts) for layer in served]
        assert all(x is y for one, other in zip(before, after, strict=True) for x, y in zip(one, other, strict=True))
        assert len(said) == lines
        again = harness.run_schedule(llm, events)
        assert again.tokens == first.tokens and len(again.tokens["a"]) == 8
    with harness.engine(target) as llm:
        plain = harness.run_schedule(llm, events)
    assert first.tokens == plain.tokens


@pytest.mark.parametrize("runner, name", [("v1", "qwen3"), ("v2", "llama"), ("v2", "qwen3")])
def test_a_draft_model_has_pages_like_those_with_an_index(tmp_path, runner, name):
    """Whichever backend V1 chooses for it: its layers share the KV-cache group of those that MAC serves, also where its heads
    and so its pages are larger."""
    target, draft = str(write("llama", tmp_path)), str(write(name, tmp_path, seed=1))
    events = [harness.Add(0, "a", text("a", 200), 12), harness.Add(0, "b", text("b", 300), 12)]
    speculation = dict(method="draft_model", model=draft, num_speculative_tokens=2)
    config = {"mac": {"min_context": 64, "band": 16, "tolerance": 0.0}}
    with harness.engine(target, runner, "MAC", config, rule=None, speculative_config=speculation) as llm:
        found = mac_layers(harness.worker(llm).vllm_config)
        assert [layer.index is not None for layer in found] == [True] * 2 + [False] * (len(found) - 2)
        (group,) = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_config.kv_cache_groups
        specs = getattr(group.kv_cache_spec, "kv_cache_specs", {"": group.kv_cache_spec}).values()
        assert len(group.layer_names) == 4 and all(spec.page_size_padded for spec in specs)
        run = harness.run_schedule(llm, events)
    with harness.engine(target) as llm:
        assert run.tokens == harness.run_schedule(llm, events).tokens
