"""Decoding by the index in PyTorch, against the same rule written plainly in float64."""

from dataclasses import replace

import pytest
import torch

from support.indexed import Batch, Case, Row
from vllm_mac.lookup import near_edges
from vllm_mac.state import IndexRule

# Products of float32 of 128 terms at most, whose sum is below 40, and an exponential of them: an error of
# 128 * eps * 40 = 6e-4 at the very worst. Rounding errors cancel, so a fiftieth is asked for.
TOLERANCE = 1.2e-5


def check(batch: Batch) -> list:
    """Whether the oracle agrees in all rows; returns them."""
    looked, case = batch.decode(), batch.case
    assert looked.out.dtype == torch.float32 and looked.read.dtype == torch.int64
    found = []
    for row, n in enumerate(case.lengths):
        out = looked.out[batch.first[row] : batch.first[row + 1]].cpu().double()
        if n == 0:
            assert not out.any() and not looked.read[row].any() and not looked.looked[row]
            continue
        want = batch.row(row)
        found.append(want)
        # No token's share lies so near the threshold that float32 might decide otherwise.
        assert not case.tolerance or ((want.share * want.own / case.tolerance - 1).abs() > 1e-5).all()
        assert bool(looked.looked[row]) == (want.end > want.begin)
        assert looked.read[row].tolist() == (want.chosen.sum(-1) + want.index_tokens).tolist()
        error = (out - want.attention(want.chosen)).abs().max()
        assert error <= TOLERANCE * want.value.abs().max()
    return found


@pytest.mark.parametrize("head_major", [True, False])
@pytest.mark.parametrize("page", [16, 32, 64])
def test_pages_of_every_size_and_layout(page, head_major):
    rows = check(Batch(Case(page=page, head_major=head_major)).write())
    assert [row.end > row.begin for row in rows] == [True, False, True]
    assert all(not row.chosen.all() for row in rows[::2])


@pytest.mark.parametrize("group", range(1, 9))
def test_groups(group):
    check(Batch(Case(group=group, seed=group)).write())


@pytest.mark.parametrize("d, n", [(32, 32), (80, 48), (128, 64), (128, 128)])
def test_head_sizes_and_directions(d, n):
    check(Batch(Case(d=d, n=n, lengths=(420,))).write())


@pytest.mark.parametrize("sink, band", [(0, 1), (1, 64), (64, 65), (300, 100), (16, 5000)])
def test_near_tokens(sink, band):
    """Also a sink beyond the sample's first span, and a band beyond the row."""
    check(Batch(Case(sink=sink, band=band, lengths=(127, 128, 129, 600))).write())


def test_long_rows_are_sampled():
    """The sample has a third span, whole or not, beyond 2048 tokens."""
    (first, second) = check(Batch(Case(lengths=(2200, 2700), kv_heads=1, group=2)).write())
    assert first.end == 2112 and second.end == 2624  # of [2048, 2176)


def test_rows_that_are_read_whole():
    """Short ones, those that opted out, and all before maps are ready: exact attention."""
    batch = Batch(Case(lengths=(127, 500, 192), opted_out=(1,))).write()
    assert batch.decode().looked.tolist() == [False, False, True]
    check(batch)
    for case in (Case(lengths=(127, 500), opted_out=(1,)), Case(ready=False)):
        batch = Batch(case).write()
        for row, looked in zip(check(batch), batch.decode().read[batch.position >= 0], strict=True):
            assert row.begin == row.end and row.chosen.all() and looked.tolist() == [row.n] * 2
            assert (row.attention(row.chosen) - plain(row)).abs().max() < 1e-12


def exact(batch: Batch) -> torch.Tensor:
    """Plain attention `[N, H, D]`."""
    return torch.cat([plain(batch.row(row)) for row in range(len(batch.case.lengths))])


def plain(row: Row) -> torch.Tensor:
    """The same of one row, `[T, H, D]`."""
    out = torch.softmax(row.logit, -1) @ row.value  # [K, T G, D]
    return out.unflatten(1, (row.tokens, -1)).permute(1, 0, 2, 3).flatten(1, 2)


def test_tolerance_nought_is_exact_attention_and_reads_all():
    batch = Batch(Case(lengths=(300, 700), tolerance=0.0)).write()
    looked = batch.decode()
    assert looked.looked.all()
    assert (looked.out.cpu() - exact(batch)).abs().max() <= TOLERANCE * 4  # as far as values reach
    index = torch.tensor([batch.row(row).index_tokens for row in range(2)])
    assert torch.equal(looked.read.cpu(), (torch.tensor([300, 700]) + index)[:, None].expand(2, 2))


