"""The kernels that own and seed rings: `assign` against `RingTable.assign`, `record_prefill`
against the recording of `paged.prefill`.

Assignments must be equal, state and all. Recorded entries may differ from the oracle's by the
rounding of what is stored in few bits, and by the float32 arithmetic of both.
"""

import random
from collections import Counter
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch

from vllm_mac import paged
from vllm_mac.kernels.assign import assign
from vllm_mac.kernels.record import record_prefill
from vllm_mac.ring import RingStore, RingTable

INTERPRETED = not torch.cuda.is_available()
DEVICE = "cpu" if INTERPRETED else "cuda"
BF16, FP16, FP32, FP8 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn


# --- assign ------------------------------------------------------------------------------------


@dataclass
class Sequence:
    """Tokens computed so far, in `blocks`; the first `prompt` of them are prefilled."""

    prompt: int
    request: int
    length: int = 0
    blocks: list[int] = field(default_factory=list)


@dataclass
class Row:
    """Positions `[start, stop)` of a sequence. slots: whether its tokens have any."""

    start: int
    stop: int
    blocks: list[int]
    prefilling: bool = False
    request: int = -1
    slots: bool = True


class Tables:
    """The oracle's table and the kernel's, driven by the same batches."""

    def __init__(self, rings, blocks, size, window, min_context, padded, idle=1):
        config = SimpleNamespace(window=window, min_context=min_context)
        self.expected = RingTable(rings, blocks, size, config, "cpu", idle)
        self.table = RingTable(rings, blocks, size, config, DEVICE, idle)
        self.columns, self.padded, self.seen = blocks, padded, Counter()

    def step(self, rows: list[Row], requests=True, flags=True, pads=0, loose=0):
        """One step. pads: rows of padding. loose: tokens past the last row's. Returns the rings."""
        expected, table, size = self.expected, self.table, self.expected.block_size
        draw = random.Random(self.expected.step)
        # Padding keeps what was there: a length, blocks; or one token without a slot.
        padding = [Row(n, n, [1], False, 0) for n in (0, 5, 7)] + [
            Row(-1, 0, [1], False, 0, slots=False)
        ]
        known, rows = len(rows), rows + [draw.choice(padding) for _ in range(pads)]
        count = torch.tensor([row.stop - row.start for row in rows])
        length = torch.tensor([row.stop for row in rows])
        slots = []
        for row in rows:
            for p in range(row.start, row.stop):
                slots.append(row.blocks[p // size] * size + p % size if row.slots else -1)
        block_table = torch.full((len(rows), self.columns), 1 << 30, dtype=torch.int32)
        for i, row in enumerate(rows):
            block_table[i, : len(row.blocks)] = torch.tensor(row.blocks, dtype=torch.int32)
        prefilling = torch.tensor([row.prefilling for row in rows]) if flags else count > 1
        request = torch.tensor([row.request for row in rows])
        self._observe(rows, count, prefilling, request if requests else None)

        given = expected.assign(
            length - count, length, prefilling, block_table.where(block_table < 1 << 30, 0),
            torch.tensor(slots, dtype=torch.int64), torch.arange(len(rows)).repeat_interleave(count),
            request if requests else None,
        )  # fmt: skip
        begin = torch.cat((torch.zeros(1, dtype=torch.int64), count.cumsum(0)))
        slots += [draw.randrange(len(expected.owner) - 1) * size for _ in range(loose)]
        position, ring, first = torch.full((3, self.padded), -77, dtype=torch.int32, device=DEVICE)
        assign(
            table, begin.int().to(DEVICE), length.int().to(DEVICE),
            prefilling[:known].to(DEVICE) if flags else None, block_table.to(DEVICE),
            torch.tensor(slots, dtype=torch.int64, device=DEVICE),
            request[:known].int().to(DEVICE) if requests else None, position, ring, first,
        )  # fmt: skip

        rest = self.padded - len(rows)
        single = (count == 1) & (length > 0)
        assert position.tolist() == torch.where(single, length - 1, -1).tolist() + [-1] * rest
        assert ring.tolist() == given.ring.tolist() + [-1] * rest
        assert first.tolist() == given.first.tolist() + [0] * rest
        for name in ("owner", "last", "request", "last_block", "first", "used"):
            got, want = getattr(table, name).cpu(), getattr(expected, name)
            # The oracle dumps what has no ring into the last element, and never reads these.
            kept = slice(None) if name in ("owner", "last", "request") else slice(-1)
            assert torch.equal(got[kept], want[kept]), name
        assert table.step == expected.step and table.states() == expected.states()
        return given.ring.tolist()[:known]

    def _observe(self, rows, count, prefilling, request):
        """Count the situations that the batch puts the table into."""
        t, claims = self.expected, Counter()
        wants = 0
        for i, row in enumerate(rows):
            if count[i] == 0 or row.start < 0:
                self.seen["padding"] += 1
                continue
            ring = int(t.owner[row.blocks[(row.start - 1) // t.block_size]]) if row.start else -1
            same = ring >= 0 and int(t.last[ring]) == row.start - 1
            if same and request is not None and int(t.request[ring]) != row.request:
                self.seen["another request's"] += 1
                same = False
            if ring >= 0 and not same:
                self.seen["out of date"] += 1
            if same:
                claims[ring] += 1
                self.seen["continued"] += 1
                self.seen["prefilled on"] += bool(prefilling[i])
            elif row.stop >= t.config.min_context:
                wants += 1
            else:
                self.seen["short"] += 1
        self.seen["contested"] += sum(n > 1 for n in claims.values())
        # The step has not been counted yet.
        left = sum(
            int(u) <= t.step + 1 - t.idle_steps and r not in claims
            for r, u in enumerate(t.used[:-1])
        )
        self.seen["fresh"] += min(wants, left)
        self.seen["exhausted"] += wants > left


class Traffic:
    """Sequences that come, grow, share their prefix, stall and go, in any order."""

    def __init__(self, seed, blocks, size, rows, chunk):
        self.draw, self.size, self.rows, self.chunk = random.Random(seed), size, rows, chunk
        self.free, self.users = list(range(1, blocks)), [0] * blocks
        self.sequences = []

    def _share(self, parent: Sequence, length: int) -> Sequence:
        """A sequence with the first `length` tokens of `parent`, in the same blocks."""
        prompt = length + self.draw.choice((0, 0, 1, self.chunk))
        # Not always another request: one may also be resumed while its blocks are still there.
        request = self.draw.choice((parent.request, parent.request, self.draw.randrange(self.rows)))
        child = Sequence(prompt, request, length, parent.blocks[: length // self.size])
        for block in child.blocks:
            self.users[block] += 1
        self.sequences.append(child)
        return child

    def _end(self, sequence: Sequence) -> None:
        self.sequences.remove(sequence)
        for block in sequence.blocks:
            self.users[block] -= 1
            if not self.users[block]:
                self.free.append(block)

    def _row(self, sequence: Sequence) -> Row | None:
        start, left = sequence.length, sequence.prompt - sequence.length
        stop = start + (min(left, self.draw.randint(1, self.chunk)) if left > 0 else 1)
        missing = -(-stop // self.size) - len(sequence.blocks)
        if missing > len(self.free):
            return None
        for _ in range(missing):
            block = self.free.pop(self.draw.randrange(len(self.free)))
            self.users[block] = 1
            sequence.blocks.append(block)
        sequence.length = stop
        return Row(start, stop, list(sequence.blocks), left > 0, sequence.request)

    def batch(self) -> list[Row]:
        draw, planned, rows = self.draw, [], []
        while len(self.sequences) < self.rows and draw.random() < 0.4:
            self.sequences.append(
                Sequence(draw.randint(1, 4 * self.chunk), draw.randrange(self.rows))
            )
        for sequence in list(self.sequences):
            if draw.random() < 0.04:
                self._end(sequence)
            elif sequence.length and sequence.length % self.size == 0 and draw.random() < 0.3:
                self._share(sequence, sequence.length)
        queue = draw.sample(self.sequences, len(self.sequences))
        while queue and len(rows) < self.rows:
            sequence = queue.pop()
            row = self._row(sequence) if draw.random() < 0.85 else None
            if row is None:
                continue
            rows.append(row)
            planned.append(sequence)
            if (
                row.stop % self.size == 0 and draw.random() < 0.2
            ):  # before anything is in the blocks
                queue.append(self._share(sequence, row.stop))
        if len(rows) < min(3, self.rows) and not self.free:
            for sequence in [s for s in self.sequences if s not in planned]:
                self._end(sequence)
        return rows


TRAFFIC = [(1, 2, 1, 12), (2, 3, 1, 5), (4, 5, 2, 16), (16, 4, 1, 40), (3, 2, 1, 1)]


@pytest.mark.parametrize("requests", [False, True])
def test_assign_follows_the_oracle(requests):
    """Any traffic, whose situations are counted: short prompts, shared prefixes, too few rings."""
    seen = Counter()
    for seed, (size, rings, idle, min_context) in enumerate(TRAFFIC):
        rows, blocks = 8, 16 + 160 // size
        tables = Tables(rings, blocks, size, 6, min_context, padded=rows + 3, idle=idle)
        traffic = Traffic(seed, blocks, size, rows, chunk=3 * size + 1)
        for i in range(28 if INTERPRETED else 150):
            batch = traffic.batch()
            pads = traffic.draw.randrange(4) if batch else 1
            tables.step(batch, requests, i % 2 > 0, pads, loose=traffic.draw.randrange(3))
        seen += tables.seen
    reached = ["padding", "continued", "prefilled on", "contested", "fresh", "exhausted"]
    reached += ["out of date", "short"] + ["another request's"] * requests
    assert all(seen[what] > 3 for what in reached), seen


def test_assign_ties():
    """Decoding before prefilling, then the earlier row; longest unused first, then by number."""
    tables = Tables(rings=6, blocks=40, size=4, window=8, min_context=4, padded=8)
    rows = [Row(0, 4, [1 + i], True) for i in range(6)]
    assert tables.step(rows[:3], requests=False) == [0, 1, 2]
    assert tables.step([Row(4, 8, [2, 10], True)], requests=False) == [1]
    assert tables.step(rows[3:], requests=False) == [3, 4, 5]
    # Unused longest: 0 and 2, then 1, then 3, 4, 5; ring 0 is still its row's own.
    assert tables.step([Row(0, 4, [20], True), Row(4, 5, [1, 21]), Row(0, 4, [22], True), Row(0, 4, [23], True)],
                       requests=False) == [2, 0, 1, 3]  # fmt: skip
    # Both rows share block 4, whose ring is 3's former one; only one may go on with ring 4.
    twins = [Row(4, 6, [5, 24], True), Row(4, 5, [5, 25]), Row(4, 5, [5, 26])]
    assert tables.step(twins, requests=False) == [5, 4, 0]
    assert tables.seen["contested"] == 1


def test_assign_forgets_blocks_that_are_written_anew():
    """A row may share a block that another begins to write in the same step."""
    tables = Tables(rings=3, blocks=9, size=4, window=8, min_context=4, padded=4)
    tables.step([Row(0, 4, [1], True)])
    # Another sequence now writes block 1, and a third continues from position 3 of it.
    assert tables.step([Row(4, 5, [1, 2]), Row(0, 4, [1], True)]) == [1, 2]


def test_assign_needs_room():
    tables = Tables(rings=1, blocks=4, size=4, window=8, min_context=4, padded=1)
    with pytest.raises(ValueError, match="position: 1 elements"):
        tables.step([Row(0, 1, [1]), Row(0, 1, [2])])


@pytest.mark.parametrize("rings", [1024, 100, 7])
def test_assign_full_size(rings):
    """1024 rows and rings; prompts of 16384 tokens; many rows that want a ring at once."""
    size, blocks = 16, 20_000
    tables = Tables(rings, blocks, size, window=64, min_context=128, padded=1024)  # most rows grow past it
    tables.columns = 2000
    draw = random.Random(rings)
    long = Sequence(16_384, 5, 0, list(range(1, 1026)))
    rest = [Sequence(1, i, 0, list(range(1030 + 15 * i, 1045 + 15 * i))) for i in range(1020)]
    for step in range(20):
        rows = []
        if step < 2:
            rows.append(Row(8192 * step, 8192 * (step + 1), long.blocks, True, 5))
        for sequence in rest if step % 5 else rest[:50]:
            stop = min(sequence.length + (draw.randint(1, 60) if step < 8 else 1), 15 * size)
            if stop > sequence.length:
                rows.append(
                    Row(sequence.length, stop, sequence.blocks, stop < 150, sequence.request)
                )
                sequence.length = stop
        tables.step(rows, pads=draw.randrange(4), loose=3)
    assert tables.seen["continued"] and tables.seen["fresh"] and tables.seen["short"]
    assert tables.seen["exhausted"] or rings == 1024


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
    angle = torch.arange(longest)[:, None] * 0.3 ** (torch.arange(rotary // 2) * 8 / max(rotary, 1))
    cos_sin = (1.1 * torch.cat((angle.cos(), angle.sin()), -1)).to(case.dtype) if rotary else None
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
        paged.prefill(start, mine, pre.float(), kv, table[i], int(ring[i]), want, config, scale)
        last = p[-window:]
        token += (begins[i] + last - start).tolist()
        row += [i] * len(last)
        position += last.tolist()
        at = torch.arange(stop)
        key, value = paged.gather(kv, table[i], at)
        q = (
            mine[-window:]
            .double()
            .view(len(last), k, case.group, d)
            .permute(1, 2, 0, 3)
            .flatten(1, 2)
        )
        end = (last + 1 - case.band).repeat(case.group)
        part = paged.attend(q, key.double(), value.double(), at, torch.tensor(lo), end, scale)
        by_head = lambda x: x.unflatten(1, (case.group, -1)).movedim(2, 0).flatten(1, 2)
        empty = (last + 1 - case.band <= lo)[:, None].expand(-1, h)
        outs.append(by_head(part.out).masked_fill(empty[..., None], torch.nan))
        lses.append(
            (by_head(part.lse) / torch.log(torch.tensor(2.0))).masked_fill(empty, torch.nan)
        )
        if i not in case.ringless:
            kinds["far"] += int((last + 1 - case.band > lo).sum())
            kinds["near only"] += int(
                ((last + 1 - case.band <= lo) & (last + 1 - case.band > case.sink)).sum()
            )
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
    record_prefill(
        seen_query.to(DEVICE)[..., :d], ints(token), ints(row), ints(position), ints(ring), ints(table),
        laid.to(DEVICE), store, config, scale, prefix_out.to(DEVICE), prefix_lse.to(DEVICE),
        None if cos_sin is None else seen_cos_sin.to(DEVICE), case.neox,
    )  # fmt: skip

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


@pytest.mark.parametrize("sink", [0, 4, 16, 20, 40])
@pytest.mark.parametrize("page, head_major", [(16, False), (48, True)])
def test_record_sinks_and_pages(sink, page, head_major):
    chunks = ((0, 110), (36, 42), (40, 41), (0, 3), (47, 50), (62, 74))
    kinds = check(Case(chunks, sink=sink, page=page, head_major=head_major, window=8))
    assert kinds["far"] and kinds["empty"] and bool(kinds["near only"]) == (sink % page > 0)


@pytest.mark.parametrize(
    "group, d", [(1, 32), (2, 64), (7, 96), (8, 128), (16, 256), (1, 256), (16, 32)]
)
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


@pytest.mark.parametrize(
    "chunks", [((0, 1),), ((20, 24), (20, 25)), ((511, 512),), ((7, 40), (24, 40))]
)
def test_record_lengths(chunks):
    """One token; a prefix of none and of one; the window just filled, just overfilled."""
    check(Case(chunks=chunks, ringless=(), sink=0, group=2))


def test_record_nothing():
    prefix = torch.empty(0, 4, 64), torch.empty(0, 4)
    none = torch.empty(0, dtype=torch.int32)
    kv, store = torch.empty(2, 2, 16, 128), RingStore.allocate(1, 4, 8, 64, FP32, "cpu")
    config = SimpleNamespace(window=8, band=4, sink=0)
    table = torch.zeros(1, 1, dtype=torch.int32)
    record_prefill(
        torch.empty(0, 4, 64), none, none, none, none, table, kv, store, config, 1.0, *prefix
    )


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
