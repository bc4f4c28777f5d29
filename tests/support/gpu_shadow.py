"""Runs `paged` beside the CUDA engine, on the very queries, keys and values that each layer had.

    with shadow(llm) as watch:
        run_schedule(llm, events)

As in `shadow`, each ring has a copy here, and the tokens that it was recorded from, which must be those of
whoever reads it. Both sides start every step from the same entries: what the engine recorded is copied once
it was judged, so one step's rounding is all that may lie between them. Entries that a row may read must be,
bit for bit, those that were copied.

For engines in eager mode (a graph runs no Python) on Model Runner V2.
"""

from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from support.engine import worker
from support.rounding import decode_error
from support.spans import Span, Texts
from vllm_mac import paged, requests
from vllm_mac.limits import limit, relief
from vllm_mac.state import Chunk, RingStore, Rows

FLOAT32 = 2.0**-24


@dataclass
class Watch:
    """Sums over all layers. heads: by outcome, as the engine counts them. ties: heads whose choice rounding decides.
    empty: rows that were given a ring with nothing in it.

    worst: largest error of a decode row, a prefill row and an entry, each over what rounding allows.
    """

    rows: int = 0
    chunks: int = 0
    hit: int = 0
    miss: int = 0
    exact: int = 0
    read: int = 0
    skipped: int = 0
    ties: int = 0
    empty: int = 0
    worst: dict = field(default_factory=lambda: {"decode": 0.0, "prefill": 0.0, "entry": 0.0})
    spans: dict = field(default_factory=dict)  # (ring, layer) -> Span
    stores: dict = field(default_factory=dict)  # layer -> RingStore

    def judge(self, what: str, error: torch.Tensor, bound) -> None:
        share = float((error / bound).max()) if error.numel() else 0.0
        assert share <= 1, f"{what}: {share:.2f} times what rounding allows"  # NaN fails
        self.worst[what] = max(self.worst[what], share)


@contextmanager
def shadow(llm):
    from vllm_mac import cuda

    runner, watch, facts = worker(llm).model_runner, Watch(), {}
    texts = Texts(runner)
    prepare, forward, build = runner.prepare_inputs, cuda.MacCUDAImpl.forward, cuda.MacCUDAMetadataBuilder._build

    def prepare_inputs(*args, **kwargs):
        batch = prepare(*args, **kwargs)
        facts["names"], facts["inputs"] = list(batch.req_ids), batch.input_ids
        return batch

    def watched_build(builder, common, fast_build, capture):
        facts["common"], facts["rings"], facts["tokens"] = common, requests.row_rings(common), None
        return build(builder, common, fast_build, capture)

    def watched(impl, layer, query, key, value, kv_cache, metadata, output, **scales):
        if metadata is None or not impl.mac.served:
            return forward(impl, layer, query, key, value, kv_cache, metadata, output, **scales)
        step = Step(watch, impl, query, kv_cache, metadata, facts, texts)
        step.before()
        result = forward(impl, layer, query, key, value, kv_cache, metadata, output, **scales)
        step.after(output)
        return result

    runner.prepare_inputs = prepare_inputs
    cuda.MacCUDAImpl.forward, cuda.MacCUDAMetadataBuilder._build = watched, watched_build
    try:
        yield watch
    finally:
        cuda.MacCUDAImpl.forward, cuda.MacCUDAMetadataBuilder._build = forward, build
        del runner.prepare_inputs


