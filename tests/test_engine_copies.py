"""KV blocks that vLLM copies without a slot mapping: partial prefix hits of a hybrid model.

Convolution states are cached at every `prefix_match_unit`, inside a KV block of attention, and a request
that finds its prefix there is given a copy of the block, in one that another request has left.
"""

import pytest

from support import engine as harness
from support.scenarios import text
from support.shadow import shadow
from support.tiny_models import write

pytestmark = pytest.mark.cpu
BLOCK, UNIT = 128, 32


@pytest.mark.parametrize("runner", harness.RUNNERS)
def test_no_request_reads_the_ring_of_a_block_s_former_owner(tmp_path, runner):
    """The shadow compares each ring's tokens with its reader's, and every output with the formulas."""
    shared, requests = text("shared", 300), 6 if runner == "v1" else 4
    events = []
    for i in range(requests):
        events += [
            harness.Add(12 * i, f"a{i}", shared[: 100 + i * 37 % 160] + text(f"a{i % 4}", 30 + i), 24),
            harness.Add(12 * i + 1, f"b{i}", shared[: 97 + i * 61 % 180] + text(f"b{i % 3}", 3), 24),
        ]
    config = {"mac": {"window": 32, "band": 16, "min_context": 64, "threshold": 0.4}}
    options = dict(prefix_caching=True, block_size=BLOCK, blocks=24, prefix_match_unit=UNIT)
    with (
        harness.engine(write("lfm2", tmp_path), runner, "MAC", config, **options) as llm,
        shadow(llm) as watch,
    ):
        run = harness.run_schedule(llm, events)
    assert sum(n % BLOCK > 0 for n in run.cached.values()) >= requests // 2, "blocks were copied"
    assert watch.hits > 50 and watch.misses > 10 and watch.empty > requests / 2
    assert watch.worst < 1e-4
