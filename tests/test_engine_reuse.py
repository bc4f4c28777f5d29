"""With reuse on, a whole engine equals the plain reference run beside it, step by step.

Every event of `scenarios` is driven through vLLM's CPU engine in float32 while `shadow` runs
the method of `reference` on the same queries, keys and values, one ring per request.
"""

import pytest

from support import engine as harness
from support.scenarios import SCENARIOS, marathon
from support.shadow import shadow
from support.tiny_models import write
from vllm_mac import metrics

pytestmark = pytest.mark.cpu

# Small enough for contexts of a few hundred tokens; every option is met at least once.
SMALL = dict(window=32, band=16, min_context=64, threshold=0.45, mass_floor=None)
VARIANTS = {
    "anchored": SMALL,
    "chained": SMALL | dict(reuse="chained", sink=4, lag_weight=1.0),
    "weighed": SMALL | dict(threshold=0.5, mass_floor=0.1, sink=2),
    "capped": SMALL | dict(max_chain=3, threshold=0.5, sink=20),
    "layered": SMALL
    | dict(distance="relative", ring_dtype="float8_e4m3fn", layers={"threshold": {"*": 0.5, "0": 0.1, "1": 1.0}}),
}
# Both sides sum the same float32 products in other orders. A score is a dot product of 32
# terms near 3 and enters an exponential: relative error near 32 eps |score| = 2e-5 at most.
# What a chain adds on top is bounded in test_reference.
TOLERANCE = 1e-4

# (runner, scenario, variant, prefix caching)
RUNS = [("v1", name, "anchored", True in scenario.caching) for name, scenario in SCENARIOS.items()]
RUNS += [("v1", name, "chained", False) for name in ("preempt_all", "abort")]
RUNS += [("v1", name, "capped", True) for name in ("prefix", "mixed8")]
RUNS += [("v1", "preempt_cached", "weighed", True), ("v1", "chunked33", "layered", True)]
RUNS += [("v2", name, "anchored", True) for name in ("chunked33", "preempt_cached")]


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    """One engine per (runner, variant, prefix caching), the latest kept alive."""
    model = write("llama", tmp_path_factory.mktemp("models"))
    current = {}

    def get(*key):
        if key not in current:
            close()
            runner, variant, caching = key
            context = harness.engine(
                model,
                runner=runner,
                backend="MAC",
                prefix_caching=caching,
                additional_config={"mac": VARIANTS[variant]},
            )
            current[key] = context, context.__enter__()
        return current[key][1]

    def close():
        for context, _ in current.values():
            context.__exit__(None, None, None)
        current.clear()

    yield get
    close()


def test_three_hundred_tokens(engines):
    scenario = marathon()
    llm = engines("v1", "anchored", True)
    with shadow(llm) as watch:
        run = harness.run_schedule(llm, scenario.events, scenario.limits)
    assert not scenario.missed(run)
    assert watch.empty > 0 and watch.hits > 500 and watch.misses > 50
    assert watch.worst < TOLERANCE


def test_layers_have_thresholds_of_their_own(engines):
    scenario = SCENARIOS["mixed8"]
    llm = engines("v1", "layered", True)
    harness.run_schedule(llm, scenario.events, scenario.limits)
    hits = [s.value for s in llm.collective_rpc(metrics.counters)[0] if s.labels.get("outcome") == "hit"]
    assert len(hits) > 1 and hits[0] > 100 and hits[1] == 0


@pytest.mark.parametrize("runner,name,variant,caching", RUNS)
def test_engine_equals_the_reference(engines, runner, name, variant, caching):
    scenario = SCENARIOS[name]
    llm = engines(runner, variant, caching)
    with shadow(llm) as watch:
        run = harness.run_schedule(llm, scenario.events, scenario.limits)
    # Equal prompts give equal answers only where none of them skipped its prefill: one that
    # found its prompt in the prefix cache starts with an emptier ring.
    assert set(scenario.missed(run)) <= {"all the same"}
    assert watch.decoded > 100 and watch.hits > 100 and watch.misses > 10
    assert watch.taken_over or name != "turns", "a conversation goes on with the ring of its last turn"
    assert watch.worst < TOLERANCE
