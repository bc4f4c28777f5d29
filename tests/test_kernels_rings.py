"""The kernels that say what rings hold and that seed them: `assign` against `RingTable.assign`, `record_prefill`
against the recording of `paged.prefill`.

Assignments must be equal, state and all. Recorded entries may differ from the oracle's by the
rounding of what is stored in few bits, and by the float32 arithmetic of both.
"""

import random
from collections import Counter
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from support.devices import DEVICE
from support.ring_model import assign as model_assign
from support.ring_model import play, random_engine, random_schedule
from support.rotations import cosines_and_sines, rotation
from vllm_mac import paged
from vllm_mac.kernels.assign import FRESH, PREFILLING, SKIPS, assign
from vllm_mac.kernels.record import record_prefill
from vllm_mac.ring import RingTable
from vllm_mac.rope import Rotary
from vllm_mac.state import Chunk, LayerState, RingStore, Seeds

INTERPRETED = DEVICE == "cpu"
BF16, FP16, FP32, FP8 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn


# --- assign ------------------------------------------------------------------------------------


class Both:
    """The oracle's table and the kernel's, given the same batches; stands in for `ring_model.assign`."""

    def __init__(self, padded: int):
        self.padded, self.tables, self.seen = padded, {}, Counter()

    def __call__(self, expected: RingTable, start, length, ring, fresh, prefilling, skips) -> list[int]:
        if id(expected) not in self.tables:
            self.tables[id(expected)] = RingTable(expected.rings, expected.window, DEVICE), expected
        table, _ = self.tables[id(expected)]
        for mine, theirs in ((table.first, expected.first), (table.last, expected.last)):
            mine.copy_(theirs)  # the model may have let them sleep
        rows, rest = len(start), self.padded - len(start)
        count = [b - a for a, b in zip(start, length)]
        flags = [FRESH.value * f + PREFILLING.value * p + SKIPS.value * s for f, p, s in zip(fresh, prefilling, skips)]
        ints = lambda values: torch.tensor(values, dtype=torch.int32, device=DEVICE)
        position, got, first = torch.full((3, self.padded), -77, dtype=torch.int32, device=DEVICE)
        assign(
            table,
            ints([0, *count]).cumsum(0, dtype=torch.int32),
            ints(length),
            ints(ring),
            ints(flags),
            position,
            got,
            first,
        )
        wanted = model_assign(expected, start, length, ring, fresh, prefilling, skips)
        single = [n - 1 if c == 1 and n > 0 else -1 for c, n in zip(count, length)]
        assert position.tolist() == single + [-1] * rest
        used = [r if c > 0 and a >= 0 and not s else -1 for r, c, a, s in zip(ring, count, start, skips)]
        assert got.tolist() == used + [-1] * rest
        assert first.tolist() == wanted + [0] * rest
        # The oracle dumps what has no ring into the last element.
        assert torch.equal(table.first[:-1].cpu(), expected.first[:-1]) and torch.equal(
            table.last[:-1].cpu(), expected.last[:-1]
        )
        self.seen["rows"] += rows
        return wanted


@pytest.mark.parametrize("drafts", [0, 2])
def test_assign_follows_the_oracle(drafts):
    """Over schedules of `ring_model`, which checks what may be read besides."""
    seen = Counter()
    for seed in range(4 if INTERPRETED else 30):
        rng, both = random.Random(seed), Both(40)
        engine = random_engine(
            rng,
            drafts=drafts,
            told=seed % 2 > 0,
            lanes=1 + seed % 3 // 2,
            seed=seed,
            answer=both,
            exact=0.3 * (seed % 2),
        )
        play(engine, random_schedule(rng, 120))
        seen += engine.seen + both.seen
    reached = ["rows", "entries read", "ring taken over", "copied", "slept"] + ["rejected"] * (drafts > 0)
    assert all(seen[what] > 3 for what in reached), seen


@pytest.mark.parametrize("rings", [1024, 100, 7])
def test_assign_full_size(rings):
    """1024 rows, most of which continue; positions up to 100,000."""
    draw, both = random.Random(rings), Both(1024)
    table = RingTable(rings, 64, "cpu")
    length = [draw.randrange(100_000) for _ in range(1020)]
    holder = [i if i < rings else -1 for i in range(1020)]
    for step in range(8):
        start = [max(0, n - draw.choice((0, 0, 0, 1, 70))) for n in length]
        length = [n + draw.choice((0, 1, 1, 1, 3, 300)) for n in start]
        flag = lambda share: [draw.random() < share for _ in start]
        fresh = [True] * 1020 if step == 0 else flag(0.05)
        both(table, start, length, holder, fresh, flag(0.1), flag(0.1))
    assert both.seen["rows"] == 8 * 1020


