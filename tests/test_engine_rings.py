"""Whole engines with fewer rings than sequences."""

import pytest

from support import engine as harness
from support.scenarios import mixed8
from support.tiny_models import write
from vllm_mac import metrics

pytestmark = pytest.mark.cpu


def test_sequences_beyond_the_rings_are_exact_and_counted(tmp_path):
    model, scenario = write("llama", tmp_path), mixed8()
    with harness.engine(model) as llm:
        exact = harness.run_schedule(llm, scenario.events, scenario.limits)
    config = {"mac": {"window": 32, "band": 16, "min_context": 64, "threshold": 0.0, "max_sequences": 1}}
    with harness.engine(model, backend="MAC", additional_config=config) as llm:
        run = harness.run_schedule(llm, scenario.events, scenario.limits)
        samples = llm.collective_rpc(metrics.counters)[0]
    assert not scenario.missed(run)
    value = {(s.name, *s.labels.values()): s.value for s in samples}
    assert value[metrics.EXACT, "no_ring"] > 1000
    assert value[metrics.RINGS, "active"] + value[metrics.RINGS, "idle"] == 1
    heads = metrics.summarise(samples)
    assert 0 < heads.hit_rate < 0.5
    # At threshold 0 everything with a ring hits, and the text goes its own way; the others,
    # which are most of eight at a time, keep theirs.
    assert sum(run.tokens[name] == exact.tokens[name] for name in run.tokens) >= 4
