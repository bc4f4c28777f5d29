"""`paged` against the plain reference, head for head, over whole sequences of a batch.

Queries before RoPE are multiples of 1/8 in [-3, 3], in float8 rings only those it holds: every
ring dtype holds them, and sums of their squares and of their squared differences are exact in
float32, ties and limits included. So which position
each head reuses must agree exactly with the reference in float64, and only outputs may round.
"""

from dataclasses import dataclass
from math import log
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from support.rounding import BFLOAT16, FLOAT32, decode_error, largest_score
from vllm_mac import paged, reference
from vllm_mac.config import MacConfig
from vllm_mac.reference import Entry, Partial
from vllm_mac.ring import ring_dtypes
from vllm_mac.state import Chunk, RingStore, Rows

ROUNDOFF = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: 2.0**-11}
NAN, FP8 = float("nan"), torch.float8_e4m3fn


@dataclass(frozen=True)
class Case:
    """Shapes and dtypes of a batch; `rows` are (prompt, chunk, has a ring) each."""

    kv_heads: int = 2
    group: int = 2
    d: int = 32
    block: int = 16
    layout: str = "token-major"
    kv: torch.dtype = torch.float32
    ring: torch.dtype = torch.float32
    rows: tuple = ((40, 16, True), (23, 40, True), (30, 7, False))
    steps: int = 30
    window: int = 16
    band: int = 8
    sink: int = 0
    threshold: float = 0.5
    distance: str = "absolute"
    min_context: int = 16
    lag_weight: float = 0.0
    reuse: str = "anchored"
    max_chain: int | None = None
    mass_floor: float | None = None
    slack: tuple = ()  # of each row, 1 without

    def config(self) -> MacConfig:
        names = (
            "window",
            "band",
            "sink",
            "threshold",
            "distance",
            "min_context",
            "lag_weight",
            "reuse",
            "max_chain",
            "mass_floor",
        )
        ring = str(self.ring).removeprefix("torch.")
        return MacConfig(ring_dtype=ring, **{name: getattr(self, name) for name in names})


def paged_cache(case: Case, blocks: int) -> torch.Tensor:
    """KV cache `[blocks, K, block, 2 D]` full of NaN, in a physical layout of vLLM's."""
    k, b, d = case.kv_heads, case.block, case.d
    if case.layout == "token-major":
        return torch.full((blocks, b, k, 2 * d), NAN, dtype=case.kv).transpose(1, 2)
    if case.layout == "head-major":
        return torch.full((blocks, k, b, 2 * d), NAN, dtype=case.kv)
    # A view into something larger, as hybrid models have it.
    return torch.full((blocks, 2, k, b, 2 * d + 8), NAN, dtype=case.kv)[:, 1, ..., : 2 * d]


def held_rows(position, ring, first, slack=(1.0,), table=None) -> Rows:
    return Rows(*map(torch.tensor, (position, ring, first, slack)), table)