def test_assign_leaves_rings_that_only_padding_names():
    """Whatever is stale in its rows."""
    both, table = Both(8), RingTable(3, 8, "cpu")
    table.first[:3], table.last[:3] = torch.tensor([0, 1, 2]), torch.tensor([7, 8, 9])
    assert both(table, [8, -1, 5], [9, 0, 5], [0, 1, 2], *[[False] * 3] * 3) == [0, 0, 5]
    assert table.first[:3].tolist() == [0, 1, 2] and table.last[:3].tolist() == [8, 8, 9]


@pytest.mark.parametrize("short", ["position", "rings", "flags"])
def test_assign_needs_room(short):
    ints = lambda n: torch.zeros(n, dtype=torch.int32, device=DEVICE)
    sizes = {name: 1 if name == short else 2 for name in ("position", "rings", "flags")}
    with pytest.raises(ValueError, match=rf"{short}: 1 elements, choose at least as many as rows \(2\)"):
        assign(
            RingTable(1, 8, DEVICE), ints(3), ints(2), ints(sizes["rings"]), ints(sizes["flags"]), ints(sizes["position"]),
            ints(2), ints(2),
        )  # fmt: skip


# --- record ------------------------------------------------------------------------------------


@dataclass
class Case:
    """A batch: rows of chunks `(start, stop)`, each with a ring unless in `ringless`."""

    chunks: tuple = ((0, 70), (33, 43), (20, 21), (0, 9))
    ringless: tuple = (2,)
    group: int = 4
    kv_heads: int = 2
    d: int = 64
    page: int = 16
    dtype: torch.dtype = BF16
    ring_dtype: torch.dtype | None = None
    prefix_dtype: torch.dtype | None = None
    head_major: bool = False
    rotary: int | None = None  # default: d
    neox: bool = True
    size: float = 1.0  # of the queries; scores are divided by it
    window: int = 16
    band: int = 24
    sink: int = 0
    seed: int = 0


def unrotate(query, table, position, neox):
    """The queries `[n, H, d]` before RoPE, float64, with `table` `[positions, rotary]`."""
    cos, sin = (x[:, None] for x in table[position].double().chunk(2, -1))
    size = table.shape[-1]
    x, rest = query.double()[..., :size], query.double()[..., size:]
    a, b = x.chunk(2, -1) if neox else (x[..., ::2], x[..., 1::2])
    back = (a * cos + b * sin) / (cos**2 + sin**2), (b * cos - a * sin) / (cos**2 + sin**2)
    back = torch.cat(back, -1) if neox else torch.stack(back, -1).flatten(-2)
    return torch.cat((back, rest), -1)


