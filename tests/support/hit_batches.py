"""Random batches for the kernels of a decode step, and what they must give: `reference`, in float64 on the same stored values.

A tolerance is what an eager evaluation in the inputs' dtype misses the oracle by, times a
small factor. All outputs, workspaces, free pages and rings start as NaN; slots of a row's ring that are not its
own, and those that nothing may match, hold queries nearer than all others.
"""

from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import torch

from support.rotations import cosines_and_sines, rotation
from support.rounding import FLOAT32, largest_score
from vllm_mac import reference
from vllm_mac.counters import OPTED_OUT, Count
from vllm_mac.decoder import Decoder
from vllm_mac.kernels.complete import complete_misses
from vllm_mac.kernels.exact import TritonExact, Tuning
from vllm_mac.kernels.hit import decode_hits
from vllm_mac.kernels.workspace import Workspace
from vllm_mac.reference import Entry, Partial
from vllm_mac.ring import narrow
from vllm_mac.state import Geometry, LayerState, RingStore, Rows

BF16, FP16, FP32, FP8 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn


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
            self.cos_sin = (1.1 * cosines_and_sines(int(length.max()), rotary)).to(case.dtype)
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
        self.scale = d**-0.5
        self.work = Workspace.allocate(replace(self.geometry(), max_rows=b + 1), device)
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
                # A request's own threshold, as that of a layer.
                wanted = max(self.config.threshold, 1.0 - float(self.slack[i]) ** 0.5)
                own = SimpleNamespace(**vars(self.config) | {"threshold": wanted})
                inputs = query[i, head].to(dtype), pre[i, head], key, value
                step = reference.decode(m, *inputs, rings, own, self.scale)
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

    def geometry(self) -> Geometry:
        rows, heads, d = self.query.shape
        return Geometry(
            max_rows=rows, heads=heads, kv_heads=self.kv.shape[1], head_size=d, page_size=self.kv.shape[2],
            max_blocks=self.table.shape[1], dtype=self.query.dtype, band=self.config.band, sink=self.config.sink,
            scale=self.scale,
        )  # fmt: skip

    def layer(self, **changes) -> LayerState:
        rotary = rotation(self.cos_sin, self.case.neox)
        return replace(LayerState(self.store, self.config, rotary, self.counters, paused=self.paused), **changes)

    def rows(self) -> Rows:
        return Rows(self.position, self.ring, self.first, self.slack, self.table)

    def decoder(self, **changes) -> Decoder:
        """A decoder of these rows."""
        made = Decoder(replace(self.geometry(), **changes), self.config, torch.device(self.device))
        self.assign(made)
        return made

    def assign(self, decoder: Decoder) -> None:
        for name in ("position", "ring", "first"):
            getattr(decoder, name).fill_(-1)
            getattr(decoder, name)[: len(self.position)].copy_(getattr(self, name))

    def launch(self):
        decode_hits(self.layer(), self.rows(), self.query, self.kv, self.work, self.out)

    def finish(self, prefix):
        complete_misses(self.layer(), self.rows(), self.query, *prefix, self.work, self.out)

    def engine(self):
        """The miss engine, which also completes the groups; one for all steps."""
        if self._engine is None:
            self._engine = TritonExact(self.geometry(), self.device)
        return self._engine

    def finish_at_once(self):
        """As `finish`, with the prefix as the miss engine computes it."""
        self.engine().finish(self.layer(), self.rows(), self.query, self.kv, self.work, self.out)

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


def tune(splits, bands, small, halves):
    """A `Workspace.tune`: small: how much at a time. halves: as there."""
    return {
        "splits": splits, "bands": bands, "bw": small, "bn": small, "bt": 16,
        "stages": 1, "near_stages": 1, "scan_stages": 1, "warps": 4, "halves": halves,
        "registers": None,
    }  # fmt: skip


def two_stages(geometry: Geometry, device) -> TritonExact:
    """An engine whose one long group is merged in blocks of programs, and then the blocks."""
    made = TritonExact(geometry, device, programs=16, tuning=Tuning(block=16, warps=4, stages=3, per_sm=1))
    assert made._block == 4  # a group in more than 8 pieces
    return made
