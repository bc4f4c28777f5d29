"""The kernels of the hit path against `reference`, in float64 on the same stored values.

A tolerance is what an eager evaluation in the inputs' dtype misses the oracle by, times a
small factor. All outputs, workspaces, free pages and rings start as NaN; slots of a row's ring that are not its
own, and those that nothing may match, hold queries nearer than all others.
"""

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from rounding import FLOAT32, largest_score
from test_kernels_exact import two_stages

from vllm_mac import reference
from vllm_mac.counters import OPTED_OUT, Count
from vllm_mac.fused import Decoder
from vllm_mac.kernels import hit
from vllm_mac.kernels.complete import complete_misses
from vllm_mac.kernels.exact import Completion, PrefixProblem, TritonExact
from vllm_mac.kernels.hit import Workspace, decode_hits
from vllm_mac.reference import Entry, Partial
from vllm_mac.ring import RingStore, narrow
from vllm_mac.rope import Rotary

INTERPRETED = not torch.cuda.is_available()
BF16, FP16, FP32, FP8 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn


@pytest.fixture
def device():
    return "cpu" if INTERPRETED else "cuda"


def config(**changes):
    keys = {
        "window": 32,
        "band": 24,
        "sink": 0,
        "threshold": 0.45,
        "distance": "absolute",
        "min_context": 64,
        "lag_weight": 0.0,
        "reuse": "anchored",
        "max_chain": None,
        "mass_floor": None,
    }
    return SimpleNamespace(**keys | changes)


@dataclass
class Case:
    """A batch: `lengths` tokens per row (0: padding), each with a ring unless in `ringless` or `opted_out`."""

    lengths: tuple = (200,)
    pattern: str = "mixed"  # which groups hit: all, none, mixed
    group: int = 4
    kv_heads: int = 2
    d: int = 64
    page: int = 16
    dtype: torch.dtype = FP32
    ring_dtype: torch.dtype | None = None
    head_major: bool = False
    rotary: int | None = None  # default: d
    neox: bool = True
    ringless: tuple = ()
    opted_out: tuple = ()  # rows without a ring because their request wants none
    slack: dict = field(default_factory=dict)  # row -> what its request grants at most
    size: float = 1.0  # of the queries
    fresh: dict = field(default_factory=dict)  # row -> number of entries its ring holds
    seed: int = 0


def rotate(pre, table, position, neox):
    """RoPE of `[B, H, d]`, float64, with `table` `[positions, rotary]`."""
    cos, sin = table[position.clamp(min=0)].double()[:, None].chunk(2, -1)
    n = 2 * cos.shape[-1]
    x, rest = pre[..., :n], pre[..., n:]
    a, b = x.chunk(2, -1) if neox else (x[..., ::2], x[..., 1::2])
    turned = a * cos - b * sin, b * cos + a * sin
    turned = torch.cat(turned, -1) if neox else torch.stack(turned, -1).flatten(-2)
    return torch.cat((turned, rest), -1)


def unrotate(query, table, position, neox):
    cos, sin = table.double().chunk(2, -1)
    square = torch.cat((cos, cos), -1) ** 2 + torch.cat((sin, sin), -1) ** 2
    return rotate(query, torch.cat((cos, -sin), -1) / square, position, neox)


