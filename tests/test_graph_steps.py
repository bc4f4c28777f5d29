"""A thousand steps of a decoder whose batch changes under it, with everything freed poisoned.

`ring_model` schedules: requests arrive, share prefixes, are read in chunks, decode, finish, are
preempted and come back in other blocks. On a GPU steps that only decode replay CUDA graphs
captured for a few batch sizes, as vLLM does; steps that also read prompts run eagerly. Beside the decoder
runs `paged`, on its own rings, of which each request has one from its start to its end.

When a request ends or is preempted, its ring turns to NaN, and so do KV blocks that nobody can find
again and those that are given out. Queries are planned so that entries of any request would match those of any other.
"""

from dataclasses import dataclass

import pytest
import torch

from support.devices import DEVICE
from support.ring_model import Engine
from support.rotations import cosines_and_sines, rotation
from support.rounding import decode_error, largest_score
from vllm_mac import paged
from vllm_mac.config import MacConfig
from vllm_mac.counters import Count
from vllm_mac.decoder import Decoder
from vllm_mac.kernels.assign import FRESH, PREFILLING, assign
from vllm_mac.kernels.record import record_prefill
from vllm_mac.ring import RingTable
from vllm_mac.state import Chunk, Geometry, LayerState, RingStore, Rows, Seeds

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
LAYERS, TOPICS, GENERATIONS, PHASES, LONE = 2, 3, 64, 12, 4096
# Queries of one topic move by STEP a visit: the limit lies between the sixth visit and the
# seventh, far from both against rounding, and of two entries the later one is nearer.
REACH = 6
STEP = 2**0.5 * (1 - 0.45) / (REACH + 0.5)


@dataclass(frozen=True)
class Setup:
    """Sizes of a run. prompt: lengths of prompts, least and most. pool: KV blocks. chunk: tokens of a
    row in one step. graphs: batch sizes captured (none: eager)."""

    steps: int
    rows: int
    prompt: tuple[int, int]
    pool: int
    chunk: int
    window: int
    band: int
    min_context: int
    page: int
    d: int
    dtype: torch.dtype
    ring_dtype: torch.dtype
    sink: int = 0
    group: int = 4
    kv_heads: int = 2
    graphs: tuple[int, ...] = ()
    engine: str = "triton"


