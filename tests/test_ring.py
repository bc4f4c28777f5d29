"""Ownership of rings: a row never reads an entry that was recorded from another history than its own.

First over whole schedules of the model in `ring_model`; then the adversarial cases one by
one, in terms of requests, blocks and positions only.
"""

import random
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support.ring_model import Engine, assign, play, random_engine, random_schedule
from vllm_mac.config import MacConfig
from vllm_mac.owners import Arrival, Growth, RingOwners
from vllm_mac.ring import RingTable, narrow, ring_bytes, ring_dtypes
from vllm_mac.state import RingStore

prompts = st.tuples(st.integers(0, 3), st.integers(1, 9))  # one of few contents, and a length
events = st.one_of(
    st.tuples(st.just("add"), prompts, st.integers(1, 9)),
    st.tuples(st.just("twins"), prompts, st.integers(1, 9)),
    st.tuples(st.just("abort"), st.integers(0, 9), st.none()),
    st.tuples(st.just("preempt"), st.integers(0, 9), st.none()),
    st.tuples(st.just("step"), st.just(False), st.none()),
    st.tuples(st.just("step"), st.just(False), st.none()),
    st.tuples(st.just("step"), st.just(True), st.none()),
    st.tuples(st.sampled_from(["reset", "sleep"]), st.none(), st.none()),
)
shapes = st.fixed_dictionaries(
    {
        "rings": st.integers(1, 4),
        "blocks": st.integers(4, 16),
        "size": st.sampled_from([1, 2, 4]),
        "unit": st.sampled_from([None, 1, 2]),
        "window": st.integers(1, 6),
        "min_context": st.integers(3, 7),
        "chunk": st.integers(1, 8),
        "told": st.booleans(),
        "lanes": st.sampled_from([1, 1, 2]),
        "drafts": st.sampled_from([0, 0, 1, 3]),
        "exact": st.sampled_from([0.0, 0.0, 0.4]),
        "seed": st.integers(0, 1 << 16),
    }
)


@given(shapes, st.lists(events, min_size=10, max_size=60))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_any_schedule_reads_only_its_own_history(shape, schedule):
    unit = shape.pop("unit")
    play(Engine(unit=unit and min(unit, shape["size"]), **shape), schedule)


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("lanes", [1, 2])
@pytest.mark.parametrize("drafts", [0, 2])
def test_long_schedules_reach_what_they_mean_to(told, lanes, drafts):
    """The same check over long random schedules, which meet every situation many times."""
    seen: Counter = Counter()
    for seed in range(36):
        rng = random.Random(seed)
        engine = random_engine(rng, told=told, lanes=lanes, drafts=drafts, seed=seed, exact=0.3 * (seed % 3 == 0))
        play(engine, random_schedule(rng, 250))
        seen += engine.seen
    reached = ["entries read", "prefix found", "copied", "preempted", "resumed as decode", "stalled", "exhausted"]
    reached += ["ring taken over", "reset", "slept", "opted out"] + ["rejected"] * (drafts > 0)
    assert all(seen[what] > 10 for what in reached), seen


# --- Adversarial cases, one by one: blocks of 4 tokens, window 8, matching from 3 tokens ---------


class Case:
    """Requests by name, in steps of one row each unless `step` is given more."""

    def __init__(self, rings: int = 2, min_context: int = 3, idle_steps: int = 1, window: int = 8, sizes=(4,)):
        self.owners, self.table = RingOwners(rings, min_context, sizes, idle_steps), RingTable(rings, window, "cpu")

    def step(self, *rows, ended=()) -> list[tuple[int, int]]:
        """rows: `(name, start, stop, arrival's blocks or None)`. Each one's ring and first position that it may
        read as soon as it decodes."""
        arrived = [Arrival(name, start, (blocks,)) for name, start, _, blocks in rows if blocks is not None]
        self.owners.begin_step(ended, arrived, (), {name: stop for name, _, stop, _ in rows})
        held = [self.owners.ring(name) for name, *_ in rows]
        start, stop = [row[1] for row in rows], [row[2] for row in rows]
        first = assign(self.table, start, stop, [r for r, _ in held], [f for _, f in held], *[[False] * len(rows)] * 2)
        return [(ring, seen) for (ring, _), seen in zip(held, first)]

    def one(self, name, start, stop, blocks=None, ended=()) -> tuple[int, int]:
        return self.step((name, start, stop, blocks), ended=ended)[0]