class Batch:
    """Random inputs of `case` on `device`; `check` decodes them and compares with the oracle."""

    def __init__(self, case: Case, config, device):
        self.case, self.config, self.device = case, config, device
        g = torch.Generator().manual_seed(case.seed)

        def randn(*shape):
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        b, k, d, w, page = len(case.lengths), case.kv_heads, case.d, config.window, case.page
        h = k * case.group
        length = torch.tensor(case.lengths)
        self.position = length - 1
        pages = [-(-n // page) for n in case.lengths]
        blocks = sum(pages) + 2
        order = torch.randperm(blocks - 1, generator=g) + 1
        self.table = torch.zeros(b, max(pages) + 1, dtype=torch.int32)
        self.tokens = []  # [K, n, 2d] per row
        kv = torch.full((blocks, k, page, 2 * d), torch.nan, dtype=case.dtype)
        for i, n in enumerate(case.lengths):
            mine, order = order[: pages[i]], order[pages[i] :]
            self.table[i, : pages[i]] = mine
            self.tokens.append(randn(k, n, 2 * d).to(case.dtype))
            at = torch.arange(n)
            kv[mine[at // page], :, at % page] = self.tokens[i].transpose(0, 1)
        self.kv = kv if case.head_major else kv.transpose(1, 2).contiguous().transpose(1, 2)

        rotary = d if case.rotary is None else case.rotary
        self.cos_sin = None
        if rotary:
            angle = torch.arange(int(length.max()))[:, None] * 0.3 ** (torch.arange(rotary // 2) * 8 / rotary)
            self.cos_sin = (1.1 * torch.cat((angle.cos(), angle.sin()), -1)).to(case.dtype)
        pre = case.size * randn(b, h, d)
        query = pre if self.cos_sin is None else rotate(pre, self.cos_sin, self.position, case.neox)
        self.query = query.to(case.dtype)

        self.ring = torch.tensor([-1 if i in case.ringless or n == 0 else i for i, n in enumerate(case.lengths)])
        self.ring = torch.where(self.ring >= 0, b - self.ring, -1)  # not the row's own number
        self.ring[list(case.opted_out)] = OPTED_OUT
        self.slack = torch.tensor([case.slack.get(i, 1.0) for i in range(b)])
        self.first = torch.tensor([max(0, n - 1 - case.fresh.get(i, w)) for i, n in enumerate(case.lengths)])
        ring_dtype = case.ring_dtype or case.dtype
        out_dtype = case.dtype if ring_dtype == FP8 else ring_dtype
        self.store = RingStore.allocate(b + 2, h, w, d, ring_dtype, "cpu", out_dtype)
        for tensor in (self.store.query, self.store.out, self.store.lse):
            tensor.fill_(torch.nan)
        self.store.chain.fill_(-7)
        for i in range(b):
            if self.ring[i] < 0:
                continue
            m, r = int(self.position[i]), int(self.ring[i])
            # What the row may not match is nearer than anything else: entries of an earlier owner, and further down
            # those with an empty summary.
            decoys = pre[i, :, None] + 0.02 * case.size * randn(h, w, d)
            self.store.query[r] = narrow(decoys, self.store.query.dtype)
            self.store.lse[r], self.store.chain[r] = 9, 0
            for p in range(max(int(self.first[i]), m - w, 0), m):
                slot = p % w
                empty = p + 1 - config.band <= config.sink
                if not empty:
                    self.store.query[r, :, slot] = randn(h, d).to(self.store.query.dtype)
                self.store.out[r, :, slot] = randn(h, d).to(self.store.out.dtype)
                self.store.lse[r, :, slot] = -torch.inf if empty else randn(h).float() + 4
                self.store.chain[r, :, slot] = torch.randint(0, 3, (h,), generator=g).int()
            oldest = max(int(self.first[i]), m - w, config.band + config.sink)
            for head in range(h if oldest < m else 0):
                hits = {
                    "all": True,
                    "none": False,
                    "mixed": (head // case.group + i) % 2 == 0 or head % case.group > 0,
                }
                if hits[case.pattern]:
                    p = int(torch.randint(oldest, m, (), generator=g))
                    near = pre[i, head] + 0.2 * case.size * randn(d)
                    self.store.query[r, head, p % w] = narrow(near, self.store.query.dtype)
                    self.store.chain[r, head, p % w] = 0
        for name in ("position", "table", "kv", "cos_sin", "query", "ring", "first", "slack"):
            tensor = getattr(self, name)
            moved = None if tensor is None else tensor.to(device)
            setattr(self, name, moved.int() if name in ("position", "ring", "first") else moved)
        # .to() keeps strides only of dense tensors, which kv is.
        names = ("query", "out", "lse", "chain")
        self.store = RingStore(**{name: getattr(self.store, name).to(device) for name in names})
        self.work = Workspace.allocate(b + 1, h, k, d, device)
        for tensor in (
            self.work.part_out,
            self.work.part_lse,
            self.work.band_acc,
            self.work.band_sum,
        ):
            tensor.fill_(torch.nan)
        for tensor in (self.work.key, self.work.source, self.work.hit):
            tensor.fill_(-9)
        self.out = torch.full_like(self.query, torch.nan)
        self.counters = torch.zeros(len(Count), dtype=torch.int64, device=device)
        self.scale = d**-0.5
        self.paused = None
        self._engine = None

    def oracle(self, dtype=torch.float64):
        """A `reference.Step` per (row, KV head), and the new `Entry` of each of its heads."""
        case, w = self.case, self.config.window
        query, pre = self.query.cpu(), self.query.cpu().double()
        if self.cos_sin is not None:
            pre = unrotate(pre, self.cos_sin.cpu(), self.position.cpu().long(), case.neox)
        names = ("query", "out", "lse", "chain")
        store = SimpleNamespace(**{name: getattr(self.store, name).cpu() for name in names})
        steps, entries = {}, {}
        for i, n in enumerate(case.lengths):
            m, r = n - 1, int(self.ring[i])
            if m < 0:
                continue
            for k in range(case.kv_heads):
                heads = range(k * case.group, (k + 1) * case.group)
                rings = [{} for _ in heads]
                if r >= 0:
                    for p in range(max(int(self.first[i]), m - w, 0), m):
                        for ring, h in zip(rings, heads, strict=True):
                            at = r, h, p % w
                            summary = Partial(store.out[at].to(dtype), store.lse[at].to(dtype))
                            ring[p] = Entry(store.query[at].double(), summary, int(store.chain[at]))
                key, value = self.tokens[i][k].to(dtype).chunk(2, -1)
                head = slice(heads.start, heads.stop)
                step = reference.decode(
                    m,
                    query[i, head].to(dtype),
                    pre[i, head],
                    key,
                    value,
                    rings,
                    self.config,
                    self.scale,
                    float(self.slack[i]),
                )
                steps[i, k], entries[i, k] = step, [ring[m] for ring in rings]
        return steps, entries

    def prefix(self, steps):
        """What a miss engine gives: attention over `[lo, m+1-band)`, NaN where the group hit."""
        case, page = self.case, self.case.page
        out = torch.full(self.query.shape, torch.nan, dtype=torch.float32)
        lse = torch.full(self.query.shape[:2], torch.nan)
        for (i, k), step in steps.items():
            _, band_start = reference.split(case.lengths[i] - 1, self.config)
            lo = min(-(-self.config.sink // page) * page, band_start)
            key, value = self.tokens[i][k].double().chunk(2, -1)
            for h in range(k * case.group, (k + 1) * case.group):
                if not step.hit:
                    q = self.query[i, h].cpu().double()
                    part = reference.attend(q, key, value, lo, band_start, self.scale)
                    out[i, h] = part.out if lo < band_start else torch.nan
                    lse[i, h] = part.lse / torch.log(torch.tensor(2.0))
        return out.to(self.device), lse.to(self.device)

    def launch(self):
        decode_hits(
            self.query, self.position, self.ring, self.first, self.slack, self.table, self.kv,
            self.store, self.config, self.scale, self.work, self.out, self.counters,
            self.cos_sin, self.case.neox, paused=self.paused,
        )  # fmt: skip

    def finish(self, prefix):
        complete_misses(
            self.query, self.position, self.ring, self.store, *prefix, self.work, self.out,
            self.cos_sin, self.case.neox,
        )  # fmt: skip

    def engine(self):
        """The engine for misses, which also completes them; not made anew for each step."""
        if self._engine is None:
            rows, heads, d = self.query.shape
            problem = PrefixProblem(
                max_rows=rows, heads=heads, kv_heads=self.kv.shape[1], head_size=d, page_size=self.kv.shape[2],
                max_blocks=self.table.shape[1], dtype=self.query.dtype, band=self.config.band, sink=self.config.sink,
                scale=self.scale,
            )  # fmt: skip
            self._engine = TritonExact(problem, self.device)
        return self._engine

    def finish_at_once(self):
        """As `finish`, with the prefix as the engine for misses finds it."""
        completion = Completion(self.ring, self.work, self.store, self.cos_sin, self.case.neox)
        hit = self.work.hit[: len(self.query)]
        self.engine().run(self.query, self.kv, self.table, self.position, hit, self.out, None, completion)

    def check(self):
        """Run one step, its misses completed in every way, and compare everything it may write with the
        oracle. Returns its steps."""
        steps, entries = self.oracle()
        rough, rough_entries = self.oracle(self.case.dtype)
        prefix = self.prefix(steps)
        before = {name: getattr(self.store, name).clone() for name in ("query", "out", "lse", "chain")}
        for whole in (False, True):
            for name, content in before.items():
                getattr(self.store, name).copy_(content)
            self.out.fill_(torch.nan)
            self.work.hit.fill_(-9)
            self.counters.zero_()
            self.work.whole = whole
            self.launch()
            self.finish_at_once() if whole else self.finish(prefix)
            self.compare(steps, entries, rough, rough_entries, RingStore(**{k: x.clone() for k, x in before.items()}))
        return steps

    def compare(self, steps, entries, rough, rough_entries, before):
        case, config = self.case, self.config
        ring_eps = torch.finfo(self.store.out.dtype).eps
        expected = dict.fromkeys(Count, 0)
        for (i, k), step in steps.items():
            m, at = case.lengths[i] - 1, slice(k * case.group, (k + 1) * case.group)
            assert self.work.source[i, at].tolist() == step.source, (i, k)
            assert bool(self.work.hit[i, k]) == step.hit
            sigma = largest_score(self.query[i, at].cpu(), self.tokens[i][k].chunk(2, -1)[0], self.scale)
            close(self.out[i, at], step.out, rough[i, k].out, torch.finfo(case.dtype).eps, sigma)
            short, ringless = m + 1 < config.min_context, int(self.ring[i]) < 0
            kind = (
                Count.HIT
                if step.hit
                else Count.REQUEST
                if i in case.opted_out
                else Count.SHORT_CONTEXT
                if short
                else Count.NO_RING
                if ringless
                else Count.MISS
            )
            expected[kind] += case.group
            expected[Count.READ] += step.read
            expected[Count.SKIPPED] += m + 1 - step.read
            if ringless:
                continue
            r, slot = int(self.ring[i]), m % config.window
            for h, entry, rough_entry in zip(range(at.start, at.stop), entries[i, k], rough_entries[i, k], strict=True):
                at_slot = r, h, slot
                close_query(self.store.query[at_slot].cpu(), entry.query)
                close(self.store.out[at_slot], entry.summary.out, rough_entry.summary.out, ring_eps, sigma)
                if entry.summary.lse == -torch.inf:
                    assert self.store.lse[at_slot] == -torch.inf
                else:
                    # An LSE errs by no more than its largest score does.
                    error = abs(float(rough_entry.summary.lse.double() - entry.summary.lse))
                    assert abs(float(self.store.lse[at_slot]) - entry.summary.lse) <= 2 * error + 1e-5
                assert int(self.store.chain[at_slot]) == entry.chain
                for name in (
                    "query",
                    "out",
                    "lse",
                    "chain",
                ):  # so that the rest can be compared below
                    getattr(before, name)[at_slot] = getattr(self.store, name)[at_slot]
        for name in ("query", "out", "lse", "chain"):
            torch.testing.assert_close(
                getattr(self.store, name).float(),
                getattr(before, name).float(),
                rtol=0,
                atol=0,
                equal_nan=True,
            )
        assert dict(zip(Count, self.counters.tolist(), strict=True)) == expected
        assert not self.work.arrived.any()
        for i, n in enumerate(case.lengths):
            if n == 0:
                assert self.out[i].isnan().all() and (self.work.hit[i] == -9).all()


def close(got, exact, rough, eps, sigma=0.0):
    """`got` misses `exact` by little more than `rough`, a low-precision evaluation, does.

    sigma: largest score. Scaling a score and shifting it by another round it, and weights take that over.
    """
    got, exact, rough = got.double().cpu(), exact.double(), rough.double()
    norm = exact.norm() if exact.norm() > 0 else 1.0
    error, eager = (got - exact).norm() / norm, (rough - exact).norm() / norm
    bound = 2 * eager + 4 * eps + 2 * FLOAT32 * sigma
    assert error <= bound, f"error {error:.2e}, eager {eager:.2e}, bound {bound:.2e}"  # NaN fails


def close_query(got, exact):
    """`got`, in a ring's dtype, is `exact` rounded to it."""
    if got.dtype != FP8:
        return close(got, exact, exact, 2 * torch.finfo(got.dtype).eps)
    # Half the spacing, 2^-9 among the smallest; what is beyond the largest is the largest.
    exact = exact.clamp(-448, 448)
    bound = 1.01 * exact.abs() * torch.finfo(FP8).eps / 2 + 2**-10
    assert ((got.double() - exact).abs() <= bound).all()  # NaN fails


def observed(steps):
    hits = {step.hit for step in steps.values()}
    return "mixed" if len(hits) == 2 else "all" if True in hits else "none"


@pytest.mark.parametrize("pattern", ["all", "none", "mixed"])
@pytest.mark.parametrize("group", [1, 2, 4, 7, 8, 16])
def test_groups(group, pattern, device):
    case = Case(group=group, kv_heads=1 if group > 4 else 2, pattern=pattern, lengths=(100, 131, 0))
    steps = Batch(case, config(), device).check()
    assert observed(steps) == pattern


@pytest.mark.parametrize("d", [32, 64, 96, 128, 256])
@pytest.mark.parametrize("page, head_major", [(16, False), (48, True), (128, False)])
def test_shapes(d, page, head_major, device):
    case = Case(d=d, page=page, head_major=head_major, lengths=(150, 97), group=2)
    assert observed(Batch(case, config(sink=5), device).check()) == "mixed"


def test_a_window_of_as_many_pages_as_there_may_be(device):
    """65,536 tokens in pages of 16 are at most 4,097 of them; as many tokens in pages of one are 8,192 with both ends."""
    case = Case(lengths=(8300,), pattern="all", group=2, kv_heads=1, d=32, page=1)
    assert observed(Batch(case, config(window=8190), device).check()) == "all"


@pytest.mark.parametrize("length", [1, 2, 5, 24, 63, 64, 65, 255, 256, 257, 511])
@pytest.mark.parametrize("sink", [0, 4, 40])
def test_lengths(length, sink, device):
    """From one token on, with a band and window that some of them do not fill."""
    Batch(
        Case(lengths=(length, length + 1), pattern="all", group=3, kv_heads=1),
        config(sink=sink, min_context=sink + 26),
        device,
    ).check()


@pytest.mark.parametrize(
    "dtype, ring_dtype",
    [(BF16, BF16), (FP16, FP16), (BF16, FP32), (FP32, BF16), (FP16, BF16), (BF16, FP8), (FP32, FP8)],
)
@pytest.mark.parametrize("reuse", ["anchored", "chained"])
def test_dtypes(dtype, ring_dtype, reuse, device):
    steps = Batch(
        Case(dtype=dtype, ring_dtype=ring_dtype, lengths=(100, 120)),
        config(sink=3, reuse=reuse),
        device,
    ).check()
    assert observed(steps) == "mixed"


@pytest.mark.parametrize("pattern", ["all", "none"])
def test_float8_rings_saturate(pattern, device):
    """Queries with many elements beyond 448 hit and miss like others, and leave no NaN."""
    case = Case(pattern=pattern, ring_dtype=FP8, size=300.0, rotary=0)
    batch = Batch(case, config(distance="relative", reuse="chained"), device)
    batch.scale /= case.size
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
@pytest.mark.parametrize("d", [32, 64, 96, 128])
def test_distance(distance, size, threshold, pattern, found, d, device):
    """Long queries of which a near one is planted, and short ones with none nearer than their size."""
    case = Case(d=d, size=size, pattern=pattern, rotary=d // 2, group=2)
    settings = config(distance=distance, threshold=threshold)
    assert observed(Batch(case, settings, device).check()) == found


def tune(splits, bands, small, halves):
    """A `Workspace.tune`: small: how much at a time. halves: as there."""
    return {
        "splits": splits, "bands": bands, "bw": small, "bn": small, "bt": 16,
        "stages": 1, "near_stages": 1, "scan_stages": 1, "warps": 4, "halves": halves,
        "registers": None,
    }  # fmt: skip


@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("d, lag_weight", [(64, 0.0), (64, 0.1), (128, 0.1), (128, 4.0)])
@pytest.mark.parametrize("distance, ring_dtype", [("absolute", FP32), ("relative", FP8)])
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


def test_every_threshold_runs_the_same_kernel(device):
    """Layers with thresholds of their own share one compiled kernel; the bound is an argument."""
    batch = Batch(Case(lengths=(140,)), config(), device)
    launched = []

    class Kernel:
        warmup = staticmethod(lambda **arguments: None)

        def __getitem__(self, _grid):
            return lambda **arguments: launched.append(arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hit, "hit_kernel", Kernel())
        for batch.config.threshold in (0.0, 0.45, 1.0):
            batch.launch()
    first, *others = launched
    for arguments in others:
        differ = [name for name, was in first.items() if arguments[name] is not was and not same(arguments[name], was)]
        assert differ == ["bound"] and arguments.keys() == first.keys()


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


def test_threads_get_the_registers_that_they_need(device, monkeypatch):
    """The fewest of those to choose from under which none is kept in memory; found once for each variant."""
    asked, launched = [], []

    class Kernel:
        @staticmethod
        def warmup(grid, maxnreg, **arguments):
            asked.append((grid, maxnreg))
            return SimpleNamespace(_init_handles=lambda: None, n_spills=needed > maxnreg)

        def __getitem__(self, grid):
            return lambda maxnreg, **arguments: launched.append((grid, maxnreg))

    monkeypatch.setattr(hit, "hit_kernel", Kernel())
    for wanted, needed, tried, taken in (  # noqa: B007 - Kernel reads `needed`
        (128, 120, [128], 128), (128, 160, [128, 168], 168), (128, 200, [128, 168], 255), (168, 400, [168], 255), (None, 99, [], None),
    ):  # fmt: skip
        batch = Batch(Case(lengths=(140, 140)), config(), device)
        batch.work.tune = tune(1, 1, 16, True) | {"registers": wanted}
        asked.clear(), launched.clear()
        batch.launch(), batch.launch()
        assert [limit for _, limit in asked] == tried and [limit for _, limit in launched] == [taken] * 2
        assert {grid for grid, _ in [*asked, *launched]} == {(1 + batch.case.group, batch.case.kv_heads, 2)}


def test_a_decoder_takes_each_layer_s_own_threshold(device):
    """One decoder, made with one configuration, serves layers whose thresholds differ."""
    lengths = (200, 190)
    fresh = dict.fromkeys(range(2), 31)  # without the entry whose slot the first step overwrites
    batch = Batch(Case(lengths, "all", rotary=0, fresh=fresh), config(miss_engine="triton", audit=0.0), device)
    problem = PrefixProblem(
        max_rows=2, heads=8, kv_heads=2, head_size=64, page_size=16, max_blocks=13, dtype=FP32,
        band=24, sink=0, scale=batch.scale,
    )  # fmt: skip
    decoder = Decoder(problem, batch.config, torch.device(device))
    for name in ("position", "ring", "first"):
        getattr(decoder, name).copy_(getattr(batch, name))
    for threshold, hits in ((1.0, 0), (0.45, 16)):
        own = batch.config = config(threshold=threshold)
        steps, _ = batch.oracle()
        rough, _ = batch.oracle(FP32)
        batch.counters.zero_()
        decoder.begin_step(batch.table, batch.kv)
        decoder.decode(batch.query, batch.kv, batch.table, batch.store, own, Rotary(None), batch.counters, batch.out)
        assert batch.counters[Count.HIT] == hits
        for (i, k), step in steps.items():
            heads = slice(4 * k, 4 * k + 4)
            close(batch.out[i, heads], step.out, rough[i, k].out, torch.finfo(FP32).eps)


@pytest.mark.parametrize("sink", [0, 5, 40])
@pytest.mark.parametrize("group", [1, 4])
def test_rows_without_a_ring_are_read_in_one_go(sink, group, device):
    """The engine for misses reads their band as well, whatever their length, beside rows that have a ring."""
    lengths = (1, 20, 90, 200, 190, 0, 47, 140)
    case = Case(lengths, "mixed", rotary=0, group=group, ringless=(0, 1, 2, 4, 6), dtype=FP32)
    batch = Batch(case, config(miss_engine="triton", audit=0.0, sink=sink), device)
    heads = 2 * group
    problem = PrefixProblem(
        max_rows=len(lengths), heads=heads, kv_heads=2, head_size=64, page_size=16, max_blocks=13, dtype=FP32,
        band=24, sink=sink, scale=batch.scale,
    )  # fmt: skip
    decoder = Decoder(problem, batch.config, torch.device(device))
    for name in ("position", "ring", "first"):
        getattr(decoder, name).copy_(getattr(batch, name))
    steps, _ = batch.oracle()
    rough, _ = batch.oracle(FP32)
    for name in ("part_out", "part_lse", "band_acc", "band_sum"):
        getattr(decoder._work, name).fill_(torch.nan)
    decoder.begin_step(batch.table, batch.kv)
    decoder.decode(
        batch.query, batch.kv, batch.table, batch.store, batch.config, Rotary(None), batch.counters, batch.out
    )
    without = [i for i, n in enumerate(lengths) if i in case.ringless and n]
    if not sink:  # else the hit path left it
        assert decoder._work.part_lse[without].isnan().all()
    for (i, k), step in steps.items():
        own = slice(group * k, group * (k + 1))
        close(batch.out[i, own], step.out, rough[i, k].out, torch.finfo(FP32).eps)
    counted = dict(zip(Count, batch.counters.tolist(), strict=True))
    short = sum(lengths[i] < batch.config.min_context for i in without)
    assert counted[Count.SHORT_CONTEXT] - heads * short == heads * sum(
        n and n < batch.config.min_context for i, n in enumerate(lengths) if i not in without
    )
    assert counted[Count.NO_RING] == heads * (len(without) - short)
    assert counted[Count.READ] + counted[Count.SKIPPED] == 2 * sum(lengths)


def same(a, b):
    return not isinstance(a, torch.Tensor) and type(a) is type(b) and a == b


@pytest.mark.parametrize("neox", [True, False])
@pytest.mark.parametrize("rotary", [0, 32, 64])
@pytest.mark.parametrize("reuse", ["anchored", "chained"])
def test_rotary(rotary, neox, reuse, device):
    steps = Batch(Case(rotary=rotary, neox=neox), config(reuse=reuse), device).check()
    assert observed(steps) == "mixed"


@pytest.mark.parametrize("max_chain", [1, 2])
@pytest.mark.parametrize("lag_weight", [0.0, 1.5])
def test_choice(max_chain, lag_weight, device):
    """Many acceptable entries: the limit lets in any of them, so that score and chain decide."""
    case = Case(lengths=(140, 100, 170), group=2, pattern="all")
    batch = Batch(case, config(threshold=0.0, lag_weight=lag_weight, max_chain=max_chain), device)
    assert observed(batch.check()) != "none"


@pytest.mark.parametrize(
    "lag_weight, distance", [(0.0, "absolute"), (1.5, "absolute"), (20.0, "absolute"), (1.0, "relative")]
)
@pytest.mark.parametrize("sink, reuse", [(0, "anchored"), (5, "chained")])
@pytest.mark.parametrize("splits, halves, ring_dtype, max_chain", [(1, True, None, None), (3, False, FP8, 2)])
def test_mass(lag_weight, distance, sink, reuse, splits, halves, ring_dtype, max_chain, device):
    """Planted entries lie 0.2 d^0.5 off, which is too far with all the mass, and near enough with half of it."""
    case = Case(lengths=(140, 100, 170, 190), group=2, pattern="all", seed=3, ring_dtype=ring_dtype)
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


def test_a_group_in_many_pieces_is_completed_once(device):
    """Its pieces are merged in two stages, and only then is it complete; see `two_stages` of test_kernels_exact."""
    fresh = {1: 31}  # without the entry whose slot the first step overwrites
    batch = Batch(Case(lengths=(0, 720), pattern="none", kv_heads=1, fresh=fresh), config(), device)
    batch._engine = two_stages(batch.engine().problem)
    for _ in range(2):
        assert observed(batch.check()) == "none"


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


def test_rows_of_all_kinds(device):
    """Short, without a ring, padded, just begun, and plain rows in one batch."""
    case = Case(lengths=(30, 200, 0, 170, 180, 64, 300, 20, 190), ringless=(1,), opted_out=(7, 8), fresh={3: 0, 4: 5})
    batch = Batch(case, config(sink=2), device)
    assert observed(batch.check()) == "mixed"
    counted = dict(zip(Count, batch.counters.tolist(), strict=True))
    assert [name for name, count in counted.items() if not count] == [Count.OVER_BUDGET]


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
    batch = Batch(Case(lengths=(110,), pattern="mixed"), config(), device)
    limit = config().window + 5
    table = torch.arange(1, 11, dtype=torch.int32, device=device)[None]
    tokens = torch.randn(2, 160, 128, generator=torch.Generator().manual_seed(1))
    kv = torch.full((12, 2, 16, 128), torch.nan)
    at = torch.arange(160)
    kv[at // 16 + 1, :, at % 16] = tokens.transpose(0, 1)
    batch.kv, batch.table = kv.to(device), table
    query = batch.query.clone()
    for step in range(limit):
        n = 110 + step
        batch.case.lengths, batch.tokens = (n,), [tokens[:, :n]]
        batch.position.fill_(n - 1)
        batch.first.fill_(max(109 - 32, 0))
        batch.query = query + 0.1 * torch.randn(query.shape, generator=torch.Generator().manual_seed(n)).to(device)
        if step == 0:
            batch.cos_sin = None
        batch.counters.zero_()
        steps = batch.check()
        if step > 2:  # what was missed at first is matched once recorded
            assert observed(steps) == "all"


def test_every_split_gives_the_same(device):
    """However the work of a group is split."""
    outs = []
    for splits, bands, small, halves in (
        (1, 1, 16, True),
        (3, 2, 32, False),
        (8, 8, 16, False),
        (2, 4, 64, True),
    ):
        batch = Batch(Case(lengths=(200, 190)), config(window=50, band=70, sink=9, min_context=81), device)
        batch.work.tune = tune(splits, bands, small, halves)
        assert observed(batch.check()) == "mixed"
        outs.append(batch.out)
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0], rtol=1e-5, atol=1e-5)


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


@pytest.mark.gpu
@pytest.mark.parametrize(
    "rows, rings, whole", [(r, *x) for r in (1, 3, 64) for x in ((True, False), (True, True), (False, True))]
)
def test_graph_replay(rows, rings, whole, device):
    """A captured step, replayed on restored rings, gives the same, and follows changed inputs; also without rings."""
    lengths = tuple(2100 + 37 * i for i in range(rows))
    settings = config(window=512, band=256, min_context=1024)
    # Without the entry whose slot the step overwrites: a second step would match what it wrote.
    fresh = dict.fromkeys(range(rows), 511)
    batch = Batch(
        Case(lengths, "mixed", 4, 8, 128, 16, BF16, fresh=fresh, ringless=() if rings else range(rows)),
        settings,
        device,
    )
    names = ("query", "out", "lse", "chain")
    before = [getattr(batch.store, name).clone() for name in names]
    prefix = (
        torch.zeros_like(batch.query),
        torch.full(batch.query.shape[:2], -torch.inf, device=device),
    )

    batch.work.whole = whole

    def step():
        batch.launch()
        batch.finish_at_once() if whole else batch.finish(prefix)

    def state():
        torch.cuda.synchronize()
        parts = batch.out, batch.work.hit[:rows], *(getattr(batch.store, name) for name in names)
        return [part.clone() for part in parts]

    step()
    eager = state()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(3):
            step()
    for _ in range(3):
        for name, saved in zip(names, before, strict=True):
            getattr(batch.store, name).copy_(saved)
        batch.out.fill_(torch.nan)
        batch.work.hit.fill_(1)
        graph.replay()
        for got, expected in zip(state(), eager, strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    batch.position[-1] = batch.ring[-1] = -1
    batch.out.fill_(torch.nan)
    graph.replay()
    assert batch.out[-1].isnan().all() and not batch.out[:-1].isnan().any()
