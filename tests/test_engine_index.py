"""By the default, `rule: index`, whole engines decode as it says, whatever the scheduler does with requests and pages.

Every step is compared with the rule written plainly (`index_shadow`), and so is the index in every complete page.
"""

import pytest

from support import engine as harness
from support.engine import Add, Limits, Preempt
from support.index_engine import rest
from support.index_shadow import index_shadow
from support.scenarios import SCENARIOS, text
from vllm_mac.counters import Count
from vllm_mac.layers import mac_layers

pytestmark = pytest.mark.cpu
CONFIG = {"min_context": 64, "band": 16}
LAYERS, HEADS, KV_HEADS = 2, 8, 2
# Both sides sum the same float32 products in other orders; see test_engine_reuse.
TOLERANCE = 1e-4
# What maps are learned from; they rest then, since no other prompt is 1.25 times as long.
TEACHER = Add(0, "teacher", text("teacher", 600), 2)

RUNS = [("v1", name, True in scenario.caching) for name, scenario in SCENARIOS.items()]
RUNS += [("v2", name, True) for name in ("chunked33", "prefix", "preempt_cached", "abort")]


def counts(llm) -> list[int]:
    """The counters of all layers together, by `Count`."""
    return sum(layer.counts for layer in layers(llm)).tolist()


def layers(llm) -> list:
    return mac_layers(harness.worker(llm).vllm_config)


def moved(llm, before: list[int]) -> dict[str, int]:
    return {
        Count(i).name: now - then for i, (now, then) in enumerate(zip(counts(llm), before, strict=True)) if now != then
    }


@pytest.fixture(scope="module")
def engines(model):
    """One engine per (runner, tolerance, prefix caching), the latest kept alive, with maps of one long prompt."""
    current = {}

    def get(runner, tolerance, caching):
        key = runner, tolerance, caching
        if key not in current:
            close()
            config = {"mac": CONFIG | {"tolerance": tolerance}}
            context = harness.engine(
                model,
                runner=runner,
                backend="MAC",
                prefix_caching=caching,
                additional_config=config,
                chunk=1024,
                rule=None,
            )
            current[key] = context, context.__enter__()
            harness.run_schedule(current[key][1], [TEACHER])
            assert all(layer.index.maps.ready for layer in layers(current[key][1]))
            rest(current[key][1])
        return current[key][1]

    def close():
        for context, _ in current.values():
            context.__exit__(None, None, None)
        current.clear()

    yield get
    close()


@pytest.mark.parametrize("runner,name,caching", sorted(RUNS, key=lambda run: (run[0], run[2])))
def test_every_step_is_the_rule_s(engines, runner, name, caching):
    scenario = SCENARIOS[name]
    llm = engines(runner, 1.0, caching)
    before = counts(llm)
    with index_shadow(llm) as watch:
        run = harness.run_schedule(llm, scenario.events, scenario.limits)
    assert set(scenario.missed(run)) <= {"all the same"}
    assert watch.rows > 50 and watch.chunks > 1 and watch.pages > 50
    assert watch.undecided <= watch.rows / 20
    assert watch.worst < TOLERANCE
    found = moved(llm, before)
    assert sum(found.get(kind, 0) for kind in ("HIT", "SHORT_CONTEXT")) == watch.rows * HEADS
    assert watch.undecided or found["READ"] == watch.read
    assert watch.looked > 0 or "SKIPPED" not in found


# Requests that look up much of their context, each alone, together, in chunks, and as prefixes of one another.
NEW = 24
SHARED = text("shared", 200)
PROMPTS = {"a": SHARED + text("a", 150), "b": SHARED + text("b", 60), "c": text("c", 333), "d": text("d", 190)}


def events(*names: str, **asked) -> list[Add]:
    return [Add(0, name, PROMPTS[name], NEW, asked.get(name)) for name in names]


@pytest.mark.parametrize("runner", harness.RUNNERS)
def test_a_request_gives_the_same_alone_and_beside_others(engines, runner):
    llm, alone = engines(runner, 1.0, True), {}
    for name in PROMPTS:
        before = counts(llm)
        alone |= harness.run_schedule(llm, events(name)).tokens
        found = moved(llm, before)
        assert (NEW - 1) * LAYERS * HEADS == found["HIT"] and found["READ"] > 0
        assert found["SKIPPED"] > 0.1 * found["READ"]
        # A KV head that reads nearly all, and the index on top, skips none.
        full = LAYERS * KV_HEADS * sum(len(PROMPTS[name]) + i for i in range(1, NEW))
        assert found["READ"] < full <= found["READ"] + found["SKIPPED"]
    together = harness.run_schedule(llm, events(*PROMPTS))
    assert together.batch == 4 and together.tokens == alone
    chunked = harness.run_schedule(llm, events(*PROMPTS), Limits(chunk=70))
    assert chunked.chunks["a"] > 1 and chunked.tokens == alone
    late = [Add(5 * i, name, PROMPTS[name], NEW) for i, name in enumerate(PROMPTS)]
    found = harness.run_schedule(llm, late, Limits(chunk=100))
    assert found.cached["b"] == 192 and found.mixed > 3 and found.tokens == alone