def test_a_request_keeps_its_ring_while_rows_change_places():
    case = Case(rings=3)
    rings = case.step(("a", 0, 3, [1]), ("b", 0, 7, [4, 5]), ("c", 0, 4, [7]))
    assert sorted(ring for ring, _ in rings) == [0, 1, 2] and [first for _, first in rings] == [0, 0, 0]
    a, b, c = (ring for ring, _ in rings)
    for step in range(3):
        order = [("c", 4 + step, 5 + step, None), ("a", 3 + step, 4 + step, None), ("b", 7 + step, 8 + step, None)]
        got = case.step(*order[step:], *order[:step])
        assert [ring for ring, _ in got] == ([c, a, b] * 2)[step : step + 3]


def test_a_block_copied_over_lends_no_ring():
    """Copy-on-write of a partial prefix hit: the target block is one that an ended request wrote."""
    case = Case()
    ring, _ = case.one("a", 0, 6, [1, 2])
    # b finds 6 tokens of another request; the second block is copied, without a slot, into a's former block 2.
    got, first = case.one("b", 6, 7, [9, 2], ended=["a"])
    assert first == 6


def test_a_copied_block_is_its_new_owner_s():
    """Whoever shares it afterwards, whole, inherits nothing from the request that had it before."""
    case = Case(rings=3)
    old, _ = case.one("a", 0, 8, [1, 2])
    # b finds 6 tokens of another request, the last two by a copy in a's former block 2.
    case.one("b", 6, 8, [7, 2], ended=["a"])
    got, first = case.one("c", 8, 9, [7, 2, 5])
    assert got != old and first == 8


def test_a_request_that_starts_inside_a_block_takes_over_nothing():
    """It shares a's first block, and of its second what a third request had there."""
    case = Case()
    case.one("a", 0, 7, [1, 2])
    _, first = case.one("b", 6, 7, [1, 9], ended=["a"])
    assert first == 6


def test_a_chunk_longer_than_the_window_may_be_read_only_where_recorded():
    case = Case(window=8)
    ring, _ = case.one("a", 0, 18, [1, 2, 3, 4, 5])
    assert case.one("a", 18, 19) == (ring, 10)


def test_ended_then_found_by_a_request_with_that_prefix():
    case = Case()
    ring, _ = case.one("a", 0, 7, [1, 2])
    assert case.one("a", 7, 8) == (ring, 0)
    assert case.one("b", 8, 10, [1, 2, 3], ended=["a"]) == (ring, 0)


def test_found_short_of_where_the_ended_request_stopped():
    """What the ended request recorded past the shared prefix took slots, and is not read."""
    case = Case(window=8)
    ring, _ = case.one("a", 0, 11, [1, 2, 3])
    # Positions 8 to 10 took the slots of 0 to 2.
    assert case.one("b", 8, 9, [1, 2, 4], ended=["a"]) == (ring, 3)
    for p in range(9, 13):
        assert case.one("b", p, p + 1) == (ring, max(3, p - 8))


def test_a_shared_block_of_an_older_request_lends_no_ring():
    case = Case()
    old, _ = case.one("a", 0, 8, [1, 2])
    new, _ = case.one("b", 8, 13, [1, 2, 3, 4], ended=["a"])
    assert new == old
    # c shares with b only what a wrote; b's ring holds more than that, but b is not c.
    got, first = case.one("c", 8, 9, [1, 2, 5], ended=["b"])
    assert got != new and first == 8