class Plan:
    """Queries, keys and values as functions of a sequence's tokens, so that equal histories agree."""

    def __init__(self, setup: Setup):
        draw = torch.Generator().manual_seed(0)
        pairs, shape = LAYERS * setup.kv_heads, (setup.group, setup.d)
        self.pairs, self.kv_heads, self.dtype = pairs, setup.kv_heads, setup.dtype
        self.topic = torch.randn(pairs * TOPICS * GENERATIONS + LONE, *shape, generator=draw)
        self.way = torch.randn(pairs, *shape, generator=draw).sign()
        self.kv = torch.randn(4099, LAYERS, setup.kv_heads, 2 * setup.d, generator=draw)
        self.kv[..., : setup.d] *= 2
        cos_sin = cosines_and_sines(4096, setup.d)
        self.rotary, self.device_rotary = rotation(cos_sin), rotation(cos_sin.to(DEVICE))
        self.turn = rotation(cos_sin * torch.tensor([1.0, -1.0]).repeat_interleave(setup.d // 2))
        self.known: dict[int, list] = {}  # request -> (state, facts of each position)

    def facts(self, request, start: int, stop: int):
        """`(pre-RoPE queries [L, n, H, D], after RoPE, KV [L, n, K, 2 D])` of positions `[start, stop)`."""
        state, facts = self.known.setdefault(id(request), [(1, [(0, [0] * TOPICS)] * self.pairs), []])
        for p in range(len(facts), stop):
            mix, topics = state
            mix = (mix * 6364136223846793005 + 2 * request.tokens[p] + 1442695040888963407) % (1 << 64)
            bits, now, index, phase, lone = mix >> 11, [], [], [], []
            for i, (topic, visits) in enumerate(topics):
                bits = (bits * 2862933555777941757 + 3037000493) % (1 << 61)
                chance, other = (bits >> 40) % 1000 / 1000, (bits >> 20) % LONE
                topic = other % TOPICS if chance < 0.3 else topic
                visits = [n + (t == topic) for t, n in enumerate(visits)]
                generation, step = divmod(visits[topic], PHASES)
                base = (i * TOPICS + topic) * GENERATIONS + generation % GENERATIONS
                new = len(self.topic) - LONE + other
                index.append(new if chance > 0.94 else base)
                phase.append(0 if chance > 0.94 else step)
                lone.append(new if 0.9 < chance <= 0.94 else -1)  # a head with a query like no other
                now.append((topic, visits))
            facts.append(((mix >> 20) % len(self.kv), index, phase, lone))
            state = mix, now
        self.known[id(request)][0] = state
        content, index, phase, lone = zip(*facts[start:stop])
        index, phase, lone = torch.tensor(index), torch.tensor(phase), torch.tensor(lone)  # [n, L K]
        pre = self.topic[index] + STEP * phase[..., None, None] * self.way  # [n, L K, G, D]
        pre[:, :, 0] = torch.where((lone >= 0)[..., None], self.topic[lone, 0], pre[:, :, 0])
        pre = pre.unflatten(1, (LAYERS, self.kv_heads)).flatten(2, 3).transpose(0, 1)  # [L, n, H, D]
        at = torch.arange(start, stop)
        query = torch.stack([self.turn.undo(layer, at) for layer in pre]).to(self.dtype)
        # The rotation is undone from what is stored, in the kernels as in the oracle.
        pre = torch.stack([self.rotary.undo(layer, at) for layer in query])
        return pre, query, self.kv[torch.tensor(content)].transpose(0, 1).to(self.dtype)


class Run(Engine):
    """`ring_model.Engine` with a decoder in place of the model of one."""

    def __init__(self, setup: Setup, seed: int = 0):
        s = self.setup = setup
        super().__init__(s.rows, s.pool, s.page, s.window, s.min_context, s.chunk, seed=seed)
        self.config = MacConfig(
            window=s.window, band=s.band, sink=s.sink, min_context=s.min_context, max_chain=8, miss_engine=s.engine
        )
        self.device_table = RingTable(s.rows, s.window, DEVICE)
        self.plan, self.heads, self.scale = Plan(s), s.group * s.kv_heads, s.d**-0.5
        columns = s.pool
        geometry = Geometry(s.rows, self.heads, s.kv_heads, s.d, s.page, columns, s.dtype, s.band, s.sink, self.scale)
        self.decoder = Decoder(geometry, self.config, torch.device(DEVICE))
        nan = lambda *shape, dtype=s.dtype: torch.full(shape, torch.nan, dtype=dtype, device=DEVICE)
        # Token-major, as vLLM lays it out.
        self.kv = [nan(s.pool, s.page, s.kv_heads, 2 * s.d).transpose(1, 2) for _ in range(LAYERS)]
        self.plain_kv = [kv.cpu() for kv in self.kv]
        allocate = lambda rings, device: RingStore.allocate(rings, self.heads, s.window, s.d, s.ring_dtype, device)
        self.store = [allocate(s.rows, DEVICE) for _ in range(LAYERS)]
        self.plain = [allocate(s.rows, "cpu") for _ in range(LAYERS)]
        for store in self.store + self.plain:
            self._poison(store, slice(None), True)
            store.chain.zero_()
        self.query, self.out = nan(LAYERS, s.rows, self.heads, s.d), nan(LAYERS, s.rows, self.heads, s.d)
        self.blocks = torch.zeros(s.rows, columns, dtype=torch.int32, device=DEVICE)
        self.counts = torch.zeros(LAYERS, len(Count), dtype=torch.int64, device=DEVICE)
        self.layers = [
            LayerState(store, self.config, self.plan.device_rotary, counts)
            for store, counts in zip(self.store, self.counts, strict=True)
        ]
        self.mixed = [torch.zeros_like(self.decoder.position) for _ in range(3)]
        self.taken: list[int] = []
        take = self.pool.take
        self.pool.take = lambda: self.taken.append(take()) or self.taken[-1]
        self.wanted = torch.zeros_like(self.counts, device="cpu")
        self.arrived, self.replays, self.worst = 0, 0, 0.0
        self.graphs = {size: self._capture(size) for size in s.graphs}
        assert not self.counts.any(), "padding was counted"

    def _decode(self, rows: Rows) -> None:
        n = len(rows.position)
        for i, layer in enumerate(self.layers):
            self.decoder.decode(layer, rows, self.query[i, :n], self.kv[i], self.out[i, :n])

    def _capture(self, size: int):
        self.decoder.position.fill_(-1), self.decoder.ring.fill_(-1)
        rows = self.decoder.rows(self.blocks[:size])
        self.decoder.begin_step(rows, self.kv[0])
        self._decode(rows)  # compiles
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._decode(rows)
        return graph

    # --- what is freed is poisoned

    def _poison(self, store: RingStore, ring, queries: bool) -> None:
        store.out[ring], store.lse[ring] = torch.nan, torch.nan
        if queries:  # a query of NaN is never near: left alone, it would lead to the rest
            store.query[ring] = torch.nan

    def drop(self, request, resume: bool) -> None:
        held = list(request.blocks)
        super().drop(request, resume)
        free = [b for b in held if not self.pool.users[b] and self.pool.cached.get(self.pool.content[b]) != b]
        self._poison_blocks(free)
        if not resume:
            del self.plan.known[id(request)]

    def _poison_blocks(self, blocks: list[int]) -> None:
        for kv in self.kv + self.plain_kv:
            kv[blocks] = torch.nan
        self.seen["poisoned blocks"] += len(blocks)

    # --- one step

    def arrive(self) -> None:
        """Few contents that begin alike, so that prefixes meet and part."""
        if len(self.running) + len(self.waiting) < self.setup.rows and self.rng.random() < 0.3:
            least, most = self.setup.prompt
            # Of few lengths too, so that all but a page of a prompt is often found, and its ring begins late.
            length, letters = least + (most - least) * self.rng.randrange(4) // 3, self.rng.randrange(4)
            shared = least if letters < 3 else 0
            prompt = [i % 7 for i in range(shared)] + [2 + letters * (i % 3) for i in range(length - shared)]
            self.add(prompt, self.rng.randint(2, 3 * self.setup.window))
            self.arrived += 1

    def step(self, stalled: bool = False) -> None:
        self.arrive()
        rows, arrived = self._schedule(stalled)
        self._poison_blocks(self.taken)
        self.taken.clear()
        if not rows:
            return
        self._begin(rows, arrived)
        plan = [(request, stop) for request, stop, _ in rows]
        self.rng.shuffle(plan)
        plan.sort(key=lambda item: item[1] - item[0].computed > 1)  # vLLM has decoding rows first
        count = [stop - r.computed for r, stop in plan]
        decodes = count.count(1)
        facts = [self.plan.facts(r, r.computed, stop) for r, stop in plan]
        self._write(plan, [kv for *_, kv in facts])
        first = self._assign(plan, count, decodes)
        expected = self._plain(plan, facts, decodes, first)
        self._device(plan, facts, decodes)
        self._compare(plan, expected, decodes)
        self._advance([(request, stop, 0) for request, stop in plan])

    def _write(self, plan, kv: list) -> None:
        """Put the step's keys and values into their blocks."""
        slots = [
            r.blocks[p // self.size] * self.size + p % self.size for r, stop in plan for p in range(r.computed, stop)
        ]
        slots = torch.tensor(slots)
        block, at, kv = slots // self.size, slots % self.size, torch.cat(kv, 1)
        for layer in range(LAYERS):
            self.plain_kv[layer][block, :, at] = kv[layer]
            self.kv[layer][block.to(DEVICE), :, at.to(DEVICE)] = kv[layer].to(DEVICE)

    def _assign(self, plan, count, decodes) -> torch.Tensor:
        """As `cuda.MacCUDAMetadataBuilder` does before a step. Returns what the oracle lets each row read from."""
        ints = lambda x: torch.tensor(x, dtype=torch.int32, device=DEVICE)
        for i, (request, _) in enumerate(plan):
            self.blocks[i, : len(request.blocks)] = ints(request.blocks)
        decoder = self.decoder
        own = decoder.position, decoder.ring, decoder.first
        outputs = own if decodes == len(plan) else self.mixed
        held = [self.owners.ring(r.name) for r, _ in plan]
        for ring in (ring for ring, fresh in held if fresh):
            queries = self.rng.random() < 0.3
            for store in self.store:
                self._poison(store, ring, queries)
            for store in self.plain:
                self._poison(store, ring, True)
            self.seen["poisoned rings"] += 1
        start, stops = [r.computed for r, _ in plan], [stop for _, stop in plan]
        self.held, fresh = [ring for ring, _ in held], [fresh for _, fresh in held]
        prefilling = [r.computed < r.prompt for r, _ in plan]
        flags = [FRESH.value * f + PREFILLING.value * p for f, p in zip(fresh, prefilling)]
        assign(
            self.device_table, ints([0] + count).cumsum(0, dtype=torch.int32), ints(stops), ints(self.held), ints(flags),
            *outputs,
        )  # fmt: skip
        for mine, rows in zip(own, outputs, strict=True):
            mine[:decodes].copy_(rows[:decodes])
        self.rings = outputs[1]
        return torch.tensor(self.answer(self.table, start, stops, self.held, fresh, prefilling, [False] * len(plan)))

    def _plain(self, plan, facts, decodes, first):
        """The step by `paged`. Returns a `Decoded` per layer."""
        config, width = self.config, max(len(r.blocks) for r, _ in plan)
        table = torch.tensor([r.blocks + [0] * (width - len(r.blocks)) for r, _ in plan], dtype=torch.int32)
        ring = torch.tensor(self.held)
        assert ring.ge(0).tolist() == [stop >= config.min_context for _, stop in plan], "a ring too many or too few"
        results = []
        for i in range(LAYERS):
            store, kv = self.plain[i], self.plain_kv[i]
            for row in range(decodes, len(plan)):
                request, _ = plan[row]
                pre, query, _ = (x[i] for x in facts[row])
                chunk = Chunk(request.computed, int(ring[row]), table[row])
                paged.prefill(chunk, query, pre, kv, store, config, self.scale)
            if decodes:
                position = torch.tensor([r.computed for r, _ in plan[:decodes]])
                pre, query = (torch.cat([x[j][i] for x in facts[:decodes]]) for j in (0, 1))
                held = Rows(position, ring[:decodes], first[:decodes], torch.ones(decodes), table[:decodes])
                results.append(paged.decode(held, query, pre, kv, store, config, self.scale))
        return results

    def _device(self, plan, facts, decodes) -> None:
        for row in range(decodes, len(plan)):
            self._seed(plan[row], facts[row], row)
        if not decodes:
            return
        self.query.fill_(torch.nan), self.out.fill_(torch.nan)
        self.query[:, :decodes] = torch.cat([query for _, query, _ in facts[:decodes]], 1).to(DEVICE)
        # Steps that also prefill are not replayed.
        size = min((s for s in self.graphs if s >= decodes), default=None) if decodes == len(plan) else None
        rows = self.decoder.rows(self.blocks[: size or decodes])
        self.decoder.begin_step(rows, self.kv[0])
        if size:
            self.graphs[size].replay()
            self.replays += 1
            self.seen["padded rows"] += size - decodes
        else:
            self._decode(rows)

    def _seed(self, item, facts, row: int) -> None:
        """Record the end of a chunk, given attention cut to the prefix as FlashInfer would give it."""
        s, (request, stop) = self.setup, item
        begin = max(request.computed, stop - s.window)
        position = torch.arange(begin, stop)
        table = torch.tensor(request.blocks)
        first = self.decoder.geometry.prefix_start
        end = position + 1 - s.band
        token = torch.arange(stop)
        ints = lambda x: torch.as_tensor(x).int().to(DEVICE)
        n = stop - begin
        seeds = Seeds(ints(torch.arange(n)), ints([row] * n), ints(position), self.rings, self.blocks)
        for i in range(LAYERS):
            key, value = paged.gather(self.plain_kv[i], table, token)
            query = facts[1][i][-n:]
            grouped = query.float().view(n, s.kv_heads, s.group, s.d).permute(1, 2, 0, 3).flatten(1, 2)
            part = paged.attend(grouped, key, value, token, torch.tensor(first), end.repeat(s.group), self.scale)
            by_head = lambda x: x.unflatten(1, (s.group, n)).movedim(2, 0).flatten(1, 2).contiguous().to(DEVICE)
            prefix = by_head(part.out).to(s.dtype), by_head(part.lse) / torch.tensor(2.0).log().item()
            record_prefill(self.layers[i], seeds, query.to(DEVICE), self.kv[i], *prefix, self.scale)

    def _compare(self, plan, expected, decodes) -> None:
        if not decodes:
            return
        out = self.out.cpu().float()
        assert not out[:, :decodes].isnan().any(), "a row read what had been freed"
        assert out[:, decodes:].isnan().all(), "a padded row was written"
        for i, want in enumerate(expected):
            error = (out[i, :decodes] - want.out).abs().max()
            self.worst = max(self.worst, float(error))
            assert error <= self.bound(), (self.step_no, i, float(error), self.bound())
            length = torch.tensor([r.computed + 1 for r, _ in plan[:decodes]])
            short, hits = length < self.config.min_context, want.hit.sum(1) * self.setup.group
            read = want.read.sum()
            values = {
                Count.HIT: hits.sum(), Count.MISS: (self.heads - hits)[~short].sum(),
                Count.SHORT_CONTEXT: short.sum() * self.heads, Count.READ: read,
                Count.SKIPPED: length.sum() * self.setup.kv_heads - read,
            }  # fmt: skip
            for name, value in values.items():  # the others stay 0
                self.wanted[i, name] += value

    def bound(self) -> float:
        """How far two evaluations of one step may lie apart, both elements of outputs.

        Rounded to the model's dtype, each at most by `u V`, `V` the largest |value|: the weights,
        the miss engine's output, or the prefix that a ring was seeded with, and the output. An
        engine that adds up rounded weights errs in its LSE by `u`. Merges average these errors,
        and every link of a chain rounds once to the ring's dtype. The rest is float32.
        """
        if not hasattr(self, "_bound"):
            s, kv = self.setup, self.plan.kv
            u, ring = torch.finfo(s.dtype).eps / 2, torch.finfo(s.ring_dtype).eps / 2
            links, n = self.config.max_chain + 1, self.setup.pool * self.size
            sigma = largest_score((self.plan.topic.abs() + STEP * PHASES)[::97], kv[::97, 0, 0, : s.d], self.scale)
            largest = float(kv[..., s.d :].abs().max())
            self._bound = largest * (4 * u + links * ring + 2 * decode_error(min(n, 1024), s.d, sigma, links))
        return self._bound


def check(setup: Setup, seed: int = 0) -> Run:
    """Run to the end and check that everything the module speaks of has happened."""
    run = Run(setup, seed)
    while (run.replays if setup.graphs else run.step_no) < setup.steps:
        run.step()
    assert run.counts.tolist() == run.wanted.tolist(), "other heads hit than in the plain result"
    counts = dict(zip(Count, run.counts.sum(0).tolist(), strict=True))
    decoded = sum(counts[name] for name in Count if name not in (Count.READ, Count.SKIPPED))
    assert counts[Count.HIT] > decoded / 5 and counts[Count.MISS] > decoded / 20, counts
    assert counts[Count.SKIPPED] > counts[Count.READ] / 20, counts
    scale = max(1, setup.steps // 50)
    least = {
        "preempted": max(1, scale // 2),
        "prefix found": scale,
        "poisoned rings": scale,
        "poisoned blocks": 5 * scale,
    }
    if setup.graphs:
        least["padded rows"] = setup.steps // 4
    assert all(run.seen[what] >= n for what, n in least.items()), (least, run.seen)
    assert run.arrived > scale
    return run


@pytest.mark.cpu
def test_steps_under_the_interpreter():
    """Few steps, for they are slow here: with this seed all that `check` asks for happens in them."""
    check(Setup(
        steps=30, rows=3, prompt=(12, 60), pool=20, chunk=24, window=16, band=8, min_context=24, page=8, d=32,
        dtype=FP16, ring_dtype=FP16, sink=3, group=2,
    ))  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("engine, steps, sink, dtype, ring_dtype, chunk", [
    ("triton", 1000, 0, FP16, FP16, 1000),
    ("triton", 1000, 20, BF16, FP32, 100),
    ("flashinfer", 300, 20, FP16, FP16, 100),
])  # fmt: skip
def test_a_thousand_replays(engine, steps, sink, dtype, ring_dtype, chunk):
    """Prompts are read in one step or in several; the captured sizes are 1, 2, 4 and 8."""
    if engine == "flashinfer":
        pytest.importorskip("flashinfer", reason="FlashInfer's engine")
    run = check(Setup(
        steps=steps, rows=8, prompt=(100, 300), pool=80, chunk=chunk, window=64, band=32, min_context=128, page=16, d=64,
        dtype=dtype, ring_dtype=ring_dtype, sink=sink, graphs=(1, 2, 4, 8), engine=engine,
    ))  # fmt: skip
    assert engine == "triton" or run.decoder._misses.device_planned