class Batch:
    """The same sequences in a paged cache with a RingStore, and in the reference."""

    def __init__(self, case: Case, seed: int = 0):
        self.case, self.c, self.scale = case, case.config(), case.d**-0.5
        g = torch.Generator().manual_seed(seed)
        self.heads = case.kv_heads * case.group
        self.totals = [prompt + case.steps for prompt, _, _ in case.rows]
        width = -(-max(self.totals) // case.block)
        self.kv = paged_cache(case, len(case.rows) * width + 1)
        order = torch.randperm(len(case.rows) * width, generator=g) + 1
        self.table = order.view(len(case.rows), width).to(torch.int32)
        # Rings are given out of order too, one is nobody's.
        self.rings = len(case.rows) + 1
        given_rings = torch.randperm(self.rings, generator=g)[: len(case.rows)].tolist()
        self.ring = [r if has else -1 for r, (_, _, has) in zip(given_rings, case.rows)]
        self.slack = case.slack or (1.0,) * len(case.rows)
        query_dtype, out_dtype = ring_dtypes(self.c, case.kv)
        self.store = RingStore.allocate(self.rings, self.heads, case.window, case.d, query_dtype, "cpu", out_dtype)
        for part in (self.store.query, self.store.out, self.store.lse):
            part.fill_(NAN)
        self.store.chain.fill_(-(2**30))
        self.first = [max(prompt - case.window, 0) for prompt, _, _ in case.rows]
        self.length = [0] * len(case.rows)
        self.plain = [[[{} for _ in range(case.group)] for _ in range(case.kv_heads)] for _ in case.rows]

        total = max(self.totals)
        # Two queries that come back, a little changed, or so much that only some heads match.
        base = torch.randint(-8, 9, (2, self.heads, case.d), generator=g) / 8
        change = torch.rand(len(case.rows), total, self.heads, case.d, generator=g) * 2 - 1
        much = torch.tensor([1, 3, 9, 10, 12])[torch.randint(0, 5, change.shape[:2], generator=g)]
        which = torch.randint(0, 2, change.shape[:2], generator=g)
        self.pre = base[which] + (change * much[..., None, None]).round() / 8
        if case.ring == FP8:
            self.pre = self.pre.to(FP8).float()
        self.query = (self.pre + 0.3 * torch.randn(self.pre.shape, generator=g)).to(case.kv).float()
        kv = torch.randn(len(case.rows), case.kv_heads, total, 2 * case.d, generator=g).to(case.kv)
        self.fresh = kv
        self.key, self.value = kv.double().chunk(2, -1)
        self.largest = float(self.value.abs().max())
        self.hits = self.misses = self.chain = 0

    def write(self, b: int, start: int, stop: int) -> None:
        """Put the KV of these positions into the cache, which holds NaN beyond them."""
        for p in range(start, stop):
            block = int(self.table[b, p // self.case.block])
            self.kv[block, :, p % self.case.block] = self.fresh[b, :, p]
        self.length[b] = stop

    def groups(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., H, D]` as `[K, ..., G, D]` in float64."""
        return x.double().unflatten(-2, (self.case.kv_heads, self.case.group)).movedim(-3, 0)

    def sigma(self, b: int, positions) -> float:
        q = self.groups(self.query[b, positions])
        return max(largest_score(q[k], self.key[b, k], self.scale) for k in range(len(q)))

    def prefill(self, b: int) -> None:
        prompt, chunk, _ = self.case.rows[b]
        for s in range(0, prompt, chunk):
            e = min(s + chunk, prompt)
            self.write(b, s, e)
            q, pre = self.query[b, s:e], self.pre[b, s:e]
            given_pre = pre if self.ring[b] >= 0 else None
            part = Chunk(s, self.ring[b], self.table[b])
            out = paged.prefill(part, q, given_pre, self.kv, self.store, self.c, self.scale)
            assert out.shape == q.shape and out.dtype == torch.float32
            for k, (qk, prek) in enumerate(zip(self.groups(q), self.groups(pre))):
                key, value = self.key[b, k], self.value[b, k]
                exact = [
                    [reference.attend(x, key, value, 0, s + i + 1, self.scale).out for x in xs]
                    for i, xs in enumerate(qk)
                ]
                self.close(out.unflatten(1, (-1, self.case.group))[:, k], exact, b, slice(s, e), 0)
                if self.ring[b] >= 0:
                    reference.seed(s, qk, prek, key, value, self.plain[b][k], self.c, self.scale)

    def close(self, out, exact, b: int, positions, chain: int) -> None:
        exact = torch.stack([torch.stack(x) if isinstance(x, list) else x for x in exact])
        error = decode_error(self.length[b], self.case.d, self.sigma(b, positions), chain)
        # Each summary that the chain went through was rounded to the ring's dtype.
        stored = self.store.out.dtype
        error += chain * ROUNDOFF[stored] * (stored != torch.float32)
        off = (out.double() - exact).abs().max()
        assert off <= error * self.largest, f"row {b}, {positions}: {off:.2g} > {error * self.largest:.2g}"

    def decode(self, rows: list[int]) -> None:
        """One step of these rows, in this order."""
        m = [self.length[b] for b in rows]
        for b, p in zip(rows, m):
            self.write(b, p, p + 1)
        q = torch.stack([self.query[b, p] for b, p in zip(rows, m)])
        pre = torch.stack([self.pre[b, p] for b, p in zip(rows, m)])
        held = held_rows(m, *([x[b] for b in rows] for x in (self.ring, self.first, self.slack)), self.table[rows])
        got = paged.decode(held, q, pre, self.kv, self.store, self.c, self.scale)
        assert got.out.shape == q.shape and got.hit.dtype == torch.bool
        for i, (b, p) in enumerate(zip(rows, m)):
            for k in range(self.case.kv_heads):
                rings = self.plain[b][k]
                if self.ring[b] < 0:  # exact: nothing to match
                    rings = [{} for _ in rings]
                qk, prek = self.groups(q[i])[k], self.groups(pre[i])[k]
                threshold = max(self.c.threshold, 1 - self.slack[b] ** 0.5)
                own = self.c.model_copy(update={"threshold": threshold})
                want = reference.decode(p, qk, prek, self.key[b, k], self.value[b, k], rings, own, self.scale)
                heads = slice(k * self.case.group, (k + 1) * self.case.group)
                assert bool(got.hit[i, k]) == want.hit, (b, p)
                assert got.source[i, heads].tolist() == want.source, (b, p)
                assert int(got.read[i, k]) == want.read, (b, p)
                chain = max(ring[p].chain for ring in rings)
                self.close(got.out[i, heads], list(want.out), b, p, chain)
                self.hits += want.hit
                assert self.slack[b] or not want.hit
                self.misses += not want.hit and self.ring[b] >= 0
                self.chain = max(self.chain, chain)

    def check_rings(self) -> None:
        """What the store holds is what the reference holds, entry for entry."""
        for b, ring in enumerate(self.ring):
            if ring < 0:
                continue
            for h in range(self.heads):
                for p, entry in self.plain[b][h // self.case.group][h % self.case.group].items():
                    slot = p % self.case.window
                    assert torch.equal(self.store.query[ring, h, slot].double(), entry.query), (b, h, p)
                    assert self.store.chain[ring, h, slot] == entry.chain
                    n, sigma = self.length[b], self.sigma(b, p)
                    error = decode_error(n, self.case.d, sigma, entry.chain)
                    stored = (entry.chain + 1) * ROUNDOFF[self.store.out.dtype]
                    off = (self.store.out[ring, h, slot].double() - entry.summary.out).abs().max()
                    assert off <= (error + stored) * self.largest
                    if entry.summary.lse == -torch.inf:
                        assert self.store.lse[ring, h, slot] == -torch.inf
                    else:
                        assert abs(self.store.lse[ring, h, slot] - entry.summary.lse) <= error + FLOAT32 * (
                            sigma + log(n)
                        )
        used = set(self.ring) - {-1}
        for ring in set(range(self.rings)) - used:
            assert self.store.query[ring].isnan().all(), "a ring that no row has was written"

    def run(self) -> "Batch":
        for b in range(len(self.case.rows)):
            self.prefill(b)
        for step in range(self.case.steps):
            order = [(i + step) % len(self.case.rows) for i in range(len(self.case.rows))]
            # Rows come and go: the last of the order sits out now and then.
            self.decode(order[:-1] if step % 5 == 4 and len(order) > 1 else order)
        self.check_rings()
        return self


CASES = {
    "mha": Case(kv_heads=3, group=1, block=32, layout="head-major"),
    "gqa 2, bfloat16 kv": Case(group=2, d=64, kv=torch.bfloat16, sink=3, min_context=20),
    "gqa 4, float16 kv and ring": Case(group=4, d=32, kv=torch.float16, ring=torch.float16, layout="head-major"),
    "gqa 7": Case(kv_heads=1, group=7, d=96, steps=20, lag_weight=1.0),
    "mqa 8, bfloat16 ring": Case(kv_heads=1, group=8, d=128, steps=20, ring=torch.bfloat16, block=128),
    "float8 ring": Case(ring=FP8, lag_weight=1.0),
    "float8 ring, bfloat16 kv, chained": Case(ring=FP8, kv=torch.bfloat16, reuse="chained", sink=2),
    "relative": Case(distance="relative", d=64, threshold=0.55),
    "relative, lag, cap, float8 ring": Case(distance="relative", lag_weight=1.5, max_chain=2, ring=FP8),
    "mass": Case(mass_floor=0.3, threshold=0.7, band=4),
    "mass, relative, lag, sink, chained": Case(mass_floor=0.1, threshold=0.75, distance="relative", lag_weight=1.0, sink=3, reuse="chained"),
    "slack": Case(rows=((40, 16, True),) * 4, slack=(0.0, 0.09, 0.25, 0.9), threshold=0.4, group=1, lag_weight=0.5),
    "slack, mass, relative": Case(
        rows=((40, 16, True),) * 3, slack=(0.0, 0.04, 0.25), threshold=0.3, mass_floor=0.3, distance="relative", group=1,
    ),
    "mqa 16": Case(kv_heads=1, group=16, d=32, steps=15),
    "head size 256": Case(kv_heads=2, group=1, d=256, steps=20, layout="slice", kv=torch.bfloat16, ring=torch.bfloat16),
    "chained": Case(reuse="chained", layout="slice", sink=1),
    "chained, lag, cap": Case(reuse="chained", max_chain=2, lag_weight=2.0, kv_heads=4, group=1),
    "anchored, cap 1": Case(max_chain=1),
    "window longer than the prompt": Case(window=64, steps=50, rows=((20, 20, True), (9, 4, True))),
    "ring wraps around often": Case(window=4, band=2, steps=40),
    "one row, chunks of one": Case(rows=((30, 1, True),)),
    "chunk longer than the window": Case(window=8, rows=((70, 50, True), (64, 64, True))),
    "band longer than the window": Case(window=8, band=20, min_context=24),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_like_the_reference_head_for_head(case):
    batch = Batch(case).run()
    assert batch.hits > 9 and batch.misses > 9, (batch.hits, batch.misses)
    assert batch.chain > 1 or case.max_chain == 1


def test_exact_when_nothing_may_match():
    for case in (Case(threshold=1.0), Case(min_context=1000), Case(rows=((40, 16, False), (20, 9, False)))):
        batch = Batch(case).run()
        assert batch.hits == batch.chain == 0


def test_decoding_from_the_very_first_token():
    """Rows without a prompt, shorter than the band and the sink at first."""
    case = Case(rows=((1, 1, True), (2, 1, True)), steps=40, sink=4, band=6, min_context=12)
    batch = Batch(case).run()
    assert batch.hits


@given(
    st.builds(
        Case,
        kv_heads=st.integers(1, 3),
        group=st.integers(1, 3),
        block=st.sampled_from([1, 4, 16]),
        layout=st.sampled_from(["token-major", "head-major", "slice"]),
        kv=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
        ring=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, FP8]),
        rows=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30), st.booleans()), min_size=1, max_size=3).map(tuple),
        steps=st.integers(1, 12),
        window=st.sampled_from([1, 2, 8, 16]),
        band=st.integers(1, 10),
        sink=st.integers(0, 5),
        threshold=st.sampled_from([0.0, 0.25, 0.5]),
        distance=st.sampled_from(["absolute", "relative"]),
        min_context=st.integers(17, 24),
        lag_weight=st.sampled_from([0.0, 0.5, 2.0]),
        reuse=st.sampled_from(["anchored", "chained"]),
        max_chain=st.sampled_from([None, 1, 2]),
    ),
    st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=30, deadline=None, derandomize=True)
def test_any_small_batch(case, seed):
    Batch(case, seed).run()


# --- what may be read ---------------------------------------------------------------------------


def store_of(queries: torch.Tensor, dtype=torch.float32) -> RingStore:
    """Rings `[R, H, W, D]` of these queries, with summaries that would be noticed."""
    r, h, w, d = queries.shape
    store = RingStore.allocate(r, h, w, d, dtype, "cpu")
    store.query.copy_(queries)
    store.out.fill_(1e4)
    store.lse.fill_(50.0)
    store.chain.zero_()
    return store


@pytest.mark.parametrize("first, found", [(0, 19), (12, 19), (19, 19), (20, -1)])
def test_match_reads_from_first_on(first, found):
    config = MacConfig(window=8, band=4, min_context=16)
    store = store_of(torch.zeros(1, 1, 8, 4))
    rows = held_rows([20], [0], [first])
    source = paged.match(rows, torch.zeros(1, 1, 4), store, config, torch.tensor([[60.0]]))
    assert source.tolist() == [[found]]


@pytest.mark.parametrize("threshold, query, found", [(0.5, 1.0, -1), (0.5, 0.875, 19), (1.0, 0.0, -1)])
def test_match_at_the_limit(threshold, query, found):
    """2 d (1 - 0.5)^2 = 2 at d = 4, and (1, 1, 0, 0) is just that far from 0."""
    config = MacConfig(window=8, band=4, min_context=16, threshold=threshold, mass_floor=None)
    pre_query = torch.tensor([[[query, query, 0.0, 0.0]]])
    args = held_rows([20], [0], [0]), pre_query, store_of(torch.zeros(1, 1, 8, 4))
    assert paged.match(*args, config, torch.tensor([[50.0]])).tolist() == [[found]]
    # With a floor, a summary that has all the mass has the same limit.
    weighed = config.model_copy(update={"mass_floor": 0.25})
    assert paged.match(*args, weighed, torch.tensor([[-torch.inf]])).tolist() == [[found]]
    # So has a request that asks for this threshold where the layer has a looser one, or for a looser one here.
    for own, asked in ((threshold, 0.9 * threshold), (0.5 * threshold, threshold)):
        own, rows = config.model_copy(update={"threshold": own}), held_rows([20], [0], [0], [(1 - asked) ** 2])
        assert paged.match(rows, *args[1:], own, torch.tensor([[50.0]])).tolist() == [[found]]


@pytest.mark.parametrize("scale", [0.125, 1.0, 8.0])
@pytest.mark.parametrize("other, found", [(0.0, -1), (0.125, 19)])
def test_match_at_the_relative_limit(scale, other, found):
    """2 |q|^2 (1 - 0.5)^2 = 2 for (1, 1, 1, 1), and (0, 0, 1, 1) is just that far; so at any scale."""
    config = MacConfig(window=8, band=4, min_context=16, threshold=0.5, distance="relative", mass_floor=None)
    store = store_of(torch.tensor([other, other, 1.0, 1.0]).expand(1, 1, 8, 4) * scale)
    args = held_rows([20], [0], [0]), torch.full((1, 1, 4), scale), store
    assert paged.match(*args, config, torch.tensor([[50.0]])).tolist() == [[found]]
    # With a floor, a summary that has all the mass has the same limit.
    weighed = config.model_copy(update={"mass_floor": 0.25})
    assert paged.match(*args, weighed, torch.tensor([[-torch.inf]])).tolist() == [[found]]


def test_float8_rings_hold_no_more_than_their_largest_and_no_nan():
    """Entries beyond it match like any other once their query is as large."""
    config = MacConfig(window=8, band=4, min_context=16, ring_dtype="float8_e4m3fn")
    store = RingStore.allocate(1, 1, 8, 4, FP8, "cpu", torch.float32)
    store.query.fill_(NAN)
    query = torch.tensor([[[1e5, -500.0, 460.0, 448.0]]])
    rows = held_rows([20], [0], [20], table=torch.arange(2)[None])
    paged.decode(rows, query, query, torch.randn(2, 1, 16, 8), store, config, 1.0)
    assert store.query[0, 0, 20 % 8].float().tolist() == [448.0, -448.0, 448.0, 448.0]
    assert store.out.dtype == torch.float32
    got = paged.match(held_rows([21], [0], [20]), query.clamp(-448, 448), store, config, torch.zeros(1, 1))
    assert got.tolist() == [[20]]


def test_match_takes_the_later_of_equals_across_the_wrap():
    config = MacConfig(window=8, band=4, min_context=16)
    queries = torch.ones(1, 1, 8, 4)
    queries[..., [13 % 8, 17 % 8], :] = 0.0  # slot of 13 lies behind that of 17
    args = torch.zeros(1, 1, 4), store_of(queries), config, torch.zeros(1, 1)
    assert paged.match(held_rows([20], [0], [0]), *args).tolist() == [[17]]


def test_rows_without_a_ring_read_and_write_none():
    config = MacConfig(window=4, band=4, min_context=16)
    store = store_of(torch.zeros(2, 1, 4, 8))
    before = [part.clone() for part in (store.query, store.out, store.lse, store.chain)]
    kv = torch.randn(4, 1, 16, 16)
    query = torch.zeros(1, 1, 8)
    rows = held_rows([40], [-1], [0], table=torch.arange(4)[None])
    got = paged.decode(rows, query, query, kv, store, config, 1.0)
    assert not got.hit.any() and got.source.tolist() == [[-1]] and got.read.tolist() == [[41]]
    mean = kv.reshape(-1, 16)[:41, 8:].mean(0)  # all scores are 0
    assert (got.out[0, 0] - mean).abs().max() <= decode_error(41, 8, 0.0, 0) * kv.abs().max()
    paged.prefill(Chunk(38, -1, torch.arange(4)), query, None, kv, store, config, 1.0)
    for part, old in zip((store.query, store.out, store.lse, store.chain), before):
        assert torch.equal(part, old)


def test_a_hit_reads_only_the_band_the_lag_and_the_sink():
    """Keys that a hit need not read are NaN, and so would the output be."""
    case = Case(rows=((60, 60, True),), steps=1, sink=2, threshold=0.0, min_context=20)
    batch = Batch(case)
    batch.prefill(0)
    batch.pre[0, 60] = batch.pre[0, 59]
    spared = range(case.sink, 59 + 1 - case.band)
    for p in spared:
        batch.kv[batch.table[0, p // 16].long(), :, p % 16] = NAN
    batch.decode([0])
    assert batch.hits == case.kv_heads


def test_prefill_in_blocks_of_bounded_memory_is_the_same(monkeypatch):
    case = Case(rows=((70, 70, True),), steps=0)
    whole = Batch(case).run()
    outputs, summaries = [], []
    causal, attend = F.scaled_dot_product_attention, paged.attend
    monkeypatch.setattr(paged, "SCORES_AT_ONCE", 4 * 70 * 9)
    monkeypatch.setattr(paged, "attend", lambda query, *rest: summaries.append(query.shape[1]) or attend(query, *rest))
    counted = lambda query, *rest, **more: outputs.append(query.shape[1]) or causal(query, *rest, **more)
    monkeypatch.setattr(paged, "F", SimpleNamespace(scaled_dot_product_attention=counted))
    parts = Batch(case).run()  # checked against the reference on the way
    assert outputs == [9] * 7 + [7] and summaries == [9 * case.group, 7 * case.group]
    error = 2 * decode_error(70, case.d, whole.sigma(0, slice(0, 70)), 0) * whole.largest
    kept = whole.ring[0]
    assert (whole.store.out[kept] - parts.store.out[kept]).abs().max() <= error


def test_attend_over_nothing_is_empty_and_not_nan():
    token, nothing = torch.arange(3), torch.tensor(2)
    args = torch.ones(1, 2, 4), torch.ones(1, 3, 4), torch.ones(1, 3, 4), token
    got = paged.attend(*args, nothing, nothing, 0.5)
    assert isinstance(got, Partial) and not got.out.any() and (got.lse == -torch.inf).all()


def test_the_reference_is_what_it_is_compared_with():
    """`Entry` is all that the reference's rings hold, so `check_rings` compares all of it."""
    assert set(Entry.__annotations__) == {"query", "summary", "chain"}
    assert set(RingStore.__slots__) == {"query", "out", "lse", "chain"}
