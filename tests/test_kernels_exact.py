"""Exact attention of missed groups: both engines and FlashInfer's work list.

The oracle is `paged.attend` in float64 on the same stored values. A tolerance is what an eager
evaluation that rounds where the kernels round (weights, partial results) misses the oracle by,
times a small factor. Outputs and free pages start as NaN.
"""

import logging
import math
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from support.devices import DEVICE
from support.hit_batches import two_stages
from vllm_mac import paged
from vllm_mac.kernels import exact
from vllm_mac.kernels.exact import TritonExact, Tuning
from vllm_mac.kernels.plan import Plan, capacity, write_pages, write_plan
from vllm_mac.state import Geometry, Rows

INTERPRETED = DEVICE == "cpu"
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@dataclass
class Case:
    """A batch: `lengths` tokens per row (0: a padded row). missed: all, none or some groups."""

    lengths: tuple = (300, 40, 0, 33, 500)
    missed: str = "some"
    group: int = 4
    kv_heads: int = 2
    d: int = 64
    page: int = 16
    dtype: torch.dtype = BF16
    head_major: bool = False
    band: int = 32
    sink: int = 0
    seed: int = 0


def held(position: torch.Tensor, table: torch.Tensor | None) -> Rows:
    """Rows of which only these are read."""
    return Rows(position, None, None, None, table)


