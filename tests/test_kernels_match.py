"""Which entry the hit kernel matches: distance, thresholds, lag weight, mass, ties, the ends of the window."""

import pytest
import torch

from support.hit_batches import BF16, FP8, FP32, Batch, Case, config, observed, tune, unrotate
from vllm_mac.counters import Count
from vllm_mac.kernels import hit
from vllm_mac.ring import narrow


@pytest.mark.parametrize("pattern", ["all", "none"])
def test_float8_rings_saturate(pattern, device):
    """Queries with many elements beyond 448 hit and miss like others, and leave no NaN."""
    case = Case(pattern=pattern, ring_dtype=FP8, size=300.0, rotary=0)
    batch = Batch(case, config(distance="relative", reuse="chained"), device)
    batch.scale /= case.size
    batch.work.scale = batch.scale
    assert observed(batch.check()) == pattern
    written = batch.store.query[int(batch.ring[0]), :, 199 % 32].float().abs()
    assert written.max() == 448.0 and (written == 448.0).float().mean() > 0.05


@pytest.mark.parametrize(
    "distance, size, threshold, pattern, found",
    [
        ("relative", 8.0, 0.45, "all", "all"),
        ("absolute", 8.0, 0.45, "all", "none"),
        ("relative", 0.02, 0.2, "none", "none"),
        ("absolute", 0.02, 0.2, "none", "all"),
    ],
)
@pytest.mark.parametrize("d", [64, 96])
def test_distance(distance, size, threshold, pattern, found, d, device):
    """Long queries of which a near one is planted, and short ones with none nearer than their size."""
    case = Case(d=d, size=size, pattern=pattern, rotary=d // 2, group=2)
    settings = config(distance=distance, threshold=threshold)
    assert observed(Batch(case, settings, device).check()) == found


@pytest.mark.parametrize("distance, ring_dtype, d, lag_weight, halves", [
    ("absolute", FP32, 64, 0.0, True), ("absolute", FP32, 64, 0.1, False), ("absolute", FP32, 128, 0.1, True),
    ("absolute", FP32, 128, 4.0, False), ("relative", FP8, 64, 0.0, False), ("relative", FP8, 64, 0.1, True),
    ("relative", FP8, 128, 0.1, False), ("relative", FP8, 128, 4.0, True),
])  # fmt: skip
def test_scan(distance, ring_dtype, d, lag_weight, halves, device):
    """Several blocks of entries, about half of them acceptable: which wins is a matter of the score."""
    case = Case(lengths=(140, 190), pattern="none", ring_dtype=ring_dtype, d=d, group=2, rotary=0)
    settings = config(window=64, threshold=0.0, lag_weight=lag_weight, distance=distance)
    batch = Batch(case, settings, device)
    batch.work.tune = tune(1, 1, 16, halves)
    # Every second head's entries differ in the first half of the dimensions only, which is then as
    # far as the whole: none that is better than the best so far may be left out for it.
    for ring, query in zip(batch.ring.tolist(), batch.query, strict=True):
        same_half = query[::2, None, d // 2 :].expand(-1, 64, -1)
        batch.store.query[ring, ::2, :, d // 2 :] = narrow(same_half, ring_dtype)
    steps = batch.check()
    assert observed(steps) != "none"
    sources = [m - 1 - p for (i, _), s in steps.items() for m in [case.lengths[i]] for p in s.source]
    # A large weight takes the most recent of the acceptable ones, which the first block has.
    assert (max(sources) < 16) == (lag_weight > 1)


@pytest.mark.parametrize("distance", ["absolute", "relative"])
@pytest.mark.parametrize("splits, halves, lag_weight, mass_floor", [(1, True, 0.0, None), (3, False, 1.5, 0.2)])
def test_each_row_keeps_to_its_own_threshold(splits, halves, lag_weight, mass_floor, distance, device):
    """Planted entries lie 0.2 sqrt(d) off: every one of them is accepted at 0.45, and none by requests that want 0 or a
    hundredth of that squared; one that wants less than the layer gets what the layer has. Some rows opted out."""
    lengths = (140, 190, 150, 170, 0, 160, 30, 180)
    slack = {0: 0.0, 1: 0.55**2 / 400, 2: 0.55**2, 3: 1.0, 5: 0.0}
    case = Case(lengths, "all", group=2, slack=slack, opted_out=(5, 6), ringless=(7,))
    settings = config(distance=distance, lag_weight=lag_weight, mass_floor=mass_floor)
    batch = Batch(case, settings, device)
    batch.work.tune = tune(splits, 1, 16, halves)
    batch.store.lse.add_(20)  # nearly all the mass: mass_floor loosens nothing
    steps = batch.check()
    hits = {i: {steps[i, k].hit for k in range(2)} for i, n in enumerate(lengths) if n}
    assert hits == {i: {i in (2, 3)} for i in hits}
    counted = dict(zip(Count, batch.counters.tolist(), strict=True))
    assert counted[Count.REQUEST] == counted[Count.MISS] == counted[Count.HIT] == 8 and counted[Count.NO_RING] == 4
    assert counted[Count.SHORT_CONTEXT] == 0  # a short row that opted out is counted as such


def test_a_threshold_of_a_row_s_own_is_that_of_a_layer(device):
    """Bit for bit what a layer with this threshold gives; all rows with none of their own are untouched by it."""
    ended = {}
    for name, own, slack in (
        ("layer", 0.7, {}), ("row", 0.45, {0: 0.3**2}), ("none", 0.45, {}), ("looser", 0.7, {0: 0.9}),
    ):  # fmt: skip
        batch = Batch(Case((200, 190), "none", slack=slack, seed=4), config(threshold=own, window=64), device)
        # So near that with 0.7 chance decides for each head whether it matches, and with 0.45 all do.
        pre = unrotate(batch.query.double().cpu(), batch.cos_sin.cpu(), batch.position.cpu().long(), True)
        for i, r in enumerate(batch.ring.tolist()):
            share = torch.linspace(0.3, 1, 64, device=device)[None, :, None]
            batch.store.query[r] = (1 - share) * pre[i, :, None].float().to(device) + share * batch.store.query[r]
        batch.launch()
        ended[name] = batch
    row = lambda name, i: [ended[name].work.source[i].tolist(), ended[name].work.hit[i].tolist()]
    assert row("row", 0) == row("layer", 0) == row("looser", 0) and 0 < row("row", 0)[0].count(-1) < 8
    assert -1 not in row("none", 0)[0]
    assert row("row", 1) == row("none", 1) and row("layer", 1) == row("looser", 1)


@pytest.mark.parametrize("max_chain", [1, 2])
@pytest.mark.parametrize("lag_weight", [0.0, 1.5])
def test_choice(max_chain, lag_weight, device):
    """Many acceptable entries: the limit lets in any of them, so that score and chain decide."""
    case = Case(lengths=(140, 100, 170), group=2, pattern="all")
    batch = Batch(case, config(threshold=0.0, lag_weight=lag_weight, max_chain=max_chain), device)
    assert observed(batch.check()) != "none"


@pytest.mark.parametrize("lag_weight, distance, sink, reuse, splits, halves, ring_dtype, max_chain", [
    (0.0, "absolute", 0, "anchored", 1, True, None, None), (0.0, "absolute", 5, "chained", 3, False, FP8, 2),
    (1.5, "absolute", 5, "chained", 1, True, None, None), (1.5, "absolute", 0, "anchored", 3, False, FP8, 2),
    (20.0, "absolute", 0, "anchored", 1, True, None, None), (20.0, "absolute", 5, "chained", 3, False, FP8, 2),
    (1.0, "relative", 5, "chained", 1, True, None, None), (1.0, "relative", 0, "anchored", 3, False, FP8, 2),
])  # fmt: skip
def test_mass(lag_weight, distance, sink, reuse, splits, halves, ring_dtype, max_chain, device):
    """Planted entries lie 0.2 d^0.5 off, which is too far with all the mass, and near enough with half of it."""
    case = Case(lengths=(140, 190), group=2, pattern="all", seed=3, ring_dtype=ring_dtype)
    keys = dict(threshold=0.9, lag_weight=lag_weight, distance=distance, sink=sink, reuse=reuse, max_chain=max_chain)
    matched = {}
    for floor in (None, 0.2):
        batch = Batch(case, config(mass_floor=floor, **keys), device)
        batch.work.tune = tune(splits, 1, 16, halves)
        # From all the mass to none.
        batch.store.lse.add_(torch.linspace(-6, 6, batch.store.lse.shape[1], device=device)[:, None])
        steps = batch.check()
        matched[floor] = [p >= 0 for step in steps.values() for p in step.source]
    assert not any(matched[None]) and 0.3 < sum(matched[0.2]) / len(matched[0.2]) < 0.9


def test_ties_go_to_the_later_position(device):
    batch = Batch(Case(pattern="none"), config(), device)
    m, r = 199, int(batch.ring[0])
    pre = unrotate(batch.query.double().cpu(), batch.cos_sin.cpu(), batch.position.cpu().long(), True)[0]
    for p in (m - 32, m - 20, m - 7, m - 11):
        batch.store.query[r, :, p % 32] = pre.to(batch.store.query)
    steps = batch.check()
    assert all(step.source == [m - 7] * 4 for step in steps.values())


def test_the_entry_that_leaves_the_window_can_be_matched(device):
    """Position m-W has the slot that m is written to."""
    batch = Batch(Case(pattern="none", lengths=(200, 230)), config(), device)
    pre = unrotate(batch.query.double().cpu(), batch.cos_sin.cpu(), batch.position.cpu().long(), True)
    for i, m in enumerate((199, 229)):
        batch.store.query[int(batch.ring[i]), :, m % 32] = pre[i].to(batch.store.query)
    steps = batch.check()
    assert all(step.source == [(199, 229)[i] - 32] * 4 for (i, _), step in steps.items())


@pytest.mark.gpu
@pytest.mark.parametrize("like_rows", [1, 8, 64])
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize(
    "distance, ring_dtype, lag_weight, reuse",
    [
        ("absolute", FP8, 0.0, "anchored"),
        ("relative", BF16, 1.0, "chained"),
        ("relative", FP8, 1.0, "chained"),
    ],
)
def test_full_size_options(distance, ring_dtype, lag_weight, reuse, d, like_rows, device):
    """Options of the match at window 512, each with the work split as for a small and a large batch."""
    settings = config(window=512, band=256, min_context=512, distance=distance, lag_weight=lag_weight, reuse=reuse)
    case = Case((2100, 4097, 700), "mixed", 4, 8, d, dtype=BF16, ring_dtype=ring_dtype)
    batch = Batch(case, settings, device)
    batch.work.tune = hit._tune(like_rows, 32, 8, batch.work.slots, d, 512, batch.store.query.dtype.itemsize)
    assert observed(batch.check()) == "mixed"