class Step:
    """One layer's step: rows `[begin[i], begin[i + 1])` of the batch, which end at `length[i]`."""

    def __init__(self, watch, impl, query, kv, metadata, facts, texts):
        self.watch, self.mac, self.scale, self.query, self.kv = watch, impl.mac, impl.scale, query, kv
        self.metadata, self.device = metadata, query.device
        names, common = facts["names"], facts["common"]
        rows = len(names)
        self.begin = common.query_start_loc[: rows + 1].tolist()
        self.length = common.seq_lens[:rows].tolist()
        self.start = [n - (e - b) for n, b, e in zip(self.length, self.begin, self.begin[1:])]
        self.prompt = common.is_prefilling[:rows].tolist()
        self.table = common.block_table_tensor
        self.decodes = min(metadata.num_decodes, rows)
        assert all(e - b == 1 for b, e in zip(self.begin[: self.decodes], self.begin[1:]))
        if facts["tokens"] is None:
            pieces = [facts["inputs"][b:e].tolist() for b, e in zip(self.begin, self.begin[1:])]
            facts["tokens"] = [texts.of(name, start, piece) for name, start, piece in zip(names, self.start, pieces)]
        if self.mac.name not in watch.stores:
            theirs = self.mac.state.store.query
            rings, heads, window, d = theirs.shape
            store = RingStore.allocate(rings, heads, window, d, theirs.dtype, self.device)
            store.out.fill_(torch.nan), store.lse.fill_(torch.nan)
            watch.stores[self.mac.name] = store
        self.store = watch.stores[self.mac.name]
        held = facts["rings"]
        self.ring = [-1 if skips else int(ring) for ring, skips in zip(held.ring[:rows], held.skips)]
        step = metadata.step
        given = step.rows.ring[: self.decodes].tolist()
        if step.seeding is not None:
            given += step.seeding.seeds.ring[self.decodes : rows].tolist()
        assert given == self.ring[: len(given)], "the device has other rings than the host"
        self.first = [None] * rows
        for row, ring in enumerate(self.ring):
            assert (ring >= 0) == (self.length[row] >= self.mac.config.min_context), "a ring too many or too few"
            if ring >= 0:
                span = watch.spans.setdefault((ring, self.mac.name), Span())
                span.begin(self.start[row], facts["tokens"][row], bool(held.fresh[row]), self.mac.config.window)
                self.first[row] = span.first
                span.end(self.length[row], facts["tokens"][row])
                watch.empty += bool(held.fresh[row])

    def before(self) -> None:
        """What the decoding rows may read is what was recorded for them."""
        window = self.mac.config.window
        for row in range(self.decodes):
            first, ring, m = self.first[row], self.ring[row], self.start[row]
            if ring < 0 or self.prompt[row]:
                continue
            slot = torch.arange(max(first, m - window, 0), m, device=self.device) % window
            for name in ("query", "out", "lse", "chain"):
                ours, engine = getattr(self.store, name)[ring], getattr(self.mac.state.store, name)[ring]
                assert torch.equal(ours[:, slot], engine[:, slot]), f"{name} of another request's ring"

    def after(self, output) -> None:
        with self.device:  # `paged` makes its index tensors there
            if self.decodes:
                self._decode(output)
            for row in range(self.decodes, len(self.ring)):
                self._prefill(row, output)

    def _bounds(self, row: int):
        """`(u V, float32 rest)`: see `test_graph_steps.Run.bound`; V over the row's own values."""
        n = self.length[row]
        key, value = paged.gather(self.kv, self.table[row], torch.arange(n, device=self.device))
        query = self.query[self.begin[row] : self.begin[row + 1]].float()
        sigma = float(query.norm(dim=-1).max() * key.norm(dim=-1).max()) * self.scale
        largest = float(value.abs().max())
        unit = torch.finfo(self.query.dtype).eps / 2
        # Weights below float16's smallest normal number are off by up to half its smallest step each.
        tiny = n * 2.0**-25 if self.query.dtype == torch.float16 else 0.0
        return largest * (unit + tiny), largest * 2 * decode_error(n, query.shape[-1], sigma, 0), sigma

    def _decode(self, output) -> None:
        mac, config, n = self.mac, self.mac.config, self.decodes
        ints = lambda x: torch.tensor(x, dtype=torch.int64)
        position = ints(self.start[:n])
        ring = ints(self.ring[:n])
        first = ints([
            first if first is not None and not prompt else stop
            for first, prompt, stop in zip(self.first[:n], self.prompt, self.length)
        ])  # fmt: skip
        query = self.query[:n]
        pre = mac.rotary.undo(query, position)
        distance = self._distances(pre, position, ring)
        held = Rows(position, ring, first, torch.ones(n), self.table[:n])
        want = paged.decode(held, query, pre, self.kv, self.store, config, self.scale)
        work = self.metadata.step.decoder._work
        found, hit = work.source[:n].long(), work.hit[:n].bool()
        same = (found == want.source).view(n, mac.num_kv_heads, -1).all(-1)
        rest = paged.band_and_sink(position, query, self.kv, self.table[:n], config, self.scale)
        self._ties(found, want.source, distance, pre, rest.lse)
        assert torch.equal(hit[same], want.hit[same])
        for row in range(n):
            rounding, rest, sigma = self._bounds(row)
            groups = same[row].repeat_interleave(mac.num_heads // mac.num_kv_heads)
            error = (output[row].float().view_as(want.out[row]) - want.out[row]).abs()[groups]
            self.watch.judge("decode", error, 5 * rounding + rest)
            if self.ring[row] >= 0:
                slot = position[row : row + 1] % config.window
                self._entries(row, slot, groups, rounding, rest, sigma)
        self._count(position, ring, hit, found)

    def _distances(self, pre, position, ring):
        """`[B, H, W]` squared distance of each query to each slot, before this step writes one."""
        return ((pre[:, :, None] - self.store.query[ring.clamp(min=0)].float()) ** 2).sum(-1)

    def _ties(self, found, wanted, distance, pre, rest_lse) -> None:
        """Where the choices differ, rounding must be what decides between them, or against the limit."""
        config, d = self.mac.config, pre.shape[-1]
        differ = (found != wanted).nonzero().tolist()
        bound = limit(d, config)
        for row, head in differ:
            picked = [p for p in (int(found[row, head]), int(wanted[row, head])) if p >= 0]
            scores, rounded = [], 0.0
            for p in picked:
                at = float(distance[row, head, p % config.window])
                size = float(pre[row, head].norm()) + at**0.5
                lag = self.start[row] - p
                scores.append(at + config.lag_weight * lag / config.window * bound)
            if len(picked) == 1:  # one side took it and the other did not
                lse = float(self.store.lse[self.ring[row], head, picked[0] % config.window])
                mass = float(torch.sigmoid(torch.tensor(lse) - rest_lse[row, head].cpu()))
                scores = [at, bound * relief(mass, config)]
                # The limit follows an LSE's error at most twofold; for that error see `_entries`.
                _, _, sigma = self._bounds(row)
                rounded = scores[1] * 4 * FLOAT32 * (self.length[row] + (d + 8) * sigma + 32)
            # d differences of numbers that are rounded by themselves, squared and added up.
            assert abs(scores[0] - scores[1]) <= 8 * d * FLOAT32 * (size**2 + bound) + rounded, (scores, bound)
        self.watch.ties += len(differ)

    def _entries(self, row, slot, heads, rounding, rest, sigma) -> None:
        """Judge what the engine recorded at `slot`, of the given heads, and take it over."""
        store, ours, theirs = self.mac.state.store, self.ring[row], self.ring[row]
        part = lambda s, name, ring: getattr(s, name)[ring][:, slot]
        unit = torch.finfo(store.query.dtype).eps / 2
        mine, its = part(self.store, "query", ours)[heads].float(), part(store, "query", theirs)[heads].float()
        self.watch.judge("entry", (mine - its).abs(), 2.1 * unit * mine.abs() + 16 * FLOAT32 * mine.norm(dim=-1).amax())
        mine, its = part(self.store, "lse", ours)[heads], part(store, "lse", theirs)[heads]
        some = mine > -torch.inf
        assert torch.equal(some, its > -torch.inf)
        # FlashInfer adds up weights that are already rounded, and gives its LSE in base 2.
        weights = torch.finfo(self.query.dtype).eps
        n, d = self.length[row], store.query.shape[-1]
        allowed = weights + 2 * FLOAT32 * (n + (d + 8) * sigma + 32)
        self.watch.judge("entry", (mine - its)[some].abs(), allowed)
        mine, its = part(self.store, "out", ours)[heads].float(), part(store, "out", theirs)[heads].float()
        self.watch.judge("entry", (mine - its)[some].abs(), 5 * rounding + rest + 2 * unit * mine[some].abs())
        assert torch.equal(part(self.store, "chain", ours)[heads], part(store, "chain", theirs)[heads])
        for name in ("query", "out", "lse", "chain"):
            getattr(self.store, name)[ours, :, slot] = getattr(store, name)[theirs, :, slot]

    def _prefill(self, row: int, output) -> None:
        mac, window = self.mac, self.mac.config.window
        b, e, ring = self.begin[row], self.begin[row + 1], self.ring[row]
        position = torch.arange(self.start[row], self.length[row])
        pre = mac.rotary.undo(self.query[b:e], position)
        chunk = Chunk(self.start[row], ring, self.table[row])
        want = paged.prefill(chunk, self.query[b:e], pre, self.kv, self.store, mac.config, self.scale)
        rounding, rest, sigma = self._bounds(row)
        self.watch.judge("prefill", (output[b:e].float().view_as(want) - want).abs(), 5 * rounding + rest)
        if ring >= 0:
            heads = torch.ones(mac.num_heads, dtype=torch.bool)
            self._entries(row, position[-window:] % window, heads, rounding, rest, sigma)
        self.watch.chunks += 1

    def _count(self, position, ring, hit, source) -> None:
        mac, watch, config = self.mac, self.watch, self.mac.config
        group = mac.num_heads // mac.num_kv_heads
        tried = ((position + 1 >= config.min_context) & (ring >= 0))[:, None].expand_as(hit)
        assert not hit[~tried].any()
        watch.hit += int(hit.sum()) * group
        watch.miss += int((~hit & tried).sum()) * group
        watch.exact += int((~tried).sum()) * group
        length = (position + 1)[:, None].expand_as(hit)
        begin = source.view(*hit.shape, group).amin(-1) + 1 - config.band
        read = torch.where(hit, length - begin + config.sink, length)
        watch.read += int(read.sum())
        watch.skipped += int((length - read).sum())
        watch.rows += len(position)
