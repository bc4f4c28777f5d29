"""The kernels of the hit path against `reference`: every shape, dtype, length and kind of row."""

import pytest
import torch

from support.hit_batches import BF16, FP8, FP16, FP32, Batch, Case, config, observed
from vllm_mac.counters import Count


@pytest.mark.parametrize("group, pattern", [
    *((group, "mixed") for group in (1, 2, 4, 7, 8, 16)), (1, "all"), (7, "all"), (4, "none"), (16, "none"),
])  # fmt: skip
def test_groups(group, pattern, device):
    case = Case(group=group, kv_heads=1 if group > 4 else 2, pattern=pattern, lengths=(100, 131, 0))
    steps = Batch(case, config(), device).check()
    assert observed(steps) == pattern


@pytest.mark.parametrize("d, page, head_major", [
    (32, 16, False), (64, 48, True), (96, 128, False), (96, 16, False), (128, 48, True), (256, 16, False), (256, 128, True),
])  # fmt: skip
def test_shapes(d, page, head_major, device):
    case = Case(d=d, page=page, head_major=head_major, lengths=(150, 97), group=2)
    assert observed(Batch(case, config(sink=5), device).check()) == "mixed"


def test_a_window_of_as_many_pages_as_there_may_be(device):
    """65,536 tokens in pages of 16 are at most 4,097 of them; as many tokens in pages of one are 8,192 with both ends."""
    case = Case(lengths=(8300,), pattern="all", group=2, kv_heads=1, d=32, page=1)
    assert observed(Batch(case, config(window=8190), device).check()) == "all"


@pytest.mark.parametrize("sink, length", [
    *((0, length) for length in (1, 2, 24, 63, 65, 255, 257)), *((4, length) for length in (1, 5, 29, 64, 256, 511)),
    *((40, length) for length in (2, 24, 41, 63, 65, 256)),
])  # fmt: skip
def test_lengths(length, sink, device):
    """From one token on, with a band and window that some of them do not fill."""
    Batch(
        Case(lengths=(length, length + 1), pattern="all", group=3, kv_heads=1),
        config(sink=sink, min_context=sink + 26),
        device,
    ).check()


@pytest.mark.parametrize("dtype, ring_dtype, reuse", [
    (BF16, BF16, "anchored"), (FP16, FP16, "chained"), (BF16, FP32, "chained"), (FP32, BF16, "anchored"),
    (FP16, BF16, "anchored"), (BF16, FP8, "anchored"), (FP32, FP8, "chained"), (BF16, BF16, "chained"),
])  # fmt: skip
def test_dtypes(dtype, ring_dtype, reuse, device):
    steps = Batch(
        Case(dtype=dtype, ring_dtype=ring_dtype, lengths=(100, 120)),
        config(sink=3, reuse=reuse),
        device,
    ).check()
    assert observed(steps) == "mixed"


@pytest.mark.parametrize("rotary, neox, reuse", [
    (0, True, "anchored"), (32, True, "chained"), (32, False, "anchored"), (64, True, "anchored"), (64, False, "chained"),
])  # fmt: skip
def test_rotary(rotary, neox, reuse, device):
    steps = Batch(Case(rotary=rotary, neox=neox), config(reuse=reuse), device).check()
    assert observed(steps) == "mixed"


def test_rows_of_all_kinds(device):
    """Short, without a ring, padded, just begun, and plain rows in one batch."""
    case = Case(lengths=(30, 200, 0, 170, 180, 64, 300, 20, 190), ringless=(1,), opted_out=(7, 8), fresh={3: 0, 4: 5})
    batch = Batch(case, config(sink=2), device)
    assert observed(batch.check()) == "mixed"
    counted = dict(zip(Count, batch.counters.tolist(), strict=True))
    assert [name for name, count in counted.items() if not count] == [
        Count.OVER_BUDGET,
        Count.NO_MAPS,
        Count.SMALL_STEP,
    ]


def test_a_paused_layer_misses_and_records(device):
    """As one that nothing can match; only what is counted differs."""
    case = Case(lengths=(30, 200, 0, 170), ringless=(3,), pattern="all")
    names = "query", "out", "lse", "chain"
    ended = []
    for paused, settings in ((0, config()), (1, config()), (None, config(threshold=1.0))):
        batch = Batch(case, settings, device)
        batch.paused = None if paused is None else torch.tensor([paused], dtype=torch.int32, device=device)
        if paused == 0:
            batch.check()
            assert batch.counters[0] > 0 and batch.counters[Count.OVER_BUDGET] == 0
            continue
        prefix = torch.zeros_like(batch.out), torch.full(batch.out.shape[:2], -torch.inf, device=device)
        batch.launch()
        batch.finish(prefix)
        ended.append((batch, dict(zip(Count, batch.counters.tolist(), strict=True))))
    (got, counted), (wanted, plain) = ended
    assert got.work.hit[:2].eq(0).all() and got.work.hit[3].eq(0).all()
    assert counted.pop(Count.MISS) == plain.pop(Count.OVER_BUDGET) == 0
    assert counted.pop(Count.OVER_BUDGET) == plain.pop(Count.MISS) == 8
    assert counted == plain and plain[Count.NO_RING] == plain[Count.SHORT_CONTEXT] == 8
    pairs = [(got.out, wanted.out), *((getattr(got.store, n), getattr(wanted.store, n)) for n in names)]
    for mine, theirs in pairs:
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)


def test_steps_in_a_row(device):
    """The ring that one step writes is the one that the next reads, past its end."""
    window = 16
    batch = Batch(Case(lengths=(110,), pattern="mixed"), config(window=window), device)
    table = torch.arange(1, 11, dtype=torch.int32, device=device)[None]
    tokens = torch.randn(2, 160, 128, generator=torch.Generator().manual_seed(1))
    kv = torch.full((12, 2, 16, 128), torch.nan)
    at = torch.arange(160)
    kv[at // 16 + 1, :, at % 16] = tokens.transpose(0, 1)
    batch.kv, batch.table = kv.to(device), table
    query = batch.query.clone()
    for step in range(window + 5):
        n = 110 + step
        batch.case.lengths, batch.tokens = (n,), [tokens[:, :n]]
        batch.position.fill_(n - 1)
        batch.first.fill_(109 - window)
        batch.query = query + 0.1 * torch.randn(query.shape, generator=torch.Generator().manual_seed(n)).to(device)
        if step == 0:
            batch.cos_sin = None
        batch.counters.zero_()
        steps = batch.check()
        if step > 2:  # what was missed at first is matched once recorded
            assert observed(steps) == "all"


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", ["all", "none", "mixed"])
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("group, kv_heads, d, page, head_major", [
    (1, 8, 64, 16, False), (2, 4, 128, 16, True), (4, 8, 128, 16, False), (7, 2, 128, 32, False),
    (8, 4, 128, 64, True), (16, 1, 256, 16, False), (4, 2, 96, 48, False), (8, 2, 256, 128, True),
])  # fmt: skip
def test_full_size(group, kv_heads, d, page, head_major, dtype, pattern, device):
    """Window 512, band 256 and lengths around them, at every size that models have."""
    lengths = (1, 255, 256, 257, 511, 512, 513, 0, 1024, 2047, 2048, 4097)
    case = Case(lengths, pattern, group, kv_heads, d, page, dtype, head_major=head_major, ringless=(9,))
    settings = config(window=512, band=256, sink=4 if dtype == FP16 else 0, min_context=512)
    assert observed(Batch(case, settings, device).check()) == ("mixed" if pattern == "all" else pattern)
