"""The counters of one layer: what each of them counts, and their order.

Kernels, `cpu_decoder` and `series` all use this order.
"""

from enum import IntEnum


class Count(IntEnum):
    """The index of each counter in a layer's `[len(Count)]` int64; totals over decode steps.

    Every query head of a row is counted once, by its outcome. KV tokens are counted once for each KV head.
    """

    HIT = 0  # the head reused a summary, or its keys were looked up in the index
    MISS = 1  # it tried to; its KV group read everything
    SHORT_CONTEXT = 2  # below `min_context`
    NO_RING = 3  # its request holds no ring
    OVER_BUDGET = 4  # the layer is over its `error_budget`
    REQUEST = 5  # its request asked for exact decoding, or has just begun with what a KV connector may have loaded
    READ = 6  # KV tokens read
    SKIPPED = 7  # KV tokens that full attention would have read too
    NO_MAPS = 8  # with `rule: index`: no prompt was long enough yet to learn the index's maps from
    SMALL_STEP = 9  # with `rule: index`: the step has less KV than `min_step_mib`


# Heads that did not try to match, and the reason as a label of the metrics.
REASONS = {
    Count.SHORT_CONTEXT: "short_context",
    Count.NO_RING: "no_ring",
    Count.OVER_BUDGET: "error_budget",
    Count.REQUEST: "request",
    Count.NO_MAPS: "no_maps",
    Count.SMALL_STEP: "small_step",
}

# In place of a ring, for a row that has none because its request is to be read whole; -1 for any other row without one.
OPTED_OUT = -2
# The same, for a row of a few tokens of a prompt among rows that verify as many: it is read whole, and not counted.
PREFILLED = -3
# The same, for a row that would be looked up if its step had more KV: see `MacConfig.min_step_mib`.
IN_SMALL_STEP = -4