def check(case: Case) -> Counter:
    """Record a batch and compare everything written. Returns what kinds of summaries there were."""
    g = torch.Generator().manual_seed(case.seed)
    k, d, page, window = case.kv_heads, case.d, case.page, case.window
    rows, h, scale = len(case.chunks), k * case.group, d**-0.5 / case.size
    ring_dtype, prefix_dtype = case.ring_dtype or case.dtype, case.prefix_dtype or case.dtype
    out_dtype = case.dtype if ring_dtype == FP8 else ring_dtype
    config = SimpleNamespace(window=window, band=case.band, sink=case.sink)
    lo = -(-case.sink // page) * page

    # Inputs. What may not be read is NaN: free blocks, other positions, other tokens, empty prefixes.
    pages = [-(-stop // page) for _, stop in case.chunks]
    order = torch.randperm(sum(pages) + 1, generator=g).int() + 1
    table = torch.zeros(rows, max(pages) + 1, dtype=torch.int32)
    for i, n in enumerate(pages):
        table[i, :n], order = order[:n], order[n:]
    kv = torch.randn(sum(pages) + 2, k, page, 2 * d, generator=g).to(case.dtype)
    seen_kv = torch.full_like(kv, torch.nan)
    block, near = table[:, case.sink // page].long(), slice(case.sink % page, page)
    if lo > case.sink:
        seen_kv[block, :, near] = kv[block, :, near]
    begins = [0]
    for start, stop in case.chunks:
        begins.append(begins[-1] + stop - start)
    query = (case.size * torch.randn(begins[-1], h, d, generator=g)).to(case.dtype)
    longest = max(stop for _, stop in case.chunks)
    rotary = d if case.rotary is None else case.rotary
    cos_sin = (1.1 * cosines_and_sines(longest, rotary)).to(case.dtype) if rotary else None
    ring = torch.tensor([-1 if i in case.ringless else rows - i for i in range(rows)])

    # Expected, and the prefixes that FlashInfer would give.
    names = ("query", "out", "lse", "chain")
    want = RingStore.allocate(rows + 2, h, window, d, FP32, "cpu")
    store = RingStore.allocate(rows + 2, h, window, d, ring_dtype, "cpu", out_dtype)
    for each in (want, store):
        for name in names:
            getattr(each, name).fill_(-7 if name == "chain" else torch.nan)
    token, row, position, outs, lses, kinds = [], [], [], [], [], Counter()
    for i, (start, stop) in enumerate(case.chunks):
        mine = query[begins[i] : begins[i + 1]]
        p = torch.arange(start, stop)
        pre = mine.double() if cos_sin is None else unrotate(mine, cos_sin, p, case.neox)
        paged.prefill(Chunk(start, int(ring[i]), table[i]), mine, pre.float(), kv, want, config, scale)
        last = p[-window:]
        token += (begins[i] + last - start).tolist()
        row += [i] * len(last)
        position += last.tolist()
        at = torch.arange(stop)
        key, value = paged.gather(kv, table[i], at)
        q = mine[-window:].double().view(len(last), k, case.group, d).permute(1, 2, 0, 3).flatten(1, 2)
        end = (last + 1 - case.band).repeat(case.group)
        part = paged.attend(q, key.double(), value.double(), at, torch.tensor(lo), end, scale)
        by_head = lambda x: x.unflatten(1, (case.group, -1)).movedim(2, 0).flatten(1, 2)
        empty = (last + 1 - case.band <= lo)[:, None].expand(-1, h)
        outs.append(by_head(part.out).masked_fill(empty[..., None], torch.nan))
        lses.append((by_head(part.lse) / torch.log(torch.tensor(2.0))).masked_fill(empty, torch.nan))
        if i not in case.ringless:
            kinds["far"] += int((last + 1 - case.band > lo).sum())
            kinds["near only"] += int(((last + 1 - case.band <= lo) & (last + 1 - case.band > case.sink)).sum())
            kinds["empty"] += int((last + 1 - case.band <= case.sink).sum())
    seen_query = torch.full((len(query), h, d + 8), torch.nan, dtype=case.dtype)  # and rows apart
    seen_query[token, :, :d] = query[token]
    seen_cos_sin = None
    if cos_sin is not None:
        seen_cos_sin = torch.full_like(cos_sin, torch.nan)
        seen_cos_sin[position] = cos_sin[position]
    # Padding, as of a batch whose size is rounded up.
    token, row, position = token + [0, 1], row + [-1, -1], position + [-1, 3]
    nothing = torch.full((2, h, d), torch.nan)
    prefix_out = torch.cat((*outs, nothing)).to(prefix_dtype)
    prefix_lse = torch.cat((*lses, nothing[..., 0])).float()

    def ints(x):
        return torch.as_tensor(x).int().to(DEVICE)

    laid = seen_kv if case.head_major else seen_kv.transpose(1, 2).contiguous().transpose(1, 2)
    store = RingStore(**{name: getattr(store, name).to(DEVICE) for name in names})
    rotary = rotation(None if cos_sin is None else seen_cos_sin.to(DEVICE), case.neox)
    layer = LayerState(store, config, rotary, None)
    seeds = Seeds(*map(ints, (token, row, position, ring, table)))
    prefix = prefix_out.to(DEVICE), prefix_lse.to(DEVICE)
    record_prefill(layer, seeds, seen_query.to(DEVICE)[..., :d], laid.to(DEVICE), *prefix, scale)

    # A float32 score errs by at most d roundings of |q| |k| scale, in the kernel and in the oracle.
    unit = torch.finfo(FP32).eps
    reach = float(query.float().norm(dim=-1).max() * kv[..., :d].float().norm(dim=-1).max()) * scale
    lse_error = unit * (d * reach + 4 * (reach + torch.tensor(float(longest)).log()))
    biggest = float(kv[..., d:].abs().max())
    # The prefix is rounded before it is merged with weight at most 1, the result after.
    # Triton's interpreter truncates to bf16.
    unit_of = lambda dtype: torch.finfo(dtype).eps / (1 if INTERPRETED and dtype == BF16 else 2)
    round_in, round_out, round_query = torch.finfo(prefix_dtype).eps / 2, unit_of(out_dtype), unit_of(ring_dtype)
    got = RingStore(**{name: getattr(store, name).cpu() for name in names})
    written = want.chain == 0
    assert written.any() and torch.equal(got.chain, want.chain)
    for name in ("query", "out"):
        assert torch.equal(getattr(got, name).isnan(), getattr(want, name).isnan()), name
        assert torch.equal(getattr(got, name)[..., 0].isnan(), ~written), name
    expected, error = want.out[written], (got.out.float() - want.out)[written].abs()
    bound = round_in * biggest + round_out * expected.abs() * 1.01 + 4 * lse_error * biggest
    assert (error <= bound).all(), float((error - bound).max())
    expected, least = want.query[written], 8 * unit * query.float().abs().max()
    if ring_dtype == FP8:
        # What float8 does not reach becomes its largest; 2^-10 is half the spacing of its smallest.
        expected, least = expected.clamp(-448, 448), least + 2**-10
    error = (got.query.float()[written] - expected).abs()
    bound = round_query * expected.abs() * 1.01 + least
    assert (error <= bound).all(), float((error - bound).max())
    expected, found = want.lse[written], got.lse[written]
    some = expected > -torch.inf
    assert torch.equal(found > -torch.inf, some) and (got.out[written][~some] == 0).all()
    assert ((found - expected)[some].abs() <= 2 * lse_error).all()
    assert torch.equal(got.lse.isnan(), ~written)
    return kinds


@pytest.mark.parametrize("sink, page, head_major", [
    (0, 48, True), (4, 16, False), (16, 16, False), (16, 48, True), (20, 16, False), (40, 48, True),
])  # fmt: skip
def test_record_sinks_and_pages(sink, page, head_major):
    chunks = ((0, 110), (36, 42), (40, 41), (0, 3), (47, 50), (62, 74))
    kinds = check(Case(chunks, sink=sink, page=page, head_major=head_major, window=8))
    assert kinds["far"] and kinds["empty"] and bool(kinds["near only"]) == (sink % page > 0)


@pytest.mark.parametrize("group, d", [(1, 32), (2, 64), (7, 96), (8, 128), (16, 256), (1, 256), (16, 32)])
def test_record_shapes(group, d):
    kinds = check(Case(group=group, d=d, sink=3, window=5, chunks=((0, 50), (30, 34)), ringless=()))
    assert kinds["far"] and kinds["near only"]


@pytest.mark.parametrize("dtype, ring_dtype, prefix_dtype", [
    (BF16, BF16, BF16), (FP16, FP16, FP16), (BF16, FP32, FP32), (FP32, BF16, FP32), (FP16, BF16, FP32), (FP32, FP32, FP32),
])  # fmt: skip
def test_record_dtypes(dtype, ring_dtype, prefix_dtype):
    assert check(
        Case(
            ((30, 44), (0, 3)),
            (),
            dtype=dtype,
            ring_dtype=ring_dtype,
            prefix_dtype=prefix_dtype,
            sink=5,
        )
    )["far"]


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("size", [1.0, 300.0])
def test_record_float8_queries(size, dtype):
    """Elements of queries beyond 448, of which size 300 has many, are recorded as that, not as NaN."""
    assert check(Case(((30, 44), (0, 3)), (), dtype=dtype, ring_dtype=FP8, size=size, sink=5))["far"]


@pytest.mark.parametrize("neox", [True, False])
@pytest.mark.parametrize("rotary", [0, 32, 64])
def test_record_rotary(rotary, neox):
    check(Case(rotary=rotary, neox=neox, dtype=FP32, window=4))


@pytest.mark.parametrize("chunks", [((0, 1),), ((20, 24), (20, 25)), ((511, 512),), ((7, 40), (24, 40))])
def test_record_lengths(chunks):
    """One token; a prefix of none and of one; the window just filled, just overfilled."""
    check(Case(chunks=chunks, ringless=(), sink=0, group=2))


def test_record_nothing():
    prefix = torch.empty(0, 4, 64), torch.empty(0, 4)
    none = torch.empty(0, dtype=torch.int32)
    kv, store = torch.empty(2, 2, 16, 128), RingStore.allocate(1, 4, 8, 64, FP32, "cpu")
    config = SimpleNamespace(window=8, band=4, sink=0)
    seeds = Seeds(none, none, none, none, torch.zeros(1, 1, dtype=torch.int32))
    record_prefill(LayerState(store, config, Rotary(None), None), seeds, torch.empty(0, 4, 64), kv, *prefix, 1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("group, kv_heads, d, page, head_major, dtype", [
    (1, 8, 64, 16, False, BF16), (4, 8, 128, 16, False, BF16), (7, 2, 128, 32, True, FP16),
    (16, 1, 256, 16, False, BF16), (4, 2, 96, 48, True, FP16),
])  # fmt: skip
def test_record_full_size(group, kv_heads, d, page, head_major, dtype):
    """Window 512, band 256 and chunks around them."""
    chunks = ((0, 257), (100, 612), (3, 516), (3500, 4097), (2000, 2001))
    kinds = check(Case(
        chunks, (4,), group, kv_heads, d, page, dtype, head_major=head_major, window=512, band=256, sink=4,
    ))  # fmt: skip
    assert kinds["far"] and kinds["near only"] and kinds["empty"]


@pytest.mark.gpu
@pytest.mark.parametrize("size", [1.0, 300.0])
def test_record_full_size_float8(size):
    chunks = ((0, 257), (100, 612), (3500, 4097))
    case = Case(chunks, (), 4, 8, 128, ring_dtype=FP8, size=size, window=512, band=256)
    assert check(case)["far"]
