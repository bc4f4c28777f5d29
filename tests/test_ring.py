"""RingTable: a row never reads an entry that was recorded from another history than its own.

First over whole schedules of the model in `ring_model`; then the adversarial cases one by
one, in terms of blocks and positions only.
"""

import random
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ring_model import Engine, Row, assign, make_config

from vllm_mac.config import MacConfig
from vllm_mac.ring import RingStore, RingTable, narrow, ring_bytes, ring_dtypes

prompts = st.tuples(st.integers(0, 3), st.integers(1, 9))  # one of few contents, and a length
events = st.one_of(
    st.tuples(st.just("add"), prompts, st.integers(1, 9)),
    st.tuples(st.just("twins"), prompts, st.integers(1, 9)),
    st.tuples(st.just("abort"), st.integers(0, 9), st.none()),
    st.tuples(st.just("preempt"), st.integers(0, 9), st.none()),
    st.tuples(st.just("step"), st.just(False), st.none()),
    st.tuples(st.just("step"), st.just(False), st.none()),
    st.tuples(st.just("step"), st.just(True), st.none()),
)
shapes = st.fixed_dictionaries(
    {
        "rings": st.integers(1, 4),
        "blocks": st.integers(4, 16),
        "size": st.sampled_from([1, 2, 4]),
        "window": st.integers(1, 6),
        "min_context": st.integers(3, 7),
        "chunk": st.integers(1, 8),
        "v2": st.booleans(),
        "lanes": st.sampled_from([1, 1, 2]),
        "seed": st.integers(0, 1 << 16),
    }
)