def test_a_block_that_nobody_was_seen_to_get_lends_no_ring():
    case = Case()
    assert case.one("a", 8, 9, [50, 60, 3])[1] == 8


def test_a_block_given_away_lends_no_ring():
    case = Case(rings=3)
    old, _ = case.one("a", 0, 8, [1, 2])
    case.one("b", 0, 5, [7, 2], ended=["a"])  # block 2 is b's now
    got, first = case.one("c", 8, 9, [1, 2, 5])
    assert got != old and first == 8


@pytest.mark.parametrize("turned", [False, True])
def test_a_block_given_away_and_shared_in_the_same_step(turned):
    """vLLM caches a block before the step that fills it: a second request shares it at once."""
    case = Case(rings=3)
    old, _ = case.one("a", 0, 8, [1, 2])
    rows = [("b", 0, 9, [3, 2, 4]), ("c", 8, 9, [3, 2, 5])]
    got = dict(zip("cb" if turned else "bc", case.step(*(rows[::-1] if turned else rows), ended=["a"])))
    assert old not in (got["b"][0], got["c"][0])
    assert got["b"][1] == 0 and got["c"][1] == 8


def test_a_block_that_a_growing_request_was_given_lends_no_ring():
    case = Case(rings=3)
    old, _ = case.one("a", 0, 8, [1, 2])
    case.one("b", 0, 4, [6], ended=["a"])
    case.owners.begin_step((), [Arrival("c", 8, ([6, 2, 7],))], [Growth("b", ([2],))], {"b": 5, "c": 9})
    assert case.owners.ring("c")[1] and case.owners.ring("c")[0] not in (case.owners.ring("b")[0],)


def test_two_requests_with_one_prefix_never_share_a_ring():
    case = Case(rings=3)
    ring, _ = case.one("a", 0, 8, [1, 2])
    got = case.step(("b", 8, 9, [1, 2, 3]), ("c", 8, 9, [1, 2, 4]), ended=["a"])
    assert [first for _, first in got] == [0, 8] and got[0][0] == ring != got[1][0]


def test_the_ring_of_a_running_request_is_not_lent():
    case = Case()
    ring, _ = case.one("a", 0, 8, [1, 2])
    got = case.step(("b", 8, 9, [1, 2, 4]), ("a", 8, 9, None))
    assert got == [(1 - ring, 8), (ring, 0)]


@pytest.mark.parametrize("ended", [(), ("b",)])
def test_every_group_must_agree(ended):
    """Two KV-cache groups with blocks of 4 and 8 tokens: a block of each is looked at."""
    case = Case(rings=3, sizes=(4, 8))
    case.owners.begin_step((), [Arrival("a", 0, ([1, 2], [1]))], (), {"a": 8})
    ring, _ = case.owners.ring("a")
    case.owners.begin_step(["a"], [Arrival("b", 0, ([7], [1]))], (), {"b": 3})  # the second group's block is b's
    case.owners.begin_step(ended, [Arrival("c", 8, ([1, 2, 3], [1, 2]))], (), {"c": 9})
    assert case.owners.ring("c")[1], "c was lent a ring"


@pytest.mark.parametrize("found", [8, 16])
def test_a_prefix_is_inherited_wherever_it_ends(found):
    """In blocks that its writer was given when it arrived, or later; in every group."""
    case = Case(rings=2, sizes=(4, 8))
    case.owners.begin_step((), [Arrival("a", 0, ([1, 2], [1]))], (), {"a": 8})
    case.owners.begin_step((), (), [Growth("a", ([3, 4], [2]))], {"a": 16})
    ring, _ = case.owners.ring("a")
    case.owners.begin_step(["a"], [Arrival("b", found, ([1, 2, 3, 4, 5], [1, 2, 3]))], (), {"b": 17})
    assert case.owners.ring("b") == (ring, False)