class Batch:
    """Inputs of a case, and the results expected in float64 (LSE base 2)."""

    def __init__(self, case: Case, max_blocks: int | None = None, blocks: int | None = None):
        draw = torch.Generator().manual_seed(case.seed)
        rows, heads = len(case.lengths), case.group * case.kv_heads
        used = [-(-n // case.page) for n in case.lengths]
        self.max_blocks = max_blocks or max(max(used), 1)
        self.blocks = blocks or sum(used) + 2
        shape = (self.blocks, case.page, case.kv_heads, 2 * case.d)
        kv = torch.randn(shape, generator=draw)
        order = torch.randperm(self.blocks - 1, generator=draw) + 1  # block 0 is never used
        table = torch.zeros(rows, self.max_blocks, dtype=torch.int32)
        for row, n in enumerate(used):
            table[row, :n], order = order[:n].int(), order[n:]
        kv[order], kv[0] = math.nan, math.nan
        for row, n in enumerate(case.lengths):
            if n % case.page:
                kv[table[row, n // case.page], n % case.page :] = math.nan
        hit = torch.randint(0, 2, (rows, case.kv_heads), generator=draw)
        hit[0, 0] = 0
        hit = {"some": hit, "all": torch.zeros_like(hit), "none": torch.ones_like(hit)}[case.missed]
        self.query = torch.randn(rows, heads, case.d, generator=draw).to(case.dtype).to(DEVICE)
        kv = kv.to(case.dtype).to(DEVICE)
        self.kv = kv.transpose(1, 2).contiguous() if case.head_major else kv.transpose(1, 2)
        self.table = table.to(DEVICE)
        self.position = (torch.tensor(case.lengths, dtype=torch.int32) - 1).to(DEVICE)
        self.hit = hit.int().to(DEVICE)
        self.case = case

    def geometry(self, **changes) -> Geometry:
        c = self.case
        keys = {
            "max_rows": len(c.lengths), "heads": c.group * c.kv_heads, "kv_heads": c.kv_heads,
            "head_size": c.d, "page_size": c.page, "max_blocks": self.max_blocks,
            "dtype": c.dtype, "band": c.band, "sink": c.sink,
            "scale": c.d**-0.5,
        }  # fmt: skip
        return Geometry(**keys | changes)

    def rows(self) -> Rows:
        return held(self.position, self.table)

    def inputs(self):
        """What `attend` takes, without the outputs."""
        return self.rows(), self.query, self.kv, self.hit

    def tensors(self):
        return self.query, self.kv, self.table, self.position, self.hit

    def poisoned(self, dtype):
        out = torch.full(self.query.shape, math.nan, dtype=dtype, device=DEVICE)
        return out, torch.full(self.query.shape[:2], math.nan, device=DEVICE)

    def expected(self):
        """`(out, lse, rounded, rounded_lse)`: in float64, and as eager code in the case's dtype."""
        p, c = self.geometry(), self.case
        out = torch.zeros(self.query.shape, dtype=torch.float64)
        lse = torch.full(self.query.shape[:2], -math.inf, dtype=torch.float64)
        rounded, rounded_lse = out.clone(), lse.clone()
        for row, n in enumerate(c.lengths):
            token = torch.arange(p.prefix_start, max(n - p.band, p.prefix_start))
            if not len(token):
                continue
            key, value = paged.gather(self.kv.cpu(), self.table[row].cpu(), token)  # [K, T, D]
            query = self.query[row].cpu().view(c.kv_heads, c.group, c.d)
            start, stop = torch.tensor(0), torch.tensor(n)
            exact = paged.attend(query.double(), key.double(), value.double(), token, start, stop, p.scale)
            score = query.float() @ key.transpose(1, 2) * p.scale
            peak = score.amax(-1, keepdim=True)
            weight = torch.exp(score - peak)
            eager = (weight.to(c.dtype).float() @ value) / weight.sum(-1, keepdim=True)
            eager_lse = peak[..., 0] + weight.sum(-1).log()
            missed = (self.hit[row] == 0).cpu()
            for whole, part in (
                (out, exact.out),
                (lse, exact.lse / math.log(2)),
                (rounded, eager.to(c.dtype).double()),
                (rounded_lse, eager_lse.double() / math.log(2)),
            ):
                whole[row].view(part.shape)[missed] = part[missed]
        return out, lse, rounded, rounded_lse

    def check(self, out, lse, rounded_weights=False):
        want, want_lse, rounded, rounded_lse = self.expected()
        out, lse = out.cpu().double(), lse.cpu().double()
        assert not out.isnan().any() and not lse.isnan().any()
        some = want_lse.isfinite()
        assert torch.equal(lse.isfinite(), some) and (out[~some] == 0).all()
        assert (lse[~some] == -math.inf).all()
        if not some.any():
            return
        bound = 3 * (rounded - want).abs().max() + 1e-6
        assert (out - want).abs().max() <= bound
        bound = 3 * (rounded_lse - want_lse)[some].abs().max() + 4e-7 * (1 + want_lse[some].abs().max())
        # FlashInfer sums weights that are already rounded to KV's dtype.
        bound = max(bound, rounded_weights * torch.finfo(self.case.dtype).eps / 2 / math.log(2))
        assert (lse - want_lse)[some].abs().max() <= bound


def engine(name: str, geometry: Geometry, programs: int | None = None):
    if name == "triton":
        return TritonExact(geometry, DEVICE, programs=programs if INTERPRETED else None)
    pytest.importorskip("flashinfer", reason="FlashInfer's engine")
    from vllm_mac.flashinfer_exact import FlashInferExact

    made = FlashInferExact(geometry, DEVICE)
    assert made.device_planned
    return made


ENGINES = ["triton", pytest.param("flashinfer", marks=pytest.mark.gpu)]


def run(made, batch: Batch):
    out, lse = batch.poisoned(batch.case.dtype)
    made.begin_step(batch.rows(), batch.kv)
    made.attend(*batch.inputs(), out=out, lse=lse)
    batch.check(out, lse, rounded_weights=not isinstance(made, TritonExact))


SMALL = [
    Case(),
    Case(missed="all", dtype=FP16),
    Case(missed="none"),
    Case(head_major=True, page=32, sink=5, missed="all"),
    Case(group=1, d=128, lengths=(700,), missed="all"),
    Case(group=7, d=64, page=64, head_major=True),
    Case(group=16, kv_heads=1, lengths=(0, 400), missed="all"),
    Case(band=0, lengths=(1, 15, 16, 17), missed="all"),
]


@pytest.mark.parametrize("case", SMALL, ids=str)
@pytest.mark.parametrize("name", ENGINES)
def test_agrees_with_the_oracle(name, case):
    batch = Batch(case)
    run(engine(name, batch.geometry(), programs=5), batch)


@pytest.mark.parametrize("d", [96, 256])
@pytest.mark.parametrize("dtype", [FP16, FP32])
def test_triton_takes_more_head_sizes_and_dtypes(d, dtype):
    batch = Batch(Case(d=d, dtype=dtype, lengths=(100, 260), head_major=d == 96))
    run(engine("triton", batch.geometry(), programs=5), batch)


@pytest.mark.parametrize("programs", [1, 3, 8, 40])
def test_any_number_of_programs_shares_the_work(programs):
    """One program, pieces that begin and end inside groups, and more programs than blocks."""
    batch = Batch(Case(lengths=(130, 0, 2300), missed="all", group=16, kv_heads=1))
    made = TritonExact(batch.geometry(), DEVICE, programs=programs)
    for _ in range(2):  # the second finds the counters that the first left
        run(made, batch)


def test_many_pieces_are_merged_in_two_stages():
    batch = Batch(Case(lengths=(0, 700), missed="all", group=4, kv_heads=1))
    made = two_stages(batch.geometry(), DEVICE)
    for _ in range(2):  # the second finds the counters that the first left
        made._part_lse.fill_(math.nan), made._part_out.fill_(math.nan)
        run(made, batch)
        assert not made._arrived.any()
    # Pieces of 4 blocks of 16 tokens: 11 programs have put theirs, two of them their block's as well.
    assert (
        made._part_lse.view(16, 2, 4)[:11].isfinite().any(1).all() and made._part_lse.view(16, 2, 4)[11:].isnan().all()
    )


@pytest.mark.gpu
@pytest.mark.parametrize("group", [1, 2, 4, 7, 8, 16])
@pytest.mark.parametrize("head_major", [False, True])
@pytest.mark.parametrize("missed", ["some", "all", "none"])
@pytest.mark.parametrize("name", ["triton", "flashinfer"])
def test_lengths_groups_and_layouts(name, missed, head_major, group):
    case = Case(
        lengths=(1, 255, 256, 257, 511, 4097, 0), missed=missed, group=group, head_major=head_major,
        kv_heads=3 if group == 7 else 2, d=64 if group == 16 else 128, band=256,
        page=64 if group == 8 else 16,
    )  # fmt: skip
    batch = Batch(case)
    run(engine(name, batch.geometry()), batch)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("name", ["triton", "flashinfer"])
def test_head_sizes_and_long_rows(name, d, dtype):
    batch = Batch(Case(lengths=(40_000, 700, 20_001), d=d, dtype=dtype, band=256, sink=4, kv_heads=4))
    run(engine(name, batch.geometry()), batch)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["triton", "flashinfer"])
def test_a_batch_that_changes_under_a_captured_graph(name):
    """Other lengths, padded rows, pages and hits: only the inputs' contents may change."""
    shape = {"max_blocks": 400, "blocks": 900}
    cases = [
        Case(lengths=(3000, 500, 6000, 0), seed=1),
        Case(lengths=(0, 0, 0, 0), seed=2),
        Case(lengths=(260, 5000, 17, 300), seed=3, missed="all"),
        Case(lengths=(6400, 0, 6000, 1), seed=4, missed="none"),
        Case(lengths=(6400, 0, 6000, 1), seed=5),
    ]
    batches = [Batch(case, **shape) for case in cases]
    live = Batch(cases[0], **shape)
    made = engine(name, live.geometry(max_rows=9))
    out, lse = live.poisoned(BF16)
    run(made, live)  # compiles outside the graph
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made.attend(*live.inputs(), out=out, lse=lse)
    for batch in batches:
        for mine, other in zip(live.tensors(), batch.tensors(), strict=True):
            mine.copy_(other)
        out.fill_(math.nan), lse.fill_(math.nan)
        made.begin_step(live.rows(), live.kv)
        graph.replay()
        batch.check(out, lse, rounded_weights=name == "flashinfer")


@pytest.mark.gpu
def test_flashinfer_falls_back_to_its_public_path(caplog, monkeypatch):
    pytest.importorskip("flashinfer", reason="FlashInfer's engine")
    from vllm_mac.flashinfer_exact import FlashInferExact

    def broken(self):
        raise RuntimeError("its result is off")

    monkeypatch.setattr(FlashInferExact, "_check", broken)
    batch = Batch(SMALL[0])
    with caplog.at_level(logging.WARNING):
        made = FlashInferExact(batch.geometry(), DEVICE)
    assert not made.device_planned and len(caplog.records) == 1
    run(made, batch)


def test_unknown_inputs_are_refused():
    batch = Batch(Case())
    with pytest.raises(ValueError, match="max_rows"):
        engine("triton", batch.geometry(max_rows=1), programs=2).attend(*batch.inputs(), *batch.poisoned(BF16))
    with pytest.raises(ValueError, match="kv_heads"):
        batch.geometry(kv_heads=3)
    with pytest.raises(ValueError, match="dtype"):
        batch.geometry(dtype=torch.float8_e4m3fn)


WAYS = [(4, 5, None), (4, 5, 255), (4, 4, 255), (8, 4, 255)]  # warps, stages, most registers


@pytest.mark.parametrize("spills, tried, taken", [
    (lambda warps, stages, limit: False, 1, 0),
    (lambda warps, stages, limit: limit is None, 2, 1),
    (lambda warps, stages, limit: stages > 4, 3, 2),
    (lambda warps, stages, limit: warps < 8, 3, 3),
    (lambda warps, stages, limit: True, 3, 3),
])  # fmt: skip
def test_it_is_launched_so_that_registers_are_enough(spills, tried, taken, monkeypatch):
    """The first way under which no thread keeps registers in memory, or else the last; found once for each variant."""
    asked, launched = [], []

    class Kernel:
        @staticmethod
        def warmup(grid, STAGES, num_warps, num_stages, maxnreg, **arguments):
            asked.append((num_warps, num_stages, maxnreg))
            return SimpleNamespace(_init_handles=lambda: None, n_spills=int(spills(num_warps, num_stages, maxnreg)))

        def __getitem__(self, grid):
            return lambda STAGES, num_warps, num_stages, maxnreg, **arguments: launched.append(
                (num_warps, STAGES, maxnreg)
            )

    monkeypatch.setattr(exact, "prefix_kernel", Kernel())
    batch = Batch(Case())
    made = TritonExact(batch.geometry(), DEVICE, programs=2, tuning=Tuning(16, 4, 5, 1))
    for _ in range(2):
        made.attend(*batch.inputs(), *batch.poisoned(BF16))
    assert asked == WAYS[:tried] and launched == [WAYS[taken]] * 2
    made.attend(*batch.inputs(), *batch.poisoned(FP32))
    assert asked == 2 * WAYS[:tried], "another variant"


PLANS = {
    "none missed": (4, 2, [1000, 70, 0, 5000], 0.0),
    "one missed": (1, 8, [9000], 0.1),
    "some missed": (4, 2, [1000, 70, 0, 5000], 0.6),
    "all missed": (5, 8, [131072] * 5, 1.0),
    "many groups": (100, 4, [37 * i for i in range(100)], 0.7),
}


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("slots", [6, 264])
def test_plan_lists_the_missed_tiles_and_nothing_else(name, slots):
    rows, kv_heads, lengths, share = PLANS[name]
    band, first, groups = 256, 16, rows * kv_heads
    geometry = Geometry(rows, kv_heads, kv_heads, 64, 16, 1, BF16, band, first, 1.0)
    draw = torch.Generator().manual_seed(1)
    hit = (torch.rand(rows, kv_heads, generator=draw) >= share).int()
    position = torch.tensor(lengths, dtype=torch.int32) - 1
    tiles = capacity(groups, slots)
    plan = Plan.in_buffer(torch.zeros(1 << 16, dtype=torch.uint8, device=DEVICE), groups, tiles)
    for poisoned in (
        plan.request_indices,
        plan.kv_tile_indices,
        plan.indptr,
        plan.chunk_size,
        plan.valid,
    ):
        poisoned.fill_(-77)
    write_plan(held(position.to(DEVICE), None), geometry, hit.to(DEVICE), plan, slots)

    chunk = int(plan.chunk_size)
    tokens = ((position + 1 - band - first).clamp(min=0)[:, None] * (hit == 0)).flatten()
    parts = -(-tokens // chunk)
    total = int(parts.sum())
    assert total <= tiles and int(plan.total_rows) == groups
    assert plan.indptr.tolist() == [0, *parts.cumsum(0).tolist()]
    assert torch.equal(plan.valid.cpu() != 0, torch.arange(tiles) < total)
    assert plan.request_indices[:total].tolist() == torch.repeat_interleave(parts).tolist()
    assert plan.kv_tile_indices[:total].tolist() == [i for n in parts.tolist() for i in range(n)]
    if name == "all missed":  # long equal rows: the busiest slot has at most a tenth more than the mean
        waves = -(-total // slots)
        assert waves * chunk <= 1.1 * int(tokens.sum()) / slots


def test_pages_of_virtual_requests():
    band, page, first_page, kv_heads = 32, 16, 1, 3
    position = torch.tensor([199, -1, 47, 48, 300], dtype=torch.int32)
    table = torch.arange(100, dtype=torch.int32).view(5, 20)
    groups = 5 * kv_heads

    def ints(n):
        return torch.full((n,), -77, dtype=torch.int32, device=DEVICE)

    indices, indptr, last = ints(groups * 20), ints(groups + 1), ints(groups)
    geometry = Geometry(5, kv_heads, kv_heads, 64, page, 20, BF16, band, first_page * page, 1.0)
    write_pages(held(position.to(DEVICE), table.to(DEVICE)), geometry, indices, indptr, last, 48, 2)
    at = 0
    for row, m in enumerate(position.tolist()):
        tokens = max(m + 1 - band - first_page * page, 0)
        pages = -(-tokens // page)
        for head in range(kv_heads):
            i = row * kv_heads + head
            assert int(indptr[i]) == at
            assert int(last[i]) == (tokens - (pages - 1) * page if pages else 0)
            want = table[row, first_page : first_page + pages] * 48 + head * 2
            assert torch.equal(indices[at : at + pages].cpu(), want)
            at += pages
    assert int(indptr[groups]) == at and (indices[at:] == -77).all()