def play(engine: Engine, schedule) -> None:
    for event, what, extra in schedule:
        if event in ("add", "twins"):
            # Contents that share their first half, so that prefixes meet and part.
            letters, length = what
            prompt = [0, 1] * 2 + [letters // 2, letters % 2] * 3
            for _ in range(1 + (event == "twins")):
                engine.add(prompt[:length], extra)
        elif event == "step":
            engine.step(what)
        elif engine.running:
            engine.drop(engine.running[what % len(engine.running)], resume=event == "preempt")
    engine.finish()


@given(shapes, st.lists(events, min_size=10, max_size=60))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_any_schedule_reads_only_its_own_history(shape, schedule):
    play(Engine(**shape), schedule)


@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize("lanes", [1, 2])
def test_long_schedules_reach_what_they_mean_to(v2, lanes):
    """The same check over long random schedules, which meet every situation many times."""
    seen: Counter = Counter()
    for seed in range(36):
        rng = random.Random(seed)
        engine = Engine(
            rings=rng.randint(1, 4), blocks=rng.randint(10, 24), size=rng.choice([1, 2, 4]), window=rng.randint(1, 6),
            min_context=rng.randint(3, 6), chunk=rng.randint(1, 8), v2=v2, lanes=lanes, seed=seed,
        )  # fmt: skip
        kinds = ["add", "twins", "abort", "preempt"] + ["step"] * 12
        schedule = []
        for _ in range(250):
            kind = rng.choice(kinds)
            prompt = rng.randrange(4), rng.randint(1, 9)
            what = {"step": rng.random() < 0.2, "abort": rng.randrange(9), "preempt": rng.randrange(9)}
            schedule.append((kind, what.get(kind, prompt), rng.randint(1, 12)))
        play(engine, schedule)
        seen += engine.seen
    reached = ["entries read", "prefix found", "preempted", "resumed as decode", "stalled", "exhausted"]
    reached += ["ring taken over", "all rings found again"]
    assert all(seen[what] for what in reached), seen


# --- Adversarial cases, one by one: blocks of 4 tokens, window 8 --------------------------------


def make_table(rings: int = 2, blocks: int = 32, window: int = 8, min_context: int = 3, idle_steps: int = 1) -> RingTable:
    return RingTable(rings, blocks, 4, make_config(window, min_context), "cpu", idle_steps)


def one(table: RingTable, blocks: list[int], start: int, stop: int, prefilling=False, request=None) -> tuple[int, int]:
    """A step of one row: its ring, and the first position it may read there."""
    row = Row(blocks, start, stop, prefilling, -1 if request is None else request)
    (ring,), (first,) = assign(table, [row], requests=request is not None)
    return ring, first


def test_a_sequence_keeps_its_ring_while_rows_change_places():
    table = make_table(rings=3)
    a, b, c = [1, 2, 3], [4, 5, 6], [7, 8, 9]
    rings, first = assign(table, [Row(a, 0, 3, True), Row(b, 0, 7, True), Row(c, 0, 4, True)])
    assert sorted(rings) == [0, 1, 2] and first == [0, 0, 0]
    for step in range(3):
        order = [Row(c, 4 + step, 5 + step), Row(a, 3 + step, 4 + step), Row(b, 7 + step, 8 + step)]
        shift = [rings[2], rings[0], rings[1]]
        k = step % 3
        assert assign(table, order[k:] + order[:k])[0] == shift[k:] + shift[:k]


def test_a_chunk_longer_than_the_window_may_be_read_only_where_recorded():
    table = make_table(window=8)
    ring, first = one(table, [1, 2, 3, 4, 5], 0, 18, True)
    assert ring >= 0 and first == 18 - 8
    assert one(table, [1, 2, 3, 4, 5], 18, 19) == (ring, 10)


def test_ended_at_a_block_boundary_then_found_again_by_a_request_with_that_prefix():
    table = make_table()
    ring, _ = one(table, [1, 2], 0, 7, True)
    assert one(table, [1, 2], 7, 8) == (ring, 0)  # aborted here, block 2 full and cached
    assert one(table, [1, 2, 3], 8, 10, True) == (ring, 0)


def test_ended_inside_a_block_that_another_then_writes():
    table = make_table()
    old, _ = one(table, [1, 2], 0, 6, True)
    new, first = one(table, [3, 2], 0, 6, True)  # position 5 in block 2 again, other content
    assert new != old and first == 0
    assert one(table, [3, 2], 6, 7) == (new, 0)
    assert one(table, [1, 2], 6, 7) != (old, 0)


def test_a_shorter_prefix_than_the_ring_went_on_to_is_not_continued():
    table = make_table()
    ring, _ = one(table, [1, 2, 3], 0, 10, True)
    other, first = one(table, [1, 2, 4], 8, 9, True)
    assert other != ring and first == 8


def test_ring_reassigned_while_its_old_sequence_comes_back():
    table = make_table(rings=1)
    ring, _ = one(table, [1, 2], 0, 8, True)
    assert one(table, [3, 4], 0, 8, True)[0] == ring  # taken over, at the very same position
    # Block 2 is still the one that ring recorded position 7 in, but for another sequence.
    assert one(table, [1, 2, 5], 8, 9) == (ring, 8)


def test_a_live_sequence_wins_over_one_that_has_just_found_its_prefix():
    table = make_table()
    ring, _ = one(table, [1, 2], 0, 8, True)
    rows = [Row([1, 2, 4], 8, 10, True), Row([1, 2, 3], 8, 9)]
    rings, first = assign(table, rows)
    assert rings == [1 - ring, ring] and first == [8, 0]


def test_two_sequences_that_share_a_position_never_share_a_ring():
    table = make_table()
    ring, _ = one(table, [1, 2], 0, 8, True)
    # V1, both resumed: nothing tells which of the two recorded the ring, and either may have it.
    rings, first = assign(table, [Row([1, 2, 3], 8, 9), Row([1, 2, 4], 8, 9)])
    assert rings == [ring, 1 - ring] and first == [0, 8]


def test_identical_prompts_in_one_step_each_get_their_own_ring():
    table = make_table()
    rings, _ = assign(table, [Row([1, 2], 0, 7, True), Row([3, 4], 0, 7, True)])
    assert sorted(rings) == [0, 1]


def test_block_written_and_shared_in_the_same_step():
    """vLLM caches a block before the step that fills it: a second request shares it at once."""
    table = make_table(rings=3)
    old, _ = one(table, [1, 2], 0, 8, True)  # ends at a block boundary; block 2 is given away
    rows = [Row([3, 2, 4], 0, 9, True), Row([3, 2, 5], 8, 9, True)]
    for order in (rows, rows[::-1]):
        rings, first = assign(table, order)
        assert old not in rings and sorted(first) == [1, 8]
        table = make_table(rings=3)
        assert one(table, [1, 2], 0, 8, True)[0] == old


def test_an_aborted_sequence_and_its_block_at_the_same_place_of_another():
    table = make_table()
    old, _ = one(table, [1, 2], 0, 8, True)
    new, _ = one(table, [3, 2], 4, 8, True)  # block 2 again as second block, with other content
    assert new != old
    assert one(table, [3, 2, 4], 8, 9) == (new, 4)


@pytest.mark.parametrize("found", [8, 0])
def test_preempted_and_resumed_as_a_decoding_row(found):
    """V1 resumes behind the prompt with is_prefilling False, perhaps with one token to compute."""
    table = make_table()
    ring, _ = one(table, [1, 2], 0, 7, True)
    assert one(table, [1, 2], 7, 8) == (ring, 0)
    blocks = [1, 2, 3] if found else [4, 5, 6]
    resumed, first = one(table, blocks, found, 9)
    assert (resumed, first) == ((ring, 0) if found else (1 - ring, 1))


def test_tokens_taken_back_are_not_read():
    """Rejected speculated tokens: the row goes on before the last position that was recorded."""
    table = make_table()
    ring, _ = one(table, [1, 2], 0, 5, True)
    assert one(table, [1, 2], 5, 8)[0] == ring
    again, first = one(table, [1, 2], 6, 7)
    assert again != ring and first == 6


def test_request_index_protects_a_live_ring_and_its_reuse_does_no_harm():
    table = make_table()
    ring, _ = one(table, [1, 2], 0, 8, True, request=5)
    # Another request with the same prefix and history, also decoding, in an earlier row.
    rings, _ = assign(table, [Row([1, 2, 3], 8, 9, request=6), Row([1, 2, 4], 8, 9, request=5)], requests=True)
    assert rings == [1 - ring, ring]
    # Index 5 is free and used again at once, by a request with another prefix.
    again, first = one(table, [6, 7, 8], 8, 9, True, request=5)
    assert first == 8
    assert one(table, [6, 7, 8], 9, 10, request=5) == (again, 8)


def test_no_ring_left():
    table = make_table(rings=1)
    rows = [Row([1, 2], 0, 5, True), Row([3, 4], 0, 5, True)]
    rings, first = assign(table, rows)
    assert rings == [0, -1] and first == [0, 5]
    assert table.states() == {"active": 1, "idle": 0, "free": 0}
    assert one(table, [3, 4], 5, 6) == (0, 5)  # the first sequence has ended


def test_short_sequences_take_no_ring():
    table = make_table(rings=1, window=8, min_context=12)
    assert one(table, [1, 2, 3], 0, 11, True) == (-1, 11)
    assert table.states() == {"active": 0, "idle": 0, "free": 1}
    # Matching begins here, and with it recording.
    assert one(table, [1, 2, 3], 11, 12) == (0, 11)


def test_batches_in_flight_do_not_take_each_other_s_rings():
    table = make_table(rings=2, idle_steps=2)
    a, _ = one(table, [1, 2, 3], 0, 4, True)
    b, _ = one(table, [4, 5, 6], 0, 4, True)
    assert {a, b} == {0, 1}
    for p in range(4, 9):
        rings, _ = assign(table, [Row([7, 8], 0, 5, True), Row([1, 2, 3], p, p + 1)])
        assert rings == [-1, a]
        assert one(table, [4, 5, 6], p, p + 1) == (b, 0)
    assert one(table, [1, 2, 3], 9, 10) == (a, 0)


def test_padding_rows_and_tokens_change_nothing():
    table = make_table()
    ring, _ = one(table, [1, 2], 0, 8, True)
    rows = [Row([1, 2, 3], 8, 8), Row([0], 0, 0), Row([1, 2, 3], 8, 9)]
    assert assign(table, rows, slots_unset=5) == ([-1, -1, ring], [8, 0, 0])
    # A row of vLLM's warm-up: one token, and a length of 0.
    assert assign(table, [Row([0], -1, 0), Row([0], 0, 0)], slots_unset=1)[0] == [-1, -1]
    assert table.states() == {"active": 0, "idle": 1, "free": 1}
    assert one(table, [1, 2, 3], 9, 10) == (ring, 0)


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