@pytest.mark.parametrize("found", [8, 0])
def test_preempted_and_resumed(found):
    case = Case()
    ring, _ = case.one("a", 0, 7, [1, 2])
    assert case.one("a", 7, 8) == (ring, 0)
    blocks = [1, 2, 3] if found else [4, 5, 6]
    # The scheduler of V1 does not name it when it is preempted.
    resumed, first = case.one("a", found, 9, blocks)
    assert (resumed == ring, first) == (bool(found), 0)


def test_a_name_that_is_used_again_has_nothing_of_its_former_owner():
    case = Case()
    ring, _ = case.one("a", 0, 6, [1, 2])
    assert case.one("a", 6, 7, [3, 4], ended=["a"])[1] == 6
    case = Case()
    case.one("a", 0, 6, [1, 2])
    assert case.one("a", 6, 7, [3, 4])[1] == 6


def test_a_gap_is_not_read_over():
    """Rows that verify speculated tokens record nothing."""
    case = Case()
    ring, _ = case.one("a", 0, 5, [1, 2])
    assert assign(case.table, [5], [8], [ring], [False], [False], [True]) == [8]
    assert case.one("a", 7, 8) == (ring, 7)
    assert case.one("a", 8, 9) == (ring, 7)


def test_a_ring_given_to_a_row_that_skips_it_is_empty_afterwards():
    case = Case(rings=1)
    case.one("a", 0, 8, [1, 2])
    case.owners.begin_step(["a"], [], (), {"b": 8})
    assert assign(case.table, [6], [8], [0], [True], [False], [True]) == [8]
    assert case.one("b", 7, 8) == (0, 7)


def test_tokens_taken_back_are_recorded_anew_before_they_are_read():
    case = Case(window=4)
    ring, _ = case.one("a", 0, 5, [1, 2])
    assert case.one("a", 5, 8) == (ring, 1)  # of which two are rejected
    # Positions 6 and 7 took the slots of 2 and 3.
    assert case.one("a", 6, 7) == (ring, 4)
    assert case.one("a", 7, 8) == (ring, 4)
    assert case.one("a", 8, 9) == (ring, 4) and case.one("a", 9, 10) == (ring, 5)


def test_no_ring_left():
    case = Case(rings=1)
    assert case.owners.states() == {"active": 0, "idle": 0, "free": 1}
    assert case.step(("a", 0, 5, [1, 2]), ("b", 0, 5, [3, 4])) == [(0, 0), (-1, 5)]
    assert case.owners.states() == {"active": 1, "idle": 0, "free": 0}
    assert case.one("b", 5, 6, ended=["a"]) == (0, 5)


def test_short_requests_take_no_ring():
    case = Case(rings=1, min_context=12)
    assert case.one("a", 0, 11, [1, 2, 3]) == (-1, 11)
    assert case.owners.states() == {"active": 0, "idle": 0, "free": 1}
    # Matching begins here, and with it recording.
    assert case.one("a", 11, 12) == (0, 11)


def test_kept_rings_go_to_others_longest_unused_first():
    case = Case(rings=3)
    a, b, c = (ring for ring, _ in case.step(("a", 0, 4, [1]), ("b", 0, 4, [2]), ("c", 0, 4, [3])))
    case.one("b", 4, 5)
    case.step(("a", 4, 5, None), ("c", 4, 5, None), ended=["b"])
    assert case.owners.states() == {"active": 2, "idle": 1, "free": 0}
    assert case.one("d", 0, 4, [5], ended=["a", "c"])[0] == b
    assert case.one("e", 0, 4, [6])[0] in (a, c)


