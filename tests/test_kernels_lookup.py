"""The kernels that index pages and decode by the index, against the rule written plainly.

What the kernels choose to read is taken from their lists, and must be what the rule chooses but for tokens whose share
is within rounding of the threshold. Then the output must be that of the same choice in float64, see `allowed`. Outputs,
free pages and free slots start as NaN.
"""

import math
from dataclasses import replace

import pytest
import torch

from support.devices import DEVICE
from support.indexed import Batch, Case, Row
from vllm_mac import lookup
from vllm_mac.counters import IN_SMALL_STEP, PREFILLED, Count
from vllm_mac.kernels.encode import append, encode
from vllm_mac.kernels.lookup import _check_places, look_up, merged_at_once
from vllm_mac.kernels.lookup_work import LookupWork, Tuning
from vllm_mac.key_index import FP8
from vllm_mac.lookup import SPAN

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CASES = [
    Case(),
    Case(lengths=(300, 40, 0, 700), head_major=False, page=64),
    Case(lengths=(1000,), kv_heads=1, group=7, d=128, page=32, dtype=BF16),
    Case(lengths=(500, 700), kv_heads=2, group=1, d=80, page=64, dtype=FP16, head_major=False),
    Case(lengths=(400,), kv_heads=1, group=16, d=256, page=32, dtype=BF16, head_major=False),
    Case(lengths=(400,), kv_heads=1, group=8, d=128, n=128, dtype=FP16),
    Case(lengths=(500, 900), group=2, opted_out=(1,), dtype=BF16),
    Case(lengths=(500, 0, 127), ready=False, d=32, n=32),
    Case(lengths=(128, 129, 600), sink=300, band=100),  # the sample's first span is near
    Case(lengths=(2200, 2700), kv_heads=1, group=2),  # the sample has a third span, half of it or whole
    Case(lengths=(400, 700), tolerance=0.0),
    Case(lengths=(400, 700), tolerance=1e6),
]
FLOAT8 = [
    Case(scales=(0.05, 0.3), dtype=BF16),
    Case(scales=(1.0, 1.0), dtype=FP16, lengths=(500, 0, 127), head_major=False, page=64),
    Case(scales=(0.05, 0.3), dtype=BF16, lengths=(1000,), kv_heads=1, group=7, d=128, page=32),
    Case(
        scales=(0.1, 0.02), dtype=BF16, lengths=(400,), kv_heads=1, group=16, d=256, page=16, head_major=False, seed=1
    ),
    Case(scales=(0.1, 0.1), dtype=FP16, lengths=(500, 700), kv_heads=2, group=1, d=80, page=64, opted_out=(1,)),
    Case(scales=(0.05, 0.3), dtype=BF16, lengths=(500, 127), ready=False),
    Case(scales=(0.05, 0.3), dtype=BF16, lengths=(1003, 40), kv_heads=1, group=4, d=128, tokens=(4, 2)),
]