@pytest.mark.parametrize("seed", range(3))
def test_the_error_falls_with_the_tolerance(seed):
    error, read = [], []
    for tolerance in (8.0, 2.0, 0.5, 0.1, 0.0):
        batch = Batch(Case(lengths=(700, 1000, 1300), tolerance=tolerance, seed=seed)).write()
        looked = batch.decode()
        error.append(float((looked.out.cpu() - exact(batch)).norm()))
        read.append(int(looked.read.sum()))
    assert error == sorted(error, reverse=True) and error[2] < error[0] / 2
    assert read == sorted(read) and read[0] < read[-1] / 2


SEVERAL = Case(lengths=(300, 41, 0, 702, 500), tokens=(2, 4, 0, 3, 1))


@pytest.mark.parametrize("group", range(1, 9))
def test_rows_of_several_tokens(group):
    """Rows that verify speculated tokens, each another number of them, and one that has none."""
    rows = check(Batch(replace(SEVERAL, group=group, seed=40 + group)).write())
    assert [row.tokens for row in rows] == [2, 4, 3, 1] and [row.end > row.begin for row in rows] == [
        True,
        False,
        True,
        True,
    ]


@pytest.mark.parametrize("page", [16, 32, 64])
def test_the_first_token_decides_what_is_indexed(page):
    """Of rows whose later tokens cross `min_context`, and the end of a tile."""
    batch = Batch(Case(lengths=(130, 131, 450, 451), page=page, tokens=(4, 4, 4, 4))).write()
    assert [row.end for row in check(batch)] == [64, 64, 320, 384]


def test_tokens_of_a_row_read_what_any_of_them_chooses():
    """And so more than each would read alone, in the same shares of the attention."""
    batch = Batch(Case(lengths=(703,), tokens=(4,))).write()
    together, row = batch.decode(), batch.row(0)
    for i in range(4):
        alone = Batch(Case(lengths=(700 + i,)))
        alone.kv, alone.query, alone.maps, alone.table = batch.kv, batch.query[i : i + 1], batch.maps, batch.table
        assert alone.decode().read.lt(together.read).all()
        assert (alone.row(0).share - row.share[:, 3 * i : 3 * i + 3]).abs().max() < 1e-12


@pytest.mark.parametrize("tolerance", [0.0, 1e6])
def test_no_token_sees_later_ones(tolerance):
    """Where all or none of the indexed tokens are read, so that no token's choice is another's."""
    batch = Batch(Case(lengths=(703,), tokens=(4,), tolerance=tolerance)).write()
    before = batch.decode().out
    batch.kv[batch.table[0, -1].long(), :, 702 % 16] += 100
    after = batch.decode().out
    assert torch.equal(after[:3], before[:3]) and (after[3] - before[3]).abs().max() > 1


def test_several_tokens_at_tolerance_nought_are_exact_attention():
    batch = Batch(replace(SEVERAL, lengths=(300, 41, 702, 500), tokens=(2, 4, 3, 1), tolerance=0.0)).write()
    assert (batch.decode().out.cpu() - exact(batch)).abs().max() <= TOLERANCE * 4


def test_pages_of_128_tokens_have_near_tokens_in_whole_pages():
    rule = IndexRule(1.5, 64, 16, 128, 1.0)
    assert near_edges(700, rule, 64) == (64, 576) and near_edges(700, rule, 128) == (128, 512)
    batch = Batch(Case(page=128, lengths=(700,), tolerance=0.0)).write()
    assert (batch.decode().out.cpu() - exact(batch)).abs().max() <= TOLERANCE * 4


@pytest.mark.parametrize("scales", [(1.0, 1.0), (0.03, 0.2)])
@pytest.mark.parametrize("head_major", [True, False])
def test_fp8_caches(scales, head_major):
    """Against the rule on the keys and values that the cache stands for, estimates by their index too."""
    case = Case(scales=scales, head_major=head_major, lengths=(300, 40, 700))
    assert [row.end > row.begin for row in check(Batch(case).write())] == [True, False, True]
    batch = Batch(replace(case, tolerance=0.0)).write()
    assert (batch.decode().out.cpu() - exact(batch)).abs().max() <= TOLERANCE * 4


def test_keys_that_differ_by_their_scale_are_one_to_the_index():
    """Numbers twice as large, with half the scale, have the same codes: a power of two rounds nothing anew."""
    one, other = (Batch(Case(scales=scales)).write() for scales in ((0.5, 0.5), (1.0, 1.0)))
    codes = [batch.layout.views(batch.kv)[0][batch.complete] for batch in (one, other)]
    assert not torch.equal(one.kv.float(), other.kv.float()) and (codes[0] == codes[1]).float().mean() > 0.99
    assert (one.decode().out - other.decode().out).abs().max() < 0.05  # but for numbers below FP8's least normal one


def test_edges():
    for n in (1, 63, 64, 128, 129, 1000):
        for band in (1, 63, 64, 65, 2000):
            begin, end = near_edges(n, IndexRule(1.0, band, 65, 1, 1.0))
            assert begin == 128 and end % 64 == 0 and end >= begin
            assert end == begin or n - band - 64 < end <= n - band