def test_batches_in_flight_do_not_take_each_other_s_rings():
    case = Case(rings=2, idle_steps=2)
    a, _ = case.one("a", 0, 4, [1])
    b, _ = case.one("b", 0, 4, [4])
    assert {a, b} == {0, 1}
    for p in range(4, 9):
        assert case.step((f"new {p}", 0, 5, [7]), ("a", p, p + 1, None)) == [(-1, 5), (a, max(0, p - 8))]
        assert case.one("b", p, p + 1, ended=[f"new {p}"])[0] == b


def test_a_request_that_is_not_scheduled_gives_its_ring_to_one_that_is():
    case = Case(rings=1)
    case.one("a", 0, 4, [1])
    assert case.one("b", 0, 4, [2]) == (0, 0)
    assert case.one("a", 4, 5) == (0, 4)  # and has it back once b waits, empty


def test_the_request_that_has_not_been_scheduled_longest_gives_its_ring():
    case = Case(rings=3)
    (z, _), (a, _), _ = case.step(("z", 0, 4, [1]), ("a", 0, 4, [2]), ("b", 0, 4, [3]))
    case.step(("a", 4, 5, None), ("b", 4, 5, None))
    case.one("a", 5, 6)
    assert case.step(("a", 6, 7, None), ("c", 0, 4, [5])) == [(a, 0), (z, 0)]


def test_padding_rows_change_nothing():
    case = Case()
    case.one("b", 0, 9, [3, 4, 5])
    ring, _ = case.one("a", 0, 8, [1, 2])
    before = case.table.first[:-1].clone(), case.table.last[:-1].clone()
    assert assign(case.table, [8, 0, -1], [8, 0, 0], [-1] * 3, *[[False] * 3] * 3) == [8, 0, 0]
    # Nor do they where something stale names a ring.
    assert assign(case.table, [8, -1], [8, 0], [ring, 1 - ring], *[[False] * 2] * 3) == [8, 0]
    assert torch.equal(case.table.first[:-1], before[0]) and torch.equal(case.table.last[:-1], before[1])
    assert case.one("a", 8, 9) == (ring, 0)


def test_rows_of_the_prompt_read_nothing():
    table = RingTable(2, 8, "cpu")
    assert assign(table, [0], [5], [1], [True], [True], [False]) == [5]
    assert assign(table, [5], [6], [1], [False], [True], [False]) == [6]
    assert assign(table, [6], [7], [1], [False], [False], [False]) == [0]


@pytest.mark.parametrize("model", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["auto", "float32", "bfloat16", "float16", "float8_e4m3fn"])
def test_ring_bytes_is_what_a_store_takes(name, model):
    dtypes = ring_dtypes(MacConfig(ring_dtype=name), model)
    store = RingStore.allocate(3, 4, 8, 32, dtypes[0], "cpu", dtypes[1])
    parts = [store.query, store.out, store.lse, store.chain]
    assert 3 * ring_bytes(4, 8, 32, *dtypes) == sum(part.nbytes for part in parts)
    assert store.lse.dtype == torch.float32
    # An output in float8 would be off by 6 %.
    assert store.query.dtype == (model if name == "auto" else getattr(torch, name))
    assert store.out.dtype == (model if name == "float8_e4m3fn" else store.query.dtype)


def test_without_another_dtype_outputs_are_stored_like_queries():
    store = RingStore.allocate(1, 1, 2, 32, torch.bfloat16, "cpu")
    assert store.query.dtype == store.out.dtype == torch.bfloat16
    assert ring_bytes(1, 2, 32, torch.bfloat16) == 2 * (2 * 32 * 2 + 8)


def test_narrow_saturates_where_there_is_no_infinity():
    """Not every PyTorch does so by itself: some make it NaN."""
    x = torch.tensor([448.0, 449.0, 480.0, 1e5, -float("inf"), -3.0, 2**-9])
    stored = narrow(x, torch.float8_e4m3fn).float()
    assert stored.tolist() == [448.0, 448.0, 448.0, 448.0, -448.0, -3.0, 2**-9]
    assert narrow(x, torch.float32).tolist() == x.tolist()