@pytest.fixture(scope="module")
def exact(model):
    """What vLLM's own backend makes of the prompts."""
    with harness.engine(model) as llm:
        return harness.run_schedule(llm, events(*PROMPTS)).tokens


@pytest.mark.parametrize("runner", harness.RUNNERS)
def test_tolerance_nought_gives_the_exact_tokens(engines, runner, exact):
    """Also of requests that are thrown out and come back, and whose pages others hold meanwhile."""
    llm = engines(runner, 0.0, True)
    before = counts(llm)
    assert harness.run_schedule(llm, events(*PROMPTS)).tokens == exact
    found = moved(llm, before)
    full = sum(LAYERS * KV_HEADS * (len(prompt) + i) for prompt in PROMPTS.values() for i in range(1, NEW))
    assert found["READ"] > full and "SKIPPED" not in found  # reading the index comes on top
    thrown = [*events(*PROMPTS), Preempt(12), Preempt(25)]
    for schedule, limits in ((thrown, Limits(chunk=100)), (events("a", "c"), Limits(blocks=22))):
        run = harness.run_schedule(llm, schedule, limits)
        assert run.preempted.total() > 0
        assert run.tokens == {name: exact[name] for name in run.tokens}


@pytest.mark.parametrize("runner", harness.RUNNERS)
def test_requests_that_opt_out_read_everything(engines, runner, exact):
    llm = engines(runner, 1.0, True)
    off = {"mac": "off"}
    before = counts(llm)
    with index_shadow(llm, opted_out={"a", "d"}) as watch:
        run = harness.run_schedule(llm, events(*PROMPTS, a=off, d=off))
    assert watch.worst < TOLERANCE and run.tokens["a"] == exact["a"] and run.tokens["d"] == exact["d"]
    found = moved(llm, before)
    assert found["REQUEST"] == found["HIT"] == 2 * (NEW - 1) * LAYERS * HEADS
    before = counts(llm)
    assert harness.run_schedule(llm, events("a", a=off)).tokens["a"] == exact["a"]
    full = LAYERS * KV_HEADS * sum(len(PROMPTS["a"]) + i for i in range(1, NEW))
    assert moved(llm, before) == {"REQUEST": (NEW - 1) * LAYERS * HEADS, "READ": full}


@pytest.mark.parametrize("runner", harness.RUNNERS)
def test_maps_are_made_of_the_first_long_prompt_and_of_longer_ones(model, runner):
    """Until then rows are read whole. Pages that are in use, in the cache or free are indexed anew."""
    config = {"mac": CONFIG | {"tolerance": 1.0}}
    with harness.engine(
        model, runner=runner, backend="MAC", prefix_caching=True, additional_config=config, chunk=1024, rule=None
    ) as llm:
        maps = [layer.index.maps for layer in layers(llm)]
        groups = {id(layer.group): layer.group for layer in layers(llm)}.values()
        learned = lambda: [group.lessons.longest for group in groups]
        versions = lambda: [x.to_key.clone() for x in maps]
        with index_shadow(llm) as watch:
            # A prompt that no step has 64 tokens of teaches nothing, so all is read.
            run = harness.run_schedule(llm, events("a", "c"), Limits(chunk=60))
            assert run.chunks["a"] > 3 and learned() == [0] and not any(x.ready for x in maps)
            found = moved(llm, [0] * len(Count))
            assert found == {"NO_MAPS": watch.rows * HEADS, "READ": watch.read} and watch.looked == 0
            # One that decodes while the maps are learned: `d`, then the longer `c`.
            both = [Add(0, "d", PROMPTS["d"], 60), Add(20, "c", PROMPTS["c"], NEW)]
            harness.run_schedule(llm, both)
            assert learned() == [len(PROMPTS["c"])] and all(x.ready for x in maps)
            before = versions()
            # 350 is not 1.25 times 333, and makes no maps as the third text; 420 is.
            harness.run_schedule(llm, events("a"))
            assert learned() == [333] and all((x == y).all() for x, y in zip(versions(), before, strict=True))
            harness.run_schedule(llm, [Add(0, "d", PROMPTS["d"], 40), Add(9, "long", text("long", 420), 8)])
            assert learned() == [420] and not any((x == y).all() for x, y in zip(versions(), before, strict=True))
        assert watch.looked > 50 and watch.worst < TOLERANCE


def test_an_engine_that_is_told_nothing_uses_the_index(model):
    prompt = text("long", 4200)
    with harness.engine(model, backend="MAC", max_model_len=4400, rule=None) as llm:
        harness.run_schedule(llm, [Add(0, "long", prompt, NEW), Add(0, "short", prompt[:4000], NEW)])
        assert all(layer.index is not None and layer.state is None for layer in layers(llm))
        found = moved(llm, [0] * len(Count))
    each = (NEW - 1) * LAYERS * HEADS
    assert found["HIT"] == found["SHORT_CONTEXT"] == each and 0 < found["SKIPPED"] and "NO_MAPS" not in found