def work_of(batch: Batch, ns: int | None = None, **tuning) -> LookupWork:
    """Buffers full of what is no number. ns: programs of each (row, KV head) pair."""
    parts, pairs = batch.case.parts, len(batch.case.lengths) * batch.case.kv_heads
    rows = max(len(batch.case.lengths), -(-pairs * (ns or 1) // batch.case.kv_heads))
    geometry = batch.geometry(max_rows=-(-rows // parts), at_once=max(batch.case.tokens, default=1) * parts)
    assert geometry.parts == parts
    work = LookupWork.allocate(geometry, batch.layout.directions, DEVICE, Tuning(**tuning))
    if ns:
        work.weighers = work.sms = pairs * ns  # so many fit, however they are compiled
        work.programs = dict.fromkeys(work.programs, pairs * ns)
        assert all(work.splits(pairs, width) == ns for width in work.programs)
        assert work.weigh_splits(pairs) == min(ns, work.tuning.most_weighers)
    for name in ("lse2", "scale", "part", "part_acc", "rest"):
        getattr(work, name).fill_(math.nan)
    for name in ("slots", "words", "read"):
        getattr(work, name).fill_(1 << 30)
    return work


def width_of(case: Case, work: LookupWork) -> int:
    """`BQ` of the kernels that decode a case's batch."""
    return work.width(case.group * (work.together if case.tokens else 1))


def run(batch: Batch, work: LookupWork) -> tuple[torch.Tensor, list[int]]:
    """The output and the counters of one step."""
    out = torch.full_like(batch.query, math.nan)
    counts = torch.zeros(len(Count), dtype=torch.int64, device=DEVICE)
    look_up(batch.rows(), batch.query, batch.kv, batch.layout, batch.maps, batch.rule, work, (out, counts))
    return out.cpu(), counts.tolist()


def chosen(batch: Batch, row: int, work: LookupWork) -> torch.Tensor:
    """What the kernels read, `[K, n]` bool: the bits of `words`, of one turn. Checks `read` and `slots`."""
    c, want = batch.case, batch.row(row)
    found = torch.zeros(c.kv_heads, want.n, dtype=torch.bool)
    if want.begin == want.end:
        return ~found
    ns = work.splits(len(c.lengths) * c.kv_heads, width_of(c, work))
    some = min(ns, -(-want.end // SPAN))  # others have nothing to do
    token = torch.arange(want.n)
    far = (token >= want.begin) & (token < want.end)
    near, block = (~far).nonzero()[:, 0], work.block(width_of(c, work), c.d, c.kv_dtype.itemsize, c.page)
    blocks = -(-len(near) // block)
    page, offset = batch.table[row // c.parts].cpu().long(), torch.arange(SPAN)
    bits = offset // 8 * 2 + offset % 2  # of the word `offset % 8 // 2`
    unit, several = torch.tensor(batch.kv.stride()) // 16, work.together if c.tokens else 1
    slots = lambda token: page[token // c.page] * unit[0] + token % c.page * unit[2]
    for head in range(c.kv_heads):
        for program in range(some):
            part = (row * c.kv_heads + head) * ns + program
            spans = torch.arange(program, -(-want.end // SPAN), some)
            assert len(spans) <= work.tuning.turn
            words = work.words[part].cpu().view(-1, SPAN // 32)[: len(spans)]
            marked = (words[:, offset % 8 // 2] >> bits) & 1 != 0  # [spans, SPAN]
            own = (spans[:, None] * SPAN + offset)[marked]
            assert far[own].all() and not found[head, own].any()
            found[head, own] = True
            share = near[blocks * program // some * block : blocks * (program + 1) // some * block]
            assert work.read[part] == len(own) + len(share)
            listed = work.slots[part].cpu().long()
            assert listed[: len(own)].sort()[0].equal(slots(own).sort()[0])
            # Where a row decodes one token near ones follow, if they have room. Then its first new token fills a block or two.
            fits = several == 1 and len(own) + len(share) <= len(listed) - 2 * block
            rest = torch.cat((share[: len(share) * fits], torch.full((2 * block,), want.n - want.tokens)))
            assert listed[len(own) : len(own) + len(rest)].equal(slots(rest))
        found[head, near] = True
    return found


class Narrowed:
    """A row whose queries are rounded as the kernels round them: what codes are multiplied with has 16 bits.

    slip: `[K, G, 1]`, how far estimates may be off because float32 rounds some of it the other way. undecided:
    `[K, end - begin]`, of which tokens that, and what float32 does to sums of a few hundred terms, may decide.
    """

    def __init__(self, want: Row):
        case = want.batch.case
        self.estimate, self.slip = want.estimate, torch.zeros(())
        if want.end > want.begin:
            unit = want.direction.abs().amax(-1, keepdim=True).clamp(min=1e-20) / 32512
            place = want.direction / unit + 0.5
            self.estimate = want.estimated(place.floor() * unit)
            either = (place - place.round()).abs() < 0.1
            self.slip = either.sum(-1, keepdim=True) * unit * 7.5 * case.d**-0.5
        self.share = want.shares(self.estimate)
        limit = case.tolerance / want.own
        self.chosen = (self.share >= limit).any(1)
        low, high = (limit * torch.exp(side * (2 * self.slip + 1e-4)) for side in (-1, 1))
        self.undecided = ((self.share >= low) & (self.share <= high)).any(1)


def check(batch: Batch, work: LookupWork) -> list[torch.Tensor]:
    """Run a step twice and check it; returns what was chosen in each row that is not padding."""
    case, tallies, read, numbers = batch.case, [0] * len(Count), [], {}
    run(batch, work)
    out, counts = run(batch, work)  # with the buffers as another step left them
    for row, n in enumerate(case.lengths):
        own = out[batch.first[row] : batch.first[row + 1]]
        if n == 0:
            assert own.isnan().all()  # nobody reads it
            continue
        want, got = batch.row(row), chosen(batch, row, work)
        narrowed, indexed = Narrowed(want), got[:, want.begin : want.end]
        assert got[:, : want.begin].all() and got[:, want.end :].all()
        assert ((indexed == narrowed.chosen) | narrowed.undecided).all()
        assert narrowed.undecided.sum() <= 0.03 * indexed.numel()  # few, so that the check above decides
        exact = want.attention(got, narrowed.estimate)
        assert ((own.double() - exact).abs() <= allowed(want, got, narrowed, exact)).all()
        # Of each KV head, by all parts of a request.
        numbers[row // case.parts] = got.sum(1) + want.index_tokens + numbers.get(row // case.parts, 0)
        short = n - want.tokens + 1 < case.min_context
        kind = Count.SHORT_CONTEXT if short else Count.HIT if case.ready else Count.NO_MAPS
        kind = Count.REQUEST if row in case.opted_out else kind
        tallies[kind] += case.kv_heads * case.group * want.tokens
        read.append(got)
    for request, number in numbers.items():
        tallies[Count.READ] += int(number.sum())
        tallies[Count.SKIPPED] += int((case.requests[request] - number).clamp(min=0).sum())
    assert counts == tallies
    return read


def allowed(want: Row, got: torch.Tensor, narrowed: Narrowed, out: torch.Tensor) -> torch.Tensor:
    """How far an output may be off, element by element.

    Each weight is rounded to the cache's dtype before it meets its value, and the result in the end: the dtype's
    half step, a whole one where Triton's interpreter truncates. To pages read in part a slip of their estimates
    comes. float32 sums are off by 1e-5 of the values at most. With FP8 weights are float16, as fine as any dtype here,
    but below 2^-14 they have steps of 2^-24.
    """
    dtype = want.batch.case.dtype
    step = torch.finfo(dtype).eps / (1 if DEVICE == "cpu" and dtype == BF16 else 2)
    size = want.attention(got, narrowed.estimate, size=True)
    slip = narrowed.slip.expand(*want.query.shape[:2], 1)
    slip = slip.unflatten(1, (want.tokens, -1)).permute(1, 0, 2, 3).flatten(1, 2)  # [T, H, 1]
    least = 1e-5 + (want.n * 2**-25 if want.batch.case.scales else 0)
    return (size + out.abs()) * (2 * step + slip) + least * want.value.abs().max()


@pytest.mark.parametrize("case", CASES + FLOAT8, ids=str)
def test_agrees_with_the_rule(case):
    batch = Batch(case).write()
    read = check(batch, work_of(batch))
    if case.tolerance == 0:
        assert all(x.all() for x in read)
    elif case.tolerance > 1e5:
        ends = [(batch.row(row).begin, batch.row(row).end) for row in range(len(read))]
        assert not any(x[:, begin:end].any() for x, (begin, end) in zip(read, ends, strict=True))
    elif case is CASES[0]:
        assert 0.1 < read[2].float().mean() < 0.9  # it looks up something


SEVERAL = [
    Case(lengths=(301, 40, 0, 703), tokens=(2, 1, 0, 2)),
    Case(lengths=(303, 40, 0, 703, 500), tokens=(4, 4, 0, 3, 1)),
    Case(lengths=(1003,), kv_heads=1, group=7, d=128, page=32, dtype=BF16, tokens=(4,)),
    Case(lengths=(502, 702), kv_heads=2, group=1, d=80, page=64, dtype=FP16, head_major=False, tokens=(3, 2)),
    Case(lengths=(401,), kv_heads=1, group=4, d=256, page=32, dtype=BF16, head_major=False, tokens=(2,)),
    Case(lengths=(500, 900), group=2, opted_out=(1,), dtype=BF16, tokens=(4, 4)),
    Case(lengths=(500, 0, 130), ready=False, d=32, n=32, tokens=(4, 0, 4)),
    Case(lengths=(130, 131, 450, 451), tokens=(4, 4, 4, 4), page=64),  # across `min_context`, and the end of a tile
    Case(lengths=(450, 451), tokens=(4, 4), band=1),  # of the last tile, which only later tokens see
    Case(lengths=(2203, 2703), kv_heads=1, group=2, tokens=(4, 4)),
    Case(lengths=(400, 700), tolerance=0.0, tokens=(4, 2)),
    Case(lengths=(400, 700), tolerance=1e6, tokens=(4, 2)),
]
PARTS = [
    Case(lengths=(1003, 1005), kv_heads=1, group=7, d=128, page=32, dtype=BF16, tokens=(3, 2), parts=2),
    Case(lengths=(503, 506, 401, 0, 0, 0, 701, 0), group=8, tokens=(3, 3, 1, 0, 0, 0, 1, 0), parts=2),
    Case(lengths=(400, 401), kv_heads=1, group=8, d=256, page=32, dtype=BF16, tokens=(1, 1), parts=2),
    Case(lengths=(702, 704, 706, 300, 0, 0), kv_heads=1, group=16, d=32, n=32, tokens=(2, 2, 2, 2, 0, 0), parts=3),
    Case(lengths=(130, 133, 400, 402), kv_heads=1, group=9, tokens=(3, 3, 3, 2), opted_out=(2, 3), parts=2),
    Case(lengths=(800, 803), group=8, tokens=(3, 3), tolerance=0.0, parts=2),  # reads everything twice
    Case(lengths=(800, 803), kv_heads=1, group=8, tokens=(3, 3), scales=(0.05, 0.3), dtype=BF16, parts=2),
]


@pytest.mark.parametrize("case", SEVERAL + PARTS, ids=str)
def test_rows_of_several_tokens(case):
    """Each row another number of them; one has none."""
    batch = Batch(case).write()
    check(batch, work_of(batch))


@pytest.mark.parametrize("group, tokens", [
    (1, 1), (1, 4), (2, 2), (3, 1), (3, 4), (4, 2), (5, 1), (5, 4), (6, 2), (7, 1), (7, 4), (8, 1), (8, 2), (8, 4),
])  # fmt: skip
def test_groups_and_tokens(group, tokens):
    batch = Batch(Case(lengths=(500,), kv_heads=1, group=group, d=32, n=32, tokens=(tokens,), seed=group)).write()
    check(batch, work_of(batch, 2))


@pytest.mark.parametrize("ns", [1, 3, 64])
def test_any_number_of_programs_shares_a_row_of_several_tokens(ns):
    """Also where a program has near tokens only that the first token of the row does not see."""
    batch = Batch(Case(lengths=(1100, 303), kv_heads=1, group=2, dtype=BF16, tokens=(4, 3))).write()
    check(batch, work_of(batch, ns))


def test_a_row_of_a_prompt_is_read_whole_and_not_counted():
    batch = Batch(Case(lengths=(500, 700), tokens=(3, 4))).write()
    out, counts = run(batch, work_of(batch))
    rows = batch.rows()
    rows.ring[0] = PREFILLED
    batch.rows = lambda: rows
    whole, counted = run(batch, work_of(batch))
    want = batch.row(0)
    exact = torch.softmax(want.logit, -1) @ want.value
    exact = exact.unflatten(1, (3, -1)).permute(1, 0, 2, 3).flatten(1, 2)
    assert (whole[:3] - exact).abs().max() < 1e-5 < (out[:3] - exact).abs().max() and torch.equal(whole[3:], out[3:])
    assert counted[Count.HIT] == counts[Count.HIT] * 4 // 7 and sum(counted) < sum(counts)
    assert counted[Count.READ] + counted[Count.SKIPPED] == 2 * 700 and not counted[Count.REQUEST]


@pytest.mark.parametrize("ns", [1, 2, 3, 7, 64])
def test_any_number_of_programs_shares_a_row(ns):
    """Also more of them than the row has spans."""
    batch = Batch(Case(lengths=(1100, 300), kv_heads=1, group=2, dtype=BF16)).write()
    work = work_of(batch, ns)
    check(batch, work)
    assert work.splits(2, width_of(batch.case, work)) == ns  # once it is compiled, too


def test_most_limits_the_programs():
    batch = Batch(Case(lengths=(600,), kv_heads=1))
    work = work_of(batch, 4)
    work.tuning = Tuning(most=3)
    assert work.splits(1, width_of(batch.case, work)) == 3
    check(batch.write(), work)


@pytest.mark.parametrize("tokens", [(), (3, 1)])
@pytest.mark.parametrize("ns", [1, 3])
def test_long_rows_are_read_in_turns(tokens, ns):
    case = Case(lengths=(1500, 300), kv_heads=1, group=2, dtype=FP32, tolerance=0.6, tokens=tokens)
    batch = Batch(case).write()
    check(batch, work := work_of(batch, ns, turn=16))
    out, counts = run(batch, work)
    turns = work_of(batch, ns, turn=2)
    again, counted = run(batch, turns)
    assert counts == counted and turns.read.equal(work.read)
    assert (again - out).abs().max() <= 1e-5 * batch.kv.nan_to_num().abs().max()


@pytest.mark.parametrize("band, lengths", [(64, (260, 1500)), (1200, (1400, 300))])
def test_lists_that_are_full(band, lengths):
    """Every token of a turn is listed; near ones have room in the last turn, or are too many for a list."""
    batch = Batch(Case(lengths=lengths, kv_heads=1, group=2, tolerance=0.0, band=band)).write()
    out, counts = run(batch, work := work_of(batch, 1, turn=2))
    assert work.read[:2].tolist() == list(lengths) and counts[Count.SKIPPED] == 0 < counts[Count.HIT]
    for row in range(2):
        want = batch.row(row)
        exact = torch.softmax(want.logit, -1) @ want.value
        assert (out[row].double() - exact.flatten(0, 1)).abs().max() < 1e-5
    assert chosen(batch, 0, work).all()  # the row that takes one turn


def test_caches_whose_places_lists_cannot_hold_are_refused():
    batch = Batch(Case(lengths=(300,))).write()
    batch.kv = batch.kv.as_strided(batch.kv.shape, (batch.kv.stride(0) + 8, *batch.kv.stride()[1:]))[:-1]
    with pytest.raises(ValueError, match="kv: .* strides .*choose multiples of 16"):
        run(batch, work_of(batch))
    far = torch.empty(1, dtype=torch.bfloat16, device="meta").expand(1 << 20, 1, 16, 128)
    with pytest.raises(ValueError, match="34359738368 elements at most"):
        _check_places(far.as_strided(far.shape, (1 << 16, 0, 128, 1)))


@pytest.mark.parametrize("sharp", [0.0, 40.0, 400.0])
def test_logits_that_are_all_alike_or_far_apart(sharp):
    """A query of noughts, and logits some hundreds apart: few tokens have nearly all of the attention."""
    batch = Batch(Case(lengths=(700,), sharp=sharp)).write()
    out, _ = run(batch, work_of(batch))
    assert out.isfinite().all()
    if sharp == 0:
        check(batch, work_of(batch))


@pytest.mark.parametrize("case", [*CASES[:7], *FLOAT8[:5], Case(lengths=(500, 0, 127), d=32, n=32)], ids=str)
def test_encode(case):
    """Pages whose last slot is written are indexed, no others; then all of them."""
    batch = Batch(case)
    last = torch.tensor([page * case.page + case.page - 1 for page in batch.complete], device=DEVICE)
    padding = torch.tensor([-1, case.page - 2, -1], device=DEVICE)
    encode(batch.kv, torch.cat((padding, last)), batch.layout, batch.maps)
    codes, means = (x.to("cpu", copy=True) for x in batch.layout.views(batch.kv))
    others = sorted({*range(len(batch.kv))} - {*batch.complete})
    assert means[others].isnan().all()
    for page in batch.complete:
        key, value = batch.kv[page].cpu().double().chunk(2, -1)
        check_codes(codes[page], key * (case.scales or (1.0,))[0], batch)
        most = 4 / (case.scales or (1.0, 1.0))[1]  # of a mean
        assert ((means[page].double() - value.mean(1)).abs() <= torch.finfo(means.dtype).eps * most).all()
    encode(batch.kv, None, batch.layout, batch.maps)
    again = [x.cpu() for x in batch.layout.views(batch.kv)]
    assert torch.equal(again[0][batch.complete], codes[batch.complete])
    assert torch.equal(again[1][batch.complete], means[batch.complete])


@pytest.mark.parametrize("case", [CASES[0], CASES[1], *CASES[3:5]], ids=str)
def test_append(case):
    """Keys and values reach their slots, and the pages that they complete are indexed as `encode` indexes them."""
    batch, want = Batch(case), Batch(case)
    last = [page * case.page + case.page - 1 for page in batch.complete]
    encode(want.kv, torch.tensor(last, device=DEVICE), batch.layout, batch.maps)
    table, lengths = batch.table.tolist(), case.lengths
    ends = [(row, n) for row, n in enumerate(lengths) if n % case.page]
    slots = [*last, *(table[row][n // case.page] * case.page + n % case.page - 1 for row, n in ends), -1]
    at = torch.tensor(slots[:-1])
    page, token = at // case.page, at % case.page
    both = batch.kv[page, :, token].clone()  # [n, K, 2 D], of which key and value are no neighbours
    batch.kv[page, :, token] = math.nan
    # As in vLLM, rows of padding follow.
    both = torch.cat((both, torch.full_like(both[:2], math.nan)))
    key, value = both.chunk(2, -1)
    append(key, value, torch.tensor(slots, device=DEVICE), batch.kv, batch.layout, batch.maps, pdl=DEVICE == "cuda")
    assert torch.equal(batch.kv.nan_to_num(), want.kv.nan_to_num())
    for mine, theirs in zip(batch.layout.views(batch.kv), batch.layout.views(want.kv), strict=True):
        assert torch.equal(mine[batch.complete], theirs[batch.complete])
        others = sorted({*range(len(mine))} - {*batch.complete})
        assert torch.equal(mine[others].float().nan_to_num(), theirs[others].float().nan_to_num())


@pytest.mark.parametrize("tokens", [(4, 2, 1), (17, 16, 3)])
def test_append_of_several_tokens(tokens):
    """Of each row its last ones, some of which complete a page: whatever order programs run in, it has the index of all."""
    case = Case(lengths=(131, 33, 64), page=16)
    batch, want = Batch(case), Batch(case)
    encode(want.kv, torch.tensor([p * 16 + 15 for p in batch.complete], device=DEVICE), batch.layout, batch.maps)
    slots = [
        int(batch.table[row, i // 16]) * 16 + i % 16
        for row, (n, count) in enumerate(zip(case.lengths, tokens, strict=True))
        for i in range(n - count, n)
    ]
    page, token = torch.tensor(slots) // 16, torch.tensor(slots) % 16
    done = [p for p in batch.complete if p not in page]
    encode(batch.kv, torch.tensor([p * 16 + 15 for p in done], device=DEVICE), batch.layout, batch.maps)
    key, value = batch.kv[page, :, token].clone().chunk(2, -1)
    batch.kv[page, :, token] = math.nan
    slots = torch.tensor([-1, *slots, -1], device=DEVICE)  # a slot before the first one is no part of its page
    key, value = (torch.cat((x[:1], x, x[:1])) for x in (key, value))
    key[[0, -1]] = value[[0, -1]] = math.nan
    append(key, value, slots, batch.kv, batch.layout, batch.maps, DEVICE == "cuda", at_once=max(tokens))
    assert torch.equal(batch.kv.nan_to_num(), want.kv.nan_to_num()) and len(done) < len(batch.complete)
    for mine, theirs in zip(batch.layout.views(batch.kv), batch.layout.views(want.kv), strict=True):
        assert torch.equal(mine[batch.complete], theirs[batch.complete])


@pytest.mark.parametrize("case", FLOAT8[:5], ids=str)
def test_append_rounds_to_fp8(case):
    """As PyTorch divides and rounds, and the largest is the largest; pages are indexed as `encode` indexes them."""
    batch, want = Batch(case), Batch(case)
    last = [page * case.page + case.page - 1 for page in batch.complete]
    draw = torch.Generator().manual_seed(1)
    both = torch.randn(len(last) + 2, case.kv_heads, 2 * case.d, generator=draw) * 4
    both[0, 0, : case.d] = torch.linspace(-900, 900, case.d) * case.scales[0]  # twice as far as FP8 reaches
    both[1] = torch.exp2(torch.randn(both[1].shape, generator=draw) * 8)
    both = both.to(case.dtype).to(DEVICE)
    slots = torch.tensor([*last, -1], device=DEVICE)
    page, token = slots[:-1] // case.page, slots[:-1] % case.page
    want.kv.view(torch.uint8)[page, :, token] = batch.held(both[: len(last)].cpu()).to(DEVICE).view(torch.uint8)
    encode(want.kv, slots, batch.layout, batch.maps)
    key, value = both.chunk(2, -1)
    append(key, value, slots, batch.kv, batch.layout, batch.maps, pdl=DEVICE == "cuda")
    found, wanted = (one.kv.float().nan_to_num(1e9) for one in (batch, want))
    assert (found == torch.finfo(FP8).max).any() and torch.equal(found, wanted)
    for mine, theirs in zip(batch.layout.views(batch.kv), batch.layout.views(want.kv), strict=True):
        assert torch.equal(mine[batch.complete], theirs[batch.complete])


def check_codes(packed: torch.Tensor, key: torch.Tensor, batch: Batch) -> None:
    """Codes are the levels of the mapped keys, and one next to it only where the key lies at their border."""
    maps = [x.cpu().double() for x in (batch.maps.to_key, batch.maps.shift)]
    place = key @ maps[0] - maps[1][:, None]
    code = torch.cat((packed % 16, packed // 16), -1)
    # float32 sums of products: eps times the sum of their sizes, at the very worst for each term.
    off = (key.abs() @ maps[0].abs()) * 2**-23 * 8 + 1e-5
    low, high = ((place + side * off).floor().clamp(0, 15) for side in (-1, 1))
    assert ((code >= low) & (code <= high)).all() and (low == high).double().mean() > 0.99


def test_no_slots_are_no_work():
    batch = Batch(CASES[0])
    encode(batch.kv, torch.zeros(0, dtype=torch.int64, device=DEVICE), batch.layout, batch.maps)
    assert batch.layout.views(batch.kv)[1].isnan().all()


@pytest.mark.parametrize("ready", [True, False])
def test_rows_of_a_small_step_are_read_whole(ready):
    """And counted as such, but for what is too short anyway."""
    batch = Batch(Case(lengths=(700, 300, 90), opted_out=(1,), ready=ready)).write()
    rows, out, counts = batch.rows(), torch.full_like(batch.query, math.nan), torch.zeros(len(Count), dtype=torch.int64)
    counts = counts.to(DEVICE)
    ring = torch.where(rows.ring == -1, IN_SMALL_STEP, rows.ring).int()
    look_up(
        replace(rows, ring=ring),
        batch.query,
        batch.kv,
        batch.layout,
        batch.maps,
        batch.rule,
        work_of(batch),
        (out, counts),
    )
    want = lookup.decode(replace(rows, ring=ring), batch.query, batch.kv, batch.layout, batch.maps, batch.rule)
    assert not want.looked.any() and (out - want.out).abs().max() <= 1e-3
    heads, found = batch.case.kv_heads * batch.case.group, counts.tolist()
    assert [found[kind] for kind in (Count.SMALL_STEP, Count.REQUEST, Count.SHORT_CONTEXT)] == [heads] * 3
    assert found[Count.HIT] == found[Count.NO_MAPS] == found[Count.SKIPPED] == 0


def test_the_kernels_and_pytorch_agree():
    """The oracle that CPUs run, in a case where no token lies at the threshold."""
    batches = (Batch(Case(lengths=(300, 700), seed=seed)).write() for seed in range(9))
    batch = next(x for x in batches if not any(Narrowed(x.row(row)).undecided.any() for row in range(2)))
    out, counts = run(batch, work_of(batch))
    looked = batch.decode()
    assert counts[Count.READ] == int(looked.read.sum())
    assert (out - looked.out.cpu()).abs().max() <= 1e-3


def test_programs_are_as_many_as_run_at_once():
    """Where the kernel has to be compiled with more registers than it was asked for first, fewer."""
    work = replace(work_of(Batch(CASES[0])), sms=10, programs={8: 120, 16: 80}, found={8: {}, 16: {}})
    assert work.splits(4, 8) == 30 and work.splits(4, 16) == 20
    work.found[8]["a"] = {"num_warps": 1, "maxnreg": 168}
    assert work.splits(4, 8) == 30  # 12 of an SM
    work.found[8]["b"] = {"num_warps": 1, "maxnreg": 152}
    assert work.splits(4, 8) == 30  # all registers are enough for 13, those of a quarter for three
    work.found[8]["c"] = {"num_warps": 1, "maxnreg": 200}
    assert work.splits(4, 8) == 20
    work.found[8]["d"] = {"num_warps": 2, "maxnreg": 255}
    assert work.splits(4, 8) == 10 and work.splits(1000, 8) == 1
    assert work.splits(4, 16) == 20  # whatever other widths need


@pytest.mark.parametrize(
    "ns, d, most",
    [(1, 128, (4, 128)), (4, 64, (4, 64)), (5, 80, (16, 128)), (17, 128, (64, 32)), (64, 256, (64, 32)), (198, 128, (256, 32))],
)  # fmt: skip
def test_a_head_s_results_are_merged_in_one_read(ns, d, most):
    assert merged_at_once(ns, d) == most


@pytest.mark.parametrize("width", [8, 16, 64, 128])
@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize("itemsize", [1, 2])
def test_every_way_to_launch_fits_an_sm(width, size, itemsize):
    """Whatever the group, as that of one KV head for all queries."""
    ways = LookupWork.options(width, size, itemsize, 64)
    ways.append(LookupWork.weigher_options(width, size, 64))
    assert all(32 * way["num_warps"] * way["maxnreg"] <= 65536 and way["num_warps"] <= 32 for way in ways)
