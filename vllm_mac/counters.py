"""The counters of one served layer: what each of them counts, and where it lies.

Kernels, `cpu` and `metrics` all go by this one order.
"""

from enum import IntEnum


class Count(IntEnum):
    """Where each counter lies in a layer's `[len(Count)]` int64; totals over decode steps.

    Every query head of a row is counted once, as what became of it. KV tokens are counted once for each KV head.
    """

    HIT = 0  # reused a summary
    MISS = 1  # tried to; its KV group read everything
    SHORT_CONTEXT = 2  # below `min_context`
    NO_RING = 3  # its request holds none
    OVER_BUDGET = 4  # the layer is over its `error_budget`
    REQUEST = 5  # its request asked for exact decoding, whatever its length
    READ = 6  # KV tokens read
    SKIPPED = 7  # KV tokens that full attention would have read too


# Heads that did not try, and why, as the metrics say it.
REASONS = {
    Count.SHORT_CONTEXT: "short_context",
    Count.NO_RING: "no_ring",
    Count.OVER_BUDGET: "error_budget",
    Count.REQUEST: "request",
}

# In place of a ring, for a row that has none because its request opted out; -1 for any other row without one.
OPTED_OUT = -2
